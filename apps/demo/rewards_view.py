"""The Rewards tab's view of scores: a table with thumbnails, and one reward against another."""

import math
from collections.abc import Sequence
from html import escape

from matplotlib.ticker import MaxNLocator

from steer.apps.demo.charts import Axis, short, table
from steer.apps.demo.reward_scores import Row, Scores
from steer.apps.demo.steering import data_uri
from steer.reward import reward_names
from steer.rewards.agreement import spearman

NOTHING = "The images appear here with their scores, best first."
WIDTH, HEIGHT = 400.0, 340.0
LEFT, RIGHT, TOP, BOTTOM = 58.0, 24.0, 24.0, 46.0  # around the axes, for their labels and half a picture
SIDE = 32.0  # of a picture among the axes


def empty_view() -> str:
    """Before anything was scored."""
    return f'<p class="steer-empty">{NOTHING}</p>'


def scores_view(scores: Scores, by: str) -> str:
    """All scores, the best by one reward first; those of parts, and a line for what could not be scored."""
    rows = scores.best_first(by)
    head = "".join(_heading(reward, reward == by) for reward in scores.rewards)
    body = "".join(_row(rank, row, scores.rewards) for rank, row in enumerate(rows))
    images = "1 image" if len(rows) == 1 else f"{len(rows)} images, the best by {by} first"
    own = any(row.inside for row in rows)
    caption = escape(f"{images}. Prompt: {scores.prompt or ('inside the images' if own else '(none)')}")
    return (
        f'<div class="steer-scores">{_notes(scores.notes)}<div class="steer-scroll" tabindex="0" role="region"'
        f' aria-label="Scores"><table class="steer-table"><caption>{caption}</caption>'
        f'<thead><tr><th scope="col">image</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f"{_parts(scores, rows)}</div>"
    )


def _heading(reward: str, leads: bool) -> str:
    """A column's; the order of the rows is told at the reward that makes it."""
    order = ' aria-sort="descending"' if leads else ""
    return f'<th scope="col"{order}>{escape(reward)}</th>'


def _row(rank: int, row: Row, rewards: Sequence[str]) -> str:
    totals = [row.scores[reward].total if reward in row.scores else None for reward in rewards]
    cells = "".join(f"<td>{short(total)}</td>" for total in totals)
    name, star = escape(row.name, quote=True), "★ " if rank == 0 else ""
    pixels = f"{row.size[0]} × {row.size[1]}"
    pixels += f", its own prompt: {escape(row.prompt)}" if row.inside else ""
    return (
        f'<tr><th scope="row"><span class="steer-scored"><img src="{data_uri(row.thumbnail)}" alt="{name}"/>'
        f"<span>{star}{name}<small>{pixels}</small></span></span></th>{cells}</tr>"
    )


def _parts(scores: Scores, rows: Sequence[Row]) -> str:
    """The scores of rewards' parts, where there are any."""
    columns = {
        (reward, part): f"{reward}: {part}"
        for reward in scores.rewards
        for row in rows
        if reward in row.scores
        for part in row.scores[reward].parts
    }
    if not columns:
        return ""
    numbers: list[list[object]] = []
    for row in rows:
        told = [row.scores[reward].parts.get(part) if reward in row.scores else None for reward, part in columns]
        numbers.append([row.name, *told])
    return (
        '<details class="steer-numbers"><summary>What the scores are made of</summary>'
        f"{table('Scores of parts', ['image', *columns.values()], numbers)}</details>"
    )


def _notes(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    lines = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<div class="steer-left-out" role="alert"><p>Not scored:</p><ul>{lines}</ul></div>'


def scatter_view(scores: Scores, across: str, up: str) -> str:
    """Every image that both rewards scored at its two scores, and how alike they rank the images.

    Pictures can be reached by Tab, and say their scores; nothing where there are fewer than two.
    """
    rows = [row for row in scores.rows if across in row.scores and up in row.scores]
    if len(rows) < 2:
        return ""
    places = [(row.scores[across].total, row.scores[up].total) for row in rows]
    xs, ys = zip(*places, strict=True)
    x_axis, y_axis = _axis(xs, LEFT, WIDTH - RIGHT), _axis(ys, HEIGHT - BOTTOM, TOP)
    pictures = "".join(
        _picture(row, (x_axis.at(x), y_axis.at(y)), f"{row.name}: {across} {short(x)}, {up} {short(y)}")
        for row, (x, y) in zip(rows, places, strict=True)
    )
    title = f"{up} against {across}"
    numbers = [[row.name, x, y] for row, (x, y) in zip(rows, places, strict=True)]
    return (
        f'<figure class="steer-chart steer-scatter"><figcaption>{escape(title)}</figcaption>'
        f"<p>{_alike(xs, ys)}</p>"
        f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="group" aria-label="{escape(title)}">'
        f"{_axes(x_axis, y_axis, across, up)}<g>{pictures}</g></svg>"
        f'<details class="steer-numbers"><summary>As a table</summary>{table(title, ["image", across, up], numbers)}'
        "</details></figure>"
    )


def _alike(xs: Sequence[float], ys: Sequence[float]) -> str:
    """Spearman's rank correlation in a sentence."""
    rho = spearman(xs, ys)
    if math.isnan(rho):
        return "One of the two gives all images the same score: there is no order to compare."
    told = f"{rho:.2f}".replace("-", "−")
    return (
        f"Spearman's ρ = {told} over {len(xs)} images: 1 where both rank them alike, 0 where one says nothing of "
        "the other, −1 where they rank them the other way round."
    )


def _axis(values: Sequence[float], start: float, end: float) -> Axis:
    low, high = min(values), max(values)
    if high - low <= 1e-6 * abs(high):  # rounding errors of what is one value
        low, high = low - (abs(low) / 10 or 1.0), high + (abs(high) / 10 or 1.0)
    ticks = [float(tick) for tick in MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)]
    return Axis(min(low, ticks[0]), max(high, ticks[-1]), start, end, tuple(ticks))


def _axes(across: Axis, up: Axis, x_label: str, y_label: str) -> str:
    """Grid lines with their values, and the names of both axes."""
    drawn, floor = "", HEIGHT - BOTTOM
    for tick in up.ticks:
        y = up.at(tick)
        drawn += f'<path class="steer-grid" d="M{LEFT:g} {y:.1f}H{WIDTH - RIGHT:g}"/>'
        drawn += f'<text x="{LEFT - 8:g}" y="{y + 3.5:.1f}" text-anchor="end">{up.label(tick)}</text>'
    for tick in across.ticks:
        x = across.at(tick)
        drawn += f'<path class="steer-grid" d="M{x:.1f} {TOP:g}V{floor:g}"/>'
        drawn += f'<text x="{x:.1f}" y="{floor + 18:g}" text-anchor="middle">{across.label(tick)}</text>'
    middle = (TOP + floor) / 2
    drawn += (
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2:g}" y="{HEIGHT - 8:g}" text-anchor="middle">{escape(x_label)}</text>'
    )
    turned = f'transform="translate(14 {middle:g}) rotate(-90)" text-anchor="middle"'
    return f'<g aria-hidden="true">{drawn}<text {turned}>{escape(y_label)}</text></g>'


def _picture(row: Row, place: tuple[float, float], told: str) -> str:
    """A thumbnail around its place, in a frame that shows the focus."""
    left, top, words = place[0] - SIDE / 2, place[1] - SIDE / 2, escape(told, quote=True)
    box = f'x="{left:.1f}" y="{top:.1f}" width="{SIDE:g}" height="{SIDE:g}"'
    return (
        f'<g class="steer-spot" role="img" tabindex="0" aria-label="{words}"><title>{words}</title>'
        f'<image href="{data_uri(row.thumbnail)}" {box} preserveAspectRatio="xMidYMid slice"/><rect {box}/></g>'
    )


def names_view() -> str:
    """The rewards that have a name, and what they measure."""
    return table("Rewards that have a name", ["name", "what it measures"], sorted(reward_names().items()))
