"""Pictures of a report: base beside steered images, and the tree of the particles."""

import re
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from PIL import Image

from steer.errors import InputError
from steer.images import BROKEN

Report = dict[str, Any]
MOST_ROWS = 24  # prompts in one grid
MOST_TREES = 6
SHADE = "viridis"  # tells rewards apart for colour-blind readers too
INK, FAINT = "#222222", "#bbbbbb"


def draw_grid(report: Report, out: Path) -> Path:
    """Writes grid.png: a row a prompt, the base images (where there are any) left of the steered ones, best first."""
    entries = report["prompts"][:MOST_ROWS]
    bases = [entry.get("base", {"images": [], "rewards": []}) for entry in entries]
    left, right = max(len(base["images"]) for base in bases), max(len(entry["images"]) for entry in entries)
    gap = 0.35 if left else 0.0
    figure = Figure(figsize=(1.35 * (left + right) + gap + 0.3, 1.75 * len(entries) + 0.75), dpi=120, layout=None)
    width, height = figure.get_size_inches()
    for row, (entry, base) in enumerate(zip(entries, bases, strict=True)):
        top = height - 0.75 - 1.75 * row
        figure.text(0.15 / width, (top - 0.02) / height, shown(entry["prompt"]), size=9, va="top", color=INK)
        cells = (
            [*zip(base["images"], base["rewards"], strict=True)],
            [*zip(entry["images"], entry["rewards"], strict=True)],
        )
        for images, start in zip(cells, (0.15, 0.15 + 1.35 * left + gap), strict=True):
            for column, (name, reward) in enumerate(images):
                place = ((start + 1.35 * column) / width, (top - 1.45) / height, 1.2 / width, 1.2 / height)
                _picture(figure.add_axes(place), out / name, reward)
    if left:
        figure.text(0.15 / width, 1 - 0.2 / height, "base", size=11, weight="bold", va="top", color=INK)
    x = (0.15 + 1.35 * left + gap) / width
    figure.text(x, 1 - 0.2 / height, made_how(report), size=11, weight="bold", va="top", color=INK)
    figure.text(
        0.15 / width,
        1 - 0.42 / height,
        f"below each image: {report['settings']['reward']}",
        size=8,
        va="top",
        color=INK,
    )
    figure.savefig(out / "grid.png")
    return out / "grid.png"


def made_how(report: Report) -> str:
    """What the images beside the base ones are, in a few words."""
    finetuned = report["settings"].get("lora") is not None
    if report["method"] == "base":
        return "finetuned" if finetuned else "base"
    return f"{'finetuned, ' if finetuned else ''}{report['method']}, best first"


def shown(prompt: str, length: int = 70) -> str:
    """A prompt as one line of plain text for matplotlib, which would read $…$ as mathematics."""
    prompt = re.sub("[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", prompt)
    return (prompt if len(prompt) <= length else prompt[: length - 1] + "…").replace("$", r"\$")


def opened(path: Path) -> Image.Image:
    """An image that a run has written, in RGB. Raises InputError where it was spoilt since."""
    try:
        with Image.open(path, formats=("PNG",)) as file:
            return file.convert("RGB")
    except BROKEN as error:
        raise InputError(f"{path} is damaged ({error}); delete it, the same command makes it again") from error


def _picture(axes: Axes, path: Path, reward: float) -> None:
    axes.imshow(opened(path), interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel(f"{reward:.3g}", size=8, labelpad=2, color=INK)
    axes.spines[:].set_color(FAINT)


def draw_ancestry(report: Report, out: Path) -> Path:
    """Writes ancestry.png: for each prompt the particles from left to right through the evaluated steps.

    A dot is a particle, coloured by its reward; a line leads to where it goes on. Dark lines lead to a finished
    image, shown at the right with its reward.
    """
    entries = report["prompts"][:MOST_TREES]
    size = max(len(column) for entry in entries for column in _columns(entry))
    figure = Figure(figsize=(9, (0.62 * size + 0.95) * len(entries)), dpi=120, layout="constrained")
    for axes, entry in zip(np.atleast_1d(figure.subplots(len(entries), 1)), entries, strict=True):
        _tree(axes, entry, out)
    figure.savefig(out / "ancestry.png")
    return out / "ancestry.png"


def _columns(entry: dict[str, Any]) -> list[list[float]]:
    """Rewards by slot at each reading, and of the finished images."""
    return [*entry["step_rewards"], _in_slots(entry["rewards"], entry["order"])]


def _tree(axes: Axes, entry: dict[str, Any], out: Path) -> None:
    columns = _columns(entry)
    size, last = max(map(len, columns)), len(columns) - 1
    _lines(axes, entry["ancestors"], len(columns[-1]))
    shade: dict[str, Any] = {"cmap": SHADE, "vmin": min(map(min, columns)), "vmax": max(map(max, columns))}
    for column, rewards in enumerate(columns):
        axes.scatter(
            [column] * len(rewards),
            range(len(rewards)),
            c=rewards,
            s=46,
            zorder=2,
            edgecolors=INK,
            linewidths=0.6,
            **shade,
        )
        if column < last:
            for slot, reward in enumerate(rewards):
                _label(axes, f"{reward:.2g}", (column, slot), (0, 7), size=6.5, ha="center")
    for rank, slot in enumerate(entry["order"]):
        picture = opened(out / entry["images"][rank]).resize((64, 64))
        thumbnail = OffsetImage(np.asarray(picture), zoom=0.42)
        axes.add_artist(AnnotationBbox(thumbnail, (last, slot), (26, 0), boxcoords="offset points", frameon=False))
        weight = "bold" if rank == 0 else "normal"
        _label(axes, f"{entry['rewards'][rank]:.3g}", (last, slot), (46, 0), size=8, va="center", weight=weight)
    steps = [f"step {step}\nESS {ess:.1f}" for step, ess in zip(entry["steps"], entry["ess"], strict=True)]
    axes.set_title(shown(entry["prompt"]), size=9, loc="left", color=INK)
    axes.set_xticks(range(last + 1), [*steps, "end"], size=8)
    axes.set_yticks([])
    axes.set_xlim(-0.25, last + 0.75)
    axes.set_ylim(size - 0.4, -0.7)
    axes.spines[:].set_visible(False)


def _lines(axes: Axes, ancestors: list[list[int]], size: int) -> None:
    """From each particle to where it goes on, from the end backwards: what leads to an image is dark."""
    alive = set(range(size))
    for column in range(len(ancestors) - 1, -1, -1):
        for slot, parent in enumerate(ancestors[column]):
            color, width = (INK, 1.6) if slot in alive else (FAINT, 1.0)
            axes.plot([column, column + 1], [parent, slot], color=color, lw=width, zorder=1)
        alive = {ancestors[column][slot] for slot in alive}


def _label(axes: Axes, text: str, place: tuple[int, int], offset: tuple[int, int], **style: Any) -> None:
    axes.annotate(text, place, offset, textcoords="offset points", color=INK, **style)


def _in_slots(rewards: list[float], order: list[int]) -> list[float]:
    """Rewards by slot of the run, from rewards best first."""
    return [rewards[order.index(slot)] for slot in range(len(order))]
