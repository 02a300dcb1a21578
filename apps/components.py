"""Components of a loaded pipeline by text: another scheduler, another autoencoder."""

import inspect
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler
from safetensors import SafetensorError

from steer.errors import InputError
from steer.registry import did_you_mean, nearest
from steer.tables import one_line

# Short names of schedulers, as in their papers; any class of diffusers is accepted too.
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "deis": "DEISMultistepScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "dpm++-singlestep": "DPMSolverSinglestepScheduler",
    "dpm2": "KDPM2DiscreteScheduler",
    "dpm2-a": "KDPM2AncestralDiscreteScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "flow-euler": "FlowMatchEulerDiscreteScheduler",
    "flow-heun": "FlowMatchHeunDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lcm": "LCMScheduler",
    "lms": "LMSDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "tcd": "TCDScheduler",
    "unipc": "UniPCMultistepScheduler",
}
FEW_STEP = ("LCMScheduler", "TCDScheduler")  # for noise models; diffusers lists no compatible schedulers for them
MAX_VALUE = 100_000  # largest value of an option: the text may come from an image
FLOW_OPTION = "use_flow_sigmas"  # makes solvers of noise models accept flow models
# Raised by diffusers, peft and safetensors for files that do not match.
LOAD_ERRORS = (OSError, ValueError, RuntimeError, KeyError, IndexError, TypeError, AttributeError, SafetensorError)


def read_scheduler(text: str) -> tuple[type[Any], dict[str, Any]]:
    """Return the class and the options of a scheduler: NAME, or NAME:OPTION=VALUE,…

    Options are arguments of its class, such as use_karras_sigmas=true. Raises InputError for an unknown name or option.
    """
    import diffusers

    name, _, tail = text.partition(":")
    cls: Any = getattr(diffusers, SCHEDULERS.get(name, name), None) if name.isprintable() else None
    if not hasattr(cls, "step"):
        classes = [one for one in dir(diffusers) if one.endswith("Scheduler")]
        hint = did_you_mean(name, [*SCHEDULERS, *classes], f"use {', '.join(SCHEDULERS)}, or a class of diffusers")
        raise InputError(f"unknown scheduler {name!r:.60}: {hint}")
    known = [one for one in inspect.signature(cls.__init__).parameters if one not in ("self", "kwargs")]
    options: dict[str, Any] = {}
    for part in filter(None, tail.split(",")):
        option, equals, value = part.partition("=")
        if not equals or option not in known:
            raise InputError(
                f"scheduler {name!r}: {part!r:.60} is no option of it; write OPTION=VALUE with {nearest(option, known)}"
            )
        try:
            options[option] = json.loads(value.lower())
        except (ValueError, RecursionError):
            options[option] = value
        if isinstance(options[option], int | float) and not abs(options[option]) <= MAX_VALUE:
            raise InputError(f"scheduler {name!r}: {part!r:.60} is at most {MAX_VALUE}")
    return cls, options


def set_scheduler(pipe: Any, text: str) -> None:
    """Replace the scheduler of a pipeline; the new one keeps the old configuration, changed by the options of the text.

    Raises InputError for a scheduler of another kind of model.
    """
    cls, options = read_scheduler(text)
    own = type(pipe.scheduler)
    same_kind = own is cls or own.__name__ in _compatible(cls) or cls.__name__ in _compatible(own)
    same_kind = same_kind or options.get(FLOW_OPTION) is True or all("FlowMatch" in one.__name__ for one in (own, cls))
    if not same_kind:
        names = sorted(short for short, name in SCHEDULERS.items() if name in _compatible(own)) or [own.__name__]
        raise InputError(
            f"--scheduler {text}: {type(pipe).__name__} with {own.__name__} is of another kind: use {', '.join(names)}"
        )
    try:
        pipe.scheduler = cls.from_config(pipe.scheduler.config, **options)
    except (ImportError, *LOAD_ERRORS) as error:
        raise InputError(f"--scheduler {text}: {one_line(error)}") from error


def _compatible(cls: type[Any]) -> list[str]:
    named = DDIMScheduler if cls.__name__ in FEW_STEP else cls
    names = list(getattr(named, "_compatibles", ()))
    return [*names, *FEW_STEP] if "DDIMScheduler" in names else names


def set_vae(pipe: Any, source: str) -> None:
    """Replace the autoencoder of a pipeline: a folder in diffusers' format, a .safetensors file, or ORGANISATION/NAME.

    Raises InputError for one that cannot be loaded, or whose latents are not this model's.
    """
    own = getattr(pipe, "vae", None)
    if own is None:
        raise InputError(f"--vae {source}: {type(pipe).__name__} has no autoencoder: leave it out")
    path = check_vae(source)
    try:
        vae = _load_vae(type(own), path if path.exists() else source, own)
    except LOAD_ERRORS as error:
        raise InputError(f"--vae {source}: cannot be loaded as {type(own).__name__}: {one_line(error)}") from error
    for name in ("latent_channels", "block_out_channels"):
        mine, other = (_length(one.config.get(name)) for one in (own, vae))
        if mine != other:
            raise InputError(f"--vae {source}: {name} {other} does not fit the {mine} of {type(pipe).__name__}")
    pipe.register_modules(vae=vae.eval())


def _length(value: Any) -> Any:
    """Return a number, or the length of a list: widths may differ, but their number decides the size of latents."""
    return len(value) if isinstance(value, list | tuple) else value


def check_vae(source: str) -> Path:
    """Return the path of an autoencoder; if it does not exist, the name is one on the hub. Raises InputError."""
    path = Path(source).expanduser()
    if path.is_dir() and (path / "vae" / "config.json").is_file():
        return path / "vae"  # the folder is a whole model
    if path.is_dir() and not (path / "config.json").is_file():
        raise InputError(f"--vae {source}: no config.json in this folder; is it in diffusers' format?")
    if path.is_file() and path.suffix != ".safetensors":
        raise InputError(f"--vae {source}: a single file must be .safetensors: other formats may hold code")
    if not path.exists() and (source.count("/") != 1 or source.startswith((".", "/", "~"))):
        raise InputError(f"--vae {source}: no such file; give a folder, a .safetensors file, or ORGANISATION/NAME")
    return path


def _load_vae(cls: Any, source: Path | str, own: Any) -> Any:
    if isinstance(source, Path) and source.is_file():
        with tempfile.TemporaryDirectory() as folder:  # the file has no configuration: the model's own one applies
            own.save_config(folder)
            return cls.from_single_file(str(source), config=folder, dtype=own.dtype, local_files_only=True)
    return cls.from_pretrained(source, torch_dtype=own.dtype, use_safetensors=True)


def check_components(loading: Mapping[str, str]) -> None:
    """Check scheduler and autoencoder as far as possible without the model. Raises InputError."""
    if "scheduler" in loading:
        read_scheduler(loading["scheduler"])
    if "vae" in loading:
        check_vae(loading["vae"])
