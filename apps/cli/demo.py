"""`steer demo`: options of the command line. Heavy imports wait inside the command."""

import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

import click

from steer.apps.cli.options import DEVICE, Command
from steer.errors import InputError


@click.command(cls=Command)
@click.option("--host", default="127.0.0.1", help="Address to listen on; other machines can connect only with --auth.")
@click.option("--port", type=click.IntRange(1, 65535), help="Port; by default the first free one from 7860.")
@click.option("--auth", metavar="USER:PASSWORD", help="Login for visitors.")
@click.option("--share", is_flag=True, help="Create a public address through gradio's servers; only with --auth.")
@click.option("--model", "models", multiple=True, help="A further model: a folder, or ORGANISATION/NAME; repeatable.")
@click.option(
    "--reward", "rewards", multiple=True, help="A further allowed reward, such as my_file:function; repeatable."
)
@click.option("--labels", type=click.Path(path_type=Path, file_okay=False), help="Folder for the preferences.")
@click.option(
    "--label-images",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of your images with prompts; annotators compare these in place of sampled images.",
)
@click.option(
    "--max-upload",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    help="Size limit of an uploaded file, such as a LoRA, in MB.",
)
@DEVICE
@click.option("--variant", help="Variant of the weights of --model, such as fp16.")
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Precision of the models.")
def demo(
    host: str,
    port: int | None,
    auth: str | None,
    share: bool,
    models: tuple[str, ...],
    rewards: tuple[str, ...],
    labels: Path | None,
    label_images: Path | None,
    max_upload: int,
    device: str | None,
    variant: str | None,
    dtype: str | None,
) -> None:
    """Open the app: live particles, finetuning, scoring, and preferences of annotators.

    The app listens on this machine only, needs no network and no GPU, and ends with Ctrl-C. Weights are downloaded from
    the hub only with --model or --reward, or with HF_HUB_OFFLINE=0.
    """
    if find_spec("gradio") is None:
        raise InputError("the app needs gradio: pip install 'steer-diffusion[app]'")
    if label_images is not None and labels is None:
        raise InputError("--label-images needs --labels FOLDER, where the table of choices is written")
    user = None if auth is None else _user(auth)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is first imported, after this
    if not (models or rewards):  # visitors must not download from the hub unless the owner does
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    click.echo("steer demo: loading PyTorch, diffusers and gradio …")
    from steer.apps.demo.app import check_address, launch
    from steer.apps.demo.history import default_path
    from steer.apps.demo.studio import Studio, embedded_models

    check_address(host, share, user)
    history = default_path() if user is None else None  # without a login only this user gets in
    given = (*models, *embedded_models()), rewards, labels, device, dtype, label_images
    studio = Studio(*given, history_file=history, max_upload=max_upload, variant=variant)
    if studio.history_notice:
        click.echo(f"steer demo: {studio.history_notice}", err=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # sent to stop a service; `finally` must run
    try:
        click.echo(f"steer demo: building the page for {', '.join(studio.models)} …")
        app = launch(studio, host, port, user, share)
        click.echo(f"steer demo: {app.share_url or app.local_url} (Ctrl-C ends it)")
        app.block_thread()
    finally:
        studio.close()


def _user(text: str) -> tuple[str, str]:
    name, colon, password = text.partition(":")
    if not (name and colon and password):
        raise InputError("--auth must be USER:PASSWORD, both not empty")
    return name, password
