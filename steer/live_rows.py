"""A batch of which some rows are dead: neither a pipeline's denoisers nor its decoder compute them.

A pipeline's batch keeps its size from the first step to the last. Where only some of its particles go on, the others'
rows stay in it, and every module is called with the rows of the living alone.
"""

import copy
import functools
import inspect
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from steer.errors import InputError
from steer.microbatch import batch_of, part
from steer.preview import with_decode
from steer.stand_in import CONTROLNETS, DENOISERS, StandIn, denoisers_in


class LiveRows:
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

    def _denoiser(self, module: Any) -> StandIn:
        names = list(inspect.signature(module.forward).parameters)

        def living(*args: Any, **kwargs: Any) -> Any:
            if self.rows is None:
                return module(*args, **kwargs)
            given = dict(zip(names, args, strict=False)) | kwargs
            batch = batch_of(given, module)
            rows = self._in(batch)
            return spread(module(**part(given, batch, rows)), rows, batch)

        return StandIn(module, living)

    def _decoded(self, decode: Any, z: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.rows is None or len(z) != self.size:
            return decode(z, *args, **kwargs)
        return spread(decode(self.of(z), *args, **kwargs), self.rows, self.size)

    def _in(self, batch: int) -> Tensor:
        """The living in a batch that guidance made of several blocks."""
        assert self.rows is not None
        if batch % self.size:
            raise InputError(f"a denoiser was called with {batch} rows, no multiple of {self.size} particles")
        return torch.cat([self.rows + start for start in range(0, batch, self.size)])


def spread(output: Any, rows: Tensor, batch: int) -> Any:
    """What a module says of some rows of a batch, as if it had been asked of all: 0 for the others."""

    def whole(tensor: Tensor) -> Tensor:
        if tensor.dim() == 0 or len(tensor) != len(rows):
            return tensor
        return tensor.new_zeros((batch, *tensor.shape[1:])).index_copy(0, rows.to(tensor.device), tensor)

    return tree_map_only(Tensor, whole, output)
