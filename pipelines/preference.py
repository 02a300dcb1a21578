"""Finetuning by comparing samples of one prompt: D3PO (arXiv 2311.13231) and PRDP (arXiv 2402.08714)."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from steer.losses import D3PO, PRDP, D3POTrajectory
from steer.pipelines.finetune import LossPipeline
from steer.pipelines.samples import Scored


class D3POPipeline(LossPipeline):
    """Direct preference optimisation of denoising steps: of two samples from one x_T the better one becomes likelier.

    pipe = StableDiffusionPipeline.from_pretrained(...)
    D3POPipeline(pipe, reward="hpsv2.1").train(prompts, "out/d3po")

    beta        β of the implicit reward β log pθ/p_ref, for log-probabilities per latent element (published: 0.1)
    trajectory  one comparison of whole trajectories in place of one for each step
    pareto      of a reward made of others: prefer what is better by one part and worse by none; the rest is dropped
    """

    shared_start: ClassVar[bool] = True

    def __init__(
        self, pipe: Any, reward: Any, *, beta: float = 0.1, trajectory: bool = False, pareto: bool = False
    ) -> None:
        super().__init__(pipe, reward, (D3POTrajectory if trajectory else D3PO)(beta=beta))
        self.pareto = pareto

    def signal(self, scored: Scored) -> Tensor:
        """Rewards (B, K), or those of the parts (B, K, M)."""
        return torch.stack(list(scored.parts.values()), -1) if self.pareto and scored.parts else scored.rewards


class PRDPPipeline(LossPipeline):
    """Regression of reward differences on those of log pθ/p_ref, with proximal updates: stable on many prompts.

    beta  of the optimum pθ ∝ p_ref · exp(r/β), in units of the reward per nat; start from a tenth of its spread
    clip  ε, how far log pθ/p_ref of a step may go from where the samples were drawn, in nats
    """

    def __init__(self, pipe: Any, reward: Any, *, beta: float = 0.1, clip: float = 0.1) -> None:
        super().__init__(pipe, reward, PRDP(beta=beta, clip=clip))
