"""The exact gains that can be switched on around a call, by name: each is measured on against off."""

import platform
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from steer.apps.bench.flops import Flops
from steer.attention import attention_backend
from steer.compiled import compiled
from steer.errors import InputError
from steer.microbatch import micro_batched
from steer.shared_prompt import shared_prompt

On = Callable[[Any], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Switch:
    """A gain.

    about    what is switched
    on       (pipeline) → a context that gives the pipeline to call
    off      what it is compared with; by default the pipeline as it is
    lasting  one context for all repeats, not one for each call: what has to be compiled first
    quick    whether `--quick` has the time for it
    touched  (FLOPs of a denoiser call by operator and module) → the share of them that it touches
    removes  whether that share is saved; else it gets faster by an unknown factor
    memory   it saves memory, and may cost time
    """

    about: str
    on: On
    off: On
    lasting: bool = False
    quick: bool = True
    touched: Callable[[Flops], float] = lambda flops: 0.0
    removes: bool = True
    memory: bool = False


@contextmanager
def as_it_is(pipe: Any) -> Iterator[Any]:
    """Nothing is switched."""
    yield pipe


def backend(name: str) -> On:
    """Attention computed by a backend of `steer.attention`."""

    @contextmanager
    def on(pipe: Any) -> Iterator[Any]:
        with attention_backend(pipe, name):
            yield pipe

    return on


@contextmanager
def shared(pipe: Any) -> Iterator[Any]:
    """Prompts' keys and values once, queries of a prompt's particles in one sequence."""
    with shared_prompt(pipe) as sharing:
        if not sharing.layers:
            raise InputError(f"nothing to share: {'; '.join(sharing.reasons)}")
        yield pipe


def by_rows(rows: int) -> On:
    """The denoiser a few rows at a time."""
    return lambda pipe: micro_batched(pipe, rows)


@contextmanager
def denoiser_compiled(pipe: Any) -> Iterator[Any]:
    """The denoiser through torch.compile, on CUDA as captured graphs."""
    if platform.system() == "Windows" and not torch.cuda.is_available():
        raise InputError("torch.compile needs a C++ compiler here")
    with compiled(pipe) as view:
        yield view


@contextmanager
def everything(pipe: Any) -> Iterator[Any]:
    """All exact gains that cost nothing where they do nothing, together."""
    with attention_backend(pipe, "auto"), shared_prompt(pipe):
        yield pipe


SWITCHES = {
    "shared_prompt": Switch(
        "cross-attention: keys and values of prompts once, queries of a prompt in one sequence",
        shared,
        as_it_is,
        touched=lambda flops: flops.prompts / flops.all,
    ),
    "sdpa": Switch(
        "attention by PyTorch's kernel against softmax(QKᵀ/√d) V as written",
        backend("sdpa"),
        backend("eager"),
        touched=lambda flops: flops.attention / flops.all,
        removes=False,
    ),
    "xformers": Switch(
        "attention by xformers against PyTorch's kernel",
        backend("xformers"),
        backend("sdpa"),
        touched=lambda flops: flops.attention / flops.all,
        removes=False,
    ),
    "micro_batches": Switch("the denoiser 4 rows at a time against all rows", by_rows(4), as_it_is, memory=True),
    "compiled": Switch(
        "the denoiser through torch.compile (on CUDA: captured graphs)",
        denoiser_compiled,
        as_it_is,
        lasting=True,
        quick=False,
        touched=lambda flops: 1.0,
        removes=False,
    ),
}
