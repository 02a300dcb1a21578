"""A round of finetuning: the samples that several updates learn from, all drawn by one policy."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Generator, Tensor

from steer.batch import Batch, Reference, reference_of
from steer.guards import check_spread
from steer.pipelines.finetune_method import FinetuningMethod
from steer.pipelines.finetune_settings import DTYPES, FinetuneSettings
from steer.pipelines.samples import BeforeEach, Scored, draw, prompts_at, rows_of
from steer.seeds import derived_seed
from steer.team import Team
from steer.trainable import Trainable
from steer.trajectory import Sampler, Trajectories


@dataclass(frozen=True)
class Round:
    """Round `number`: a batch for each update, with the rewards (B, K) of its samples and what is told of them.

    Of several processes each has its own chunks of the batches; all else is the same in all of them.

    order   numbers of batches as they are learnt from, pass after pass
    cursor  place in it
    """

    number: int
    batches: tuple[Batch, ...]
    rewards: tuple[Tensor, ...]
    told: tuple[dict[str, float], ...]
    order: tuple[int, ...]
    cursor: int = 0

    @property
    def batch(self) -> Batch:
        """The one to learn from now."""
        return self.batches[self.order[self.cursor]]

    @property
    def untouched(self) -> bool:
        """Whether the weights are still those that drew the samples."""
        return self.cursor == 0

    def record(self) -> dict[str, float]:
        """What is told of the present batch's samples."""
        return self.told[self.order[self.cursor]]

    def following(self) -> "Round | None":
        """With the next batch as the present one; None after the last."""
        return replace(self, cursor=self.cursor + 1) if self.cursor + 1 < len(self.order) else None


def learning_order(batches: int, passes: int, seed: int, number: int) -> tuple[int, ...]:
    """All batches as they were drawn, then in a new order for each further pass."""
    order = list(range(batches))
    for turn in range(1, passes):
        generator = Generator().manual_seed(derived_seed(seed, f"round {number} pass {turn}"))
        order += torch.randperm(batches, generator=generator).tolist()
    return tuple(order)


class Source(Protocol):
    """Where the samples of a run come from."""

    def about(self) -> dict[str, Any]:
        """What decides them, as plain values."""
        ...

    def round(self, number: int, sampler: Sampler, trainable: Trainable, before_each: BeforeEach, team: Team) -> Round:
        """Round `number`, from 0: this process's share of it."""
        ...


@dataclass(frozen=True)
class OnlineSamples:
    """Samples of prompts by the policy as it is, scored by a reward.

    method  says what its loss is told of them, whether those of a prompt begin at one x_T, and which steps count
    """

    prompts: Sequence[str]
    method: FinetuningMethod
    settings: FinetuneSettings

    def about(self) -> dict[str, Any]:
        return {"prompts": list(self.prompts)}

    def round(self, number: int, sampler: Sampler, trainable: Trainable, before_each: BeforeEach, team: Team) -> Round:
        """Draws and scores the samples of every update of a round, and asks the reference about them.

        Raises InputError where the first round leaves nothing to learn.
        """
        size, samples, seed = self.settings.prompts_per_step, self.settings.samples_per_prompt, self.settings.seed
        batches, rewards, told = [], [], []
        for update in range(number * self.settings.steps_per_round, (number + 1) * self.settings.steps_per_round):
            name = f"update {update}"
            prompts = prompts_at(update * size, size, self.prompts, seed)
            rows = rows_of(prompts, samples, seed, name, self.method.shared_start)
            scored = draw(sampler, self.method.reward, rows, samples, self.settings.micro_batch, before_each, team)
            window = self.method.window(scored.chunks[0].log_probs.shape[1], self.settings)
            steps = self.method.steps(window, self.settings, name)
            references = references_of(sampler, trainable, scored.chunks, steps, before_each, self.settings)
            batches.append(Batch(scored.chunks, references, steps, self.method.signal(scored), window))
            rewards.append(scored.rewards)
            told.append(summary(scored))
        if number == 0:
            check_spread(torch.cat(rewards), self.method.reward.name)
        order = learning_order(len(batches), self.settings.passes, seed, number)
        return Round(number, tuple(batches), tuple(rewards), tuple(told), order)


def references_of(
    sampler: Sampler,
    trainable: Trainable,
    chunks: Sequence[Trajectories],
    steps: Sequence[int],
    before_each: BeforeEach,
    settings: FinetuneSettings,
) -> list[Reference]:
    """Evaluate the reference on each chunk; keep its residuals, in the storage dtype, where a penalty needs them."""
    found, dtype = [], DTYPES[settings.storage] if settings.divergence_counts else None
    with trainable.reference():
        for chunk in chunks:
            before_each()
            found.append(reference_of(sampler, chunk, steps, dtype))
    return found


def summary(scored: Scored) -> dict[str, Any]:
    """The rewards' mean, their standard deviation among the samples of a prompt, and the means of parts."""
    spread = scored.rewards.std(1).mean().item() if scored.rewards.shape[1] > 1 else 0.0
    parts = {f"reward/{name}": values.mean().item() for name, values in scored.parts.items()}
    return {"reward": scored.rewards.mean().item(), "reward_spread": spread, **parts}
