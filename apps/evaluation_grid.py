"""A grid of images: a row a prompt, a column a contender, all of one seed."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from steer.apps.evaluation_plots import labels, named
from steer.apps.evaluation_store import Store
from steer.apps.finetune_grids import DPI, GAP, SIDE
from steer.apps.pictures import FAINT, INK, opened, shown
from steer.staged import staged

MOST = 16  # contenders
MARGIN = 160  # pixels for the prompts, on the left
TITLE, LINE, BELOW = 54, 15, 20  # pixels: above the names, of a line of them, below an image


def draw_images(report: Mapping[str, Any], store: Store, shown_places: Sequence[int]) -> Path:
    """Writes grid.png: the picked images of the first seed, below each its first reward."""
    contenders, name = report["contenders"][:MOST], report["rewards"][0]
    columns = [named(name, 22, 4) for name in labels(report["contenders"])[:MOST]]
    top = TITLE + LINE * max(map(len, columns)) + 4
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
                words(_asked(report["prompts"][place]["prompt"]), GAP, upper + high / 2, size=8, va="center")
            _picture(figure, pictures[one["name"], place], (left / width, 1 - (upper + high) / height), high)
            words(f"{firsts[place]:.3g}".replace("-", "−"), left + SIDE / 2, upper + high + 3, size=8, ha="center")
    with staged(store.out / "grid.png") as new:
        figure.savefig(new, format="png")
    return store.out / "grid.png"


class _Words:
    """Writes text at places in pixels from the top left."""

    def __init__(self, figure: Figure, width: float, height: float) -> None:
        self.figure, self.width, self.height = figure, width, height

    def __call__(self, text: str, left: float, top: float, **style: Any) -> None:
        said: dict[str, Any] = {"va": "top", "color": INK, "linespacing": 1.15}
        self.figure.text(left / self.width, 1 - top / self.height, text, **(said | style))


def _asked(prompt: str) -> str:
    lines = textwrap.wrap(prompt, 19)
    return "\n".join(shown(line) for line in (lines if len(lines) <= 6 else [*lines[:5], f"{lines[5][:18]}…"]))


def _height(path: Path) -> int:
    return opened(path).height


def _picture(figure: Figure, path: Path, corner: tuple[float, float], high: int) -> None:
    """A picture in a cell with this lower left corner, in shares of the figure; an empty frame where there is none."""
    width, height = figure.get_size_inches() * DPI
    axes = figure.add_axes((*corner, SIDE / width, high / height))
    if path.is_file():
        axes.imshow(opened(path), interpolation="antialiased")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_color(FAINT)
