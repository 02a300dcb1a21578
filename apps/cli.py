"""The `steer` command. Heavy imports wait inside the commands, so that `steer --help` answers at once."""

import json
import sys
from pathlib import Path
from typing import Any

import click

from steer import __version__
from steer.errors import InputError


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__, prog_name="steer")
def steer() -> None:
    """Better images from a diffusion model and a reward."""


@steer.command()
@click.argument("prompt", nargs=-1)
@click.option("--prompts", "prompt_file", type=click.Path(path_type=Path), help="File of prompts: .txt, .jsonl, .tsv.")
@click.option("--model", default="scenes", help="Embedded model, folder, or ORGANISATION/NAME.")
@click.option("--method", default="fk", help="fk, best-of-n or base.")
@click.option("--reward", default="scene-soft", help="NAME or NAME:ARGUMENT; `steer rewards` lists them.")
@click.option("--particles", default=4, help="K, images for each prompt.")
@click.option("--steps", type=int, help="Solver steps; by default the pipeline's own number.")
@click.option("--guidance", type=float, help="Guidance scale; by default the pipeline's own.")
@click.option("--lam", default=10.0, help="Strength of the reward, λ.")
@click.option("--potential", default="difference", help="difference, max, sum or now.")
@click.option("--resampler", default="systematic", help="systematic, stratified, residual, ssp or multinomial.")
@click.option("--tempering", default="constant", help="Of λ along the run: constant, geometric or ess.")
@click.option("--ess-threshold", default=0.5, help="Resample when ESS is below this share of K; 1: always.")
@click.option("--eta", type=float, help="Noise of every step, 0 to 1; by default the solver's own.")
@click.option("--seed", default=0, type=click.IntRange(0, 2**63 - 1), help="The same for each prompt.")
@click.option("--out", default=Path("out"), type=click.Path(path_type=Path), help="Output folder; a run there goes on.")
@click.option("--compare/--no-compare", default=True, help="Also make the base images, for grid.png.")
@click.option("--device", help="Where to run; by default the GPU if there is one.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="By default float32 on the CPU, bfloat16 elsewhere.",
)
def sample(prompt: tuple[str, ...], prompt_file: Path | None, out: Path, device: str | None, **settings: Any) -> None:
    """Steers PROMPT… or the prompts of a file: images (best first), grid.png, ancestry.png and report.json."""
    from steer.apps.prompts import read_prompts

    if bool(prompt) == bool(prompt_file):
        raise InputError("give prompts as words or with --prompts FILE, one of the two")
    prompts = read_prompts(prompt_file) if prompt_file else [text.strip() for text in prompt]
    if not all(prompts):
        raise InputError("a prompt is empty")
    _look_here_for(settings["reward"])
    from steer.apps.sample import SampleSettings
    from steer.apps.sample import sample as run

    report = run(prompts, SampleSettings(**settings), out, device)
    means = [sum(entry["rewards"]) / len(entry["rewards"]) for entry in report["prompts"]]
    best = [max(entry["rewards"]) for entry in report["prompts"]]
    click.echo(
        f"{len(prompts)} prompts, {settings['reward']}: best {sum(best) / len(best):.3f}, "
        f"mean {sum(means) / len(means):.3f}, {report['cost']['seconds']:.1f} s → {out / 'grid.png'}"
    )


@steer.command()
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="IMAGE...")
@click.option("--prompt", required=True, help="What the images were asked to show.")
@click.option("--reward", required=True, help="NAME or NAME:ARGUMENT; `steer rewards` lists them.")
def score(images: tuple[Path, ...], prompt: str, reward: str) -> None:
    """Scores IMAGEs and prints JSON."""
    from steer.images import read_image
    from steer.reward import load_reward
    from steer.reward import score as score_images

    _look_here_for(reward)
    loaded = load_reward(reward)
    scores = [score_images(loaded, read_image(path)[None], [prompt])[0].item() for path in images]
    rows = [{"image": str(path), "score": value} for path, value in zip(images, scores, strict=True)]
    click.echo(json.dumps({"reward": reward, "prompt": prompt, "scores": rows}, indent=1))


@steer.command()
def rewards() -> None:
    """Lists the rewards that have a name."""
    from steer.reward import reward_names

    names = reward_names()
    width = max(map(len, names))
    for name, about in sorted(names.items()):
        click.echo(f"{name:{width}}  {about}")


def _look_here_for(reward: str) -> None:
    """Lets --reward my_file:function find the user's own file; for built-in names the folder stays out of reach."""
    from steer.rewards import REWARDS

    name, found, _ = reward.partition(":")
    if found and name not in REWARDS:
        sys.path.append(str(Path.cwd()))


def main() -> None:
    """Runs the command; what the user can put right is one line on stderr and exit code 2."""
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
