"""Several rewards as one number: pure functions of scores (M, N), M rewards of N images, that return (N,)."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from numbers import Real
from typing import Any, TypeGuard

import torch
from torch import Tensor

from steer.contract import RewardError

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
OPTIONS: dict[str, tuple[str, ...]] = {"mean-std": ("lam",), "quantile": ("q",)}


def aggregate(name: str, options: Mapping[str, Any], where: str) -> Aggregate:
    """One of them with its options. Raises RewardError, which begins with `where`, for options that cannot be."""
    allowed = OPTIONS.get(name, ())
    for option, value in options.items():
        if option not in allowed:
            raise RewardError(f"{where}: {name} takes {' and '.join(allowed) or 'no options'}, not {option!r}")
        if not is_number(value) or (option == "q" and not 0 <= value <= 1):
            raise RewardError(
                f"{where}: {option} must be a {'number from 0 to 1' if option == 'q' else 'finite number'}"
            )
    return partial(AGGREGATES[name], **{option: float(value) for option, value in options.items()})


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is one real number, finite as a float."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False
