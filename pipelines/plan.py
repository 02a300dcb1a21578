"""When a steered run reads rewards, and how many of its particles go on from there."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from steer.errors import InputError


@dataclass(frozen=True)
class Plan:
    """Of every prompt of a run alike.

    asked   solver steps, from 0, at which rewards are read; None: the method's own
    narrow  {solver step: particles that go on from it}, fewer and fewer; rewards are read there too
    target  once r(x̂0) of a particle is as high, the best one alone goes on, and no more rewards are read
    """

    asked: Iterable[int] | None = None
    narrow: Mapping[int, int] = field(default_factory=dict)
    target: float | None = None

    def __post_init__(self) -> None:
        if self.asked is not None:
            object.__setattr__(self, "asked", frozenset(self.asked))
        if self.target is not None and not math.isfinite(self.target):
            raise InputError(f"target_reward must be a finite number, got {self.target}")

    def check_size(self, size: int) -> None:
        """Raises InputError where the numbers of particles are not fewer and fewer, from `size` on."""
        before = size
        for step, count in sorted(self.narrow.items()):
            if not 1 <= count < before:
                raise InputError(
                    f"narrow: {count} particles from step {step} on, of {before}: they must be fewer and fewer, and at "
                    "least 1"
                )
            before = count

    @property
    def narrows(self) -> bool:
        """Whether a run may go on with fewer particles than it began with."""
        return bool(self.narrow) or self.target is not None

    def count(self, step: int, size: int) -> int:
        """How many of `size` particles go on from this step."""
        return self.narrow.get(step, size)

    def reached(self, rewards: Tensor) -> bool:
        """Whether one of the rewards (1, K) is as high as the target."""
        return self.target is not None and bool((rewards >= self.target).any())

    def steps(self, own: Iterable[int], first: int, last: int, total: int, name: str) -> frozenset[int]:
        """The steps asked for, or the method's `own`, and those at which particles get fewer: from `first` to `last`.

        Raises InputError for others, in a run of `total` steps; `name` is what the caller knows them as.
        """
        for told, steps in ((name, self.asked or ()), ("narrow", self.narrow)):
            if wrong := sorted(step for step in steps if not first <= step <= last):
                raise InputError(f"{told}: {wrong[0]} is not from {first} to {last}, in a run of {total} steps")
        usual = {min(step, last) for step in own} if self.asked is None else self.asked
        return frozenset(step for step in usual if step >= first) | frozenset(self.narrow)
