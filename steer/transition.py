"""The Gaussian transition p(x_s | x_t) that every first-order solver shares."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from steer.errors import InputError
from steer.precision import widest
from steer.schedule import Level, Scheduler, descends_from, level


@dataclass(frozen=True)
class Gaussian:
    """N(mean, std² I): mean (N, …) fp32 or fp64; std a scalar tensor, 0 where the step is deterministic."""

    mean: Tensor
    std: Tensor

    def sample(self, generator: torch.Generator | None) -> Tensor:
        """A draw shaped like the mean."""
        return self.mean + self.std * self.noise(generator)

    def noise(self, generator: torch.Generator | None) -> Tensor:
        """Standard normal numbers shaped like the mean; they come from the generator's own device."""
        device = generator.device if generator else self.mean.device
        return torch.randn(self.mean.shape, generator=generator, device=device).to(self.mean.device)

    def log_prob(self, x: Tensor, reduce: Literal["sum", "mean"] = "sum") -> Tensor:
        """log N(x; mean, std² I) in nats (N,), summed or averaged in fp64 over the elements of a sample.

        Raises InputError where std = 0: a deterministic step has no density.
        """
        if not self.std > 0:
            raise InputError("this step is deterministic (τ = 0): it has no log-probability. Use η > 0")
        dtype = widest(self.mean.device)
        std = self.std.to(dtype)
        z = (x.to(dtype) - self.mean.to(dtype)) / std
        terms = (-0.5 * z**2 - std.log() - 0.5 * math.log(2 * math.pi)).flatten(1)
        return terms.sum(1) if reduce == "sum" else terms.mean(1)

    def draw(self, noise: Tensor, dtype: torch.dtype, storage: torch.dtype) -> tuple[Tensor, Tensor]:
        """The sample x_s (N, …) that standard normal `noise` stands for, and log p(x_s) in nats (N,).

        x_s is rounded through `dtype`, which is its own, and `storage` before its density is taken. Raises InputError
        where std = 0.
        """
        x_s = (self.mean + self.std * noise).to(dtype).to(storage).to(dtype)
        return x_s, self.log_prob(x_s)

    def kl(self, other: "Gaussian") -> Tensor:
        """KL(self ‖ other) in nats (N,), summed in fp64, for two steps of equal τ: ‖μ − μ'‖² / 2τ²."""
        dtype = widest(self.mean.device)
        if not (self.std > 0 and torch.isclose(self.std, other.std.to(self.std))):
            raise InputError(f"KL in closed form needs two steps of one τ > 0, got {self.std:g} and {other.std:g}")
        difference = (self.mean.to(dtype) - other.mean.to(dtype)) / self.std.to(dtype)
        return (difference**2).flatten(1).sum(1) / 2


def gaussian_transition(x: Tensor, x0: Tensor, before: Level, after: Level, eta: float) -> Gaussian:
    """p(x_s | x_t) given x̂0. The DDPM posterior at η = 1, DDIM's step at any η, Euler's ancestral one in its frame.

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
    """τ and √(σ_s² − τ²): the parts of σ_s that a step draws anew, and that it takes along in the direction of ε̂."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = before, after
    tau = eta * sigma_s / sigma_t * (sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2).clamp(min=0).sqrt()
    return tau, (sigma_s**2 - tau**2).clamp(min=0).sqrt()


def has_gaussian_kernel(scheduler: Scheduler) -> bool:
    """False for solvers that spend several model calls on one transition."""
    return getattr(scheduler, "order", 1) == 1 and not hasattr(scheduler, "prk_timesteps")


# Consistency models and samplers with inner stages draw noise of their own at every transition.
_CONSISTENCY = {"LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler"}
_STOCHASTIC_STAGES = {"KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler"}


def can_redraw(scheduler: Scheduler) -> bool:
    """Whether a transition of this solver may be drawn anew from the Gaussian kernel."""
    return has_gaussian_kernel(scheduler) and not descends_from(scheduler, _CONSISTENCY)


def redraws(scheduler: Scheduler) -> bool:
    """Whether the Gaussian kernel with η = 1 may take single steps of a run with this solver.

    False too for solvers whose own noise follows another kernel: two kernels in one run would mix two laws.
    """
    return can_redraw(scheduler) and not _has_other_noise(scheduler)


def _has_other_noise(scheduler: Scheduler) -> bool:
    config = scheduler.config
    if descends_from(scheduler, {"DDPMScheduler"}):
        return config.variance_type not in ("fixed_small", "fixed_small_log")
    algorithm = str(config.get("algorithm_type", ""))
    if algorithm.startswith("sde"):
        return algorithm != "sde-dpmsolver++" or config.solver_order > 1
    return bool(config.get("stochastic_sampling"))


def copies_part(scheduler: Scheduler) -> bool:
    """Whether two particles in one place ever part again: by a redrawn step, or by the solver's own noise."""
    return can_redraw(scheduler) or descends_from(scheduler, _CONSISTENCY | _STOCHASTIC_STAGES)


def step_levels(scheduler: Scheduler, timestep: Any, index: int) -> tuple[Level, Level]:
    """(α, σ) before and after the transition that `scheduler.step` makes at a timestep.

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
