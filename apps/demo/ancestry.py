"""The ancestry of a run's particles as SVG: columns are readings, rows are slots, lines lead to where particles go on.

Every dot names its whole lineage in `data-path`, so that run_view.js has only to light it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib import colormaps
from matplotlib.colors import to_hex

from steer.apps.demo.charts import short
from steer.apps.demo.steering import Frame
from steer.apps.pictures import SHADE

VIRIDIS = colormaps[SHADE]
MOST_VALUES = 8  # particles of a tree that says the reward at every dot
LEFT, RIGHT, TOP = 44, 96, 52  # around the dots, for names and finished images
WIDE, NARROWEST, WIDEST = 420, 58, 105  # of all columns together, of one
ICON = 28  # of a finished image
SHADES = 12  # of the legend
HELP = (
    "Each dot is a particle; lines lead to where it goes on, thick ones to {end}. "
    "Choose a dot to light where it came from and what came of it."
)

Key = tuple[int, int]  # column and slot
Lineages = dict[Key, list[Key]]


@dataclass(frozen=True)
class Column:
    """A reading, or the finished images as if they were one, by slot."""

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

    def told(self, slot: int) -> str:
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


def ways_back(parents: Sequence[Sequence[int]], size: int) -> Lineages:
    """Of each particle (column, slot) the way to it from the first column.

    parents  parents[c] of each slot in column c + 1: the slot in column c that it goes on from
    """
    ways = {(0, slot): [(0, slot)] for slot in range(size)}
    for column, row in enumerate(parents):
        ways |= {(column + 1, slot): [*ways[column, parent], (column + 1, slot)] for slot, parent in enumerate(row)}
    return ways


def lineages(ways: Lineages) -> Lineages:
    """Of each particle the way to it, and all that came of it, from the ways of all."""
    found = {key: list(way) for key, way in ways.items()}
    for key, way in ways.items():
        for older in way[:-1]:
            found[older].append(key)
    return found


def ancestry(columns: Sequence[Column], ways: Lineages, icons: Sequence[str]) -> str:
    """The tree with its heading, and a legend of the colours.

    ways   from `ways_back`
    icons  data: URIs of the last column's images by slot; none while the run goes on
    """
    last, size = len(columns) - 1, len(columns[0].frame.rewards)
    pitch, row = max(NARROWEST, min(WIDEST, WIDE // max(last, 1))), 38 if size <= MOST_VALUES else 28
    spots = {(column, slot): (LEFT + column * pitch, TOP + slot * row) for column, slot in ways}
    known = [reward for column in columns for reward in column.known]
    shade = Shade(min(known, default=0.0), max(known, default=0.0))
    dots, wholes = "", lineages(ways)
    for key, (x, y) in spots.items():
        dots += _dot(columns[key[0]], key, wholes[key], shade, f"translate({x} {y})")
    width, height = LEFT + last * pitch + RIGHT, TOP + (size - 1) * row + 20
    end = "a finished image" if columns[-1].ended else "the newest reading"
    return (
        f'<div class="steer-ancestry"><h3>Ancestry</h3><p class="steer-note">{HELP.format(end=end)}</p>'
        f'<div class="steer-scroll"><svg class="steer-tree" width="{width}" height="{height}"'
        f' viewBox="0 0 {width} {height}" role="group" aria-label="Ancestry of the particles">'
        f'<g aria-hidden="true">{_names(columns, spots)}</g><g aria-hidden="true">{_links(spots, ways, last)}</g>'
        f'<g>{dots}</g><g aria-hidden="true">{_ends(columns[-1], spots, last, icons)}</g></svg></div>'
        f"{_legend(shade) if known else ''}</div>"
    )


def _links(spots: dict[Key, Key], ways: Lineages, last: int) -> str:
    """A line to every particle from the one before; those that lead to the last column are alive, and on top."""
    alive = {key for end, way in ways.items() if end[0] == last for key in way}
    drawn = {True: "", False: ""}
    for key, way in ways.items():
        if len(way) > 1:
            (x, y), (to_x, to_y), lives = spots[way[-2]], spots[key], key in alive
            middle = (x + to_x) / 2
            drawn[lives] += (
                f'<path class="steer-link{" steer-alive" if lives else ""}" data-key="{_name(key)}" fill="none"'
                f' d="M{x} {y}C{middle:g} {y} {middle:g} {to_y} {to_x} {to_y}"/>'
            )
    return drawn[False] + drawn[True]


def _dot(column: Column, key: Key, lineage: list[Key], shade: Shade, place: str) -> str:
    reward, told = column.frame.rewards[key[1]], column.told(key[1])
    value = f'<text y="-11" text-anchor="middle">{short(reward)}</text>' if _valued(column) else ""
    return (
        f'<g class="steer-dot" role="button" tabindex="0" aria-pressed="false" aria-label="{told}" transform="{place}"'
        f' data-key="{_name(key)}" data-path="{" ".join(map(_name, lineage))}"><title>{told}</title>'
        f'<circle class="steer-hit" r="13"/><circle class="steer-mark" r="6" fill="{shade.of(reward)}"/>{value}</g>'
    )


def _valued(column: Column) -> bool:
    return not column.ended and len(column.frame.rewards) <= MOST_VALUES


def _names(columns: Sequence[Column], spots: dict[Key, Key]) -> str:
    """Above each column its step, with the ESS where it is known; left of each row its slot."""
    drawn = ""
    for place, column in enumerate(columns):
        x, _ = spots[place, 0]
        drawn += f'<text class="steer-name" x="{x}" y="12" text-anchor="middle">{column.name}</text>'
        if column.frame.ess is not None:
            drawn += f'<text x="{x}" y="25" text-anchor="middle">ESS {short(column.frame.ess)}</text>'
    for (place, slot), (_, y) in spots.items():
        if place == 0:
            drawn += f'<text class="steer-name" x="14" y="{y + 4}" text-anchor="middle">{slot + 1}</text>'
    return drawn


def _ends(column: Column, spots: dict[Key, Key], last: int, icons: Sequence[str]) -> str:
    """Right of the finished dots what they are."""
    drawn = ""
    for slot, icon in enumerate(icons):
        x, y = spots[last, slot]
        drawn += f'<image href="{icon}" x="{x + 12}" y="{y - ICON // 2 + 1}" width="{ICON - 2}" height="{ICON - 2}"/>'
        drawn += f'<text class="steer-name" x="{x + 42}" y="{y + 4}">{short(column.frame.rewards[slot])}</text>'
    return drawn


def _legend(shade: Shade) -> str:
    steps = (shade.low + (shade.high - shade.low) * step / (SHADES - 1) for step in range(SHADES))
    bars = "".join(f'<rect x="{8 * n}" width="8.5" height="10" fill="{shade.of(r)}"/>' for n, r in enumerate(steps))
    bar = f'<svg width="{8 * SHADES}" height="10" viewBox="0 0 {8 * SHADES} 10" aria-hidden="true">{bars}</svg>'
    return f'<p class="steer-note steer-shades">reward {short(shade.low)} {bar} {short(shade.high)}</p>'


def _name(key: Key) -> str:
    return f"{key[0]}-{key[1]}"
