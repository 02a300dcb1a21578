"""What a learned reward minimises: pure functions of the rewards of two images and of how a person chose.

For pairs i of images a, b of one prompt: Δ = r(a) − r(b), c the choice (1: a, 0: b, ½: a tie), s ≥ 0 the strength
of the preference (1 where nobody gave any). Rewards are raw, in nats: σ(Δ) is the probability that a is chosen.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class PreferenceLabels:
    """One row a pair: choice (N,) in 0..1 and strength (N,) ≥ 0, as above."""

    choice: Tensor
    strength: Tensor

    def __getitem__(self, rows: Tensor) -> "PreferenceLabels":
        return PreferenceLabels(self.choice[rows], self.strength[rows])

    def to(self, device: str) -> "PreferenceLabels":
        """The same on a device."""
        return PreferenceLabels(self.choice.to(device), self.strength.to(device))


Objective = Callable[[Tensor, PreferenceLabels], Tensor]


def bradley_terry(difference: Tensor, choices: PreferenceLabels) -> Tensor:
    """−[c log σ(Δ) + (1 − c) log σ(−Δ)], the mean over pairs (Bradley and Terry 1952; arXiv 2304.05977)."""
    return F.binary_cross_entropy_with_logits(difference, choices.choice)


def scaled_bradley_terry(difference: Tensor, choices: PreferenceLabels) -> Tensor:
    """The same, each pair weighed by its strength s (HelpSteer2-Preference, arXiv 2410.01257, equation 3)."""
    each = F.binary_cross_entropy_with_logits(difference, choices.choice, reduction="none")
    return (choices.strength * each).mean()


def regression(difference: Tensor, choices: PreferenceLabels) -> Tensor:
    """(Δ − s (2c − 1))²: the difference itself, in the unit that the strength has."""
    return F.mse_loss(difference, choices.strength * (2 * choices.choice - 1))


OBJECTIVES: dict[str, Objective] = {
    "bradley-terry": bradley_terry,
    "scaled-bradley-terry": scaled_bradley_terry,
    "regression": regression,
}


def smooth_labels(choices: PreferenceLabels, share: float) -> PreferenceLabels:
    """Label smoothing: c ↦ (1 − 2ε) c + ε, for ε in 0..½ (as conservative DPO, Mitchell 2023)."""
    return PreferenceLabels((1 - 2 * share) * choices.choice + share, choices.strength)


def noisy_difference(difference: Tensor, share: float) -> Tensor:
    """Δ' with σ(Δ') = (1 − ε) σ(Δ) + ε σ(−Δ): what is seen where a share ε of all labels is wrong.

    Trained through it, Δ itself stays the clean preference (loss correction of Patrini et al., arXiv 1609.03683).
    """
    if share == 0:
        return difference
    # Of both, the odds: ((1 − ε) e^Δ + ε) / (ε e^Δ + 1 − ε), in logarithms, which do not round σ to 1.
    wrong, right = difference.new_tensor([share, 1 - share]).log()
    return torch.logaddexp(right + difference, wrong) - torch.logaddexp(wrong + difference, right)


def center_rewards_penalty(a: Tensor, b: Tensor) -> Tensor:
    """(r(a) + r(b))², the mean over pairs: pulls the rewards of every prompt towards a mean of 0.

    Choices tell rewards up to a shift for each prompt only, and each member of an ensemble learns a shift of its own.
    A mean over members does not mind; the worst of them would be, whatever the image, the one that is shifted down
    (arXiv 2312.09244, section 2).
    """
    return ((a + b) ** 2).mean()


def contrastive(images: Tensor, texts: Tensor, scale: Tensor, prompts: Sequence[str]) -> Tensor:
    """CLIP's symmetric loss (arXiv 2103.00020, figure 3) on features (N, D) of unit length.

    Another row with the very same prompt is no wrong answer and is left out of the sum over negatives.
    """
    same = torch.tensor([[a == b for b in prompts] for a in prompts], device=images.device)
    same.fill_diagonal_(False)
    logits = (scale * images @ texts.T).masked_fill(same, -torch.inf)
    rows = torch.arange(len(prompts), device=images.device)
    return (F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, rows)) / 2
