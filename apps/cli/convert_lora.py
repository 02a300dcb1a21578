"""`steer convert-lora`: options of the command line. Heavy imports wait inside the command."""

from importlib.util import find_spec
from pathlib import Path

import click

from steer.apps.cli.options import Command
from steer.errors import InputError


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
