"""Rewards made of rewards: sums, worst cases, products of constraints, each itself a Reward that reports its parts.

combine({"hpsv2.1": 5, "imagereward": 1})                       Σ w_m r_m
Combined([a, b], aggregate=worst)                               min_m r_m
Product([Constraint(a, ">", 0.3), Constraint(b, ">", 0.5)])     Π_m σ((r_m − c_m) / temperature)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from steer.reward import Reward, RewardError, load_reward
from steer.rewards.aggregate import AGGREGATES, Aggregate, is_number, total
from steer.rewards.composed import Composed
from steer.rewards.grammar import number_text
from steer.rewards.term import atom_text, composed_text

SIGNS = {">": 1.0, "<": -1.0}
SHARPNESS = 0.05  # temperature of a constraint, in the reward's own unit


@dataclass(frozen=True)
class Part:
    """One reward and its weight. Raises RewardError for a weight that is no finite number."""

    reward: Reward
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not is_number(self.weight):
            raise RewardError(f"the weight of reward {self.reward.name!r} must be a finite number, got {self.weight!r}")

    def __str__(self) -> str:
        if isinstance(self.reward, Composed):
            return composed_text(self.reward.name, self.weight)
        return atom_text(self.reward.name, self.weight, getattr(self.reward, "takes_number", False))


class Combined(Composed):
    """An aggregate of weighted rewards: by default their sum, Σ w_m r_m."""

    def __init__(self, parts: Sequence[Part], aggregate: Aggregate = total, name: str | None = None) -> None:
        if not parts:
            raise RewardError("a combination needs at least one reward")
        super().__init__([part.reward for part in parts], name or _written(parts, aggregate))
        self._weights, self._aggregate = [float(part.weight) for part in parts], aggregate

    def total(self, parts: Mapping[str, Tensor], prompts: Sequence[str]) -> Tensor:
        """The aggregate (N,) of the weighted parts."""
        weighted = [weight * parts[name] for name, weight in zip(self._names, self._weights, strict=True)]
        return self._aggregate(torch.stack(weighted))


def _written(parts: Sequence[Part], aggregate: Aggregate) -> str:
    """The text of a combination, as `steer.rewards.expression` reads it."""
    if aggregate is total:
        return " + ".join(map(str, parts))
    function, options = (aggregate.func, aggregate.keywords) if isinstance(aggregate, partial) else (aggregate, {})
    own = getattr(function, "__name__", type(function).__name__)
    known = next((name for name, one in AGGREGATES.items() if one is function), own)
    inside = [*map(str, parts), *(f"{name}={number_text(value)}" for name, value in options.items())]
    return f"{known}({', '.join(inside)})"


def combine(rewards: Mapping[Any, float] | Sequence[Any], aggregate: Aggregate = total) -> Combined:
    """Σ w_m r_m, or another aggregate, of rewards given with their weights, or of a list of them (weights 1).

    Each is whatever `load_reward` takes.
    """
    weighted = rewards.items() if isinstance(rewards, Mapping) else [(reward, 1.0) for reward in rewards]
    return Combined([Part(load_reward(reward), weight) for reward, weight in weighted], aggregate)


@dataclass(frozen=True)
class Constraint:
    """reward > bound (or <), softly: σ(±(r − bound) / temperature), 0..1, ½ at the bound.

    Raises RewardError for another sign, for a bound or a temperature that cannot be.
    """

    reward: Reward
    sign: str
    bound: float
    temperature: float = SHARPNESS

    def __post_init__(self) -> None:
        sound = self.sign in SIGNS and is_number(self.bound) and is_number(self.temperature) and self.temperature > 0
        if not sound:
            raise RewardError(
                f"constraint {self.reward.name} {self.sign} {self.bound}, temperature {self.temperature}: "
                "write > or <, a finite bound, a temperature above 0"
            )

    def __str__(self) -> str:
        return f"{self.reward.name} {self.sign} {number_text(self.bound)}"

    def degree(self, scores: Tensor) -> Tensor:
        """How well scores (N,) meet it: (N,) in 0..1."""
        return torch.sigmoid(SIGNS[self.sign] * (scores - self.bound) / self.temperature)


class Product(Composed):
    """Π_m of the degrees, 0..1, to which constraints hold: near 1 only where all do."""

    def __init__(self, constraints: Sequence[Constraint]) -> None:
        if not constraints:
            raise RewardError("a product needs at least one constraint, like product(hpsv2.1 > 0.25)")
        inside = [str(c) for c in constraints]
        if (own := {c.temperature for c in constraints}) != {SHARPNESS}:
            inside += [f"temperature={number_text(one)}" for one in sorted(own)]
        super().__init__([c.reward for c in constraints], f"product({', '.join(inside)})")
        self._constraints = tuple(constraints)

    def total(self, parts: Mapping[str, Tensor], prompts: Sequence[str]) -> Tensor:
        """The product (N,) of the degrees."""
        degrees = [c.degree(parts[name]) for name, c in zip(self._names, self._constraints, strict=True)]
        return torch.stack(degrees).prod(0)
