"""The rows of a call: N particles as one call of a diffusers pipeline, or as one call for each in lock step.

Pipelines differ in how they repeat prompts, images and embeddings. The forms of a call are tried in order; the first
whose scheduler receives N rows is used. A form that fails does so before its first solver step.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Generator, Tensor

from steer.arguments import IMAGES_PER_PROMPT
from steer.diffusion.lockstep import run_in_lock_step
from steer.diffusion.preview import filter_call_kwargs, first_output
from steer.diffusion.seeds import get_random_state, set_random_state
from steer.diffusion.step_hooks import Continue, OnStep, SolverStep, StepOverride, hook_steps
from steer.errors import UnsupportedPipelineError

TEXTS = ("prompt", "negative_prompt", "pooled_prompt", "negative_pooled_prompt", "class_labels")
# Arguments with one value for the whole call, whatever their length.
SHARED = (
    *("generator", "latents", "timesteps", "sigmas", "guidance_scale", "cross_attention_kwargs", "metadata"),
    *("callback_on_step_end_tensor_inputs", "original_size", "crops_coords_top_left", "target_size"),
    *("negative_original_size", "negative_crops_coords_top_left", "negative_target_size", "complex_human_instruction"),
    *("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end", "ip_adapter_image_embeds"),
)


# One form of a call: the arguments of one call for all rows, or of one call for each row.
Form = tuple[dict[str, Any], ...]


class RowsCall:
    """The call of a pipeline for `groups` prompts of `size` rows each.

    call           arguments of the pipeline's call for the prompts, without a count of images
    one_condition  a list of images is the condition of every row, whatever its length
    each           further arguments of each row, which then has a call of its own: in some pipelines a list of images
                   is one for each row, in others several for all
    """

    def __init__(
        self,
        pipe: Any,
        call: Mapping[str, Any],
        groups: int,
        size: int,
        *,
        one_condition: bool = False,
        each: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        self.rows = groups * size
        self._forms = list(forms(pipe, call, groups, size, one_condition))
        if each is not None:
            self._forms = [tuple(own | dict(more) for own, more in zip(self._forms[-1], each, strict=True))]
        self.place = 0  # number of the form in use

    def start_at(self, place: int) -> None:
        """Start with the form that another call of this pipeline ended with."""
        self.place = min(place, len(self._forms) - 1)

    @property
    def call(self) -> dict[str, Any]:
        """The arguments of the form in use; if it has one call for each row, of the first call."""
        return self._forms[self.place][0]

    def run(
        self,
        pipe: Any,
        on_step: OnStep,
        given: Mapping[str, Any],
        *,
        grad: bool = True,
        change: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None,
    ) -> Tensor:
        """Call the pipeline with step hooks; return its images (N, 3, H, W) or other media.

        given   arguments in place of the call's own; in lock step, arguments with one entry per row are divided
        change  function applied to the arguments of each call, before `given`

        Raises UnsupportedPipelineError where no form of the call has N rows, and where the pipeline fails later; the
        errors of `on_step` and of the caller's own callbacks reach the caller unchanged.
        """
        values = [value for value in (*self.call.values(), *given.values()) if value is not None]
        random = RandomState.of([one for value in values for one in (value if isinstance(value, list) else [value])])
        reasons: list[Exception] = []
        while True:
            progress = _Progress(on_step)
            try:
                return self._run(pipe, progress, given, grad, change or dict)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # pipelines do not document their errors for a form that does not fit
                raised_here = type(error).__module__.startswith("steer.") and not isinstance(
                    error, UnsupportedPipelineError
                )
                if progress.in_on_step or raised_here:
                    raise
                if progress.steps:
                    if not _raised_by_library(error):
                        raise
                    raise _failure(pipe, self.rows, progress.steps, error) from error
                reasons.append(error)
            if self.place + 1 == len(self._forms):
                raise _refusal(pipe, self.rows, reasons) from reasons[0]
            self.place += 1
            random.restore()

    @property
    def in_lock_step(self) -> bool:
        """Whether the form in use has one call for each row."""
        return len(self._forms[self.place]) > 1

    def _run(self, pipe: Any, on_step: OnStep, given: Mapping[str, Any], grad: bool, change: Any) -> Tensor:
        calls = [_with_own_lists(change(call)) for call in self._forms[self.place]]
        if len(calls) == 1:
            with hook_steps(pipe, on_step, rows=self.rows, grad=grad) as view:
                return first_output(view(**filter_call_kwargs(pipe, calls[0] | dict(given))))
        each = [call | _row_of(given, row, len(calls)) for row, call in enumerate(calls)]
        return run_in_lock_step(pipe, [filter_call_kwargs(pipe, call) for call in each], on_step, grad)


def _with_own_lists(call: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a call and its lists: Z-Image writes its chat template into the list of prompts, again at each call."""
    return {name: list(value) if isinstance(value, list) else value for name, value in call.items()}


@dataclass
class _Progress:
    """Step hook that counts the steps of an attempt and records whether the attempt failed in the hook itself."""

    on_step: OnStep
    steps: int = 0
    in_on_step: bool = False

    def __call__(self, solver_step: SolverStep) -> StepOverride | Continue | None:
        self.steps, self.in_on_step = self.steps + 1, True
        override = self.on_step(solver_step)
        self.in_on_step = False
        return override


LIBRARIES = ("diffusers", "torch", "transformers", "accelerate", "peft", "numpy", "PIL")


def _raised_by_library(error: Exception) -> bool:
    """Return whether an error was raised in a pipeline or below it, not in a callback of the caller."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return place is not None and str(place.tb_frame.f_globals.get("__name__")).partition(".")[0] in LIBRARIES


def _failure(pipe: Any, rows: int, steps: int, error: Exception) -> UnsupportedPipelineError:
    """Return the error for a call that failed after some solver steps."""
    return UnsupportedPipelineError(
        f"{type(pipe).__name__} fails after {steps} solver steps with {rows} images ({type(error).__name__}: "
        f"{_first_line(error)}): check the arguments of its call, and that the plain pipeline runs with them"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no reason").splitlines()[0]


@dataclass(frozen=True)
class RandomState:
    """The states of some generators and of PyTorch's global generators, before an attempt."""

    generators: tuple[tuple[Generator, Tensor], ...]
    default: Mapping[str, Tensor]

    @classmethod
    def of(cls, values: Sequence[Any]) -> "RandomState":
        """Store the states of the generators among some values."""
        own = tuple((one, one.get_state()) for one in values if isinstance(one, Generator))
        return cls(own, get_random_state())

    def restore(self) -> None:
        """Restore all generators."""
        set_random_state(self.default)
        for generator, state in self.generators:
            generator.set_state(state)


def _refusal(pipe: Any, rows: int, reasons: Sequence[Exception]) -> UnsupportedPipelineError:
    """Return the error for a call of which no form runs, with the reason of the last form, one call for each row."""
    error = reasons[-1]
    if isinstance(error, UnsupportedPipelineError):
        return UnsupportedPipelineError(_first_line(error))
    return UnsupportedPipelineError(
        f"{type(pipe).__name__} does not run as called for {rows} images ({type(error).__name__}: "
        f"{_first_line(error)}): check the arguments of its call"
    )


def forms(pipe: Any, call: Mapping[str, Any], groups: int, size: int, one_condition: bool = False) -> Iterator[Form]:
    """Return the forms of a call, in the order in which they are tried.

    1. the pipeline's own count of images for each prompt    2. the same, with conditions repeated for every row
    3. prompts repeated for every row, a count of one        4. the same, with conditions repeated too
    5. one call for each row
    """
    accepted = inspect.signature(type(pipe).__call__).parameters
    count = next((name for name in IMAGES_PER_PROMPT if name in accepted), None)
    rows = groups * size
    own = dict(call) | ({"batch_size": rows} if count is None and "batch_size" in accepted else {})
    texts = {name: _repeated(value, groups, size) for name, value in own.items() if _is_text(name, value)}
    lists = {name for name, value in own.items() if one_condition and isinstance(value, list | tuple)}
    conditions = {
        name: [value] * rows if name in lists else _repeated(value, groups, size)
        for name, value in own.items()
        if _is_condition(name, value)
    }
    batches = [own | {count: size}, own | conditions | {count: size}] if count else []
    single = {count: 1} if count else {}
    batches += [own | texts | single, own | texts | conditions | single]
    if rows == 1:
        batches = batches[:1]
    distinct: list[dict[str, Any]] = []
    for batch in batches:
        if not any(_same_arguments(batch, other) for other in distinct):
            distinct.append(batch)
            yield (batch,)
    alone = {"batch_size": 1} if "batch_size" in accepted else {}
    if rows > 1:
        shared = {name: own[name] for name in conditions.keys() & lists}
        each = [_call_of_row(own, row // size, groups, row, rows) | shared for row in range(rows)]
        yield tuple(one | single | alone for one in each)


def _same_arguments(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        value is other[name] or _plain_equal(value, other[name]) for name, value in one.items()
    )


def _plain_equal(one: Any, other: Any) -> bool:
    return type(one) is type(other) and isinstance(one, str | int | float | bool) and one == other


def _is_text(name: str, value: Any) -> bool:
    return value is not None and name not in SHARED and name.startswith(TEXTS)


def _is_condition(name: str, value: Any) -> bool:
    """Return whether an argument is an image, video, mask, control or embedding, by its value."""
    if name in SHARED or name.startswith(TEXTS):
        return False
    first = value
    while isinstance(first, list | tuple) and first:
        first = first[0]
    return isinstance(first, PIL.Image.Image | Tensor | np.ndarray)


def _repeated(value: Any, groups: int, size: int) -> Any:
    """Repeat a value to one entry per row, prompt after prompt; it has one entry for each prompt, or one for all."""
    rows = groups * size
    if isinstance(value, Tensor):
        if len(value) == groups:
            return value.repeat_interleave(size, 0)
        if value.dim() < 3:
            return value
        return value.repeat(rows, *[1] * (value.dim() - 1)) if len(value) == 1 else torch.stack([value] * rows)
    if isinstance(value, np.ndarray):
        return _repeated(torch.from_numpy(value), groups, size).numpy()
    if isinstance(value, list | tuple) and len(value) == groups:
        return [one for one in value for _ in range(size)]
    single = isinstance(value, list | tuple) and len(value) == 1 and not isinstance(value[0], list | tuple)
    return list(value) * rows if single else [value] * rows


def _call_of_row(call: Mapping[str, Any], group: int, groups: int, row: int, rows: int) -> dict[str, Any]:
    """Return the arguments of the call of one row."""
    own: dict[str, Any] = {}
    for name, value in call.items():
        entries = groups if name not in ("generator", "latents") else rows
        at = group if name not in ("generator", "latents") else row
        divided = entries > 1 and (
            _is_text(name, value) or _is_condition(name, value) or name in ("generator", "latents")
        )
        own[name] = _entry(value, at, entries) if divided else value
    return own


def _row_of(given: Mapping[str, Any], row: int, rows: int) -> dict[str, Any]:
    return {name: _entry(value, row, rows) for name, value in given.items()}


def _entry(value: Any, at: int, entries: int) -> Any:
    """Return the entry `at` of a value with `entries` entries; tensors keep the dimension."""
    if isinstance(value, Tensor | np.ndarray) and value.ndim and len(value) == entries:
        return value[at : at + 1]
    return value[at] if isinstance(value, list | tuple) and len(value) == entries else value
