"""Colour and brightness: rewards that are differentiable and need no weights."""

from collections.abc import Sequence

import torch
from PIL import ImageColor
from torch import Tensor

from steer.reward import RewardError
from steer.rewards.inputs import takes_any_images
from steer.rewards.sandbox_helpers import luma


class ColourMatch:
    """Mean over the pixels of 1 − distance/√3 to one colour, 0..1. The colour is a CSS name or #RRGGBB."""

    differentiable = True

    def __init__(self, colour: str) -> None:
        try:
            rgb = ImageColor.getrgb(colour)[:3]
        except ValueError as error:
            raise RewardError(f"colour:{colour}: unknown colour; use a CSS name like red, or #RRGGBB") from error
        self.name = f"colour:{colour}"
        self._target = torch.tensor(rgb).float().view(3, 1, 1) / 255

    @takes_any_images
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        # The offset keeps the gradient finite if a pixel has exactly this colour.
        squared = ((images.float() - self._target.to(images.device)) ** 2).sum(1)
        return 1 - ((squared + 1e-12) / 3).sqrt().mean((1, 2))


class Brightness:
    """Mean luma, 0..1; with a target in 0..1, one minus the distance of the mean luma from it."""

    differentiable = True
    takes_number = True  # brightness:0.3 is a target, not a weight

    def __init__(self, target: str | float | None = None) -> None:
        self.name = "brightness" if target is None else f"brightness:{target}"
        try:
            self._target = None if target is None else float(target)
            if self._target is not None and not 0 <= self._target <= 1:  # false for nan, too
                raise ValueError("out of range")
        except ValueError as error:
            raise RewardError(f"{self.name}: the target is a number from 0 to 1") from error

    @takes_any_images
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        mean = luma(images.float()).mean((1, 2))
        return mean if self._target is None else 1 - (mean - self._target).abs()
