"""What a finetuning method is, and what its training returns."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Unpack

import torch
from torch import Generator, Tensor

from steer.diffusion.precision import HALF, Precision
from steer.diffusion.seeds import derived_seed
from steer.errors import InputError
from steer.pipelines.base import RewardedPipeline
from steer.pipelines.training.config import DTYPES, TrainingConfig
from steer.reward import Reward, mean_over_frames, score_components
from steer.training.distributed import DistributedContext
from steer.training.gradient import Batch, GradientOptions
from steer.training.losses import Metrics
from steer.training.rollout import Rows, Sampler, Trajectories
from steer.training.trainable import get_denoiser

HALF_PRECISION_SKIPPED_STEPS = 2  # the last steps, which carry nearly all of the rounding
OnChunk = Callable[[], None]


@dataclass(frozen=True)
class Scored:
    """Samples of B prompts × K, in chunks: rewards (B, K), and those of the reward's components.

    Of several processes each has the chunks of its own share of the prompts; all else is of all of them.
    """

    prompts: tuple[str, ...]
    chunks: tuple[Trajectories, ...]
    rewards: Tensor
    components: dict[str, Tensor]


def prompts_at(position: int, count: int, prompts: Sequence[str], seed: int) -> tuple[str, ...]:
    """`count` prompts from a position on, in a stream that goes over all of them in one new order after another."""
    result = []
    for place in range(position, position + count):
        turn, index = divmod(place, len(prompts))
        generator = Generator().manual_seed(derived_seed(seed, f"order {turn}"))
        result.append(prompts[int(torch.randperm(len(prompts), generator=generator)[index])])
    return tuple(result)


def rows_of(prompts: Sequence[str], samples: int, seed: int, name: str, shared_start: bool) -> Rows:
    """K rows for each prompt; with `shared_start` they begin at one x_T, and only the noise on the way differs."""
    places = [(place, k) for place in range(len(prompts)) for k in range(samples)]
    starts = [derived_seed(seed, f"{name} start {place} {0 if shared_start else k}") for place, k in places]
    noises = [derived_seed(seed, f"{name} noise {place} {k}") for place, k in places]
    return Rows(tuple(prompts[place] for place, _ in places), tuple(starts), tuple(noises))


def sample_and_score(
    sampler: Sampler,
    reward: Reward,
    rows: Rows,
    samples: int,
    chunk: int,
    on_chunk: OnChunk,
    context: DistributedContext,
) -> Scored:
    """Draws this process's share of the rows, `chunk` at a time, and scores their images."""
    chunks, scores = [], []
    for some in rows.at(process_shard(range(len(rows)), context)).split(chunk):
        on_chunk()
        trajectories, images = sampler.rollout(some)
        chunks.append(trajectories)
        with torch.no_grad():
            scores.append(mean_over_frames(images, partial(score_components, reward, prompts=some.prompts)))
    rewards, components = zip(*context.gather(scores), strict=True)
    return Scored(
        prompts=rows.prompts[::samples],
        chunks=tuple(chunks),
        rewards=torch.cat(rewards).view(-1, samples),
        components={
            name: torch.cat([scores_by_name[name] for scores_by_name in components]).view(-1, samples)
            for name in components[0]
        },
    )


def process_shard(numbers: range, context: DistributedContext) -> range:
    """This process's part, one run of them, as long as everybody's."""
    size = len(numbers) // context.count
    return numbers[context.index * size : (context.index + 1) * size]


def chosen_steps(total: int, fraction: float, seed: int, name: str) -> tuple[int, ...]:
    """A share of the steps 0 … total − 1, at least one, ascending."""
    generator = Generator().manual_seed(derived_seed(seed, f"{name} steps"))
    count = max(1, math.ceil(fraction * total - 1e-9))
    return tuple(sorted(torch.randperm(total, generator=generator)[:count].tolist()))


def half_precision(denoiser: Any, settings: TrainingConfig) -> torch.dtype | None:
    """The half-precision dtype of a run, of autocast or of the weights; None in float32."""
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(settings.mixed_precision, denoiser.dtype)
    return dtype if dtype in HALF else None


def num_training_steps_of(total: int, settings: TrainingConfig, half: bool) -> int:
    """How many of `total` stochastic steps are learnt from: all but the last ones, whose τ is lowest.

    Raises InputError where none is left.
    """
    if settings.skip_low_noise_steps is None:
        return total - min(HALF_PRECISION_SKIPPED_STEPS, total // 2) if half else total
    if settings.skip_low_noise_steps >= total:
        raise InputError(
            f"skip_low_noise_steps must be below the number of steps with noise, {total}, got "
            f"{settings.skip_low_noise_steps}: lower it, or raise num_inference_steps"
        )
    return total - settings.skip_low_noise_steps


def sampler_of(
    pipe: Any, settings: TrainingConfig, prepared: Any = None, precision: Precision | None = None
) -> Sampler:
    """A new sampler, which remembers no texts; in the precision of log-probabilities, or another."""
    latents_dtype = DTYPES[settings.latents_dtype]
    precision, autocast = precision or settings.log_prob_precision, settings.mixed_precision != "no"
    return Sampler(pipe, settings.call_kwargs, settings.eta, latents_dtype, prepared, precision, autocast)


Record = dict[str, Any]


@dataclass(frozen=True)
class TrainingResult:
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


class TrainingMethod(RewardedPipeline, ABC):
    """How a denoiser learns from samples; the rest of a training is the same for all methods.

    shared_start  whether the samples of one prompt begin at one x_T
    """

    shared_start: ClassVar[bool] = False

    @abstractmethod
    def check(self, settings: TrainingConfig) -> None:
        """Raises InputError for settings that this method can do nothing with."""

    def signal(self, scored: Scored) -> Tensor:
        """What the loss is told of the samples: by default their rewards (B, K)."""
        return scored.rewards

    def window(self, total: int, settings: TrainingConfig) -> int:
        """How many of the stochastic steps, the first ones, count in losses and penalties."""
        half = half_precision(get_denoiser(self.pipe)[1], settings)
        return num_training_steps_of(total, settings, half is not None)

    def steps(self, total: int, settings: TrainingConfig, name: str) -> tuple[int, ...]:
        """Which of the stochastic steps 0 … total − 1 of the window an update of that name learns from."""
        return chosen_steps(total, settings.timestep_fraction, settings.seed, name)

    @abstractmethod
    def gradient(self, sampler: Sampler, batch: Batch, **options: Unpack[GradientOptions]) -> tuple[float, Metrics]:
        """Adds the gradient of one update to the weights' .grad; returns the loss, and metrics with `kl` and
        `kl_per_step` in nats. The options are those of `steer.training.gradient.two_pass_gradient`."""

    def config_dict(self) -> dict[str, Any]:
        """What makes this method, as plain values."""
        return {"method": type(self).__name__, "reward": self.reward.name}

    def state(self) -> dict[str, Any]:
        """What the method itself remembers from round to round, as plain values."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state` told."""
