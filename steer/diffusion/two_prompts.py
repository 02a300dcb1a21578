"""Guidance by two prompts: an expanded prompt, centred on the original (Parrot, arXiv 2401.05675, sec. 3.5).

    ε̂ = ε_∅ + w₁ (ε_c − ε_∅) + w₂ (ε_ĉ − ε_∅),   c the original prompt, ĉ the expanded one

With g = w₁ + w₂ and the share w₁/g this is guidance of scale g by ε_mix = share · ε_c + (1 − share) · ε_ĉ: the denoiser
is called with both texts and the pipeline applies the guidance. Rows of the negative prompt are the same in both.
"""

import copy
import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from steer.diffusion.rows import RandomState
from steer.diffusion.seeds import list_generators
from steer.diffusion.step_hooks import RunEnded, without_hooks
from steer.diffusion.views import ModuleProxy, denoisers_in, named_arguments
from steer.errors import InputError

STATE = ("sample", "hidden_states", "timestep")  # arguments of a denoiser that are not the text


def two_prompts(pipe: Any, originals: Mapping[str, str], share: float) -> Any:
    """Return a view of a pipeline that is guided by the prompts it is called with and by their originals.

    originals  the original of each expanded prompt; other prompts guide alone
    share      w₁/(w₁ + w₂) of the original, 0 to 1; the guidance scale of the call is w₁ + w₂
    Each denoiser call becomes two where both shares are above 0. Raises InputError for a share out of range.
    """
    if not 0 <= share <= 1:
        raise InputError(f"the share of the original prompt must be from 0 to 1, got {share:g}")
    cls, view = type(pipe), copy.copy(pipe)
    signature = inspect.signature(cls.__call__)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        signature.bind(self, *args, **kwargs)  # raises for what the pipeline does not take
        given = named_arguments(cls.__call__, args, kwargs)
        other = _originals_of(given.get("prompt"), originals)
        if other == given.get("prompt") or share == 0:
            return cls.__call__(self, **given)
        text = _first_arguments(cls, self, given | {"prompt": other})
        active = copy.copy(self)
        for name in denoisers_in(self):
            denoiser = getattr(self, name)
            vars(active)[name] = ModuleProxy(denoiser, _MixedDenoiser(denoiser, text, share))
        return cls.__call__(active, **given)

    # No functools.wraps: `inspect.unwrap` would then skip this call.
    call.__dict__["__signature__"] = signature
    view.__class__ = type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})
    return view


def _originals_of(prompt: Any, originals: Mapping[str, str]) -> Any:
    if isinstance(prompt, str):
        return originals.get(prompt, prompt)
    return [originals.get(one, one) for one in prompt] if isinstance(prompt, list | tuple) else prompt


def _first_arguments(cls: Any, pipe: Any, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the arguments of the denoiser's first call in a pipeline's call, which ends there without side effects."""
    probe = copy.copy(pipe)

    def capture(denoiser: Any, *args: Any, **kwargs: Any) -> Any:
        raise RunEnded(named_arguments(denoiser.forward, args, kwargs))

    for name in denoisers_in(pipe):
        denoiser = getattr(pipe, name)
        vars(probe)[name] = ModuleProxy(denoiser, partial(capture, denoiser))
    vars(probe).update(scheduler=copy.deepcopy(without_hooks(pipe.scheduler)), _progress_bar_config={"disable": True})
    random = RandomState.of(list_generators(given.get("generator")))
    try:
        cls.__call__(probe, **given)
    except RunEnded as ended:
        arguments: Mapping[str, Any] = ended.value
        return arguments
    finally:
        random.restore()
    raise InputError(f"{type(pipe).__name__} never called its denoiser: it cannot be guided by two prompts")


class _MixedDenoiser:
    """A denoiser called with both texts: share · original + (1 − share) · expanded.

    text  arguments of the denoiser's first call with the original prompt
    """

    def __init__(self, denoiser: Any, text: Mapping[str, Any], share: float) -> None:
        self._denoiser, self._text, self._share = denoiser, text, share
        self._texts: dict[str, tuple[Any, Any]] | None = None  # argument → for the expanded and the original prompt

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        own = named_arguments(self._denoiser.forward, args, kwargs)
        if self._texts is None:
            self._texts = {
                name: (value, self._text[name])
                for name, value in own.items()
                if name not in STATE and name in self._text and not _equal(value, self._text[name])
            }
        # Some pipelines call the denoiser with the negative prompt alone: its text differs, and the call is unchanged.
        if not self._texts or not all(_equal(own.get(name), expanded) for name, (expanded, _) in self._texts.items()):
            return self._denoiser(*args, **kwargs)
        original = self._denoiser(**own | {name: other for name, (_, other) in self._texts.items()})
        if self._share == 1:
            return original
        leaves, spec = tree_flatten(original)
        expanded, _ = tree_flatten(self._denoiser(**own))
        return tree_unflatten([_mix(a, b, self._share) for a, b in zip(expanded, leaves, strict=True)], spec)


def _mix(expanded: Any, original: Any, share: float) -> Any:
    return torch.lerp(expanded, original, share) if isinstance(expanded, Tensor) else expanded


def _equal(one: Any, other: Any) -> bool:
    """Return whether two arguments are the same, tensors by value."""
    leaves, others = tree_flatten(one)[0], tree_flatten(other)[0]
    return len(leaves) == len(others) and all(
        a is b or (a.shape == b.shape and torch.equal(a, b))
        if isinstance(a, Tensor) and isinstance(b, Tensor)
        else a is b or (type(a) is type(b) and a == b)
        for a, b in zip(leaves, others, strict=True)
    )
