"""A picture of a benchmark: ratios, what was predicted of them, and where the seconds went."""

from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from steer.apps.bench.report import Json, spread
from steer.apps.pictures import FAINT, INK, SHADE, shown
from steer.staged import staged

FOUND, FORETOLD = colormaps[SHADE](0.15), colormaps[SHADE](0.7)
ROW = 0.34  # inches of a ratio


def draw(report: Json, path: Path) -> Path | None:
    """Writes a PNG; None where nothing was measured."""
    names = list(report["ratios"])
    if not names:
        return None
    figure = Figure(figsize=(12, 1.6 + ROW * max(len(names), 4)), dpi=120, layout="constrained")
    ratios, parts = figure.subplots(1, 2)
    _draw_ratios(ratios, report, names)
    _draw_parts(parts, report, names)
    where = f"{report['device']}, {report['threads']} thread{'s' * (report['threads'] != 1)}"
    figure.suptitle(f"{where}{'; ' * bool(report['note'])}{report['note']}", size=9, x=0.01, ha="left", color=INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    with staged(path) as new:
        figure.savefig(new, format="png")
    return path


def _draw_ratios(axes: Axes, report: Json, names: list[str]) -> None:
    for row, name in enumerate(names):
        low, high = spread(report["runs"][name])
        axes.plot([low, high], [row, row], color=FOUND, lw=2)
        axes.plot(report["ratios"][name], row, "o", color=FOUND, ms=6, label="found, quartiles" if row == 0 else None)
        foretold = report["predicted"].get(name) or {"ratio": None}
        if foretold["ratio"] is not None:
            axes.plot(foretold["ratio"], row, "D", mfc="white", mec=FORETOLD, ms=6, zorder=1)
    axes.plot([], [], "D", mfc="white", mec=FORETOLD, label="predicted", ls="")
    axes.axvline(1, color=INK, lw=0.9, ls=":", zorder=0)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks([0.5, 1, 2, 4])
    axes.set_yticks(range(len(names)), [shown(name, 44) for name in names])
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, ncols=2, loc="upper left", bbox_to_anchor=(-0.02, -0.05))
    _finish(axes, "ratio of seconds")


def _draw_parts(axes: Axes, report: Json, names: list[str]) -> None:
    """Seconds of both variants of each ratio, by the part that took them."""
    parts = sorted({part for name in names for one in _variants(report, name) for part in one["parts"]})
    colors = {part: colormaps[SHADE](place / max(len(parts), 1)) for place, part in enumerate(parts)}
    for row, name in enumerate(names):
        for one, aside in zip(_variants(report, name), (-0.18, 0.18), strict=True):
            left = 0.0
            for part, seconds in one["parts"].items():
                axes.barh(row + aside, seconds, 0.3, left=left, color=colors[part])
                left += seconds
            axes.barh(row + aside, max(one["median"] - left, 0), 0.3, left=left, color=FAINT)
    for part, color in [*colors.items(), ("all else", FAINT)]:
        axes.barh(0, 0, color=color, label=part)
    axes.set_yticks([])
    axes.invert_yaxis()
    # Below the axes: bars may be anywhere inside.
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, ncols=3, loc="upper left", bbox_to_anchor=(-0.02, -0.05))
    _finish(axes, "seconds; above the first variant, below the second")


def _variants(report: Json, name: str) -> list[dict[str, Any]]:
    return list(report["runs"][name]["variants"].values())


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, size=9, loc="left", color=INK)
    axes.tick_params(labelsize=8, color=FAINT, labelcolor=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.grid(axis="x", color=FAINT, lw=0.4, alpha=0.6)
