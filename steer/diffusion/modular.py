"""Views of modular pipelines of diffusers, called like all other pipelines, with their blocks' inputs as signature.

A `ModularPipeline` takes any keyword and returns the state of all its blocks. The view takes the inputs of the blocks
by name and returns a tuple of the images; everything else is the modular pipeline's own.
"""

import copy
import functools
import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from diffusers import ModularPipeline
from torch import nn

from steer.diffusion.differentiable import differentiable_class
from steer.diffusion.views import ENCODED_TEXTS, ModuleProxy, cached_calls
from steer.errors import UnsupportedPipelineError

MEDIA = ("images", "videos", "audios", "audio")  # outputs of blocks; the first one that a pipeline has is scored
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
PROGRESS = "_progress_bar_config"


def as_callable(pipe: Any) -> Any:
    """Return a view of a modular pipeline that is called like other pipelines; return any other pipeline unchanged.

    The view has the same attributes. Raises UnsupportedPipelineError for blocks without images, videos or audio.
    """
    if not isinstance(pipe, ModularPipeline) or isinstance(pipe, _Called):
        return pipe
    outputs = [one.name for one in pipe.blocks.outputs]
    media = next((name for name in MEDIA if name in outputs), None)
    if media is None:
        raise UnsupportedPipelineError(
            f"{type(pipe).__name__} returns {', '.join(outputs) or 'nothing'}: add the blocks that decode its latents"
        )
    defaults = {one.name: one.default for one in pipe.blocks.inputs if one.name is not None}
    view: Any = object.__new__(_called_class(type(pipe), defaults, media))
    view.__dict__ = pipe.__dict__
    return view


class _Called:
    """The members of a view that modular pipelines lack and other pipelines have."""

    def set_progress_bar_config(self, **config: Any) -> None:
        """Configure the progress bars of all blocks."""
        vars(self)[PROGRESS] = config

    def maybe_free_model_hooks(self) -> None:
        """Leave offloading to the components manager of the modular pipeline."""


def _called_class(kind: type, defaults: Mapping[str, Any], media: str) -> type:
    """Return the subclass of a modular pipeline's class whose call has these arguments and returns (media,)."""

    def run(self: Any, **arguments: Any) -> tuple[Any]:
        view = copy.copy(self)
        vars(view).update(_of_one_call(self))
        with _without_error_logs():
            return (kind.__call__(view, output=media, **arguments),)

    named = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value) for name, value in defaults.items()]
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    run.__dict__["__signature__"] = inspect.Signature([own, *named])
    members = {"__call__": torch.no_grad()(run), "__module__": kind.__module__}
    return type(kind.__name__, (_Called, kind), members)


def _of_one_call(pipe: Any) -> dict[str, Any]:
    """Return attributes for one call, as a preview is a call within a call: copied blocks and cached text encoders.

    Where gradients are enabled, the copies are without the blocks' own no_grad.
    """
    grad = torch.is_grad_enabled()
    blocks = _copied(pipe._blocks, grad, vars(pipe).get(PROGRESS))

    def run(*args: Any) -> Any:
        with torch.set_grad_enabled(grad):
            return blocks(*args)

    parts: dict[str, Any] = {"_blocks": ModuleProxy(blocks, run)}
    for name, part in pipe.components.items():
        if name in ENCODERS and isinstance(part, nn.Module) and (texts := vars(pipe).get(ENCODED_TEXTS)) is not None:
            cache = texts.setdefault(name, {})
            parts[name] = ModuleProxy(part, cached_calls(torch.no_grad()(part.__call__), cache))
    return parts


def _copied(blocks: Any, grad: bool, progress: Mapping[str, Any] | None) -> Any:
    """Copy a tree of blocks; with `grad` without the no_grad around their calls."""
    own = copy.copy(blocks)
    if progress is not None and hasattr(own, "set_progress_bar_config"):
        own.set_progress_bar_config(**progress)
    if grad:
        kind: type = type(blocks)
        own.__class__ = _graph_class(kind)
    if parts := getattr(blocks, "sub_blocks", None):
        own.sub_blocks = type(parts)((name, _copied(one, grad, progress)) for name, one in parts.items())
    return own


_graph_class = functools.cache(differentiable_class)  # blocks have few classes


_quiet: ContextVar[bool] = ContextVar("quiet", default=False)
# Blocks log the traceback of every exception that passes through them; it reaches the caller by itself.
logging.getLogger("diffusers.modular_pipelines.modular_pipeline").addFilter(lambda record: not _quiet.get())


@contextmanager
def _without_error_logs() -> Iterator[None]:
    before = _quiet.set(True)
    try:
        yield
    finally:
        _quiet.reset(before)
