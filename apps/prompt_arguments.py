"""Columns of a prompt file that are named after arguments of the pipeline: each prompt is sampled with its own."""

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from steer.apps.prompt_rows import PromptRow
from steer.apps.sample_settings import SampleSettings
from steer.arguments import coerced_value, hints_of
from steer.errors import InputError

# Arguments of a pipeline that are settings of `steer sample`: {column: setting}.
SETTINGS = {"seed": "seed", "guidance_scale": "guidance", "num_inference_steps": "steps", "eta": "eta"}
# Arguments that steering has of its own, or that no cell can hold.
TAKEN: tuple[str, ...] = (
    "prompt",
    "generator",
    "latents",
    "num_images_per_prompt",
    "num_videos_per_prompt",
    "batch_size",
)
TAKEN += (
    "output_type",
    "return_dict",
    "callback_on_step_end_tensor_inputs",
    "callback",
    "callback_steps",
    "callback_on_step_end",
)
LARGEST = {"height": 8192, "width": 8192}  # pixels; a recipe may come from a stranger
MOST_ELSE = 100_000


@dataclass(frozen=True)
class Asked:
    """A prompt to sample, with the settings and the arguments of the pipeline's call that its row gives it."""

    prompt: str
    settings: SampleSettings
    arguments: Mapping[str, Any]


def asked_settings(row: PromptRow, settings: SampleSettings) -> SampleSettings:
    """The settings of a row: those of the run, with the row's seed, guidance, steps and η.

    Raises InputError for a value that cannot be.
    """
    hints, own = hints_of(SampleSettings.__init__), {}
    for name, value in row.columns.items():
        if (setting := SETTINGS.get(name.lower())) is not None:
            own[setting] = cell(name, hints[setting], value, row.prompt)
    if not own:
        return settings
    made = replace(settings, **own)
    try:
        made.check()
        if not 0 <= made.seed < 2**63:
            raise InputError(f"seed must be from 0 to 2^63 - 1, got {made.seed}")
    except InputError as error:
        raise InputError(f"prompt {row.prompt!r:.60}: {error}") from error
    return made


def asked_of(rows: Sequence[PromptRow], settings: SampleSettings, pipe: Any) -> list[Asked]:
    """The rows as they are sampled by a pipeline.

    The n-th of equal rows that name no seed is sampled with seed + n, so that its images are its own.
    Raises InputError for a value that does not fit the pipeline's argument.
    """
    found: list[Asked] = []
    before: dict[str, int] = {}
    for row in rows:
        arguments = _arguments(row, pipe)
        own = asked_settings(row, settings)
        if "seed" not in map(str.lower, row.columns):
            key = json.dumps([row.prompt, arguments, own.steps, own.guidance, own.eta], sort_keys=True)
            number = before[key] = before.get(key, -1) + 1
            own = replace(own, seed=(own.seed + number) % 2**63)
        found.append(Asked(row.prompt, own, arguments))
    return found


def argument_names(pipe: Any) -> dict[str, Any]:
    """The arguments of a pipeline's call that a cell may give: {name: annotation}."""
    hints = hints_of(type(pipe).__call__)
    names = inspect.signature(type(pipe).__call__).parameters
    return {name: hints.get(name, Any) for name in names if name not in (*TAKEN, *SETTINGS) and _holds(hints.get(name))}


def check_arguments(arguments: Any, where: str) -> dict[str, Any]:
    """Arguments that a stranger's image names: plain values in range. Raises InputError."""
    if not isinstance(arguments, dict) or len(arguments) > 64:
        raise InputError(f"{where}: expected an object of at most 64 arguments")
    for name, value in arguments.items():
        values = value if isinstance(value, list) else [value]
        if len(values) > 64 or not all(_is_plain(name, one) for one in values):
            raise InputError(f"{where}: {name!r:.40}: expected texts or numbers in range, got {value!r:.40}")
    return arguments


def cell(name: str, hint: Any, value: Any, prompt: str) -> Any:
    """The value of a cell as an argument of some annotation: texts of tables are read as numbers where it has those.

    Raises InputError that names the prompt.
    """
    where = f"prompt {prompt!r:.60}, column {name!r}"
    if isinstance(value, str) and not _holds_text(hint):
        try:
            value = json.loads(value.strip().lower())
        except ValueError as error:
            raise InputError(
                f"{where}: {value!r:.60} is no value of it: leave the cell empty for the default"
            ) from error
    return coerced_value(where, hint, value)


def _arguments(row: PromptRow, pipe: Any) -> dict[str, Any]:
    names = argument_names(pipe)
    return {
        name.lower(): cell(name, names[name.lower()], value, row.prompt)
        for name, value in row.columns.items()
        if name.lower() in names
    }


def _holds(hint: Any) -> bool:
    """Whether an annotation has room for a text, a number or a switch, and not for images or functions."""
    text = str(hint)
    plain = any(kind in text for kind in ("str", "int", "float", "bool"))
    return plain and not any(kind in text for kind in ("Image", "Tensor", "Callable", "Callback", "dict", "Dict"))


def _holds_text(hint: Any) -> bool:
    return "str" in str(hint)


def _is_plain(name: str, value: Any) -> bool:
    if isinstance(value, bool) or value is None:
        return True
    if isinstance(value, str):
        return len(value) <= MOST_ELSE and "\0" not in value
    return isinstance(value, int | float) and abs(value) <= LARGEST.get(name, MOST_ELSE)


def used_columns(pipe: Any) -> list[str]:
    """The columns that a pipeline takes as arguments, and those that are settings."""
    return [*SETTINGS, *argument_names(pipe)]
