"""`steer tune`, `foresight` and `value train`: commands that run a model on prompts, with a reward.

Heavy imports wait inside the commands.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from steer.apps.cli.options import DEVICE, Command, Group, NumberOrWord, options_of
from steer.apps.cli.sample import SPEC, TIMEOUT
from steer.errors import InputError
from steer.pipelines.settings import FKSettings, ValueConfig

if TYPE_CHECKING:
    from steer.reward import Reward


@dataclass(frozen=True)
class ModelRuns:
    """The model, reward and prompts of a command, as given on the command line."""

    model: str
    reward: str
    reward_timeout: float | None
    prompts: str
    prompt_column: str | None
    num_prompts: int | None
    steps: int | None
    guidance: float | None
    device: str | None

    @property
    def call(self) -> dict[str, Any]:
        """Arguments of the pipeline's call."""
        given = {"num_inference_steps": self.steps, "guidance_scale": self.guidance}
        return {name: value for name, value in given.items() if value is not None}

    def load(self) -> "tuple[Any, Reward, list[str]]":
        """Load the pipeline, the reward and the prompts, evenly spaced if only some are wanted."""
        from steer.apps.models import load_pipeline
        from steer.apps.prompts import evenly_chosen, load_prompts
        from steer.apps.reward_specs import resolve_reward

        texts = evenly_chosen(load_prompts(self.prompts, self.prompt_column), self.num_prompts)
        reward = resolve_reward(self.reward, self.reward_timeout)
        pipe = load_pipeline(self.model, self.device)
        pipe.set_progress_bar_config(disable=True)
        return pipe, reward, texts


def model_runs(min_steps: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a command, which receives its `ModelRuns` first and then its own options."""
    options = (
        click.argument("model"),
        click.option("--reward", required=True, help=SPEC),
        TIMEOUT,
        click.option("--prompts", required=True, help="Embedded list, file (as in `steer sample`), or data set."),
        click.option("--prompt-column", help="Column of the prompts; by default prompt, else text or caption."),
        click.option("--num-prompts", type=click.IntRange(1), help="Number of evenly spaced prompts; by default all."),
        click.option(
            "--steps",
            type=click.IntRange(min_steps),
            help="Solver steps of a run; by default the pipeline's own number.",
        ),
        click.option("--guidance", type=float, help="Guidance scale; by default the pipeline's own."),
        DEVICE,
    )

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**given: Any) -> None:
            own = {one.name: given.pop(one.name) for one in fields(ModelRuns)}
            command(ModelRuns(**own), **given)

        for option in reversed(options):
            run = option(run)
        return run

    return decorate


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
