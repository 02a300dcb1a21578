"""Preferences between trajectories of one prompt, without a reward model: D3PO (arXiv 2311.13231).

With r̂_t = log π(x_s | x_t) − log π_ref(x_s | x_t), for each pair of a winner w and a loser l of one prompt:

per step    − (1/T) Σ_t log sigmoid(β (r̂_t^w − r̂_t^l))      (an image's preference is applied to every step)
trajectory  − log sigmoid(β Σ_t (r̂_t^w − r̂_t^l))            (DPO, arXiv 2305.18290, on whole trajectories)

The authors' code clamps the ratio π/π_ref to 1 ± 0.1, which keeps the loss within [0.683, 0.703] and has no gradient
outside: it is not done here.

Where preferences follow Bradley and Terry, P(w ≻ l) = sigmoid(r^w − r^l), the trajectory form is minimised by
π(τ) ∝ π_ref(τ) exp(r(τ)/β). The form per step, in general, is not: each step is credited with the others' effect.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from steer.arguments import Settings, argument
from steer.training.losses.log_probs import LogProbs, Metrics, Unit, accuracy, checked_rewards


def dominates(rewards: Tensor) -> Tensor:
    """Return (B, K, K), true where the first of two samples of a prompt is the winner.

    rewards (B, K), or (B, K, M) for Pareto dominance: no worse in all M, better in one. Ties and incomparable pairs
    are false both ways.
    """
    rewards = rewards if rewards.dim() == 3 else rewards[..., None]
    first, second = rewards[:, :, None], rewards[:, None]
    return (first >= second).all(-1) & (first > second).any(-1)


def preference_metrics(log_probs: LogProbs, better: Tensor) -> Metrics:
    """Return the metrics of preference losses, over all pairs of the batch.

    accuracy  fraction (0..1) of pairs whose winner has the higher implicit reward, ties half
    margin    nats, mean of Σ_t (r̂_t^w − r̂_t^l)
    pairs     their number; without any, accuracy and margin are NaN
    """
    implicit = log_probs.implicit_rewards().detach().sum(-1)
    margins = (implicit[:, :, None] - implicit[:, None, :])[better]
    margin = float(margins.mean()) if len(margins) else torch.nan
    return {"accuracy": accuracy(implicit, better), "margin": margin, "pairs": float(len(margins))}


@dataclass(frozen=True)
class D3PO(Settings):
    """D3PO as published: every step of the winner is preferred to the same step of the loser.

    beta  > 0, per `unit`; published 0.1 for log-probabilities averaged over the elements
    unit  of the log-probabilities: element or nat

    Takes rewards (B, K), or (B, K, M) whose winners are better in one and worse in none. K ≥ 2.
    The loss is the mean over pairs and steps; without a pair it is 0, and so is its gradient.
    """

    beta: float = argument(0.1, "(0, inf)")
    unit: Unit = "element"
    whole_trajectory: ClassVar[bool] = False
    stepwise: ClassVar[bool] = True

    def __call__(self, log_probs: LogProbs, rewards: Tensor) -> tuple[Tensor, Metrics]:
        better = dominates(checked_rewards(log_probs, rewards, group=2, several=True))
        implicit = log_probs.per(self.unit).implicit_rewards()  # r̂_t (B, K, T)
        if self.whole_trajectory:
            implicit = implicit.sum(-1)  # r̂ (B, K)
        logits = self.beta * (implicit[:, :, None] - implicit[:, None, :])[better]  # (pairs, T), or (pairs,)
        loss = -logsigmoid(logits).sum() / max(logits.numel(), 1)  # a sum: it has a gradient (0) without any pair
        return loss, preference_metrics(log_probs, better)


@dataclass(frozen=True)
class D3POTrajectory(D3PO):
    """DPO on whole trajectories, which D3PO's authors could not afford (over 100 GB); computed one step at a time.

    beta  > 0, per `unit`. The weight of KL(π ‖ π_ref) of the whole trajectory against the reward, as the sum of D3PO's
          steps does: hence the same 0.1. The first gradient is T times that of D3PO.

    The loss is the mean over pairs.
    """

    whole_trajectory: ClassVar[bool] = True
    stepwise: ClassVar[bool] = False
