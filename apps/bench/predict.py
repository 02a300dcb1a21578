"""What a ratio should be, before the seconds are looked at: Amdahl's law on the share of time that is touched."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from steer.apps.bench.clock import Measured


@dataclass(frozen=True)
class Predicted:
    """share   of the slower variant's seconds that the other does without, 0..1 (below 0: it does more)
    ratio   that follows; None where a part gets faster by an unknown factor
    at_most where so: what it would be if that part took no time
    """

    share: float
    ratio: float | None = None
    at_most: float | None = None


Predict = Callable[[Measured, Measured], Predicted]


# Amdahl 1967: if a share s of the time is saved, what is left is 1 − s, and the ratio is 1 / (1 − s).
def amdahl(share: float) -> float:
    """The ratio of the whole to what is left."""
    return 1 / (1 - share) if share < 1 else float("inf")


def by_counts(over: Measured, under: Measured) -> Predicted:
    """Every part costs in both what a row of it costs in `over` (or in `under`, where only that one has it).

    Of a variant whose calls cannot be counted nothing is foretold."""
    if not under.counts:
        return Predicted(0.0)
    saved = 0.0
    for part in over.counts.keys() | under.counts.keys():
        told = over if over.counts.get(part) else under
        row = told.parts[part] / told.counts[part]
        saved += row * (over.counts.get(part, 0) - under.counts.get(part, 0))
    share = saved / median(over.seconds)
    return Predicted(share, amdahl(share))


def bounded(share: float) -> Predicted:
    """A share of the time gets faster, nobody knows how much."""
    return Predicted(share, at_most=amdahl(share))
