"""`steer value`: options of the command line. Heavy imports wait inside the command."""

from pathlib import Path
from typing import Any

import click

from steer.apps.cli.model_runs import ModelRuns, model_runs
from steer.apps.cli.options import Group, options_of
from steer.pipelines.settings import ValueConfig


@click.group(cls=Group)
def value() -> None:
    """Learned values: a small network on latents in place of intermediate rewards."""


@value.command()
@model_runs(min_steps=2)
@options_of(ValueConfig)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder of the value; a run there is resumed."
)
def train(runs: ModelRuns, out: Path, **options: Any) -> None:
    """Train the value of MODEL: the expected reward of the finished image, given the latents of a step.

    Samples images of the prompts, and learns from their steps. A sum, such as "scene-soft + aesthetic:scenes", has one
    head for each of its rewards; the reward at use gives their weights. Use the value as --value OUT with fk, svdd,
    beam and race, and with prompts, steps and guidance similar to the training's. Run the command again to resume.
    """
    from steer.pipelines.training.value import train_value

    config, about = ValueConfig(**options), {"model": runs.model, "prompts": runs.prompts}
    learned = train_value(*runs.load(), out, config, runs.call, about)
    click.echo(f"{learned.config['rollouts']} rollouts, R² of held-out ones by step:")
    for name, numbers in learned.config["r2"].items():
        click.echo(f"  {name}: {' '.join(f'{number:.2f}' for number in numbers)}")
    click.echo(f"→ {out}")
