"""Warm pictures: a reward as a package of its own. After `pip install .` it is `--reward warmth`."""

from collections.abc import Sequence

from torch import Tensor


class Warmth:
    """Mean of red minus mean of blue, −1..1; with a target, warmth:0.2, minus the distance from it."""

    differentiable = True  # gradients flow from the scores back to the images
    takes_number = True  # warmth:0.2 is a target, not a weight

    def __init__(self, target: str | None = None) -> None:
        self.name = "warmth" if target is None else f"warmth:{target}"
        self._target = None if target is None else float(target)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        warmth = images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))
        return warmth if self._target is None else -(warmth - self._target).abs()
