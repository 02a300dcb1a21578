"""`steer rewards …`: list, analyse, calibrate, train and serve rewards. Commands import heavy modules themselves."""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from steer.apps.cli.options import RESOLVED_DEVICE, Group, options_of
from steer.rewards.training_config import RewardTrainingConfig

FOLDER = click.Path(path_type=Path)
IMAGES = click.option(
    "--images", required=True, type=FOLDER, help="Folder of images, such as the output of `steer sample`."
)
PROMPT = click.option("--prompt", help="Prompt of all images, if the folder contains no prompts.")


@click.group(cls=Group, invoke_without_command=True)
@click.pass_context
def rewards(context: click.Context) -> None:
    """List the named rewards, or run a command: analyse, calibrate, train or serve rewards."""
    if context.invoked_subcommand is None:
        from steer.rewards import FACTS
        from steer.rewards.names import reward_names

        names = reward_names()
        width = max(map(len, names))
        for name, about in sorted(names.items()):
            click.echo(f"{name:{width}}  {about}")
            if name in FACTS:
                click.echo(f"{'':{width}}    {FACTS[name]}")
        click.echo("http://HOST:PORT/  a reward served by another process: `steer rewards serve SPEC`")


@rewards.command()
@click.argument("reward", metavar="SPEC")
@click.option(
    "--host", default="127.0.0.1", help="Address to listen on; with other than the default, other machines can connect."
)
@click.option("--port", default=0, type=click.IntRange(0, 65535), help="Port to listen on; 0: any free port.")
@RESOLVED_DEVICE
def serve(reward: str, host: str, port: int, device: str) -> None:
    """Serve the reward SPEC over HTTP, for `--reward http://…/` elsewhere, until Ctrl-C.

    If the environment variable STEER_REWARD_TOKEN is set, requests need this token: set it for the client too.
    """
    from steer.apps.errors import exit_now
    from steer.apps.reward_specs import resolve_reward
    from steer.rewards.remote import LOCAL, RewardServer, read_token

    with RewardServer(resolve_reward(reward), host, port, read_token(), device) as server:
        if host not in LOCAL:
            click.echo(
                f"steer: --host {host}: anyone who can reach this machine can use the reward; there is no encryption",
                err=True,
            )
        idle = server.serve_until_signal(lambda: click.echo(server.url))
    if not idle:  # a call that hangs
        exit_now(0)


def on_images(command: Callable[..., None]) -> Callable[..., None]:
    """Add --images, --prompt and --device, and pass the images' paths, their prompts and the device to a command."""

    @IMAGES
    @PROMPT
    @RESOLVED_DEVICE
    @wraps(command)
    def run(images: Path, prompt: str | None, device: str, **options: Any) -> None:
        from steer.apps.scoring import images_with_prompts

        command(*images_with_prompts(images, prompt), device, **options)

    return run


@rewards.command()
@click.argument("reward")
@on_images
@click.option("--max-images", default=8, type=click.IntRange(1), help="Maximum number of test images, all of one size.")
def check(paths: Sequence[Path], prompts: Sequence[str], device: str, reward: str, max_images: int) -> None:
    """Test REWARD: contract, determinism, batches, gradients, speed; for a judge, agreement of both orders of a pair.

    Exit code 1: a test failed.
    """
    from steer.apps.reward_specs import resolve_reward
    from steer.apps.scoring import load_batch, render_check_results
    from steer.rewards.analysis import check_judge, check_reward
    from steer.rewards.parser import load_judge, names_judge

    batch, texts = load_batch(paths, prompts, max_images)
    batch = batch.to(device)
    if names_judge(reward):
        check_results = [check_judge(load_judge(reward), batch, texts)]
    else:
        check_results = check_reward(resolve_reward(reward), batch, texts)
    click.echo(render_check_results(check_results))
    if any(finding.passed is False for finding in check_results):
        raise SystemExit(1)


@rewards.command()
@click.argument("first")
@click.argument("second")
@on_images
@click.option("--out", default=Path("scatter.png"), type=FOLDER, help="PNG file for the scatter plot.")
def compare(paths: Sequence[Path], prompts: Sequence[str], device: str, first: str, second: str, out: Path) -> None:
    """Measure the agreement of two rewards on images: rank correlations, STARC distance, and a scatter plot."""
    from steer.apps.reward_specs import resolve_reward
    from steer.apps.scoring import draw_scatter, render_agreement, score_each
    from steer.rewards.analysis import compare as agreement_of

    one, two = score_each(map(resolve_reward, (first, second)), paths, prompts, device)
    agreement = agreement_of(one, two, prompts)
    draw_scatter(first, one, second, two, prompts, agreement, out)
    click.echo(f"{render_agreement(agreement)}\n→ {out}")


@rewards.command()
@click.argument("proxy")
@click.argument("held_out", metavar="HOLDOUT")
@on_images
def usefulness(paths: Sequence[Path], prompts: Sequence[str], device: str, proxy: str, held_out: str) -> None:
    """Find where HOLDOUT peaks while best-of-n of each prompt's images optimises PROXY: a bound for training."""
    from steer.apps.reward_specs import resolve_reward
    from steer.apps.scoring import render_usefulness, scores_by_prompt
    from steer.training.overoptimization import point_of_usefulness

    reward = resolve_reward(proxy)
    scores = scores_by_prompt(reward, resolve_reward(held_out), paths, prompts, device)
    click.echo(render_usefulness(point_of_usefulness(*scores), reward.name))


@rewards.command()
@click.argument("proxy")
@click.argument("held_out", metavar="HOLDOUT")
@on_images
@click.option("--keep", type=click.IntRange(2), help="Samples to keep per prompt.  [default: half]")
def reliability(
    paths: Sequence[Path], prompts: Sequence[str], device: str, proxy: str, held_out: str, keep: int | None
) -> None:
    """Measure how well PROXY predicts HOLDOUT among the samples that each `sample_filter` of a training keeps."""
    from steer.apps.reward_specs import resolve_reward
    from steer.apps.scoring import render_reliability, scores_by_prompt
    from steer.training.signals import filter_reliability

    first, second = scores_by_prompt(resolve_reward(proxy), resolve_reward(held_out), paths, prompts, device)
    kept = keep or max(2, first.shape[1] // 2)
    click.echo(render_reliability(filter_reliability(first, second, kept), kept))


@rewards.command()
@click.argument("reward")
@on_images
def contrast(paths: Sequence[Path], prompts: Sequence[str], device: str, reward: str) -> None:
    """Measure how often REWARD prefers an image's prompt to one with a colour, count or relation changed."""
    from steer.apps.reward_specs import resolve_reward
    from steer.apps.scoring import render_consistency, score_consistency
    from steer.errors import InputError

    results = score_consistency(resolve_reward(reward), paths, prompts, device=device)
    if not results:
        raise InputError(
            f"--images: no prompt of its {len(paths)} images names a colour, a count or a relation to change"
        )
    click.echo(render_consistency(results))


@rewards.command()
@click.argument("rewards_", nargs=-1, required=True, metavar="REWARD...")
@IMAGES
@PROMPT
@click.option("--optimised", type=FOLDER, help="Folder of images that were optimised: also report their correlations.")
@click.option(
    "--gold", metavar="REWARD", help="The true reward: list images that all members overrate compared with it."
)
@click.option("--out", type=FOLDER, help="JSON file for the figures.")
@RESOLVED_DEVICE
def herding(
    rewards_: tuple[str, ...],
    images: Path,
    prompt: str | None,
    optimised: Path | None,
    gold: str | None,
    out: Path | None,
    device: str,
) -> None:
    """Measure whether the members of an ensemble err together: correlations, and gains of each other's best of n."""
    from steer.apps.calibration import measure_herding

    folders = [images, *([optimised] if optimised else [])]
    for text in measure_herding(rewards_, gold, folders, prompt, out, device):
        click.echo(text)


@rewards.command()
@click.argument("rewards_", nargs=-1, required=True, metavar="REWARD...")
@on_images
@click.option("--gold", metavar="REWARD", help="The true reward: its best images of a prompt are the right ones.")
def benchmark(
    paths: Sequence[Path], prompts: Sequence[str], device: str, rewards_: tuple[str, ...], gold: str | None
) -> None:
    """Measure how often each REWARD scores the right candidate above ALL wrong ones.

    Wrong candidates are changed prompts of an image and, with --gold, other images of its prompt. The table also has
    the share of right pairs, and the gain of best-of-n.
    """
    from steer.apps.calibration import benchmark_rewards

    for text in benchmark_rewards(rewards_, gold, paths, prompts, device):
        click.echo(text)


@rewards.command()
@click.argument("rewards_", nargs=-1, required=True, metavar="REWARD...")
@IMAGES
@PROMPT
@click.option("--out", required=True, type=FOLDER, help="JSON file of the calibration; other rewards in it are kept.")
@click.option(
    "--bound", metavar="TRUTH", help="Fit a lower bound on the reward TRUTH instead, for lower(A, B, from=OUT)."
)
@click.option("--level", default=0.9, help="Share of fresh images on which the bound holds, 0 to 1.")
@click.option(
    "--optimised", type=FOLDER, help="Folder of images that were optimised: also report the bound's share on them."
)
@RESOLVED_DEVICE
def calibrate(
    rewards_: tuple[str, ...],
    images: Path,
    prompt: str | None,
    out: Path,
    bound: str | None,
    level: float,
    optimised: Path | None,
    device: str,
) -> None:
    """Measure each REWARD's mean and spread, overall and per prompt, on images of `steer sample --method base`."""
    from steer.apps.calibration import calibrate_bound, calibrate_rewards

    where = images, prompt, out, device
    lines = (
        calibrate_bound(rewards_, bound, level, optimised, *where)
        if bound is not None
        else calibrate_rewards(rewards_, *where)
    )
    for text in lines:
        click.echo(text)


PAIRS_PER_PROMPT = click.option(
    "--pairs-per-prompt",
    default=32,
    type=click.IntRange(1),
    help="Maximum number of pairs per prompt, drawn without repetition.",
)
SEED = click.option("--seed", default=0)
DATA = click.option("--images", type=FOLDER, help="Folder that image paths are relative to.  [default: folder of DATA]")
OUT_PAIRS = click.option(
    "--out", required=True, type=FOLDER, help="File for the pairs: .jsonl, or .parquet with their images."
)
MAX_ROWS = click.option("--max-rows", type=click.IntRange(1), help="Read only the first rows of DATA.")
WORK = click.option(
    "--work", type=FOLDER, help="Folder of checkpoints and logs; run the command again to resume.  [default: runs/OUT]"
)


@rewards.command()
@click.option(
    "--by", "judge", required=True, help="A judge: hierarchy(A > 0.1, B), a reward, http://HOST/v1,model=NAME."
)
@on_images
@click.option("--out", required=True, type=FOLDER, help="File for the pairs: .jsonl, for `steer rewards train`.")
@PAIRS_PER_PROMPT
@SEED
def pairs(
    paths: Sequence[Path],
    prompts: Sequence[str],
    device: str,
    judge: str,
    out: Path,
    pairs_per_prompt: int,
    seed: int,
) -> None:
    """Label pairs of images of one prompt by a judge: rows with the probability that image_a is preferred."""
    from steer.apps.scoring import label_pairs
    from steer.rewards.parser import load_judge

    _report_pairs(label_pairs(load_judge(judge), paths, prompts, pairs_per_prompt, seed, device, out), out)


def _report_pairs(rows: int, out: Path) -> None:
    click.echo(f"{rows} pairs → {out}; train on them: steer rewards train {out} --out FOLDER")


@rewards.command()
@click.argument("data", type=FOLDER)
@OUT_PAIRS
@DATA
@click.option("--certainty", default=0.3, help="Leave out pairs with |P - 1/2| below this, 0 to 0.5.")
@PAIRS_PER_PROMPT
@SEED
def counts(data: Path, out: Path, images: Path | None, certainty: float, pairs_per_prompt: int, seed: int) -> None:
    """Label pairs of images by the counts of likes and views: rows of image, prompt, shown, liked in DATA."""
    from steer.apps.learning import label_counts

    _report_pairs(label_counts(data, out, certainty, pairs_per_prompt, seed, images), out)


OF_STRENGTH = ("backbone", "head", "members", "steps", "batch_size", "learning_rate", "seed")


@rewards.command()
@click.argument("data", type=FOLDER)
@OUT_PAIRS
@DATA
@MAX_ROWS
@WORK
@click.option(
    "--folds",
    default=4,
    type=click.IntRange(2),
    help="Parts of the data; members trained on the other parts measure a part.",
)
@click.option("--flip", default=0.1, type=click.FloatRange(0, 1), help="Maximum share of the labels to flip.")
@click.option(
    "--soften", default=0.1, type=click.FloatRange(0, 1), help="Share of the labels that become probabilities."
)
@options_of(RewardTrainingConfig, *OF_STRENGTH, members=3, steps=300)
@RESOLVED_DEVICE
def strength(
    data: Path,
    out: Path,
    images: Path | None,
    max_rows: int | None,
    work: Path | None,
    folds: int,
    flip: float,
    soften: float,
    device: str,
    **options: Any,
) -> None:
    """Measure the strength of the preferences in DATA by an ensemble, and clean their labels.

    Writes pairs with the columns strength, spread and change, for `steer rewards train` with --objective
    scaled-bradley-terry or margin.
    """
    from steer.apps.learning import clean_pairs

    config, work = RewardTrainingConfig(**options), work or Path("runs") / out.stem
    click.echo(clean_pairs(data, config, folds, (flip, soften), out, work, device, images, max_rows))


@rewards.command()
@click.argument("goal")
@click.option("--chat", required=True, metavar="URL", help="OpenAI-compatible endpoint, such as http://HOST/v1.")
@click.option("--chat-model", required=True, metavar="NAME", help="Name of the model on that server.")
@IMAGES
@PROMPT
@click.option("--judge", help="Rank by this judge or reward instead of asking you in the terminal.")
@click.option("--candidates", default=6, type=click.IntRange(1), help="Files per iteration.")
@click.option("--iterations", default=5, type=click.IntRange(1))
@click.option("--seconds", default=20.0, help="Time limit of one call of a written reward, in seconds.")
@click.option("--out", required=True, type=FOLDER, help="Python file for the reward; use it as sandbox:FILE.")
@click.option("--work", type=FOLDER, help="Folder of the iterations.  [default: runs/OUT]")
@click.option("--distil", type=FOLDER, help="Train a head on a CLIP to predict the reward, into this folder.")
@click.option("--backbone", default="scenes", help="The CLIP of --distil, as in `steer rewards train`.")
@RESOLVED_DEVICE
def write(out: Path, work: Path | None, distil: Path | None, backbone: str, device: str, **options: Any) -> None:
    """Have a language model write a reward for GOAL, rank its versions by the images that they prefer, and refine it.

    Written code runs in a child process with limits: not a complete security boundary. Run the command again to resume.
    """
    from steer.apps import writing
    from steer.rewards.writing import WritingSettings

    settings = WritingSettings(**{name: options.pop(name) for name in ("candidates", "iterations", "seconds")})
    work = work or Path("runs") / out.stem
    writing.run_writing(**options, settings=settings, out=out, work=work)
    if distil is not None:
        data = options["images"], options["prompt"]
        writing.distil(out, *data, backbone, distil, work / "distil", device)


@rewards.command()
@click.argument("data", type=FOLDER)
@click.option("--out", required=True, type=FOLDER, help="Folder for the reward; load it with `--reward FOLDER`.")
@DATA
@MAX_ROWS
@WORK
@options_of(RewardTrainingConfig)
@click.option(
    "--features", help='Fit weights of named rewards, such as "clip:scenes, brightness", in place of a CLIP head.'
)
@click.option("--signs", default="", help='Signs of the weights: "+ ? -" for at least 0, free, at most 0.')
@click.option("--hidden", default=0, help="Units of a small network over the features, in place of weights.")
@click.option(
    "--groups",
    type=int,
    help="For pairs with a column user: number of groups over which each user's weights are learned.",
)
@click.option(
    "--latent", type=int, help="For pairs with a column user: size of the latent vector learned for each user."
)
@RESOLVED_DEVICE
def train(
    data: Path,
    out: Path,
    images: Path | None,
    max_rows: int | None,
    work: Path | None,
    device: str,
    groups: int | None,
    latent: int | None,
    **options: Any,
) -> None:
    """Train a reward on DATA: preferences between images of a prompt, or ratings of images.

    DATA is a .jsonl, .json, .parquet, .csv or .tsv file, a folder, or ORGANISATION/NAME[:SPLIT] on the hub: pairs
    (image_a, image_b, prompt, choice), the tables of Pick-a-Pic, HPDv2, HPDv3 and ImageReward, DPO's chosen and
    rejected, and preference datasets from the demo; with --objective rating: image, prompt and rating.
    """
    from steer.apps.learning import run_reward_training, summary
    from steer.errors import InputError
    from steer.rewards.named_features import FeatureConfig

    features, kind = options["features"], "a reward of CLIP features"
    users = next(((name, size) for name, size in (("groups", groups), ("latent", latent)) if size is not None), None)
    if sum(one is not None for one in (features, groups, latent)) > 1:
        raise InputError("--features, --groups and --latent are three kinds of rewards: give one of them")
    config = _config(RewardTrainingConfig if features is None else FeatureConfig, options)
    kind = "--groups and --latent" if users else kind if features is None else "--features"
    _refuse_others(kind, vars(config).keys() - (OF_HEADS if users else set()))
    work = work or Path("runs") / out.name
    report = run_reward_training(data, config, out, work, device, images, max_rows, users)
    click.echo(f"{summary(report)} → {out}")


OF_HEADS = {"head", "objective", "margin", "label_smoothing", "label_noise", "center_rewards_coefficient"}
OF_HEADS |= {"slope_penalty", "slope", "mix_text"}
OF_ALL = {"data", "out", "images", "max_rows", "work", "device", "groups", "latent"}


def _refuse_others(kind: str, allowed: Collection[str]) -> None:
    """Raise InputError for an option on the command line that a kind of reward does not have."""
    context = click.get_current_context()
    given = [name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if others := [name for name in given if name not in {*allowed, *OF_ALL}]:
        raise click.UsageError(f"--{others[0].replace('_', '-')} is not an option of {kind}: leave it out")


def _config(kind: Any, options: dict[str, Any]) -> Any:
    """Make a configuration from the options that are its fields."""
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in options.items() if name in names})
