"""`steer value`: options of the command line. Heavy imports wait inside the command."""

from pathlib import Path
from typing import Any

import click

from steer.apps.cli.options import DEVICE, Group, options_of
from steer.apps.cli.sample import SPEC, TIMEOUT
from steer.pipelines.settings import ValueConfig


@click.group(cls=Group)
def value() -> None:
    """Learned values: a small network on latents in place of intermediate rewards."""


@value.command()
@click.argument("model")
@click.option("--reward", required=True, help=SPEC)
@TIMEOUT
@click.option("--prompts", required=True, help="Embedded list, file (as in `steer sample`), or data set.")
@click.option("--prompt-column", help="Column of the prompts; by default prompt, else text or caption.")
@options_of(ValueConfig)
@click.option("--steps", type=click.IntRange(2), help="Solver steps of a run; by default the pipeline's own number.")
@click.option("--guidance", type=float, help="Guidance scale; by default the pipeline's own.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the value; a run is resumed.")
@DEVICE
def train(
    model: str,
    reward: str,
    reward_timeout: float | None,
    prompts: str,
    prompt_column: str | None,
    steps: int | None,
    guidance: float | None,
    out: Path,
    device: str | None,
    **options: Any,
) -> None:
    """Train the value of MODEL: the expected reward of the finished image, given the latents of a step.

    Samples images of the prompts, and learns from their steps. Use it by --value OUT of fk, svdd, beam and race, with
    prompts, steps and guidance like those of the training. Run the command again to resume.
    """
    from steer.apps.models import default_device, load_pipeline
    from steer.apps.prompts import load_prompts
    from steer.apps.reward_specs import resolve_reward
    from steer.pipelines.training.value import train_value

    config = ValueConfig(**options)
    texts, scorer = load_prompts(prompts, prompt_column), resolve_reward(reward, reward_timeout)
    pipe = load_pipeline(model, default_device(device))
    pipe.set_progress_bar_config(disable=True)
    given: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance}
    call = {name: number for name, number in given.items() if number is not None}
    learned = train_value(pipe, scorer, texts, out, config, call, {"model": model, "prompts": prompts})
    r2 = " ".join(f"{number:.2f}" for number in learned.config["r2"])
    click.echo(f"{learned.config['rollouts']} rollouts, R² of held-out ones by step: {r2} → {out}")
