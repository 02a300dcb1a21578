"""What an update of finetuning learns from: samples of prompts in chunks, and what the reference says of them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from steer.team import ALONE, Team
from steer.trajectory import Sampler, Trajectories
from steer.transition import Gaussian


@dataclass(frozen=True)
class Reference:
    """What the reference policy says of S chosen steps: means (N, S, …) fp32, τ (S,), log-probs (N, S) in nats."""

    means: Tensor
    deviations: Tensor
    log_probs: Tensor

    def at(self, numbers: Collection[int]) -> "Reference":
        """Of some rows."""
        some = list(numbers)
        return replace(self, means=self.means[some], log_probs=self.log_probs[some])

    @staticmethod
    def joined(parts: Sequence["Reference"]) -> "Reference":
        """Of all their rows; they have the same steps."""
        means, log_probs = torch.cat([part.means for part in parts]), torch.cat([part.log_probs for part in parts])
        return replace(parts[0], means=means, log_probs=log_probs)

    def kernel(self, column: int, like: Tensor) -> Gaussian:
        """Its p(x_s | x_t) at one of those steps."""
        return Gaussian(self.means[:, column].to(like.device), self.deviations[column].to(like.device))


def reference_of(sampler: Sampler, stored: Trajectories, steps: Sequence[int]) -> Reference:
    """By today's weights: call it where these are the reference's."""
    told: list[tuple[Tensor, Tensor, Tensor]] = []

    def keep(t: int, kernel: Gaussian, x_s: Tensor) -> None:
        told.append((kernel.mean.cpu(), kernel.std.cpu(), kernel.log_prob(x_s).cpu()))

    sampler.replay(stored, keep, steps)
    means, deviations, log_probs = zip(*told, strict=True)
    return Reference(torch.stack(means, 1), torch.stack(deviations), torch.stack(log_probs, 1))


@dataclass(frozen=True)
class Batch:
    """B prompts × K samples, prompt after prompt, in chunks of rows that go through the denoiser together.

    chunks, references  of several processes, those of this one's prompts
    steps    the stochastic steps to learn from, ascending: S of all T
    rewards  (B, K), or (B, K, M) where a loss takes several; of all processes
    """

    chunks: Sequence[Trajectories]
    references: Sequence[Reference]
    steps: Sequence[int]
    rewards: Tensor

    def matrix(self, values: Sequence[Tensor], team: Team = ALONE) -> Tensor:
        """(N, S) of each chunk, of all processes, as one (B, K, S)."""
        return torch.cat(team.gather(values)).view(*self.rewards.shape[:2], len(self.steps))

    def shares(self, matrix: Tensor, team: Team = ALONE) -> Sequence[Tensor]:
        """(n, S) of each of this process's chunks, views of the (B, K, S) of all."""
        return matrix.flatten(0, 1).chunk(team.count)[team.index].split([len(chunk.rows) for chunk in self.chunks])
