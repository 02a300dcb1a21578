"""`--device`: one option, the same for every command that runs a model or a reward. Imports nothing heavy."""

import click

from steer.errors import InputError


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
