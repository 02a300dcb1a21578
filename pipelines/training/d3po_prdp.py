"""Finetuning by comparing samples of one prompt: D3PO (arXiv 2311.13231) and PRDP (arXiv 2402.08714)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from steer.pipelines.training.config import LossConfig
from steer.pipelines.training.method import Scored
from steer.pipelines.training.trainer import LossTrainer
from steer.training.losses import D3PO, PRDP, D3POTrajectory


@dataclass(frozen=True)
class D3POConfig(LossConfig):
    """TrainingConfig with the options of D3PO.

    beta        β of the implicit reward β log pθ/p_ref, for log-probabilities per latent element; published 0.1
    trajectory  one comparison of whole trajectories in place of one per step
    pareto      of a composed reward: prefer the sample that is better by one component and worse by none
    """

    title: ClassVar[str] = "D3PO"
    paper: ClassVar[tuple[str, str]] = (
        "Using Human Feedback to Fine-tune Diffusion Models without Any Reward Model",
        "2311.13231",
    )

    beta: float = D3PO.beta
    trajectory: bool = False
    pareto: bool = False

    def loss(self) -> D3PO | D3POTrajectory:
        return D3POTrajectory(beta=self.beta) if self.trajectory else D3PO(beta=self.beta)


class D3POTrainer(LossTrainer[D3POConfig]):
    """Direct preference optimisation of denoising steps: of two samples from one x_T the better one becomes likelier.

    D3POTrainer(pipe, "hpsv2.1", D3POConfig(max_steps=200), train_prompts=prompts).train()
    D3POTrainer(pipe, preferences="my-preferences").train()  # of people
    """

    config_class = D3POConfig
    shared_start: ClassVar[bool] = True
    takes_preferences: ClassVar[bool] = True

    def signal(self, scored: Scored) -> Tensor:
        """Mixed rewards (B, K), or those of the components (B, K, M)."""
        return self.reward_signal.objectives(scored) if self.config.pareto else super().signal(scored)


@dataclass(frozen=True)
class PRDPConfig(LossConfig):
    """TrainingConfig with the options of PRDP.

    beta  of the optimum pθ ∝ p_ref · exp(r/β), reward per nat; start from a tenth of the reward's standard deviation
    clip  ε in nats: how far log pθ/p_ref of a step may move from its value when the samples were drawn
    """

    title: ClassVar[str] = "PRDP"
    paper: ClassVar[tuple[str, str]] = (
        "PRDP: Proximal Reward Difference Prediction for Large-Scale Reward Finetuning of Diffusion Models",
        "2402.08714",
    )

    beta: float = PRDP.beta
    clip: float = PRDP.clip

    def loss(self) -> PRDP:
        return PRDP(beta=self.beta, clip=self.clip)


class PRDPTrainer(LossTrainer[PRDPConfig]):
    """Regression of reward differences on those of log pθ/p_ref, with proximal updates: stable on many prompts."""

    config_class = PRDPConfig
