"""Reward-filtered finetuning: the likelihood of each prompt's best samples (RAFT, arXiv 2304.06767).

loss = − mean over the best n of K samples of each prompt, and over steps, of (1/D) log π(x_s | x_t)
n    = max(1, keep·K rounded)

The loss does not keep the policy near the reference: add a KL penalty (`steer.training.gradient`).
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from steer.arguments import Settings, argument
from steer.training.losses.log_probs import LogProbs, Metrics, checked_rewards


@dataclass(frozen=True)
class Filtered(Settings):
    """Imitation of the best samples of each prompt.

    keep  fraction of samples, above 0 and at most 1; at least one sample is kept. 0.25 is the best of four.

    Takes rewards (B, K); of equal ones the earlier sample is kept. Metrics: kept, samples per prompt; lift, the mean
    reward of those kept minus that of all.
    """

    keep: float = argument(0.25, "(0, 1]")
    whole_trajectory: ClassVar[bool] = False
    stepwise: ClassVar[bool] = True

    def __call__(self, log_probs: LogProbs, rewards: Tensor) -> tuple[Tensor, Metrics]:
        rewards = checked_rewards(log_probs, rewards)
        new = log_probs.per("element").new
        kept = max(1, round(self.keep * rewards.shape[1]))
        best = rewards.argsort(dim=1, descending=True, stable=True)[:, :kept]
        loss = -new.gather(1, best[..., None].expand(-1, -1, new.shape[2])).mean()
        return loss, {"kept": float(kept), "lift": float(rewards.gather(1, best).mean() - rewards.mean())}
