"""The inputs of every finetuning loss: log-probabilities of steps and rewards of the final images.

With T stochastic steps (τ > 0) from noise to an image, sample k of prompt b, policy π and reference π_ref:

r̂_t = log π(x_s | x_t) − log π_ref(x_s | x_t)
r̂   = Σ_t r̂_t = log π(τ)/π_ref(τ), the implicit reward of a whole trajectory (DPO, arXiv 2305.18290)

A loss is a function of the matrices (B, K, T) and (B, K) alone: it has no access to a model.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from steer.errors import InputError

Metrics = dict[str, float]
Unit = Literal["nat", "element"]


@dataclass(frozen=True)
class LogProbs:
    """log p(x_s | x_t) of the T stochastic steps of K samples for each of B prompts.

    new        (B, K, T) fp64, nats summed over a sample's elements, of the trained policy; may require grad
    old        (B, K, T) of the policy that drew the samples, a constant
    reference  (B, K, T) of the reference policy, a constant
    elements   D ≥ 1, elements per sample

    Raises InputError where the shapes differ or have no step.
    """

    new: Tensor
    old: Tensor
    reference: Tensor
    elements: int

    def __post_init__(self) -> None:
        shapes = [tuple(tensor.shape) for tensor in (self.new, self.old, self.reference)]
        if len(set(shapes)) > 1 or len(shapes[0]) != 3 or 0 in shapes[0]:
            raise InputError(
                f"log-probabilities (new, old, reference) of shapes {shapes} must all be one (prompts, samples, steps)"
            )
        if self.elements < 1:
            raise InputError(f"elements must be at least 1, got {self.elements}")

    def per(self, unit: Unit) -> "LogProbs":
        """Convert from nats to a unit: element divides by D, as β and ε of DDPO and D3PO assume."""
        scale = 1 / self.elements if unit == "element" else 1.0
        return replace(self, new=self.new * scale, old=self.old * scale, reference=self.reference * scale)

    def implicit_rewards(self) -> Tensor:
        """Return r̂_t = new − reference (B, K, T), differentiable w.r.t. `new` alone."""
        return self.new - self.reference.detach()


class Loss(Protocol):
    """A loss of finetuning: a frozen dataclass of its hyperparameters, called once per update.

    whole_trajectory: it couples all steps of a sample, and cannot be computed from some of them.

    A loss whose derivative w.r.t. a step of a prompt's samples depends on that step of these samples alone may set the
    class attribute `stepwise = True`: then the gradient needs no first pass over all steps.
    """

    whole_trajectory: ClassVar[bool]

    def __call__(self, log_probs: LogProbs, rewards: Tensor) -> tuple[Tensor, Metrics]:
        """Return the loss, a scalar differentiable w.r.t. `log_probs.new` alone, and metrics, plain numbers.

        rewards: (B, K), higher is better; a loss may document other inputs. Raises InputError where they do not fit.
        """
        ...


def checked_rewards(log_probs: LogProbs, rewards: Tensor, group: int = 1, several: bool = False) -> Tensor:
    """Return the rewards with the device and dtype of the log-probabilities.

    rewards   (B, K), or with `several` also (B, K, M)
    group     samples per prompt that the loss needs

    Raises InputError for another shape, too few samples, or a reward that is not finite.
    """
    prompts, samples = log_probs.new.shape[:2]
    if rewards.shape[:2] != (prompts, samples) or rewards.dim() not in ((2, 3) if several else (2,)):
        rest = " or (prompts, samples, rewards)" if several else ""
        raise InputError(
            f"rewards of shape {tuple(rewards.shape)} must be (prompts, samples) = ({prompts}, {samples}){rest}"
        )
    if samples < group:
        raise InputError(f"num_generations {samples} must be at least {group}: this loss compares samples")
    if count := int((~rewards.isfinite()).sum()):
        raise InputError(f"rewards must be finite, {count} of {rewards.numel()} are not: fix or drop these samples")
    return rewards.detach().to(log_probs.new)


def accuracy(implicit: Tensor, better: Tensor) -> float:
    """Return the fraction (0..1) of pairs that r̂ (B, K) ranks like the rewards, ties half; NaN without pairs.

    better: (B, K, K) true where the first of two samples of a prompt has the higher reward.
    """
    difference = (implicit[:, :, None] - implicit[:, None, :]).detach()[better]
    return float((difference.sign() / 2 + 0.5).mean()) if len(difference) else torch.nan
