"""Line charts as SVG text in the page's own colours, and tables with the numbers behind them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby, pairwise

from matplotlib.ticker import MaxNLocator

WIDTH, HEIGHT = 270.0, 170.0
LEFT, RIGHT, TOP, BOTTOM = 40.0, 10.0, 8.0, 36.0  # around the axes, for their labels
HUES = 4  # of style.css: further lines take them again, dashed
MOST_DOTS = 24  # points of a line that are marked
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
        """Where a value lies: in the middle, where the axis has no length."""
        if self.high <= self.low:
            return (self.start + self.end) / 2
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def label(self, tick: float) -> str:
        """A tick in as few digits as tell it from the next."""
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
    seen = [place for place in tops if all(map(math.isfinite, place))]
    if not seen:
        return ""
    xs, ys = [x for x, _ in seen] + [*(x_range or ())], [y for _, y in seen] + ([] if y_from is None else [y_from])
    across = _axis(xs, LEFT, WIDTH - RIGHT, whole=all(float(x).is_integer() for x in xs))
    up = _axis(ys, HEIGHT - BOTTOM, TOP, widened=True)
    told = "; ".join(filter(None, map(_told, series)))
    lines = "".join(_line(one, number, across, up) for number, one in enumerate(series))
    return (
        f'<figure class="steer-chart"><figcaption>{escape(title)}</figcaption>{_legend(series)}'
        f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img"><title>{escape(title)}</title>'
        f"<desc>{escape(f'By {x_label}. {told}.')}</desc>{_axes(across, up, x_label)}{lines}</svg></figure>"
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


def _axis(values: Sequence[float], start: float, end: float, whole: bool = False, widened: bool = False) -> Axis:
    """An axis over the values, in whole steps or not; widened, it ends in ticks."""
    low, high = min(values), max(values)
    if widened and high - low <= 1e-6 * abs(high):  # rounding errors of what is one value
        low, high = low - (abs(low) / 10 or 1.0), high + (abs(high) / 10 or 1.0)
    locator = MaxNLocator(5 if whole else 4, integer=whole, steps=[1, 2, 2.5, 5, 10])
    ticks = [float(tick) for tick in locator.tick_values(low, high)] if high > low else [low]
    if widened:
        low, high = min(low, ticks[0]), max(high, ticks[-1])
    return Axis(low, high, start, end, tuple(tick for tick in ticks if low <= tick <= high) or (low,))


def _axes(across: Axis, up: Axis, x_label: str) -> str:
    """Grid lines with their values, and the name of the horizontal axis."""
    drawn = ""
    for tick in up.ticks:
        y = up.at(tick)
        drawn += f'<path class="steer-grid" d="M{LEFT:g} {y:.1f}H{WIDTH - RIGHT:g}"/>'
        drawn += f'<text x="{LEFT - 6:g}" y="{y + 3.5:.1f}" text-anchor="end">{up.label(tick)}</text>'
    floor = HEIGHT - BOTTOM
    for tick in across.ticks:
        x = across.at(tick)
        drawn += f'<path class="steer-tick" d="M{x:.1f} {floor:g}v4"/>'
        drawn += f'<text x="{x:.1f}" y="{floor + 16:g}" text-anchor="middle">{across.label(tick)}</text>'
    middle = (LEFT + WIDTH - RIGHT) / 2
    return drawn + f'<text x="{middle:g}" y="{HEIGHT - 4:g}" text-anchor="middle">{escape(x_label)}</text>'


def _line(one: Series, number: int, across: Axis, up: Axis) -> str:
    """A series: its band, its line, and a mark at every point where they are few, at single ones anyway."""
    drawn, runs = "", list(_runs(one.points))
    for run in _runs(one.band):
        edge = [(x, high) for x, _, high in run] + [(x, low) for x, low, _ in reversed(run)]
        drawn += f'<path class="steer-band" d="{_path(edge, across, up)}Z"/>'
    for run in runs:
        if len(run) > 1:
            drawn += f'<path class="steer-curve" fill="none" d="{_path(run, across, up)}"/>'
    for run in runs:
        if len(run) == 1 or sum(map(len, runs)) <= MOST_DOTS:
            for x, y in run:
                told = escape(f"{one.name}, {short(x)}: {short(y)}")
                drawn += f'<circle cx="{across.at(x):.1f}" cy="{up.at(y):.1f}" r="3"><title>{told}</title></circle>'
    return f'<g class="{_hue(number)}">{drawn}</g>'


def _runs(points: Sequence[tuple[float, ...]]) -> Iterator[list[tuple[float, ...]]]:
    """The points without those that are not finite, in pieces."""
    for whole, run in groupby(points, lambda point: all(map(math.isfinite, point))):
        if whole:
            yield list(run)


def _path(points: Sequence[tuple[float, ...]], across: Axis, up: Axis) -> str:
    return "M" + "L".join(f"{across.at(x):.1f} {up.at(y):.1f}" for x, y in points)


def _hue(number: int) -> str:
    return f"steer-hue-{number % HUES + 1}" + (" steer-dashed" if number >= HUES else "")


def _legend(series: Sequence[Series]) -> str:
    if len(series) < 2:
        return ""
    key = '<svg viewBox="0 0 22 8" aria-hidden="true"><path class="steer-curve" d="M1 4H21"/></svg>'
    entries = "".join(
        f'<li class="{_hue(n)}">{key}<span>{escape(one.name)}</span></li>' for n, one in enumerate(series)
    )
    return f'<ul class="steer-legend">{entries}</ul>'


def _told(one: Series) -> str:
    """A line in words."""
    points = [(x, y) for x, y in one.points if math.isfinite(y)]
    if not points:
        return ""
    (first, start), (last, end) = points[0], points[-1]
    return f"{one.name}: {short(start)} at {short(first)}" + (
        f", {short(end)} at {short(last)}" if len(points) > 1 else ""
    )
