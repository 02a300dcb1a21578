"""The Gaussian step in one pass over memory, in Triton. Requires triton: import it by `steer.diffusion.kernels`."""

import math
from collections.abc import Collection

import torch
import triton
import triton.language as tl
from torch import Tensor

from steer.diffusion.schedules import LinearStep, Wanted, check_pass

BLOCK = 1024  # elements of a row per program
DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
HALF_LOG_2PI = tl.constexpr(0.5 * math.log(2 * math.pi))


# The operations of plain_pass, in its order, on one block of one row; the block sums are added afterwards, in order:
# without atomics the log-prob is the same in every run.
def _step(
    x: tl.tensor,
    output: tl.tensor,
    given: tl.tensor,
    table: tl.tensor,
    x0_to: tl.tensor,
    mean_to: tl.tensor,
    x_s_to: tl.tensor,
    sums_to: tl.tensor,
    elements: tl.tensor,
    x_row: tl.tensor,
    output_row: tl.tensor,
    given_row: tl.tensor,
    table_row: tl.tensor,
    limit: tl.tensor,
    CLIPS: tl.constexpr,
    DRAWS: tl.constexpr,
    X0: tl.constexpr,
    MEAN: tl.constexpr,
    X_S: tl.constexpr,
    LOG_PROB: tl.constexpr,
    STORAGE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < elements
    weights = table + row * table_row
    x_t = tl.load(x + row * x_row + place, mask=inside, other=0.0).to(tl.float32)
    prediction = tl.load(output + row * output_row + place, mask=inside, other=0.0).to(tl.float32)
    x0 = tl.load(weights) * x_t + tl.load(weights + 1) * prediction
    if CLIPS:
        x0 = tl.clamp(x0, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    mean = tl.load(weights + 2) * x_t + tl.load(weights + 3) * x0
    std = tl.load(weights + 4)
    to = row * elements + place
    if X0:
        tl.store(x0_to + to, x0, mask=inside)
    if MEAN:
        tl.store(mean_to + to, mean, mask=inside)
    if X_S or LOG_PROB:
        x_s = tl.load(given + row * given_row + place, mask=inside, other=0.0).to(tl.float32)
        if DRAWS:
            own = x_s_to.dtype.element_ty
            x_s = (mean + std * x_s).to(own).to(STORAGE).to(own)
            if X_S:
                tl.store(x_s_to + to, x_s, mask=inside)
            x_s = x_s.to(tl.float32)
        if LOG_PROB:
            z = ((x_s - mean) / std).to(tl.float64)
            terms = -0.5 * z * z - tl.load(weights + 5).to(tl.float64) - HALF_LOG_2PI
            total = tl.sum(tl.where(inside, terms, 0.0))
            tl.store(sums_to + row * tl.num_programs(0) + tl.program_id(0), total)


step_kernel = triton.jit(_step)


def triton_pass(
    step: LinearStep,
    x: Tensor,
    output: Tensor,
    want: Collection[Wanted],
    noise: Tensor | None = None,
    x_s: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    storage: torch.dtype | None = None,
) -> dict[Wanted, Tensor]:
    """Evaluate a step as `plain_pass` does, in one kernel; a given x_s is returned unchanged. No gradients.

    Rows whose elements are not contiguous, as in channels-last, are copied first.
    """
    check_pass(step, x, output, want, noise, x_s)
    rows, elements = len(x), math.prod(x.shape[1:])
    blocks = triton.cdiv(elements, BLOCK)
    results: dict[Wanted, Tensor] = {} if x_s is None else {"x_s": x_s}
    for name in ("x0", "mean"):
        if name in want:
            results[name] = torch.empty(x.shape, device=x.device)
    if noise is not None:
        results["x_s"] = torch.empty(x.shape, dtype=dtype, device=x.device)
    sums = torch.empty((rows, blocks), device=x.device, dtype=torch.float64)
    table = step.table(x.device)
    given = next((tensor for tensor in (noise, x_s) if tensor is not None), x)
    inputs = [_rows(tensor.detach(), elements) for tensor in (x, output, given)]
    if rows and elements:
        with torch.cuda.device_of(x):
            step_kernel[blocks, rows](
                *inputs,
                table,
                *(results.get(name, sums) for name in ("x0", "mean", "x_s")),
                sums,
                elements,
                *(tensor.stride(0) for tensor in inputs),
                0 if len(table) == 1 else table.stride(0),
                step.limit,
                CLIPS=step.limit < math.inf,
                DRAWS=noise is not None,
                X0="x0" in want,
                MEAN="mean" in want,
                X_S="x_s" in want,
                LOG_PROB="log_prob" in want,
                STORAGE=DTYPES[storage or dtype],
                BLOCK=BLOCK,
                enable_fp_fusion=False,  # products and sums are rounded separately, as in plain_pass
            )
    if "log_prob" in want:
        results["log_prob"] = sums.sum(1)
    return {name: results[name] for name in want}


def _rows(tensor: Tensor, elements: int) -> Tensor:
    """Return (N, elements) with contiguous rows."""
    flat = tensor.reshape(len(tensor), elements)
    return flat if elements == 1 or flat.stride(1) == 1 else flat.contiguous()
