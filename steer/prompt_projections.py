"""Linear maps of a prompt, computed once for each distinct prompt and for as long as the weights are the same."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.embeddings import PixArtAlphaTextProjection
from torch import Tensor, nn

from steer.prompt_memory import PromptBatch, PromptMemory, Sight, writes


@dataclass
class Counts:
    """Projections of a batch of prompts: computed, and taken from memory instead."""

    computed: int = 0
    reused: int = 0


@dataclass(eq=False)
class Once:
    """The forward of a module that maps every token of a prompt by itself.

    find    the batch of prompts whose projection an input asks for, if it is one
    places  (…,) of a batch, which of its distinct prompts each row of the output is
    An object and no closure: copies of a model then hold copies of it.
    """

    module: nn.Module
    plain: Callable[[Tensor], Tensor]
    find: Callable[[Tensor], PromptBatch | None]
    places: Callable[[PromptBatch], Tensor]
    counts: Counts

    def __call__(self, x: Tensor) -> Tensor:
        batch = None if torch.is_grad_enabled() else self.find(x)
        if batch is None:
            return self.plain(x)
        kept = batch.results.get(self)
        if kept is not None and kept.tensor is not None and kept.writes == writes(kept.tensor):
            self.counts.reused += 1
            return kept.tensor
        output = self.plain(batch.rows)[self.places(batch)]
        self.counts.computed += 1
        batch.results[self] = Sight.of(output)
        return output


def is_plain(linear: Any) -> bool:
    """Whether its weights alone say what a linear layer computes: none with an adapter, quantised or offloaded."""
    exact = type(linear) is nn.Linear and type(linear.weight) is nn.Parameter
    return exact and "_hf_hook" not in vars(linear) and not linear.weight.is_meta


@dataclass(eq=False)
class WeightsWatch:
    """Before every call of a model: has memories forget their results unless the weights, and the precision that they
    are used in, are those of the call before.

    What goes through `weight.data` (merging an adapter, a moving average) is not counted as a write. So the diagonals
    of the weights are compared too, which any dense change meets: one small copy, and one wait for the GPU, a call.
    """

    memories: tuple[PromptMemory, ...]
    modules: list[nn.Module] = field(default_factory=list)
    stamp: tuple[Any, ...] = ()
    diagonals: dict[torch.device, Tensor] = field(default_factory=dict)

    def __call__(self, model: nn.Module, inputs: Any) -> None:
        if torch.is_grad_enabled():
            return
        linears = [linear for module in self.modules for linear in _linears(module)]
        weights = [weight for linear in linears for weight in linear.parameters()]
        known = all(is_plain(linear) for linear in linears) and not any(weight.is_inference() for weight in weights)
        stamp = (_precision(weights), *((w.data_ptr(), w.dtype, writes(w)) for w in weights))
        diagonals = _diagonals(weights) if known else {}
        if not known or stamp != self.stamp or not _equal(diagonals, self.diagonals):
            for memory in self.memories:
                memory.forget_results()
        self.stamp, self.diagonals = stamp, diagonals


def _linears(module: nn.Module) -> tuple[Any, ...]:
    return (module.linear_1, module.linear_2) if isinstance(module, PixArtAlphaTextProjection) else (module,)


def _precision(weights: list[nn.Parameter]) -> torch.dtype | None:
    """What autocast computes in; None where it is off."""
    device = weights[0].device.type if weights else "cpu"
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _diagonals(weights: list[nn.Parameter]) -> dict[torch.device, Tensor]:
    """Of matrices the diagonals, of vectors all, one after the other, by device."""
    components: dict[torch.device, list[Tensor]] = {}
    for weight in weights:
        values = weight.detach()
        components.setdefault(weight.device, []).append(values.diagonal() if values.dim() == 2 else values)
    return {device: torch.cat(some) for device, some in components.items()}


def _equal(a: dict[torch.device, Tensor], b: dict[torch.device, Tensor]) -> bool:
    return a.keys() == b.keys() and all(x.shape == b[key].shape and torch.equal(x, b[key]) for key, x in a.items())
