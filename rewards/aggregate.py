"""Several rewards as one number: pure functions of scores (M, N), M rewards of N images, that return (N,)."""

from collections.abc import Callable

import torch
from torch import Tensor

Aggregate = Callable[[Tensor], Tensor]


def mean(scores: Tensor) -> Tensor:
    """(1/M) Σ_m r_m."""
    return scores.mean(0)


def total(scores: Tensor) -> Tensor:
    """Σ_m r_m."""
    return scores.sum(0)


def worst(scores: Tensor) -> Tensor:
    """min_m r_m: only what pleases all pleases (worst-case optimisation, arXiv 2310.02743)."""
    return scores.amin(0)


def mean_minus_std(scores: Tensor, lam: float = 1.0) -> Tensor:
    """mean_m r_m − λ std_m r_m, std with M in the denominator (uncertainty-weighted, arXiv 2310.02743)."""
    # The tiny offset keeps the gradient finite where all agree.
    spread = (scores.var(0, correction=0) + 1e-12).sqrt()
    return scores.mean(0) - lam * spread


def quantile(scores: Tensor, q: float = 0.25) -> Tensor:
    """The q-quantile over the rewards, linear between neighbours; q = 0: the worst, ½: the median."""
    return torch.quantile(scores, q, dim=0)


AGGREGATES: dict[str, Aggregate] = {
    "mean": mean,
    "sum": total,
    "min": worst,
    "mean-std": mean_minus_std,
    "quantile": quantile,
}
