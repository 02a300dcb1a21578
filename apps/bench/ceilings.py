"""What the device can do at most, and how much of it is used: FLOP/s of the denoiser, bytes a second of the step."""

from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from steer.apps.bench.clock import seconds_of
from steer.apps.bench.flops import first_call, flops_of
from steer.apps.bench.subject import Subject, plain_call
from steer.kernels import one_pass
from steer.linear import linear_step
from steer.schedule import Level
from steer.stand_in import denoisers_in

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
