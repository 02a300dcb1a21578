"""The `steer` command. Heavy imports wait inside the commands, so that `steer --help` answers at once."""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import click

from steer import __version__
from steer.apps.finetune_cli import finetune
from steer.apps.rewards_cli import rewards
from steer.errors import InputError

SPEC = "NAME[:ARGUMENT], a sum like hpsv2.1:5 + imagereward:1, a folder or a YAML file; `steer rewards` lists names."
TIMEOUT = click.option("--reward-timeout", type=float, help="Seconds that one call of the reward may take.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__, prog_name="steer")
@click.option(
    "--offline", is_flag=True, help="Use no network: models and rewards come from folders and the hub's cache."
)
def steer(offline: bool) -> None:
    """Better images from a diffusion model and a reward."""
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's library is first imported, after this


@steer.command()
@click.argument("prompt", nargs=-1)
@click.option("--prompts", "prompt_file", type=click.Path(path_type=Path), help="File of prompts: .txt, .jsonl, .tsv.")
@click.option("--model", default="scenes", help="Embedded model, folder, or ORGANISATION/NAME.")
@click.option(
    "--method", default="fk", help="fk, best-of-n, base, reno (for one-step models, like scenes-turbo) or noise-search."
)
@click.option("--reward", default="scene-soft", help=SPEC)
@TIMEOUT
@click.option("--particles", "--seeds", "particles", default=4, help="K, images for each prompt.")
@click.option("--steps", type=int, help="Solver steps; by default the pipeline's own number, for reno 1.")
@click.option("--guidance", type=float, help="Guidance scale; by default the pipeline's own, for reno 0.")
@click.option("--lam", default=10.0, help="fk: strength of the reward, λ.")
@click.option("--potential", default="difference", help="fk: difference, max, sum or now.")
@click.option("--resampler", default="systematic", help="fk: systematic, stratified, residual, ssp or multinomial.")
@click.option("--tempering", default="constant", help="fk: of λ along the run: constant, geometric or ess.")
@click.option("--ess-threshold", default=0.5, help="fk: resample when ESS is below this share of K; 1: always.")
@click.option("--reward-guidance", default=0.0, help="fk: how far steps lean along the reward's gradient, γ; 1 is DAS.")
@click.option("--iterations", default=50, help="reno, noise-search: how often images are made and scored.")
@click.option("--optimiser", default="sgd", help="reno: sgd or adam.")
@click.option("--lr", type=float, help="reno: learning rate; by default the optimiser's own, sgd 5, adam 0.05.")
@click.option("--regularisation", default=0.01, help="reno: weight of log p(‖ε‖), which keeps the noise noise.")
@click.option("--gradient", default="backprop", help="reno: backprop, or zero-order for any reward.")
@click.option("--patience", type=int, help="reno: iterations without a better reward that end a search.")
@click.option("--restarts", default=0, help="reno: how often a search begins anew when patience is out.")
@click.option("--neighbours", default=4, help="noise-search: images of each seed in an iteration.")
@click.option("--distance", default=0.5, help="noise-search: from a noise to its neighbours, up to 1.")
@click.option("--eta", type=float, help="Noise of every step, 0 to 1; by default the solver's own.")
@click.option("--seed", default=0, type=click.IntRange(0, 2**63 - 1), help="The same for each prompt.")
@click.option("--out", default=Path("out"), type=click.Path(path_type=Path), help="Output folder; a run there goes on.")
@click.option("--compare/--no-compare", default=True, help="Also make the base images, for grid.png.")
@click.option("--animation", is_flag=True, help="reno, noise-search: also progress.gif for each prompt.")
@click.option("--device", help="Where to run; by default the GPU if there is one.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="By default float32 on the CPU, bfloat16 elsewhere.",
)
def sample(
    prompt: tuple[str, ...],
    prompt_file: Path | None,
    out: Path,
    device: str | None,
    reward_timeout: float | None,
    animation: bool,
    **settings: Any,
) -> None:
    """Steers PROMPT… or the prompts of a file: images (best first), grid.png, report.json; ancestry.png of particles,
    progress.png of noise that was optimised.

    Where help begins with the name of a method, the option is for that method alone.
    """
    from steer.apps.prompts import read_prompts

    if bool(prompt) == bool(prompt_file):
        raise InputError("give prompts as words or with --prompts FILE, one of the two")
    prompts = read_prompts(prompt_file) if prompt_file else [text.strip() for text in prompt]
    if not all(prompts):
        raise InputError("a prompt is empty")
    from steer.apps.sample import SampleSettings
    from steer.apps.sample import sample as run

    report = run(prompts, SampleSettings(**settings), out, device, reward_timeout, animation)
    means = [sum(entry["rewards"]) / len(entry["rewards"]) for entry in report["prompts"]]
    best = [max(entry["rewards"]) for entry in report["prompts"]]
    click.echo(
        f"{len(prompts)} prompts, {settings['reward']}: best {sum(best) / len(best):.3f}, "
        f"mean {sum(means) / len(means):.3f}, {report['cost']['seconds']:.1f} s → {out / 'grid.png'}"
    )


@steer.command()
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="IMAGE...")
@click.option("--prompt", required=True, help="What the images were asked to show.")
@click.option("--reward", required=True, help=SPEC)
@TIMEOUT
def score(images: tuple[Path, ...], prompt: str, reward: str, reward_timeout: float | None) -> None:
    """Scores IMAGEs and prints JSON, every part of a composed reward too."""
    from steer.apps.specs import reward_here
    from steer.images import read_image
    from steer.reward import score_parts

    loaded = reward_here(reward, reward_timeout)
    rows = []
    for path in images:
        total, parts = score_parts(loaded, read_image(path)[None], [prompt])
        told = {"parts": {name: value.item() for name, value in parts.items()}} if parts else {}
        rows.append({"image": str(path), "score": total.item()} | told)
    click.echo(json.dumps({"reward": reward, "prompt": prompt, "scores": rows}, indent=1))


steer.add_command(finetune)
steer.add_command(rewards)


def main() -> None:
    """Runs the command; what the user can put right is one line on stderr and exit code 2."""
    # A run that ended before its time ends in such a line too: the pipelines' own warning would say it twice.
    logging.getLogger("steer.pipelines").addHandler(logging.NullHandler())
    try:
        steer(standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("steer: interrupted; what was finished is kept, the same command goes on", err=True)
        sys.exit(130)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
    except click.ClickException as error:
        click.echo(f"steer: {' '.join(error.format_message().split())}", err=True)
        sys.exit(2)
    except InputError as error:
        click.echo(f"steer: {' '.join(str(error).split())}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
