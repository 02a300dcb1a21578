"""The fields of the Steer tab, and the settings that they stand for."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import gradio as gr

from steer.apps.demo.page import MOST_CHARACTERS, number, seed_of, whole
from steer.apps.demo.studio import Studio
from steer.apps.demo.weights import Weights
from steer.apps.png_metadata import Recipe
from steer.apps.sample_settings import SampleSettings
from steer.errors import InputError

METHODS = {
    "Particles (Feynman–Kac)": "fk",
    "Best of N": "best-of-n",
    "Optimised noise (ReNO)": "reno",
    "Plain sampling": "base",
}
REWARDS = {
    "scene-soft": "how well the scene's parts are there, in degrees",
    "preference:scenes": "what people would prefer, learned from choices",
    "aesthetic:scenes": "how calm and balanced it looks, learned",
    "clip:scenes": "how well a small CLIP thinks it fits the words",
    "preference:scenes + aesthetic:scenes:0.5": "both, the second at half weight",
    "jpeg": "how well it compresses: plain pictures",
}
# What one visitor may ask for of a machine that others wait for.
MOST_PROMPTS = 4
MOST = {"particles": 16, "steps": 100, "iterations": 100}
ONE_STEP = "scenes-turbo"
EXAMPLE = "three green triangles"  # with the fields as they are: 1 of 4 base images is right, steered all are


def steer_fields(studio: Studio) -> dict[str, Any]:
    """The components, by the names that `settings_of` reads."""
    fields: dict[str, Any] = {
        "prompts": gr.Textbox(EXAMPLE, label="Prompt", lines=2, info=f"One a line, up to {MOST_PROMPTS}."),
        "method": gr.Radio([*METHODS.items()], value="fk", label="Method"),
        "reward": gr.Dropdown(
            [*dict.fromkeys([*studio.rewards, *REWARDS])],
            value=studio.rewards[0] if studio.rewards else "scene-soft",
            allow_custom_value=True,
            label="Reward",
            info="What is to rise. Add several with +, weigh one with :0.5.",
        ),
    }
    with gr.Accordion("What the rewards measure", open=False):
        gr.Markdown("\n".join(f"- `{name}`: {told}" for name, told in REWARDS.items()))
    with gr.Row():
        fields["particles"] = gr.Slider(1, MOST["particles"], 4, step=1, label="Particles", info="images at a time")
        fields["lam"] = gr.Slider(0, 100, 25, step=1, label="Strength λ", info="0: no steering")
    with gr.Row():
        fields["steps"] = gr.Slider(1, MOST["steps"], 20, step=1, label="Steps", info="of the solver")
        fields["guidance"] = gr.Slider(0, 15, 4, step=0.5, label="Guidance", info="how closely to follow the words")
    fields["iterations"] = gr.Slider(
        1, MOST["iterations"], 20, step=1, label="Iterations", info="of the noise, for ReNO", visible=False
    )
    with gr.Row():
        fields["seed"] = gr.Number(0, label="Seed", info="−1: a new one for every run")
        fields["fresh"] = gr.Checkbox(False, label="A new seed for every run")
    with gr.Accordion("Model and comparison", open=len(studio.models) > 1):
        fields["model"] = gr.Dropdown([*studio.models], value=studio.models[0], label="Model")
        fields["compare"] = gr.Checkbox(True, label="Also make the base images of the same seed")
        fields["worn"] = gr.Checkbox(False, label="Finetuned weights", visible=False, elem_id="steer-worn")
    return fields


def settings_of(asked: Mapping[str, Any], weights: Weights | None = None) -> SampleSettings:
    """What the fields ask for, with the weights that the visitor loaded.

    Raises InputError for numbers beyond what this app does.
    """
    settings = SampleSettings(
        model=asked["model"],
        method=asked["method"],
        reward=asked["reward"].strip(),
        particles=whole("particles", asked["particles"]),
        steps=whole("steps", asked["steps"]),
        guidance=number("guidance", asked["guidance"]),
        lam=number("strength", asked["lam"]),
        potential="difference",
        resampler="systematic",
        tempering="constant",
        ess_threshold=0.5,
        eta=None,
        seed=seed_of(asked["seed"], asked["fresh"]),
        compare=bool(asked["compare"]),
        dtype=None,
        iterations=whole("iterations", asked["iterations"]),
        lora=_worn(asked["model"], weights) if asked["worn"] else None,
    )
    settings.check()
    for name, most in MOST.items():
        if getattr(settings, name) > most:
            raise InputError(f"{name} can be at most {most} in this app, got {getattr(settings, name)}")
    return settings


def _worn(model: str, weights: Weights | None) -> str:
    """What settings say of finetuned weights that a model is to wear. Raises InputError where it cannot."""
    if weights is None:
        raise InputError("no finetuned weights are loaded here: train some in the Finetune tab")
    if weights.model != model:
        raise InputError(f"the finetuned weights are those of {weights.model}: choose that model, or leave them off")
    return weights.told


def prompts_of(text: str) -> list[str]:
    """The prompts of a field, one a line. Raises InputError where there are none, or too much of them."""
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise InputError("the prompt is empty: say what the image should show")
    if len(prompts) > MOST_PROMPTS:
        raise InputError(f"{len(prompts)} prompts: at most {MOST_PROMPTS} at a time in this app")
    if (longest := max(map(len, prompts))) > MOST_CHARACTERS:
        raise InputError(f"a prompt of {longest} characters: at most {MOST_CHARACTERS}")
    return prompts


def restored(recipe: Recipe, models: Sequence[str], weights: Weights | None = None) -> dict[str, Any]:
    """What the fields were when an image was made. Raises InputError for one that they cannot ask for."""
    settings = recipe.settings
    if settings.model not in models or settings.method not in METHODS.values():
        what = f"model {settings.model!r:.80}, method {settings.method!r}"
        raise InputError(
            f"it was made with {what}, which this app does not have: `steer sample --replay` makes it again"
        )
    asked = {
        "prompts": recipe.prompt,
        "method": settings.method,
        "reward": settings.reward,
        "particles": settings.particles,
        "lam": 0.0 if settings.lam is None else settings.lam,
        "steps": settings.steps or 1,
        "guidance": 0.0 if settings.guidance is None else settings.guidance,
        "iterations": settings.iterations,
        "seed": settings.seed,
        "fresh": False,
        "model": settings.model,
        "compare": settings.compare,
        "worn": settings.lora is not None,
    }
    again, first = asdict(settings_of(asked, weights)), asdict(settings)
    if apart := [name for name, value in first.items() if again[name] != value]:
        name = apart[0]
        raise InputError(
            f"it was made with {name} {first[name]!r}, which has no field here: `steer sample --replay` does it"
        )
    return asked


def defaults_of(method: str, models: Sequence[str], weights: Weights | None = None) -> dict[str, Any]:
    """Values of the fields that depend on the method: ReNO is for one-step models.

    Where finetuned weights are loaded, the other methods begin with them.
    """
    reno = method == "reno"
    model, steps, guidance = (weights.model, weights.steps, weights.guidance) if weights else (models[0], 20, 4)
    return {
        "steps": 1 if reno else steps,
        "guidance": 0 if reno else guidance,
        "model": ONE_STEP if reno and ONE_STEP in models else model,
        "worn": weights is not None and not reno,
    }


def shown_with(method: str, weights: Weights | None = None) -> dict[str, bool]:
    """Which fields a method has."""
    return {
        "lam": method == "fk",
        "iterations": method == "reno",
        "compare": method != "base" or weights is not None,
        "worn": weights is not None,
    }


@dataclass(frozen=True)
class Defaults:
    """The defaults that fields had last, by name, and the names of those that the visitor has set otherwise."""

    values: Mapping[str, Any]
    kept: frozenset[str] = frozenset()

    def changed(self, now: Mapping[str, Any], to: Mapping[str, Any]) -> tuple["Defaults", dict[str, Any]]:
        """Other defaults, and the fields that follow them: those that the visitor has left alone, of what they say."""
        kept = self.kept | {name for name, value in self.values.items() if now[name] != value}
        follows = {name: value for name, value in to.items() if name not in kept}
        return Defaults({**self.values, **to}, kept), follows
