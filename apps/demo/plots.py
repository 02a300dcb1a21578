"""Charts, tables, galleries and the ancestry of particles as HTML and SVG.

In the ancestry columns are evaluated steps, rows are slots, and lines lead to descendants; every dot lists its whole
lineage in `data-path`, which run_view.js highlights.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby, pairwise

from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.ticker import MaxNLocator

from steer.apps.demo.steering import Frame
from steer.apps.plots import COLORMAP

WIDTH, HEIGHT = 270.0, 170.0
LEFT, RIGHT, TOP, BOTTOM = 40.0, 10.0, 8.0, 36.0  # around the axes, for their labels
NUM_HUES = 4  # in style.css: further lines use them again, dashed
MAX_MARKERS = 24  # points of a line that are marked
UNKNOWN = "–"


@dataclass(frozen=True)
class Series:
    """A named line through points (x, y), and a band of (x, low, high) around it. What is not finite leaves a gap."""

    name: str
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True)
class Axis:
    """Maps low..high to the pixels start..end, and marks some values in between."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        """The pixel of a value: the middle, where the axis has no length."""
        if self.high <= self.low:
            return (self.start + self.end) / 2
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def label(self, tick: float) -> str:
        """Format a tick with as few digits as distinguish it from the next."""
        size = max(map(abs, self.ticks))
        apart = min((b - a for a, b in pairwise(self.ticks)), default=size) or 1.0
        digits = math.floor(math.log10(max(size, apart))) - math.floor(math.log10(apart)) + 2
        return f"{tick:.{max(5, digits)}g}" if abs(tick) > apart / 100 else "0"


def line_chart(
    title: str,
    series: Sequence[Series],
    x_label: str,
    *,
    x_range: tuple[float, float] | None = None,
    y_from: float | None = None,
) -> str:
    """A <figure>: title, legend (where there is more than one line) and SVG.

    x_range  of the axis, where it is more than that of the points
    y_from   a value that the vertical axis reaches down to
    """
    tops = [(x, y) for one in series for x, y in one.points] + [
        (x, y) for one in series for x, *ys in one.band for y in ys
    ]
    finite_points = [place for place in tops if all(map(math.isfinite, place))]
    if not finite_points:
        return ""
    xs, ys = (
        [x for x, _ in finite_points] + [*(x_range or ())],
        [y for _, y in finite_points] + ([] if y_from is None else [y_from]),
    )
    across = axis(xs, LEFT, WIDTH - RIGHT, whole=all(float(x).is_integer() for x in xs))
    up = axis(ys, HEIGHT - BOTTOM, TOP, widened=True)
    description = "; ".join(filter(None, map(_describe_series, series)))
    lines = "".join(_line(one, number, across, up) for number, one in enumerate(series))
    return (
        f'<figure class="steer-chart"><figcaption>{escape(title)}</figcaption>{_legend(series)}'
        f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img"><title>{escape(title)}</title>'
        f"<desc>{escape(f'By {x_label}. {description}.')}</desc>{axes(across, up, x_label)}{lines}</svg></figure>"
    )


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A <table>: the first cell of each row is its name. Floats are shortened; None is a dash."""
    columns = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = ""
    for name, *cells in rows:
        body += (
            f'<tr><th scope="row">{_cell(name)}</th>' + "".join(f"<td>{_cell(cell)}</td>" for cell in cells) + "</tr>"
        )
    return (
        f'<div class="steer-scroll" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f'<table class="steer-table"><caption>{escape(caption)}</caption>'
        f"<thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def short(value: float | None) -> str:
    """Three digits of a number; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    return f"{value:.0f}" if 100 <= abs(value) < 1e6 else f"{value:.3g}"


def _cell(value: object) -> str:
    return escape(short(value) if isinstance(value, float) or value is None else str(value))


def axis(values: Sequence[float], start: float, end: float, whole: bool = False, widened: bool = False) -> Axis:
    """An axis over the values, in whole steps or not; widened, it ends in ticks."""
    low, high = min(values), max(values)
    if widened and high - low <= 1e-6 * abs(high):  # rounding errors of one value
        low, high = low - (abs(low) / 10 or 1.0), high + (abs(high) / 10 or 1.0)
    locator = MaxNLocator(5 if whole else 4, integer=whole, steps=[1, 2, 2.5, 5, 10])
    ticks = [float(tick) for tick in locator.tick_values(low, high)] if high > low else [low]
    if widened:
        low, high = min(low, ticks[0]), max(high, ticks[-1])
    return Axis(low, high, start, end, tuple(tick for tick in ticks if low <= tick <= high) or (low,))


def axes(across: Axis, up: Axis, x_label: str, y_label: str = "") -> str:
    """Grid lines with their values, and the names of the axes."""
    markup, left, right, floor, top = "", across.start, across.end, up.start, up.end
    for tick in up.ticks:
        y = up.at(tick)
        markup += f'<path class="steer-grid" d="M{left:g} {y:.1f}H{right:g}"/>'
        markup += f'<text x="{left - 6:g}" y="{y + 3.5:.1f}" text-anchor="end">{up.label(tick)}</text>'
    kind, line = ("grid", f"{top:g}V{floor:g}") if y_label else ("tick", f"{floor:g}v4")
    for tick in across.ticks:
        x = across.at(tick)
        markup += f'<path class="steer-{kind}" d="M{x:.1f} {line}"/>'
        markup += f'<text x="{x:.1f}" y="{floor + 16:g}" text-anchor="middle">{across.label(tick)}</text>'
    middle = (top + floor) / 2
    turned = f'<text transform="translate(14 {middle:g}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    name = f'<text x="{(left + right) / 2:g}" y="{floor + BOTTOM - 4:g}" text-anchor="middle">{escape(x_label)}</text>'
    return markup + name + (turned if y_label else "")


def gallery(title: str, frames: Sequence[tuple[str, str, str]], note: str) -> str:
    """A scrubber and frames of images, of which it shows one; run_view.js moves it.

    frames  label, classes and HTML of each
    note    escaped, below the images
    """
    last = len(frames) - 1
    moves = {-1: ("Earlier", "‹", "false" if last else "true"), 1: ("Later", "›", "true")}
    earlier, later = (
        f'<button type="button" data-move="{step}" aria-label="{name}" aria-disabled="{off}">{sign}</button>'
        for step, (name, sign, off) in moves.items()
    )
    hidden = ['hidden=""'] * last + [""]
    shown = "".join(
        f'<div class="steer-frame {classes}" data-label="{label}" {off}>{cells}</div>'
        for (label, classes, cells), off in zip(frames, hidden, strict=True)
    )
    label = frames[-1][0]
    return (
        f'<div class="steer-gallery"><h3>{title}</h3><div class="steer-scrub" role="group" aria-label="Which images">'
        f'{earlier}<input type="range" class="steer-scrubber" min="0" max="{last}" step="1" value="{last}"'
        f' aria-label="Which images" aria-valuetext="{label}"/>{later}'
        f'<span class="steer-reading" role="status">{label}</span></div><div class="steer-frames">{shown}</div>'
        f'<p class="steer-note">{note}</p></div>'
    )


def _line(one: Series, number: int, across: Axis, up: Axis) -> str:
    """A series: its band, its line, and a mark at every point where they are few, at single ones anyway."""
    markup, runs = "", list(_runs(one.points))
    for run in _runs(one.band):
        edge = [(x, high) for x, _, high in run] + [(x, low) for x, low, _ in reversed(run)]
        markup += f'<path class="steer-band" d="{_path(edge, across, up)}Z"/>'
    for run in runs:
        if len(run) > 1:
            markup += f'<path class="steer-curve" fill="none" d="{_path(run, across, up)}"/>'
    for run in runs:
        if len(run) == 1 or sum(map(len, runs)) <= MAX_MARKERS:
            for x, y in run:
                description = escape(f"{one.name}, {short(x)}: {short(y)}")
                markup += (
                    f'<circle cx="{across.at(x):.1f}" cy="{up.at(y):.1f}" r="3"><title>{description}</title></circle>'
                )
    return f'<g class="{_hue(number)}">{markup}</g>'


def _runs(points: Sequence[tuple[float, ...]]) -> Iterator[list[tuple[float, ...]]]:
    """The points without those that are not finite, in pieces."""
    for whole, run in groupby(points, lambda point: all(map(math.isfinite, point))):
        if whole:
            yield list(run)


def _path(points: Sequence[tuple[float, ...]], across: Axis, up: Axis) -> str:
    return "M" + "L".join(f"{across.at(x):.1f} {up.at(y):.1f}" for x, y in points)


def _hue(number: int) -> str:
    return f"steer-hue-{number % NUM_HUES + 1}" + (" steer-dashed" if number >= NUM_HUES else "")


def _legend(series: Sequence[Series]) -> str:
    if len(series) < 2:
        return ""
    key = '<svg viewBox="0 0 22 8" aria-hidden="true"><path class="steer-curve" d="M1 4H21"/></svg>'
    entries = "".join(
        f'<li class="{_hue(n)}">{key}<span>{escape(one.name)}</span></li>' for n, one in enumerate(series)
    )
    return f'<ul class="steer-legend">{entries}</ul>'


def _describe_series(one: Series) -> str:
    """A line in words."""
    points = [(x, y) for x, y in one.points if math.isfinite(y)]
    if not points:
        return ""
    (first, start), (last, end) = points[0], points[-1]
    return f"{one.name}: {short(start)} at {short(first)}" + (
        f", {short(end)} at {short(last)}" if len(points) > 1 else ""
    )


VIRIDIS = colormaps[COLORMAP]
MAX_LABELLED_PARTICLES = 8  # particles up to which every dot has its reward
TREE_LEFT, TREE_RIGHT, TREE_TOP = 44, 96, 52  # around the dots, for names and finished images
WIDE, NARROWEST, WIDEST = 420, 58, 105  # of all columns together, of one column
ICON = 28  # of a finished image
SHADES = 12  # of the legend
HELP = (
    "Each dot is a particle; lines lead to its descendants, thick ones to {end}. "
    "Choose a dot to highlight its ancestors and descendants."
)

Key = tuple[int, int]  # column and slot
Lineages = dict[Key, list[Key]]


@dataclass(frozen=True)
class Column:
    """The particles of an evaluated step, or the finished images, by slot."""

    frame: Frame
    ended: bool = False

    @property
    def name(self) -> str:
        """Its short name."""
        return "finished" if self.ended else f"step {self.frame.step}"

    @property
    def known(self) -> list[float]:
        """The rewards that are numbers."""
        return [reward for reward in self.frame.rewards if math.isfinite(reward)]

    def description(self, slot: int) -> str:
        """A particle in words."""
        reward = self.frame.rewards[slot]
        place = self.name if self.ended else f"at {self.name}"
        return f"particle {slot + 1} {place}, reward {short(reward) if math.isfinite(reward) else 'unknown'}"


@dataclass(frozen=True)
class Shade:
    """Colours for rewards from low to high."""

    low: float
    high: float

    def of(self, reward: float) -> str:
        """A colour as #rrggbb; none for what is no number."""
        if not math.isfinite(reward):
            return "none"
        span = self.high - self.low
        return to_hex(VIRIDIS((reward - self.low) / span if span > 0 else 0.5))


def ancestor_paths(parents: Sequence[Sequence[int]], size: int) -> Lineages:
    """Trace each particle (column, slot) back to the first column.

    parents  parents[c][slot] is the parent in column c of a slot in column c + 1
    """
    paths = {(0, slot): [(0, slot)] for slot in range(size)}
    for column, row in enumerate(parents):
        paths |= {(column + 1, slot): [*paths[column, parent], (column + 1, slot)] for slot, parent in enumerate(row)}
    return paths


def full_lineages(paths: Lineages) -> Lineages:
    """The ancestors and descendants of each particle, from the paths of all."""
    result = {key: list(way) for key, way in paths.items()}
    for key, way in paths.items():
        for older in way[:-1]:
            result[older].append(key)
    return result


def ancestry(columns: Sequence[Column], paths: Lineages, icons: Sequence[str]) -> str:
    """The tree with its heading, and a legend of the colours.

    paths   from `ancestor_paths`
    icons  data: URIs of the last column's images by slot; none during the run
    """
    last, size = len(columns) - 1, len(columns[0].frame.rewards)
    pitch, row = max(NARROWEST, min(WIDEST, WIDE // max(last, 1))), 38 if size <= MAX_LABELLED_PARTICLES else 28
    spots = {(column, slot): (TREE_LEFT + column * pitch, TREE_TOP + slot * row) for column, slot in paths}
    known = [reward for column in columns for reward in column.known]
    shade = Shade(min(known, default=0.0), max(known, default=0.0))
    dots, wholes = "", full_lineages(paths)
    for key, (x, y) in spots.items():
        dots += _dot(columns[key[0]], key, wholes[key], shade, f"translate({x} {y})")
    width, height = TREE_LEFT + last * pitch + TREE_RIGHT, TREE_TOP + (size - 1) * row + 20
    end = "a finished image" if columns[-1].ended else "the latest step"
    return (
        f'<div class="steer-ancestry"><h3>Ancestry</h3><p class="steer-note">{HELP.format(end=end)}</p>'
        f'<div class="steer-scroll"><svg class="steer-tree" width="{width}" height="{height}"'
        f' viewBox="0 0 {width} {height}" role="group" aria-label="Ancestry of the particles">'
        f'<g aria-hidden="true">{_names(columns, spots)}</g><g aria-hidden="true">{_links(spots, paths, last)}</g>'
        f'<g>{dots}</g><g aria-hidden="true">{_ends(columns[-1], spots, last, icons)}</g></svg></div>'
        f"{_tree_legend(shade) if known else ''}</div>"
    )


def _links(spots: dict[Key, Key], paths: Lineages, last: int) -> str:
    """A line to every particle from the one before; those that lead to the last column are alive, and on top."""
    alive = {key for end, way in paths.items() if end[0] == last for key in way}
    markup = {True: "", False: ""}
    for key, way in paths.items():
        if len(way) > 1:
            (x, y), (to_x, to_y), lives = spots[way[-2]], spots[key], key in alive
            middle = (x + to_x) / 2
            markup[lives] += (
                f'<path class="steer-link{" steer-alive" if lives else ""}" data-key="{_name(key)}" fill="none"'
                f' d="M{x} {y}C{middle:g} {y} {middle:g} {to_y} {to_x} {to_y}"/>'
            )
    return markup[False] + markup[True]


def _dot(column: Column, key: Key, lineage: list[Key], shade: Shade, place: str) -> str:
    reward, description = column.frame.rewards[key[1]], column.description(key[1])
    value = f'<text y="-11" text-anchor="middle">{short(reward)}</text>' if _valued(column) else ""
    return (
        f'<g class="steer-dot" role="button" tabindex="0" aria-pressed="false" aria-label="{description}"'
        f' transform="{place}"'
        f' data-key="{_name(key)}" data-path="{" ".join(map(_name, lineage))}"><title>{description}</title>'
        f'<circle class="steer-hit" r="13"/><circle class="steer-mark" r="6" fill="{shade.of(reward)}"/>{value}</g>'
    )


def _valued(column: Column) -> bool:
    return not column.ended and len(column.frame.rewards) <= MAX_LABELLED_PARTICLES


def _names(columns: Sequence[Column], spots: dict[Key, Key]) -> str:
    """Above each column its step, with the ESS where it is known; left of each row its slot."""
    markup = ""
    for place, column in enumerate(columns):
        x, _ = spots[place, 0]
        markup += f'<text class="steer-name" x="{x}" y="12" text-anchor="middle">{column.name}</text>'
        if column.frame.ess is not None:
            markup += f'<text x="{x}" y="25" text-anchor="middle">ESS {short(column.frame.ess)}</text>'
    for (place, slot), (_, y) in spots.items():
        if place == 0:
            markup += f'<text class="steer-name" x="14" y="{y + 4}" text-anchor="middle">{slot + 1}</text>'
    return markup


def _ends(column: Column, spots: dict[Key, Key], last: int, icons: Sequence[str]) -> str:
    """Right of the finished dots what they are."""
    markup = ""
    for slot, icon in enumerate(icons):
        x, y = spots[last, slot]
        markup += f'<image href="{icon}" x="{x + 12}" y="{y - ICON // 2 + 1}" width="{ICON - 2}" height="{ICON - 2}"/>'
        markup += f'<text class="steer-name" x="{x + 42}" y="{y + 4}">{short(column.frame.rewards[slot])}</text>'
    return markup


def _tree_legend(shade: Shade) -> str:
    steps = (shade.low + (shade.high - shade.low) * step / (SHADES - 1) for step in range(SHADES))
    bars = "".join(f'<rect x="{8 * n}" width="8.5" height="10" fill="{shade.of(r)}"/>' for n, r in enumerate(steps))
    bar = f'<svg width="{8 * SHADES}" height="10" viewBox="0 0 {8 * SHADES} 10" aria-hidden="true">{bars}</svg>'
    return f'<p class="steer-note steer-shades">reward {short(shade.low)} {bar} {short(shade.high)}</p>'


def _name(key: Key) -> str:
    return f"{key[0]}-{key[1]}"
