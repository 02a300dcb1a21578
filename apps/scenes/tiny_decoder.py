"""scenes-tiny-vae: a small autoencoder for the latents of scenes, whose decoder paints what the full one paints."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor
from torch.nn import functional as F

from steer.apps.scenes.autoencoder import CHANNELS, encode, image_loss, to_model
from steer.apps.scenes.evaluate import CALL
from steer.apps.scenes.preferences import trained_prompts
from steer.apps.scenes.training import training_scenes
from steer.seam import Event, steered
from steer.staged import staged
from steer.training import Run, batch_at

WIDTH = 16
BATCH = 32
CLEAN_ROWS = 8  # of a batch: latents of drawn scenes; the other rows are x̂0 of the sampling path
SCENES = 4096
PROMPTS = 1024
READ = range(4, 20, 2)  # solver steps of 20 whose x̂0 is learned from: blurry ones too, as previews are
TOGETHER = 32  # images of one call


def new_tiny_vae() -> AutoencoderTiny:
    """diffusers' TAESD with 16 channels, and most of its blocks where pixels are few."""
    return AutoencoderTiny(
        latent_channels=CHANNELS,
        encoder_block_out_channels=(WIDTH,) * 4,
        decoder_block_out_channels=(WIDTH,) * 4,
        num_encoder_blocks=(0, 1, 1, 1),
        num_decoder_blocks=(3, 2, 1, 0),
    )


@torch.no_grad()
def path_latents(pipe: StableDiffusionPipeline, prompts: list[str]) -> Tensor:
    """x̂0 (steps · P, 8, 8, 8) of one sampling run for each prompt, at the steps of READ."""
    found: list[Tensor] = []

    def watch(event: Event) -> None:
        if event.k in READ:
            found.append(event.x0())

    for start in range(0, len(prompts), TOGETHER):
        some = prompts[start : start + TOGETHER]
        with steered(pipe, watch, rows=len(some)) as view:
            view(some, generator=Generator().manual_seed(start), output_type="latent", **CALL)
    return torch.cat(found)


@torch.no_grad()
def full_images(vae: Any, latents: Tensor) -> Tensor:
    """What the full decoder makes of latents: uint8 (N, 3, 64, 64)."""
    decoded = torch.cat([vae.decode(z / vae.config.scaling_factor).sample for z in latents.split(TOGETHER)])
    return ((decoded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def pairs(folder: Path, pipe: StableDiffusionPipeline) -> dict[str, Tensor]:
    """Latents, and their images by the full decoder, of drawn scenes and of sampling paths: made once a folder."""
    path = folder / "pairs.safetensors"
    if not path.exists():
        latents = {
            "clean": encode(pipe.vae, training_scenes(SCENES)[0]),
            "path": path_latents(pipe, trained_prompts(PROMPTS)),
        }
        images = {f"{name}_images": full_images(pipe.vae, z) for name, z in latents.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        with staged(path) as new:
            save_file({name: data.contiguous() for name, data in (latents | images).items()}, new)
    return load_file(path)


def train_tiny_decoder(folder: Path, model: str | Path, steps: int, learning_rate: float = 2e-3) -> AutoencoderTiny:
    """Trains on the latents of `model` and saves to folder/vae, with averaged weights in half precision.

    L = image_loss(D(z), D_full(z)) over all z  +  ‖E(D_full(z)) − z‖² over those of drawn scenes
    """
    torch.manual_seed(0)
    pipe = StableDiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    data = pairs(folder, pipe)
    vae = new_tiny_vae().to(memory_format=torch.channels_last)
    average = EMAModel(vae.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)

    def loss_at(step: int) -> Tensor:
        clean = batch_at(step, CLEAN_ROWS, len(data["clean"]))
        path = batch_at(step, BATCH - CLEAN_ROWS, len(data["path"]))
        z = torch.cat([data["clean"][clean], data["path"][path]])
        images = to_model(torch.cat([data["clean_images"][clean], data["path_images"][path]]))
        decoded = vae.decode(z.contiguous(memory_format=torch.channels_last)).sample
        encoded = vae.encode(images[: len(clean)]).latents
        return image_loss(decoded, images) + F.mse_loss(encoded, z[: len(clean)])

    Run(folder, steps, learning_rate).train([vae], loss_at, after=average)
    average.copy_to(vae.parameters())
    vae.half().save_pretrained(folder / "vae")
    config = folder / "vae/config.json"
    told = json.loads(config.read_text())
    del told["block_out_channels"]  # diffusers derives it, and warns where a file has it
    config.write_text(json.dumps(told, indent=2) + "\n")
    return vae.float()
