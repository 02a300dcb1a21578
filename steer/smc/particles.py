"""Weighted particles, a group for each prompt, and their Feynman–Kac recursion (arXiv 2501.06848, Algorithm 1)."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from steer.errors import InputError
from steer.smc.potentials import PathRewards, Potential, Tempering, TemperingState, constant, difference
from steer.smc.resampling import Resampler, subsample, systematic


def log_mean_exp(log_values: Tensor) -> Tensor:
    """Return the log of the mean of exp over the last axis: (B, K) → (B,)."""
    return log_values.logsumexp(-1) - torch.tensor(float(log_values.shape[-1])).log()


def ess(log_weights: Tensor) -> Tensor:
    """Return the effective sample size 1/Σ W² of normalised weights W: (B, K) → (B,), between 1 and K."""
    return (-(2 * log_weights.log_softmax(-1)).logsumexp(-1)).exp()


@dataclass(frozen=True)
class Particles:
    """The weights of K particles for each of B prompts, immutable.

    log_weights      (B, K)  accumulated since the last resampling
    log_normaliser   (B,)    log Ẑ up to the last resampling
    log_potentials   (B, K)  Σ_j log G_j along each particle's path
    path             rewards and strengths along each particle's path, J evaluations
    """

    log_weights: Tensor
    log_normaliser: Tensor
    log_potentials: Tensor
    path: PathRewards

    @classmethod
    def start(cls, groups: int, size: int) -> "Particles":
        """Start with equal weights and no evaluation."""
        zeros = torch.zeros(groups, size)
        return cls(zeros, torch.zeros(groups), zeros, PathRewards.empty(groups, size))

    @property
    def ess(self) -> Tensor:
        """Effective sample size of each group (B,)."""
        return ess(self.log_weights)

    @property
    def log_evidence(self) -> Tensor:
        """log Ẑ so far (B,): the log-normaliser and the mean of the weights since."""
        return self.log_normaliser + log_mean_exp(self.log_weights)

    def reweight(self, log_g: Tensor) -> "Particles":
        """Multiply the weights by a potential: log w += log G."""
        return replace(self, log_weights=self.log_weights + log_g, log_potentials=self.log_potentials + log_g)

    def correct(self, log_ratio: Tensor) -> "Particles":
        """Correct the weights for steps drawn from q instead of p: log w += log p − log q (B, K).

        The ratio is not a potential: it is left out of Σ log G, which the terminal factor divides out.
        """
        return replace(self, log_weights=self.log_weights + log_ratio)

    def resample(self, ancestors: Tensor, groups: Tensor) -> "Particles":
        """Take the ancestors (B, n), n of K, in the groups where `groups` (B,) is true.

        Weights become equal, their mean is multiplied into Ẑ, and each path follows its particle. The particles of
        other groups must be their own ancestors; their weights are kept.
        """
        return Particles(
            log_weights=torch.where(groups[:, None], 0.0, self.log_weights.gather(1, ancestors)),
            log_normaliser=torch.where(groups, self.log_evidence, self.log_normaliser),
            log_potentials=self.log_potentials.gather(1, ancestors),
            path=self.path.follow(ancestors),
        )


TIE_SHARE = 0.01  # rewards that differ by less than this share of the range are tied where λ is chosen
ROUNDING = 1e-6  # relative error of rewards in fp32
UNIFORM_ESS_SHARE = 1 - 1e-6  # weights with an ESS above this fraction of K count as equal: never resampled


@dataclass(frozen=True)
class FeynmanKac:
    """Sampling from p(x0) exp(λ r(x0)), given intermediate rewards of the particles.

    lam            λ, the final strength
    potential      path of rewards → log G_j
    resampler      log-weights (B, K) → ancestors (B, K)
    tempering      progress of the run → λ_j
    ess_threshold  resample a group when its ESS < threshold · K; 1 or tempering by ESS: at every evaluation
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

    def at_half_ess(self, particles: Particles, rewards: Tensor, progress: float) -> "FeynmanKac":
        """Return this algorithm with the λ that gives an ESS of half the particles for the first rewards (B, K).

        Bisection finds the λ at which the mean ESS of the prompts whose particles differ is the mean of their targets

            max(K/2, n + 1/2),  n: particles that are as good as the prompt's best

        As λ → ∞ the ESS falls to n, which no finite λ reaches: the target is 3/2 for two particles that differ.

        A particle is as good as the best if log G_j at λ = 1 is less by at most 1 % of the prompt's range, and a
        prompt's particles differ if this range is above rounding and 1 % of the widest: λ would otherwise have to
        separate near ties. If none differ, λ is 0. At the largest λ tried, one standard deviation is a factor e^100.
        """
        log_g = replace(self, lam=1.0).reweight(particles, rewards, progress).log_weights - particles.log_weights
        ranges = log_g.amax(1) - log_g.amin(1)
        differ = ranges > torch.maximum(TIE_SHARE * ranges.max(), ROUNDING * rewards.abs().amax(1))
        if not differ.any():
            return replace(self, lam=0.0)
        behind = log_g.amax(1, keepdim=True) - log_g
        best = (behind <= TIE_SHARE * ranges[:, None]).sum(1)[differ]
        target = (best + 0.5).clamp(min=rewards.shape[1] / 2).mean().item()
        spread = (log_g - log_g.mean(1, keepdim=True))[differ].square().mean().sqrt().item()
        low, high = 0.0, 100 / spread
        for _ in range(60):
            middle = (low + high) / 2
            left = replace(self, lam=middle).reweight(particles, rewards, progress).ess[differ].mean().item()
            low, high = (middle, high) if left > target else (low, middle)
        return replace(self, lam=high)

    def reweight(self, particles: Particles, rewards: Tensor, progress: float) -> Particles:
        """Multiply the weights by G_j, from rewards (B, K) of x̂0 after the fraction `progress` of the run."""

        def reweighted(strength: Tensor) -> Particles:
            path = particles.path.append(rewards, strength)
            return replace(particles, path=path).reweight(self.potential(path))

        strengths, size = particles.path.strengths, rewards.shape[1]
        previous = strengths[-1] if len(strengths) else torch.zeros(len(rewards), 1)
        state = TemperingState(progress, self.lam, previous, lambda strength: reweighted(strength).ess / size)
        return reweighted(self.tempering(state))

    def select(
        self, particles: Particles, generator: Generator, count: int | None = None
    ) -> tuple[Particles, Tensor | None]:
        """Resample the groups with low ESS, and every group where only `count` of the K particles remain.

        Returns the particles and their ancestors (B, count); None where no group is resampled.
        """
        groups, size = particles.log_weights.shape
        count = size if count is None else count
        threshold = 1.0 if getattr(self.tempering, "holds_ess", False) else self.ess_threshold
        low = (particles.ess < size * min(threshold, UNIFORM_ESS_SHARE)) | torch.tensor(count < size)
        if not low.any():
            return particles, None
        resampled = self.resampler(particles.log_weights, generator)
        if count < size:
            resampled = subsample(resampled, count, generator)
        ancestors = torch.where(low[:, None], resampled, torch.arange(count).expand(groups, count))
        return particles.resample(ancestors, low), ancestors

    def finish(self, particles: Particles, rewards: Tensor) -> Particles:
        """Multiply by the terminal factor log G_end = λ r(x0) − Σ_j log G_j; rewards (B, K) of the final images."""
        return particles.reweight(self.lam * rewards - particles.log_potentials)
