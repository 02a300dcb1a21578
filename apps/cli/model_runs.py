"""Options of commands that run a model on prompts, with a reward: `steer tune`, `foresight` and `value train`."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import click

from steer.apps.cli.options import DEVICE
from steer.apps.cli.sample import SPEC, TIMEOUT

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
        from steer.apps.models import default_device, load_pipeline
        from steer.apps.prompts import evenly_chosen, load_prompts
        from steer.apps.reward_specs import resolve_reward

        texts = evenly_chosen(load_prompts(self.prompts, self.prompt_column), self.num_prompts)
        reward = resolve_reward(self.reward, self.reward_timeout)
        pipe = load_pipeline(self.model, default_device(self.device))
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
