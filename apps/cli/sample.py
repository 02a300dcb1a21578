"""`steer sample`: the words of the command line. Heavy imports wait inside the command."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from steer.apps.cli.options import DEVICE, Command
from steer.apps.processes import is_main_process, launch_context
from steer.errors import InputError

if TYPE_CHECKING:
    from steer.apps.prompts import PromptRow


SPEC = "NAME[:ARGUMENT], a sum like hpsv2.1:5 + imagereward:1, a folder or a YAML file; `steer rewards` lists names."
TIMEOUT = click.option("--reward-timeout", type=float, help="Seconds that one call of the reward may take.")
FLAGS = "nsfw_content_detected"
WITH_REPLAY = {
    "replay",
    "out",
    "device",
    "dtype",
    "reward",
    "reward_timeout",
    "lora",
    "preview",
}  # the rest comes from the image


@click.command(cls=Command)
@click.pass_context
@click.argument("prompt", nargs=-1)
@click.option(
    "--prompts", "prompt_file", type=click.Path(path_type=Path), help="File: .txt, .jsonl, .json, .csv, .tsv, .parquet."
)
@click.option("--prompt-column", help="Column of the prompts; by default prompt, else text or caption.")
@click.option("--model", default="scenes", help="Embedded model, folder, .safetensors file, or ORGANISATION/NAME.")
@click.option(
    "--variant", help="Of the model's weights, such as fp16; by default plain ones, or the folder's only one."
)
@click.option("--config", "model_config", help="For a single file: folder of such a model in diffusers' format.")
@click.option(
    "--method",
    default="fk",
    help="fk, svdd, beam, best-of-n, base, reno (for one-step models, like scenes-turbo) or noise-search.",
)
@click.option("--lora", help="Finetuned weights that the model wears: RUN/final, or a LoRA file.")
@click.option("--reward", default="scene-soft", help=SPEC)
@TIMEOUT
@click.option("--particles", "--seeds", "particles", default=4, help="K, images for each prompt.")
@click.option("--steps", type=int, help="Solver steps; by default the pipeline's own number, for reno 1.")
@click.option("--guidance", type=float, help="Guidance scale; by default the pipeline's own, for reno 0.")
@click.option(
    "--lam", type=float, help="fk, svdd: strength of the reward, λ; by default for fk 10, and svdd takes the best."
)
@click.option("--potential", default="difference", help="fk: difference, max, sum or now.")
@click.option("--resampler", default="systematic", help="fk: systematic, stratified, residual, ssp or multinomial.")
@click.option("--tempering", default="constant", help="fk: of λ along the run: constant, geometric or ess.")
@click.option("--ess-threshold", default=0.5, help="fk: resample when ESS is below this share of K; 1: always.")
@click.option("--reward-guidance", default=0.0, help="fk: how far steps lean along the reward's gradient, γ; 1 is DAS.")
@click.option("--particle-schedule", default="", help="fk: particle schedule, STEP:PARTICLES,… such as 8:4,14:2.")
@click.option(
    "--particle-schedule-rule", default="resample", help="fk: which are kept: resample by weight, or top_k rewards."
)
@click.option("--draw", default="best", help="fk: the first image: best, or weighted, a draw by the final weights.")
@click.option("--target", type=float, help="fk: a reward at which the best goes on alone; reno, noise-search: the end.")
@click.option(
    "--asynchronous-rewards",
    is_flag=True,
    default=False,
    help="fk: score beside the next denoiser call, resample one step later.",
)
@click.option("--preview", default="full", help="What decodes x̂0: full, linear, tiny, a folder, or ORGANISATION/NAME.")
@click.option("--noise-candidates", type=int, help="Starting noises of which the best K start, by short runs.")
@click.option("--screening-steps", default=4, help="Solver steps of those short runs.")
@click.option("--beams", default=2, help="beam: how many of the particles are kept at each step; divides them.")
@click.option("--iterations", default=50, help="reno, noise-search: how often images are made and scored.")
@click.option("--optimiser", default="sgd", help="reno: sgd or adam.")
@click.option("--lr", type=float, help="reno: learning rate; by default the optimiser's own, sgd 5, adam 0.05.")
@click.option("--regularisation", default=0.01, help="reno: weight of log p(‖ε‖), which keeps the noise noise.")
@click.option("--gradient", default="backprop", help="reno: backprop, or zero-order for any reward.")
@click.option("--patience", type=int, help="reno: iterations without a better reward that end a search.")
@click.option("--restarts", default=0, help="reno: how often a search begins anew when patience is out.")
@click.option("--neighbours", default=4, help="noise-search: images of each seed in an iteration.")
@click.option("--distance", default=0.5, help="noise-search: from a noise to its neighbours, up to 1.")
@click.option("--eta", type=float, help="Noise of every step, 0 to 1; by default the solver's own, for svdd, beam 1.")
@click.option("--seed", default=0, type=click.IntRange(0, 2**63 - 1), help="The same for each prompt.")
@click.option("--out", default=Path("out"), type=click.Path(path_type=Path), help="Output folder; a run there goes on.")
@click.option("--replay", type=click.Path(path_type=Path), help="PNG of an earlier run: that image once more.")
@click.option("--compare/--no-compare", default=True, help="Also make the base images, for grid.png.")
@click.option("--animation", is_flag=True, help="reno, noise-search: also progress.gif for each prompt.")
@DEVICE
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="By default float32 on the CPU, bfloat16 elsewhere.",
)
@click.option("--attention", default="auto", help="What computes it: auto, xformers, sdpa or eager.")
@click.option("--compile", "compiled", is_flag=True, help="The denoiser through torch.compile: pays for many prompts.")
@click.option("--micro-batch", type=int, help="Rows of the denoiser at a time; 0: as many as the memory takes.")
def sample(
    context: click.Context,
    /,
    prompt: tuple[str, ...],
    prompt_file: Path | None,
    prompt_column: str | None,
    out: Path,
    device: str | None,
    reward_timeout: float | None,
    animation: bool,
    replay: Path | None,
    attention: str,
    compiled: bool,
    micro_batch: int | None,
    **settings: Any,
) -> None:
    """Steers PROMPT… or the prompts of a file: images (best first), grid.png, report.json; ancestry.png of particles,
    progress.png of noise that was optimised.

    Columns of a file that are named after arguments of the pipeline (negative_prompt, seed) are for their prompt alone.

    Where help begins with the name of a method, the option is for that method alone.

    With --replay it makes an image of an earlier run again, from what the image says of itself; only --out, --device,
    --dtype, --reward, --reward-timeout and --lora go with it. Exit code 0 where the pixels are the same, else 1.

    Under torchrun or accelerate launch the prompts are shared out among the processes.
    """
    if replay is not None:
        return _replay(context)
    with launch_context().local_main_process_first():
        prompts = _prompts(prompt, prompt_file, prompt_column)
    from steer.apps.methods import ComputeOptions, SamplingConfig
    from steer.apps.sampling import sample as run

    compute_options = ComputeOptions(attention, compiled, micro_batch)
    report = run(prompts, SamplingConfig(**settings), out, device, reward_timeout, animation, compute_options)
    means = [sum(entry["rewards"]) / len(entry["rewards"]) for entry in report["prompts"]]
    best = [max(entry["rewards"]) for entry in report["prompts"]]
    if is_main_process():
        _warn_nsfw(report["prompts"])
        click.echo(
            f"{len(prompts)} prompts, {settings['reward']}: best {sum(best) / len(best):.3f}, "
            f"mean {sum(means) / len(means):.3f}, {report['cost']['seconds']:.1f} s → {out / 'grid.png'}"
        )


def _warn_nsfw(entries: Sequence[Mapping[str, Any]]) -> None:
    """Say how many images the safety checker blackened: their rewards are those of before."""
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
    """Writes the image again, says whether its pixels are the same, and exits with 1 where they are not."""
    given_options = [
        option
        for option in context.command.params
        if context.get_parameter_source(str(option.name)) is ParameterSource.COMMANDLINE
    ]
    if surplus := [option for option in given_options if option.name not in WITH_REPLAY]:
        name = surplus[0].opts[0] if isinstance(surplus[0], click.Option) else surplus[0].human_readable_name
        raise InputError(f"--replay takes all from the image: leave out {name}")
    if not is_main_process():
        return  # one image is for one process
    from steer.apps.replay import replay

    given = {option.name: context.params[option.name] for option in given_options if option.name != "replay"}
    replayed = replay(context.params["replay"], **{"out": context.params["out"]} | given)
    click.echo(replayed.message)
    raise SystemExit(0 if replayed.same else 1)
