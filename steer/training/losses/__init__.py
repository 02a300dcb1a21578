"""Losses of finetuning from rewards, as functions of log-probabilities (B, K, T) and rewards (B, K)."""

from steer.training.losses.advantages import PerPromptStatTracker
from steer.training.losses.d3po import D3PO, D3POTrajectory
from steer.training.losses.filtered import Filtered
from steer.training.losses.log_probs import LogProbs, Loss, Metrics, Unit
from steer.training.losses.policy_gradient import DDPO, GRPO
from steer.training.losses.prdp import PRDP

__all__ = [
    "D3PO",
    "DDPO",
    "GRPO",
    "PRDP",
    "D3POTrajectory",
    "Filtered",
    "LogProbs",
    "Loss",
    "Metrics",
    "PerPromptStatTracker",
    "Unit",
]
