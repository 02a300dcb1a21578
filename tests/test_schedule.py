"""Noise levels and x̂0 against what diffusers' own schedulers say."""

from typing import Any

import diffusers
import pytest
import torch
from schedulers import DIFFUSION, FLOW, STOCHASTIC, build
from torch import Tensor

from steer.diffusion.schedules import VERIFIED, check_verified, level, predict_x0
from steer.errors import InputError

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
    """Of the step just made, in scheduler.sigmas."""
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
    x, found = noise(0) * scheduler.init_noise_sigma, []
    for k, t in enumerate(scheduler.timesteps):
        following = scheduler.step(noise(k + 1), t, x).prev_sample
        x0 = predict_x0(scheduler, noise(k + 1), t, x, position(scheduler))
        found.append((x0, scheduler.model_outputs[-1], x))
        x = following
    return found


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


def test_verified_schedulers_are_diffusers_own() -> None:
    assert len(VERIFIED) == 20 and all(hasattr(diffusers, name) for name in VERIFIED)


def test_verification_names_what_is_wrong_and_what_to_use() -> None:
    check_verified(build("DDIM"))
    with pytest.raises(InputError, match=r"EDMEulerScheduler is not a verified scheduler.*Use one of DDIM.*UniPC"):
        check_verified(build("EDMEuler"))
    with pytest.raises(InputError, match="invert_sigmas runs from image to noise"):
        check_verified(build("FlowMatchEulerDiscrete", invert_sigmas=True))
