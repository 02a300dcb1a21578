"""Batches of a denoiser: micro-batches, rows that are still alive, compiled calls."""

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from steer.diffusion.preview import with_decode
from steer.diffusion.step_hooks import CONTROLNETS, DENOISERS, ModuleProxy, denoisers_in, replace_modules
from steer.errors import InputError

LATENTS = ("sample", "hidden_states")  # what denoisers and ControlNets call their first argument
# Tables of positions that all rows share where they have no more than two axes, and weights of layers: their length
# may be the number of rows by chance.
POSITIONS = {"img_ids", "txt_ids", "image_rotary_emb", "rotary_embedding", "video_rotary_emb", "position_ids"}
PER_LAYER = {"control_hidden_states_scale"}


@contextmanager
def micro_batched(pipe: Any, rows: int | None = None) -> Iterator[Any]:
    """Yields a view of a diffusers pipeline whose denoisers and ControlNets take at most `rows` rows at a time.

    rows  of a denoiser's batch, which guidance may double; None: all of them, until the device's memory is full

    Where memory runs out the number is halved, the rows that were done are kept, and what fitted is remembered until
    the block ends. Images are those of the whole batch. The pipeline itself stays as it is; offloading hooks work, and
    a compiled view may be given (`compiled`). Gradients flow, but their memory is that of the whole batch.

    Raises InputError where `rows` is below 1, nothing can be split, or a single row does not fit.
    """
    if rows is not None and rows < 1:
        raise InputError(f"rows must be at least 1, got {rows}")
    modules = {name: getattr(pipe, name, None) for name in (*DENOISERS, *CONTROLNETS)}
    split = {name: MicroBatches(name, module, rows) for name, module in modules.items() if module is not None}
    if not set(split) & set(DENOISERS):
        raise InputError(f"{type(pipe).__name__} has none of {', '.join(DENOISERS)}: there is nothing to split")
    with replace_modules(pipe, {name: ModuleProxy(one.module, one) for name, one in split.items()}) as view:
        yield view


class MicroBatches:
    """Calls a module on a few rows at a time, and joins what it says of them.

    rows  how many at most; less once memory ran out
    """

    def __init__(self, name: str, module: Any, rows: int | None) -> None:
        self.name, self.module, self.rows = name, module, rows
        self._names = list(inspect.signature(module.forward).parameters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(self._names, args, strict=False)) | kwargs
        batch = batch_size_of(given, self.module)
        outputs: list[Any] = []
        done = 0
        while done < batch:
            count = min(self.rows or batch, batch - done)
            output = self._try_call(select_rows(given, batch, slice(done, done + count)), count)
            if output is None:
                self.rows = (count + 1) // 2
                torch.cuda.empty_cache()
                continue
            outputs.append(output)
            done += count
        return outputs[0] if len(outputs) == 1 else tree_map(_joined, outputs[0], *outputs[1:])

    def _try_call(self, given: dict[str, Any], count: int) -> Any:
        """What the module says of so many rows; None where they do not fit into memory."""
        try:
            return self.module(**given)
        except torch.OutOfMemoryError as error:
            if count == 1:
                raise InputError(
                    f"{self.name}: the device's memory is full with a single row: use smaller images, half precision "
                    "or pipe.enable_model_cpu_offload()"
                ) from error
        return None  # here the error is gone, and with it the tensors that its traceback holds


def batch_size_of(given: Mapping[str, Any], module: Any) -> int:
    """Rows of a module's call, by its arguments. Raises InputError where its latents are not one tensor."""
    latents = next((given[name] for name in LATENTS if name in given), None)
    if not torch.is_tensor(latents):
        kind = type(module).__name__
        raise InputError(f"{kind} takes no batch of latents as one tensor: it cannot be split, use fewer particles")
    return len(latents)


def select_rows(given: Mapping[str, Any], batch: int, rows: slice | Tensor) -> dict[str, Any]:
    """The arguments for some rows of a batch: of everything that has one entry a row, theirs."""

    def cut(tensor: Tensor) -> Tensor:
        if tensor.dim() == 0 or len(tensor) != batch:
            return tensor
        return tensor[rows if isinstance(rows, slice) else rows.to(tensor.device)]

    def cut_positions(tensor: Tensor) -> Tensor:
        return tensor if tensor.dim() <= 2 else cut(tensor)

    cuts = {name: cut_positions if name in POSITIONS else cut for name in given.keys() - PER_LAYER}
    return {name: tree_map_only(Tensor, cuts[name], value) if name in cuts else value for name, value in given.items()}


def _joined(*outputs: Any) -> Any:
    return torch.cat(outputs) if torch.is_tensor(outputs[0]) else outputs[0]


class ActiveRows:
    """Which rows of a batch are alive: all of them, until some are kept.

    rows  (n,) int64, or None: all
    size  of the whole batch
    """

    def __init__(self) -> None:
        self.rows: Tensor | None = None
        self.size = 0

    def keep(self, rows: Tensor, size: int) -> None:
        """From now on these rows of a batch of so many are computed."""
        self.rows, self.size = rows, size

    def of(self, values: Tensor) -> Tensor:
        """The rows of the living, of a tensor (N, …) of the whole batch."""
        return values if self.rows is None else values[self.rows.to(values.device)]

    def view(self, pipe: Any) -> Any:
        """A view of a pipeline that computes no dead rows: there they say 0. The pipeline stays as it is.

        Guidance repeats the batch in blocks of its size, as diffusers does. Raises InputError for a pipeline without a
        denoiser of a known name.
        """
        if not denoisers_in(pipe):
            raise InputError(f"{type(pipe).__name__} has none of {', '.join(DENOISERS)}: no rows can be left out")
        names = [name for name in (*DENOISERS, *CONTROLNETS) if getattr(pipe, name, None) is not None]
        view = copy.copy(pipe)
        modules: dict[str, Any] = {name: self._denoiser(getattr(pipe, name)) for name in names}
        if getattr(pipe, "vae", None) is not None:
            modules["vae"] = self.decoder(pipe.vae)
        # Offloading hooks are on the pipeline's own modules, and it is the one that puts them back.
        vars(view).update(modules, maybe_free_model_hooks=pipe.maybe_free_model_hooks)
        return view

    def decoder(self, vae: Any) -> Any:
        """A copy of an autoencoder, on the same weights, that decodes no dead rows; anything else stays what it is."""
        return with_decode(vae, functools.partial(self._decoded, vae.decode)) if hasattr(vae, "decode") else vae

    def _denoiser(self, module: Any) -> ModuleProxy:
        names = list(inspect.signature(module.forward).parameters)

        def active_call(*args: Any, **kwargs: Any) -> Any:
            if self.rows is None:
                return module(*args, **kwargs)
            given = dict(zip(names, args, strict=False)) | kwargs
            batch = batch_size_of(given, module)
            rows = self._active_rows_in(batch)
            return scatter_rows(module(**select_rows(given, batch, rows)), rows, batch)

        return ModuleProxy(module, active_call)

    def _decoded(self, decode: Any, z: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.rows is None or len(z) != self.size:
            return decode(z, *args, **kwargs)
        return scatter_rows(decode(self.of(z), *args, **kwargs), self.rows, self.size)

    def _active_rows_in(self, batch: int) -> Tensor:
        """The living in a batch that guidance made of several blocks."""
        assert self.rows is not None
        if batch % self.size:
            raise InputError(f"a denoiser was called with {batch} rows, no multiple of {self.size} particles")
        return torch.cat([self.rows + start for start in range(0, batch, self.size)])


def scatter_rows(output: Any, rows: Tensor, batch: int) -> Any:
    """What a module says of some rows of a batch, as if it had been asked of all: 0 for the others."""

    def whole(tensor: Tensor) -> Tensor:
        if tensor.dim() == 0 or len(tensor) != len(rows):
            return tensor
        return tensor.new_zeros((batch, *tensor.shape[1:])).index_copy(0, rows.to(tensor.device), tensor)

    return tree_map_only(Tensor, whole, output)


def is_offloaded(model: nn.Module) -> bool:
    """Whether accelerate or diffusers moves the weights of a model, or of a part of it, at each call."""
    for module in model.modules():
        hook, registry = getattr(module, "_hf_hook", None), getattr(module, "_diffusers_hook", None)
        moves = type(hook).__name__ in ("CpuOffload", "SequentialHook") or getattr(hook, "offload", False)
        if moves or "group_offloading" in getattr(registry, "hooks", ()):
            return True
    return False


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
        _check_compilable(name, getattr(pipe, name))
    on_cuda = all(getattr(pipe, name).device.type == "cuda" for name in names)
    if cuda_graphs and not (on_cuda and backend == "inductor"):
        raise InputError("cuda_graphs need the denoiser on CUDA and backend='inductor': leave cuda_graphs out")
    graphs = cuda_graphs if cuda_graphs is not None else on_cuda and backend == "inductor"
    modules = {name: getattr(pipe, name) for name in names}
    proxies = {
        name: ModuleProxy(module, compiled_call(name, module, graphs, backend)) for name, module in modules.items()
    }
    with replace_modules(pipe, proxies) as view:
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


def _check_compilable(name: str, denoiser: Any) -> None:
    """Raises InputError unless the denoiser is a plain module whose weights stay where they are."""
    if type(denoiser) is ModuleProxy:
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
