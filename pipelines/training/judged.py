"""Finetuning by a judge of image pairs, with preferences that may be intransitive: SPO (2401.04056), DNO (2404.03715).

The signal of a sample is its win rate against the other samples of its prompt (`steer.rewards.judges.Tournament`).
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from steer.errors import InputError
from steer.pipelines.training.config import LossConfig
from steer.pipelines.training.ddpo_grpo import GRPOConfig, GRPOTrainer
from steer.pipelines.training.trainer import LossTrainer
from steer.reward import Reward, compares_images
from steer.rewards.judges import RewardJudge, Tournament
from steer.rewards.parser import load_judge
from steer.training.losses import DNO


class JudgedTrainer:
    """A mixin for trainers with a judge, as read by `steer.load_judge`, in place of a reward.

    The trained model is evaluated by its win rate against the model before the training, from the same noise.
    """

    @staticmethod
    def read_reward(reward: Any) -> Reward:
        """Return the tournament of a judge; a tournament is returned unchanged."""
        judge = load_judge(reward)
        if isinstance(judge, RewardJudge) and compares_images(judge.reward):
            return judge.reward
        return Tournament(judge)


def check_micro_batch(config: LossConfig) -> None:
    """Raise InputError where the samples of a prompt, which are compared, are not in one micro-batch."""
    if config.micro_batch % config.num_generations:
        raise InputError(
            f"micro_batch must be a multiple of num_generations, {config.num_generations}, got {config.micro_batch}: "
            f"{config.title} compares the samples of a prompt"
        )


@dataclass(frozen=True)
class SPOConfig(GRPOConfig):
    """GRPOConfig with win rates in place of rewards."""

    title: ClassVar[str] = "SPO"
    paper: ClassVar[tuple[str, str]] = (
        "A Minimaximalist Approach to Reinforcement Learning from Human Feedback",
        "2401.04056",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_micro_batch(self)


class SPOTrainer(JudgedTrainer, GRPOTrainer):
    """Self-play preference optimisation (arXiv 2401.04056): GRPO on win rates among a prompt's samples.

    SPOTrainer(pipe, "hierarchy(scene-soft, brightness)", SPOConfig(max_steps=200), train_prompts=prompts).train()
    """

    config_class = SPOConfig


@dataclass(frozen=True)
class DNOConfig(LossConfig):
    """TrainingConfig with the options of DNO. Use several updates per rollout (`num_iterations`).

    beta         β of β log pθ/p_old, for log-probabilities per latent element
    temperature  T of the labels σ((wᵃ − wᵇ)/T): 1; a value near 0, with `sample_filter: best-worst` and `filter_keep:
                 2`, gives the paper's practical form, DPO on the best and the worst sample
    """

    loss_class: ClassVar[Any] = DNO
    title: ClassVar[str] = "DNO"
    paper: ClassVar[tuple[str, str]] = (
        "Direct Nash Optimization: Teaching Language Models to Self-Improve with General Preferences",
        "2404.03715",
    )

    beta: float = DNO.beta
    temperature: float = DNO.temperature

    def __post_init__(self) -> None:
        super().__post_init__()
        check_micro_batch(self)


class DNOTrainer(JudgedTrainer, LossTrainer[DNOConfig]):
    """Direct Nash optimisation (arXiv 2404.03715): win rates as soft labels of pairs, about the sampling policy.

    DNOTrainer(pipe, "hierarchy(scene-soft, brightness)", DNOConfig(num_iterations=2), train_prompts=prompts).train()
    """

    config_class = DNOConfig
