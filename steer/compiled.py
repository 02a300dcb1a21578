"""A pipeline's denoisers through torch.compile, and on CUDA through captured graphs, for the calls inside a block."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from steer.errors import InputError
from steer.offloading import is_offloaded
from steer.stand_in import StandIn, denoisers_in, standing_in

Backend = str | Callable[..., Any]


@contextmanager
def compiled(pipe: Any, *, cuda_graphs: bool | None = None, backend: Backend = "inductor") -> Iterator[Any]:
    """Yields a view of a diffusers pipeline whose denoisers are compiled at their first call, for each shape once.

    cuda_graphs  capture the denoiser's kernels and launch them as one; None: on CUDA, with the inductor
    backend      of torch.compile; "aot_eager" compiles fast and makes nothing faster, for tests

    Another prompt, other latents and resampled particles are copied into the graph's own buffers, and what it says is
    copied out: they need no new graph. Another batch size or image size does. The pipeline itself stays as it is.

    Raises InputError for a denoiser that is moved or changed at each call (offloading, a feature cache), one that is
    micro-batched already, CUDA graphs where there are none, and, when it is called, where gradients are asked for.
    """
    names = denoisers_in(pipe)
    if not names:
        raise InputError(f"{type(pipe).__name__} has no unet or transformer: there is nothing to compile")
    for name in names:
        _check_stays(name, getattr(pipe, name))
    on_cuda = all(getattr(pipe, name).device.type == "cuda" for name in names)
    if cuda_graphs and not (on_cuda and backend == "inductor"):
        raise InputError("cuda_graphs need the denoiser on CUDA and backend='inductor': leave cuda_graphs out")
    graphs = cuda_graphs if cuda_graphs is not None else on_cuda and backend == "inductor"
    modules = {name: getattr(pipe, name) for name in names}
    stand_ins = {
        name: StandIn(module, compiled_call(name, module, graphs, backend)) for name, module in modules.items()
    }
    with standing_in(pipe, stand_ins) as view:
        yield view


def compiled_call(name: str, module: Any, graphs: bool, backend: Backend) -> Callable[..., Any]:
    """A module's call through torch.compile, without gradients; with `graphs` it answers in the graph's own memory."""
    run = torch.compile(module, backend=backend, mode="reduce-overhead" if graphs else None)

    def call(*args: Any, **kwargs: Any) -> Any:
        _check_no_gradients(name, module, [args, kwargs])
        if not graphs:
            return run(*args, **kwargs)
        # A new step: what the last one said may be overwritten now. Pipelines that call twice a step keep both
        # outputs, and so does the seam, hence the copies.
        torch.compiler.cudagraph_mark_step_begin()
        return tree_map_only(Tensor, torch.clone, run(*args, **kwargs))

    return call


def _check_stays(name: str, denoiser: Any) -> None:
    """Raises InputError unless the denoiser is a plain module whose weights stay where they are."""
    if type(denoiser) is StandIn:
        raise InputError(f"{name} is micro-batched or watched: compile first, micro_batched(compiled_view) after it")
    if is_offloaded(denoiser):
        raise InputError(
            f"{name} is offloaded: its weights move at each call, and a compiled graph needs them in one place. "
            "Use pipe.remove_all_hooks() and pipe.to(device), or leave compiled out"
        )
    if getattr(denoiser, "is_cache_enabled", False):
        raise InputError(f"{name} has a feature cache: use pipe.{name}.disable_cache(), or leave compiled out")


def _check_no_gradients(name: str, module: Any, given: Any) -> None:
    if not torch.is_grad_enabled():
        return
    tensors = [leaf for leaf in tree_leaves(given) if torch.is_tensor(leaf)]
    if any(tensor.requires_grad for tensor in (*tensors, *module.parameters())):
        raise InputError(
            f"{name} is compiled for calls without gradients: use the plain pipeline for replays, guidance by a reward "
            "and noise optimisation, or torch.no_grad()"
        )
