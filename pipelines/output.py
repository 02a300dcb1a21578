"""What every steering pipeline returns."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cost:
    """What a call spent. nfe: denoiser evaluations, one per particle and model call (a guided pair counts once);
    decodes: images decoded, previews included; reward_calls: images scored; seconds: wall clock."""

    nfe: int
    decodes: int
    reward_calls: int
    seconds: float


@dataclass(frozen=True)
class Evaluation:
    """The rewards (B, K) of x̂0 at one solver step, the strength λ_j (B, 1) used, the ESS (B,) before resampling and the
    ancestors (B, K) that the slots went on from."""

    step: int
    rewards: Tensor
    strength: Tensor
    ess: Tensor
    ancestors: Tensor


@dataclass(frozen=True)
class SteeringOutput:
    """Images and what is known of them, best first within each of B prompts of K particles.

    images          B·K of them, prompt after prompt, in the requested output type
    rewards         (B, K) of the finished images
    parts           of a reward made of others: the scores (B, K) of each, by name
    log_weights     (B, K) unnormalised; their softmax weighs the images as draws from p(x0) exp(λ r(x0))
    log_normaliser  (B,)   log of the estimate of E_p[exp(λ r(x0))]
    latents         (B·K, …) final latents
    order           (B, K) the slot of the run that each image comes from
    history         one Evaluation per evaluated step, in slots of that step
    cost            evaluations and seconds
    """

    images: Any
    rewards: Tensor
    parts: Mapping[str, Tensor]
    log_weights: Tensor
    log_normaliser: Tensor
    latents: Tensor
    order: Tensor
    history: tuple[Evaluation, ...]
    cost: Cost

    def in_slot_order(self) -> "SteeringOutput":
        """The same with images as the pipeline made them, not sorted by reward."""
        slots = self.order.argsort(1)
        groups, size = slots.shape
        rows = (slots + torch.arange(groups)[:, None] * size).flatten().tolist()
        return replace(
            self,
            images=[self.images[row] for row in rows] if isinstance(self.images, list) else self.images[rows],
            rewards=self.rewards.gather(1, slots),
            parts={name: scores.gather(1, slots) for name, scores in self.parts.items()},
            log_weights=self.log_weights.gather(1, slots),
            latents=self.latents[rows],
            order=torch.arange(size).expand(groups, size),
        )

    @property
    def ess(self) -> list[Tensor]:
        """Effective sample size (B,) at each evaluated step, before resampling."""
        return [evaluation.ess for evaluation in self.history]

    @property
    def ancestors(self) -> list[Tensor]:
        """Ancestors (B, K) at each evaluated step: the slot before it that each slot goes on from."""
        return [evaluation.ancestors for evaluation in self.history]
