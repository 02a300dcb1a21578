"""`steer foresight`: options of the command line. Heavy imports wait inside the command."""

from pathlib import Path

import click

from steer.apps.cli.model_runs import ModelRuns, model_runs
from steer.apps.cli.options import Command, NumberOrWord
from steer.errors import InputError


@click.command(cls=Command)
@model_runs(min_steps=4)
@click.option("--judge", help="Reward of the finished images that is predicted, in place of --reward.")
@click.option(
    "--lookahead",
    "lookaheads",
    multiple=True,
    type=NumberOrWord(int),
    default=(1, 2, 3),
    help="Look-ahead: coarse steps to the end, 1 is x̂0; or lora:PATH; repeatable.",
)
@click.option(
    "--value",
    "values",
    multiple=True,
    help="Folder of a learned value of `steer value train`, as a further row; repeatable.",
)
@click.option("--at", help="Solver steps, from 0, such as 2,5,8; by default at 10, 25, 40, 55, 70 and 85 % of the run.")
@click.option("--particles", default=4, type=click.IntRange(2), help="Images of each prompt; their pairs are ranked.")
@click.option("--out", default=Path("foresight"), type=click.Path(path_type=Path), help="Output folder.")
def foresight(
    runs: ModelRuns,
    judge: str | None,
    lookaheads: tuple[int | str, ...],
    values: tuple[str, ...],
    at: str | None,
    particles: int,
    out: Path,
) -> None:
    """Measure how well intermediate rewards predict the final ranking of images of MODEL.

    For each solver step and look-ahead: the share of pairs of images of one prompt that are ranked as at the end.
    Choose the steps and the look-ahead of steering from this table. Writes foresight.md, foresight.json and
    foresight.png.
    """
    from steer.apps.evaluation import foresight as analysis
    from steer.apps.reward_specs import resolve_reward

    judged = None if judge is None else resolve_reward(judge, runs.reward_timeout)
    steps = _steps(at)
    figures = analysis.foresight(*runs.load(), lookaheads, steps, particles, judged, runs.call, values)
    analysis.write(figures, out)
    click.echo(f"{analysis.table(figures)}\n→ {out / 'foresight.png'}")


def _steps(text: str | None) -> list[int] | None:
    try:
        return None if text is None else [int(word) for word in text.split(",")]
    except ValueError as error:
        raise InputError(f"--at must be whole numbers such as 2,5,8, got {text!r}") from error
