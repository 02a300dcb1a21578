"""Objectives of learned rewards: pure functions of the rewards of two images and of the preference label.

For a pair of images a, b of one prompt: Δ = r(a) − r(b), c the label (1: a preferred, 0: b, ½: a tie), s ≥ 0 the
strength of the preference (1 by default). Rewards are raw, in nats: σ(Δ) is the probability that a is preferred.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class PreferenceLabels:
    """Labels c (N,) in 0..1 and strengths s (N,) ≥ 0 of N pairs."""

    choice: Tensor
    strength: Tensor

    def __getitem__(self, rows: Tensor) -> "PreferenceLabels":
        return PreferenceLabels(self.choice[rows], self.strength[rows])

    def to(self, device: str) -> "PreferenceLabels":
        """Move to a device."""
        return PreferenceLabels(self.choice.to(device), self.strength.to(device))


Objective = Callable[[Tensor, PreferenceLabels], Tensor]


def bradley_terry(difference: Tensor, labels: PreferenceLabels) -> Tensor:
    """Return −[c log σ(Δ) + (1 − c) log σ(−Δ)], the mean over pairs (Bradley, Terry 1952; arXiv 2304.05977)."""
    return F.binary_cross_entropy_with_logits(difference, labels.choice)


def scaled_bradley_terry(difference: Tensor, labels: PreferenceLabels) -> Tensor:
    """Scale each pair's term by its strength s (HelpSteer2-Preference, arXiv 2410.01257, equation 3)."""
    each = F.binary_cross_entropy_with_logits(difference, labels.choice, reduction="none")
    return (labels.strength * each).mean()


def regression(difference: Tensor, labels: PreferenceLabels) -> Tensor:
    """Return (Δ − s (2c − 1))²: the difference itself, in the unit of the strength."""
    return F.mse_loss(difference, labels.strength * (2 * labels.choice - 1))


def margin(difference: Tensor, labels: PreferenceLabels) -> Tensor:
    """Return −[c log σ(Δ − s) + (1 − c) log σ(−Δ − s)]: s is the margin (arXiv 2401.06080, section 2.4)."""
    preferred, other = F.logsigmoid(difference - labels.strength), F.logsigmoid(-difference - labels.strength)
    return -(labels.choice * preferred + (1 - labels.choice) * other).mean()


def triplet(difference: Tensor, labels: PreferenceLabels, gap: float | None = None) -> Tensor:
    """Return relu(gap − 2 Δcos), the mean over pairs with a preference (Social Reward, arXiv 2402.09872).

    On features of unit length this is relu(‖t − p‖² − ‖t − n‖² + gap), p preferred and n the other image.
    gap  .3 by default
    """
    gap = 0.3 if gap is None else gap
    sign = (labels.choice - 0.5).sign()
    loss = F.relu(gap - 2 * sign * difference) * sign.abs()
    return loss.sum() / sign.abs().sum().clamp(min=1)


OBJECTIVES: dict[str, Objective] = {
    "bradley-terry": bradley_terry,
    "scaled-bradley-terry": scaled_bradley_terry,
    "regression": regression,
    "margin": margin,
    "triplet": triplet,
}


def smooth_labels(labels: PreferenceLabels, share: float) -> PreferenceLabels:
    """Smooth labels: c ↦ (1 − 2ε) c + ε, for ε in 0..½ (as in conservative DPO, Mitchell 2023)."""
    return PreferenceLabels((1 - 2 * share) * labels.choice + share, labels.strength)


def noisy_difference(difference: Tensor, share: float) -> Tensor:
    """Return Δ' with σ(Δ') = (1 − ε) σ(Δ) + ε σ(−Δ): the observed preference if a share ε of labels is wrong.

    Trained through it, Δ itself stays the clean preference (loss correction of Patrini et al., arXiv 1609.03683).
    """
    if share == 0:
        return difference
    # The odds of both cases: ((1 − ε) e^Δ + ε) / (ε e^Δ + 1 − ε), in logarithms, which do not round σ to 1.
    wrong, right = difference.new_tensor([share, 1 - share]).log()
    return torch.logaddexp(right + difference, wrong) - torch.logaddexp(wrong + difference, right)


def center_rewards_penalty(a: Tensor, b: Tensor) -> Tensor:
    """Return (r(a) + r(b))², the mean over pairs: centers the rewards of every prompt at 0.

    Preferences determine rewards up to a shift per prompt only, and each member of an ensemble learns its own shift.
    A mean over members is unaffected; their minimum would always be the member with the lowest shift (arXiv 2312.09244,
    section 2).
    """
    return ((a + b) ** 2).mean()


def slope_penalty(reward: Callable[[Tensor], Tensor], images: Tensor, bound: float) -> Tensor:
    """Return max(0, ‖∇_x r(x)‖ − k)², the mean over images (N, 3, H, W) in [0, 1], with a graph of its own.

    A one-sided gradient penalty (arXiv 1709.08894): if a reward changes slowly with the pixels, there is little to
    exploit. k is in nats per unit of the norm over all pixels.
    """
    points = images.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(reward(points).sum(), points, create_graph=True)
    return F.relu(gradient.flatten(1).norm(dim=1) - bound).square().mean()


def mixed_texts(texts: Tensor, share: float, generator: Generator) -> Tensor:
    """Mix a share of the prompt features (N, D): λ c + (1 − λ) c', with c' of the most similar other prompt.

    ConvexDA: λ ~ Beta(½, ½), folded to [½, 1], so that the mixture stays nearer to the prompt and keeps its preference.
    """
    unit = F.normalize(texts.detach(), dim=1)
    similarity = unit @ unit.T
    closest, neighbour = similarity.masked_fill(similarity > 1 - 1e-5, -torch.inf).max(1)  # not the prompt itself
    uniform, drawn = torch.rand(2, len(texts), generator=generator).to(texts)
    weight = (uniform * math.pi / 2).sin().square()  # the inverse of the arcsine law's distribution function
    weight = torch.maximum(weight, 1 - weight).masked_fill((drawn >= share) | closest.isinf(), 1)
    return torch.lerp(texts[neighbour], texts, weight[:, None])


def contrastive(images: Tensor, texts: Tensor, scale: Tensor, prompts: Sequence[str]) -> Tensor:
    """Compute CLIP's symmetric loss (arXiv 2103.00020, figure 3) on features (N, D) of unit length.

    Other rows with the same prompt are not negatives, and are left out of the sum.
    """
    same = torch.tensor([[a == b for b in prompts] for a in prompts], device=images.device)
    same.fill_diagonal_(False)
    logits = (scale * images @ texts.T).masked_fill(same, -torch.inf)
    rows = torch.arange(len(prompts), device=images.device)
    return (F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, rows)) / 2
