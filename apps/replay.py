"""`steer sample --replay IMAGE`: run the recipe of an image again, and compare the pixels.

The image is untrusted. `steer.apps.recipes` checks its recipe; code of a reward is imported only if the user names it.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from steer.apps.errors import check_writable, wrap_errors
from steer.apps.methods import METHODS, TINY, Job
from steer.apps.models import check_device
from steer.apps.prompts import argument_names, call_arguments, cell, check_arguments
from steer.apps.recipes import Recipe, image_hash, make_recipe, read_png, write_png
from steer.apps.reward_specs import only_named_rewards, resolve_reward
from steer.apps.sampling import READ, guided_by_original, opened_model
from steer.apps.settings import SamplingConfig, default_of
from steer.diffusion.preview import PREVIEWS
from steer.errors import InputError
from steer.reward import Reward, with_timeout
from steer.rewards.parser import load_reward

ENVIRONMENT_FIELDS = ("steer", "torch", "diffusers", "device", "dtype")


@dataclass(frozen=True)
class ReplayResult:
    """The image written by a replay, whether its pixels are the same, and a message."""

    path: Path
    same: bool
    message: str


def replay(
    image: Path,
    out: Path,
    reward: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    lora: str | None = None,
    preview: str | None = None,
    lookahead: int | str | None = None,
    value: str | None = None,
    reward_timeout: float | None = None,
) -> ReplayResult:
    """Reproduce a PNG of `steer sample` as NAME-replay.png in `out`.

    reward   replaces the image's reward; required if the image's reward has other than built-in names
    dtype    replaces the image's dtype; by default the device's
    lora     path of the finetuned weights; required if the image was made with finetuned weights
    preview  decoder of previews; required if the image's decoder is neither full, linear nor tiny
    lookahead, value  the user's own settings; required if the image's are files
    Raises InputError for any other file, or if something that the image needs is missing.
    """
    recipe, before = read_png(image)
    loaded = _reward(image, recipe, reward, reward_timeout)
    here: dict[str, Any] = {"reward": reward or recipe.settings.reward, "dtype": dtype or recipe.settings.dtype}
    here |= {"lora": _weights(image, recipe, lora), "preview": preview or _trusted_preview(image, recipe)}
    here |= {"lookahead": _trusted_file(image, recipe, "lookahead", lookahead)}
    here |= {"value": _trusted_file(image, recipe, "value", value)}
    settings = SamplingConfig.of(**recipe.settings.plain() | here)
    METHODS[settings.method].check(settings, loaded)
    check_device(device)
    check_writable(out)
    path, state = out / f"{image.stem}-replay.png", out / f".{image.stem}-replay.safetensors"
    loaded_settings = replace(settings, lora=None) if recipe.base else settings
    with (
        wrap_errors(str(image), "nothing was written", "use a device with more memory"),
        opened_model(loaded_settings, device) as (pipe, _),
    ):
        arguments = _arguments(recipe, pipe)
        view = guided_by_original(pipe, settings, recipe.prompt, arguments.get(READ, recipe.prompt))
        job = Job(view, loaded, recipe.prompt, settings, state, arguments=arguments)
        output = job.run("base" if recipe.base else None)
        new_recipe = make_recipe(job, output, recipe.rank, recipe.base)
        write_png(output.images[recipe.rank], path, new_recipe)
        state.unlink(missing_ok=True)
    same = new_recipe.pixels == image_hash(before)
    if same:
        return ReplayResult(path, same, f"{path}: the same pixels as {image}")
    how = _describe_difference(before, output.images[recipe.rank])
    return ReplayResult(
        path, same, f"{path}: not the pixels of {image}, {how}: {_difference_reason(recipe, new_recipe, before)}"
    )


def _arguments(recipe: Recipe, pipe: Any) -> dict[str, Any]:
    """Check the recipe's arguments of the call; only those of prompt files are allowed. Raises InputError."""
    known = argument_names(type(pipe)) | {READ: str}  # the original of an expanded prompt
    check_arguments(call_arguments(type(pipe), recipe.settings), "the arguments of its call")
    if unknown := sorted(recipe.arguments.keys() - known.keys()):
        raise InputError(f"{type(pipe).__name__} takes no argument {unknown[0]!r:.60} from an image")
    return {name: cell(f"argument {name!r}", known[name], value) for name, value in recipe.arguments.items()}


def _trusted_preview(image: Path, recipe: Recipe) -> str | None:
    """Return the image's preview decoder if it is built in: a file named by an image is never opened or downloaded."""
    source: str | None = recipe.settings.plain().get("preview")
    if not recipe.base and source not in (None, *PREVIEWS, TINY):
        raise InputError(
            f"{image}: its previews were decoded by {source!r:.200}: add --preview {TINY}, or --preview PATH"
        )
    return source


def _trusted_file(image: Path, recipe: Recipe, name: str, given: int | str | None) -> int | str | None:
    """Return the user's value of a setting, or the image's if that is not a file. Raises InputError."""
    stored: int | str | None = recipe.settings.plain().get(name)
    own = default_of(recipe.settings.method, name) if stored is not None else None
    if given is None and isinstance(stored, str) and stored != own and not recipe.base:
        raise InputError(f"{image}: its {name} is {stored!r:.200}: add --{name} with a file that you trust")
    return stored if given is None else given


def _reward(image: Path, recipe: Recipe, given: str | None, timeout: float | None) -> Reward:
    """Load the reward that the user names, or the image's if it only has built-in names."""
    if given is not None:
        return resolve_reward(given, timeout)
    source = recipe.settings.reward
    if not only_named_rewards(source):
        raise InputError(
            f"{image}: its reward {source!r:.200} may run code or read files of this machine: if you trust it, or for "
            "another one, add --reward SPEC"
        )
    return with_timeout(load_reward(source), timeout)


def _weights(image: Path, recipe: Recipe, given: str | None) -> str | None:
    """Return the path of finetuned weights that the user names; the path in an image is never opened."""
    if recipe.base:  # base images are made without finetuned weights
        return recipe.settings.lora
    if given is None and recipe.settings.lora is not None:
        raise InputError(f"{image}: made with the finetuned weights {recipe.settings.lora!r:.200}: add --lora PATH")
    if given is not None and recipe.settings.lora is None:
        raise InputError(f"{image}: made without finetuned weights: leave out --lora")
    return given


def _describe_difference(one: Image.Image, other: Image.Image) -> str:
    if (one.mode, one.size) != (other.mode, other.size):
        return f"{other.mode} {other.width}x{other.height} in place of {one.mode} {one.width}x{one.height}"
    differences = np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int))
    differences = differences.reshape(one.height * one.width, -1).max(1)
    return f"{np.count_nonzero(differences)} of {differences.size} differ by up to {differences.max()} of 255"


def _difference_reason(recipe: Recipe, new_recipe: Recipe, before: Image.Image) -> str:
    """Explain differing pixels: an edited file, other versions, another device."""
    if new_recipe.pixels == recipe.pixels:
        return "they are those of its recipe, so the file was edited"
    original, current = (
        {name: getattr(one, name) for name in ENVIRONMENT_FIELDS} | {"reward": repr(one.settings.reward)}
        for one in (recipe, new_recipe)
    )
    reasons = ["the file was edited"] if recipe.pixels != image_hash(before) else []
    reasons += [f"{name} {old} there, {current[name]} here" for name, old in original.items() if old != current[name]]
    unknown_cause = "versions and device are the same; the number of threads or the weights behind a name may differ"
    return "; ".join(reasons) or unknown_cause
