"""The output folder of a training: metrics, checkpoints and exported weights."""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steer.diffusion.seeds import get_random_state, set_random_state
from steer.errors import InputError
from steer.files import write_checksums, write_errors, write_text
from steer.pipelines.training.config import TrainingConfig
from steer.pipelines.training.distributed import AccelerateContext
from steer.pipelines.training.method import Record, TrainingMethod
from steer.pipelines.training.rollouts import RolloutBuffer, rollout_from_tensors, rollout_to_tensors
from steer.training.checkpoint import Checkpoint, Checkpoints, load_optimiser, optimiser_tensors
from steer.training.guards import EarlyStopping, KLControl
from steer.training.optimisers import set_learning_rate
from steer.training.trainable import Trainable, set_parameter, whole

logger = logging.getLogger(__name__)

RESUMABLE, REMEDY = "resumable", "make room, then resume"
SCHEDULE_FIELDS = {"learning_rate", "max_steps", "lr_scheduler_type", "lr_num_cycles", "lr_power"}
LOG_FILES = {"records": "metrics.jsonl", "evaluations": "evaluations.jsonl"}


def read_logs(folder: Path) -> tuple[list[Record], list[Record]]:
    """Return the records of updates and of evaluations so far in the folder of a run. Raises OSError."""
    paths = [folder / name for name in LOG_FILES.values()]
    lines = [path.read_text(encoding="utf-8").splitlines() if path.exists() else [] for path in paths]
    updates, evaluations = ([json.loads(line) for line in some] for some in lines)
    return updates, evaluations


@dataclass
class RunState:
    """The state of a training, as a checkpoint holds it.

    step, num_rollouts  numbers of updates and rollouts so far
    rollout             the samples of the next updates; None: to be collected
    old                 average of the weights, used to draw samples; None: the trained weights draw samples
    """

    method: TrainingMethod[Any]
    trainable: Trainable
    optimiser: Any
    schedule: Any
    scaler: Any
    ema: Any
    control: KLControl
    early_stopping: EarlyStopping
    step: int = 0
    num_rollouts: int = 0
    rollout: RolloutBuffer | None = None
    old: Any = None
    records: list[Record] = field(default_factory=list)
    evaluations: list[Record] = field(default_factory=list)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters, in a fixed order."""
        return list(self.trainable.parameters.values())

    def set_parameter(self, weights: Mapping[str, Tensor]) -> None:
        """Replace the weights, by name."""
        for name, parameter in self.trainable.parameters.items():
            set_parameter(parameter, weights[name])

    def ema_weights(self) -> AbstractContextManager[None]:
        """Use the moving average of the weights, if any, inside the block."""
        return self._averaged(self.ema)

    def old_policy(self) -> AbstractContextManager[None]:
        """Use the weights that draw the samples inside the block."""
        return self._averaged(self.old)

    @torch.no_grad()
    def average_policy(self, decay: float) -> None:
        """Move the weights that draw samples towards the trained weights: old ← decay · old + (1 − decay) · trained."""
        if self.old is not None:
            for average, parameter in zip(self.old.shadow_params, self.parameters, strict=True):
                average.lerp_(parameter.detach(), 1 - decay)

    @contextmanager
    def _averaged(self, average: Any) -> Iterator[None]:
        if average is None:
            yield
            return
        average.store(self.parameters)
        average.copy_to(self.parameters)
        try:
            yield
        finally:
            average.restore(self.parameters)


class RunFolder:
    """The folder `path` of one run.

    identity     plain values that must be equal when the run is resumed
    resumable    plain values that may differ when the run is resumed; differences are logged
    config_dict  plain values to save with every checkpoint
    """

    def __init__(
        self,
        path: Path,
        identity: Mapping[str, Any],
        config_dict: Mapping[str, Any],
        config: TrainingConfig,
        context: AccelerateContext,
        resumable: Mapping[str, Any] | None = None,
    ) -> None:
        self.path, self.config_dict, self.context, self.chunk = path, dict(config_dict), context, config.micro_batch
        self.identity = json.loads(json.dumps(identity), parse_constant=str)  # JSON has no inf
        self.resumable = json.loads(json.dumps(resumable or {}), parse_constant=str)
        self.checkpoints = Checkpoints(path / "checkpoints", config.save_total_limit)

    def open(self, run: RunState, resume_from: Checkpoint | None) -> None:
        """Restore the run from a checkpoint, and rewrite its logs to that point."""
        if resume_from is not None:
            self._restore(run, resume_from)
            logger.info("resumed %s at update %d", self.path, run.step)
            self._change(run, resume_from)
        if not self.context.is_main_process:
            return
        with write_errors(self.path, REMEDY):
            for series, name in LOG_FILES.items():
                lines = [json.dumps(record, allow_nan=False) + "\n" for record in getattr(run, series)]
                write_text(self.path / name, "".join(lines))

    def _change(self, run: RunState, resume_from: Checkpoint) -> None:
        """Apply the values that differ from the checkpoint's, and log each in one line."""
        there = resume_from.json("identity") | resume_from.json("identity").get(RESUMABLE, {})
        changed = {name: value for name, value in self.resumable.items() if there.get(name, value) != value}
        for name, value in changed.items():
            if self.context.is_main_process:
                logger.warning("resumed with another %s: %r, before it was %r", name, value, there[name])
        for group in run.optimiser.param_groups:
            group["weight_decay"] = changed.get("weight_decay", group["weight_decay"])
        if changed.keys() & SCHEDULE_FIELDS:
            set_learning_rate(run.schedule, self.resumable["learning_rate"])

    def log(self, series: str, record: Record) -> None:
        """Append a line to a log file; resuming rewrites it to the last checkpoint."""
        if not self.context.is_main_process:
            return
        with write_errors(self.path, REMEDY), (self.path / LOG_FILES[series]).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")

    def save(self, run: RunState) -> None:
        """Save everything that the next update depends on, independent of the number of processes.

        All processes must call this method: their shards are gathered.
        """
        random = self.context.gather([get_random_state()])
        rollout = run.rollout and rollout_to_tensors(run.rollout, self.context)
        weights = {name: whole(value.detach()) for name, value in run.trainable.parameters.items()}
        moments, optimiser = optimiser_tensors(run.optimiser)
        shadow, old = ([whole(value) for value in one.shadow_params] if one else [] for one in (run.ema, run.old))
        if not self.context.is_main_process:
            return
        tensors: dict[str, dict[str, Tensor]] = {
            "weights": weights,
            "optimiser": moments,
            "random": {name: torch.stack([state[name] for state in random]) for name in random[0]},
        }
        values: dict[str, Any] = {
            "state": {
                "step": run.step,
                "num_rollouts": run.num_rollouts,
                "optimiser": optimiser,
                "schedule": run.schedule.state_dict(),
                "kl_weight": run.control.weight,
                "kl_highest": run.control.highest,
                "kl_stalled": run.control.stalled,
                "early_stopping": run.early_stopping.state(),
                "method": run.method.state_dict(),
                "scaler": run.scaler.state_dict() if run.scaler else None,
                # As lines of JSON, since a checkpoint sorts keys: an evaluation's first reward is the trained one.
                **{series: [json.dumps(record) for record in getattr(run, series)] for series in LOG_FILES},
            },
            "identity": self.identity | {RESUMABLE: self.resumable},
            "config": self.config_dict,
        }
        if run.ema:
            tensors["average"] = dict(zip(weights, shadow, strict=True))
            values["average"] = {"step": run.ema.optimization_step}
        if run.old:
            tensors["old"] = dict(zip(weights, old, strict=True))
        if rollout:
            tensors["rollout"], values["rollout"] = rollout
        pinned = [] if run.early_stopping.best_step is None else [run.early_stopping.best_step]
        self.checkpoints.save(run.step, tensors, values, pinned=pinned)

    def _restore(self, run: RunState, saved: Checkpoint) -> None:
        state = saved.json("state")
        run.set_parameter(saved.tensors("weights"))
        load_optimiser(run.optimiser, saved.tensors("optimiser"), state["optimiser"])
        run.schedule.load_state_dict(state["schedule"])
        kept = {name: state[f"kl_{name}"] for name in ("weight", "highest", "stalled")}
        run.control = replace(run.control, **kept)
        run.early_stopping = run.early_stopping.load_state(state["early_stopping"])
        run.method.load_state_dict(state["method"])
        run.step, run.num_rollouts = state["step"], state["num_rollouts"]
        run.records, run.evaluations = ([json.loads(line) for line in state[series]] for series in LOG_FILES)
        if run.scaler and state["scaler"]:
            run.scaler.load_state_dict(state["scaler"])
        if run.ema:
            _load_average(run, run.ema, saved.tensors("average"))
            run.ema.optimization_step = saved.json("average")["step"]
        if run.old:
            _load_average(run, run.old, saved.tensors("old"))
        if (saved.path / "rollout.json").exists():
            rollout = saved.tensors("rollout"), saved.json("rollout")
            run.rollout = rollout_from_tensors(*rollout, self.context, self.chunk)
        random = saved.tensors("random")
        if self.context.rank < len(random["cpu"]):  # an additional process starts with its own state
            set_random_state({name: states[self.context.rank] for name, states in random.items()})

    def load_best(self, run: RunState) -> None:
        """Load the weights of the best evaluation, or their moving average."""
        saved = Checkpoint.open(self.checkpoints.folder / f"step-{run.early_stopping.best_step:08d}")
        run.set_parameter(saved.tensors("average" if run.ema else "weights"))

    def export(self, run: RunState, name: str) -> Path:
        """Write the weights in diffusers' format, with checksums; replace earlier weights once complete."""
        state = run.trainable.state()
        written = [self._export(run.trainable, state, name) if self.context.is_main_process else Path()]
        return self.path / name / self.context.gather(written)[0]

    def _export(self, trainable: Trainable, state: Mapping[str, Tensor], name: str) -> Path:
        new, old = (self.path / f".{name}.{kind}" for kind in ("new", "old"))
        with write_errors(self.path, REMEDY):
            for left in (new, old):
                shutil.rmtree(left, ignore_errors=True)
            written = trainable.write(state, new)
            write_checksums(new)
            if (self.path / name).exists():
                os.rename(self.path / name, old)
            os.rename(new, self.path / name)
            shutil.rmtree(old, ignore_errors=True)
        return written.relative_to(new)


def _load_average(run: RunState, average: Any, saved: Mapping[str, Tensor]) -> None:
    """Restore an average of the weights by name."""
    for name, value in zip(run.trainable.parameters, average.shadow_params, strict=True):
        set_parameter(value, saved[name])


def checkpoint_to_resume(path: Path, resume: bool, warn: Callable[[str], None] = logger.warning) -> Checkpoint | None:
    """Return the newest whole checkpoint of the run in a folder; None where there is no run yet.

    warn  called with a line about each checkpoint that is skipped
    Raises InputError for a folder that has a run while `resume` is false, or a run without a whole checkpoint.
    """
    newest, skipped = Checkpoints(path / "checkpoints").latest()
    if not resume and (newest or skipped or (path / LOG_FILES["records"]).exists()):
        raise InputError(
            f"{path} holds a run already: resume it (--resume or resume_from_checkpoint) or choose another output_dir"
        )
    if newest is None and skipped:
        raise InputError(f"{path}: no checkpoint there is whole ({skipped[0]}); choose another output_dir")
    for line in skipped:
        warn(f"skipped a checkpoint: {line}")
    return newest
