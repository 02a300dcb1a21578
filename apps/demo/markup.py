"""HTML that several tabs show: a table, and images of which a scrubber selects one."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from steer.apps.plots import short

RUN_SCRIPT = (Path(__file__).parent / "run_view.js").read_text()  # for views with a gallery, a tree or folded tables
HIDDEN = ' hidden=""'


class Html(str):
    """HTML of a cell, which is not escaped."""


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[object]], by: str | None = None) -> str:
    """Return a <table>; the first cell of each row is its name. Floats are shortened; None becomes a dash.

    by  the column by which the rows are sorted, the highest first
    """
    order = {by: ' aria-sort="descending"'}
    columns = "".join(f'<th scope="col"{order.get(name, "")}>{escape(name)}</th>' for name in head)
    body = ""
    for name, *cells in rows:
        values = "".join(f"<td>{_cell(cell)}</td>" for cell in cells)
        body += f'<tr><th scope="row">{_cell(name)}</th>{values}</tr>'
    return (
        f'<div class="steer-scroll" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f'<table class="steer-table"><caption>{escape(caption)}</caption>'
        f"<thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(value: object) -> str:
    if isinstance(value, Html):
        return value
    return escape(short(value) if isinstance(value, float) or value is None else str(value))


def folded(summary: str, content: str) -> str:
    """Return content that opens below its summary; run_view.js keeps it open when the view around it changes."""
    return f'<details class="steer-numbers"><summary>{summary}</summary>{content}</details>'


def gallery(title: str, frames: Sequence[tuple[str, str, str]], note: str) -> str:
    """Return a scrubber and frames of images, of which it shows one; run_view.js moves the scrubber.

    frames  label, classes and HTML of each frame
    note    text below the images, which is escaped
    """
    last, label = len(frames) - 1, frames[-1][0]
    earlier, later = (
        f'<button type="button" data-move="{step}" aria-label="{name}" aria-disabled="{off}">{sign}</button>'
        for step, name, sign, off in ((-1, "Earlier", "‹", "false" if last else "true"), (1, "Later", "›", "true"))
    )
    shown = "".join(
        f'<div class="steer-frame {classes}" data-label="{text}"{"" if number == last else HIDDEN}>{cells}</div>'
        for number, (text, classes, cells) in enumerate(frames)
    )
    return (
        f'<div class="steer-gallery"><h3>{title}</h3><div class="steer-scrub" role="group" aria-label="Which images">'
        f'{earlier}<input type="range" class="steer-scrubber" min="0" max="{last}" step="1" value="{last}"'
        f' aria-label="Which images" aria-valuetext="{label}"/>{later}'
        f'<span class="steer-reading" role="status">{label}</span></div><div class="steer-frames">{shown}</div>'
        f'<p class="steer-note">{note}</p></div>'
    )
