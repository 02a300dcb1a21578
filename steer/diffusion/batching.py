"""Batches of a denoiser: micro-batches, active rows and compiled calls."""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from diffusers import ControlNetModel, MultiControlNetModel, UNetMotionModel
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from steer.diffusion.views import (
    DENOISERS,
    ModuleProxy,
    denoisers_in,
    denoising_modules,
    named_arguments,
    replace_modules,
    with_decode,
    with_modules,
)
from steer.errors import InputError

LATENTS = ("sample", "hidden_states")  # names of the first argument of denoisers and ControlNets
ROW_LIST = "x"  # name of the first argument of those that take a list of latents, one tensor for each row (Z-Image)
# Position tables, shared by all rows where they have at most two axes, and per-layer weights: their length may equal
# the number of rows by chance.
POSITIONS = {"img_ids", "txt_ids", "image_rotary_emb", "rotary_embedding", "video_rotary_emb", "position_ids"}
POSITIONS |= {"visual_rope_pos", "text_rope_pos"}
PER_LAYER = {"control_hidden_states_scale"}
SEVERAL_EACH = {"encoder_hidden_states_image"}  # entries of each row, one after the other: first and last image (Wan)
LAYERS_FIRST = {"encoder_hidden_states_llama3"}  # rows are the second axis (HiDream)


@contextmanager
def micro_batched(pipe: Any, rows: int | None = None) -> Iterator[Any]:
    """Yield a view of a diffusers pipeline whose denoisers and ControlNets take at most `rows` rows at a time.

    rows  rows of a denoiser's batch, which guidance may double; None: all of them, until the device's memory is full

    When memory runs out, `rows` is halved, finished rows are kept, and the smaller number is used until the block ends.
    The images equal the whole batch's. The pipeline stays unchanged; offloading hooks work, and a compiled view
    may be given (`compiled`). Gradients flow, but need the memory of the whole batch.

    Raises InputError where `rows` is below 1, nothing can be split, or a single row does not fit.
    """
    if rows is not None and rows < 1:
        raise InputError(f"rows must be at least 1, got {rows}")
    split = {name: MicroBatches(name, module, rows) for name, module in denoising_modules(pipe).items()}
    if not denoisers_in(pipe):
        raise InputError(f"{type(pipe).__name__} has none of {', '.join(DENOISERS)}: there is nothing to split")
    with replace_modules(pipe, {name: ModuleProxy(one.module, one) for name, one in split.items()}) as view:
        yield view


class MicroBatches:
    """A module called on a few rows at a time, its outputs concatenated.

    rows  the largest number of rows; reduced when memory runs out
    """

    def __init__(self, name: str, module: Any, rows: int | None) -> None:
        self.name, self.module, self.rows = name, module, rows

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = named_arguments(self.module.forward, args, kwargs)
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
        if len(outputs) == 1:
            return outputs[0]
        return tree_map(_joined, outputs[0], *outputs[1:], is_leaf=RowLayout.of(given).is_leaf)

    def _try_call(self, given: dict[str, Any], count: int) -> Any:
        """Call the module on `count` rows; None where they do not fit into memory."""
        try:
            return self.module(**given)
        except torch.OutOfMemoryError as error:
            if count == 1:
                raise InputError(
                    f"{self.name}: the device's memory is full with a single row: use smaller images, half precision "
                    "or pipe.enable_model_cpu_offload()"
                ) from error
        return None  # after the except block, which frees the tensors held by the traceback


def batch_size_of(given: Mapping[str, Any], module: Any) -> int:
    """Return the number of rows of a module's call. Raises InputError where its latents are not one tensor.

    A list of latents, one tensor for each row, is accepted from a module whose first argument is such a list.
    """
    latents: Any = next((given[name] for name in (*LATENTS, ROW_LIST) if name in given), None)
    if not torch.is_tensor(latents) and RowLayout.of(given).is_leaf is None:
        kind = type(module).__name__
        raise InputError(f"{kind} takes no single tensor of latents: its batch cannot be split, use fewer particles")
    return len(latents)


class RowLayout(NamedTuple):
    """The layout of the rows in the arguments and outputs of a module's call.

    is_leaf  test for lists of rows, if the latents are one: then texts and outputs are such lists too; else None, and
             the tensors of a list have one entry for each row
    frames   entries of each row in tensors that have one for each frame: the texts of AnimateDiff, and the residuals
             of its ControlNets
    """

    is_leaf: Callable[[Any], bool] | None = None
    frames: int = 1

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "RowLayout":
        """Return the layout of a call with these arguments."""
        sample: Any = given.get("sample")
        frames = sample.shape[2] if torch.is_tensor(sample) and sample.dim() == 5 else 1  # (N, C, F, H, W), of a UNet
        return cls(_is_list if isinstance(given.get(ROW_LIST), list) else None, frames)


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def select_rows(given: Mapping[str, Any], batch: int, rows: slice | Tensor) -> dict[str, Any]:
    """Select rows of every tensor, and of every list of rows, among the arguments that has one entry per row.

    A tensor may also have one entry for each frame of each row (`RowLayout`).
    """
    layout = RowLayout.of(given)

    def cut(value: Any) -> Any:
        if isinstance(value, list):
            return [value[row] for row in torch.arange(batch)[rows].tolist()] if len(value) == batch else value
        if value.dim() == 0 or len(value) not in (batch, batch * layout.frames):
            return value
        entries = value.unflatten(0, (batch, -1))[rows if isinstance(rows, slice) else rows.to(value.device)]
        return entries.flatten(0, 1)

    def cut_several(tensor: Tensor) -> Any:
        return tensor if len(tensor) % batch else cut(tensor.unflatten(0, (batch, -1))).flatten(0, 1)

    def cut_positions(tensor: Tensor) -> Any:
        return tensor if tensor.dim() <= 2 else cut(tensor)

    cuts: dict[str, Callable[[Any], Any]] = dict.fromkeys(given.keys() - PER_LAYER, cut)
    cuts |= dict.fromkeys(cuts.keys() & POSITIONS, cut_positions)
    cuts |= dict.fromkeys(cuts.keys() & SEVERAL_EACH, cut_several)
    cuts |= dict.fromkeys(cuts.keys() & LAYERS_FIRST, lambda tensor: cut(tensor.transpose(0, 1)).transpose(0, 1))
    return {
        name: tree_map_only((Tensor, list), cuts[name], value, layout.is_leaf) if name in cuts else value
        for name, value in given.items()
    }


def _joined(*outputs: Any) -> Any:
    if isinstance(outputs[0], list):
        return [row for output in outputs for row in output]
    return torch.cat(outputs) if torch.is_tensor(outputs[0]) else outputs[0]


class ActiveRows:
    """The rows of a batch that are computed: all of them, until `keep` selects some.

    rows    (n,) int64, or None: all
    size    of the whole batch
    frames  of each row in the last call of a UNet: the autoencoder gets chunks of frames, and decodes them all
    """

    def __init__(self) -> None:
        self.rows: Tensor | None = None
        self.size, self.frames = 0, 1

    def keep(self, rows: Tensor, size: int) -> None:
        """Compute only these rows of a batch of `size` from now on."""
        self.rows, self.size = rows, size

    def of(self, values: Tensor) -> Tensor:
        """Return the active rows of a tensor (N, …) of the whole batch."""
        return values if self.rows is None else values[self.rows.to(values.device)]

    def mask(self, flags: Tensor) -> Tensor:
        """Return the flags (N,) of the whole batch, false for rows that are not active."""
        if self.rows is None:
            return flags
        return flags & torch.zeros_like(flags).index_fill(0, self.rows.to(flags.device), True)

    def view(self, pipe: Any) -> Any:
        """Return a view of a pipeline that computes active rows only, zeros elsewhere. The pipeline stays unchanged.

        Guidance repeats the batch in blocks of its size, as diffusers does. A ControlNet of single frames computes all
        rows. Raises InputError for a pipeline without a denoiser of a known name.
        """
        if not denoisers_in(pipe):
            raise InputError(f"{type(pipe).__name__} has none of {', '.join(DENOISERS)}: no rows can be left out")
        modules: dict[str, Any] = {
            name: self._denoiser(module)
            for name, module in denoising_modules(pipe).items()
            if not _takes_frames(pipe, module)
        }
        if getattr(pipe, "vae", None) is not None:
            modules["vae"] = self.decoder(pipe.vae)
        return with_modules(pipe, modules)

    def decoder(self, vae: Any) -> Any:
        """Copy an autoencoder, on the same weights, to decode active rows only; anything else is returned as is."""
        return with_decode(vae, functools.partial(self._decoded, vae.decode)) if hasattr(vae, "decode") else vae

    def _denoiser(self, module: Any) -> ModuleProxy:
        def active_call(*args: Any, **kwargs: Any) -> Any:
            given = named_arguments(module.forward, args, kwargs)
            layout = RowLayout.of(given)
            self.frames = layout.frames
            if self.rows is None:
                return module(*args, **kwargs)
            batch = batch_size_of(given, module)
            rows = self._active_rows_in(batch)
            return scatter_rows(module(**select_rows(given, batch, rows)), rows, batch, layout)

        return ModuleProxy(module, active_call)

    def _decoded(self, decode: Any, z: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.rows is None or self.frames > 1 or len(z) != self.size:
            return decode(z, *args, **kwargs)
        return scatter_rows(decode(self.of(z), *args, **kwargs), self.rows, self.size)

    def _active_rows_in(self, batch: int) -> Tensor:
        """Return the active rows of a batch that guidance has repeated in blocks."""
        assert self.rows is not None
        if batch % self.size:
            raise InputError(f"a denoiser was called with {batch} rows, no multiple of {self.size} particles")
        return torch.cat([self.rows + start for start in range(0, batch, self.size)])


def _takes_frames(pipe: Any, module: Any) -> bool:
    """Return whether a ControlNet for images is called with the frames of AnimateDiff's videos as its rows."""
    return isinstance(module, ControlNetModel | MultiControlNetModel) and isinstance(
        getattr(pipe, "unet", None), UNetMotionModel
    )


def scatter_rows(output: Any, rows: Tensor, batch: int, layout: RowLayout | None = None) -> Any:
    """Scatter a module's outputs for some rows to the full batch, zeros elsewhere.

    layout  of the module's call; lists of rows hold tensors of one shape
    """
    layout = layout or RowLayout()

    def whole(value: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        if isinstance(value, list):
            computed = dict(zip(rows.tolist(), value, strict=True))
            return [computed.get(row, torch.zeros_like(value[0])) for row in range(batch)]
        if value.dim() == 0 or len(value) not in (len(rows), len(rows) * layout.frames):
            return value
        entries = value.unflatten(0, (len(rows), -1))
        zeros = entries.new_zeros((batch, *entries.shape[1:]))
        return zeros.index_copy(0, rows.to(value.device), entries).flatten(0, 1)

    return tree_map_only((Tensor, list), whole, output, layout.is_leaf)


def is_offloaded(model: nn.Module) -> bool:
    """Return whether accelerate or diffusers moves the weights of a model, or of a part of it, at each call."""
    for module in model.modules():
        hook, registry = getattr(module, "_hf_hook", None), getattr(module, "_diffusers_hook", None)
        moves = type(hook).__name__ in ("CpuOffload", "SequentialHook") or getattr(hook, "offload", False)
        if moves or "group_offloading" in getattr(registry, "hooks", ()):
            return True
    return False


Backend = str | Callable[..., Any]


@contextmanager
def compiled(pipe: Any, *, cuda_graphs: bool | None = None, backend: Backend = "inductor") -> Iterator[Any]:
    """Yield a view of a diffusers pipeline whose denoisers are compiled at their first call of each shape.

    cuda_graphs  capture the denoiser's kernels and launch them as one; None: on CUDA, with inductor
    backend      backend of torch.compile; "aot_eager" compiles fast without a speed-up, for tests

    Inputs are copied into the graph's buffers and outputs out of them, so that other prompts, latents and resampled
    particles need no new graph. Another batch size or image size does. The pipeline itself stays unchanged.

    Raises InputError for a denoiser that is moved or modified at each call (offloading, a feature cache) or already
    micro-batched, for CUDA graphs without CUDA, and, when called, where gradients are required.
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
    """Compile a module's call, without gradients; with `graphs` its output is copied out of the graph's memory."""
    run = torch.compile(module, backend=backend, mode="reduce-overhead" if graphs else None)

    def call(*args: Any, **kwargs: Any) -> Any:
        _check_no_gradients(name, module, [args, kwargs])
        if not graphs:
            return run(*args, **kwargs)
        # A new step may overwrite the outputs of the last one. Pipelines with two calls per step keep both outputs,
        # and so do the step hooks, hence the copies.
        torch.compiler.cudagraph_mark_step_begin()
        return tree_map_only(Tensor, torch.clone, run(*args, **kwargs))

    return call


def _check_compilable(name: str, denoiser: Any) -> None:
    """Raise InputError unless the denoiser is a plain module whose weights stay in place."""
    if type(denoiser) is ModuleProxy:
        raise InputError(f"{name} is already a proxy: compile first, then use micro_batched(compiled_view)")
    if is_offloaded(denoiser):
        raise InputError(
            f"{name} is offloaded: its weights move at each call, but a compiled graph needs them in place. "
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
