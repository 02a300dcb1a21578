"""The fields of the Finetune tab, and the training that they ask for."""

from collections.abc import Mapping
from typing import Any

import gradio as gr

from steer.apps.demo.label_folder import label_folder
from steer.apps.demo.page import number, whole
from steer.apps.demo.steer_fields import REWARDS
from steer.apps.demo.studio import Studio
from steer.apps.demo.training import CONFIGURATIONS, MODELS, MOST_RANK, MOST_UPDATES, Asked
from steer.apps.finetune_config import read_config

METHODS = {"D3PO, from a reward": "d3po", "PRDP, from a reward": "prdp", "D3PO, from labelled choices": "choices"}
TRAINED_ON, JUDGED_BY, UPDATES = "aesthetic:scenes", "scene", 30
HELP = (
    "**D3PO** draws images in pairs and makes the better one of each likelier. **PRDP** learns by how much one is "
    "better than the other. Both train a small addition to the model, a LoRA; the model itself stays as it is. "
    "**Choices** are those of the Label tab. Whatever is trained on loses its meaning when it is pushed for long: "
    "so a second reward, which is not trained on, judges images of prompts that the training never sees."
)


def finetune_fields(studio: Studio) -> dict[str, Any]:
    """The components, by the names that `asked_of` reads."""
    models, rewards = _models(studio), [*dict.fromkeys([*studio.rewards, JUDGED_BY, *REWARDS])]
    free: dict[str, Any] = {"choices": rewards, "allow_custom_value": True}
    fields: dict[str, Any] = {
        "method": gr.Radio([*METHODS.items()], value="d3po", label="Method", elem_id="finetune-method"),
        "reward": gr.Dropdown(
            value=TRAINED_ON, label="Reward", info="What is to rise.", elem_id="finetune-reward", **free
        ),
        "held_out": gr.Dropdown(
            value=JUDGED_BY,
            label="Held-out reward",
            info="Judges, and is never trained on: it shows when the other one is being fooled.",
            elem_id="finetune-held-out",
            **free,
        ),
        "updates": gr.Slider(
            1,
            MOST_UPDATES,
            UPDATES,
            step=1,
            label="Updates",
            info="Each learns from 16 images.",
            elem_id="finetune-updates",
        ),
    }
    with gr.Accordion("What this does", open=False):
        gr.Markdown(HELP)
    with gr.Accordion("More", open=False):
        fields["learning_rate"] = gr.Number(
            usual_rate("d3po"), label="Learning rate", info="Too high, and images fall apart.", elem_id="finetune-rate"
        )
        fields["rank"] = gr.Slider(1, MOST_RANK, 16, step=1, label="LoRA rank", info="How much it can learn.")
        fields["kl_weight"] = gr.Number(
            0, label="KL weight", minimum=0, info="What it costs to leave the base model; 0: only what the method asks."
        )
        fields["seed"] = gr.Number(0, label="Seed")
        fields["model"] = gr.Dropdown([*models], value=next(iter(models), None), label="Model", visible=len(models) > 1)
    return fields


def _models(studio: Studio) -> list[str]:
    return [model for model in MODELS if model in studio.models]


def usual_rate(method: str) -> float:
    """The learning rate of the method's configuration."""
    return read_config(CONFIGURATIONS[method]).settings.learning_rate


def asked_of(told: Mapping[str, Any], studio: Studio) -> Asked:
    """What the fields ask for. Raises InputError, and for rewards that visitors may not use."""
    choices, model = None, str(told["model"])
    if told["method"] == "choices":
        choices, model = label_folder(studio), studio.models[0]
    asked = Asked(
        method=told["method"],
        model=model,
        reward=str(told["reward"] or "").strip(),
        held_out=str(told["held_out"] or "").strip(),
        updates=whole("updates", told["updates"]),
        learning_rate=number("learning rate", told["learning_rate"]),
        rank=whole("rank", told["rank"]),
        kl_weight=number("KL weight", told["kl_weight"]),
        seed=whole("seed", told["seed"]),
        choices=choices,
    )
    for spec in [asked.held_out] if choices else [asked.reward, asked.held_out]:
        studio.reward(spec)
    return asked
