"""The finetuning runs side by side: how far rewards rose on prompts that were learnt from, and on others."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from steer.apps.finetuning import FinetuneConfig, TrainingData, read_config
from steer.apps.models import load_pipeline
from steer.apps.plots import FAINT, INK
from steer.apps.prompts import load_prompts
from steer.apps.reward_specs import resolve_reward
from steer.apps.scenes.evaluate import interval
from steer.apps.scenes.preferences import CHOICES, write_choices
from steer.files import atomic_write, write_text
from steer.pipelines.training.evaluation import EvalResult
from steer.pipelines.training.method import TrainingResult, prompts_at

NUM_EVAL_PROMPTS = 96  # prompts that were learnt from, and as many that no training ever saw
# Equal images and equal updates for all; each method's own options, and learning rate, are those of its configuration.
SHARED_CHANGES = {
    "train_batch_size": "4",
    "num_generations": "8",
    "micro_batch": "32",
    "steps_per_generation": "2",
    "max_steps": "60",
    "eval_steps": "20",
    "num_generations_eval": "1",
    "save_steps": "20",
    "log_with": "[]",
}


@dataclass(frozen=True)
class RunConfig:
    """A run: an embedded configuration, the keys it changes as on the command line, and what it shows."""

    config: str
    shows: str
    changes: Mapping[str, str] = field(default_factory=dict)

    def read(self, folder: Path) -> FinetuneConfig:
        """All of its settings."""
        return read_config(self.config, SHARED_CHANGES | dict(self.changes) | {"output_dir": str(folder)})


def seeds_of(method: str, prompts: str, seeds: int, **changes: str) -> dict[str, RunConfig]:
    """The same run with several seeds."""
    summary = {"prompts": f"scenes-{prompts}"} | changes
    shows = f"{method}, {prompts} prompts"
    return {
        f"{method}-{prompts}-{seed}": RunConfig(f"{method}-scenes", shows, summary | {"seed": str(seed)})
        for seed in range(seeds)
    }


OFF_POLICY = {"prompts": "scenes-many", "steps_per_generation": "10"}  # a round's last update is nine updates old
HIGH_LEARNING_RATE = {"learning_rate": "3e-3", "max_steps": "80", "eval_steps": "10", "save_steps": "10"}
EARLY_STOPPING = {"early_stopping_patience": "2"}
EARLY_STOPPING_AND_KL = EARLY_STOPPING | {"kl_weight": "1e-3", "kl_target": "50"}
# As many images an update as the others, two for each choice.
FROM_PREFERENCES = {"prompts": "null", "train_batch_size": "16", "num_generations": "2"}
RUN_CONFIGS = {
    **seeds_of("prdp", "many", 3),
    **seeds_of("ddpo", "many", 3),
    **seeds_of("prdp", "few", 3),
    **seeds_of("ddpo", "few", 3),
    **seeds_of("grpo", "many", 1),
    **seeds_of("grpo", "few", 1),
    "prdp-stale": RunConfig("prdp-scenes", "prdp, ten updates a round", OFF_POLICY),
    "prdp-stale-unclipped": RunConfig("prdp-scenes", "the same without the clip", OFF_POLICY | {"clip": "1e9"}),
    "d3po-jpeg": RunConfig("d3po-scenes", "d3po on jpeg", {"reward": "jpeg"}),
    "d3po-scene": RunConfig("d3po-scenes", "d3po on scene", {"reward": "scene", "eval_rewards": "[aesthetic:scenes]"}),
    "d3po-choices": RunConfig("d3po-scenes", "d3po on 500 choices", FROM_PREFERENCES),
    "d3po-unguarded": RunConfig("d3po-scenes", "d3po, a high rate", HIGH_LEARNING_RATE),
    "d3po-watched": RunConfig(
        "d3po-scenes", "the same, watched by the held-out reward", HIGH_LEARNING_RATE | EARLY_STOPPING
    ),
    "d3po-guarded": RunConfig(
        "d3po-scenes", "the same, watched, and held by a KL penalty", HIGH_LEARNING_RATE | EARLY_STOPPING_AND_KL
    ),
}


def train(name: str, folder: Path) -> TrainingResult:
    """Trains folder/NAME as planned, from where it stopped; judged/STEP.json holds the rewards of every prompt."""
    run_config, out = RUN_CONFIGS[name], folder / name
    choices = folder / "choices"
    if run_config.changes.get("prompts") == "null":
        write_choices(choices)
        config = RunConfig(
            run_config.config, run_config.shows, dict(run_config.changes) | {"preferences": str(choices)}
        ).read(out)
    else:
        config = run_config.read(out)
    pipe = load_pipeline(config.job.model)
    pipe.set_progress_bar_config(disable=True)
    assert config.job.reward is not None
    prompts = load_prompts(config.job.prompts or "scenes-training")
    learnt = prompts if config.job.preferences is None else prompts[:CHOICES]
    eval_prompts = [*prompts_at(0, NUM_EVAL_PROMPTS, learnt, config.training.seed), *unseen(NUM_EVAL_PROMPTS)]
    eval_rewards = [resolve_reward(spec) for spec in config.job.eval_rewards]
    data = TrainingData(prompts, eval_prompts, resolve_reward(config.job.reward), eval_rewards)
    return config.trainer(pipe, data, callbacks=[Judged(out)]).train(resume_from_checkpoint=True)


class Judged:
    """Keeps every evaluation, prompt by prompt."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def on_evaluate(self, args: Any, state: Any, control: Any, **details: Any) -> None:
        """Write judged/STEP.json."""
        judged(self.out, details["evaluation"])


def unseen(count: int) -> list[str]:
    """Of the held-out prompts so many, evenly spaced: of every task as many as there are."""
    prompts = load_prompts("scenes-heldout")
    return [prompts[place * len(prompts) // count] for place in range(count)]


def judged(out: Path, method_results: EvalResult) -> None:
    """Keeps what an evaluation found, prompt by prompt: those that were learnt from, then the others."""
    summary = {name: values.mean(1).tolist() for name, values in method_results.rewards.items()}
    write_text(
        out / "judged" / f"{method_results.step:04d}.json",
        json.dumps({"prompts": method_results.prompts, "rewards": summary}),
    )


def read_evaluations(out: Path) -> dict[int, dict[str, Any]]:
    """What `judged` kept, by update."""
    return {int(path.stem): json.loads(path.read_text()) for path in sorted((out / "judged").glob("*.json"))}


LAST = 5  # updates before the weights that were kept, whose KL is averaged
HALVES = {"seen": slice(None, NUM_EVAL_PROMPTS), "unseen": slice(NUM_EVAL_PROMPTS, None)}


@dataclass(frozen=True)
class FinishedRun:
    """A finished run: its plan, how it ended, and its evaluations by update."""

    run_config: RunConfig
    result: TrainingResult
    judged: Mapping[int, Mapping[str, Any]]

    @property
    def last(self) -> int:
        """Updates behind the weights it ended with."""
        assert self.result.weights_step is not None, "finished"
        return self.result.weights_step

    @property
    def last_records(self) -> list[Any]:
        """Records of the last updates before those weights."""
        return [one for one in self.result.records if one["step"] <= self.last][-LAST:]

    def rewards(self, step: int, name: str, half: str) -> dict[str, float]:
        """Of each prompt of a half the mean reward after so many updates."""
        prompts, values = self.judged[step]["prompts"][HALVES[half]], self.judged[step]["rewards"][name][HALVES[half]]
        method_results: dict[str, list[float]] = {}
        for prompt, value in zip(prompts, values, strict=True):
            method_results.setdefault(prompt, []).append(value)
        return {prompt: float(np.mean(some)) for prompt, some in method_results.items()}

    def rises(self, step: int, name: str, half: str) -> dict[str, float]:
        """Since the start."""
        before, after = (self.rewards(at, name, half) for at in (0, step))
        return {prompt: after[prompt] - value for prompt, value in before.items()}


def study(folder: Path, only: Sequence[str]) -> dict[str, Any]:
    """Trains what is planned and not finished, and tells how it went; `only` begins the names of some.

    Rises are [mean, low, high], 95 % bootstrap intervals over prompts of what several seeds have in the mean.
    """
    names = [name for name in RUN_CONFIGS if not only or name.startswith(tuple(only))]
    runs = [FinishedRun(RUN_CONFIGS[name], train(name, folder), read_evaluations(folder / name)) for name in names]
    groups: dict[str, list[FinishedRun]] = {}
    for run in runs:
        groups.setdefault(run.run_config.shows, []).append(run)
    return {
        "rows": [row(shows, some) for shows, some in groups.items()],
        "differences": differences(groups),
    }


def row(shows: str, runs: Sequence[FinishedRun]) -> dict[str, Any]:
    """The runs of one plan with several seeds."""
    first, names = runs[0], list(runs[0].judged[0]["rewards"])
    records = [run.result.records for run in runs]
    return {
        "shows": shows,
        "seeds": len(runs),
        "updates": [run.result.step for run in runs],
        "kept": [run.last for run in runs],
        "stopped": [run.result.stopped for run in runs],
        "images": len(records[0]) * 32,
        "seconds": round(float(np.mean([sum(one["seconds"] for one in some) for some in records]))),
        "kl": round(float(np.mean([one["kl"] for run in runs for one in run.last_records])), 1),
        "rewards": {name: {half: summary(runs, name, half) for half in HALVES} for name in names},
        "curves": {
            name: {
                half: [[step, *mean_rise(runs, step, name, half)] for step in sorted(first.judged)] for half in HALVES
            }
            for name in names
        },
    }


def summary(runs: Sequence[FinishedRun], name: str, half: str) -> dict[str, Any]:
    """Base, end, and the rise between the two; also the rise by each seed."""
    before = [run.rewards(0, name, half).values() for run in runs]
    after = [run.rewards(run.last, name, half).values() for run in runs]
    return {
        "base": round(float(np.mean([list(some) for some in before])), 4),
        "end": round(float(np.mean([list(some) for some in after])), 4),
        "rise": interval(
            torch.tensor(list(mean_by_prompt([run.rises(run.last, name, half) for run in runs]).values()))
        ),
        "by_seed": [round(float(np.mean(list(run.rises(run.last, name, half).values()))), 4) for run in runs],
    }


def mean_rise(runs: Sequence[FinishedRun], step: int, name: str, half: str) -> list[float]:
    """[mean, low, high] of the rise up to one update."""
    return interval(
        torch.tensor(list(mean_by_prompt([run.rises(step, name, half) for run in runs if step in run.judged]).values()))
    )


def mean_by_prompt(rises: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Over the seeds that have a prompt."""
    prompts = dict.fromkeys(prompt for some in rises for prompt in some)
    return {prompt: float(np.mean([some[prompt] for some in rises if prompt in some])) for prompt in prompts}


def differences(groups: Mapping[str, Sequence[FinishedRun]]) -> dict[str, Any]:
    """PRDP's rise minus another method's, prompt by prompt, where both were trained on the same prompts."""
    method_results: dict[str, Any] = {}
    for size in ("few", "many"):
        ours = groups.get(f"prdp, {size} prompts")
        for other in ("ddpo", "grpo"):
            theirs = groups.get(f"{other}, {size} prompts")
            if ours and theirs:
                names = list(ours[0].judged[0]["rewards"])
                method_results[f"prdp minus {other}, {size} prompts"] = {
                    name: {half: paired(ours, theirs, name, half) for half in HALVES} for name in names
                }
    return method_results


def paired(ours: Sequence[FinishedRun], theirs: Sequence[FinishedRun], name: str, half: str) -> list[float]:
    """[mean, low, high] over the prompts that both have."""
    first, second = (mean_by_prompt([run.rises(run.last, name, half) for run in some]) for some in (ours, theirs))
    return interval(torch.tensor([first[prompt] - second[prompt] for prompt in first if prompt in second]))


COLOURS = {"prdp": "#832db6", "ddpo": "#e76300", "grpo": "#3f90da", "d3po": "#2f7d32"}
GUARDS = {
    "left alone": "d3po, a high rate",
    "watched": "the same, watched by the held-out reward",
    "watched, KL held": "the same, watched, and held by a KL penalty",
}
DASHES = {"seen": "-", "unseen": (0, (2, 1))}
TRAINED, HELD_OUT = "aesthetic:scenes", "scene"
TITLES = {TRAINED: "rise of the trained reward", HELD_OUT: "rise of what was asked for, exact, not trained on"}


def draw_methods(method_results: Mapping[str, Any], path: Path) -> None:
    """Trained and held-out reward by update, on few prompts and on many, for prompts seen and unseen."""
    rows = {row["shows"]: row for row in method_results["rows"]}
    figure = Figure(figsize=(10.5, 7.2), dpi=120, layout="constrained")
    for line, name in zip(figure.subplots(2, 2, sharex=True, sharey="row"), (TRAINED, HELD_OUT), strict=True):
        for axes, (size, shown) in zip(line, (("few", "32 prompts"), ("many", "1,024 prompts")), strict=True):
            for method in ("prdp", "ddpo", "grpo"):
                if (row := rows.get(f"{method}, {size} prompts")) is not None:
                    _curves(axes, row, name, method.upper(), COLOURS[method])
            _finish(axes, f"{TITLES[name]}; {shown}")
    figure.axes[0].legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper left", ncols=2)
    with atomic_write(path) as new:
        figure.savefig(new, format="png")


def draw_guards(method_results: Mapping[str, Any], path: Path) -> None:
    """The same run left alone, watched, and held: both rewards by update, on unseen prompts."""
    rows = {row["shows"]: row for row in method_results["rows"]}
    runs = {label: rows.get(shows) for label, shows in GUARDS.items()}
    figure = Figure(figsize=(10.5, 3.8), dpi=120, layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), (TRAINED, HELD_OUT), strict=True):
        for (label, row), colour in zip(runs.items(), ("#e76300", "#2f7d32", "#3f90da"), strict=True):
            if row is not None:
                _band(axes, row["curves"][name]["unseen"], colour, "-", label)
                axes.axvline(row["kept"][0], color=colour, lw=1.2, ls=":", label=f"{label}: weights kept")
        _finish(axes, TITLES[name])
    figure.axes[0].legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper left")
    with atomic_write(path) as new:
        figure.savefig(new, format="png")


def _curves(axes: Axes, row: Mapping[str, Any], name: str, label: str, colour: str) -> None:
    for half, dash in DASHES.items():
        _band(axes, row["curves"][name][half], colour, dash, f"{label}, {half}")


def _band(axes: Axes, curve: Sequence[Sequence[float]], colour: str, dash: Any, label: str) -> None:
    """Means of all seeds with their interval over prompts."""
    steps, mean, low, high = zip(*curve, strict=True)
    axes.fill_between(steps, low, high, color=colour, alpha=0.1, lw=0)
    axes.plot(steps, mean, color=colour, lw=1.8, ls=dash, marker="o", ms=3.5, label=label)


def _finish(axes: Axes, title: str) -> None:
    axes.axhline(0, color=INK, lw=0.8)
    axes.set_title(title, size=9.5, loc="left", color=INK)
    axes.set_xlabel("updates", size=8.5, color=INK)
    axes.tick_params(labelsize=8, color=FAINT, labelcolor=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.grid(color=FAINT, alpha=0.3)
