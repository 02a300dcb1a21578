"""What an update of finetuning learns from: samples of prompts in chunks, and what the reference says of them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from steer.precision import widest
from steer.team import ALONE, Team
from steer.trajectory import Sampler, Trajectories
from steer.transition import Gaussian


@dataclass(frozen=True)
class Reference:
    """What the reference policy says of S chosen steps.

    residuals   (μ_ref − x_s)/τ (N, S, …), kept where a penalty needs them: standard normal numbers, which lose less to
                a short dtype than means do
    deviations  τ (S,)
    log_probs   (N, S) fp64, nats
    """

    residuals: Tensor | None
    deviations: Tensor
    log_probs: Tensor

    def at(self, numbers: Collection[int]) -> "Reference":
        """Of some rows."""
        some = list(numbers)
        return replace(self, residuals=_rows(self.residuals, some), log_probs=self.log_probs[some])

    @staticmethod
    def joined(parts: Sequence["Reference"]) -> "Reference":
        """Of all their rows; they have the same steps."""
        kept = [part.residuals for part in parts if part.residuals is not None]
        log_probs = torch.cat([part.log_probs for part in parts])
        return replace(parts[0], residuals=torch.cat(kept) if kept else None, log_probs=log_probs)

    def kernel(self, column: int, x_s: Tensor) -> Gaussian | None:
        """Its p(· | x_t) at one of those steps, which led to x_s; None where no residuals are kept."""
        if self.residuals is None:
            return None
        dtype = widest(x_s.device)
        std = self.deviations[column].to(x_s.device, dtype)
        return Gaussian(x_s.to(dtype) + std * self.residuals[:, column].to(x_s.device, dtype), std)


def _rows(tensor: Tensor | None, some: Sequence[int]) -> Tensor | None:
    return None if tensor is None else tensor[some]


def reference_of(
    sampler: Sampler, stored: Trajectories, steps: Sequence[int], dtype: torch.dtype | None = torch.float32
) -> Reference:
    """Evaluate the present weights, which are those of the reference where this is called.

    dtype  of the residuals; None where no penalty needs them. bfloat16 ones are kept in float16, of the same size
    """
    dtype = torch.float16 if dtype == torch.bfloat16 else dtype
    log_probs, deviations, residuals = [], [], []

    def keep(t: int, kernel: Gaussian, x_s: Tensor) -> None:
        log_probs.append(kernel.log_prob(x_s).cpu())
        deviations.append(kernel.std.cpu())
        if dtype is not None:
            residuals.append(((kernel.mean - x_s) / kernel.std).to(dtype).cpu())

    sampler.replay(stored, keep, steps)
    kept = torch.stack(residuals, 1) if residuals else None
    return Reference(kept, torch.stack(deviations), torch.stack(log_probs, 1))


@dataclass(frozen=True)
class Batch:
    """B prompts × K samples, prompt after prompt, in chunks of rows that go through the denoiser together.

    chunks, references  of several processes, those of this one's prompts
    steps    the stochastic steps to learn from, ascending: S of those in the window
    window   how many of the T stochastic steps are in the window, the first ones; None: all
    rewards  (B, K), or (B, K, M) where a loss takes several; of all processes
    """

    chunks: Sequence[Trajectories]
    references: Sequence[Reference]
    steps: Sequence[int]
    rewards: Tensor
    window: int | None = None

    @property
    def counted(self) -> int:
        """How many steps a sum over a trajectory has."""
        return self.window or self.chunks[0].log_probs.shape[1]

    def matrix(self, values: Sequence[Tensor], team: Team = ALONE) -> Tensor:
        """(N, S) of each chunk, of all processes, as one (B, K, S)."""
        return torch.cat(team.gather(values)).view(*self.rewards.shape[:2], len(self.steps))

    def shares(self, matrix: Tensor, team: Team = ALONE) -> Sequence[Tensor]:
        """(n, S) of each of this process's chunks, views of the (B, K, S) of all."""
        return matrix.flatten(0, 1).chunk(team.count)[team.index].split([len(chunk.rows) for chunk in self.chunks])
