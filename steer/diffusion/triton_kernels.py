"""The Gaussian step in one pass over memory, in Triton. Requires triton: import it by `steer.diffusion.kernels`."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from steer.diffusion.schedules import LinearStep, check_pass

BLOCK = 1024  # elements of a row per program


# The operations of plain_pass, in its order, on one block of one row.
def _step(
    x: tl.tensor,
    output: tl.tensor,
    noise: tl.tensor,
    table: tl.tensor,
    result: tl.tensor,
    elements: tl.tensor,
    x_row: tl.tensor,
    output_row: tl.tensor,
    noise_row: tl.tensor,
    table_row: tl.tensor,
    limit: tl.tensor,
    CLIPS: tl.constexpr,
    DRAWS: tl.constexpr,
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
    value = tl.load(weights + 2) * x_t + tl.load(weights + 3) * x0
    if DRAWS:
        z = tl.load(noise + row * noise_row + place, mask=inside, other=0.0).to(tl.float32)
        value += tl.load(weights + 4) * z
    tl.store(result + row * elements + place, value, mask=inside)


step_kernel = triton.jit(_step)


def triton_pass(step: LinearStep, x: Tensor, output: Tensor, noise: Tensor | None = None) -> Tensor:
    """Return the mean of a step or a sample as `plain_pass` does, in one kernel. No gradients.

    Rows whose elements are not contiguous, as in channels-last, are copied first.
    """
    check_pass(step, x, output, noise)
    rows, elements = len(x), math.prod(x.shape[1:])
    table, result = step.table(x.device), torch.empty(x.shape, device=x.device)
    inputs = [_rows(tensor.detach(), elements) for tensor in (x, output, x if noise is None else noise)]
    if rows and elements:
        with torch.cuda.device_of(x):
            step_kernel[triton.cdiv(elements, BLOCK), rows](
                *inputs,
                table,
                result,
                elements,
                *(tensor.stride(0) for tensor in inputs),
                0 if len(table) == 1 else table.stride(0),
                step.limit,
                CLIPS=step.limit < math.inf,
                DRAWS=noise is not None,
                BLOCK=BLOCK,
                enable_fp_fusion=False,  # products and sums are rounded separately, as in plain_pass
            )
    return result


def _rows(tensor: Tensor, elements: int) -> Tensor:
    """Return (N, elements) with contiguous rows."""
    flat = tensor.reshape(len(tensor), elements)
    return flat if elements == 1 or flat.stride(1) == 1 else flat.contiguous()
