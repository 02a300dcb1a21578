"""Rewards of audio: waveforms as the pipeline returns them, and their sample rate."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from steer.errors import InputError


@dataclass(frozen=True)
class AudioReward:
    """A reward of waveforms, for pipelines that make audio: a Reward whose images are waveforms.

    function        (waveforms, prompts, sample_rate) → (N,): waveforms (N, C, L) or (N, L), neither scaled nor clamped;
                    sample_rate in Hz, None where the pipeline has none
    differentiable  whether gradients flow back to the waveforms
    sample_rate     set by the steered pipeline
    """

    function: Callable[[Tensor, Sequence[str], int | None], Tensor]
    name: str = "audio"
    differentiable: bool = False
    sample_rate: int | None = None
    takes_audio: bool = True

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score waveforms."""
        return self.function(images, prompts, self.sample_rate)


def is_audio(media: Tensor) -> bool:
    """Return whether the output of a pipeline is waveforms (N, C, L) or (N, L), not images or videos."""
    return media.dim() <= 3


def as_scored(media: Tensor) -> Tensor:
    """Clamp images to [0, 1] and leave waveforms unscaled; both in fp32."""
    return media.float() if is_audio(media) else media.float().clamp(0, 1)


def sample_rate_of(pipe: Any) -> int | None:
    """Return the sample rate of a pipeline's waveforms in Hz, None where its decoder has none."""
    for part in (getattr(pipe, "vocoder", None), getattr(pipe, "vae", None)):
        for holder in (part, getattr(part, "config", None)):
            for name in ("sampling_rate", "sample_rate", "output_sampling_rate"):
                if isinstance(rate := getattr(holder, name, None), int):
                    return rate
    return None


def check_media(pipe: Any, reward: Any, media: Tensor) -> None:
    """Raise InputError where a reward of images meets audio, or a reward of audio meets images."""
    if is_audio(media) == getattr(reward, "takes_audio", False):
        return
    name, shape = type(pipe).__name__, tuple(media.shape)
    if is_audio(media):
        raise InputError(
            f"{name} makes no images but a tensor of shape {shape}, which reward {reward.name!r} does not score: use "
            "an AudioReward for waveforms"
        )
    raise InputError(f"{name} makes images, which reward {reward.name!r} does not score: use a reward of images")
