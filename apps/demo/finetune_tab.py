"""The Finetune tab: a model learns from a reward or from choices, is watched, and goes on to the Steer tab."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from steer.apps.demo.finetune_fields import asked_of, finetune_fields, usual_rate
from steer.apps.demo.finetune_view import Story, charts_view, samples_view, updates_made
from steer.apps.demo.label_folder import label_folder
from steer.apps.demo.page import FAILED, PRIVATE, Change, line, public, whole
from steer.apps.demo.steer_fields import Defaults
from steer.apps.demo.studio import Studio
from steer.apps.demo.training import Asked, Evaluation, Trained, training
from steer.apps.demo.weights import Weights
from steer.apps.demo.worker import Ticket
from steer.errors import InputError

HERE = Path(__file__).parent
KEYS = {"--eval-rewards": "the held-out reward", "--reward": "the reward", "--choices": "the choices"}


@dataclass(frozen=True)
class Run:
    """A visitor's training: what they asked for, its folder, and its end, once there is one."""

    asked: Asked
    folder: Path
    trained: Trained | None = None


class FinetuneTab:
    """Its components and what they do; to be made inside the app's Blocks.

    A visitor has one training, which goes on from its folder.
    """

    def __init__(self, studio: Studio) -> None:
        self.studio, self.run, self.usual = studio, gr.State(None), gr.State(Defaults({"rate": usual_rate("d3po")}))
        script = (HERE / "run_view.js").read_text()
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300):
                self.fields = finetune_fields(studio)
                with gr.Row():
                    self.start = gr.Button("Train", variant="primary", elem_id="finetune-start")
                    self.stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="finetune-stop")
                with gr.Row(visible=False, elem_id="finetune-again") as self.again:
                    self.more = gr.Button("Go on", elem_id="finetune-more")
                    self.finish = gr.Button("Finish here", elem_id="finetune-finish")
            with gr.Column(scale=3, min_width=300):
                self.status = gr.HTML(line("Ready."), elem_id="finetune-status")
                with gr.Row(visible=False, elem_id="finetune-results") as self.results:
                    self.load = gr.Button("Load into Steer", variant="primary", elem_id="finetune-load")
                    self.archive = gr.DownloadButton("Download (zip)", elem_id="finetune-archive")
                self.samples = gr.HTML(samples_view(Story(0), ""), js_on_load=script, elem_id="finetune-samples")
                self.charts = gr.HTML(js_on_load=script, elem_id="finetune-charts")
        self._connect()

    def _connect(self) -> None:
        fields, seen = self.fields, [self.status, self.samples, self.charts, self.start, self.stop]
        live = [*seen, self.again, self.finish, self.results, self.archive, self.run]
        for ran in (
            self.start.click(self.begin, {*fields.values()}, live, concurrency_limit=None, **PRIVATE),
            self.more.click(self.go_on, [self.run, fields["updates"]], live, concurrency_limit=None, **PRIVATE),
            self.finish.click(self.finish_here, self.run, live, concurrency_limit=None, **PRIVATE),
        ):
            ran.failure(self.fail, None, [self.status, self.start, self.stop], **PRIVATE)
        self.stop.click(self.studio.stop, None, None, queue=False, **PRIVATE)
        follows = [*(fields[name] for name in ("reward", "learning_rate", "model")), self.usual]
        known = [fields["method"], fields["learning_rate"], self.usual]
        fields["method"].input(self.fit, known, follows, **PRIVATE)

    def begin(self, told: dict[Any, Any], request: gr.Request) -> Iterator[Change]:
        """A new training, shown as it goes."""
        try:
            asked = asked_of({name: told[field] for name, field in self.fields.items()}, self.studio)
            place = self.studio.folder(request) / "finetune"
            run = Run(asked, place / f"run-{len([*place.glob('run-*')]) + 1}")
            ticket = self.studio.begin(request, training(asked, run.folder, self.studio, resume=False))
        except InputError as error:
            yield self._refused(error)
        else:
            yield from self._follow(run, ticket)

    def fail(self) -> Change:
        """After an error that a training does not know, and for fields whose values Gradio refuses."""
        ready = {self.start: gr.update(interactive=True), self.stop: gr.update(interactive=False)}
        return ready | {self.status: line(FAILED, "alert")}

    def go_on(self, run: Run, updates: float | None, request: gr.Request) -> Iterator[Change]:
        """The training from where it was, to as many updates as the field asks for now."""
        try:
            asked = replace(run.asked, updates=whole("updates", updates))
            ticket = self.studio.begin(request, training(asked, run.folder, self.studio, resume=True))
        except InputError as error:
            yield self._refused(error)
        else:
            yield from self._follow(Run(asked, run.folder), ticket)

    def finish_here(self, run: Run, request: gr.Request) -> Iterator[Change]:
        """The training's end, after the updates that were made."""
        yield from self.go_on(run, updates_made(run.folder), request)

    def _follow(self, run: Run, ticket: Ticket) -> Iterator[Change]:
        """A training from its turn in the queue to its end."""
        story = Story.of(run.folder, run.asked.updates)
        yield self._drawn(story, run) | self._buttons(run, running=True) | {self.status: line(story.line)}
        try:
            for event in ticket.events():
                if story.after(event):
                    yield self._drawn(story, run, isinstance(event, Evaluation)) | {self.status: _progress(story)}
            if story.trained is None:
                story = Story.of(run.folder, run.asked.updates)  # with what was made after the last event
            run = replace(run, trained=story.trained)
            yield self._drawn(story, run) | {self.status: line(story.conclusion())}
        except InputError as error:
            yield self._refused(error, run.folder)
        yield self._buttons(run)

    def _drawn(self, story: Story, run: Run, whole: bool = True) -> Change:
        charts: Change = {self.charts: charts_view(story, run.folder.name)}
        return charts | ({self.samples: samples_view(story, run.folder.name)} if whole else {})

    def _buttons(self, run: Run, running: bool = False) -> Change:
        """What can be pressed now, of this training."""
        trained = run.trained
        return {
            self.run: run,
            self.start: gr.update(interactive=not running),
            self.stop: gr.update(interactive=running),
            self.again: gr.update(visible=not running and (run.folder / "checkpoints").exists()),
            self.finish: gr.update(visible=trained is None and updates_made(run.folder) > 0),
            self.results: gr.update(visible=trained is not None and not running),
            self.archive: gr.update(value=str(trained.archive) if trained else None),
        }

    def _refused(self, error: InputError, *folders: Path) -> Change:
        """Says why not, where it is seen at once, and where it stays; without places on the owner's disk."""
        text = str(error)
        for folder in (*folders, label_folder(self.studio)):
            text = text.replace(f"{folder}/", "").replace(str(folder), "the folder")
        for key, name in KEYS.items():
            text = text.replace(key, name)
        text = public(text)
        gr.Warning(escape(text))
        return {self.status: line(text, "alert")}

    def loaded(self, weights: gr.State, tabs: gr.Tabs) -> None:
        """Says where finetuned weights go when they are loaded, and where the tab is that then wears them."""
        self.load.click(self.lend, self.run, [weights, tabs], **PRIVATE)

    def lend(self, run: Run) -> tuple[Weights, Change]:
        """Hands the weights to the Steer tab, and opens it."""
        assert run.trained is not None
        return run.trained.weights, gr.update(selected="steer")

    def fit(self, method: str, rate: float | None, usual: Defaults) -> Change:
        """Other fields follow the method, but for a learning rate that the visitor has set."""
        choices, model = method == "choices", self.fields["model"]
        new, follows = usual.changed({"rate": rate}, {"rate": usual_rate(method)})
        return {
            self.fields["reward"]: gr.update(visible=not choices),
            self.fields["learning_rate"]: gr.update(value=follows.get("rate", rate)),
            self.usual: new,
            model: gr.update(visible=not choices and len(model.choices) > 1),
        }


def _progress(story: Story) -> str:
    """The line, and how much is done as a bar."""
    size = f'max="{story.updates}" value="{story.step}"'
    return f'{line(story.line)}<progress class="steer-progress" aria-label="Updates made" {size}></progress>'
