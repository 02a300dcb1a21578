"""The `steer` command. Heavy imports are inside the commands: `steer --help` answers at once."""

import io
import json
import logging
import os
import sys
from pathlib import Path

import click

from steer import __version__
from steer.apps.cli.bench import bench
from steer.apps.cli.check_pipeline import check_pipeline
from steer.apps.cli.completion import completion
from steer.apps.cli.convert_lora import convert_lora
from steer.apps.cli.demo import demo
from steer.apps.cli.evaluate import evaluate
from steer.apps.cli.finetune import finetune
from steer.apps.cli.foresight import foresight
from steer.apps.cli.grid import grid
from steer.apps.cli.options import DEVICE, Group
from steer.apps.cli.pick import pick
from steer.apps.cli.rewards import rewards
from steer.apps.cli.sample import SPEC, TIMEOUT, sample
from steer.apps.cli.tune import tune
from steer.apps.cli.value import value
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


@steer.command()
@click.argument("images", nargs=-1, type=click.Path(path_type=Path), metavar="IMAGE...")
@click.option("--prompt", "texts", multiple=True, help="Prompt of all images, or one per image; repeatable.")
@click.option("--prompts", "file", type=click.Path(path_type=Path), help="File with one prompt per image.")
@click.option("--prompt-column", help="Column of the prompts; by default prompt, else text or caption.")
@click.option("--reward", required=True, help=SPEC)
@TIMEOUT
@DEVICE
def score(
    images: tuple[Path, ...],
    texts: tuple[str, ...],
    file: Path | None,
    prompt_column: str | None,
    reward: str,
    reward_timeout: float | None,
    device: str | None,
) -> None:
    """Score IMAGEs and print JSON, with the components of a composed reward.

    IMAGE is a file, a folder (of `steer sample`, or with captions), or a table (.csv, .jsonl, .json, .tsv, .parquet)
    with columns of images and prompts. Rewards that read prompts require them. Images that cannot be scored are listed
    in the error, the other images are scored, and the exit code is 2.
    """
    from steer.apps.models import default_device
    from steer.apps.reward_specs import resolve_reward
    from steer.apps.scoring import collect_images, score_images
    from steer.reward import attribute

    samples = collect_images(images, texts, file, prompt_column)
    loaded = resolve_reward(reward, reward_timeout)
    rows, errors = score_images(loaded, samples, default_device(device))
    if cost := attribute(loaded, "cost", None):  # only chat endpoints have it
        click.echo(f"steer: {cost}", err=True)
    prompts = {one.prompt for one in samples}
    output = {"reward": reward, "prompt": prompts.pop() if len(prompts) == 1 else None}
    if len(errors) < len(samples):
        click.echo(json.dumps(output | {"scores": rows}, indent=1))
    if errors:
        count = "" if len(samples) == 1 else f"{len(errors)} of {len(samples)} images have no score: "
        raise InputError(count + "; ".join(errors))


COMMANDS = (
    *(bench, check_pipeline, completion, convert_lora, demo, evaluate, finetune),
    *(foresight, grid, pick, rewards, sample, tune, value),
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
