"""Steps that lean towards the reward: the proposal, its price, and the gradients inside tiny real pipelines."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PIPELINES, with_scheduler
from diffusers import DDIMInverseScheduler
from gaussian import GaussianPipeline
from schedulers import DIFFUSION
from test_fk import seeded, steer_kwargs
from test_preview import safety_checker_that_blackens_everything
from torch import Generator, Tensor
from transformers import CLIPImageProcessor

from steer import FKSteeringPipeline, SteeringOutput, StepReport
from steer.diffusion.schedules import Gaussian, draw_guided
from steer.errors import InputError, UnsupportedPipelineError
from steer.pipelines import fk_steering as guided
from steer.reward import RewardError
from steer.smc.particles import Particles

K = 3


class Redness:
    """Red minus blue: differentiable, and different from pixel to pixel."""

    name, differentiable = "redness", True

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        slope = torch.linspace(0.5, 1.5, images.shape[-1], dtype=images.dtype)
        return ((images[:, 0] - images[:, 2] ** 2) * slope).mean((1, 2))


@dataclass
class Near:
    """−½ ‖x − target‖², on images that are vectors."""

    target: float
    name: str = "near"
    differentiable: bool = True

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return -0.5 * ((images - self.target) ** 2).sum((1, 2, 3))


# The proposal


@pytest.mark.parametrize("std", [0.05, 0.7])
def test_the_price_is_the_difference_of_the_two_log_densities(std: float) -> None:
    generator = seeded()
    mean, gradient = (torch.randn(4, 3, 2, 2, generator=generator) for _ in range(2))
    kernel = Gaussian(mean, torch.tensor(std))
    x, log_ratio = draw_guided(kernel, gradient, generator)
    leaning = Gaussian(mean + std**2 * gradient, kernel.std)
    assert x.dtype == log_ratio.dtype == torch.float32 and log_ratio.shape == (4,)
    assert torch.allclose(log_ratio.double(), kernel.log_prob(x) - leaning.log_prob(x), atol=1e-3)


def test_a_guided_step_leans_by_tau_squared_times_the_gradient() -> None:
    kernel = Gaussian(torch.zeros(2, 1, 100, 100), torch.tensor(0.5))
    gradient = torch.stack([torch.full((1, 100, 100), slope) for slope in (3.0, -1.0)])
    x, _ = draw_guided(kernel, gradient, seeded())
    assert torch.allclose(x.mean((1, 2, 3)), 0.25 * torch.tensor([3.0, -1.0]), atol=4 * 0.5 / 100)
    assert torch.allclose(x.std((1, 2, 3)), torch.tensor(0.5), atol=0.02)
    assert torch.equal(draw_guided(kernel, torch.zeros_like(gradient), seeded())[0], kernel.sample(seeded()))


def test_the_price_is_fair() -> None:
    kernel = Gaussian(torch.zeros(100_000, 2), torch.tensor(0.5))
    _, log_ratio = draw_guided(kernel, torch.full((100_000, 2), 0.8), seeded())
    ratio = log_ratio.double().exp()
    assert abs(ratio.mean() - 1) <= 4 * ratio.std() / len(ratio) ** 0.5


def test_a_step_without_noise_owes_nothing() -> None:
    kernel = Gaussian(torch.randn(2, 3, generator=seeded()), torch.tensor(0.0))
    x, log_ratio = draw_guided(kernel, torch.ones(2, 3), seeded())
    assert torch.equal(x, kernel.mean) and (log_ratio == 0).all()


def test_the_price_is_no_potential() -> None:
    ratio = torch.tensor([[0.3, -2.0]])
    particles = Particles.start(1, 2).reweight(torch.tensor([[1.0, 2.0]])).correct(ratio)
    assert torch.equal(particles.log_weights, torch.tensor([[1.3, 0.0]]))
    assert torch.equal(particles.log_potentials, torch.tensor([[1.0, 2.0]]))


# The distribution, against closed forms


LAM, TARGET, STEPS, SIZE = 200.0, 0.62, 8, 4


def near_by_hand(mean: float, std: float) -> tuple[float, float, float]:
    """Z, mean and variance of N(mean, std² I) in 3 dimensions, tilted by exp(−½ λ ‖x − target‖²)."""
    shrink = 1 + LAM * std**2
    z = (shrink**-0.5 * math.exp(-LAM * (mean - TARGET) ** 2 / (2 * shrink))) ** 3
    return z, (mean + LAM * std**2 * TARGET) / shrink, std**2 / shrink


def steer_gaussians(guidance: float, seed: int, groups: int = 100, **options: Any) -> SteeringOutput:
    return FKSteeringPipeline(GaussianPipeline(mean=0.5, std=0.1), Near(TARGET))(
        reward_guidance=guidance,
        eta=1.0,
        reward_prompt=[""] * groups,
        chunk_size=SIZE * groups,
        generator=seeded(seed),
        output_type="pt",
        **{"num_particles": SIZE, "lam": LAM, "num_inference_steps": STEPS} | options,
    )


@pytest.mark.few(2)
@pytest.mark.parametrize("ess_threshold", [0.8, 1.0], ids=["adaptive", "scheduled"])
@pytest.mark.parametrize("potential", ["difference", "max"])
@pytest.mark.parametrize("guidance", [0.5, 1.0])
def test_a_guided_gaussian_is_the_tilted_gaussian(guidance: float, potential: str, ess_threshold: float) -> None:
    groups, batches = 400, 6
    z, mean, variance = near_by_hand(*GaussianPipeline(mean=0.5, std=0.1).distribution(STEPS, eta=1.0))
    estimates, firsts, seconds = [], [], []
    for seed in range(batches):
        steps = [2, 4, 5] if potential == "max" else None
        options = {"potential": potential, "ess_threshold": ess_threshold, "resample_steps": steps}
        out = steer_gaussians(guidance, seed, groups, **options)
        weights = out.log_weights.double().softmax(1)
        x = out.images.double().view(groups, SIZE, 3)
        estimates.append(out.log_normaliser.double().exp())
        firsts.append((weights * (x - mean).sum(2)).sum(1))
        seconds.append((weights * ((x - mean) ** 2 - variance).sum(2)).sum(1))
    estimate = torch.cat(estimates)
    assert estimate.std() / estimate.mean() < 1.5  # light tails: the standard error means something
    root = len(estimate) ** 0.5
    assert abs(estimate.mean() - z) <= 4 * estimate.std() / root
    for moment in (firsts, seconds):
        pooled = estimate * torch.cat(moment)
        assert abs(pooled.mean()) <= 4 * pooled.std() / root


def test_guidance_leaves_more_of_the_particles() -> None:
    """Without resampling: the ESS at the end is that of importance sampling with either proposal."""
    shares = [steer_gaussians(guidance, 0, 200, num_particles=8, ess_threshold=1e-6) for guidance in (0.0, 0.5, 1.0)]
    none, half, full = ((1 / (out.log_weights.softmax(1) ** 2).sum(1)).mean().item() for out in shares)
    assert none + 0.3 < half < full - 0.3


# The gradients, inside real pipelines


@dataclass
class Leaning:
    """Kernels that a guided run sampled from, and the gradients that shifted them."""

    kernels: list[Gaussian]
    gradients: list[Tensor]


@pytest.fixture
def proposals(monkeypatch: pytest.MonkeyPatch) -> Iterator[Leaning]:
    recorded = Leaning([], [])

    def record(kernel: Gaussian, gradient: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        recorded.kernels.append(kernel)
        recorded.gradients.append(gradient)
        return draw_guided(kernel, gradient, generator)

    monkeypatch.setattr(guided, "draw_guided", record)
    return recorded


def guided_run(pipe: Any, name: str, reward: Any = None, **options: Any) -> SteeringOutput:
    defaults = {"num_particles": K, "lam": 300.0, "reward_guidance": 1.0, "generator": seeded(3), "output_type": "pt"}
    return FKSteeringPipeline(pipe, reward or Redness())(**(defaults | steer_kwargs(name) | options))


def reward_by_hand(pipe: Any, x: Tensor, timestep: int, embeds: Tensor) -> Tensor:
    """r(x̂0(x)) of a Stable Diffusion with epsilon prediction and guidance 3, without any of this project's code."""
    cumulative = pipe.scheduler.alphas_cumprod[timestep].double()
    unconditional, conditional = pipe.unet(torch.cat([x, x]), timestep, embeds, return_dict=False)[0].chunk(2)
    epsilon = unconditional + 3.0 * (conditional - unconditional)
    x0 = (x - (1 - cumulative).sqrt() * epsilon) / cumulative.sqrt()
    images = pipe.vae.decode(x0 / pipe.vae.config.scaling_factor, return_dict=False)[0]
    return Redness()((images / 2 + 0.5).clamp(0, 1), [])


@torch.no_grad()
def finite_differences(reward: Callable[[Tensor], Tensor], x: Tensor, step: float = 1e-5) -> Tensor:
    """Central differences of a reward (M, …) → (M,) at one x (…), element by element."""
    nudges = step * torch.eye(x.numel(), dtype=x.dtype).view(-1, *x.shape)
    return ((reward(x + nudges) - reward(x - nudges)) / (2 * step)).view_as(x)


def test_gradients_are_each_particles_own_and_go_where_it_goes(
    pipe_of: Callable[[str], Any], proposals: Leaning
) -> None:
    """Two prompts, resampled at every step, against finite differences of a hand-written reward in fp64."""
    pipe, prompts, guidance, lam = pipe_of("sd"), ["a red circle", "a blue star"], 0.7, 3000.0
    latents: list[Tensor] = []

    def keep(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        latents.append(tensors["latents"].detach().clone())
        return tensors

    options = {"prompt": prompts, "lam": lam, "reward_guidance": guidance, "tempering": "geometric"}
    out = guided_run(pipe, "sd", ess_threshold=1.0, callback_on_step_end=keep, **options)
    exact, scheduler = copy.deepcopy(pipe).to(torch.float64), copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(5)
    embeds, negative = exact.encode_prompt(prompts, "cpu", 1, True)
    assert [evaluation.step for evaluation in out.history] == [1, 2, 3]
    assert any((ancestors != torch.arange(K)).any() for ancestors in out.ancestors)
    for evaluation, gradient in zip(out.history, proposals.gradients, strict=True):
        timestep, x = int(scheduler.timesteps[evaluation.step]), latents[evaluation.step - 1].double()
        for row in range(2 * K):
            prompt = row // K
            parent = prompt * K + int(evaluation.ancestors[prompt, row % K])
            pair = torch.stack([negative[prompt], embeds[prompt]]).repeat_interleave(2 * x[0].numel() // 2, 0)
            by_hand = finite_differences(lambda x, t=timestep, e=pair: reward_by_hand(exact, x, t, e), x[parent])
            expected = guidance * lam * (2 ** (evaluation.step / 5) - 1) * by_hand
            assert expected.abs().max() > 0.1
            torch.testing.assert_close(gradient[row].double(), expected, rtol=2e-3, atol=2e-3 * expected.abs().max())


@pytest.mark.few(2)
@pytest.mark.parametrize("name", PIPELINES)
def test_every_family_is_guided_and_left_as_it_was(
    pipe_of: Callable[[str], Any], name: str, proposals: Leaning
) -> None:
    reports: list[StepReport] = []
    pipe = pipe_of(name)
    models = [model for model in pipe.components.values() if isinstance(model, torch.nn.Module)]
    asked = [parameter.requires_grad for model in models for parameter in model.parameters()]
    before = dict(vars(pipe))
    out = guided_run(pipe, name, on_step=reports.append)
    again = guided_run(pipe, name)
    assert torch.equal(out.images, again.images) and torch.equal(out.log_weights, again.log_weights)
    steps = [evaluation.step for evaluation in out.history]
    assert steps == list(range(1, out.history[-1].step + 1)) and len(proposals.gradients) == 2 * len(steps)
    assert all(gradient.flatten(1).norm(dim=1).min() > 0 for gradient in proposals.gradients)
    assert out.cost.gradients == K * len(steps)
    kept = [out.images, out.latents, out.rewards, out.log_weights, out.log_normaliser]
    kept += [value for one in out.history for value in vars(one).values() if torch.is_tensor(value)]
    kept += [report.previews for report in reports if report.previews is not None]
    assert not any(tensor.requires_grad for tensor in kept)
    assert [parameter.requires_grad for model in models for parameter in model.parameters()] == asked
    assert all(parameter.grad is None for model in models for parameter in model.parameters())
    assert all(vars(pipe)[attribute] is value for attribute, value in before.items() if attribute in pipe.components)


@pytest.mark.few(4)
@pytest.mark.parametrize("scheduler", DIFFUSION)
def test_every_solver_is_guided(pipe_of: Callable[[str], Any], scheduler: str) -> None:
    pipe = with_scheduler(pipe_of("sd"), DIFFUSION[scheduler]())
    out = guided_run(pipe, "sd", num_particles=2)
    assert out.cost.gradients == 2 * len(out.history) > 0 and out.images.isfinite().all()


@pytest.mark.hard
def test_guidance_makes_better_images(pipe_of: Callable[[str], Any]) -> None:
    means = [
        guided_run(pipe_of("sd"), "sd", num_particles=16, reward_guidance=guidance, eta=1.0, ess_threshold=1e-6)
        .rewards.mean()
        .item()
        for guidance in (0.0, 0.5, 1.0)
    ]
    assert means[0] < means[1] < means[2]


def test_without_strength_the_images_are_those_of_the_kernel(pipe_of: Callable[[str], Any]) -> None:
    plain, still = (
        guided_run(pipe_of("flux"), "flux", lam=0.0, eta=1.0, reward_guidance=guidance) for guidance in (0.0, 1.0)
    )
    assert torch.allclose(plain.images, still.images, atol=1e-5)
    assert (still.log_weights == 0).all()


def test_half_precision_gradients_are_those_of_single_precision(
    pipe_of: Callable[[str], Any], proposals: Leaning
) -> None:
    """The reward is so weak that its gradients underflow in fp16."""

    class Weak(Redness):
        def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            return 1e-5 * super().__call__(images, prompts)

    pipe = pipe_of("sd")
    latents = torch.randn(K, 4, 4, 4, generator=seeded()).half().float()
    options = {"lam": 1.0, "resample_steps": [1]}
    guided_run(copy.deepcopy(pipe).to(torch.float16), "sd", Weak(), latents=latents.half(), **options)
    guided_run(pipe, "sd", Weak(), latents=latents, **options)
    half, single = proposals.gradients
    assert half.dtype == torch.float32 and (half - single).norm() < 0.05 * single.norm()


def test_the_safety_checker_sees_the_finished_images(pipe_of: Callable[[str], Any]) -> None:
    pipe = copy.copy(pipe_of("sd"))
    pipe.safety_checker = safety_checker_that_blackens_everything()
    pipe.feature_extractor = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    out = guided_run(pipe, "sd", num_particles=2)
    assert (out.images == 0).all() and (out.history[-1].rewards != 0).all()


def test_the_watermark_is_on_the_finished_images_only(pipe_of: Callable[[str], Any]) -> None:
    class Stamp:
        def apply_watermark(self, images: Tensor) -> Tensor:
            return torch.from_numpy(np.ones_like(images.numpy()))

    reports: list[StepReport] = []
    pipe = copy.copy(pipe_of("sdxl"))
    pipe.watermark = Stamp()
    out = guided_run(pipe, "sdxl", num_particles=2, on_step=reports.append)
    assert (out.images == 1).all()
    assert all((report.previews != 1).any() for report in reports if report.previews is not None)


def test_an_interrupted_run_still_returns_images(pipe_of: Callable[[str], Any]) -> None:
    def interrupt(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step >= 2
        return tensors

    out = guided_run(pipe_of("sd"), "sd", callback_on_step_end=interrupt, output_type="pil")
    assert len(out.images) == K and out.cost.nfe == 3 * K and not out.latents.requires_grad


# Refusals


@dataclass
class Broken:
    """A reward that keeps its word but for one thing."""

    score: Callable[[Tensor], Tensor]
    name: str = "broken"
    differentiable: bool = True

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.score(images)


def corner(images: Tensor) -> Tensor:
    """0, and its slope is 0 · ∞."""
    return ((images - images.detach()) ** 2).sum((1, 2, 3)).sqrt()


def elsewhere(images: Tensor) -> Tensor:
    """A graph that leads to the reward's own weights only."""
    return images.detach().mean((1, 2, 3)) * torch.ones(1, requires_grad=True)


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (corner, "the gradient of reward 'broken' is not finite at step 1"),
        (
            lambda images: images.detach().mean((1, 2, 3)),
            "reward 'broken' has no gradients: use reward_guidance=0",
        ),
        (elsewhere, "reward 'broken' has no gradients: use reward_guidance=0"),
    ],
)
def test_a_reward_without_gradients_ends_the_run_by_name(
    pipe_of: Callable[[str], Any], score: Callable[[Tensor], Tensor], message: str
) -> None:
    with pytest.raises(RewardError, match=message):
        guided_run(pipe_of("sd"), "sd", Broken(score))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eta": 0.0}, "eta must be above 0 and at most 1, got 0: guided steps need noise"),
        ({"eta": 1.5}, "eta must be from 0 to 1, got 1.5"),
        ({"reward_guidance": -1.0}, "reward_guidance must be at least 0 and finite, got -1.0"),
        ({"reward_guidance": math.nan}, "reward_guidance must be at least 0 and finite, got nan"),
        ({"reward_guidance": math.inf}, "reward_guidance must be at least 0 and finite, got inf"),
        (
            {"reward": Broken(lambda images: images, differentiable=False)},
            "'broken' is not differentiable: use",
        ),
        ({"resample_steps": [0, 1]}, "resample_steps: 0 is not from 1 to 3, in a run of 5 steps"),
        ({"num_inference_steps": 2}, "a run of 2 steps has none to resample at"),
    ],
)
def test_what_cannot_be_guided_is_refused(pipe_of: Callable[[str], Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        guided_run(pipe_of("sd"), "sd", **options)


def test_an_inversion_is_refused(pipe_of: Callable[[str], Any]) -> None:
    pipe = with_scheduler(pipe_of("sd"), DDIMInverseScheduler.from_config(pipe_of("sd").scheduler.config))
    with pytest.raises(InputError, match="DDIMInverseScheduler runs from data to noise"):
        guided_run(pipe, "sd", num_particles=1)


class Blind(GaussianPipeline):
    """A pipeline that gives away nothing with a graph."""

    def __call__(self, batch_size: int = 1, num_inference_steps: int = 5, generator: Any = None) -> Any:
        with torch.no_grad():
            return super().__call__(batch_size, num_inference_steps, generator)


def test_a_pipeline_that_lets_no_gradients_through_is_refused() -> None:
    with pytest.raises(UnsupportedPipelineError, match="Blind lets no gradients through: use reward_guidance=0"):
        FKSteeringPipeline(Blind(), Near(0.5))(reward_guidance=1.0)
