"""The app: its tabs, its style and its address."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gradio as gr

from steer.apps.demo.fields import DEFAULTS, setting_field
from steer.apps.demo.finetune_tab import FinetuneTab
from steer.apps.demo.history_tab import TOKEN, HistoryTab
from steer.apps.demo.label_tab import LabelTab
from steer.apps.demo.presets import Presets
from steer.apps.demo.rewards_tab import RewardsTab
from steer.apps.demo.steer_tab import SteerTab, prompts_of, settings_of
from steer.apps.demo.steering import PromptResult, steering
from steer.apps.demo.studio import PRIVATE, Studio, line, public
from steer.apps.demo.text_tab import TextTab
from steer.apps.methods import METHODS
from steer.apps.settings import default_of
from steer.errors import InputError


class PublicApi:
    """The endpoint /steer, with hidden components; create it inside the app's Blocks."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        with gr.Row(visible=False):
            inputs = [
                gr.Textbox(label="prompt"),
                gr.Radio([*METHODS], value="race", label="method"),
                gr.Textbox("scene-soft", label="reward"),
                gr.Number(0, label="particles", precision=0),
                *(setting_field(name, label=name) for name in ("steps", "guidance")),
                gr.Textbox("auto", label="strength"),  # with a value, so that clients may leave it out
                *(setting_field(name, label=name) for name in ("iterations", "seed")),
                gr.Dropdown([*studio.models], value=studio.models[0], label="model"),
            ]
            outputs = [gr.Gallery(label="images", format="png", type="filepath"), gr.JSON(label="report")]
            gr.Button().click(self.steer, inputs, outputs, api_name="steer", concurrency_limit=None)

    def steer(
        self,
        prompt: str,
        method: str,
        reward: str,
        particles: int,
        steps: int,
        guidance: float,
        strength: str,
        iterations: int,
        seed: int,
        model: str,
        request: gr.Request,
    ) -> tuple[list[str], dict[str, Any]]:
        """Make images of a prompt that score high by a reward.

        Args:
            prompt: what the image should show
            method: race (the best picture, by search), fk (samples), best-of-n, base, svdd, beam, drafts, renoise, or,
                for one-step models, reno (optimised noise), noise-search or map-elites
            reward: a name that `steer rewards` lists, or a sum such as preference:scenes + aesthetic:scenes:0.5
            particles: images at a time; 0: the method's own number
            steps: of the solver; 1 for reno
            guidance: classifier-free guidance; 0 for reno
            strength: lambda of fk, a number, or auto: chosen by the first rewards
            iterations: of reno
            seed: the same seed gives the same images; -1: a new one, which the report names
            model: one of the app's

        Returns:
            the images, best first, as PNG files that hold their settings; and rewards, components, seed and cost
        """
        asked = {"method": method, "reward": reward, "steps": steps, "guidance": guidance}
        asked["particles"] = particles or default_of(method, "num_particles")
        asked |= {"lam": DEFAULTS["lam"] if strength == "auto" else strength, "auto": strength == "auto"}
        asked |= {"iterations": iterations, "seed": seed, "model": model}
        asked |= {"fresh": False, "compare": False, "adapter": False}
        try:
            made = self._run(prompt, asked, request)
        except InputError as error:
            raise gr.Error(public(str(error)), print_exception=False) from error
        return [str(picture.path) for picture in made.images], {
            "prompt": made.prompt,
            "settings": made.settings.plain(),
            "rewards": [picture.recipe.reward for picture in made.images],
            "components": [dict(picture.recipe.components) for picture in made.images],
            "cost": asdict(made.cost),
        }

    def _run(self, prompt: str, asked: dict[str, Any], request: gr.Request) -> PromptResult:
        prompts, settings = prompts_of(prompt), settings_of(asked)
        if len(prompts) > 1:
            raise InputError(f"{len(prompts)} prompts: one a call")
        work = steering(self.studio, prompts, settings, self.studio.run_folder(request))
        for event in self.studio.begin(request, work).events():
            if isinstance(event, PromptResult):
                return event
        raise InputError("stopped before there was an image")


STYLE = Path(__file__).parent / "style.css"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
MAX_QUEUED_EVENTS = 64  # waiting events of all visitors
CACHE_LIMITS = (600, 6 * 3600)  # seconds: interval of the search for unused files, and age of the files to delete
INTRODUCTION = "Images and texts that score higher by a reward you choose, and a look at how they got there."


def build(studio: Studio) -> gr.Blocks:
    """Build the app of a studio, without launching it."""
    with gr.Blocks(title="steer", analytics_enabled=False, delete_cache=CACHE_LIMITS) as app:
        gr.HTML(f'<header class="steer-header"><h1>steer</h1><p>{INTRODUCTION}</p></header>')
        with gr.Tabs() as tabs:
            with gr.Tab("Steer", id="steer"):
                steer = SteerTab(studio)
                presets = Presets(studio, steer)
            text = None
            if studio.text_models:
                with gr.Tab("Text", id="text"):
                    text = TextTab(studio)
            with gr.Tab("Label", id="label"):
                labels = LabelTab(studio)
            with gr.Tab("Finetune", id="finetune"):
                finetune = FinetuneTab(studio)
            with gr.Tab("Rewards", id="rewards"):
                rewards = RewardsTab(studio)
            with gr.Tab("History", id="history") as history:
                if studio.history_notice:
                    gr.HTML(line(studio.history_notice))
                past = HistoryTab(studio, steer, text, labels, rewards, tabs)
        history.select(past.refresh, past.chosen, past.live, **PRIVATE)
        app.load(past.enter, past.token, None, js=TOKEN, **PRIVATE)
        app.load(presets.show, presets.saved, presets.name, **PRIVATE)
        app.load(past.open_link, steer.weights, past.form, **PRIVATE)
        finetune.loaded(steer.weights, tabs)
        finetune.started_by(labels.learning.finetune, tabs)
        labels.learning.loaded(steer.fields["reward"], tabs)
        PublicApi(studio)
        app.unload(studio.forget)
    app.queue(max_size=MAX_QUEUED_EVENTS, default_concurrency_limit=8)
    return app


def check_address(host: str, share: bool, auth: tuple[str, str] | None) -> None:
    """Raise InputError if other machines could reach the app, and anybody could use it."""
    if auth is None and (share or host not in LOOPBACK):
        where = "--share" if share else f"--host {host}"
        raise InputError(f"{where} lets others in: give --auth USER:PASSWORD with it")


def launch(studio: Studio, host: str, port: int | None, auth: tuple[str, str] | None, share: bool) -> gr.Blocks:
    """Serve the app from a thread. Raises InputError for an address that is not safe, or not free."""
    check_address(host, share, auth)
    try:
        return serve(studio, server_name=host, server_port=port, auth=auth, share=share, prevent_thread_lock=True)
    except OSError as error:
        raise InputError(f"--host {host}, --port {port}: cannot listen there ({error})") from error


def serve(studio: Studio, **address: Any) -> gr.Blocks:
    """Serve the app with arguments of gradio's `launch`; the caller decides who can reach it."""
    os.environ["GRADIO_TEMP_DIR"] = str(studio.home / "served")  # files that gradio serves
    app = build(studio)
    app.launch(
        **address,
        max_file_size=f"{studio.max_upload}mb",
        ssr_mode=False,
        theme=theme(),
        css_paths=[STYLE],
        footer_links=["api"],
        enable_monitoring=False,
        quiet=True,
    )
    return app


def theme() -> gr.themes.Base:
    """Return Gradio's plain theme with installed fonts, so that nothing is downloaded."""
    return gr.themes.Base(
        primary_hue="blue",
        font=("system-ui", "sans-serif"),
        font_mono=("ui-monospace", "monospace"),
    )
