"""The Steer tab: a prompt, the particles while they are steered, and what came out."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from steer.apps.demo.page import PRIVATE, Change, line
from steer.apps.demo.results import Results
from steer.apps.demo.run_view import run_view
from steer.apps.demo.seen import Finished, Seen
from steer.apps.demo.steer_fields import fitting, prompts_of, restored, settings_of, steer_fields
from steer.apps.demo.steering import Frame, Made, steering
from steer.apps.demo.studio import Studio
from steer.apps.demo.weights import Weights
from steer.apps.png_metadata import read_metadata
from steer.errors import InputError

HERE = Path(__file__).parent


class SteerTab:
    """Its components and what they do; to be made inside the app's Blocks.

    `weights` holds the finetuned Weights that the visitor loaded, None before.
    """

    def __init__(self, studio: Studio) -> None:
        self.studio, self.finished, self.weights = studio, gr.State(()), gr.State(None)
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300):
                self.fields = steer_fields(studio)
                with gr.Row():
                    self.start = gr.Button("Steer", variant="primary", elem_id="steer-start")
                    self.stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="steer-stop")
                label = "Drop an image that was made here: its settings come back"
                self.dropped = gr.File(label=label, file_types=[".png"], height=160, elem_id="steer-drop")
            with gr.Column(scale=3, min_width=300):
                self.status = gr.HTML(line("Ready."), elem_id="steer-status")
                script = (HERE / "run_view.js").read_text()
                self.view = gr.HTML(run_view((), None), js_on_load=script, elem_id="steer-view")
                self.results = Results()
        self._connect()

    def _connect(self) -> None:
        fields, seed = self.fields, self.fields["seed"]
        live = [self.status, self.view, self.start, self.stop, self.finished, seed, *self.results.components]
        asked = {*fields.values(), self.weights}
        self.start.click(self.run, asked, live, concurrency_limit=None, **PRIVATE)
        self.stop.click(self.studio.stop, None, None, queue=False, **PRIVATE)
        fields["method"].input(self.fit, [fields["method"], self.weights], [*fields.values()], **PRIVATE)
        self.weights.change(self.wear, self.weights, [self.status, *fields.values()], **PRIVATE)
        restored = [self.status, *fields.values()]
        self.dropped.upload(self.restore, [self.dropped, self.weights], restored, **PRIVATE)
        chosen = [self.results.chooser, self.finished]
        self.results.chooser.input(self.show, chosen, [self.view, *self.results.components], **PRIVATE)

    def run(self, told: dict[Any, Any], request: gr.Request) -> Iterator[Change]:
        """The whole run, shown as it goes."""
        yield {
            self.start: gr.update(interactive=False),
            self.stop: gr.update(interactive=True),
            self.view: run_view((), None),
        }
        try:
            asked = {name: told[field] for name, field in self.fields.items()}
            yield from self._run(asked, told[self.weights], request)
        except InputError as error:
            yield {self.status: line(str(error), "alert")}
        yield {self.start: gr.update(interactive=True), self.stop: gr.update(interactive=False)}

    def _run(self, asked: dict[str, Any], weights: Weights | None, request: gr.Request) -> Iterator[Change]:
        prompts, settings = prompts_of(asked["prompts"]), settings_of(asked, weights)
        work = steering(self.studio, prompts, settings, self.studio.folder(request) / "steer", weights)
        ticket, seen = self.studio.begin(request, work), Seen()
        yield {self.fields["seed"]: settings.seed, self.results.box: gr.update(visible=False)}
        for event in ticket.events():
            if seen.after(event):
                view = {self.view: run_view(seen.frames, seen.made)} if isinstance(event, Frame | Made) else {}
                yield {self.status: line(seen.line), **view}
        yield {self.status: line(seen.conclusion(ticket.stopped)), self.finished: seen.finished}
        if seen.finished:
            yield self.show(0, seen.finished)

    def show(self, place: int, finished: tuple[Finished, ...]) -> Change:
        """One of the finished prompts."""
        one = finished[place]
        return {self.view: run_view(one.frames, one.made), **self.results.updates(finished, place)}

    def fit(self, method: str, weights: Weights | None) -> Change:
        """Other fields follow the method."""
        follows = fitting(method, self.studio.models, weights)
        return {self.fields[name]: gr.update(**change) for name, change in follows.items()}

    def wear(self, weights: Weights) -> Change:
        """Finetuned weights that were just loaded: what they do is seen best without steering."""
        change = self.fit("base", weights)
        change[self.fields["method"]] = "base"
        if weights.reward is not None:
            change[self.fields["reward"]] = weights.reward
        change[self.fields["worn"]] = gr.update(value=True, visible=True, label=f"Finetuned weights: {weights.label}")
        told = f"{weights.label}: press Steer to see images of the same noise before and after."
        return change | {self.status: line(told)}

    def restore(self, path: str, weights: Weights | None) -> Change:
        """The settings of a PNG that was made here, or by `steer sample`."""
        try:
            told = restored(read_metadata(Path(path)), self.studio.models, weights)
        except InputError as error:
            return {self.status: line(str(error).replace(path, Path(path).name), "alert")}
        follows = fitting(told["method"], self.studio.models, weights)
        change: Change = {
            field: gr.update(**follows.get(name, {}) | ({"value": told[name]} if name in told else {}))
            for name, field in self.fields.items()
        }
        return change | {
            self.status: line(f"The settings of {Path(path).name} are back: press Steer for the same image.")
        }
