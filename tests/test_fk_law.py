"""The law that FK steering draws from, against closed forms of the chain that really runs, whatever the weights do."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from gaussian import TOTAL
from schedulers import BETAS, FLOW, build
from torch import Generator, Tensor

from steer import FKSteeringPipeline
from steer.apps.settings import SamplingConfig
from steer.diffusion.step_hooks import SolverStep
from steer.errors import InputError
from steer.pipelines.fk_steering import Run

MEAN, STD, GROUPS = 0.5, 0.1, 2000  # five standard deviations inside of what rewards clip to, 0 … 1
LAM = 3.0  # of the sum of three pixels: exp(λ r) has a relative standard deviation of about .5
SHARES = (0.4, 0.55, 0.7, 0.85)  # the default steps, as documented
SOLVERS = {
    "DDIM": lambda: build("DDIM", **BETAS, clip_sample=False, timestep_spacing="trailing"),
    "DDIM-clipped": lambda: build("DDIM", **BETAS, clip_sample_range=50.0, timestep_spacing="trailing"),
    "flow Euler": FLOW["FlowMatchEulerDiscrete"],
    "DPM++ 2M": lambda: build("DPMSolverMultistep", **BETAS, timestep_spacing="trailing"),
}


class AnyGaussian(DiffusionPipeline):
    """N(MEAN, STD² I), shaped (N, 3, 1, 1), from an exact denoiser under any scheduler with ε or flow prediction."""

    def __init__(self, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(scheduler=scheduler)
        self.set_progress_bar_config(disable=True)

    def level(self, t: Tensor) -> tuple[float, float]:
        """α and σ from what the scheduler was configured with."""
        if type(self.scheduler).__name__.startswith("FlowMatch"):
            return 1 - float(t) / 1000, float(t) / 1000
        cumulative = float(self.scheduler.alphas_cumprod[int(t)])
        return math.sqrt(cumulative), math.sqrt(1 - cumulative)

    def guess(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """E[x0 | x], and ε that goes with it."""
        alpha, sigma = self.level(t)
        x0 = MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x - alpha * MEAN)
        return x0, (x - alpha * x0) / sigma

    def predict(self, x: Tensor, t: Tensor) -> Tensor:
        x0, epsilon = self.guess(x, t)
        if self.scheduler.config.get("prediction_type") == "v_prediction":
            alpha, sigma = self.level(t)
            return alpha * epsilon - sigma * x0
        return epsilon - x0 if type(self.scheduler).__name__.startswith("FlowMatch") else epsilon

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int = 10,
        generator: Generator | None = None,
        eta: float = 0.0,
        latents: Tensor | None = None,
        output_type: str = "pt",
    ) -> ImagePipelineOutput:
        x = randn_tensor((batch_size, 3, 1, 1), generator=generator) if latents is None else latents
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            own = {"eta": eta, "generator": generator} if isinstance(self.scheduler, DDIMScheduler) else {}
            own |= {"generator": generator} if isinstance(self.scheduler, DDPMScheduler) else {}
            x = self.scheduler.step(self.predict(x, t), t, x, **own).prev_sample
        return ImagePipelineOutput(images=x)


def law(pipe: AnyGaussian, steps: int, noisy: set[int]) -> tuple[float, float]:
    """Mean and variance of x0 when diffusers' solver makes the run and the steps in `noisy` are DDPM's posterior.

    The chain is affine in the starting noise and in the noise of its steps: a basis of both, run once by hand.
    """
    scheduler, sample_particles = pipe.scheduler, sorted(noisy)
    x = torch.zeros(2 + len(sample_particles), 1, 1, 1, dtype=torch.float64)
    x[1] = 1
    scheduler.set_timesteps(steps)
    for k, t in enumerate(scheduler.timesteps):
        following = scheduler.step(pipe.predict(x, t), t, x).prev_sample.double()
        if k in noisy:
            x0, epsilon = pipe.guess(x, t)
            (alpha_t, sigma_t), (alpha_s, sigma_s) = pipe.level(t), pipe.level(scheduler.timesteps[k + 1])
            tau = sigma_s / sigma_t * math.sqrt(sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2)
            following = alpha_s * x0 + math.sqrt(sigma_s**2 - tau**2) * epsilon
            following[2 + sample_particles.index(k)] += tau
        x = following
    x = x.flatten()
    return x[0].item(), (x[1:] - x[0]).square().sum().item()


@dataclass
class Estimate:
    """E[Ẑ] / Z over groups, and its standard error."""

    ratio: float
    error: float


def estimate(pipe: AnyGaussian, steps: int, size: int, groups: int = GROUPS, **options: Any) -> Estimate:
    later = 1 if options.get("asynchronous_rewards") else 0
    mean, variance = law(pipe, steps, {round(share * steps) + later for share in SHARES} if LAM else set())
    truth = math.exp(3 * (LAM * mean + LAM**2 * variance / 2))
    out = FKSteeringPipeline(pipe, TOTAL)(
        num_particles=size,
        reward_prompt=[""] * groups,
        lam=LAM,
        chunk_size=groups * size,
        num_inference_steps=steps,
        generator=Generator().manual_seed(steps * size),
        output_type="pt",
        **options,
    )
    z = out.log_normaliser.double().exp() / truth
    assert z.std() < 0.7  # light tails: the standard error means something
    return Estimate(z.mean().item(), z.std().item() / groups**0.5)


@pytest.mark.few(4)
@pytest.mark.parametrize("threshold", [0.9, 1.0], ids=["adaptive", "scheduled"])
@pytest.mark.parametrize("steps", [10, 20, 40])
@pytest.mark.parametrize("size", [4, 32])
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_default_law_holds_whatever_the_weights_do(solver: str, size: int, steps: int, threshold: float) -> None:
    """Adaptive: some groups resample at a step and others do not; all of them are noisy there."""
    result = estimate(AnyGaussian(SOLVERS[solver]()), steps, size, ess_threshold=threshold)
    assert abs(result.ratio - 1) <= 3 * result.error


@pytest.mark.parametrize("asynchronous_rewards", [False, True])
def test_asynchronous_rewards_put_the_noise_a_step_later(asynchronous_rewards: bool) -> None:
    result = estimate(
        AnyGaussian(SOLVERS["DDIM"]()), 20, 8, ess_threshold=1.0, asynchronous_rewards=asynchronous_rewards
    )
    assert abs(result.ratio - 1) <= 3 * result.error


def final_latents(lam: float, rewards: Any, **options: Any) -> Tensor:
    out = FKSteeringPipeline(AnyGaussian(SOLVERS["DPM++ 2M"]()), rewards)(
        num_particles=4,
        reward_prompt=["", ""],
        lam=lam,
        num_inference_steps=10,
        generator=Generator().manual_seed(0),
        output_type="pt",
        **options,
    )
    return out.in_slot_order().latents


def test_weights_that_resample_nobody_leave_the_same_steps_noisy() -> None:
    """A particle that is kept does not depend on the value of λ > 0 or on other prompts; λ = 0 is the plain batch."""
    weak, weaker = (final_latents(lam, TOTAL, ess_threshold=0.01) for lam in (1.0, 1e-3))
    assert torch.equal(weak, weaker) and not torch.allclose(weak, final_latents(0.0, TOTAL), atol=1e-3)
    scheduler = SOLVERS["DPM++ 2M"]()
    plain = AnyGaussian(scheduler)(batch_size=8, generator=Generator().manual_seed(0)).images
    assert torch.equal(final_latents(0.0, TOTAL), plain)


# One kernel in a run


@pytest.mark.parametrize("size", [4, 32])
def test_ddpm_with_a_large_variance_keeps_its_own_noise(size: int) -> None:
    """Its variance is β̃_t = 1 − ᾱ_t/ᾱ_s at every step but the last, which draws nothing."""
    pipe = AnyGaussian(build("DDPM", **BETAS, clip_sample=False, variance_type="fixed_large"))
    steps, lam, groups = 10, 4.0, 2000
    pipe.scheduler.set_timesteps(steps)
    mean, variance = 0.0, 1.0
    timesteps = pipe.scheduler.timesteps
    for k, t in enumerate(timesteps):
        end = k + 1 == steps
        before = float(pipe.scheduler.alphas_cumprod[t])
        after = 1.0 if end else float(pipe.scheduler.alphas_cumprod[timesteps[k + 1]])
        ratio = before / after
        x0 = [pipe.guess(torch.tensor(x), t)[0].item() for x in (0.0, 1.0)]
        of_x0, of_x = math.sqrt(after) * (1 - ratio) / (1 - before), math.sqrt(ratio) * (1 - after) / (1 - before)
        shift, slope = of_x0 * x0[0], of_x0 * (x0[1] - x0[0]) + of_x
        mean, variance = shift + slope * mean, slope**2 * variance + (0 if end else 1 - ratio)
    x = torch.linspace(-8, 8, 100_001, dtype=torch.float64)
    pixels = (mean + math.sqrt(variance) * x).clamp(0, 1)  # which rewards see
    truth = torch.trapezoid((lam * pixels - x**2 / 2).exp() / math.sqrt(2 * math.pi), x).item() ** 3
    out = FKSteeringPipeline(pipe, TOTAL)(
        num_particles=size,
        reward_prompt=[""] * groups,
        lam=lam,
        chunk_size=groups * size,
        ess_threshold=1.0,
        num_inference_steps=steps,
        generator=Generator().manual_seed(1),
        output_type="pt",
    )
    z = out.log_normaliser.double().exp() / truth
    assert abs(z.mean() - 1) <= 3 * z.std() / groups**0.5


ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}


@pytest.mark.parametrize("steps", [10, 20, 25])
@pytest.mark.parametrize(
    "config", [{"clip_sample": True}, {"thresholding": True}, ZERO_SNR], ids=["clipped", "thresholded", "zero-SNR"]
)
def test_eta_makes_every_step_of_ddim_the_same_kernel(
    monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], steps: int
) -> None:
    """All steps are draws from the kernel whose density finetuning takes, with or without resampling."""
    monkeypatch.setitem(globals(), "MEAN", 0.5 if config is ZERO_SNR else 1.5)  # beyond what x̂0 is clipped to
    scores: list[Tensor] = []
    moved = Run._next_latents

    def recorded(run: Run, solver_step: SolverStep, rows: Tensor | None, intermediate: Any) -> Tensor | None:
        result, kernel = moved(run, solver_step, rows, intermediate), solver_step.kernel(1.0, rows)
        if kernel.std > 0:
            following = result if result is not None else solver_step.prev if rows is None else solver_step.prev[rows]
            scores.append((following - kernel.mean) / kernel.std)
        return result

    monkeypatch.setattr(Run, "_next_latents", recorded)
    scheduler = build("DDIM", **BETAS, **{"clip_sample": False} | config)
    out = FKSteeringPipeline(AnyGaussian(scheduler), TOTAL)(
        num_particles=4,
        reward_prompt=[""] * 100,
        lam=LAM,
        eta=1.0,
        ess_threshold=1.0,
        num_inference_steps=steps,
        generator=Generator().manual_seed(0),
        output_type="pt",
    )
    assert out.images.isfinite().all() and len(scores) == steps - 1
    for score in scores:
        assert abs(score.mean()) <= 5 / score.numel() ** 0.5
        assert abs(score.var() - 1) <= 5 * (2 / score.numel()) ** 0.5


# What stands first


SETTINGS: dict[str, Any] = {
    **{"model": "scenes", "method": "fk", "reward": "scene-soft", "particles": 4, "steps": 5, "guidance": None},
    **{"lam": 10.0, "potential": "difference", "resampler": "systematic", "tempering": "constant"},
    **{"ess_threshold": 0.5, "eta": None, "seed": 0, "compare": False, "dtype": None},
}


def sample_particles(draw: str, groups: int = 2000, **options: Any) -> Any:
    return FKSteeringPipeline(AnyGaussian(SOLVERS["DDIM"]()), TOTAL)(
        num_particles=4,
        reward_prompt=[""] * groups,
        lam=10.0,
        ess_threshold=1e-6,
        chunk_size=4 * groups,
        num_inference_steps=10,
        generator=Generator().manual_seed(0),
        output_type="pt",
        draw=draw,
        **options,
    )


def test_the_first_image_is_the_best_or_one_draw_by_the_weights() -> None:
    best, weighted, again = sample_particles("best"), sample_particles("weighted"), sample_particles("weighted")
    assert (best.rewards.diff(dim=1) <= 0).all() and (weighted.rewards[:, 1:].diff(dim=1) <= 0).all()
    assert torch.equal(weighted.images, again.images) and torch.equal(weighted.order[:, 0], again.order[:, 0])
    assert torch.equal(weighted.in_slot_order().images, best.in_slot_order().images)
    torch.testing.assert_close(weighted.images.sum((1, 2, 3)).view_as(weighted.rewards), weighted.rewards)
    expected = best.log_weights.double().softmax(1)
    places = (weighted.rewards[:, :1] == best.rewards).double()
    error = (expected * (1 - expected)).sum(0).sqrt()
    assert ((places - expected).sum(0).abs() <= 4 * error).all()


@pytest.mark.parametrize(
    "options", [{"target_reward": 9.0}, {"particle_schedule": {4: 2}, "particle_schedule_rule": "top_k"}]
)
def test_a_search_has_no_weights_to_draw_by(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="leave no weights: use draw='best'"):
        sample_particles("weighted", groups=1, **options)
    with pytest.raises(InputError, match="unknown draw 'weigthed': did you mean weighted"):
        sample_particles("weigthed", groups=1)


@pytest.mark.parametrize(
    "options",
    [{"method": "svdd"}, {"target_reward": 9.0}, {"particle_schedule": "4:2", "particle_schedule_rule": "top_k"}],
)
def test_the_command_refuses_a_draw_without_weights(options: dict[str, Any]) -> None:
    SamplingConfig.of(**SETTINGS | {"draw": "weighted"})
    with pytest.raises(InputError, match=r"leave no weights: use draw='best'|draw is an option of fk, not of svdd"):
        given = {"draw": "weighted"} if options.get("method") == "svdd" else SETTINGS | {"draw": "weighted"}
        SamplingConfig.of(**given | options)
    with pytest.raises(InputError, match="unknown draw 'heaviest'"):
        SamplingConfig.of(**SETTINGS | {"draw": "heaviest"})
