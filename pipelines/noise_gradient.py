"""The gradient of the reward with respect to the noise: exact, through the whole chain, or estimated from values."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from steer.differentiable import own_gradients
from steer.errors import InputError
from steer.pipelines.noise_to_image import NoiseToImage
from steer.reward import Reward
from steer.seeds import drawn


@dataclass(frozen=True)
class Estimate:
    """At some noise: images (B·K, 3, H, W), rewards (B, K) with their parts, ∇_ε r (B·K, …) in fp32."""

    images: Tensor
    rewards: Tensor
    parts: Mapping[str, Tensor]
    gradient: Tensor


class NoiseGradient(Protocol):
    """(chain, noise, number of the iteration) → Estimate."""

    def __call__(self, chain: NoiseToImage, noise: Tensor, iteration: int) -> Estimate: ...


@dataclass(frozen=True)
class Backprop:
    """∇_ε r(G(ε)) by automatic differentiation. Raises InputError for a reward that lets no gradients through.

    checkpointing  recompute activations on the way back instead of keeping them
    """

    checkpointing: bool = field(default=True, repr=False)  # changes no number: not told of a saved search

    def __call__(self, chain: NoiseToImage, noise: Tensor, iteration: int) -> Estimate:
        leaf = noise.detach().requires_grad_(True)
        with torch.enable_grad():
            images = chain.with_graph(leaf, self.checkpointing)
            rewards, parts = chain.population.score(images)
            gradient = own_gradients(rewards, leaf, chain.in_fp16)
        if gradient is None:
            raise _not_differentiable(chain.population.reward.name)
        chain.population.count_gradients(len(noise))
        return Estimate(images.detach(), rewards.detach(), {n: p.detach() for n, p in parts.items()}, gradient)


@dataclass(frozen=True)
class ZeroOrder:
    """For rewards that are black boxes: 1/n Σ_i [r(ε + δu_i) − r(ε − δu_i)]/2δ · u_i, u_i ~ N(0, I).

    (antithetic evolution strategies, arXiv 1703.03864)

    directions  n: an iteration makes 2n + 1 images of each
    distance    δ, in the noise's own standard deviations
    """

    directions: int = 8
    distance: float = 0.1

    def __post_init__(self) -> None:
        if self.directions < 1 or not self.distance > 0:
            raise InputError(f"zero-order: directions must be at least 1 and distance above 0, got {self}")

    def __call__(self, chain: NoiseToImage, noise: Tensor, iteration: int) -> Estimate:
        images = chain.quickly(noise)
        rewards, parts = chain.population.score(images)
        gradient = torch.zeros_like(noise)
        for number in range(self.directions):
            u = drawn(chain.seeds, noise, [f"direction {iteration} {number}"] * len(noise))
            ahead, behind = (self._reward(chain, noise + side * self.distance * u) for side in (1, -1))
            slope = ((ahead - behind) / (2 * self.distance)).flatten().to(u)
            gradient += slope.view(-1, *[1] * (u.dim() - 1)) * u / self.directions
        return Estimate(images, rewards, parts, gradient)

    def _reward(self, chain: NoiseToImage, noise: Tensor) -> Tensor:
        return chain.population.score(chain.quickly(noise))[0]


GRADIENTS: dict[str, NoiseGradient] = {"backprop": Backprop(), "zero-order": ZeroOrder()}


def check_differentiable(reward: Reward, gradient: NoiseGradient) -> None:
    """Raises InputError where gradients are asked of a reward that says it has none."""
    if isinstance(gradient, Backprop) and not reward.differentiable:
        raise _not_differentiable(reward.name)


def _not_differentiable(name: str) -> InputError:
    return InputError(
        f"reward {name!r} is not differentiable: use the zero-order estimator "
        "(gradient='zero-order', on the command line --gradient zero-order), or another reward"
    )
