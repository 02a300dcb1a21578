"""How alike two rewards are, measured on scores that both gave to the same images."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy import stats
from torch import Tensor

from steer.errors import InputError

Scores = Tensor | Sequence[float] | np.ndarray
ROUNDING = 1e-12  # of a score's size: smaller differences from a prompt's mean are rounding, not preference


@dataclass(frozen=True)
class Agreement:
    """Of `n` images: rank correlations −1..1 over all of them, pairs alike and STARC distance 0..1 within prompts.

    nan where it cannot be told: correlations of a constant, the others where no prompt has two images.
    """

    n: int
    spearman: float
    kendall: float
    pairs_alike: float
    starc: float


def compare(a: Scores, b: Scores, groups: Sequence[str]) -> Agreement:
    """All measures at once, of scores a and b (N,) and the N prompts `groups`.

    Raises InputError where they do not fit together, are fewer than two, or are not finite.
    """
    first, second = _checked(a, b, groups)
    told = max(map(len, _rows_by_group(groups))) > 1
    return Agreement(
        n=len(first),
        spearman=spearman(first, second),
        kendall=kendall(first, second),
        pairs_alike=pairs_alike(first, second, groups),
        starc=starc_distance(first, second, groups) if told else float("nan"),
    )


def spearman(a: Scores, b: Scores) -> float:
    """Spearman's ρ of scores (N,), −1..1: the linear correlation of their ranks. nan where one is constant."""
    first, second = _checked(a, b)
    return float("nan") if _constant(first, second) else float(stats.spearmanr(first, second).statistic)


def kendall(a: Scores, b: Scores) -> float:
    """Kendall's τ_b of scores (N,), −1..1: pairs ranked alike minus unlike, mending ties. nan where one is constant."""
    first, second = _checked(a, b)
    return float("nan") if _constant(first, second) else float(stats.kendalltau(first, second).statistic)


def pairs_alike(a: Scores, b: Scores, groups: Sequence[str]) -> float:
    """Share 0..1 of the pairs of images of one prompt that both rewards rank alike; a tie in either counts 1/2.

        mean over i < j of one prompt of (1 + sign(aᵢ − aⱼ) · sign(bᵢ − bⱼ)) / 2

    Only images of one prompt are compared: that is what steering and best-of-n choose among. nan where no prompt
    has two images.
    """
    first, second = _checked(a, b, groups)
    agreeing, pairs = 0.0, 0
    for rows in _rows_by_group(groups):
        x, y = first[rows], second[rows]
        for k in range(len(rows) - 1):
            agreeing += float(np.sum(1 + np.sign(x[k] - x[k + 1 :]) * np.sign(y[k] - y[k + 1 :]))) / 2
            pairs += len(rows) - 1 - k
    return agreeing / pairs if pairs else float("nan")


def starc_distance(a: Scores, b: Scores, groups: Sequence[str]) -> float:
    """A STARC distance between rewards over images, 0..1, of scores (N,) and the N prompts `groups`.

        c(r)ᵢ = rᵢ − mean of r over the images of i's prompt,   s(r) = c(r) / ‖c(r)‖₂,   d = ‖s(a) − s(b)‖₂ / 2

    Source: STARC (arXiv 2309.15257): canonicalise, normalise, measure. There the canonical form removes potential
    shaping; here it removes a shift for each prompt, which likewise changes no ranking of a prompt's images. So 0:
    the same up to such shifts and a positive scale; 1: opposite. d = √((1 − ρ) / 2) with ρ the correlation within
    prompts. A reward that is constant within each prompt has ‖c(r)‖ = 0 and keeps s(r) = 0: 1/2 from every other
    reward, 0 from another constant.
    """
    first, second = _checked(a, b, groups)
    return float(np.linalg.norm(_standardised(first, groups) - _standardised(second, groups)) / 2)


def _standardised(scores: np.ndarray, groups: Sequence[str]) -> np.ndarray:
    canonical = scores.copy()
    for rows in _rows_by_group(groups):
        canonical[rows] -= scores[rows].mean()
    norm = np.linalg.norm(canonical)
    if norm <= ROUNDING * np.linalg.norm(scores):
        return np.zeros_like(scores)
    return canonical / norm


def _rows_by_group(groups: Sequence[str]) -> list[list[int]]:
    rows: dict[str, list[int]] = {}
    for row, group in enumerate(groups):
        rows.setdefault(group, []).append(row)
    return list(rows.values())


def _constant(*scores: np.ndarray) -> bool:
    return any(np.ptp(some) == 0 for some in scores)


def _checked(a: Scores, b: Scores, groups: Sequence[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Both as (N,) fp64. Raises InputError where they cannot be compared."""
    first, second = (np.asarray(scores, dtype=np.float64) for scores in (a, b))
    sizes = [first.shape, second.shape, *([] if groups is None else [(len(groups),)])]
    if first.ndim != 1 or any(one != other for one, other in pairwise(sizes)):
        raise InputError(f"two rewards are compared on scores of the same images, one number each, got shapes {sizes}")
    if len(first) < 2:
        raise InputError(f"two rewards are compared on at least 2 images, got {len(first)}")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise InputError("two rewards are compared on finite scores: leave out the images with nan or inf")
    return first, second
