"""Base classes and common options of all commands: every given option is used or refused."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click

from steer.apps.settings import (
    ALL_OPTIONS,
    SHARED,
    flags_of,
    help_of,
    kinds_of,
    owner_of,
    within_of,
)
from steer.arguments import Settings, plain_kinds, plain_value
from steer.errors import InputError
from steer.registry import did_you_mean

F = TypeVar("F", bound=Callable[..., object])


class Command(click.Command):
    """A command that refuses a repeated single-valued option; click would silently use the last."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        """Parse the command line. Raises InputError for a single-valued option that is repeated."""
        if not context.resilient_parsing:  # a shell completes words
            check_not_repeated(self, context, args)
        return super().parse_args(context, args)


class Group(click.Group):
    """A group of such commands; its own options follow the same rule."""

    command_class = Command
    group_class = type

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        """Parse the options before the name of a command, as `Command.parse_args` does."""
        if not context.resilient_parsing:  # a shell completes words
            check_not_repeated(self, context, args)
        return super().parse_args(context, args)


def is_single_valued(option: click.Parameter) -> bool:
    """Return whether an option has one value: not `multiple`, not counted, not `--help` or `--version`."""
    return isinstance(option, click.Option) and not (option.multiple or option.count or option.is_eager)


def check_not_repeated(command: click.Command, context: click.Context, args: Sequence[str]) -> None:
    """Raise InputError for a repeated option that has one value."""
    _, _, order = command.make_parser(context).parse_args(args=list(args))
    for option in filter(is_single_valued, order):
        if (times := order.count(option)) > 1:
            value = "is a switch" if isinstance(option, click.Option) and option.is_flag else "takes one value"
            name = "/".join([*option.opts, *option.secondary_opts])
            raise InputError(f"{name} is given {times} times and {value}: give it once")


def _checked(context: click.Context, option: click.Parameter, device: str | None) -> str | None:
    """Refuse a device that this machine lacks before anything is loaded; without --device nothing is imported."""
    if device is not None:
        from steer.apps.models import check_device

        try:
            check_device(device)
        except InputError as error:  # only the main process prints it
            raise click.ClickException(str(error)) from error
    return device


def _resolved(context: click.Context, option: click.Parameter, device: str | None) -> str | None:
    """Check a device, and resolve None."""
    if context.resilient_parsing:  # a shell completes words: nothing is imported
        return device
    from steer.apps.models import default_device

    return default_device(_checked(context, option, device))


DEVICE, RESOLVED_DEVICE = (
    click.option(
        "--device",
        callback=callback,
        help="Device of models and rewards, such as cpu, cuda or cuda:1; by default the GPU if there is one.",
    )
    for callback in (_checked, _resolved)
)


def _read_settings(others: Collection[str], context: click.Context, option: click.Parameter, path: Path | None) -> None:
    """Use the settings and `others` of a YAML file as a command's defaults. Raises InputError for unknown keys."""
    if path is None:
        return
    from steer.yaml_text import read_yaml

    try:
        values = read_yaml(path.read_text(encoding="utf-8-sig"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--settings {path}: cannot be read ({error})") from error
    options = {option.name: option for option in context.command.params if isinstance(option, click.Option)}
    known = options.keys() & {*SHARED, *ALL_OPTIONS, *others}
    if not isinstance(values, dict):
        raise InputError(f"--settings {path}: expected lines of `name: value`, such as lam: 25")
    if unknown := [str(name) for name in values if name not in known]:
        hint = did_you_mean(unknown[0], known, f"`{context.command_path} --help` lists the options")
        raise InputError(f"--settings {path}: unknown key {unknown[0]!r:.60}: {hint}")
    given = {name: value for name, value in values.items() if value is not None}
    context.default_map = {
        name: (value if isinstance(value, list) else [value]) if options[name].multiple else plain_value(value)
        for name, value in given.items()
    }


class CallArgument(click.ParamType[dict[str, Any]]):
    """An argument of the pipeline's call, NAME=VALUE; a mapping in a settings file."""

    name = "NAME=VALUE"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> dict[str, Any]:
        """Return {name: value as text}. Raises InputError."""
        if isinstance(value, dict):
            return value
        name, equals, text = str(value).partition("=")
        if not (equals and name.isidentifier()):
            raise InputError(f"--call {value!r:.60}: write NAME=VALUE, such as --call guidance_rescale=0.7")
        return {name: text}


def _merge_call(context: click.Context, option: click.Parameter, given: Sequence[dict[str, Any]]) -> Any:
    """Return all arguments of the call by name. Raises InputError for an argument that is given twice."""
    names = [name for one in given for name in one]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise InputError(f"--call {repeated[0]} is given {names.count(repeated[0])} times and takes one value")
    return {name: value for one in given for name, value in one.items()} or None


def _join_loras(context: click.Context, option: click.Parameter, given: Sequence[str]) -> str | None:
    return " + ".join(given) or None


# Settings with a repeatable option: {setting: (type, callback that merges the values)}.
REPEATABLE: dict[str, tuple[Any, Callable[..., Any]]] = {
    "call": (CallArgument(), _merge_call),
    "lora": (str, _join_loras),
}


class NumberOrWord(click.ParamType[Any]):
    """A number of one kind, or a word in its place, such as auto."""

    name = "number or word"

    def __init__(self, kind: type) -> None:
        self.kind = kind

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Any:
        """Convert the text of a number to the number; return other texts unchanged."""
        try:
            return self.kind(value)
        except ValueError:
            return value


def complete_setting(context: click.Context, option: click.Parameter, incomplete: str) -> list[str]:
    """Return the names of a setting that begin with a text: methods, rewards, schedulers, embedded models, choices."""
    name, names = str(option.name), list[str]()
    if name == "reward":
        from steer.rewards import REWARDS

        names = [*REWARDS]
    elif name == "model":
        from steer.assets import MODELS, TEXT_MODELS

        names = [*MODELS, *TEXT_MODELS]
    elif name == "scheduler":
        from steer.apps.components import SCHEDULERS

        names = [*SCHEDULERS]
    else:
        choices = owner_of(name).field(name).metadata["choices"]
        names = [*choices] if isinstance(choices, tuple) else []
    return [one for one in names if one.startswith(incomplete)]


def setting_options(without: Collection[str] = (), others: Collection[str] = ()) -> Callable[[F], F]:
    """Decorate a command with an option for every setting of `steer.apps.settings`; None means the default.

    others  the command's own options that a settings file may also contain
    """
    settings_file = click.option(
        "--settings",
        "--preset",
        type=click.Path(path_type=Path),
        is_eager=True,
        expose_value=False,
        callback=partial(_read_settings, others),
        help="YAML file of the settings below, by name; `steer tune` writes one. Options on the command line "
        "override it.",
    )

    def decorate(command: F) -> F:
        for name in reversed([name for name in (*SHARED, *ALL_OPTIONS) if name not in without]):
            flags = flags_of(name)
            kinds = [kind for kind in kinds_of(name) if kind in (bool, int, float)]
            kind: Any = NumberOrWord(kinds[0]) if kinds and str in kinds_of(name) else (*kinds, str)[0]
            if kind in SHOWN_RANGES and (within := within_of(name)) is not None:
                kind = range_of(kind, within, SHOWN_RANGES)
            switch = True if kind is bool and "/" not in flags[0] else None
            given: dict[str, Any] = {"type": None if kind is bool else kind, "is_flag": switch}
            if name in REPEATABLE:
                kind, merge = REPEATABLE[name]
                given = {"type": kind, "multiple": True, "callback": merge}
            option = click.option(
                *flags, name, default=None, help=help_of(name), shell_complete=complete_setting, **given
            )
            command = option(command)
        return settings_file(command)

    return decorate


def options_of(settings: type[Settings], *names: str, **defaults: Any) -> Callable[[F], F]:
    """Decorate a command with an option for each field of a settings dataclass, with its range, default and help.

    names     the fields; all by default
    defaults  other defaults than those of the fields
    """

    def decorate(command: F) -> F:
        for one in reversed([one for one in fields(settings) if one.name in (names or settings.hints())]):
            flags = one.metadata.get("flags") or (f"--{one.name.replace('_', '-')}",)
            text, (kind, *_) = settings.help()[one.name], plain_kinds(settings.hints()[one.name])
            typed: Any = range_of(kind, one.metadata["within"]) if one.metadata["within"] else kind
            given = {"is_flag": True} if kind is bool else {"type": typed}
            default, help_text = defaults.get(one.name, one.default), text[0].upper() + text[1:] + "."
            command = click.option(*flags, one.name, default=default, help=help_text, **given)(command)
        return command

    return decorate


class _ShownIntRange(click.IntRange):
    """A range that help shows and the settings check: their message has the flag and may depend on other settings."""

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Any:
        return click.INT.convert(value, param, context)


class _ShownFloatRange(click.FloatRange):
    """As `_ShownIntRange`, for real numbers."""

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Any:
        return click.FLOAT.convert(value, param, context)


RANGES: dict[type, Any] = {int: click.IntRange, float: click.FloatRange}
SHOWN_RANGES: dict[type, Any] = {int: _ShownIntRange, float: _ShownFloatRange}


def range_of(kind: type, within: str, ranges: Mapping[type, Any] = RANGES) -> click.ParamType[Any]:
    """Return the click type for numbers of one kind in an interval such as "(0, 1]"; a plain one without bounds."""
    low, high = (None if end.strip("-") == "inf" else kind(end) for end in within[1:-1].split(", "))
    if low is None and high is None:
        return click.INT if kind is int else click.FLOAT
    numbers: click.ParamType[Any] = ranges[kind](low, high, min_open=within[0] == "(", max_open=within[-1] == ")")
    return numbers
