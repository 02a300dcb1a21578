"""What programs may call: `gradio_client.Client(URL).predict("a red star", api_name="/steer")`."""

from dataclasses import asdict
from typing import Any

import gradio as gr

from steer.apps.demo.page import public
from steer.apps.demo.steer_fields import METHODS, MOST, prompts_of, settings_of
from steer.apps.demo.steering import Made, steering
from steer.apps.demo.studio import Studio
from steer.errors import InputError


class PublicApi:
    """The endpoint /steer, whose components nobody sees; to be made inside the app's Blocks."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        with gr.Row(visible=False):
            inputs = [
                gr.Textbox(label="prompt"),
                gr.Radio([*METHODS.values()], value="fk", label="method"),
                gr.Textbox("scene-soft", label="reward"),
                gr.Slider(1, MOST["particles"], 4, step=1, label="particles"),
                gr.Slider(1, MOST["steps"], 20, step=1, label="steps"),
                gr.Slider(0, 30, 4, label="guidance"),
                gr.Number(25, label="strength"),
                gr.Slider(1, MOST["iterations"], 20, step=1, label="iterations"),
                gr.Number(0, label="seed"),
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
        strength: float,
        iterations: int,
        seed: int,
        model: str,
        request: gr.Request,
    ) -> tuple[list[str], dict[str, Any]]:
        """Makes images of a prompt that score high by a reward.

        Args:
            prompt: what the image should show
            method: fk (particles), best-of-n, reno (optimised noise, for one-step models) or base
            reward: a name that `steer rewards` lists, or a sum such as preference:scenes + aesthetic:scenes:0.5
            particles: images at a time
            steps: of the solver; 1 for reno
            guidance: classifier-free guidance; 0 for reno
            strength: lambda of fk
            iterations: of reno
            seed: the same seed gives the same images; -1: a new one, which the report names
            model: one of the app's

        Returns:
            the images, best first, as PNG files that hold their settings; and rewards, parts, seed and cost
        """
        asked = {"method": method, "reward": reward, "particles": particles, "steps": steps, "guidance": guidance}
        asked |= {"lam": strength, "iterations": iterations, "seed": seed, "model": model}
        try:
            made = _made(self.studio, prompt, asked | {"fresh": False, "compare": False, "worn": False}, request)
        except InputError as error:
            raise gr.Error(public(str(error)), print_exception=False) from error
        return [str(picture.path) for picture in made.images], told(made)


def _made(studio: Studio, prompt: str, asked: dict[str, Any], request: gr.Request) -> Made:
    """One prompt, from its turn in the queue to its end."""
    prompts, settings = prompts_of(prompt), settings_of(asked)
    if len(prompts) > 1:
        raise InputError(f"{len(prompts)} prompts: one a call")
    work = steering(studio, prompts, settings, studio.run_folder(request))
    made = [event for event in studio.begin(request, work).events() if isinstance(event, Made)]
    if not made:
        raise InputError("stopped before there was an image")
    return made[0]


def told(made: Made) -> dict[str, Any]:
    """Of the images, best first, what is known, as plain values."""
    return {
        "prompt": made.prompt,
        "settings": asdict(made.settings),
        "rewards": [picture.recipe.reward for picture in made.images],
        "parts": [dict(picture.recipe.parts) for picture in made.images],
        "cost": asdict(made.cost),
    }
