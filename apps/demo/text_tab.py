"""The Text tab: the beginning of a text, its tokens while they are steered, and the finished texts."""

import textwrap
import zlib
from collections.abc import Iterator, Sequence
from html import escape
from statistics import fmean
from typing import Any

import gradio as gr
from PIL import Image, ImageDraw, ImageFont

from steer.apps.demo.fields import read_settings, setting_field
from steer.apps.demo.history import TEXTS
from steer.apps.demo.markup import RUN_SCRIPT, gallery, table
from steer.apps.demo.pictures import as_png
from steer.apps.demo.progress import Throttle
from steer.apps.demo.steering import Step, as_command
from steer.apps.demo.studio import (
    PRIVATE,
    RUNS,
    Change,
    JobTab,
    Studio,
    guarded,
    line,
    plural,
    prompts_in,
    seed_of,
    warning,
)
from steer.apps.demo.text_steering import TextFrame, TextResult, Token, text_steering
from steer.apps.plots import short
from steer.apps.settings import SamplingConfig, default_of, option_names

METHODS = {"Particles (Feynman–Kac)": "fk", "Best of N": "best-of-n", "Plain sampling": "base"}
REWARDS = ("parses + says:blue", "says:blue", "parses", "says:two + says:star", "regex:left of")
EXAMPLE = "a red"
EMPTY_TEXT = "The texts appear here, word by word, while they are being steered."
NOTE = "Each line: the particle’s number, its reward where it was evaluated, and its words. Words in brackets are the "
NOTE += "model’s present guess at places that are still masked."
SETTINGS = ("method", "reward", "particles", "lam", "steps", "model", "compare")
LAM = 5.0  # strength where it is not chosen
REDRAW_INTERVAL = 0.15  # seconds between two updates of the view


def text_settings(asked: dict[str, Any]) -> SamplingConfig:
    """Read the settings from the fields. Raises InputError for numbers beyond the limits of this app."""
    return read_settings(asked, SETTINGS, seed=seed_of(asked["seed"]))


def text_view(frames: Sequence[TextFrame], made: TextResult | None) -> str:
    """Return the HTML of a run so far: its frames, of which a scrubber shows one, and the finished texts."""
    if not frames:
        return f'<section class="steer-run"><p class="steer-empty">{EMPTY_TEXT}</p></section>'
    shown = [(f"step {one.step} of {one.total}", "steer-lines", _lines(one)) for one in frames]
    run = zlib.crc32(repr(frames[0]).encode())  # differs between runs
    results = "" if made is None else results_table(made)
    return f'<section class="steer-run" data-run="{run:08x}">{gallery("Texts", shown, NOTE)}{results}</section>'


def _lines(frame: TextFrame) -> str:
    rows = ""
    for slot, text in enumerate(frame.texts):
        reward = "" if frame.rewards is None else f" <b>{short(frame.rewards[slot])}</b>"
        rows += f'<p class="steer-text"><span>{slot + 1}</span>{reward} {" ".join(map(_word, text))}</p>'
    about = "" if frame.ess is None else f'<p class="steer-note">ESS before resampling {short(frame.ess)}</p>'
    return rows + about


def _word(token: Token) -> str:
    if not token.masked:
        return f"<span>{escape(token.word)}</span>"
    return f'<i class="steer-masked">[{escape(token.word) or "…"}]</i>'


def results_table(made: TextResult) -> str:
    """Return a table of the finished texts, best first, then texts without steering, with rewards and components."""
    components = list(made.texts[0].components) if len(made.texts[0].components) > 1 else []
    rows: list[list[object]] = []
    for label, texts in (("", made.texts), ("base ", made.base)):
        for rank, one in enumerate(texts):
            rows.append([f"{label}{rank + 1}", one.text, one.reward, *(one.components[name] for name in components)])
    return table(f"Texts: {made.settings.reward}", ["", "text", "reward", *components], rows)


def summary(made: TextResult) -> str:
    """Compare the mean rewards in a sentence, with the cost."""
    after = fmean(one.reward for one in made.texts)
    base = f", of the base texts {short(fmean(one.reward for one in made.base))}" if made.base else ""
    texts = plural(len(made.texts), "text")
    return (
        f"Done: {texts} in {made.cost.seconds:.1f} s, mean reward {short(after)}{base}; {made.cost.nfe} denoiser "
        f"evaluations; seed {made.settings.seed}."
    )


def card(text: str) -> bytes:
    """Draw a text as a PNG, for the history."""
    image = Image.new("RGB", (256, 256), "white")
    lines = "\n".join(textwrap.wrap(text, 20))
    ImageDraw.Draw(image).multiline_text((12, 12), lines, "black", ImageFont.load_default(22))
    return as_png(image)


class TextTab(JobTab):
    """The components and their events; create it inside the app's Blocks."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300):
                self.fields = self._fields()
                self._job_buttons("Steer texts", "text")
            with gr.Column(scale=3, min_width=300):
                self.status = gr.HTML(line("Ready."), elem_id="text-status")
                self.view = gr.HTML(text_view((), None), js_on_load=RUN_SCRIPT, elem_id="text-view")
                with gr.Accordion("The same outside this app", open=False):
                    self.command = gr.Code(label="Command", language="shell", interactive=False, wrap_lines=True)
        live = [self.status, self.view, self.start, self.stop, self.command, self.fields["seed"]]
        self._connect_job(self.start.click(self.run, {*self.fields.values()}, live, **RUNS))
        own = [self.fields["lam"], self.fields["auto"]]
        self.fields["method"].input(self.fit, self.fields["method"], own, **PRIVATE)

    def _fields(self) -> dict[str, Any]:
        models = [*self.studio.text_models]
        fields: dict[str, Any] = {
            "prompt": gr.Textbox(EXAMPLE, label="Beginning of the text", info="Or a text with [MASK] in it."),
            "method": gr.Radio([*METHODS.items()], value="fk", label="Method"),
            "reward": setting_field(
                "reward",
                choices=[*REWARDS],
                value=REWARDS[0],
                allow_custom_value=True,
                info="To be maximised. Add several with +, weight one with :0.5.",
            ),
        }
        with gr.Row():
            fields |= {
                "particles": setting_field(
                    "particles", value=default_of("fk", "num_particles"), info="K, texts at a time"
                ),
                "lam": setting_field("lam", value=LAM),
            }
        fields["auto"] = gr.Checkbox(True, label="Choose the strength by the first rewards", elem_id="text-auto")
        with gr.Row():
            fields |= {"steps": setting_field("steps", value=20), "seed": setting_field("seed", info="−1: a new one")}
        fields["model"] = setting_field("model", choices=models, value=models[0], info=None, visible=len(models) > 1)
        fields["compare"] = setting_field("compare", label="Also make the base texts of the same seed", info=None)
        return fields

    def fit(self, method: str) -> list[Any]:
        """Show the strength, and its choice, if the method has one."""
        return [gr.update(visible="lam" in option_names(method))] * 2

    def remember(self, request: gr.Request, made: TextResult) -> None:
        """Add finished texts to the history."""
        kept = made.settings.plain() | {TEXTS: " · ".join(one.text for one in made.texts)}
        rewards, base = [one.reward for one in made.texts], max((one.reward for one in made.base), default=None)
        pngs = [card(one.text) for one in made.texts]
        with warning():
            session = str(request.session_hash)
            self.studio.history.keep(session, made.prompt, kept, pngs, rewards, base, made.cost.seconds)

    def fill(self, prompt: str, settings: SamplingConfig) -> Change:
        """Set all fields as they were for a run."""
        values = settings.plain() | {"prompt": prompt}
        changes = {self.fields[name]: gr.update(value=values[name]) for name in self.fields if name in values}
        lam = values.get("lam")
        own = {"lam": LAM if lam in (None, "auto") else lam, "auto": lam in (None, "auto")}
        shown = {self.fields[name]: gr.update(visible="lam" in values, value=value) for name, value in own.items()}
        status = line("Settings of the run restored: press Steer texts for the same texts.")
        return changes | shown | {self.status: status}

    @guarded
    def run(self, field_values: dict[Any, Any], request: gr.Request) -> Iterator[Change]:
        asked = self.values(field_values)
        prompts, settings = prompts_in(asked["prompt"], 1), text_settings(asked)
        ticket = self.studio.begin(request, text_steering(self.studio, (prompts or [""])[0], settings))
        yield {self.view: text_view((), None), self.fields["seed"]: settings.seed}
        frames, made, redraws = list[TextFrame](), None, Throttle(REDRAW_INTERVAL)
        for event in ticket.events():
            match event:
                case TextFrame():
                    frames.append(event)
                case TextResult():
                    made = event
                case Step():
                    continue  # its frame follows
                case _:
                    yield {self.status: line(str(event))}
            if isinstance(event, TextFrame) and redraws.due():
                yield {self.view: text_view(frames, None), self.status: line(f"Step {event.step} of {event.total}")}
        if made is None:
            yield {self.status: line("Stopped. Nothing was finished."), self.view: text_view(frames, None)}
        else:
            self.remember(request, made)
            command = as_command(made.prompt, settings)
            yield {self.view: text_view(frames, made), self.status: line(summary(made)), self.command: command}
