"""Models as large as the published ones.

Denoisers and VAEs have the published sizes. Text encoders have the published widths and two layers, or one: text is
encoded once a call, and is not what is measured.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from steer.apps.bench import subject as models
from steer.apps.bench.subject import Subject, plain_call
from steer.apps.bench.timing import seconds_of
from steer.diffusion.attention import attention_backend
from steer.diffusion.kernels import one_pass
from steer.diffusion.schedules import Level, linear_step
from steer.diffusion.step_hooks import denoisers_in

SD_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
SIXTEEN_CHANNELS = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}

REAL_SIZES = {
    "sd15": models.RealSize(
        models.sd,
        {
            "sample_size": 64,
            "block_out_channels": (320, 640, 1280, 1280),
            "layers_per_block": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 768,
        },
        SD_VAE | {"latent_channels": 4, "sample_size": 512, "scaling_factor": 0.18215},
        guidance=7.5,
    ),
    "sdxl": models.RealSize(
        models.sdxl,
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
        clips=(768, 1280),
        guidance=5.0,
    ),
    "sd3": models.RealSize(
        models.sd3,
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
        clips=(768, 1280),
        words=4096,
        guidance=7.0,
    ),
    "flux": models.RealSize(
        models.flux,
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
        words=4096,
        guidance=3.5,
    ),
}


@dataclass(frozen=True)
class Flops:
    """FLOPs (a multiplication and an addition are two) of one denoiser call: of all; of attention's scores and sums of
    values."""

    all: int
    attention: int


class _FirstCall(Exception):
    """Carries the arguments of the first denoiser call out of a run."""


def first_call(denoiser: Any, run: Callable[[], Any]) -> tuple[Any, Any]:
    """What `run` calls a denoiser with first; the run ends there."""

    def stop(module: Any, args: Any, kwargs: Any) -> None:
        raise _FirstCall(args, kwargs)

    handle = denoiser.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        run()
    except _FirstCall as called:
        return called.args
    finally:
        handle.remove()
    raise AssertionError("the run never called its denoiser")


def flops_of(pipe: Any, run: Callable[[], Any]) -> Flops:
    """Counts the first denoiser call that `run` makes of a pipeline, guidance's rows included."""
    denoiser = getattr(pipe, denoisers_in(pipe)[0])
    args, kwargs = first_call(denoiser, run)
    counter = FlopCounterMode(display=False)
    # The formula as it is written: its two products are counted wherever the model is.
    with attention_backend(denoiser, "eager"), torch.no_grad(), counter:
        denoiser(*args, **kwargs)
    by_operator = counter.get_flop_counts()["Global"]
    return Flops(counter.get_total_flops(), by_operator.get(torch.ops.aten.bmm, 0))


SIDES = {"cuda": 8192}  # of the matrices; elsewhere SMALL
SMALL = 1024
BYTES = {"cuda": 2**30}  # that are copied; elsewhere FEW
FEW = 2**25


def ceilings(subject: Subject, quick: bool) -> dict[str, Any]:
    """Measured on the subject's device, in its precision.

    matrix_flops     FLOP/s of one large matrix product
    copy_bytes       bytes a second, read and written, of one large copy
    denoiser_flops   FLOP/s of the denoiser's call, and `denoiser_share` of the first
    step_bytes       bytes a second of the fused step on latents that fill the device, and `step_share` of the second
    fused            whether that was the kernel, or its twin in plain PyTorch
    """
    device, dtype = subject.device, subject.pipe.dtype
    repeats = 3 if quick else 10
    side = SIDES.get(device.type, SMALL)
    a = torch.randn(side, side, device=device, dtype=dtype)
    matrix = 2 * side**3 / _fastest(lambda: a @ a, device, repeats)
    source = torch.empty(BYTES.get(device.type, FEW), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = 2 * len(source) / _fastest(lambda: target.copy_(source), device, repeats)
    denoiser = _denoiser_rate(subject, repeats)
    step = _step_rate(device, dtype, len(source) // 16, repeats)
    return {
        "matrix_flops": matrix,
        "copy_bytes": copied,
        "denoiser_flops": denoiser,
        "denoiser_share": denoiser / matrix,
        "step_bytes": step,
        "step_share": step / copied,
        "fused": device.type == "cuda",
    }


def _fastest(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """A ceiling is what the fastest repeat shows."""
    run()
    return min(seconds_of(run, device) for _ in range(repeats))


@torch.no_grad()
def _denoiser_rate(subject: Subject, repeats: int) -> float:
    def plain() -> Any:
        return plain_call(subject, subject.pipe)

    denoiser = getattr(subject.pipe, denoisers_in(subject.pipe)[0])
    args, kwargs = first_call(denoiser, plain)
    denoiser(*args, **kwargs)
    seconds = [seconds_of(lambda: denoiser(*args, **kwargs), subject.device) for _ in range(repeats)]
    return flops_of(subject.pipe, plain).all / median(seconds)


def _step_rate(device: torch.device, dtype: torch.dtype, elements: int, repeats: int) -> float:
    """Bytes that have to move, noise in fp32, over seconds."""
    before, after = (Level(torch.tensor(a).double().sqrt(), torch.tensor(1 - a).double().sqrt()) for a in (0.3, 0.6))
    step = linear_step("epsilon", before, after, eta=1.0)
    x, output = (torch.randn(16, elements // 16, device=device, dtype=dtype) for _ in range(2))
    noise = torch.randn(16, elements // 16, device=device)
    seconds = _fastest(
        lambda: one_pass(step, x, output, ("x_s", "log_prob"), noise=noise, dtype=dtype), device, repeats
    )
    moved = x.numel() * (3 * x.element_size() + noise.element_size())
    return moved / seconds
