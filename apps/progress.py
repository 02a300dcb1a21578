"""A picture of noise optimisations: how the reward grew, and whether the noise stayed as long as noise is."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from steer.apps.pictures import FAINT, INK, SHADE, shown

Report = dict[str, Any]
Numbers = NDArray[np.float64]
MOST_LINES = 6  # prompts with a line of their own
BAND = (10, 90)  # per cent of the prompts


def draw_progress(report: Report, out: Path) -> Path:
    """Writes progress.png: the reward and ‖ε‖/√D by iteration, each seed thin, the best bold.

    Where there are too many prompts to tell apart, the means over them, with a band of most of them.
    """
    entries = report["prompts"]
    figure = Figure(figsize=(10, 4.1 + 0.18 * min(len(entries), MOST_LINES)), dpi=120, layout="constrained")
    reward, norm = figure.subplots(1, 2)
    (_lines if len(entries) <= MOST_LINES else _means)(reward, norm, entries)
    norm.axhline(1, color=INK, lw=0.8, ls=":", zorder=0)
    _finish(reward, f"reward {shown(report['settings']['reward'], 55)}")
    _finish(norm, "length of the noise, ‖ε‖/√D (dotted: random noise)")
    handles, labels = reward.get_legend_handles_labels()
    if len(handles) > 1:
        figure.legend(handles, labels, loc="outside lower left", frameon=False, fontsize=8, labelcolor=INK)
    figure.suptitle(_title(report), size=9, x=0.01, ha="left", color=INK)
    figure.savefig(out / "progress.png")
    return out / "progress.png"


def _title(report: Report) -> str:
    entries, seeds = report["prompts"], report["settings"]["particles"]
    of = f"“{shown(entries[0]['prompt'])}”" if len(entries) == 1 else f"{len(entries)} prompts"
    each = f"{seeds} {'seed' if seeds == 1 else 'seeds'}{' each' * (len(entries) > 1)}"
    return f"{report['method']}, {of}, {each}\nbold: the best; thin: all seeds"


def _lines(reward: Axes, norm: Axes, entries: Sequence[dict[str, Any]]) -> None:
    """A colour for each prompt."""
    for number, entry in enumerate(entries):
        color = colormaps[SHADE](0.85 * number / (len(entries) - 1) if len(entries) > 1 else 0.25)
        trace, first = entry["trace"], entry["order"][0]
        best, lengths = np.max(trace["best"], axis=1), np.array(trace["norms"])
        _draw(reward, np.array(trace["rewards"]), color, bold=False)
        _draw(norm, lengths, color, bold=False)
        _draw(reward, best, color, bold=True, label=shown(entry["prompt"]))
        _draw(norm, lengths[:, first], color, bold=True)


def _means(reward: Axes, norm: Axes, entries: Sequence[dict[str, Any]]) -> None:
    """Means over prompts, drawn as the lines of one. A search that has ended keeps its last values."""
    longest = max(len(entry["trace"]["best"]) for entry in entries)

    def series(name: str, entry: dict[str, Any]) -> Numbers:
        values = np.array(entry["trace"][name])
        return np.pad(values, ((0, longest - len(values)), (0, 0)), mode="edge")

    color = colormaps[SHADE](0.25)
    best = np.array([series("best", entry).max(1) for entry in entries])
    lengths = np.array([series("norms", entry)[:, entry["order"][0]] for entry in entries])
    seeds = np.mean([series("rewards", entry).mean(1) for entry in entries], axis=0)
    for axes, values in ((reward, best), (norm, lengths)):
        low, high = np.percentile(values, BAND, axis=0)
        band = f"{BAND[1] - BAND[0]} % of the prompts"
        axes.fill_between(range(longest), low, high, color=color, alpha=0.18, lw=0, label=band)
        _draw(axes, values.mean(0), color, bold=True, label="mean over prompts")
    _draw(reward, seeds, color, bold=False, label="mean over prompts and seeds")


def _draw(axes: Axes, values: Numbers, color: Any, *, bold: bool, label: str | None = None) -> None:
    """A line, or of (iterations, seeds) several; a single iteration is a dot."""
    style: dict[str, Any] = {"lw": 2.2, "zorder": 3} if bold else {"lw": 0.9, "alpha": 0.6}
    dot = "o" if len(values) == 1 else None
    axes.plot(range(len(values)), values, color=color, marker=dot, label=label, **style)


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, size=9, loc="left", color=INK)
    axes.set_xlabel("iteration (0: the noise it began with)", size=8, color=INK)
    axes.tick_params(labelsize=8, color=FAINT, labelcolor=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.grid(axis="y", color=FAINT, lw=0.4, alpha=0.6)
