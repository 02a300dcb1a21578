"""Fields of the tabs; type, range, default, label and help come from the settings dataclasses."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass
from typing import Any

import gradio as gr

from steer.apps.settings import SHARED, SamplingConfig, kinds_of, option_names, owner_of
from steer.errors import InputError
from steer.pipelines.training.config import TrainingConfig

REWARDS = {
    "scene-soft": "how well the scene's components are there, in degrees",
    "preference:scenes": "what people would prefer, learned from their comparisons",
    "aesthetic:scenes": "how calm and balanced it looks, learned",
    "clip:scenes": "how well a small CLIP thinks it fits the words",
    "preference:scenes + aesthetic:scenes:0.5": "both, the second at half weight",
    "jpeg": "how well it compresses: plain pictures",
}
# These hints replace the help of options, which uses terms without explaining them.
HINTS = {
    "particles": "Images that are made at a time; more find better ones, and take longer",
    "lam": "λ: how strongly the reward steers; 0: as the model would alone",
    "steps": "Of the solver, from noise to an image; more take longer and add detail",
    "guidance": "How closely images keep to the prompt; above 1 each step costs twice as much",
    "iterations": "Images of each prompt that are made and scored, one after the other",
    "max_steps": "Changes of the model; each one learns from 16 images",
    "learning_rate": "How far one update changes the model; too high a rate breaks its images",
    "lora_rank": "Size of the addition to the model; a higher one can learn more",
    "ask": "When the two rewards disagree about the images so far, the run shows both and waits for an answer",
    "kl_weight": "Keeps the model close to the base model (KL divergence); 0: no penalty",
}
EXAMPLE = "three green triangles"  # with the default fields, 1 of 4 base images is right, and all steered images are
DEFAULTS: dict[str, Any] = {"steps": 20, "guidance": 4.0, "lam": 25.0, "iterations": 20}  # the app's own defaults
LIMITED = ("particles", "steps", "iterations")  # at most their slider's end: visitors share the machine


def _setting(name: str) -> "tuple[Field[Any], str]":
    """Return the dataclass field of a setting, and its help."""
    return owner_of(name).field(name), owner_of(name).help()[name]


def _hint(text: str) -> str:
    """Return the first clause of a help text."""
    clause = re.split(r"[.;:] ", text)[0]
    return clause[0].upper() + clause[1:] if clause[0].isascii() else clause


def label_of(name: str) -> str:
    """Return the name of a setting in the app."""
    return _setting(name)[0].metadata["label"] or name


def setting_field(name: str, **look: Any) -> Any:
    """Make the field of a setting; `look` overrides derived arguments of the component."""
    one, text = _setting(name)
    derived = {"label": label_of(name).capitalize(), "info": HINTS.get(name) or _hint(text)}
    look = derived | {"value": DEFAULTS.get(name, one.default)} | look
    if (slider := one.metadata["slider"]) is not None:
        low, high, step = slider
        return gr.Slider(low, high, step=step, **look)
    kinds = kinds_of(name)
    return (gr.Checkbox if bool in kinds else gr.Dropdown if str in kinds else gr.Number)(**look)


def training_field(name: str, config: TrainingConfig, **look: Any) -> Any:
    """Make the field of a training argument, with its value in a configuration; a slider with a `maximum`."""
    hint = HINTS.get(name) or _hint(TrainingConfig.help()[name])
    derived = {"label": name.replace("_", " ").capitalize(), "info": hint}
    look = derived | {"value": getattr(config, name)} | look
    if isinstance(look["value"], bool):
        return gr.Checkbox(**look)
    return gr.Slider(minimum=1, step=1, **look) if "maximum" in look else gr.Number(**look)


def read_settings(asked: Mapping[str, Any], names: Iterable[str], **more: Any) -> SamplingConfig:
    """Read those of the named settings that the method has from their fields; `more` are further settings.

    Raises InputError for an empty field, and for numbers beyond the limits of this app.
    """
    own = {*SHARED, *option_names(asked["method"])}  # fields of other methods stay as they are
    own -= set() if asked["method"] == "fk" else {"lam"}  # svdd selects the best candidate
    given = {name: asked[name] for name in names if name in own} | more
    if "lam" in given and asked.get("auto"):
        given["lam"] = "auto"
    if empty := [name for name in names if name in given and given[name] is None]:
        kind = "name" if empty[0] in ("reward", "model") else "number"
        raise InputError(f"{label_of(empty[0])}: the field is empty, give a {kind}")
    settings = SamplingConfig.of(**given | {"reward": given["reward"].strip()})
    check_limits(settings)
    return settings


def check_limits(settings: SamplingConfig) -> None:
    """Raise InputError for numbers beyond the limits of this app."""
    values = settings.plain()
    for name in LIMITED:
        if (value := values.get(name) or 0) > (most := _setting(name)[0].metadata["slider"][1]):
            raise InputError(f"{name} can be at most {most} in this app, got {value}")


@dataclass(frozen=True)
class Defaults:
    """The latest defaults of fields by name, and the names of fields that the visitor has set."""

    values: Mapping[str, Any]
    kept: frozenset[str] = frozenset()

    def changed(self, now: Mapping[str, Any], to: Mapping[str, Any]) -> tuple["Defaults", dict[str, Any]]:
        """Return new defaults, and values for the fields that the visitor has not set."""
        kept = self.kept | {name for name, value in self.values.items() if now[name] != value}
        follows = {name: value for name, value in to.items() if name not in kept}
        return Defaults({**self.values, **to}, kept), follows
