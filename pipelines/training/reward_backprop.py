"""Finetuning along the reward's own gradient: DRaFT-K (arXiv 2309.17400)."""

from typing import Any, Unpack

import torch

from steer.errors import InputError
from steer.pipelines.training.config import TrainingConfig
from steer.pipelines.training.trainer import Trainer
from steer.training.gradient import Batch, GradientOptions, reward_gradient
from steer.training.losses import Metrics
from steer.training.rollout import Sampler, takes_prompts


class RewardBackpropTrainer(Trainer):
    """The gradient of a differentiable reward, through the decoder and the last k solver steps.

    last_steps  k; 1 is cheapest and often enough
    """

    def __init__(self, pipe: Any, reward: Any, *, last_steps: int = 1) -> None:
        super().__init__(pipe, reward)
        self.last_steps = last_steps

    def check(self, settings: TrainingConfig) -> None:
        """Raises InputError for a reward without gradients, and for more steps than there are."""
        if not self.reward.differentiable:
            raise InputError(f"reward {self.reward.name!r} is not differentiable: use prdp or d3po, or another reward")
        if not 1 <= self.last_steps <= settings.num_inference_steps:
            raise InputError(f"last_steps must be from 1 to {settings.num_inference_steps}, got {self.last_steps}")
        if self.pipe is not None and not takes_prompts(
            self.pipe
        ):  # None: settings are checked before a model is loaded
            raise InputError(
                f"{type(self.pipe).__name__} makes arrays of its images, which let no gradients through: use another "
                "method, for example grpo or d3po"
            )
        vae = getattr(self.pipe, "vae", None)
        if vae is not None and vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False):
            raise InputError(
                "the decoder of this pipeline is cast to float32 and back in every call, amid the gradient: load the "
                "model with dtype bfloat16 or float32, or give it a VAE that is made for float16"
            )
        if settings.skip_low_noise_steps:
            raise InputError("skip_low_noise_steps must be unset: reward backpropagation learns from the last steps")
        if settings.steps_per_generation * settings.num_iterations > 1 or settings.timestep_fraction < 1:
            raise InputError(
                "reward backpropagation goes along the samples of the present weights: steps_per_generation, "
                "num_iterations and timestep_fraction must be 1"
            )

    def window(self, total: int, settings: TrainingConfig) -> int:
        """All: the gradient goes through the last steps."""
        return total

    def steps(self, total: int, settings: TrainingConfig, name: str) -> tuple[int, ...]:
        """The last k: the KL and penalties are told of these alone."""
        return tuple(range(max(total - self.last_steps, 0), total))

    def gradient(self, sampler: Sampler, batch: Batch, **options: Unpack[GradientOptions]) -> tuple[float, Metrics]:
        """Adds the gradient of one update; see `steer.training.gradient.reward_gradient`."""
        return reward_gradient(sampler, batch, self.reward, self.last_steps, **options)

    def config_dict(self) -> dict[str, Any]:
        return super().config_dict() | {"last_steps": self.last_steps}
