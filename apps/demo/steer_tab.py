"""The Steer tab: a prompt, the particles while they are steered, and what came out."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from steer.apps.demo.page import FAILED, PRIVATE, RANDOM, Change, line
from steer.apps.demo.results import Results
from steer.apps.demo.run_view import run_view
from steer.apps.demo.seen import Finished, Seen
from steer.apps.demo.steer_fields import (
    Defaults,
    defaults_of,
    prompts_of,
    restored,
    settings_of,
    shown_with,
    steer_fields,
)
from steer.apps.demo.steering import Frame, Made, steering
from steer.apps.demo.studio import Studio
from steer.apps.demo.weights import Weights
from steer.apps.png_metadata import read_metadata
from steer.errors import InputError

HERE = Path(__file__).parent


class SteerTab:
    """Its components and what they do; to be made inside the app's Blocks.

    `weights` holds the finetuned Weights that the visitor loaded, None before; `defaults` those of their fields.
    """

    def __init__(self, studio: Studio) -> None:
        self.studio, self.finished, self.weights = studio, gr.State(()), gr.State(None)
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300):
                self.fields = steer_fields(studio)
                first = defaults_of(self.fields["method"].value, studio.models)
                self.defaults = gr.State(Defaults(first | {"reward": self.fields["reward"].value}))
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
        fields, seed = self.fields, (self.fields["seed"], self.fields["fresh"])
        live = [self.status, self.view, self.start, self.stop, self.finished, *seed, *self.results.components]
        asked = {*fields.values(), self.weights}
        ran = self.start.click(self.run, asked, live, concurrency_limit=None, **PRIVATE)
        ran.failure(self.fail, None, [self.status, self.start, self.stop], **PRIVATE)
        self.stop.click(self.studio.stop, None, None, queue=False, **PRIVATE)
        follows, known = [self.status, self.defaults, *fields.values()], {self.weights, self.defaults, *fields.values()}
        fields["method"].input(self.fit, known, follows, **PRIVATE)
        self.weights.change(self.wear, known, follows, **PRIVATE)
        self.dropped.upload(self.restore, [self.dropped, self.weights], follows, **PRIVATE)
        chosen = [self.results.chooser, self.finished]
        self.results.chooser.input(self.show, chosen, [self.view, *self.results.components], **PRIVATE)

    def run(self, told: dict[Any, Any], request: gr.Request) -> Iterator[Change]:
        """The whole run, shown as it goes."""
        yield {self.start: gr.update(interactive=False), self.stop: gr.update(interactive=True)}
        try:
            asked = {name: told[field] for name, field in self.fields.items()}
            yield from self._run(asked, told[self.weights], request)
        except InputError as error:
            yield {self.status: line(str(error), "alert")}
        yield {self.start: gr.update(interactive=True), self.stop: gr.update(interactive=False)}

    def fail(self) -> Change:
        """After an error that `run` does not know, and for fields whose values Gradio refuses."""
        ready = {self.start: gr.update(interactive=True), self.stop: gr.update(interactive=False)}
        return ready | {self.status: line(FAILED, "alert")}

    def _run(self, asked: dict[str, Any], weights: Weights | None, request: gr.Request) -> Iterator[Change]:
        prompts, settings = prompts_of(asked["prompts"]), settings_of(asked, weights)
        work = steering(self.studio, prompts, settings, self.studio.run_folder(request), weights)
        ticket, seen = self.studio.begin(request, work), Seen()
        yield {
            self.fields["seed"]: settings.seed,
            self.fields["fresh"]: bool(asked["fresh"]) or asked["seed"] == RANDOM,
            self.view: run_view((), None),
            self.results.box: gr.update(visible=False),
        }
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

    def fit(self, told: dict[Any, Any]) -> Change:
        """Other fields follow the method, but for what the visitor has set."""
        method, weights = told[self.fields["method"]], told[self.weights]
        return self._follow(told, method, weights, defaults_of(method, self.studio.models, weights))

    def _follow(
        self, told: dict[Any, Any], method: str, weights: Weights | None, defaults: Mapping[str, Any]
    ) -> Change:
        now = {name: told[field] for name, field in self.fields.items()}
        new, values = told[self.defaults].changed(now, defaults)
        return {self.defaults: new} | self._updates(values, method, weights)

    def _updates(self, values: Mapping[str, Any], method: str, weights: Weights | None) -> Change:
        """Shows the fields of a method, and gives some of them values."""
        shown: dict[str, dict[str, Any]] = {
            name: {"visible": visible} for name, visible in shown_with(method, weights).items()
        }
        given: dict[str, dict[str, Any]] = {name: {"value": value} for name, value in values.items()}
        return {self.fields[name]: gr.update(**shown.get(name, {}), **given.get(name, {})) for name in shown | given}

    def wear(self, told: dict[Any, Any]) -> Change:
        """Finetuned weights that were just loaded: what they do is seen best without steering."""
        weights: Weights = told[self.weights]
        defaults = defaults_of("base", self.studio.models, weights)
        if weights.reward is not None:
            defaults["reward"] = weights.reward
        change = self._follow(told, "base", weights, defaults)
        change |= self._updates({"method": "base", "model": weights.model}, "base", weights)  # else they cannot be worn
        change[self.fields["worn"]] = gr.update(value=True, visible=True, label=f"Finetuned weights: {weights.label}")
        text = f"{weights.label}: press Steer to see images of the same noise before and after."
        return change | {self.status: line(text)}

    def restore(self, path: str, weights: Weights | None) -> Change:
        """The settings of a PNG that was made here, or by `steer sample`."""
        try:
            values = restored(read_metadata(Path(path)), self.studio.models, weights)
        except InputError as error:
            return {self.status: line(str(error).replace(path, Path(path).name), "alert")}
        method = values["method"]
        return self._updates(values, method, weights) | {
            self.defaults: Defaults(defaults_of(method, self.studio.models, weights)),
            self.status: line(f"The settings of {Path(path).name} are back: press Steer for the same image."),
        }
