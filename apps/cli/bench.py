"""`steer bench`: options of the command line. Heavy imports wait inside the command."""

import sys
from pathlib import Path

import click

from steer.apps.cli.options import RESOLVED_DEVICE, Command
from steer.errors import InputError

QUICK, LONG = 24.0, 600.0  # seconds of measuring; on two idle cores a quick run is over within 45, loading included


@click.command(cls=Command)
@click.option("--quick", is_flag=True, help="Fewer steps and repeats, no compilation: 45 seconds on two cores.")
@RESOLVED_DEVICE
@click.option("--json", "file", default=Path("out/bench.json"), type=click.Path(path_type=Path), help="Report file.")
@click.option(
    "--model",
    "models",
    multiple=True,
    help="scenes, or real sizes with random weights: sd15, sdxl, sd3, flux; repeatable. Default: scenes, on CUDA all.",
)
@click.option(
    "--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Precision; by default as in `sample`."
)
@click.option("--particles", default=8, type=click.IntRange(2), help="K, particles per prompt.")
@click.option("--steps", type=click.IntRange(3), help="T, solver steps; by default 20, with --quick 6.")
@click.option("--resolution", type=int, help="Pixels per side; by default the model's own.")
@click.option(
    "--seconds",
    type=click.FloatRange(0, min_open=True),
    help=f"Time for repeats; by default {LONG:g}, with --quick {QUICK:g}.",
)
def bench(
    quick: bool,
    device: str,
    file: Path,
    models: tuple[str, ...],
    dtype: str | None,
    particles: int,
    steps: int | None,
    resolution: int | None,
    seconds: float | None,
) -> None:
    """Measure the cost of steering and finetuning against the plain pipeline and naive implementations.

    Reports medians of ratios. Both sides are measured in turns in this run, at equal work, and checked to give the same
    results. Writes FILE and a picture beside it. Ctrl-C keeps all measurements so far. Exit code 1: results differ.
    """
    if file.is_dir():
        raise InputError(f"--json {file}: this is a folder; name a file")
    if file.suffix == ".png":
        raise InputError(f"--json {file}: the picture would take that name; use .json")
    import torch

    from steer.apps.bench.comparisons import EMBEDDED, BenchOptions, subjects_of
    from steer.apps.bench.report import Bench, draw, table
    from steer.apps.models import is_cpu

    chosen = models or ((EMBEDDED,) if is_cpu(device) else (EMBEDDED, "sd15", "sdxl", "sd3", "flux"))
    subjects = subjects_of(chosen, BenchOptions(device, dtype, particles, steps, resolution, quick))
    run = Bench(file, seconds or (QUICK if quick else LONG), quick, lambda line: click.echo(line, err=True))
    try:
        run.run(subjects, torch.device(device))
    except KeyboardInterrupt:
        click.echo(f"steer: interrupted; all measurements so far are in {file}", err=True)
        sys.exit(130)
    finally:
        if run.report.get("ratios"):
            draw(run.report, file.with_suffix(".png"))
            click.echo(f"{table(run.report)}\n→ {file}")
    if not all(check["passed"] for check in run.report["checks"].values()):
        click.echo("steer: results that should be the same differ; see the table", err=True)
        sys.exit(1)
