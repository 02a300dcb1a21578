"""Small commands: `steer score`, `pick`, `convert-lora`, `check-pipeline` and `completion`.

Heavy imports wait inside the commands.
"""

import json
from importlib.util import find_spec
from pathlib import Path

import click
from click.shell_completion import get_completion_class

from steer.apps.cli.options import DEVICE, RESOLVED_DEVICE, Command
from steer.apps.cli.sample import SPEC, TIMEOUT
from steer.errors import InputError


@click.command(cls=Command)
@click.argument("images", nargs=-1, type=click.Path(path_type=Path), metavar="IMAGE...")
@click.option("--prompt", "texts", multiple=True, help="Prompt of all images, or one per image; repeatable.")
@click.option("--prompts", "file", type=click.Path(path_type=Path), help="File with one prompt per image.")
@click.option("--prompt-column", help="Column of the prompts; by default prompt, else text or caption.")
@click.option("--reward", required=True, help=SPEC)
@TIMEOUT
@RESOLVED_DEVICE
def score(
    images: tuple[Path, ...],
    texts: tuple[str, ...],
    file: Path | None,
    prompt_column: str | None,
    reward: str,
    reward_timeout: float | None,
    device: str,
) -> None:
    """Score IMAGEs and print JSON, with the components of a composed reward.

    IMAGE is a file, a folder (of `steer sample`, or with captions), or a table (.csv, .jsonl, .json, .tsv, .parquet)
    with columns of images and prompts. Rewards that read prompts require them. Images that cannot be scored are listed
    in the error, the other images are scored, and the exit code is 2.
    """
    from steer.apps.reward_specs import resolve_reward
    from steer.apps.scoring import collect_images, score_images
    from steer.reward import attribute

    samples = collect_images(images, texts, file, prompt_column)
    loaded = resolve_reward(reward, reward_timeout)
    rows, errors = score_images(loaded, samples, device)
    if cost := attribute(loaded, "cost", None):  # only chat endpoints have it
        click.echo(f"steer: {cost}", err=True)
    prompts = {one.prompt for one in samples}
    output = {"reward": reward, "prompt": prompts.pop() if len(prompts) == 1 else None}
    if len(errors) < len(samples):
        click.echo(json.dumps(output | {"scores": rows}, indent=1))
    if errors:
        count = "" if len(samples) == 1 else f"{len(errors)} of {len(samples)} images have no score: "
        raise InputError(count + "; ".join(errors))


@click.command(cls=Command)
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="IMAGE...")
@click.option(
    "--reward", "rewards", multiple=True, required=True, help="A reward; repeatable: their ranks are averaged."
)
@click.option("--keep", default=4, type=click.IntRange(1), help="Images to choose.")
@click.option("--diverse", default=0.5, type=click.FloatRange(0), help="Weight of coverage; 0: the highest rewards.")
@click.option("--prompt", "texts", multiple=True, help="Prompt of all images, or one per image; repeatable.")
@click.option("--prompts", "file", type=click.Path(path_type=Path), help="File with one prompt per image.")
@click.option("--features", help="CLIP whose features measure diversity, such as scenes; by default pixels.")
@click.option("--represent", is_flag=True, help="Choose an image of high rank for each reward, not for their mean.")
@click.option("--at-least", type=click.IntRange(1), help="Minimum number of images of each prompt.")
@RESOLVED_DEVICE
def pick(
    images: tuple[Path, ...],
    rewards: tuple[str, ...],
    keep: int,
    diverse: float,
    texts: tuple[str, ...],
    file: Path | None,
    features: str | None,
    device: str,
    represent: bool,
    at_least: int | None,
) -> None:
    """Choose a few diverse IMAGEs with high rewards, and print them as JSON in the order of the choice.

    IMAGE is a file, a folder or a table, as for `steer score`.
    """
    from steer.apps.picking import pick as pick_images
    from steer.apps.scoring import collect_images

    shown = collect_images(images, texts, file)
    chosen = pick_images(shown, rewards, keep, diverse, features, device, represent, at_least)
    click.echo(json.dumps({"diverse": diverse, "picked": chosen}, indent=1))


@click.command("convert-lora", cls=Command)
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
def convert_lora(source: Path, out: Path) -> None:
    """Convert a LoRA between diffusers' layout and kohya's, which ComfyUI and A1111 read.

    SOURCE is a folder such as RUN/final, or a .safetensors file, for a UNet or a Flux transformer. If SOURCE is in
    diffusers' layout, OUT is a .safetensors file in kohya's layout; if it is in kohya's, OUT is a folder for
    `load_lora_weights` and `init_adapter`. The tensors are the same.
    """
    if find_spec("peft") is None:
        raise InputError("convert-lora needs peft: pip install 'steer-diffusion[train]'")
    from steer.training.lora_layouts import convert_lora as convert

    click.echo(convert(source, out))


@click.command("check-pipeline", cls=Command)
@click.argument("model")
@click.option("--prompt", default="a red circle left of a blue star", help="Prompt of all runs.")
@click.option(
    "--call", "arguments", default="{}", help='Further arguments of the pipeline\'s call, as JSON: {"eta": 0.5}.'
)
@click.option("--steps", default=4, type=click.IntRange(4), help="Solver steps of each run.")
@click.option("--size", default=64, type=click.IntRange(8), help="Pixels per side of example images.")
@DEVICE
@click.option("--json", "file", type=click.Path(path_type=Path), help="Also write the results to this file.")
def check_pipeline(
    model: str, prompt: str, arguments: str, steps: int, size: int, device: str | None, file: Path | None
) -> None:
    """Check which features of steer work with a pipeline, by short runs of two particles.

    MODEL is a model as in `steer sample`, or module:NAME, a pipeline or a function without arguments that returns one.
    Prints one line per check: ok, refused (with the reason), differs (a wrong result) or traceback. Exit code 1: a
    result differs, or a traceback.
    """
    from steer.apps.models import load_pipeline
    from steer.pipelines.compatibility import PipelineCheck, example_call, load_object

    try:
        given = json.loads(arguments)
    except ValueError as error:
        raise InputError(f"--call {arguments!r} is no JSON ({error})") from error
    if not isinstance(given, dict):
        raise InputError(f"--call must be a JSON object, got {arguments!r}")
    pipe = load_object(model) if ":" in model else load_pipeline(model, device)
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(disable=True)
    row = PipelineCheck(pipe, example_call(pipe, prompt, steps, size) | given).row()
    for name, outcome in row.items():
        click.echo(f"{name:10} {outcome.state:10} {outcome.reason}".rstrip())
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        outcomes = {name: {"state": one.state, "reason": one.reason} for name, one in row.items()}
        file.write_text(json.dumps({"pipeline": type(pipe).__name__, "checks": outcomes}, indent=1) + "\n")
    if any(one.state in ("differs", "traceback") for one in row.values()):
        raise SystemExit(1)


SHELLS = ("bash", "fish", "zsh")


@click.command(cls=Command)
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, /, shell: str) -> None:
    """Print the completion script of SHELL.

    Append it to ~/.bashrc or ~/.zshrc, or write it to ~/.config/fish/completions/steer.fish.
    """
    kind = get_completion_class(shell)
    assert kind is not None, "one of SHELLS"
    root = context.find_root()
    click.echo(kind(root.command, {}, "steer", "_STEER_COMPLETE").source())
