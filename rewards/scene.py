"""The scene reward: the requirements of a prompt, checked on the pixels. Ground truth for the embedded model.

Source: GenEval's six tasks (arXiv 2310.11513). No detector is needed because scenes have a plain background: segment,
label connected components, compare each with the known shapes.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from steer.reward import RewardError
from steer.rewards.inputs import rows_by_prompt, takes_any_images

COLOURS = {
    "red": (0.86, 0.12, 0.14),
    "green": (0.13, 0.62, 0.24),
    "blue": (0.14, 0.34, 0.90),
    "yellow": (0.97, 0.80, 0.10),
    "purple": (0.60, 0.20, 0.76),
    "black": (0.09, 0.09, 0.11),
}
SHAPES = ("circle", "square", "triangle", "cross", "star")
PLURALS = {"crosses": "cross"} | {f"{shape}s": shape for shape in SHAPES if shape != "cross"}
NUMBERS = {"a": 1, "one": 1, "two": 2, "three": 3, "four": 4}
# Direction from the second object to the first, in image coordinates (y points down).
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
MIRRORED = {"right of": "left of", "below": "above"}

_PHRASE = re.compile(
    rf"(?P<count>{'|'.join(NUMBERS)}) (?:(?P<colour>{'|'.join(COLOURS)}) )?"
    rf"(?P<shape>{'|'.join((*PLURALS, *SHAPES))})"
)
_JOIN = re.compile(rf" (and|{'|'.join(RELATIONS)}) ")
_PREFIX = re.compile(r"^(?:a (?:photo|picture|drawing|scene) (?:of|with) )")


@dataclass(frozen=True, order=True)
class Phrase:
    """`count` objects of one shape, all of one colour (None: any)."""

    count: int
    colour: str | None
    shape: str

    def __str__(self) -> str:
        plural = {shape: word for word, shape in PLURALS.items()}
        number = next(word for word, count in NUMBERS.items() if count == self.count)
        noun = self.shape if self.count == 1 else plural[self.shape]
        return " ".join(word for word in (number, self.colour, noun) if word)


@dataclass(frozen=True)
class SceneRequest:
    """One phrase, or two of different shapes, joined by "and" or by a relation."""

    phrases: tuple[Phrase, ...]
    relation: str | None = None

    @property
    def task(self) -> str:
        """Return the GenEval task of this request."""
        if self.relation:
            return "position"
        coloured = any(phrase.colour for phrase in self.phrases)
        if len(self.phrases) == 2:
            return "color_attr" if coloured else "two_object"
        if self.phrases[0].count > 1:
            return "counting"
        return "colors" if coloured else "single_object"

    @property
    def canonical(self) -> "SceneRequest":
        """Return the same scene in one wording: "B right of A" is "A left of B", "B and A" is "A and B"."""
        if self.relation in MIRRORED:
            return SceneRequest(self.phrases[::-1], MIRRORED[self.relation])
        return self if self.relation else replace(self, phrases=tuple(sorted(self.phrases, key=str)))

    @property
    def wordings(self) -> tuple["SceneRequest", ...]:
        """Return all wordings of the same scene, the canonical one first."""
        one = self.canonical
        mirrored = {canonical: relation for relation, canonical in MIRRORED.items()}
        other = SceneRequest(one.phrases[::-1], mirrored[one.relation] if one.relation else None)
        return (one,) if len(one.phrases) == 1 else (one, other)

    def __str__(self) -> str:
        return f" {self.relation or 'and'} ".join(map(str, self.phrases))


def parse(prompt: str) -> SceneRequest:
    """Parse a prompt; the inverse of `str(request)`. Raises RewardError for anything else."""
    words = re.sub(r"\s+", " ", prompt.strip().strip(".").lower())
    words = _PREFIX.sub("", words).replace(" to the left of ", " left of ").replace(" to the right of ", " right of ")
    head, *tail = _JOIN.split(words)
    matches = [match for part in (head, *tail[1::2]) if (match := _PHRASE.fullmatch(part))]
    phrases = tuple(
        Phrase(NUMBERS[match["count"]], match["colour"], PLURALS.get(match["shape"], match["shape"]))
        for match in matches
    )
    if len(phrases) < 1 + len(tail) // 2 or len(phrases) > 2 or len({one.shape for one in phrases}) < len(phrases):
        raise RewardError(
            f"the scene reward cannot read {prompt!r}: it asks for one kind of object or two different ones, like "
            f"'three red circles' or 'a red circle left of a blue star' (colours: {', '.join(COLOURS)}; "
            f"shapes: {', '.join(SHAPES)}; joined by: and, {', '.join(RELATIONS)})"
        )
    return SceneRequest(phrases, tail[0] if tail and tail[0] in RELATIONS else None)


Array = np.ndarray


def _star(u: Array, v: Array) -> Array:
    # A pentagram: the points that at most one of its five lines cuts off from the centre.
    angles = [math.pi / 2 + k * 2 * math.pi / 5 for k in range(5)]
    cut_off = sum((math.cos(a) * u + math.sin(a) * v > 0.4).astype(int) for a in angles)
    return (cut_off <= 1) & (u**2 + v**2 <= 1.2)


INSIDE: dict[str, Callable[[Array, Array], Array]] = {
    "circle": lambda u, v: u**2 + v**2 <= 1,
    "square": lambda u, v: np.maximum(abs(u), abs(v)) <= 0.88,
    "triangle": lambda u, v: (abs(u) <= (v + 0.95) / 1.9) & (v <= 0.95),
    "cross": lambda u, v: (np.minimum(abs(u), abs(v)) <= 0.32) & (np.maximum(abs(u), abs(v)) <= 1),
    "star": _star,
}


def coverage(shape: str, size: int, x: float, y: float, radius: float, oversample: int = 4) -> Array:
    """Return the share 0..1 of each pixel of a (size, size) image that the shape at (x, y) covers."""
    grid = (np.arange(size * oversample) + 0.5) / oversample
    u, v = np.meshgrid((grid - x) / radius, (grid - y) / radius)
    inside = INSIDE[shape](u, v).astype(np.float32)
    return inside.reshape(size, oversample, size, oversample).mean((1, 3))


FOREGROUND = 0.35  # RGB distance of an object's pixels from the background: less than half of any colour's
SMALLEST = 0.008  # share of the image's area: smaller components are ignored
TEMPLATE = 32  # pixels per side at which outlines are compared
SIMILAR = 0.72  # intersection over union from which an outline counts as a shape
NEAR = 0.33  # distance in RGB within which a colour has a name


@dataclass(frozen=True)
class Object:
    """One connected component: centre (x, y) in pixels; shape and colour are None if nothing matches."""

    colour: str | None
    shape: str | None
    x: float
    y: float


@cache
def _templates() -> tuple[np.ndarray, ...]:
    """Return the outline of each shape, cut to its bounding box and stretched to a square."""
    masks = (coverage(shape, 64, 32, 32, 28) > 0.5 for shape in SHAPES)
    return tuple(_stretch(mask[ndimage.find_objects(mask.astype(int))[0]]) for mask in masks)


def _stretch(mask: np.ndarray) -> np.ndarray:
    rows, columns = ((np.arange(TEMPLATE) + 0.5) * n / TEMPLATE - 0.5 for n in mask.shape)
    grid = np.meshgrid(rows, columns, indexing="ij")
    return ndimage.map_coordinates(mask.astype(np.float32), grid, order=1, mode="nearest") > 0.5


def _shape_of(mask: np.ndarray) -> str | None:
    """Return the shape with the best matching outline, or None if none matches well enough."""
    if max(mask.shape) > 1.5 * min(mask.shape):
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
    """Detect the objects of an image (H, W, 3) in [0, 1]: components that differ from its border's colour."""
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    contrast = np.linalg.norm(image - np.median(border, axis=0), axis=-1)
    labels, _ = ndimage.label(contrast > FOREGROUND, structure=np.ones((3, 3)))
    detected = []
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        mask = labels == label
        # Half the contrast: the middle of a soft edge.
        mask[box] &= contrast[box] > contrast[box][mask[box]].max() / 2
        if mask.sum() < SMALLEST * contrast.size:
            continue
        rows, columns = np.nonzero(mask)
        outline = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        inner = ndimage.binary_erosion(mask)
        colour = _colour_of(image[inner if inner.any() else mask])
        detected.append(Object(colour, _shape_of(outline), float(columns.mean()), float(rows.mean())))
    return detected


def requirements(request: SceneRequest, detected: Sequence[Object]) -> dict[str, bool]:
    """Evaluate each requirement of a request: number of objects, of each kind, of each colour, and position."""
    kinds = [[thing for thing in detected if thing.shape == phrase.shape] for phrase in request.phrases]
    total = sum(phrase.count for phrase in request.phrases)
    holds = {f"{total} object{'s' * (total > 1)}": len(detected) == total}
    for phrase, kind in zip(request.phrases, kinds, strict=True):
        holds[str(replace(phrase, colour=None))] = len(kind) == phrase.count
        if phrase.colour:
            holds[str(phrase)] = sum(thing.colour == phrase.colour for thing in kind) == phrase.count
    if request.relation:
        sx, sy = RELATIONS[request.relation]
        offsets = [(a.x - b.x, a.y - b.y) for a in kinds[0] for b in kinds[1]]
        holds[request.relation] = any(dx * sx + dy * sy > abs(dx * sy) + abs(dy * sx) for dx, dy in offsets)
    return holds


class SceneReward:
    """Fraction 0..1 of the prompt's requirements that the image meets.

    Piecewise constant in the pixels, for evaluation; `SceneSoftReward` is for steering. Prompts outside the grammar of
    `steer.rewards.scene` raise RewardError.
    """

    name = "scene"
    differentiable = False

    @takes_any_images
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return torch.tensor([np.mean([*one.values()]) for one in self.checklist(images, prompts)], dtype=torch.float32)

    def checklist(self, images: Tensor, prompts: Sequence[str]) -> list[dict[str, bool]]:
        """Return the requirements of each prompt, and whether its image (N, 3, H, W) meets them."""
        arrays = images.detach().float().cpu().permute(0, 2, 3, 1).numpy()
        return [requirements(parse(prompt), objects(array)) for array, prompt in zip(arrays, prompts, strict=True)]


SIDE = 32  # pixels per side at which templates are compared
RADII = (4.0, 4.5, 5.0, 5.5, 6.0, 6.5)  # radii of the templates, in these pixels
TEMPLATE_RADIUS = 8  # half the side of a template, pixels
TOLERANCE = 0.3  # distance in RGB at which a colour counts for e^(-1/2)
MARGIN = 0.04  # lead over the next shape at which a shape has confidence 0.73
PEAK_WINDOW = 7  # pixels per side; only the strongest match in it counts as an object
RELATION_SCALE = 2.0  # pixels by which a relation must hold for the degree 0.73


@cache
def _soft_templates() -> Tensor:
    """Return (5 shapes · 6 radii, 1, 17, 17): mean inside the shape minus mean in the frame around it."""
    side, kernels = 2 * TEMPLATE_RADIUS + 1, []
    grid = abs(np.arange(side) - TEMPLATE_RADIUS)
    for shape in SHAPES:
        for radius in RADII:
            inside = coverage(shape, side, TEMPLATE_RADIUS + 0.5, TEMPLATE_RADIUS + 0.5, radius)
            frame = (np.maximum(grid[:, None], grid[None]) <= radius + 2.5) * (1 - inside)
            kernels.append(inside / inside.sum() - frame / frame.sum())
    return torch.from_numpy(np.stack(kernels)).float()[:, None]


def _matches(maps: Tensor) -> Tensor:
    """Match each shape at each position: (N, H, W) → (N, 5, H, W), the best of all radii."""
    responses = F.conv2d(maps[:, None], _soft_templates().to(maps.device), padding=TEMPLATE_RADIUS)
    return responses.unflatten(1, (len(SHAPES), len(RADII))).amax(2)


def _shape_confidence(matches: Tensor, shape: str) -> Tensor:
    """Return the match of one shape, discounted where another shape matches better: (N, H, W) in 0..1."""
    mine = SHAPES.index(shape)
    own = matches[:, mine]
    others = matches[:, [k for k in range(len(SHAPES)) if k != mine]].amax(1)
    return own.clamp(min=0) * torch.sigmoid((own - others) / MARGIN)


def _peaks(places: Tensor, count: int) -> Tensor:
    """Return the `count` strongest local maxima of (N, H, W): (N, count), strongest first."""
    highest = F.max_pool2d(places[:, None], PEAK_WINDOW, stride=1, padding=PEAK_WINDOW // 2)[:, 0]
    return (places * (places >= highest)).flatten(1).topk(count).values


def _count_degree(places: Tensor, count: int) -> Tensor:
    """Return the degree (N,) in 0..1 of `count` strong matches and no further one."""
    peaks = _peaks(places, count + 1)
    return peaks[:, :count].mean(1) * (1 - peaks[:, count].clamp(0, 1))


def _centre(places: Tensor) -> Tensor:
    """Return the soft position of the strongest match: (N, 2) as x, y in pixels."""
    weights = (places.flatten(1) / 0.05).softmax(1).view_as(places)
    grid = torch.arange(SIDE, device=places.device, dtype=weights.dtype)
    return torch.stack([(weights.sum(1) * grid).sum(1), (weights.sum(2) * grid).sum(1)], 1)


def _relation_degree(first: Tensor, second: Tensor, relation: str) -> Tensor:
    """Return the degree (N,) in 0..1 to which the strongest matches of two maps stand in a relation."""
    sx, sy = RELATIONS[relation]
    dx, dy = (_centre(first) - _centre(second)).unbind(1)
    return torch.sigmoid((dx * sx + dy * sy - (dx * sy).abs() - (dy * sx).abs()) / RELATION_SCALE)


def soft_requirements(request: SceneRequest, images: Tensor) -> Tensor:
    """Evaluate the requirements of the exact reward on images (N, 3, 32, 32), as degrees (N, R) in 0..1."""
    palette = torch.tensor(list(COLOURS.values()), device=images.device)
    distance = (images[:, None] - palette[:, :, None, None]) ** 2
    affinity = torch.exp(-distance.sum(2) / (2 * TOLERANCE**2))  # of each pixel and each colour: (N, 6, H, W) in 0..1
    anything = _matches(affinity.amax(1))
    total = sum(phrase.count for phrase in request.phrases)
    degrees = [1 - _peaks(anything.amax(1), total + 1)[:, total].clamp(0, 1)]
    maps = []
    for phrase in request.phrases:
        places = _shape_confidence(anything, phrase.shape)
        degrees.append(_count_degree(places, phrase.count))
        if phrase.colour:
            coloured = _matches(affinity[:, list(COLOURS).index(phrase.colour)])
            places = _shape_confidence(coloured, phrase.shape)
            degrees.append(_count_degree(places, phrase.count))
        maps.append(places)
    if request.relation:
        degrees.append(_relation_degree(maps[0], maps[1], request.relation))
    return torch.stack(degrees, 1)


class SceneSoftReward:
    """Mean degree, 0..1, to which an image meets the prompt's requirements. Differentiable.

    Any image size; prompts outside the grammar of `steer.rewards.scene` raise RewardError.
    """

    name = "scene-soft"
    differentiable = True

    @takes_any_images
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        small = F.interpolate(images.float(), size=(SIDE, SIDE), mode="area")
        scores = small.new_zeros(len(prompts))
        for prompt, rows in rows_by_prompt(prompts).items():
            scores[rows] = soft_requirements(parse(prompt), small[rows]).mean(1)
        return scores
