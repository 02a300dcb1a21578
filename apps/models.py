"""A model by name: embedded, a folder, or on the hub."""

from _pickle import UnpicklingError  # the error's name only
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer.assets import MODELS
from steer.choices import nearest
from steer.errors import InputError

if TYPE_CHECKING:
    import torch  # else where it is needed: it takes seconds


def load_pipeline(model: str, device: str | None = None, dtype: str | None = None) -> Any:
    """A diffusers pipeline: the name of an embedded model, a folder in diffusers' format, or ORGANISATION/NAME.

    device  where to run; by default the GPU if there is one
    dtype   float32, float16 or bfloat16; by default float32 on the CPU and bfloat16 elsewhere

    Raises InputError where there is no such model. Code that a model folder may hold is never run.
    """
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    check_device(device)
    source: str | Path = MODELS.get(model, Path(model))
    if not Path(source).is_dir():
        if model in MODELS:
            raise InputError(f"model {model!r} lies in the repository, not in the package: clone it, give its folder")
        if model.count("/") != 1 or model.startswith((".", "/")):
            raise InputError(f"unknown model {model!r}: use {nearest(model, MODELS)}, a folder, or ORGANISATION/NAME")
        source = model
    elif not (Path(source) / "model_index.json").exists():
        raise InputError(f"model {model!r}: no model_index.json in this folder; is it in diffusers' format?")
    device = device_here(device)
    try:
        pipe = DiffusionPipeline.from_pretrained(source, dtype=precision(device, dtype))
    except UnpicklingError as error:
        raise InputError(
            f"model {model!r} cannot be loaded: a file of its weights is broken, or holds code, which is never run; "
            "take one with safetensors"
        ) from error
    except Exception as error:  # two libraries and a stranger's files: there is no list of what they raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"model {model!r} cannot be loaded: {reason}") from error
    return pipe.to(device)


def precision(device: str, dtype: str | None) -> "torch.dtype":
    """What a model computes in: float32 on the CPU and bfloat16 elsewhere, where nothing else is asked for."""
    import torch

    number: torch.dtype = getattr(torch, dtype or ("float32" if device == "cpu" else "bfloat16"))
    return number


def device_here(device: str | None = None) -> str:
    """The device, or where none is given the GPU if there is one, else the CPU."""
    import torch

    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def check_device(device: str | None) -> None:
    """Raises InputError for a device that there is not, or that holds no numbers."""
    import torch

    if device is None:
        return
    try:
        if torch.empty(0, device=device).is_meta:
            raise InputError(f"--device {device!r} cannot be used: tensors have no values there; use cpu or cuda")
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
