"""Constraints on rewards with learned multipliers (Constrained RLHF, arXiv 2310.04373).

max_π min_{μ ≥ 0}  E[r_0] + Σ_i μ_i ± (E[r_i] − θ_i),   + for r_i ≥ θ_i, − for r_i ≤ θ_i

The policy ascends the mixed reward and the multipliers descend. With s_i, the standard deviation of r_i among the
samples of the first rollout (of the base model), and r̄_i, the mean of r_i in an update,

μ_i ← clip(μ_i ± rate (θ_i − r̄_i)/s_i, 0, limit)          (for r_i = θ_i without the bound at 0)
r   = [r_0 + Σ_i ± μ_i (s_0/s_i) r_i] / (1 + Σ_i |μ_i|)

so that r stays in the unit of r_0, and a multiplier has no unit. It ends at 0 where its constraint never binds.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from steer.errors import InputError

SIGNS = {">=": 1.0, "<=": -1.0, "=": 1.0}


@dataclass(frozen=True)
class Bound:
    """A bound r ≥ θ, r ≤ θ or r = θ on the mean of the reward `name`."""

    name: str
    sign: str
    limit: float

    @property
    def direction(self) -> float:
        """+1 where a higher reward helps, −1 where a lower reward helps."""
        return SIGNS[self.sign]


def read_bounds(constraints: Mapping[str, str]) -> tuple[Bound, ...]:
    """Parse the bounds of a mapping such as {"NAME": "<= 0.3"}. Raises InputError for another form."""
    bounds = []
    for name, text in constraints.items():
        read = re.fullmatch(r"\s*(<=|>=|=)\s*(\S+)\s*", str(text))
        try:
            limit = float(read[2]) if read else math.nan
        except ValueError:
            limit = math.nan
        if read is None or not math.isfinite(limit):
            raise InputError(f'constraints: {name} must be like "<= 0.3", ">= 0.45" or "= 0.4", got {text!r}')
        bounds.append(Bound(name, read[1], limit))
    return tuple(bounds)


@dataclass(frozen=True)
class Constraints:
    """Bounds with their multipliers.

    rate         step size of the multipliers, per update
    limit        largest |μ|
    multipliers  μ of each bound
    scales       s of the trained reward, then of each bounded reward; empty before the first rollout
    """

    bounds: tuple[Bound, ...]
    rate: float = 0.05
    limit: float = 10.0
    multipliers: tuple[float, ...] = ()
    scales: tuple[float, ...] = ()

    def after(self, rewards: Tensor, bounded: Mapping[str, Tensor]) -> "Constraints":
        """Return the constraints with the multipliers after one more update.

        rewards  (B, K), the trained reward, or (B, K, M), several objectives in one unit
        bounded  (B, K) for each bounded reward, of all processes

        Raises InputError where the first samples all have one value, so that there is no scale.
        """
        multipliers = self.multipliers or (0.0,) * len(self.bounds)
        scales = self.scales or tuple(
            _scale(name, values)
            for name, values in [("the trained one", rewards), *((one.name, bounded[one.name]) for one in self.bounds)]
        )
        moved = []
        for bound, multiplier, scale in zip(self.bounds, multipliers, scales[1:], strict=True):
            slack = (bound.limit - bounded[bound.name].double().mean().item()) / scale
            lowest = -self.limit if bound.sign == "=" else 0.0
            moved.append(min(max(multiplier + self.rate * bound.direction * slack, lowest), self.limit))
        return replace(self, multipliers=tuple(moved), scales=scales)

    def signal(self, rewards: Tensor, bounded: Mapping[str, Tensor]) -> Tensor:
        """Return the mixed reward of the shape and in the unit of `rewards`. The multipliers are constants in it."""
        total = rewards
        for bound, multiplier, scale in zip(self.bounds, self.multipliers, self.scales[1:], strict=True):
            values = bounded[bound.name].reshape(*rewards.shape[:2], *(1,) * (rewards.dim() - 2))
            total = total + multiplier * bound.direction * (self.scales[0] / scale) * values
        return total / (1 + sum(map(abs, self.multipliers)))

    def metrics(self) -> dict[str, float]:
        """Return the multipliers by name."""
        names = [f"multiplier/{bound.name}" for bound in self.bounds]
        return dict(zip(names, self.multipliers or (0.0,) * len(names), strict=True))

    def state(self) -> dict[str, Any]:
        """Return the state as plain values."""
        return {"multipliers": list(self.multipliers), "scales": list(self.scales)}

    def load_state(self, state: Mapping[str, Any]) -> "Constraints":
        """Restore from `state`."""
        return replace(self, multipliers=tuple(state["multipliers"]), scales=tuple(state["scales"]))


def _scale(name: str, values: Tensor) -> float:
    scale = values.double().std(correction=0).item()
    if not scale > 0:
        raise InputError(
            f"constraints: all samples of the first rollout have one value of reward {name!r}: it has no scale. Use a "
            "finer reward, or more samples"
        )
    return scale
