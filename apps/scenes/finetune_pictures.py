"""Pictures of the finetuning runs: methods side by side, and what a guard does."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from steer.apps.pictures import FAINT, INK
from steer.staged import staged

COLOURS = {"prdp": "#832db6", "ddpo": "#e76300", "grpo": "#3f90da", "d3po": "#2f7d32"}
GUARDS = {
    "left alone": "d3po, a high rate",
    "watched": "the same, watched by the held-out reward",
    "watched, KL held": "the same, watched, and held by a KL penalty",
}
DASHES = {"seen": "-", "unseen": (0, (2, 1))}
TRAINED, HELD_OUT = "aesthetic:scenes", "scene"
TITLES = {TRAINED: "rise of the trained reward", HELD_OUT: "rise of what was asked for, exact, not trained on"}


def draw_methods(found: Mapping[str, Any], path: Path) -> None:
    """Trained and held-out reward by update, on few prompts and on many, for prompts seen and unseen."""
    rows = {row["shows"]: row for row in found["rows"]}
    figure = Figure(figsize=(10.5, 7.2), dpi=120, layout="constrained")
    for line, name in zip(figure.subplots(2, 2, sharex=True, sharey="row"), (TRAINED, HELD_OUT), strict=True):
        for axes, (size, shown) in zip(line, (("few", "32 prompts"), ("many", "1,024 prompts")), strict=True):
            for method in ("prdp", "ddpo", "grpo"):
                if (row := rows.get(f"{method}, {size} prompts")) is not None:
                    _curves(axes, row, name, method.upper(), COLOURS[method])
            _finish(axes, f"{TITLES[name]}; {shown}")
    figure.axes[0].legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper left", ncols=2)
    with staged(path) as new:
        figure.savefig(new, format="png")


def draw_guards(found: Mapping[str, Any], path: Path) -> None:
    """The same run left alone, watched, and held: both rewards by update, on unseen prompts."""
    rows = {row["shows"]: row for row in found["rows"]}
    runs = {label: rows.get(shows) for label, shows in GUARDS.items()}
    figure = Figure(figsize=(10.5, 3.8), dpi=120, layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), (TRAINED, HELD_OUT), strict=True):
        for (label, row), colour in zip(runs.items(), ("#e76300", "#2f7d32", "#3f90da"), strict=True):
            if row is not None:
                _band(axes, row["curves"][name]["unseen"], colour, "-", label)
                axes.axvline(row["kept"][0], color=colour, lw=1.2, ls=":", label=f"{label}: weights kept")
        _finish(axes, TITLES[name])
    figure.axes[0].legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper left")
    with staged(path) as new:
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
