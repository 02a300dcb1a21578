"""Regression of reward differences on differences of log-probability ratios: PRDP (arXiv 2402.08714).

With r̂_t = log π(x_s | x_t) − log π_ref(x_s | x_t) and r̂ = Σ_t r̂_t, for each pair (a, b) of one prompt:

l(r̂)  = (r̂^a − r̂^b − (r^a − r^b)/β)²
loss   = mean over pairs of max(l(r̂), l(clip(r̂)))
clip   : each r̂_t into [r̂old_t − ε, r̂old_t + ε], where r̂old_t = log π_old(x_s | x_t) − log π_ref(x_s | x_t)

It is zero for all pairs exactly where π(τ) ∝ π_ref(τ) exp(r(τ)/β), the optimum of E r − β KL(π ‖ π_ref).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steer.arguments import Settings, argument
from steer.training.losses.log_probs import LogProbs, Metrics, accuracy, checked_rewards


@dataclass(frozen=True)
class PRDP(Settings):
    """PRDP, in nats summed over elements and steps; the reductions of the published β and ε are not documented.

    beta  > 0, reward per nat. Start from std(r)/10: trajectories with rewards a standard deviation apart then differ
          by 10 nats. The default assumes rewards standardised to a deviation of 1; sweep it otherwise.
    clip  ε > 0, nats per step, inf for none: how far a step may move before new samples are drawn. At 0.1, 20 steps
          can move by 2 nats, a fifth of those 10, while fp32 sums over 10⁴ elements are accurate to 10⁻³ nats.

    Takes rewards (B, K), K ≥ 2. Right after sampling π = π_old and the clip has no effect: make several updates.
    Metrics, over all pairs of the batch:

    accuracy  fraction (0..1) of pairs of different rewards that r̂ ranks alike, ties half; NaN without such a pair
    clipped   fraction of steps out of the proximal range
    error     nats, root mean square of r̂^a − r̂^b − (r^a − r^b)/β
    """

    beta: float = argument(0.1, "(0, inf)")
    clip: float = argument(0.1, "(0, inf]")
    whole_trajectory: ClassVar[bool] = True
    stepwise: ClassVar[bool] = False

    def __call__(self, log_probs: LogProbs, rewards: Tensor) -> tuple[Tensor, Metrics]:
        rewards = checked_rewards(log_probs, rewards, group=2)
        implicit = log_probs.implicit_rewards()  # r̂_t (B, K, T)
        before = log_probs.old.detach() - log_probs.reference.detach()  # r̂old_t
        proximal = implicit.clamp(before - self.clip, before + self.clip)
        target = _differences(rewards) / self.beta
        error = _differences(implicit.sum(-1)) - target
        error_clipped = _differences(proximal.sum(-1)) - target
        loss = torch.maximum(error**2, error_clipped**2).mean()
        return loss, {
            "accuracy": accuracy(implicit.sum(-1), rewards[:, :, None] > rewards[:, None, :]),
            "clipped": float((proximal != implicit).float().mean()),
            "error": float((error.detach() ** 2).mean().sqrt()),
        }


def _differences(values: Tensor) -> Tensor:
    """Return (B, K) → (B, K(K−1)/2): value of a minus value of b, for every a < b."""
    a, b = torch.triu_indices(values.shape[1], values.shape[1], offset=1, device=values.device)
    return values[:, a] - values[:, b]
