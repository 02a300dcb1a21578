"""Optimisation of the initial noise ε for a higher reward of the image G(ε) (ReNO, arXiv 2406.04312); knows no model.

max_ε  Σ_m w_m r_m(G(ε)) + w_reg · log p(‖ε‖)
log p(‖ε‖) = (D − 1) log‖ε‖ − ½‖ε‖² + const, the χ distribution with D degrees of freedom

Every row of a batch is an independent search: gradients are clipped, and searches stopped and restarted, per row.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from steer.errors import InputError

OptimizerState = Mapping[str, Tensor]  # state of an update rule: tensors of N rows, zero at the start
STATE_PREFIX = "optimizer_state."  # prefix of its tensors in a saved search


def norms(noise: Tensor) -> Tensor:
    """Return ‖ε‖/√D of each row (N,), fp32: near 1 for standard normal noise."""
    flat = noise.float().flatten(1)
    return flat.norm(dim=1) / flat.shape[1] ** 0.5


def neighbour(noise: Tensor, u: Tensor, distance: float) -> Tensor:
    """Return √(1 − d²) ε + d u for u ~ N(0, I), which keeps the expected norm; d = 1 gives independent noise."""
    return (1 - distance**2) ** 0.5 * noise + distance * u


def prior_gradient(noise: Tensor) -> Tensor:
    """Return ∇ log p(‖ε‖) = ((D − 1)/‖ε‖² − 1) ε, shaped like the noise, fp32; it vanishes at ‖ε‖ = √(D − 1)."""
    flat = noise.float().flatten(1)
    square = (flat**2).sum(1, keepdim=True)
    return (((flat.shape[1] - 1) / square - 1) * flat).view_as(noise)


def clipped(gradient: Tensor, max_norm: float) -> Tensor:
    """Clip the gradient of each row to a norm of at most `max_norm`, as torch's clip_grad_norm_ does."""
    length = gradient.flatten(1).norm(dim=1)
    factor = (max_norm / (length + 1e-6)).clamp(max=1)
    return gradient * factor.view(-1, *[1] * (gradient.dim() - 1))


class Optimiser(Protocol):
    """An update rule, a dataclass: gradient (N, …) and state → ascent step Δε (N, …) and next state."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def lr(self) -> float: ...

    def start(self, noise: Tensor) -> OptimizerState: ...

    def step(self, gradient: Tensor, optimizer_state: OptimizerState) -> tuple[Tensor, OptimizerState]: ...


@dataclass(frozen=True)
class Nesterov:
    """Gradient ascent with Nesterov momentum, in torch's form: v ← μ v + g,  Δε = lr (g + μ v)."""

    lr: float = 5.0
    momentum: float = 0.9

    def start(self, noise: Tensor) -> OptimizerState:
        return {"velocity": torch.zeros_like(noise)}

    def step(self, gradient: Tensor, optimizer_state: OptimizerState) -> tuple[Tensor, OptimizerState]:
        velocity = self.momentum * optimizer_state["velocity"] + gradient
        return self.lr * (gradient + self.momentum * velocity), {"velocity": velocity}


@dataclass(frozen=True)
class Adam:
    """Adam (arXiv 1412.6980): m ← β₁ m + (1 − β₁) g,  v ← β₂ v + (1 − β₂) g²,  Δε = lr m̂ / (√v̂ + δ)."""

    lr: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    delta: float = 1e-8

    def start(self, noise: Tensor) -> OptimizerState:
        return {"first": torch.zeros_like(noise), "second": torch.zeros_like(noise), "count": torch.zeros(len(noise))}

    def step(self, gradient: Tensor, optimizer_state: OptimizerState) -> tuple[Tensor, OptimizerState]:
        b1, b2 = self.betas
        first = b1 * optimizer_state["first"] + (1 - b1) * gradient
        second = b2 * optimizer_state["second"] + (1 - b2) * gradient**2
        count = optimizer_state["count"] + 1
        n = count.to(gradient).view(-1, *[1] * (gradient.dim() - 1))
        rate = self.lr / (1 - b1**n)
        step = rate * first / ((second / (1 - b2**n)).sqrt() + self.delta)
        return step, {"first": first, "second": second, "count": count}


OPTIMISERS: dict[str, Optimiser] = {"sgd": Nesterov(), "adam": Adam()}


@dataclass(frozen=True)
class Search:
    """The state of N independent searches, immutable.

    noise            (N, …) fp32, current iterates
    state            state of the update rule, or the archive of MAP-Elites, where no search restarts
    best_noise       (N, …) best iterates so far, over all restarts; best_rewards (N,) their rewards
    peak             (N,) best reward since the last restart, not improved for `stale` (N,) iterations
    starts           (N,) number of starts
    finished         (N,) true where a search has stopped
    """

    noise: Tensor
    state: Mapping[str, Tensor]
    best_noise: Tensor
    best_rewards: Tensor
    peak: Tensor
    stale: Tensor
    starts: Tensor
    finished: Tensor

    @classmethod
    def start(cls, noise: Tensor, optimiser: Optimiser | None = None) -> "Search":
        """Start from noise (N, …) with no rewards yet; without an update rule the state is empty."""
        noise, rows = noise.detach().float(), len(noise)
        lowest, zero = torch.full((rows,), -torch.inf), torch.zeros(rows, dtype=torch.int64)
        state = optimiser.start(noise) if optimiser else {}
        return cls(noise, state, noise, lowest, lowest, zero, zero + 1, zero.bool())

    def record(self, rewards: Tensor) -> "Search":
        """Record the rewards (N,) of the current noise and keep the best iterates."""
        better, higher = rewards > self.best_rewards, rewards > self.peak
        return replace(
            self,
            best_noise=where_rows(better, self.noise, self.best_noise),
            best_rewards=torch.where(better, rewards, self.best_rewards),
            peak=torch.where(higher, rewards, self.peak),
            stale=torch.where(higher, 0, self.stale + 1),
        )

    def ascend(self, gradient: Tensor, optimiser: Optimiser) -> "Search":
        """Take one ascent step in the searches that are not finished."""
        step, state = optimiser.step(gradient, self.state)
        return replace(self, noise=where_rows(self.finished, self.noise, self.noise + step), state=state)

    def retire(self, rows: Tensor) -> "Search":
        """Mark the searches in `rows` (N,) as finished."""
        return replace(self, finished=self.finished | rows)

    def finish_at_target(self, target: float | None) -> "Search":
        """Mark the searches whose best reward has reached the target as finished; None: no target."""
        return self if target is None else self.retire(self.best_rewards >= target)

    def restart(self, rows: Tensor, new_noise: Tensor) -> "Search":
        """Restart the searches in `rows` (N,) from `new_noise` (N, …), keeping their best iterates."""
        return replace(
            self,
            noise=where_rows(rows, new_noise, self.noise),
            state={name: where_rows(rows, 0.0, slot) for name, slot in self.state.items()},
            peak=torch.where(rows, -torch.inf, self.peak),
            stale=torch.where(rows, 0, self.stale),
            starts=self.starts + rows,
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name, for saving."""
        plain = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "state"}
        return plain | {f"{STATE_PREFIX}{name}": slot for name, slot in self.state.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], device: torch.device) -> "Search":
        """Restore a search from `tensors`, the noise on `device`. Raises InputError where a tensor is missing."""
        placed = {name: value.to(device) if value.dim() > 1 else value for name, value in tensors.items()}
        state = {
            name.removeprefix(STATE_PREFIX): value for name, value in placed.items() if name.startswith(STATE_PREFIX)
        }
        known: dict[str, Any] = {f.name: placed.get(f.name) for f in fields(cls) if f.name != "state"}
        if missing := [name for name, value in known.items() if value is None]:
            raise InputError(f"the saved search has no {missing[0]}: delete it to start over")
        return cls(**known, state=state)


def where_rows(rows: Tensor, then: Tensor | float, other: Tensor) -> Tensor:
    """Select `then` in the rows (N,) that are true, `other` (N, …) elsewhere."""
    return torch.where(rows.to(other.device).view(-1, *[1] * (other.dim() - 1)), then, other)
