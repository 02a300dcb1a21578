"""`steer foresight`: options of the command line. Heavy imports wait inside the command."""

from pathlib import Path
from typing import Any

import click

from steer.apps.cli.options import DEVICE, Command, NumberOrWord
from steer.apps.cli.sample import SPEC, TIMEOUT
from steer.errors import InputError


@click.command(cls=Command)
@click.argument("model")
@click.option("--reward", required=True, help=SPEC)
@click.option("--judge", help="Reward of the finished images to predict, in place of --reward.")
@TIMEOUT
@click.option("--prompts", required=True, help="Embedded list, file (as in `steer sample`), or data set.")
@click.option("--prompt-column", help="Column of the prompts; by default prompt, else text or caption.")
@click.option("--num-prompts", type=click.IntRange(1), help="So many of them, evenly spaced.")
@click.option(
    "--lookahead",
    "lookaheads",
    multiple=True,
    type=NumberOrWord(int),
    default=(1, 2, 3),
    help="Coarse steps to the end, 1 is x̂0; or lora:PATH; repeatable.",
)
@click.option("--value", "values", multiple=True, help="Folder of `steer value train`, as a further row; repeatable.")
@click.option("--at", help="Solver steps, from 0, such as 2,5,8; by default at 10, 25, 40, 55, 70 and 85 % of the run.")
@click.option("--particles", default=4, type=click.IntRange(2), help="Images of each prompt, whose pairs are ranked.")
@click.option("--steps", type=click.IntRange(4), help="Solver steps of a run; by default the pipeline's own number.")
@click.option("--guidance", type=float, help="Guidance scale; by default the pipeline's own.")
@click.option("--out", default=Path("foresight"), type=click.Path(path_type=Path), help="Output folder.")
@DEVICE
def foresight(
    model: str,
    reward: str,
    judge: str | None,
    reward_timeout: float | None,
    prompts: str,
    prompt_column: str | None,
    num_prompts: int | None,
    lookaheads: tuple[int | str, ...],
    values: tuple[str, ...],
    at: str | None,
    particles: int,
    steps: int | None,
    guidance: float | None,
    out: Path,
    device: str | None,
) -> None:
    """Measure how well intermediate rewards rank the images of MODEL as the finished ones do.

    For each solver step and look-ahead: the share of pairs of images of one prompt that are ranked as at the end. Take
    the steps and the look-ahead of steering from this table. Writes foresight.md, foresight.json and foresight.png.
    """
    from steer.apps.evaluation import foresight as analysis
    from steer.apps.models import default_device, load_pipeline
    from steer.apps.prompts import evenly_chosen, load_prompts
    from steer.apps.reward_specs import resolve_reward

    chosen = evenly_chosen(load_prompts(prompts, prompt_column), num_prompts)
    given: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance}
    judged = None if judge is None else resolve_reward(judge, reward_timeout)
    scorer = resolve_reward(reward, reward_timeout)
    pipe = load_pipeline(model, default_device(device))
    pipe.set_progress_bar_config(disable=True)
    figures = analysis.foresight(
        *(pipe, scorer, chosen, lookaheads, _steps(at), particles, judged),
        {name: number for name, number in given.items() if number is not None},
        values,
    )
    analysis.write(figures, out)
    click.echo(f"{analysis.table(figures)}\n→ {out / 'foresight.png'}")


def _steps(text: str | None) -> list[int] | None:
    try:
        return None if text is None else [int(word) for word in text.split(",")]
    except ValueError as error:
        raise InputError(f"--at must be whole numbers such as 2,5,8, got {text!r}") from error
