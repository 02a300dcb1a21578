"""Coercion of arguments to their annotations: 2.0 becomes 2, an array of strings a list; all else is an InputError."""

import functools
import inspect
import math
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, ParamSpec, TypeGuard, TypeVar, Union, get_args, get_origin, get_type_hints

from steer.errors import InputError

# diffusers' names of num_particles
IMAGES_PER_PROMPT = (
    "num_images_per_prompt",
    "num_videos_per_prompt",
    "num_waveforms_per_prompt",
    "num_images_per_text",
)

P = ParamSpec("P")
R = TypeVar("R")


def coerce_arguments(call: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function to coerce its arguments to their annotations before it runs (2.0 → 2, string array → list).

    Raises InputError with the name of the argument whose value does not fit its annotation.
    """
    hints = annotations_of(call)
    code = inspect.unwrap(call).__code__
    names = code.co_varnames[: code.co_argcount]

    @functools.wraps(call)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        given = [
            coerce_value(name, hints[name], value) if name in hints else value
            for name, value in zip(names, args, strict=False)
        ]
        named = {name: coerce_value(name, hints[name], v) if name in hints else v for name, v in kwargs.items()}
        return call(*given, *args[len(given) :], **named)  # type: ignore[arg-type]

    return checked


def annotations_of(call: Callable[..., Any]) -> dict[str, Any]:
    """Return the annotations of a function's own arguments; empty where they cannot be resolved."""
    try:
        hints = get_type_hints(call)
    except (NameError, TypeError):  # annotations of another library that cannot be imported
        hints = dict(getattr(call, "__annotations__", {}))
    code = getattr(inspect.unwrap(call), "__code__", None)
    known = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount] if code is not None else ()
    return {name: hint for name, hint in hints.items() if name in known}


def coerce_value(name: str, hint: Any, value: Any) -> Any:
    """Coerce a value to its annotation: integers, floats, booleans, strings, and lists and mappings of numbers.

    Values whose annotation includes other types (functions, tensors, objects) are returned unchanged.
    """
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if value is None and (type(None) in kinds or Any in kinds):
        return None
    plain = [kind for kind in kinds if kind is not type(None)]
    if str in plain and any(_is_list_of(kind, str) for kind in plain) and len(plain) == len(_text_kinds(plain)):
        return texts(name, value)
    if plain and all(kind in (bool, int, float) for kind in plain):
        return _scalar(name, plain, value)
    if len(plain) == 1 and (_is_list_of(plain[0], int) or _is_list_of(plain[0], float)):
        return _numbers(name, plain[0], value)
    if len(plain) == 1 and get_origin(plain[0]) is Mapping and get_args(plain[0]) == (int, int):
        return _counts(name, value)
    return value


def whole(name: str, value: Any) -> int:
    """Return an integer. Raises InputError for a boolean, a string and a number with a fraction."""
    number = _number(value)
    if number is None or not math.isfinite(number) or number != int(number):
        raise InputError(f"{name} must be a whole number, got {_describe(value)}")
    return int(number)


def number(name: str, value: Any) -> float:
    """Return a number, possibly infinite or NaN: its range is checked elsewhere. Raises InputError."""
    converted = _number(value)
    if converted is None:
        raise InputError(f"{name} must be a number, got {_describe(value)}")
    return converted


def texts(name: str, value: Any) -> str | list[str]:
    """Return a string, or the list of strings in a list, tuple or array. Raises InputError."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bytes | Mapping | set | frozenset) or not isinstance(value, Iterable):
        raise InputError(f"{name} must be a text or a list of texts, got {_describe(value)}")
    converted = list(value)
    if not converted:
        raise InputError(f"{name}: an empty list; give at least one text")
    for place, one in enumerate(converted):
        if not isinstance(one, str):
            raise InputError(f"{name} must be a text or a list of texts, got {_describe(one)} at place {place}")
    return [str(one) for one in converted]


def _scalar(name: str, kinds: Sequence[Any], value: Any) -> bool | int | float:
    scalar = value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value
    if bool in kinds:
        if isinstance(scalar, bool) or (len(kinds) == 1 and scalar in (0, 1) and not isinstance(scalar, str)):
            return bool(scalar)
        if len(kinds) == 1:
            raise InputError(f"{name} must be True or False, got {_describe(value)}")
    if float in kinds:
        converted = number(name, value)
        return value if type(value) in (int, float) else int(converted) if isinstance(scalar, int) else converted
    return whole(name, value)


def _number(value: Any) -> int | float | None:
    """Return the Python number of a scalar, 0-d array or tensor; None for anything else."""
    if hasattr(value, "item") and getattr(value, "size", None) is not None and getattr(value, "ndim", 0) == 0:
        value = value.item()
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _numbers(name: str, kind: Any, value: Any) -> list[Any]:
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise InputError(f"{name} must be a list of numbers, got {_describe(value)}")
    one = whole if _is_list_of(kind, int) else number
    return [one(name, item) for item in value]


def _counts(name: str, value: Any) -> dict[int, int]:
    if not isinstance(value, Mapping):
        raise InputError(f"{name} must be a mapping of whole numbers, like {{8: 4, 14: 2}}, got {_describe(value)}")
    return {whole(name, key): whole(name, one) for key, one in value.items()}


def _is_list_of(kind: Any, inner: type) -> bool:
    return get_origin(kind) in (list, Sequence, Iterable) and get_args(kind) == (inner,)


def _text_kinds(kinds: Sequence[Any]) -> list[Any]:
    return [kind for kind in kinds if kind is str or _is_list_of(kind, str)]


def _describe(value: Any) -> str:
    return f"{value!r:.60} of type {type(value).__name__}"


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether the value is a real number, finite as a float."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False
