"""Guards against a reward optimised until it means nothing: penalties, budgets, a watch over held-out rewards."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from steer.errors import InputError
from steer.trajectory import Sampler, Trajectories, log_probs
from steer.transition import Gaussian

LARGEST_EXPONENT = 10.0  # of the χ² penalty: beyond, one step would outweigh all others
SAME = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-2}  # |ratio − 1| of a replay


def kl(p: Gaussian, reference: Gaussian) -> Tensor:
    """KL(pθ ‖ p_ref) of one step in nats (N,): ‖μθ − μ_ref‖² / 2τ²."""
    return p.kl(reference)


def chi_square(p: Gaussian, reference: Gaussian) -> Tensor:
    """χ²(pθ ‖ p_ref) of one step (N,): exp(‖μθ − μ_ref‖²/τ²) − 1, level from e¹⁰ on (after arXiv 2403.03185).

    It punishes few large deviations more than many small ones, as a hacked reward makes them.
    """
    return torch.expm1((2 * p.kl(reference)).clamp(max=LARGEST_EXPONENT))


@dataclass(frozen=True)
class KLControl:
    """How much KL costs, and how much there may be. KL is that of whole trajectories, in nats.

    weight  β of the penalty
    target  KL that β is steered to: β ← β (1 + rate · clip(KL/target − 1, ±0.2)) (arXiv 1909.08593, sec. 2.2)
    budget  KL at which training stops
    """

    weight: float = 0.0
    target: float | None = None
    budget: float | None = None
    rate: float = 0.1

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise InputError(f"kl_weight must be at least 0, got {self.weight}")
        for name, value in (("kl_target", self.target), ("kl_budget", self.budget)):
            if value is not None and not value > 0:
                raise InputError(f"{name} must be above 0 nats, got {value}")
        if self.target is not None and self.weight == 0:
            raise InputError("kl_target moves kl_weight, which is 0: give it a start above 0")

    def after(self, found: float) -> "KLControl":
        """The control for the next update, where this one's KL was `found`."""
        if self.target is None:
            return self
        error = min(max(found / self.target - 1, -0.2), 0.2)
        return replace(self, weight=self.weight * (1 + self.rate * error))

    def spent(self, found: float) -> bool:
        """Whether the budget is used up."""
        return self.budget is not None and found >= self.budget


@dataclass(frozen=True)
class HoldOutWatch:
    """Compares the trained reward with a held-out one, evaluation by evaluation.

    patience  evaluations in a row, since the best held-out one, with a better trained reward and a worse held-out
              one, that end the training; 0: never
    """

    patience: int = 0
    best_step: int | None = None
    best: tuple[float, float] = field(default=(0.0, 0.0))  # (trained, held out) at that step
    fooled: int = 0

    def after(self, step: int, proxy: float, held_out: float) -> "HoldOutWatch":
        """The watch after one more evaluation."""
        if self.best_step is None or held_out > self.best[1]:
            return replace(self, best_step=step, best=(proxy, held_out), fooled=0)
        fooled = proxy > self.best[0] and held_out < self.best[1]
        return replace(self, fooled=self.fooled + 1 if fooled else 0)

    def stop(self) -> bool:
        """Whether the trained reward has been rising alone for too long."""
        return self.patience > 0 and self.fooled >= self.patience

    def state(self) -> dict[str, Any]:
        """As plain values."""
        return {"best_step": self.best_step, "best": list(self.best), "fooled": self.fooled}

    def restored(self, state: Mapping[str, Any]) -> "HoldOutWatch":
        """The watch with what `state` told."""
        return replace(self, best_step=state["best_step"], best=tuple(state["best"]), fooled=state["fooled"])


def check_replay(sampler: Sampler, drew: Trajectories, dtype: torch.dtype) -> float:
    """Largest |ratio − 1| of any step between a rollout's own log-probs and its replay by the same weights.

    Raises InputError where it is above what rounding explains: every ratio of the training would be wrong.
    """
    difference = (log_probs(sampler, drew) - drew.log_probs).abs().max().item()
    found = torch.expm1(torch.tensor(difference)).item()
    if not found <= SAME[dtype]:
        raise InputError(
            f"a replay of the first samples gives other log-probabilities (ratio off by {found:.2g}, at most "
            f"{SAME[dtype]:g} in {str(dtype).removeprefix('torch.')}): the pipeline draws random numbers or edits its "
            "latents beside the solver, or dropout is on"
        )
    return found


def check_spread(rewards: Tensor, name: str) -> None:
    """Raises InputError where the samples (B, K) of every prompt have one reward: there is nothing to prefer."""
    if rewards.shape[1] > 1 and (rewards == rewards[:, :1]).all():
        raise InputError(
            f"reward {name!r} gave all {rewards.shape[1]} samples of every prompt the same score "
            f"({rewards[0, 0].item():g} for the first): there is nothing to learn from. Use a finer reward, more "
            "samples_per_prompt, or prompts that it tells apart"
        )
