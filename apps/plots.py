"""Pictures of a report: base beside steered images, and the tree of the particles."""

import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from steer.errors import InputError
from steer.files import DECODE_ERRORS, atomic_write
from steer.pipelines.base import Iteration
from steer.pipelines.particle_batch import as_type
from steer.pipelines.training.evaluation import EvalResult

Report = dict[str, Any]
MAX_ROWS = 24  # prompts in one grid
MAX_TREES = 6
COLORMAP = "viridis"  # tells rewards apart for colour-blind readers too
INK, FAINT = "#222222", "#bbbbbb"


def draw_grid(report: Report, out: Path) -> Path:
    """Writes grid.png: a row a prompt, the base images (where there are any) left of the steered ones, best first."""
    entries = report["prompts"][:MAX_ROWS]
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
                _draw_picture(figure.add_axes(place), out / name, reward)
    if left:
        figure.text(0.15 / width, 1 - 0.2 / height, "base", size=11, weight="bold", va="top", color=INK)
    x = (0.15 + 1.35 * left + gap) / width
    figure.text(x, 1 - 0.2 / height, image_title(report), size=11, weight="bold", va="top", color=INK)
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


def image_title(report: Report) -> str:
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
    except DECODE_ERRORS as error:
        raise InputError(f"{path} is damaged ({error}); delete it, the same command makes it again") from error


def _draw_picture(axes: Axes, path: Path, reward: float) -> None:
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
    entries = report["prompts"][:MAX_TREES]
    size = max(len(column) for entry in entries for column in _columns(entry))
    figure = Figure(figsize=(9, (0.62 * size + 0.95) * len(entries)), dpi=120, layout="constrained")
    for axes, entry in zip(np.atleast_1d(figure.subplots(len(entries), 1)), entries, strict=True):
        _tree(axes, entry, out)
    figure.savefig(out / "ancestry.png")
    return out / "ancestry.png"


def _columns(entry: dict[str, Any]) -> list[list[float]]:
    """Rewards by slot at each reading, and of the finished images."""
    return [*entry["step_rewards"], _slot_order(entry["rewards"], entry["order"])]


def _tree(axes: Axes, entry: dict[str, Any], out: Path) -> None:
    columns = _columns(entry)
    size, last = max(map(len, columns)), len(columns) - 1
    _ancestry_lines(axes, entry["ancestors"], len(columns[-1]))
    shade: dict[str, Any] = {"cmap": COLORMAP, "vmin": min(map(min, columns)), "vmax": max(map(max, columns))}
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


def _ancestry_lines(axes: Axes, ancestors: list[list[int]], size: int) -> None:
    """From each particle to where it goes on, from the end backwards: what leads to an image is dark."""
    alive = set(range(size))
    for column in range(len(ancestors) - 1, -1, -1):
        for slot, parent in enumerate(ancestors[column]):
            color, width = (INK, 1.6) if slot in alive else (FAINT, 1.0)
            axes.plot([column, column + 1], [parent, slot], color=color, lw=width, zorder=1)
        alive = {ancestors[column][slot] for slot in alive}


def _label(axes: Axes, text: str, place: tuple[int, int], offset: tuple[int, int], **style: Any) -> None:
    axes.annotate(text, place, offset, textcoords="offset points", color=INK, **style)


def _slot_order(rewards: list[float], order: list[int]) -> list[float]:
    """Rewards by slot of the run, from rewards best first."""
    return [rewards[order.index(slot)] for slot in range(len(order))]


LARGEST = 512  # pixels of a side; more would only make the file heavy
SMALLEST = 256  # smaller images are enlarged, or their caption would not fit
CAPTION = 26  # pixels
SECONDS, LAST = 0.12, 2.0  # that a frame stays, and the last one


class Frames:
    """A folder with one picture an iteration, the images of all slots side by side.

    Which slot ends best is known at the end only. On disk they cost no memory, and a run that was interrupted has them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def keep(self, iteration: Iteration) -> None:
        """Saves the images of an iteration, whole or not at all."""
        assert iteration.images is not None, "observers are given the images"
        pixels = iteration.images if iteration.images.dim() == 4 else iteration.images[:, 0]  # of a video the first
        images: Sequence[Image.Image] = as_type(pixels.detach().float().cpu().clamp(0, 1), "pil")
        for image in images:
            image.thumbnail((LARGEST, LARGEST))
        width, height = images[0].size
        row = Image.new("RGB", (width * len(images), height))
        for slot, image in enumerate(images):
            row.paste(image, (width * slot, 0))
        with atomic_write(self._path(iteration.number)) as new:
            row.save(new, format="PNG")

    def write(self, entry: Mapping[str, Any], best: Image.Image, path: Path) -> None:
        """Writes the animation of the seed that ended best; its last frame is the image that it ended with."""
        slot, size, series = entry["order"][0], len(entry["order"]), entry["trace"]["rewards"]
        shown = [
            captioned(self._image(number, slot, size), f"iteration {number}", rewards[slot])
            for number, rewards in enumerate(series)
            if self._path(number).exists()
        ]
        last = best.convert("RGB")
        last.thumbnail((LARGEST, LARGEST))
        frames = [*shown, captioned(last, "best", entry["rewards"][0])]
        times = [round(1000 * SECONDS)] * len(shown) + [round(1000 * LAST)]
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=times, loop=0)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.png"

    def _image(self, number: int, slot: int, size: int) -> Image.Image:
        with Image.open(self._path(number)) as row:
            width = row.width // size
            return row.crop((width * slot, 0, width * (slot + 1), row.height)).convert("RGB")


def captioned(image: Image.Image, text: str, reward: float) -> Image.Image:
    """The image over a line of text: words on the left, the reward on the right."""
    larger = max(1, -(-SMALLEST // image.width))
    image = image.resize((image.width * larger, image.height * larger), Image.Resampling.NEAREST)
    frame = Image.new("RGB", (image.width, image.height + CAPTION), "white")
    frame.paste(image)
    draw, font = ImageDraw.Draw(frame), ImageFont.load_default(size=14)
    middle = image.height + CAPTION / 2
    draw.text((8, middle), text, INK, font, anchor="lm")
    draw.text((image.width - 8, middle), f"{reward:.3f}", INK, font, anchor="rm")
    return frame


Numbers = NDArray[np.float64]
MAX_LINES = 6  # prompts with a line of their own
BAND = (10, 90)  # per cent of the prompts


def draw_progress(report: Report, out: Path) -> Path:
    """Writes progress.png: the reward and ‖ε‖/√D by iteration, each seed thin, the best bold.

    Where there are too many prompts to tell apart, the means over them, with a band of most of them.
    """
    entries = report["prompts"]
    figure = Figure(figsize=(10, 4.1 + 0.18 * min(len(entries), MAX_LINES)), dpi=120, layout="constrained")
    reward, norm = figure.subplots(1, 2)
    (_progress_lines if len(entries) <= MAX_LINES else _progress_means)(reward, norm, entries)
    norm.axhline(1, color=INK, lw=0.8, ls=":", zorder=0)
    _style_axes(reward, f"reward {shown(report['settings']['reward'], 55)}")
    _style_axes(norm, "length of the noise, ‖ε‖/√D (dotted: random noise)")
    handles, labels = reward.get_legend_handles_labels()
    if len(handles) > 1:
        figure.legend(handles, labels, loc="outside lower left", frameon=False, fontsize=8, labelcolor=INK)
    figure.suptitle(_progress_title(report), size=9, x=0.01, ha="left", color=INK)
    figure.savefig(out / "progress.png")
    return out / "progress.png"


def _progress_title(report: Report) -> str:
    entries, seeds = report["prompts"], report["settings"]["particles"]
    of = f"“{shown(entries[0]['prompt'])}”" if len(entries) == 1 else f"{len(entries)} prompts"
    each = f"{seeds} {'seed' if seeds == 1 else 'seeds'}{' each' * (len(entries) > 1)}"
    return f"{report['method']}, {of}, {each}\nbold: the best; thin: all seeds"


def _progress_lines(reward: Axes, norm: Axes, entries: Sequence[dict[str, Any]]) -> None:
    """A colour for each prompt."""
    for number, entry in enumerate(entries):
        color = colormaps[COLORMAP](0.85 * number / (len(entries) - 1) if len(entries) > 1 else 0.25)
        trace, first = entry["trace"], entry["order"][0]
        best, lengths = np.max(trace["best"], axis=1), np.array(trace["norms"])
        _draw(reward, np.array(trace["rewards"]), color, bold=False)
        _draw(norm, lengths, color, bold=False)
        _draw(reward, best, color, bold=True, label=shown(entry["prompt"]))
        _draw(norm, lengths[:, first], color, bold=True)


def _progress_means(reward: Axes, norm: Axes, entries: Sequence[dict[str, Any]]) -> None:
    """Means over prompts, drawn as the lines of one. A search that has ended keeps its last values."""
    longest = max(len(entry["trace"]["best"]) for entry in entries)

    def series(name: str, entry: dict[str, Any]) -> Numbers:
        values = np.array(entry["trace"][name])
        return np.pad(values, ((0, longest - len(values)), (0, 0)), mode="edge")

    color = colormaps[COLORMAP](0.25)
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


def _style_axes(axes: Axes, title: str) -> None:
    axes.set_title(title, size=9, loc="left", color=INK)
    axes.set_xlabel("iteration (0: the noise it began with)", size=8, color=INK)
    axes.tick_params(labelsize=8, color=FAINT, labelcolor=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.grid(axis="y", color=FAINT, lw=0.4, alpha=0.6)


DPI = 120
MAX_IMAGES = 24
COLUMNS = 6
SIDE = 192  # most pixels of a picture's side: three times a 64-pixel image
GAP = 14
CAPTION_HEIGHT = 32  # pixels above an image, for two lines
BELOW = 20  # pixels below it, for its rewards
TOP = 46
PAIRS = 8  # prompts in the comparison
MAX_REWARDS = 3  # numbers below one image
LETTERS = 30  # of a caption's line
METADATA_KEY = "steer"  # a grid's own text chunk in the PNG: what is where, to be read again for the comparison


def write_grid(evaluated: EvalResult, out: Path, samples: int) -> Path:
    """Writes samples/step-000020.png: at most 24 images of evenly spaced prompts, the same ones at every step.

    samples  images of each prompt to show; no more than were drawn are
    """
    samples_per_prompt = len(evaluated.images) // len(evaluated.prompts)
    each = max(1, min(samples, samples_per_prompt, MAX_IMAGES))
    rewards = np.stack([values.float().cpu().numpy() for values in evaluated.rewards.values()])
    cells, pictures = [], []
    for place in evenly_spaced(len(evaluated.prompts), MAX_IMAGES // each):
        for k in range(each):
            grid_metadata = [float(value) for value in rewards[:MAX_REWARDS, place, k]]
            cells.append({"prompt": evaluated.prompts[place], "rewards": grid_metadata})
            pictures.append(thumbnail(evaluated.images[place * samples_per_prompt + k]))
    names = list(evaluated.rewards)[:MAX_REWARDS]
    video = "   (videos: the middle frame)" if evaluated.images.ndim == 5 else ""
    title = (f"after {evaluated.step} updates", f"below each image: {listed(names)}{video}")
    figure, boxes = _layout_grid(cells, pictures, title)
    info_dict = {"step": evaluated.step, "rewards": names, "cells": cells, "boxes": boxes}
    path = out / "samples" / f"step-{evaluated.step:06d}.png"
    with atomic_write(path) as new:
        figure.savefig(new, format="png", metadata={METADATA_KEY: json.dumps(info_dict)})
    return path


def evenly_spaced(count: int, most: int) -> list[int]:
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


def _layout_grid(
    cells: Sequence[dict[str, Any]], pictures: Sequence[Image.Image], title: tuple[str, str]
) -> tuple[Figure, list[list[int]]]:
    """A grid, and where in it each picture is: left, top, right, bottom, in pixels from the top left."""
    columns, high = min(COLUMNS, len(cells)), max(picture.height for picture in pictures)
    row = CAPTION_HEIGHT + high + BELOW + GAP
    size = (max(columns * (SIDE + GAP) + GAP, 460), TOP + row * -(-len(cells) // columns))
    figure, boxes = _canvas(*size), []
    _words(figure, title[0], GAP, 6, size=11, weight="bold")
    _words(figure, title[1], GAP, 26, size=8)
    for number, (cell, picture) in enumerate(zip(cells, pictures, strict=True)):
        left, top = GAP + (number % columns) * (SIDE + GAP), TOP + (number // columns) * row
        _caption(figure, cell["prompt"], left, top + CAPTION_HEIGHT)
        boxes.append(_place(figure, picture, left, top + CAPTION_HEIGHT, high))
        _words(figure, numbers(cell["rewards"]), left + SIDE / 2, top + CAPTION_HEIGHT + high + 4, size=8, ha="center")
    return figure, boxes


def _canvas(width: int, height: int) -> Figure:
    return Figure(figsize=(width / DPI, height / DPI), dpi=DPI, layout=None)


def _words(figure: Figure, text: str, left: float, top: float, **style: Any) -> None:
    """Text at a place in pixels from the top left."""
    width, height = figure.get_size_inches() * DPI
    info_dict: dict[str, Any] = {"va": "top", "color": INK, "linespacing": 1.05}
    figure.text(left / width, 1 - top / height, text, **(info_dict | style))


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
            info_dict = picture.info.get(METADATA_KEY)
        return json.loads(info_dict) if isinstance(info_dict, str) else None
    except DECODE_ERRORS:
        return None


def grids(out: Path) -> list[Path]:
    """The grids of a run, by step."""
    return [path for path in sorted((out / "samples").glob("step-*.png")) if read_grid(path)]


def draw_before_after(out: Path) -> Path | None:
    """Writes plots/before-after.png: prompts of the first and the last grid, one above the other, at equal seeds.

    Without two grids of the same prompts there is nothing to compare: None.
    """
    grid_paths = grids(out)
    if len(grid_paths) < 2:
        return None
    paths = (grid_paths[0], grid_paths[-1])
    grid_metadata = [read_grid(path) or {} for path in paths]
    if [cell["prompt"] for cell in grid_metadata[0]["cells"]] != [cell["prompt"] for cell in grid_metadata[1]["cells"]]:
        return None
    chosen = evenly_spaced(len(grid_metadata[0]["cells"]), PAIRS)
    high = max(lower - upper for info_dict in grid_metadata for _, upper, _, lower in info_dict["boxes"])
    margin, step, row_height = 106, SIDE + GAP, high + BELOW + 8
    figure = _canvas(max(margin + len(chosen) * step, 460), TOP + CAPTION_HEIGHT + 2 * row_height)
    _words(figure, "The same prompts and seeds, before and after", GAP, 6, size=11, weight="bold")
    _words(figure, f"below each image: {listed(grid_metadata[1]['rewards'])}", GAP, 26, size=8)
    for row, (path, info_dict) in enumerate(zip(paths, grid_metadata, strict=True)):
        top = TOP + CAPTION_HEIGHT + row * row_height
        _words(
            figure, f"{('before', 'after')[row]}\n{info_dict['step']} updates", GAP, top + high / 2, size=8, va="center"
        )
        with Image.open(path) as whole:
            for column, number in enumerate(chosen):
                cell, left = info_dict["cells"][number], margin + column * step
                if row == 0:
                    _caption(figure, cell["prompt"], left, top)
                _place(figure, whole.convert("RGB").crop(tuple(info_dict["boxes"][number])), left, top, high)
                _words(figure, numbers(cell["rewards"]), left + SIDE / 2, top + high + 4, size=8, ha="center")
    with atomic_write(out / "plots" / "before-after.png") as new:
        figure.savefig(new, format="png")
    return out / "plots" / "before-after.png"
