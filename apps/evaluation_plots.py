"""Pictures of an evaluation: rewards by contender, by task, and against what they cost."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from steer.apps.pictures import FAINT, INK, SHADE, shown
from steer.staged import staged

Json = Mapping[str, Any]
PICKED, EVERY = (colormaps[SHADE](place) for place in (0.12, 0.6))  # apart in grey too
MARKERS = "osD^vP*X<>ph"
NAME, LINES = 30, 3  # letters in a line of a contender's name, and lines
ROW, LINE = 0.3, 0.15  # inches of a contender with a name in one line, and of each further line
ASIDE = 0.055  # inches, of two marks in one row
PANEL, NARROWEST = 2.7, 5.2  # inches of a panel's width, of a picture's
MOST_REWARDS, REWARDS_BY_TASK, MOST_TASKS, TASKS_IN_A_ROW = 4, 2, 12, 4
WIDE = 12  # largest by smallest cost from which a scale is logarithmic
APART = 0.012  # of the scale, between contenders that cost the same


def labels(contenders: Sequence[Json]) -> list[str]:
    """Names of contenders for a picture: the model is left out where it is the same for all."""
    models = {one["model"] for one in contenders}
    model = models.pop() if len(models) == 1 else ""
    return [one["name"].removeprefix(model).strip() or one["name"] for one in contenders]


def named(name: str, letters: int = NAME, most: int = LINES) -> list[str]:
    """A name in few lines: of what is too long the end says most."""
    lines = textwrap.wrap(name, letters, break_on_hyphens=False)
    if len(lines) > most:
        kept = " ".join(lines)
        lines = textwrap.wrap("…" + kept[-(letters * most - letters // 2) :], letters, break_on_hyphens=False)[:most]
    return [shown(line, letters) for line in lines]


def draw_rewards(report: Json, out: Path) -> Path:
    """Writes rewards.png: for each reward the means and, against the first contender, differences and win rates."""
    contenders, names = report["contenders"], report["rewards"][:MOST_REWARDS]
    columns = 3 if len(contenders) > 1 else 1
    figure, places = _panels(contenders, len(names), columns)
    for row, name in zip(places, names, strict=True):
        told = [one["rewards"][name] for one in contenders]
        _means(row[0], contenders, told)
        _title(row[0], shown(name, 36))
        if columns == 3:
            _forest(row[1], [values.get("difference") for values in told], PICKED, "o")
            row[1].axvline(0, color=INK, lw=0.9, ls=":", zorder=0)
            _title(row[1], "difference from the first")
            _forest(row[2], [values.get("wins") for values in told], PICKED, "o")
            row[2].axvline(0.5, color=INK, lw=0.9, ls=":", zorder=0)
            row[2].set_xlim(-0.03, 1.03)
            _title(row[2], "win rate against the first")
    _legend(figure, places[0][0])
    return _saved(figure, out / "rewards.png")


def draw_tasks(report: Json, out: Path) -> Path | None:
    """Writes tasks.png: the means by task, for the first two rewards. None where prompts have no tags."""
    contenders, path = report["contenders"], out / "tasks.png"
    path.unlink(missing_ok=True)
    if contenders[0]["tasks"] is None:
        return None
    tags, names = list(contenders[0]["tasks"])[:MOST_TASKS], report["rewards"][:REWARDS_BY_TASK]
    panels = [(name, tag) for name in names for tag in tags]
    columns = min(len(tags), TASKS_IN_A_ROW)
    rows_each = -(-len(tags) // columns)
    figure, places = _panels(contenders, rows_each * len(names), columns)
    for place, (name, tag) in enumerate(panels):
        row, column = divmod(place % len(tags), columns)
        axes = places[place // len(tags) * rows_each + row][column]
        task = [one["tasks"][tag] for one in contenders]
        _means(axes, contenders, [one["rewards"][name] for one in task])
        prompts = f"{task[0]['prompts']} prompt{'s' * (task[0]['prompts'] > 1)}"
        _title(axes, f"{shown(tag or 'no tag', 24)}, {prompts}", shown(name, 38))
    for row in places:
        for axes in row:
            axes.set_visible(axes.has_data())
    _legend(figure, places[0][0])
    return _saved(figure, path)


def draw_costs(report: Json, out: Path) -> Path:
    """Writes costs.png: rewards against denoiser evaluations and seconds of a run; a line joins one contender's kin,
    who differ in their options alone."""
    names = report["rewards"][:MOST_REWARDS]
    figure = Figure(figsize=(9.2, 3.1 * len(names) + 0.9), dpi=120, layout="constrained")
    places = figure.subplots(len(names), 2, squeeze=False)
    families = _families(report["contenders"])
    for row, name in zip(places, names, strict=True):
        for axes, (what, about) in zip(row, COSTS.items(), strict=True):
            costs = [one["cost"][what] for one in report["contenders"]]
            wide = min(costs) > 0 and max(costs) > WIDE * min(costs)
            for number, family in enumerate(families.values()):
                # Side by side where they make the same number of evaluations.
                aside = APART * (number - (len(families) - 1) / 2) if what == "nfe" else 0
                shift = (max(costs) / min(costs)) ** aside if wide else aside * max(costs)
                x = [one["cost"][what] * shift if wide else one["cost"][what] + shift for one in family]
                _line(axes, x, [one["rewards"][name]["picked"] for one in family], number, len(families))
            _style(axes)
            axes.grid(axis="y", color=FAINT, lw=0.4, alpha=0.6)
            if wide:
                axes.set_xscale("log")
                axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.xaxis.set_major_formatter("{x:g}")
                axes.xaxis.set_minor_locator(NullLocator())
            else:
                axes.set_xlim(0, 1.1 * max(costs))
            axes.set_xlabel(about, size=8, color=INK)
        _title(row[0], shown(name, 46))
    handles, _ = places[0][0].get_legend_handles_labels()
    _below(figure, handles, ["\n".join(named(name, 44, 2)) for name in families])
    return _saved(figure, out / "costs.png")


COSTS = {"nfe": "denoiser evaluations of a run", "seconds": "seconds of a run"}


def _families(contenders: Sequence[Json]) -> dict[str, list[Json]]:
    """Contenders of one model, weights and method, under the name that they share."""
    found: dict[tuple[Any, ...], list[Json]] = {}
    for one in contenders:
        found.setdefault((one["model"], one["lora"], one["method"]), []).append(one)
    shared = []
    for (model, lora, method), family in found.items():
        words = f"{model}{' + ' * bool(lora)}{lora or ''} {method}"
        shared.append({"model": model, "name": family[0]["name"] if len(family) == 1 else words})
    return dict(zip(labels(shared), found.values(), strict=True))


def _line(axes: Axes, costs: Sequence[float], rewards: Sequence[Sequence[float]], number: int, count: int) -> None:
    color = colormaps[SHADE](0.9 * number / max(count - 1, 1))
    x, y, low, high = np.array(sorted((cost, *reward) for cost, reward in zip(costs, rewards, strict=True))).T
    style: dict[str, Any] = {"color": color, "marker": MARKERS[number % len(MARKERS)], "ms": 6, "lw": 1.4}
    bars: dict[str, Any] = {"elinewidth": 1, "capsize": 2.5, "mec": INK, "mew": 0.5}
    axes.errorbar(x, y, [y - low, high - y], label=str(number), **style, **bars)


def _panels(contenders: Sequence[Json], rows: int, columns: int) -> tuple[Figure, Any]:
    """Panels with a contender a row, the first on top, and their names on the left."""
    names = [named(name) for name in labels(contenders)]
    height = sum(ROW + LINE * (len(lines) - 1) for lines in names)
    width = 0.5 + 0.075 * max(len(line) for lines in names for line in lines)
    size = (max(width + PANEL * columns, NARROWEST), (height + 0.75) * rows + 0.6)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in places.flatten():
        _style(axes)
        axes.grid(axis="x", color=FAINT, lw=0.4, alpha=0.6)
        axes.tick_params(axis="y", length=0)
    first = places[0][0]
    first.set_yticks(_heights(names), ["\n".join(lines) for lines in names])
    first.set_ylim(height, 0)
    return figure, places


def _heights(names: Sequence[Sequence[str]]) -> list[float]:
    """The middle of each contender's row, in inches from the top."""
    found, top = [], 0.0
    for lines in names:
        height = ROW + LINE * (len(lines) - 1)
        found.append(top + height / 2)
        top += height
    return found


def _means(axes: Axes, contenders: Sequence[Json], told: Sequence[Json]) -> None:
    """Picked images; and all images, where that is something else."""
    several = [one["particles"] > 1 for one in contenders]
    if any(several):
        every = [values["all"] if more else None for more, values in zip(several, told, strict=True)]
        _forest(axes, every, EVERY, "D", [ASIDE] * len(told), "mean of all images")
    _forest(
        axes, [values["picked"] for values in told], PICKED, "o", [-ASIDE * more for more in several], "picked image"
    )
    if len(contenders) > 1:
        axes.axvline(told[0]["picked"][0], color=INK, lw=0.9, ls=":", zorder=0, label="the first contender")


def _forest(
    axes: Axes,
    rows: Sequence[Sequence[float] | None],
    color: Any,
    marker: str,
    shifts: Sequence[float] | None = None,
    label: str = "",
) -> None:
    """A mark and its interval in each row that has one; shifted down from the middle by so many inches."""
    heights = np.array(axes.get_yticks()) + (0 if shifts is None else np.array(shifts))
    told = [(height, *row) for height, row in zip(heights, rows, strict=True) if row is not None]
    y, mean, low, high = np.array(told).T
    style: dict[str, Any] = {"color": color, "marker": marker, "ms": 5, "ls": "", "elinewidth": 1.2, "capsize": 2}
    face = color if marker == "o" else "white"
    axes.errorbar(mean, y, xerr=[mean - low, high - mean], mfc=face, label=label or None, zorder=3, **style)


def _style(axes: Axes) -> None:
    axes.tick_params(which="both", labelsize=8, color=FAINT, labelcolor=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)


def _title(axes: Axes, *lines: str) -> None:
    axes.set_title("\n".join(lines), size=9, loc="left", color=INK)


def _legend(figure: Figure, axes: Axes) -> None:
    told = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    order = [name for name in ("picked image", "mean of all images", "the first contender") if name in told]
    texts = [f"{order[0]}, 95 % interval over prompts", *order[1:]]
    _below(figure, [told[name] for name in order], texts)


def _below(figure: Figure, handles: Sequence[Any], texts: Sequence[str]) -> None:
    columns = 1 if figure.get_size_inches()[0] < 6.5 else 2 if max(map(len, texts)) > 40 else 3
    style: dict[str, Any] = {"frameon": False, "fontsize": 8, "labelcolor": INK, "ncols": columns}
    figure.legend(handles, texts, loc="outside lower left", **style)


def _saved(figure: Figure, path: Path) -> Path:
    for axes in figure.axes:
        if axes.get_xscale() == "linear":
            axes.xaxis.set_major_locator(MaxNLocator(5))
    with staged(path) as new:
        figure.savefig(new, format="png")
    return path
