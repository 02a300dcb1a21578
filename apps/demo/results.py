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
            self.gallery = gr.Gallery(
                label="Base images",
                format="png",
                type="filepath",
                columns=4,
                height="auto",
                object_fit="contain",
                interactive=False,
                buttons=["fullscreen"],
                elem_id="steer-base",
            )
            self.table = gr.HTML(elem_id="steer-rewards")
            with gr.Accordion("Images, each with its settings inside", open=False):
                self.files = gr.File(show_label=False, file_count="multiple", interactive=False, elem_id="steer-files")
            with gr.Accordion("The same outside this app", open=False):
                self.command = gr.Code(label="Command", language="shell", interactive=False, wrap_lines=True)
                self.python = gr.Code(label="Python", language="python", interactive=False)

    @property
    def components(self) -> list[Any]:
        return [self.box, self.chooser, self.slider, self.gallery, self.table, self.files, self.command, self.python]

    def updates(self, finished: Sequence[Finished], place: int = 0) -> dict[Any, Any]:
        """Shows one of the finished prompts, and offers the others."""
        one = finished[place].made
        pair = compared(one)
        choices = [(f"{number + 1}. {each.made.prompt}", number) for number, each in enumerate(finished)]
        return {
            self.box: gr.update(visible=True),
            self.chooser: gr.update(choices=choices, value=place, visible=len(finished) > 1),
            self.slider: gr.update(
                value=pair and tuple(str(picture.path) for picture in pair),
                visible=pair is not None,
                label=pair and sides(one, *pair),
            ),
            self.gallery: gr.update(value=base_captions(one), visible=bool(one.base)),
            self.table: rewards_table(one) + f'<p class="steer-told">{escape(means_told(one) + cost_told(one))}</p>',
            self.files: [str(picture.path) for picture in (*one.images, *one.base)],
            self.command: as_command(one.prompt, one.settings),
            self.python: as_python(one.prompt, one.settings),
        }


def compared(made: Made) -> tuple[Picture, Picture] | None:
    """The two sides of the slider: the best base image and the best image of as many, by the same reward.

    Plain sampling sorts nothing: with finetuned weights it is the same noise before and after. None where there are no
    base images, and for best of N, whose image is the best base image itself.
    """
    if not made.base or (made.settings.method == "best-of-n" and made.base_cost is None):
        return None
    if made.settings.method == "base":
        return made.base[0], made.images[0]
    return best(made.base), best(made.images)


def best(pictures: Sequence[Picture]) -> Picture:
    """The one of the highest reward, the first of several."""
    return max(pictures, key=lambda one: one.recipe.reward)


def sides(made: Made, left: Picture, right: Picture) -> str:
    """What the two sides of the slider are, in words."""
    steered, finetuned = made.settings.method != "base", made.settings.lora is not None
    kind = "finetuned, and steered" if steered and finetuned else "finetuned" if finetuned else "steered"
    of = f"the best of {len(made.images)} each" if steered else "the same noise"
    rewards = f"{short(left.recipe.reward)} and {short(right.recipe.reward)}"
    return f"Left: base model, right: {kind} ({of}; rewards {rewards})"


def base_captions(made: Made) -> list[tuple[str, str]]:
    """Every base image with its number and reward, the best with a star."""
    top = best(made.base) if made.base else None
    return [
        (str(one.path), f"{'★ ' if one is top else ''}base {slot + 1}: {short(one.recipe.reward)}")
        for slot, one in enumerate(made.base)
    ]


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
    first, last = (short(best(pictures).recipe.reward) for pictures in (made.base, made.images))
    same = " Best of N picks among the base images: its first is the best of them." if compared(made) is None else ""
    text = f"Mean reward: {short(after)}, of the base images {short(before)}. Best: {last}, of the base images {first}."
    return f"{text}{same} "


def cost_told(made: Made) -> str:
    """What it took, in a sentence."""
    base = f"; the base images beside them {_cost(made.base_cost)}" if made.base_cost else ""
    return f"It took {_cost(made.cost)}{base}. Seed {made.settings.seed}."


def _cost(cost: Cost) -> str:
    gradients = f", {cost.gradients} gradients" if cost.gradients else ""
    scored = f"{cost.decodes} images decoded, {cost.reward_calls} scored{gradients}"
    return f"{cost.nfe} denoiser evaluations, {scored}, {cost.seconds:.1f} s"
