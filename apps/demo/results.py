"""What came out of a run: base beside steered, rewards by part, the cost, the same outside the app, files."""

from collections.abc import Sequence
from html import escape
from typing import Any

import gradio as gr

from steer.apps.demo.charts import table
from steer.apps.demo.recipes import as_command, as_python
from steer.apps.demo.seen import Finished
from steer.apps.demo.steering import Made
from steer.apps.finished import Picture
from steer.pipelines.output import Cost


class Results:
    """The components, hidden until there is something in them."""

    def __init__(self) -> None:
        with gr.Column(visible=False, elem_id="steer-results") as self.box:
            self.chooser = gr.Radio([], label="Prompt", visible=False, elem_id="steer-chooser")
            self.slider = gr.ImageSlider(
                label="The same starting noise: base model (left), steered (right)",
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
        pair = (str(_origin(finished[place]).path), str(one.images[0].path)) if one.base else None
        choices = [(f"{number + 1}. {each.made.prompt}", number) for number, each in enumerate(finished)]
        return {
            self.box: gr.update(visible=True),
            self.chooser: gr.update(choices=choices, value=place, visible=len(finished) > 1),
            self.slider: gr.update(value=pair, visible=pair is not None),
            self.table: rewards_table(one) + f"<p>{escape(cost_told(one))}</p>",
            self.files: [str(picture.path) for picture in (*one.images, *one.base)],
            self.command: as_command(one.prompt, one.settings),
            self.python: as_python(one.prompt, one.settings),
        }


def _origin(finished: Finished) -> Picture:
    """The base image of the noise that the best image began with: its slot, followed back through the readings."""
    slot = finished.made.order[0]
    for frame in reversed(finished.frames):
        slot = slot if frame.ancestors is None else frame.ancestors[slot]
    return finished.made.base[slot]


def rewards_table(made: Made) -> str:
    """Every image's reward and its parts: steered ones best first, then the base ones."""
    parts = list(made.images[0].recipe.parts)
    parts = parts if len(parts) > 1 else []

    def row(name: str, picture: Picture) -> list[object]:
        scores = (picture.recipe.reward, *(picture.recipe.parts[part] for part in parts))
        return [name, *scores]

    rows = [row("best" if rank == 0 else f"{rank + 1}.", picture) for rank, picture in enumerate(made.images)]
    rows += [row(f"base {slot + 1}", picture) for slot, picture in enumerate(made.base)]
    return table(f"Rewards: {made.settings.reward}", ["image", "reward", *parts], rows)


def cost_told(made: Made) -> str:
    """What it took, in a sentence."""
    base = f"; the base images beside them {_cost(made.base_cost)}" if made.base_cost else ""
    return f"It took {_cost(made.cost)}{base}. Seed {made.settings.seed}."


def _cost(cost: Cost) -> str:
    gradients = f", {cost.gradients} gradients" if cost.gradients else ""
    scored = f"{cost.decodes} images decoded, {cost.reward_calls} scored{gradients}"
    return f"{cost.nfe} denoiser evaluations, {scored}, {cost.seconds:.1f} s"
