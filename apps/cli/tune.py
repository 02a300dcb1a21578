"""`steer tune`: options of the command line. Heavy imports wait inside the command."""

from pathlib import Path
from typing import Any

import click

from steer.apps.cli.options import DEVICE, Command
from steer.apps.cli.sample import SPEC, TIMEOUT
from steer.errors import InputError


@click.command(cls=Command)
@click.argument("model")
@click.option("--reward", required=True, help=SPEC)
@TIMEOUT
@click.option("--prompts", required=True, help="Embedded list, file (as in `steer sample`), or data set.")
@click.option("--prompt-column", help="Column of the prompts; by default prompt, else text or caption.")
@click.option("--num-prompts", type=click.IntRange(1), help="So many of them, evenly spaced.")
@click.option("--budget", required=True, type=click.IntRange(2), help="Denoiser evaluations for each prompt.")
@click.option(
    "--purpose",
    default="picture",
    type=click.Choice(["picture", "samples"]),
    help="picture: one best image, by race, beam search, drafts or best-of-N; samples: fk at strength --lam.",
)
@click.option("--lam", type=float, help="Strength of --purpose samples.")
@click.option("--steps", type=click.IntRange(4), help="Solver steps of a run; by default the pipeline's own number.")
@click.option("--guidance", type=float, help="Guidance scale; by default the pipeline's own.")
@click.option("--seed", default=0, type=click.IntRange(0, 2**62))
@click.option("--out", default=Path("out/tune"), type=click.Path(path_type=Path), help="Folder; a run is resumed.")
@DEVICE
def tune(
    model: str,
    reward: str,
    reward_timeout: float | None,
    prompts: str,
    prompt_column: str | None,
    num_prompts: int | None,
    budget: int,
    purpose: str,
    lam: float | None,
    steps: int | None,
    guidance: float | None,
    seed: int,
    out: Path,
    device: str | None,
) -> None:
    """Choose the options of steering MODEL on prompts, at an equal number of evaluations.

    Particles, steps of resampling or rungs, branches and look-ahead. Writes tune.md, with intervals and differences to
    best-of-N, tune.json and preset.yaml for `steer sample --preset`. Keep these prompts out of later comparisons.
    """
    if (purpose == "samples") != (lam is not None):
        raise InputError("--lam and --purpose samples need each other: the strength decides what is sampled")
    from steer.apps.evaluation import tune as tuning
    from steer.apps.models import default_device, load_pipeline
    from steer.apps.prompts import evenly_chosen, load_prompts
    from steer.apps.reward_specs import resolve_reward

    chosen = evenly_chosen(load_prompts(prompts, prompt_column), num_prompts)
    scorer = resolve_reward(reward, reward_timeout)
    pipe = load_pipeline(model, default_device(device))
    pipe.set_progress_bar_config(disable=True)
    given: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance}
    call = {name: value for name, value in given.items() if value is not None}
    shared = {"model": model, "reward": reward}
    results = tuning.tune(pipe, scorer, chosen, budget, out, purpose, lam, call, shared, seed)
    click.echo(f"{tuning.table(results)}\nbest: {results['best']} → {out / tuning.PRESET}")
