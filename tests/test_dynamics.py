"""Noise laws of flow matching against their published formulas and closed forms, and windows of noisy steps."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import cached_pipe
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from gaussian import GaussianPipeline
from rollouts import TWO_PROMPTS, call_of, counted, fresh_pipe
from soft_rewards import Soft
from torch import Generator, Tensor

from steer.diffusion.kernels import fused_gaussian
from steer.diffusion.schedules import Dynamics, Level, check_dynamics, gaussian_transition, step_levels
from steer.errors import InputError
from steer.pipelines.training.d3po_prdp import PRDPConfig
from steer.pipelines.training.ddpo_grpo import GRPOConfig, GRPOTrainer
from steer.pipelines.training.reward_backprop import RewardBackpropConfig
from steer.training.rollout import Rows, Sampler, StepWindow, log_probs
from steer.training.trainable import get_denoiser

FLOW_DYNAMICS: tuple[tuple[Dynamics, float], ...] = (("flow-sde", 0.7), ("dance", 0.3), ("cps", 0.8))


class FlowGaussianPipeline(GaussianPipeline):
    """GaussianPipeline of flow matching: x = (1 − σ) x0 + σ ε, the denoiser predicts E[ε − x0 | x]."""

    def __init__(self, scheduler: Any = None, mean: float = 0.5, std: float = 0.3) -> None:
        super().__init__(scheduler or FlowMatchEulerDiscreteScheduler(), mean, std)

    def velocity(self, x: Tensor, sigma: float) -> Tensor:
        gain, shift = self.posterior(sigma)
        return (x - (gain * x + shift)) / sigma  # x = x̂0 + σ v

    def posterior(self, sigma: float) -> tuple[float, float]:
        """(a, b) of E[x0 | x] = a x + b."""
        alpha, variance = 1 - sigma, self.config.std**2
        gain = alpha * variance / (alpha**2 * variance + sigma**2)
        return gain, self.config.mean * (1 - gain * alpha)

    def levels(self, steps: int) -> list[float]:
        self.scheduler.set_timesteps(steps)
        return self.scheduler.sigmas.double().tolist()

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int = 10,
        generator: Generator | None = None,
        latents: Tensor | None = None,
        output_type: str = "pt",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Tensor]:
        if latents is None:
            latents = randn_tensor((batch_size, 3, 1, 1), generator=generator)
        sigmas = self.levels(num_inference_steps)
        for k, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
            output = self.velocity(latents, sigmas[k])
            latents = self.scheduler.step(output, timestep, latents).prev_sample
        return ImagePipelineOutput(images=latents) if return_dict else (latents,)


def published(
    dynamics: str, a: float, sigma: float, after: float, x: Any, v: Any, sigma_max: float
) -> tuple[Any, float]:
    """Mean and standard deviation as the papers write them, in x, v and dt."""
    dt = after - sigma
    if dynamics == "cps":
        std = after * math.sin(a * math.pi / 2)
        return (x - sigma * v) * (1 - after) + (x + v * (1 - sigma)) * math.sqrt(after**2 - std**2), std
    s = a * math.sqrt(sigma / (1 - (sigma_max if sigma == 1 else sigma))) if dynamics == "flow-sde" else a
    if dynamics == "dance":
        score = -(x - (x - sigma * v) * (1 - sigma)) / sigma**2
        return x + v * dt - 0.5 * a**2 * score * dt, a * math.sqrt(-dt)
    return x * (1 + s**2 / (2 * sigma) * dt) + v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt, s * math.sqrt(-dt)


@pytest.mark.parametrize(("dynamics", "a"), FLOW_DYNAMICS)
@pytest.mark.parametrize("k", [0, 3, 9])
def test_a_step_is_that_of_its_paper(dynamics: Dynamics, a: float, k: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    sigmas = scheduler.sigmas.double()
    x, v = torch.randn(2, 4, 3, 3, 3, generator=Generator().manual_seed(0), dtype=torch.float64)
    sigma, after = sigmas[k].item(), sigmas[k + 1].item()
    mean, std = published(dynamics, a, sigma, after, x, v, sigmas[1].item())
    levels = step_levels(scheduler, scheduler.timesteps[k], k)
    kernel = gaussian_transition(x, x - sigma * v, *levels, a, dynamics)
    torch.testing.assert_close(kernel.mean, mean, rtol=1e-5, atol=1e-6)  # σ is fp32 in the scheduler
    assert math.isclose(kernel.std.item(), std, rel_tol=1e-5)
    fused = fused_gaussian(scheduler, x.float(), v.float(), *levels, a, dynamics)
    torch.testing.assert_close(fused.mean, mean.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dynamics", "share"), [("ddim", 0.74), ("flow-sde", 0.67), ("cps", 0.71), ("dance", 0.28)])
def test_how_much_of_the_kl_is_in_the_last_two_steps(dynamics: Dynamics, share: float) -> None:
    """KL of two policies whose velocities differ by one, in ten even steps; the figures of finetuning-reference.md."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[sigma / 10 for sigma in range(10, 0, -1)])
    x, nats = torch.zeros(1, 1, dtype=torch.float64), []
    for k, t in enumerate(scheduler.timesteps):
        levels, a = step_levels(scheduler, t, k), dict(FLOW_DYNAMICS).get(dynamics, 1.0)
        one, other = (gaussian_transition(x, x - levels[0].sigma * v, *levels, a, dynamics) for v in (0, 1))
        if one.std > 0:
            nats.append(one.kl(other).item())
    assert sum(nats[-2:]) / sum(nats) == pytest.approx(share, abs=0.006)


def moments(pipe: FlowGaussianPipeline, steps: int, dynamics: str, a: float, window: range) -> tuple[float, float]:
    """Mean and standard deviation of the samples: N(0, 1) pushed through the published steps, the ODE elsewhere."""
    mean, variance, sigmas = 0.0, 1.0, pipe.levels(steps)
    for k, (sigma, after) in enumerate(itertools.pairwise(sigmas)):
        gain, shift = pipe.posterior(sigma)
        maps = []
        for x in (0.0, 1.0):  # the step is affine in x
            v = (x - gain * x - shift) / sigma
            noisy = k in window
            maps.append(
                published(dynamics, a, sigma, after, x, v, sigmas[1]) if noisy else (x + v * (after - sigma), 0.0)
            )
        (at0, std), (at1, _) = maps
        mean, variance = at0 + (at1 - at0) * mean, (at1 - at0) ** 2 * variance + std**2
    return mean, math.sqrt(variance)


@pytest.mark.few(6)
@pytest.mark.parametrize("kind", [None, "first", "random", "sliding"])
@pytest.mark.parametrize(("dynamics", "a"), FLOW_DYNAMICS)
def test_samples_of_a_gaussian_have_the_law_in_closed_form(dynamics: Dynamics, a: float, kind: Any) -> None:
    pipe, count, steps = FlowGaussianPipeline(), 2000, 8
    sampler = Sampler(pipe, {"batch_size": count, "num_inference_steps": steps}, a, dynamics=dynamics)
    window = None if kind is None else StepWindow(kind, 3, number=2)
    rows = Rows(("",) * count, tuple(range(count)), tuple(range(count)))
    stored, _ = sampler.rollout(rows, window)
    noisy = range(steps) if window is None else window.steps(steps)
    mean, std = moments(pipe, steps, dynamics, a, noisy)
    samples = stored.latents[:, -1].double().flatten()
    assert abs(samples.mean().item() - mean) < 4 * std / len(samples) ** 0.5
    assert abs(samples.std().item() / std - 1) < 4 / (2 * len(samples)) ** 0.5
    assert stored.stochastic == tuple(k for k in noisy if dynamics != "cps" or k < steps - 1)
    assert torch.equal(log_probs(sampler, stored), stored.log_probs)


@pytest.mark.parametrize(("dynamics", "a"), FLOW_DYNAMICS[:2])
def test_with_many_steps_the_sde_has_the_law_of_the_data(dynamics: str, a: float) -> None:
    """Flow-SDE and Dance-SDE keep every marginal in the limit: their closed form ends in N(m, s²)."""
    pipe = FlowGaussianPipeline()
    errors = []
    for steps in (50, 800):
        mean, std = moments(pipe, steps, dynamics, a, range(steps))
        errors.append(max(abs(mean - 0.5), abs(std - 0.3)))
    assert errors[1] < 0.02 and errors[1] < errors[0] / 4


def test_cps_keeps_the_coefficients_and_the_others_do_not() -> None:
    """From an exact x̂0 and ε̂, CPS makes x_s with the noise σ_s of the forward process."""
    before, after = (Level(torch.tensor(1 - s).double(), torch.tensor(s).double()) for s in (0.6, 0.45))
    # x0 = 0, ε̂ = 1: the noise of x_s is √(ρ² + τ²), by hand s² = .735 and .09, τ² = .15 s², ρ = .45 − .125 s².
    expected = {"flow-sde": math.hypot(0.358125, math.sqrt(0.11025)), "dance": math.hypot(0.43875, math.sqrt(0.0135))}
    x, x0 = torch.tensor([[0.6], [0.0]], dtype=torch.float64)[:, None]
    for dynamics, a in FLOW_DYNAMICS:
        kernel = gaussian_transition(x, x0, before, after, a, dynamics)
        noise = math.hypot(kernel.mean.item(), kernel.std.item())
        assert math.isclose(noise, ({"cps": 0.45} | expected)[dynamics], rel_tol=1e-6)


def test_dynamics_of_flow_matching_need_it() -> None:
    with pytest.raises(InputError, match="'cps' are for flow matching, and DDIMScheduler"):
        Sampler(cached_pipe("sd"), call_of("sd"), dynamics="cps")
    check_dynamics(DDIMScheduler(), "ddim")


def test_windows_lie_where_they_should() -> None:
    assert StepWindow("first", 3).steps(10) == range(3)
    places = {StepWindow("random", 2, seed).steps(10).start for seed in range(60)}
    assert places == {0, 1, 2, 3}  # [0, 5) holds a window of two at four places
    assert [StepWindow("sliding", 3, n).steps(6).start for n in range(5)] == [0, 1, 2, 0, 1]  # never the last step
    assert [StepWindow("sliding", 3, n, skip=2).steps(8).start for n in range(4)] == [0, 1, 2, 0]
    with pytest.raises(InputError, match="window_size must be from 1 to 3"):
        StepWindow("first", 4).steps(4)


def test_a_configuration_places_its_windows() -> None:
    config = GRPOConfig(window="sliding", window_size=2, window_interval=3)
    assert [config.step_window(update).number for update in (0, 2, 3, 6)] == [0, 0, 1, 2]
    assert config.step_window(0, half=True).skip == 2
    random = PRDPConfig(window="random", window_size=2)
    assert random.step_window(4) == random.step_window(4) and random.step_window(4) != random.step_window(5)
    assert GRPOConfig().step_window(0) is None
    assert not hasattr(RewardBackpropConfig(), "window")


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_steps_outside_of_a_window_are_those_of_the_ode(name: str) -> None:
    """And neither its replay nor the solver's own noise-free run costs or changes anything else."""
    pipe, window = cached_pipe(name), StepWindow("sliding", 2, number=1)
    sampler = Sampler(pipe, call_of(name, steps=5))
    stored, _ = sampler.rollout(TWO_PROMPTS, window)
    assert stored.stochastic == (1, 2) and stored.log_probs.shape == (4, 2)
    same_start = stored.latents[[0, 2]], stored.latents[[1, 3]]
    assert torch.allclose(same_start[0][:, 0], same_start[1][:, 0])  # before the window: one x_T, one path
    assert not torch.allclose(same_start[0][:, 1], same_start[1][:, 1])
    with counted(get_denoiser(pipe)[1]) as calls:
        assert torch.equal(log_probs(sampler, stored), stored.log_probs)
    each = len(calls) // 2
    assert len(calls) == 2 * each and each in (1, 2)


def test_images_of_the_ode_are_those_of_the_solver() -> None:
    """FlowMatchEuler without noise is the plain pipeline."""
    pipe = FlowGaussianPipeline()
    call = {"batch_size": 4, "num_inference_steps": 6}
    images = Sampler(pipe, call).ode_images(Rows(("",) * 4, (1, 2, 3, 4), (0,) * 4))
    start = torch.cat([torch.randn(1, 3, 1, 1, generator=Generator().manual_seed(n)) for n in (1, 2, 3, 4)])
    plain = pipe(**call, latents=start).images
    torch.testing.assert_close(images, plain.clamp(0, 1), rtol=1e-5, atol=1e-5)


BRIGHT = Soft(lambda images, prompts: images.mean((1, 2, 3)), "bright")


def test_a_training_learns_from_its_window(tmp_path: Path) -> None:
    trainer = GRPOTrainer(
        fresh_pipe("sd3"),
        BRIGHT,
        GRPOConfig(
            output_dir=str(tmp_path / "run"), dynamics="flow-sde", eta=0.7, window="random", window_size=2,
            max_steps=1, train_batch_size=1, num_generations=2, num_inference_steps=4, lora_rank=2,
        ),
        train_prompts=["a star"],
        eval_prompts=["a circle"],
    )  # fmt: skip
    result = trainer.train()
    assert math.isfinite(result.records[0]["loss"]) and result.records[0]["grad_norm"] > 0
    assert len(result.evaluations) == 2
