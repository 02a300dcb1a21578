"""Questions to a person where rewards disagree: the value of asking, and the question about a resampling."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean, pstdev

import torch
from torch import Tensor

from steer.errors import InputError
from steer.reward import Reward


# The value of asking before an action of utility U ~ N(m, s²), where a person knows U and the alternative is worth 0:
# Δ = E[max(U, 0)] − max(E U, 0) = m Φ(m/s) + s φ(m/s) − max(m, 0)
# (the off-switch game, arXiv 1611.08219, for a person who answers correctly)
def value_of_asking(mean: float, deviation: float) -> float:
    """Return Δ ≥ 0, in the unit of U: s/√(2π) at m = 0, 0 where s = 0, and near 0 where |m| is well above s."""
    if deviation == 0:
        return 0.0
    z = abs(mean) / deviation  # Δ is even in m; written so that nothing cancels
    return deviation * math.exp(-z * z / 2) / math.sqrt(2 * math.pi) - abs(mean) * math.erfc(z / math.sqrt(2)) / 2


@dataclass(frozen=True)
class Disagreement:
    """The question whether to resample the particles of prompt `prompt` at solver step `step`, from 0.

    ancestors  (K,) of the slots, if they are resampled
    previews   (K, 3, H, W), as scored
    gains      by member or term: the mean reward of the ancestors minus the mean of all particles, in standard
               deviations of the reward among the particles
    mean, deviation  m and s of the gains
    value      value of asking, in the same unit (`value_of_asking`)
    """

    step: int
    prompt: int
    ancestors: Tensor
    previews: Tensor
    gains: dict[str, float]
    mean: float
    deviation: float
    value: float


def term_signs(reward: Reward) -> Callable[[str], float]:
    """Return the sign with which each component of an ensemble or weighted sum enters the reward, by name.

    Raises InputError for any other reward, and for a single member or term.
    """
    weights: Mapping[str, float] = getattr(reward, "weights", None) or {}
    if max(len(weights), getattr(reward, "num_members", 0)) < 2:
        raise InputError(
            f"on_disagreement needs several rewards: a learned ensemble or a weighted sum, got {reward.name!r}"
        )
    return lambda name: math.copysign(1.0, weights.get(name, 1.0))


def disagreements(
    step: int, components: Mapping[str, Tensor], sign: Callable[[str], float], ancestors: Tensor, previews: Tensor
) -> list[Disagreement]:
    """Return for every prompt the question about resampling by ancestors (B, K), with the gain of each component."""
    gains = {
        name: sign(name) * (values.gather(1, ancestors) - values).mean(1) / values.std(1, correction=0).clamp(min=1e-12)
        for name, values in ((name, values.double().cpu()) for name, values in components.items())
    }
    questions, size = [], ancestors.shape[1]
    for prompt, own in enumerate(ancestors):
        by_name = {name: values[prompt].item() for name, values in gains.items()}
        mean, deviation = fmean(by_name.values()), pstdev(by_name.values())
        images = previews[prompt * size : (prompt + 1) * size]
        value = value_of_asking(mean, deviation)
        questions.append(Disagreement(step, prompt, own, images, by_name, mean, deviation, value))
    return questions


OnDisagreement = Callable[[Disagreement], bool]


def agreed(questions: list[Disagreement], ask_cost: float, on_disagreement: OnDisagreement) -> Tensor:
    """Return (B,) whether to resample each prompt's particles; ask where the value is above `ask_cost`."""
    return torch.tensor([one.value <= ask_cost or bool(on_disagreement(one)) for one in questions])
