"""The finetuning study: runs of a plan such as docs/studies/finetuning.yaml, evaluated beside the base model."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steer.apps.evaluation.run import evaluate
from steer.apps.evaluation.spec import Contender
from steer.apps.finetuning import FinetuneConfig, finetune, read_config
from steer.apps.prompts import evenly_chosen, load_prompts
from steer.apps.scenes.preferences import CHOICES, write_choices
from steer.apps.yaml_text import read_yaml
from steer.pipelines.training.method import prompts_at

NUM_EVAL_PROMPTS = 96  # prompts that were learnt from, and as many that no training ever saw


Run = Mapping[
    str, str
]  # "config", a configuration of `steer finetune`, and the keys it changes, as on its command line


def read_plan(path: Path) -> dict[str, Run]:
    """Read the runs of a plan by name: the keys that all share, and those of each run."""
    plan = read_yaml(path.read_text(encoding="utf-8"), str(path))
    return {
        name: {
            key: value if isinstance(value, str) else json.dumps(value) for key, value in (plan["shared"] | run).items()
        }
        for name, run in plan["runs"].items()
    }


def read_run(run: Run, out: Path) -> FinetuneConfig:
    """Read the configuration of a run in a folder. Raises InputError."""
    changes = dict(run) | {"output_dir": str(out)}
    return read_config(changes.pop("config"), changes)


def train(run: Run, out: Path) -> FinetuneConfig:
    """Train a run as `steer finetune` does, or resume it; a finished one is left alone.

    A run without prompts learns from the simulated annotator's choices in the folder beside it.
    """
    preferences = out.parent / "choices"
    if run.get("prompts") == "null":
        write_choices(preferences)
        run = {**run, "preferences": str(preferences)}
    config = read_run(run, out)
    if not (out / "final").exists():
        finetune(config, resume=(out / "checkpoints").exists())
    return config


def finetuning_study(
    runs: Mapping[str, Run], folder: Path, only: Sequence[str] = (), count: int = NUM_EVAL_PROMPTS
) -> dict[str, Any]:
    """Train the runs whose names begin with one of `only` (by default all), and evaluate each beside the base model.

    A group of runs that learnt from the same prompts is one evaluation in folder/evaluation/PROMPTS, on prompts that
    were learnt from and on prompts that no training saw: the tasks "seen" and "unseen".
    """
    groups: dict[str, list[str]] = {}
    for name in runs:
        if not only or name.startswith(tuple(only)):
            groups.setdefault(train(runs[name], folder / name).job.prompts or "scenes-training", []).append(name)
    unseen = evenly_chosen(load_prompts("scenes-heldout"), count)  # of every task
    reports = {}
    for prompts, names in groups.items():
        learnt = list(dict.fromkeys(prompts_at(0, count, load_prompts(prompts)[:CHOICES], seed=0)))
        adapters = [None, *(str(folder / name / "final") for name in names)]
        reports[prompts] = evaluate(
            [Contender("scenes", adapter) for adapter in adapters],
            [*learnt, *unseen],
            ["aesthetic:scenes", "scene", "jpeg"],
            1,
            folder / "evaluation" / prompts,
            {"steps": 10, "guidance": 1.0, "eta": 1.0},
            tags=["seen"] * len(learnt) + ["unseen"] * len(unseen),
            batch=32,
        )
    return reports
