"""The scene reward: what a prompt asks for, measured from the pixels. Gold for the embedded model.

Source: GenEval's six tasks (arXiv 2310.11513), read without a detector because the scenes are drawn
on a plain background: segment, label connected components, compare each with the drawn shapes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from steer.rewards.scene_language import COLOURS, RELATIONS, SHAPES, SceneRequest, parse
from steer.rewards.scene_shapes import coverage

FOREGROUND = (
    0.35  # distance in RGB from the background at which a pixel belongs to an object: under half of any colour's
)
SMALLEST = 0.008  # of the image's area: smaller specks are no objects
TEMPLATE = 32  # pixels per side at which outlines are compared
SIMILAR = 0.72  # intersection over union that makes an outline a shape
NEAR = 0.33  # distance in RGB within which a colour has a name


@dataclass(frozen=True)
class Object:
    """One connected component: centre (x, y) in pixels; shape and colour None where nothing fits."""

    colour: str | None
    shape: str | None
    x: float
    y: float


@cache
def _templates() -> tuple[np.ndarray, ...]:
    """The outline of each shape, cut to its bounding box and stretched to a square."""
    drawn = (coverage(shape, 64, 32, 32, 28) > 0.5 for shape in SHAPES)
    return tuple(_stretch(mask[ndimage.find_objects(mask.astype(int))[0]]) for mask in drawn)


def _stretch(mask: np.ndarray) -> np.ndarray:
    rows, columns = ((np.arange(TEMPLATE) + 0.5) * n / TEMPLATE - 0.5 for n in mask.shape)
    grid = np.meshgrid(rows, columns, indexing="ij")
    return ndimage.map_coordinates(mask.astype(np.float32), grid, order=1, mode="nearest") > 0.5


def _shape_of(mask: np.ndarray) -> str | None:
    """The shape whose outline fits best, if it fits."""
    height, width = mask.shape
    if max(height, width) > 1.5 * min(height, width):
        return None
    outline = _stretch(mask)
    scores = [(outline & shape).sum() / (outline | shape).sum() for shape in _templates()]
    best = int(np.argmax(scores))
    return SHAPES[best] if scores[best] >= SIMILAR else None


def _colour_of(pixels: np.ndarray) -> str | None:
    names, palette = list(COLOURS), np.array(list(COLOURS.values()))
    distance = np.linalg.norm(palette - np.median(pixels, axis=0), axis=1)
    return names[distance.argmin()] if distance.min() < NEAR else None


def objects(image: np.ndarray) -> list[Object]:
    """Finds the objects of an image (H, W, 3) in [0, 1]: components that differ from its border's colour."""
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    contrast = np.linalg.norm(image - np.median(border, axis=0), axis=-1)
    labels, _ = ndimage.label(contrast > FOREGROUND, structure=np.ones((3, 3)))
    found = []
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        mask = labels == label
        # Half the contrast: where a soft edge really runs.
        mask[box] &= contrast[box] > contrast[box][mask[box]].max() / 2
        if mask.sum() < SMALLEST * contrast.size:
            continue
        rows, columns = np.nonzero(mask)
        outline = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        inner = ndimage.binary_erosion(mask)
        colour = _colour_of(image[inner if inner.any() else mask])
        found.append(Object(colour, _shape_of(outline), float(columns.mean()), float(rows.mean())))
    return found


def requirements(request: SceneRequest, found: Sequence[Object]) -> list[bool]:
    """What the request asks for, one truth value each: how many objects, of each kind, of which colour, and where."""
    kinds = [[thing for thing in found if thing.shape == phrase.shape] for phrase in request.phrases]
    holds = [len(found) == sum(phrase.count for phrase in request.phrases)]
    for phrase, kind in zip(request.phrases, kinds, strict=True):
        holds.append(len(kind) == phrase.count)
        if phrase.colour:
            holds.append(sum(thing.colour == phrase.colour for thing in kind) == phrase.count)
    if request.relation:
        holds.append(any(_related(a, b, request.relation) for a in kinds[0] for b in kinds[1]))
    return holds


def _related(a: Object, b: Object, relation: str) -> bool:
    sx, sy = RELATIONS[relation]
    dx, dy = a.x - b.x, a.y - b.y
    return dx * sx + dy * sy > abs(dx * sy) + abs(dy * sx)


class SceneReward:
    """Fraction of the prompt's requirements that the picture meets: 0..1, 1 only when all hold.

    Piecewise constant in the pixels, so it evaluates; `SceneSoftReward` steers. Prompts outside the
    language of `steer.rewards.scene_language` raise RewardError.
    """

    name = "scene"
    differentiable = False

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        pictures = images.detach().float().cpu().permute(0, 2, 3, 1).numpy()
        scores = [
            float(np.mean(requirements(parse(prompt), objects(picture))))
            for picture, prompt in zip(pictures, prompts, strict=True)
        ]
        return torch.tensor(scores, dtype=torch.float32)
