"""A training loop that can be stopped: AdamW, cosine schedule, progress bar, a log that can be plotted."""

import json
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from diffusers.optimization import get_cosine_schedule_with_warmup
from torch import Tensor, nn
from tqdm.auto import tqdm

from steer.staged import staged

logger = logging.getLogger(__name__)


class Stateful(Protocol):
    """Anything that is saved with the run."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


class After(Stateful, Protocol):
    """Something to do once a step, like a running average of the weights."""

    def step(self, parameters: Iterable[nn.Parameter]) -> None: ...


def batch_at(step: int, size: int, count: int, seed: int = 0) -> Tensor:
    """Row numbers of the batch at one step: epochs in an order that depends on seed and epoch number alone."""
    per_epoch = max(count // size, 1)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step // per_epoch)
    order = torch.randperm(count, generator=generator)
    start = step % per_epoch * size
    return order[start : start + size]


@dataclass
class Run:
    """A folder with `state.pt` (written whole, then renamed), `log.jsonl`, and how far the run should go."""

    folder: Path
    steps: int
    learning_rate: float
    log_every: int = 50
    save_every: int = 200
    warmup: int = 100

    def train(self, modules: Iterable[nn.Module], loss_at: Callable[[int], Tensor], after: After | None = None) -> None:
        """Minimises `loss_at(step)` from the last saved step on; `after` is called once a step (for averages)."""
        modules = list(modules)
        parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=1e-4, betas=(0.9, 0.98))
        schedule = get_cosine_schedule_with_warmup(optimiser, self.warmup, self.steps)
        stateful = [*modules, optimiser, schedule, *([after] if after else [])]
        first = self._load(stateful, parameters[0].device)
        started, losses = time.monotonic(), []
        steps = tqdm(range(first, self.steps), self.folder.name, self.steps, initial=first, unit="step", disable=None)
        for step in steps:
            loss = loss_at(step)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            schedule.step()
            if after:
                after.step(parameters)
            losses.append(loss.item())
            if (step + 1) % self.log_every == 0:
                seconds = (time.monotonic() - started) / (step + 1 - first)
                self._log({"step": step + 1, "loss": float(np.mean(losses)), "seconds_per_step": round(seconds, 3)})
                losses.clear()
            if (step + 1) % self.save_every == 0 or step + 1 == self.steps:
                self._save(step + 1, stateful)

    def _load(self, stateful: list[Stateful], device: torch.device) -> int:
        path = self.folder / "state.pt"
        if not path.exists():
            return 0
        saved = torch.load(path, weights_only=True, map_location=device)
        for target, state in zip(stateful, saved["states"], strict=True):
            target.load_state_dict(state)
        logger.info("resumed %s at step %d", self.folder, saved["step"])
        return saved["step"]

    def _save(self, step: int, stateful: list[Stateful]) -> None:
        with staged(self.folder / "state.pt") as new:
            torch.save({"step": step, "states": [target.state_dict() for target in stateful]}, new)

    def _log(self, record: dict[str, float]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        logger.info("%s", record)
