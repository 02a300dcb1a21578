"""What the steering pipelines share: a diffusers pipeline and a reward."""

from os import PathLike
from typing import Any, Self

from diffusers import DiffusionPipeline

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
