"""What came out of a run: base beside steered, rewards by part, the cost, the same outside the app, files."""

from collections.abc import Sequence
from html import escape
from statistics import fmean
from typing import Any

import gradio as gr

from steer.apps.demo.charts import short, table
from steer.apps.demo.recipes import as_command, as_python
from steer.apps.demo.seen import Finished
from steer.apps.demo.steering import Made
from steer.apps.finished import Picture
from steer.apps.sample_settings import SampleSettings
from steer.pipelines.output import Cost


class Results:
    """The components, hidden until there is something in them."""

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
            self.table = gr.HTML(elem_id="steer-rewards")
            with gr.Accordion("Images, each with its settings inside", open=False):
                self.files = gr.File(show_label=False, file_count="multiple", interactive=False, elem_id="steer-files")
            with gr.Accordion("The same outside this app", open=False):
                self.command = gr.Code(label="Command", language="shell", interactive=False, wrap_lines=True)
                self.python = gr.Code(label="Python", language="python", interactive=False)

    @property
    def components(self) -> list[Any]:
        return [self.box, self.chooser, self.slider, self.table, self.files, self.command, self.python]

    def updates(self, finished: Sequence[Finished], place: int = 0) -> dict[Any, Any]:
        """Shows one of the finished prompts, and offers the others."""
        one = finished[place].made
        pair = (str(one.base[0].path), str(one.images[0].path)) if one.base else None
        choices = [(f"{number + 1}. {each.made.prompt}", number) for number, each in enumerate(finished)]
        return {
            self.box: gr.update(visible=True),
            self.chooser: gr.update(choices=choices, value=place, visible=len(finished) > 1),
            self.slider: gr.update(value=pair, visible=pair is not None, label=compared(one.settings)),
            self.table: rewards_table(one) + f'<p class="steer-told">{escape(means_told(one) + cost_told(one))}</p>',
            self.files: [str(picture.path) for picture in (*one.images, *one.base)],
            self.command: as_command(one.prompt, one.settings),
            self.python: as_python(one.prompt, one.settings),
        }


def compared(settings: SampleSettings) -> str:
    """What the two sides of the slider are: what a plain call gives for the seed, and the best image."""
    steered, finetuned = settings.method != "base", settings.lora is not None
    made = "finetuned, and steered" if steered and finetuned else "finetuned" if finetuned else "steered"
    return f"Left: base model, right: {made}"


def rewards_table(made: Made) -> str:
    """Every image's reward and its parts: steered ones best first, then the base ones."""
    parts = list(made.images[0].recipe.parts)
    parts = parts if len(parts) > 1 else []

    def row(name: str, picture: Picture) -> list[object]:
        scores = (picture.recipe.reward, *(picture.recipe.parts[part] for part in parts))
        return [name, *scores]

    first = "1." if made.settings.method == "base" else "best"  # nothing has sorted plain images
    rows = [row(f"{rank + 1}." if rank else first, picture) for rank, picture in enumerate(made.images)]
    rows += [row(f"base {slot + 1}", picture) for slot, picture in enumerate(made.base)]
    return table(f"Rewards: {made.settings.reward}", ["image", "reward", *parts], rows)


def means_told(made: Made) -> str:
    """The mean rewards, in a sentence, where there is something to compare with."""
    if not made.base:
        return ""
    before, after = (fmean(one.recipe.reward for one in pictures) for pictures in (made.base, made.images))
    return f"Mean reward: {short(after)}, of the base images {short(before)}. "


def cost_told(made: Made) -> str:
    """What it took, in a sentence."""
    base = f"; the base images beside them {_cost(made.base_cost)}" if made.base_cost else ""
    return f"It took {_cost(made.cost)}{base}. Seed {made.settings.seed}."


def _cost(cost: Cost) -> str:
    gradients = f", {cost.gradients} gradients" if cost.gradients else ""
    scored = f"{cost.decodes} images decoded, {cost.reward_calls} scored{gradients}"
    return f"{cost.nfe} denoiser evaluations, {scored}, {cost.seconds:.1f} s"
