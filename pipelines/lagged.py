"""Feynman–Kac steering that reads rewards beside the denoiser's next call, and resamples by them a step later."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from steer.background import Begin, in_background
from steer.errors import InputError
from steer.offloading import is_offloaded
from steer.pipelines.fk_run import Reading, Run, StepReport
from steer.seam import Answer, Event


class LaggedRun(Run):
    """A run whose potentials G_j(x̂0(x_t)) multiply the weights one step after x_t.

    G_j is a function of the path up to x_t: whether it is multiplied there or a step later, before any further reading,
    the product over the path is the same, and with it what the weighted particles are drawn from.
    """

    lag = 1
    beside: Callable[[torch.device], AbstractContextManager[Begin]] = staticmethod(in_background)
    begin: Begin  # while the pipeline runs
    pending: Callable[[], Reading] | None = None

    def sample(self) -> Tensor:
        """Runs the pipeline to its end: the finished images (B·K, 3, H, W) of the K particles that are left."""
        check_stays(self.population.pipe)
        with self.beside(torch.device(self.population.pipe.device)) as self.begin:
            return super().sample()

    def on_event(self, event: Event) -> Answer:
        """One solver step: resample by what was read at the step before, begin to read, move on."""
        rows: Tensor | None = None
        reading: Reading | None = None
        if self.pending is None:
            self._tell(StepReport(event.k, event.total))
        else:
            reading, self.pending = self.pending(), None
            rows = self._resampled(reading, event.k - self.lag, event)
        if self._reads_at(event):
            x0 = event.x0() if rows is None else event.x0()[rows]
            self.pending = self.begin(lambda: self._read_off(x0))
        return rows, self._moved(event, rows, reading)


def check_stays(pipe: Any) -> None:
    """Raises InputError where the pipeline's parts take turns on the device: then two cannot compute at once."""
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    if moved := [name for name, module in modules.items() if is_offloaded(module)]:
        raise InputError(f"overlap: {', '.join(moved)} are offloaded and take turns on the device: leave overlap out")
