"""Figures of sampling runs, as files and as SVG for pages, and the style and canvas that all figures share."""

import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from html import escape
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import Any
from xml.etree import ElementTree

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
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

Report = Mapping[str, Any]
Numbers = NDArray[np.float64]
Panel = Callable[[Axes], None]

# ---- Style: axes, titles, text ----

COLORMAP = "viridis"  # its colours also differ in lightness, for colour-blind readers and grey prints
INK, FAINT = "#222222", "#bbbbbb"
DPI = 120
# Colours of lines, which differ in lightness too.
LINE_COLORS = tuple(to_hex(colormaps[COLORMAP](place)) for place in (0.12, 0.5, 0.78))


def style_axes(axes: Axes, grid: str | None = "y") -> None:
    """Remove the box around axes, and draw faint grid lines along `grid` ("x" or "y")."""
    axes.tick_params(which="both", labelsize=8, color=FAINT, labelcolor=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    if grid is not None:
        axes.grid(axis=grid, color=FAINT, lw=0.4, alpha=0.6)  # type: ignore[arg-type]


def set_title(axes: Axes, *lines: str) -> None:
    """Write a small title at the upper left of axes."""
    axes.set_title("\n".join(lines), size=9, loc="left", color=INK)


def mark_integers(axes: Axes, label: str) -> None:
    """Mark the x axis with whole numbers."""
    axes.set_xlabel(label, size=8, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def save_figure(figure: Figure, path: Path, metadata: dict[str, str] | None = None) -> Path:
    """Write a figure as PNG, atomically. Raises OSError."""
    with atomic_write(path) as new:
        figure.savefig(new, format="png", metadata=metadata)
    return path


def plain_text(prompt: str, length: int = 70) -> str:
    """Shorten a prompt to one line of text for matplotlib, which would read $…$ as mathematics."""
    prompt = re.sub("[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", prompt)
    return (prompt if len(prompt) <= length else prompt[: length - 1] + "…").replace("$", r"\$")


def join_names(names: Sequence[str]) -> str:
    """Join the names of rewards in one line that fits above a grid."""
    return " · ".join(plain_text(name, 40) for name in names)


def format_rewards(rewards: Sequence[float]) -> str:
    """Format the rewards below an image, three digits each."""
    return " · ".join(f"{reward:.3g}".replace("-", "−") for reward in rewards)


def short(value: float | None) -> str:
    """Three digits of a number; a dash for None."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.0f}" if 100 <= abs(value) < 1e6 else f"{value:.3g}"


def wrap_caption(prompt: str) -> list[str]:
    """Wrap a prompt into at most two lines."""
    lines = textwrap.wrap(prompt, CAPTION_LETTERS)
    return lines if len(lines) <= 2 else [lines[0], lines[1][: CAPTION_LETTERS - 1] + "…"]


def evenly_spaced(count: int, most: int) -> list[int]:
    """At most `most` of the indices 0 … count − 1, evenly spaced, including the first and the last."""
    return sorted({int(place) for place in np.linspace(0, count - 1, min(count, max(most, 1))).round()})


# ---- Canvas: images and text at pixels ----

SIDE, GAP = 192, 14  # pixels: side of a cell (three times a 64-pixel image), space between cells
TOP = 46  # pixels of a title with a subtitle
CAPTION_HEIGHT, BELOW = 32, 20  # pixels: two lines of caption above an image, rewards below it
CAPTION_LETTERS = 30
MIN_WIDTH = 460


def open_image(path: Path) -> Image.Image:
    """Read a PNG of a run as RGB. Raises InputError for a damaged file."""
    try:
        with Image.open(path, formats=("PNG",)) as file:
            return file.convert("RGB")
    except DECODE_ERRORS as error:
        raise InputError(f"{path} is damaged ({error}); delete it and run the command again") from error


def thumbnail(image: Tensor) -> Image.Image:
    """Fit an image (3, H, W), or the middle frame of a video (F, 3, H, W), into a cell."""
    frame = image[len(image) // 2] if image.ndim == 4 else image
    pixels = (frame.float().nan_to_num().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return fit(Image.fromarray(pixels), SIDE)


def fit(picture: Image.Image, side: int) -> Image.Image:
    """Resize a picture so that its longer side is `side` pixels; small ones grow by a whole factor."""
    largest = max(picture.size)
    if (factor := side // largest) > 1:
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    width, height = (max(1, round(length * side / largest)) for length in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


class Canvas:
    """A figure whose text and images are placed in pixels from the top left corner."""

    def __init__(self, width: int, height: int, title: str, subtitle: str) -> None:
        self.width, self.height = max(width, MIN_WIDTH), height
        self.figure = Figure(figsize=(self.width / DPI, height / DPI), dpi=DPI, layout=None)
        self.text(title, GAP, 6, size=11, weight="bold")
        self.text(subtitle, GAP, 26, size=8)

    def text(self, text: str, left: float, top: float, **style: Any) -> None:
        """Write text; `style` as of `Figure.text`."""
        defaults: dict[str, Any] = {"va": "top", "color": INK, "linespacing": 1.1}
        self.figure.text(left / self.width, 1 - top / self.height, text, **(defaults | style))

    def caption(self, prompt: str, left: float, bottom: float) -> None:
        """Write a prompt above a cell, line by line: in a block, letters of one line would shift the others."""
        for number, line in enumerate(reversed(wrap_caption(prompt))):
            self.text(plain_text(line), left, bottom - 5 - 12 * number, size=7, va="baseline")

    def cell(
        self, picture: Image.Image, rewards: Sequence[float], left: int, top: int, height: int, side: int = SIDE
    ) -> list[int]:
        """Draw a picture pixel by pixel, centred in a cell of side × height, over its rewards; return its box.

        The box is (left, top, right, bottom) in pixels.
        """
        self.text(format_rewards(rewards), left + side / 2, top + height + 4, size=8, ha="center")
        left, top = left + (side - picture.width) // 2, top + (height - picture.height) // 2
        # matplotlib counts from the lower left corner.
        bottom = self.height - top - picture.height
        self.figure.figimage(np.asarray(picture), left, bottom, origin="upper", resize=False)
        corner = ((left - 1) / self.width, (bottom - 1) / self.height)
        size = ((picture.width + 2) / self.width, (picture.height + 2) / self.height)
        self.figure.add_artist(Rectangle(corner, *size, fill=False, lw=0.6, ec=FAINT))
        return [left, top, left + picture.width, top + picture.height]


# ---- Pages: a panel as SVG, with the variables of apps/demo/style.css as colours ----

CHART_SIZE = (3.75, 2.4)  # inches
PAGE_COLORS = {INK: "body-text-color", FAINT: "border-color-primary", "#ffffff": "background-fill-primary"}
PAGE_COLORS |= {color: f"steer-hue-{number + 1}" for number, color in enumerate(LINE_COLORS)}
SVG, LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"
_SVG_LOCK = Lock()  # matplotlib's rc_context is not thread-safe


def chart(panel: Panel) -> str:
    """Draw a panel as an HTML <figure>; "" without a finite point. The panel's title becomes the caption."""
    figure = Figure(figsize=CHART_SIZE, dpi=72)
    axes = figure.subplots()
    style_axes(axes)
    panel(axes)
    # Room for the legend below the axis; constrained layout would take as long as the drawing.
    rows = len(legend.get_texts()) if (legend := axes.get_legend()) else 0
    bottom = 0.2 + 0.09 * rows
    figure.subplots_adjust(0.16, bottom, 0.97, 0.96)
    if rows:
        below = (-0.02, -0.18 / (0.96 - bottom))
        axes.legend(loc="upper left", bbox_to_anchor=below, frameon=False, fontsize=10, labelcolor=INK, borderaxespad=0)
    if not any(_finite_points(line) for line in axes.lines):
        return ""
    title = axes.get_title(loc="left").replace(r"\$", "$")
    set_title(axes, "")
    return f'<figure class="steer-chart"><figcaption>{escape(title)}</figcaption>{as_svg(figure, title)}</figure>'


def as_svg(figure: Figure, title: str, role: str = "img") -> str:
    """Write a figure as <svg>: the ends of its lines as its description, the value of every marker as a tooltip."""
    lines = [line for axes in figure.axes for line in axes.lines if not str(line.get_label()).startswith("_")]
    for number, line in enumerate(lines):
        line.set_gid(f"line-{number}")
    file = BytesIO()
    with _SVG_LOCK, rc_context({"svg.fonttype": "none"}):
        figure.savefig(file, format="svg", transparent=True)
    root = ElementTree.fromstring(file.getvalue())
    del root[:2]  # metadata, and a style that would apply to the whole page
    for number, line in enumerate(lines):
        marks = root.iterfind(f".//{SVG}g[@id='line-{number}']//{SVG}use")
        for mark, (x, y) in zip(marks, _finite_points(line), strict=False):
            ElementTree.SubElement(mark, "title").text = f"{line.get_label()}, {short(x)}: {short(y)}"
    for element in root.iter():
        element.tag = element.tag.removeprefix(SVG)
        if (target := element.attrib.pop(LINK, None)) is not None:
            element.set("href", target)
        elif element.tag == "g":
            element.attrib.pop("id", None)  # ids repeat in every figure
    root.set("role", role)
    for tag, text in (("desc", ". ".join(filter(None, map(_describe_line, lines)))), ("title", title)):
        described = ElementTree.Element(tag)
        described.text = text
        root.insert(0, described)
    svg = ElementTree.tostring(root, encoding="unicode")
    for color, variable in PAGE_COLORS.items():
        svg = svg.replace(color, f"var(--{variable})")
    return svg


def _finite_points(line: Line2D) -> list[tuple[float, float]]:
    return [(x, y) for x, y in np.asarray(line.get_xydata(), dtype=float).tolist() if math.isfinite(x + y)]


def _describe_line(line: Line2D) -> str:
    points = _finite_points(line)
    ends = dict.fromkeys((points[0], points[-1])) if points else ()
    return f"{line.get_label()}: " + ", ".join(f"{short(y)} at {short(x)}" for x, y in ends) if ends else ""


def draw_series(
    axes: Axes,
    title: str,
    name: str,
    points: Sequence[tuple[float, ...]],
    x_range: tuple[float, float],
    bottom: float | None = None,
) -> None:
    """Draw points (x, y), or (x, y, low, high) with a band, by solver step; the vertical axis begins at `bottom`."""
    columns = np.array(points, dtype=float).reshape(len(points), -1).T
    if len(columns) == 4:
        draw_band(axes, columns[0], columns[2], columns[3], LINE_COLORS[0], "lowest to highest")
    axes.plot(columns[0], columns[1], color=LINE_COLORS[0], lw=2, marker="o", ms=4, label=name, clip_on=False)
    axes.set_ylim(bottom=bottom)
    axes.set_xlim(*(x_range if x_range[1] > x_range[0] else (None, None)))
    axes.ticklabel_format(axis="y", useOffset=False)
    set_title(axes, title)
    mark_integers(axes, "step")


# ---- Sampling: grid.png, ancestry.png, progress.png, progress.gif ----

MAX_ROWS, MAX_TREES, MAX_LINES = 24, 6, 6  # prompts in grid.png, in ancestry.png, and with a line each in progress.png
CELL = 144  # pixels
LINE = 13  # pixels of a line of a checklist
MET, MISSED = "#2a7f3f", "#b3382c"
BAND = (10, 90)  # percentiles over prompts


def draw_grid(report: Report, out: Path) -> Path:
    """Write grid.png: one row per prompt, from left to right the base images, best-of-N, and the steered images.

    If `steer sample --keep` chose steered images, only these are drawn.
    Below each image are its reward and, if it has a checklist, the requirements that it meets or misses.
    """
    entries = [_kept(entry) for entry in report["prompts"][:MAX_ROWS]]
    sides = [side for side in ("base", "best_of") if any(entry.get(side, {}).get("images") for entry in entries)]
    blocks = [[*(entry.get(side, {}) for side in sides), entry] for entry in entries]
    columns = [max(len(block[n].get("images", ())) for block in blocks) for n in range(len(sides) + 1)]
    lefts = [GAP + n * GAP + sum(columns[:n]) * (CELL + GAP) for n in range(len(columns) + 1)]
    pictures = [
        [[fit(open_image(out / name), CELL) for name in s.get("images", ())] for s in block] for block in blocks
    ]
    heights = [max(picture.height for side in row for picture in side) for row in pictures]
    lines = [max(len(one) for side in block for one in side.get("checklist", [{}])) for block in blocks]
    below = [BELOW + LINE * count for count in lines]
    subtitle = f"below each image: {report['settings']['reward']}"
    height = TOP + sum(heights) + sum(below) + (BELOW + GAP) * len(blocks)
    names = {"base": "base", "best_of": f"best of {report['settings'].get('best_of')}"}
    titles = [*(names[side] for side in sides), image_title(report)]
    canvas = Canvas(lefts[-1], height, "", plain_text(subtitle, 150))
    for left, title in zip(lefts, titles, strict=False):
        canvas.text(title, left, 6, size=11, weight="bold")
    top = TOP
    for row, block in enumerate(blocks):
        canvas.text(plain_text(entries[row]["prompt"]), GAP, top, size=9)
        for left, side, drawn in zip(lefts, block, pictures[row], strict=False):
            for column, picture in enumerate(drawn):
                place = left + column * (CELL + GAP), top + BELOW, heights[row]
                canvas.cell(picture, [side["rewards"][column]], *place, CELL)
                if "checklist" in side:
                    _draw_checklist(canvas, side["checklist"][column], place[0], top + 2 * BELOW + heights[row])
        top += heights[row] + BELOW + below[row] + GAP
    return save_figure(canvas.figure, out / "grid.png")


def _kept(entry: Report) -> Report:
    """Return an entry with the images that `steer sample --keep` chose, in the order of the choice."""
    if (ranks := entry.get("kept", {}).get("ranks")) is None:
        return entry
    names = [name for name in ("images", "rewards", "checklist") if name in entry]
    return {**entry} | {name: [entry[name][k] for k in ranks] for name in names}


def _draw_checklist(canvas: Canvas, checks: Mapping[str, bool], left: int, top: int) -> None:
    """Write the requirements of an image, one line each, ticked or crossed."""
    for number, (requirement, met) in enumerate(checks.items()):
        sign, color = ("✓", MET) if met else ("✗", MISSED)
        style: dict[str, Any] = {"size": 8, "va": "baseline"}
        bottom = top + (number + 0.8) * LINE
        canvas.text(sign, left + 2, bottom, color=color, weight="bold", **style)
        canvas.text(plain_text(requirement, 26), left + 16, bottom, color=INK if met else color, **style)


def image_title(report: Report) -> str:
    """Name the method and weights of the images beside the base images."""
    finetuned = report["settings"].get("lora") is not None
    if report["method"] == "base":
        return "finetuned" if finetuned else "base"
    order = "best and different" if any("kept" in entry for entry in report.get("prompts", ())) else "best first"
    return f"{'finetuned, ' if finetuned else ''}{report['method']}, {order}"


MAX_TEXT = 60  # characters of a text beside its particle


def draw_ancestry(report: Report, out: Path) -> Path:
    """Write ancestry.png: the particles of each prompt, from left to right through the evaluated steps.

    A dot is a particle, coloured by its reward; a line joins it to its children. Dark lines lead to a finished image,
    shown at the right with its reward.
    """
    entries = report["prompts"][:MAX_TREES]
    size = max(len(column) for entry in entries for column in _reward_columns(entry))
    figure = Figure(figsize=(9, (0.62 * size + 0.95) * len(entries)), dpi=DPI, layout="constrained")
    for axes, entry in zip(np.atleast_1d(figure.subplots(len(entries), 1)), entries, strict=True):
        _draw_tree(axes, entry, out)
    return save_figure(figure, out / "ancestry.png")


def _reward_columns(entry: Report) -> list[list[float]]:
    """Rewards by slot at each evaluated step, and of the finished images."""
    slots = _finished_slots(entry)
    return [*entry["step_rewards"], [entry["rewards"][slots.index(slot)] for slot in range(len(slots))]]


def _finished_slots(entry: Report) -> list[int]:
    """Slots of the finished images, best first, from 0 without gaps: a run such as drafts keeps only some."""
    return [sorted(entry["order"]).index(slot) for slot in entry["order"]]


def _draw_tree(axes: Axes, entry: Report, out: Path) -> None:
    columns = _reward_columns(entry)
    size, last = max(map(len, columns)), len(columns) - 1
    _draw_ancestry_lines(axes, entry["ancestors"], len(columns[-1]))
    style: dict[str, Any] = {"cmap": COLORMAP, "vmin": min(map(min, columns)), "vmax": max(map(max, columns))}
    style |= {"s": 46, "zorder": 2, "edgecolors": INK, "linewidths": 0.6}
    for column, rewards in enumerate(columns):
        axes.scatter([column] * len(rewards), range(len(rewards)), c=rewards, **style)
        for slot, reward in enumerate(rewards if column < last else ()):
            _annotate(axes, f"{reward:.2g}", (column, slot), (0, 7), size=6.5, ha="center")
    for rank, slot in enumerate(_finished_slots(entry)):
        weight = "bold" if rank == 0 else "normal"
        if "texts" in entry:
            text = f"{entry['rewards'][rank]:.3g}  {plain_text(entry['texts'][rank])[:MAX_TEXT]}"
            _annotate(axes, text, (last, slot), (8, 0), size=8, va="center", weight=weight)
            continue
        picture = OffsetImage(np.asarray(open_image(out / entry["images"][rank]).resize((64, 64))), zoom=0.42)
        axes.add_artist(AnnotationBbox(picture, (last, slot), (26, 0), boxcoords="offset points", frameon=False))
        _annotate(axes, f"{entry['rewards'][rank]:.3g}", (last, slot), (46, 0), size=8, va="center", weight=weight)
    steps = [f"step {step}\nESS {ess:.1f}" for step, ess in zip(entry["steps"], entry["ess"], strict=True)]
    set_title(axes, plain_text(entry["prompt"]))
    axes.set_xticks(range(last + 1), [*steps, "end"], size=8)
    axes.set_yticks([])
    axes.set_xlim(-0.25, last + (last + 2.0 if "texts" in entry else 0.75))
    axes.set_ylim(size - 0.4, -0.7)
    axes.spines[:].set_visible(False)


def _draw_ancestry_lines(axes: Axes, ancestors: list[list[int]], size: int) -> None:
    """Draw lines from parents to children, last step first: ancestors of a finished image are dark."""
    alive = set(range(size))
    for column in range(len(ancestors) - 1, -1, -1):
        for slot, parent in enumerate(ancestors[column]):
            color, width = (INK, 1.6) if slot in alive else (FAINT, 1.0)
            axes.plot([column, column + 1], [parent, slot], color=color, lw=width, zorder=1)
        alive = {ancestors[column][slot] for slot in alive}


def _annotate(axes: Axes, text: str, place: tuple[int, int], offset: tuple[int, int], **style: Any) -> None:
    axes.annotate(text, place, offset, textcoords="offset points", color=INK, **style)


def draw_progress(report: Report, out: Path) -> Path:
    """Write progress.png: the reward and ‖ε‖/√D by iteration, thin lines for seeds, bold for the best.

    With more than MAX_LINES prompts, means over prompts with a band of 10 to 90 %.
    """
    entries = report["prompts"]
    figure = Figure(figsize=(10, 4.1 + 0.18 * min(len(entries), MAX_LINES)), dpi=DPI, layout="constrained")
    reward, norm = figure.subplots(1, 2)
    (_draw_prompt_lines if len(entries) <= MAX_LINES else _draw_prompt_means)(reward, norm, entries)
    norm.axhline(1, color=INK, lw=0.8, ls=":", zorder=0)
    for axes in (reward, norm):
        style_axes(axes)
        mark_integers(axes, "iteration (0: initial noise)")
    set_title(reward, f"reward {plain_text(report['settings']['reward'], 55)}")
    set_title(norm, "norm of the noise, ‖ε‖/√D (dotted: random noise)")
    handles, labels = reward.get_legend_handles_labels()
    if len(handles) > 1:
        figure.legend(handles, labels, loc="outside lower left", frameon=False, fontsize=8, labelcolor=INK)
    figure.suptitle(_progress_title(report), size=9, x=0.01, ha="left", color=INK)
    return save_figure(figure, out / "progress.png")


def _progress_title(report: Report) -> str:
    entries, seeds = report["prompts"], report["settings"]["particles"]
    prompts = f"“{plain_text(entries[0]['prompt'])}”" if len(entries) == 1 else f"{len(entries)} prompts"
    each = f"{seeds} {'seed' if seeds == 1 else 'seeds'}{' each' * (len(entries) > 1)}"
    return f"{report['method']}, {prompts}, {each}\nbold: the best; thin: all seeds"


def _draw_prompt_lines(reward: Axes, norm: Axes, entries: Sequence[Report]) -> None:
    """Draw each prompt in its own colour."""
    for number, entry in enumerate(entries):
        color = colormaps[COLORMAP](0.85 * number / (len(entries) - 1) if len(entries) > 1 else 0.25)
        trace, first = entry["trace"], entry["order"][0]
        norms = np.array(trace["norms"])
        _draw_lines(reward, np.array(trace["rewards"]), color, bold=False)
        _draw_lines(norm, norms, color, bold=False)
        _draw_lines(reward, np.max(trace["best"], axis=1), color, bold=True, label=plain_text(entry["prompt"]))
        _draw_lines(norm, norms[:, first], color, bold=True)


def _draw_prompt_means(reward: Axes, norm: Axes, entries: Sequence[Report]) -> None:
    """Draw means over prompts. The last values of a run that stopped early are repeated."""
    longest = max(len(entry["trace"]["best"]) for entry in entries)

    def series(name: str, entry: Report) -> Numbers:
        values = np.array(entry["trace"][name])
        return np.pad(values, ((0, longest - len(values)), (0, 0)), mode="edge")

    color = colormaps[COLORMAP](0.25)
    best = np.array([series("best", entry).max(1) for entry in entries])
    norms = np.array([series("norms", entry)[:, entry["order"][0]] for entry in entries])
    seeds = np.mean([series("rewards", entry).mean(1) for entry in entries], axis=0)
    for axes, values in ((reward, best), (norm, norms)):
        low, high = np.percentile(values, BAND, axis=0)
        draw_band(axes, range(longest), low, high, color, f"{BAND[1] - BAND[0]} % of the prompts")
        _draw_lines(axes, values.mean(0), color, bold=True, label="mean over prompts")
    _draw_lines(reward, seeds, color, bold=False, label="mean over prompts and seeds")


def draw_band(axes: Axes, x: Sequence[float] | Numbers, low: Numbers, high: Numbers, color: Any, label: str) -> None:
    """Shade between two curves."""
    axes.fill_between(x, low, high, color=color, alpha=0.18, lw=0, label=label)


def _draw_lines(axes: Axes, values: Numbers, color: Any, *, bold: bool, label: str | None = None) -> None:
    """Draw a line of (iterations,), or one per column of (iterations, seeds); a dot for a single iteration."""
    style: dict[str, Any] = {"lw": 2.2, "zorder": 3} if bold else {"lw": 0.9, "alpha": 0.6}
    marker = "o" if len(values) == 1 else None
    axes.plot(range(len(values)), values, color=color, marker=marker, label=label, **style)


MAX_FRAME, MIN_FRAME = 512, 256  # pixels of a side: larger frames are reduced, smaller ones enlarged for their caption
FRAME_CAPTION = 26  # pixels
FRAME_SECONDS, LAST_FRAME_SECONDS = 0.12, 2.0


class Frames:
    """A folder with one PNG per iteration, the images of all slots side by side, for an animation of the best slot.

    The best slot is only known at the end. Files use no memory and survive an interruption.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def keep(self, iteration: Iteration) -> None:
        """Save the images of an iteration, atomically."""
        assert iteration.images is not None, "observers are given the images"
        pixels = iteration.images if iteration.images.dim() == 4 else iteration.images[:, 0]  # first frame of a video
        images: Sequence[Image.Image] = as_type(pixels.detach().float().cpu().clamp(0, 1), "pil")
        for image in images:
            image.thumbnail((MAX_FRAME, MAX_FRAME))
        width, height = images[0].size
        row = Image.new("RGB", (width * len(images), height))
        for slot, image in enumerate(images):
            row.paste(image, (width * slot, 0))
        with atomic_write(self._path(iteration.number)) as new:
            row.save(new, format="PNG")

    def write(self, entry: Report, best: Image.Image, path: Path) -> None:
        """Write the animation of the best slot as GIF; its last frame is the finished image."""
        slot, size, series = entry["order"][0], len(entry["order"]), entry["trace"]["rewards"]
        frames = [
            add_caption(self._image(number, slot, size), f"iteration {number}", rewards[slot])
            for number, rewards in enumerate(series)
            if self._path(number).exists()
        ]
        last = best.convert("RGB")
        last.thumbnail((MAX_FRAME, MAX_FRAME))
        times = [round(1000 * FRAME_SECONDS)] * len(frames) + [round(1000 * LAST_FRAME_SECONDS)]
        frames.append(add_caption(last, "best", entry["rewards"][0]))
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=times, loop=0)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.png"

    def _image(self, number: int, slot: int, size: int) -> Image.Image:
        with Image.open(self._path(number)) as row:
            width = row.width // size
            return row.crop((width * slot, 0, width * (slot + 1), row.height)).convert("RGB")


def add_caption(image: Image.Image, text: str, reward: float) -> Image.Image:
    """Add a line below an image: text on the left, the reward on the right."""
    factor = max(1, -(-MIN_FRAME // image.width))
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    frame = Image.new("RGB", (image.width, image.height + FRAME_CAPTION), "white")
    frame.paste(image)
    draw, font = ImageDraw.Draw(frame), ImageFont.load_default(size=14)
    middle = image.height + FRAME_CAPTION / 2
    draw.text((8, middle), text, INK, font, anchor="lm")
    draw.text((image.width - 8, middle), f"{reward:.3f}", INK, font, anchor="rm")
    return frame
