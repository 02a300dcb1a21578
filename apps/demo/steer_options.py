"""Optional settings of the Steer tab: weighted rewards, weighted LoRA files, negative prompt, size and solver."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from steer.apps.components import SCHEDULERS, read_scheduler
from steer.apps.demo.fields import REWARDS, setting_field
from steer.apps.demo.studio import MAX_PROMPT_CHARACTERS, PRIVATE, Change, whole
from steer.apps.models import read_loras
from steer.errors import InputError
from steer.rewards import FACTS

IMAGE_SETTINGS = ("negative_prompt", "height", "width", "scheduler")
MAX_SIZE = 1024  # pixels of an image's side, because visitors share the machine
MAX_LORAS = 4
LORA_NAME = re.compile(r"[\w.-]+\.safetensors")  # contains no separator of a sum of adapters
MORE_REWARDS = {"brightness": "how light it is", "colour:red": "how red it is; other names work too"}


def reward_choices(allowed: Sequence[str]) -> dict[str, str]:
    """Return the rewards to choose from, with meanings and units; `allowed` are the owner's additional rewards."""
    meanings = dict.fromkeys(allowed, "of this app") | REWARDS | MORE_REWARDS
    single = {name: text for name, text in meanings.items() if " + " not in name}
    units = {name: facts.unit for name in single if (facts := FACTS.get(name.partition(":")[0]))}
    return {name: f"{text} ({units[name]})" if name in units else text for name, text in single.items()}


def reward_text(weights: Mapping[str, float]) -> str:
    """Write a weighted sum of rewards as text: scene-soft + jpeg:0.5."""
    return " + ".join(name if weight == 1 else f"{name}:{weight:g}" for name, weight in weights.items())


class RewardChips:
    """Checkboxes of rewards, with a slider for the weight of each; together they write the reward's field."""

    def __init__(self, reward: Any, allowed: Sequence[str]) -> None:
        self.reward, choices = reward, reward_choices(allowed)
        with gr.Accordion("Choose and weight rewards", open=False):
            shown = [(f"{name}: {text}", name) for name, text in choices.items()]
            self.chosen = gr.CheckboxGroup(shown, label="Rewards, with their meanings and units", elem_id="steer-chips")
            self.sliders = {
                name: gr.Slider(0.1, 2, 1, step=0.1, label=f"Weight of {name}", visible=False) for name in choices
            }
        self.components = [self.chosen, *self.sliders.values()]
        gr.on(
            [self.chosen.input, *(slider.release for slider in self.sliders.values())],
            *(self.write, {*self.components}, [reward, *self.sliders.values()]),
            **PRIVATE,
        )
        reward.input(self.clear, None, self.components, **PRIVATE)

    def write(self, values: Change) -> Change:
        """Write the reward's text, and show the weights if there are several rewards."""
        chosen = values[self.chosen]
        text = reward_text({name: values[self.sliders[name]] for name in chosen})
        shown = {slider: gr.update(visible=name in chosen) for name, slider in self.sliders.items()}
        return shown | ({self.reward: text} if chosen else {})

    def clear(self) -> Change:
        """Clear all checkboxes: the reward's field contains a different text."""
        return {self.chosen: []} | {slider: gr.update(visible=False) for slider in self.sliders.values()}


def image_fields() -> dict[str, Any]:
    """Create the fields of IMAGE_SETTINGS."""
    with gr.Accordion("Negative prompt, size and solver", open=False):
        hint = "What the images should not show; needs a guidance above 1"
        fields: dict[str, Any] = {"negative_prompt": gr.Textbox("", label="Negative prompt", info=hint)}
        with gr.Row():
            for name in ("width", "height"):
                fields[name] = setting_field(name, value=0, info="Pixels; 0: the model’s own", precision=0)
        fields["scheduler"] = gr.Dropdown(
            [("the model’s own", ""), *SCHEDULERS],
            value="",
            label="Scheduler",
            allow_custom_value=True,
            info="The solver of the diffusion equation; options follow a colon: dpm++:use_karras_sigmas=true",
        )
    return fields


def lora_fields() -> dict[str, Any]:
    """Create the fields of uploaded LoRA files and their weights."""
    with gr.Accordion("LoRA files", open=False):
        files = gr.File(
            label=f"LoRA files, up to {MAX_LORAS}",
            file_count="multiple",
            file_types=[".safetensors"],
            height=120,
            elem_id="steer-loras",
        )
        hint = "One for each file, in their order: 0.7, 1. Empty: 1 each"
        return {"loras": files, "lora_weights": gr.Textbox("", label="Weights of the LoRA files", info=hint)}


def image_settings(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Read IMAGE_SETTINGS from the fields; empty ones and sizes of 0 are left out. Raises InputError."""
    given: dict[str, Any] = {name: value for name in IMAGE_SETTINGS if (value := asked.get(name)) not in (None, "", 0)}
    for name in ("height", "width"):
        if name in given and (size := whole(name, given[name])) > MAX_SIZE:
            raise InputError(f"{name} can be at most {MAX_SIZE} pixels in this app, got {size}")
        elif name in given:
            given[name] = size
    if ("height" in given) != ("width" in given):  # several pipelines of diffusers ignore a single one
        raise InputError("width and height: give both, or 0 for each")
    if len(given.get("negative_prompt", "")) > MAX_PROMPT_CHARACTERS:
        raise InputError(f"the negative prompt has more than {MAX_PROMPT_CHARACTERS} characters: shorten it")
    if "scheduler" in given:
        read_scheduler(given["scheduler"])
    return given


def uploaded_loras(asked: Mapping[str, Any]) -> str | None:
    """Read names and weights of the uploaded LoRA files: a.safetensors:0.7 + b.safetensors. Raises InputError."""
    names = [Path(path).name for path in asked.get("loras") or ()]
    if len(names) > MAX_LORAS:
        raise InputError(f"{len(names)} LoRA files: at most {MAX_LORAS} at a time in this app")
    for name in names:
        if not LORA_NAME.fullmatch(name) or names.count(name) > 1:
            raise InputError(f"LoRA file {name!r:.80}: rename it to letters, digits, dots and dashes, once each")
    words = [word for word in re.split(r"[,\s]+", asked.get("lora_weights") or "") if word]
    if words and len(words) != len(names):
        raise InputError(f"LoRA weights: {len(words)} for {len(names)} files, give one for each or none")
    terms = [f"{name}:{word}" for name, word in zip(names, words or ["1"] * len(names), strict=True)]
    for (name, _), term in zip(read_loras(" + ".join(terms)) if terms else (), terms, strict=True):
        if name == term:
            raise InputError(f"LoRA weights: {term.rpartition(':')[2]!r:.20} is no number")
    return " + ".join(term.removesuffix(":1") for term in terms) or None


def on_disk(lora: str, places: Mapping[str, Path]) -> str:
    """Write adapters, named as in the settings, with their paths on disk."""
    return " + ".join(f"{places[name]}:{weight!r}" for name, weight in read_loras(lora))
