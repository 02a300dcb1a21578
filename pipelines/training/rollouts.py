"""The rollout buffer: the samples that several updates learn from, all drawn by one policy."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Generator, Tensor

from steer.diffusion.precision import without_tf32
from steer.diffusion.seeds import derived_seed
from steer.pipelines.fk_steering import check_not_offloaded
from steer.pipelines.training.config import DTYPES, TrainingConfig
from steer.pipelines.training.method import (
    OnChunk,
    Samples,
    Scored,
    TrainingMethod,
    at_once,
    process_shard,
    prompts_at,
    rows_of,
    sample_and_score,
)
from steer.pipelines.training.workers import num_workers, one_local_call
from steer.reward import Reward, Submit, run_in_background
from steer.training.distributed import DistributedContext
from steer.training.gradient import Batch, Reference, reference_of
from steer.training.guards import check_spread
from steer.training.rollout import Rows, Sampler, StepWindow, Trajectories, blocks
from steer.training.trainable import Trainable, whole


@dataclass(frozen=True)
class RolloutBuffer:
    """Rollout `number`: a batch per update, with the rewards (B, K) of its samples and their metrics.

    In a distributed run each process has its own chunks of the batches; all else is equal in all processes.

    order   numbers of the batches in the order of the updates, pass after pass
    cursor  position in `order`
    reward_seconds  time that the run waited for rewards
    """

    number: int
    batches: tuple[Batch, ...]
    rewards: tuple[Tensor, ...]
    metrics: tuple[dict[str, float], ...]
    order: tuple[int, ...]
    cursor: int = 0
    reward_seconds: float = 0.0

    @property
    def batch(self) -> Batch:
        """The batch of the next update."""
        return self.batches[self.order[self.cursor]]

    @property
    def on_policy(self) -> bool:
        """Whether the current weights drew the samples."""
        return self.cursor == 0

    def record(self) -> dict[str, float]:
        """Return the metrics of the present batch."""
        return self.metrics[self.order[self.cursor]]

    def next_batch(self) -> "RolloutBuffer | None":
        """Advance to the next batch; None after the last."""
        return replace(self, cursor=self.cursor + 1) if self.cursor + 1 < len(self.order) else None


def batch_order(batches: int, num_passes: int, seed: int, number: int) -> tuple[int, ...]:
    """Return the batches in the order of sampling, then shuffled for each further pass."""
    order = list(range(batches))
    for turn in range(1, num_passes):
        generator = Generator().manual_seed(derived_seed(seed, f"round {number} pass {turn}"))
        order += torch.randperm(batches, generator=generator).tolist()
    return tuple(order)


class RolloutSource(Protocol):
    """A source of samples to learn from: prompts for which the model draws samples, or preferences."""

    def config_dict(self) -> dict[str, Any]:
        """Return the plain values that determine the samples."""
        ...

    def collect(
        self, number: int, sampler: Sampler, trainable: Trainable, on_chunk: OnChunk, context: DistributedContext
    ) -> RolloutBuffer:
        """Collect rollout `number`, from 0, for this process's shard."""
        ...


@dataclass(frozen=True)
class OnlineRollouts:
    """Samples of prompts by the present policy, scored by the reward of `method`.

    method  defines the signal of its loss, the steps to learn from, and whether samples of a prompt share one x_T
    """

    prompts: Sequence[str]
    method: TrainingMethod[Any]

    def config_dict(self) -> dict[str, Any]:
        """Return the plain values that determine the samples."""
        return {"prompts": list(self.prompts)}

    def collect(
        self, number: int, sampler: Sampler, trainable: Trainable, on_chunk: OnChunk, context: DistributedContext
    ) -> RolloutBuffer:
        """Collect rollout `number`, from 0: sample and score this process's shard of every update.

        The reference is evaluated on the samples if one of their updates needs it. Raises InputError if the first
        rollout leaves nothing to learn.
        """
        config, updates = self.method.config, self.method.config.steps_per_generation
        batches, rewards, metrics, seconds = list[Batch](), [], [], 0.0
        if self.method.workers is not None:
            self.method.workers.load({name: whole(one.detach()).cpu() for name, one in trainable.parameters.items()})
        order = batch_order(updates, config.num_iterations, config.seed, number)
        passes = enumerate(order, number * len(order))  # with the number of the optimiser's update
        referenced = {batch for update, batch in passes if self.method.evaluates_reference(update)}
        first = number * updates
        for update, scored in enumerate(self._sample(first, sampler, on_chunk, context), first):
            name = f"update {update}"
            seconds += scored.seconds
            learned = self.method.num_learned_steps(scored.chunks[0].log_probs.shape[1])
            steps = self.method.steps(learned, name)
            chunks, signal = self.method.select(scored, self.method.signal(scored), name, context)
            references: list[Reference] = []
            if len(batches) in referenced:
                references = references_of(sampler, trainable, chunks, steps, on_chunk, config)
            batches.append(Batch(chunks, references, steps, signal, learned))
            rewards.append(scored.rewards)
            metrics.append(summary(scored) | self.method.metrics())
        if number == 0:
            check_spread(torch.cat(rewards), self.method.reward.name)
        return RolloutBuffer(number, tuple(batches), tuple(rewards), tuple(metrics), order, reward_seconds=seconds)

    def _sample(self, first: int, sampler: Sampler, on_chunk: OnChunk, context: DistributedContext) -> list[Scored]:
        """Sample and score the updates of a rollout from `first` on; all are sampled before the wait for rewards."""
        config, reward, pending = self.method.config, self.method.scored_reward(), list[Callable[[], Scored]]()
        reward = one_local_call(reward) if num_workers(reward) > 1 else reward
        size, samples, seed = config.train_batch_size, config.num_generations, config.seed
        with self._submit(reward) as submit:
            for update in range(first, first + config.steps_per_generation):
                prompts = prompts_at(update * size, size, self.prompts, seed)
                rows = rows_of(prompts, samples, seed, f"update {update}", self.method.shared_start)
                draw = partial(self._draw, sampler, self.method.step_window(update), on_chunk)
                pending.append(sample_and_score(draw, reward, rows, samples, config.micro_batch, context, submit))
            return [scored() for scored in pending]

    def _draw(
        self, sampler: Sampler, window: StepWindow | None, on_chunk: OnChunk, chunks: Sequence[Rows]
    ) -> Iterator[Samples]:
        if self.method.workers is not None:
            yield from self.method.workers.draw(chunks, window, on_chunk)
            return
        for rows in chunks:
            on_chunk()
            yield self.method.draw(sampler, rows, window)

    @contextmanager
    def _submit(self, reward: Reward) -> Iterator[Submit]:
        """Score in the background, with a thread for each worker of the reward, or at once."""
        threads = num_workers(reward)
        if not (threads or self.method.config.asynchronous_rewards):
            yield at_once
            return
        check_not_offloaded(self.method.pipe)
        # The sampler would switch TF32 off and on while rewards are computed: scores must not depend on the timing.
        one_precision = without_tf32() if self.method.config.log_prob_precision == "float32" else nullcontext()
        with one_precision, run_in_background(self.method.pipe.device, max(threads, 1)) as submit:
            yield submit


def references_of(
    sampler: Sampler,
    trainable: Trainable,
    chunks: Sequence[Trajectories],
    steps: Sequence[int],
    on_chunk: OnChunk,
    config: TrainingConfig,
) -> list[Reference]:
    """Evaluate the reference on each chunk; keep its residuals, in the storage dtype, where a penalty needs them."""
    results, dtype = [], DTYPES[config.latents_dtype] if config.needs_divergence else None
    with trainable.reference():
        for chunk in chunks:
            on_chunk()
            results.append(reference_of(sampler, chunk, steps, dtype))
    return results


def summary(scored: Scored) -> dict[str, Any]:
    """Return the mean reward, its standard deviation among samples of a prompt, and the means of the components."""
    spread = scored.rewards.std(1).mean().item() if scored.rewards.shape[1] > 1 else 0.0
    components = {f"reward/{name}": values.mean().item() for name, values in scored.components.items()}
    return {"reward": scored.rewards.mean().item(), "reward_spread": spread, **components}


def trajectories_to_tensors(stored: Trajectories) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Convert trajectories to tensors and plain values; lossless."""
    values = {**asdict(stored.rows), "stochastic": stored.stochastic}
    return {"latents": stored.latents, "log_probs": stored.log_probs}, values


def trajectories_from_tensors(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> Trajectories:
    """Restore trajectories from `trajectories_to_tensors`."""
    rows = Rows(tuple(values["prompts"]), tuple(values["starts"]), tuple(values["noises"]))
    return Trajectories(rows, tensors["latents"], tuple(values["stochastic"]), tensors["log_probs"])


def rollout_to_tensors(buffer: RolloutBuffer, context: DistributedContext) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Convert a rollout, gathered from all processes, to tensors and plain values; lossless."""
    tensors: dict[str, Tensor] = {}
    batches = []
    for number, (batch, rewards) in enumerate(zip(buffer.batches, buffer.rewards, strict=True)):
        stored, values = trajectories_to_tensors(Trajectories.concatenate(context.gather(batch.chunks)))
        if batch.references:
            reference = vars(Reference.concatenate(context.gather(batch.references)))
            stored |= {f"reference {name}": value for name, value in reference.items() if value is not None}
        tensors |= {f"{number}/signal": batch.rewards, f"{number}/rewards": rewards}
        tensors |= {f"{number}/0/{name}": value for name, value in stored.items()}
        batches.append({"steps": list(batch.steps), "window": batch.num_learned_steps, "chunks": [values]})
    plain = {name: getattr(buffer, name) for name in ("number", "metrics", "order", "cursor")}
    return tensors, plain | {"batches": batches}


def rollout_from_tensors(
    tensors: Mapping[str, Tensor], values: Mapping[str, Any], context: DistributedContext, size: int
) -> RolloutBuffer:
    """Restore this process's shard of a rollout from `rollout_to_tensors`, in chunks of at most `size` rows."""
    batches, rewards = [], []
    for number, batch in enumerate(values["batches"]):
        start = f"{number}/0/"
        own = {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
        stored = trajectories_from_tensors(own, batch["chunks"][0])
        parts = blocks(process_shard(range(len(stored.rows)), context), size)
        chunks, references = [stored.at(part) for part in parts], list[Reference]()
        if "reference log_probs" in own:
            reference = Reference(
                own.get("reference residuals"), own["reference deviations"], own["reference log_probs"]
            )
            references = [reference.at(part) for part in parts]
        batches.append(Batch(chunks, references, tuple(batch["steps"]), tensors[f"{number}/signal"], batch["window"]))
        rewards.append(tensors[f"{number}/rewards"])
    metrics, order = tuple(values["metrics"]), tuple(values["order"])
    return RolloutBuffer(values["number"], tuple(batches), tuple(rewards), metrics, order, values["cursor"])
