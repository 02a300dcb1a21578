"""Noise levels, x̂0 and Gaussian transitions against diffusers' schedulers and torch.distributions."""

import math
from typing import Any

import diffusers
import pytest
import torch
from gaussian import GaussianPipeline
from schedulers import BETAS, DIFFUSION, FLOW, STOCHASTIC, build
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

from steer.diffusion.schedules import (
    Gaussian,
    Level,
    gaussian_transition,
    has_other_noise,
    level,
    predict_x0,
    step_levels,
)
from steer.errors import InputError

# Noise levels and x̂0


STEPS = 6
SHAPE = (2, 4, 3, 3)
CLOSE = {"atol": 2e-5, "rtol": 2e-5}
PREDICTIONS = ("epsilon", "v_prediction", "sample")
# What diffusers does not implement.
NO_SAMPLE = ("KDPM2Discrete", "KDPM2AncestralDiscrete", "EulerAncestralDiscrete", "DPMSolverSDE", "LMSDiscrete")

SAYS_X0 = (
    *("DDIM", "DDIM-clipped", "DDPM", "EulerDiscrete", "EulerDiscrete-karras", "EulerAncestralDiscrete", "LMSDiscrete"),
    *("HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete"),
    *(name for name in STOCHASTIC if name == "DPMSolverSDE"),
)
CONVERTS_TO_X0 = (
    *("DPMSolverMultistep", "DPMSolverMultistep-sde", "DPMSolverMultistep-3", "DPMSolverSinglestep"),
    *("UniPCMultistep", "UniPCMultistep-3", "SASolver"),
)


def with_predictions(names: tuple[str, ...]) -> list[tuple[str, str]]:
    return [(name, kind) for name in names for kind in PREDICTIONS if kind != "sample" or name not in NO_SAMPLE]


def ready(scheduler: Any) -> Any:
    scheduler.set_timesteps(STEPS)
    return scheduler


def noise(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def position(scheduler: Any) -> int:
    """Index of the latest step in scheduler.sigmas."""
    return (getattr(scheduler, "step_index", None) or 0) - 1


@pytest.mark.parametrize(("name", "kind"), with_predictions(SAYS_X0))
def test_x0_is_what_the_scheduler_says(name: str, kind: str) -> None:
    scheduler = ready(DIFFUSION[name](prediction_type=kind))
    x = noise(0) * scheduler.init_noise_sigma
    for k, t in enumerate(scheduler.timesteps):
        scheduler.scale_model_input(x, t)
        out = scheduler.step(noise(k + 1), t, x)
        if k % scheduler.order == 0:  # the second call of a transition looks from elsewhere
            x0 = predict_x0(scheduler, noise(k + 1), t, x, position(scheduler))
            torch.testing.assert_close(x0, out.pred_original_sample, **CLOSE)
        x = out.prev_sample


@pytest.mark.parametrize(("name", "kind"), with_predictions(CONVERTS_TO_X0))
def test_x0_is_what_a_multistep_solver_converts_to(name: str, kind: str) -> None:
    scheduler = ready(DIFFUSION[name](prediction_type=kind))
    for x0, converted, _ in conversions(scheduler):
        torch.testing.assert_close(x0, converted, **CLOSE)


@pytest.mark.parametrize("name", ["DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "SASolver"])
def test_x0_is_what_a_multistep_flow_solver_converts_to(name: str) -> None:
    for x0, converted, _ in conversions(ready(FLOW[name]())):
        torch.testing.assert_close(x0, converted, **CLOSE)


@pytest.mark.parametrize(
    "scheduler",
    [*(DIFFUSION["DEISMultistep"](prediction_type=kind) for kind in PREDICTIONS), FLOW["DEISMultistep"]()],
    ids=lambda scheduler: scheduler.config.prediction_type,
)
def test_the_noise_that_x0_leaves_is_what_deis_converts_to(scheduler: Any) -> None:
    for k, (x0, epsilon, x) in enumerate(conversions(ready(scheduler))):
        alpha, sigma = level(scheduler, scheduler.timesteps[k], k)
        torch.testing.assert_close(alpha.float() * x0 + sigma.float() * epsilon, x, **CLOSE)


def conversions(scheduler: Any) -> list[tuple[Tensor, Tensor, Tensor]]:
    """At each step of a run: our x̂0, what the solver took the model's output for, and the latents it began with."""
    x, steps = noise(0) * scheduler.init_noise_sigma, []
    for k, t in enumerate(scheduler.timesteps):
        following = scheduler.step(noise(k + 1), t, x).prev_sample
        x0 = predict_x0(scheduler, noise(k + 1), t, x, position(scheduler))
        steps.append((x0, scheduler.model_outputs[-1], x))
        x = following
    return steps


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_x0_of_lcm_is_what_its_boundary_condition_starts_from(kind: str) -> None:
    scheduler = ready(DIFFUSION["LCM"](prediction_type=kind))
    x = noise(0)
    for k, t in enumerate(scheduler.timesteps):
        out = scheduler.step(noise(k + 1), t, x)
        skip, gain = scheduler.get_scalings_for_boundary_condition_discrete(t)
        x0 = predict_x0(scheduler, noise(k + 1), t, x, position(scheduler))
        torch.testing.assert_close(gain * x0 + skip * x, out.denoised, **CLOSE)
        x = out.prev_sample


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "FlowMatchLCM"])
def test_x0_of_flow_matching_goes_along_the_velocity(name: str) -> None:
    scheduler = ready(FLOW[name]())
    x = noise(0)
    for k, t in enumerate(scheduler.timesteps):
        following = scheduler.step(noise(k + 1), t, x).prev_sample
        x0 = predict_x0(scheduler, noise(k + 1), t, x, position(scheduler))
        torch.testing.assert_close(x0, x - scheduler.sigmas[k] * noise(k + 1), **CLOSE)
        x = following


def test_x0_of_thresholding_is_the_schedulers_own() -> None:
    scheduler = ready(DIFFUSION["DDIM"](thresholding=True))
    t, x = scheduler.timesteps[2], 3 * noise(0)
    x0 = predict_x0(scheduler, noise(1), t, x, -1)
    assert x0.abs().max() <= 1
    torch.testing.assert_close(x0, scheduler.step(noise(1), t, x).pred_original_sample, **CLOSE)


def test_a_learned_variance_is_left_out() -> None:
    scheduler = ready(DIFFUSION["DDIM"]())
    output, x, t = noise(1), noise(0), scheduler.timesteps[0]
    both = torch.cat([output, noise(2)], dim=1)
    assert torch.equal(predict_x0(scheduler, both, t, x, -1), predict_x0(scheduler, output, t, x, -1))


def test_x0_is_fp32_under_half_precision() -> None:
    scheduler = ready(DIFFUSION["EulerDiscrete"]())
    scheduler.step(noise(1), scheduler.timesteps[0], noise(0))
    x0 = predict_x0(scheduler, noise(1).half(), scheduler.timesteps[0], noise(0).half(), 0)
    assert x0.dtype == torch.float32


def test_a_prediction_type_without_a_rule_is_refused() -> None:
    scheduler = ready(DIFFUSION["DDIM"](prediction_type="score"))
    with pytest.raises(InputError, match="DDIMScheduler: no rule for x̂0 from prediction_type 'score'"):
        predict_x0(scheduler, noise(1), scheduler.timesteps[0], noise(0), -1)


@pytest.mark.parametrize("name", DIFFUSION)
def test_the_levels_are_those_that_add_noise_has(name: str) -> None:
    scheduler = ready(DIFFUSION[name]())
    x0, epsilon = noise(0), noise(1)
    for index in range(0, len(scheduler.timesteps), scheduler.order):
        t = scheduler.timesteps[index]
        if (scheduler.timesteps == t).sum() > 1 and index == 0:
            continue  # add_noise would look it up elsewhere
        alpha, sigma = level(scheduler, t, index)
        noisy = scheduler.add_noise(x0, epsilon, t.repeat(len(x0)))
        torch.testing.assert_close(alpha.float() * x0 + sigma.float() * epsilon, noisy, **CLOSE)


@pytest.mark.parametrize("name", sorted(FLOW.keys() - {"SASolver"}))  # its add_noise forgets that it is a flow
def test_the_levels_of_flow_matching_are_those_that_its_noise_has(name: str) -> None:
    scheduler = ready(FLOW[name]())
    x0, epsilon = noise(0), noise(1)
    for index in range(0, len(scheduler.timesteps), scheduler.order):
        t = scheduler.timesteps[index]
        if hasattr(scheduler, "scale_noise"):
            one_by_one = name != "FlowMatchHeunDiscrete"  # which takes a single timestep
            scheduler._step_index = index
            noisy = scheduler.scale_noise(x0, t.repeat(len(x0)) if one_by_one else t, epsilon)
        else:
            noisy = scheduler.add_noise(x0, epsilon, t.repeat(len(x0)))
        alpha, sigma = level(scheduler, t, index)
        torch.testing.assert_close(alpha.float() * x0 + sigma.float() * epsilon, noisy, **CLOSE)


def test_a_negative_timestep_is_the_end() -> None:
    alpha, sigma = level(DIFFUSION["DDIM"](set_alpha_to_one=True), -249, -1)
    assert (alpha, sigma) == (1, 0)
    kept = DIFFUSION["DDIM"](set_alpha_to_one=False)
    assert level(kept, -249, -1) == level(kept, 0, -1)


# Gaussian transitions


CLOSER = {"atol": 1e-5, "rtol": 1e-5}


def kernel(scheduler: Any, output: Tensor, t: Any, x: Tensor, eta: float) -> Gaussian:
    """Gaussian transition of the latest step of the scheduler."""
    x0 = predict_x0(scheduler, output, t, x, position(scheduler))
    return gaussian_transition(x, x0, *step_levels(scheduler, t, position(scheduler)), eta)


@pytest.mark.parametrize("steps", [7, 1000])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_has_this_mean_and_this_noise(eta: float, clip: bool, steps: int) -> None:
    scheduler = build("DDIM", **BETAS, clip_sample=clip)
    scheduler.set_timesteps(steps)
    ones = torch.ones(SHAPE)
    for t in scheduler.timesteps[:: max(1, steps // 7)]:
        x, output = noise(int(t)), noise(int(t) + 1)
        # use_clipped_model_output: ε̂ is taken after the clipping of x̂0
        step = {"eta": eta, "use_clipped_model_output": True}
        still = scheduler.step(output, t, x, **step, variance_noise=0 * ones).prev_sample
        shifted = scheduler.step(output, t, x, **step, variance_noise=ones).prev_sample
        ours = kernel(scheduler, output, t, x, eta)
        torch.testing.assert_close(ours.mean, still, **CLOSER)
        torch.testing.assert_close(ours.std * ones, shifted - still, **CLOSER)


def test_ddpm_has_this_mean_and_this_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = build("DDPM", **BETAS, clip_sample=False, variance_type="fixed_small")
    scheduler.set_timesteps(9)
    for t in scheduler.timesteps:
        x, output = noise(int(t)), noise(int(t) + 1)
        ours = kernel(scheduler, output, t, x, 1.0)
        still, shifted = (step_with_noise(monkeypatch, scheduler, output, t, x, value) for value in (0.0, 1.0))
        torch.testing.assert_close(ours.mean, still, **CLOSER)
        # diffusers keeps the variance above 1e-20 and draws nothing at t = 0
        torch.testing.assert_close(ours.std * torch.ones(SHAPE), shifted - still, **CLOSER)


def step_with_noise(
    monkeypatch: pytest.MonkeyPatch, scheduler: Any, output: Tensor, t: Any, x: Tensor, value: float
) -> Tensor:
    """One step of a scheduler whose standard normal draws are all `value`."""
    module = __import__(type(scheduler).__module__, fromlist=["randn_tensor"])
    monkeypatch.setattr(module, "randn_tensor", lambda shape, **_: torch.full(tuple(shape), value))
    if hasattr(scheduler, "_step_index"):
        scheduler._step_index = None
    return scheduler.step(output, t, x).prev_sample


def test_ddpm_is_the_posterior_of_the_forward_process() -> None:
    """q(x_s | x_t, x0) of one adjacent step, by hand (arXiv 2006.11239, eq. 7)."""
    scheduler = build("DDPM", **BETAS)
    t = 500
    beta, cumulative, before = scheduler.betas[t], scheduler.alphas_cumprod[t], scheduler.alphas_cumprod[t - 1]
    x, x0 = noise(0), noise(1)
    mean = before.sqrt() * beta / (1 - cumulative) * x0 + (1 - beta).sqrt() * (1 - before) / (1 - cumulative) * x
    std = ((1 - before) / (1 - cumulative) * beta).sqrt()
    ours = gaussian_transition(x, x0, level(scheduler, t, -1), level(scheduler, t - 1, -1), 1.0)
    torch.testing.assert_close(ours.mean, mean, **CLOSER)
    torch.testing.assert_close(ours.std, std, **CLOSER)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_euler_ancestral_has_this_mean_and_this_noise(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    scheduler = build("EulerAncestralDiscrete", **BETAS, prediction_type=kind)
    scheduler.set_timesteps(7)
    for t in scheduler.timesteps:
        x, output = 5 * noise(int(t)), noise(int(t) + 1)
        scheduler.is_scale_input_called = True
        still, shifted = (step_with_noise(monkeypatch, scheduler, output, t, x, value) for value in (0.0, 1.0))
        ours = kernel(scheduler, output, t, x, 1.0)
        torch.testing.assert_close(ours.mean, still, **CLOSER)
        torch.testing.assert_close(ours.std * torch.ones(SHAPE), shifted - still, **CLOSER)


def test_sde_dpmsolver_has_this_mean_and_this_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = build("DPMSolverMultistep", **BETAS, algorithm_type="sde-dpmsolver++", solver_order=1)
    scheduler.set_timesteps(7)
    for t in scheduler.timesteps:
        x, output = noise(int(t)), noise(int(t) + 1)
        still, shifted = (step_with_noise(monkeypatch, scheduler, output, t, x, value) for value in (0.0, 1.0))
        ours = kernel(scheduler, output, t, x, 1.0)
        torch.testing.assert_close(ours.mean, still, **CLOSER)
        torch.testing.assert_close(ours.std * torch.ones(SHAPE), shifted - still, **CLOSER)


@pytest.mark.parametrize(
    "scheduler",
    [
        *(build("EulerDiscrete", **BETAS, prediction_type=kind) for kind in ("epsilon", "v_prediction", "sample")),
        build("DPMSolverMultistep", **BETAS, solver_order=1),
        build("DPMSolverSinglestep", **BETAS, solver_order=1),
        build("UniPCMultistep", **BETAS, solver_order=1, disable_corrector=list(range(20))),
        FLOW["FlowMatchEulerDiscrete"](),
        FLOW["DPMSolverMultistep"](solver_order=1),
    ],
    ids=lambda scheduler: f"{type(scheduler).__name__}-{scheduler.config.get('prediction_type', 'flow')}",
)
def test_a_noiseless_first_order_solver_takes_the_mean_at_eta_0(scheduler: Any) -> None:
    scheduler.set_timesteps(7)
    x = noise(0) * getattr(scheduler, "init_noise_sigma", 1.0)
    for k, t in enumerate(scheduler.timesteps):
        output = noise(k + 1)
        scheduler.is_scale_input_called = True
        following = scheduler.step(output, t, x).prev_sample
        ours = kernel(scheduler, output, t, x, 0.0)
        torch.testing.assert_close(ours.mean, following, **CLOSER)
        assert ours.std == 0
        x = following


@pytest.mark.parametrize(("name", "end"), [("LCM", -1), ("TCD", 0)])  # TCD's last step ends at timestep 0
def test_a_consistency_model_goes_to_the_next_timestep_of_its_own(name: str, end: int) -> None:
    scheduler = build(name, **BETAS)
    scheduler.set_timesteps(4)
    for k, t in enumerate(scheduler.timesteps):
        scheduler.step(noise(k), t, noise(k + 1))
        before, after = step_levels(scheduler, t, position(scheduler))
        following = scheduler.timesteps[k + 1] if k + 1 < len(scheduler.timesteps) else end
        assert before == level(scheduler, t, k) and after == level(scheduler, following, k)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_the_marginal_after_the_transition_is_that_of_the_forward_process(eta: float) -> None:
    """Σ over ε of p(x_s | x_t, x0) is N(α_s x0, σ_s²), whatever η: what DDIM is built on."""
    before, after = (Level(torch.tensor(a).double().sqrt(), torch.tensor(1 - a).double().sqrt()) for a in (0.3, 0.6))
    x0 = torch.full((40_000, 1), 0.7)
    x = before.alpha.float() * x0 + before.sigma.float() * torch.randn(x0.shape, generator=seeded(0))
    samples = gaussian_transition(x, x0, before, after, eta).sample(seeded(1))
    error = float(after.sigma) / math.sqrt(len(x0))
    assert abs(samples.mean() - float(after.alpha) * 0.7) < 4 * error
    assert abs(samples.std() - float(after.sigma)) < 4 * error


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_gaussian_pipeline_draws_from_what_it_says(eta: float) -> None:
    count = 30_000
    pipe = GaussianPipeline(mean=0.4, std=0.3)
    mean, std = pipe.distribution(8, eta)
    images = pipe(batch_size=count, num_inference_steps=8, eta=eta, generator=seeded(0)).images
    error = std / math.sqrt(images.numel())
    assert abs(images.mean() - mean) < 4 * error and abs(images.std() - std) < 4 * error
    assert mean == pytest.approx(0.4, abs=0.01)


def test_log_prob_is_that_of_independent_normals() -> None:
    ours = Gaussian(noise(0), torch.tensor(0.3))
    terms = Normal(ours.mean.double(), ours.std.double()).log_prob(noise(1)).flatten(1)
    torch.testing.assert_close(ours.log_prob(noise(1)), terms.sum(1))


def test_log_prob_is_taken_in_fp64_and_carries_gradients_to_the_mean() -> None:
    mean = noise(0).requires_grad_()
    value = Gaussian(mean, torch.tensor(0.5)).log_prob(noise(1).half())
    assert value.dtype == torch.float64
    (gradient,) = torch.autograd.grad(value.sum(), mean)
    torch.testing.assert_close(gradient, (noise(1).half().float() - mean.detach()) / 0.25)


def test_kl_is_that_of_independent_normals() -> None:
    std = torch.tensor(0.3)
    first, second = Gaussian(noise(0), std), Gaussian(noise(1), std)
    independent = (Independent(Normal(each.mean.double(), std.double()), 3) for each in (first, second))
    torch.testing.assert_close(first.kl(second), kl_divergence(*independent))
    assert (first.kl(first) == 0).all()


def test_a_deterministic_step_has_no_density() -> None:
    certain = Gaussian(noise(0), torch.tensor(0.0))
    with pytest.raises(InputError, match=r"deterministic \(τ = 0\): it has no log-probability. Use η > 0"):
        certain.log_prob(noise(0))
    with pytest.raises(InputError, match="KL in closed form needs two steps of one τ > 0"):
        certain.kl(certain)


def test_kl_of_unequal_noise_is_refused() -> None:
    with pytest.raises(InputError, match=r"needs two steps of one τ > 0, got 0\.3 and 0\.4"):
        Gaussian(noise(0), torch.tensor(0.3)).kl(Gaussian(noise(0), torch.tensor(0.4)))


def test_draws_have_the_mean_and_the_standard_deviation() -> None:
    samples = Gaussian(torch.full((50_000,), 2.0), torch.tensor(0.5)).sample(seeded(0))
    error = 0.5 / math.sqrt(len(samples))
    assert abs(samples.mean() - 2) < 4 * error and abs(samples.std() - 0.5) < 4 * error


def test_draws_follow_the_generator() -> None:
    gaussian = Gaussian(noise(0), torch.tensor(0.5))
    assert torch.equal(gaussian.sample(seeded(3)), gaussian.sample(seeded(3)))
    assert not torch.equal(gaussian.sample(seeded(3)), gaussian.sample(seeded(4)))


def test_which_solvers_keep_noise_of_their_own() -> None:
    own = {name for name, make in (DIFFUSION | FLOW).items() if has_other_noise(make())}
    assert own - {"DPMSolverSDE"} == {"TCD", "KDPM2AncestralDiscrete", "DPMSolverMultistep-sde"}
    mine = type("Mine", (diffusers.TCDScheduler,), {})
    assert has_other_noise(mine())


def test_a_run_that_upscales_its_latents_has_no_kernel() -> None:
    scheduler = ready(FLOW["FlowMatchLCM"]())
    scheduler.set_scale_factors([1.0, 2.0], upscale_mode="bicubic")
    with pytest.raises(InputError, match="FlowMatchLCMScheduler upscales its latents between steps"):
        step_levels(scheduler, scheduler.timesteps[0], 0)
