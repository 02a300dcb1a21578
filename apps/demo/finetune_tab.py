"""The Finetune tab: train from a reward or preferences, follow the metrics, load the weights into Steer."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from matplotlib.axes import Axes
from PIL import Image

from steer.apps.demo.fields import REWARDS, Defaults, training_field
from steer.apps.demo.labels import label_folder
from steer.apps.demo.markup import RUN_SCRIPT, folded, gallery, table
from steer.apps.demo.pictures import data_uri
from steer.apps.demo.progress import Progress, Throttle
from steer.apps.demo.steering import Loading
from steer.apps.demo.studio import PRIVATE, RUNS, Change, JobTab, Studio, Waiting, Weights, line, plural, whole
from steer.apps.demo.training import (
    ANSWER_TIMEOUT,
    CONFIGURATIONS,
    FROM_LABELS,
    MAX_RANK,
    MAX_UPDATES,
    MODELS,
    Asked,
    Evaluation,
    Trained,
    TrainingRequest,
    Update,
    training,
)
from steer.apps.finetune_report import divergence_panels, grids, read_grid, rewards_panels, series_panels
from steer.apps.finetuning import read_config
from steer.apps.plots import Panel, chart, short
from steer.errors import InputError
from steer.pipelines.training.asking import Question
from steer.pipelines.training.config import TrainingConfig
from steer.pipelines.training.method import Record, TrainingResult
from steer.pipelines.training.model_card import held_out_names
from steer.pipelines.training.state import read_logs

METHODS = {
    "Reward backpropagation": "backprop",
    "D3PO, from a reward": "d3po",
    "PRDP, from a reward": "prdp",
}
DEFAULT_METHOD = "backprop"  # the method that raises its reward within the updates a visitor waits for
DEMO_RATES = {"backprop": 3e-4}  # at its configuration's 1e-3, `scene` falls within 20 updates of 16 images
OF_CHOICES = {"D3PO, from labelled choices": "choices"}
OF_PAIRS = {"Diffusion-DPO, from labelled images": "pairs"}
TRAINED_ON, JUDGED_BY, UPDATES = "aesthetic:scenes", "scene", 30
HELP = (
    "**Reward backpropagation** follows the gradient of the reward with respect to the image: the fastest, and the "
    "first to exploit the reward, which must be differentiable. **D3PO** draws images in pairs and makes the better "
    "one of each likelier. **PRDP** learns by how much one is better than the other. All train a small addition to "
    "the model, a LoRA; the model itself stays as it is. **Choices** are those of the Label tab. Whatever is trained "
    "on loses its meaning when it is pushed for long: so a second reward, which is not trained on, scores images of "
    "prompts that the training never sees."
)
HELD_OUT_INFO = "Never trained on: it shows when the training exploits the other one."


def finetune_fields(studio: Studio) -> dict[str, Any]:
    """Create the components, by the names that `training_request` reads."""
    models, config = [model for model in MODELS if model in studio.models], usual_config(DEFAULT_METHOD)
    rewards = [*dict.fromkeys([*studio.rewards, JUDGED_BY, *REWARDS])]
    methods = METHODS | (OF_CHOICES if studio.label_images is None else OF_PAIRS)
    fields: dict[str, Any] = {"method": gr.Radio([*methods.items()], value=DEFAULT_METHOD, label="Method")}
    for name, label, value, info in (
        ("reward", "Reward", TRAINED_ON, "The score that training raises."),
        ("held_out", "Held-out reward", JUDGED_BY, HELD_OUT_INFO),
    ):
        fields[name] = gr.Dropdown(rewards, value=value, label=label, info=info, allow_custom_value=True)
    fields["updates"] = training_field("max_steps", config, label="Updates", value=UPDATES, maximum=MAX_UPDATES)
    with gr.Accordion("What this does", open=False):
        gr.Markdown(HELP)
    with gr.Accordion("More", open=False):
        fields["learning_rate"] = training_field("learning_rate", config)
        fields["rank"] = training_field("lora_rank", config, label="LoRA rank", maximum=MAX_RANK)
        fields["kl_weight"] = training_field("kl_weight", config, label="KL weight", minimum=0)
        fields["ask"] = training_field("ask", config, label="Ask when the rewards disagree")
        fields["seed"] = training_field("seed", config)
        fields["model"] = gr.Dropdown(models, value=next(iter(models), None), label="Model", visible=len(models) > 1)
    return fields


def usual_config(method: str) -> TrainingConfig:
    """Return a method's configuration, before the changes of a request."""
    config = read_config(CONFIGURATIONS[method]).training
    return replace(config, learning_rate=DEMO_RATES.get(method, config.learning_rate))


def training_request(field_values: Mapping[str, Any], studio: Studio) -> TrainingRequest:
    """Read a request from the fields. Raises InputError, also for rewards that visitors may not use."""
    own: dict[str, Any] = {}
    if field_values["method"] in FROM_LABELS:
        own = {"choices": label_folder(studio), "model": studio.models[0], "ask": False}  # one reward
    if field_values["method"] == "pairs":
        own["kl_weight"] = 0  # this method has no log-probabilities
    asked = TrainingRequest(**{**field_values, **own})
    for spec in [asked.held_out] if own else [asked.reward, asked.held_out]:
        studio.reward(spec)
    return asked


EMPTY_TEXT = "Images of prompts that the training never sees appear here, before the first update and after every few."
ACCURACY = {"accuracy": "pairs put in the right order, share"}
REDRAW_INTERVAL = 1.0  # seconds between two updates of the curves
HIGH = 2  # place in [mean, low, high]
SIDE = 128  # largest side of a picture in pixels


@dataclass
class TrainingView:
    """The records, pictures and status line of a training of `updates` updates.

    frames    the pictures of every evaluation by file, in the form of `gallery`
    question  the question that the run waits for an answer to, if any
    """

    updates: int
    records: list[Record] = field(default_factory=list)
    evaluations: list[Record] = field(default_factory=list)
    frames: dict[Path, tuple[str, str, str]] = field(default_factory=dict)
    trained: Trained | None = None
    question: Question | None = None
    line: str = "Starting …"
    progress: Progress = field(default_factory=Progress)
    _redraws: Throttle = field(default_factory=lambda: Throttle(REDRAW_INTERVAL))

    @classmethod
    def of(cls, folder: Path, updates: int) -> "TrainingView":
        """Read the folder of a run."""
        records, evaluations = read_logs(folder)
        return cls(updates, records, evaluations, {path: _frame(path) for path in grids(folder)})

    @property
    def step(self) -> int:
        return len(self.records)

    @property
    def result(self) -> TrainingResult:
        if self.trained is not None:
            return self.trained.result
        return TrainingResult(self.step, None, None, None, tuple(self.records), tuple(self.evaluations))

    def after(self, event: Any) -> bool:
        """Add an event; return whether the view changes."""
        was_asked, self.question = self.question is not None, None
        match event:
            case Waiting() | Loading():
                self.line = str(event)
            case Evaluation(record, grid):
                self.evaluations.append(record)
                self.frames[grid] = _frame(grid)
                self.line = f"Update {min(self.step + 1, self.updates)} of {self.updates} is being made …"
            case Update(record):
                return self._updated(record) or was_asked
            case Asked(question):
                self.question = question
                self.line = f"Update {self.step} of {self.updates}: the rewards disagree. Continue, or stop?"
            case Trained():
                self.trained = event
            case _:
                raise TypeError(f"no event of a training: {event!r}")
        return True

    def _updated(self, record: Record) -> bool:
        self.records.append(record)
        self.progress.update(self.step / self.updates)
        reward = f", reward {short(record['reward'])}" if "reward" in record else ""
        divergence = f", KL {short(record['kl'])}" if "kl" in record else ""  # not measured in every update
        self.line = f"Update {self.step} of {self.updates}{reward}{divergence}"
        return self._redraws.due() or self.step >= self.updates

    def conclusion(self) -> str:
        """Return the final status: why the training ended, and its results."""
        if self.trained is not None:
            return f"{_describe_end(self.trained.result)} {_describe_outcome(self.trained.result)}".strip()
        if not self.step:
            return "Stopped before the first update."
        return (
            f"Stopped after {self.step} of {self.updates} updates. Nothing is lost: Resume continues, Finish here "
            "exports the present weights."
        )


def _describe_end(result: TrainingResult) -> str:
    updates = plural(result.step, "update")
    seconds = sum(record["seconds"] for record in result.records)
    return f"Ended after {updates}: {result.stopped}." if result.stopped else f"Done: {updates} in {seconds:.0f} s."


def _describe_outcome(result: TrainingResult) -> str:
    """Describe held-out rewards from the first to the last evaluation, and warn about over-optimisation."""
    names = held_out_names(result.evaluations)
    if len(result.evaluations) < 2:
        return ""
    first, last = (
        {name: one[f"eval/{name}"] for name in names} for one in (result.evaluations[0], result.evaluations[-1])
    )
    field_values = "; ".join(f"{name} {first[name][0]:.3f} → {last[name][0]:.3f}" for name in names)
    text = f"On prompts it never saw: {field_values}."
    rose, fell = last[names[0]][0] > first[names[0]][0], last[names[-1]][HIGH] < first[names[-1]][0]
    if rose and fell:
        text += " The trained reward rose and the held-out one fell: it may be exploiting the reward."
    if result.best_step not in (None, 0, result.step):
        text += f" By {names[-1]} it was best after update {result.best_step}: those weights are in the zip as well."
    return text


def samples_view(story: TrainingView, run: str) -> str:
    """Return the held-out images of every evaluation, of which run_view.js shows one; a hint without images.

    run  another name for each training
    """
    frames = [frame for _, frame in sorted(story.frames.items())]
    if not frames:
        return f'<section class="steer-run"><p class="steer-empty">{EMPTY_TEXT}</p></section>'
    names = " · ".join(held_out_names(story.evaluations))
    images = gallery("The same prompts and noise as it learns", frames, f"Below each image: {escape(names)}.")
    return f'<section class="steer-run" data-run="{escape(run, quote=True)}">{images}</section>'


def _frame(grid: Path) -> tuple[str, str, str]:
    """Return the pictures of an evaluation, cut out of its grid, with prompts and rewards, in the form of `gallery`."""
    grid_metadata = read_grid(grid) or {"step": 0, "cells": [], "boxes": []}
    cells = ""
    with Image.open(grid) as whole:
        pixels = whole.convert("RGB")
        for cell, box in zip(grid_metadata["cells"], grid_metadata["boxes"], strict=True):
            picture = pixels.crop(tuple(box))
            picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
            rewards, prompt = " · ".join(map(short, cell["rewards"])), escape(cell["prompt"], quote=True)
            cells += (
                f'<figure class="steer-cell"><img src="{data_uri(picture)}" alt="{prompt}"/>'
                f"<figcaption><b>{rewards}</b><span>{prompt}</span></figcaption></figure>"
            )
    label = "before training" if grid_metadata["step"] == 0 else f"after {grid_metadata['step']} updates"
    return label, "steer-held", cells


def question_view(story: TrainingView) -> str:
    """Return the question of a run with the images of the kept weights and of the present ones; nothing without one."""
    if (question := story.question) is None:
        return ""
    gains = ", ".join(f"{escape(name)} {gain:+.2f}" for name, gain in question.gains.items())
    text = (
        f"The rewards disagree about update {question.step}: {gains}, in standard deviations, since update "
        f"{question.kept_step}. Gain m = {question.mean:+.2f} ± s = {question.deviation:.2f}; asking is worth Δ = "
        f"{question.value:.3f}. <b>Stop</b> ends with the best weights by the held-out reward. Without an answer "
        f"within {ANSWER_TIMEOUT / 60:.0f} minutes the run ends with a checkpoint."
    )
    frames = {path.name: frame for path, frame in story.frames.items()}
    grids = ""
    for title, step in (("Kept", question.kept_step), ("Now", question.step)):
        label, classes, cells = frames.get(f"step-{step:06d}.png", ("", "", ""))
        grids += f'<h3>{title}: {label}</h3><div class="steer-frame {classes}">{cells}</div>'
    return f'<section class="steer-run"><p class="steer-note" role="alert">{text}</p>{grids}</section>'


def charts_view(story: TrainingView, run: str) -> str:
    """Return curves by update, as in the report of the training, and a table of their numbers."""
    if not story.evaluations and not story.records:
        return '<section class="steer-run"></section>'
    result = story.result
    panels = [*rewards_panels(result), *divergence_panels(result, {}), *series_panels(result.records, ACCURACY, {})]
    charts = "".join(chart(_over_updates(panel, story.updates)) for panel in panels)
    return (
        f'<section class="steer-run" data-run="{escape(run, quote=True)}"><div class="steer-charts">{charts}</div>'
        f"{folded('As a table', _table(story))}</section>"
    )


def _over_updates(panel: Panel, updates: int) -> Panel:
    """Extend a panel by update to the end of the training."""

    def draw(axes: Axes) -> None:
        panel(axes)
        if axes.get_xlabel() == "updates":
            axes.set_xlim(0, updates)

    return draw


def _table(story: TrainingView) -> str:
    names, rows = held_out_names(story.evaluations), []
    evaluations, updates = ({one["step"]: one for one in some} for some in (story.evaluations, story.records))
    for step in sorted({*evaluations, *updates}):
        update, evaluation = updates.get(step, {}), evaluations.get(step, {})
        held = [evaluation[f"eval/{name}"][0] if evaluation else None for name in names]
        rows.append([step, *map(update.get, ("reward", "kl", "accuracy")), *held])
    head = ["updates", "reward in training", "KL", "pairs right", *(f"held out: {name}" for name in names)]
    return table("Rewards and KL by update", head, rows)


KEYS = {"--eval-rewards": "the held-out reward", "--reward": "the reward", "--preferences": "the choices"}


@dataclass(frozen=True)
class Run:
    """A visitor's training: the request, its folder, and the result once there is one."""

    training_asked: TrainingRequest
    folder: Path
    trained: Trained | None = None


class FinetuneTab(JobTab):
    """The components and their events; create it inside the app's Blocks.

    A visitor has one training, which resumes from its folder.
    """

    def __init__(self, studio: Studio) -> None:
        self.studio, self.run = studio, gr.State(None)
        self.defaults = gr.State(Defaults({"rate": usual_config(DEFAULT_METHOD).learning_rate}))
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300):
                self.fields = finetune_fields(studio)
                self._job_buttons("Train", "finetune")
                with gr.Row(visible=False, elem_id="finetune-again") as self.again:
                    self.more = gr.Button("Resume", elem_id="finetune-more")
                    self.finish = gr.Button("Finish here", elem_id="finetune-finish")
            with gr.Column(scale=3, min_width=300):
                self.status = gr.HTML(line("Ready."), elem_id="finetune-status")
                with gr.Column(visible=False, elem_id="finetune-asking") as self.asking:
                    self.question = gr.HTML(elem_id="finetune-question")
                    with gr.Row():
                        self.yes = gr.Button("Continue", variant="primary", elem_id="finetune-yes")
                        self.no = gr.Button("Stop", variant="stop", elem_id="finetune-no")
                with gr.Row(visible=False, elem_id="finetune-results") as self.results:
                    self.load = gr.Button("Load into Steer", variant="primary", elem_id="finetune-load")
                    self.archive = gr.DownloadButton("Download (zip)", elem_id="finetune-archive")
                self.samples = gr.HTML(
                    samples_view(TrainingView(0), ""), js_on_load=RUN_SCRIPT, elem_id="finetune-samples"
                )
                self.charts = gr.HTML(js_on_load=RUN_SCRIPT, elem_id="finetune-charts")
        self._connect()

    def _connect(self) -> None:
        fields, shown = self.fields, [self.status, self.samples, self.charts, self.start, self.stop]
        live = self.live = [*shown, self.again, self.finish, self.results, self.archive, self.run]
        live += [self.asking, self.question]
        for button, handler in ((self.yes, self.agree), (self.no, self.decline)):
            button.click(handler, None, self.asking, queue=False, **PRIVATE)  # also while the run has the queue
        self._connect_job(
            self.start.click(self.begin, {*fields.values()}, live, **RUNS),
            self.more.click(self.resume, [self.run, fields["updates"]], live, **RUNS),
            self.finish.click(self.finish_here, self.run, live, **RUNS),
        )
        self.follows = [
            *(fields[name] for name in ("reward", "learning_rate", "ask", "kl_weight", "model")),
            self.defaults,
        ]
        known = [fields["method"], fields["learning_rate"], self.defaults]
        fields["method"].input(self.fit, known, self.follows, **PRIVATE)

    def started_by(self, button: gr.Button, tabs: gr.Tabs) -> None:
        """Connect a button of another tab that opens this tab and trains on the labels."""
        known = [self.fields["learning_rate"], self.defaults]
        chosen = button.click(
            lambda rate, defaults: self.choose_labels(rate, defaults) | {tabs: gr.update(selected="finetune")},
            *(known, [tabs, self.fields["method"], *self.follows]),
            **PRIVATE,
        )
        begun = chosen.then(self.begin, {*self.fields.values()}, self.live, **RUNS)
        begun.failure(self.fail, None, [self.status, self.start, self.stop], **PRIVATE)

    def choose_labels(self, rate: float | None, defaults: Defaults) -> Change:
        """Choose the method that learns from labels."""
        method = "choices" if self.studio.label_images is None else "pairs"
        return self.fit(method, rate, defaults) | {self.fields["method"]: method}

    def begin(self, field_values: dict[Any, Any], request: gr.Request) -> Iterator[Change]:

        def new_run() -> Run:
            asked = training_request(self.values(field_values), self.studio)
            place = self.studio.folder(request) / "finetune"
            return Run(asked, place / f"run-{len([*place.glob('run-*')]) + 1}")

        yield from self._follow(new_run, request, resume=False)

    def resume(self, run: Run, updates: float | None, request: gr.Request) -> Iterator[Change]:
        """Resume the training up to the number of updates in the field."""

        def longer_run() -> Run:
            return Run(replace(run.training_asked, updates=whole("updates", updates)), run.folder)

        yield from self._follow(longer_run, request, resume=True)

    def finish_here(self, run: Run, request: gr.Request) -> Iterator[Change]:
        """End the training after the updates made so far."""
        yield from self.resume(run, len(read_logs(run.folder)[0]), request)

    def agree(self, request: gr.Request) -> Change:
        """Let the visitor's run continue after its question."""
        self.studio.answer(request, True)
        return {self.asking: gr.update(visible=False)}

    def decline(self, request: gr.Request) -> Change:
        """End the visitor's run after its question, with the best weights."""
        self.studio.answer(request, False)
        return {self.asking: gr.update(visible=False)}

    def _follow(self, make_run: Callable[[], Run], request: gr.Request, resume: bool) -> Iterator[Change]:
        """Show a training from its place in the queue to its end."""
        try:
            run = make_run()
            asked = run.training_asked
            ticket = self.studio.begin(request, training(asked, run.folder, self.studio, resume))
        except InputError as error:
            yield self._refused(error)
            return
        story = TrainingView.of(run.folder, asked.updates)
        yield self._view_updates(story, run) | self._buttons(run, running=True) | {self.status: line(story.line)}
        try:
            for event in ticket.events():
                if story.after(event):
                    view = self._view_updates(story, run, isinstance(event, Evaluation))
                    waits = story.question is not None  # for an answer, for no time that can be estimated
                    yield view | {self.status: line(story.line) if waits else story.progress.status(story.line)}
            if story.trained is None:
                story = TrainingView.of(run.folder, asked.updates)  # with the updates after the last event
            run = replace(run, trained=story.trained)
            yield self._view_updates(story, run) | {self.status: line(story.conclusion())}
        except InputError as error:
            yield self._refused(error, run.folder)
        yield self._buttons(run)

    def _view_updates(self, story: TrainingView, run: Run, whole: bool = True) -> Change:
        charts: Change = {self.charts: charts_view(story, run.folder.name), self.question: question_view(story)}
        charts |= {self.asking: gr.update(visible=story.question is not None)}
        return charts | ({self.samples: samples_view(story, run.folder.name)} if whole else {})

    def _buttons(self, run: Run, running: bool = False) -> Change:
        """Enable the buttons that apply to this training now."""
        trained = run.trained
        return self.running(running) | {
            self.run: run,
            self.again: gr.update(visible=not running and (run.folder / "checkpoints").exists()),
            self.finish: gr.update(visible=trained is None and bool(read_logs(run.folder)[0])),
            self.results: gr.update(visible=trained is not None and not running),
            self.archive: gr.update(value=str(trained.archive) if trained else None),
        }

    def _refused(self, error: InputError, *folders: Path) -> Change:
        """Show the reason for a refusal, with the names of the fields."""
        text = str(error)
        for folder in (*folders, label_folder(self.studio)):
            text = text.replace(f"{folder}/", "").replace(str(folder), "the folder")
        for key, name in KEYS.items():
            text = text.replace(key, name)
        return self.refuse(text)

    def loaded(self, weights: gr.State, tabs: gr.Tabs) -> None:
        """Connect the button that loads the weights into the Steer tab."""
        self.load.click(self.lend, self.run, [weights, tabs], **PRIVATE)

    def lend(self, run: Run) -> tuple[Weights, Change]:
        """Load the weights into the Steer tab, and open it."""
        assert run.trained is not None
        return run.trained.weights, gr.update(selected="steer")

    def fit(self, method: str, rate: float | None, defaults: Defaults) -> Change:
        """Set the fields that depend on the method, but not a learning rate that the visitor has set."""
        choices, model = method in FROM_LABELS, self.fields["model"]
        new, follows = defaults.changed({"rate": rate}, {"rate": usual_config(method).learning_rate})
        return {
            self.fields["reward"]: gr.update(visible=not choices),
            self.fields["ask"]: gr.update(visible=not choices),
            self.fields["kl_weight"]: gr.update(visible=method != "pairs"),
            self.fields["learning_rate"]: gr.update(value=follows.get("rate", rate)),
            self.defaults: new,
            model: gr.update(visible=not choices and len(model.choices) > 1),
        }
