"""The Steer tab's view of a run: the particles at each reading, their ancestry, curves, and all of it as a table.

All readings are in the HTML; run_view.js shows one of them, and lights the lineage of a chosen particle.
"""

import zlib
from collections.abc import Sequence

from PIL import Image

from steer.apps.demo.ancestry import Column, Lineages, ancestry, ways_back
from steer.apps.demo.charts import Series, line_chart, short, table
from steer.apps.demo.steering import Frame, Made, data_uri

NOTHING = "The particles appear here while they are being steered."
CROWDS = ((1, " steer-single"), (4, " steer-few"), (8, " steer-some"))  # up to so many images
FINISHED, SMALL = 256, 56  # pixels of a finished image's longer side, in the gallery and in the tree


def run_view(frames: Sequence[Frame], made: Made | None) -> str:
    """The HTML of a run as far as it is: an invitation, where nothing has been read yet.

    frames  the readings so far, each with as many particles
    made    what came out, once it has
    """
    columns = [Column(frame) for frame in frames]
    if made is not None:
        columns.append(Column(_finished(made, frames[-1].total if frames else 0), ended=True))
    if not columns:
        return f'<section class="steer-run"><p class="steer-empty">{NOTHING}</p></section>'
    parents, size = [frame.ancestors for frame in frames if frame.ancestors], len(columns[0].frame.rewards)
    related = size > 1 and bool(frames) and len(parents) == len(frames)
    ways = ways_back(parents[: len(columns) - 1], size) if related else {}
    tree = ancestry(columns, ways, _icons(columns[-1])) if related else ""
    curves = _curves(columns, ways) if frames else ""
    parts = _gallery(columns) + tree + curves + _table(columns, ways)
    return f'<section class="steer-run" data-run="{_mark(columns[0].frame)}">{parts}</section>'


def _finished(made: Made, total: int) -> Frame:
    """The finished images as a last reading: in the slots that they come from."""
    pictures = [made.images[made.order.index(slot)] for slot in sorted(made.order)]
    images = []
    for picture in pictures:
        with Image.open(picture.path) as image:
            images.append(_smaller(image, FINISHED))
    return Frame(total, total, tuple(images), tuple(picture.recipe.reward for picture in pictures))


def _smaller(image: Image.Image, size: int) -> Image.Image:
    copy = image.convert("RGB")
    copy.thumbnail((size, size))
    return copy


def _icons(column: Column) -> list[str]:
    return [data_uri(_smaller(image, SMALL)) for image in column.frame.images] if column.ended else []


def _mark(first: Frame) -> str:
    """Tells one run from another."""
    return f"{zlib.crc32(repr(first.rewards).encode() + first.images[0].tobytes()):08x}"


def _place(column: Column) -> str:
    return column.name if column.ended else f"{column.name} of {column.frame.total}"


def _gallery(columns: Sequence[Column]) -> str:
    """The scrubber, and below it the images of every position, of which one is shown."""
    several = len(columns[-1].frame.images) > 1
    note = "each image: the particle’s number and its reward, ★ the highest" if several else "the image: its reward"
    last, place, alone = len(columns) - 1, _place(columns[-1]), "false" if len(columns) > 1 else "true"
    frames = ""
    for number, column in enumerate(columns):
        cells = "".join(_cell(column, number, slot) for slot in range(len(column.frame.images)))
        hidden = "" if number == last else ' hidden=""'
        frames += f'<div class="steer-frame{_crowd(column)}" data-label="{_place(column)}"{hidden}>{cells}</div>'
    return (
        '<div class="steer-gallery"><h3>Particles</h3><div class="steer-scrub" role="group" aria-label="Which reading">'
        f'<button type="button" data-move="-1" aria-label="Earlier reading" aria-disabled="{alone}">‹</button>'
        f'<input type="range" class="steer-scrubber" min="0" max="{last}" step="1" value="{last}"'
        f' aria-label="Reading" aria-valuetext="{place}"/>'
        '<button type="button" data-move="1" aria-label="Later reading" aria-disabled="true">›</button>'
        f'<span class="steer-reading" role="status">{place}</span></div><div class="steer-frames">{frames}</div>'
        f'<p class="steer-note">Below {note}.</p></div>'
    )


def _crowd(column: Column) -> str:
    """Of how many images style.css makes a row of which size."""
    size = len(column.frame.images)
    return next((name for most, name in CROWDS if size <= most), "")


def _cell(column: Column, number: int, slot: int) -> str:
    reward, several = column.frame.rewards[slot], len(column.frame.rewards) > 1
    best = several and reward == max(column.known, default=None)
    return (
        f'<figure class="steer-cell{" steer-best" if best else ""}" data-key="{number}-{slot}">'
        f'<img src="{column.frame.sources[slot]}" alt="{column.told(slot)}{", the highest" if best else ""}"/>'
        f"<figcaption><span>{slot + 1 if several else ''}</span> <b>{short(reward)}</b></figcaption></figure>"
    )


def _spread(column: Column) -> tuple[float, float, float] | None:
    """Lowest, mean and highest reward."""
    known = column.known
    return (min(known), sum(known) / len(known), max(known)) if known else None


def _living(columns: Sequence[Column], ways: Lineages) -> list[int]:
    """At each column, of how many first particles some descendant is there; nothing where ancestors are unknown."""
    return [len({way[0] for (column, _), way in ways.items() if column == place}) for place in range(len(columns))]


def _curves(columns: Sequence[Column], ways: Lineages) -> str:
    """Small charts of rewards and, where several particles are related, of how many still count."""
    span, several = (1.0, float(columns[-1].frame.total)), len(columns[0].frame.rewards) > 1
    steps = [float(column.frame.step) for column in columns]
    spreads = [(step, spread) for step, column in zip(steps, columns, strict=True) if (spread := _spread(column))]
    mean = Series("mean", [(x, middle) for x, (_, middle, _) in spreads], _band(spreads) if several else ())
    charts = line_chart("Rewards: mean, lowest to highest" if several else "Reward", [mean], "step", x_range=span)
    if ways:
        ess = [(step, column.frame.ess) for step, column in zip(steps, columns, strict=True)]
        sizes = Series("ESS", [(x, size) for x, size in ess if size is not None])
        living = Series("living", [*zip(steps, map(float, _living(columns, ways)), strict=True)])
        charts += line_chart("Particles that count (ESS)", [sizes], "step", x_range=span, y_from=0)
        charts += line_chart("First particles that live on", [living], "step", x_range=span, y_from=0)
    return f'<div class="steer-curves"><h3>Curves</h3><div class="steer-charts">{charts}</div></div>' if charts else ""


def _band(spreads: Sequence[tuple[float, tuple[float, float, float]]]) -> list[tuple[float, float, float]]:
    return [(x, low, high) for x, (low, _, high) in spreads]


def _table(columns: Sequence[Column], ways: Lineages) -> str:
    """The numbers of the tree and of the curves."""
    head = ["reading", "lowest reward", "mean", "highest"]
    head += ["ESS", "first particles alive", "the next go on from"] if ways else []
    rows: list[list[object]] = []
    for place, column in enumerate(columns):
        row: list[object] = [column.name, *(_spread(column) or (None, None, None))]
        if ways:
            onward = ", ".join(str(slot + 1) for slot in column.frame.ancestors or ()) or None
            row += [column.frame.ess, _living(columns, ways)[place], onward]
        rows.append(row)
    caption = "Rewards, and where particles go on" if ways else "Rewards"
    return f'<details class="steer-numbers"><summary>As a table</summary>{table(caption, head, rows)}</details>'
