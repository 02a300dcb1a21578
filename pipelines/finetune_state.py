"""The folder of a finetuning run: its records, its checkpoints and the weights it exports."""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steer.checkpoint import Checkpoint, Checkpoints
from steer.errors import InputError
from steer.guards import KLControl
from steer.optimiser_state import load_optimiser, optimiser_tensors
from steer.pipelines.round_file import round_from, round_tensors
from steer.quiet import plain_values
from steer.staged import write_text

if TYPE_CHECKING:
    from steer.pipelines.finetune_run import FinetuneRun

logger = logging.getLogger(__name__)

SERIES = {"records": "metrics.jsonl", "evaluations": "evaluations.jsonl"}
# What a run that goes on may have otherwise than before.
FREE = {"max_steps", "eval_every", "patience", "checkpoint_every", "keep_checkpoints", "log_with", "kl_budget"}


class RunFolder:
    """`path`, for one run; `about` are plain values to be saved with every checkpoint."""

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.path, self.about = path, dict(about)

    def open(self, run: "FinetuneRun", resume: bool) -> None:
        """Makes the folder and, to resume, puts the run where its newest whole checkpoint was.

        Raises InputError for a folder that holds another run, or this one where nobody asked to resume.
        """
        self.checkpoints = Checkpoints(self.path / "checkpoints", run.settings.keep_checkpoints)
        self.identity = json.loads(json.dumps(_identity(run)))
        found, skipped = self.checkpoints.latest()
        for line in skipped:
            logger.warning("skipped a checkpoint: %s", line)
        if not resume and (found or skipped or (self.path / SERIES["records"]).exists()):
            raise InputError(f"{self.path} holds a run already: resume it, or choose another output folder")
        if found is None and skipped:
            raise InputError(f"{self.path}: no checkpoint there is whole ({skipped[0]}); choose another output folder")
        if found is not None:
            self._restore(run, found)
            logger.info("resumed %s at update %d", self.path, run.step)
        self.note(run)

    def note(self, run: "FinetuneRun") -> None:
        """Writes down the records so far."""
        try:
            for series, name in SERIES.items():
                lines = [json.dumps(record) + "\n" for record in getattr(run, series)]
                write_text(self.path / name, "".join(lines))
        except OSError as error:
            raise InputError(f"{self.path}: cannot write there ({error.strerror})") from error

    def save(self, run: "FinetuneRun") -> Path:
        """A checkpoint of everything that the next update depends on."""
        moments, optimiser = optimiser_tensors(run.optimiser.optimizer)
        tensors: dict[str, dict[str, Tensor]] = {
            "weights": {name: value.detach() for name, value in run.trainable.parameters.items()},
            "optimiser": moments,
            "random": {"cpu": torch.get_rng_state()},
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
                "scaler": run.accelerator.scaler.state_dict() if run.accelerator.scaler else None,
                "records": run.records,
                "evaluations": run.evaluations,
            },
            "identity": self.identity,
            "config": self.about,
        }
        if torch.cuda.is_initialized():
            states = torch.cuda.get_rng_state_all()
            tensors["random"] |= {f"cuda-{number}": state for number, state in enumerate(states)}
        if run.ema:
            named = zip(run.trainable.parameters, run.ema.shadow_params, strict=True)
            tensors["average"] = {name: value for name, value in named}  # noqa: C416 - a typed dict
            values["average"] = {"step": run.ema.optimization_step}
        if run.round:
            tensors["round"], values["round"] = round_tensors(run.round)
        pinned = [] if run.watch.best_step is None else [run.watch.best_step]
        return self.checkpoints.save(run.step, tensors, values, pinned=pinned)

    def _restore(self, run: "FinetuneRun", saved: Checkpoint) -> None:
        _check_identity(self.identity, saved)
        state = saved.json("state")
        self._put(run, saved.tensors("weights"))
        load_optimiser(run.optimiser.optimizer, saved.tensors("optimiser"), state["optimiser"])
        run.schedule.load_state_dict(state["schedule"])
        run.control = KLControl(state["kl_weight"], run.settings.kl_target, run.settings.kl_budget)
        run.watch = run.watch.restored(state["watch"])
        run.method.restore(state["method"])
        run.step, run.rounds = state["step"], state["rounds"]
        run.records, run.evaluations = state["records"], state["evaluations"]
        if run.accelerator.scaler and state["scaler"]:
            run.accelerator.scaler.load_state_dict(state["scaler"])
        if run.ema:
            average = saved.tensors("average")
            for name, value in zip(run.trainable.parameters, run.ema.shadow_params, strict=True):
                value.copy_(average[name])
            run.ema.optimization_step = saved.json("average")["step"]
        if (saved.path / "round.json").exists():
            run.round = round_from(saved.tensors("round"), saved.json("round"))
        random = saved.tensors("random")
        torch.set_rng_state(random.pop("cpu"))
        if random and torch.cuda.is_available():
            torch.cuda.set_rng_state_all([random[f"cuda-{number}"] for number in range(len(random))])

    def _put(self, run: "FinetuneRun", weights: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in run.trainable.parameters.items():
                parameter.copy_(weights[name])

    def load_weights(self, run: "FinetuneRun", step: int) -> None:
        """Puts the weights of a checkpoint, or their average, in the place of the present ones."""
        saved = Checkpoint.open(self.checkpoints.folder / f"step-{step:08d}")
        self._put(run, saved.tensors("average" if run.ema else "weights"))

    def export(self, run: "FinetuneRun", name: str) -> Path:
        """The present weights, as diffusers reads them."""
        return run.trainable.export(self.path / name)


def _identity(run: "FinetuneRun") -> dict[str, Any]:
    """What makes this run this run, as plain values."""
    pipe, exam = run.method.pipe, run.exam
    settings = {name: value for name, value in asdict(run.settings).items() if name not in FREE}
    return {
        **run.method.about(),
        "model": f"{type(pipe).__name__} {getattr(pipe.config, '_name_or_path', '')}".strip(),
        "scheduler": pipe.scheduler.to_json_string(),
        **run.source.about(),
        "eval_prompts": list(exam.prompts),
        "eval_rewards": [reward.name for reward in exam.held_out],
        **{name: plain_values(value) for name, value in settings.items()},
    }


def _check_identity(identity: Mapping[str, Any], saved: Checkpoint) -> None:
    there = saved.json("identity")
    for name, value in identity.items():
        if there.get(name) != value:
            told = "" if len(str(value)) > 60 else f" ({there.get(name)!r} there, {value!r} here)"
            raise InputError(f"{saved.path} is of a run with another {name}{told}: choose another output folder")
