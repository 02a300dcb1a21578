"""The Rewards tab: score dropped images by several rewards."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from steer.apps.demo.fields import EXAMPLE
from steer.apps.demo.markup import RUN_SCRIPT, Html, folded, table
from steer.apps.demo.pictures import data_uri
from steer.apps.demo.studio import (
    MAX_PROMPT_CHARACTERS,
    PRIVATE,
    RUNS,
    Change,
    JobTab,
    Studio,
    Ticket,
    guarded,
    line,
    plural,
    public,
)
from steer.apps.models import default_device
from steer.apps.plots import INK, as_svg, plain_text, short, style_axes, thumbnail
from steer.apps.recipes import read_prompt
from steer.errors import InputError
from steer.files import DECODE_ERRORS, FORMATS, read_image
from steer.reward import Reward, score_components
from steer.rewards import FACTS
from steer.rewards.analysis import spearman
from steer.rewards.names import reward_names

MAX_FILES, MAX_REWARDS = 32, 8
MAX_BYTES = 10 * 2**20
MAX_PIXELS = 16_000_000
# Longer side / shorter side: rewards that resize the shorter side would make huge images of strips.
MAX_ASPECT_RATIO = 8


@dataclass(frozen=True)
class Score:
    """A reward's score of an image, and the scores of its components if it has several."""

    total: float
    components: Mapping[str, float]


@dataclass(frozen=True)
class Row:
    """An image: its file's name, pixels across and down, and its scores by the rewards that could score it.

    prompt  prompt of the scores;  inside: whether the prompt comes from the image's own metadata
    """

    name: str
    size: tuple[int, int]
    thumbnail: Image.Image
    scores: Mapping[str, Score]
    prompt: str = ""
    inside: bool = False


@dataclass(frozen=True)
class Scoring:
    """An event: image `number`, from 1, of `count` is being scored."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"Scoring image {self.number} of {self.count} …"


@dataclass(frozen=True)
class Scores:
    """The scores of all images in their order; notes: a line for each image or reward that failed."""

    prompt: str
    rewards: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    def best_first(self, reward: str) -> list[Row]:
        """Sort the images by one reward; images without a score come last."""
        return sorted(self.rows, key=lambda row: -row.scores[reward].total if reward in row.scores else float("inf"))


def check_request(paths: Sequence[Path], prompt: str, rewards: Sequence[str]) -> None:
    """Check the numbers of images, rewards and characters of a request. Raises InputError."""
    if not paths:
        raise InputError("no images: drop some first")
    if not rewards:
        raise InputError("no rewards: tick one or more, or name one")
    for name, count, most in (("images", len(paths), MAX_FILES), ("rewards", len(rewards), MAX_REWARDS)):
        if count > most:
            raise InputError(f"{count} {name}: at most {most} at a time")
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise InputError(f"a prompt of {len(prompt)} characters: at most {MAX_PROMPT_CHARACTERS}")


def score_files(
    paths: Sequence[Path],
    prompt: str,
    rewards: Sequence[str],
    find: Callable[[str], Reward],
    ticket: Ticket,
    device: str = "cpu",
) -> None:
    """Score image files, one in memory at a time; sends Scoring events and, at the end, Scores.

    prompt  prompt of all images; empty: the prompt in the metadata of each image, if any
    find    returns the reward of a specification, or raises InputError
    device  where the images are scored
    Each failure is one line of the notes, and the rest is scored. Raises InputError if no reward can be loaded, or no
    image can be read.
    """
    notes: dict[str, None] = {}
    rewards_by_spec = {}
    for spec in rewards:
        ticket.check()
        try:
            rewards_by_spec[spec] = find(spec)
        except InputError as error:
            notes[_line(spec, error)] = None
    if not rewards_by_spec:
        raise InputError(next(iter(notes)))
    rows = []
    for number, path in enumerate(paths):
        ticket.say(Scoring(number + 1, len(paths)))
        try:
            image = read_upload(path)
        except InputError as error:
            notes[_line(path.name, error)] = None
            continue
        own = None if prompt else read_prompt(path)
        row = Row(path.name, (image.shape[2], image.shape[1]), thumbnail(image), {}, own or prompt, own is not None)
        rows.append(_scored(row, image.to(device), rewards_by_spec, notes, ticket))
    if not rows:
        raise InputError("; ".join(notes))
    ticket.say(Scores(prompt, tuple(rewards_by_spec), tuple(rows), tuple(notes)))


def _scored(row: Row, image: Tensor, rewards: Mapping[str, Reward], notes: dict[str, None], ticket: Ticket) -> Row:
    scores = {}
    for spec, reward in rewards.items():
        ticket.check()
        try:
            with torch.no_grad():
                total, components = score_components(reward, image[None], [row.prompt])
        except InputError as error:
            notes[_line(spec, error)] = None
            continue
        several = components if len(components) > 1 else {}
        scores[spec] = Score(total.item(), {name: values.item() for name, values in several.items()})
    return replace(row, scores=scores)


def read_upload(path: Path) -> Tensor:
    """Read an uploaded image as (3, H, W) in [0, 1]. Its size is checked before its pixels are decoded.

    Raises InputError, without the file's path, for a file that is too big, too long or not an image.
    """
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise InputError(f"{size / 2**20:.1f} MB: at most {MAX_BYTES / 2**20:.0f} MB an image")
        with Image.open(path, formats=FORMATS) as file:
            width, height = file.size
    except InputError:
        raise
    except DECODE_ERRORS as error:  # Pillow's messages contain the path
        raise InputError("not an image that can be read: use PNG, JPEG or WebP") from error
    if width * height > MAX_PIXELS:
        raise InputError(f"{width} × {height} pixels: at most {MAX_PIXELS // 10**6} megapixels, make it smaller")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise InputError(f"{width} × {height} pixels: at most {MAX_ASPECT_RATIO} times as long as wide, crop it")
    try:
        return read_image(path)
    except InputError as error:
        raise InputError(str(error).removeprefix(f"{path}: ")) from error


def _line(name: str, error: InputError) -> str:
    return f"{name:.80}: {public(str(error))}"


EMPTY_VIEW = '<p class="steer-empty">The images appear here with their scores, best first.</p>'
SIZE, SIDE = (5.6, 4.7), 32.0  # inches of the chart, points of a thumbnail in it


def scores_view(scores: Scores, by: str) -> str:
    """Return a table of all scores, the best by one reward first, a table of components, and the notes."""
    rows = scores.best_first(by)
    images = plural(len(rows), "image") + (f", the best by {by} first" if len(rows) > 1 else "")
    own = any(row.inside for row in rows)
    caption = f"{images}. Prompt: {scores.prompt or ('inside the images' if own else '(none)')}"
    cells: list[list[object]] = []
    for rank, row in enumerate(rows):
        totals = (row.scores[reward].total if reward in row.scores else None for reward in scores.rewards)
        cells.append([_picture_cell(row, "" if rank else "★ "), *totals])
    shown = table(caption, ["image", *scores.rewards], cells, by)
    return f'<div class="steer-scores">{_notes(scores.notes)}{shown}{_components_table(scores, rows)}</div>'


def _picture_cell(row: Row, star: str) -> Html:
    name, prompt = escape(row.name, quote=True), f", its own prompt: {escape(row.prompt)}" if row.inside else ""
    return Html(
        f'<span class="steer-scored"><img src="{data_uri(row.thumbnail)}" alt="{name}"/>'
        f"<span>{star}{name}<small>{row.size[0]} × {row.size[1]}{prompt}</small></span></span>"
    )


def _components_table(scores: Scores, rows: Sequence[Row]) -> str:
    """Return a table of the components' scores, if there are any."""
    columns = {
        (reward, part): f"{reward}: {part}"
        for reward in scores.rewards
        for row in rows
        if reward in row.scores
        for part in row.scores[reward].components
    }
    if not columns:
        return ""
    numbers: list[list[object]] = []
    for row in rows:
        by_reward = {reward: score.components for reward, score in row.scores.items()}
        numbers.append([row.name, *(by_reward.get(reward, {}).get(part) for reward, part in columns)])
    return folded("What the scores are made of", table("Scores of components", ["image", *columns.values()], numbers))


def _notes(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    lines = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<div class="steer-left-out" role="alert"><p>Not scored:</p><ul>{lines}</ul></div>'


def scatter_view(scores: Scores, across: str, up: str) -> str:
    """Return a scatter plot of the images by two rewards, and the rank correlation of the two.

    Thumbnails can be reached with the Tab key, and have their scores as labels; nothing for fewer than two images.
    """
    rows = [row for row in scores.rows if across in row.scores and up in row.scores]
    if len(rows) < 2:
        return ""
    xs, ys = ([row.scores[reward].total for row in rows] for reward in (across, up))
    title, numbers = f"{up} against {across}", [[row.name, x, y] for row, x, y in zip(rows, xs, ys, strict=True)]
    figure = Figure(figsize=SIZE, dpi=72, layout="constrained")
    axes = figure.subplots()
    style_axes(axes, "both")
    axes.margins(0.1)
    axes.set_xlabel(plain_text(across), size=8, color=INK)
    axes.set_ylabel(plain_text(up), size=8, color=INK)
    axes.plot(xs, ys, ls="")
    svg = as_svg(figure, title, role="group")  # also computes the layout of the axes
    places = axes.transData.transform(np.column_stack([xs, ys])).tolist()
    height = figure.bbox.height
    pictures = "".join(
        _picture(row, (left, height - low), f"{row.name}: {across} {short(x)}, {up} {short(y)}")
        for row, (left, low), x, y in zip(rows, places, xs, ys, strict=True)
    )
    return (
        f'<figure class="steer-chart steer-scatter"><figcaption>{escape(title)}</figcaption>'
        f"<p>{_describe_correlation(xs, ys)}</p>{svg.removesuffix('</svg>')}<g>{pictures}</g></svg>"
        f"{folded('As a table', table(title, ['image', across, up], numbers))}</figure>"
    )


def _describe_correlation(xs: Sequence[float], ys: Sequence[float]) -> str:
    rho = spearman(xs, ys)
    if math.isnan(rho):
        return "One of the two gives all images the same score: there is no order to compare."
    description = f"{rho:.2f}".replace("-", "−")
    return (
        f"Spearman's ρ = {description} over {len(xs)} images: 1 for the same order, 0 for no "
        "relation, −1 for the reverse order."
    )


def _picture(row: Row, place: tuple[float, float], description: str) -> str:
    """Return a thumbnail centred at its place, in a frame that shows the focus."""
    left, top, words = place[0] - SIDE / 2, place[1] - SIDE / 2, escape(description, quote=True)
    box = f'x="{left:.1f}" y="{top:.1f}" width="{SIDE:g}" height="{SIDE:g}"'
    return (
        f'<g class="steer-spot" role="img" tabindex="0" aria-label="{words}"><title>{words}</title>'
        f'<image href="{data_uri(row.thumbnail)}" {box} preserveAspectRatio="xMidYMid slice"/><rect {box}/></g>'
    )


def names_view() -> str:
    """Return a list of the named rewards with their descriptions."""
    names = {name: f"{about}; {FACTS[name]}" if name in FACTS else about for name, about in reward_names().items()}
    return table("Rewards that have a name", ["name", "what it measures"], sorted(names.items()))


DEFAULT_REWARDS = ("preference:scenes", "aesthetic:scenes", "clip:scenes")  # these score any image
EMBEDDED = ("scene", "scene-soft", *DEFAULT_REWARDS, "jpeg", "brightness")  # these need no network


class RewardsTab(JobTab):
    """The components and their events."""

    def __init__(self, studio: Studio) -> None:
        self.studio, self.scores = studio, gr.State(None)
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300):
                self._form()
            with gr.Column(scale=3, min_width=300):
                self.status = gr.HTML(line("Ready."), elem_id="rewards-status")
                self.by = gr.Dropdown([], label="Best first by", visible=False, elem_id="rewards-by")
                self.view = gr.HTML(EMPTY_VIEW, js_on_load=RUN_SCRIPT, elem_id="rewards-view")
                with gr.Row(visible=False) as self.axes:
                    self.across = gr.Dropdown([], label="Across", min_width=200, elem_id="rewards-across")
                    self.up = gr.Dropdown([], label="Up", min_width=200, elem_id="rewards-up")
                self.scatter = gr.HTML(js_on_load=RUN_SCRIPT, elem_id="rewards-scatter")
        with gr.Accordion("What the rewards measure", open=False):
            gr.HTML(names_view(), elem_id="rewards-names")
        self._connect()

    def _form(self) -> None:
        several: dict[str, Any] = {"file_count": "multiple", "file_types": ["image"], "height": 180}
        self.files = gr.File(label=f"Images, up to {MAX_FILES}", elem_id="rewards-files", **several)
        self.prompt = gr.Textbox(
            label="Prompt",
            placeholder=EXAMPLE,
            max_length=MAX_PROMPT_CHARACTERS,
            info="What the images were to show, the same for all. Left empty: the prompts inside images of steer.",
            elem_id="rewards-prompt",
        )
        names = [*dict.fromkeys([*self.studio.rewards, *EMBEDDED])]
        ticked = [*self.studio.rewards, *DEFAULT_REWARDS]
        self.ticked = gr.CheckboxGroup(names, value=ticked, label="Rewards", elem_id="rewards-ticked")
        self.others = gr.Textbox(
            label="Others, by name",
            lines=2,
            info="One a line, such as colour:red or scene + jpeg:0.01. Some need files that this machine may not have.",
            elem_id="rewards-others",
        )
        self._job_buttons("Score", "rewards")

    def _connect(self) -> None:
        live = [self.status, self.start, self.stop, self.scores, self.by, self.view, self.axes, self.across, self.up]
        asked = [self.files, self.prompt, self.ticked, self.others]
        self._connect_job(self.start.click(self.run, asked, [*live, self.scatter], **RUNS))
        self.by.input(scores_view, [self.scores, self.by], self.view, **PRIVATE)
        for field in (self.across, self.up):
            field.input(scatter_view, [self.scores, self.across, self.up], self.scatter, **PRIVATE)

    @guarded
    def run(
        self, files: list[str] | None, prompt: str, ticked: list[str], others: str, request: gr.Request
    ) -> Iterator[Change]:
        specs = [*dict.fromkeys([*ticked, *filter(None, map(str.strip, (others or "").splitlines()))])]
        paths, prompt = [Path(file) for file in files or ()], (prompt or "").strip()
        check_request(paths, prompt, specs)

        def work(ticket: Ticket) -> None:
            score_files(paths, prompt, specs, self.studio.reward, ticket, default_device(self.studio.device))

        scores = None
        for event in self.studio.begin(request, work).events():
            if isinstance(event, Scores):
                scores = event
            else:
                yield {self.status: line(str(event))}
        yield {self.status: line("Stopped.")} if scores is None else self._shown(scores)

    def _shown(self, scores: Scores) -> Change:
        """Show all scores, sorted by the first reward, with a plot of the first two rewards."""
        names = list(scores.rewards)
        first, second = names[0], names[min(1, len(names) - 1)]
        several = len(names) > 1 and len(scores.rows) > 1
        images, rewards = plural(len(scores.rows), "image"), plural(len(names), "reward")
        left = " Some were left out: see below." if scores.notes else ""
        inside = sum(row.inside for row in scores.rows)
        which = f" The prompts of {inside} of them are those inside the images." if inside else ""
        return {
            self.status: line(f"Done: {images} by {rewards}.{which}{left}"),
            self.scores: scores,
            self.by: gr.update(choices=names, value=first, visible=several),
            self.view: scores_view(scores, first),
            self.axes: gr.update(visible=several),
            self.across: gr.update(choices=names, value=first),
            self.up: gr.update(choices=names, value=second),
            self.scatter: scatter_view(scores, first, second) if several else "",
        }
