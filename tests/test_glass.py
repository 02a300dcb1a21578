"""GLASS transitions against Gaussian data in closed form, the Gaussian kernel, and conditioning by linear algebra."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from steer.diffusion.glass import bridge, correlation, glass_transition, inner_levels, statistic
from steer.diffusion.schedules import Level, gaussian_transition
from steer.errors import InputError

MEAN, VARIANCE = 0.7, 0.25


def level(alpha: float, sigma: float) -> Level:
    return Level(*torch.tensor([alpha, sigma], dtype=torch.float64))


def angle(t: float) -> Level:
    """A variance-preserving level, t from 0 (data) to 1."""
    return level(math.cos(t * math.pi / 2), math.sin(t * math.pi / 2))


def denoise(s: Tensor, sigma: Tensor) -> Tensor:
    """E[z | z + σ ε] of z ~ N(MEAN, VARIANCE)."""
    return (VARIANCE * s + sigma**2 * MEAN) / (VARIANCE + sigma**2)


LEVELS = [
    (angle(0.8), angle(0.5)),  # variance preserving
    (level(0.2, 0.8), level(0.6, 0.4)),  # flow matching
    (level(1.0, 6.0), level(1.0, 1.5)),  # variance exploding
]


def affine(draw: Callable[[Tensor, Tensor], Tensor]) -> tuple[float, float, float]:
    """(a, b, c) of x_s = a x_t + b ε + c: with an exact denoiser every inner step is affine."""
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    c = draw(zero, zero).item()
    return draw(one, zero).item() - c, draw(zero, one).item() - c, c


def transition(before: Level, after: Level, rho: Tensor, steps: int) -> tuple[float, float, float]:
    return affine(lambda x, noise: glass_transition(x, denoise, before, after, rho, noise, steps))


@pytest.mark.parametrize(("before", "after"), LEVELS)
@pytest.mark.parametrize("rho", [0.0, 0.4, 0.9])
def test_many_inner_steps_have_mean_variance_and_covariance_of_the_joint_gaussian(
    before: Level, after: Level, rho: float
) -> None:
    """(x_t, x_s) = (α_t x0 + σ_t ε, α_s x0 + σ_s ε') with corr(ε, ε') = ρ: Gaussian, conditioned by hand."""
    alpha_t, sigma_t, alpha_s, sigma_s = (float(one) for one in (*before, *after))
    variance_t = alpha_t**2 * VARIANCE + sigma_t**2
    variance_s = alpha_s**2 * VARIANCE + sigma_s**2
    covariance = alpha_t * alpha_s * VARIANCE + rho * sigma_t * sigma_s
    slope = covariance / variance_t
    offset = alpha_s * MEAN - slope * alpha_t * MEAN
    std = math.sqrt(variance_s - covariance**2 / variance_t)
    errors = []
    for steps in (32, 256):
        a, b, c = transition(before, after, torch.tensor(rho, dtype=torch.float64), steps)
        errors.append(max(abs(a - slope), abs(b - std), abs(c - offset)))
        # Law of total variance, and the covariance with x_t, after this transition.
        assert a * variance_t == pytest.approx(covariance, abs=20 / steps)
        assert a**2 * variance_t + b**2 == pytest.approx(variance_s, abs=20 / steps)
        assert a * alpha_t * MEAN + c == pytest.approx(alpha_s * MEAN, abs=1e-12), "the mean is exact at any number"
    assert errors[1] < 0.01 and errors[1] < errors[0] / 6, "of first order in the number of steps"


@pytest.mark.parametrize(("before", "after"), LEVELS)
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_one_inner_step_is_the_gaussian_kernel(before: Level, after: Level, eta: float) -> None:
    x, noise = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x0 = denoise(x / before.alpha, before.sigma / before.alpha)
    kernel = gaussian_transition(x, x0, before, after, eta)
    drawn = glass_transition(x, denoise, before, after, correlation(before, after, eta), noise, steps=1)
    torch.testing.assert_close(drawn, kernel.mean + kernel.std * noise)


@pytest.mark.parametrize(("before", "after"), LEVELS)
def test_with_eta_1_x_t_is_a_noisier_x_s(before: Level, after: Level) -> None:
    """Then x_t = (α_t/α_s) x_s + noise, so that ρ = α_t σ_s/(α_s σ_t), and the last precision is that of x_s."""
    rho = correlation(before, after, 1.0)
    assert rho == pytest.approx(before.alpha * after.sigma / (after.alpha * before.sigma))
    between = bridge(before, after, rho)
    precision = (before.alpha / before.sigma) ** 2 + (between.alpha / between.sigma) ** 2
    assert precision == pytest.approx((after.alpha / after.sigma) ** 2)


@pytest.mark.parametrize(("before", "after"), LEVELS)
def test_the_statistic_is_sufficient(before: Level, after: Level) -> None:
    """E[z | x_t, x̃_u] by conditioning a Gaussian vector equals E[z | S] at the level of S."""
    x_t, x_u = torch.tensor([[1.3]], dtype=torch.float64), torch.tensor([[-0.4]], dtype=torch.float64)
    for at in [*inner_levels(before, bridge(before, after, torch.tensor(0.5)), 5)][:-1]:
        gains = torch.stack([before.alpha, at.alpha])
        covariance = VARIANCE * gains[:, None] * gains + torch.diag(torch.stack([before.sigma, at.sigma]) ** 2)
        observed = torch.stack([x_t, x_u]).flatten() - gains * MEAN
        expected = MEAN + VARIANCE * gains @ torch.linalg.solve(covariance, observed)
        assert denoise(*statistic(x_t, before, x_u, at)).item() == pytest.approx(expected.item())


def test_levels_start_at_that_of_x_t_and_grow_evenly() -> None:
    before, after = LEVELS[0]
    between = bridge(before, after, torch.tensor(0.3, dtype=torch.float64))
    levels = [*inner_levels(before, between, 4)]
    assert levels[0] == (0, 1) and levels[-1] == (between.alpha, between.sigma)
    precisions = [((before.alpha / before.sigma) ** 2 + (a / s) ** 2).log() for a, s in levels]
    gaps = torch.stack(precisions).diff()
    torch.testing.assert_close(gaps, gaps.mean().expand(4))


def test_a_chain_keeps_the_variance_of_the_data_that_the_gaussian_kernel_loses() -> None:
    """Five steps with η = 1 by exact recursions: the kernel forgets Var[x0 | x_t], GLASS draws it."""
    levels = [angle(t) for t in (0.98, 0.8, 0.6, 0.4, 0.2, 0.0)]

    def final_variance(inner: int) -> float:
        variance = 1.0
        for before, after in itertools.pairwise(levels):
            a, b, _ = transition(before, after, correlation(before, after, 1.0), inner)
            variance = a**2 * variance + b**2
        return variance

    errors = [VARIANCE - final_variance(inner) for inner in (1, 2, 3, 6, 12)]
    assert errors == sorted(errors, reverse=True) and errors[3] < errors[0] / 2 and errors[4] < errors[0] / 4
    ode = 1.0
    for before, after in itertools.pairwise(levels):
        slope = gaussian_transition(torch.ones(1, 1).double(), gain(before), before, after, 0.0).mean.item()
        ode *= slope**2
    assert errors[1] < VARIANCE - ode < errors[0], "two inner steps: more of the data's variance than the ODE"


def gain(before: Level) -> Tensor:
    """x̂0 of x_t = 1 for data of mean 0."""
    return (VARIANCE * before.alpha / (VARIANCE * before.alpha**2 + before.sigma**2)).view(1, 1)


def test_what_cannot_be_drawn_is_refused() -> None:
    x = torch.zeros(1, 1)
    for before, steps in ((LEVELS[0][0], 0), (angle(0.0), 2)):
        with pytest.raises(InputError, match="a GLASS transition needs noise before it and at least 1 inner step"):
            glass_transition(x, denoise, before, LEVELS[0][1], torch.tensor(0.5), x, steps)
