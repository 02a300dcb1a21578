"""Linear maps of a prompt, computed once for each distinct prompt and for as long as the weights are the same."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.embeddings import PixArtAlphaTextProjection
from torch import Tensor, nn

from steer.prompt_memory import PromptBatch, PromptMemory, writes

Stamp = tuple[Any, ...]


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
        stamp = _stamp(self.module, x.device.type)
        kept = batch.results.get(self)
        if stamp is not None and kept is not None and kept[:2] == (stamp, writes(kept[2])):
            self.counts.reused += 1
            return kept[2]
        output = self.plain(batch.rows)[self.places(batch)]
        self.counts.computed += 1
        batch.results[self] = stamp, writes(output), output
        return output


def is_plain(linear: Any) -> bool:
    """Whether its weights alone say what a linear layer computes: none with an adapter, quantised or offloaded."""
    exact = type(linear) is nn.Linear and type(linear.weight) is nn.Parameter
    return exact and "_hf_hook" not in vars(linear) and not linear.weight.is_meta


def _linears(module: nn.Module) -> tuple[Any, ...]:
    return (module.linear_1, module.linear_2) if isinstance(module, PixArtAlphaTextProjection) else (module,)


def _stamp(module: nn.Module, device: str) -> Stamp | None:
    """Changes with the weights of a module and the precision that it computes in; None: cannot be told."""
    linears = _linears(module)
    if not all(is_plain(linear) for linear in linears):
        return None
    weights = [weight for linear in linears for weight in linear.parameters()]
    if any(weight.is_inference() for weight in weights):
        return None
    precision = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    return precision, *((weight.data_ptr(), weight.dtype, writes(weight)) for weight in weights)


@dataclass(eq=False)
class WeightsWatch:
    """Before every call of a model: has a memory forget its results when weights were written to behind PyTorch's back.

    What goes through `weight.data` (merging an adapter, a moving average) is not counted as a write. So the diagonals
    of the weights are compared, which any dense change meets: one small copy, and one wait for the GPU, a call.
    """

    memories: tuple[PromptMemory, ...]
    modules: list[nn.Module] = field(default_factory=list)
    seen: dict[torch.device, Tensor] = field(default_factory=dict)

    def __call__(self, model: nn.Module, inputs: Any) -> None:
        if torch.is_grad_enabled():
            return
        linears = [linear for module in self.modules for linear in _linears(module) if is_plain(linear)]
        now = _by_device(_diagonals(linears))
        if now.keys() != self.seen.keys() or not all(_equal(now[device], self.seen[device]) for device in now):
            for memory in self.memories:
                memory.forget_results()
        self.seen = now


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def _diagonals(linears: Iterable[nn.Linear]) -> Iterable[Tensor]:
    for linear in linears:
        yield linear.weight.detach().diagonal()
        if linear.bias is not None:
            yield linear.bias.detach()


def _by_device(parts: Iterable[Tensor]) -> dict[torch.device, Tensor]:
    lists: dict[torch.device, list[Tensor]] = {}
    for part in parts:
        lists.setdefault(part.device, []).append(part)
    return {device: torch.cat(group) for device, group in lists.items()}
