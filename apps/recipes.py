"""The recipe in a PNG of `steer sample`: all settings that reproduce the image, as JSON in one text chunk.

Equal runs give equal bytes. Files are untrusted: reading returns a Recipe whose every value has its type and range, or
raises InputError. No reward or model is loaded here.
"""

import hashlib
import inspect
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from io import BytesIO
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import diffusers
import torch
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

import steer
from steer.apps.methods import Job
from steer.apps.prompts import LARGEST_SIZES, check_arguments
from steer.apps.settings import SHARED, SamplingConfig, kinds_of, option_names
from steer.errors import InputError
from steer.files import DECODE_ERRORS
from steer.pipelines.base import SteeringOutput

KEY = "steer"  # keyword of the iTXt chunk
MAX_JSON_LENGTH = 1_000_000  # characters
REQUIRED = ("model", "method", "reward", "particles", "seed")  # required settings
# A recipe from a stranger runs on the user's machine: numbers are limited to reasonable values.
MAX_VALUES = {"particles": 1024, "neighbours": 1024, "steps": 10_000, "seed": 2**63 - 1} | LARGEST_SIZES
MAX_VALUE = 100_000


@dataclass(frozen=True)
class Recipe:
    """The recipe of an image: settings, environment, reward.

    base        True for a base image, without steering
    rank        index among the images of the prompt: best first, base images in slot order
    reward, components    reward of the image, and its components by name
    pixels      `image_hash` of the image
    steer, torch, diffusers, device, dtype    versions and device, to explain differing pixels
    arguments   arguments of the pipeline's call, from the settings and the columns of a prompt file
    scheduler, steps, guidance    settings of the call, for other programs
    lam         the strength λ, also if `auto` chose it; None for methods without λ
    """

    prompt: str
    settings: SamplingConfig
    base: bool
    rank: int
    reward: float
    components: Mapping[str, float]
    pixels: str
    steer: str
    torch: str
    diffusers: str
    device: str
    dtype: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    scheduler: str = ""
    steps: int | None = None
    guidance: float | None = None
    lam: float | None = None

    def plain(self) -> dict[str, Any]:
        """Return all fields in the form of JSON."""
        return {one.name: getattr(self, one.name) for one in fields(self)} | {"settings": self.settings.plain()}


def make_recipe(job: Job, output: SteeringOutput, rank: int, base: bool) -> Recipe:
    """Make the recipe of one image of a job's output. Raises InputError for a video."""
    if not isinstance(output.images[rank], Image.Image):
        raise InputError(
            "this model makes videos, `steer sample` writes images: call the pipelines of steer from Python"
        )
    device: torch.device = job.pipe.device
    named = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    return Recipe(
        prompt=job.prompt,
        settings=job.settings,
        base=base,
        rank=rank,
        reward=output.rewards[0, rank].item(),
        components={name: scores[0, rank].item() for name, scores in output.components.items()},
        pixels=image_hash(output.images[rank]),
        steer=steer.__version__,
        torch=torch.__version__,
        diffusers=diffusers.__version__,
        device=device.type + named,
        dtype=str(job.pipe.dtype).removeprefix("torch."),
        arguments=job.call_arguments,
        scheduler=type(job.pipe.scheduler).__name__,
        steps=_call_value(job, "num_inference_steps", int),
        guidance=_call_value(job, "guidance_scale", float),
        lam=output.lam,
    )


def _call_value(job: Job, name: str, kind: type) -> Any:
    """Look up a numeric argument of the pipeline's call: the job's, else the pipeline's default."""
    parameters = inspect.signature(type(job.pipe).__call__).parameters
    value = job.call.get(name, parameters[name].default if name in parameters else None)
    return kind(value) if type(value) in (int, float) else None


def parameters_text(recipe: Recipe, image: Image.Image) -> str:
    """Format a recipe as the text chunk "parameters", which other programs read."""
    negative = recipe.arguments.get("negative_prompt", "")
    data: dict[str, Any] = {"Steps": recipe.steps, "Sampler": sampler_name(recipe) or None}
    data |= {"CFG scale": recipe.guidance, "Seed": recipe.settings.seed, "Size": f"{image.width}x{image.height}"}
    data |= {"Model": recipe.settings.model, "VAE": recipe.settings.vae, "Clip skip": recipe.arguments.get("clip_skip")}
    data |= {"Loras": None if recipe.base else recipe.settings.lora, "Version": f"steer {recipe.steer}"}
    data |= {"Steering": "base" if recipe.base else recipe.settings.method, "Reward": recipe.settings.reward}
    pairs = [f"{name}: {_quoted(str(value))}" for name, value in data.items() if value is not None]
    lines = [recipe.prompt, *([f"Negative prompt: {negative}"] if negative else []), ", ".join(pairs)]
    return "\n".join(lines)


# Names of solvers without options in other programs.
SAMPLERS = {
    "DDIMScheduler": "DDIM",
    "DPMSolverMultistepScheduler": "DPM++ 2M",
    "DPMSolverSinglestepScheduler": "DPM++ 2S",
    "EulerAncestralDiscreteScheduler": "Euler a",
    "EulerDiscreteScheduler": "Euler",
    "FlowMatchEulerDiscreteScheduler": "Euler",
    "HeunDiscreteScheduler": "Heun",
    "KDPM2AncestralDiscreteScheduler": "DPM2 a",
    "KDPM2DiscreteScheduler": "DPM2",
    "LCMScheduler": "LCM",
    "LMSDiscreteScheduler": "LMS",
    "PNDMScheduler": "PLMS",
    "UniPCMultistepScheduler": "UniPC",
}


def sampler_name(recipe: Recipe) -> str:
    """Return the solver's name in other programs, with Karras if an option selects these noise levels."""
    name = SAMPLERS.get(recipe.scheduler, recipe.scheduler.removesuffix("Scheduler"))
    return f"{name} Karras" if "use_karras_sigmas=true" in (recipe.settings.scheduler or "").lower() else name


def _quoted(value: str) -> str:
    """Quote a value that contains a separator, as other programs do."""
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ",:\n") else value


def write_png(image: Image.Image, path: Path, recipe: Recipe) -> None:
    """Save an image with its recipe, and a text chunk "parameters" for other programs. Raises OSError."""
    info = PngInfo()
    info.add_text("parameters", parameters_text(recipe, image))
    info.add_itxt(KEY, json.dumps(recipe.plain(), ensure_ascii=False, allow_nan=False))
    image.save(path, format="PNG", pnginfo=info)


def image_hash(image: Image.Image) -> str:
    """Hash (SHA-256) an image's mode, size and pixels."""
    data = f"{image.mode} {image.width}x{image.height}\n".encode()
    return hashlib.sha256(data + image.tobytes()).hexdigest()


def read_png(path: Path | bytes) -> tuple[Recipe, Image.Image]:
    """Read the recipe and the image of a PNG file, or of its bytes. Raises InputError like `read_metadata`."""
    with _opened(path) as file:
        return _recipe(file, _name(path)), file.copy()  # reads all pixels


def read_metadata(path: Path | bytes) -> Recipe:
    """Read the recipe of a PNG file, or of its bytes, without decoding pixels.

    Raises InputError for a file that is not a PNG, has no recipe, or contains an invalid value.
    """
    with _opened(path) as file:
        return _recipe(file, _name(path))


def read_prompt(path: Path) -> str | None:
    """Read the prompt of an image file of steer; None for another image, or invalid metadata."""
    try:
        return read_metadata(path).prompt
    except InputError:
        return None


def _name(path: Path | bytes) -> str:
    return f"an image of {len(path)} bytes" if isinstance(path, bytes) else str(path)


@contextmanager
def _opened(path: Path | bytes) -> Iterator[Image.Image]:
    try:
        with Image.open(BytesIO(path) if isinstance(path, bytes) else path, formats=("PNG",)) as file:
            yield file
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(f"{_name(path)}: not a PNG that can be read") from error
    except DECODE_ERRORS as error:  # ValueError: a text chunk larger than Pillow reads
        raise InputError(f"{_name(path)}: cannot read the PNG ({getattr(error, 'strerror', None) or error})") from error


def _recipe(file: Image.Image, name: str) -> Recipe:
    text = file.info.get(KEY)
    if not isinstance(text, str):
        raise InputError(
            f"{name}: no metadata of `steer sample` in this image: many programs drop it, use the original"
        )
    try:
        if len(text) > MAX_JSON_LENGTH:
            raise InputError(f"longer than {MAX_JSON_LENGTH} characters")
        return _checked(json.loads(text, parse_constant=_reject_constant))
    except InputError as error:
        raise InputError(f"{name}: metadata: {error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}: metadata: not JSON ({str(error)[:80]})") from error


def _checked(data: Any) -> Recipe:
    known, hints = {one.name: one for one in fields(Recipe)}, get_type_hints(Recipe)
    # Fields with a default may be missing: older files do not have them.
    needed = [name for name, one in known.items() if one.default is MISSING and one.default_factory is MISSING]
    _check_keys(data, needed, known)
    settings = checked_settings(data["settings"])
    plain = [name for name in known if name in data and name not in ("settings", "components", "arguments")]
    values = {name: _value(name, data[name], get_args(hints[name]) or (hints[name],)) for name in plain}
    if not isinstance(data["components"], dict):
        raise InputError("components: expected an object of numbers")
    scores = {name: _value(f"part {name!r:.40}", score, (float,)) for name, score in data["components"].items()}
    arguments = check_arguments(data.get("arguments", {}), "arguments")
    recipe = Recipe(**values, settings=settings, components=scores, arguments=arguments)
    if not recipe.prompt.strip() or "\0" in recipe.prompt:
        raise InputError("the prompt is empty, or holds a null character")
    if recipe.rank >= settings.particles and settings.plain().get("budget") is None:  # a budget decides the starts
        raise InputError(f"rank {recipe.rank} is out of range for {settings.particles} particles")
    if not re.fullmatch("[0-9a-f]{64}", recipe.pixels):
        raise InputError("pixels: expected a hash")
    for name in ("steer", "torch", "diffusers", "device", "dtype", "scheduler"):  # they are printed
        if not getattr(recipe, name).isprintable() or len(getattr(recipe, name)) > 100:
            raise InputError(f"{name}: expected a short text")
    return recipe


def checked_settings(data: Any) -> SamplingConfig:
    """Check settings from outside; missing settings, newer than the file, get their default. Raises InputError."""
    _check_keys(data, REQUIRED)
    method = _value("method", data["method"], (str,))
    _check_keys(data, REQUIRED, [*SHARED, *option_names(method)])
    optional = {name: () if name in REQUIRED else (NoneType,) for name in data}
    kinds = {name: (*dict.fromkeys((*kinds_of(name, method), *optional[name])),) for name in data}
    return SamplingConfig.of(**{name: _value(name, value, kinds[name]) for name, value in data.items()})


def _check_keys(data: Any, needed: Collection[str], known: Collection[str] | None = None) -> None:
    """Raise InputError if data is not an object, lacks a needed key, or has a key outside `known` (None: any key)."""
    if not isinstance(data, dict):
        raise InputError(f"expected an object, got {type(data).__name__}")
    if known is not None and (unknown := sorted(data.keys() - {*known})):
        raise InputError(f"unknown key {unknown[0]!r:.60}; was it written by a newer steer than {steer.__version__}?")
    if missing := [name for name in needed if name not in data]:
        raise InputError(f"{missing[0]!r} is missing")


def _value(name: str, value: Any, kinds: Collection[type]) -> Any:
    """Check a value against its types and range."""
    if type(value) is int and float in kinds and abs(value) <= MAX_VALUE:
        value = float(value)  # JSON does not distinguish 1 from 1.0
    if type(value) not in kinds:
        wanted = " or ".join("null" if one is type(None) else one.__name__ for one in kinds)
        raise InputError(f"{name}: expected {wanted}, got {value!r:.40}")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{name}: expected a finite number, got {value}")
    if type(value) is int and not 0 <= value <= MAX_VALUES.get(name, MAX_VALUE):
        raise InputError(f"{name}: expected 0 to {MAX_VALUES.get(name, MAX_VALUE)}, got {value!s:.40}")
    if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
        raise InputError(f"{name}: not text ({value!r:.40})")
    return value


def _reject_constant(text: str) -> Any:
    raise InputError(f"{text} is not a number")
