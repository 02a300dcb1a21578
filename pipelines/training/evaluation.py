"""Evaluation on held-out prompts at fixed seeds: the trained reward, held-out rewards, and diversity."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor

from steer.pipelines.training.config import TrainingConfig
from steer.pipelines.training.method import OnChunk, rows_of, sampler_of
from steer.reward import Reward, mean_over_frames, score_components
from steer.training.distributed import DistributedContext
from steer.training.rollout import Rows, Sampler, Trajectories
from steer.training.signals import within_prompt_correlation

BOOTSTRAP_RESAMPLES = 10_000  # of the bootstrap


@dataclass(frozen=True)
class EvalResult:
    """An evaluation after `step` updates of P prompts × K: rewards (P, K) by name, the trained one first; diversity,
    the mean distance between two samples of a prompt (root mean square of the pixels' differences, 0..1; 0 for K = 1);
    the images (P·K, 3, H, W)."""

    step: int
    prompts: tuple[str, ...]
    rewards: Mapping[str, Tensor]
    diversity: float
    images: Tensor

    def means(self) -> tuple[float, float]:
        """Return the means of the trained reward and the first held-out one (the trained one where there is none)."""
        collected = [values.mean().item() for values in self.rewards.values()]
        return collected[0], collected[1] if len(collected) > 1 else collected[0]

    def record(self) -> dict[str, Any]:
        """Return plain values: [mean, low, high] of every reward, a 95 % bootstrap interval over the prompts.

        Also the standard deviation of each over all images, and Pearson's correlation of each held-out one with the
        trained one within prompts, where there are several images per prompt.
        """
        intervals = {f"eval/{name}": interval(values.mean(1)) for name, values in self.rewards.items()}
        deviations = {
            f"eval/deviation/{name}": values.double().std(correction=0).item() for name, values in self.rewards.items()
        }
        trained, *held_out = self.rewards
        correlations = {
            f"eval/correlation/{name}": within_prompt_correlation(self.rewards[trained], self.rewards[name])
            for name in held_out
        }
        known = {name: value for name, value in correlations.items() if math.isfinite(value)}
        return {"step": self.step, **intervals, **deviations, **known, "eval/diversity": self.diversity}


@dataclass(frozen=True)
class Evaluator:
    """The prompts and rewards of all evaluations of a run, and how samples are drawn."""

    prompts: Sequence[str]
    trained: Reward
    held_out: Sequence[Reward]
    draw: Callable[[Sampler, Rows], tuple[Trajectories, Tensor]] = Sampler.rollout

    def evaluate(
        self,
        pipe: Any,
        config: TrainingConfig,
        step: int,
        prepared: Any,
        before: OnChunk,
        context: DistributedContext,
    ) -> EvalResult:
        """Evaluate the same prompts and seeds at every step; the processes take turns with chunks of them."""
        size, sampler = config.num_generations_eval, sampler_of(pipe, config, prepared, "model")
        chunks = rows_of(self.prompts, size, config.seed, "evaluation", shared_start=False).split(config.micro_batch)
        rewards = {reward.name: reward for reward in (self.trained, *self.held_out)}
        collected: list[tuple[int, Tensor, list[Tensor]]] = []
        for turn in range(0, len(chunks), context.world_size):
            # All processes sample in every turn, as a sharded denoiser requires; duplicates are left out.
            number = min(turn + context.rank, len(chunks) - 1)
            before()
            rows = chunks[number]
            images = sampler.ode_images(rows) if config.evaluates_by_ode else self.draw(sampler, rows)[1]
            if turn + context.rank < len(chunks):
                # Scored on the device of the pipeline, and only then moved to the CPU.
                scorers = [(partial(score_components, one, prompts=rows.prompts), one) for one in rewards.values()]
                with torch.no_grad():
                    scores = [mean_over_frames(images, scorer, one)[0] for scorer, one in scorers]
                collected.append((number, images.cpu(), scores))
        _, drawn, chunk_scores = zip(*sorted(context.gather(collected), key=lambda one: one[0]), strict=True)
        columns = zip(rewards, zip(*chunk_scores, strict=True), strict=True)
        scored = {name: torch.cat(column).view(-1, size) for name, column in columns}
        images = torch.cat(drawn)
        return EvalResult(step, tuple(self.prompts), scored, diversity(images, size), images)


def diversity(images: Tensor, samples: int) -> float:
    """Mean distance (root mean square over pixels) between two different samples of one prompt; 0 for one sample."""
    flat = images.flatten(1).view(-1, samples, images[0].numel())
    distances = torch.stack([torch.cdist(group, group) for group in flat]) / flat.shape[2] ** 0.5
    return (distances.sum((1, 2)) / max(samples * (samples - 1), 1)).mean().item()


def interval(values: Tensor) -> list[float]:
    """Mean of (N,) values and its 95 % bootstrap interval over them."""
    generator = Generator().manual_seed(0)
    rows = torch.randint(len(values), (BOOTSTRAP_RESAMPLES, len(values)), generator=generator)
    low, high = values[rows].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return [values.mean().item(), low, high]
