"""Finetuning along the reward's own gradient: DRaFT-K (arXiv 2309.17400)."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Unpack

import torch

from steer.arguments import argument
from steer.errors import InputError
from steer.pipelines.training.config import TrainingConfig
from steer.pipelines.training.trainer import Trainer
from steer.training.gradient import Batch, GradientOptions, reward_gradient
from steer.training.guards import SlopeLimit
from steer.training.losses import Metrics
from steer.training.rollout import Sampler, takes_prompts


@dataclass(frozen=True)
class RewardBackpropConfig(TrainingConfig):
    """TrainingConfig with the option of reward backpropagation.

    last_steps  K, number of last solver steps that the gradient goes through; 1 is cheapest and often enough
    max_slope   bound on the gradient with respect to each image, in medians of the first update; None: no bound
                (`steer.training.guards.SlopeLimit`)
    """

    title: ClassVar[str] = "Reward backpropagation (DRaFT-K)"
    paper: ClassVar[tuple[str, str]] = (
        "Directly Fine-Tuning Diffusion Models on Differentiable Rewards",
        "2309.17400",
    )

    last_steps: int = 1
    max_slope: float | None = argument(None, "[1, inf)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.last_steps <= self.num_inference_steps:
            raise InputError(f"last_steps must be from 1 to {self.num_inference_steps}, got {self.last_steps}")
        if self.max_slope is not None and self.mixed_precision == "fp16":
            raise InputError("max_slope needs gradients of one scale, which mixed_precision fp16 changes: use bf16")
        if self.reward_workers:
            raise InputError("reward_workers return no gradients, which reward backpropagation needs: leave them out")
        if self.skip_low_noise_steps:
            raise InputError("skip_low_noise_steps must be unset: reward backpropagation learns from the last steps")
        if self.steps_per_generation * self.num_iterations > 1 or self.timestep_fraction < 1:
            raise InputError(
                "reward backpropagation differentiates samples of the present weights: steps_per_generation, "
                "num_iterations and timestep_fraction must be 1"
            )


class RewardBackpropTrainer(Trainer[RewardBackpropConfig]):
    """Training by the gradient of a differentiable reward, through the decoder and the last K solver steps."""

    config_class = RewardBackpropConfig

    def check(self) -> None:
        """Raise InputError for a reward or a pipeline without gradients."""
        if not self.reward.differentiable:
            raise InputError(f"reward {self.reward.name!r} is not differentiable: use prdp or d3po, or another reward")
        if self.pipe is None:  # arguments are checked before a model is loaded
            return
        if not takes_prompts(self.pipe):
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

    @cached_property
    def slope_limit(self) -> SlopeLimit:
        """The bound on the slope of the reward, once the first update has measured its unit."""
        return SlopeLimit(self.config.max_slope)

    def state_dict(self) -> dict[str, Any]:
        return {"base_slope": self.slope_limit.base}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.slope_limit.base = state.get("base_slope")

    def num_learned_steps(self, total: int) -> int:
        """Return all steps: the gradient goes through the last of them."""
        return total

    def steps(self, total: int, name: str) -> tuple[int, ...]:
        """The last K steps, over which KL and penalties are summed."""
        return tuple(range(max(total - self.config.last_steps, 0), total))

    def gradient(self, sampler: Sampler, batch: Batch, **options: Unpack[GradientOptions]) -> tuple[float, Metrics]:
        """Add the gradient of one update; see `steer.training.gradient.reward_gradient`."""
        limit = self.slope_limit
        return reward_gradient(sampler, batch, self.reward, self.config.last_steps, limit=limit, **options)
