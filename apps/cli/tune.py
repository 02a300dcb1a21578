"""`steer tune`: options of the command line. Heavy imports wait inside the command."""

from pathlib import Path

import click

from steer.apps.cli.model_runs import ModelRuns, model_runs
from steer.apps.cli.options import Command, NumberOrWord
from steer.errors import InputError
from steer.pipelines.settings import FKSettings


@click.command(cls=Command)
@model_runs(min_steps=4)
@click.option("--budget", required=True, type=click.IntRange(2), help="Denoiser evaluations for each prompt.")
@click.option(
    "--purpose",
    default="picture",
    type=click.Choice(["picture", "samples"]),
    help="picture: one best image, by race, beam search, drafts or best-of-N; samples: fk at strength --lam.",
)
@click.option(
    "--lam",
    type=NumberOrWord(float),
    help="Strength of --purpose samples, a number or auto, which best-of-N chooses [default: auto].",
)
@click.option("--seed", default=0, type=click.IntRange(0, 2**62))
@click.option(
    "--out", default=Path("out/tune"), type=click.Path(path_type=Path), help="Output folder; a run there is resumed."
)
def tune(runs: ModelRuns, budget: int, purpose: str, lam: float | str | None, seed: int, out: Path) -> None:
    """Choose the options of steering MODEL on prompts, at an equal number of evaluations.

    The options are particles, steps of resampling or rungs, branches and look-ahead. Writes tune.md, with intervals and
    differences from best-of-N, tune.json, and preset.yaml for `steer sample --preset`. Keep these prompts out of later
    comparisons.
    """
    if purpose != "samples" and lam is not None:
        raise InputError("--lam is the strength of --purpose samples: leave it out, or add that purpose")
    lam = FKSettings(lam="auto" if lam is None else lam).lam if purpose == "samples" else None
    from steer.apps.evaluation import tune as tuning

    shared = {"model": runs.model, "reward": runs.reward}
    results = tuning.tune(*runs.load(), budget, out, purpose, lam, runs.call, shared, seed)
    click.echo(f"{tuning.table(results)}\nbest: {results['best']} → {out / tuning.PRESET}")
