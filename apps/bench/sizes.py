"""Models as large as the published ones, and the ceilings of their device.

Denoisers and VAEs have the published sizes. Text encoders have the published widths but only one or two layers: text
is encoded once per call, and this is not measured.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

from steer.apps.bench.subject import DDIM, RealSize, Subject, plain_call, without_decoder
from steer.diffusion.kernels import one_pass
from steer.diffusion.schedules import X0_WEIGHTS, Level, weighted_step

SD_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
SIXTEEN_CHANNELS = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}

REAL_SIZES = {
    "sd15": RealSize(
        partial(StableDiffusionPipeline, safety_checker=None, feature_extractor=None, requires_safety_checker=False),
        DDIM,
        UNet2DConditionModel,
        {
            "sample_size": 64,
            "block_out_channels": (320, 640, 1280, 1280),
            "layers_per_block": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 768,
        },
        SD_VAE | {"latent_channels": 4, "sample_size": 512, "scaling_factor": 0.18215},
        ((CLIPTextModel, 768),),
        guidance=7.5,
    ),
    "sdxl": RealSize(
        partial(StableDiffusionXLPipeline, add_watermarker=False),
        DDIM,
        UNet2DConditionModel,
        {
            "sample_size": 128,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (320, 640, 1280),
            "layers_per_block": 2,
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        SD_VAE | {"latent_channels": 4, "sample_size": 1024, "scaling_factor": 0.13025},
        ((CLIPTextModel, 768), (CLIPTextModelWithProjection, 1280)),
        guidance=5.0,
    ),
    "sd3": RealSize(
        StableDiffusion3Pipeline,
        partial(FlowMatchEulerDiscreteScheduler, shift=3.0),
        SD3Transformer2DModel,
        {
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 24,
            "attention_head_dim": 64,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 192,
        },
        SD_VAE | SIXTEEN_CHANNELS | {"sample_size": 1024, "scaling_factor": 1.5305, "shift_factor": 0.0609},
        ((CLIPTextModelWithProjection, 768), (CLIPTextModelWithProjection, 1280), (T5EncoderModel, 4096)),
        guidance=7.0,
    ),
    "flux": RealSize(
        FluxPipeline,
        partial(FlowMatchEulerDiscreteScheduler, use_dynamic_shifting=True),
        FluxTransformer2DModel,
        {
            "patch_size": 1,
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": True,
        },
        SD_VAE | SIXTEEN_CHANNELS | {"sample_size": 1024, "scaling_factor": 0.3611, "shift_factor": 0.1159},
        ((CLIPTextModel, 768), (T5EncoderModel, 4096)),
        guidance=3.5,
    ),
}


SIDE = {"cuda": 8192, "cpu": 1024}  # side of the matrices
BYTES = {"cuda": 2**30, "cpu": 2**25}  # copied bytes


@torch.no_grad()
def ceilings(subject: Subject, quick: bool) -> dict[str, Any]:
    """Measure the ceilings of the subject's device in its precision, and which shares denoiser and step reach.

    matrix_flops     FLOP/s of one large matrix product
    copy_bytes       bytes per second, read and written, of one large copy
    denoiser_flops   FLOP/s of the plain pipeline's call;  `denoiser_share`: its share of matrix_flops
    step_bytes       bytes per second of the fused step on latents that fill the device;  `step_share`: of copy_bytes
    fused            whether the step is the kernel, or its equivalent in plain PyTorch
    """
    device, dtype, seconds = subject.device, subject.pipe.dtype, 0.1 if quick else 1.0
    side, count = (table.get(device.type, table["cpu"]) for table in (SIDE, BYTES))

    def rate(work: float, run: Callable[[], Any]) -> float:
        """Return the work per second of the fastest block of repeats."""
        timed = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
        return work / min(timed.blocked_autorange(min_run_time=seconds).times)

    a, source = (
        torch.randn(side, side, device=device, dtype=dtype),
        torch.empty(count, dtype=torch.uint8, device=device),
    )
    target = torch.empty_like(source)
    view = without_decoder(subject.pipe)
    with FlopCounterMode(display=False) as counter:
        plain_call(subject, view)
    before, after = (Level(torch.tensor(a).double().sqrt(), torch.tensor(1 - a).double().sqrt()) for a in (0.3, 0.6))
    step, shape = weighted_step(X0_WEIGHTS["epsilon"](*before), before, after, eta=1.0), (16, count // 256)
    x, output = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
    noise = torch.randn(shape, device=device)
    moved = 2 * x.numel() * (x.element_size() + noise.element_size())  # bytes that must be moved, noise and x_s in fp32
    rates = {
        "matrix_flops": rate(2 * side**3, lambda: a @ a),
        "copy_bytes": rate(2 * count, lambda: target.copy_(source)),
        "denoiser_flops": rate(counter.get_total_flops(), lambda: plain_call(subject, view)),
        "step_bytes": rate(moved, lambda: one_pass(step, x, output, noise)),
    }
    return rates | {
        "denoiser_share": rates["denoiser_flops"] / rates["matrix_flops"],
        "step_share": rates["step_bytes"] / rates["copy_bytes"],
        "fused": device.type == "cuda",
    }
