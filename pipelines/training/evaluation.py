"""Evaluation on held-out prompts at fixed seeds: the trained reward, held-out rewards, and diversity."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from steer.errors import InputError
from steer.pipelines.training.config import TrainingConfig
from steer.pipelines.training.method import OnChunk, rows_of, sampler_of
from steer.pipelines.training.signals import unwrapped
from steer.reward import Reward, Scores, Texts, compare, compares_images, mean_over_frames, score_components
from steer.rewards.judges import Tournament
from steer.rewards.learned import LearnedReward
from steer.training.distributed import DistributedContext
from steer.training.forward import Policy
from steer.training.overoptimization import MIN_ESS, chi_square_estimate, interval
from steer.training.rollout import Kernel, Rows, Sampler, Trajectories
from steer.training.signals import within_prompt_correlation


@dataclass(frozen=True)
class EvalResult:
    """An evaluation of P prompts × K samples after `step` updates.

    rewards    (P, K) by name, the trained reward first
    diversity  mean distance between two samples of a prompt, 0 to 1, see `diversity`; 0 for K = 1
    images     (P·K, 3, H, W) in [0, 1]; videos (P·K, F, 3, H, W); or texts
    members    rewards (P, K) of the members if the trained reward is an ensemble, by name
    kl         KL to the reference, nats per trajectory, if measured
    log_ratios (N,) log p/p_ref of trajectories with noise, if measured and the images are of such trajectories
    """

    step: int
    prompts: tuple[str, ...]
    rewards: Mapping[str, Tensor]
    diversity: float
    images: Any
    members: Mapping[str, Tensor] = field(default_factory=dict)
    kl: float | None = None
    log_ratios: Tensor | None = None

    def means(self) -> tuple[float, float]:
        """Return the means of the trained and the first held-out reward (the trained one where there is none)."""
        collected = [values.mean().item() for values in self.rewards.values()]
        return collected[0], collected[1] if len(collected) > 1 else collected[0]

    def record(self) -> dict[str, Any]:
        """Return plain values: [mean, low, high] of every reward, a 95 % bootstrap interval over the prompts.

        Also the standard deviation of each reward over all images, the means of each held-out reward by prompt, and,
        with several images per prompt, Pearson's correlation of each held-out reward with the trained reward within
        prompts, and the deviation of each within prompts. With log_ratios, χ² to the reference and its effective sample
        size, without χ² where that is below MIN_ESS.
        """
        members = {f"member/{name}": values for name, values in self.members.items()}
        values: dict[str, Any] = {name: interval(one.mean(1)) for name, one in self.rewards.items()}
        values |= {name: one.double().mean().item() for name, one in members.items()}
        every = {**self.rewards, **members}
        values |= {f"deviation/{name}": one.double().std(correction=0).item() for name, one in every.items()}
        trained, *held_out = self.rewards
        for name in held_out:
            correlation = within_prompt_correlation(self.rewards[trained], self.rewards[name])
            values |= {f"correlation/{name}": correlation} if math.isfinite(correlation) else {}
        values |= {"by_prompt": {name: self.rewards[name].mean(1).tolist() for name in held_out}} if held_out else {}
        if len(self.rewards[trained][0]) > 1:
            values |= {f"within/{name}": one.double().var(1).mean().sqrt().item() for name, one in self.rewards.items()}
        if self.log_ratios is not None:
            chi_square, ess = chi_square_estimate(self.log_ratios)
            values |= {"chi_square_ess": ess} if math.isfinite(ess) else {}
            values |= {"chi_square": chi_square} if ess >= MIN_ESS else {}
        values |= {"diversity": self.diversity} | ({} if self.kl is None else {"kl": self.kl})
        return {"step": self.step} | {f"eval/{name}": value for name, value in values.items()}


@dataclass(frozen=True)
class Evaluator:
    """The prompts and rewards of all evaluations of a run, how samples are drawn, and the conditions by prompt.

    The win rates of a tournament within one policy are ½. It is evaluated instead by its judge's P(image ≻ image of the
    reference from the same noise), the win rate against the model before the training.

    base  images of the reference by the number of their chunk, drawn once per process
    """

    prompts: Sequence[str]
    trained: Reward
    held_out: Sequence[Reward]
    draw: Callable[[Sampler, Rows], tuple[Trajectories, Tensor]] = Sampler.rollout
    conditions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    base: dict[int, Tensor] = field(default_factory=dict)

    def evaluate(
        self,
        pipe: Any,
        config: TrainingConfig,
        step: int,
        prepared: Any,
        before: OnChunk,
        context: DistributedContext,
        reference: Policy = nullcontext,
    ) -> EvalResult:
        """Evaluate the same prompts and seeds at every step; their chunks are distributed over the processes."""
        size, sampler = config.num_generations_eval, sampler_of(pipe, config, prepared, "model", self.conditions)
        rewards = {reward.name: reward for reward in (self.trained, *self.held_out)}
        rows = rows_of(self.prompts, size, config.seed, "evaluation", shared_start=False)
        chunks = rows.split(_chunk_size(rewards.values(), config))
        ensemble = isinstance(unwrapped(self.trained), LearnedReward)
        judged = any(isinstance(unwrapped(one), Tournament) for one in rewards.values())
        collected: list[tuple[int, Any, dict[str, Tensor], dict[str, Tensor]]] = []
        for turn in range(0, len(chunks), context.world_size):
            # All processes sample in every turn, as a sharded denoiser requires; duplicates are left out.
            number = min(turn + context.rank, len(chunks) - 1)
            before()
            rows = chunks[number]
            images = self._images(sampler, rows, config)
            if judged and number not in self.base:
                with reference():
                    self.base[number] = self._images(sampler, rows, config)
            if turn + context.rank < len(chunks):
                # Images are scored on the device of the pipeline, and only then moved to the CPU.
                with torch.no_grad():
                    scores = {name: self._score(one, images, rows.prompts, number) for name, one in rewards.items()}
                members = scores[self.trained.name][1] if ensemble else {}
                own = images if isinstance(images, Texts) else images.cpu()
                collected.append((number, own, {name: total for name, (total, _) in scores.items()}, members))
        in_order = sorted(context.gather(collected), key=lambda one: one[0])
        _, drawn, chunk_scores, chunk_members = zip(*in_order, strict=True)
        kl, ratios = None, None
        if config.eval_kl:
            exact = sampler_of(pipe, config, prepared, "float32", self.conditions)
            divergence = policy_divergence(exact, chunks[context.rank % len(chunks)], reference)
            kl, ratios = torch.cat(list(context.gather([divergence])), 1)
            kl = kl.mean().item()
        scored = _by_name(chunk_scores, size)
        by_member = _by_name(chunk_members, size) if len(chunk_members[0]) > 1 else {}
        images = _concatenate(drawn)
        ratios = ratios if config.samples_with_eta and not config.evaluates_by_ode else None  # of other samples
        return EvalResult(step, tuple(self.prompts), scored, diversity(images, size), images, by_member, kl, ratios)

    def _images(self, sampler: Sampler, rows: Rows, config: TrainingConfig) -> Tensor:
        return sampler.ode_images(rows) if config.evaluates_by_ode else self.draw(sampler, rows)[1]

    def _score(self, reward: Reward, images: Tensor, prompts: Sequence[str], number: int) -> Scores:
        """Return the scores (N,) of a chunk, and of the reward's components."""
        if not isinstance(tournament := unwrapped(reward), Tournament):
            return mean_over_frames(images, partial(score_components, reward, prompts=prompts), reward)

        def win_rates(both: Tensor) -> Scores:
            own, base = both.chunk(2)
            return compare(tournament.judge, own, base, prompts), {}

        return mean_over_frames(torch.cat([images, self.base[number]]), win_rates)


def _chunk_size(rewards: Iterable[Reward], config: TrainingConfig) -> int:
    """Return the rows of a chunk: `micro_batch`, in whole prompts where a reward compares the images of a prompt."""
    chunk, size = config.micro_batch, config.num_generations_eval
    # A tournament compares each image with its own base image.
    comparing = [one for one in rewards if compares_images(one) and not isinstance(unwrapped(one), Tournament)]
    if comparing and chunk < size:
        raise InputError(
            f"reward {comparing[0].name!r} compares the images of a prompt: micro_batch must be at least "
            f"num_generations_eval, {size}, got {chunk}"
        )
    return chunk // size * size if comparing else chunk


def policy_divergence(sampler: Sampler, rows: Rows, reference: Policy, other: Sampler | None = None) -> Tensor:
    """Return the sums over steps of KL(p ‖ p_ref) and of log p/p_ref (2, N) in nats, along trajectories of p.

    reference  context in which the denoiser has the weights of the reference
    other      sampler of the reference, where its text embeddings differ
    """
    stored, _ = sampler.rollout(rows)
    kernels: list[Kernel] = []
    total = torch.zeros(2, len(rows), dtype=torch.float64)

    def add(t: int, kernel: Kernel, x_s: Tensor) -> None:
        ratio = kernels[t].log_prob(x_s) - kernel.log_prob(x_s)
        total.add_(torch.stack([kernels[t].kl(kernel), ratio]).cpu())

    sampler.replay(stored, lambda t, kernel, x_s: kernels.append(kernel))
    with reference():
        (other or sampler).replay(stored, add)
    return total


def _by_name(chunks: Sequence[Mapping[str, Tensor]], samples: int) -> dict[str, Tensor]:
    """Concatenate the scores (N,) of chunks: (P, K) by name."""
    return {name: torch.cat([one[name] for one in chunks]).view(-1, samples) for name in chunks[0]}


def _concatenate(drawn: Sequence[Any]) -> Any:
    if not isinstance(drawn[0], Texts):
        return torch.cat(list(drawn))
    ids = torch.cat([texts.ids.cpu() for texts in drawn])  # texts of a model have ids
    return Texts([text for texts in drawn for text in texts], ids)


def diversity(images: Any, samples: int) -> float:
    """Return the mean distance between two different samples of one prompt; 0 for one sample.

    For images, the root mean square over pixels; for texts with ids, the share of tokens that differ.
    """
    if isinstance(images, Texts) and images.ids is not None:
        groups = images.ids.view(len(images) // samples, samples, -1)
        distances = (groups[:, :, None] != groups[:, None]).double().mean(-1)
    else:
        flat = images.flatten(1).view(-1, samples, images[0].numel())
        distances = torch.stack([torch.cdist(group, group) for group in flat]) / flat.shape[2] ** 0.5
    return (distances.sum((1, 2)) / max(samples * (samples - 1), 1)).mean().item()
