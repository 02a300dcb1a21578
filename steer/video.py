"""Rewards of whole videos: all frames as the pipeline returns them, and the frames per second."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

FRAME_RATES = ("fps", "frame_rate")  # arguments of pipelines


@dataclass(frozen=True)
class VideoReward:
    """A reward of whole videos, for motion and consistency; other rewards score single frames, and the mean is used.

    function        (videos, prompts, fps) → (N,): videos (N, F, 3, H, W) in [0, 1]; fps is None if unknown
    differentiable  whether gradients flow back to the frames
    fps             frames per second; None: the `fps` or `frame_rate` of the pipeline's call
    """

    function: Callable[[Tensor, Sequence[str], float | None], Tensor]
    name: str = "video"
    differentiable: bool = False
    fps: float | None = None
    takes_videos: bool = True

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score videos (N, F, 3, H, W); images (N, 3, H, W) are videos of one frame."""
        return self.function(images if images.dim() == 5 else images[:, None], prompts, self.fps)


def frame_rate(pipe: Any, call: Mapping[str, Any]) -> float | None:
    """Return the frames per second of a call of a pipeline: its argument or default; None where it has none."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    for name in FRAME_RATES:
        default = parameters[name].default if name in parameters else None
        given = call.get(name, default)
        if isinstance(given, int | float):
            return float(given)
    return None
