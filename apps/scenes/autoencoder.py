"""The autoencoder of scenes: 64×64 pixels to 8×8 latents of 8 channels, whitened."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from steer.apps.scenes.training import training_scenes
from steer.rewards.scene import SceneReward
from steer.training import Run, batch_at

CHANNELS = 8
BATCH = 16
SCENES = 20_000
FRESH = 10_000_000  # scenes from this number on are never trained on


def new_autoencoder() -> AutoencoderKL:
    """Four blocks, so that diffusers takes latents for 8 times smaller than images."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def to_model(images: Tensor) -> Tensor:
    """uint8 0..255 to float −1..1."""
    return (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def reconstruction_loss(vae: AutoencoderKL, images: Tensor, generator: torch.Generator) -> Tensor:
    """That of the images, and a whiff of KL."""
    posterior = vae.encode(images).latent_dist
    decoded = vae.decode(posterior.sample(generator=generator)).sample
    return image_loss(decoded, images) + 1e-5 * posterior.kl().mean()


def image_loss(decoded: Tensor, images: Tensor) -> Tensor:
    """Absolute and squared error of images −1..1, objects weighing five times the background."""
    error = decoded - images
    background = images.flatten(2).median(2).values[..., None, None]
    weight = 1 + 4 * ((images - background).abs().amax(1, keepdim=True) > 0.2)
    return (weight * (error.abs() + error**2)).mean()


def train_autoencoder(folder: Path, steps: int, device: str) -> AutoencoderKL:
    """Trains, whitens and saves to folder/vae."""
    torch.manual_seed(0)
    vae = new_autoencoder().to(device, memory_format=torch.channels_last)
    images, _ = training_scenes(SCENES)

    def loss_at(step: int) -> Tensor:
        batch = to_model(images[batch_at(step, BATCH, SCENES)]).to(device)
        return reconstruction_loss(vae, batch, torch.Generator(device).manual_seed(step))

    Run(folder, steps, learning_rate=2e-3).train([vae], loss_at)
    whiten(vae, encode(vae, images[:4000]))
    vae.save_pretrained(folder / "vae")
    return vae


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Means of the posterior (N, 8, 8, 8) on the CPU, of uint8 images."""
    chunks = images.split(100)
    return torch.cat([vae.encode(to_model(chunk).to(vae.device)).latent_dist.mean.cpu() for chunk in chunks])


@torch.no_grad()
def whiten(vae: AutoencoderKL, latents: Tensor) -> None:
    """Folds z ↦ W(z − m) into quant_conv and its inverse into post_quant_conv: channels of unit covariance.

    One scaling factor cannot do this: variances of raw channels differ a thousandfold, and the small
    ones, which noise would hide at every step, carry colours.
    """
    z = latents.movedim(1, -1).flatten(0, -2).double()
    mean, covariance = z.mean(0), torch.cov(z.T)
    values, vectors = torch.linalg.eigh(covariance)
    forward, backward = (vectors * values**power @ vectors.T for power in (-0.5, 0.5))
    quant, post = vae.quant_conv, vae.post_quant_conv
    half = CHANNELS  # quant_conv gives means, then log-variances, which sampling does not use after this
    weight, bias = quant.weight[:half, :, 0, 0].double().cpu(), quant.bias[:half].double().cpu()
    quant.weight[:half] = (forward @ weight)[..., None, None].to(quant.weight)
    quant.bias[:half] = (forward @ (bias - mean)).to(quant.bias)
    weight, bias = post.weight[:, :, 0, 0].double().cpu(), post.bias.double().cpu()
    post.weight.copy_((weight @ backward)[..., None, None])
    post.bias.copy_(bias + weight @ mean)
    quant.bias[half:] = -30.0  # the posterior's noise, of the old scale, is dropped
    quant.weight[half:] = 0.0


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """What the autoencoder makes of uint8 images: float (N, 3, 64, 64) in [0, 1]."""
    decoded = [vae.decode(z.to(vae.device)).sample.cpu() for z in encode(vae, images).split(100)]
    return (torch.cat(decoded) / 2 + 0.5).clamp(0, 1)


def autoencoder_accuracy(vae: AutoencoderKL, scenes: int = 2000) -> float:
    """Share of fresh scenes whose reconstruction still meets every requirement of its prompt."""
    images, prompts = training_scenes(scenes, first=FRESH)
    return float((SceneReward()(reconstruct(vae, images), prompts) == 1).float().mean())
