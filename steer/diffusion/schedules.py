"""Noise levels and x̂0 of every verified diffusers scheduler, in the scaling of the latents that its `step` receives.

One forward marginal for all of them: x_t = α_t x0 + σ_t ε.
"""

import math
from collections.abc import Callable, Collection, Set
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Generator, Tensor

from steer.diffusion.precision import widest
from steer.errors import InputError

Scheduler = Any  # diffusers' schedulers share no base class that has `step`

VERIFIED = frozenset(
    f"{name}Scheduler"
    for name in (
        "DDIM",
        "DDPM",
        "PNDM",
        "LCM",
        "TCD",
        "EulerDiscrete",
        "EulerAncestralDiscrete",
        "LMSDiscrete",
        "HeunDiscrete",
        "KDPM2Discrete",
        "KDPM2AncestralDiscrete",
        "DPMSolverSDE",
        "DPMSolverMultistep",
        "DPMSolverSinglestep",
        "UniPCMultistep",
        "DEISMultistep",
        "SASolver",
        "FlowMatchEulerDiscrete",
        "FlowMatchHeunDiscrete",
        "FlowMatchLCM",
    )
)


FLOW_MATCHING = frozenset(name for name in VERIFIED if name.startswith("FlowMatch"))


class Level(NamedTuple):
    """α and σ of x = α x0 + σ ε: float64 scalars."""

    alpha: Tensor
    sigma: Tensor


def descends_from(scheduler: Scheduler, names: Set[str]) -> bool:
    """Return whether a scheduler is of one of these diffusers classes, or of a subclass of one."""
    return any(cls.__name__ in names for cls in type(scheduler).__mro__)


def check_verified(scheduler: Scheduler) -> None:
    """Raise InputError unless the levels and x̂0 of this scheduler were verified against diffusers."""
    name = type(scheduler).__name__
    if not descends_from(scheduler, VERIFIED):
        raise InputError(
            f"{name} is not a verified scheduler: its noise levels are unknown here. Use one of "
            f"{', '.join(sorted(VERIFIED))}, for example "
            "pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)"
        )
    if scheduler.config.get("invert_sigmas"):
        raise InputError(f"{name} with invert_sigmas runs from image to noise: it cannot be steered")


def prediction_type(scheduler: Scheduler) -> str:
    """Return the denoiser's prediction type: epsilon, v_prediction, sample or flow_prediction."""
    if descends_from(scheduler, FLOW_MATCHING) or scheduler.config.get("use_flow_sigmas"):
        return "flow_prediction"
    return str(scheduler.config.get("prediction_type", "epsilon"))


def level(scheduler: Scheduler, timestep: Any, index: int) -> Level:
    """Return α and σ at a timestep, or at an index of `scheduler.sigmas` where the scheduler has them.

    A negative timestep stands for the end of the run.
    """
    if getattr(scheduler, "sigmas", None) is None:
        cumulative = (
            (
                scheduler.alphas_cumprod[int(timestep)]
                if timestep >= 0
                else torch.as_tensor(getattr(scheduler, "final_alpha_cumprod", 1.0))
            )
            .cpu()
            .double()
        )
        return Level(cumulative.sqrt(), (1 - cumulative).sqrt())
    sigma = torch.as_tensor(scheduler.sigmas[index])
    if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
        alpha, sigma = map(torch.as_tensor, scheduler._sigma_to_alpha_sigma_t(sigma))
    elif prediction_type(scheduler) == "flow_prediction":
        alpha = 1 - sigma
    else:
        alpha = torch.ones_like(sigma)
    return Level(alpha.cpu().double(), sigma.cpu().double())  # not every device has float64


def predict_x0(
    scheduler: Scheduler,
    model_output: Tensor,
    timestep: Any,
    sample: Tensor,
    index: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return x̂0 (in `dtype`, shaped like `sample`) from the denoiser's output, clipped as the scheduler does.

    Raises InputError for an unknown prediction type.
    """
    kind, output, x = prediction_type(scheduler), model_output.to(dtype), sample.to(dtype)
    alpha, sigma = (value.to(x) for value in level(scheduler, timestep, index))
    if output.shape[1] == 2 * x.shape[1]:  # a learned variance
        output = output[:, : x.shape[1]]
    if kind == "epsilon":
        x0 = (x - sigma * output) / alpha
    elif kind in ("sample", "original_sample"):
        x0 = output
    elif kind == "flow_prediction":
        x0 = (x - sigma * output) / (alpha + sigma)
    elif kind == "v_prediction":
        # Where α² + σ² ≠ 1 (Euler) the input of the model is x/r, and v belongs to the scaled x.
        r = (alpha**2 + sigma**2).sqrt()
        x0 = (alpha * x / r - sigma * output) / r
    else:
        raise InputError(f"{type(scheduler).__name__}: no rule for x̂0 from prediction_type {kind!r}: use epsilon")
    return _clip(scheduler, x0)


def _clip(scheduler: Scheduler, x0: Tensor) -> Tensor:
    if scheduler.config.get("thresholding"):
        return scheduler._threshold_sample(x0)
    limit = clip_limit(scheduler)
    return x0.clamp(-limit, limit) if limit < math.inf else x0


def clip_limit(scheduler: Scheduler) -> float:
    """Return the bound of the scheduler's configuration on |x̂0|, infinite where there is none."""
    clips = scheduler.config.get("clip_sample") and not descends_from(scheduler, {"TCDScheduler"})
    return float(scheduler.config.clip_sample_range) if clips else math.inf


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
    """Return the number of transitions of a run after its first one, made by calls at timesteps `first` to `latest`."""
    timesteps = torch.as_tensor(scheduler.timesteps).tolist()
    first, latest = float(first), float(latest)
    if hasattr(scheduler, "prk_timesteps"):
        if warm_up := len(scheduler.prk_timesteps):  # four calls each, and then one
            return warm_up // 4 + len(timesteps) - warm_up
        # One timestep occurs twice. A run of image-to-image may start at either, or after them, and the
        # scheduler takes two calls for its first transition in any case.
        again = first == latest and timesteps.count(first) > 1
        return len(timesteps) - timesteps.index(latest) - again
    begin = getattr(scheduler, "begin_index", None)
    rest = len(timesteps) - (timesteps.index(first) if begin is None else begin)
    return (rest + 1) // 2 if getattr(scheduler, "order", 1) == 2 else rest


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

    def kl(self, other: "Gaussian") -> Tensor:
        """Return KL(self ‖ other) in nats (N,), summed in fp64, for two steps of equal τ: ‖μ − μ'‖² / 2τ²."""
        dtype = widest(self.mean.device)
        if not (self.std > 0 and torch.isclose(self.std, other.std.to(self.std))):
            raise InputError(f"KL in closed form needs two steps of one τ > 0, got {self.std:g} and {other.std:g}")
        difference = (self.mean.to(dtype) - other.mean.to(dtype)) / self.std.to(dtype)
        return (difference**2).flatten(1).sum(1) / 2


def gaussian_transition(x: Tensor, x0: Tensor, before: Level, after: Level, eta: float) -> Gaussian:
    """Return p(x_s | x_t) given x̂0: the DDPM posterior at η = 1, DDIM's step at any η, Euler's ancestral step.

    τ = η (σ_s/σ_t) √(σ_t² − (α_t/α_s)² σ_s²),  mean = α_s x̂0 + √(σ_s² − τ²) ε̂,  ε̂ = (x_t − α_t x̂0)/σ_t
    (DDIM, arXiv 2010.02502, eq. 12 and 16). `eta` in [0, 1]. In fp64 where x̂0 is, else in fp32.
    """
    (alpha_t, sigma_t), alpha_s = before, after.alpha
    tau, rest = split_noise(before, after, eta)
    x0 = x0 if x0.dtype == torch.float64 else x0.float()
    x = x.to(x0.dtype)
    epsilon = (x - alpha_t.to(x) * x0) / sigma_t.to(x)
    return Gaussian(alpha_s.to(x) * x0 + rest.to(x) * epsilon, tau.to(x))


def split_noise(before: Level, after: Level, eta: float) -> tuple[Tensor, Tensor]:
    """Return τ and √(σ_s² − τ²): the fresh noise of a step, and the noise it keeps in the direction of ε̂."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = before, after
    tau = eta * sigma_s / sigma_t * (sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2).clamp(min=0).sqrt()
    return tau, (sigma_s**2 - tau**2).clamp(min=0).sqrt()


def has_gaussian_kernel(scheduler: Scheduler) -> bool:
    """Return False for solvers that take several model calls per transition."""
    return getattr(scheduler, "order", 1) == 1 and not hasattr(scheduler, "prk_timesteps")


# Consistency models and samplers with inner stages draw their own noise at every transition.
_CONSISTENCY = {"LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler"}
_STOCHASTIC_STAGES = {"KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler"}


def can_resample_noise(scheduler: Scheduler) -> bool:
    """Return whether the noise of a transition of this solver may be resampled from the Gaussian kernel."""
    return has_gaussian_kernel(scheduler) and not descends_from(scheduler, _CONSISTENCY)


def matches_gaussian_kernel(scheduler: Scheduler) -> bool:
    """Return whether the Gaussian kernel with η = 1 may take single steps of a run with this solver.

    False too for solvers whose own noise has another kernel: two kernels in one run would mix two laws.
    """
    return can_resample_noise(scheduler) and not _has_other_noise(scheduler)


def _has_other_noise(scheduler: Scheduler) -> bool:
    config = scheduler.config
    if descends_from(scheduler, {"DDPMScheduler"}):
        return config.variance_type not in ("fixed_small", "fixed_small_log")
    algorithm = str(config.get("algorithm_type", ""))
    if algorithm.startswith("sde"):
        return algorithm != "sde-dpmsolver++" or config.solver_order > 1
    return bool(config.get("stochastic_sampling"))


def copies_diverge(scheduler: Scheduler) -> bool:
    """Return whether two equal particles ever differ again: by resampled noise, or by the solver's own."""
    return can_resample_noise(scheduler) or descends_from(scheduler, _CONSISTENCY | _STOCHASTIC_STAGES)


def step_levels(scheduler: Scheduler, timestep: Any, index: int) -> tuple[Level, Level]:
    """Return (α, σ) before and after the transition that `scheduler.step` makes at a timestep.

    Raises InputError where the solver has no Gaussian kernel.
    """
    if not has_gaussian_kernel(scheduler):
        raise InputError(
            f"{type(scheduler).__name__} spends several model calls on one transition: it has no Gaussian kernel. "
            "Use a first-order or multistep scheduler, for example DDIMScheduler.from_config(pipe.scheduler.config)"
        )
    before = level(scheduler, timestep, index)
    if getattr(scheduler, "sigmas", None) is not None:
        return before, level(scheduler, timestep, index + 1)
    if hasattr(scheduler, "previous_timestep"):  # DDPM
        following = scheduler.previous_timestep(timestep)
    elif hasattr(scheduler, "step_index"):  # LCM, TCD
        following = scheduler.timesteps[index + 1] if index + 1 < len(scheduler.timesteps) else -1
    else:  # DDIM
        following = timestep - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    return before, level(scheduler, following, index)


# The proposal of DAS (arXiv 2501.05803): the optimal one for p(x_s | x_t) exp(g·x_s).
def draw_guided(kernel: Gaussian, gradient: Tensor, generator: Generator | None) -> tuple[Tensor, Tensor]:
    """Draw x_s from q = N(mean + τ² g, τ² I) in place of the kernel p = N(mean, τ² I).

    gradient  g (N, …), of the log-potential with respect to x_t, in nats per unit of the latents
    Returns x_s (N, …) and log p(x_s) − log q(x_s) in nats (N,), summed over the elements. With x_s = mean + τ² g + τ z

        log p − log q = ½ ‖z‖² − ½ ‖z + τ g‖² = −τ g·z − ½ τ² ‖g‖²

    whose exponential has mean 1 over z. A step without noise (τ = 0) is not moved, its ratio is 0.
    """
    z, shift = kernel.noise(generator), kernel.std * gradient.float()
    # From z itself: the difference of two log-densities of thousands of nats would lose precision.
    log_ratio = -(shift * z + 0.5 * shift**2).flatten(1).sum(1)
    return kernel.mean + kernel.std * (shift + z), log_ratio


Wanted = Literal["x0", "mean", "x_s", "log_prob"]


@dataclass(frozen=True)
class LinearStep:
    """x̂0 = clip(a x_t + b o),  mean = c x_t + d x̂0,  x_s = mean + τ z, for a model output o.

    a, b, c, d, std (τ)  float64 on the CPU, scalars or one per row (N,)
    limit                bound on |x̂0|, infinite where it is not clipped
    """

    a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor
    std: Tensor
    limit: float = math.inf

    def table(self, device: torch.device) -> Tensor:
        """Return a, b, c, d, τ, log τ in fp32, (1, 6) or (N, 6): one transfer for all."""
        columns = torch.broadcast_tensors(self.a, self.b, self.c, self.d, self.std, self.std.log())
        return torch.stack([column.reshape(-1) for column in columns], 1).float().to(device)


# (a, b) of x̂0 = a x_t + b o for each prediction type, from x_t = α x0 + σ ε, as in predict_x0.
X0_WEIGHTS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "epsilon": lambda alpha, sigma: (1 / alpha, -sigma / alpha),
    "sample": lambda alpha, sigma: (torch.zeros_like(alpha), torch.ones_like(alpha)),
    "original_sample": lambda alpha, sigma: (torch.zeros_like(alpha), torch.ones_like(alpha)),
    "flow_prediction": lambda alpha, sigma: (1 / (alpha + sigma), -sigma / (alpha + sigma)),
    "v_prediction": lambda alpha, sigma: (alpha / (alpha**2 + sigma**2), -sigma / (alpha**2 + sigma**2).sqrt()),
}


def linear_step(kind: str, before: Level, after: Level, eta: float, limit: float = math.inf) -> LinearStep:
    """Return the step of `gaussian_transition` and x̂0 of a prediction type as weights of x_t and o.

    mean = α_s x̂0 + √(σ_s² − τ²) (x_t − α_t x̂0)/σ_t = c x_t + d x̂0,  c = √(σ_s² − τ²)/σ_t,  d = α_s − c α_t

    before, after  levels: float64 scalars, or one per row (N,)
    eta            η in [0, 1]

    Raises InputError for an unknown prediction type.
    """
    if kind not in X0_WEIGHTS:
        raise InputError(f"no rule for x̂0 from prediction_type {kind!r}: use one of {', '.join(X0_WEIGHTS)}")
    tau, rest = split_noise(before, after, eta)
    c = rest / before.sigma
    return LinearStep(*X0_WEIGHTS[kind](*before), c, after.alpha - c * before.alpha, tau, limit)


class Pass(Protocol):
    """One evaluation of a step: any of x̂0, mean, x_s (each shaped like x) and log p(x_s | x_t) (N,).

    x, output   x_t and the model output (N, …), of any floating dtype
    noise       z shaped like x: x_s is drawn from it, in `dtype`, rounded through `storage`
    x_s         in place of the noise: the sample whose density is evaluated
    """

    def __call__(
        self,
        step: LinearStep,
        x: Tensor,
        output: Tensor,
        want: Collection[Wanted],
        noise: Tensor | None = None,
        x_s: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        storage: torch.dtype | None = None,
    ) -> dict[Wanted, Tensor]: ...


def plain_pass(
    step: LinearStep,
    x: Tensor,
    output: Tensor,
    want: Collection[Wanted],
    noise: Tensor | None = None,
    x_s: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    storage: torch.dtype | None = None,
) -> dict[Wanted, Tensor]:
    """Evaluate a step (`Pass`) in plain PyTorch, with gradients. All but x_s is fp32; log-probs are summed in fp64."""
    check_pass(step, x, output, want, noise, x_s)
    columns = step.table(x.device).unbind(1)
    a, b, c, d, std, log_std = (column.view(-1, *[1] * (x.dim() - 1)) for column in columns)
    x0 = a * x.float() + b * output.float()
    if step.limit < math.inf:
        x0 = x0.clamp(-step.limit, step.limit)
    mean = c * x.float() + d * x0
    results: dict[Wanted, Tensor] = {"x0": x0, "mean": mean}
    if noise is not None:
        x_s = (mean + std * noise.float()).to(dtype).to(storage or dtype).to(dtype)
    if x_s is not None:
        results["x_s"] = x_s
    if x_s is not None and "log_prob" in want:
        z, log_std = ((x_s.float() - mean) / std).to(widest(x.device)), log_std.to(widest(x.device))
        terms = -0.5 * z**2 - log_std - 0.5 * math.log(2 * math.pi)
        results["log_prob"] = terms.reshape(len(x), -1).sum(1)
    return {name: results[name] for name in want}


def check_pass(
    step: LinearStep, x: Tensor, output: Tensor, want: Collection[Wanted], noise: Tensor | None, x_s: Tensor | None
) -> None:
    """Raise InputError where shapes differ, or a requested result lacks its inputs."""
    given = {"output": output, "noise": noise, "x_s": x_s}
    for name, tensor in given.items():
        if tensor is not None and tensor.shape != x.shape:
            raise InputError(f"{name} has shape {tuple(tensor.shape)}, but must have that of x, {tuple(x.shape)}")
    if noise is not None and x_s is not None:
        raise InputError("noise and x_s are both given: a sample is either drawn or evaluated, give one of them")
    if {"x_s", "log_prob"} & set(want) and noise is None and x_s is None:
        raise InputError("x_s and its log_prob need the noise or x_s itself: give one of them")
    if "log_prob" in want and not (step.std > 0).all():
        raise InputError("this step is deterministic (τ = 0): it has no log-probability. Use η > 0")
    rows = max(value.numel() for value in (step.a, step.b, step.c, step.d, step.std))
    if rows not in (1, len(x)):
        raise InputError(f"the step has weights for {rows} rows and x has {len(x)}: give one for all, or one per row")
