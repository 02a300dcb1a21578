"""Short runs of a pipeline: a scheduler copy whose `set_timesteps` gives a few timesteps of a longer run.

Its `step` computes nothing and returns the latents unchanged: step hooks replace them. Everything else stays that
scheduler's own: scaling of the denoiser's input, noise levels, prediction type. A run that starts at a later solver
step (`starting_at`) keeps the scheduler's own `step` too.
"""

import copy
import functools
import inspect
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steer.diffusion.schedules import Scheduler, is_flow, predict_x0, stepped_timesteps
from steer.errors import UnsupportedPipelineError

STATE, PLACES, RATIO, FIRST = "_short_state", "_short_places", "_short_ratio", "_first_transition"


class StepOutput(tuple[Tensor, Tensor]):
    """Latents and x̂0 after a step, for pipelines that take `[0]` and for those that take `.prev_sample`."""

    @property
    def prev_sample(self) -> Tensor:
        return self[0]

    @property
    def pred_original_sample(self) -> Tensor:
        return self[1]


def last_step_only(scheduler: Scheduler) -> Scheduler:
    """Copy a scheduler so that its runs, of any number of steps, consist of their last step alone."""
    return _short(scheduler, None, None)


def at_places(
    scheduler: Scheduler, places: Sequence[int], hooked: Sequence[str] = (), ratio: float | None = None
) -> Scheduler:
    """Copy the scheduler of a run so that the copy's runs have the timesteps at `places` of that run's `timesteps`.

    hooked  attributes that are not copied
    ratio   level σ/α that the last place is moved to
    """
    state = {name: value for name, value in vars(scheduler).items() if name not in hooked}
    return _short(scheduler, state, list(places), ratio)


def _short(
    scheduler: Scheduler, state: dict[str, Any] | None, places: list[int] | None, ratio: float | None = None
) -> Scheduler:
    short = copy.copy(scheduler)
    kind: type = getattr(scheduler, "base_class", type(scheduler))
    short.__class__ = _short_class(kind)
    vars(short).update({STATE: state, PLACES: places, RATIO: ratio})
    return short


@functools.cache
def _short_class(kind: type) -> type:
    """Return a subclass of a scheduler's class whose runs are short."""

    @functools.wraps(kind.set_timesteps)  # type: ignore[attr-defined]
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        if vars(self)[STATE] is None:
            kind.set_timesteps(self, *args, **kwargs)  # type: ignore[attr-defined]
            keep_places(self, [transition_starts(self)[-1]])
        else:
            vars(self).update(vars(self)[STATE])
            run = torch.as_tensor(self.timesteps), getattr(self, "sigmas", None)
            keep_places(self, vars(self)[PLACES])
            if vars(self)[RATIO] is not None:
                _move_level(self, len(vars(self)[PLACES]) - 1, vars(self)[RATIO], *run)

    @functools.wraps(kind.step)  # type: ignore[attr-defined]
    def step(self: Any, model_output: Tensor, timestep: Any, sample: Tensor, *_: Any, **__: Any) -> StepOutput:
        index = getattr(self, "_step_index", None) or 0
        x0 = predict_x0(self, model_output, timestep, sample, index) if _converts(kind) else sample
        if hasattr(self, "_step_index"):
            self._step_index = index + 1
        return StepOutput((sample, x0))

    own = {"set_timesteps": set_timesteps, "step": step, "order": 1, "base_class": kind}
    if not hasattr(kind, "scale_model_input"):  # some pipelines leave it out for this very class alone (Bria)
        own["scale_model_input"] = lambda self, sample, timestep=None: sample
    return type(kind.__name__, (kind,), own)


def _converts(kind: Any) -> bool:
    """Return whether pipelines may call `step` for x̂0 alone (EDM)."""
    return "pred_original_sample" in inspect.signature(kind.step).parameters


def starting_at(scheduler: Scheduler, step: int) -> Scheduler:
    """Copy a scheduler so that its runs begin with solver step `step` (from 0) of the whole run, by its own `step`."""
    kind: type = type(scheduler)
    later = copy.copy(scheduler)
    later.__class__ = _later_class(kind)
    vars(later)[FIRST] = step
    return later


@functools.cache
def _later_class(kind: type) -> type:
    """Return a subclass of a scheduler's class whose runs start later."""

    @functools.wraps(kind.set_timesteps)  # type: ignore[attr-defined]
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        kind.set_timesteps(self, *args, **kwargs)  # type: ignore[attr-defined]
        keep_places(self, range(transition_starts(self)[vars(self)[FIRST]], len(stepped_timesteps(self))))

    return type(kind.__name__, (kind,), {"set_timesteps": set_timesteps, "base_class": kind})


def keep_places(scheduler: Scheduler, places: Sequence[int]) -> None:
    """Keep the timesteps at some places, with their `sigmas` and the last one, which marks the end."""
    timesteps, stepped = torch.as_tensor(scheduler.timesteps), stepped_timesteps(scheduler)
    at = torch.tensor(places, device=timesteps.device)
    scheduler.timesteps = torch.cat([stepped[at], timesteps[len(stepped) :]])  # and the last one, if it marks the end
    if getattr(scheduler, "sigmas", None) is not None:
        sigmas = torch.as_tensor(scheduler.sigmas)
        scheduler.sigmas = torch.cat([sigmas[at.to(sigmas.device)], sigmas[-1:]])
    if hasattr(scheduler, "prk_timesteps"):  # PNDM, without its warm-up
        scheduler.prk_timesteps, scheduler.counter = [], 0
    if hasattr(scheduler, "_step_index"):
        scheduler._step_index, scheduler._begin_index = 0, None


def _move_level(scheduler: Scheduler, place: int, ratio: float, timesteps: Tensor, sigmas: Any) -> None:
    """Move one place of a short run to the level σ/α = r.

    Without `sigmas`, to the nearest timestep. With them, σ = r, or r/(1 + r) for flows with α = 1 − σ, and the timestep
    is interpolated between the timesteps of the whole run, linearly in σ for flows, else in log σ.

    ratio              r > 0
    timesteps, sigmas  of the whole run; sigmas are None where the scheduler has none
    """
    if sigmas is None:
        cumulative = torch.as_tensor(scheduler.alphas_cumprod).double().cpu()
        distance = (((1 - cumulative) / cumulative).log() / 2 - math.log(ratio)).abs()
        scheduler.timesteps[place] = int(distance.argmin())
        return
    flow = is_flow(scheduler)
    sigma = ratio / (1 + ratio) if flow else ratio
    count = min(len(timesteps), len(torch.as_tensor(sigmas)))
    known = torch.as_tensor(sigmas)[:count].double().cpu().numpy()
    order = known.argsort()
    axis = (lambda values: values) if flow else np.log
    at = np.interp(axis(sigma), axis(known[order]), timesteps[:count].double().cpu().numpy()[order])
    kind = scheduler.timesteps.dtype
    scheduler.timesteps[place] = torch.tensor(at).to(kind) if kind.is_floating_point else round(float(at))
    scheduler.sigmas[place] = sigma


def check_movable(scheduler: Scheduler) -> None:
    """Raise UnsupportedPipelineError for a scheduler whose places cannot be moved to another level."""
    if getattr(scheduler, "sigmas", None) is None and not hasattr(scheduler, "alphas_cumprod"):
        raise UnsupportedPipelineError(
            f"{type(scheduler).__name__} has no noise levels between its steps: use kernel='gaussian'"
        )


def transition_starts(scheduler: Scheduler) -> list[int]:
    """Return the places in `scheduler.timesteps` at which the transitions of a whole run begin.

    Some solvers call the denoiser several times in a transition (Heun, KDPM2, PNDM's warm-up).
    """
    count = len(stepped_timesteps(scheduler))
    if hasattr(scheduler, "prk_timesteps"):
        if warm_up := len(scheduler.prk_timesteps):
            return [*range(0, warm_up, 4), *range(warm_up, count)]
        return [0, *range(2, count)]
    return list(range(0, count, 2 if getattr(scheduler, "order", 1) == 2 else 1))
