"""A model by name: embedded, a folder, or on the hub."""

import json
import re
from _pickle import UnpicklingError  # the error's name only
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer.assets import MODELS
from steer.choices import nearest
from steer.errors import InputError

# Of single files, by the first letters of diffusers' name of the kind of checkpoint.
SINGLE = {
    "xl_base": "StableDiffusionXLPipeline",
    "xl_refiner": "StableDiffusionXLImg2ImgPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "flux-d": "FluxPipeline",
    "flux-s": "FluxPipeline",
    "v1": "StableDiffusionPipeline",
    "v2": "StableDiffusionPipeline",
}
WEIGHTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
INDEX = "model_index.json"
# diffusion_pytorch_model.fp16.safetensors, model.fp16-00001-of-00002.safetensors
FILE = re.compile(r"[A-Za-z_0-9]+(\.(?P<variant>[A-Za-z]\w*))?(-\d+-of-\d+)?\.(safetensors|bin)")

if TYPE_CHECKING:
    import torch  # else where it is needed: it takes seconds


def load_pipeline(
    model: str,
    device: str | None = None,
    dtype: str | None = None,
    *,
    variant: str | None = None,
    config: str | None = None,
) -> Any:
    """A diffusers pipeline: the name of an embedded model, a folder in diffusers' format, a checkpoint in a single
    .safetensors file, or ORGANISATION/NAME.

    A folder whose weights are all of one variant, such as *.fp16.safetensors, is loaded with that variant. A single
    file's configuration is that of a folder in diffusers' format beside it (the file's own folder, or one of its name
    without .safetensors), else that of the published model of its kind, from the hub or its cache.

    device  where to run; by default the GPU if there is one
    variant of the weights, such as fp16; by default plain ones, or the folder's only one
    config  for a single file: a folder of such a model in diffusers' format, JSON files and tokenizer
    dtype   float32, float16 or bfloat16; by default float32 on the CPU and bfloat16 elsewhere

    Raises InputError where there is no such model. Code that a model folder may hold is never run.
    """
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    check_device(device)
    source = _source(model)
    single = isinstance(source, Path) and source.is_file()
    if single and variant is not None:
        raise InputError(f"--variant {variant}: model {model!r} is a single file, which has none: leave it out")
    if config is not None and not (single and (Path(config) / INDEX).is_file()):
        wrong = f"no {INDEX} in this folder" if single else f"model {model!r} is no single file: leave it out"
        raise InputError(f"--config {config}: {wrong}")
    device = device_here(device)
    try:
        if isinstance(source, Path) and source.is_file():
            pipe = _from_single_file(model, source, precision(device, dtype), config)
        else:
            variant = _variant(source) if variant is None and isinstance(source, Path) else variant
            pipe = DiffusionPipeline.from_pretrained(source, dtype=precision(device, dtype), variant=variant)
    except InputError:
        raise
    except UnpicklingError as error:
        raise InputError(
            f"model {model!r} cannot be loaded: a file of its weights is broken, or holds code, which is never run; "
            "take one with safetensors"
        ) from error
    except Exception as error:  # two libraries and a stranger's files: there is no list of what they raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"model {model!r} cannot be loaded: {reason}") from error
    return pipe.to(device)


def _source(model: str) -> str | Path:
    """A folder or a file where there is one, else the name of a model on the hub. Raises InputError."""
    source = MODELS.get(model, Path(model).expanduser())
    if source.is_dir():
        if not (source / INDEX).exists():
            raise InputError(f"model {model!r}: no {INDEX} in this folder; is it in diffusers' format?")
        return source
    if source.is_file():
        if source.suffix != ".safetensors":
            raise InputError(f"model {model!r}: a single file must be .safetensors: other formats may hold code")
        return source
    if model in MODELS:
        raise InputError(f"model {model!r} lies in the repository, not in the package: clone it, give its folder")
    if model.endswith(WEIGHTS) or model.startswith("~"):
        raise InputError(f"model {model!r}: no such file")
    if model.count("/") != 1 or model.startswith((".", "/")) or model.endswith("/"):
        raise InputError(f"unknown model {model!r}: use {nearest(model, MODELS)}, a folder, or ORGANISATION/NAME")
    return model


def _variant(folder: Path) -> str | None:
    """The variant that all weights of some component are of, such as fp16; None where each has plain ones."""
    for component in sorted(path for path in folder.iterdir() if path.is_dir()):
        found = [match["variant"] for path in component.iterdir() if (match := FILE.fullmatch(path.name))]
        if found and all(found):
            return str(sorted(set(found))[0])
    return None


def _from_single_file(model: str, file: Path, dtype: "torch.dtype", given: str | None) -> Any:
    """A pipeline of a checkpoint in one file, as its trainers publish them. Raises InputError."""
    import diffusers
    from diffusers.loaders.single_file_utils import (
        DIFFUSERS_DEFAULT_PIPELINE_PATHS,
        infer_diffusers_model_type,
        load_single_file_checkpoint,
    )

    places = (file.with_suffix(""), file.parent) if given is None else (Path(given),)
    beside = [folder for folder in places if (folder / INDEX).is_file()]
    if beside:
        name = str(json.loads((beside[0] / INDEX).read_text(encoding="utf-8")).get("_class_name"))
        config: dict[str, Any] = {"config": str(beside[0])}
        missing = ""
    else:
        kind = infer_diffusers_model_type(load_single_file_checkpoint(str(file), local_files_only=True))
        repository = DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"]
        name = next((cls for prefix, cls in SINGLE.items() if kind.startswith(prefix)), "")
        config, missing = {}, f", and that of {repository} cannot be had from the hub"
    cls: Any = getattr(diffusers, name, None)
    remedy = f"give --config FOLDER of such a model in diffusers' format, or put it at {file.with_suffix('')}"
    if not hasattr(cls, "from_single_file"):
        raise InputError(f"model {model!r}: no configuration beside this {name or kind} checkpoint: {remedy}")
    try:
        return cls.from_single_file(str(file), dtype=dtype, local_files_only=bool(beside), **config)
    except OSError as error:
        raise InputError(f"model {model!r}: a single file needs a configuration{missing}: {remedy}") from error


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
