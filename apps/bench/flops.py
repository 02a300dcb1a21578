"""Arithmetic of one denoiser call, counted: what a gain can touch at most, and what a device achieves."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from steer.attention import attention_backend
from steer.shared_prompt import KEYS_AND_VALUES
from steer.stand_in import denoisers_in


@dataclass(frozen=True)
class Flops:
    """FLOPs (a multiplication and an addition are two) of one denoiser call: of all; of attention's scores and sums of
    values; of the keys and values that cross-attention makes of prompts."""

    all: int
    attention: int
    prompts: int


class _Called(Exception):
    """Carries the arguments of the first denoiser call out of a run."""


def first_call(denoiser: Any, run: Callable[[], Any]) -> tuple[Any, Any]:
    """What `run` calls a denoiser with first; the run ends there."""

    def stop(module: Any, args: Any, kwargs: Any) -> None:
        raise _Called(args, kwargs)

    handle = denoiser.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        run()
    except _Called as called:
        return called.args
    finally:
        handle.remove()
    raise AssertionError("the run never called its denoiser")


def flops_of(pipe: Any, run: Callable[[], Any]) -> Flops:
    """Counts the first denoiser call that `run` makes of a pipeline, guidance's rows included."""
    denoiser = getattr(pipe, denoisers_in(pipe)[0])
    args, kwargs = first_call(denoiser, run)
    prompts = 0

    def count(linear: Any, given: Any, output: Tensor) -> None:
        nonlocal prompts
        prompts += 2 * output[..., 0].numel() * linear.weight.numel()

    layers = [layer for layer in denoiser.modules() if getattr(layer, "is_cross_attention", False)]
    linears = [linear for layer in layers for name in KEYS_AND_VALUES if (linear := getattr(layer, name, None))]
    counter = FlopCounterMode(display=False)
    with ExitStack() as stack:
        for linear in linears:
            stack.callback(linear.register_forward_hook(count).remove)
        # The formula as it is written: its two products are counted wherever the model is.
        stack.enter_context(attention_backend(denoiser, "eager"))
        stack.enter_context(torch.no_grad())
        stack.enter_context(counter)
        denoiser(*args, **kwargs)
    by_operator = counter.get_flop_counts()["Global"]
    return Flops(counter.get_total_flops(), by_operator.get(torch.ops.aten.bmm, 0), prompts)
