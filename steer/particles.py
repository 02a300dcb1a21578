"""Weighted particles in groups of one prompt each: immutable, fp32, in logs."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from steer.potentials import PathRewards


def log_mean_exp(log_values: Tensor) -> Tensor:
    """log of the mean of exp over the last axis: (B, K) → (B,)."""
    return log_values.logsumexp(-1) - torch.tensor(float(log_values.shape[-1])).log()


def ess(log_weights: Tensor) -> Tensor:
    """Effective sample size 1/Σ W² of normalised weights W: (B, K) → (B,), between 1 and K."""
    return (-(2 * log_weights.log_softmax(-1)).logsumexp(-1)).exp()


@dataclass(frozen=True)
class Particles:
    """K particles for each of B prompts.

    log_weights      (B, K)  gathered since the last resampling
    log_normaliser   (B,)    log Ẑ up to the last resampling
    log_potentials   (B, K)  Σ_j log G_j along each particle's own path
    path             rewards and strengths along each particle's own path, J evaluations
    """

    log_weights: Tensor
    log_normaliser: Tensor
    log_potentials: Tensor
    path: PathRewards

    @classmethod
    def start(cls, groups: int, size: int) -> "Particles":
        """All weights equal, nothing evaluated."""
        zeros = torch.zeros(groups, size)
        return cls(zeros, torch.zeros(groups), zeros, PathRewards.empty(groups, size))

    @property
    def ess(self) -> Tensor:
        """Effective sample size of each group (B,)."""
        return ess(self.log_weights)

    @property
    def log_evidence(self) -> Tensor:
        """log Ẑ of everything so far (B,): the log-normaliser with the weights still carried."""
        return self.log_normaliser + log_mean_exp(self.log_weights)

    def reweight(self, log_g: Tensor) -> "Particles":
        """Multiplies the weights by a potential: log w += log G."""
        return replace(self, log_weights=self.log_weights + log_g, log_potentials=self.log_potentials + log_g)

    def correct(self, log_ratio: Tensor) -> "Particles":
        """Pays for steps drawn from q instead of p: log w += log p − log q (B, K).

        No potential of the reward: it stays out of Σ log G, which the terminal factor takes back.
        """
        return replace(self, log_weights=self.log_weights + log_ratio)

    def resample(self, ancestors: Tensor, groups: Tensor) -> "Particles":
        """Follows `ancestors` (B, n), n of K, in the groups where `groups` (B,) is true: weights become equal, their
        mean goes into log Ẑ, and the history of each path goes with its particle. Other groups, whose particles must
        all be their own ancestors, keep theirs."""
        return Particles(
            log_weights=torch.where(groups[:, None], 0.0, self.log_weights.gather(1, ancestors)),
            log_normaliser=torch.where(groups, self.log_evidence, self.log_normaliser),
            log_potentials=self.log_potentials.gather(1, ancestors),
            path=self.path.follow(ancestors),
        )
