"""kernel="glass" of steering: the law of a Gaussian chain by hand, evaluations, copies, and what is refused."""

import itertools
import math
from typing import Any

import pytest
import torch
from conftest import cached_pipe, call_kwargs, with_scheduler
from diffusers import DDIMScheduler
from gaussian import GaussianPipeline, check_tilted, steered_gaussians
from schedulers import DIFFUSION, FLOW
from soft_rewards import redness, seeded
from zoo.build import build, call_of

from steer import BestOfNPipeline, FKSteeringPipeline, RacingPipeline, SelectionPipeline
from steer.arguments import IMAGES_PER_PROMPT
from steer.diffusion.schedules import step_levels
from steer.diffusion.step_hooks import SolverStep
from steer.errors import InputError
from steer.pipelines.compatibility import PipelineCheck
from steer.pipelines.particle_batch import ParticleBatch
from steer.rewards.parser import load_reward

STEPS, K = 6, 4
redness_reward = load_reward(redness)


def two_step_transition(pipe: GaussianPipeline, t: int, s: int) -> tuple[float, float, float]:
    """(a, b, c) of x_s = a x_t + b ε + c by two inner steps, η = 1, written out for N(m, v)."""
    (alpha, sigma), (alpha_s, sigma_s), m, v = pipe.level(t), pipe.level(s), pipe.config.mean, pipe.config.std**2
    tau = sigma_s / sigma * math.sqrt(sigma**2 - (alpha / alpha_s * sigma_s) ** 2)
    rho = math.sqrt(sigma_s**2 - tau**2) / sigma_s if sigma_s > 0 else 1.0
    gamma = rho * sigma_s / sigma
    a_end, s_end = alpha_s - gamma * alpha, sigma_s * math.sqrt(1 - rho**2)
    own = (alpha / sigma) ** 2
    if s_end > 0:  # the midpoint in log precision
        ratio = math.sqrt(own * math.sqrt(1 + (a_end / s_end) ** 2 / own) - own)
        s_mid = 0.5 + 0.5 * s_end
        a_mid = ratio * s_mid
    else:
        a_mid, s_mid = 0.5 * a_end, 0.5
    precision = own + (a_mid / s_mid) ** 2

    def after(x: float, noise: float) -> float:
        def mean(z: float, variance: float) -> float:  # E[z | z + noise of a variance]
            return (v * z + variance * m) / (v + variance)

        first = mean(x / alpha, 1 / own)
        inner = a_mid * first + s_mid * noise
        sufficient = (alpha * x / sigma**2 + a_mid * inner / s_mid**2) / precision
        second = mean(sufficient, 1 / precision)
        return gamma * x + a_end * second + s_end / s_mid * (inner - a_mid * second)

    shift = after(0.0, 0.0)
    return after(1.0, 0.0) - shift, after(0.0, 1.0) - shift, shift


def test_the_law_of_a_chain_of_glass_steps_is_exact() -> None:
    pipe = GaussianPipeline(DDIMScheduler(clip_sample=False, timestep_spacing="trailing"))
    outs = list(steered_gaussians(pipe, 4, kernel="glass", num_inference_steps=5, resample_steps=[1, 3]))
    pipe.scheduler.set_timesteps(5)
    times, mean, variance = [*pipe.scheduler.timesteps.tolist(), -1], 0.0, 1.0
    for t, s in itertools.pairwise(times):
        a, b, c = two_step_transition(pipe, t, s)
        mean, variance = a * mean + c, a**2 * variance + b**2
    check_tilted(outs, mean, math.sqrt(variance))
    assert abs(math.sqrt(variance) - pipe.config.std) < abs(pipe.distribution(5, 1.0)[1] - pipe.config.std)
    assert outs[0].cost.nfe == 100 * 4 * (5 + 5), "two evaluations a step"


CASES = {
    "ddim": ("sd", DIFFUSION["DDIM"]),
    "euler": ("sdxl", DIFFUSION["EulerDiscrete"]),
    "dpm": ("sd", DIFFUSION["DPMSolverMultistep"]),
    "flow": ("sd3", FLOW["FlowMatchEulerDiscrete"]),
    "flux": ("flux", FLOW["FlowMatchEulerDiscrete"]),
}


@pytest.mark.parametrize("case", CASES)
def test_the_denoiser_at_the_level_of_the_next_step_is_that_step(case: str) -> None:
    """Asked from step 1 at (x_2, σ_2/α_2), the pipeline answers as in its own step 2: guidance, conditions, scaling."""
    name, scheduler = CASES[case]
    pipe = with_scheduler(cached_pipe(name), scheduler())
    call = {key: value for key, value in call_kwargs(name, K, STEPS).items() if key not in IMAGES_PER_PROMPT}
    batch = ParticleBatch(pipe, redness_reward, call.pop("prompt"), K, call | {"generator": seeded()})
    x0: dict[str, torch.Tensor] = {}

    def on_step(solver_step: SolverStep) -> None:
        if solver_step.k == 1:
            _, (alpha, sigma) = step_levels(solver_step.scheduler, solver_step.t, solver_step.index)
            x0["asked"] = batch._look_ahead.denoise(solver_step, solver_step.prev.float() / float(alpha), sigma / alpha)
        elif solver_step.k == 2:
            x0["run"] = solver_step.x0()

    batch.sample(on_step)
    torch.testing.assert_close(x0["asked"], x0["run"], atol=1e-4, rtol=1e-4)


@pytest.mark.few(2)
@pytest.mark.parametrize("case", CASES)
def test_copies_diverge_in_steps_of_glass(case: str) -> None:
    name, scheduler = CASES[case]
    pipe = with_scheduler(cached_pipe(name), scheduler())
    call: dict[str, Any] = {
        key: value for key, value in call_kwargs(name, K, STEPS).items() if key not in IMAGES_PER_PROMPT
    }
    call |= {"num_particles": K, "output_type": "pt"}
    runs: list[tuple[Any, dict[str, Any], int]] = [
        (FKSteeringPipeline, {"resample_steps": [1, 3], "lam": 50.0, "ess_threshold": 1.0}, 2),
        (SelectionPipeline, {"select_steps": [1, 3], "beams": 2, "eta": None}, 2),
        (RacingPipeline, {"rungs": {1: 4, 3: 4}, "branches": 2, "lookahead": 1}, 2),
    ]
    for method, options, noisy in runs:
        outs = [
            method(pipe, redness)(generator=seeded(), kernel=kernel, **call | options)
            for kernel in ("gaussian", "glass")
        ]
        assert outs[1].cost.nfe == outs[0].cost.nfe + noisy * K, method
        images = outs[1].images
        assert images.isfinite().all() and not torch.equal(images, outs[0].images)
        assert all(not torch.equal(images[i], images[j]) for i in range(K) for j in range(i))


@pytest.mark.few(3)
@pytest.mark.parametrize("eta", [None, 0.0])
@pytest.mark.parametrize("case", CASES)
def test_without_noise_a_step_is_that_of_the_plain_batch(case: str, eta: float | None) -> None:
    """GLASS transitions are drawn only where copies part: at no step of an unsteered run."""
    name, scheduler = CASES[case]
    pipe = with_scheduler(cached_pipe(name), scheduler())
    call: dict[str, Any] = {
        key: value for key, value in call_kwargs(name, K, STEPS).items() if key not in IMAGES_PER_PROMPT
    }
    call |= {"num_particles": K, "output_type": "pt", "eta": eta}
    plain = BestOfNPipeline(pipe, redness)(generator=seeded(), **call)
    unsteered = {"resample_steps": [1, 3], "lam": 0.0}
    out = FKSteeringPipeline(pipe, redness)(generator=seeded(), kernel="glass", **call | unsteered)
    assert torch.equal(out.images, plain.images) and out.cost.nfe == plain.cost.nfe == K * STEPS
    runs: list[tuple[Any, dict[str, Any]]] = [
        (FKSteeringPipeline, {"resample_steps": [1], "lam": 50.0, "ess_threshold": 1.0}),
        (SelectionPipeline, {"select_steps": [1], "beams": 1}),
        (RacingPipeline, {"rungs": {1: K}, "branches": 2, "lookahead": 1}),
    ]
    for method, options in runs:
        out = method(pipe, redness)(generator=seeded(), kernel="glass", **call | options)
        assert out.cost.nfe == K * (STEPS + 1), method  # one further evaluation at the step whose copies part


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "glas"}, "kernel"),
        ({"glass_steps": 1}, "glass_steps must be at least 2"),
        ({"glass_steps": 3}, "glass_steps is an option of kernel='glass' alone: leave it out"),
        ({"kernel": "glass", "reward_guidance": 1.0}, "reward_guidance and kernel='glass' exclude each other"),
        ({"kernel": "glass", "asynchronous_rewards": True}, "asynchronous_rewards and kernel='glass' exclude"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        FKSteeringPipeline(cached_pipe("sd"), redness)(**call_kwargs("sd", K, STEPS) | options)


def test_a_scheduler_without_levels_between_its_steps_is_refused_by_name() -> None:
    check = PipelineCheck(build("SanaSprint"), call_of("SanaSprint"))
    prompt, call = check.split()
    options: dict[str, Any] = {"num_particles": 2, "rungs": {0: 2}, "branches": 2, "lookahead": 1, "kernel": "glass"}
    with pytest.raises(
        InputError, match=r"^SCMScheduler has no noise levels between its steps: use kernel='gaussian'$"
    ):
        RacingPipeline(check.pipe, check.reward)(prompt, **call, **options)
