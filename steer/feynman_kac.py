"""Feynman–Kac steering, apart from any model: weights and ancestors from rewards (arXiv 2501.06848, Algorithm 1)."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from steer.errors import InputError
from steer.particles import Particles
from steer.potentials import Moment, Potential, Tempering, constant, difference, ess_targeted
from steer.resampling import Resampler, systematic, thinned

EQUAL = 1 - 1e-6  # weights whose ESS exceeds this share of K count as equal: they are never resampled


@dataclass(frozen=True)
class FeynmanKac:
    """Draws from p(x0) exp(λ r(x0)), given the rewards of particles on their way.

    lam            λ, the strength at the end
    potential      path of rewards → log G_j
    resampler      log-weights (B, K) → ancestors (B, K)
    tempering      where the run stands → λ_j
    ess_threshold  resample a group when its ESS < threshold · K; 1, and tempering by ESS, at every evaluation
    """

    lam: float = 10.0
    potential: Potential = difference
    resampler: Resampler = systematic
    tempering: Tempering = constant
    ess_threshold: float = 0.5

    def __post_init__(self) -> None:
        if not math.isfinite(self.lam):
            raise InputError(f"lam must be a finite number, got {self.lam}")
        if not 0 < self.ess_threshold <= 1:
            raise InputError(f"ess_threshold must be above 0 and at most 1, got {self.ess_threshold}")

    def weigh(self, particles: Particles, rewards: Tensor, progress: float) -> Particles:
        """Multiplies the weights by G_j, from rewards (B, K) of x̂0 after the share `progress` of the run."""

        def weighed(strength: Tensor) -> Particles:
            path = particles.path.append(rewards, strength)
            return replace(particles, path=path).reweight(self.potential(path))

        strengths, size = particles.path.strengths, rewards.shape[1]
        previous = strengths[-1] if len(strengths) else torch.zeros(len(rewards), 1)
        moment = Moment(progress, self.lam, previous, lambda strength: weighed(strength).ess / size)
        return weighed(self.tempering(moment))

    def select(
        self, particles: Particles, generator: Generator, count: int | None = None
    ) -> tuple[Particles, Tensor | None]:
        """Resamples the groups whose ESS is low, and all of them where only `count` of K particles are to go on: the
        particles and their ancestors (B, count), None where all stay."""
        groups, size = particles.log_weights.shape
        count = size if count is None else count
        # An ESS that is steered to its target never falls below it: carried weights would keep λ_j down for good.
        threshold = 1.0 if self.tempering is ess_targeted else self.ess_threshold
        low = (particles.ess < size * min(threshold, EQUAL)) | torch.tensor(count < size)
        if not low.any():
            return particles, None
        drawn = self.resampler(particles.log_weights, generator)
        if count < size:
            drawn = thinned(drawn, count, generator)
        ancestors = torch.where(low[:, None], drawn, torch.arange(count).expand(groups, count))
        return particles.resample(ancestors, low), ancestors

    def finish(self, particles: Particles, rewards: Tensor) -> Particles:
        """The terminal factor, log G_end = λ r(x0) − Σ_j log G_j, from the rewards (B, K) of the finished images."""
        return particles.reweight(self.lam * rewards - particles.log_potentials)
