"""The view of a steered run: its images, the ancestry of its particles, its curves and its numbers as HTML.

In the ancestry, columns are evaluated steps, rows are slots, and lines lead to descendants; every dot lists its whole
lineage in `data-path`, which run_view.js highlights.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from matplotlib import colormaps
from matplotlib.colors import Normalize, to_hex
from PIL import Image

from steer.apps.demo.markup import folded, gallery, table
from steer.apps.demo.progress import Progress, Throttle
from steer.apps.demo.steering import Frame, Loading, PromptResult, Step
from steer.apps.demo.studio import Waiting, plural
from steer.apps.plots import COLORMAP, chart, draw_series, short

EMPTY_TEXT = "The particles appear here while they are being steered."
GRID_CLASSES = ((1, "steer-single"), (4, "steer-few"), (8, "steer-some"))  # largest number of images for each class
FINISHED = 256  # pixels of a finished image's longer side
REDRAW_INTERVAL = 0.15  # seconds between two status lines about single steps

Key = tuple[int, int]  # column and slot
Lineages = dict[Key, list[Key]]


@dataclass
class RunView:
    """The frames and the result of the current prompt, the results of all finished prompts, and the status line."""

    frames: tuple[Frame, ...] = ()
    made: PromptResult | None = None
    finished: tuple[PromptResult, ...] = ()
    line: str = "Starting …"
    progress: Progress = field(default_factory=Progress)
    _redraws: Throttle = field(default_factory=lambda: Throttle(REDRAW_INTERVAL), repr=False)

    def after(self, event: Any) -> bool:
        """Add an event; return whether the view changes."""
        match event:
            case Frame():
                self.frames = (*self.frames, event)
            case PromptResult():
                self.made, self.finished = event, (*self.finished, event)
            case Step() | Waiting() | Loading():
                self.line = str(event)
            case _:
                raise TypeError(f"no event of a run: {event!r}")
        if not isinstance(event, Step):
            return True
        self.progress.update(event.share)
        if event.step == 1 and event.phase != "beside":
            self.frames, self.made = (), None
        return self._redraws.due()

    @property
    def status(self) -> str:
        """Return the status line with the progress of the run."""
        return self.progress.status(self.line)

    def conclusion(self, stopped: bool) -> str:
        if stopped and not self.finished:
            return "Stopped. Nothing was finished."
        costs = [cost for one in self.finished for cost in (one.cost, one.base_cost) if cost is not None]
        seconds = sum(cost.seconds for cost in costs)
        about = plural(len(self.finished), "prompt")
        seed = f", seed {self.finished[0].settings.seed}" if self.finished else ""
        return f"{'Stopped' if stopped else 'Done'}: {about} in {seconds:.1f} s{seed}."


def run_view(frames: Sequence[Frame], made: PromptResult | None) -> str:
    """Return the HTML of a run so far; a hint before the first evaluated step.

    frames  the particles at the evaluated steps so far
    made    the result, once there is one
    """
    columns = [*frames]
    if made is not None:
        columns.append(_finished(made, frames[-1].total if frames else 0))
    if not columns:
        return f'<section class="steer-run"><p class="steer-empty">{EMPTY_TEXT}</p></section>'
    parents, size = [frame.ancestors for frame in frames if frame.ancestors], len(columns[0].rewards)
    related = size > 1 and bool(frames) and len(parents) == len(frames)
    paths = ancestor_paths(parents[: len(columns) - 1], size) if related else {}
    tree = ancestry(columns, paths) if related else ""
    curves = _curves(columns, paths) if frames else ""
    run = zlib.crc32(repr(columns[0].rewards).encode() + columns[0].images[0].tobytes())  # differs between runs
    components = _gallery(columns) + tree + curves + _table(columns, paths)
    if made is not None and not related:
        components = f'<details class="steer-folded"><summary>The steps of the run</summary>{components}</details>'
    return f'<section class="steer-run" data-run="{run:08x}">{components}</section>'


def _finished(made: PromptResult, total: int) -> Frame:
    """Return the finished images as a last frame, in their slots."""
    pictures, images = [made.images[made.order.index(slot)] for slot in sorted(made.order)], []
    for picture in pictures:
        with Image.open(picture.path) as file:
            image = file.convert("RGB")
        image.thumbnail((FINISHED, FINISHED))
        images.append(image)
    return Frame(total, total, tuple(images), tuple(picture.recipe.reward for picture in pictures), finished=True)


def _gallery(columns: Sequence[Frame]) -> str:
    """Return the particles at every evaluated step; one step is shown at a time."""
    size = len(columns[-1].images)
    note = "each image: the particle’s number and its reward, ★ the highest" if size > 1 else "the image: its reward"
    frames = []
    for number, column in enumerate(columns):
        label = column.name if column.finished else f"{column.name} of {column.total}"
        classes = next((name for most, name in GRID_CLASSES if len(column.images) <= most), "")
        frames.append((label, classes, "".join(_cell(column, number, slot) for slot in range(len(column.images)))))
    return gallery("Particles", frames, f"Below {note}.")


def _cell(column: Frame, number: int, slot: int) -> str:
    reward, several = column.rewards[slot], len(column.rewards) > 1
    best = several and reward == max(column.known, default=None)
    return (
        f'<figure class="steer-cell{" steer-best" if best else ""}" data-key="{number}-{slot}">'
        f'<img src="{column.sources[slot]}" alt="{column.describe(slot)}{", the highest" if best else ""}"/>'
        f"<figcaption><span>{slot + 1 if several else ''}</span> <b>{short(reward)}</b></figcaption></figure>"
    )


def _spread(column: Frame) -> tuple[float, float, float] | None:
    known = column.known
    return (sum(known) / len(known), min(known), max(known)) if known else None


def _num_living_ancestors(columns: Sequence[Frame], paths: Lineages) -> list[int]:
    """Return, for each column, the number of initial particles with a descendant."""
    return [len({way[0] for (column, _), way in paths.items() if column == place}) for place in range(len(columns))]


def _curves(columns: Sequence[Frame], paths: Lineages) -> str:
    """Return charts of rewards, ESS and surviving ancestors."""
    span, several = (1.0, float(columns[-1].total)), len(columns[0].rewards) > 1
    spreads = [(column.step, *spread[: 3 if several else 1]) for column in columns if (spread := _spread(column))]
    drawn: dict[tuple[str, str], Sequence[tuple[float, ...]]] = {
        ("Rewards: mean, lowest to highest" if several else "Reward", "mean"): spreads
    }
    if paths:
        alive = _num_living_ancestors(columns, paths)
        drawn["Effective sample size (ESS)", "ESS"] = [(one.step, one.ess) for one in columns if one.ess is not None]
        drawn["First particles with descendants", "living"] = [
            (column.step, number) for column, number in zip(columns, alive, strict=True)
        ]
    charts = ""
    for (title, name), points in drawn.items():
        if points:
            bottom = None if name == "mean" else 0.0
            charts += chart(partial(draw_series, title=title, name=name, points=points, x_range=span, bottom=bottom))
    note = f'<p class="steer-note">{CURVES_HELP}</p>' if paths else ""
    return (
        f'<div class="steer-curves"><h3>Curves</h3>{note}<div class="steer-charts">{charts}</div></div>'
        if charts
        else ""
    )


def _table(columns: Sequence[Frame], paths: Lineages) -> str:
    """Return the numbers of the ancestry and of the charts as a table."""
    head = ["step", "lowest reward", "mean", "highest"]
    head += ["ESS", "first particles alive", "ancestors of the next"] if paths else []
    living, rows = _num_living_ancestors(columns, paths), []
    for column, alive in zip(columns, living, strict=True):
        mean, low, high = _spread(column) or (None, None, None)
        row: list[object] = [column.name, low, mean, high]
        if paths:
            row += [column.ess, alive, ", ".join(str(slot + 1) for slot in column.ancestors or ()) or None]
        rows.append(row)
    return folded("As a table", table("Rewards and ancestors" if paths else "Rewards", head, rows))


MAX_LABELLED_PARTICLES = 8  # largest number of particles for which every dot shows its reward
LEFT, RIGHT, TOP = 44, 96, 52  # margins around the dots, for names and finished images
WIDE, NARROWEST, WIDEST = 420, 58, 105  # widths of all columns together, and of one column
ICON = 28  # side of a finished image
HELP = (
    "Each dot is a particle; lines lead to its descendants, thick ones to {end}. "
    "Choose a dot to highlight its ancestors and descendants."
)

CURVES_HELP = (
    "ESS: how many particles carry the weight, by which they are copied and dropped; near 1, a single one does. First "
    "particles with descendants: how many of those at the start the present ones come from."
)


def ancestor_paths(parents: Sequence[Sequence[int]], size: int) -> Lineages:
    """Trace each particle (column, slot) back to the first column.

    parents  parents[c][slot] is the parent in column c of a slot in column c + 1
    """
    paths = {(0, slot): [(0, slot)] for slot in range(size)}
    for column, row in enumerate(parents):
        paths |= {(column + 1, slot): [*paths[column, parent], (column + 1, slot)] for slot, parent in enumerate(row)}
    return paths


def full_lineages(paths: Lineages) -> Lineages:
    """Return the ancestors and descendants of each particle, from the paths of all particles."""
    result = {key: list(way) for key, way in paths.items()}
    for key, way in paths.items():
        for older in way[:-1]:
            result[older].append(key)
    return result


def ancestry(columns: Sequence[Frame], paths: Lineages) -> str:
    """Return the tree with its heading, and a legend of the colours.

    paths  from `ancestor_paths`
    """
    last, size = len(columns) - 1, len(columns[0].rewards)
    pitch, row = max(NARROWEST, min(WIDEST, WIDE // max(last, 1))), 38 if size <= MAX_LABELLED_PARTICLES else 28
    spots = {(column, slot): (LEFT + column * pitch, TOP + slot * row) for column, slot in paths}
    known = [reward for column in columns for reward in column.known] or [0.0]
    shade, wholes = Normalize(min(known), max(known)), full_lineages(paths)
    dots = "".join(_dot(columns[key[0]], key, wholes[key], shade, spot) for key, spot in spots.items())
    width, height = LEFT + last * pitch + RIGHT, TOP + (size - 1) * row + 20
    end = "a finished image" if columns[-1].finished else "the latest step"
    colors = ", ".join(map(to_hex, colormaps[COLORMAP]([0, 0.25, 0.5, 0.75, 1.0])))
    return (
        f'<div class="steer-ancestry"><h3>Ancestry</h3><p class="steer-note">{HELP.format(end=end)}</p>'
        f'<div class="steer-scroll"><svg class="steer-tree" width="{width}" height="{height}"'
        f' viewBox="0 0 {width} {height}" role="group" aria-label="Ancestry of the particles">'
        f'<g aria-hidden="true">{_names(columns, spots)}{_links(spots, paths, last)}</g><g>{dots}</g></svg></div>'
        f'<p class="steer-note steer-shades">reward {short(shade.vmin)} '
        f'<span style="background: linear-gradient(to right, {colors})"></span> {short(shade.vmax)}</p></div>'
    )


def _links(spots: dict[Key, Key], paths: Lineages, last: int) -> str:
    """Return a line from each parent to its child; lines that lead to the last column are alive, and on top."""
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


def _dot(column: Frame, key: Key, lineage: list[Key], shade: Normalize, spot: Key) -> str:
    """Return the dot of a particle, with its reward above it, or a finished image on its right."""
    reward, description = column.rewards[key[1]], column.describe(key[1])
    color = to_hex(colormaps[COLORMAP](shade(reward))) if reward in column.known else "none"
    beside = ""
    if column.finished:
        beside = f'<image href="{column.sources[key[1]]}" x="12" y="{1 - ICON // 2}" width="{ICON}" height="{ICON}"/>'
        beside += f'<text class="steer-name" x="44" y="4">{short(reward)}</text>'
    elif len(column.rewards) <= MAX_LABELLED_PARTICLES:
        beside = f'<text y="-11" text-anchor="middle">{short(reward)}</text>'
    return (
        f'<g class="steer-dot" role="button" tabindex="0" aria-pressed="false" aria-label="{description}"'
        f' transform="translate({spot[0]} {spot[1]})"'
        f' data-key="{_name(key)}" data-path="{" ".join(map(_name, lineage))}"><title>{description}</title>'
        f'<circle class="steer-hit" r="13"/><circle class="steer-mark" r="6" fill="{color}"/>{beside}</g>'
    )


def _names(columns: Sequence[Frame], spots: dict[Key, Key]) -> str:
    """Return the step above each column, with the ESS if it is known, and the slot left of each row."""
    markup = ""
    for (place, slot), (x, y) in spots.items():
        if slot == 0:
            column = columns[place]
            markup += f'<text class="steer-name" x="{x}" y="12" text-anchor="middle">{column.name}</text>'
            if column.ess is not None:
                markup += f'<text x="{x}" y="25" text-anchor="middle">ESS {short(column.ess)}</text>'
        if place == 0:
            markup += f'<text class="steer-name" x="14" y="{y + 4}" text-anchor="middle">{slot + 1}</text>'
    return markup


def _name(key: Key) -> str:
    return f"{key[0]}-{key[1]}"
