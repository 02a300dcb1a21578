"""Verification of a scheduler before a run: a copy of it samples a known image, with the exact denoiser of that image.

No list of class names decides: a scheduler is steered if its levels agree with its own `add_noise` (`scale_noise`),
and both its own x̂0 at every step and its last latents equal the known image. The few rules for single schedulers
(`steer.diffusion.schedules`: clipping, noise of another law, an ignored η) are checked against the same steps.
"""

import functools
import inspect
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from steer.diffusion.schedules import (
    Level,
    Scheduler,
    is_flow,
    level,
    measure_level,
    mid_transition,
    step_levels,
    stepped_timesteps,
    x0_weights,
)
from steer.errors import InputError

STEPS = (20, 2)  # consistency decoders and SCM take two
SHAPE = (2, 2, 2, 2)
TOLERANCE = 2e-2  # for an image in [−½, ½]; with a wrong convention the error is as large as the image
# Arguments of `step` that a rehearsal can give.
KNOWN_ARGUMENTS = {"self", "model_output", "timestep", "sample", "old_pred_original_sample", "timestep_back"}
SCORE_INSTEAD = "Rank finished images with `steer score` instead"
# Schedulers raise these for arguments that do not fit them.
MISFITS = (TypeError, ValueError, AttributeError, IndexError, RuntimeError, AssertionError)

_verified: dict[tuple[type, str], str | None] = {}


def check_verified(scheduler: Scheduler) -> None:
    """Raise InputError, with the reason, unless the levels and x̂0 of this scheduler agree with its own steps.

    The result is cached for each class and configuration.
    """
    kind = getattr(scheduler, "base_class", type(scheduler))  # for a short run, the class of the run's scheduler
    key = kind, json.dumps(dict(getattr(scheduler, "config", {})), default=repr, sort_keys=True)
    if key not in _verified:
        _verified[key] = reason_against(scheduler if kind is type(scheduler) else kind.from_config(scheduler.config))
    if reason := _verified[key]:
        raise InputError(f"{type(scheduler).__name__} {reason}")


def reason_against(scheduler: Scheduler) -> str | None:
    """Return the reason why a scheduler cannot be steered, with a remedy, or None."""
    if not hasattr(scheduler, "step"):
        return f"has no step(): its pipeline samples by methods of its own, which cannot be hooked. {SCORE_INSTEAD}"
    parameters = inspect.signature(type(scheduler).step).parameters
    if "LongTensor" in str(getattr(parameters.get("sample"), "annotation", "")):
        return f"steps discrete tokens: there are no latents with a noise level to steer. {SCORE_INSTEAD}"
    needed = {name for name, parameter in parameters.items() if parameter.default is inspect.Parameter.empty}
    needed |= {name for name in parameters if name.startswith("dmd_")}  # HeliosDMD: optional in its signature alone
    if unknown := sorted(needed - KNOWN_ARGUMENTS):
        return f"takes {', '.join(unknown)} in its step, which only its own pipeline can give. {SCORE_INSTEAD}"
    if scheduler.config.get("stages", 1) > 1:
        return "changes the resolution of the latents between its stages: particles cannot be resampled. Use stages=1"
    try:
        return rehearse(type(scheduler).from_config(scheduler.config))
    except InputError as error:
        return f"{error}".removeprefix(f"{type(scheduler).__name__} ") + f": it is not supported. {SCORE_INSTEAD}"
    except MISFITS as error:
        reason = str(error).splitlines()[0][:120]
        return f"could not sample a known image ({reason}): it is not supported. {SCORE_INSTEAD}"


def _remedy(scheduler: Scheduler) -> str:
    name = "FlowMatchEulerDiscreteScheduler" if is_flow(scheduler) else "DDIMScheduler"
    return f"Use for example pipe.scheduler = {name}.from_config(pipe.scheduler.config)"


def rehearse(scheduler: Scheduler) -> str | None:
    """Sample a known image with its exact denoiser; return any disagreement with the rules of `schedules`, or None."""
    _set_timesteps(scheduler)
    timesteps = stepped_timesteps(scheduler)
    first, last = (_noise_ratio(level(scheduler, timesteps[k], k)) for k in (0, len(timesteps) - 1))
    if len(timesteps) > 1 and first < last:
        return "runs from data to noise (an inversion): there is nothing to steer. Use the scheduler that samples"
    generator = Generator().manual_seed(0)
    image = torch.rand(SHAPE, generator=generator, dtype=torch.float64) - 0.5
    end, final = Level(torch.ones(()), torch.zeros(())), image
    for t, index, x0, x_s in transitions(scheduler, image, generator):
        final = x_s
        end = step_levels(scheduler, t, index)[1]
        if not _levels_agree(scheduler, t, index):
            return f"has other noise levels in its add_noise than in its steps. {_remedy(scheduler)}"
        if x0 is not None and _far(x0, image):
            return f"has another x̂0 than its noise levels and prediction type give. {_remedy(scheduler)}"
    if _far(final, end.alpha * image, 5 * float(end.sigma)):
        return (
            f"does not end at the image that its denoiser predicts: its noise levels are unknown. {_remedy(scheduler)}"
        )
    return None


def transitions(
    scheduler: Scheduler, image: Tensor, generator: Generator
) -> Iterator[tuple[Tensor, int, Tensor | None, Tensor]]:
    """Run a scheduler on the exact denoiser of one image (N, …), from its timesteps' first level.

    Yields after each transition: t and index of its first call, the scheduler's own x̂0 where it returns one, and x_s.
    """
    timesteps, own_x0, start = stepped_timesteps(scheduler), None, None
    before = level(scheduler, timesteps[0], 0)
    x = before.alpha * image + before.sigma * torch.randn(image.shape, generator=generator, dtype=image.dtype)
    for k, t in enumerate(timesteps):
        time = t.expand(len(image)) if hasattr(scheduler, "_alpha_cumprod") else t  # Würstchen: one per row
        output = _exact_output(scheduler, x, image, time, k)
        given: dict[str, Any] = {"old_pred_original_sample": own_x0, "timestep_back": timesteps[k - 1] if k else None}
        given |= {"prev_timestep": timesteps[k + 1] if k + 1 < len(timesteps) else None, "generator": generator}
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, time)
        step = functools.partial(scheduler.step, model_output=output, timestep=time, sample=x, return_dict=True)
        accepted = inspect.signature(type(scheduler).step).parameters
        out = step(**{name: value for name, value in given.items() if name in accepted})
        own_x0 = _own_x0(out)
        start = start or (time, k, own_x0)
        if not mid_transition(scheduler):
            yield *start, out[0]
            start = None
        x = out[0].double()


def _own_x0(out: Any) -> Tensor | None:
    """Return the x̂0 of a scheduler's output where it has one; TCD's second field is not x̂0."""
    if isinstance(out, tuple):  # CogVideoXDPM
        return out[1]
    return next((out[name] for name in ("pred_original_sample", "denoised") if name in out), None)


def _exact_output(scheduler: Scheduler, x: Tensor, image: Tensor, timestep: Tensor, index: int) -> Tensor:
    """Return the output o with image = a x + b o, and a learned variance where the scheduler takes one."""
    at = _inner_level(scheduler, timestep) if mid_transition(scheduler) else level(scheduler, timestep, index)
    a, b = x0_weights(scheduler, at)
    output = (image - a * x) / b
    learned = str(scheduler.config.get("variance_type", "")).startswith("learned")
    return torch.cat([output, torch.zeros_like(output)], 1) if learned else output


def _inner_level(scheduler: Scheduler, timestep: Tensor) -> Level:
    """Return the level of a later call of a transition, which `sigmas` does not list, from its fractional timestep."""
    if not hasattr(scheduler, "alphas_cumprod"):
        return level(scheduler, timestep, scheduler.step_index)
    if not hasattr(scheduler, "sigmas"):  # PNDM
        return level(scheduler, timestep, -1)
    grid, time = scheduler.alphas_cumprod.double(), float(timestep)
    log_sigmas, low = ((1 - grid) / grid).log() / 2, min(int(time), len(grid) - 2)
    sigma = torch.lerp(log_sigmas[low], log_sigmas[low + 1], time - low).exp()
    return Level(torch.ones_like(sigma), sigma)


def _set_timesteps(scheduler: Scheduler) -> None:
    given: dict[str, Any] = {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}
    if scheduler.config.get("num_train_timesteps") == 1:  # no grid of its own: its pipeline gives levels in [0, 1]
        scheduler.set_timesteps(sigmas=np.linspace(1, 0, STEPS[0] + 1)[:-1], **given)
        return
    try:
        scheduler.set_timesteps(STEPS[0], **given)
    except ValueError:
        scheduler.set_timesteps(STEPS[1], **given)


def _levels_agree(scheduler: Scheduler, timestep: Any, index: int) -> bool:
    """Compare levels with `add_noise`, except for schedulers whose steps are known to have other levels.

    `_sigma_to_alpha_sigma_t` defines the levels of the steps (SASolver's `add_noise` ignores that it is a flow), and
    `scale_noise` ignores `invert_sigmas`.
    """
    has_noise = hasattr(scheduler, "add_noise") or hasattr(scheduler, "scale_noise")
    if not has_noise or hasattr(scheduler, "_sigma_to_alpha_sigma_t") or scheduler.config.get("invert_sigmas"):
        return True
    ours, measured = level(scheduler, timestep, index), measure_level(scheduler, timestep, index)
    return all(torch.isclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(ours, measured, strict=True))


def _noise_ratio(at: Level) -> float:
    return float(at.sigma / at.alpha.clamp(min=1e-12))


def _far(x: Tensor, image: Tensor, slack: float = 0.0) -> bool:
    return not bool(((x - image).abs() <= TOLERANCE + slack).all())
