"""The scene reward by template matching: graded, so that it tells blurry x̂0 apart, and differentiable."""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from steer.rewards.scene_language import COLOURS, RELATIONS, SHAPES, Phrase, SceneRequest, parse
from steer.rewards.scene_shapes import coverage

SIDE = 32  # pixels at which templates are compared
RADII = (4.0, 4.5, 5.0, 5.5, 6.0, 6.5)  # of the templates, in those pixels
REACH = 8  # half the side of a template
TOLERANCE = 0.3  # distance in RGB at which a colour counts for e^(-1/2)
MARGIN = 0.04  # lead over the next shape at which a shape is believed to 73 %
APART = 7  # window in which only the strongest match counts as an object
STEADY = 2.0  # pixels by which a relation must hold to be believed to 73 %


@cache
def _templates() -> Tensor:
    """(5 shapes · 6 radii, 1, 17, 17): mean inside the shape minus mean in the frame around it."""
    side, kernels = 2 * REACH + 1, []
    grid = abs(np.arange(side) - REACH)
    for shape in SHAPES:
        for radius in RADII:
            inside = coverage(shape, side, REACH + 0.5, REACH + 0.5, radius)
            frame = (np.maximum(grid[:, None], grid[None]) <= radius + 2.5) * (1 - inside)
            kernels.append(inside / inside.sum() - frame / frame.sum())
    return torch.from_numpy(np.stack(kernels)).float()[:, None]


def _affinity(images: Tensor) -> Tensor:
    """How much each pixel has each colour: (N, 6, H, W) in 0..1."""
    palette = torch.tensor(list(COLOURS.values()), device=images.device)
    distance = (images[:, None] - palette[:, :, None, None]) ** 2
    return torch.exp(-distance.sum(2) / (2 * TOLERANCE**2))


def _matches(maps: Tensor) -> Tensor:
    """How well each shape fits at each place: (N, H, W) → (N, 5, H, W), the best of all radii."""
    responses = F.conv2d(maps[:, None], _templates().to(maps.device), padding=REACH)
    return responses.unflatten(1, (len(SHAPES), len(RADII))).amax(2)


def _believed(matches: Tensor, shape: str) -> Tensor:
    """(N, H, W) in 0..1: the match of one shape, discounted where another fits better."""
    mine = SHAPES.index(shape)
    own = matches[:, mine]
    others = matches[:, [k for k in range(len(SHAPES)) if k != mine]].amax(1)
    return own.clamp(min=0) * torch.sigmoid((own - others) / MARGIN)


def _peaks(places: Tensor, count: int) -> Tensor:
    """The `count` strongest local maxima of (N, H, W): (N, count), strongest first."""
    highest = F.max_pool2d(places[:, None], APART, stride=1, padding=APART // 2)[:, 0]
    return (places * (places >= highest)).flatten(1).topk(count).values


def _exactly(places: Tensor, count: int) -> Tensor:
    """(N,) in 0..1: `count` strong matches and no further one."""
    peaks = _peaks(places, count + 1)
    return peaks[:, :count].mean(1) * (1 - peaks[:, count].clamp(0, 1))


def _centre(places: Tensor) -> Tensor:
    """Where the strongest match lies, softly: (N, 2) as x, y in pixels."""
    weights = (places.flatten(1) / 0.05).softmax(1).view_as(places)
    grid = torch.arange(SIDE, device=places.device, dtype=weights.dtype)
    return torch.stack([(weights.sum(1) * grid).sum(1), (weights.sum(2) * grid).sum(1)], 1)


def _holds(first: Tensor, second: Tensor, relation: str) -> Tensor:
    """(N,) in 0..1: how surely the strongest match of one map lies in a relation to that of the other."""
    sx, sy = RELATIONS[relation]
    dx, dy = (_centre(first) - _centre(second)).unbind(1)
    return torch.sigmoid((dx * sx + dy * sy - (dx * sy).abs() - (dy * sx).abs()) / STEADY)


def soft_requirements(request: SceneRequest, images: Tensor) -> Tensor:
    """The requirements of the exact reward, each as a degree (N, R) in 0..1, of images (N, 3, 32, 32)."""
    affinity = _affinity(images)
    anything = _matches(affinity.amax(1))
    wanted = sum(phrase.count for phrase in request.phrases)
    degrees = [1 - _peaks(anything.amax(1), wanted + 1)[:, wanted].clamp(0, 1)]
    maps = []
    for phrase in request.phrases:
        degrees.append(_exactly(_believed(anything, phrase.shape), phrase.count))
        places = _believed(_coloured(affinity, anything, phrase), phrase.shape)
        if phrase.colour:
            degrees.append(_exactly(places, phrase.count))
        maps.append(places)
    if request.relation:
        degrees.append(_holds(maps[0], maps[1], request.relation))
    return torch.stack(degrees, 1)


def _coloured(affinity: Tensor, anything: Tensor, phrase: Phrase) -> Tensor:
    if phrase.colour is None:
        return anything
    return _matches(affinity[:, list(COLOURS).index(phrase.colour)])


class SceneSoftReward:
    """Mean degree, 0..1, to which a picture meets the prompt's requirements. Differentiable.

    Any image size; prompts outside the language of `steer.rewards.scene_language` raise RewardError.
    """

    name = "scene-soft"
    differentiable = True

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        small = F.interpolate(images.float(), size=(SIDE, SIDE), mode="area")
        scores = small.new_zeros(len(prompts))
        for prompt in dict.fromkeys(prompts):
            rows = [row for row, text in enumerate(prompts) if text == prompt]
            scores[rows] = soft_requirements(parse(prompt), small[rows]).mean(1)
        return scores
