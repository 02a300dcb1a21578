"""Prompts continued by a model of text before images are sampled from them."""

import json
from collections.abc import Callable
from pathlib import Path

import torch

from steer.apps.errors import wrap_errors
from steer.apps.models import load_pipeline
from steer.assets import TEXT_MODELS
from steer.errors import InputError
from steer.pipelines.text.masked_diffusion import INDEX

PIPELINES = ("MaskedDiffusionPipeline", "LLaDA2Pipeline", "DiffusionGemmaPipeline")


def is_text_model(model: str) -> bool:
    """Return whether an embedded model, or the one of a folder, makes texts."""
    if model in TEXT_MODELS:
        return True
    try:
        index = json.loads((Path(model).expanduser() / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # on the hub, or reported when it is loaded
    return isinstance(index, dict) and index.get("_class_name") in PIPELINES


def load_expander(model: str, device: str | None = None) -> Callable[[str, int], str]:
    """Load a text model: a function of a prompt and a seed to the prompt's continuation, one draw.

    A chain prompt → expanded prompt → image, as of Parrot (arXiv 2401.05675). Raises InputError for another model; the
    function does so by the name of the prompt.
    """
    if not is_text_model(model):
        raise InputError(f"--expand {model!r} is no text model: use {' or '.join(TEXT_MODELS)}, or a folder of one")
    pipe = load_pipeline(model, device)
    pipe.set_progress_bar_config(disable=True)

    def expand(prompt: str, seed: int) -> str:
        with wrap_errors(f"prompt {prompt!r}", f"expanded by {model}", "shorten it"):
            return str(pipe(prompt=prompt, generator=torch.Generator().manual_seed(seed)).texts[0])

    return expand
