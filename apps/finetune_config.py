"""What `steer finetune` is told: a YAML file and options, held to one schema before anything heavy happens."""

import inspect
import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from steer.apps.finetune_job import METHODS, FinetuneJob
from steer.apps.named_errors import named
from steer.apps.yaml_text import read_yaml
from steer.assets import CONFIGS
from steer.choices import choose, nearest
from steer.errors import InputError
from steer.pipelines import FinetuneSettings
from steer.pipelines.choices import settings_of

DEFAULTS = {"log_with": ("tensorboard",)}  # where the command has another than FinetuneSettings
NESTED = ("options", "call")  # keys that hold others: --options.beta
TYPES = {  # pydantic's kinds of error, in the words of a YAML file
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number (1e9 does for no limit)",
    "bool_type": "true or false",
    "string_type": "text (a number in quotes is one)",
    "tuple_type": "a list, like [a, b]",
    "dict_type": "a mapping of keys to values",
    "model_type": "a mapping of keys to values",
}


@dataclass(frozen=True)
class Source:
    """Where keys came from, to say so: a configuration, and the keys that the command line changed."""

    name: str
    changed: frozenset[str] = frozenset()

    def key(self, key: str) -> str:
        """A key, or a place inside its value, as the user wrote it."""
        said = {key, key.partition(".")[0]} & self.changed
        return f"--{key.replace('_', '-')}" if said else f"{self.name}: {key}"

    def blame(self, error: InputError) -> InputError:
        """The error with the place of the key that its message begins with."""
        first, _, rest = str(error).partition(" ")
        known = next((key for key in (first, f"options.{first}") if key in self.changed), None)
        return InputError(f"{self.key(known)} {rest}" if known else f"{self.name}: {error}")


@dataclass(frozen=True)
class FinetuneConfig:
    """All that is known of a run before it begins."""

    job: FinetuneJob
    options: dict[str, Any]
    settings: FinetuneSettings
    source: Source

    def plain(self) -> dict[str, Any]:
        """Every key with its value, as a configuration file holds them."""
        told = asdict(self.job) | {"options": self.options} | asdict(self.settings)
        return json.loads(json.dumps(told))

    def method(self, pipe: Any, reward: Any) -> Any:
        """The method, over a pipeline or, to look at the settings alone, over None."""
        return METHODS[self.job.method](pipe, reward, **self.options)


def read_config(name: str, changes: Mapping[str, str] | None = None) -> FinetuneConfig:
    """The configuration of an embedded name or a file, with `changes`, key → YAML, in place of what it says.

    Raises InputError, one line, for the first thing that is wrong.
    """
    changes, source = dict(changes or {}), Source(name, frozenset(changes or {}))
    told = _read_file(name)
    given = changes.pop("method", told.get("method"))
    if not isinstance(given, str):
        raise InputError(f"{source.key('method')} must be one of {', '.join(METHODS)}, got {json.dumps(given)}")
    with named(source.key("method")):
        choose("method", given, METHODS)
    schema = schema_of(given)
    told = _changed(told, changes, schema) | {"method": given}
    found = _validated(schema, _as_drawn(told, source), source)
    parts = {cls: {one.name: found[one.name] for one in fields(cls)} for cls in (FinetuneJob, FinetuneSettings)}
    try:
        job, settings = FinetuneJob(**parts[FinetuneJob]), FinetuneSettings(**parts[FinetuneSettings])
    except InputError as error:
        raise source.blame(error) from error
    return FinetuneConfig(job, found["options"], settings, source)


@cache
def schema_of(method: str) -> type[BaseModel]:
    """The keys of a method's configuration, with types and defaults: those of the classes that take them."""
    strict = ConfigDict(extra="forbid", allow_inf_nan=False)
    init = METHODS[method].__init__
    hints, taken = get_type_hints(init), inspect.signature(init).parameters.values()
    own: dict[str, Any] = {one.name: (hints[one.name], one.default) for one in taken if one.kind is one.KEYWORD_ONLY}
    options: Any = create_model(f"options of {method}", __config__=strict, **own)
    keys: dict[str, Any] = {"options": (options, Field(default_factory=options))}
    for cls in (FinetuneJob, FinetuneSettings):
        hints = get_type_hints(cls)
        for one in fields(cls):
            factory = Field(default_factory=one.default_factory) if one.default_factory is not MISSING else None
            default = factory or (... if one.default is MISSING else DEFAULTS.get(one.name, one.default))
            keys[one.name] = (hints[one.name], default)
    return create_model(method, __config__=strict, **keys)


def _read_file(name: str) -> dict[str, Any]:
    path = CONFIGS.get(name, Path(name))
    try:
        told = read_yaml(path.read_text(encoding="utf-8-sig"), name)
    except FileNotFoundError as error:
        raise InputError(f"unknown configuration {name!r}: use {nearest(name, CONFIGS)}, or a YAML file") from error
    except OSError as error:
        raise InputError(f"{name}: cannot read the configuration ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8 text (byte {error.start})") from error
    if not isinstance(told, dict):
        raise InputError(f"{name}: expected lines of `key: value`, as in {nearest(name, CONFIGS)}")
    return told


def _changed(told: dict[str, Any], changes: Mapping[str, str], schema: type[BaseModel]) -> dict[str, Any]:
    """What the file says with the words of the command line in their places."""
    told = dict(told)
    for key, word in changes.items():
        name, _, inner = key.partition(".")
        value = _value(key, word, schema)
        if name not in NESTED or not inner:
            told[key] = value
        elif isinstance(before := told.get(name, {}), dict):
            told[name] = before | {inner: value}
    return told


def _as_drawn(told: Mapping[str, Any], source: Source) -> dict[str, Any]:
    """The keys with what human choices were drawn with, where there are any: it stands for what nobody says otherwise.

    Choices of the command line take the place of a file's prompts, and of what it says of sampling.
    """
    said = {key.partition(".")[0] for key in source.changed}
    asked = "choices" in said and told.get("choices") is not None
    told = {key: value for key, value in told.items() if not asked or key != "prompts" or key in said}
    if not isinstance(folder := told.get("choices"), str) or told.get("prompts") is not None:
        return told
    with named(source.key("choices")):
        drawn = settings_of(folder)
    return drawn | {key: value for key, value in told.items() if not asked or key in said or key not in drawn}


def _value(key: str, word: str, schema: type[BaseModel]) -> Any:
    """A word of the command line as YAML; where text is asked for, it is the text as it stands."""
    asked = schema.model_fields[key].annotation if key in schema.model_fields else None
    text = asked is str or (asked == str | None and word != "null")
    return word if text else read_yaml(word, f"--{key.replace('_', '-')}")


def _validated(schema: type[BaseModel], told: Mapping[str, Any], source: Source) -> dict[str, Any]:
    try:
        # By the rules of JSON: a list is a tuple, an integer is a float, and a text is never a number.
        return schema.model_validate_json(json.dumps(told, default=str), strict=True).model_dump()
    except ValidationError as error:
        # An unknown key first: the key that is missing may be the one that was meant.
        first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        raise InputError(_unknown(key, schema, source))
    if first["type"] == "missing":
        raise InputError(f"{source.name}: {key} is missing: give it there, or with --{key.replace('_', '-')}")
    asked = TYPES.get(first["type"]) or first["msg"].removeprefix("Input should be ")
    raise InputError(f"{source.key(key)} must be {asked}, got {json.dumps(first['input'], ensure_ascii=False):.80}")


def _unknown(key: str, schema: type[BaseModel], source: Source) -> str:
    method, options = schema.__name__, _options_of(schema).model_fields
    outer, _, inner = key.partition(".")
    if key in options:
        return f"{source.key(key)}: unknown key, an option of {method}: write it under options, or --options.{key}"
    if outer == "options" and inner:
        return f"{source.key(key)}: unknown option of {method}: did you mean {nearest(inner, options)}?"
    return f"{source.key(key)}: unknown key, did you mean {nearest(key, schema.model_fields)}?"


def _options_of(schema: type[BaseModel]) -> Any:
    return schema.model_fields["options"].annotation
