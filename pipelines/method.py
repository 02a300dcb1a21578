"""What the steering pipelines share: a diffusers pipeline, a reward, and where η goes."""

import inspect
import math
from os import PathLike
from typing import Any, Self

from diffusers import DiffusionPipeline

from steer.errors import InputError
from steer.reward import load_reward
from steer.schedule import clip_limit, descends_from


class SteeringMethod:
    """A method over `pipe`, a diffusers pipeline that stays untouched, and `reward`: a Reward, a function
    (images, prompts) → (N,), or a name (see `steer.reward.load_reward`)."""

    def __init__(self, pipe: Any, reward: Any) -> None:
        self.pipe = pipe
        self.reward = load_reward(reward)

    @classmethod
    def from_pretrained(cls, model: str | PathLike[str], reward: Any, **options: Any) -> Self:
        """Loads a diffusers pipeline by hub name or folder; `options` go to DiffusionPipeline.from_pretrained."""
        return cls(DiffusionPipeline.from_pretrained(model, **options), reward)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Moves the diffusers pipeline, as its own `to` does."""
        self.pipe.to(*args, **kwargs)
        return self


def route_eta(pipe: Any, call: dict[str, Any], eta: float | None) -> tuple[dict[str, Any], float | None]:
    """Route η to the pipeline where it and its solver know η (DDIM), else to the Gaussian kernel.

    The kernel takes it too where DDIM's own step is another one: with x̂0 clipped but not ε̂, or not finite at zero SNR.
    """
    if eta is None:
        return call, None
    if not 0 <= eta <= 1:
        raise InputError(f"eta must be from 0 to 1, got {eta}")
    knows = all("eta" in inspect.signature(f).parameters for f in (type(pipe).__call__, pipe.scheduler.step))
    own = knows and (eta == 0 or not _differs(pipe.scheduler))
    return (call | {"eta": eta}, None) if own else (call, eta)


VANISHING = 1e-6  # ᾱ below which 1 − ᾱ_s − τ² of a DDIM step may round to a negative number


def _differs(scheduler: Any) -> bool:
    clips = clip_limit(scheduler) < math.inf or bool(scheduler.config.get("thresholding"))
    return descends_from(scheduler, {"DDIMScheduler"}) and (clips or float(scheduler.alphas_cumprod.min()) < VANISHING)
