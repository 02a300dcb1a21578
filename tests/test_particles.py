"""Feynman–Kac steering against closed forms, and against known mistakes of published code."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from steer.diffusion.schedules import Level, gaussian_transition
from steer.smc.particles import FeynmanKac, Particles, log_mean_exp
from steer.smc.potentials import POTENTIALS, TEMPERINGS, ESSTargeted, TemperingState
from steer.smc.resampling import RESAMPLERS

LAM, TARGET = 0.3, 1.2  # reward −½ (x − TARGET)²
DATA_MEAN, DATA_STD = -0.5, 0.8
ALPHAS = torch.tensor([0.1, 0.3, 0.55, 0.8, 0.95, 1.0], dtype=torch.float64)
EVALUATED = (1, 3)


def reward(x: Tensor) -> Tensor:
    return -0.5 * (x - TARGET) ** 2


def levels(step: int) -> tuple[Level, Level]:
    before, after = ALPHAS[step], ALPHAS[step + 1]
    return Level(before, (1 - before**2).sqrt()), Level(after, (1 - after**2).clamp(min=0).sqrt())


def posterior_mean(x: Tensor, level: Level) -> Tensor:
    """The perfect denoiser of data N(m, s²): x̂0 = m + α s²/(α² s² + σ²) (x − α m)."""
    gain = level.alpha * DATA_STD**2 / (level.alpha**2 * DATA_STD**2 + level.sigma**2)
    return (DATA_MEAN + gain * (x - level.alpha * DATA_MEAN)).float()


def discretised_prior() -> tuple[float, float]:
    """Mean and variance of x0 under the discretised sampler: v_s = c² v_t + τ², by probing the affine step."""
    mean, variance = 0.0, 1.0
    for step in range(len(ALPHAS) - 1):
        before, after = levels(step)
        probe = torch.tensor([[0.0], [1.0]])
        kernel = gaussian_transition(probe, posterior_mean(probe, before), before, after, eta=1.0)
        offset, slope = kernel.mean[0].item(), (kernel.mean[1] - kernel.mean[0]).item()
        mean, variance = slope * mean + offset, slope**2 * variance + kernel.std.item() ** 2
    return mean, variance


def steer_the_chain(algorithm: FeynmanKac, groups: int, size: int, seed: int) -> tuple[Tensor, Particles]:
    generator = torch.Generator().manual_seed(seed)
    particles, x = Particles.start(groups, size), torch.randn(groups, size, generator=generator)
    for step in range(len(ALPHAS) - 1):
        before, after = levels(step)
        x0 = posterior_mean(x, before)
        if step in EVALUATED:
            particles, ancestors = algorithm.select(algorithm.reweight(particles, reward(x0), step / 5), generator)
            if ancestors is not None:
                x, x0 = x.gather(1, ancestors), x0.gather(1, ancestors)
        kernel = gaussian_transition(x, x0, before, after, eta=1.0)
        x = kernel.sample(generator) if kernel.std > 0 else kernel.mean
    return x, algorithm.finish(particles, reward(x))


@pytest.mark.few(2)
@pytest.mark.parametrize("ess_threshold", [0.5, 0.95, 1.0], ids=["adaptive", "eager", "scheduled"])
@pytest.mark.parametrize("scheme", RESAMPLERS)
@pytest.mark.parametrize("potential", POTENTIALS)
def test_normaliser_and_moments_are_those_of_the_tilted_gaussian(
    potential: str, scheme: str, ess_threshold: float
) -> None:
    groups, size = 8000, 4
    algorithm = FeynmanKac(LAM, POTENTIALS[potential], RESAMPLERS[scheme], ess_threshold=ess_threshold)
    x, particles = steer_the_chain(algorithm, groups, size, seed=sum(map(ord, potential + scheme)))
    mean, variance = discretised_prior()
    tilted_variance = variance / (1 + LAM * variance)
    tilted_mean = (mean + LAM * variance * TARGET) / (1 + LAM * variance)
    z = (1 + LAM * variance) ** -0.5 * math.exp(-LAM * (mean - TARGET) ** 2 / (2 * (1 + LAM * variance)))

    estimates = particles.log_evidence.double().exp()
    assert (estimates.std() / estimates.mean()).item() < 1.0  # light tails: the standard error means something
    assert abs(estimates.mean().item() - z) <= 4 * estimates.std().item() / groups**0.5
    # Pooled over groups, Σ Ẑ Σ W f / Σ Ẑ: a group's own self-normalised mean is biased.
    weights = particles.log_weights.double().softmax(1)
    for values, truth in ((x, tilted_mean), ((x - tilted_mean) ** 2, tilted_variance)):
        contributions = estimates * (weights * (values.double() - truth)).sum(1)
        error = contributions.std().item() / groups**0.5 / estimates.mean().item()
        assert abs(contributions.mean().item() / estimates.mean().item()) <= 4 * error


@pytest.mark.parametrize("tempering", TEMPERINGS)
def test_every_tempering_ends_at_the_same_normaliser(tempering: str) -> None:
    algorithm = FeynmanKac(LAM, tempering=TEMPERINGS[tempering])
    _, particles = steer_the_chain(algorithm, 8000, 4, seed=5)
    _, plain = steer_the_chain(FeynmanKac(LAM), 8000, 4, seed=6)
    a, b = particles.log_evidence.exp(), plain.log_evidence.exp()
    assert abs(a.mean() - b.mean()) <= 4 * ((a.var() + b.var()) / 8000).sqrt()


reward_paths = hnp.arrays("float32", (3, 2, 4), elements=st.floats(-20, 20, width=32))


@pytest.mark.few(2)
@pytest.mark.parametrize("tempering", TEMPERINGS)
@pytest.mark.parametrize("potential", POTENTIALS)
@given(path=reward_paths, lam=st.floats(0.1, 20), seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_potentials_of_a_path_multiply_to_exp_lambda_r(
    potential: str, tempering: str, path: object, lam: float, seed: int
) -> None:
    rewards = torch.as_tensor(path)
    algorithm = FeynmanKac(lam, POTENTIALS[potential], tempering=TEMPERINGS[tempering], ess_threshold=0.9)
    particles, generator = Particles.start(2, 4), torch.Generator().manual_seed(seed)
    for j in range(2):
        particles, _ = algorithm.select(algorithm.reweight(particles, rewards[j], j / 3), generator)
    end = algorithm.finish(particles, rewards[2])
    assert torch.allclose(end.log_potentials, lam * rewards[2], atol=lam * 1e-3, rtol=1e-4)


def test_without_resampling_the_weights_are_those_of_importance_sampling() -> None:
    algorithm = FeynmanKac(2.0, ess_threshold=1e-9)
    x, particles = steer_the_chain(algorithm, 5, 6, seed=0)
    assert torch.allclose(particles.log_weights, 2.0 * reward(x), atol=1e-5)
    assert torch.allclose(particles.log_evidence, log_mean_exp(2.0 * reward(x)), atol=1e-5)


def test_geometric_tempering_reaches_lambda_at_the_end_and_das_constant_does_not() -> None:
    def strength(progress: float) -> float:
        moment = TemperingState(progress, 10.0, torch.zeros(1, 1), lambda lam: torch.ones(1))
        return TEMPERINGS["geometric"](moment).item()

    das = 10.0 * min(1.008**20 - 1, 1)
    assert strength(0.0) == 0 and strength(1.0) == 10 and das < 1.8
    assert strength(0.5) == pytest.approx(10 * (2**0.5 - 1))


def test_ess_tempering_leaves_half_of_the_particles() -> None:
    rewards = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)) * 5
    reweighted = FeynmanKac(50.0, tempering=TEMPERINGS["ess"]).reweight(Particles.start(3, 16), rewards, 0.3)
    assert torch.allclose(reweighted.ess, torch.full((3,), 8.0), atol=0.05)


@pytest.mark.parametrize("size", [4, 16])
@pytest.mark.parametrize("potential", ["difference", "max"])
def test_ess_tempering_meets_its_target_again_and_again(potential: str, size: int) -> None:
    """300 groups, 5 evaluations: whenever some λ_j of a fine grid brings the ESS to the target, tempering does too."""
    target, groups, lam = size / 2, 300, 40.0
    generator = torch.Generator().manual_seed(0)
    algorithm = FeynmanKac(lam, POTENTIALS[potential], tempering=TEMPERINGS["ess"])
    particles, rewards = Particles.start(groups, size), torch.zeros(groups, size)
    fell = False
    for j in range(5):
        rewards = 0.7 * rewards + torch.randn(groups, size, generator=generator)
        reweighted = algorithm.reweight(particles, rewards, j / 6)
        every = [FeynmanKac(float(x), POTENTIALS[potential]).reweight(particles, rewards, 0).ess for x in range(41)]
        possible = torch.stack(every).amax(0) >= target
        strength = reweighted.path.strengths[-1][:, 0]
        at_target = (reweighted.ess - target).abs() < 0.05 * size
        at_target |= (strength == lam) & (reweighted.ess >= target)
        assert possible.float().mean() > 0.5 and at_target[possible].float().mean() >= 0.8
        assert ((strength >= 0) & (strength <= lam)).all()
        fell |= j > 0 and bool((strength < particles.path.strengths[-1][:, 0] - 1e-3).any())
        particles, ancestors = algorithm.select(reweighted, generator)
        assert ancestors is not None and (particles.ess > size * (1 - 1e-5)).all()  # resampled at its own target
        rewards = rewards.gather(1, ancestors)
    assert fell


# The known mistakes of the published code, by their numbers in the design notes: the published rule fails, ours passes.


def test_mistake_1_clamped_weights_steer_nothing() -> None:
    rewards = 5 + torch.tanh(torch.tensor([[-2.0, -1.0, 0.0, 1.0]]))
    published = (10 * rewards).exp().clamp(0, 1e10)
    assert (published == published[0, 0]).all()
    assert FeynmanKac(10.0).reweight(Particles.start(1, 4), rewards, 0.5).ess < 2


def test_mistake_2_a_maximum_that_starts_from_zero_ignores_negative_rewards() -> None:
    rewards = torch.tensor([[-3.0, -2.0, -1.0, -0.5]])
    published = torch.maximum(torch.zeros(1, 4), rewards)
    assert (published == 0).all()
    reweighted = FeynmanKac(1.0, POTENTIALS["max"]).reweight(Particles.start(1, 4), rewards, 0.5)
    assert torch.equal(reweighted.log_weights, rewards)


def test_mistake_3_weights_of_steps_without_resampling_are_kept() -> None:
    rewards = torch.tensor([[0.0, 0.1, 0.2, 0.3]])
    algorithm, generator = FeynmanKac(1.0), torch.Generator().manual_seed(0)
    particles, ancestors = algorithm.select(algorithm.reweight(Particles.start(1, 4), rewards, 0.5), generator)
    published = torch.zeros(1, 4)  # thrown away when the ESS is high
    assert ancestors is None
    assert torch.equal(particles.log_weights, rewards) and not torch.equal(particles.log_weights, published)


@pytest.mark.parametrize("potential", ["max", "sum", "now"])
def test_mistake_4_the_end_is_judged_by_the_finished_image(potential: str) -> None:
    early, final = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    algorithm = FeynmanKac(1.0, POTENTIALS[potential], ess_threshold=1e-9)
    particles = algorithm.finish(algorithm.reweight(Particles.start(1, 2), early, 0.5), final)
    published = torch.maximum(early, final)  # against the historical maximum
    assert published.argmax() == 0 and particles.log_weights.argmax() == 1


def test_mistake_5_hopeless_rewards_still_have_weights() -> None:
    rewards = torch.tensor([[-1000.0, -1001.0, -1002.0, -1100.0]])
    published = (10 * rewards).exp()
    assert (published == 0).all()
    with pytest.raises(RuntimeError):
        torch.multinomial(published, 4, replacement=True)
    algorithm, generator = FeynmanKac(10.0), torch.Generator().manual_seed(0)
    _, ancestors = algorithm.select(algorithm.reweight(Particles.start(1, 4), rewards, 0.5), generator)
    assert ancestors is not None and (ancestors == 0).all()


def test_mistake_6_prompts_of_one_batch_keep_their_particles_and_the_global_rng_is_left_alone() -> None:
    rewards = torch.tensor([[0.0, 9.0], [0.0, 1.0]])
    before = torch.get_rng_state()
    algorithm, generator = FeynmanKac(10.0, ess_threshold=1.0), torch.Generator().manual_seed(0)
    _, ancestors = algorithm.select(algorithm.reweight(Particles.start(2, 2), rewards, 0.5), generator)
    flat = (10 * rewards).flatten().softmax(0) * 4  # what resampling the whole batch would expect
    assert flat[2:].sum() < 1e-6
    assert ancestors is not None and ((ancestors >= 0) & (ancestors < 2)).all()
    assert torch.equal(torch.get_rng_state(), before)


def test_tempering_at_another_ess_resamples_at_every_evaluation_too() -> None:
    rewards = torch.tensor([[0.0, 0.1, 0.2, 0.3]])
    algorithm = FeynmanKac(1.0, tempering=ESSTargeted(target=0.3))
    reweighted = algorithm.reweight(Particles.start(1, 4), rewards, 0.5)
    assert 3.9 < reweighted.ess < 4, "above the threshold of half the particles"
    particles, ancestors = algorithm.select(reweighted, torch.Generator().manual_seed(0))
    assert ancestors is not None and particles.ess == 4
    assert FeynmanKac(1.0).select(reweighted, torch.Generator().manual_seed(0))[1] is None


def test_equal_weights_are_never_resampled() -> None:
    algorithm, generator = FeynmanKac(0.0, ess_threshold=1.0), torch.Generator().manual_seed(0)
    particles = algorithm.reweight(Particles.start(3, 4), torch.randn(3, 4), 0.5)
    assert algorithm.select(particles, generator)[1] is None
