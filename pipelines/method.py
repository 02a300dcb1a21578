"""What the steering pipelines share: a diffusers pipeline, a reward, and where η goes."""

import inspect
from os import PathLike
from typing import Any, Self

from diffusers import DiffusionPipeline

from steer.errors import InputError
from steer.reward import load_reward


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
    """η goes to the pipeline where it and its solver know η (DDIM); elsewhere the Gaussian kernel takes it."""
    if eta is None:
        return call, None
    if not 0 <= eta <= 1:
        raise InputError(f"eta must be from 0 to 1, got {eta}")
    knows = all("eta" in inspect.signature(f).parameters for f in (type(pipe).__call__, pipe.scheduler.step))
    return (call | {"eta": eta}, None) if knows else (call, eta)
