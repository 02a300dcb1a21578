"""Finetuning by policy gradients, and by imitation of the best: the baselines of D3PO and PRDP."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from steer.pipelines.training.config import TrainingConfig
from steer.pipelines.training.method import Scored
from steer.pipelines.training.trainer import LossTrainer
from steer.training.losses import DDPO, GRPO, Filtered
from steer.training.losses.advantages import PerPromptStatTracker


class DDPOTrainer(LossTrainer):
    """DDPO (arXiv 2305.13301): a clipped policy gradient, rewards standardised by each prompt's own history.

    clip            ε of the ratio, for log-probabilities per latent element
    advantage_clip  advantages beyond are shortened to it
    history         rewards of a prompt that are remembered
    enough          of them before they are used in place of the batch's
    """

    def __init__(
        self,
        pipe: Any,
        reward: Any,
        *,
        clip: float = 1e-4,
        advantage_clip: float = 5.0,
        history: int = 16,
        enough: int = 16,
    ) -> None:
        super().__init__(pipe, reward, DDPO(clip=clip, advantage_clip=advantage_clip))
        self.normaliser = PerPromptStatTracker(history, enough)

    def check(self, settings: TrainingConfig) -> None:
        """One sample of a prompt is enough: it is compared with earlier ones."""

    def signal(self, scored: Scored) -> Tensor:
        """Advantages (B, K)."""
        return self.normaliser(scored.prompts, scored.rewards)

    def config_dict(self) -> dict[str, Any]:
        return super().config_dict() | {"history": self.normaliser.size, "enough": self.normaliser.min_count}

    def state(self) -> dict[str, Any]:
        return self.normaliser.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        self.normaliser.load(state)


class GRPOTrainer(LossTrainer):
    """GRPO (arXiv 2505.05470): a clipped policy gradient, the samples of a prompt being each other's baseline.

    clip   ε of the ratio, for log-probabilities per latent element
    scale  divide by the standard deviation of a prompt's rewards
    """

    def __init__(self, pipe: Any, reward: Any, *, clip: float = 1e-4, scale: bool = True) -> None:
        super().__init__(pipe, reward, GRPO(clip=clip, scale=scale))


class FilteredTrainer(LossTrainer):
    """Reward-filtered finetuning (arXiv 2304.06767): the best samples of each prompt become likelier.

    keep_fraction  share of them. Nothing but `kl_weight` holds the model near the reference.
    """

    def __init__(self, pipe: Any, reward: Any, *, keep_fraction: float = 0.25) -> None:
        super().__init__(pipe, reward, Filtered(keep=keep_fraction))
