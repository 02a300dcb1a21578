"""`steer evaluate`: the command line. Heavy imports wait inside the command."""

from pathlib import Path
from typing import Any

import click

from steer.apps.cli.options import DEVICE, Command, setting_options
from steer.apps.cli.sample import SPEC, TIMEOUT
from steer.apps.processes import is_main_process, launch_context
from steer.apps.settings import errors_with_flags
from steer.errors import InputError

# Settings of a contender or of the whole evaluation, which have options of their own here.
OWN = ("model", "lora", "method", "reward", "compare", "particles", "seed")
PARTICLES = click.option("--particles", default=4, help="K, images of a run, of which the best is picked; base has 1.")


@click.command(cls=Command)
@click.option(
    "--model", "models", multiple=True, default=("scenes",), help="Embedded, folder, ORGANISATION/NAME; again."
)
@click.option("--lora", "loras", multiple=True, help="Finetuned weights beside the model without: RUN/final; again.")
@click.option("--method", "methods", multiple=True, default=("base",), help="As in `steer sample`; again.")
@click.option("--prompts", required=True, help="Embedded list, file (as in `steer sample`), or data set.")
@click.option("--prompt-column", help="Column of the prompts; by default prompt, else text or caption.")
@click.option("--num-prompts", type=click.IntRange(1), help="So many of them, evenly spaced; by default all.")
@click.option("--tag-column", help='Column of the prompts\' tasks; by default "tag", where there is one.')
@click.option("--reward", "rewards", multiple=True, required=True, help=f"The first steers and picks. {SPEC} (*)")
@TIMEOUT
@click.option("--seeds", default=1, help="Runs of each prompt, the same for all contenders.")
@click.option("--seed", default=0, type=click.IntRange(0, 2**63 - 1), help="What all random numbers follow from.")
@PARTICLES
@setting_options(without=OWN)
@click.option("--kl-prompts", default=16, help="Prompts for the KL of finetuned weights; 0: none.")
@click.option("--batch", default=8, help="Images made in one call, where the method can.")
@click.option("--out", default=Path("out/evaluation"), type=click.Path(path_type=Path), help="A folder; it goes on.")
@DEVICE
def evaluate(
    models: tuple[str, ...],
    loras: tuple[str, ...],
    methods: tuple[str, ...],
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
    """Compares models, finetuned weights and methods, all with all, on the same prompts and seeds.

    A folder with evaluation.md, evaluation.json and pictures: rewards of the image that each run picks and of all its
    images, with intervals, against the first contender, by task and by cost; diversity; KL of finetuned weights.

    The same command goes on where it stopped; more models, methods or weights may be added to a folder. Options
    marked (*) may be given several times; where help begins with the name of a method, the option is for that one.
    """
    if loras and len(models) > 1:
        raise InputError(f"--lora belongs to one model, and there are {len(models)}: one evaluation for each")
    from steer.apps.prompts import load_tagged_prompts

    with launch_context().local_main_process_first():
        texts, tags = load_tagged_prompts(prompts, prompt_column, tag_column)
    count = min(num_prompts or len(texts), len(texts))
    chosen = [place * len(texts) // count for place in range(count)]
    from steer.apps.evaluation.report import summary
    from steer.apps.evaluation.run import Contender
    from steer.apps.evaluation.run import evaluate as run

    contenders = [Contender(m, lora, method) for m in models for lora in (None, *loras) for method in methods]
    tag_list = None if tags is None else [tags[place] for place in chosen]
    given: dict[str, Any] = {"tags": tag_list, "kl_prompts": kl_prompts, "batch": batch}
    given |= {"device": device, "reward_timeout": reward_timeout}
    options = {name: value for name, value in options.items() if value is not None}
    with errors_with_flags():
        report = run(contenders, [texts[place] for place in chosen], rewards, seeds, out, options, **given)
    if is_main_process():
        click.echo(f"{summary(report)}\n→ {out / 'evaluation.md'}")
