"""Report of a finetuning run: curves, held-out images before and after, and a model card."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from steer.apps.plots import (
    BELOW,
    CAPTION_HEIGHT,
    COLORMAP,
    DPI,
    FAINT,
    GAP,
    INK,
    LINE_COLORS,
    SIDE,
    TOP,
    Canvas,
    Numbers,
    Panel,
    draw_band,
    evenly_spaced,
    join_names,
    mark_integers,
    plain_text,
    save_figure,
    set_title,
    style_axes,
    thumbnail,
)
from steer.files import DECODE_ERRORS, make_folder, write_text
from steer.pipelines.training.evaluation import EvalResult
from steer.pipelines.training.method import TrainingResult
from steer.pipelines.training.model_card import held_out_names, model_card
from steer.pipelines.training.trainer import Trainer
from steer.reward import Texts
from steer.training.overoptimization import fit_reward_curve

__all__ = ["write_report", "write_samples"]

Records = Sequence[Mapping[str, Any]]
TRAINED_COLOR, HELD_OUT_COLOR, SAMPLES_COLOR = LINE_COLORS
MIN_SMOOTHED = 10  # values from which a moving mean is drawn
FAR_FACTOR = 3  # a level more than this many times above the curve is only named
GAIN_UPDATES = 5  # updates before an evaluation that determine its KL
LOG_SCALE_RATIO = 30  # ratio of largest to smallest value from which a scale is logarithmic


def write_samples(evaluated: EvalResult, out: Path, samples: int) -> Path:
    """Write the held-out samples of an evaluation: a grid of images, or samples/step-000020.jsonl of all texts."""
    if not isinstance(evaluated.images, Texts):
        return write_grid(evaluated, out, samples)
    each, lines = len(evaluated.images) // len(evaluated.prompts), []
    for number, text in enumerate(evaluated.images):
        place, k = divmod(number, each)
        rewards = {name: values[place, k].item() for name, values in evaluated.rewards.items()}
        lines.append(json.dumps({"prompt": evaluated.prompts[place], "text": text, "rewards": rewards}) + "\n")
    path = out / "samples" / f"step-{evaluated.step:06d}.jsonl"
    make_folder(path.parent)
    write_text(path, "".join(lines))
    return path


def write_report(trainer: Trainer[Any], result: TrainingResult) -> None:
    """Write plots/*.png and README.md, a model card, in the output folder of a trainer."""
    out = Path(trainer.config.output_dir)
    _draw_panels(out / "plots" / "rewards.png", rewards_panels(result))
    _draw_panels(out / "plots" / "overoptimization.png", overoptimization_panels(result))
    _draw_panels(out / "plots" / "divergence.png", divergence_panels(result, vars(trainer.config)))
    _draw_panels(out / "plots" / "training.png", training_panels(result))
    draw_before_after(out)
    card = model_card(out, trainer.pipe, trainer.config, result, trainer.describe(), grids(out))
    write_text(out / "README.md", card)


def _draw_panels(path: Path, panels: Sequence[Panel]) -> None:
    """Write a figure of the panels; without panels, delete an older figure."""
    path.unlink(missing_ok=True)
    if not panels:
        return
    columns = len(panels) if len(panels) <= 3 else 2
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.5 * rows), dpi=DPI, layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, panel in zip(places, panels, strict=False):
        style_axes(axes)
        panel(axes)
    for axes in places[len(panels) :]:
        axes.set_visible(False)
    save_figure(figure, path)


def rewards_panels(result: TrainingResult) -> list[Panel]:
    """Create panels of the trained reward, each held-out reward, and the first held-out against the trained reward."""
    names = held_out_names(result.evaluations)
    panels: list[Panel] = []
    if names or len(_series(result.records, "reward")[0]):
        panels.append(lambda axes: _draw_trained(axes, result, names[0] if names else None))
    panels += [partial(_draw_held_out, result=result, name=name) for name in names[1:]]
    if len(names) > 1 and len(result.evaluations) > 1:
        panels.append(lambda axes: _draw_against(axes, result, names[0], names[1]))
    return panels


def _draw_trained(axes: Axes, result: TrainingResult, name: str | None) -> None:
    _draw_curve(axes, result.records, "reward", "training samples", SAMPLES_COLOR)
    if name:
        _draw_evaluations(axes, result, name, TRAINED_COLOR)
    _finish(axes, f"reward that was trained{': ' + plain_text(name, 32) if name else ''}", legend=True)


def _draw_held_out(axes: Axes, result: TrainingResult, name: str) -> None:
    _draw_evaluations(axes, result, name, HELD_OUT_COLOR)
    _finish(axes, f"held-out reward: {plain_text(name, 38)}", legend=True)


def _draw_evaluations(axes: Axes, result: TrainingResult, name: str, color: Any) -> None:
    """Draw means over held-out prompts with their 95 % intervals, and mark the best evaluation."""
    step_values = [(one["step"], *one[f"eval/{name}"]) for one in result.evaluations if f"eval/{name}" in one]
    steps, mean, low, high = np.array(step_values, dtype=float).T
    draw_band(axes, steps, low, high, color, "95 % interval of the mean")
    axes.plot(steps, mean, color=color, lw=2.2, marker="o", ms=4, label="held-out prompts", zorder=3)
    if len(steps) == 1:  # the band has no width
        axes.errorbar(steps, mean, [mean - low, high - mean], color=color, capsize=3, alpha=0.5)
    if (best := result.best_step) is not None:
        axes.axvline(best, color=INK, lw=0.9, ls=":", zorder=1, label=f"best: {best} updates")


def _draw_against(axes: Axes, result: TrainingResult, trained: str, held_out: str) -> None:
    """Draw a path through the evaluations: to the right and down means over-optimisation of the trained reward."""
    both = [one for one in result.evaluations if f"eval/{trained}" in one and f"eval/{held_out}" in one]
    x, y = (np.array([one[f"eval/{name}"][0] for one in both]) for name in (trained, held_out))
    axes.plot(x, y, color=FAINT, lw=1.2, zorder=1)
    shades = colormaps[COLORMAP](np.linspace(0, 0.85, len(both)))
    axes.scatter(x, y, c=shades, s=30, zorder=2, edgecolors=INK, linewidths=0.5)
    axes.margins(0.18)
    marked = {0: f"{both[0]['step']}", len(both) - 1: f"{both[-1]['step']}"}
    for number, one in enumerate(both):
        if one["step"] == result.best_step:
            marked[number] = f"{one['step']}, best"
            axes.scatter(x[number], y[number], s=110, facecolors="none", edgecolors=INK, linewidths=1.1, zorder=3)
    outline = [withStroke(linewidth=2.5, foreground="white")]
    style: dict[str, Any] = {"size": 8, "ha": "center", "color": INK, "path_effects": outline}
    for number, text in marked.items():
        axes.annotate(text, (x[number], y[number]), (0, 9), textcoords="offset points", **style)
    _finish(axes, "held out against trained, by updates")
    axes.set_xlabel(f"trained: {plain_text(trained, 38)}", size=8, color=INK)
    axes.set_ylabel(f"held out: {plain_text(held_out, 34)}", size=8, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(5))


def reward_gains(result: TrainingResult, name: str) -> tuple[Tensor, Tensor]:
    """Return KL (N,) in nats and the gain (N,) of a reward since the base model, in the base model's deviations.

    The KL is measured at the evaluations, by `eval_kl`, or else on the training samples: the mean of the GAIN_UPDATES
    updates before each evaluation but the first.
    """
    base, *later = [one for one in result.evaluations if f"eval/{name}" in one]
    scale = base.get(f"eval/deviation/{name}") or 1.0
    kl, gains = [], []
    for one in later:
        recent = [r["kl"] for r in result.records if 0 <= one["step"] - r["step"] < GAIN_UPDATES and "kl" in r]
        recent = [one["eval/kl"]] if "eval/kl" in one else recent
        if recent:
            kl.append(sum(recent) / len(recent))
            gains.append((one[f"eval/{name}"][0] - base[f"eval/{name}"][0]) / scale)
    return torch.tensor(kl, dtype=torch.float64), torch.tensor(gains, dtype=torch.float64)


def overoptimization_panels(result: TrainingResult) -> list[Panel]:
    """Create a panel of the gains of all rewards over √KL with their fits, if three evaluations have a KL."""
    names = [name for name in held_out_names(result.evaluations) if (reward_gains(result, name)[0] > 0).sum() >= 3]
    return [partial(_draw_gains, result=result, names=names)] if names else []


def _draw_gains(axes: Axes, result: TrainingResult, names: Sequence[str]) -> None:
    for place, name in enumerate(names):
        color, kl, gains = LINE_COLORS[min(place, 1)], *(values.numpy() for values in reward_gains(result, name))
        used = kl > 0
        distance = np.sqrt(kl[used])
        label = f"{plain_text(name, 24)} ({'held out' if place else 'trained'})"
        axes.plot(distance, gains[used], "o", color=color, ms=4, label=label)
        if len(np.unique(distance)) < 2:
            continue
        curve = fit_reward_curve(torch.from_numpy(kl), torch.from_numpy(gains), resamples=200)
        grid = np.linspace(distance.min(), distance.max(), 60)
        axes.plot(grid, [curve(d) for d in grid], color=color, lw=1.2, label=f"α {curve.alpha:.2g}, β {curve.beta:.2g}")
    axes.axhline(0, color=FAINT, lw=0.9)
    set_title(axes, "gain in deviations of the base model")
    axes.set_xlabel("√KL from the base model, √nats", size=8, color=INK)
    axes.legend(frameon=False, fontsize=7, labelcolor=INK)


def divergence_panels(result: TrainingResult, config: Mapping[str, Any]) -> list[Panel]:
    """Create panels of the divergence from the reference model, its cost, and the diversity of images."""
    titles = {"kl": "KL from the start, nats a trajectory", "reference_distance": "squared distance of outputs"}
    if any(record.get("kl_weight") for record in result.records):
        titles |= {"kl_weight": "price of KL, β"}
    panels = series_panels(result.records, titles | {"chi_square": "χ² from the start"}, config)
    # The diversity of one sample per prompt is logged as 0.
    if any(one.get("eval/diversity") for one in result.evaluations):
        panels.append(lambda axes: _draw_diversity(axes, result))
    return panels


def _draw_diversity(axes: Axes, result: TrainingResult) -> None:
    axes.plot(*_series(result.evaluations, "eval/diversity"), color=HELD_OUT_COLOR, lw=2.2, marker="o", ms=4)
    axes.set_ylim(0, 1.15 * axes.get_ylim()[1])
    _finish(axes, "diversity of a prompt's images, 0 to 1")


def training_panels(result: TrainingResult) -> list[Panel]:
    """Create panels of the optimisation: loss, accuracy, gradient norm, speed."""
    titles = {"loss": "loss", "accuracy": "pairs ordered rightly, share", "grad_norm": "gradient norm, before clipping"}
    return series_panels(result.records, titles | {"images_per_second": "images per second, updates included"}, {})


def series_panels(records: Records, titles: Mapping[str, str], config: Mapping[str, Any]) -> list[Panel]:
    """Create a panel for each series with values, with its target and budget from the configuration."""
    drawn = {name: title for name, title in titles.items() if len(_series(records, name)[0])}
    return [partial(_draw_series, records=records, name=one, title=drawn[one], config=config) for one in drawn]


def _draw_series(axes: Axes, records: Records, name: str, title: str, config: Mapping[str, Any]) -> None:
    _draw_curve(axes, records, name, "each update", TRAINED_COLOR)
    values = _series(records, name)[1]
    for suffix, style in (("target", "--"), ("budget", ":")):
        if (level := config.get(f"{name}_{suffix}_nats")) is not None:
            _draw_level(axes, level, values.max(), style, f"{suffix}: {level:g} nats")
    if name == "accuracy":
        _draw_level(axes, 0.5, 1, ":", "chance")
    _finish(axes, title, legend=True)
    if values.min() > 0 and values.max() > LOG_SCALE_RATIO * values.min():
        axes.set_yscale("log")


def _draw_level(axes: Axes, level: float, highest: float, style: str, label: str) -> None:
    """Draw a horizontal line; a level far above the curve is only named, because a line would flatten the curve."""
    if level > FAR_FACTOR * highest:
        axes.plot([], [], color=INK, lw=0.9, ls=style, label=f"{label}, above")
    else:
        axes.axhline(level, color=INK, lw=0.9, ls=style, label=label)


def _series(records: Records, name: str) -> tuple[Numbers, Numbers]:
    """Collect steps and finite values: PRDP's accuracy is NaN for a batch without a pair, a loss may overflow."""
    step_values = [(one["step"], one[name]) for one in records if one.get(name) is not None and np.isfinite(one[name])]
    steps, values = np.array(step_values, dtype=float).reshape(-1, 2).T
    return steps, values


def _draw_curve(axes: Axes, records: Records, name: str, label: str, color: Any) -> None:
    """Draw values as a thin line with their moving mean in bold; fewer than MIN_SMOOTHED values as dots."""
    steps, values = _series(records, name)
    if len(values) < MIN_SMOOTHED:
        axes.plot(steps, values, color=color, lw=1.2, marker="o", ms=3.5, label=label)
        return
    reach = max(2, len(values) // 20)
    means = np.convolve(values, np.full(2 * reach + 1, 1 / (2 * reach + 1)), mode="valid")
    axes.plot(steps, values, color=color, lw=0.8, alpha=0.45, label=label)
    axes.plot(steps[reach:-reach], means, color=color, lw=2.0, label=f"moving mean of {2 * reach + 1}", zorder=2)


def _finish(axes: Axes, title: str, legend: bool = False) -> None:
    set_title(axes, title)
    mark_integers(axes, "updates")
    axes.yaxis.set_major_formatter("{x:.6g}")  # no offset in a corner
    if legend and len(axes.get_legend_handles_labels()[0]) > 1:
        # Below the axes, and not wider than them: constrained layout would shrink the panel.
        letters = sum(map(len, axes.get_legend_handles_labels()[1]))
        below: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (-0.02, -0.15), "borderaxespad": 0}
        axes.legend(frameon=False, fontsize=7, labelcolor=INK, ncols=3 if letters < 45 else 2, **below)


# ---- Images: samples/step-*.png, plots/before-after.png ----

MAX_IMAGES, COLUMNS = 24, 6  # in a grid
MAX_PAIRS = 8  # prompts in the comparison
MAX_REWARDS = 3  # below an image
METADATA_KEY = "steer"  # text chunk of a grid's PNG: its cells and their boxes, read by the comparison


def write_grid(evaluated: EvalResult, out: Path, samples: int) -> Path:
    """Write samples/step-000020.png: at most 24 images of evenly spaced prompts, the same ones at every step.

    samples  images of each prompt to draw, at most all
    """
    num_generations = len(evaluated.images) // len(evaluated.prompts)
    each = max(1, min(samples, num_generations, MAX_IMAGES))
    rewards = np.stack([values.float().cpu().numpy() for values in evaluated.rewards.values()])[:MAX_REWARDS]
    cells, pictures = [], []
    for place in evenly_spaced(len(evaluated.prompts), MAX_IMAGES // each):
        for k in range(each):
            cells.append({"prompt": evaluated.prompts[place], "rewards": rewards[:, place, k].tolist()})
            pictures.append(thumbnail(evaluated.images[place * num_generations + k]))
    names = list(evaluated.rewards)[:MAX_REWARDS]
    video = "   (videos: the middle frame)" if evaluated.images.ndim == 5 else ""
    columns, height = min(COLUMNS, len(cells)), max(picture.height for picture in pictures)
    row_height = CAPTION_HEIGHT + height + BELOW + GAP
    size = (columns * (SIDE + GAP) + GAP, TOP + row_height * -(-len(cells) // columns))
    canvas = Canvas(*size, f"after {evaluated.step} updates", f"below each image: {join_names(names)}{video}")
    boxes = []
    for number, (cell, picture) in enumerate(zip(cells, pictures, strict=True)):
        row, column = divmod(number, columns)
        left, top = GAP + column * (SIDE + GAP), TOP + row * row_height + CAPTION_HEIGHT
        canvas.caption(cell["prompt"], left, top)
        boxes.append(canvas.cell(picture, cell["rewards"], left, top, height))
    metadata = {"step": evaluated.step, "rewards": names, "cells": cells, "boxes": boxes}
    path = out / "samples" / f"step-{evaluated.step:06d}.png"
    return save_figure(canvas.figure, path, {METADATA_KEY: json.dumps(metadata)})


def read_grid(path: Path) -> dict[str, Any] | None:
    """Read the metadata of a grid: step, rewards, cells and boxes; None for another picture or a damaged one."""
    try:
        with Image.open(path) as picture:
            picture.load()
            text = picture.info.get(METADATA_KEY)
        return json.loads(text) if isinstance(text, str) else None
    except DECODE_ERRORS:
        return None


def grids(out: Path) -> list[Path]:
    """List the grids of a run, by step."""
    return [path for path in sorted((out / "samples").glob("step-*.png")) if read_grid(path)]


def draw_before_after(out: Path) -> Path | None:
    """Write plots/before-after.png: prompts of the first grid above the same prompts and seeds of the last one.

    None if there are no two grids of the same prompts.
    """
    listed = grids(out)
    if len(listed) < 2:
        return None
    paths = (listed[0], listed[-1])
    before, after = metadata = [read_grid(path) or {} for path in paths]
    if [cell["prompt"] for cell in before["cells"]] != [cell["prompt"] for cell in after["cells"]]:
        return None
    numbers = evenly_spaced(len(before["cells"]), MAX_PAIRS)
    height = max(lower - upper for grid in metadata for _, upper, _, lower in grid["boxes"])
    margin, row_height = 106, height + BELOW + 8
    canvas = Canvas(
        margin + len(numbers) * (SIDE + GAP),
        TOP + CAPTION_HEIGHT + 2 * row_height,
        "The same prompts and seeds, before and after",
        f"below each image: {join_names(after['rewards'])}",
    )
    for row, (path, grid, label) in enumerate(zip(paths, metadata, ("before", "after"), strict=True)):
        top = TOP + CAPTION_HEIGHT + row * row_height
        canvas.text(f"{label}\n{grid['step']} updates", GAP, top + height / 2, size=8, va="center")
        with Image.open(path) as file:
            whole = file.convert("RGB")
        for column, number in enumerate(numbers):
            cell, left = grid["cells"][number], margin + column * (SIDE + GAP)
            if row == 0:
                canvas.caption(cell["prompt"], left, top)
            canvas.cell(whole.crop(tuple(grid["boxes"][number])), cell["rewards"], left, top, height)
    return save_figure(canvas.figure, out / "plots" / "before-after.png")
