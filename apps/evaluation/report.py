"""Statistics, figures and tables of an evaluation."""

import json
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from PIL import Image
from torch import Tensor

from steer.apps.evaluation.spec import BASE_METHOD, ContenderResults, EvaluationSpec, Json, ResultStore, mean_cost
from steer.apps.plots import (
    BELOW,
    COLORMAP,
    DPI,
    GAP,
    INK,
    SIDE,
    Canvas,
    open_image,
    plain_text,
    save_figure,
    set_title,
    style_axes,
)
from steer.files import write_text
from steer.training.overoptimization import best_of_n_kl, interval

Table = Mapping[str, Tensor]  # values by reward
BEST_OF_N = "best-of-n"

# ---- Statistics: evaluation.json ----


def figures(
    spec: EvaluationSpec, particles: Sequence[int], stored: Sequence[ContenderResults], kl_prompts: int
) -> Json:
    """Compute evaluation.json: the specification, and the statistics and runs of each contender.

    An interval is [mean, low, high]: a 95 % bootstrap over prompts. Contenders are compared with the first one.
    """
    prompts = [{"prompt": prompt} for prompt in spec.prompts]
    if spec.tags is not None:
        prompts = [one | {"tag": tag} for one, tag in zip(prompts, spec.tags, strict=True)]
    contenders = []
    for size, one in zip(particles, stored, strict=True):
        stats = one.identity | {"particles": size} | _statistics(spec, one, stored[0])
        if one.identity["weights"] is not None:
            stats["kl"] = one.kl.get(str(kl_prompts))
        elif one.identity["method"] == BEST_OF_N:
            stats["kl"] = {"nats": [best_of_n_kl(size)] * 3, "best_of": size}
        runs = [{"prompt": place} | run for place in range(len(prompts)) for run in one.runs[place]]
        contenders.append(stats | {"environments": one.environments, "runs": runs})
    return spec.identity() | {"prompts": prompts, "contenders": contenders}


def _statistics(spec: EvaluationSpec, one: ContenderResults, first: ContenderResults) -> Json:
    picked, means = reward_tables(spec, one)
    baseline = reward_tables(spec, first)[0]
    rewards: Json = {}
    for name in spec.rewards:
        rewards[name] = {"picked": prompt_interval(picked[name]), "all": prompt_interval(means[name])}
        if one is not first:
            rewards[name]["difference"] = prompt_interval(picked[name] - baseline[name])
            rewards[name]["wins"] = prompt_interval(wins(picked[name], baseline[name]))
    diversities = [value for place in range(len(spec.prompts)) if (value := one.diversity[place]) is not None]
    runs = [run for prompt_runs in one.runs.values() for run in prompt_runs]
    return {
        "rewards": rewards,
        "tasks": None if spec.tags is None else _task_statistics(spec.tags, picked, means),
        "diversity": interval(torch.tensor(diversities)) if diversities else None,
        "cost": mean_cost(runs),
        "stopped": sum(run["stopped"] is not None for run in runs),
    }


def reward_tables(spec: EvaluationSpec, one: ContenderResults) -> tuple[Table, Table]:
    """Tabulate rewards as (prompts, seeds): the picked image's reward in each run, and the mean of all images."""

    def table(name: str, value: Callable[[list[float]], float]) -> Tensor:
        places = range(len(spec.prompts))
        values = [[value(run["rewards"][name]) for run in one.runs[n]] for n in places]
        return torch.tensor(values, dtype=torch.float64)

    return {n: table(n, itemgetter(0)) for n in spec.rewards}, {n: table(n, fmean) for n in spec.rewards}


def prompt_interval(values: Tensor) -> list[float]:
    """Bootstrap [mean, low, high] of (prompts, seeds): seeds are averaged, prompts resampled."""
    return interval(values.mean(1).float())


def wins(values: Tensor, first: Tensor) -> Tensor:
    """Mark values above those of the first contender with 1, ties with ½, others with 0."""
    return (values > first).float() + 0.5 * (values == first).float()


def _task_statistics(tags: Sequence[str], picked: Table, means: Table) -> dict[str, Any]:
    """Compute the mean rewards of each tag, in the order of the prompts."""
    groups: dict[str, Any] = {}
    for tag in dict.fromkeys(tags):
        rows = torch.tensor([place for place, one in enumerate(tags) if one == tag])
        groups[tag] = {
            "prompts": len(rows),
            "rewards": {
                name: {"picked": prompt_interval(picked[name][rows]), "all": prompt_interval(means[name][rows])}
                for name in picked
            },
        }
    return groups


# ---- Figures: rewards.png, tasks.png, costs.png, kl.png, grid.png ----

PICKED, ALL_IMAGES = (colormaps[COLORMAP](place) for place in (0.12, 0.6))  # differ in lightness too
MARKERS = "osD^vP*X<>ph"
NAME_LETTERS, NAME_LINES = 30, 3  # of a contender's name: letters per line, lines
ROW, LINE = 0.3, 0.15  # inches of a contender with a name in one line, and of each further line
ROW_OFFSET = 0.055  # inches, of two marks in one row
PANEL, MIN_FIGURE = 2.7, 5.2  # inches of width
MAX_REWARDS, MAX_TASK_REWARDS, MAX_TASKS, TASK_COLUMNS = 4, 2, 12, 4
LOG_SCALE_RATIO = 12  # largest by smallest cost from which the scale is logarithmic
MARKER_OFFSET = 0.012  # share of the scale, between contenders of equal cost
PICKED_LABEL, ALL_LABEL, FIRST_LABEL = "picked image", "mean of all images", "the first contender"
COSTS = {"nfe": "denoiser evaluations of a run", "seconds": "seconds of a run"}


def labels(contenders: Sequence[Json]) -> list[str]:
    """Name contenders for a figure, without the model if all have the same."""
    models = {one["model"] for one in contenders}
    model = models.pop() if len(models) == 1 else ""
    return [one["name"].removeprefix(model).strip() or one["name"] for one in contenders]


def wrap_name(name: str, letters: int = NAME_LETTERS, most: int = NAME_LINES) -> list[str]:
    """Wrap a name into at most `most` lines; a longer name keeps its end, where names differ."""
    lines = textwrap.wrap(name, letters, break_on_hyphens=False)
    if len(lines) > most:
        joined = " ".join(lines)
        lines = textwrap.wrap("…" + joined[-(letters * most - letters // 2) :], letters, break_on_hyphens=False)[:most]
    return [plain_text(line, letters) for line in lines]


def draw_rewards(report: Json, out: Path) -> Path:
    """Write rewards.png: mean rewards and, against the first contender, differences and win rates."""
    contenders, names = report["contenders"], report["rewards"][:MAX_REWARDS]
    columns = 3 if len(contenders) > 1 else 1
    figure, places = _panels(contenders, len(names), columns)
    for row, name in zip(places, names, strict=True):
        stats = [one["rewards"][name] for one in contenders]
        _draw_means(row[0], contenders, stats)
        set_title(row[0], plain_text(name, 36))
        if columns == 3:
            _draw_intervals(row[1], [values.get("difference") for values in stats], PICKED, "o")
            row[1].axvline(0, color=INK, lw=0.9, ls=":", zorder=0)
            set_title(row[1], "difference from the first")
            _draw_intervals(row[2], [values.get("wins") for values in stats], PICKED, "o")
            row[2].axvline(0.5, color=INK, lw=0.9, ls=":", zorder=0)
            row[2].set_xlim(-0.03, 1.03)
            set_title(row[2], "win rate against the first")
    _legend(figure, places[0][0])
    return _save_panels(figure, out / "rewards.png")


def draw_tasks(report: Json, out: Path) -> Path | None:
    """Write tasks.png: the means of the first two rewards by task. None for prompts without tags."""
    contenders, path = report["contenders"], out / "tasks.png"
    path.unlink(missing_ok=True)
    if contenders[0]["tasks"] is None:
        return None
    tags, names = list(contenders[0]["tasks"])[:MAX_TASKS], report["rewards"][:MAX_TASK_REWARDS]
    columns = min(len(tags), TASK_COLUMNS)
    rows_each = -(-len(tags) // columns)
    figure, places = _panels(contenders, rows_each * len(names), columns)
    for place, (name, tag) in enumerate((name, tag) for name in names for tag in tags):
        row, column = divmod(place % len(tags), columns)
        axes = places[place // len(tags) * rows_each + row][column]
        task = [one["tasks"][tag] for one in contenders]
        _draw_means(axes, contenders, [one["rewards"][name] for one in task])
        title = f"{plain_text(tag or 'no tag', 24)}, {_count(task[0]['prompts'], 'prompt')}"
        set_title(axes, title, plain_text(name, 38))
    for axes in places.flatten():
        axes.set_visible(axes.has_data())
    _legend(figure, places[0][0])
    return _save_panels(figure, path)


def draw_costs(report: Json, out: Path) -> Path:
    """Write costs.png: rewards against denoiser evaluations and seconds of a run.

    A line joins contenders that differ only in their options.
    """
    names, families = report["rewards"][:MAX_REWARDS], _families(report["contenders"])
    figure = Figure(figsize=(9.2, 3.1 * len(names) + 0.9), dpi=DPI, layout="constrained")
    places = figure.subplots(len(names), 2, squeeze=False)
    for row, name in zip(places, names, strict=True):
        for axes, (cost, label) in zip(row, COSTS.items(), strict=True):
            _draw_costs(axes, list(families.values()), name, cost)
            axes.set_xlabel(label, size=8, color=INK)
        set_title(row[0], plain_text(name, 46))
    handles, _ = places[0][0].get_legend_handles_labels()
    _legend_below(figure, handles, ["\n".join(wrap_name(name, 44, 2)) for name in families])
    return _save_panels(figure, out / "costs.png")


def _draw_costs(axes: Axes, families: Sequence[Sequence[Json]], reward: str, cost: str) -> None:
    """Draw a line with intervals per family; equal numbers of evaluations are drawn side by side."""
    costs = [one["cost"][cost] for family in families for one in family]
    log_scale = min(costs) > 0 and max(costs) > LOG_SCALE_RATIO * min(costs)
    for number, family in enumerate(families):
        offset = MARKER_OFFSET * (number - (len(families) - 1) / 2) if cost == "nfe" else 0
        rows = [(one["cost"][cost], *one["rewards"][reward]["picked"]) for one in family]
        x, y, low, high = np.array(sorted(rows)).T
        x = x * (max(costs) / min(costs)) ** offset if log_scale else x + offset * max(costs)
        style: dict[str, Any] = {"marker": MARKERS[number % len(MARKERS)], "ms": 6, "lw": 1.4, "elinewidth": 1}
        style |= {"capsize": 2.5, "mec": INK, "mew": 0.5}
        color = colormaps[COLORMAP](0.9 * number / max(len(families) - 1, 1))
        axes.errorbar(x, y, [y - low, high - y], color=color, label=str(number), **style)
    style_axes(axes)
    if log_scale:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.set_xlim(0, 1.1 * max(costs))


BEST_LABEL = "best of n"  # series of kl.png
WEIGHTS_IN_RUN = re.compile(r"(.+)[/\\](?:checkpoints[/\\]step-0*(\d+)|best|final)[/\\]?")


def draw_kl(report: Json, out: Path) -> Path | None:
    """Write kl.png: rewards against √KL from the base model, a line per run and one of best-of-n, numbers at points.

    Finetuned weights have the mean of all images of plain sampling; best-of-n has the picked image. None without KL.
    """
    path, series = out / "kl.png", _kl_series(report["contenders"])
    path.unlink(missing_ok=True)
    if not any("nats" in (one.get("kl") or {}) for one in report["contenders"]):
        return None
    names = report["rewards"][:MAX_REWARDS]
    figure = Figure(figsize=(6.4, 3.1 * len(names) + 0.9), dpi=DPI, layout="constrained")
    for axes, name in zip(figure.subplots(len(names), 1, squeeze=False)[:, 0], names, strict=True):
        for number, (title, points) in enumerate(series.items()):
            color = colormaps[COLORMAP](0.9 * number / max(len(series) - 1, 1))
            part = "picked" if title == BEST_LABEL else "all"
            rows = np.array([[*np.sqrt(kl), *one["rewards"][name][part]] for _, kl, one in points])
            x, x_low, x_high, y, y_low, y_high = rows.T
            errors = {"xerr": [x - x_low, x_high - x], "yerr": [y - y_low, y_high - y]}
            style: dict[str, Any] = {"marker": MARKERS[number % len(MARKERS)], "ms": 5, "lw": 1.2, "elinewidth": 0.8}
            axes.errorbar(x, y, **errors, **style, color=color, capsize=2, label=title)
            for (mark, _, _), place in zip(points, zip(x, y, strict=True), strict=True):
                axes.annotate(mark, place, xytext=(4, 3), textcoords="offset points", size=7, color=INK)
        style_axes(axes)
        axes.set_xlabel("√KL from the model, √nats", size=8, color=INK)
        set_title(axes, plain_text(name, 46))
    handles, titles = figure.axes[0].get_legend_handles_labels()
    _legend_below(figure, handles, ["\n".join(wrap_name(title, 44, 2)) for title in titles])
    return _save_panels(figure, path)


def _kl_series(contenders: Sequence[Json]) -> dict[str, list[tuple[str, list[float], Json]]]:
    """Group the contenders that have a KL by run: the number of each (its step, or n), its KL in nats, and itself."""
    series: dict[str, list[tuple[str, list[float], Json]]] = {}
    for one in contenders:
        kl: Any = (one.get("kl") or {}).get("nats")
        if one["method"] == BEST_OF_N and one["lora"] is None:
            series.setdefault(BEST_LABEL, []).append((str(one["particles"]), kl, one))
        elif one["method"] == BASE_METHOD and one["lora"] is None:
            series.setdefault(one["model"], []).append(("", [0.0] * 3, one))
        elif one["method"] == BASE_METHOD and kl is not None:
            match = WEIGHTS_IN_RUN.fullmatch(one["lora"])
            title, mark = (match[1], match[2] or "") if match else (one["lora"], "")
            series.setdefault(title, []).append((mark, [max(value, 0.0) for value in kl], one))
    return series


def _families(contenders: Sequence[Json]) -> dict[str, list[Json]]:
    """Group contenders by model, weights and method, under a name for each group."""
    groups: dict[tuple[Any, ...], list[Json]] = {}
    for one in contenders:
        groups.setdefault((one["model"], one["lora"], one["method"]), []).append(one)
    named = []
    for (model, lora, method), family in groups.items():
        shared = f"{model}{' + ' * bool(lora)}{lora or ''} {method}"
        named.append({"model": model, "name": family[0]["name"] if len(family) == 1 else shared})
    return dict(zip(labels(named), groups.values(), strict=True))


def _panels(contenders: Sequence[Json], rows: int, columns: int) -> tuple[Figure, Any]:
    """Create panels with one row per contender, the first on top, and names on the left."""
    names = [wrap_name(name) for name in labels(contenders)]
    heights = np.array([ROW + LINE * (len(lines) - 1) for lines in names])
    width = 0.5 + 0.075 * max(len(line) for lines in names for line in lines)
    size = (max(width + PANEL * columns, MIN_FIGURE), (heights.sum() + 0.75) * rows + 0.6)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in places.flatten():
        style_axes(axes, grid="x")
        axes.tick_params(axis="y", length=0)
    first = places[0][0]
    first.set_yticks(heights.cumsum() - heights / 2, ["\n".join(lines) for lines in names])
    first.set_ylim(heights.sum(), 0)
    return figure, places


def _draw_means(axes: Axes, contenders: Sequence[Json], stats: Sequence[Json]) -> None:
    """Draw the means of picked images and, for contenders with several, of all images."""
    several = [one["particles"] > 1 for one in contenders]
    if any(several):
        means = [values["all"] if more else None for more, values in zip(several, stats, strict=True)]
        _draw_intervals(axes, means, ALL_IMAGES, "D", [ROW_OFFSET] * len(stats), ALL_LABEL)
    shifts = [-ROW_OFFSET * more for more in several]
    _draw_intervals(axes, [values["picked"] for values in stats], PICKED, "o", shifts, PICKED_LABEL)
    if len(contenders) > 1:
        axes.axvline(stats[0]["picked"][0], color=INK, lw=0.9, ls=":", zorder=0, label=FIRST_LABEL)


def _draw_intervals(
    axes: Axes,
    rows: Sequence[Sequence[float] | None],
    color: Any,
    marker: str,
    shifts: Sequence[float] | None = None,
    label: str = "",
) -> None:
    """Draw [mean, low, high] of each row that has one, `shifts` inches below the middle of the row."""
    heights = np.array(axes.get_yticks()) + (0 if shifts is None else np.array(shifts))
    stats = [(height, *row) for height, row in zip(heights, rows, strict=True) if row is not None]
    y, mean, low, high = np.array(stats).T
    style: dict[str, Any] = {"color": color, "marker": marker, "ms": 5, "ls": "", "elinewidth": 1.2, "capsize": 2}
    face = color if marker == "o" else "white"
    axes.errorbar(mean, y, xerr=[mean - low, high - mean], mfc=face, label=label or None, zorder=3, **style)


def _legend(figure: Figure, axes: Axes) -> None:
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    order = [name for name in (PICKED_LABEL, ALL_LABEL, FIRST_LABEL) if name in handles]
    texts = [f"{order[0]}, 95 % interval over prompts", *order[1:]]
    _legend_below(figure, [handles[name] for name in order], texts)


def _legend_below(figure: Figure, handles: Sequence[Any], texts: Sequence[str]) -> None:
    columns = 1 if figure.get_size_inches()[0] < 6.5 else 2 if max(map(len, texts)) > 40 else 3
    style: dict[str, Any] = {"frameon": False, "fontsize": 8, "labelcolor": INK, "ncols": columns}
    figure.legend(handles, texts, loc="outside lower left", **style)


def _save_panels(figure: Figure, path: Path) -> Path:
    for axes in figure.axes:
        if axes.get_xscale() == "linear":
            axes.xaxis.set_major_locator(MaxNLocator(5))
    return save_figure(figure, path)


MAX_CONTENDERS = 16  # in grid.png
MARGIN = 160  # pixels for the prompts, on the left
TITLE, LINE_HEIGHT = 54, 15  # pixels: space above the names, height of a line of names


def draw_images(report: Mapping[str, Any], store: ResultStore, grid_places: Sequence[int]) -> Path:
    """Write grid.png: the picked images of the first seed over their first reward, one column per contender."""
    contenders, name = report["contenders"][:MAX_CONTENDERS], report["rewards"][0]
    columns = [wrap_name(name, 22, 4) for name in labels(report["contenders"])[:MAX_CONTENDERS]]
    top = TITLE + LINE_HEIGHT * max(map(len, columns)) + 4
    paths = {(one["name"], place): store.image(one["name"], place) for one in contenders for place in grid_places}
    pictures = {key: open_image(path) for key, path in paths.items() if path.is_file()}
    height = max((picture.height for picture in pictures.values()), default=SIDE)
    missing = Image.new("RGB", (SIDE, height), "white")
    more = len(report["contenders"]) - len(contenders)
    canvas = Canvas(
        max(MARGIN + (SIDE + GAP) * len(contenders), 520),
        top + (height + BELOW + GAP) * len(grid_places),
        "The same prompts and seed",
        f"below each image: {plain_text(name, 60)}{f'   ({more} more contenders)' * (more > 0)}",
    )
    for column, (one, lines) in enumerate(zip(contenders, columns, strict=True)):
        left = MARGIN + column * (SIDE + GAP)
        canvas.text("\n".join(lines), left, TITLE, size=8, weight="bold")
        firsts: dict[int, float] = {}
        for run in one["runs"]:
            firsts.setdefault(run["prompt"], run["rewards"][name][0])
        for row, place in enumerate(grid_places):
            upper = top + row * (height + BELOW + GAP)
            if column == 0:
                prompt = _wrap_prompt(report["prompts"][place]["prompt"])
                canvas.text(prompt, GAP, upper + height / 2, size=8, va="center")
            canvas.cell(pictures.get((one["name"], place), missing), [firsts[place]], left, upper, height)
    return save_figure(canvas.figure, store.out / "grid.png")


def _wrap_prompt(prompt: str) -> str:
    lines = textwrap.wrap(prompt, 19)
    return "\n".join(plain_text(line) for line in (lines if len(lines) <= 6 else [*lines[:5], f"{lines[5][:18]}…"]))


# ---- Tables: evaluation.md, the summary on the terminal ----

MAX_DECIMALS = 6  # fp32 has no more
MAX_NAME = 48  # letters, on the terminal


def write_report(report: Json, store: ResultStore, grid_places: Sequence[int]) -> None:
    """Write evaluation.json, evaluation.md and the figures. Raises OSError.

    grid_places  indices of the prompts in grid.png
    """
    out = store.out
    write_text(out / "evaluation.json", json.dumps(report, ensure_ascii=False) + "\n")
    pictures = {
        "Rewards": draw_rewards(report, out),
        "By task": draw_tasks(report, out),
        "Rewards and costs": draw_costs(report, out),
        "Rewards and KL": draw_kl(report, out),
        "Images": draw_images(report, store, grid_places),
    }
    image_links = [f"![{title}]({path.name})" for title, path in pictures.items() if path is not None]
    write_text(out / "evaluation.md", "\n\n".join([*markdown(report), *image_links]) + "\n")


def markdown(report: Json) -> list[str]:
    """Format the tables: rewards, against the first contender, by task, costs."""
    prompts, seeds, rewards = report["prompts"], report["seeds"], report["rewards"]
    introduction = (
        f"{_count(len(prompts), 'prompt')}, {_count(seeds, 'seed')} each; {rewards[0]} steers and picks. In brackets: "
        "95 % bootstrap intervals over prompts."
    )
    sections = ["# Evaluation", introduction, _means(report)]
    if len(report["contenders"]) > 1:
        sections += [f"## Against {_code(report['contenders'][0]['name'])}", _against(report)]
    if report["contenders"][0]["tasks"] is not None:
        sections += [f"## By task: {rewards[0]} of the picked image", _tasks(report)]
    return [*sections, "## Diversity, KL, cost of a run", _costs(report), *_remarks(report)]


def summary(report: Json) -> str:
    """Format the most important columns for the terminal."""
    name = report["rewards"][0]
    rows = [["", f"{name}, picked image", "wins", "evaluations", "seconds"]]
    for label, one in zip(labels(report["contenders"]), report["contenders"], strict=True):
        stats, cost = one["rewards"][name], one["cost"]
        win_rate = format_interval(stats["wins"]) if "wins" in stats else ""
        short = label if len(label) <= MAX_NAME else f"…{label[1 - MAX_NAME :]}"
        rows.append([short, format_interval(stats["picked"]), win_rate, f"{cost['nfe']:.4g}", f"{cost['seconds']:.3g}"])
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Format a table for the terminal, its columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def format_interval(values: Sequence[float]) -> str:
    """Format [mean, low, high] as "0.300 [0.200, 0.400]": three digits of the largest."""
    largest = max(map(abs, values))
    decimals = min(max(2 - math.floor(math.log10(largest)), 0), MAX_DECIMALS) if largest else 2
    mean, low, high = (f"{round(value, decimals) + 0.0:.{decimals}f}".replace("-", "−") for value in values)
    return f"{mean} [{low}, {high}]"


def _means(report: Json) -> str:
    parts = ("picked", "all") if any(one["particles"] > 1 for one in report["contenders"]) else ("picked",)
    columns = [f"{name}, {part}" if len(parts) > 1 else name for name in report["rewards"] for part in parts]
    header = ["", "images", *columns]
    return _table(header, report["contenders"], lambda one: [str(one["particles"]), *_intervals(one, parts)])


def _against(report: Json) -> str:
    parts = ("difference", "wins")
    columns = [f"{name}, {part}" for name in report["rewards"] for part in parts]
    return _table(["picked image", *columns], report["contenders"][1:], lambda one: _intervals(one, parts))


def _intervals(one: Json, parts: Sequence[str]) -> list[str]:
    return [format_interval(stats[part]) for stats in one["rewards"].values() for part in parts]


def _tasks(report: Json) -> str:
    name, contenders = report["rewards"][0], report["contenders"]
    header = ["", *(f"{tag} ({stats['prompts']})" for tag, stats in contenders[0]["tasks"].items())]

    def cells(one: Json) -> list[str]:
        return [format_interval(task["rewards"][name]["picked"]) for task in one["tasks"].values()]

    return _table(header, contenders, cells)


def _costs(report: Json) -> str:
    def cells(one: Json) -> list[str]:
        kl, cost = one.get("kl") or {}, one["cost"]
        diversity = format_interval(one["diversity"]) if one["diversity"] else "–"
        divergence = format_interval(kl["nats"]) if "nats" in kl else "–"
        costs = [f"{cost[key]:.3g}" for key in ("decodes", "reward_calls", "gradients", "seconds")]
        return [diversity, divergence, f"{cost['nfe']:.6g}", *costs]

    header = ["", "diversity", "KL, nats", "evaluations", "decodes", "images scored", "gradients", "seconds"]
    return _table(header, report["contenders"], cells)


def _remarks(report: Json) -> list[str]:
    """List limitations of the numbers: missing KL, runs that stopped early, a single prompt."""
    groups: dict[str, list[str]] = {}
    for one in report["contenders"]:
        name, kl = _code(one["name"]), one.get("kl") or {}
        if "best_of" in kl:
            groups.setdefault("KL is that of the picked image, at most log n − (n − 1)/n", []).append(name)
        elif "skipped" in kl:
            groups.setdefault(f"no KL, because {kl['skipped']}", []).append(name)
        elif "eta" in kl:
            remark = f"KL is the mean of {_count(len(kl['by_prompt']), 'trajectory')} with η = {kl['eta']:g}"
            groups.setdefault(remark, []).append(name)
        if one["stopped"]:
            remark = f"{_count(one['stopped'], 'run')} stopped before the last iteration and kept the best so far"
            groups.setdefault(remark, []).append(name)
    lines = [f"- {', '.join(names)}: {remark.rstrip('.')}." for remark, names in groups.items()]
    if len(report["prompts"]) == 1:
        lines.append("- A single prompt has no interval.")
    return ["\n".join(lines)] if lines else []


def _table(header: Sequence[str], contenders: Sequence[Json], cells: Callable[[Json], Sequence[str]]) -> str:
    """Format a line of Markdown for each contender: its name and its cells."""
    lines = [header, ["---"] * len(header), *([_code(one["name"]), *cells(one)] for one in contenders)]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _code(name: str) -> str:
    return f"`{name}`"


def _count(count: int, thing: str) -> str:
    plural = f"{thing[:-1]}ies" if thing.endswith("y") else f"{thing}s"
    return f"{count} {thing if count == 1 else plural}"
