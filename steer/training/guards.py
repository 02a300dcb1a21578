"""Guards against reward over-optimisation: penalties, KL control, early stopping, checks before the first update."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from steer.errors import InputError
from steer.training.rollout import Kernel, Sampler, Trajectories, log_probs

GROWTH = 1.2  # of KL over its highest value, after which updates below the target do not lower β:
PATIENCE = 2
LARGEST_EXPONENT = 10.0  # the χ² penalty is linear beyond: its exponential would overflow
RATIO_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-2}  # |ratio − 1|
TOLERANCE_ELEMENTS = 16384  # sample size up to which it holds; rounding grows with the root of the size
PERTURBATION, ROUNDING = 1e-4, 0.1  # of one weight entry; allowed fraction of rounding in its effect


def kl(p: Kernel, reference: Kernel) -> Tensor:
    """Return KL(pθ ‖ p_ref) of one step in nats (N,): ‖μθ − μ_ref‖² / 2τ², or its sum over tokens."""
    return p.kl(reference)


def chi_square(p: Kernel, reference: Kernel) -> Tensor:
    """Return χ²(pθ ‖ p_ref) of one step (N,): e^u − 1 with u = ‖μθ − μ_ref‖²/τ² (after arXiv 2403.03185), without unit.

    It penalises few large deviations, as caused by reward hacking, more than many small ones. Beyond u = 10 it
    continues along its tangent, e¹⁰ (u − 9) − 1, so that value and gradient are continuous.
    """
    exponent = 2 * p.kl(reference)
    below = exponent.clamp(max=LARGEST_EXPONENT)
    return torch.expm1(below) + math.exp(LARGEST_EXPONENT) * (exponent - below)


@dataclass(frozen=True)
class KLControl:
    """Weight and budget of the KL penalty. KL is in nats, summed over the elements and steps of a trajectory.

    weight  β of the penalty, per nat
    target  KL in nats that β is adapted to: log β ← log β + rate · clip(log(KL/target), log ⅓, log 100). (The
            controller of arXiv 1909.08593, sec. 2.2, moves β by 2 % per update: it corrects a factor of 10⁴ in 460
            updates.) β is lowered in smaller steps than it is raised, and only after PATIENCE updates in which KL,
            which is noisy, did not grow by a fifth over its highest value (anti-windup): a run starts at a KL of 0, far
            below the target, and follows β some updates later. A β lowered all the while would not be back in time
    budget  KL in nats at which training stops
    highest the highest KL so far, in nats
    stalled updates since it grew
    """

    weight: float = 0.0
    target: float | None = None
    budget: float | None = None
    rate: float = 0.4
    highest: float = 0.0
    stalled: int = 0

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise InputError(f"kl_weight must be at least 0, got {self.weight}")
        for name, value in (("kl_target_nats", self.target), ("kl_budget_nats", self.budget)):
            if value is not None and not value > 0:
                raise InputError(f"{name} must be above 0 nats, got {value}")
        if self.target is not None and self.weight == 0:
            raise InputError("kl_target_nats adapts kl_weight, which is 0: set a kl_weight above 0")

    def after(self, measured: float) -> "KLControl":
        """Return the control for the next update, given the `measured` KL of this update."""
        if self.target is None or not measured > 0:  # the KL is 0 before the first step
            return self
        ratio = min(max(measured / self.target, 1 / 3), 100.0)
        stalled = 0 if measured > GROWTH * self.highest else self.stalled + 1
        if stalled < PATIENCE:
            ratio = max(ratio, 1.0)
        highest = max(measured, self.highest)
        return replace(self, weight=self.weight * ratio**self.rate, highest=highest, stalled=stalled)

    def is_exhausted(self, measured: float) -> bool:
        """Return whether the budget is exhausted."""
        return self.budget is not None and measured >= self.budget


@dataclass
class SlopeLimit:
    """A bound factor · s₀ on the gradient of a reward with respect to each image, s₀ the median in the first update.

    A reward that changes much faster with the pixels than among images of the base model is being exploited: there the
    gradient is scaled down to the bound, so that no image outweighs the others.

    factor  κ ≥ 1; None: no bound
    base    s₀ once known, in the reward's unit: independent of chunks and processes
    """

    factor: float | None
    base: float | None = None

    def apply(self, images: Tensor, count: int) -> Tensor:
        """Bound the gradient of the mean reward of `count` images that flows back into images (N, …); return them."""
        if self.factor is not None and self.base is not None and images.requires_grad:
            bound = self.factor * self.base / count
            images.register_hook(lambda gradient: _bounded(gradient, bound))
        return images


def _bounded(gradient: Tensor, bound: float) -> Tensor:
    scale = (bound / gradient.float().flatten(1).norm(dim=1).clamp(min=1e-30)).clamp(max=1)
    return gradient * scale.view(-1, *[1] * (gradient.dim() - 1)).to(gradient.dtype)


@dataclass(frozen=True)
class EarlyStopping:
    """Early stopping by a held-out reward.

    patience  the training ends after this many evaluations in a row with a better trained and a worse held-out reward
              than at the best held-out evaluation; 0: never
    """

    patience: int = 0
    best_step: int | None = None
    best: tuple[float, float] = field(default=(0.0, 0.0))  # (trained, held out) at best_step
    num_overoptimized: int = 0

    def after(self, step: int, proxy: float, held_out: float) -> "EarlyStopping":
        """Return the state after one more evaluation."""
        if self.best_step is None or held_out > self.best[1]:
            return replace(self, best_step=step, best=(proxy, held_out), num_overoptimized=0)
        overoptimized = proxy > self.best[0] and held_out < self.best[1]
        return replace(self, num_overoptimized=self.num_overoptimized + 1 if overoptimized else 0)

    def stop(self) -> bool:
        """Return whether only the trained reward has been rising for `patience` evaluations."""
        return self.patience > 0 and self.num_overoptimized >= self.patience

    def state(self) -> dict[str, Any]:
        """Return the state as plain values."""
        return {"best_step": self.best_step, "best": list(self.best), "num_overoptimized": self.num_overoptimized}

    def load_state(self, state: Mapping[str, Any]) -> "EarlyStopping":
        """Restore from `state`."""
        return replace(self, **{**state, "best": tuple(state["best"])})


def check_replay(sampler: Sampler, trajectories: Trajectories, dtype: torch.dtype, factor: float = 1.0) -> float:
    """Return the largest |ratio − 1| of any step between a rollout's log-probs and its replay by the same weights.

    factor  multiplies the tolerance, for a replay with another batch shape than the rollout

    Raises InputError where rounding does not explain the difference: every ratio of the training would be wrong.
    """
    difference = (log_probs(sampler, trajectories) - trajectories.log_probs).abs().max().item()
    measured = torch.expm1(torch.tensor(difference)).item()
    allowed = factor * RATIO_TOLERANCE[dtype] * max(1.0, math.sqrt(trajectories.elements / TOLERANCE_ELEMENTS))
    if not measured <= allowed:
        raise InputError(
            f"a replay of the first samples has other log-probabilities (ratio off by {measured:.2g}, at most "
            f"{allowed:.3g} in {str(dtype).removeprefix('torch.')}): the pipeline draws random numbers or modifies its "
            "latents outside the solver, or dropout is on"
        )
    return measured


def check_rounding(
    sampler: Sampler,
    exact: Sampler,
    parameters: Mapping[str, Tensor],
    trajectories: Trajectories,
    steps: Collection[int],
) -> float:
    """Return the fraction of rounding in the change of a rollout's log-probs when one weight entry grows by 10⁻⁴.

    exact  sampler that evaluates the same denoiser in float32

    Raises InputError where the fraction is above a tenth: a training would learn from rounding errors.
    """
    some = trajectories.at(range(min(2, len(trajectories.rows))))
    names = [name for name in parameters if "lora_B" in name] or list(parameters)
    for name in names[len(names) // 2 :] + names[: len(names) // 2]:
        truth = _change(exact, parameters[name], some, steps)
        if (size := truth.square().mean().sqrt().item()) > 0:
            break
    else:
        raise InputError("no entry of the trained weights changes any log-probability: train other layers")
    measured = (_change(sampler, parameters[name], some, steps) - truth).square().mean().sqrt().item() / size
    if not measured <= ROUNDING:
        raise InputError(
            f"rounding is {measured:.2g} times the change in log-probability of one entry of the weights (at most "
            f"{ROUNDING:g}): set log_prob_precision float32, or float32 weights without mixed_precision, or try "
            "float16 in place of bfloat16, or a larger skip_low_noise_steps"
        )
    return measured


def _change(sampler: Sampler, parameter: Tensor, trajectories: Trajectories, steps: Collection[int]) -> Tensor:
    """Return the change of log-probs (N, T) when the first entry of a parameter grows by 10⁻⁴."""
    columns, local = list(steps), parameter.to_local() if hasattr(parameter, "to_local") else parameter
    before, entry = log_probs(sampler, trajectories, columns), local.detach().view(-1)[:1]
    kept = entry.clone()
    entry += PERTURBATION
    try:
        return (log_probs(sampler, trajectories, columns) - before)[:, columns]
    finally:
        entry.copy_(kept)


def check_spread(rewards: Tensor, name: str) -> None:
    """Raise InputError where the samples (B, K) of every prompt have equal rewards: there is nothing to prefer."""
    if rewards.shape[1] > 1 and (rewards == rewards[:, :1]).all():
        raise InputError(
            f"reward {name!r} gave all {rewards.shape[1]} samples of every prompt the same score "
            f"({rewards[0, 0].item():g} for the first prompt): there is nothing to learn. Use a finer reward, more "
            "num_generations, or prompts that it distinguishes"
        )
