"""Signals, the inputs of losses made from rewards: several rewards on one scale, Pareto front, choice of samples."""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Generator, Tensor

from steer.errors import InputError
from steer.training.losses import dominates, group_advantages

SampleFilter = Literal["none", "best", "best-random", "best-worst"]


# Group-wise normalisation before the sum (GDPO, arXiv 2601.05242): A = Σ_m w_m (r_m − mean_K)/(std_K + 10⁻⁶).
# Standardising the sum instead gives all the weight to the component with the largest spread.
def normalized_sum(components: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Return the weighted sum (B, K) of components (B, K), each standardised among the samples of a prompt."""
    return torch.stack([weight * group_advantages(components[name], True) for name, weight in weights.items()]).sum(0)


def pareto_front(rewards: Tensor) -> Tensor:
    """Return (B, K), true for samples that no other sample of their prompt dominates in rewards (B, K, M)."""
    return ~dominates(rewards).any(1)


# Parrot (arXiv 2401.05675, alg. 1): only samples of the Pareto front have a gradient.
def pareto_advantages(rewards: Tensor) -> Tensor:
    """Return Σ_m (r_m − mean_K)/std_K (B, K) of rewards (B, K, M) on the Pareto front, 0 for dominated samples."""
    total = torch.stack([group_advantages(one, True) for one in rewards.unbind(-1)]).sum(0)
    return torch.where(pareto_front(rewards), total, 0.0)


# Policy filtration (PF-PPO, arXiv 2409.06957): a reward model is most reliable at the ends of its ranking.
def kept_samples(rewards: Tensor, kind: SampleFilter, keep: int, seed: int) -> Tensor:
    """Return the ascending indices (B, m) of the samples to learn from, by their rewards (B, K).

    best         the m highest rewards
    best-random  the ⌈m/2⌉ highest, the others at random
    best-worst   the ⌈m/2⌉ highest and the ⌊m/2⌋ lowest

    Raises InputError where m is not from 1 to K.
    """
    samples = rewards.shape[1]
    if not 1 <= keep <= samples:
        raise InputError(f"filter_keep must be from 1 to num_generations = {samples}, got {keep}")
    ranked = rewards.argsort(dim=1, descending=True, stable=True)
    best = {"none": samples, "best": keep}.get(kind, math.ceil(keep / 2))
    rest = ranked[:, best:]
    if kind == "best-random":
        noise = torch.rand(rest.shape, generator=Generator().manual_seed(seed))
        rest = rest.gather(1, noise.argsort(1))[:, : keep - best]
    elif kind == "best-worst":
        rest = rest[:, rest.shape[1] - (keep - best) :]
    else:
        rest = rest[:, :0]
    return torch.cat([ranked[:, :best], rest], 1).sort(1).values


def filter_reliability(proxy: Tensor, truth: Tensor, keep: int, seed: int = 0) -> dict[str, float]:
    """Return R² of proxy and truth (P, K) among the samples that each filter keeps, both centred within a prompt.

    PF-PPO chooses the filter with the largest R² (sec. 4.2); samples of one prompt are compared, as in losses.
    """
    kinds: tuple[SampleFilter, ...] = ("none", "best", "best-random", "best-worst")
    results: dict[str, float] = {}
    for kind in kinds:
        kept = kept_samples(proxy, kind, keep, seed)
        results[kind] = within_prompt_correlation(proxy.gather(1, kept), truth.gather(1, kept)) ** 2
    return results


def within_prompt_correlation(first: Tensor, second: Tensor) -> float:
    """Return Pearson's correlation of (P, K) and (P, K) after centring each prompt; NaN if either has no spread."""
    x, y = (values.double() - values.double().mean(1, keepdim=True) for values in (first, second))
    norm = x.norm() * y.norm()
    return float((x * y).sum() / norm) if norm > 0 else math.nan
