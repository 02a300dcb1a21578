"""Tiny real diffusers pipelines of every model family, with random weights."""

import copy
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    ControlNetModel,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from schedulers import BETAS
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from steer.apps.scenes.training import build_tokenizer
from steer.assets import MODELS

PROMPT = "a red circle left of a blue star"
T5_WIDTH = 32
CLIP_WIDTH = 16


@functools.cache
def clip_tokenizer() -> CLIPTokenizer:
    with tempfile.TemporaryDirectory() as folder:
        return build_tokenizer(Path(folder))


@functools.cache
def t5_tokenizer() -> PreTrainedTokenizerFast:
    """Words, with an end token after them as T5 has it."""
    words = ["<pad>", "</s>", "<unk>", *sorted(set(PROMPT.split()))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=32
    )


def clip_encoder(cls: type) -> Any:
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=CLIP_WIDTH,
        intermediate_size=16,
        projection_dim=CLIP_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return cls(config).eval()


def t5_encoder(cls: type, config: type) -> Any:
    width = {"d_model": T5_WIDTH, "d_kv": 8, "d_ff": 16, "num_heads": 2, "num_layers": 1}
    return cls(config(vocab_size=len(t5_tokenizer()), **width)).eval()


def vae() -> AutoencoderKL:
    """Halves the size: 8 px are 4 latent pixels."""
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[4, 4],
        norm_num_groups=2,
        latent_channels=4,
        sample_size=8,
        shift_factor=0.1,
        scaling_factor=0.5,
    ).eval()


def unet(**config: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=4,
        down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
        block_out_channels=[8, 8],
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        **config,
    ).eval()


def noise_levels() -> DDIMScheduler:
    return DDIMScheduler(**BETAS, clip_sample=False, steps_offset=1)


def stable_diffusion_parts() -> dict[str, Any]:
    return {
        "vae": vae(),
        "text_encoder": clip_encoder(CLIPTextModel),
        "tokenizer": clip_tokenizer(),
        "unet": unet(cross_attention_dim=CLIP_WIDTH),
        "scheduler": noise_levels(),
        "safety_checker": None,
        "feature_extractor": None,
    }


def sd() -> StableDiffusionPipeline:
    return StableDiffusionPipeline(**stable_diffusion_parts(), requires_safety_checker=False)


def img2img() -> StableDiffusionImg2ImgPipeline:
    return StableDiffusionImg2ImgPipeline(**stable_diffusion_parts(), requires_safety_checker=False)


def controlnet() -> StableDiffusionControlNetPipeline:
    components = stable_diffusion_parts()
    net = ControlNetModel.from_unet(components["unet"], conditioning_embedding_out_channels=(4, 4)).eval()
    for parameter in net.parameters():  # the zero convolutions of a fresh ControlNet would say nothing
        torch.nn.init.normal_(parameter, std=0.2)
    return StableDiffusionControlNetPipeline(**components, controlnet=net, requires_safety_checker=False)


def sdxl() -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip_encoder(CLIPTextModel),
        text_encoder_2=clip_encoder(CLIPTextModelWithProjection),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet(
            cross_attention_dim=2 * CLIP_WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + CLIP_WIDTH,
        ),
        scheduler=noise_levels(),
        add_watermarker=False,
    )


def sd3() -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * CLIP_WIDTH,
        pos_embed_max_size=4,
    ).eval()
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(),
        text_encoder=clip_encoder(CLIPTextModelWithProjection),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_encoder(CLIPTextModelWithProjection),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(T5EncoderModel, T5Config),
        tokenizer_3=t5_tokenizer(),
    )


def flux() -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=CLIP_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    ).eval()
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae(),
        text_encoder=clip_encoder(CLIPTextModel),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(T5EncoderModel, T5Config),
        tokenizer_2=t5_tokenizer(),
        transformer=transformer,
    )


def pixart() -> PixArtSigmaPipeline:
    transformer = PixArtTransformer2DModel(
        sample_size=4,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        cross_attention_dim=16,
        caption_channels=T5_WIDTH,
    ).eval()
    return PixArtSigmaPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(T5EncoderModel, T5Config),
        vae=vae(),
        transformer=transformer,
        scheduler=noise_levels(),
    )


def wan() -> WanPipeline:
    video_vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.1, -0.1, 0.2, 0.0],
        latents_std=[1.0, 2.0, 1.5, 0.5],
        scale_factor_temporal=2,
        scale_factor_spatial=2,
    ).eval()
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=T5_WIDTH,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=16,
    ).eval()
    return WanPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(UMT5EncoderModel, UMT5Config),
        vae=video_vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=transformer,
    )


def fresh_scenes() -> StableDiffusionPipeline:
    """The embedded model, loaded once more."""
    pipe = StableDiffusionPipeline.from_pretrained(MODELS["scenes"])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def large_denoiser(name: str) -> DiffusionPipeline:
    """A tiny pipeline for latents of real size: 256 px are 128 latent pixels, D = 65,536."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = PIPELINES[name]()
        if name == "sd3":  # its table of positions is larger, its weights are the same
            config = dict(pipe.transformer.config) | {"sample_size": 64, "pos_embed_max_size": 64}
            pipe.transformer = SD3Transformer2DModel.from_config(config).eval()
        if name == "sdxl":  # no attention at the highest resolution, as in the released model: 16,384² pairs a head
            blocks = {"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"]}
            blocks |= {"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]}
            pipe.unet = UNet2DConditionModel.from_config(dict(pipe.unet.config) | blocks).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


PIPELINES: dict[str, Callable[[], DiffusionPipeline]] = {
    "sd": sd,
    "img2img": img2img,
    "controlnet": controlnet,
    "sdxl": sdxl,
    "sd3": sd3,
    "flux": flux,
    "pixart": pixart,
    "wan": wan,
}


def call_kwargs(name: str, images: int = 3, steps: int = 4) -> dict[str, Any]:
    """Arguments of a cheap call with several images of one prompt."""
    count = "num_videos_per_prompt" if name == "wan" else "num_images_per_prompt"
    call: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": steps, "guidance_scale": 3.0, count: images}
    if name != "img2img":
        side = 16 if name == "wan" else 8
        call |= {"height": side, "width": side}
    if name in ("sd3", "flux", "pixart", "wan"):
        call["max_sequence_length"] = 10
    if name == "pixart":
        call |= {"clean_caption": False, "use_resolution_binning": False}
    if name == "wan":
        call["num_frames"] = 3
    picture = torch.linspace(0, 1, 3 * 8 * 8).view(1, 3, 8, 8)
    if name == "img2img":
        call |= {"image": picture.repeat(images, 1, 1, 1), "strength": 0.8}
    if name == "controlnet":
        call["image"] = picture
    return call


SHARED: list[DiffusionPipeline] = []  # what `cached_pipe` has made


@functools.cache
def cached_pipe(name: str) -> DiffusionPipeline:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = PIPELINES[name]()
    pipe.set_progress_bar_config(disable=True)
    SHARED.append(pipe)
    return pipe


def with_scheduler(pipe: DiffusionPipeline, scheduler: Any) -> DiffusionPipeline:
    """The same models under another scheduler; `pipe`, which other tests share, keeps its own."""
    other = copy.copy(pipe)
    other.scheduler = scheduler
    return other


def forget_gradients() -> None:
    """Leave the weights of all shared pipelines as they were made: trainable, without gradients."""
    for pipe in SHARED:
        for model in pipe.components.values():
            if isinstance(model, torch.nn.Module):
                model.requires_grad_().zero_grad(set_to_none=True)  # a trainer freezes what it does not train
