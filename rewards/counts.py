"""Preference pairs from a platform's counts: how often an image was shown, and how often it was liked.

θ of an image, the probability that a viewer likes it, has the posterior Beta(½ + liked, ½ + shown − liked). The label
of two images of a prompt is P(θ_a > θ_b), if it differs enough from ½. Raw likes would prefer the images that were
shown most (after Social Reward, arXiv 2402.09872).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.stats import beta

from steer.arguments import is_number
from steer.reward import RewardError
from steer.rewards.objectives import PreferenceLabels
from steer.rewards.preference_pairs import Captions, Pairs, draw_pairs, read_captions, read_rows

QUANTILES = 1024
SHOWN, LIKED = "shown", "liked"


def probability_better(a: tuple[float, float], b: tuple[float, float]) -> float:
    """Return P(θ_a > θ_b) of two images, each (shown, liked), by the quantiles of θ_a."""
    (shown_a, liked_a), (shown_b, liked_b) = a, b
    u = (np.arange(QUANTILES) + 0.5) / QUANTILES
    first = beta(0.5 + liked_a, 0.5 + shown_a - liked_a).ppf(u)
    return float(beta(0.5 + liked_b, 0.5 + shown_b - liked_b).cdf(first).mean())


def read_counts(path: Path, images: Path | None = None) -> tuple[Captions, list[tuple[float, float]]]:
    """Read rows of image, prompt, shown and liked. Raises RewardError that names file and row."""
    captions, counts = read_captions(path, images), []
    for number, row in enumerate(read_rows(path), 1):
        shown, liked = row.get(SHOWN), row.get(LIKED)
        if not is_number(shown) or not is_number(liked) or not 0 <= liked <= shown:
            raise RewardError(
                f"{path}, row {number}: shown and liked must be counts, liked at most shown: got {row}"[:200]
            )
        counts.append((float(shown), float(liked)))
    return captions, counts


def pairs_of_counts(
    captions: Captions, counts: Sequence[tuple[float, float]], certainty: float = 0.3, limit: int = 32, seed: int = 0
) -> Pairs:
    """Pair the images of each prompt, with the label P(θ_a > θ_b) and the strength |2 P − 1|.

    certainty  pairs with |P − ½| below it are left out
    limit      maximum number of pairs of each prompt, drawn without repetition
    Raises RewardError if no pair is left.
    """
    if not 0 <= certainty < 0.5:
        raise RewardError(f"--certainty must be from 0 to below 0.5, got {certainty}")
    labelled = [(a, b, probability_better(counts[a], counts[b])) for a, b in draw_pairs(captions.prompts, limit, seed)]
    kept = [(a, b, p) for a, b, p in labelled if abs(p - 0.5) >= certainty]
    if not kept:
        raise RewardError(f"no two images of a prompt differ with |P − ½| of at least {certainty}: lower --certainty")
    first, second = (tuple(captions.images[row] for row in column) for column in list(zip(*kept, strict=True))[:2])
    choice = torch.tensor([p for *_, p in kept])
    labels = PreferenceLabels(choice, (2 * choice - 1).abs())
    return Pairs(first, second, tuple(captions.prompts[a] for a, *_ in kept), labels)
