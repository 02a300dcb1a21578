"""The Steer tab: a prompt, the particles while they are steered, and the finished images."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

import gradio as gr

from steer.apps.demo.estimate import Paces
from steer.apps.demo.fields import DEFAULTS, EXAMPLE, REWARDS, Defaults, read_settings, setting_field
from steer.apps.demo.history import STOPPED
from steer.apps.demo.markup import RUN_SCRIPT, table
from steer.apps.demo.pictures import as_png
from steer.apps.demo.run_view import RunView, run_view
from steer.apps.demo.steer_options import RewardChips, image_fields, image_settings, lora_fields, uploaded_loras
from steer.apps.demo.steering import Frame, PromptResult, as_command, as_python, steering
from steer.apps.demo.studio import (
    PRIVATE,
    RANDOM,
    RUNS,
    Change,
    JobTab,
    Studio,
    Weights,
    guarded,
    line,
    prompts_in,
    seed_of,
    warning,
    write_zip,
)
from steer.apps.methods import METHODS
from steer.apps.plots import short
from steer.apps.recipes import Recipe, read_metadata
from steer.apps.sampling import SavedImage
from steer.apps.settings import SamplingConfig, default_of, option_names
from steer.assets import MODELS
from steer.errors import InputError
from steer.pipelines.base import Cost
from steer.rewards.scene import COLOURS, PLURALS

EXAMPLES = (EXAMPLE, "a red circle left of a blue star", "two yellow squares and a black cross")
KEYS_SCRIPT = (Path(__file__).parent / "keys.js").read_text()
MAX_PROMPTS = 4  # prompts of one visitor on a shared machine
SETTINGS = ("method", "reward", "particles", "lam", "steps", "guidance", "iterations", "seed", "model", "compare")
ONE_STEP = "scenes-turbo"


def drawable(model: str) -> str:
    """Describe the prompts that a model understands."""
    if model not in MODELS:
        return ""
    shapes, colours = (", ".join(names[:-1]) + f" or {names[-1]}" for names in ([*PLURALS], [*COLOURS]))
    return f"{model} draws one to four {shapes}, each {colours}, with and, left of, right of, above or below."


def prompt_info(model: str) -> str:
    """Return the hint of the prompts' field."""
    return f"One a line, up to {MAX_PROMPTS}. Ctrl+Enter runs. {drawable(model)}"


def steer_fields(studio: Studio) -> dict[str, Any]:
    """Create the components of the settings, by the names that `settings_of` reads."""
    rewards = [*dict.fromkeys([*studio.rewards, *REWARDS])]
    fields: dict[str, Any] = {
        "method": gr.Dropdown(
            [(one.label, name) for name, one in METHODS.items()],
            value="race",
            label="Method",
            info=METHODS["race"].hint,
            elem_id="steer-method",
        ),
        "reward": setting_field(
            "reward",
            choices=rewards,
            value=rewards[0],
            allow_custom_value=True,
            info="To be maximised. Add several with +, weight one with :0.5.",
        ),
    }
    for names in (("particles", "lam"), ("steps", "guidance")):
        with gr.Row():
            own: dict[str, dict[str, Any]] = {"lam": {"visible": False}}
            own["particles"] = {"value": default_of("race", "num_particles")}
            fields |= {name: setting_field(name, **own.get(name, {})) for name in names}
    fields["auto"] = gr.Checkbox(
        True, label="Choose the strength by the first rewards", visible=False, elem_id="steer-auto"
    )
    fields["iterations"] = setting_field("iterations", visible=False)
    with gr.Row():
        fields["seed"] = setting_field("seed", info="−1: a new one for every run")
        fields["fresh"] = gr.Checkbox(False, label="A new seed for every run")
    with gr.Accordion("Model and comparison", open=len(studio.models) > 1):
        fields["model"] = setting_field("model", choices=[*studio.models], value=studio.models[0], info=None)
        fields["compare"] = setting_field("compare", label="Also make the base images of the same seed", info=None)
        fields["adapter"] = gr.Checkbox(False, label="Finetuned weights", visible=False, elem_id="steer-adapter")
    fields |= image_fields() | lora_fields()
    return fields


def settings_of(asked: Mapping[str, Any], weights: Weights | None = None) -> SamplingConfig:
    """Read the settings from the fields, with the weights that the visitor loaded.

    Raises InputError for numbers beyond the limits of this app.
    """
    adapters = [_adapter_path(asked["model"], weights) if asked["adapter"] else None, uploaded_loras(asked)]
    more = {"seed": seed_of(asked["seed"], asked["fresh"]), "lora": " + ".join(filter(None, adapters)) or None}
    more |= {"beams": 2 - (asked["particles"] or 0) % 2} if asked["method"] == "beam" else {}
    return read_settings(asked, SETTINGS, **more, **image_settings(asked))


def _adapter_path(model: str, weights: Weights | None) -> str:
    """Return the path of the finetuned weights for the settings. Raises InputError if they do not match the model."""
    if weights is None:
        raise InputError("no finetuned weights are loaded here: train some in the Finetune tab")
    if weights.model != model:
        raise InputError(f"the finetuned weights are those of {weights.model}: choose that model, or switch them off")
    return weights.archive_path


def prompts_of(text: str) -> list[str]:
    """Read the prompts of a field, one per line. Raises InputError for none, or too many."""
    if prompts := prompts_in(text, MAX_PROMPTS):
        return prompts
    raise InputError("the prompt is empty: say what the image should show")


def fields_from_recipe(recipe: Recipe, models: Sequence[str], weights: Weights | None = None) -> dict[str, Any]:
    """Restore the fields from a recipe. Raises InputError if a setting has no field."""
    return fields_from_settings(recipe.prompt, recipe.settings, models, weights)


def fields_from_settings(
    prompt: str, settings: SamplingConfig, models: Sequence[str], weights: Weights | None = None
) -> dict[str, Any]:
    """Restore the fields from settings. Raises InputError if a setting has no field."""
    first = settings.plain()
    if settings.model not in models:
        what = f"model {settings.model!r:.80}"
        raise InputError(f"it was made with {what}, which this app does not have: use `steer sample --replay`")
    asked = {name: first.get(name, DEFAULTS.get(name)) for name in SETTINGS}
    asked |= {"prompts": prompt, "fresh": False, "adapter": settings.lora is not None}
    asked["auto"] = settings.method != "fk" or first["lam"] == "auto"
    asked |= {"lam": DEFAULTS["lam"]} if asked["auto"] else {}
    asked |= {name: first[name] or "" for name in ("negative_prompt", "scheduler")}
    asked |= {name: first[name] or 0 for name in ("height", "width")} | {"loras": None, "lora_weights": ""}
    asked |= {"steps": settings.steps or 1, "guidance": settings.guidance or 0.0}
    again = settings_of(asked, weights).plain()
    for name, value in first.items():
        if again[name] != value:
            raise InputError(f"it was made with {name} {value!r}, which has no field here: use `steer sample --replay`")
    return asked


def defaults_of(method: str, models: Sequence[str], weights: Weights | None = None) -> dict[str, Any]:
    """Return default values of the fields that depend on the method: some methods are for one-step models.

    The other methods use finetuned weights if some are loaded.
    """
    own = {"particles": default_of(method, "num_particles")}
    if METHODS[method].is_iterative:  # such a method makes many images, with a one-step model if there is one
        model = weights.model if weights else models[0]
        return own | {"steps": 1, "guidance": 0, "model": ONE_STEP if ONE_STEP in models else model, "adapter": False}
    if weights:
        return own | {"steps": weights.steps, "guidance": weights.guidance, "model": weights.model, "adapter": True}
    return own | {"steps": DEFAULTS["steps"], "guidance": DEFAULTS["guidance"], "model": models[0], "adapter": False}


def visible_fields(method: str, weights: Weights | None = None) -> dict[str, bool]:
    """Return the visibility of the fields that not all methods have."""
    own = {"lam": method == "fk", "auto": method == "fk", "iterations": "iterations" in option_names(method)}
    return own | {"compare": method != "base" or weights is not None, "adapter": weights is not None}


class Results:
    """The components of the results, hidden until there are results."""

    def __init__(self) -> None:
        with gr.Column(visible=False, elem_id="steer-results") as self.box:
            self.chooser = gr.Radio([], label="Prompt", visible=False, elem_id="steer-chooser")
            files: dict[str, Any] = {"type": "filepath", "format": "png", "interactive": False}
            self.slider = gr.ImageSlider(max_height=420, elem_id="steer-slider", **files)
            shown: dict[str, Any] = {"columns": 4, "height": "auto", "object_fit": "contain"}
            shown["buttons"] = ["download", "fullscreen"]  # buttons of a clicked image; arrow keys show the next one
            self.images = gr.Gallery(label="Images, best first", elem_id="steer-images", **shown, **files)
            self.gallery = gr.Gallery(label="Base images", elem_id="steer-base", **shown, **files)
            self.archive = gr.DownloadButton("Download all images (zip)", size="sm", elem_id="steer-archive")
            self.table = gr.HTML(elem_id="steer-rewards")
            with gr.Accordion("Images, each with its settings inside", open=False):
                self.files = gr.File(show_label=False, file_count="multiple", interactive=False, elem_id="steer-files")
            with gr.Accordion("The same outside this app", open=False):
                self.command = gr.Code(label="Command", language="shell", interactive=False, wrap_lines=True)
                self.python = gr.Code(label="Python", language="python", interactive=False)

    @property
    def components(self) -> list[Any]:
        pictures = [self.slider, self.images, self.gallery, self.archive]
        return [self.box, self.chooser, *pictures, self.table, self.files, self.command, self.python]

    def updates(self, finished: Sequence[PromptResult], place: int = 0) -> dict[Any, Any]:
        """Show one of the finished prompts, and offer the others."""
        one = finished[place]
        pair, summary = compared(one), escape(describe_means(one) + describe_cost(one))
        label = "Images" if one.settings.method == "base" else "Images, best first"  # plain sampling does not sort
        choices = [(f"{number + 1}. {each.prompt}", number) for number, each in enumerate(finished)]
        return {
            self.box: gr.update(visible=True),
            self.chooser: gr.update(choices=choices, value=place, visible=len(finished) > 1),
            self.slider: gr.update(
                value=pair and tuple(str(picture.path) for picture in pair),
                visible=pair is not None,
                label=pair and sides(one, *pair),
            ),
            self.images: gr.update(value=image_captions(one), label=label),
            self.gallery: gr.update(value=base_captions(one), visible=bool(one.base)),
            self.archive: str(archive_of(one)),
            self.table: f'{rewards_table(one)}<p class="steer-summary">{summary}</p>',
            self.files: [str(picture.path) for picture in (*one.images, *one.base)],
            self.command: as_command(one.prompt, one.settings),
            self.python: as_python(one.prompt, one.settings),
        }


def compared(made: PromptResult) -> tuple[SavedImage, SavedImage] | None:
    """Return both sides of the slider: the best base image and the best of as many images, by the same reward.

    Plain sampling does not sort: with finetuned weights the sides are the same noise before and after. None without
    base images, and for best of N, whose image is itself the best base image.
    """
    if not made.base or (made.settings.method == "best-of-n" and made.base_cost is None):
        return None
    if made.settings.method == "base":
        return made.base[0], made.images[0]
    return best(made.base), best(made.images)


def best(pictures: Sequence[SavedImage]) -> SavedImage:
    """Return the image with the highest reward; among equals, the first."""
    return max(pictures, key=lambda one: one.recipe.reward)


def sides(made: PromptResult, left: SavedImage, right: SavedImage) -> str:
    """Describe the two sides of the slider."""
    steered, finetuned = made.settings.method != "base", made.settings.lora is not None
    kind = "finetuned, and steered" if steered and finetuned else "finetuned" if finetuned else "steered"
    of = f"the best of {len(made.images)} each" if steered else "the same noise"
    rewards = f"{short(left.recipe.reward)} and {short(right.recipe.reward)}"
    return f"Left: base model, right: {kind} ({of}; rewards {rewards})"


def image_captions(made: PromptResult) -> list[tuple[str, str]]:
    """Return every image with its rank and reward."""
    return [(str(one.path), f"{rank + 1}: {short(one.recipe.reward)}") for rank, one in enumerate(made.images)]


def archive_of(made: PromptResult) -> Path:
    """Zip all images of a prompt into a file beside them, once."""
    files = [picture.path for picture in (*made.images, *made.base)]
    folder, name = files[0].parent, files[0].stem.removesuffix("-00")
    path = folder / f"{name}.zip"
    return path if path.is_file() else write_zip(path, folder, files, name)


def base_captions(made: PromptResult) -> list[tuple[str, str]]:
    """Return every base image with its number and reward, the best with a star."""
    top = best(made.base) if made.base else None
    return [
        (str(one.path), f"{'★ ' if one is top else ''}base {slot + 1}: {short(one.recipe.reward)}")
        for slot, one in enumerate(made.base)
    ]


def rewards_table(made: PromptResult) -> str:
    """Return a table of every image's reward and components: steered images best first, then base images."""
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
    """Compare the mean rewards in a sentence, if there are base images."""
    if not made.base:
        return ""
    before, after = (fmean(one.recipe.reward for one in pictures) for pictures in (made.base, made.images))
    first, last = (short(best(pictures).recipe.reward) for pictures in (made.base, made.images))
    same = " Best of N picks among the base images: its first is the best of them." if compared(made) is None else ""
    text = f"Mean reward: {short(after)}, of the base images {short(before)}. Best: {last}, of the base images {first}."
    return f"{text}{same} "


def total_cost(made: PromptResult) -> tuple[int, float]:
    """Return denoiser evaluations and seconds of a prompt, including its base images."""
    costs = [cost for cost in (made.cost, made.base_cost) if cost is not None]
    return sum(cost.nfe for cost in costs), sum(cost.seconds for cost in costs)


def describe_cost(made: PromptResult) -> str:
    """Describe the cost in a sentence."""
    base = f"; the base images beside them {_cost(made.base_cost)}" if made.base_cost else ""
    return f"Cost: {_cost(made.cost)}{base}. Seed {made.settings.seed}."


def _cost(cost: Cost) -> str:
    gradients = f", {cost.gradients} gradients" if cost.gradients else ""
    scored = f"{cost.decodes} images decoded, {cost.reward_calls} scored{gradients}"
    return f"{cost.nfe} denoiser evaluations, {scored}, {cost.seconds:.1f} s"


class SteerTab(JobTab):
    """The components and their events; create it inside the app's Blocks.

    `weights` holds the finetuned Weights that the visitor loaded, or None; `defaults` the Defaults of the fields.
    """

    def __init__(self, studio: Studio) -> None:
        self.studio, self.finished, self.weights, self.paces = studio, gr.State(()), gr.State(None), Paces()
        with gr.Row(equal_height=False, elem_id="steer-top"):
            with gr.Column(scale=3, min_width=300):
                look: dict[str, Any] = {"label": "Prompt", "info": prompt_info(studio.models[0]), "lines": 2}
                prompts = gr.Textbox(EXAMPLE, max_lines=MAX_PROMPTS, elem_id="steer-prompts", **look)
                if studio.models[0] in MODELS:
                    gr.Examples([[one] for one in EXAMPLES], [prompts], label="Examples", api_visibility="private")
            with gr.Column(scale=2, min_width=300):
                self._job_buttons("Steer", "steer")
                self.status = gr.HTML(line("Ready."), js_on_load=KEYS_SCRIPT, elem_id="steer-status")
                self.estimate = gr.HTML(elem_id="steer-estimate")
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=300):
                self.results = Results()
                self.view = gr.HTML(run_view((), None), js_on_load=RUN_SCRIPT, elem_id="steer-view")
            with gr.Column(scale=2, min_width=300):
                self.above_fields = gr.Row(equal_height=False, elem_id="steer-presets")
                self.fields = {"prompts": prompts} | steer_fields(studio)
                first = defaults_of(self.fields["method"].value, studio.models)
                self.defaults = gr.State(Defaults(first | {"reward": self.fields["reward"].value}))
                self.chips = RewardChips(self.fields["reward"], studio.rewards)
                label = "Restore the settings of an image"
                self.dropped = gr.File(label=label, file_types=[".png"], height=160, elem_id="steer-drop")
        values = {field: field.value for field in self.fields.values()} | {self.weights: None}
        self.estimate.value = self.describe_cost(values)
        self._connect()

    def _connect(self) -> None:
        fields, seed = self.fields, (self.fields["seed"], self.fields["fresh"])
        live = [
            self.status,
            self.estimate,
            self.view,
            self.start,
            self.stop,
            self.finished,
            *seed,
            *self.results.components,
        ]
        asked = {*fields.values(), self.weights}
        self._connect_job(self.start.click(self.run, asked, live, **RUNS))
        follows, known = (
            [self.status, self.defaults, *fields.values(), *self.chips.components],
            {self.weights, self.defaults, *fields.values()},
        )
        fields["method"].input(self.fit, known, follows, **PRIVATE)
        self.weights.change(self.load_adapter, known, follows, **PRIVATE)
        self.dropped.upload(self.restore, [self.dropped, self.weights], follows, **PRIVATE)
        costs = [fields[name].change for name in ("prompts", "particles", "steps", "iterations", "compare")]
        costs += [fields[name].change for name in ("method", "model")]
        gr.on(costs, self.describe_cost, {*fields.values(), self.weights}, self.estimate, trigger_mode="always_last",
              queue=False, **PRIVATE)  # fmt: skip
        fields["model"].change(lambda model: gr.update(info=prompt_info(model)), fields["model"], fields["prompts"],
                               queue=False, **PRIVATE)  # fmt: skip
        chosen = [self.results.chooser, self.finished]
        self.results.chooser.input(self.show, chosen, [self.view, *self.results.components], **PRIVATE)

    @guarded
    def run(self, field_values: dict[Any, Any], request: gr.Request) -> Iterator[Change]:
        asked, weights = self.values(field_values), field_values[self.weights]
        prompts, settings = prompts_of(asked["prompts"]), settings_of(asked, weights)
        work = steering(self.studio, prompts, settings, self.studio.run_folder(request), weights, asked["loras"] or ())
        ticket, state = self.studio.begin(request, work), RunView()
        yield {
            self.fields["seed"]: settings.seed,
            self.fields["fresh"]: bool(asked["fresh"]) or asked["seed"] == RANDOM,
            self.view: run_view((), None),
            self.results.box: gr.update(visible=False),
        }
        for event in ticket.events():
            if isinstance(event, PromptResult):
                self.remember(request, event)
            if state.after(event):
                view = (
                    {self.view: run_view(state.frames, state.made)} if isinstance(event, Frame | PromptResult) else {}
                )
                yield {self.status: state.status, **view}
        if ticket.stopped and state.made is None:
            self.remember_previews(request, prompts[len(state.finished)], settings, state.frames)
        yield {self.status: line(state.conclusion(ticket.stopped)), self.finished: state.finished}
        for one in state.finished:
            self.paces.add(settings, *total_cost(one))
        if state.finished:
            yield self.show(0, state.finished) | {self.estimate: self.describe_cost(field_values)}

    def describe_cost(self, field_values: dict[Any, Any]) -> str:
        """Describe the cost of a run with the current fields; nothing if they are invalid."""
        asked = self.values(field_values) | {"seed": 0}
        try:
            prompts, settings = prompts_of(asked["prompts"]), settings_of(asked, field_values[self.weights])
        except InputError:
            return ""
        return f'<p class="steer-note">{self.paces.describe(settings, len(prompts))}</p>'

    def remember(self, request: gr.Request, made: PromptResult) -> None:
        """Add a finished prompt to the history."""
        with warning():
            self.studio.history.record(str(request.session_hash), made.images, made.base, made.cost.seconds)

    def remember_previews(
        self, request: gr.Request, prompt: str, settings: SamplingConfig, frames: Sequence[Frame]
    ) -> None:
        """Add a stopped prompt to the history: its last previews that all have rewards, if any."""
        for frame in reversed(frames):
            if len(frame.known) == len(frame.images):
                stopped = settings.plain() | {STOPPED: f"{frame.name} of {frame.total}"}
                pngs = [as_png(image) for image in frame.images]
                with warning():
                    self.studio.history.keep(str(request.session_hash), prompt, stopped, pngs, frame.rewards)
                return

    def show(self, place: int, finished: tuple[PromptResult, ...]) -> Change:
        return {self.view: run_view(finished[place].frames, finished[place]), **self.results.updates(finished, place)}

    def fit(self, field_values: dict[Any, Any]) -> Change:
        """Set the fields that depend on the method, but not those that the visitor has set."""
        method, weights = field_values[self.fields["method"]], field_values[self.weights]
        return self._follow(field_values, method, weights, defaults_of(method, self.studio.models, weights))

    def _follow(
        self, field_values: dict[Any, Any], method: str, weights: Weights | None, defaults: Mapping[str, Any]
    ) -> Change:
        new, values = field_values[self.defaults].changed(self.values(field_values), defaults)
        return {self.defaults: new} | self._set_fields(values, method, weights)

    def _set_fields(self, values: Mapping[str, Any], method: str, weights: Weights | None) -> Change:
        """Show the fields of a method, and set some of them."""
        changes = {name: {"value": value} for name, value in values.items()}
        for name, visible in visible_fields(method, weights).items():
            changes.setdefault(name, {})["visible"] = visible
        changes.setdefault("method", {})["info"] = METHODS[method].hint
        chips = self.chips.clear() if "reward" in values else {}
        return chips | {self.fields[name]: gr.update(**change) for name, change in changes.items()}

    def load_adapter(self, field_values: dict[Any, Any]) -> Change:
        """Select newly loaded finetuned weights, and plain sampling, which shows their effect best."""
        weights: Weights = field_values[self.weights]
        defaults = defaults_of("base", self.studio.models, weights)
        if weights.reward is not None:
            defaults["reward"] = weights.reward
        fitting = {"method": "base", "model": weights.model, "adapter": True}
        change = self._follow(field_values, "base", weights, defaults) | self._set_fields(fitting, "base", weights)
        change[self.fields["adapter"]]["label"] = f"Finetuned weights: {weights.label}"
        text = f"{weights.label}: press Steer to see images of the same noise before and after."
        return change | {self.status: line(text)}

    def restore(self, path: str, weights: Weights | None) -> Change:
        """Restore the settings of a PNG of this app, or of `steer sample`."""
        try:
            values = fields_from_recipe(read_metadata(Path(path)), self.studio.models, weights)
        except InputError as error:
            return {self.status: line(str(error).replace(path, Path(path).name), "alert")}
        return self.fill(values, weights, f"Settings of {Path(path).name} restored: press Steer for the same image.")

    def fill(self, values: Mapping[str, Any], weights: Weights | None, text: str) -> Change:
        """Set all fields, and the status."""
        method = values["method"]
        return self._set_fields(values, method, weights) | {
            self.defaults: Defaults(defaults_of(method, self.studio.models, weights)),
            self.status: line(text),
        }
