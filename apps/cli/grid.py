"""`steer grid`: options of the command line. Heavy imports wait inside the command."""

from pathlib import Path
from typing import Any

import click

from steer.apps.cli.options import DEVICE, Command, setting_options
from steer.apps.cli.sample import TIMEOUT
from steer.apps.settings import errors_with_flags


@click.command(cls=Command)
@click.argument("prompt", required=False)
@click.option("--x", required=True, help="Columns: NAME=VALUE,VALUE,… or, if values contain commas, NAME=VALUE|VALUE|…")
@click.option("--y", help="Rows, in the same form.")
@TIMEOUT
@setting_options(without=("compare", "best_of"))
@click.option(
    "--out", default=Path("out/grid"), type=click.Path(path_type=Path), help="Output folder; a grid there is resumed."
)
@DEVICE
def grid(
    prompt: str | None,
    x: str,
    y: str | None,
    reward_timeout: float | None,
    out: Path,
    device: str | None,
    **settings: Any,
) -> None:
    """Sample PROMPT with every pair of values of two settings and one seed: grid.png, grid.json and the images.

    NAME is any setting below (method, reward, lam, seed, scheduler, lora, …), an argument of the pipeline, or prompt.
    The value default means the setting's default. The best image of each run is shown over its reward, and contains its
    recipe.
    """
    from steer.apps.grids import Axis, sample_grid

    with errors_with_flags():
        axes = Axis.read(x), None if y is None else Axis.read(y)
        report = sample_grid(prompt, *axes, settings, out, device, reward_timeout)
    best = max(report["cells"], key=lambda cell: cell["reward"])
    where = f"{axes[0].name}={best['x']}" + ("" if axes[1] is None else f", {axes[1].name}={best['y']}")
    click.echo(f"{len(report['cells'])} images, best {best['reward']:.3f} at {where} → {out / 'grid.png'}")
