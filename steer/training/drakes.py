"""Reward backpropagation through masked diffusion (DRAKES, arXiv 2410.13643): relaxed steps and the exact KL.

    max_θ  E[r(x_0)] − α Σ_t KL(p_θ(z_s | z_t) ‖ p_pre(z_s | z_t)),   whose optimum is p_pre(x) exp(r(x)/α)

A relaxed state z̃ (N, L, V) has rows of probabilities. A masked place opens with probability (t − s)/t, independent of
θ, so the opening is drawn; its token is relaxed, y = Gumbel-softmax(log x_θ; τ). (The published code relaxes the mask
with the tokens: its gradient, and with it the tilt, shrinks with the number of steps.) The last state is made hard by
the straight-through estimator. The KL of a factorised step is Σ_{l masked} (t − s)/t · KL(x_θ^l ‖ x_pre^l). It is not
0 at masked places, unlike in the public code, which multiplies it by the share of open places.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

Denoise = Callable[[Tensor], Tensor]  # relaxed tokens (N, L, V) → logits (N, L, V)


@dataclass(frozen=True)
class RelaxedRun:
    """The end of a relaxed run: one-hot `tokens` (N, L, V) with a graph, and the KL (N,) of the last steps in nats."""

    tokens: Tensor
    kl: Tensor


def clean_log_probs(logits: Tensor, mask_id: int) -> Tensor:
    """Return log x_θ (N, L, V), with the mask at −1e4 nats: gradients of −∞ are not numbers."""
    masked = torch.arange(logits.shape[-1], device=logits.device) == mask_id
    return logits.masked_fill(masked, -1e4).log_softmax(-1)


@dataclass(frozen=True)
class StepNoise:
    """The random numbers of a relaxed step: standard Gumbel (N, L, V), and uniform (N, L) for the opening."""

    gumbel: Tensor
    uniform: Tensor

    @classmethod
    def draw(cls, like: Tensor, generator: Generator | None) -> "StepNoise":
        """Draw the noise for log-probabilities (N, L, V), on the generator's own device."""
        device = generator.device if generator else like.device
        first, second = (
            torch.rand(shape, generator=generator, device=device, dtype=torch.float64).clamp(min=1e-300).to(like.device)
            for shape in (like.shape, like.shape[:-1])
        )
        return cls(-(-first.log()).clamp(min=1e-300).log().to(like), second)


def relaxed_step(
    state: Tensor, log_x0: Tensor, rate: float, mask_id: int, noise: StepNoise, temperature: float
) -> Tensor:
    """Return z̃_s from z̃_t = `state` (N, L, V) and log x_θ (N, L, V); a masked place opens with probability `rate`."""
    tokens = ((log_x0 + noise.gumbel) / temperature).softmax(-1)
    opens = (state[..., mask_id] > 0.5) & (noise.uniform < rate)
    return torch.where(opens[..., None], tokens, state)


def relaxed_run(
    policy: Denoise,
    reference: Denoise | None,
    start: Tensor,
    mask_id: int,
    steps: int,
    last_steps: int,
    temperature: float,
    generator: Generator | None,
    hard: bool = True,
) -> RelaxedRun:
    """Run `steps` relaxed steps from ids `start` (N, L), with gradients through the last `last_steps`.

    hard  whether the end is made one-hot by the straight-through estimator
    The KL is computed at detached states: its gradient through the states made published runs diverge.
    """
    state: Tensor = F.one_hot(start, mask_id + 1).to(torch.get_default_dtype())
    kl = torch.zeros(len(start), device=start.device)
    for left in range(steps, 0, -1):
        if left >= last_steps:
            state = state.detach()
        with torch.set_grad_enabled(left <= last_steps):
            log_x0 = clean_log_probs(policy(state), mask_id)
            if reference is not None and left <= last_steps:
                detached = state.detach()
                with torch.no_grad():
                    log_pre = clean_log_probs(reference(detached), mask_id)
                own = clean_log_probs(policy(detached), mask_id)
                by_place = (own.exp() * (own - log_pre)).sum(-1)
                kl = kl + (detached[..., mask_id] * by_place).sum(1) / left
            state = relaxed_step(state, log_x0, 1 / left, mask_id, StepNoise.draw(log_x0, generator), temperature)
    if not hard:
        return RelaxedRun(state, kl)
    tokens = F.one_hot(state.argmax(-1), state.shape[-1]).to(state)
    return RelaxedRun(tokens + state - state.detach(), kl)
