"""c = ∂L/∂ℓ, by which the log-probability of every step is weighed on the way back."""

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from steer.batch import Batch
from steer.losses import LogProbs, Loss, Metrics
from steer.team import Team


class Coefficients(Protocol):
    """c of the chunks of this process."""

    def __call__(self, chunk: int, column: int, log_prob: Tensor) -> Tensor:
        """c (n,) of one step of a chunk, whose ℓ (n,) is known by now."""
        ...

    def loss(self) -> tuple[float, Metrics]:
        """L and its metrics, once all steps are known."""
        ...


class AllSteps:
    """∂L/∂ℓ where all of ℓ is known."""

    def __init__(self, seen: LogProbs, loss: Loss, batch: Batch, team: Team) -> None:
        leaf = seen.new.clone().requires_grad_(True)
        self._value, self._metrics = loss(replace(seen, new=leaf), batch.rewards)
        (c,) = torch.autograd.grad(self._value, leaf)
        self._shares = batch.shares(c, team)

    def __call__(self, chunk: int, column: int, log_prob: Tensor) -> Tensor:
        return self._shares[chunk][:, column]

    def loss(self) -> tuple[float, Metrics]:
        return self._value.item(), self._metrics


class OwnStep:
    """∂L/∂ℓ of a loss in which a step of a prompt's samples meets nothing else: the others may stand as they were."""

    def __init__(self, seen: LogProbs, loss: Loss, batch: Batch, team: Team) -> None:
        self._seen, self._loss, self._batch, self._team = seen, loss, batch, team
        self._new = [chunk.log_probs[:, list(batch.steps)].clone() for chunk in batch.chunks]

    def __call__(self, chunk: int, column: int, log_prob: Tensor) -> Tensor:
        self._new[chunk][:, column] = log_prob.detach().cpu()
        leaf = self._seen.old.clone()
        self._batch.shares(leaf, self._team)[chunk][:, column] = self._new[chunk][:, column]
        with torch.enable_grad():
            value, _ = self._loss(replace(self._seen, new=leaf.requires_grad_(True)), self._batch.rewards)
            (c,) = torch.autograd.grad(value, leaf)
        return self._batch.shares(c, self._team)[chunk][:, column]

    def loss(self) -> tuple[float, Metrics]:
        value, metrics = self._loss(
            replace(self._seen, new=self._batch.matrix(self._new, self._team)), self._batch.rewards
        )
        return value.item(), metrics
