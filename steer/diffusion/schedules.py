"""Noise levels, x̂0 and transitions of diffusers' schedulers, in the scaling of the latents that its `step` receives.

One forward marginal for all of them: x_t = α_t x0 + σ_t ε.
"""

import copy
import inspect
import math
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Generator, Tensor

from steer.diffusion.precision import widest
from steer.errors import InputError

Scheduler = Any  # diffusers' schedulers share no base class that has `step`


class Level(NamedTuple):
    """α and σ of x = α x0 + σ ε: float64 scalars."""

    alpha: Tensor
    sigma: Tensor


class FreshLevel(Level):
    """The level after a transition whose noise is all newly drawn: x_s ~ N(α_s x̂0, σ_s² I), whatever η."""

    __slots__ = ()


def descends_from(scheduler: Scheduler, names: Set[str]) -> bool:
    """Return whether a scheduler is an instance of one of these diffusers classes or of a subclass."""
    return any(cls.__name__ in names for cls in type(scheduler).__mro__)


def is_flow(scheduler: Scheduler) -> bool:
    """Return whether a scheduler interpolates x = (1 − σ) x0 + σ ε and its denoiser predicts a velocity.

    Flow schedulers of diffusers declare it in their configuration, or have `sigmas` without an `add_noise`.
    """
    says = scheduler.config.get("use_flow_sigmas") or scheduler.config.get("prediction_type") == "flow_prediction"
    return bool(says) or (hasattr(scheduler, "sigmas") and not hasattr(scheduler, "add_noise"))


def prediction_type(scheduler: Scheduler) -> str:
    """Return the denoiser's prediction type, a key of X0_WEIGHTS if known.

    Where time runs from noise to data (`invert_sigmas`, MiniMax H3), the velocity points to the data too.
    """
    if is_flow(scheduler):
        times = torch.as_tensor(scheduler.timesteps)
        return "reverse_flow_prediction" if times[0] == 0 or times[0] < times[-1] else "flow_prediction"
    return str(scheduler.config.get("prediction_type", "epsilon"))


def level(scheduler: Scheduler, timestep: Any, index: int) -> Level:
    """Return α and σ at a timestep, or at an index of `scheduler.sigmas` where the scheduler has them.

    A negative timestep means the end of the run.
    """
    if getattr(scheduler, "sigmas", None) is not None:
        alpha, sigma = _level_at_sigma(scheduler, torch.as_tensor(scheduler.sigmas[index]))
    elif hasattr(scheduler, "alphas_cumprod") or hasattr(scheduler, "sqrt_alphas_cumprod"):
        cumulative = _cumulative_alpha(scheduler, int(first_of(timestep)))
        return Level(cumulative.sqrt(), (1 - cumulative).sqrt())
    elif prediction_type(scheduler) == "trigflow":
        angle = torch.as_tensor(scheduler.timesteps[index]).cpu().double()
        alpha, sigma = angle.cos(), angle.sin() * scheduler.config.sigma_data
    else:
        alpha, sigma = measure_level(scheduler, timestep, index)
    return Level(alpha.cpu().double(), sigma.cpu().double())  # not every device has float64


def _level_at_sigma(scheduler: Scheduler, sigma: Tensor) -> tuple[Tensor, Tensor]:
    if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
        alpha, sigma = map(torch.as_tensor, scheduler._sigma_to_alpha_sigma_t(sigma))
        return alpha, sigma
    if not is_flow(scheduler):
        return torch.ones_like(sigma), sigma
    inverted = scheduler.sigmas[0] < scheduler.sigmas[-1]  # `sigmas` then holds α
    return (sigma, 1 - sigma) if inverted else (1 - sigma, sigma)


def _cumulative_alpha(scheduler: Scheduler, timestep: int) -> Tensor:
    if timestep < 0:
        cumulative = torch.as_tensor(getattr(scheduler, "final_alpha_cumprod", 1.0))
    elif hasattr(scheduler, "alphas_cumprod"):
        cumulative = scheduler.alphas_cumprod[timestep]
    else:  # ConsistencyDecoder
        return scheduler.sqrt_alphas_cumprod[timestep].cpu().double() ** 2
    return cumulative.cpu().double()


def measure_level(scheduler: Scheduler, timestep: Any, index: int) -> Level:
    """Measure α and σ by the scheduler's own `add_noise` or `scale_noise` on ones and zeros.

    index  index of the timestep, set in a copy of schedulers that look up their level by it

    Raises InputError for a scheduler with neither method.
    """
    if not (hasattr(scheduler, "add_noise") or hasattr(scheduler, "scale_noise")):
        raise InputError(f"{type(scheduler).__name__} has no add_noise to measure its noise levels by")
    at = copy.copy(scheduler)
    if hasattr(at, "_step_index"):
        at._step_index = at._begin_index = index
    one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    times = torch.as_tensor(timestep).cpu().reshape(-1)[:1]
    if hasattr(at, "scale_noise"):
        alpha, sigma = at.scale_noise(one, times, zero), at.scale_noise(zero, times, one)
    else:
        alpha, sigma = at.add_noise(one, zero, times), at.add_noise(zero, one, times)
    return Level(alpha.reshape(()).double(), sigma.reshape(()).double())


def first_of(timestep: Any) -> float:
    """Return a timestep as a number: some pipelines pass one per row, all equal."""
    return float(torch.as_tensor(timestep).reshape(-1)[0])


def predict_x0(
    scheduler: Scheduler,
    model_output: Tensor,
    timestep: Any,
    sample: Tensor,
    index: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return x̂0 (in `dtype`, shaped like `sample`) from the denoiser's output, clipped as by the scheduler.

    Raises InputError for an unknown prediction type.
    """
    output, x = model_output.to(dtype), sample.to(dtype)
    before = level(scheduler, timestep, index)
    if output.shape[1] == 2 * x.shape[1]:  # a learned variance
        output = output[:, : x.shape[1]]
    if not _has_own_weights(scheduler) and prediction_type(scheduler) == "epsilon":
        alpha, sigma = (value.to(x) for value in before)
        return _clip(scheduler, (x - sigma * output) / alpha)
    a, b = (value.to(x) for value in x0_weights(scheduler, before))
    return _clip(scheduler, a * x + b * output)


def _has_own_weights(scheduler: Scheduler) -> bool:
    return any(hasattr(scheduler, name) for name in ("precondition_outputs", CONSISTENCY_WEIGHTS, "c_skip"))


def x0_weights(scheduler: Scheduler, before: Level) -> tuple[Tensor, Tensor]:
    """Return (a, b) of x̂0 = a x_t + b o for a model output o at a level, before any clipping.

    Where a scheduler has its own weights (EDM preconditioning, the boundary condition of consistency models), they are
    measured by calling the scheduler on ones and zeros. Raises InputError for an unknown prediction type.
    """
    alpha, sigma = before
    one, zero, kind = torch.ones_like(sigma), torch.zeros_like(sigma), prediction_type(scheduler)
    if hasattr(scheduler, "precondition_outputs") and kind in ("epsilon", "v_prediction"):
        return scheduler.precondition_outputs(one, zero, sigma), scheduler.precondition_outputs(zero, one, sigma)
    if hasattr(scheduler, CONSISTENCY_WEIGHTS):
        skip, out = getattr(scheduler, CONSISTENCY_WEIGHTS)(sigma)
        return skip, out
    if hasattr(scheduler, "c_skip"):  # ConsistencyDecoder: at the step with this α
        at = (scheduler.sqrt_alphas_cumprod.cpu().double() - alpha).abs().argmin()
        return scheduler.c_skip[at].cpu().double(), scheduler.c_out[at].cpu().double()
    if kind == "trigflow":  # x = cos t x0 + sin t z with z of standard deviation σ_data (arXiv 2410.11081, eq. 4)
        return alpha, -sigma / scheduler.config.sigma_data
    if hasattr(scheduler, "precondition_outputs") or kind not in X0_WEIGHTS:
        raise InputError(f"{type(scheduler).__name__}: no rule for x̂0 from prediction_type {kind!r}: use epsilon")
    return X0_WEIGHTS[kind](alpha, sigma)


CONSISTENCY_WEIGHTS = "get_scalings_for_boundary_condition"


def _clip(scheduler: Scheduler, x0: Tensor) -> Tensor:
    if scheduler.config.get("thresholding"):
        return scheduler._threshold_sample(x0)
    limit = clip_limit(scheduler)
    return x0.clamp(-limit, limit) if limit < math.inf else x0


def clip_limit(scheduler: Scheduler) -> float:
    """Return the bound on |x̂0| in the scheduler's configuration, infinite where there is none."""
    if scheduler.config.get("clip_denoised"):  # consistency models
        return 1.0
    clips = scheduler.config.get("clip_sample") and not descends_from(scheduler, _NEVER_CLIP)
    return float(scheduler.config.clip_sample_range) if clips else math.inf


# Schedulers that have `clip_sample` in their configuration and never apply it.
_NEVER_CLIP = {"TCDScheduler", "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"}


def mid_transition(scheduler: Scheduler) -> bool:
    """Return whether a transition needs further model calls (Heun, KDPM2, DPMSolverSDE, PNDM's warm-up)."""
    if hasattr(scheduler, "state_in_first_order"):
        return not scheduler.state_in_first_order and scheduler.step_index < len(scheduler.timesteps)
    if not hasattr(scheduler, "prk_timesteps"):
        return False
    if not scheduler.config.skip_prk_steps and scheduler.counter <= len(scheduler.prk_timesteps):
        return scheduler.counter % 4 != 0
    return scheduler.counter == 1 and len(scheduler.timesteps) > 1


def total_transitions(scheduler: Scheduler, first: Any, latest: Any) -> int:
    """Return the number of transitions of a run, known after its first one with calls at `first` to `latest`."""
    timesteps = stepped_timesteps(scheduler).tolist()
    first, latest = first_of(first), first_of(latest)
    if hasattr(scheduler, "prk_timesteps"):
        if warm_up := len(scheduler.prk_timesteps):  # four calls each, and then one
            return warm_up // 4 + len(timesteps) - warm_up
        # One timestep occurs twice. An image-to-image run may start at either occurrence, or after both, and the
        # scheduler takes two calls for its first transition in any case.
        again = first == latest and timesteps.count(first) > 1
        return len(timesteps) - timesteps.index(latest) - again
    begin = getattr(scheduler, "begin_index", None)
    rest = len(timesteps) - (timesteps.index(first) if begin is None else begin)
    return (rest + 1) // 2 if getattr(scheduler, "order", 1) == 2 else rest


def stepped_timesteps(scheduler: Scheduler) -> Tensor:
    """Return the timesteps at which a run steps, without a last one that only marks the end (SCM, Würstchen, LTX)."""
    timesteps = torch.as_tensor(scheduler.timesteps)
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None:
        marks_end = len(sigmas) == len(timesteps)
    else:
        marks_end = not (hasattr(scheduler, "alphas_cumprod") or hasattr(scheduler, "sqrt_alphas_cumprod"))
    return timesteps[:-1] if marks_end else timesteps


@dataclass(frozen=True)
class Gaussian:
    """N(mean, std² I): mean (N, …) fp32 or fp64; std a scalar tensor, 0 where the step is deterministic."""

    mean: Tensor
    std: Tensor

    def sample(self, generator: torch.Generator | None) -> Tensor:
        """Draw a sample shaped like the mean."""
        return self.mean + self.std * self.noise(generator)

    def noise(self, generator: torch.Generator | None) -> Tensor:
        """Draw standard normal noise shaped like the mean, on the generator's own device."""
        device = generator.device if generator else self.mean.device
        return torch.randn(self.mean.shape, generator=generator, device=device).to(self.mean.device)

    def log_prob(self, x: Tensor) -> Tensor:
        """Return log N(x; mean, std² I) in nats (N,), summed in fp64 over the elements of a sample.

        Raises InputError where std = 0: a deterministic step has no density.
        """
        if not self.std > 0:
            raise InputError("this step is deterministic (τ = 0): it has no log-probability. Use η > 0")
        dtype = widest(self.mean.device)
        std = self.std.to(dtype)
        z = (x.to(dtype) - self.mean.to(dtype)) / std
        return (-0.5 * z**2 - std.log() - 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)

    def draw(self, noise: Tensor, dtype: torch.dtype, storage: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the sample x_s (N, …) of given standard normal `noise`, and log p(x_s) in nats (N,).

        x_s has `dtype` and is rounded through `storage` before its density is evaluated. Raises InputError for std = 0.
        """
        x_s = (self.mean + self.std * noise).to(dtype).to(storage).to(dtype)
        return x_s, self.log_prob(x_s)

    @property
    def scale(self) -> Tensor:
        """τ, which a stored reference keeps beside the `statistics` of a step."""
        return self.std

    def statistics(self, x_s: Tensor) -> Tensor:
        """Return (μ − x_s)/τ (N, …): standard normal numbers, which lose less precision in a short dtype than means."""
        return (self.mean - x_s) / self.std

    def from_statistics(self, statistics: Tensor, scale: Tensor, x_s: Tensor) -> "Gaussian":
        """Return the kernel of another policy at the same step from its `statistics` and `scale`."""
        dtype = widest(x_s.device)
        std = scale.to(x_s.device, dtype)
        return Gaussian(x_s.to(dtype) + std * statistics.to(x_s.device, dtype), std)

    def kl(self, other: "Gaussian") -> Tensor:
        """Return KL(self ‖ other) in nats (N,), summed in fp64, for two steps of equal τ: ‖μ − μ'‖² / 2τ²."""
        dtype = widest(self.mean.device)
        if not (self.std > 0 and torch.isclose(self.std, other.std.to(self.std))):
            raise InputError(f"KL in closed form needs two steps of one τ > 0, got {self.std:g} and {other.std:g}")
        difference = (self.mean.to(dtype) - other.mean.to(dtype)) / self.std.to(dtype)
        return (difference**2).flatten(1).sum(1) / 2


Dynamics = Literal["ddim", "flow-sde", "dance", "cps"]
DYNAMICS: tuple[Dynamics, ...] = get_args(Dynamics)
# η of DDPM; a of Flow-GRPO (arXiv 2505.05470), DanceGRPO (2505.07818) and Flow-CPS (2509.05952)
PUBLISHED_ETA: dict[Dynamics, float] = {"ddim": 1.0, "flow-sde": 0.7, "dance": 0.3, "cps": 0.8}


def gaussian_transition(
    x: Tensor, x0: Tensor, before: Level, after: Level, eta: float, dynamics: Dynamics = "ddim"
) -> Gaussian:
    """Return p(x_s | x_t) given x̂0: the DDPM posterior at η = 1, DDIM's step at any η, Euler's ancestral step.

    mean = α_s x̂0 + ρ ε̂,  ε̂ = (x_t − α_t x̂0)/σ_t, with the noise τ and ρ of `split_noise`.

    eta       in [0, 1]
    dynamics  the law of the noise

    Computed in fp64 where x̂0 is fp64, else in fp32.
    """
    (alpha_t, sigma_t), alpha_s = before, after.alpha
    tau, rest = split_noise(before, after, eta, dynamics)
    x0 = x0 if x0.dtype == torch.float64 else x0.float()
    x = x.to(x0.dtype)
    epsilon = (x - alpha_t.to(x) * x0) / sigma_t.to(x)
    return Gaussian(alpha_s.to(x) * x0 + rest.to(x) * epsilon, tau.to(x))


def split_noise(before: Level, after: Level, eta: float, dynamics: Dynamics = "ddim") -> tuple[Tensor, Tensor]:
    """Return τ and ρ: the new noise of a step, and the noise kept in the direction of ε̂.

    τ = η (σ_s/σ_t) √(σ_t² − (α_t/α_s)² σ_s²),  ρ = √(σ_s² − τ²)    (DDIM, arXiv 2010.02502, eq. 12 and 16)

    dynamics  other than "ddim": a law of flow matching (`split_flow_noise`)
    """
    if dynamics != "ddim":
        return split_flow_noise(before, after, eta, dynamics)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = before, after
    if isinstance(after, FreshLevel):
        return sigma_s, torch.zeros_like(sigma_s)
    tau = eta * sigma_s / sigma_t * (sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2).clamp(min=0).sqrt()
    return tau, (sigma_s**2 - tau**2).clamp(min=0).sqrt()


# The SDEs that GRPO trains flow models with. α = 1 − σ, the denoiser predicts v = ε̂ − x̂0, and dt = σ_s − σ_t < 0:
#
# Flow-SDE (Flow-GRPO, arXiv 2505.05470, eq. 9), s = a √(σ_t/(1 − σ_t)), and Dance-SDE (DanceGRPO, arXiv 2505.07818,
# eq. 8), s = a:    mean = x_t + [v + s²/(2σ_t) (x_t + (1 − σ_t) v)] dt,    τ = s √(−dt)
# CPS (arXiv 2509.05952, eq. 10):    mean = (1 − σ_s) x̂0 + √(σ_s² − τ²) ε̂,    τ = σ_s sin(aπ/2)
#
# With x_t + (1 − σ_t) v = ε̂ and x_t + v dt = (1 − σ_s) x̂0 + σ_s ε̂, the first two have the mean of DDIM with
# another ρ:    mean = (1 − σ_s) x̂0 + ρ ε̂,    ρ = σ_s − s² (σ_t − σ_s)/(2σ_t)
#
# As published, these two add noise in the last step too, which stays in the image: τ² + ρ² is not σ_s².


def split_flow_noise(before: Level, after: Level, noise_level: float, dynamics: Dynamics) -> tuple[Tensor, Tensor]:
    """Return τ and ρ of a step of flow matching (equations above) at the noise level a (`noise_level`).

    Where σ_t = 1, s of Flow-SDE has 1 − σ_s in place of 1 − σ_t, as in its authors' code.
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = before, after
    if dynamics == "cps":
        return sigma_s * math.sin(noise_level * math.pi / 2), sigma_s * math.cos(noise_level * math.pi / 2)
    down = sigma_t - sigma_s
    s_squared = torch.full_like(sigma_t, noise_level**2)
    if dynamics == "flow-sde":
        s_squared = noise_level**2 * sigma_t / torch.where(alpha_t > 0, alpha_t, alpha_s)
    return (s_squared * down).sqrt(), sigma_s - s_squared * down / (2 * sigma_t)


def check_dynamics(scheduler: Scheduler, dynamics: Dynamics) -> None:
    """Raise InputError where the law of the noise does not belong to the scheduler's forward process."""
    if dynamics != "ddim" and not is_flow(scheduler):
        raise InputError(
            f"dynamics {dynamics!r} are for flow matching, and {type(scheduler).__name__} is none: use ddim"
        )


def draws_fresh_noise(scheduler: Scheduler) -> bool:
    """Return whether the solver's own transition is x_s = α_s x̂0 + σ_s z: consistency models, stochastic flows."""
    return (
        any(hasattr(scheduler, name) for name in (CONSISTENCY_WEIGHTS, f"{CONSISTENCY_WEIGHTS}_discrete", "c_skip"))
        or scheduler.config.get("prediction_type") == "trigflow"
        or bool(scheduler.config.get("stochastic_sampling"))
        or descends_from(scheduler, {"FlowMatchLCMScheduler"})
    )


# Schedulers whose noise is drawn within a transition, around a higher-order mean, or by a rule of their own.
_OTHER_NOISE = {
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverSDEScheduler",
    "CosineDPMSolverMultistepScheduler",
    "CogVideoXDPMScheduler",
    "TCDScheduler",
}


def ignores_eta(scheduler: Scheduler) -> bool:
    """Return whether `step` takes an `eta` that changes nothing."""
    return descends_from(scheduler, {"CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"})


def has_other_noise(scheduler: Scheduler) -> bool:
    """Return whether the solver's own noise has another law than the Gaussian kernel with η = 1."""
    config = scheduler.config
    variance_type = config.get("variance_type")
    if variance_type is not None:  # DDPM, UnCLIP
        return variance_type not in ("fixed_small", "fixed_small_log")
    algorithm = str(config.get("algorithm_type", ""))
    if algorithm.startswith("sde"):
        return algorithm != "sde-dpmsolver++" or config.solver_order > 1
    if hasattr(scheduler, "tau_func"):  # SASolver
        return any(scheduler.tau_func(t) for t in range(0, config.num_train_timesteps, 50))
    ancestral_flow = is_flow(scheduler) and bool(config.get("eta")) and bool(config.get("s_noise"))  # LTX
    return ancestral_flow or descends_from(scheduler, _OTHER_NOISE)


def step_levels(scheduler: Scheduler, timestep: Any, index: int) -> tuple[Level, Level]:
    """Return (α, σ) before and after the transition that begins with `scheduler.step` at a timestep.

    A transition of several model calls (Heun, KDPM2, PNDM's warm-up) has the levels of its first call and of its end.
    Raises InputError for a run that changes the size of its latents.
    """
    if getattr(scheduler, "_scale_factors", None):
        raise InputError(
            f"{type(scheduler).__name__} upscales its latents between steps: particles cannot be resampled. "
            "Run it without scale factors"
        )
    before, after = level(scheduler, timestep, index), _next_level(scheduler, timestep, index)
    return before, FreshLevel(*after) if draws_fresh_noise(scheduler) else after


def _next_level(scheduler: Scheduler, timestep: Any, index: int) -> Level:
    if hasattr(scheduler, CONSISTENCY_WEIGHTS):  # its data are at the level σ_min
        config, sigma = scheduler.config, scheduler.sigmas[index + 1].double()
        fresh = (sigma.clamp(config.sigma_min, config.sigma_max) ** 2 - config.sigma_min**2).clamp(min=0).sqrt()
        return Level(torch.ones_like(fresh), config.s_noise * fresh)
    by_index = not hasattr(scheduler, "alphas_cumprod") and hasattr(scheduler, "step_index")
    if getattr(scheduler, "sigmas", None) is not None or by_index:
        return level(scheduler, timestep, index + 1)
    following = _next_timestep(scheduler, timestep, index)
    if first_of(following) < 0 and draws_fresh_noise(scheduler):  # ends with x̂0 itself
        return Level(torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64))
    return level(scheduler, following, index)


def _next_timestep(scheduler: Scheduler, timestep: Any, index: int) -> Any:
    """Return the timestep after a transition, below 0 at the end."""
    if hasattr(scheduler, "previous_timestep") and not hasattr(scheduler, "step_index"):  # DDPM, Würstchen
        return scheduler.previous_timestep(timestep)
    if descends_from(scheduler, {"TCDScheduler"}) and index + 1 == len(scheduler.timesteps):
        return 0
    goes_by_schedule = hasattr(scheduler, "step_index") or hasattr(scheduler, "c_skip")  # LCM, TCD; ConsistencyDecoder
    if not goes_by_schedule and "prev_timestep" not in inspect.signature(type(scheduler).step).parameters:  # DDIM, PNDM
        return timestep - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    timesteps = torch.as_tensor(scheduler.timesteps)
    if not hasattr(scheduler, "step_index"):  # UnCLIP, ConsistencyDecoder
        index = int((timesteps == timestep).nonzero()[0])
    return timesteps[index + 1] if index + 1 < len(timesteps) else -1


# The proposal of DAS (arXiv 2501.05803), optimal for p(x_s | x_t) exp(g·x_s).
def draw_guided(kernel: Gaussian, gradient: Tensor, generator: Generator | None) -> tuple[Tensor, Tensor]:
    """Draw x_s from q = N(mean + τ² g, τ² I) in place of the kernel p = N(mean, τ² I).

    gradient  g (N, …), gradient of the log-potential with respect to x_t, in nats per unit of the latents
    Returns x_s (N, …) and log p(x_s) − log q(x_s) in nats (N,), summed over the elements. With x_s = mean + τ² g + τ z

        log p − log q = ½ ‖z‖² − ½ ‖z + τ g‖² = −τ g·z − ½ τ² ‖g‖²

    whose exponential has mean 1 over z. A step without noise (τ = 0) is not moved, and its log-ratio is 0.
    """
    z, shift = kernel.noise(generator), kernel.std * gradient.float()
    # From z itself: the difference of two log-densities of thousands of nats would lose precision.
    log_ratio = -(shift * z + 0.5 * shift**2).flatten(1).sum(1)
    return kernel.mean + kernel.std * (shift + z), log_ratio


@dataclass(frozen=True)
class LinearStep:
    """x̂0 = clip(a x_t + b o),  mean = c x_t + d x̂0,  x_s = mean + τ z, for a model output o.

    a, b, c, d, std (τ)  float64 on the CPU, scalars or one per row (N,)
    limit                bound on |x̂0|, infinite without clipping
    """

    a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor
    std: Tensor
    limit: float = math.inf

    def table(self, device: torch.device) -> Tensor:
        """Return a, b, c, d, τ in fp32, (1, 5) or (N, 5): one transfer for all."""
        columns = torch.broadcast_tensors(self.a, self.b, self.c, self.d, self.std)
        return torch.stack([column.reshape(-1) for column in columns], 1).float().to(device)


# (a, b) of x̂0 = a x_t + b o for each prediction type, from x_t = α x0 + σ ε, as in predict_x0.
X0_WEIGHTS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "epsilon": lambda alpha, sigma: (1 / alpha, -sigma / alpha),
    "sample": lambda alpha, sigma: (torch.zeros_like(alpha), torch.ones_like(alpha)),
    "original_sample": lambda alpha, sigma: (torch.zeros_like(alpha), torch.ones_like(alpha)),
    "flow_prediction": lambda alpha, sigma: (1 / (alpha + sigma), -sigma / (alpha + sigma)),
    "reverse_flow_prediction": lambda alpha, sigma: (1 / (alpha + sigma), sigma / (alpha + sigma)),
    # Where α² + σ² ≠ 1 (Euler) the input of the model is x/r, r² = α² + σ², and v belongs to the scaled x.
    "v_prediction": lambda alpha, sigma: (alpha / (alpha**2 + sigma**2), -sigma / (alpha**2 + sigma**2).sqrt()),
}


def weighted_step(
    weights: tuple[Tensor, Tensor],
    before: Level,
    after: Level,
    eta: float,
    limit: float = math.inf,
    dynamics: Dynamics = "ddim",
) -> LinearStep:
    """Return the step of `gaussian_transition`, for x̂0 = a x_t + b o with weights (a, b), as weights of x_t and o.

    mean = α_s x̂0 + √(σ_s² − τ²) (x_t − α_t x̂0)/σ_t = c x_t + d x̂0,  c = √(σ_s² − τ²)/σ_t,  d = α_s − c α_t

    before, after  levels: float64 scalars, or one per row (N,)
    eta            η in [0, 1]
    """
    tau, rest = split_noise(before, after, eta, dynamics)
    c = rest / before.sigma
    return LinearStep(*weights, c, after.alpha - c * before.alpha, tau, limit)


def plain_pass(step: LinearStep, x: Tensor, output: Tensor, noise: Tensor | None = None) -> Tensor:
    """Return the mean of a step (N, …), or x_s drawn from `noise` z, in fp32, with gradients.

    x, output  x_t and the model output (N, …), of any floating dtype

    `steer.diffusion.triton_kernels.triton_pass` is the fast version.
    """
    check_pass(step, x, output, noise)
    columns = step.table(x.device).unbind(1)
    a, b, c, d, std = (column.view(-1, *[1] * (x.dim() - 1)) for column in columns)
    x0 = a * x.float() + b * output.float()
    if step.limit < math.inf:
        x0 = x0.clamp(-step.limit, step.limit)
    mean = c * x.float() + d * x0
    return mean if noise is None else mean + std * noise.float()


def check_pass(step: LinearStep, x: Tensor, output: Tensor, noise: Tensor | None) -> None:
    """Raise InputError where shapes differ."""
    for name, tensor in (("output", output), ("noise", noise)):
        if tensor is not None and tensor.shape != x.shape:
            raise InputError(f"{name} has shape {tuple(tensor.shape)}, but must have that of x, {tuple(x.shape)}")
    rows = max(value.numel() for value in (step.a, step.b, step.c, step.d, step.std))
    if rows not in (1, len(x)):
        raise InputError(f"the step has weights for {rows} rows and x has {len(x)}: give one for all, or one per row")
