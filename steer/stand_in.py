"""Modules that pass for a pipeline's own in everything but what their call does."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

DENOISERS = ("unet", "transformer", "transformer_2")
CONTROLNETS = ("controlnet",)


def denoisers_in(pipe: Any) -> list[str]:
    """Names of the pipeline's denoisers; the first is the one that is trained."""
    return [name for name in DENOISERS if getattr(pipe, name, None) is not None]


class StandIn:
    """Passes for a module in everything but what its call returns."""

    def __init__(self, target: Any, call: Callable[..., Any]) -> None:
        self.__dict__.update(_target=target, _call=call)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        kind: type = self._target.__class__  # of a stand-in for another one: that of the module itself
        return kind

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)


class Output(tuple[Tensor, ...]):
    """What a model returns, for callers that take `[0]` and for those that take `.sample`."""

    @property
    def sample(self) -> Tensor:
        return self[0]


def silent_denoiser(denoiser: Any) -> StandIn:
    """Passes for a denoiser that predicts nothing: zeros, at no cost."""
    channels = getattr(getattr(denoiser, "config", None), "out_channels", None)

    def zeros(*args: Any, **kwargs: Any) -> Any:
        x: Tensor = args[0] if args else kwargs["sample" if "sample" in kwargs else "hidden_states"]
        if x.dim() > 3:
            return Output([x.new_zeros((len(x), channels or x.shape[1], *x.shape[2:]))])
        shape = (*x.shape[:-1], channels or x.shape[-1])  # a model of tokens
        return Output([x.new_zeros(shape)])

    return StandIn(denoiser, zeros)


def silent_controlnet(controlnet: Any) -> StandIn:
    """Passes for a ControlNet that adds nothing."""
    return StandIn(controlnet, lambda *args, **kwargs: ([], None))


def silences(pipe: Any) -> dict[str, StandIn]:
    """For every denoiser and ControlNet of a pipeline, by name, one that says nothing."""
    found: dict[str, StandIn] = {}
    for silence, names in ((silent_denoiser, DENOISERS), (silent_controlnet, CONTROLNETS)):
        found |= {name: silence(getattr(pipe, name)) for name in names if getattr(pipe, name, None) is not None}
    return found


@contextmanager
def standing_in(pipe: Any, modules: Mapping[str, StandIn]) -> Iterator[Any]:
    """Yields a view of a pipeline with these in place of its own modules; after the block it has those again.

    The pipeline stays as it is. Offloading hooks are on its own modules, and it is the one that puts them back.
    """
    view = copy.copy(pipe)
    vars(view).update(modules, maybe_free_model_hooks=pipe.maybe_free_model_hooks)
    try:
        yield view
    finally:
        vars(view).update({name: getattr(pipe, name) for name in modules})
