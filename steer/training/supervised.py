"""A resumable training loop: AdamW, learning-rate schedule, progress bar and a log for plots."""

import hashlib
import json
import logging
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm.auto import tqdm

from steer.errors import InputError
from steer.files import atomic_write, write_errors

logger = logging.getLogger(__name__)

# Appended to torch's file, whose reader ignores the trailer: torch verifies no checksum itself.
TRAILER = re.compile(rb"\nsha256 ([0-9a-f]{64})\n")
TRAILER_LENGTH = 73


class StepCallback(Protocol):
    """A callback for every step, saved with the run, such as a running average of the weights."""

    def step(self, parameters: Iterable[nn.Parameter]) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


def batch_at(step: int, size: int, count: int, seed: int = 0) -> Tensor:
    """Return the row numbers of the batch at one step: the order of an epoch depends on seed and epoch number alone."""
    per_epoch = max(count // size, 1)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step // per_epoch)
    order = torch.randperm(count, generator=generator)
    start = step % per_epoch * size
    return order[start : start + size]


@dataclass
class TrainingRun:
    """A training in a folder: `state.pt` (atomically written), `log.jsonl`, and the number of steps."""

    folder: Path
    steps: int
    learning_rate: float
    log_every: int = 50
    save_every: int = 200
    warmup: int = 100
    decay: float | None = None  # fraction of the steps with a linear decay to 0; None: a cosine over all steps
    start: int = 0  # first step of a run without a saved state: a warm start from given weights
    average: float | None = None  # decay of a running average of the weights, with which the modules end
    stop_after: float | None = None  # CPU seconds of this process, for runs of equal cost

    def _schedule(self, optimiser: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        """Return a schedule: warm up, keep the rate, decay linearly; `steps` may be raised until the decay begins."""
        if self.decay is None:
            return get_cosine_schedule_with_warmup(optimiser, self.warmup, self.steps)
        last = self.decay * self.steps

        def rate(step: int) -> float:
            return min((step + 1) / self.warmup, 1.0, max(self.steps - step, 0) / last)

        return torch.optim.lr_scheduler.LambdaLR(optimiser, rate)

    def _average(self, parameters: list[nn.Parameter]) -> EMAModel | None:
        if self.average is None:
            return None
        average = EMAModel(parameters, decay=self.average, use_ema_warmup=True, power=0.75)
        average.optimization_step = self.start
        return average

    def train(
        self, modules: Iterable[nn.Module], loss_at: Callable[[int], Tensor], after: StepCallback | None = None
    ) -> None:
        """Minimise `loss_at(step)` from the last saved step; `after` is called once per step."""
        modules = list(modules)
        parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=1e-4, betas=(0.9, 0.98))
        schedule = self._schedule(optimiser)
        average = self._average(parameters)
        callbacks = [one for one in (after, average) if one]
        stateful: list[Any] = [*modules, optimiser, schedule, *callbacks]
        first = self._load(stateful, parameters[0].device)
        schedule.last_epoch = first
        if isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):  # recomputed, since `steps` may have changed
            for group, base, rate in zip(optimiser.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
                group["lr"] = base * rate(first)
        started, losses = time.monotonic(), []
        steps = tqdm(range(first, self.steps), self.folder.name, self.steps, initial=first, unit="step", disable=None)
        for step in steps:
            loss = loss_at(step)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            schedule.step()
            for callback in callbacks:
                callback.step(parameters)
            losses.append(loss.item())
            if (step + 1) % self.log_every == 0:
                seconds = (time.monotonic() - started) / (step + 1 - first)
                self._log({"step": step + 1, "loss": float(np.mean(losses)), "seconds_per_step": round(seconds, 3)})
                losses.clear()
            time_is_up = self.stop_after is not None and time.process_time() > self.stop_after
            if (step + 1) % self.save_every == 0 or step + 1 == self.steps or time_is_up:
                self._save(step + 1, stateful)
            if time_is_up:
                break
        if average:
            average.copy_to(parameters)

    def _load(self, stateful: list[Any], device: torch.device) -> int:
        path = self.folder / "state.pt"
        if not path.exists():
            return self.start
        saved = read_state(path, device)
        for target, state in zip(stateful, saved["states"], strict=True):
            target.load_state_dict(state)
        logger.info("resumed %s at step %d", self.folder, saved["step"])
        return saved["step"]

    def _save(self, step: int, stateful: list[Any]) -> None:
        write_state(self.folder / "state.pt", {"step": step, "states": [target.state_dict() for target in stateful]})

    def _log(self, record: dict[str, float]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        logger.info("%s", record)


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values in torch's format with their checksum. Raises InputError where writing fails."""
    buffer = BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    with write_errors(path), atomic_write(path) as new:
        new.write_bytes(data + f"\nsha256 {hashlib.sha256(data).hexdigest()}\n".encode())


def read_state(path: Path, device: torch.device) -> dict[str, Any]:
    """Read and verify a file of `write_state`; older files have no checksum. Raises InputError for a corrupt file."""
    corrupt = f"{path} is corrupt; delete it to start over"
    try:
        data = path.read_bytes()
        if trailer := TRAILER.fullmatch(data[-TRAILER_LENGTH:]):
            data = data[:-TRAILER_LENGTH]
            if hashlib.sha256(data).hexdigest() != trailer[1].decode():
                raise InputError(f"{corrupt}: checksum mismatch")
        buffer = BytesIO(data)
        saved: dict[str, Any] = torch.load(buffer, weights_only=True, map_location=device)
    except (InputError, MemoryError, torch.OutOfMemoryError):  # out of memory does not mean corrupt
        raise
    except Exception as error:  # torch's reader may raise nearly anything on a corrupt file
        raise InputError(f"{corrupt} ({' '.join(str(error).split())[:80]})") from error
    return saved
