"""Runs that start at a later solver step, by a scheduler copy whose `set_timesteps` leaves out the earlier steps."""

import copy
import functools
from typing import Any

from steer.diffusion.schedules import Scheduler, stepped_timesteps
from steer.diffusion.short_schedule import keep_places, transition_starts

FIRST = "_first_transition"


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
