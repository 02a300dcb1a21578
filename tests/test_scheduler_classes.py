"""Every scheduler class of diffusers: levels, x̂0, kernel and law against closed forms and its own steps, or a refusal.

The independent truth of the steps is a point mass: under the exact denoiser of one image x0 every latent that a solver
makes is α x0 + σ ε, and every solver of ODEs stays at the same ε.
"""

import copy
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from diffusers import schedulers as library
from torch import Generator, Tensor

from steer.diffusion.kernels import fused_gaussian
from steer.diffusion.rehearsal import check_verified, transitions
from steer.diffusion.schedules import (
    FreshLevel,
    draws_fresh_noise,
    gaussian_transition,
    has_other_noise,
    is_flow,
    level,
    measure_level,
    predict_x0,
    step_levels,
    stepped_timesteps,
    x0_weights,
)
from steer.errors import InputError

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SHAPE = (2, 2, 4, 4)


def silent(timestep: float) -> int:
    """τ(t) of SASolver that draws no noise."""
    return 0


@dataclass(frozen=True)
class Case:
    """A scheduler in one setting. noise: of its own steps, 'none', 'kernel' (that of η = 1 or fresh), or 'other'."""

    name: str
    noise: str = "none"
    config: dict[str, Any] = field(default_factory=dict)
    steps: int = 6

    def __call__(self, steps: int | None = None) -> Any:
        scheduler = getattr(library, f"{self.name}Scheduler")(**self.config)
        shift = {"mu": 0.7} if self.config.get("use_dynamic_shifting") else {}
        scheduler.set_timesteps(steps or self.steps, **shift)
        return scheduler

    def __str__(self) -> str:
        config = {key: getattr(value, "__name__", value) for key, value in self.config.items() if key not in BETAS}
        return "-".join([self.name, *(f"{key}={value}" for key, value in config.items())])


V = {"prediction_type": "v_prediction"}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
CASES = [
    Case("DDIM", config=BETAS | {"clip_sample": False}),
    Case("DDIM", config=BETAS | V | ZERO_SNR | {"clip_sample": False}, steps=5),
    Case("DDIMParallel", config=BETAS | {"clip_sample": False}),
    Case("DDPM", "kernel", BETAS | {"clip_sample": False}),
    Case("DDPM", "other", BETAS | {"clip_sample": False, "variance_type": "fixed_large"}),
    Case("DDPMParallel", "kernel", BETAS | {"clip_sample": False}),
    Case("PNDM", config=BETAS | {"skip_prk_steps": True, "steps_offset": 1}),
    Case("PNDM", config=BETAS | V | {"skip_prk_steps": True, "set_alpha_to_one": True}),
    Case("PNDM", config=BETAS | {"skip_prk_steps": False}),
    Case("LCM", "kernel", BETAS),
    Case("LCM", "kernel", BETAS | V),
    Case("TCD", "other", BETAS | {"original_inference_steps": 250}),
    Case("EulerDiscrete", config=BETAS),
    Case("EulerDiscrete", config=BETAS | V | {"use_karras_sigmas": True}),
    Case("EulerAncestralDiscrete", "kernel", BETAS),
    Case("LMSDiscrete", config=BETAS),
    Case("HeunDiscrete", config=BETAS),
    Case("KDPM2Discrete", config=BETAS),
    Case("KDPM2AncestralDiscrete", "other", BETAS),
    Case("DPMSolverSDE", "other", BETAS | {"noise_sampler_seed": 0}),
    Case("DPMSolverMultistep", config=BETAS),
    Case("DPMSolverMultistep", "kernel", BETAS | {"algorithm_type": "sde-dpmsolver++", "solver_order": 1}),
    Case("DPMSolverMultistep", "other", BETAS | {"algorithm_type": "sde-dpmsolver++"}),
    Case("DPMSolverMultistep", config=FLOW),
    Case("DPMSolverSinglestep", config=BETAS),
    Case("DPMSolverSinglestep", config=FLOW),
    Case("UniPCMultistep", config=BETAS),
    Case("UniPCMultistep", config=FLOW),
    Case("DEISMultistep", config=BETAS),
    Case("DEISMultistep", config=FLOW),
    Case("SASolver", config=BETAS | {"tau_func": silent}),
    Case("SASolver", config=FLOW | {"tau_func": silent}),
    Case("SASolver", "other", BETAS),
    Case("EDMEuler"),
    Case("EDMEuler", config=V | {"sigma_data": 1.0, "sigma_schedule": "exponential", "final_sigmas_type": "sigma_min"}),
    Case("EDMDPMSolverMultistep"),
    Case("EDMDPMSolverMultistep", config=V),
    Case("EDMDPMSolverMultistep", "kernel", {"algorithm_type": "sde-dpmsolver++", "solver_order": 1}),
    Case("CosineDPMSolverMultistep", "other"),
    Case("CogVideoXDDIM", config=V | ZERO_SNR, steps=5),
    Case("CogVideoXDPM", "other", V | ZERO_SNR, steps=5),
    Case("CMStochasticIterative", "kernel", {"clip_denoised": False}),
    Case("ConsistencyDecoder", "kernel", steps=2),
    Case("SCM", "kernel", steps=2),
    Case("DDPMWuerstchen", "kernel"),
    Case("UnCLIP", "kernel", {"clip_sample": False}),
    Case("UnCLIP", "kernel", {"clip_sample": False, "prediction_type": "sample"}),
    Case("FlowMatchEulerDiscrete", config={"shift": 3.0}),
    Case("FlowMatchEulerDiscrete", config={"use_dynamic_shifting": True}),
    Case("FlowMatchEulerDiscrete", config={"invert_sigmas": True}),
    Case("FlowMatchEulerDiscrete", "kernel", {"stochastic_sampling": True}),
    Case("FlowMatchHeunDiscrete", config={"shift": 3.0}),
    Case("FlowMatchLCM", "kernel", {"shift": 3.0}),
    Case("FlowMapEulerDiscrete", config={"shift": 5.0}),
    Case("LTXEulerAncestralRF", "other"),
    Case("LTXEulerAncestralRF", config={"eta": 0.0}),
    Case("MiniMaxH3", config={"shift": 3.0}),
    Case("Helios", config={"stages": 1}),
]

TOKENS = "steps discrete tokens: there are no latents with a noise level to steer"
NO_STEP = r"has no step\(\): its pipeline samples by methods of its own"
# What is refused, and the reason: scheduler → (arguments, message).
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "Amused": ({"mask_token_id": 1}, TOKENS),
    "BlockRefinement": ({}, TOKENS),
    "DiscreteDDIM": ({}, TOKENS),
    "EntropyBound": ({}, TOKENS),
    "VQDiffusion": ({"num_vec_classes": 8}, TOKENS),
    "ScoreSdeVe": ({}, NO_STEP),
    "ScoreSdeVp": ({}, NO_STEP),
    "KarrasVe": ({}, "takes sample_hat, sigma_hat, sigma_prev in its step, which only its own pipeline can give"),
    "RePaint": ({}, "takes mask, original_image in its step"),
    "RFD4Proteina": (
        {"schedule_mode": "log", "noise_mode": "tan", "tsr_k": 1.0, "tsr_sigma": 1.0},
        "takes emit_mask in its step",
    ),
    "HeliosDMD": ({}, "takes dmd_noisy_tensor, dmd_sigmas, dmd_timesteps in its step"),
    "DDIMInverse": ({}, r"runs from data to noise \(an inversion\)"),
    "DPMSolverMultistepInverse": ({}, r"runs from data to noise \(an inversion\)"),
    "Piflow": ({}, r"could not sample a known image \(Piflow model output channels"),
    "IPNDM": ({}, "has no add_noise to measure its noise levels by"),
}

every = pytest.mark.parametrize("case", CASES, ids=str)


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def noise(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def timestep(scheduler: Any, k: int) -> Tensor:
    """Timestep k, one per row for Würstchen."""
    t = stepped_timesteps(scheduler)[k]
    return t.expand(SHAPE[0]) if hasattr(scheduler, "_alpha_cumprod") else t


def position(scheduler: Any, k: int) -> int:
    """The index that step hooks know: −1 for schedulers without one."""
    return k if hasattr(scheduler, "step_index") else -1


def first_calls(scheduler: Any) -> range:
    """The calls that begin a transition, of a scheduler without a Runge-Kutta warm-up."""
    return range(0, len(stepped_timesteps(scheduler)), getattr(scheduler, "order", 1))


def step(scheduler: Any, output: Tensor, k: int, x: Tensor, seed: int = 0) -> Any:
    """The scheduler's own step k from x, as if it were the first of a run."""
    twin, t = copy.deepcopy(scheduler), timestep(scheduler, k)
    if hasattr(twin, "_begin_index"):
        twin._begin_index = twin._step_index = k
    timesteps = stepped_timesteps(scheduler)
    given = {"old_pred_original_sample": None, "timestep_back": None, "generator": seeded(seed)}
    given |= {"prev_timestep": timesteps[k + 1] if k + 1 < len(timesteps) else None}
    given = {name: value for name, value in given.items() if name in inspect.signature(twin.step).parameters}
    if hasattr(twin, "scale_model_input"):
        twin.scale_model_input(x, t)
    return twin.step(model_output=output, timestep=t, sample=x, return_dict=True, **given)


# Which classes


def test_every_class_of_diffusers_is_tried_or_refused() -> None:
    classes = {name.removesuffix("Scheduler") for name in dir(library) if name.endswith("Scheduler")}
    assert {case.name for case in CASES} | set(REFUSED) == classes and not {case.name for case in CASES} & set(REFUSED)


@every
def test_the_rehearsal_accepts_it(case: Case) -> None:
    check_verified(case())


@pytest.mark.parametrize("name", REFUSED)
def test_the_others_are_refused_with_the_reason(name: str) -> None:
    arguments, message = REFUSED[name]
    with pytest.raises(InputError, match=f"{name}Scheduler {message}") as caught:
        check_verified(getattr(library, f"{name}Scheduler")(**arguments))
    assert "\n" not in str(caught.value) and "DDIM" not in str(caught.value).removeprefix(name)


class DoubledNoise(library.EulerDiscreteScheduler):  # type: ignore[misc]
    """Its steps are those of Euler, its noise is not."""

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return super().add_noise(original_samples, 2 * noise, timesteps)


class OtherX0(library.DDIMScheduler):  # type: ignore[misc]
    """Its model predicts −ε."""

    def step(self, model_output: Tensor, timestep: int, sample: Tensor, return_dict: bool = True) -> Any:
        return super().step(-model_output, timestep, sample, return_dict=return_dict)


class FlowBackwards(library.FlowMatchLCMScheduler):  # type: ignore[misc]
    """A flow whose velocity points to the data while its time runs to the noise; it returns no x̂0."""

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True) -> Any:
        return super().step(-model_output, timestep, sample, return_dict=return_dict)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (DoubledNoise(), "has other noise levels in its add_noise than in its steps.*DDIMScheduler.from_config"),
        (OtherX0(), "has another x̂0 than its noise levels and prediction type give.*DDIMScheduler.from_config"),
        (FlowBackwards(), "does not end at the image.*FlowMatchEulerDiscreteScheduler.from_config"),
        (library.FlowMatchEulerDiscreteScheduler(invert_sigmas=True, stochastic_sampling=True), "does not end at the"),
        (library.HeliosScheduler(), "changes the resolution of the latents between its stages"),
    ],
    ids=["levels", "x0", "velocity", "inverted noise", "stages"],
)
def test_a_scheduler_that_breaks_the_rules_is_refused(scheduler: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_verified(scheduler)


# Levels

# Closed forms of (α, σ) at step k, where diffusers has no add_noise, or one of another convention.
CLOSED: dict[str, Callable[[Any, int], tuple[float, float]]] = {
    "SCM": lambda s, k: (math.cos(s.timesteps[k]), 0.5 * math.sin(s.timesteps[k])),
    "ConsistencyDecoder": lambda s, k: (
        float(s.sqrt_alphas_cumprod[s.timesteps[k]]),
        float(s.sqrt_one_minus_alphas_cumprod[s.timesteps[k]]),
    ),
    "LTXEulerAncestralRF": lambda s, k: (1 - float(s.sigmas[k]), float(s.sigmas[k])),
    "Helios": lambda s, k: (1 - float(s.sigmas[k]), float(s.sigmas[k])),
    "SASolver-flow": lambda s, k: (1 - float(s.sigmas[k]), float(s.sigmas[k])),
    "inverted": lambda s, k: (float(s.sigmas[k]), 1 - float(s.sigmas[k])),
}


@every
def test_levels_are_those_of_the_closed_form_or_of_add_noise(case: Case) -> None:
    scheduler = case()
    closed = CLOSED.get("inverted" if case.config.get("invert_sigmas") else case.name)
    closed = CLOSED["SASolver-flow"] if case.name == "SASolver" and is_flow(scheduler) else closed
    for k in first_calls(scheduler):
        t = timestep(scheduler, k)
        expected = closed(scheduler, k) if closed else measure_level(scheduler, t, k)
        ours = level(scheduler, t, position(scheduler, k))
        assert ours.alpha == pytest.approx(float(expected[0]), abs=1e-6)
        assert float(ours.sigma) == pytest.approx(float(expected[1]), rel=1e-5, abs=1e-6)


# x̂0


@pytest.mark.parametrize("case", [case for case in CASES if case.config.get("skip_prk_steps") is not False], ids=str)
def test_x0_is_the_schedulers_own(case: Case) -> None:
    """Compared with pred_original_sample or denoised; without one, with the end of a last step without noise."""
    scheduler = case()
    last = first_calls(scheduler)[-1]
    for k in first_calls(scheduler):
        t, x, output = timestep(scheduler, k), noise(k), noise(k + 50)
        x0 = predict_x0(scheduler, output, t, x, position(scheduler, k), torch.float64)
        out = step(scheduler, output, k, x)
        own = out[1] if isinstance(out, tuple) else out.get("pred_original_sample", out.get("denoised"))
        after = step_levels(scheduler, t, position(scheduler, k))[1]
        if own is None and k == last and after.sigma < 1e-7 and case.name != "LMSDiscrete":
            own = out[0] / after.alpha
        if own is not None:
            torch.testing.assert_close(x0, own.double(), atol=2e-5 * max(1.0, float(x0.abs().max())), rtol=2e-5)


@pytest.mark.parametrize(
    "case",
    [
        Case("DDIM", config={"clip_sample": True}),
        Case("UnCLIP", config={"clip_sample": True, "clip_sample_range": 2.0}),
        Case("CogVideoXDDIM", config={"clip_sample": True}),  # never applied
        Case("DDIM", config={"thresholding": True}),
    ],
    ids=str,
)
def test_x0_is_clipped_as_the_scheduler_does(case: Case) -> None:
    scheduler = case()
    t, x, output = timestep(scheduler, 2), 3 * noise(0), noise(1)
    own = step(scheduler, output, 2, x).pred_original_sample
    torch.testing.assert_close(predict_x0(scheduler, output, t, x, -1, torch.float64), own, atol=1e-5, rtol=1e-5)


def test_x0_of_a_consistency_model_is_clipped() -> None:
    scheduler = Case("CMStochasticIterative")(1)
    x, output = noise(0), 5 * noise(1)
    own = step(scheduler, output, 0, x).prev_sample  # a run of one step ends at x̂0
    assert own.abs().max() == 1
    torch.testing.assert_close(predict_x0(scheduler, output, timestep(scheduler, 0), x, 0).double(), own)


# Kernels


def kernel(scheduler: Any, output: Tensor, k: int, x: Tensor, eta: float) -> Any:
    t, index = timestep(scheduler, k), position(scheduler, k)
    x0 = predict_x0(scheduler, output, t, x, index, torch.float64)
    return gaussian_transition(x, x0, *step_levels(scheduler, t, index), eta)


ONE_CALL = [case for case in CASES if getattr(getattr(library, f"{case.name}Scheduler"), "order", 1) == 1]
ONE_CALL = [case for case in ONE_CALL if case.config.get("skip_prk_steps") is not False]


@pytest.mark.parametrize("case", [case for case in ONE_CALL if case.noise == "none"], ids=str)
def test_the_kernel_without_noise_is_the_schedulers_own_first_order_step(case: Case) -> None:
    scheduler = case()
    for k in first_calls(scheduler)[: 1 if case.name == "LMSDiscrete" else None]:  # its order grows with the index
        x, output = noise(k), noise(k + 50)
        own, ours = step(scheduler, output, k, x)[0].double(), kernel(scheduler, output, k, x, 0.0)
        assert ours.std == 0
        torch.testing.assert_close(ours.mean, own, atol=5e-5 * max(1.0, float(own.abs().max())), rtol=5e-5)


@pytest.mark.parametrize("case", [case for case in ONE_CALL if case.noise == "kernel"], ids=str)
def test_the_kernel_with_noise_is_the_schedulers_own_step(case: Case) -> None:
    scheduler = case()
    assert not has_other_noise(scheduler)
    for k in first_calls(scheduler)[:-1]:
        x, output = noise(k).float(), noise(k + 50).float()  # the noise is then fp32 too
        own, ours = step(scheduler, output, k, x, seed=7)[0].double(), kernel(scheduler, output, k, x, 1.0)
        expected = ours.mean + ours.std * torch.randn(SHAPE, generator=seeded(7))
        scale = max(1.0, float(own.abs().max()))
        rounding = 3e-4 if case.name == "UnCLIP" else 5e-5  # 1 − ᾱ in fp32
        torch.testing.assert_close(expected, own, atol=rounding * scale, rtol=rounding)
        if draws_fresh_noise(scheduler):  # by hand: x_s ~ N(α_s x̂0, σ_s²)
            _, after = step_levels(scheduler, timestep(scheduler, k), position(scheduler, k))
            x0 = predict_x0(scheduler, output, timestep(scheduler, k), x, position(scheduler, k), torch.float64)
            assert isinstance(after, FreshLevel) and ours.std == after.sigma
            torch.testing.assert_close(ours.mean, after.alpha * x0)


# Not DDPM with too much noise, nor PNDM's extrapolation of v, which is not constant along the line.
MARGINAL = [case for case in CASES if case.config.get("variance_type") != "fixed_large"]
MARGINAL = [case for case in MARGINAL if not (case.name == "PNDM" and case.config.get("prediction_type"))]


@pytest.mark.parametrize("case", MARGINAL, ids=str)
def test_own_steps_from_a_point_mass_arrive_at_our_level(case: Case) -> None:
    """x_s = α_s x0 + σ_s ε after every transition of a whole run: the same ε for solvers of ODEs, else of unit size."""
    scheduler = case()
    image = torch.rand((4, 4, 16, 16), generator=seeded(1), dtype=torch.float64) - 0.5
    first = noise(3, image.shape)
    for t, index, _, x_s in transitions(scheduler, image, seeded(3)):
        after = step_levels(scheduler, t, index)[1]
        epsilon = x_s.double() - after.alpha * image
        if case.noise == "none":
            torch.testing.assert_close(
                epsilon, after.sigma * first, atol=2e-3 * max(1.0, float(after.sigma)), rtol=2e-3
            )
        elif after.sigma > 0.05:  # the mean square of 4096 normal draws: standard error 2.2 %
            assert float(epsilon.square().mean().sqrt() / after.sigma) == pytest.approx(1, abs=0.05)
            assert abs(float(epsilon.mean() / after.sigma)) < 4 / 64
        else:
            assert float(epsilon.abs().max()) < 0.3


@every
def test_the_fused_kernel_is_the_plain_one(case: Case) -> None:
    scheduler = case()
    k = first_calls(scheduler)[len(first_calls(scheduler)) // 2]
    t, index, x, output = timestep(scheduler, k), position(scheduler, k), noise(0), noise(1)
    levels = step_levels(scheduler, t, index)
    for eta in (0.0, 0.7):
        plain = kernel(scheduler, output, k, x, eta)
        fused = fused_gaussian(scheduler, x, output, *levels, eta)
        scale = max(1.0, float(plain.mean.abs().max()))
        torch.testing.assert_close(fused.mean.double(), plain.mean, atol=1e-5 * scale, rtol=1e-5)
        assert float(fused.std) == pytest.approx(float(plain.std), rel=1e-5)


def test_fresh_noise_has_an_exact_density_whatever_eta() -> None:
    scheduler = Case("LCM", config=BETAS)()
    x, output = noise(0), noise(1)
    given = kernel(scheduler, output, 1, x, 0.0)
    x_s = given.sample(seeded(2))
    normal = torch.distributions.Normal(given.mean, given.std.double())
    torch.testing.assert_close(given.log_prob(x_s), normal.log_prob(x_s).flatten(1).sum(1))


# The law

MEAN, STD = 0.3, 0.4


@every
def test_gaussian_data_sampled_by_the_kernel_has_its_mean_and_variance(case: Case) -> None:
    """20,000 draws from N(α m, α² s² + σ²), stepped by η = 1 under the exact denoiser of N(m, s²) data."""
    scheduler = case()
    x, rng = initial_draws(scheduler, 20_000), seeded(6)
    for k in transition_starts(scheduler):
        t = stepped_timesteps(scheduler)[k]
        t, index = (t[None] if hasattr(scheduler, "_alpha_cumprod") else t), position(scheduler, k)
        before, after = step_levels(scheduler, t, index)
        x0 = MEAN + gain(scheduler, *before) * (x - before.alpha * MEAN)
        a, b = x0_weights(scheduler, before)
        predicted = predict_x0(scheduler, (x0 - a * x) / b, t, x, index, torch.float64)
        torch.testing.assert_close(predicted, x0, atol=1e-6, rtol=1e-6)
        x = gaussian_transition(x, predicted, before, after, 1.0).sample(rng)
    mean, variance, _ = moments(scheduler)
    assert abs(float(x.mean()) - mean) < 4 * math.sqrt(variance / len(x))
    assert abs(float(x.var()) / variance - 1) < 4 * math.sqrt(2 / len(x))


@pytest.mark.few(8)
@every
def test_many_steps_of_the_kernel_arrive_at_the_data(case: Case) -> None:
    scheduler = case(None if draws_fresh_noise(case()) else 250)
    mean, variance, (alpha, sigma) = moments(scheduler)
    assert mean == pytest.approx(alpha * MEAN, abs=1e-4)
    if draws_fresh_noise(scheduler):  # exact at any number of steps
        assert math.sqrt(variance) == pytest.approx(math.hypot(alpha * STD, sigma), rel=1e-4)
    elif case.name == "CosineDPMSolverMultistep":  # its last step, from σ = 0.3 to 0, ends at E[x0 | x]
        assert math.sqrt(variance) == pytest.approx(STD**2 / math.hypot(STD, 0.3), rel=0.05)
    else:
        assert math.sqrt(variance) == pytest.approx(math.hypot(alpha * STD, sigma), rel=0.1)


def gain(scheduler: Any, alpha: Any, sigma: Any) -> float:
    """g of x̂0 = m + g (x − α m): E[x0 | x], for a consistency model the end of the ODE, which keeps the variance."""
    spread = float((alpha * STD) ** 2 + sigma**2)
    return STD / math.sqrt(spread) if draws_fresh_noise(scheduler) else float(alpha) * STD**2 / spread


def initial_draws(scheduler: Any, count: int) -> Tensor:
    alpha, sigma = map(float, level(scheduler, timestep(scheduler, 0), 0))
    return alpha * MEAN + math.hypot(alpha * STD, sigma) * noise(5, (count, 1, 1, 1))


def moments(scheduler: Any) -> tuple[float, float, tuple[float, float]]:
    """Mean and variance after a run of η = 1, by hand: every step is affine in x; and (α, σ) of its end.

    The DDPM posterior with ρ = α_t σ_s/(α_s σ_t): the noise kept is σ_s ρ, and τ² = σ_s² (1 − ρ²).
    """
    alpha, sigma = map(float, level(scheduler, timestep(scheduler, 0), 0))
    mean, variance = alpha * MEAN, (alpha * STD) ** 2 + sigma**2
    for k in transition_starts(scheduler):
        (alpha, sigma), (alpha_s, sigma_s) = (
            tuple(map(float, one)) for one in step_levels(scheduler, timestep(scheduler, k), position(scheduler, k))
        )
        rho = 0.0 if draws_fresh_noise(scheduler) else alpha * sigma_s / (alpha_s * sigma)
        g = gain(scheduler, alpha, sigma)
        slope = alpha_s * g + sigma_s * rho * (1 - alpha * g) / sigma
        mean = alpha_s * MEAN + slope * (mean - alpha * MEAN)
        variance = slope**2 * variance + sigma_s**2 * (1 - rho**2)
        alpha, sigma = alpha_s, sigma_s
    return mean, variance, (alpha, sigma)


def transition_starts(scheduler: Any) -> list[int]:
    if not hasattr(scheduler, "prk_timesteps"):
        return list(first_calls(scheduler))
    timesteps = stepped_timesteps(scheduler).tolist()  # each level of PNDM once
    warm_up = range(0, len(scheduler.prk_timesteps), 4)
    rest = range(len(scheduler.prk_timesteps), len(timesteps))
    return [*warm_up, *(k for k in rest if k == 0 or timesteps[k] != timesteps[k - 1])]


def test_a_flow_of_one_training_timestep_takes_the_levels_of_its_pipeline() -> None:
    """Stable Audio 3 and ACE-Step: timesteps are noise levels, of which the scheduler itself has one."""
    check_verified(library.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1))
