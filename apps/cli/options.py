"""Base classes of all commands: what is given is used or refused, never dropped in silence."""

from collections.abc import Sequence

import click

from steer.errors import InputError


class Command(click.Command):
    """A command that refuses an option with one value where it is given twice (click takes the last in silence)."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        """Parse the words of the command line. Raises InputError for a single-valued option that is repeated."""
        check_not_repeated(self, context, args)
        return super().parse_args(context, args)


class Group(click.Group):
    """A group whose own options, and those of its commands, follow the same rule."""

    command_class = Command
    group_class = type

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        """Parse the options before the name of a command, as `Command.parse_args` does."""
        check_not_repeated(self, context, args)
        return super().parse_args(context, args)


def is_single_valued(option: click.Parameter) -> bool:
    """Whether an option has one value: not `multiple`, not counted, and no `--help` or `--version`, which end it."""
    return isinstance(option, click.Option) and not (option.multiple or option.count or option.is_eager)


def check_not_repeated(command: click.Command, context: click.Context, args: Sequence[str]) -> None:
    """Raise InputError where the words give an option twice that has one value."""
    _, _, order = command.make_parser(context).parse_args(args=list(args))
    for option in order:
        if is_single_valued(option) and order.count(option) > 1:
            flags = isinstance(option, click.Option) and option.is_flag
            value = "is a switch" if flags else "takes one value"
            name = "/".join([*option.opts, *option.secondary_opts])
            raise InputError(f"{name} is given {order.count(option)} times and {value}: give it once")


def _checked(context: click.Context, option: click.Parameter, device: str | None) -> str | None:
    """Refuse a device that this machine lacks before anything is loaded. Nothing is imported where none is given."""
    if device is not None:
        from steer.apps.models import check_device

        try:
            check_device(device)
        except InputError as error:  # as click's own, which only one of several processes prints
            raise click.ClickException(str(error)) from error
    return device


DEVICE = click.option(
    "--device",
    callback=_checked,
    help="Where models and rewards run, such as cpu, cuda or cuda:1; by default the GPU if there is one.",
)
