"""The command `steer evaluate`. Heavy imports are inside the command."""

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from steer.apps.cli.options import DEVICE, Command, setting_options
from steer.apps.cli.sample import SPEC, TIMEOUT
from steer.apps.processes import is_main_process, launch_context
from steer.apps.settings import errors_with_flags
from steer.errors import InputError

# Settings with their own options here: settings of a contender or of the whole evaluation.
OWN_OPTIONS = ("model", "lora", "method", "reward", "compare", "best_of", "particles", "seed", "expand", "original")
PARTICLES = click.option(
    "--particles",
    type=click.IntRange(1),
    help="K, images per run, from which the best is picked; by default the method's own number, for base 1.",
)
# Options of this command that a settings file may contain.
IN_A_FILE = {"models", "loras", "methods", "contenders", "prompts", "prompt_column", "num_prompts", "tag_column"}
IN_A_FILE |= {"checkpoints", "rewards", "reward_timeout", "seeds", "kl_prompts", "batch"}
UNSET = (None, ParameterSource.DEFAULT)


class ContenderType(click.ParamType[dict[str, Any]]):
    """A mapping of a contender's settings, from a settings file or as text on the command line."""

    name = "mapping"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> dict[str, Any]:
        """Return the mapping. Raises InputError for another value."""
        from steer.yaml_text import read_yaml

        settings = read_yaml(f"{{{value}}}", "--contender") if isinstance(value, str) else value
        if not isinstance(settings, dict):
            raise InputError(f"--contender must be a mapping such as 'method: fk, particles: 8', got {value!r:.60}")
        return settings


@click.command(cls=Command)
@click.pass_context
@click.option(
    "--model",
    "models",
    multiple=True,
    default=("scenes",),
    help="Embedded model, folder or ORGANISATION/NAME; repeatable.",
)
@click.option(
    "--lora", "loras", multiple=True, help="Finetuned weights, compared with the plain model: RUN/final; repeatable."
)
@click.option(
    "--checkpoints",
    multiple=True,
    metavar="RUN",
    help="Output folder of a finetuning run: every kept checkpoint is compared, on the run's model unless --model is "
    "given; repeatable.",
)
@click.option("--method", "methods", multiple=True, default=("base",), help="Method, as in `steer sample`; repeatable.")
@click.option(
    "--contender",
    "contenders",
    multiple=True,
    type=ContenderType(),
    help="A contender with its own settings, in place of --model, --lora and --method, such as 'model: scenes, "
    "method: fk, lam: 5'; repeatable.",
)
@click.option("--prompts", required=True, help="Embedded list, file (as in `steer sample`), or data set.")
@click.option("--prompt-column", help="Column of the prompts; by default prompt, else text or caption.")
@click.option("--num-prompts", type=click.IntRange(1), help="Number of evenly spaced prompts; by default all.")
@click.option("--tag-column", help='Column of the tasks; by default "tag", if it exists.')
@click.option(
    "--reward", "rewards", multiple=True, required=True, help=f"The first one steers and picks; repeatable. {SPEC}"
)
@TIMEOUT
@click.option("--seeds", default=1, help="Runs per prompt, with the same seeds for all contenders.")
@click.option("--seed", default=0, type=click.IntRange(0, 2**63 - 1), help="Seed of all random numbers.")
@PARTICLES
@setting_options(without=OWN_OPTIONS, others=IN_A_FILE)
@click.option("--kl-prompts", default=16, help="Prompts for the KL of finetuned weights; 0: no KL.")
@click.option("--batch", default=8, help="Images per call, for methods with independent runs.")
@click.option(
    "--out",
    default=Path("out/evaluation"),
    type=click.Path(path_type=Path),
    help="Output folder; an evaluation there is resumed.",
)
@DEVICE
def evaluate(
    context: click.Context,
    /,
    models: tuple[str, ...],
    loras: tuple[str, ...],
    checkpoints: tuple[str, ...],
    methods: tuple[str, ...],
    contenders: tuple[dict[str, Any], ...],
    prompts: str,
    prompt_column: str | None,
    num_prompts: int | None,
    tag_column: str | None,
    rewards: tuple[str, ...],
    reward_timeout: float | None,
    seeds: int,
    kl_prompts: int,
    batch: int,
    out: Path,
    device: str | None,
    **options: Any,
) -> None:
    """Compare every combination of models, finetuned weights and methods on the same prompts and seeds.

    Writes evaluation.md, evaluation.json and figures: rewards of the picked image and of all images of a run, with
    intervals, compared with the first contender, by task and by cost; diversity; KL of finetuned weights.

    Run the command again to resume; contenders may be added to a folder. An option whose help begins with a method
    applies to that method. --settings may also contain the contenders, prompts, rewards, seeds and batch.
    """
    defined = [name for name in ("model", "lora", "method") if context.get_parameter_source(f"{name}s") not in UNSET]
    if contenders and defined:
        raise InputError(f"--{defined[0]} and contenders exclude each other: name the {defined[0]} in each contender")
    model = models[0] if context.get_parameter_source("models") not in UNSET else None
    if (loras or (checkpoints and model)) and len(models) > 1:
        name = "--lora belongs" if loras else "--checkpoints belong"
        raise InputError(f"{name} to one model, got {len(models)} models: run one evaluation for each")
    from steer.apps.prompts import evenly_chosen, load_tagged_prompts

    with launch_context().local_main_process_first():
        texts, tags = load_tagged_prompts(prompts, prompt_column, tag_column)
    from steer.apps.evaluation.checkpoints import checkpoint_contenders
    from steer.apps.evaluation.report import summary
    from steer.apps.evaluation.run import evaluate as run
    from steer.apps.evaluation.spec import Contender

    trained = checkpoint_contenders(checkpoints, model, methods)
    models = models if model else tuple(dict.fromkeys(one.model for one in trained)) or models
    combined = [Contender(m, lora, method) for m in models for lora in (None, *loras) for method in methods]
    compared = [*([Contender.of(settings) for settings in contenders] or combined), *trained]
    chosen_tags = None if tags is None else evenly_chosen(tags, num_prompts)
    arguments: dict[str, Any] = {"tags": chosen_tags, "kl_prompts": kl_prompts, "batch": batch}
    arguments |= {"device": device, "reward_timeout": reward_timeout}
    options = {name: value for name, value in options.items() if value is not None}
    with errors_with_flags():
        report = run(compared, evenly_chosen(texts, num_prompts), rewards, seeds, out, options, **arguments)
    if is_main_process():
        click.echo(f"{summary(report)}\n→ {out / 'evaluation.md'}")
