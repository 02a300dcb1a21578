"""The parts that all methods share: samples and their rewards, the choice of steps, the interface of a method."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, Unpack

import torch
from torch import Generator, Tensor

from steer.diffusion.precision import HALF, Precision
from steer.diffusion.seeds import derived_seed
from steer.diffusion.token_hooks import has_categorical_kernel, is_token_scheduler
from steer.errors import InputError
from steer.pipelines.base import RewardedPipeline
from steer.pipelines.training.config import DTYPES, LOW_NOISE_STEPS, TrainingConfig
from steer.reward import Reward, Scores, Submit, T, compares_images, mean_over_frames, score_components
from steer.training.distributed import DistributedContext
from steer.training.gradient import Batch, GradientOptions
from steer.training.losses import Metrics
from steer.training.rollout import Rows, Sampler, StepWindow, Trajectories
from steer.training.token_rollout import TokenSampler
from steer.training.trainable import get_denoiser, get_denoisers

if TYPE_CHECKING:  # which imports this module
    from steer.pipelines.training.workers import RayRollouts

OnChunk = Callable[[], None]
Samples = tuple[Trajectories, Tensor]  # trajectories and images (N, 3, H, W) in [0, 1]
Draw = Callable[[Sequence[Rows]], Iterable[Samples]]  # micro-batches → their samples, in order
ConfigT = TypeVar("ConfigT", bound=TrainingConfig)


@dataclass(frozen=True)
class Scored:
    """B prompts × K samples in chunks, with rewards (B, K) and scores of the reward's components.

    seconds  time that the run waited for rewards

    In a distributed run each process has the chunks of its shard of the prompts; all else covers all processes.
    """

    prompts: tuple[str, ...]
    chunks: tuple[Trajectories, ...]
    rewards: Tensor
    components: dict[str, Tensor]
    seconds: float = 0.0


def shuffled_at(position: int, count: int, size: int, seed: int) -> list[int]:
    """Return `count` numbers, starting at `position`, of a stream of shuffled passes over 0 … size − 1."""
    first, last = position // size, (position + count - 1) // size
    order: list[int] = []
    for turn in range(first, last + 1):
        generator = Generator().manual_seed(derived_seed(seed, f"order {turn}"))
        order += torch.randperm(size, generator=generator).tolist()
    return order[position - first * size :][:count]


def prompts_at(position: int, count: int, prompts: Sequence[str], seed: int) -> tuple[str, ...]:
    """Return `count` prompts, starting at `position`, of a stream of shuffled passes over all prompts."""
    return tuple(prompts[number] for number in shuffled_at(position, count, len(prompts), seed))


def rows_of(prompts: Sequence[str], samples: int, seed: int, name: str, shared_start: bool) -> Rows:
    """Return K rows per prompt; with `shared_start` they start from one x_T and differ in the noise of the steps."""
    places = [(place, k) for place in range(len(prompts)) for k in range(samples)]
    starts = [derived_seed(seed, f"{name} start {place} {0 if shared_start else k}") for place, k in places]
    noises = [derived_seed(seed, f"{name} noise {place} {k}") for place, k in places]
    return Rows(tuple(prompts[place] for place, _ in places), tuple(starts), tuple(noises))


def at_once(work: Callable[[], T]) -> Callable[[], T]:
    """Do work in the calling thread: a `Submit` without background threads."""
    output = work()
    return lambda: output


def sample_and_score(
    draw: Draw,
    reward: Reward,
    rows: Rows,
    samples: int,
    chunk: int,
    context: DistributedContext,
    submit: Submit = at_once,
) -> Callable[[], Scored]:
    """Sample this process's shard of the rows, `chunk` at a time; return a function that waits for the scores.

    submit  function that scores a chunk, in the background while the next chunk is sampled
    """
    if compares_images(reward) and chunk % samples:
        raise InputError(
            f"reward {reward.name!r} compares the images of a prompt: micro_batch must be a multiple of "
            f"num_generations, {samples}, got {chunk}"
        )
    chunks, results, seconds = list[Trajectories](), list[Callable[[], Scores]](), 0.0
    for trajectories, images in draw(rows.at(process_shard(range(len(rows)), context)).split(chunk)):
        chunks.append(trajectories)
        score = partial(score_components, reward, prompts=trajectories.rows.prompts)
        started = time.monotonic()
        with torch.no_grad():
            results.append(submit(partial(mean_over_frames, images, score, reward)))
        seconds += time.monotonic() - started

    def scored() -> Scored:
        started = time.monotonic()
        scores = [result() for result in results]
        spent = seconds + time.monotonic() - started
        rewards, components = zip(*context.gather(scores), strict=True)
        named = {name: torch.cat([some[name] for some in components]).view(-1, samples) for name in components[0]}
        return Scored(rows.prompts[::samples], tuple(chunks), torch.cat(rewards).view(-1, samples), named, spent)

    return scored


def process_shard(numbers: range, context: DistributedContext) -> range:
    """Return the contiguous shard of this process; all shards are equally long."""
    size = len(numbers) // context.world_size
    return numbers[context.rank * size : (context.rank + 1) * size]


def chosen_steps(total: int, fraction: float, seed: int, name: str) -> tuple[int, ...]:
    """Return a random share of the steps 0 … total − 1, at least one, ascending."""
    generator = Generator().manual_seed(derived_seed(seed, f"{name} steps"))
    count = max(1, math.ceil(fraction * total - 1e-9))
    return tuple(sorted(torch.randperm(total, generator=generator)[:count].tolist()))


def half_precision(denoiser: Any, config: TrainingConfig) -> torch.dtype | None:
    """Return the half-precision dtype of autocast or of the weights; None in float32."""
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(config.mixed_precision, denoiser.dtype)
    return dtype if dtype in HALF else None


def skips_low_noise_steps(pipe: Any, config: TrainingConfig) -> bool:
    """Return whether the last steps are left out by default: not for texts, nor where a second denoiser has them."""
    half = half_precision(get_denoiser(pipe)[1], config) is not None
    return half or (len(get_denoisers(pipe)) == 1 and not is_token_scheduler(pipe.scheduler))


def num_training_steps_of(total: int, config: TrainingConfig, skip: bool) -> int:
    """Return the number of stochastic steps to learn from: all but the last steps, whose τ is lowest.

    skip: whether some are left out by default

    Raises InputError where no step is left.
    """
    if config.skip_low_noise_steps is None:
        return total - min(LOW_NOISE_STEPS, total // 2) if skip else total
    if config.skip_low_noise_steps >= total:
        raise InputError(
            f"skip_low_noise_steps must be below the number of steps with noise, {total}, got "
            f"{config.skip_low_noise_steps}: lower it, or raise num_inference_steps"
        )
    return total - config.skip_low_noise_steps


def sampler_of(
    pipe: Any,
    config: TrainingConfig,
    prepared: Any = None,
    precision: Precision | None = None,
    conditions: Mapping[str, Mapping[str, Any]] | None = None,
) -> Sampler:
    """Create a sampler, with no cached text embeddings, in the precision of log-probabilities or another."""
    latents_dtype = DTYPES[config.latents_dtype]
    precision, autocast = precision or config.log_prob_precision, config.mixed_precision != "no"
    if is_token_scheduler(pipe.scheduler):
        return TokenSampler(pipe, config.call_kwargs, prepared, precision, autocast)
    options = (config.noise_level, latents_dtype, prepared, precision, autocast, config.dynamics)
    return Sampler(pipe, config.call_kwargs, *options, conditions, config.prompt_prefix)


def check_tokens(pipe: Any, config: TrainingConfig, trains_tokens: bool) -> None:
    """Raise InputError for a token model that a method cannot train, or for arguments that do not apply to tokens.

    trains_tokens  whether the method can train token models
    """
    if pipe is None or not is_token_scheduler(pipe.scheduler):  # arguments are checked before a model is loaded
        return
    name = type(pipe).__name__
    if not has_categorical_kernel(pipe.scheduler):
        raise InputError(f"{name} unmasks by confidence, which has no density: use a MaskedDiffusionPipeline")
    if not trains_tokens:
        raise InputError(
            f"{config.title} is for images: train {name} by a method of log-probabilities, such as grpo, or by drakes"
        )
    plain = TrainingConfig()
    options = ("dynamics", "eta", "guidance_scale", "chi_square_weight", "window")
    given = [one for one in options if getattr(config, one, None) != getattr(plain, one, None)]
    if given:
        raise InputError(f"{given[0]} is for images, and {name} makes texts: leave it out")


Record = dict[str, Any]


@dataclass(frozen=True)
class TrainingResult:
    """The outcome of a training.

    step         number of updates
    stopped      reason for an end before max_steps, else None
    weights      path of the exported weights: the last weights, or the best where the held-out reward fell
    best_step    update of the best evaluation by the held-out reward (`best/`); None without evaluations
    records      metrics of every update
    evaluations  metrics of every evaluation
    weights_step update of the exported weights
    """

    step: int
    stopped: str | None
    weights: Path | None
    best_step: int | None
    records: tuple[Record, ...]
    evaluations: tuple[Record, ...]
    weights_step: int | None = None


class TrainingMethod(RewardedPipeline, ABC, Generic[ConfigT]):
    """A method by which a denoiser learns from samples; the rest of a training is the same for all methods.

    shared_start  whether the samples of one prompt start from one x_T
    log_probs     whether the method learns from log-probabilities: the first rollout is then compared with its replay
    """

    shared_start: ClassVar[bool] = False
    log_probs: ClassVar[bool] = True
    config: ConfigT
    eval_rewards: tuple[Reward, ...] = ()
    preferences: Path | None = None
    conditions_by_prompt: Mapping[str, Mapping[str, Any]] = {}  # arguments of the pipeline's call
    workers: "RayRollouts | None" = None  # processes that draw the samples of rollouts

    def check(self) -> None:
        """Raise InputError for a reward or a pipeline that does not fit this method."""

    @property
    def averages_policy(self) -> bool:
        """Whether an average of the trained weights draws the samples."""
        return False

    def old_decay(self, rollouts: int) -> float:
        """Decay of the average of the weights that draw samples, after this many rollouts."""
        return 0.0

    @staticmethod
    def draw(sampler: Sampler, rows: Rows, window: StepWindow | None = None) -> Samples:
        """Draw samples to learn from or to evaluate, and their images: by default with noise in the window.

        This method has no state, as workers call it too.
        """
        return sampler.rollout(rows, window)

    def signal(self, scored: Scored) -> Tensor:
        """The input of the loss: by default the rewards (B, K) of the samples."""
        return scored.rewards

    def scored_reward(self) -> Reward:
        """The reward that scores training samples."""
        return self.reward

    def select(
        self, scored: Scored, signal: Tensor, name: str, context: DistributedContext
    ) -> tuple[Sequence[Trajectories], Tensor]:
        """The chunks and the signal of the samples that the update `name` learns from: by default all samples."""
        return scored.chunks, signal

    def metrics(self) -> dict[str, float]:
        """Metrics of the latest rollout, besides rewards."""
        return {}

    @property
    def needs_reference(self) -> bool:
        """Whether every update needs the reference policy, not only the log."""
        return self.config.needs_divergence

    def evaluates_reference(self, update: int) -> bool:
        """Whether the reference is evaluated on the samples of an update, numbered from 0."""
        return self.needs_reference or self.config.logs_divergence(update)

    def num_learned_steps(self, total: int) -> int:
        """Number of stochastic steps, from the first on, that count in losses and penalties."""
        if self.step_window(0) is not None:  # its place leaves out the last steps
            return total
        return num_training_steps_of(total, self.config, skips_low_noise_steps(self.pipe, self.config))

    def step_window(self, update: int) -> StepWindow | None:
        """The solver steps of an update's rollout that have noise; None: all."""
        half = half_precision(get_denoiser(self.pipe)[1], self.config)
        return self.config.step_window(update, half is not None)

    def steps(self, total: int, name: str) -> tuple[int, ...]:
        """The stochastic steps that the update `name` learns from, of the learned steps 0 … total − 1."""
        return chosen_steps(total, self.config.timestep_fraction, self.config.seed, name)

    @abstractmethod
    def gradient(self, sampler: Sampler, batch: Batch, **options: Unpack[GradientOptions]) -> tuple[float, Metrics]:
        """Add the gradient of one update to the weights' .grad; return the loss and metrics.

        The metrics include `kl` and `kl_per_step` in nats where the batch has references. The options are as in
        `steer.training.gradient.two_pass_gradient`.
        """

    def state_dict(self) -> dict[str, Any]:
        """State of the method between rollouts, as plain values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore from a `state_dict`."""
