"""When a steered run reads rewards, and how many of its particles go on from there."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Generator, Tensor

from steer.choices import choose
from steer.errors import InputError
from steer.particles import Particles

Selected = tuple[Particles, Tensor | None]  # and their ancestors (B, n); None: all stay where they are


class Algorithm(Protocol):
    """What rewards (B, K) of x̂0 do to the particles of a run, and which of them (B, count) the slots go on from."""

    @property
    def lam(self) -> float: ...

    def weigh(self, particles: Particles, rewards: Tensor, progress: float) -> Particles: ...

    def select(self, particles: Particles, generator: Generator, count: int | None = None) -> Selected: ...


Choice = Callable[[Algorithm, Particles, int, Generator], Selected]


def drawn(algorithm: Algorithm, particles: Particles, count: int, generator: Generator) -> Selected:
    """`count` of K as the algorithm draws them: of the same distribution, unbiased."""
    return algorithm.select(particles, generator, count)


def best(algorithm: Algorithm, particles: Particles, count: int, generator: Generator) -> Selected:
    """The `count` of K with the highest reward of x̂0: a search, which draws from no known distribution."""
    kept = highest(particles.path.rewards[-1], count)
    return particles.resample(kept, torch.ones(len(kept), dtype=torch.bool)), kept


def highest(rewards: Tensor, count: int) -> Tensor:
    """Places (B, count) of the highest of rewards (B, M), ascending; of equal ones the lower place."""
    return rewards.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(dim=1).values


CHOICES: dict[str, Choice] = {"drawn": drawn, "best": best}


@dataclass(frozen=True)
class Plan:
    """Of every prompt of a run alike.

    asked   solver steps, from 0, at which rewards are read; None: the method's own
    narrow  {solver step: particles that go on from it}, fewer and fewer; rewards are read there too
    choice  which go on where there are to be fewer: drawn by their weights, or the best
    target  once r(x̂0) of a particle is as high, the best one alone goes on, and no more rewards are read
    """

    asked: Iterable[int] | None = None
    narrow: Mapping[int, int] = field(default_factory=dict)
    choice: str = "drawn"
    target: float | None = None

    def __post_init__(self) -> None:
        if self.asked is not None:
            object.__setattr__(self, "asked", frozenset(self.asked))
        choose("narrow_choice", self.choice, CHOICES)
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

    @property
    def searches(self) -> bool:
        """Whether particles may be chosen for being the best, which leaves no weights."""
        return self.target is not None or (bool(self.narrow) and self.choice == "best")

    def selects(self, step: int, size: int) -> tuple[Choice, int]:
        """How those of `size` particles are chosen that go on from this step, and how many they are."""
        count = self.narrow.get(step, size)
        return (CHOICES[self.choice] if count < size else drawn), count

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
