"""Losses of the forward process: functions of clean latents, their noised versions and the denoiser's output there.

With x_t = α x0 + σ ε, a denoiser's output o (ε, v, or the velocity of a flow) predicts x̂0 = a x_t + b o, and its target
is o* = (x0 − a x_t)/b: ε, v, or ε − x0. Each sample has a signal made from its reward. Neither log-probabilities nor
trajectories are needed, so samples may come from any solver. ‖·‖² below is a mean over the elements of a sample.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from steer.arguments import Settings, argument
from steer.errors import InputError

Weighting = Literal["uniform", "noise", "noise-squared", "huber"]
SMALLEST_ERROR = 1e-5  # lower bound of |x̂0 − x0|, by which NFT divides, and of the root in AWM's huber


@dataclass(frozen=True)
class NoisyPredictions:
    """Outputs of the denoiser at one noise level, for N samples.

    x0, x_t         (N, …) fp32, clean and noisy latents
    a, b            weights of x̂0 = a x_t + b o
    noise           σ/(α + σ), 0 to 1: the time of a flow model
    new             (N, …) outputs of the trained weights; may require grad
    old, reference  outputs of the policy that drew the samples, and of the reference; None if not evaluated

    Raises InputError where b is 0: the output has no target there.
    """

    x0: Tensor
    x_t: Tensor
    a: float
    b: float
    noise: float
    new: Tensor
    old: Tensor | None = None
    reference: Tensor | None = None

    def __post_init__(self) -> None:
        if self.b == 0:
            raise InputError("the clean latents do not depend on the denoiser's output at this noise level")

    def clean(self, output: Tensor) -> Tensor:
        """Return x̂0 = a x_t + b o."""
        return self.a * self.x_t + self.b * output

    @property
    def target(self) -> Tensor:
        """o* = (x0 − a x_t)/b."""
        return (self.x0 - self.a * self.x_t) / self.b

    def error(self, output: Tensor) -> Tensor:
        """Return ‖o − o*‖² (N,)."""
        return mean_square(output - self.target)

    def sampling_policy(self) -> Tensor:
        """The output of the policy that drew the samples: `new` where `old` is None."""
        return self.new.detach() if self.old is None else self.old.detach()

    def required_reference(self) -> Tensor:
        """The output of the reference. Raises InputError where it was not evaluated."""
        if self.reference is None:
            raise InputError("this loss compares with the reference policy: evaluate it")
        return self.reference.detach()


def mean_square(values: Tensor) -> Tensor:
    """Return the mean of the squares of each sample's elements (N,)."""
    return values.square().flatten(1).mean(1)


SampleMetrics = dict[str, Tensor]  # name → (N,)


class ForwardLoss(Protocol):
    """A loss of the forward process: a frozen dataclass of its hyperparameters, called once per noise level.

    uses_old, uses_reference: the policies whose outputs the loss needs beside the trained policy's.
    """

    uses_old: ClassVar[bool]
    uses_reference: ClassVar[bool]

    def __call__(self, predictions: NoisyPredictions, signal: Tensor) -> tuple[Tensor, SampleMetrics]:
        """Return the loss (N,) of each sample, differentiable w.r.t. `predictions.new` alone, and its metrics.

        signal: (N,), higher for better samples.
        """
        ...


@dataclass(frozen=True)
class NFT(Settings):
    """DiffusionNFT (arXiv 2509.16117): good samples teach the model, bad ones its mirror image about the old policy.

    r    = ½ + ½ clip(A/A_max, −1, 1), the optimality of a sample with advantage A
    o⁺   = β o_θ + (1 − β) o_old,   o⁻ = (1 + β) o_old − β o_θ
    loss = A_max [r ‖x̂0(o⁺) − x0‖²/w⁺ + (1 − r) ‖x̂0(o⁻) − x0‖²/w⁻]/β,   w = mean |x̂0 − x0|, a constant

    Where θ is the old policy, the gradient w.r.t. x̂0 is 2 clip(A, ± A_max)(x̂0 − x0)/w: towards good samples, away from
    bad ones. (The factor A_max is from the authors' code; the published penalty weight refers to this scale.)

    beta           β > 0: 1 or 0.1 as published; smaller values move further from the old policy
    advantage_clip A_max

    Takes advantages (N,), as GRPO's.
    """

    beta: float = argument(1.0, "(0, inf)")
    advantage_clip: float = argument(5.0, "(0, inf)")
    uses_old: ClassVar[bool] = True
    uses_reference: ClassVar[bool] = False

    def __call__(self, predictions: NoisyPredictions, signal: Tensor) -> tuple[Tensor, SampleMetrics]:
        r = optimality(signal, self.advantage_clip)
        new, old = predictions.new, predictions.sampling_policy()
        positive = self._branch(predictions, self.beta * new + (1 - self.beta) * old)
        negative = self._branch(predictions, (1 + self.beta) * old - self.beta * new)
        loss = self.advantage_clip * (r * positive + (1 - r) * negative) / self.beta
        return loss, {"moved": mean_square(new.detach() - old)}

    @staticmethod
    def _branch(predictions: NoisyPredictions, output: Tensor) -> Tensor:
        """Return ‖x̂0 − x0‖²/w (N,)."""
        error = predictions.clean(output) - predictions.x0
        weight = error.detach().abs().flatten(1).mean(1).clamp(min=SMALLEST_ERROR)
        return mean_square(error) / weight


def optimality(advantages: Tensor, limit: float) -> Tensor:
    """Return r = ½ + ½ clip(A/A_max, −1, 1), from 0 to 1."""
    return 0.5 + 0.5 * (advantages / limit).clamp(-1, 1)


@dataclass(frozen=True)
class AWM(Settings):
    """Advantage-weighted matching (arXiv 2509.25050): PPO's objective, with the matching loss as a log-probability.

    ℓ    = −w(t) ‖o − o*‖²,   ρ = exp(ℓ_θ − ℓ_old)
    loss = max(−A ρ, −A clip(ρ, 1 − ε, 1 + ε))

    Where θ is the old policy, the gradient is A w ∇‖o − o*‖²: the matching loss weighted by the advantages.

    clip            ε > 0, the clip range of the ratio, inf for none
    advantage_clip  advantages are clipped to ± this
    weighting       w(t): uniform 1, noise t, or noise-squared t², with t = σ/(α + σ); huber: ℓ = −t ‖o − o*‖, a root in
                    place of the square, so that a few elements with large errors count less

    Takes advantages (N,), as GRPO's.
    """

    clip: float = argument(0.2, "(0, inf]")
    advantage_clip: float = argument(5.0, "(0, inf]")
    weighting: Weighting = "uniform"
    uses_old: ClassVar[bool] = True
    uses_reference: ClassVar[bool] = False

    def __call__(self, predictions: NoisyPredictions, signal: Tensor) -> tuple[Tensor, SampleMetrics]:
        negated = -signal.clamp(-self.advantage_clip, self.advantage_clip)
        new, old = (self._error(predictions, one) for one in (predictions.new, predictions.sampling_policy()))
        ratio = (old - new).exp()
        loss = torch.maximum(negated * ratio, negated * ratio.clamp(1 - self.clip, 1 + self.clip))
        return loss, {"clipped": ((ratio.detach() - 1).abs() > self.clip).float()}

    def _error(self, predictions: NoisyPredictions, output: Tensor) -> Tensor:
        """Return −ℓ (N,)."""
        error = predictions.error(output)
        if self.weighting == "huber":
            return predictions.noise * ((error + SMALLEST_ERROR**2).sqrt() - SMALLEST_ERROR)
        return predictions.noise ** {"uniform": 0, "noise": 1, "noise-squared": 2}[self.weighting] * error


@dataclass(frozen=True)
class RAM(Settings):
    """Reinforce adjoint matching (arXiv 2605.10759): regression on the reference's output moved along the residual.

    loss = ‖o_θ − sg(o_ref + R (o* − o_θ))‖²,   sg: a constant

    The fixed point is o_θ = o_ref + E[R (o* − o_θ) | x_t]. With samples of θ itself, whose residual has mean 0, this is
    o_ref + Cov(R, o* | x_t): the output of the reference tilted by exp(R), to first order in R.

    scale           scale of R = scale · A
    advantage_clip  advantages are clipped to ± this

    Takes advantages (N,), as GRPO's.
    """

    scale: float = argument(1.0, "(0, inf)")
    advantage_clip: float = argument(5.0, "(0, inf]")
    uses_old: ClassVar[bool] = False
    uses_reference: ClassVar[bool] = True

    def __call__(self, predictions: NoisyPredictions, signal: Tensor) -> tuple[Tensor, SampleMetrics]:
        reward = self.scale * signal.clamp(-self.advantage_clip, self.advantage_clip)
        new = predictions.new
        residual = predictions.target - new.detach()
        goal = predictions.required_reference() + reward.view(-1, *[1] * (new.dim() - 1)) * residual
        return mean_square(new - goal), {}


@dataclass(frozen=True)
class DiffusionDPO(Settings):
    """Diffusion-DPO (arXiv 2311.12908): learn to denoise the preferred of two images better than the reference does.

    z    = −(β/2) [(‖o_θ − o*‖² − ‖o_ref − o*‖²) of the first − the same of the second],  with one ε and t for both
    loss = −c log σ(z) − (1 − c) log σ(−z),   c: the probability that the first is preferred

    beta  β > 0, for errors averaged over elements; published 2000 (SD 1.5) and 5000 (SDXL). It is the paper's βTω(λ_t).
          Log-likelihoods add elements up: for the same constraint per nat, β is proportional to their number

    Rows 2i and 2i + 1 are a pair. Takes c and 1 − c (N,). Both rows of a pair have its loss.
    """

    beta: float = argument(2000.0, "(0, inf)")
    uses_old: ClassVar[bool] = False
    uses_reference: ClassVar[bool] = True

    def __call__(self, predictions: NoisyPredictions, signal: Tensor) -> tuple[Tensor, SampleMetrics]:
        excess = predictions.error(predictions.new) - predictions.error(predictions.required_reference())
        first, second = excess.view(-1, 2).unbind(1)
        z, c = -self.beta / 2 * (first - second), signal.view(-1, 2)[:, 0]
        loss = -c * logsigmoid(z) - (1 - c) * logsigmoid(-z)
        right = ((z.detach() * (c - 0.5)).sign() + 1) / 2  # ties count half
        return loss.repeat_interleave(2), {"accuracy": right.repeat_interleave(2)}
