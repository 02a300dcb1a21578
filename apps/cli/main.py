"""The `steer` command. Heavy imports are inside the commands: `steer --help` answers at once."""

import io
import logging
import os
import sys

import click

from steer import __version__
from steer.apps.cli.bench import bench
from steer.apps.cli.demo import demo
from steer.apps.cli.evaluate import evaluate
from steer.apps.cli.finetune import finetune
from steer.apps.cli.grid import grid
from steer.apps.cli.model_runs import foresight, tune, value
from steer.apps.cli.options import Group
from steer.apps.cli.rewards import rewards
from steer.apps.cli.sample import sample
from steer.apps.cli.tools import check_pipeline, completion, convert_lora, pick, score
from steer.apps.errors import ExitGuard, describe_os_error
from steer.apps.processes import is_main_process, shutdown_distributed
from steer.errors import InputError


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__, prog_name="steer")
@click.option(
    "--offline", is_flag=True, help="Use no network: load models and rewards from folders and the hub's cache only."
)
def steer(offline: bool) -> None:
    """Better images from a diffusion model and a reward."""
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read at the first import of huggingface_hub, which comes later


COMMANDS = (
    *(bench, check_pipeline, completion, convert_lora, demo, evaluate, finetune),
    *(foresight, grid, pick, rewards, sample, score, tune, value),
)
for command in COMMANDS:
    steer.add_command(command)


def main() -> None:
    """Run the command; errors in the input become one line on stderr and exit code 2."""
    for stream in (sys.stdout, sys.stderr):  # paths may contain bytes that are not text
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    with ExitGuard():
        _run()


def _run() -> None:
    # An early stop raises InputError, which repeats the pipelines' own warning.
    logging.getLogger("steer.pipelines").addHandler(logging.NullHandler())
    try:
        steer(standalone_mode=False)
        shutdown_distributed()
    except click.exceptions.Abort:
        if is_main_process():
            click.echo("steer: interrupted; finished work is kept: run the command again to resume", err=True)
        sys.exit(130)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
    except click.ClickException as error:
        if is_main_process():  # all processes parsed the same command line
            click.echo(f"steer: {' '.join(error.format_message().split())}", err=True)
        sys.exit(2)
    except InputError as error:
        click.echo(f"steer: {error}", err=True)
        sys.exit(2)
    except BrokenPipeError:  # the reader of the output closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        click.echo(f"steer: {' '.join(describe_os_error(error).split())}; finished work is kept", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
