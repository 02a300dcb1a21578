"""Finetuning by policy gradients (DDPO, GRPO), and by imitating the best samples: the baselines of D3PO and PRDP."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from steer.pipelines.training.config import ParetoConfig
from steer.pipelines.training.method import Scored
from steer.pipelines.training.trainer import LossTrainer
from steer.training.losses import DDPO, GRPO, Filtered, PerPromptStatTracker, group_advantages
from steer.training.signals import pareto_advantages


@dataclass(frozen=True)
class DDPOConfig(ParetoConfig):
    """TrainingConfig with the options of DDPO.

    clip            ε of the ratio, for log-probabilities per latent element; published 1e-4
    advantage_clip  advantages are clipped to ± this
    history         number of rewards stored per prompt
    min_history     rewards of a prompt needed before its statistics replace the batch's
    """

    loss_class: ClassVar[Any] = DDPO
    title: ClassVar[str] = "DDPO"
    paper: ClassVar[tuple[str, str]] = ("Training Diffusion Models with Reinforcement Learning", "2305.13301")
    min_generations: ClassVar[int] = 1  # a sample is compared with earlier samples of its prompt
    without_pareto: ClassVar[tuple[str, ...]] = (*ParetoConfig.without_pareto, "history", "min_history")

    clip: float = DDPO.clip
    advantage_clip: float = DDPO.advantage_clip
    history: int = 16
    min_history: int = 16

    def tracker(self) -> PerPromptStatTracker:
        """Reward statistics of each prompt, still empty."""
        return PerPromptStatTracker(self.history, self.min_history)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tracker()


class DDPOTrainer(LossTrainer[DDPOConfig]):
    """DDPO (arXiv 2305.13301): a clipped policy gradient with rewards standardised by each prompt's own history."""

    config_class = DDPOConfig

    @cached_property
    def tracker(self) -> PerPromptStatTracker:
        """Reward statistics of each prompt so far."""
        return self.config.tracker()

    def signal(self, scored: Scored) -> Tensor:
        """Advantages (B, K)."""
        if self.config.pareto:
            return pareto_advantages(self.reward_signal.objectives(scored))
        return self.tracker(scored.prompts, super().signal(scored))

    def state_dict(self) -> dict[str, Any]:
        return self.tracker.state() | super().state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.tracker.load(state)
        super().load_state_dict(state)


@dataclass(frozen=True)
class GRPOConfig(ParetoConfig):
    """TrainingConfig with the options of GRPO.

    clip           ε of the ratio, for log-probabilities per latent element; published 1e-4
    scale_rewards  divide by the standard deviation of a prompt's rewards; False: Dr. GRPO
    """

    title: ClassVar[str] = "GRPO"
    paper: ClassVar[tuple[str, str]] = ("Flow-GRPO: Training Flow Matching Models via Online RL", "2505.05470")
    without_pareto: ClassVar[tuple[str, ...]] = (*ParetoConfig.without_pareto, "scale_rewards")

    clip: float = GRPO.clip
    scale_rewards: bool = GRPO.scale

    @property
    def takes_advantages(self) -> bool:
        """Whether advantages are computed from all samples of a prompt before some of them are left out."""
        return self.pareto or self.sample_filter != "none"

    def loss(self) -> GRPO | DDPO:
        if self.takes_advantages:  # the same objective without the baseline
            return DDPO(clip=self.clip, advantage_clip=math.inf)
        return GRPO(clip=self.clip, scale=self.scale_rewards)


class GRPOTrainer(LossTrainer[GRPOConfig]):
    """GRPO (Flow-GRPO, arXiv 2505.05470): a clipped policy gradient with the other samples of a prompt as baseline.

    trainer = GRPOTrainer(pipe, "hpsv2.1", GRPOConfig(max_steps=200), train_prompts=["a red circle", "two stars"])
    trainer.train()
    trainer.save_pretrained("lora")
    """

    config_class = GRPOConfig

    def signal(self, scored: Scored) -> Tensor:
        """Mixed rewards (B, K), or advantages where the loss takes advantages."""
        if self.config.pareto:
            return pareto_advantages(self.reward_signal.objectives(scored))
        rewards = super().signal(scored)
        return group_advantages(rewards, self.config.scale_rewards) if self.config.takes_advantages else rewards


@dataclass(frozen=True)
class FilteredConfig(ParetoConfig):
    """TrainingConfig with the options of reward-filtered finetuning.

    keep_fraction  share of a prompt's samples that are imitated. Only `kl_weight` keeps the model near the reference.
    pareto         with a weighted sum of rewards, imitate the Pareto front of a prompt's samples in place of a share
    """

    title: ClassVar[str] = "Reward-filtered finetuning"
    paper: ClassVar[tuple[str, str]] = (
        "RAFT: Reward rAnked FineTuning for Generative Foundation Model Alignment",
        "2304.06767",
    )
    without_pareto: ClassVar[tuple[str, ...]] = (*ParetoConfig.without_pareto, "keep_fraction")

    keep_fraction: float = Filtered.keep

    def loss(self) -> Filtered:
        return Filtered(keep=self.keep_fraction)


class FilteredTrainer(LossTrainer[FilteredConfig]):
    """Reward-filtered finetuning (RAFT, arXiv 2304.06767): maximise the likelihood of each prompt's best samples."""

    config_class = FilteredConfig
