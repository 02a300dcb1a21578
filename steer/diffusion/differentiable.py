"""Gradients through a whole diffusers pipeline, from its latents to its images; the pipeline itself stays unchanged."""

import copy
import functools
import inspect
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from steer.diffusion.views import CONTROLNETS, DENOISERS, stages_of, with_components

LOSS_SCALES = tuple(2.0**power for power in range(16, -9, -4))  # with fp16 activations


def differentiable(pipe: Any, checkpointing: bool = True, one_call: bool = False) -> Any:
    """Copy a diffusers pipeline so that gradients flow from `latents=` to `output_type="pt"` images.

    The copy's models share the pipeline's weights, without gradients for the weights; the pipeline's models and
    their flags stay unchanged. A safety checker does not support gradients: set the copy's to None, and check later.

    checkpointing  keep no activations: denoiser calls, their blocks and the decoder are recomputed in the backward
                   pass. Memory holds one block, and one set of latents per solver step
    one_call       the graph holds one denoiser call: only its blocks are recomputed
    """
    twin = differentiable_images(pipe)
    models = {name: model for name, model in pipe.components.items() if isinstance(model, nn.Module)}
    vars(twin).update(vars(with_components(twin, _TWINS.models(twin, models, checkpointing, one_call))))
    return twin


def _build_models(models: Mapping[str, nn.Module], checkpointing: bool, one_call: bool) -> dict[str, nn.Module]:
    twins = dict(zip(models, _frozen_twins(models.values()), strict=True))
    if twins.get("vae") is not None:
        _decode_in_its_own_precision(twins["vae"])
    if checkpointing:
        _checkpoint(twins, one_call)
    return twins


@dataclass
class _Built:
    """Models of a twin, the state of the originals that they are built from, and the twin that uses them."""

    models: dict[str, nn.Module]
    state: list[Any]
    user: weakref.ref[Any]


class _Twins:
    """Cache of the latest twin of each set of models: a copy takes longer than some iterations of an optimisation.

    A twin is rebuilt if anything about the originals has changed or another call still uses it.
    """

    def __init__(self) -> None:
        self.built: weakref.WeakKeyDictionary[nn.Module, _Built] = weakref.WeakKeyDictionary()
        self.lock = threading.Lock()

    def models(
        self, twin: Any, originals: Mapping[str, nn.Module], checkpointing: bool, one_call: bool
    ) -> dict[str, nn.Module]:
        """Return the models of a twin pipeline, newly built or cached."""
        if not originals:
            return {}
        state = [checkpointing, one_call, *map(module_state, originals.values())]
        key = next(iter(originals.values()))
        with self.lock:
            kept = self.built.get(key)
            if kept is None or kept.state != state or kept.user() is not None:
                kept = _Built(_build_models(originals, checkpointing, one_call), state, weakref.ref(twin))
                self.built[key] = kept
            kept.user = weakref.ref(twin)
        return kept.models


_TWINS = _Twins()


def module_state(model: nn.Module) -> list[Any]:
    """Return the state of a module without the values of its weights, for comparison with a later state.

    Modules, weights and other objects are compared by identity; objects also by their attributes, three levels deep.
    """
    state: list[Any] = []
    for part in model.modules():
        state += id(part), type(part)
        for key, value in vars(part).items():
            kind = type(value)
            if kind in _PLAIN:
                state += key, value
            elif key in ("_parameters", "_buffers"):
                state += [one for tensor in value.values() for one in _tensor_state(tensor)]
            elif key != "_modules" and (kind not in _CONTAINERS or value):
                state += key, _value_state(value)
    return state


_PLAIN = {bool, int, float, complex, str, bytes, NoneType, torch.dtype, torch.device, type}
_CONTAINERS = {dict, OrderedDict, list, tuple, set}


def _tensor_state(value: Tensor | None) -> tuple[Any, ...]:
    if value is None:
        return (None,)
    storage = value.data_ptr() if type(value) in (nn.Parameter, Tensor) else None  # quantised ones may have none
    return id(value), storage, value.dtype, value.device


def _value_state(value: Any, depth: int = 3) -> Any:
    kind = type(value)
    if kind in _PLAIN:
        return value
    if isinstance(value, FrozenDict) or not depth:  # a changed configuration is another object
        return kind, id(value)
    if isinstance(value, dict):
        return kind, [(key, _value_state(one, depth - 1)) for key, one in value.items()]
    if isinstance(value, list | tuple):
        return kind, [_value_state(one, depth - 1) for one in value]
    inside = {} if isinstance(value, nn.Module | Tensor) else getattr(value, "__dict__", {})
    return kind, id(value), [(key, _value_state(one, depth - 1)) for key, one in inside.items()]


def differentiable_class(cls: Any) -> type:
    """Return the subclass of a pipeline's or a block's class without the no_grad of diffusers around its call."""
    return type(cls.__name__, (cls,), {"__call__": inspect.unwrap(cls.__call__), "__module__": cls.__module__})


def differentiable_images(pipe: Any) -> Any:
    """Copy a pipeline, with the same models, without the no_grad around its call."""
    twin = copy.copy(pipe)
    twin.__class__ = differentiable_class(type(pipe))
    vars(twin).update({name: differentiable_images(stage) for name, stage in stages_of(pipe).items()})
    vars(twin)["maybe_free_model_hooks"] = lambda: None
    return twin


def with_fixed_device(pipe: Any) -> Any:
    """Copy a pipeline for many runs on one device, which it then need not look up in its modules in each run."""
    if not hasattr(pipe, "_execution_device"):
        return pipe
    cls, view = type(pipe), copy.copy(pipe)
    members = {"_execution_device": pipe._execution_device, "__module__": cls.__module__}
    view.__class__ = type(cls.__name__, (cls,), members)
    return view


def _frozen_twins(models: Iterable[nn.Module]) -> list[nn.Module]:
    """Copy modules on the same weights and buffers, without gradients for them.

    All copies share one memo: hooks of one model may refer to another.
    """
    memo: dict[int, Any] = {}
    for model in (models := list(models)):
        memo |= {id(buffer): buffer for buffer in model.buffers()}
        memo |= {id(p): _frozen(p) for p in model.parameters()}
        computed = [one for part in model.modules() for one in vars(part).values() if isinstance(one, Tensor)]
        memo |= {id(one): one.detach() for one in computed if one.grad_fn is not None}  # by weight_norm
    return [copy.deepcopy(model, memo) for model in models]


def _frozen(parameter: nn.Parameter) -> nn.Parameter:
    # Parameters of other classes are quantised: they have no gradients, and would lose their class.
    return nn.Parameter(parameter.detach(), requires_grad=False) if type(parameter) is nn.Parameter else parameter


def _decode_in_its_own_precision(vae: Any) -> None:
    """Keep the dtype of a VAE: some pipelines cast it to fp32 for the call and back, which breaks the backward pass."""
    if getattr(vae.config, "force_upcast", False) and vae.dtype == torch.float16:
        vae.to(torch.float32)
    decode = vae.decode

    def decoded(z: Tensor, *args: Any, **kwargs: Any) -> Any:
        return decode(z.to(vae.dtype), *args, **kwargs)

    vae.decode = decoded


def _checkpoint(models: dict[str, Any], one_call: bool) -> None:
    for name in models.keys() & {*DENOISERS, *CONTROLNETS, "vae"}:
        model, entry = models[name], "decode" if name == "vae" else "forward"
        by_block = getattr(model, "_supports_gradient_checkpointing", False)
        if by_block:
            model.enable_gradient_checkpointing()
        if not (by_block and one_call):
            setattr(model, entry, _recomputed(getattr(model, entry)))


def _recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Checkpoint a function: where a graph is built, only the inputs are kept."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        return checkpoint(function, *args, use_reentrant=False, **kwargs)

    return call


def per_sample_gradients(rewards: Tensor, x: Tensor, half: bool) -> Tensor | None:
    """Return ∇ r_i of each particle with respect to its own x_i, (N, …) in fp32; None where no reward depends on x.

    half  for fp16 models: scale the rewards by the largest power of two with finite gradients, against underflow
    """
    if not rewards.requires_grad:
        return None
    for scale in LOSS_SCALES if half else (1.0,):
        # Each reward depends on its own row alone: the gradient of the sum holds all gradients.
        (gradient,) = torch.autograd.grad(rewards.sum() * scale, x, retain_graph=half, allow_unused=True)
        if gradient is None or gradient.isfinite().all():
            break
    return None if gradient is None else gradient.float() / scale


def computes_in_fp16(pipe: Any) -> bool:
    """Return whether any model of a pipeline has fp16 weights (some pipelines keep their latents in fp32)."""
    models = [model for model in pipe.components.values() if isinstance(model, nn.Module)]
    return any(parameter.dtype == torch.float16 for model in models for parameter in model.parameters())
