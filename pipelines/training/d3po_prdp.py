"""Finetuning by comparing samples of one prompt: D3PO (2311.13231), PRDP (2402.08714) and BRAIn (2402.02479)."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from steer.pipelines.training.config import LossConfig, ParetoConfig
from steer.pipelines.training.trainer import LossTrainer
from steer.training.losses import D3PO, PRDP, BRAIn, D3POTrajectory


@dataclass(frozen=True)
class D3POConfig(ParetoConfig):
    """TrainingConfig with the options of D3PO.

    beta        β of the implicit reward β log pθ/p_ref, for log-probabilities per latent element; published 0.1
    trajectory  one comparison of whole trajectories in place of one per step
    pareto      with a weighted sum of rewards, prefer the sample that is better by one component and worse by none
    """

    title: ClassVar[str] = "D3PO"
    paper: ClassVar[tuple[str, str]] = (
        "Using Human Feedback to Fine-tune Diffusion Models without Any Reward Model",
        "2311.13231",
    )

    beta: float = D3PO.beta
    trajectory: bool = False

    def loss(self) -> D3PO | D3POTrajectory:
        return D3POTrajectory(beta=self.beta) if self.trajectory else D3PO(beta=self.beta)


class D3POTrainer(LossTrainer[D3POConfig]):
    """Direct preference optimisation of denoising steps: the better of two samples from one x_T becomes likelier.

    D3POTrainer(pipe, "hpsv2.1", D3POConfig(max_steps=200), train_prompts=prompts).train()
    D3POTrainer(pipe, preferences="my-preferences").train()  # human preferences
    """

    config_class = D3POConfig
    shared_start: ClassVar[bool] = True
    takes_preferences: ClassVar[bool] = True


@dataclass(frozen=True)
class PRDPConfig(LossConfig):
    """TrainingConfig with the options of PRDP.

    beta  β of the optimum pθ ∝ p_ref · exp(r/β), reward per nat; start from a tenth of the reward's standard deviation
    clip  ε in nats: how far log pθ/p_ref of a step may move from its value when the samples were drawn
    """

    loss_class: ClassVar[Any] = PRDP
    title: ClassVar[str] = "PRDP"
    paper: ClassVar[tuple[str, str]] = (
        "PRDP: Proximal Reward Difference Prediction for Large-Scale Reward Finetuning of Diffusion Models",
        "2402.08714",
    )

    beta: float = PRDP.beta
    clip: float = PRDP.clip


class PRDPTrainer(LossTrainer[PRDPConfig]):
    """Regression of reward differences on differences of log pθ/p_ref, by proximal updates: stable on many prompts."""

    config_class = PRDPConfig


@dataclass(frozen=True)
class BRAInConfig(LossConfig):
    """TrainingConfig with the options of BRAIn.

    gamma  γ, in the unit of the reward: samples that differ by γ differ by a factor e in the probability of being good
    form   form of this probability: exp(r/γ), or sigmoid((r − r̄)/γ) about the mean of a prompt's samples
    clip   ε in nats: how far log pθ of a step may move from its value when the samples were drawn
    """

    loss_class: ClassVar[Any] = BRAIn
    title: ClassVar[str] = "BRAIn"
    paper: ClassVar[tuple[str, str]] = (
        "BRAIn: Bayesian Reward-conditioned Amortized Inference for natural language generation from feedback",
        "2402.02479",
    )

    gamma: float = BRAIn.gamma
    form: Literal["exp", "sigmoid"] = BRAIn.form
    clip: float = BRAIn.clip


class BRAInTrainer(LossTrainer[BRAInConfig]):
    """BRAIn (arXiv 2402.02479): distil the reference, conditioned on good samples, by all samples of a prompt at once.

    BRAInTrainer(pipe, "hpsv2.1", BRAInConfig(gamma=0.01), train_prompts=prompts).train()
    """

    config_class = BRAInConfig
