"""Evaluation of half-precision models in float32, one operation at a time, without a copy of their weights."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

HALF = (torch.float16, torch.bfloat16)
Precision = Literal["float32", "model"]
_TO_HALF = {torch.Tensor.half, torch.Tensor.bfloat16}


class Float32(TorchFunctionMode):
    """A mode in which every operation converts half-precision tensors to float32 and returns float32, autocast or not.

    Casts to half precision become casts to float32, and half-precision weights report float32 as their dtype: a model
    keeps its stored weights and computes as `model.float()` would. Gradients flow to the stored weights.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func in _TO_HALF:
            func = torch.Tensor.float
        given: Mapping[str, Any] = kwargs or {}
        device = next((one.device.type for one in args if isinstance(one, Tensor)), "cpu")
        with torch.autocast(device, enabled=False):
            return func(*tree_map(_in_float32, tuple(args)), **tree_map(_in_float32, dict(given)))


def _in_float32(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float32 if value in HALF else value
    return value.float() if isinstance(value, Tensor) and value.dtype in HALF else value


@contextmanager
def without_tf32() -> Iterator[None]:
    """Switch TF32 off in the block, in all threads: PyTorch has one setting for the process.

    The setting has two names, `fp32_precision` and the older `allow_tf32`, which raises where they differ. Both are
    set, as torch.compile reads the older one. It recompiles when the first changes: a setting that is off stays as is.
    """
    backends: Any = torch.backends
    matmul, cudnn = backends.cuda.matmul, backends.cudnn
    pairs = ((matmul, matmul), (cudnn, cudnn.conv), (cudnn, cudnn.rnn))
    switched = [pair for pair in pairs if pair[1].fp32_precision == "tf32"]

    def write(allowed: bool) -> None:
        for older, _ in switched:  # first: cuDNN's older name sets both of its operations
            older.allow_tf32 = allowed
        for _, operation in switched:
            operation.fp32_precision = "tf32" if allowed else "ieee"

    write(False)
    try:
        yield
    finally:
        write(True)


def in_float32(modules: Sequence[nn.Module], autocast: bool = False) -> Callable[[], AbstractContextManager[None]]:
    """Return a context in which modules are evaluated in float32: no half precision, autocast or TF32.

    The weights are inspected once, here, as a context is entered for every call of the modules.

    autocast  whether a forward pass enters its own autocast, as a model prepared by accelerate may
    """
    weights = {(one.dtype in HALF, one.device.type) for module in modules for one in module.parameters()}
    half, devices = autocast or any(half for half, _ in weights), {device for _, device in weights}

    @contextmanager
    def exact() -> Iterator[None]:
        # Without half precision anywhere no operation needs a cast.
        with without_tf32(), Float32() if half or any(map(torch.is_autocast_enabled, devices)) else nullcontext():
            yield

    return exact


def widest(device: torch.device) -> torch.dtype:
    """Return float64 where the device supports it: the dtype in which densities are summed over elements."""
    return torch.float32 if device.type == "mps" else torch.float64
