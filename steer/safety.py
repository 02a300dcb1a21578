"""The safety checker of a pipeline: what it flags is scored as it was made, and blackened afterwards."""

import copy
from typing import Any

import torch
from torch import Tensor

NAME = "safety_checker"


class DeferredSafetyChecker:
    """A pipeline's safety checker whose verdict is kept beside the images.

    flags     (N,) bool of the last batch; None before one was checked
    replaced  (N, 3, H, W) in [0, 1]: what the checker made of that batch
    """

    def __init__(self, checker: Any) -> None:
        self.checker = checker
        self.flags: Tensor | None = None
        self.replaced: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["checker"], name)

    def __call__(self, images: Any, **kwargs: Any) -> tuple[Any, list[bool]]:
        """Return the images as they are, and no flag, so that the pipeline treats all of them alike."""
        given = images.clone() if isinstance(images, Tensor) else copy.copy(images)
        replaced, flags = self.checker(images=given, **kwargs)
        self.flags = torch.as_tensor(flags, dtype=torch.bool).flatten().cpu()
        self.replaced = torch.as_tensor(replaced).detach()
        return images, [False] * len(self.flags)


def with_deferred_checker(pipe: Any) -> tuple[Any, DeferredSafetyChecker | None]:
    """A copy of a pipeline whose safety checker defers its verdict, and that checker; None where it has none."""
    if getattr(pipe, NAME, None) is None:
        return pipe, None
    view, deferred = copy.copy(pipe), DeferredSafetyChecker(getattr(pipe, NAME))
    vars(view)[NAME] = deferred
    return view, deferred
