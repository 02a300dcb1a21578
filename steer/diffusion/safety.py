"""Safety checkers for pipelines that are called many times: without effect, or deferred to the finished images."""

import copy
from typing import Any

import torch
from torch import Tensor

SAFETY_CHECKER = "safety_checker"


class PassThroughChecker:
    """A safety checker of texts and videos that passes everything through."""

    def to(self, *args: Any, **kwargs: Any) -> "PassThroughChecker":
        """Stay on the current device."""
        return self

    def check_text_safety(self, prompt: str) -> bool:
        """Pass any text."""
        return True

    def check_video_safety(self, frames: Any) -> Any:
        """Return the frames unchanged."""
        return frames


class DeferredSafetyChecker:
    """A pipeline's safety checker that returns its images unchanged and keeps its verdict.

    flags     (N,) bool of the last batch; None before the first
    replaced  (N, 3, H, W) in [0, 1]: the checker's output for that batch
    """

    def __init__(self, checker: Any) -> None:
        self.checker = checker
        self.flags: Tensor | None = None
        self.replaced: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["checker"], name)

    def __call__(self, images: Any, **kwargs: Any) -> tuple[Any, list[bool]]:
        """Check the images, keep the verdict, and return the images with no flag set."""
        given = images.clone() if isinstance(images, Tensor) else copy.copy(images)
        replaced, flags = self.checker(images=given, **kwargs)
        self.flags = torch.as_tensor(flags, dtype=torch.bool).flatten().cpu()
        self.replaced = torch.as_tensor(replaced).detach()
        return images, [False] * len(self.flags)


def with_deferred_checker(pipe: Any) -> tuple[Any, DeferredSafetyChecker | None]:
    """Copy a pipeline with a deferred safety checker; returns the copy, and the checker or None."""
    if getattr(pipe, SAFETY_CHECKER, None) is None:
        return pipe, None
    view, deferred = copy.copy(pipe), DeferredSafetyChecker(getattr(pipe, SAFETY_CHECKER))
    vars(view)[SAFETY_CHECKER] = deferred
    return view, deferred
