"""Potentials G_j of Feynman–Kac steering (arXiv 2501.06848, section 3), and tempering of the strength λ_j.

With q_j = λ_j r_j for the rewards r_1 … r_J of a path at its evaluated steps, and q_0 = 0. For every potential the
terminal factor is log G_end = λ r(x0) − Σ_j log G_j, so that the product over a path is exp(λ r(x0)).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class PathRewards:
    """Rewards r_j (J, B, K) along each particle's path and strengths λ_j (J, B, 1)."""

    rewards: Tensor
    strengths: Tensor

    @classmethod
    def empty(cls, groups: int, size: int) -> "PathRewards":
        return cls(torch.zeros(0, groups, size), torch.zeros(0, groups, 1))

    def append(self, rewards: Tensor, strength: Tensor) -> "PathRewards":
        """Append an evaluation: rewards (B, K), strength (B, 1)."""
        return PathRewards(torch.cat([self.rewards, rewards[None]]), torch.cat([self.strengths, strength[None]]))

    def follow(self, ancestors: Tensor) -> "PathRewards":
        """Return the paths of the ancestors (B, n), n of K."""
        every = ancestors.expand(len(self.rewards), *ancestors.shape)
        return PathRewards(self.rewards.gather(2, every), self.strengths)


Potential = Callable[[PathRewards], Tensor]


def difference(path: PathRewards) -> Tensor:
    """Return log G_j = q_j − q_{j−1}."""
    q = path.strengths * path.rewards
    return q[-1] - q[-2] if len(q) > 1 else q[-1]


def maximum(path: PathRewards) -> Tensor:
    """Return log G_j = λ_j max_{i≤j} r_i; the maximum starts at the first reward, which may be negative."""
    return path.strengths[-1] * path.rewards.amax(0)


def total(path: PathRewards) -> Tensor:
    """Return log G_j = λ_j Σ_{i≤j} r_i."""
    return path.strengths[-1] * path.rewards.sum(0)


def now(path: PathRewards) -> Tensor:
    """Return log G_j = q_j."""
    return path.strengths[-1] * path.rewards[-1]


POTENTIALS: dict[str, Potential] = {"difference": difference, "max": maximum, "sum": total, "now": now}


@dataclass(frozen=True)
class TemperingState:
    """The state of a run when λ_j is chosen.

    progress   fraction of solver steps done, 0..1
    lam        the final strength
    previous   λ_{j−1} (B, 1), zero before the first evaluation
    ess_at     λ (B, 1) → the resulting ESS as a fraction of K (B,)
    """

    progress: float
    lam: float
    previous: Tensor
    ess_at: Callable[[Tensor], Tensor]


Tempering = Callable[[TemperingState], Tensor]  # with `holds_ess = True`: particles are resampled at every evaluation


def constant(state: TemperingState) -> Tensor:
    """Return λ_j = λ."""
    return torch.full_like(state.previous, state.lam)


def geometric(state: TemperingState) -> Tensor:
    """Return λ_j = λ min((1+γ)^i − 1, 1) after i of T steps; γ = 2^(1/T) − 1, so that λ_T = λ (after DAS)."""
    return torch.full_like(state.previous, state.lam * min(2**state.progress - 1, 1.0))


@dataclass(frozen=True)
class ESSTargeted:
    """The λ_j in [0, λ] nearest to λ with an ESS of at least `target`·K, per group, by a grid and bisection.

    λ_j may be below λ_{j−1}, since the terminal factor ends at λ in any case. The ESS need not decrease in λ_j:
    log G_j may also subtract q_{j−1}. Where no λ_j reaches the target, λ_j is the grid point with the largest ESS.
    """

    target: float = 0.5
    bisections: int = 40
    grid: int = 64
    holds_ess: ClassVar[bool] = True  # without resampling the weights would keep λ_j small forever

    def __call__(self, state: TemperingState) -> Tensor:
        """Return λ_j (B, 1)."""
        lams = torch.linspace(0, 1, self.grid + 1)[:, None, None] * state.lam * torch.ones_like(state.previous)
        shares = torch.stack([state.ess_at(lam) for lam in lams])  # (grid + 1, B)
        meets_target = shares >= self.target
        last = self.grid - meets_target.flip(0).float().argmax(0)  # the highest grid point that reaches the target
        last = torch.where(meets_target.any(0), last, shares.argmax(0))[None, :, None]
        low, high = (lams.gather(0, place)[0] for place in (last, (last + 1).clamp(max=self.grid)))
        for _ in range(self.bisections):
            middle = (low + high) / 2
            reached = state.ess_at(middle)[:, None] >= self.target
            low, high = torch.where(reached, middle, low), torch.where(reached, high, middle)
        return low


TEMPERINGS: dict[str, Tempering] = {"constant": constant, "geometric": geometric, "ess": ESSTargeted()}
