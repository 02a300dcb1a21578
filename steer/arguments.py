"""Arguments coerced to their annotations, and settings dataclasses whose fields have ranges, choices and help.

2.0 becomes 2 and an array of strings becomes a list; any other mismatch raises InputError. Nothing heavy is imported.
"""

import functools
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from numbers import Real
from pkgutil import resolve_name
from types import NoneType, UnionType
from typing import (
    Any,
    ClassVar,
    Literal,
    ParamSpec,
    Self,
    TypeGuard,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from steer.errors import InputError
from steer.registry import choose, did_you_mean

# Names that diffusers uses for num_particles
IMAGES_PER_PROMPT = (
    "num_images_per_prompt",
    "num_videos_per_prompt",
    "num_waveforms_per_prompt",
    "num_images_per_text",
)

P = ParamSpec("P")
R = TypeVar("R")
Choices = str | tuple[str, ...] | None
LISTS = (list, Sequence, Iterable)


def coerce_arguments(call: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function to coerce its arguments to their annotations before it runs (2.0 → 2, string array → list).

    Raises InputError with the name of the argument whose value does not fit its annotation.
    """
    hints, signature = annotations_of(call), inspect.signature(call)

    @functools.wraps(call)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = signature.bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            bound.arguments[name] = coerce_value(name, hints.get(name, Any), value)
        return call(*bound.args, **bound.kwargs)

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
    coercion, optional = _coercion(hint)
    return value if coercion is None or (value is None and optional) else coercion(name, value)


@functools.cache
def _coercion(hint: Any) -> tuple[Callable[[str, Any], Any] | None, bool]:
    """Return the coercion for an annotation (None: values stay unchanged) and whether the annotation allows None."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    plain = [kind for kind in kinds if kind is not NoneType]
    items = [get_args(kind) for kind in plain if get_origin(kind) in LISTS]
    coercion: Callable[[str, Any], Any] | None = None
    if plain and all(kind in (bool, int, float) for kind in plain):
        coercion = functools.partial(_scalar, plain)
    elif plain in ([int, str], [float, str]):
        coercion = functools.partial(_number_or_word, plain[0])
    elif plain.count(str) + items.count((str,)) == len(plain) > plain.count(str) > 0:
        coercion = texts
    elif len(plain) == 1 and items in ([(int,)], [(float,)]):
        coercion = functools.partial(_numbers, whole if items == [(int,)] else number)
    elif len(plain) == 1 and get_origin(plain[0]) is Mapping and get_args(plain[0]) == (int, int):
        coercion = _counts
    return coercion, NoneType in kinds


def whole(name: str, value: Any) -> int:
    """Return an integer. Raises InputError for a boolean, a string and a number with a fraction."""
    number = _number(value)
    if number is None or not math.isfinite(number) or number != int(number):
        raise InputError(f"{name} must be a whole number, got {_quoted(value)}")
    return int(number)


def number(name: str, value: Any) -> float:
    """Return a number, possibly infinite or NaN: its range is checked elsewhere. Raises InputError."""
    if (converted := _number(value)) is None:
        raise InputError(f"{name} must be a number, got {_quoted(value)}")
    return converted


def texts(name: str, value: Any) -> str | list[str]:
    """Return a string, or the list of strings in a list, tuple or array. Raises InputError."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bytes | Mapping | set | frozenset) or not isinstance(value, Iterable):
        raise InputError(f"{name} must be a text or a list of texts, got {_quoted(value)}")
    converted = list(value)
    if not converted:
        raise InputError(f"{name}: an empty list; give at least one text")
    for place, one in enumerate(converted):
        if not isinstance(one, str):
            raise InputError(f"{name} must be a text or a list of texts, got {_quoted(one)} at place {place}")
    return [str(one) for one in converted]


def _scalar(kinds: Sequence[Any], name: str, value: Any) -> bool | int | float:
    scalar = value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value
    if bool in kinds:
        if isinstance(scalar, bool) or (len(kinds) == 1 and scalar in (0, 1) and not isinstance(scalar, str)):
            return bool(scalar)
        if len(kinds) == 1:
            raise InputError(f"{name} must be True or False, got {_quoted(value)}")
    return number(name, value) if float in kinds else whole(name, value)


def _number_or_word(kind: type, name: str, value: Any) -> int | float | str:
    """Return a word unchanged, and a number or the text of a number as int or float. Raises InputError."""
    if isinstance(value, str):
        try:
            value = kind(value)
        except ValueError:
            return str(value)
    return number(name, value) if kind is float else whole(name, value)


def _number(value: Any) -> int | float | None:
    """Return the Python number of a scalar, 0-d array or tensor; None for anything else."""
    if hasattr(value, "item") and getattr(value, "size", None) is not None and getattr(value, "ndim", 0) == 0:
        value = value.item()
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _numbers(one: Callable[[str, Any], Any], name: str, value: Any) -> list[Any]:
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise InputError(f"{name} must be a list of numbers, got {_quoted(value)}")
    return [one(name, item) for item in value]


def _counts(name: str, value: Any) -> dict[int, int]:
    if not isinstance(value, Mapping):
        raise InputError(f"{name} must be a mapping of whole numbers, like {{8: 4, 14: 2}}, got {_quoted(value)}")
    return {whole(name, key): whole(name, one) for key, one in value.items()}


def _quoted(value: Any) -> str:
    return f"{value!r:.60} of type {type(value).__name__}"


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether the value is a real number, finite as a float."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False


def option(
    default: Any,
    within: str | None = None,
    *,
    choices: Choices = None,
    flags: Sequence[str] = (),
    label: str | None = None,
    slider: tuple[float, float, float] | None = None,
) -> Any:
    """Return a field that affects the image: an argument in Python, a command-line option and part of the recipe.

    within   interval of its values, such as "(0, 1]"
    choices  allowed names: a tuple, or "module:TABLE", a table from names to implementations
    flags    command-line flags, if they are not --name
    label    label in the app, if it is not `name`
    slider   lowest value, highest value and step of the slider in the app
    """
    metadata = {"within": within, "choices": choices, "flags": flags, "label": label, "slider": slider, "saved": True}
    return field(default=default, metadata=metadata)


def argument(default: Any, within: str | None = None, *, choices: Choices = None) -> Any:
    """Return a field of the Python call alone, such as a batch size, the form of the output or a callback."""
    return field(default=default, metadata={"within": within, "choices": choices})


class KeywordChecked:
    """Base of classes whose unknown keyword arguments raise InputError with the nearest name.

    The check is in `__new__`, which comes after the `__init__` of every subclass in the order of resolution: the
    signature that editors, `inspect` and type checkers show stays that of `__init__`.

    other_names  words for arguments in other libraries, to the names here
    """

    other_names: ClassVar[Mapping[str, str]] = {}

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Return the object, not yet initialised. Raises InputError for a keyword that `__init__` does not have."""
        known = [*inspect.signature(cls).parameters] if kwargs else []
        if unknown := [name for name in kwargs if name not in known]:
            hint = cls._hint(unknown[0], known)
            raise InputError(f"{cls.__name__} takes no argument {unknown[0]!r}: {hint}", unknown[0])
        return super().__new__(cls)

    @classmethod
    def _hint(cls, name: str, known: Sequence[str]) -> str:
        """Return the end of the message about an unknown keyword."""
        return did_you_mean(name, known, f"help({cls.__name__}) lists the arguments", cls.other_names)


@dataclass(frozen=True)
class Settings(KeywordChecked):
    """Dataclass whose fields have range, choices and help. Raises InputError with the field's name for a bad value."""

    def __post_init__(self) -> None:
        for name, hint, within, choices in self._rules():
            try:
                value = _setting(name, hint, getattr(self, name))
            except InputError as error:
                raise InputError(str(error), name) from error
            object.__setattr__(self, name, value)
            if value is None:
                continue
            if within is not None and not isinstance(value, str) and not _contains(within, value):
                raise InputError(f"{name} must be {_in_words(within)}, got {value}", name)
            if choices is not None and isinstance(value, str) and value not in _table(choices):
                if {int, float} & set(get_args(hint)):
                    raise InputError(f"{name} must be a number, or {' or '.join(_table(choices))}, got {value!r}", name)
                choose(name, value, _table(choices))  # raises

    def error(self, message: str) -> InputError:
        """Return an InputError about the settings that the message names before its first quoted value."""
        words = dict.fromkeys(re.findall(r"\w+", message.partition("'")[0]))
        return InputError(message, *(word for word in words if word in self.hints()))

    def implementation(self, name: str) -> Any:
        """Return the implementation that a field with choices selects: by its name, or the given function itself."""
        return choose(name, getattr(self, name), _table(type(self).field(name).metadata["choices"]))

    @classmethod
    @functools.cache
    def _rules(cls) -> list[tuple[str, Any, str | None, Choices]]:
        """Return name, type, interval and choices of every field."""
        rules: list[tuple[str, Any, str | None, Choices]] = []
        for one in fields(cls):
            hint = cls.hints()[one.name]
            names = get_args(hint) if get_origin(hint) is Literal else None
            rules.append((one.name, hint, one.metadata.get("within"), one.metadata.get("choices") or names))
        return rules

    @classmethod
    def field(cls, name: str) -> "Field[Any]":
        """Return one field of the dataclass."""
        return {one.name: one for one in fields(cls)}[name]

    @classmethod
    @functools.cache
    def saved(cls) -> tuple[str, ...]:
        """Return the names of the fields that affect the image."""
        return tuple(one.name for one in fields(cls) if one.metadata.get("saved"))

    @classmethod
    @functools.cache
    def hints(cls) -> dict[str, Any]:
        """Return the types of the fields."""
        return get_type_hints(cls)

    @classmethod
    @functools.cache
    def help(cls) -> dict[str, str]:
        """Return the help of each field: the tables in the docstrings of the class and of its bases."""
        return field_help(cls)

    def plain(self) -> dict[str, Any]:
        """Return the fields that affect the image as JSON values; None where there is no limit."""
        return {name: plain_value(getattr(self, name)) for name in self.saved()}


def field_help(cls: type[Any]) -> dict[str, str]:
    """Return the help of a dataclass's fields: the tables in the docstrings of the class and of its bases.

    A line is `name  text`, or `name, name  text` for several fields.
    """
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        table = re.findall(r"^(\w+(?:, \w+)*) {2,}(.+(?:\n +.+)*)", inspect.cleandoc(base.__doc__ or ""), re.M)
        texts |= {name: " ".join(text.split()) for names, text in table for name in names.split(", ")}
    return {one.name: texts[one.name] for one in fields(cls)}


def plain_kinds(hint: Any) -> tuple[type, ...]:
    """Return the types of a field in JSON and on the command line, where mappings and lists are strings."""
    functions = get_origin(Callable[..., Any])
    kinds = [kind for kind in get_args(hint) or (hint,) if get_origin(kind) is not functions]
    return tuple(kind if kind in (bool, int, float, NoneType) else str for kind in kinds)


def plain_value(value: Any) -> Any:
    """Convert a value to its form in JSON and on the command line: "8:4,14:2", "4,8", None for no limit."""
    if isinstance(value, Mapping):
        return ",".join(f"{step}:{count}" for step, count in value.items())
    if isinstance(value, tuple | list):
        return ",".join(map(str, value))
    return None if value in (math.inf, -math.inf) else value


def _setting(name: str, hint: Any, value: Any) -> Any:
    """Convert a value to its annotation; strings such as "8:4,14:2" and "4,8" become mappings and lists."""
    kinds = get_args(hint)
    if isinstance(value, str) and Mapping[int, int] in kinds:
        value = _schedule(name, value)
    if Iterable[int] not in kinds:
        return coerce_value(name, hint, value)
    if isinstance(value, str):
        try:
            value = [int(word) for word in value.split(",")]
        except ValueError as error:
            raise InputError(f"{name} must be whole numbers such as 4,8, got {value!r}") from error
    value = coerce_value(name, hint, value)
    return tuple(value) if isinstance(value, list) else value


def _schedule(name: str, text: str) -> dict[int, int]:
    """Parse a string such as "8:4,14:2" to {solver step: particles}. Raises InputError."""
    pairs = [part.split(":") for part in text.split(",") if text.strip()]
    try:
        schedule = {int(step): int(count) for step, count in pairs}
    except ValueError as error:
        raise InputError(f"{name}: write STEP:PARTICLES,… such as 8:4,14:2, got {text!r}") from error
    if len(schedule) < len(pairs):
        raise InputError(f"{name}: a step is there twice in {text!r}")
    return schedule


@functools.cache
def _table(choices: str | tuple[str, ...]) -> Mapping[str, Any]:
    if isinstance(choices, tuple):
        return {choice: choice for choice in choices}
    table: Mapping[str, Any] = resolve_name(choices)
    return table


def _contains(interval: str, value: float) -> bool:
    """Return whether a value lies in an interval such as "(0, 1]"; nan lies in none."""
    low, high = (int(end) if end.strip("- ").isdigit() else float(end) for end in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    return above and (value <= high if interval[-1] == "]" else value < high)


def _in_words(interval: str) -> str:
    """Return an interval in words: "(0, 1]" is "above 0 and at most 1"."""
    low, high = interval[1:-1].split(", ")
    closed = interval[-1] == "]"
    if low == "-inf":
        return "a finite number, or inf" if closed else "a finite number"
    if interval[0] == "[" and closed and high != "inf":
        return f"from {low} to {high}"
    below = f" and {'at most' if closed else 'below'} {high}"
    if high == "inf":
        below = "" if closed else " and finite"
    return f"{'at least' if interval[0] == '[' else 'above'} {low}{below}"
