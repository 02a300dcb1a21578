"""`steer check-pipeline`: options of the command line. Heavy imports wait inside the command."""

import json
from pathlib import Path

import click

from steer.apps.cli.options import DEVICE, Command
from steer.errors import InputError


@click.command("check-pipeline", cls=Command)
@click.argument("model")
@click.option("--prompt", default="a red circle left of a blue star", help="Prompt of all runs.")
@click.option(
    "--call", "arguments", default="{}", help='Further arguments of the pipeline\'s call, as JSON: {"eta": 0.5}.'
)
@click.option("--steps", default=4, type=click.IntRange(4), help="Solver steps of each run.")
@click.option("--size", default=64, type=click.IntRange(8), help="Pixels per side of example images.")
@DEVICE
@click.option("--json", "file", type=click.Path(path_type=Path), help="Also write the results to this file.")
def check_pipeline(
    model: str, prompt: str, arguments: str, steps: int, size: int, device: str | None, file: Path | None
) -> None:
    """Check which features of steer work with a pipeline, by short runs of two particles.

    MODEL is a model as in `steer sample`, or module:NAME, a pipeline or a function without arguments that returns one.
    Prints one line per check: ok, refused (with the reason), differs (a wrong result) or traceback. Exit code 1: a
    result differs, or a traceback.
    """
    from steer.apps.models import default_device, load_pipeline
    from steer.pipelines.compatibility import PipelineCheck, example_call, load_object

    try:
        given = json.loads(arguments)
    except ValueError as error:
        raise InputError(f"--call {arguments!r} is no JSON ({error})") from error
    if not isinstance(given, dict):
        raise InputError(f"--call must be a JSON object, got {arguments!r}")
    pipe = load_object(model) if ":" in model else load_pipeline(model, default_device(device))
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(disable=True)
    row = PipelineCheck(pipe, example_call(pipe, prompt, steps, size) | given).row()
    for name, outcome in row.items():
        click.echo(f"{name:10} {outcome.state:10} {outcome.reason}".rstrip())
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        outcomes = {name: {"state": one.state, "reason": one.reason} for name, one in row.items()}
        file.write_text(json.dumps({"pipeline": type(pipe).__name__, "checks": outcomes}, indent=1) + "\n")
    if any(one.state in ("differs", "traceback") for one in row.values()):
        raise SystemExit(1)
