"""The denoiser of scenes and its text encoder, trained together on the autoencoder's latents."""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from steer.apps.scenes.autoencoder import CHANNELS, encode
from steer.apps.scenes.tokenizer import LENGTH, build_tokenizer
from steer.apps.scenes.training import training_scenes
from steer.staged import staged
from steer.training import Run, batch_at

logger = logging.getLogger(__name__)

BATCH = 64
SCENES = 40_000
PART = 4_000  # scenes drawn and encoded at a time
UNCONDITIONAL = 0.1  # share of prompts dropped, for classifier-free guidance


@dataclass(frozen=True)
class Size:
    """Channels of the two resolutions, and width, layers and heads of the text encoder."""

    channels: tuple[int, int]
    width: int
    layers: int
    heads: int


SIZES = {
    "scenes": Size(channels=(64, 128), width=128, layers=2, heads=4),
    "scenes-large": Size(channels=(128, 224), width=192, layers=3, heads=6),
}


def new_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule, with v-prediction."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def new_denoiser(size: Size = SIZES["scenes"]) -> UNet2DConditionModel:
    """8×8 and 4×4 latents, cross-attention at both."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=size.channels,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=size.width,
        attention_head_dim=8,
        norm_num_groups=16,
    )


def new_text_encoder(tokenizer: CLIPTokenizer, size: Size = SIZES["scenes"]) -> CLIPTextModel:
    """A few layers of CLIP's text transformer."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=size.width,
            intermediate_size=4 * size.width,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            max_position_embeddings=LENGTH,
            projection_dim=size.width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def token_ids(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    """Padded as diffusers pads: (N, LENGTH)."""
    return tokenizer(prompts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids


def latents_and_tokens(folder: Path, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> tuple[Tensor, Tensor]:
    """Every training scene as latents (N, 8, 8, 8) and tokens (N, LENGTH): encoded once for each autoencoder."""
    weights = b"".join(parameter.detach().cpu().numpy().tobytes() for parameter in vae.parameters())
    path = folder / f"latents-{hashlib.sha256(weights).hexdigest()[:8]}.safetensors"
    if not path.exists():
        latents, tokens = [], []
        for first in range(0, SCENES, PART):
            images, prompts = training_scenes(PART, first)
            latents.append(encode(vae, images))
            tokens.append(token_ids(tokenizer, prompts))
            logger.info("encoded %d of %d scenes", first + PART, SCENES)
        with staged(path) as new:
            save_file({"latents": torch.cat(latents).contiguous(), "tokens": torch.cat(tokens)}, new)
    data = load_file(path)
    return data["latents"], data["tokens"]


def train_denoiser(folder: Path, vae: AutoencoderKL, size: Size, steps: int, device: str) -> None:
    """Trains on v-prediction; the pipeline that folder/pipeline holds has the averaged weights.

    L = E ‖v − v̂(α_t x0 + σ_t ε, t, prompt)‖², v = α_t ε − σ_t x0 (arXiv 2202.00512)
    """
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, scheduler = build_tokenizer(folder / "tokenizer"), new_scheduler()
    latents, tokens = latents_and_tokens(folder, vae, tokenizer)
    empty = token_ids(tokenizer, [""])
    unet = new_denoiser(size).to(device, memory_format=torch.channels_last)
    text_encoder = new_text_encoder(tokenizer, size).to(device)
    modules = torch.nn.ModuleList([unet, text_encoder])
    average = EMAModel(modules.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)

    def loss_at(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        rows = batch_at(step, BATCH, SCENES)
        x0, ids = latents[rows].to(device), tokens[rows]
        dropped = torch.rand(BATCH, 1, generator=generator) < UNCONDITIONAL
        ids = torch.where(dropped, empty, ids).to(device)
        noise = torch.randn(x0.shape, generator=generator).to(device)
        t = torch.randint(scheduler.config.num_train_timesteps, (BATCH,), generator=generator).to(device)
        x_t = scheduler.add_noise(x0, noise, t).contiguous(memory_format=torch.channels_last)
        predicted = unet(x_t, t, text_encoder(ids)[0], return_dict=False)[0]
        return torch.nn.functional.mse_loss(predicted, scheduler.get_velocity(x0, noise, t))

    Run(folder, steps, learning_rate=1e-3).train([modules], loss_at, after=average)
    average.copy_to(modules.parameters())
    assemble(vae, unet, text_encoder, tokenizer).save_pretrained(folder / "pipeline")


def assemble(
    vae: AutoencoderKL, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer
) -> StableDiffusionPipeline:
    """The parts as a plain Stable Diffusion pipeline."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    )
