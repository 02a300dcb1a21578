"""What a finetuning method is, and what its training returns."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Unpack

from torch import Tensor

from steer.batch import Batch
from steer.engine import GradientOptions
from steer.losses import Metrics
from steer.pipelines.finetune_settings import FinetuneSettings
from steer.pipelines.method import SteeringMethod
from steer.pipelines.samples import Scored, chosen_steps, half_precision, window_of
from steer.trainable import denoiser_of
from steer.trajectory import Sampler

Record = dict[str, Any]


@dataclass(frozen=True)
class FinetuneResult:
    """How a training ended.

    step         updates made
    stopped      why it ended before its time, else None
    weights      where the exported weights are: those of the end, or the best ones where the held-out reward fell
    best_step    updates of the best evaluation by the held-out reward (`best/`); None without evaluations
    records      one for every update
    evaluations  one for every evaluation
    weights_step updates behind the exported weights
    """

    step: int
    stopped: str | None
    weights: Path | None
    best_step: int | None
    records: tuple[Record, ...]
    evaluations: tuple[Record, ...]
    weights_step: int | None = None


class FinetuningMethod(SteeringMethod, ABC):
    """How a denoiser learns from samples; the rest of a training is the same for all methods.

    shared_start  whether the samples of one prompt begin at one x_T
    """

    shared_start: ClassVar[bool] = False

    @abstractmethod
    def check(self, settings: FinetuneSettings) -> None:
        """Raises InputError for settings that this method can do nothing with."""

    def signal(self, scored: Scored) -> Tensor:
        """What the loss is told of the samples: by default their rewards (B, K)."""
        return scored.rewards

    def window(self, total: int, settings: FinetuneSettings) -> int:
        """How many of the stochastic steps, the first ones, count in losses and penalties."""
        half = half_precision(denoiser_of(self.pipe)[1], settings)
        return window_of(total, settings, half is not None)

    def steps(self, total: int, settings: FinetuneSettings, name: str) -> tuple[int, ...]:
        """Which of the stochastic steps 0 … total − 1 of the window an update of that name learns from."""
        return chosen_steps(total, settings.timestep_fraction, settings.seed, name)

    @abstractmethod
    def gradient(self, sampler: Sampler, batch: Batch, **options: Unpack[GradientOptions]) -> tuple[float, Metrics]:
        """Adds the gradient of one update to the weights' .grad; returns the loss, and metrics with `kl` and
        `kl_per_step` in nats. The options are those of `steer.engine.two_pass_gradient`."""

    def about(self) -> dict[str, Any]:
        """What makes this method, as plain values."""
        return {"method": type(self).__name__, "reward": self.reward.name}

    def state(self) -> dict[str, Any]:
        """What the method itself remembers from round to round, as plain values."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state` told."""
