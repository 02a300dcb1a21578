"""Noise levels and x̂0 of every verified diffusers scheduler, in the frame of the latents that its `step` receives.

One forward marginal for all of them: x_t = α_t x0 + σ_t ε.
"""

import math
from collections.abc import Set
from typing import Any, NamedTuple

import torch
from torch import Tensor

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
    """Whether a scheduler is of one of these diffusers classes, or of a user's subclass of one."""
    return any(cls.__name__ in names for cls in type(scheduler).__mro__)


def check_verified(scheduler: Scheduler) -> None:
    """Raises InputError unless the levels and x̂0 of this scheduler were checked against diffusers."""
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
    """What the denoiser predicts: epsilon, v_prediction, sample or flow_prediction."""
    if descends_from(scheduler, FLOW_MATCHING) or scheduler.config.get("use_flow_sigmas"):
        return "flow_prediction"
    return str(scheduler.config.get("prediction_type", "epsilon"))


def level(scheduler: Scheduler, timestep: Any, index: int) -> Level:
    """α and σ at a timestep, or at a position in `scheduler.sigmas` where the scheduler keeps them.

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
    """x̂0 (in `dtype`, shaped like `sample`) from what the denoiser said, clipped as the scheduler's configuration asks.

    Raises InputError for a prediction type that has no rule.
    """
    kind, output, x = prediction_type(scheduler), model_output.to(dtype), sample.to(dtype)
    alpha, sigma = (value.to(x) for value in level(scheduler, timestep, index))
    if output.shape[1] == 2 * x.shape[1]:  # a learned variance rides along
        output = output[:, : x.shape[1]]
    if kind == "epsilon":
        x0 = (x - sigma * output) / alpha
    elif kind in ("sample", "original_sample"):
        x0 = output
    elif kind == "flow_prediction":
        x0 = (x - sigma * output) / (alpha + sigma)
    elif kind == "v_prediction":
        # In a frame with α² + σ² ≠ 1 (Euler's) the model saw x/r, and v is that of the scaled x.
        r = (alpha**2 + sigma**2).sqrt()
        x0 = (alpha * x / r - sigma * output) / r
    else:
        raise InputError(f"{type(scheduler).__name__}: no rule for x̂0 from prediction_type {kind!r}")
    return _clip(scheduler, x0)


def _clip(scheduler: Scheduler, x0: Tensor) -> Tensor:
    if scheduler.config.get("thresholding"):
        return scheduler._threshold_sample(x0)
    limit = clip_limit(scheduler)
    return x0.clamp(-limit, limit) if limit < math.inf else x0


def clip_limit(scheduler: Scheduler) -> float:
    """The bound that the scheduler's configuration sets to |x̂0|, infinite where it sets none."""
    clips = scheduler.config.get("clip_sample") and not descends_from(scheduler, {"TCDScheduler"})
    return float(scheduler.config.clip_sample_range) if clips else math.inf


def in_the_middle(scheduler: Scheduler) -> bool:
    """True between the model calls of one transition (Heun, KDPM2, DPMSolverSDE, PNDM's warm-up)."""
    if hasattr(scheduler, "state_in_first_order"):
        return not scheduler.state_in_first_order and scheduler.step_index < len(scheduler.timesteps)
    if not hasattr(scheduler, "prk_timesteps"):
        return False
    if not scheduler.config.skip_prk_steps and scheduler.counter <= len(scheduler.prk_timesteps):
        return scheduler.counter % 4 != 0
    return scheduler.counter == 1 and len(scheduler.timesteps) > 1


def total_transitions(scheduler: Scheduler, first: Any, latest: Any) -> int:
    """How many transitions a run makes whose first one is just complete, by calls at timesteps `first` to `latest`."""
    timesteps = torch.as_tensor(scheduler.timesteps).tolist()
    first, latest = float(first), float(latest)
    if hasattr(scheduler, "prk_timesteps"):
        if warm_up := len(scheduler.prk_timesteps):  # four calls each, and then one
            return warm_up // 4 + len(timesteps) - warm_up
        # One timestep is there twice. A run of image-to-image may start at either, or after them, and the
        # scheduler spends two calls on its first transition wherever that is.
        again = first == latest and timesteps.count(first) > 1
        return len(timesteps) - timesteps.index(latest) - again
    begin = getattr(scheduler, "begin_index", None)
    rest = len(timesteps) - (timesteps.index(first) if begin is None else begin)
    return (rest + 1) // 2 if getattr(scheduler, "order", 1) == 2 else rest
