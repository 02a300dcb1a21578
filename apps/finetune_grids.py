"""Pictures of a finetuning's evaluations: a grid of held-out images for each, and the first beside the last."""

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from steer.apps.pictures import FAINT, INK, shown
from steer.images import BROKEN
from steer.pipelines.held_out import Evaluated
from steer.staged import staged

DPI = 120
MOST_IMAGES = 24
COLUMNS = 6
SIDE = 192  # most pixels of a picture's side: three times a 64-pixel image
GAP = 14
CAPTION = 32  # pixels above an image, for two lines
BELOW = 20  # pixels below it, for its rewards
TOP = 46
PAIRS = 8  # prompts in the comparison
MOST_REWARDS = 3  # numbers below one image
LETTERS = 30  # of a caption's line
TOLD = "steer"  # a grid's own text chunk in the PNG: what is where, to be read again for the comparison


def write_grid(evaluated: Evaluated, out: Path, samples: int) -> Path:
    """Writes samples/step-000020.png: at most 24 images of evenly spaced prompts, the same ones at every step.

    samples  images of each prompt to show; no more than were drawn are
    """
    drawn = len(evaluated.images) // len(evaluated.prompts)
    each = max(1, min(samples, drawn, MOST_IMAGES))
    rewards = np.stack([values.float().cpu().numpy() for values in evaluated.rewards.values()])
    cells, pictures = [], []
    for place in evenly(len(evaluated.prompts), MOST_IMAGES // each):
        for k in range(each):
            told = [float(value) for value in rewards[:MOST_REWARDS, place, k]]
            cells.append({"prompt": evaluated.prompts[place], "rewards": told})
            pictures.append(thumbnail(evaluated.images[place * drawn + k]))
    names = list(evaluated.rewards)[:MOST_REWARDS]
    video = "   (videos: the middle frame)" if evaluated.images.ndim == 5 else ""
    title = (f"after {evaluated.step} updates", f"below each image: {listed(names)}{video}")
    figure, boxes = _laid_out(cells, pictures, title)
    said = {"step": evaluated.step, "rewards": names, "cells": cells, "boxes": boxes}
    path = out / "samples" / f"step-{evaluated.step:06d}.png"
    with staged(path) as new:
        figure.savefig(new, format="png", metadata={TOLD: json.dumps(said)})
    return path


def evenly(count: int, most: int) -> list[int]:
    """At most `most` of `count` places, evenly spaced, the first and the last among them."""
    return sorted({int(place) for place in np.linspace(0, count - 1, min(count, max(most, 1))).round()})


def listed(names: Sequence[str]) -> str:
    """Names in one line that fits above a grid."""
    return " · ".join(shown(name, 40) for name in names)


def thumbnail(image: Tensor) -> Image.Image:
    """An image (3, H, W), or the middle frame of (F, 3, H, W), that fits a cell; small ones grow by whole factors."""
    frame = image[len(image) // 2] if image.ndim == 4 else image
    pixels = (frame.float().nan_to_num().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    picture = Image.fromarray(pixels)
    largest = max(picture.size)
    if (factor := SIDE // largest) > 1:
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    width, height = (max(1, round(length * SIDE / largest)) for length in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def _laid_out(
    cells: Sequence[dict[str, Any]], pictures: Sequence[Image.Image], title: tuple[str, str]
) -> tuple[Figure, list[list[int]]]:
    """A grid, and where in it each picture is: left, top, right, bottom, in pixels from the top left."""
    columns, high = min(COLUMNS, len(cells)), max(picture.height for picture in pictures)
    row = CAPTION + high + BELOW + GAP
    size = (max(columns * (SIDE + GAP) + GAP, 460), TOP + row * -(-len(cells) // columns))
    figure, boxes = _canvas(*size), []
    _words(figure, title[0], GAP, 6, size=11, weight="bold")
    _words(figure, title[1], GAP, 26, size=8)
    for number, (cell, picture) in enumerate(zip(cells, pictures, strict=True)):
        left, top = GAP + (number % columns) * (SIDE + GAP), TOP + (number // columns) * row
        _caption(figure, cell["prompt"], left, top + CAPTION)
        boxes.append(_place(figure, picture, left, top + CAPTION, high))
        _words(figure, numbers(cell["rewards"]), left + SIDE / 2, top + CAPTION + high + 4, size=8, ha="center")
    return figure, boxes


def _canvas(width: int, height: int) -> Figure:
    return Figure(figsize=(width / DPI, height / DPI), dpi=DPI, layout=None)


def _words(figure: Figure, text: str, left: float, top: float, **style: Any) -> None:
    """Text at a place in pixels from the top left."""
    width, height = figure.get_size_inches() * DPI
    said: dict[str, Any] = {"va": "top", "color": INK, "linespacing": 1.05}
    figure.text(left / width, 1 - top / height, text, **(said | style))


def _place(figure: Figure, picture: Image.Image, left: int, top: int, high: int) -> list[int]:
    """Puts a picture amid a cell of this height, pixel on pixel, in a thin frame; returns its box."""
    left, top = left + (SIDE - picture.width) // 2, top + (high - picture.height) // 2
    width, height = (round(length * DPI) for length in figure.get_size_inches())
    # A figure counts from its lower edge, and draws what it is given from the lower left on.
    figure.figimage(np.asarray(picture), left, height - top - picture.height, origin="upper", resize=False)
    edge = ((left - 1) / width, 1 - (top + picture.height + 1) / height)
    frame = Rectangle(edge, (picture.width + 2) / width, (picture.height + 2) / height, fill=False, lw=0.6, ec=FAINT)
    figure.add_artist(frame)
    return [left, top, left + picture.width, top + picture.height]


def _caption(figure: Figure, prompt: str, left: float, bottom: float) -> None:
    """A prompt above a picture. Line by line: of several at once, the place of each hangs on the others' letters."""
    for number, line in enumerate(reversed(caption(prompt))):
        _words(figure, shown(line), left, bottom - 5 - 12 * number, size=7, va="baseline")


def caption(prompt: str) -> list[str]:
    """A prompt in at most two lines."""
    lines = textwrap.wrap(prompt, LETTERS)
    return lines if len(lines) <= 2 else [lines[0], lines[1][: LETTERS - 1] + "…"]


def numbers(rewards: Sequence[float]) -> str:
    """Rewards in one line."""
    return " · ".join(f"{reward:.3g}".replace("-", "−") for reward in rewards)


def read_grid(path: Path) -> dict[str, Any] | None:
    """What a grid tells of itself: step, rewards, cells and boxes; None for another picture, and a damaged one."""
    try:
        with Image.open(path) as picture:
            picture.load()
            said = picture.info.get(TOLD)
        return json.loads(said) if isinstance(said, str) else None
    except BROKEN:
        return None


def grids(out: Path) -> list[Path]:
    """The grids of a run, by step."""
    return [path for path in sorted((out / "samples").glob("step-*.png")) if read_grid(path)]


def draw_before_after(out: Path) -> Path | None:
    """Writes plots/before-after.png: prompts of the first and the last grid, one above the other, at equal seeds.

    Without two grids of the same prompts there is nothing to compare: None.
    """
    found = grids(out)
    if len(found) < 2:
        return None
    paths = (found[0], found[-1])
    told = [read_grid(path) or {} for path in paths]
    if [cell["prompt"] for cell in told[0]["cells"]] != [cell["prompt"] for cell in told[1]["cells"]]:
        return None
    chosen = evenly(len(told[0]["cells"]), PAIRS)
    high = max(lower - upper for said in told for _, upper, _, lower in said["boxes"])
    margin, step, row_height = 106, SIDE + GAP, high + BELOW + 8
    figure = _canvas(max(margin + len(chosen) * step, 460), TOP + CAPTION + 2 * row_height)
    _words(figure, "The same prompts and seeds, before and after", GAP, 6, size=11, weight="bold")
    _words(figure, f"below each image: {listed(told[1]['rewards'])}", GAP, 26, size=8)
    for row, (path, said) in enumerate(zip(paths, told, strict=True)):
        top = TOP + CAPTION + row * row_height
        _words(figure, f"{('before', 'after')[row]}\n{said['step']} updates", GAP, top + high / 2, size=8, va="center")
        with Image.open(path) as whole:
            for column, number in enumerate(chosen):
                cell, left = said["cells"][number], margin + column * step
                if row == 0:
                    _caption(figure, cell["prompt"], left, top)
                _place(figure, whole.convert("RGB").crop(tuple(said["boxes"][number])), left, top, high)
                _words(figure, numbers(cell["rewards"]), left + SIDE / 2, top + high + 4, size=8, ha="center")
    with staged(out / "plots" / "before-after.png") as new:
        figure.savefig(new, format="png")
    return out / "plots" / "before-after.png"
