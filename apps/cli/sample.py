"""`steer sample`: the command line. Heavy imports wait inside the command."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from steer.apps.cli.options import DEVICE, Command, setting_options
from steer.apps.processes import is_main_process, launch_context
from steer.apps.settings import SamplingConfig, choose_method, errors_with_flags, help_of
from steer.errors import InputError

if TYPE_CHECKING:
    from steer.apps.prompts import PromptRow


SPEC = help_of("reward")
TIMEOUT = click.option("--reward-timeout", type=float, help="Time limit of one call of the reward, in seconds.")
FLAGS = "nsfw_content_detected"
# All other options come from the image.
WITH_REPLAY = {"replay", "out", "device", "dtype", "reward", "reward_timeout", "lora", "preview", "lookahead", "value"}


@click.command(cls=Command)
@click.pass_context
@click.argument("prompt", nargs=-1)
@click.option(
    "--prompts",
    "prompt_file",
    type=click.Path(path_type=Path),
    help="File of prompts: .txt, .jsonl, .json, .csv, .tsv, .parquet.",
)
@click.option("--prompt-column", help="Column of the prompts; by default prompt, else text or caption.")
@click.option(
    "--purpose",
    help="picture: the best one, by search (race); samples: draws from p(x0) exp(λ r(x0)) (fk). Replaces --method; "
    "by default picture, or samples if an option is given that only fk has.",
)
@TIMEOUT
@setting_options()
@click.option(
    "--out", default=Path("out"), type=click.Path(path_type=Path), help="Output folder; a run there is resumed."
)
@click.option("--replay", type=click.Path(path_type=Path), help="PNG of an earlier run: reproduce that image.")
@click.option(
    "--keep", type=click.IntRange(1), help="Number of good and diverse images of each prompt to show in grid.png."
)
@click.option(
    "--diverse", type=click.FloatRange(0), help="Weight of diversity in the choice of --keep.  [default: 0.5]"
)
@click.option("--checklist", help="Reward whose requirements grid.png ticks or crosses below each image: scene.")
@click.option("--animation", is_flag=True, help="reno, noise-search: also progress.gif for each prompt.")
@DEVICE
@click.option("--attention", default="auto", help="Attention backend: auto, xformers, sdpa or eager.")
@click.option(
    "--compile", "compiled", is_flag=True, help="Run the denoiser through torch.compile: faster for many prompts."
)
@click.option("--micro-batch", type=int, help="Rows of the denoiser at a time; 0: as many as fit into memory.")
@click.option(
    "--offload",
    type=click.Choice(["model", "sequential"]),
    help="Keep components (model) or layers (sequential, slower) on the CPU while the GPU does not need them.",
)
def sample(
    context: click.Context,
    /,
    prompt: tuple[str, ...],
    prompt_file: Path | None,
    purpose: str | None,
    prompt_column: str | None,
    out: Path,
    device: str | None,
    reward_timeout: float | None,
    keep: int | None,
    diverse: float | None,
    animation: bool,
    checklist: str | None,
    replay: Path | None,
    attention: str,
    compiled: bool,
    micro_batch: int | None,
    offload: str | None,
    **settings: Any,
) -> None:
    """Sample PROMPT…, or the prompts of a file, steered by a reward.

    Writes images (best first), grid.png and report.json; ancestry.png of particles, progress.png of optimised noise.
    Text models, such as scenes-text, write texts.jsonl in place of images.

    Columns of a file that are named after arguments of the pipeline (negative_prompt, seed) apply to their prompt.

    If help begins with the names of methods, the option belongs to these methods.

    --replay reproduces an image of an earlier run from the recipe inside its PNG; only --out, --device, --dtype,
    --reward, --reward-timeout, --lora, --preview, --lookahead and --value may be combined with it. Exit code 0 if the
    pixels are the same, else 1.

    Under torchrun or accelerate launch the prompts are divided among the processes.
    """
    if replay is not None:
        return _replay(context)
    with launch_context().local_main_process_first():
        prompts = _prompts(prompt, prompt_file, prompt_column)
    from steer.apps.expansion import is_text_model
    from steer.apps.methods import ComputeOptions
    from steer.apps.picking import check_keep
    from steer.apps.sampling import TEXTS
    from steer.apps.sampling import sample as run

    compute_options = ComputeOptions(attention, compiled, micro_batch, offload)
    texts = is_text_model(str(settings["model"] or SamplingConfig.field("model").default))
    with errors_with_flags():
        config = SamplingConfig.of(**choose_method(settings, purpose, texts))
    check_keep(keep, diverse, config.particles)
    if texts and keep is not None:
        raise InputError(f"--keep: model {config.model!r} makes texts: leave it out")
    report = run(prompts, config, out, device, reward_timeout, animation, compute_options, checklist)
    if keep is not None and is_main_process():
        report = _keep(report, out, keep, diverse, checklist)
    written = out / (TEXTS if texts else "grid.png")
    means = [sum(entry["rewards"]) / len(entry["rewards"]) for entry in report["prompts"]]
    best = [max(entry["rewards"]) for entry in report["prompts"]]
    if is_main_process():
        _warn_nsfw(report["prompts"])
        strengths = [entry["lam"] for entry in report["prompts"] if "lam" in entry]
        lam = f", λ {min(strengths):.3g} to {max(strengths):.3g}" if strengths else ""
        click.echo(
            f"{len(prompts)} prompts, {config.reward}: best {sum(best) / len(best):.3f}, "
            f"mean {sum(means) / len(means):.3f}, {report['cost']['seconds']:.1f} s by {config.method}{lam} → {written}"
        )


def _keep(report: dict[str, Any], out: Path, keep: int, diverse: float | None, checklist: str | None) -> dict[str, Any]:
    """Choose images of each prompt, draw grid.png with only these, and return the report."""
    from steer.apps.picking import keep_diverse
    from steer.apps.plots import draw_grid
    from steer.apps.sampling import load_checklist, with_checklists

    report = keep_diverse(report, out, keep, 0.5 if diverse is None else diverse)
    draw_grid(with_checklists(report, out, load_checklist(checklist)), out)
    return report


def _warn_nsfw(entries: Sequence[Mapping[str, Any]]) -> None:
    """Warn about images that the safety checker blackened: their rewards are of the images before the check."""
    flags = [flag for entry in entries for one in (entry, entry.get("base", {})) for flag in one.get(FLAGS, ())]
    if any(flags):
        click.echo(
            f"steer: the model's safety checker blackened {sum(flags)} of {len(flags)} images (nsfw_content_detected "
            "in report.json); their rewards are of the images before",
            err=True,
        )


def _prompts(words: tuple[str, ...], file: Path | None, column: str | None) -> "list[PromptRow]":
    from steer.apps.prompts import PromptRow, read_rows

    if bool(words) == bool(file):
        raise InputError("give prompts as words or with --prompts FILE, one of the two")
    if column is not None and file is None:
        raise InputError("--prompt-column belongs to --prompts FILE: leave it out")
    prompts = read_rows(file, column) if file else [PromptRow(text.strip()) for text in words]
    if not all(row.prompt for row in prompts):
        raise InputError("a prompt is empty")
    return prompts


def _replay(context: click.Context) -> None:
    """Reproduce the image; exit with 1 if its pixels differ."""
    given_options = [
        option
        for option in context.command.params
        if context.get_parameter_source(str(option.name)) is ParameterSource.COMMANDLINE
    ]
    if surplus := [option for option in given_options if option.name not in WITH_REPLAY]:
        name = surplus[0].opts[0] if isinstance(surplus[0], click.Option) else surplus[0].human_readable_name
        raise InputError(f"--replay takes all from the image: leave out {name}")
    if not is_main_process():
        return  # one process is enough for one image
    from steer.apps.replay import replay

    given = {option.name: context.params[option.name] for option in given_options if option.name != "replay"}
    replayed = replay(context.params["replay"], **{"out": context.params["out"]} | given)
    click.echo(replayed.message)
    raise SystemExit(0 if replayed.same else 1)
