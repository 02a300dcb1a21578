"""Pictures of the steering study: accuracy against cost, and settings changed one at a time."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from steer.apps.pictures import FAINT, INK

COLOURS = {
    "FK": "#832db6",
    "best-of-n": "#e76300",
    "SVDD": "#3f90da",
    "SVDD, as published": "#5cb5c9",
    "beam search": "#a96b59",
    "zero-order search": "#94a4a2",
}
COSTS = {"evaluations": "denoiser evaluations of a prompt", "seconds": "seconds of a prompt, one thread"}


def draw_steering(found: dict[str, Any], path: Path) -> None:
    """Share of prompts whose picked image is right, against evaluations and against seconds; a row for each panel."""
    panels = found["panels"]
    figure = Figure(figsize=(10.5, 0.5 + 3.7 * len(panels)), dpi=120, layout="constrained")
    grid = figure.subplots(len(panels), 2, squeeze=False, sharey="row", sharex="col")
    for places, (count, curves) in zip(grid, panels.items(), strict=True):
        for axes, (cost, title) in zip(places, COSTS.items(), strict=True):
            for name, rows in curves.items():
                if name in COLOURS:
                    _curve(axes, name, rows, cost)
                else:
                    _reference(axes, name, rows, cost)
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_xlabel(title, color=INK)
            _plain(axes)
        said = f"{count} held-out prompts" if count == str(found["prompts"]) else f"{count} of them, all methods"
        places[0].set_title(f"picked image right: {said}", size=10, loc="left", color=INK)
        everything = places[1].get_legend_handles_labels()  # another model's points are drawn there only
        places[0].legend(*everything, frameon=False, fontsize=8, loc="upper left")
    figure.savefig(path)


def _curve(axes: Axes, name: str, rows: list[dict[str, Any]], cost: str) -> None:
    mean, low, high = zip(*(row["right"] for row in rows), strict=True)
    at = [row[cost] for row in rows]
    axes.plot(at, mean, color=COLOURS[name], marker="o", ms=4, lw=1.7, label=name)
    axes.fill_between(at, low, high, color=COLOURS[name], alpha=0.1, lw=0)


def _reference(axes: Axes, name: str, rows: list[dict[str, Any]], cost: str) -> None:
    """Another model: its unsteered images as a line, against time its points too: its evaluations are dearer."""
    axes.axhline(rows[0]["right"][0], color=INK, lw=1, ls="--", label=f"{name}, unsteered")
    if cost == "seconds":
        at, mean = [row[cost] for row in rows], [row["right"][0] for row in rows]
        axes.plot(at, mean, color=INK, marker="s", ms=4, lw=1, ls=":", label=f"{name}, best-of-n")


def draw_ablations(found: dict[str, Any], path: Path) -> None:
    """What is right with every value of every factor; hollow: the standard. Bars: 95 % of the difference from it."""
    rows = [(factor, value, row) for factor, values in found["factors"].items() for value, row in values.items()]
    gaps = [sum(rows[i][0] != rows[i + 1][0] for i in range(place)) for place in range(len(rows))]
    heights = [-(place + 0.7 * gap) for place, gap in enumerate(gaps)]
    figure = Figure(figsize=(10.5, 1.2 + 0.24 * (len(rows) + 0.7 * gaps[-1])), dpi=120, layout="constrained")
    titles = {"right": "picked image right", "met": "requirements it meets", "all_right": "of all K images right"}
    grid = figure.subplots(1, len(titles), sharey=True)
    for axes, (field, title) in zip(grid, titles.items(), strict=True):
        for height, (_, _, row) in zip(heights, rows, strict=True):
            mean, (difference, low, high) = row[field][0], row["minus_standard"][field]
            axes.plot([mean - difference + low, mean - difference + high], [height] * 2, color=FAINT, lw=2, zorder=1)
            face = "white" if row["standard"] else COLOURS["FK"]
            axes.plot(mean, height, "o", ms=6, color=COLOURS["FK"], markerfacecolor=face, zorder=2)
            if row["standard"]:
                axes.axvline(mean, color=FAINT, lw=0.8, ls=":", zorder=0)
        axes.set_title(title, size=10, loc="left", color=INK)
        _plain(axes)
    names = [f"{factor}: {value}" for factor, value, _ in rows]
    grid[0].set_yticks(heights, names, size=8)
    figure.supxlabel("hollow: the standard settings; bars: 95 % interval of the difference from them", size=8, x=0.6)
    figure.savefig(path)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.grid(color=FAINT, alpha=0.3)
    axes.tick_params(labelcolor=INK, color=FAINT)
