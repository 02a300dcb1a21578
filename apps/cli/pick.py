"""`steer pick`: a few images out of many."""

import json
from pathlib import Path

import click

from steer.apps.cli.options import DEVICE, Command


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
@DEVICE
def pick(
    images: tuple[Path, ...],
    rewards: tuple[str, ...],
    keep: int,
    diverse: float,
    texts: tuple[str, ...],
    file: Path | None,
    features: str | None,
    device: str | None,
    represent: bool,
    at_least: int | None,
) -> None:
    """Choose a few diverse IMAGEs with high rewards, and print them as JSON in the order of the choice.

    IMAGE is a file, a folder or a table, as for `steer score`.
    """
    from steer.apps.models import default_device
    from steer.apps.picking import pick as pick_images
    from steer.apps.scoring import collect_images

    shown, place = collect_images(images, texts, file), default_device(device)
    chosen = pick_images(shown, rewards, keep, diverse, features, place, represent, at_least)
    click.echo(json.dumps({"diverse": diverse, "picked": chosen}, indent=1))
