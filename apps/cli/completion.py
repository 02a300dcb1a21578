"""`steer completion`: the script with which a shell completes commands, options and names."""

import click
from click.shell_completion import get_completion_class

from steer.apps.cli.options import Command

SHELLS = ("bash", "fish", "zsh")


@click.command(cls=Command)
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, /, shell: str) -> None:
    """Print the completion script of SHELL.

    Append it to ~/.bashrc or ~/.zshrc, or write it to ~/.config/fish/completions/steer.fish.
    """
    kind = get_completion_class(shell)
    assert kind is not None, "one of SHELLS"
    root = context.find_root()
    click.echo(kind(root.command, {}, "steer", "_STEER_COMPLETE").source())
