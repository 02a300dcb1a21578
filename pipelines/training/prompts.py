"""The prompts of a training, with the metadata for rewards and the conditions for the pipeline of each prompt."""

from collections.abc import Mapping, Sequence
from typing import Any

from steer.arguments import IMAGES_PER_PROMPT
from steer.diffusion.preview import filter_call_kwargs
from steer.diffusion.token_hooks import is_token_scheduler
from steer.diffusion.views import plain_values
from steer.errors import InputError
from steer.pipelines.particle_batch import rows_of_metadata
from steer.training.rollout import takes_prompts


def prompts_of(pipe: Any, prompts: Sequence[str] | int, name: str) -> tuple[str, ...]:
    """Return prompts as texts. Raises InputError for empty prompts or a count, if the pipeline takes prompts."""
    conditional = takes_prompts(pipe)
    if isinstance(prompts, int):
        if conditional:
            raise InputError(f"{name} must be texts, got {prompts}: a count is for pipelines without prompts")
        if prompts < 0:
            raise InputError(f"{name} must be at least 0, got {prompts}")
        return ("",) * prompts
    if isinstance(prompts, str):
        raise InputError(f"{name} must be a list of texts, got one text: {prompts[:40]!r}")
    if conditional and not all(prompts) and not is_token_scheduler(pipe.scheduler):  # texts may begin with nothing
        raise InputError(f"{name}: none may be empty")
    return tuple(prompts)


# Arguments that the training sets itself, or that are the same for all prompts.
FIXED_ARGUMENTS = (
    *("prompt", "generator", "latents", "output_type", "return_dict", "num_inference_steps"),
    *IMAGES_PER_PROMPT,
)


def check_conditions(pipe: Any, conditions: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise InputError for conditions by prompt that the pipeline's call does not take, or not for each prompt."""
    for name in dict.fromkeys(name for row in conditions.values() for name in row):
        if name in FIXED_ARGUMENTS or not filter_call_kwargs(pipe, {name: 0}):
            raise InputError(
                f"conditions: {type(pipe).__name__} takes no {name!r} for each prompt: give arguments of its call, "
                "like image"
            )


def rows_by_prompt(
    kind: str, *given: tuple[Sequence[str], Sequence[Mapping[str, Any]] | None]
) -> dict[str, Mapping[str, Any]]:
    """Return the mapping of each prompt; empty if no mappings are given.

    kind   metadata or conditions, for messages
    given  prompts, and one mapping for each of them or None
    Raises InputError where the mappings do not fit the prompts, or where one prompt has two different mappings.
    """
    table: dict[str, Mapping[str, Any]] = {}
    for prompts, rows in given:
        for prompt, row in zip(prompts, rows_of_metadata(rows, len(prompts), kind) or (), strict=rows is not None):
            first = table.setdefault(prompt, row)
            if first is not row and plain_values(first) != plain_values(row):
                raise InputError(
                    f"{kind}: prompt {prompt[:60]!r} has two different rows: leave one out, or change its text"
                )
    return table
