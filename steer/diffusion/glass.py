"""GLASS transitions (arXiv 2509.25170): draws of x_s | x_t by an inner ODE, with the quality of the ODE solver.

A Gaussian step replaces x0 by its mean x̂0 and adds noise: copies diverge, and the variance of x0 given x_t is lost. A
GLASS transition draws x0 given x_t too, by a few deterministic steps of the same denoiser.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from steer.diffusion.schedules import Level, split_noise
from steer.errors import InputError

Denoiser = Callable[[Tensor, Tensor], Tensor]  # S = z + σ ε (N, …), and σ: a float64 scalar → E[z | S]


class Bridge(NamedTuple):
    """x_s = γ x_t + ā x0 + σ̄ ε, the joint law of two noisy versions of x0 whose noises have correlation ρ.

    gamma, alpha, sigma  γ, ā and σ̄: float64 scalars
    """

    gamma: Tensor
    alpha: Tensor
    sigma: Tensor


def correlation(before: Level, after: Level, eta: float) -> Tensor:
    """Return the correlation ρ of the noises of x_t and x_s in the Gaussian step with noise η.

    ρ = √(σ_s² − τ²)/σ_s. ρ is 1 at η = 0; at η = 1, x_t is a noisier version of x_s, as in the forward process.
    """
    rest = split_noise(before, after, eta)[1]
    return torch.where(after.sigma > 0, rest / after.sigma.clamp(min=torch.finfo(rest.dtype).tiny), 1.0)


def bridge(before: Level, after: Level, rho: Tensor) -> Bridge:
    """Return γ = ρ σ_s/σ_t, ā = α_s − γ α_t, σ̄ = σ_s √(1 − ρ²)."""
    gamma = rho * after.sigma / before.sigma
    return Bridge(gamma, after.alpha - gamma * before.alpha, after.sigma * (1 - rho**2).clamp(min=0).sqrt())


def inner_levels(before: Level, between: Bridge, steps: int) -> Iterator[Level]:
    """Yield the levels (ā_u, σ̄_u) of x̃_u = ā_u z + σ̄_u ε from (0, 1) to (ā, σ̄), for `steps` deterministic steps.

    The denoiser's precision P_u = α_t²/σ_t² + ā_u²/σ̄_u² grows in equal steps of log(σ/α) = −½ log P, from x_t's own
    level on. Where σ̄ = 0 the last level is z itself, and the grid is a straight line, ā_u = u ā, σ̄_u = 1 − u.
    """
    alpha, sigma = between.alpha, between.sigma
    own = (before.alpha / before.sigma) ** 2
    for number in range(steps + 1):
        share = number / steps
        if number in (0, steps):
            yield Level(share * alpha, sigma if number else torch.ones_like(sigma))
        elif sigma <= 0 or own <= 0:
            yield Level(share * alpha, 1 - share + share * sigma)
        else:
            precision = own * (1 + (alpha / sigma) ** 2 / own) ** share
            ratio = (precision - own).sqrt()  # ā_u/σ̄_u
            scale = 1 - share + share * sigma
            yield Level(ratio * scale, scale)


def statistic(x_t: Tensor, before: Level, x_u: Tensor, at: Level) -> tuple[Tensor, Tensor]:
    """Return S = z + σ ε, sufficient for z given x_t = α_t z + σ_t ε and x̃_u = ā_u z + σ̄_u ε', and its σ.

    S = (α_t x_t/σ_t² + ā_u x̃_u/σ̄_u²)/P,  P = α_t²/σ_t² + ā_u²/σ̄_u²,  σ = 1/√P
    """
    own, inner = before.alpha / before.sigma**2, at.alpha / at.sigma**2
    precision = own * before.alpha + inner * at.alpha
    return (own / precision).to(x_t) * x_t + (inner / precision).to(x_t) * x_u, precision.rsqrt()


def glass_transition(
    x_t: Tensor, denoise: Denoiser, before: Level, after: Level, rho: Tensor, noise: Tensor, steps: int = 2
) -> Tensor:
    """Draw x_s given x_t (N, …) with noise correlation ρ, by `steps` inner steps; `noise` is standard normal like x_t.

        x̃ ← ε
        for each inner level u → v:
            ẑ = E[z | x_t, x̃_u] = denoise(S, σ)
            x̃ ← ā_v ẑ + (σ̄_v/σ̄_u)(x̃ − ā_u ẑ)
        x_s = γ x_t + x̃

    With exact draws, x_s has the marginal of its level for any ρ. One inner step is the Gaussian step with mean γ x_t +
    ā x̂0(x_t) and std σ̄. The first evaluation is x̂0(x_t) itself: steps − 1 further ones are needed.

    Raises InputError for fewer than one inner step, and for σ_t = 0.
    """
    if steps < 1 or before.sigma <= 0:
        raise InputError(
            f"a GLASS transition needs noise before it and at least 1 inner step, got σ = {float(before.sigma):g} and "
            f"{steps} steps"
        )
    between = bridge(before, after, rho)
    levels = [*inner_levels(before, between, steps)]
    x = noise
    for at, following in itertools.pairwise(levels):
        z = denoise(*statistic(x_t, before, x, at))
        kept = (following.sigma / at.sigma).to(x)
        x = following.alpha.to(x) * z + kept * (x - at.alpha.to(x) * z)
    return between.gamma.to(x) * x_t.to(x) + x
