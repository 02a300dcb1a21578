"""How well a learned reward foretells choices it has not seen: accuracy, log loss, calibration."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from steer.rewards.objectives import Choices

BINS = 10


@dataclass(frozen=True)
class Judgement:
    """Of pairs that training did not see.

    accuracy  share of decided pairs (no ties) in which the chosen image has the higher reward; equal rewards: half
    log_loss  mean −log of the probability given to the choice, nats; ln 2 = .693 is a coin's
    ece       expected calibration error: mean over pairs of |predicted − observed| share, in bins of 0.1
    bins      (predicted, observed, pairs) of each bin of the probability σ(Δ) that a is chosen
    """

    accuracy: float
    log_loss: float
    ece: float
    bins: tuple[tuple[float, float, int], ...]

    @property
    def summary(self) -> str:
        return f"accuracy {self.accuracy:.3f}, log loss {self.log_loss:.3f}, calibration error {self.ece:.3f}"


def judged(raw: Sequence[Tensor], choices: Choices) -> Judgement:
    """raw: rewards (N,) of the images a and of the images b, in nats."""
    difference, chosen = raw[0] - raw[1], choices.choice
    decided = chosen != 0.5
    right = torch.where(difference == 0, 0.5, ((difference > 0) == (chosen > 0.5)).float())
    loss = F.binary_cross_entropy_with_logits(difference, chosen)
    bins = _bins(torch.sigmoid(difference), chosen)
    ece = sum(count * abs(predicted - observed) for predicted, observed, count in bins) / max(len(chosen), 1)
    accuracy = right[decided].mean().item() if decided.any() else 0.5
    return Judgement(accuracy, loss.item(), ece, bins)


def _bins(predicted: Tensor, observed: Tensor) -> tuple[tuple[float, float, int], ...]:
    place = (predicted * BINS).long().clamp(max=BINS - 1)
    rows = [place == k for k in range(BINS)]
    return tuple((predicted[r].mean().item(), observed[r].mean().item(), int(r.sum())) for r in rows if r.any())
