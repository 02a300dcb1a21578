"""Finetuning studies: runs of a plan at equal seconds, as gains of rewards over seconds and √KL."""

import json
import re
from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import color_sequences
from matplotlib.figure import Figure
from scipy import stats

from steer.apps.finetuning import FinetuneConfig, finetune, read_config
from steer.apps.plots import DPI, FAINT, INK, Numbers, save_figure, set_title, style_axes
from steer.apps.prompts import load_prompts
from steer.apps.scenes.preferences import write_choices, write_labelled_pairs
from steer.apps.scenes.training import beginning_with
from steer.errors import InputError
from steer.files import write_text
from steer.pipelines.training.state import read_logs
from steer.pipelines.training.trainer import PAUSED
from steer.yaml_text import read_yaml

EVALUATIONS = 8  # of a run, evenly spaced in seconds, beside the first one
PAIRS = 2000  # for runs with `preferences: pairs`
HOLD_OUT = "scene"
COLOURS, MARKERS = color_sequences["tab10"], "os^vDPX*"
LINEAR, KL_TICKS = 10, (0, 5, 10, 20, 50, 100, 200)  # of the axis of √KL
Figures = dict[str, Any]
Run = Mapping[str, str]  # "config", an embedded configuration, and the keys it changes, as on the command line


def read_plan(path: Path) -> dict[str, Run]:
    """Read the runs of a plan by name: the keys that all share, and those of each run. Raises InputError, OSError."""
    plan = read_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(plan, dict) or set(plan) != {"shared", "runs"}:
        raise InputError(f"{path}: a plan has two keys, shared and runs, as docs/studies/finetuning-methods.yaml")
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


class TimeLimit:
    """Callback that evaluates a run EVALUATIONS times and ends it, by the seconds of its updates."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_step_end(self, args: Any, state: Any, control: Any, **details: Any) -> None:
        """Count the seconds of all updates, those before an interruption too."""
        spent = [record["seconds"] for record in state.log_history]
        before, now = (int(EVALUATIONS * sum(some) / self.seconds) for some in (spent[:-1], spent))
        control.should_evaluate, control.should_training_stop = now > before, now >= EVALUATIONS


def finetuning_study(
    runs: Mapping[str, Run],
    folder: Path,
    model: str,
    reward: str,
    seconds: float,
    seeds: int,
    only: Sequence[str] = (),
    pairs: int = PAIRS,
) -> Figures:
    """Train each run with each seed for so many seconds of updates; finished ones are kept, others resumed.

    Returns curves by the name of the run, on the held-out prompts: `trained`, `hold_out`, `kl` and `images` at
    EVALUATIONS + 1 times, each [mean, low, high] with the 95 % t interval of the mean over seeds; `trained_by_seed`, a
    curve of each. Rewards are gains since the base model.
    """
    place = folder / re.sub(r"\W+", "-", f"{Path(model).name} {reward}")
    names = beginning_with(runs, only, "run of the plan")
    grid = np.linspace(0, seconds, EVALUATIONS + 1)
    figures: Figures = {"model": Path(model).name, "reward": reward, "hold_out": HOLD_OUT, "seeds": seeds}
    figures |= {"seconds": grid.tolist(), "runs": {}}
    for name in names:
        curves = []
        for seed in range(seeds):
            run = dict(runs[name]) | {"model": model, "reward": reward, "seed": str(seed)}
            run |= {"eval_rewards": json.dumps([HOLD_OUT])}
            if run.get("preferences") in ("pairs", "choices"):
                run["preferences"] = _preferences(run["preferences"], place, model, reward, pairs)
            curves.append(train_curve(run, place / f"{name}-{seed}", grid, reward))
        run_figures = {key: _interval([one[key] for one in curves]) for key in curves[0]}
        figures["runs"][name] = run_figures | {"trained_by_seed": [one["trained"].tolist() for one in curves]}
    return figures


def _preferences(kind: str, place: Path, model: str, reward: str, pairs: int) -> str:
    """Write what a run learns from: `pairs` labelled by the reward, or `choices` of a simulated annotator with it."""
    if kind == "choices":
        write_choices(place / "choices", model, reward)
        return str(place / "choices")
    prompts = list(islice(cycle(load_prompts("scenes-training")), pairs))
    return str(write_labelled_pairs(place / "pairs", model, reward, prompts))


def train_curve(run: Run, out: Path, grid: Numbers, reward: str) -> dict[str, Numbers]:
    """Train a run, or resume it, and return its curves at the seconds of the grid, after the end those of the end."""
    config, limit = read_run(run, out), out / "seconds.txt"  # that it was given: a guard can end it earlier
    if not limit.exists() or float(limit.read_text()) < grid[-1]:
        result = finetune(config, resume=(out / "checkpoints").exists(), callbacks=[TimeLimit(grid[-1])])
        if result.stopped not in PAUSED:  # an interrupted run is resumed by the same command
            write_text(limit, f"{grid[-1]}\n")
    records, evaluations = read_logs(out)
    spent = np.cumsum([0.0, *(one["seconds"] for one in records)])
    times = [spent[one["step"]] for one in evaluations]
    images = config.training.train_batch_size * config.training.num_generations
    values = {
        "trained": [one[f"eval/{reward}"][0] - evaluations[0][f"eval/{reward}"][0] for one in evaluations],
        "hold_out": [one[f"eval/{HOLD_OUT}"][0] - evaluations[0][f"eval/{HOLD_OUT}"][0] for one in evaluations],
        "kl": [one["eval/kl"] for one in evaluations],
        "images": [one["step"] * images for one in evaluations],
    }
    return {name: np.interp(grid, times, series) for name, series in values.items()}


def _interval(series: Sequence[Numbers]) -> list[list[float]]:
    """Return [mean, low, high] of each place of the curves of several seeds; of one seed three times its value."""
    values = np.array(series)
    mean, half = values.mean(0), np.zeros(values.shape[1])
    if len(values) > 1:
        half = stats.t.ppf(0.975, len(values) - 1) * values.std(0, ddof=1) / len(values) ** 0.5
    return np.stack([mean, mean - half, mean + half], 1).tolist()


def first_reaching(grid: Numbers, values: Numbers, level: float) -> float | None:
    """Return the time at which a curve of straight lines first reaches a level; None where it never does."""
    if not (above := np.flatnonzero(values >= level)).size:
        return None
    place = int(above[0])
    if place == 0:
        return float(grid[0])
    share = (level - values[place - 1]) / (values[place] - values[place - 1])
    return float(grid[place - 1] + share * (grid[place] - grid[place - 1]))


def curves_table(figures: Figures, reached: bool = True) -> str:
    """Write the ends of all runs as a table of Markdown, and when each reaches the mean end of the first one.

    reached  whether to write the latter
    """
    (first, run), hold_out = next(iter(figures["runs"].items())), figures["hold_out"]
    level = run["trained"][-1][0]
    names = ["run", figures["reward"], hold_out, "√KL, √nats", "images"]
    if reached:
        names += [f"seconds to {level:+.3f}, as {first} after {figures['seconds'][-1]:.0f}", f"{hold_out} at that time"]
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for name, one in figures["runs"].items():
        ends = one["trained"][-1], one["hold_out"][-1]
        interval = "{0:+.3f} [{1:.3f}, {2:.3f}]" if figures["seeds"] > 1 else "{0:+.3f}"
        root, images = max(one["kl"][-1][0], 0) ** 0.5, one["images"][-1][0]
        cells = [name, *(interval.format(*end) for end in ends), f"{root:.1f}", f"{images:.0f}"]
        cells += _reached(figures["seconds"], one, level) if reached else []
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _reached(grid: Sequence[float], run: Figures, level: float) -> tuple[str, str]:
    """Write when the mean gain of a run reaches a level, with the range of its seeds, and the hold-out at that time."""
    trained, hold_out = (np.array(run[key])[:, 0] for key in ("trained", "hold_out"))
    seconds = first_reaching(np.array(grid), trained, level)
    if seconds is None:
        return "–", "–"
    by_seed = [first_reaching(np.array(grid), np.array(one), level) for one in run["trained_by_seed"]]
    bounds = [f"{one:.0f}" for one in sorted(one for one in by_seed if one is not None)]
    last = bounds[-1] if len(bounds) == len(by_seed) else "–"  # a seed that does not reach it
    return f"{seconds:.0f} ({bounds[0]} to {last})", f"{np.interp(seconds, grid, hold_out):+.3f}"


def draw_finetuning_curves(figures: Figures, path: Path) -> None:
    """Draw the gain of the trained reward over seconds, and that of the hold-out over √KL, linear up to LINEAR."""
    figure = Figure(figsize=(10.5, 4.5), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, one), colour, marker in zip(figures["runs"].items(), cycle(COLOURS), cycle(MARKERS), strict=False):
        root = np.sqrt(np.array(one["kl"])[:, 0].clip(0))
        for axes, x, key in ((left, figures["seconds"], "trained"), (right, root, "hold_out")):
            mean, low, high = np.array(one[key]).T
            axes.plot(x, mean, color=colour, lw=1.5, marker=marker, ms=4, label=name)
            axes.fill_between(x, low, high, color=colour, alpha=0.08, lw=0)
    right.set_xscale("symlog", linthresh=LINEAR)
    ticks = [one for one in KL_TICKS if one <= right.get_xlim()[1]]
    right.set_xticks(ticks, [f"{one}" for one in ticks])
    titles = {left: f"{figures['reward']}, trained", right: f"{figures['hold_out']}, held out"}
    for axes, label in ((left, "seconds of updates"), (right, "√KL from the base model, √nats")):
        axes.axhline(0, color=FAINT, lw=0.9)
        axes.set_xlabel(label, color=INK)
        set_title(axes, f"gain of {titles[axes]}, on unseen prompts")
        style_axes(axes)
    left.legend(frameon=False, fontsize=8)
    save_figure(figure, path)
