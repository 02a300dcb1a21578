"""A lower bound of the truth from an ensemble of rewards: quantile regression, aggregated and conformalised.

lower(A, B, C, from=FILE): with probability `level`, the truth of a fresh image is at least its lower bound.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor

from steer.errors import InputError
from steer.files import dumps_with_checksum, loads_with_checksum, write_text
from steer.reward import Reward, RewardError
from steer.rewards.compose import CompositeReward

MIN_IMAGES = 40  # half of them fit the quantiles, half make the bound valid
Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class LowerBound:
    """L(x) = Σ_m w_m q_m(x) − margin, with q_m(x) = a_m + b_m r_m(x) + c_m s(x), the members' quantiles of the truth.

    s(x) is the standard deviation over the members of (r_m − mean_m) / std_m: their disagreement.
    """

    names: tuple[str, ...]
    truth: str
    level: float
    count: int  # number of calibration images
    means: tuple[float, ...]
    stds: tuple[float, ...]
    quantiles: tuple[tuple[float, float, float], ...]  # a_m, b_m, c_m
    weights: tuple[float, ...]
    margin: float

    def of(self, scores: Tensor) -> Tensor:
        """Compute the bound (N,) from the members' scores (M, N); differentiable."""
        columns = [torch.tensor(one, dtype=scores.dtype, device=scores.device)[:, None] for one in self._columns()]
        mean, std, a, b, c, weight = columns
        disagreement = (((scores - mean) / std).var(0, correction=0) + 1e-12).sqrt()
        return (weight * (a + b * scores + c * disagreement)).sum(0) - self.margin

    def _columns(self) -> tuple[Sequence[float], ...]:
        a, b, c = zip(*self.quantiles, strict=True)
        return self.means, self.stds, a, b, c, self.weights

    def save(self, path: Path) -> None:
        """Write JSON atomically. Raises OSError."""
        write_text(path, dumps_with_checksum({"bound": asdict(self)}))


def read_bound(path: Path) -> LowerBound:
    """Read a file of `steer rewards calibrate --bound`. Raises RewardError for any other file."""
    try:
        record = loads_with_checksum(path.read_text(encoding="utf-8"))["bound"]
        for name in ("names", "means", "stds", "weights"):
            record[name] = tuple(record[name])
        record["quantiles"] = tuple((float(a), float(b), float(c)) for a, b, c in record["quantiles"])
        bound = LowerBound(**record)
        sizes = {len(one) for one in (bound.names, bound.means, bound.stds, bound.quantiles, bound.weights)}
        numbers = [float(n) for column in bound._columns() for n in (*column, bound.margin, bound.level)]
        valid = len(sizes) == 1 and all(map(math.isfinite, numbers)) and all(std > 0 for std in bound.stds)
    except OSError as error:
        raise RewardError(f"{path}: cannot read the bound ({error.strerror})") from error
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError, InputError) as error:
        raise RewardError(f"{path}: not a bound of `steer rewards calibrate --bound` ({str(error)[:60]})") from error
    if not valid:
        raise RewardError(f"{path}: the bound in this file has numbers that are not finite, or columns that do not fit")
    return bound


def fit_lower_bound(
    names: Sequence[str], scores: Tensor, truth: Tensor, groups: Sequence[str], name: str, level: float, seed: int = 0
) -> LowerBound:
    """Fit L with P(truth ≥ L) ≥ level on fresh images, from scores (M, N) and the truth (N,).

        q_m   quantile regression of the truth at α = 1 − level on r_m and the disagreement (Koenker and Bassett 1978)
        w     on the simplex, the weights that minimise the pinball loss of Q = Σ_m w_m q_m
        L     = Q − the ⌈(n + 1) level⌉-th smallest of Q(x_i) − y_i over n other images (CQR, arXiv 1905.03222)

    groups  the prompt of each image: the images of one prompt are all used to fit, or all to calibrate
    Raises InputError for fewer than MIN_IMAGES images, a level that n images cannot reach, and constant scores.
    """
    if not 0 < level < 1:
        raise InputError(f"--level must be between 0 and 1, got {level}")
    r, y = scores.double().numpy(), truth.double().numpy()
    if len(y) < MIN_IMAGES:
        raise InputError(f"a bound needs at least {MIN_IMAGES} images, got {len(y)}: sample more")
    if constant := [one for one, row in zip(names, r, strict=True) if np.ptp(row) == 0]:
        raise InputError(f"reward {constant[0]!r} gives every image the same score: leave it out of the bound")
    fitted = _half(groups, seed)
    means, stds = r[:, fitted].mean(1), r[:, fitted].std(1).clip(min=1e-12)
    disagreement = ((r - means[:, None]) / stds[:, None]).std(0)
    ones, alpha = np.ones_like(y), 1 - level
    designs = [np.stack([ones, row, disagreement * (len(r) > 1)], 1) for row in r]
    quantiles = [fit_pinball(design[fitted], y[fitted], alpha) for design in designs]
    q = np.stack([design @ one for design, one in zip(designs, quantiles, strict=True)], 1)
    weights = fit_pinball(q[fitted], y[fitted], alpha, simplex=True)
    excess = np.sort((q @ weights - y)[~fitted])
    rank = math.ceil((len(excess) + 1) * level)
    if rank > len(excess):
        raise InputError(f"--level {level} needs at least {math.ceil(2 * level / alpha)} images, got {len(y)}")
    return LowerBound(
        *(tuple(names), name, level, len(y), tuple(means.tolist()), tuple(stds.tolist())),
        quantiles=tuple((float(a), float(b), float(c)) for a, b, c in quantiles),
        weights=tuple(weights.tolist()),
        margin=float(excess[rank - 1]),
    )


def _half(groups: Sequence[str], seed: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Choose about half of the images, by whole prompts; with few prompts, by single images."""
    known = list(dict.fromkeys(groups))
    rows = np.array([known.index(group) for group in groups]) if len(known) >= MIN_IMAGES else np.arange(len(groups))
    order = np.random.default_rng(seed).permutation(rows.max() + 1)
    return np.isin(rows, order[: len(order) // 2])


def fit_pinball(design: Array, y: Array, tau: float, simplex: bool = False) -> Array:
    """Return the β (K,) that minimises Σ_i τ max(y_i − x_i·β, 0) + (1 − τ) max(x_i·β − y_i, 0), as a linear program.

    simplex  β ≥ 0 and Σ β = 1
    """
    count, width = design.shape
    cost = np.concatenate([np.zeros(width), np.full(count, tau), np.full(count, 1 - tau)])
    rows, right = np.hstack([design, np.eye(count), -np.eye(count)]), y
    if simplex:
        rows = np.vstack([rows, np.concatenate([np.ones(width), np.zeros(2 * count)])])
        right = np.append(y, 1.0)
    bounds = [(0, None) if simplex else (None, None)] * width + [(0, None)] * (2 * count)
    solved = linprog(cost, A_eq=rows, b_eq=right, bounds=bounds, method="highs")
    if not solved.success:
        raise InputError(f"the quantiles cannot be fitted: {solved.message}")
    return np.asarray(solved.x[:width])


class LowerBoundReward(CompositeReward):
    """Lower bound on the truth from several rewards, in the truth's unit. Optimising it voids its level.

    Raises RewardError if the bound was fitted to other rewards.
    """

    def __init__(self, rewards: Sequence[Reward], bound: LowerBound) -> None:
        super().__init__(rewards, f"lower({', '.join(reward.name for reward in rewards)})")
        if tuple(reward.name for reward in rewards) != bound.names:
            raise RewardError(f"{self.name}: its bound is of {', '.join(bound.names)}: give these, in this order")
        self.bound = bound

    def total(self, components: Mapping[str, Tensor], prompts: Sequence[str]) -> Tensor:
        """Compute the bound (N,), in the unit of the truth."""
        return self.bound.of(torch.stack([components[name] for name in self._names]))


def describe(bound: LowerBound) -> str:
    """Describe a bound in one line."""
    weights = ", ".join(f"{name} {weight:.2f}" for name, weight in zip(bound.names, bound.weights, strict=True))
    return f"{bound.truth} ≥ bound on {bound.level:.0%} of fresh images ({bound.count} images); weights: {weights}"
