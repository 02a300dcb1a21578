"""Steps guided by the gradient of a value at the kernel's mean: against closed forms, and inside real pipelines."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PIPELINES, with_scheduler
from diffusers import DDIMScheduler
from gaussian import LAM, TOTAL, GaussianPipeline, check_tilted, steered_gaussians
from schedulers import DIFFUSION
from soft_rewards import redness, seeded
from test_fk import steer_kwargs
from test_guidance import Leaning, finite_differences
from test_guidance import proposals as proposals
from torch import Tensor

from steer import FKSteeringPipeline, InputError, SteeringOutput, ValueConfig, train_value
from steer.diffusion.schedules import step_levels
from steer.diffusion.step_hooks import SolverStep
from steer.reward import RewardError

STEPS, K, GROUPS = 10, 4, 500


def chain() -> GaussianPipeline:
    return GaussianPipeline(DDIMScheduler(clip_sample=False, timestep_spacing="trailing"))


def total_to_the_end(step: int) -> tuple[float, float, float]:
    """(a, b, v) of Σ x0 | x_k ~ N(a Σ x_k + b, v) for the 3 elements of a chain with η = 1."""
    a, b, v = 1.0, 0.0, 0.0
    for gain, shift, tau in chain().transitions(STEPS, 1.0)[step:]:
        a, b, v = gain * a, gain * b + 3 * shift, gain**2 * v + 3 * tau**2
    return a, b, v


def exact_value(solver_step: SolverStep, prompts: Sequence[str]) -> Tensor:
    """E[Σ x0 | x_t] of the chain."""
    a, b, _ = total_to_the_end(solver_step.k)
    return a * solver_step.x.sum((1, 2, 3)) + b


def runs_from_common_noise(**options: Any) -> tuple[SteeringOutput, Tensor]:
    """A run of GROUPS prompts whose K particles share x_T, and log Z = log E[exp(λ Σ x0) | x_T] of each prompt."""
    start = torch.randn(GROUPS, 3, 1, 1, generator=seeded(1))
    a, b, v = total_to_the_end(0)
    out = FKSteeringPipeline(chain(), TOTAL)(
        **{"num_particles": K, "lam": LAM, "eta": 1.0, "num_inference_steps": STEPS, "output_type": "pt"} | options,
        reward_prompt=[""] * GROUPS,
        chunk_size=GROUPS * K,
        latents=start.repeat_interleave(K, 0),
        generator=seeded(2),
    )
    return out, LAM * (a * start.sum((1, 2, 3)).double() + b) + LAM**2 * v / 2


@pytest.mark.parametrize("ess_threshold", [0.5, 1.0], ids=["adaptive", "scheduled"])
def test_with_the_exact_value_of_a_linear_reward_all_weights_are_equal(ess_threshold: float) -> None:
    """Guided by ∇V at the kernel's mean the proposal is the optimal one: no weight varies, and Ẑ has no variance."""
    out, log_z = runs_from_common_noise(value=exact_value, reward_guidance=1.0, ess_threshold=ess_threshold)
    assert [evaluation.step for evaluation in out.history] == [*range(STEPS - 1)]
    for evaluation in out.history:
        torch.testing.assert_close(evaluation.ess, torch.full_like(evaluation.ess, K), rtol=0, atol=1e-4)
    spread = out.log_weights.amax(1) - out.log_weights.amin(1)
    assert spread.max() < 1e-4 and (out.log_normaliser.double() - log_z).abs().max() < 1e-4


def test_without_guidance_the_same_estimates_vary_but_are_unbiased() -> None:
    out, log_z = runs_from_common_noise(value=exact_value, resample_steps=range(STEPS - 1), ess_threshold=1.0)
    ratio = (out.log_normaliser.double() - log_z).exp()
    assert ratio.std() > 0.05 and min(evaluation.ess.min().item() for evaluation in out.history) < K - 0.01
    assert abs(ratio.mean() - 1) <= 4 * ratio.std() / GROUPS**0.5


def wrong(solver_step: SolverStep, prompts: Sequence[str]) -> Tensor:
    """A value that is not the reward's, and not linear."""
    error = (solver_step.x + solver_step.x0().square()).flatten(1)[:, :2].sum(1)
    return exact_value(solver_step, prompts) + 0.08 * error


@pytest.mark.parametrize("options", [{}, {"resample_steps": [2, 5, 8], "potential": "max"}], ids=["all", "some"])
def test_the_law_is_exact_whatever_the_value(options: dict[str, Any]) -> None:
    outs = [*steered_gaussians(chain(), 4, value=wrong, reward_guidance=0.7, **options)]
    check_tilted(outs, *chain().distribution(10, 1.0))


def test_guidance_by_a_value_lowers_the_variance_of_the_estimate() -> None:
    """With a reward that bends, −(Σ x0 − a)², and its V = E[r | x_t] from the closed form."""

    def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return -((images.sum((1, 2, 3)) - 2.0) ** 2)

    def value(solver_step: SolverStep, prompts: Sequence[str]) -> Tensor:
        return -((exact_value(solver_step, prompts) - 2.0) ** 2) - total_to_the_end(solver_step.k)[2]

    def spread(**options: Any) -> float:
        outs = steered_gaussians(chain(), 4, reward, value=value, ess_threshold=1.0, **options)
        estimates = torch.cat([out.log_normaliser.double().exp() for out in outs])
        return (estimates.std() / estimates.mean()).item()

    assert spread(reward_guidance=1.0) < 0.7 * spread(resample_steps=range(STEPS - 1))


# Inside real pipelines


def guided_run(pipe: Any, name: str, value: Any, **options: Any) -> SteeringOutput:
    defaults = {"num_particles": K, "lam": 300.0, "reward_guidance": 1.0, "generator": seeded(3), "output_type": "pt"}
    return FKSteeringPipeline(pipe, redness)(**(defaults | steer_kwargs(name) | options), value=value)


def of_latents_and_x0(solver_step: SolverStep, prompts: Sequence[str]) -> Tensor:
    slope = torch.linspace(-1, 1, solver_step.x[0].numel()).view_as(solver_step.x[0])
    return ((solver_step.x.float() + solver_step.x0() ** 2) * slope).flatten(1).mean(1)


def test_gradients_are_those_of_the_value_at_the_kernels_mean(
    pipe_of: Callable[[str], Any], proposals: Leaning
) -> None:
    """Two prompts, resampled at every step, against finite differences in fp64 of V(m, x̂0(m)), written by hand."""
    pipe, prompts, guidance, lam = pipe_of("sd"), ["a red circle", "a blue star"], 0.7, 300.0
    options = {"prompt": prompts, "lam": lam, "reward_guidance": guidance, "ess_threshold": 1.0}
    out = guided_run(pipe, "sd", of_latents_and_x0, **options)
    assert [evaluation.step for evaluation in out.history] == [0, 1, 2, 3]
    assert any((ancestors != torch.arange(K)).any() for ancestors in out.ancestors)
    exact, scheduler = copy.deepcopy(pipe).to(torch.float64), copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(5)
    embeds, negative = exact.encode_prompt(prompts, "cpu", 1, True)

    def value(x: Tensor, timestep: int, pair: Tensor) -> Tensor:
        cumulative = pipe.scheduler.alphas_cumprod[timestep].double()
        unconditional, conditional = exact.unet(torch.cat([x, x]), timestep, pair, return_dict=False)[0].chunk(2)
        x0 = (x - (1 - cumulative).sqrt() * (unconditional + 3.0 * (conditional - unconditional))) / cumulative.sqrt()
        slope = torch.linspace(-1, 1, x[0].numel(), dtype=x.dtype).view_as(x[0])
        return ((x + x0**2) * slope).flatten(1).mean(1)

    for evaluation, kernel, gradient in zip(out.history, proposals.kernels, proposals.gradients, strict=True):
        timestep = int(scheduler.timesteps[evaluation.step + 1])
        for row in range(0, 2 * K, 3):
            mean = kernel.mean[row].double()
            pair = torch.stack([negative[row // K], embeds[row // K]]).repeat_interleave(mean.numel(), 0)
            by_hand = finite_differences(lambda x, t=timestep, e=pair: value(x, t, e), mean)
            expected = guidance * lam * by_hand
            torch.testing.assert_close(gradient[row].double(), expected, rtol=2e-3, atol=2e-3 * expected.abs().max())


@pytest.mark.few(3)
@pytest.mark.parametrize("name", PIPELINES)
def test_every_family_is_guided_without_decoding(pipe_of: Callable[[str], Any], name: str, proposals: Leaning) -> None:
    """The reward has no gradients: only the value needs them."""
    pipe = pipe_of(name)
    models = [model for model in pipe.components.values() if isinstance(model, torch.nn.Module)]
    asked = [parameter.requires_grad for model in models for parameter in model.parameters()]
    out = guided_run(pipe, name, of_latents_and_x0, num_particles=3, resample_steps=[0, 1])
    assert out.cost.decodes == 3 and out.cost.other_decodes == 0 and out.cost.gradients == 2 * 3
    assert all(gradient.flatten(1).norm(dim=1).min() > 0 for gradient in proposals.gradients)
    kept = [out.images, out.latents, out.rewards, out.log_weights, out.log_normaliser]
    assert not any(tensor.requires_grad for tensor in kept)
    assert [parameter.requires_grad for model in models for parameter in model.parameters()] == asked


@pytest.mark.few(3)
@pytest.mark.parametrize("scheduler", DIFFUSION)
def test_every_solver_is_guided(pipe_of: Callable[[str], Any], scheduler: str) -> None:
    """At the mean, the step after has the level, the number and the total of the run's own step."""
    steps: list[SolverStep] = []

    def value(solver_step: SolverStep, prompts: Sequence[str]) -> Tensor:
        steps.append(solver_step)
        return of_latents_and_x0(solver_step, prompts)

    pipe = with_scheduler(pipe_of("sd"), DIFFUSION[scheduler]())
    out = guided_run(pipe, "sd", value, num_particles=2)
    assert out.cost.gradients == 2 * len(out.history) > 0 and out.images.isfinite().all()
    for there, own in zip(steps[1::2], steps[2::2], strict=False):
        assert (there.k, there.total, float(there.t)) == (own.k, own.total, float(own.t))
        assert there.scheduler is own.scheduler
        assert step_levels(own.scheduler, own.t, own.index) == step_levels(there.scheduler, there.t, there.index)


def test_a_trained_value_guides_by_its_own_gradient(
    pipe_of: Callable[[str], Any], proposals: Leaning, tmp_path: Path
) -> None:
    """With respect to its features x_t and x̂0, not to its weights."""
    pipe, call = pipe_of("sd"), {n: one for n, one in steer_kwargs("sd").items() if n != "prompt"}
    config = ValueConfig(rollouts=16, updates=3, batch_size=8, width=8)
    trained = train_value(pipe, redness, ["a"], tmp_path, config, call)
    out = guided_run(pipe, "sd", str(tmp_path))
    assert out.cost.decodes == K and out.cost.gradients == K * len(out.history) > 0
    assert all(gradient.flatten(1).norm(dim=1).min() > 0 for gradient in proposals.gradients)
    assert not any(one.requires_grad for one in trained.net.parameters())


def test_dropped_particles_are_not_guided(pipe_of: Callable[[str], Any]) -> None:
    out = guided_run(pipe_of("sd"), "sd", of_latents_and_x0, particle_schedule={1: 2}, resample_steps=[0, 1, 2])
    assert out.rewards.shape == (1, 2) and out.cost.gradients == 4 + 4 + 2
    assert out.cost.nfe == (4 + 4 + 2 + 2 + 2) + (4 + 4 + 2)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda step, prompts: step.x.detach().sum((1, 2, 3)), "value has no gradients: use reward_guidance=0"),
        (lambda step, prompts: (step.x - step.x.detach()).abs().sqrt().sum((1, 2, 3)), "the gradient of value is not"),
    ],
)
def test_a_value_without_gradients_is_refused(pipe_of: Callable[[str], Any], value: Any, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        guided_run(pipe_of("sd"), "sd", value)


def test_without_noise_there_is_no_guidance(pipe_of: Callable[[str], Any]) -> None:
    with pytest.raises(InputError, match="guided steps need noise"):
        guided_run(pipe_of("sd"), "sd", of_latents_and_x0, eta=0.0)
