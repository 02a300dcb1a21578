"""Expansion of prompts by a text model before images are sampled from them."""

from collections.abc import Callable
from pathlib import Path

import torch

from steer.apps.errors import wrap_errors
from steer.apps.models import load_pipeline
from steer.assets import TEXT_MODELS
from steer.errors import InputError
from steer.pipelines.text.masked_diffusion import read_index

PIPELINES = ("MaskedDiffusionPipeline", "LLaDA2Pipeline", "DiffusionGemmaPipeline")


def is_text_model(model: str) -> bool:
    """Return whether an embedded model, or the model in a folder, generates texts. Raises InputError."""
    if model in TEXT_MODELS:
        return True
    return read_index(Path(model).expanduser()).get("_class_name") in PIPELINES  # {} for a model on the hub


def load_expander(model: str, device: str | None = None) -> Callable[[str, int], str]:
    """Load a text model as a function that draws one continuation of a prompt from a seed.

    The chain prompt → expanded prompt → image is that of Parrot (arXiv 2401.05675). Raises InputError for any other
    model; the function raises InputError that names the prompt.
    """
    if not is_text_model(model):
        raise InputError(f"--expand {model!r} is no text model: use {' or '.join(TEXT_MODELS)}, or a folder of one")
    pipe = load_pipeline(model, device)
    pipe.set_progress_bar_config(disable=True)

    def expand(prompt: str, seed: int) -> str:
        with wrap_errors(f"prompt {prompt!r}", f"expanded by {model}", "shorten it"):
            return str(pipe(prompt=prompt, generator=torch.Generator().manual_seed(seed)).texts[0])

    return expand
