"""Figures of an evaluation: means with their intervals over prompts, differences, win rates, tasks, costs."""

import json
import math
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
from torch import Tensor

from steer.apps.evaluation.spec import ContenderResults, EvaluationSpec, Json, ResultStore, mean_cost
from steer.apps.plots import COLORMAP, DPI, FAINT, GAP, INK, SIDE, opened, shown
from steer.files import atomic_write, write_text
from steer.pipelines.training.evaluation import interval

Table = Mapping[str, Tensor]  # by reward


def figures(
    spec: EvaluationSpec, particles: Sequence[int], stored: Sequence[ContenderResults], kl_prompts: int
) -> Json:
    """All of evaluation.json: what was asked, and of every contender its figures and its runs.

    An interval is [mean, low, high]: 95 %, a bootstrap over prompts. The first contender is what the others are
    compared with.
    """
    prompts = [{"prompt": prompt} for prompt in spec.prompts]
    if spec.tags is not None:
        prompts = [one | {"tag": tag} for one, tag in zip(prompts, spec.tags, strict=True)]
    contenders = []
    for size, one in zip(particles, stored, strict=True):
        stats = one.about | {"particles": size} | _figures(spec, one, stored[0])
        if one.about["weights"] is not None:
            stats["kl"] = one.kl.get(str(kl_prompts))
        runs = [{"prompt": place} | run for place in range(len(prompts)) for run in one.runs[place]]
        contenders.append(stats | {"made": one.made, "runs": runs})
    return spec.identity() | {"prompts": prompts, "contenders": contenders}


def _figures(spec: EvaluationSpec, one: ContenderResults, first: ContenderResults) -> Json:
    picked, everything = tables(spec, one)
    against = tables(spec, first)[0]
    rewards: Json = {}
    for name in spec.rewards:
        rewards[name] = {"picked": prompt_interval(picked[name]), "all": prompt_interval(everything[name])}
        if one is not first:
            rewards[name] |= compared(picked[name], against[name])
    diverse = [value for place in range(len(spec.prompts)) if (value := one.diversity[place]) is not None]
    runs = [run for some in one.runs.values() for run in some]
    return {
        "rewards": rewards,
        "tasks": None if spec.tags is None else _task_stats(spec.tags, picked, everything),
        "diversity": interval(torch.tensor(diverse)) if diverse else None,
        "cost": mean_cost(runs),
        "stopped": sum(run["stopped"] is not None for run in runs),
    }


def tables(spec: EvaluationSpec, one: ContenderResults) -> tuple[Table, Table]:
    """By reward (prompts, seeds): of the image that a run picks, its first; and the mean of all that it made."""

    def table(name: str, value: Callable[[list[float]], float]) -> Tensor:
        places = range(len(spec.prompts))
        stats = [[value(run["rewards"][name]) for run in one.runs[n]] for n in places]
        return torch.tensor(stats, dtype=torch.float64)

    return {n: table(n, itemgetter(0)) for n in spec.rewards}, {n: table(n, fmean) for n in spec.rewards}


def prompt_interval(values: Tensor) -> list[float]:
    """[mean, low, high] of (prompts, seeds): seeds are averaged, prompts are drawn anew."""
    return interval(values.mean(1).float())


def compared(values: Tensor, first: Tensor) -> dict[str, list[float]]:
    """Against the first contender, by prompt and seed: the paired difference, and the win rate."""
    return {"difference": prompt_interval(values - first), "wins": prompt_interval(wins(values, first))}


def wins(values: Tensor, first: Tensor) -> Tensor:
    """1 where a value is above that of the first contender, ½ where both are equal, else 0."""
    return (values > first).float() + 0.5 * (values == first).float()


def _task_stats(tags: Sequence[str], picked: Table, everything: Table) -> dict[str, Any]:
    """The means of `_figures` for each tag, in the order of the prompts."""
    groups: dict[str, Any] = {}
    for tag in dict.fromkeys(tags):
        rows = torch.tensor([place for place, one in enumerate(tags) if one == tag])
        groups[tag] = {
            "prompts": len(rows),
            "rewards": {
                name: {"picked": prompt_interval(picked[name][rows]), "all": prompt_interval(everything[name][rows])}
                for name in picked
            },
        }
    return groups


PICKED, EVERY = (colormaps[COLORMAP](place) for place in (0.12, 0.6))  # apart in grey too
MARKERS = "osD^vP*X<>ph"
NAME, LINES = 30, 3  # letters in a line of a contender's name, and lines
ROW, LINE = 0.3, 0.15  # inches of a contender with a name in one line, and of each further line
ROW_OFFSET = 0.055  # inches, of two marks in one row
PANEL, NARROWEST = 2.7, 5.2  # inches of a panel's width, of a picture's
MAX_REWARDS, REWARDS_BY_TASK, MOST_TASKS, TASKS_IN_A_ROW = 4, 2, 12, 4
LOG_SCALE_RATIO = 12  # largest by smallest cost from which a scale is logarithmic
MARKER_OFFSET = 0.012  # of the scale, between contenders that cost the same


def labels(contenders: Sequence[Json]) -> list[str]:
    """Names of contenders for a picture: the model is left out where it is the same for all."""
    models = {one["model"] for one in contenders}
    model = models.pop() if len(models) == 1 else ""
    return [one["name"].removeprefix(model).strip() or one["name"] for one in contenders]


def wrap_name(name: str, letters: int = NAME, most: int = LINES) -> list[str]:
    """A name in few lines: of what is too long the end says most."""
    lines = textwrap.wrap(name, letters, break_on_hyphens=False)
    if len(lines) > most:
        joined = " ".join(lines)
        lines = textwrap.wrap("…" + joined[-(letters * most - letters // 2) :], letters, break_on_hyphens=False)[:most]
    return [shown(line, letters) for line in lines]


def draw_rewards(report: Json, out: Path) -> Path:
    """Writes rewards.png: for each reward the means and, against the first contender, differences and win rates."""
    contenders, names = report["contenders"], report["rewards"][:MAX_REWARDS]
    columns = 3 if len(contenders) > 1 else 1
    figure, places = _panels(contenders, len(names), columns)
    for row, name in zip(places, names, strict=True):
        stats = [one["rewards"][name] for one in contenders]
        _contender_means(row[0], contenders, stats)
        _set_title(row[0], shown(name, 36))
        if columns == 3:
            _forest(row[1], [values.get("difference") for values in stats], PICKED, "o")
            row[1].axvline(0, color=INK, lw=0.9, ls=":", zorder=0)
            _set_title(row[1], "difference from the first")
            _forest(row[2], [values.get("wins") for values in stats], PICKED, "o")
            row[2].axvline(0.5, color=INK, lw=0.9, ls=":", zorder=0)
            row[2].set_xlim(-0.03, 1.03)
            _set_title(row[2], "win rate against the first")
    _legend(figure, places[0][0])
    return _save_figure(figure, out / "rewards.png")


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
        _contender_means(axes, contenders, [one["rewards"][name] for one in task])
        prompts = f"{task[0]['prompts']} prompt{'s' * (task[0]['prompts'] > 1)}"
        _set_title(axes, f"{shown(tag or 'no tag', 24)}, {prompts}", shown(name, 38))
    for row in places:
        for axes in row:
            axes.set_visible(axes.has_data())
    _legend(figure, places[0][0])
    return _save_figure(figure, path)


def draw_costs(report: Json, out: Path) -> Path:
    """Writes costs.png: rewards against denoiser evaluations and seconds of a run; a line joins one contender's kin,
    who differ in their options alone."""
    names = report["rewards"][:MAX_REWARDS]
    figure = Figure(figsize=(9.2, 3.1 * len(names) + 0.9), dpi=120, layout="constrained")
    places = figure.subplots(len(names), 2, squeeze=False)
    families = _families(report["contenders"])
    for row, name in zip(places, names, strict=True):
        for axes, (what, about) in zip(row, COSTS.items(), strict=True):
            costs = [one["cost"][what] for one in report["contenders"]]
            wide = min(costs) > 0 and max(costs) > LOG_SCALE_RATIO * min(costs)
            for number, family in enumerate(families.values()):
                # Side by side where they make the same number of evaluations.
                aside = MARKER_OFFSET * (number - (len(families) - 1) / 2) if what == "nfe" else 0
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
        _set_title(row[0], shown(name, 46))
    handles, _ = places[0][0].get_legend_handles_labels()
    _below(figure, handles, ["\n".join(wrap_name(name, 44, 2)) for name in families])
    return _save_figure(figure, out / "costs.png")


COSTS = {"nfe": "denoiser evaluations of a run", "seconds": "seconds of a run"}


def _families(contenders: Sequence[Json]) -> dict[str, list[Json]]:
    """Contenders of one model, weights and method, under the name that they share."""
    groups: dict[tuple[Any, ...], list[Json]] = {}
    for one in contenders:
        groups.setdefault((one["model"], one["lora"], one["method"]), []).append(one)
    shared = []
    for (model, lora, method), family in groups.items():
        words = f"{model}{' + ' * bool(lora)}{lora or ''} {method}"
        shared.append({"model": model, "name": family[0]["name"] if len(family) == 1 else words})
    return dict(zip(labels(shared), groups.values(), strict=True))


def _line(axes: Axes, costs: Sequence[float], rewards: Sequence[Sequence[float]], number: int, count: int) -> None:
    color = colormaps[COLORMAP](0.9 * number / max(count - 1, 1))
    x, y, low, high = np.array(sorted((cost, *reward) for cost, reward in zip(costs, rewards, strict=True))).T
    style: dict[str, Any] = {"color": color, "marker": MARKERS[number % len(MARKERS)], "ms": 6, "lw": 1.4}
    bars: dict[str, Any] = {"elinewidth": 1, "capsize": 2.5, "mec": INK, "mew": 0.5}
    axes.errorbar(x, y, [y - low, high - y], label=str(number), **style, **bars)


def _panels(contenders: Sequence[Json], rows: int, columns: int) -> tuple[Figure, Any]:
    """Panels with a contender a row, the first on top, and their names on the left."""
    names = [wrap_name(name) for name in labels(contenders)]
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
    groups, top = [], 0.0
    for lines in names:
        height = ROW + LINE * (len(lines) - 1)
        groups.append(top + height / 2)
        top += height
    return groups


def _contender_means(axes: Axes, contenders: Sequence[Json], stats: Sequence[Json]) -> None:
    """Picked images; and all images, where that is something else."""
    several = [one["particles"] > 1 for one in contenders]
    if any(several):
        every = [values["all"] if more else None for more, values in zip(several, stats, strict=True)]
        _forest(axes, every, EVERY, "D", [ROW_OFFSET] * len(stats), "mean of all images")
    _forest(
        axes,
        [values["picked"] for values in stats],
        PICKED,
        "o",
        [-ROW_OFFSET * more for more in several],
        "picked image",
    )
    if len(contenders) > 1:
        axes.axvline(stats[0]["picked"][0], color=INK, lw=0.9, ls=":", zorder=0, label="the first contender")


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
    stats = [(height, *row) for height, row in zip(heights, rows, strict=True) if row is not None]
    y, mean, low, high = np.array(stats).T
    style: dict[str, Any] = {"color": color, "marker": marker, "ms": 5, "ls": "", "elinewidth": 1.2, "capsize": 2}
    face = color if marker == "o" else "white"
    axes.errorbar(mean, y, xerr=[mean - low, high - mean], mfc=face, label=label or None, zorder=3, **style)


def _style(axes: Axes) -> None:
    axes.tick_params(which="both", labelsize=8, color=FAINT, labelcolor=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)


def _set_title(axes: Axes, *lines: str) -> None:
    axes.set_title("\n".join(lines), size=9, loc="left", color=INK)


def _legend(figure: Figure, axes: Axes) -> None:
    stats = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    order = [name for name in ("picked image", "mean of all images", "the first contender") if name in stats]
    texts = [f"{order[0]}, 95 % interval over prompts", *order[1:]]
    _below(figure, [stats[name] for name in order], texts)


def _below(figure: Figure, handles: Sequence[Any], texts: Sequence[str]) -> None:
    columns = 1 if figure.get_size_inches()[0] < 6.5 else 2 if max(map(len, texts)) > 40 else 3
    style: dict[str, Any] = {"frameon": False, "fontsize": 8, "labelcolor": INK, "ncols": columns}
    figure.legend(handles, texts, loc="outside lower left", **style)


def _save_figure(figure: Figure, path: Path) -> Path:
    for axes in figure.axes:
        if axes.get_xscale() == "linear":
            axes.xaxis.set_major_locator(MaxNLocator(5))
    with atomic_write(path) as new:
        figure.savefig(new, format="png")
    return path


MAX_ROWS = 16  # contenders
MARGIN = 160  # pixels for the prompts, on the left
TITLE, LINE_HEIGHT, BELOW = 54, 15, 20  # pixels: above the names, of a line of them, below an image


def draw_images(report: Mapping[str, Any], store: ResultStore, shown_places: Sequence[int]) -> Path:
    """Writes grid.png: the picked images of the first seed, below each its first reward."""
    contenders, name = report["contenders"][:MAX_ROWS], report["rewards"][0]
    columns = [wrap_name(name, 22, 4) for name in labels(report["contenders"])[:MAX_ROWS]]
    top = TITLE + LINE_HEIGHT * max(map(len, columns)) + 4
    width = max(MARGIN + (SIDE + GAP) * len(contenders), 520)
    pictures = {(one["name"], place): store.image(one["name"], place) for one in contenders for place in shown_places}
    high = max((_height(path) for path in pictures.values() if path.is_file()), default=SIDE)
    height = top + (high + BELOW + GAP) * len(shown_places)
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, layout=None)
    words = _Words(figure, width, height)
    words("The same prompts and seed", GAP, 6, size=11, weight="bold")
    more = len(report["contenders"]) - len(contenders)
    words(f"below each image: {shown(name, 60)}{f'   ({more} more contenders)' * (more > 0)}", GAP, 29, size=8)
    for column, (one, lines) in enumerate(zip(contenders, columns, strict=True)):
        left = MARGIN + column * (SIDE + GAP)
        words("\n".join(lines), left, TITLE, size=8, weight="bold")
        firsts: dict[int, float] = {}
        for run in one["runs"]:
            firsts.setdefault(run["prompt"], run["rewards"][name][0])
        for row, place in enumerate(shown_places):
            upper = top + row * (high + BELOW + GAP)
            if column == 0:
                words(_wrap_prompt(report["prompts"][place]["prompt"]), GAP, upper + high / 2, size=8, va="center")
            _place_picture(figure, pictures[one["name"], place], (left / width, 1 - (upper + high) / height), high)
            words(f"{firsts[place]:.3g}".replace("-", "−"), left + SIDE / 2, upper + high + 3, size=8, ha="center")
    with atomic_write(store.out / "grid.png") as new:
        figure.savefig(new, format="png")
    return store.out / "grid.png"


class _Words:
    """Writes text at places in pixels from the top left."""

    def __init__(self, figure: Figure, width: float, height: float) -> None:
        self.figure, self.width, self.height = figure, width, height

    def __call__(self, text: str, left: float, top: float, **style: Any) -> None:
        text_style: dict[str, Any] = {"va": "top", "color": INK, "linespacing": 1.15}
        self.figure.text(left / self.width, 1 - top / self.height, text, **(text_style | style))


def _wrap_prompt(prompt: str) -> str:
    lines = textwrap.wrap(prompt, 19)
    return "\n".join(shown(line) for line in (lines if len(lines) <= 6 else [*lines[:5], f"{lines[5][:18]}…"]))


def _height(path: Path) -> int:
    return opened(path).height


def _place_picture(figure: Figure, path: Path, corner: tuple[float, float], high: int) -> None:
    """A picture in a cell with this lower left corner, in shares of the figure; an empty frame where there is none."""
    width, height = figure.get_size_inches() * DPI
    axes = figure.add_axes((*corner, SIDE / width, high / height))
    if path.is_file():
        axes.imshow(opened(path), interpolation="antialiased")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_color(FAINT)


MOST = 6  # decimals: beyond, fp32 has none to tell
LETTERS = 48  # of a name in a terminal


def write_report(report: Json, store: ResultStore, shown: Sequence[int]) -> None:
    """Writes evaluation.json, evaluation.md and the pictures. Raises OSError.

    shown  places of the prompts in the grid of images
    """
    out = store.out
    write_text(out / "evaluation.json", json.dumps(report, ensure_ascii=False) + "\n")
    pictures = {
        "Rewards": draw_rewards(report, out),
        "By task": draw_tasks(report, out),
        "Rewards and costs": draw_costs(report, out),
        "Images": draw_images(report, store, shown),
    }
    image_links = [f"![{title}]({path.name})" for title, path in pictures.items() if path is not None]
    write_text(out / "evaluation.md", "\n\n".join([*markdown(report), *image_links]) + "\n")


def markdown(report: Json) -> list[str]:
    """The tables: rewards, against the first contender, by task, the rest."""
    prompts, seeds, rewards = report["prompts"], report["seeds"], report["rewards"]
    about = (
        f"{_count(len(prompts), 'prompt')}, {_count(seeds, 'seed')} each; {rewards[0]} steers and picks. In brackets: "
        "95 % bootstrap intervals over prompts."
    )
    sections = ["# Evaluation", about, _means(report)]
    if len(report["contenders"]) > 1:
        sections += [f"## Against {_code(report['contenders'][0]['name'])}", _against(report)]
    if report["contenders"][0]["tasks"] is not None:
        sections += [f"## By task: {rewards[0]} of the picked image", _tasks(report)]
    return [*sections, "## Diversity, KL, cost of a run", _rest(report), *_remarks(report)]


def summary(report: Json) -> str:
    """The most important columns, for a terminal."""
    name = report["rewards"][0]
    rows = [["", f"{name}, picked image", "wins", "evaluations", "seconds"]]
    for called, one in zip(labels(report["contenders"]), report["contenders"], strict=True):
        stats, cost = one["rewards"][name], one["cost"]
        won = span(stats["wins"]) if "wins" in stats else ""
        short = called if len(called) <= LETTERS else f"…{called[1 - LETTERS :]}"
        rows.append([short, span(stats["picked"]), won, f"{cost['nfe']:.4g}", f"{cost['seconds']:.3g}"])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def span(values: Sequence[float]) -> str:
    """[mean, low, high] as "0.300 [0.200, 0.400]": three digits of the largest."""
    largest = max(map(abs, values))
    decimals = min(max(2 - math.floor(math.log10(largest)), 0), MOST) if largest else 2
    mean, low, high = (f"{round(value, decimals) + 0.0:.{decimals}f}".replace("-", "−") for value in values)
    return f"{mean} [{low}, {high}]"


def _means(report: Json) -> str:
    several = any(one["particles"] > 1 for one in report["contenders"])
    columns = [f"{name}{part}" for name in report["rewards"] for part in ((", picked", ", all") if several else ("",))]
    rows = []
    for one in report["contenders"]:
        stats = [one["rewards"][name] for name in report["rewards"]]
        cells = [span(values[part]) for values in stats for part in (("picked", "all") if several else ("picked",))]
        rows.append([_code(one["name"]), str(one["particles"]), *cells])
    return _table(["", "images", *columns], rows)


def _against(report: Json) -> str:
    columns = [f"{name}, {part}" for name in report["rewards"] for part in ("difference", "wins")]
    rows = []
    for one in report["contenders"][1:]:
        stats = [one["rewards"][name] for name in report["rewards"]]
        rows.append([_code(one["name"]), *(span(values[part]) for values in stats for part in ("difference", "wins"))])
    return _table(["picked image", *columns], rows)


def _tasks(report: Json) -> str:
    name, contenders = report["rewards"][0], report["contenders"]
    header = [f"{tag} ({stats['prompts']})" for tag, stats in contenders[0]["tasks"].items()]
    rows = []
    for one in contenders:
        rows.append([_code(one["name"]), *(span(stats["rewards"][name]["picked"]) for stats in one["tasks"].values())])
    return _table(["", *header], rows)


def _rest(report: Json) -> str:
    rows = []
    for one in report["contenders"]:
        kl, cost = one.get("kl") or {}, one["cost"]
        diverse = span(one["diversity"]) if one["diversity"] else "–"
        spent = [f"{cost[what]:.3g}" for what in ("decodes", "reward_calls", "gradients", "seconds")]
        far = span(kl["nats"]) if "nats" in kl else "–"
        rows.append([_code(one["name"]), diverse, far, f"{cost['nfe']:.6g}", *spent])
    header = ["", "diversity", "KL, nats", "evaluations", "decodes", "images scored", "gradients", "seconds"]
    return _table(header, rows)


def _remarks(report: Json) -> list[str]:
    """What a reader must know beside the numbers."""
    groups: dict[str, list[str]] = {}
    for one in report["contenders"]:
        name, kl = _code(one["name"]), one.get("kl") or {}
        if "skipped" in kl:
            groups.setdefault(f"no KL, because {kl['skipped']}", []).append(name)
        elif "eta" in kl:
            about = f"KL is that of {_count(len(kl['by_prompt']), 'trajectory')} with η = {kl['eta']:g}"
            groups.setdefault(about, []).append(name)
        if one["stopped"]:
            about = f"{_count(one['stopped'], 'run')} ended before the last iteration, with the best so far"
            groups.setdefault(about, []).append(name)
    lines = [f"- {', '.join(names)}: {about.rstrip('.')}." for about, names in groups.items()]
    if len(report["prompts"]) == 1:
        lines.append("- One prompt has no interval.")
    return ["\n".join(lines)] if lines else []


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _code(name: str) -> str:
    return f"`{name}`"


def _count(count: int, thing: str) -> str:
    plural = f"{thing[:-1]}ies" if thing.endswith("y") else f"{thing}s"
    return f"{count} {thing if count == 1 else plural}"
