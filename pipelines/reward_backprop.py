"""Finetuning along the reward's own gradient: DRaFT-K (arXiv 2309.17400)."""

from collections.abc import Callable, Mapping
from typing import Any

from steer.engine import Backward, Batch, Penalty
from steer.errors import InputError
from steer.losses import Metrics
from steer.pipelines.finetune import FinetuningPipeline
from steer.pipelines.finetune_settings import FinetuneSettings
from steer.reward_backprop import reward_gradient
from steer.trajectory import Sampler


class RewardBackpropPipeline(FinetuningPipeline):
    """The gradient of a differentiable reward, through the decoder and the last k solver steps.

    last_steps  k; 1 is cheapest and often enough
    """

    def __init__(self, pipe: Any, reward: Any, *, last_steps: int = 1) -> None:
        super().__init__(pipe, reward)
        self.last_steps = last_steps

    def check(self, settings: FinetuneSettings) -> None:
        """Raises InputError for a reward without gradients, and for more steps than there are."""
        if not self.reward.differentiable:
            raise InputError(f"reward {self.reward.name!r} is not differentiable: use prdp or d3po, or another reward")
        if not 1 <= self.last_steps <= settings.num_inference_steps:
            raise InputError(f"last_steps must be from 1 to {settings.num_inference_steps}, got {self.last_steps}")
        if settings.steps_per_round * settings.passes > 1 or settings.timestep_fraction < 1:
            raise InputError(
                "reward backpropagation goes along the samples of the present weights: steps_per_round, passes and "
                "timestep_fraction must be 1"
            )

    def gradient(
        self,
        sampler: Sampler,
        batch: Batch,
        penalties: Mapping[Penalty, float],
        unchanged: bool,
        backward: Backward,
        before_each: Callable[[], None],
    ) -> tuple[float, Metrics]:
        """Adds the gradient of one update; see `steer.reward_backprop.reward_gradient`."""
        return reward_gradient(
            sampler,
            batch,
            self.reward,
            self.last_steps,
            penalties=penalties,
            backward=backward,
            before_each=before_each,
        )

    def about(self) -> dict[str, Any]:
        return super().about() | {"last_steps": self.last_steps}
