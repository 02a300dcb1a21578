"""The prompts of a training, and the metadata of each."""

from collections.abc import Mapping, Sequence
from typing import Any

from steer.errors import InputError
from steer.pipelines.particle_batch import rows_of_metadata
from steer.training.rollout import takes_prompts


def prompts_of(pipe: Any, prompts: Sequence[str] | int, name: str) -> tuple[str, ...]:
    """Return prompts as texts. Raises InputError for empty ones and for a count, where the pipeline takes prompts."""
    conditional = takes_prompts(pipe)
    if isinstance(prompts, int):
        if conditional:
            raise InputError(f"{name} must be texts, got {prompts}: a count is for pipelines without prompts")
        if prompts < 0:
            raise InputError(f"{name} must be at least 0, got {prompts}")
        return ("",) * prompts
    if isinstance(prompts, str):
        raise InputError(f"{name} must be a list of texts, got one text: {prompts[:40]!r}")
    if conditional and not all(prompts):
        raise InputError(f"{name}: none may be empty")
    return tuple(prompts)


def metadata_table(
    *given: tuple[Sequence[str], Sequence[Mapping[str, Any]] | None],
) -> dict[str, Mapping[str, Any]] | None:
    """Return metadata by prompt, None where none is given.

    Raises InputError where it does not fit the prompts, or where one prompt has two different rows.
    """
    table: dict[str, Mapping[str, Any]] = {}
    for prompts, rows in given:
        for prompt, row in zip(prompts, rows_of_metadata(rows, len(prompts)) or (), strict=rows is not None):
            if table.setdefault(prompt, row) != row:
                raise InputError(f"metadata: prompt {prompt[:60]!r} has two different rows: leave one of them out")
    return table or None
