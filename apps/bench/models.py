"""Pipelines of random weights from written-out configurations: nothing is downloaded."""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from steer.apps.scenes.tokenizer import build_tokenizer

Config = Mapping[str, Any]
NOISE_LEVELS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}


@dataclass(frozen=True)
class RealSize:
    """A model's configurations.

    pipeline  makes a pipeline of these configurations
    denoiser, vae  what their classes are called with
    clips     widths of the CLIP text encoders
    words     width of a T5; 0: none
    guidance  scale of the pipeline's call
    """

    pipeline: Callable[["RealSize"], Any]
    denoiser: Config
    vae: Config
    clips: tuple[int, ...] = (768,)
    words: int = 0
    guidance: float = 5.0


def build(model: RealSize, device: str, dtype: torch.dtype, seed: int = 0) -> Any:
    """The pipeline, made on the device in its precision; on "meta" it takes no memory."""
    with torch.random.fork_rng(), _made_as(device, dtype):
        torch.manual_seed(seed)
        pipe = model.pipeline(model)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)  # it keeps its numbers on the CPU
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def _made_as(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Parameters are made there and so: twelve billion in fp32 would not fit where they fit in half of it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def clip_tokenizer(length: int = 77) -> CLIPTokenizer:
    """One that knows every byte."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = build_tokenizer(Path(folder))
    tokenizer.model_max_length = length
    return tokenizer


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Every word is unknown, with an end token after them as T5 has it."""
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def _clip(cls: type, width: int, tokenizer: CLIPTokenizer) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=2,  # SDXL and SD3 read the last but one
        num_attention_heads=max(width // 64, 1),
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return cls(config)


def _t5(width: int) -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=3, d_model=width, d_kv=64, d_ff=width, num_heads=2, num_layers=1))


def sd(model: RealSize) -> StableDiffusionPipeline:
    """Stable Diffusion 1 and 2."""
    tokenizer = clip_tokenizer()
    return StableDiffusionPipeline(
        vae=AutoencoderKL(**model.vae),
        text_encoder=_clip(CLIPTextModel, model.clips[0], tokenizer),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(**model.denoiser),
        scheduler=DDIMScheduler(**NOISE_LEVELS, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(model: RealSize) -> StableDiffusionXLPipeline:
    """Stable Diffusion XL."""
    tokenizer, (one, two) = clip_tokenizer(), model.clips
    return StableDiffusionXLPipeline(
        vae=AutoencoderKL(**model.vae),
        text_encoder=_clip(CLIPTextModel, one, tokenizer),
        text_encoder_2=_clip(CLIPTextModelWithProjection, two, tokenizer),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=UNet2DConditionModel(**model.denoiser),
        scheduler=DDIMScheduler(**NOISE_LEVELS, set_alpha_to_one=False, steps_offset=1),
        add_watermarker=False,
    )


def sd3(model: RealSize) -> StableDiffusion3Pipeline:
    """Stable Diffusion 3."""
    tokenizer, (one, two) = clip_tokenizer(), model.clips
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(**model.denoiser),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKL(**model.vae),
        text_encoder=_clip(CLIPTextModelWithProjection, one, tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=_clip(CLIPTextModelWithProjection, two, tokenizer),
        tokenizer_2=tokenizer,
        text_encoder_3=_t5(model.words),
        tokenizer_3=word_tokenizer(),
    )


def flux(model: RealSize) -> FluxPipeline:
    """FLUX.1."""
    tokenizer = clip_tokenizer()
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=AutoencoderKL(**model.vae),
        text_encoder=_clip(CLIPTextModel, model.clips[0], tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=_t5(model.words),
        tokenizer_2=word_tokenizer(),
        transformer=FluxTransformer2DModel(**model.denoiser),
    )
