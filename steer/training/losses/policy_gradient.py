"""Importance-sampled policy gradients: DDPO (arXiv 2305.13301) and GRPO (Flow-GRPO, arXiv 2505.05470).

With the ratio ρ_t = π(x_s | x_t)/π_old(x_s | x_t) and an advantage A per sample, both minimise PPO's (arXiv 1707.06347)

loss = mean over samples and steps of max(−A ρ_t, −A clip(ρ_t, 1 − ε, 1 + ε))

They differ in the advantage: DDPO takes one, GRPO standardises the rewards of each prompt's samples.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steer.arguments import Settings, argument
from steer.training.losses.log_probs import LogProbs, Metrics, Unit, checked_rewards

EPS = 1e-6  # added to the standard deviation of rewards: differences by rounding alone must not count


def clipped_objective(log_probs: LogProbs, advantages: Tensor, clip: float) -> tuple[Tensor, Metrics]:
    """Return the loss above for advantages (B, K), with ρ in the unit of the log-probabilities.

    Metrics: clipped, the fraction (0..1) of steps with ρ_t out of range; ratio, the largest |ρ_t − 1|.
    """
    ratio = (log_probs.new - log_probs.old.detach()).exp()
    negated_advantages = -advantages[..., None]
    loss = torch.maximum(negated_advantages * ratio, negated_advantages * ratio.clamp(1 - clip, 1 + clip)).mean()
    deviation = (ratio.detach() - 1).abs()
    return loss, {"clipped": float((deviation > clip).float().mean()), "ratio": float(deviation.max())}


def group_advantages(rewards: Tensor, scale: bool) -> Tensor:
    """Return A = (r − mean_K)/(std_K + 10⁻⁶) of rewards (B, K), or r − mean_K; exactly 0 for equal rewards."""
    advantages = rewards - rewards.mean(1, keepdim=True)
    if scale:
        advantages = advantages / (rewards.std(1, correction=0, keepdim=True) + EPS)
    # a mean of equal numbers may be off by its last bit
    return torch.where(rewards.amax(1, keepdim=True) > rewards.amin(1, keepdim=True), advantages, 0.0)


@dataclass(frozen=True)
class DDPO(Settings):
    """DDPO's importance-sampling estimator, one ratio per step.

    clip            ε > 0, inf for none; published 1e-4 for log-probabilities averaged over the elements
    unit            of the log-probabilities: element or nat
    advantage_clip  > 0, inf for none: advantages are clipped to ± this; 5 in the authors' ddpo-pytorch

    Takes ADVANTAGES (B, K) for rewards, normalised already (steer.training.losses.PerPromptStatTracker).
    """

    clip: float = argument(1e-4, "(0, inf]")
    unit: Unit = "element"
    advantage_clip: float = argument(5.0, "(0, inf]")
    whole_trajectory: ClassVar[bool] = False
    stepwise: ClassVar[bool] = True

    def __call__(self, log_probs: LogProbs, rewards: Tensor) -> tuple[Tensor, Metrics]:
        advantages = checked_rewards(log_probs, rewards).clamp(-self.advantage_clip, self.advantage_clip)
        return clipped_objective(log_probs.per(self.unit), advantages, self.clip)


@dataclass(frozen=True)
class GRPO(Settings):
    """GRPO: the samples of a prompt are each other's baseline.

    clip   ε > 0, inf for none; 1e-4 in the authors' Flow-GRPO code (1e-5 to 1e-3 by task), averaged over the elements
    unit   of the log-probabilities: element or nat
    scale  divide by the group's standard deviation (over K, not K − 1, as in their code); without it Dr. GRPO
           (arXiv 2503.20783), which does not upweight prompts whose samples hardly differ

    Takes rewards (B, K), K ≥ 2. A prompt with equal rewards contributes nothing: advantages 0.
    """

    clip: float = argument(1e-4, "(0, inf]")
    unit: Unit = "element"
    scale: bool = True
    whole_trajectory: ClassVar[bool] = False
    stepwise: ClassVar[bool] = True

    def __call__(self, log_probs: LogProbs, rewards: Tensor) -> tuple[Tensor, Metrics]:
        advantages = group_advantages(checked_rewards(log_probs, rewards, group=2), self.scale)
        return clipped_objective(log_probs.per(self.unit), advantages, self.clip)
