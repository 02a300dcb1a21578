"""A pipeline's denoisers a few rows at a time: many particles in the memory of a few, with the same results."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map, tree_map_only

from steer.errors import InputError
from steer.stand_in import CONTROLNETS, DENOISERS, StandIn, standing_in

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
    a compiled view may be given (`steer.compiled`). Gradients flow, but their memory is that of the whole batch.

    Raises InputError where `rows` is below 1, nothing can be split, or a single row does not fit.
    """
    if rows is not None and rows < 1:
        raise InputError(f"rows must be at least 1, got {rows}")
    modules = {name: getattr(pipe, name, None) for name in (*DENOISERS, *CONTROLNETS)}
    split = {name: MicroBatches(name, module, rows) for name, module in modules.items() if module is not None}
    if not set(split) & set(DENOISERS):
        raise InputError(f"{type(pipe).__name__} has none of {', '.join(DENOISERS)}: there is nothing to split")
    with standing_in(pipe, {name: StandIn(one.module, one) for name, one in split.items()}) as view:
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
        batch = batch_of(given, self.module)
        outputs: list[Any] = []
        done = 0
        while done < batch:
            count = min(self.rows or batch, batch - done)
            output = self._called(part(given, batch, slice(done, done + count)), count)
            if output is None:
                self.rows = (count + 1) // 2
                torch.cuda.empty_cache()
                continue
            outputs.append(output)
            done += count
        return outputs[0] if len(outputs) == 1 else tree_map(_joined, outputs[0], *outputs[1:])

    def _called(self, given: dict[str, Any], count: int) -> Any:
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


def batch_of(given: Mapping[str, Any], module: Any) -> int:
    """Rows of a module's call, by its arguments. Raises InputError where its latents are not one tensor."""
    latents = next((given[name] for name in LATENTS if name in given), None)
    if not torch.is_tensor(latents):
        kind = type(module).__name__
        raise InputError(f"{kind} takes no batch of latents as one tensor: it cannot be split, use fewer particles")
    return len(latents)


def part(given: Mapping[str, Any], batch: int, rows: slice | Tensor) -> dict[str, Any]:
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
