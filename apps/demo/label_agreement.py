"""How far annotators agree who judged the same lots."""

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

NOBODY = "How far people agree shows once two of them have judged the same images."


@dataclass(frozen=True)
class Agreement:
    """Of the lots that two or more judged.

    annotators  names of those who judged some of them
    share       of all pairs of judgements of one lot, how many are the same, 0..1
    kappa       Cohen's of two annotators, Fleiss' of more, at most 1; not a number where chance alone would agree
    """

    annotators: tuple[str, ...]
    lots: int
    share: float
    kappa: float

    def __str__(self) -> str:
        people = len(self.annotators)
        who = "both of two people" if people == 2 else f"two or more of {people} people"
        sets = "set of images was" if self.lots == 1 else "sets of images were"
        told = f"{self.lots} {sets} judged by {who}. They gave the same answer {self.share:.0%} of the time"
        name = "Cohen's" if people == 2 else "Fleiss'"
        kappa = "" if math.isnan(self.kappa) else f"; {name} κ = {self.kappa:.2f}, where 0 is chance and 1 is always"
        return f"{told}{kappa}."


def agreement(judgements: Mapping[str, Mapping[str, Hashable]]) -> Agreement | None:
    """Of judgements by lot and annotator; None while no lot was judged by two."""
    several = [given for given in judgements.values() if len(given) > 1]
    if not several:
        return None
    names = tuple(sorted({name for given in several for name in given}))
    pairs = [pair for given in several for pair in combinations(given.values(), 2)]
    share = sum(a == b for a, b in pairs) / len(pairs)
    if len(names) == 2:
        return Agreement(names, len(several), share, cohen([(given[names[0]], given[names[1]]) for given in several]))
    return Agreement(names, len(several), share, fleiss([list(given.values()) for given in several]))


def cohen(pairs: Sequence[tuple[Hashable, Hashable]]) -> float:
    """κ = (p_o − p_e) / (1 − p_e), p_e = Σ_c p_1(c) p_2(c) of two annotators' own shares (Cohen 1960)."""
    count = len(pairs)
    p_o = sum(a == b for a, b in pairs) / count
    first, second = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    p_e = sum(first[c] * second[c] for c in first) / count**2
    return (p_o - p_e) / (1 - p_e) if p_e < 1 else math.nan


def fleiss(rows: Sequence[Sequence[Hashable]]) -> float:
    """κ = (P − p_e) / (1 − p_e), p_e = Σ_c p(c)² of the shares of all judgements (Fleiss 1971).

    rows  the judgements of each lot, two or more of it; P is the mean over lots of how many of its pairs are the same
    """
    counts = [Counter(row) for row in rows]
    alike = [
        sum(n * (n - 1) for n in count.values()) / (len(row) * (len(row) - 1))
        for count, row in zip(counts, rows, strict=True)
    ]
    total = sum(map(len, rows))
    p_e = sum((n / total) ** 2 for n in sum(counts, Counter[Hashable]()).values())
    return (sum(alike) / len(alike) - p_e) / (1 - p_e) if p_e < 1 else math.nan
