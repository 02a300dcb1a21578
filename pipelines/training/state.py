"""The folder of a finetuning run: its records, its checkpoints and the weights it exports."""

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from steer.diffusion.seeds import put_random_state, random_state
from steer.errors import InputError
from steer.files import write_sums, write_text
from steer.pipelines.training.config import TrainingConfig
from steer.pipelines.training.distributed import AccelerateContext
from steer.pipelines.training.method import Record, TrainingMethod
from steer.pipelines.training.rollouts import Round, joined, round_from, round_tensors, shared_out
from steer.training.checkpoint import Checkpoint, Checkpoints, load_optimiser, optimiser_tensors
from steer.training.guards import EarlyStopping, KLControl
from steer.training.trainable import Trainable, put, whole

logger = logging.getLogger(__name__)

CHANGEABLE = "changeable"
SERIES = {"records": "metrics.jsonl", "evaluations": "evaluations.jsonl"}


@dataclass
class RunState:
    """All that changes while a method trains.

    step, rounds  updates made, rounds drawn
    round         the one that is being learnt from
    """

    method: TrainingMethod
    trainable: Trainable
    optimiser: Any
    schedule: Any
    scaler: Any
    ema: Any
    control: KLControl
    watch: EarlyStopping
    step: int = 0
    rounds: int = 0
    round: Round | None = None
    records: list[Record] = field(default_factory=list)
    evaluations: list[Record] = field(default_factory=list)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained, in a fixed order."""
        return list(self.trainable.parameters.values())

    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Puts weights, by name, in the place of the present ones."""
        for name, parameter in self.trainable.parameters.items():
            put(parameter, weights[name])

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the weights are their average, where there is one."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self.ema.restore(self.parameters)


class RunFolder:
    """The folder `path` of one run.

    identity  plain values that make the run this run: what goes on must have the same
    changeable  settings that may differ when it is resumed, as plain values: those that do are logged
    about     plain values to be saved with every checkpoint
    keep      checkpoints to keep
    """

    def __init__(
        self,
        path: Path,
        identity: Mapping[str, Any],
        about: Mapping[str, Any],
        settings: TrainingConfig,
        team: AccelerateContext,
        changeable: Mapping[str, Any] | None = None,
    ) -> None:
        self.path, self.about, self.team, self.chunk = path, dict(about), team, settings.micro_batch
        self.identity = json.loads(json.dumps(identity), parse_constant=str)  # inf is no JSON
        self.changeable = json.loads(json.dumps(changeable or {}), parse_constant=str)
        self.checkpoints = Checkpoints(path / "checkpoints", settings.keep_checkpoints)

    def find(self, resume: bool) -> Checkpoint | None:
        """The newest whole checkpoint, to be gone on from; None where nothing is there yet.

        Raises InputError for a folder that holds another run, or this one where nobody asked to resume.
        """
        found, skipped = self.checkpoints.latest()
        for line in skipped:
            logger.warning("skipped a checkpoint: %s", line)
        if not resume and (found or skipped or (self.path / SERIES["records"]).exists()):
            raise InputError(f"{self.path} holds a run already: resume it, or choose another output folder")
        if found is None and skipped:
            raise InputError(f"{self.path}: no checkpoint there is whole ({skipped[0]}); choose another output folder")
        if found is not None:
            _check_identity(self.identity, found)
        return found

    def open(self, run: RunState, found: Checkpoint | None) -> None:
        """Puts the run where a checkpoint was, and writes down its records so far."""
        if found is not None:
            self._restore(run, found)
            logger.info("resumed %s at update %d", self.path, run.step)
            self._change(run, found)
        if not self.team.is_main:
            return
        with self._writing():
            for series, name in SERIES.items():
                lines = [json.dumps(record, allow_nan=False) + "\n" for record in getattr(run, series)]
                write_text(self.path / name, "".join(lines))

    def _change(self, run: RunState, found: Checkpoint) -> None:
        """Apply the settings that differ from those of the checkpoint, and log each in one line."""
        there = found.json("identity") | found.json("identity").get(CHANGEABLE, {})
        changed = {name: value for name, value in self.changeable.items() if there.get(name, value) != value}
        for name, value in changed.items():
            if self.team.is_main:
                logger.warning("resumed with another %s: %r, before it was %r", name, value, there[name])
        for group in run.optimiser.param_groups:
            group["weight_decay"] = changed.get("weight_decay", group["weight_decay"])
        if (rate := changed.get("learning_rate")) is not None:
            inner = getattr(run.schedule, "scheduler", run.schedule)
            inner.base_lrs = [rate] * len(inner.base_lrs)
            inner._last_lr = [rate * scale(inner.last_epoch) for scale in inner.lr_lambdas]
            for group, present in zip(run.optimiser.param_groups, inner._last_lr, strict=True):
                group["initial_lr"], group["lr"] = rate, present

    def note(self, series: str, record: Record) -> None:
        """Adds a line to a series; what a crash leaves of it is written anew when the run goes on."""
        if not self.team.is_main:
            return
        with self._writing(), (self.path / SERIES[series]).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{self.path}: cannot write there ({reason}); make room, --resume goes on") from error

    def save(self, run: RunState) -> None:
        """A checkpoint of everything that the next update depends on, whatever the number of processes that made it.

        All of them have to call it: what each knows alone is gathered.
        """
        random, drew = self.team.gather([random_state()]), run.round and joined(run.round, self.team)
        weights = {name: whole(value.detach()) for name, value in run.trainable.parameters.items()}
        moments, optimiser = optimiser_tensors(run.optimiser)
        shadow = [whole(value) for value in run.ema.shadow_params] if run.ema else []
        if not self.team.is_main:
            return
        tensors: dict[str, dict[str, Tensor]] = {
            "weights": weights,
            "optimiser": moments,
            "random": {name: torch.stack([state[name] for state in random]) for name in random[0]},
        }
        values: dict[str, Any] = {
            "state": {
                "step": run.step,
                "rounds": run.rounds,
                "optimiser": optimiser,
                "schedule": run.schedule.state_dict(),
                "kl_weight": run.control.weight,
                "watch": run.watch.state(),
                "method": run.method.state(),
                "scaler": run.scaler.state_dict() if run.scaler else None,
                # As lines: a checkpoint sorts keys, and the first reward of an evaluation is the trained one.
                **{series: [json.dumps(record) for record in getattr(run, series)] for series in SERIES},
            },
            "identity": self.identity | {CHANGEABLE: self.changeable},
            "config": self.about,
        }
        if run.ema:
            tensors["average"] = dict(zip(weights, shadow, strict=True))
            values["average"] = {"step": run.ema.optimization_step}
        if drew:
            tensors["round"], values["round"] = round_tensors(drew)
        pinned = [] if run.watch.best_step is None else [run.watch.best_step]
        self.checkpoints.save(run.step, tensors, values, pinned=pinned)

    def _restore(self, run: RunState, saved: Checkpoint) -> None:
        state = saved.json("state")
        run.put(saved.tensors("weights"))
        load_optimiser(run.optimiser, saved.tensors("optimiser"), state["optimiser"])
        run.schedule.load_state_dict(state["schedule"])
        run.control = replace(run.control, weight=state["kl_weight"])
        run.watch = run.watch.restored(state["watch"])
        run.method.restore(state["method"])
        run.step, run.rounds = state["step"], state["rounds"]
        run.records, run.evaluations = ([json.loads(line) for line in state[series]] for series in SERIES)
        if run.scaler and state["scaler"]:
            run.scaler.load_state_dict(state["scaler"])
        if run.ema:
            average = saved.tensors("average")
            for name, value in zip(run.trainable.parameters, run.ema.shadow_params, strict=True):
                put(value, average[name])
            run.ema.optimization_step = saved.json("average")["step"]
        if (saved.path / "round.json").exists():
            joined = round_from(saved.tensors("round"), saved.json("round"))
            run.round = shared_out(joined, self.team, self.chunk)
        random = saved.tensors("random")
        if self.team.index < len(random["cpu"]):  # a process more than there were begins with its own
            put_random_state({name: states[self.team.index] for name, states in random.items()})

    def load_best(self, run: RunState) -> None:
        """Puts the weights of the best evaluation, or their average, in the place of the present ones."""
        saved = Checkpoint.open(self.checkpoints.folder / f"step-{run.watch.best_step:08d}")
        run.put(saved.tensors("average" if run.ema else "weights"))

    def export(self, run: RunState, name: str) -> Path:
        """The present weights, as diffusers reads them, and their sums; those of before stay until they are whole."""
        state = run.trainable.state()
        written = [self._export(run.trainable, state, name) if self.team.is_main else Path()]
        return self.path / name / self.team.gather(written)[0]

    def _export(self, trainable: Trainable, state: Mapping[str, Tensor], name: str) -> Path:
        new, old = (self.path / f".{name}.{kind}" for kind in ("new", "old"))
        with self._writing():
            for left in (new, old):
                shutil.rmtree(left, ignore_errors=True)
            written = trainable.write(state, new)
            write_sums(new)
            if (self.path / name).exists():
                os.rename(self.path / name, old)
            os.rename(new, self.path / name)
            shutil.rmtree(old, ignore_errors=True)
        return written.relative_to(new)


def _check_identity(identity: Mapping[str, Any], saved: Checkpoint) -> None:
    there = saved.json("identity")
    for name, value in identity.items():
        if name == "init_adapter" and value is None and name not in there:
            continue  # a run from before there was such a setting
        if there.get(name) != value:
            told = "" if len(str(value)) > 60 else f" ({there.get(name)!r} there, {value!r} here)"
            raise InputError(f"{saved.path} is of a run with another {name}{told}: choose another output folder")
