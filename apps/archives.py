"""archive.png: the best image of every cell of MAP-Elites, by one or two descriptors."""

import itertools
import math
from pathlib import Path
from typing import Any

from PIL import Image

from steer.apps.plots import BELOW, GAP, TOP, Canvas, fit, open_image, plain_text, save_figure
from steer.pipelines.base import Elites

CELL, LABEL_WIDTH = 96, 90  # pixels of a cell, and of the row labels
WIDE, HIGH = CELL + GAP, CELL + BELOW + GAP
MAX_DRAWN = 64  # intervals of a descriptor that are drawn


def write_archive(elites: Elites, prompt: str, folder: Path, image: Path) -> dict[str, Any]:
    """Draw the cells of one prompt into `folder`, and return descriptors, intervals and rewards for the report.

    image  one of the prompt's images; pictures have its shape
    The reward of an empty cell is null. An archive with more than 64 intervals is not drawn.
    """
    rewards = [value if math.isfinite(value) else None for value in elites.rewards[0].tolist()]
    entry: dict[str, Any] = {"describe": list(elites.names), "cells": list(elites.shape), "rewards": rewards}
    entry |= {"low": elites.low.tolist(), "high": elites.high.tolist()}
    if max(elites.shape) > MAX_DRAWN:
        return entry
    draw_archive(elites, prompt, open_image(image).size, folder / "archive.png")
    return entry | {"image": f"{folder.name}/archive.png"}


def draw_archive(elites: Elites, prompt: str, shape: tuple[int, int], path: Path) -> Path:
    """Draw a PNG of one prompt's cells: columns by the last descriptor, rows by the first of two; empty cells blank.

    shape  width and height of the images
    """
    rows, columns = (1, *elites.shape)[-2:]
    filled = elites.rewards[0].isfinite()
    left, top = GAP + (LABEL_WIDTH if rows > 1 else 0), TOP + BELOW
    names = f"columns: {elites.names[-1]}" + (f", rows: {elites.names[0]}" if rows > 1 else "")
    title = f"{names}; {int(filled.sum())} of {len(filled)} cells; below each image its reward"
    canvas = Canvas(left + columns * WIDE, top + rows * HIGH, plain_text(prompt), plain_text(title, 150))
    for column, label in enumerate(_intervals(elites, -1)):
        canvas.text(label, left + column * WIDE + CELL / 2, TOP, size=7, ha="center")
    for row, label in enumerate(_intervals(elites, 0) if rows > 1 else ()):
        canvas.text(label, GAP, top + row * HIGH + CELL / 2, size=7, va="center")
    for cell in filled.nonzero()[:, 0].tolist():
        row, column = divmod(cell, columns)
        picture = Image.fromarray(elites.pictures[0, cell].permute(1, 2, 0).numpy()).resize(shape)
        place = left + column * WIDE, top + row * HIGH
        canvas.cell(fit(picture, CELL), [elites.rewards[0, cell].item()], *place, CELL, CELL)
    return save_figure(canvas.figure, path)


def _intervals(elites: Elites, descriptor: int) -> list[str]:
    low, high, count = elites.low[descriptor].item(), elites.high[descriptor].item(), elites.shape[descriptor]
    edges = [low + (high - low) * number / count for number in range(count + 1)]
    return [f"{a:.3g} … {b:.3g}" for a, b in itertools.pairwise(edges)]
