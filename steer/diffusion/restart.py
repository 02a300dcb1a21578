"""Runs that start at a later solver step: a scheduler whose timesteps begin there, as in image-to-image."""

import copy
import functools
from typing import Any

from steer.diffusion.schedules import Scheduler


def starting_at(scheduler: Scheduler, step: int) -> Scheduler:
    """Copy a scheduler whose runs begin at solver step `step`: earlier timesteps are left out, the grid stays.

    The rule of diffusers' image-to-image pipelines: timesteps from step · order on, and `begin_index` there.
    """
    later = copy.copy(scheduler)
    later.__class__ = _later_class(type(scheduler))
    vars(later)["_skipped_steps"] = step
    return later


@functools.cache
def _later_class(kind: type) -> type:
    """Subclass a scheduler's class, under its name; instances without `_skipped_steps` are as before."""

    @functools.wraps(kind.set_timesteps)  # type: ignore[attr-defined]
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        kind.set_timesteps(self, *args, **kwargs)  # type: ignore[attr-defined]
        if skipped := vars(self).get("_skipped_steps", 0) * getattr(self, "order", 1):
            self.timesteps = self.timesteps[skipped:]
            if hasattr(self, "set_begin_index"):
                self.set_begin_index(skipped)

    return type(kind.__name__, (kind,), {"set_timesteps": set_timesteps, "__module__": kind.__module__})
