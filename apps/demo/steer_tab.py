"""The Steer tab: a prompt, the particles while they are steered, and the finished images."""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

import gradio as gr
from PIL import Image

from steer.apps.demo.labels import FinishedPrompt, RunView
from steer.apps.demo.plots import Column, Lineages, Series, ancestor_paths, ancestry, gallery, line_chart, short, table
from steer.apps.demo.steering import Frame, PromptResult, as_command, as_python, data_uri, steering
from steer.apps.demo.studio import (
    MAX_PROMPT_CHARACTERS,
    PRIVATE,
    RANDOM,
    Change,
    JobTab,
    Studio,
    Weights,
    line,
    seed_of,
)
from steer.apps.recipes import Recipe, read_metadata
from steer.apps.sampling import SavedImage
from steer.apps.settings import ALL_OPTIONS, SamplingConfig, option_names
from steer.errors import InputError
from steer.pipelines.base import Cost

METHODS = {
    "Particles (Feynman–Kac)": "fk",
    "Best of N": "best-of-n",
    "Optimised noise (ReNO)": "reno",
    "Plain sampling": "base",
}
REWARDS = {
    "scene-soft": "how well the scene's components are there, in degrees",
    "preference:scenes": "what people would prefer, learned from choices",
    "aesthetic:scenes": "how calm and balanced it looks, learned",
    "clip:scenes": "how well a small CLIP thinks it fits the words",
    "preference:scenes + aesthetic:scenes:0.5": "both, the second at half weight",
    "jpeg": "how well it compresses: plain pictures",
}
# Limits of one visitor on a shared machine.
MAX_PROMPTS = 4
FIELD_LIMITS = {"particles": 16, "steps": 100, "iterations": 100}
FIELD_DEFAULTS = {"lam": 25, "iterations": 20}
FIELD_LABELS = {"lam": "strength"}
ONE_STEP = "scenes-turbo"
EXAMPLE = "three green triangles"  # with the fields as they are: 1 of 4 base images is right, steered all are


def steer_fields(studio: Studio) -> dict[str, Any]:
    """The components, by the names that `settings_of` reads."""
    fields: dict[str, Any] = {
        "prompts": gr.Textbox(EXAMPLE, label="Prompt", lines=2, info=f"One a line, up to {MAX_PROMPTS}."),
        "method": gr.Radio([*METHODS.items()], value="fk", label="Method"),
        "reward": gr.Dropdown(
            [*dict.fromkeys([*studio.rewards, *REWARDS])],
            value=studio.rewards[0] if studio.rewards else "scene-soft",
            allow_custom_value=True,
            label="Reward",
            info="To be maximised. Add several with +, weight one with :0.5.",
        ),
    }
    with gr.Accordion("What the rewards measure", open=False):
        gr.Markdown("\n".join(f"- `{name}`: {field_values}" for name, field_values in REWARDS.items()))
    with gr.Row():
        fields["particles"] = gr.Slider(
            1, FIELD_LIMITS["particles"], 4, step=1, label="Particles", info="images at a time"
        )
        fields["lam"] = gr.Slider(0, 100, FIELD_DEFAULTS["lam"], step=1, label="Strength λ", info="0: no steering")
    with gr.Row():
        fields["steps"] = gr.Slider(1, FIELD_LIMITS["steps"], 20, step=1, label="Steps", info="of the solver")
        fields["guidance"] = gr.Slider(0, 15, 4, step=0.5, label="Guidance", info="how closely to follow the words")
    fields["iterations"] = gr.Slider(
        1,
        FIELD_LIMITS["iterations"],
        FIELD_DEFAULTS["iterations"],
        step=1,
        label="Iterations",
        info="of the noise, for ReNO",
        visible=False,
    )
    with gr.Row():
        fields["seed"] = gr.Number(0, label="Seed", info="−1: a new one for every run")
        fields["fresh"] = gr.Checkbox(False, label="A new seed for every run")
    with gr.Accordion("Model and comparison", open=len(studio.models) > 1):
        fields["model"] = gr.Dropdown([*studio.models], value=studio.models[0], label="Model")
        fields["compare"] = gr.Checkbox(True, label="Also make the base images of the same seed")
        fields["adapter"] = gr.Checkbox(False, label="Finetuned weights", visible=False, elem_id="steer-adapter")
    return fields


def settings_of(asked: Mapping[str, Any], weights: Weights | None = None) -> SamplingConfig:
    """Read the settings from the fields, with the weights that the visitor loaded.

    Raises InputError for numbers beyond what this app does.
    """
    own = set(ALL_OPTIONS) - set(option_names(asked["method"]))  # fields of other methods stay as they are
    given = {name: value for name, value in asked.items() if name not in {*own, "prompts", "fresh", "adapter"}}
    if empty := [name for name, value in given.items() if value is None and name != "seed"]:
        raise InputError(f"{FIELD_LABELS.get(empty[0], empty[0])}: the field is empty, give a number")
    given |= {"reward": asked["reward"].strip(), "seed": seed_of(asked["seed"], asked["fresh"])}
    settings = SamplingConfig.of(**given, lora=_adapter_path(asked["model"], weights) if asked["adapter"] else None)
    for name, most in FIELD_LIMITS.items():
        if (value := settings.plain().get(name) or 0) > most:
            raise InputError(f"{name} can be at most {most} in this app, got {value}")
    return settings


def _adapter_path(model: str, weights: Weights | None) -> str:
    """The path of the finetuned weights in the settings. Raises InputError where they do not fit the model."""
    if weights is None:
        raise InputError("no finetuned weights are loaded here: train some in the Finetune tab")
    if weights.model != model:
        raise InputError(f"the finetuned weights are those of {weights.model}: choose that model, or switch them off")
    return weights.archive_path


def prompts_of(text: str) -> list[str]:
    """Read the prompts of a field, one a line. Raises InputError for none, or too many."""
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise InputError("the prompt is empty: say what the image should show")
    if len(prompts) > MAX_PROMPTS:
        raise InputError(f"{len(prompts)} prompts: at most {MAX_PROMPTS} at a time in this app")
    if (longest := max(map(len, prompts))) > MAX_PROMPT_CHARACTERS:
        raise InputError(f"a prompt of {longest} characters: at most {MAX_PROMPT_CHARACTERS}")
    return prompts


def fields_from_recipe(recipe: Recipe, models: Sequence[str], weights: Weights | None = None) -> dict[str, Any]:
    """Restore the fields from a recipe. Raises InputError for one without a field for each setting."""
    settings = recipe.settings
    if settings.model not in models or settings.method not in METHODS.values():
        what = f"model {settings.model!r:.80}, method {settings.method!r}"
        raise InputError(f"it was made with {what}, which this app does not have: use `steer sample --replay`")
    asked = {
        "prompts": recipe.prompt,
        "method": settings.method,
        "reward": settings.reward,
        "particles": settings.particles,
        "lam": settings.plain().get("lam", FIELD_DEFAULTS["lam"]),
        "steps": settings.steps or 1,
        "guidance": 0.0 if settings.guidance is None else settings.guidance,
        "iterations": settings.plain().get("iterations", FIELD_DEFAULTS["iterations"]),
        "seed": settings.seed,
        "fresh": False,
        "model": settings.model,
        "compare": settings.compare,
        "adapter": settings.lora is not None,
    }
    again, first = settings_of(asked, weights).plain(), settings.plain()
    if apart := [name for name, value in first.items() if again[name] != value]:
        name = apart[0]
        raise InputError(
            f"it was made with {name} {first[name]!r}, which has no field here: use `steer sample --replay`"
        )
    return asked


def defaults_of(method: str, models: Sequence[str], weights: Weights | None = None) -> dict[str, Any]:
    """Default values of the fields that depend on the method: ReNO is for one-step models.

    The other methods use finetuned weights where some are loaded.
    """
    reno = method == "reno"
    model, steps, guidance = (weights.model, weights.steps, weights.guidance) if weights else (models[0], 20, 4)
    return {
        "steps": 1 if reno else steps,
        "guidance": 0 if reno else guidance,
        "model": ONE_STEP if reno and ONE_STEP in models else model,
        "adapter": weights is not None and not reno,
    }


def visible_fields(method: str, weights: Weights | None = None) -> dict[str, bool]:
    """The visibility of the fields that not all methods have."""
    return {
        "lam": method == "fk",
        "iterations": method == "reno",
        "compare": method != "base" or weights is not None,
        "adapter": weights is not None,
    }


@dataclass(frozen=True)
class Defaults:
    """The last defaults of fields by name, and the names of fields that the visitor has set."""

    values: Mapping[str, Any]
    kept: frozenset[str] = frozenset()

    def changed(self, now: Mapping[str, Any], to: Mapping[str, Any]) -> tuple["Defaults", dict[str, Any]]:
        """New defaults, and values of the fields that the visitor has not set."""
        kept = self.kept | {name for name, value in self.values.items() if now[name] != value}
        follows = {name: value for name, value in to.items() if name not in kept}
        return Defaults({**self.values, **to}, kept), follows


EMPTY_TEXT = "The particles appear here while they are being steered."
GRID_CLASSES = ((1, "steer-single"), (4, "steer-few"), (8, "steer-some"))  # up to so many images
FINISHED, SMALL = 256, 56  # pixels of a finished image's longer side, in the gallery and in the tree


def run_view(frames: Sequence[Frame], made: PromptResult | None) -> str:
    """The HTML of a run so far; a hint before the first evaluated step.

    frames  the particles at the evaluated steps so far
    made    the result, once there is one
    """
    columns = [Column(frame) for frame in frames]
    if made is not None:
        columns.append(Column(_finished(made, frames[-1].total if frames else 0), ended=True))
    if not columns:
        return f'<section class="steer-run"><p class="steer-empty">{EMPTY_TEXT}</p></section>'
    parents, size = [frame.ancestors for frame in frames if frame.ancestors], len(columns[0].frame.rewards)
    related = size > 1 and bool(frames) and len(parents) == len(frames)
    paths = ancestor_paths(parents[: len(columns) - 1], size) if related else {}
    tree = ancestry(columns, paths, _icons(columns[-1])) if related else ""
    curves = _curves(columns, paths) if frames else ""
    components = _gallery(columns) + tree + curves + _table(columns, paths)
    return f'<section class="steer-run" data-run="{_run_id(columns[0].frame)}">{components}</section>'


def _finished(made: PromptResult, total: int) -> Frame:
    """The finished images as a last frame, in their slots."""
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


def _run_id(first: Frame) -> str:
    """A name that differs between runs."""
    return f"{zlib.crc32(repr(first.rewards).encode() + first.images[0].tobytes()):08x}"


def _place(column: Column) -> str:
    return column.name if column.ended else f"{column.name} of {column.frame.total}"


def _gallery(columns: Sequence[Column]) -> str:
    """The particles at every evaluated step, of which one is shown."""
    several = len(columns[-1].frame.images) > 1
    note = "each image: the particle’s number and its reward, ★ the highest" if several else "the image: its reward"
    frames = [
        (
            _place(column),
            _grid_class(column),
            "".join(_cell(column, place, slot) for slot in range(len(column.frame.images))),
        )
        for place, column in enumerate(columns)
    ]
    return gallery("Particles", frames, f"Below {note}.")


def _grid_class(column: Column) -> str:
    """The class that sets the size of images in style.css."""
    size = len(column.frame.images)
    return next((name for most, name in GRID_CLASSES if size <= most), "")


def _cell(column: Column, number: int, slot: int) -> str:
    reward, several = column.frame.rewards[slot], len(column.frame.rewards) > 1
    best = several and reward == max(column.known, default=None)
    return (
        f'<figure class="steer-cell{" steer-best" if best else ""}" data-key="{number}-{slot}">'
        f'<img src="{column.frame.sources[slot]}" alt="{column.description(slot)}{", the highest" if best else ""}"/>'
        f"<figcaption><span>{slot + 1 if several else ''}</span> <b>{short(reward)}</b></figcaption></figure>"
    )


def _spread(column: Column) -> tuple[float, float, float] | None:
    """Lowest, mean and highest reward."""
    known = column.known
    return (min(known), sum(known) / len(known), max(known)) if known else None


def _num_living_ancestors(columns: Sequence[Column], paths: Lineages) -> list[int]:
    """At each column the number of first particles with a descendant."""
    return [len({way[0] for (column, _), way in paths.items() if column == place}) for place in range(len(columns))]


def _curves(columns: Sequence[Column], paths: Lineages) -> str:
    """Charts of rewards, of ESS and of surviving ancestors."""
    span, several = (1.0, float(columns[-1].frame.total)), len(columns[0].frame.rewards) > 1
    steps = [float(column.frame.step) for column in columns]
    spreads = [(step, spread) for step, column in zip(steps, columns, strict=True) if (spread := _spread(column))]
    mean = Series("mean", [(x, middle) for x, (_, middle, _) in spreads], _band(spreads) if several else ())
    charts = line_chart("Rewards: mean, lowest to highest" if several else "Reward", [mean], "step", x_range=span)
    if paths:
        ess = [(step, column.frame.ess) for step, column in zip(steps, columns, strict=True)]
        sizes = Series("ESS", [(x, size) for x, size in ess if size is not None])
        living = Series("living", [*zip(steps, map(float, _num_living_ancestors(columns, paths)), strict=True)])
        charts += line_chart("Effective sample size (ESS)", [sizes], "step", x_range=span, y_from=0)
        charts += line_chart("First particles with descendants", [living], "step", x_range=span, y_from=0)
    return f'<div class="steer-curves"><h3>Curves</h3><div class="steer-charts">{charts}</div></div>' if charts else ""


def _band(spreads: Sequence[tuple[float, tuple[float, float, float]]]) -> list[tuple[float, float, float]]:
    return [(x, low, high) for x, (low, _, high) in spreads]


def _table(columns: Sequence[Column], paths: Lineages) -> str:
    """The numbers of the ancestry and of the charts as a table."""
    head = ["step", "lowest reward", "mean", "highest"]
    head += ["ESS", "first particles alive", "ancestors of the next"] if paths else []
    rows: list[list[object]] = []
    for place, column in enumerate(columns):
        row: list[object] = [column.name, *(_spread(column) or (None, None, None))]
        if paths:
            onward = ", ".join(str(slot + 1) for slot in column.frame.ancestors or ()) or None
            row += [column.frame.ess, _num_living_ancestors(columns, paths)[place], onward]
        rows.append(row)
    caption = "Rewards and ancestors" if paths else "Rewards"
    return f'<details class="steer-numbers"><summary>As a table</summary>{table(caption, head, rows)}</details>'


class Results:
    """The components of the results, hidden until there are some."""

    def __init__(self) -> None:
        with gr.Column(visible=False, elem_id="steer-results") as self.box:
            self.chooser = gr.Radio([], label="Prompt", visible=False, elem_id="steer-chooser")
            self.slider = gr.ImageSlider(
                type="filepath",
                format="png",
                interactive=False,
                max_height=420,
                elem_id="steer-slider",
            )
            self.gallery = gr.Gallery(
                label="Base images",
                format="png",
                type="filepath",
                columns=4,
                height="auto",
                object_fit="contain",
                interactive=False,
                buttons=["fullscreen"],
                elem_id="steer-base",
            )
            self.table = gr.HTML(elem_id="steer-rewards")
            with gr.Accordion("Images, each with its settings inside", open=False):
                self.files = gr.File(show_label=False, file_count="multiple", interactive=False, elem_id="steer-files")
            with gr.Accordion("The same outside this app", open=False):
                self.command = gr.Code(label="Command", language="shell", interactive=False, wrap_lines=True)
                self.python = gr.Code(label="Python", language="python", interactive=False)

    @property
    def components(self) -> list[Any]:
        return [self.box, self.chooser, self.slider, self.gallery, self.table, self.files, self.command, self.python]

    def updates(self, finished: Sequence[FinishedPrompt], place: int = 0) -> dict[Any, Any]:
        """Show one of the finished prompts, and offer the others."""
        one = finished[place].made
        pair = compared(one)
        choices = [(f"{number + 1}. {each.made.prompt}", number) for number, each in enumerate(finished)]
        return {
            self.box: gr.update(visible=True),
            self.chooser: gr.update(choices=choices, value=place, visible=len(finished) > 1),
            self.slider: gr.update(
                value=pair and tuple(str(picture.path) for picture in pair),
                visible=pair is not None,
                label=pair and sides(one, *pair),
            ),
            self.gallery: gr.update(value=base_captions(one), visible=bool(one.base)),
            self.table: rewards_table(one)
            + f'<p class="steer-summary">{escape(describe_means(one) + describe_cost(one))}</p>',
            self.files: [str(picture.path) for picture in (*one.images, *one.base)],
            self.command: as_command(one.prompt, one.settings),
            self.python: as_python(one.prompt, one.settings),
        }


def compared(made: PromptResult) -> tuple[SavedImage, SavedImage] | None:
    """The two sides of the slider: the best base image and the best image of as many, by the same reward.

    Plain sampling does not sort: with finetuned weights the sides are the same noise before and after. None without
    base images, and for best of N, whose image is the best base image itself.
    """
    if not made.base or (made.settings.method == "best-of-n" and made.base_cost is None):
        return None
    if made.settings.method == "base":
        return made.base[0], made.images[0]
    return best(made.base), best(made.images)


def best(pictures: Sequence[SavedImage]) -> SavedImage:
    """The one of the highest reward, the first of several."""
    return max(pictures, key=lambda one: one.recipe.reward)


def sides(made: PromptResult, left: SavedImage, right: SavedImage) -> str:
    """Describe the two sides of the slider."""
    steered, finetuned = made.settings.method != "base", made.settings.lora is not None
    kind = "finetuned, and steered" if steered and finetuned else "finetuned" if finetuned else "steered"
    of = f"the best of {len(made.images)} each" if steered else "the same noise"
    rewards = f"{short(left.recipe.reward)} and {short(right.recipe.reward)}"
    return f"Left: base model, right: {kind} ({of}; rewards {rewards})"


def base_captions(made: PromptResult) -> list[tuple[str, str]]:
    """Every base image with its number and reward, the best with a star."""
    top = best(made.base) if made.base else None
    return [
        (str(one.path), f"{'★ ' if one is top else ''}base {slot + 1}: {short(one.recipe.reward)}")
        for slot, one in enumerate(made.base)
    ]


def rewards_table(made: PromptResult) -> str:
    """Every image's reward and its components: steered ones best first, then the base ones."""
    components = list(made.images[0].recipe.components)
    components = components if len(components) > 1 else []

    def row(name: str, picture: SavedImage) -> list[object]:
        scores = (picture.recipe.reward, *(picture.recipe.components[part] for part in components))
        return [name, *scores]

    first = "1." if made.settings.method == "base" else "best"  # plain images are not sorted
    rows = [row(f"{rank + 1}." if rank else first, picture) for rank, picture in enumerate(made.images)]
    rows += [row(f"base {slot + 1}", picture) for slot, picture in enumerate(made.base)]
    return table(f"Rewards: {made.settings.reward}", ["image", "reward", *components], rows)


def describe_means(made: PromptResult) -> str:
    """Compare the mean rewards in a sentence, where there are base images."""
    if not made.base:
        return ""
    before, after = (fmean(one.recipe.reward for one in pictures) for pictures in (made.base, made.images))
    first, last = (short(best(pictures).recipe.reward) for pictures in (made.base, made.images))
    same = " Best of N picks among the base images: its first is the best of them." if compared(made) is None else ""
    text = f"Mean reward: {short(after)}, of the base images {short(before)}. Best: {last}, of the base images {first}."
    return f"{text}{same} "


def describe_cost(made: PromptResult) -> str:
    """Describe the cost in a sentence."""
    base = f"; the base images beside them {_cost(made.base_cost)}" if made.base_cost else ""
    return f"Cost: {_cost(made.cost)}{base}. Seed {made.settings.seed}."


def _cost(cost: Cost) -> str:
    gradients = f", {cost.gradients} gradients" if cost.gradients else ""
    scored = f"{cost.decodes} images decoded, {cost.reward_calls} scored{gradients}"
    return f"{cost.nfe} denoiser evaluations, {scored}, {cost.seconds:.1f} s"


FOLDER = Path(__file__).parent


class SteerTab(JobTab):
    """The components and their events; made inside the app's Blocks.

    `weights` holds the finetuned Weights that the visitor loaded, or None; `defaults` those of their fields.
    """

    def __init__(self, studio: Studio) -> None:
        self.studio, self.finished, self.weights = studio, gr.State(()), gr.State(None)
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300):
                self.fields = steer_fields(studio)
                first = defaults_of(self.fields["method"].value, studio.models)
                self.defaults = gr.State(Defaults(first | {"reward": self.fields["reward"].value}))
                self._job_buttons("Steer", "steer")
                label = "Drop an image that was made here to restore its settings"
                self.dropped = gr.File(label=label, file_types=[".png"], height=160, elem_id="steer-drop")
            with gr.Column(scale=3, min_width=300):
                self.status = gr.HTML(line("Ready."), elem_id="steer-status")
                script = (FOLDER / "run_view.js").read_text()
                self.view = gr.HTML(run_view((), None), js_on_load=script, elem_id="steer-view")
                self.results = Results()
        self._connect()

    def _connect(self) -> None:
        fields, seed = self.fields, (self.fields["seed"], self.fields["fresh"])
        live = [self.status, self.view, self.start, self.stop, self.finished, *seed, *self.results.components]
        asked = {*fields.values(), self.weights}
        self._connect_job(self.start.click(self.run, asked, live, concurrency_limit=None, **PRIVATE))
        follows, known = [self.status, self.defaults, *fields.values()], {self.weights, self.defaults, *fields.values()}
        fields["method"].input(self.fit, known, follows, **PRIVATE)
        self.weights.change(self.load_adapter, known, follows, **PRIVATE)
        self.dropped.upload(self.restore, [self.dropped, self.weights], follows, **PRIVATE)
        chosen = [self.results.chooser, self.finished]
        self.results.chooser.input(self.show, chosen, [self.view, *self.results.components], **PRIVATE)

    def run(self, field_values: dict[Any, Any], request: gr.Request) -> Iterator[Change]:
        """Run the request, and show its progress."""
        asked = {name: field_values[field] for name, field in self.fields.items()}
        yield from self.guarded(self._run(asked, field_values[self.weights], request))

    def _run(self, asked: dict[str, Any], weights: Weights | None, request: gr.Request) -> Iterator[Change]:
        prompts, settings = prompts_of(asked["prompts"]), settings_of(asked, weights)
        work = steering(self.studio, prompts, settings, self.studio.run_folder(request), weights)
        ticket, run_view_state = self.studio.begin(request, work), RunView()
        yield {
            self.fields["seed"]: settings.seed,
            self.fields["fresh"]: bool(asked["fresh"]) or asked["seed"] == RANDOM,
            self.view: run_view((), None),
            self.results.box: gr.update(visible=False),
        }
        for event in ticket.events():
            if run_view_state.after(event):
                view = (
                    {self.view: run_view(run_view_state.frames, run_view_state.made)}
                    if isinstance(event, Frame | PromptResult)
                    else {}
                )
                yield {self.status: line(run_view_state.line), **view}
        yield {self.status: line(run_view_state.conclusion(ticket.stopped)), self.finished: run_view_state.finished}
        if run_view_state.finished:
            yield self.show(0, run_view_state.finished)

    def show(self, place: int, finished: tuple[FinishedPrompt, ...]) -> Change:
        """Show one of the finished prompts."""
        one = finished[place]
        return {self.view: run_view(one.frames, one.made), **self.results.updates(finished, place)}

    def fit(self, field_values: dict[Any, Any]) -> Change:
        """Set the fields that depend on the method, but not those that the visitor has set."""
        method, weights = field_values[self.fields["method"]], field_values[self.weights]
        return self._follow(field_values, method, weights, defaults_of(method, self.studio.models, weights))

    def _follow(
        self, field_values: dict[Any, Any], method: str, weights: Weights | None, defaults: Mapping[str, Any]
    ) -> Change:
        now = {name: field_values[field] for name, field in self.fields.items()}
        new, values = field_values[self.defaults].changed(now, defaults)
        return {self.defaults: new} | self._set_fields(values, method, weights)

    def _set_fields(self, values: Mapping[str, Any], method: str, weights: Weights | None) -> Change:
        """Show the fields of a method, and set some of them."""
        shown: dict[str, dict[str, Any]] = {
            name: {"visible": visible} for name, visible in visible_fields(method, weights).items()
        }
        given: dict[str, dict[str, Any]] = {name: {"value": value} for name, value in values.items()}
        return {self.fields[name]: gr.update(**shown.get(name, {}), **given.get(name, {})) for name in shown | given}

    def load_adapter(self, field_values: dict[Any, Any]) -> Change:
        """Select newly loaded finetuned weights, and plain sampling, which shows their effect best."""
        weights: Weights = field_values[self.weights]
        defaults = defaults_of("base", self.studio.models, weights)
        if weights.reward is not None:
            defaults["reward"] = weights.reward
        change = self._follow(field_values, "base", weights, defaults)
        change |= self._set_fields(
            {"method": "base", "model": weights.model}, "base", weights
        )  # with which the weights fit
        change[self.fields["adapter"]] = gr.update(
            value=True, visible=True, label=f"Finetuned weights: {weights.label}"
        )
        text = f"{weights.label}: press Steer to see images of the same noise before and after."
        return change | {self.status: line(text)}

    def restore(self, path: str, weights: Weights | None) -> Change:
        """Restore the settings of a PNG of this app, or of `steer sample`."""
        try:
            values = fields_from_recipe(read_metadata(Path(path)), self.studio.models, weights)
        except InputError as error:
            return {self.status: line(str(error).replace(path, Path(path).name), "alert")}
        method = values["method"]
        return self._set_fields(values, method, weights) | {
            self.defaults: Defaults(defaults_of(method, self.studio.models, weights)),
            self.status: line(f"Settings of {Path(path).name} restored: press Steer for the same image."),
        }
