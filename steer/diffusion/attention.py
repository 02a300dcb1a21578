"""Attention backends: xformers, PyTorch's own or the plain formula, for UNets and transformers alike.

Every attention layer of diffusers can compute through one function of PyTorch: `scaled_dot_product_attention`. A
backend replaces that function while a layer runs. That works for UNets, which ignore diffusers'
`set_attention_backend`, for joint attention, and for custom processors.
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models import attention_processor as processors
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from steer.diffusion.views import denoising_modules
from steer.errors import InputError
from steer.registry import choose

# With the arguments of F.scaled_dot_product_attention: Q (B, H, L, d), K (B, H, S, d), V (B, H, S, e) → (B, H, L, e).
# The mask broadcasts to (B, H, L, S): true where a key is attended to, or a number that is added to its score.
AttentionFunction = Callable[..., Tensor]


# softmax(QKᵀ/√d + M) V  (Vaswani et al. 2017, arXiv 1706.03762, eq. 1; M: the mask)
def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute the formula itself, all scores in memory: the slow reference for every other backend."""
    key, value = (_for_every_head(x, query, enable_gqa) for x in (key, value))
    d = query.shape[-1]
    scores = query @ key.transpose(-2, -1) * (d**-0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        scores = scores + _additive_mask(attn_mask, scores.dtype)
    return torch.dropout(scores.softmax(-1), dropout_p, True) @ value


def xformers_attention(kernel: Callable[..., Tensor], causal: Callable[[], Any]) -> AttentionFunction:
    """Give `xformers.ops.memory_efficient_attention` PyTorch's arguments; `causal` makes xformers' causal mask.

    xformers takes (B, L, H, d), and a mask of full shape in the queries' dtype, whose rows are aligned to 8 numbers.
    It raises NotImplementedError for a dtype or head size without a kernel.
    """

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        key, value = (_for_every_head(x, query, enable_gqa) for x in (key, value))
        bias: Any = None
        if is_causal:
            bias = causal()
        elif attn_mask is not None:
            bias = _aligned(_additive_mask(attn_mask, query.dtype), (*query.shape[:-1], key.shape[-2]))
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return kernel(q, k, v, attn_bias=bias, p=dropout_p, scale=scale).transpose(1, 2)

    return attend


def _for_every_head(x: Tensor, query: Tensor, grouped: bool) -> Tensor:
    """Repeat K or V for the query heads that share it."""
    return x.repeat_interleave(query.shape[1] // x.shape[1], 1) if grouped else x


def _additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a mask to numbers that are added to the scores."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, float("-inf"))


def _aligned(bias: Tensor, shape: tuple[int, ...]) -> Tensor:
    whole = bias.new_zeros((*shape[:-1], -(-shape[-1] // 8) * 8))
    whole[..., : shape[-1]] = bias
    return whole[..., : shape[-1]]


SDPA: AttentionFunction = F.scaled_dot_product_attention
LAYERS = (processors.Attention, processors.MochiAttention, AttentionModuleMixin)
# Processors of diffusers with their own computation, and their equivalents that call PyTorch's function.
THROUGH_SDPA: dict[type, type] = {
    processors.AttnProcessor: processors.AttnProcessor2_0,
    processors.SlicedAttnProcessor: processors.AttnProcessor2_0,
    processors.XFormersAttnProcessor: processors.AttnProcessor2_0,
    processors.AttnAddedKVProcessor: processors.AttnAddedKVProcessor2_0,
    processors.SlicedAttnAddedKVProcessor: processors.AttnAddedKVProcessor2_0,
    processors.XFormersAttnAddedKVProcessor: processors.AttnAddedKVProcessor2_0,
    processors.XFormersJointAttnProcessor: processors.JointAttnProcessor2_0,
    processors.IPAdapterAttnProcessor: processors.IPAdapterAttnProcessor2_0,
    processors.IPAdapterXFormersAttnProcessor: processors.IPAdapterAttnProcessor2_0,
}
_ROUTE = "_steer_attention"  # attribute of a layer: its route
_DISPATCH = "_attention_backend"  # attribute of diffusers' newer processors: their backend


@contextmanager
def attention_backend(target: Any, backend: str = "auto") -> Iterator[str]:
    """Set the attention backend of a pipeline's denoiser (or a module) in the block; yields the backend's name.

    auto      xformers where it is installed, has a kernel and the model is on CUDA, PyTorch's own elsewhere. It keeps
              an earlier choice: the backend of an outer block, of diffusers or of a processor
    xformers  `xformers.ops.memory_efficient_attention`
    sdpa      `torch.nn.functional.scaled_dot_product_attention`
    eager     softmax(QKᵀ/√d) V as written: the slow reference

    After the block, also on errors, every layer and processor is restored. The innermost of nested blocks applies. Use
    one block at a time for a model: threads that share a model share its backend.

    Raises InputError for an unknown name, for xformers where it is not installed or the model is not on CUDA, and, when
    the model is called, where a layer's processor would ignore the backend or xformers has no kernel for it.
    """
    modules = [target] if isinstance(target, nn.Module) else denoising_modules(target).values()
    modules = [module for module in modules if isinstance(module, nn.Module)]
    name, attend = choose("attention backend", backend, BACKENDS)(_device(target, modules))
    layers = [layer for module in modules for layer in module.modules() if isinstance(layer, LAYERS)]
    if backend != "auto" and not layers:
        raise InputError(f"{type(target).__name__} has no denoiser with attention layers: a backend would do nothing")
    with ExitStack() as stack:
        for layer in layers:
            if backend != "auto":
                _use_sdpa_processor(layer, stack)
                _route(layer, _Route(name, attend), stack)
            elif name != "sdpa" and _ROUTE not in vars(layer):
                _route(layer, _Route(name, attend, strict=False), stack)
        yield name


NamedBackend = tuple[str, AttentionFunction]


def _auto(device: torch.device) -> NamedBackend:
    try:
        return "xformers", _with_fallback(_xformers_kernel(device), SDPA)
    except InputError:  # not installed, not on CUDA, or broken
        return "sdpa", SDPA


def _xformers(device: torch.device) -> NamedBackend:
    return "xformers", _with_fallback(_xformers_kernel(device), _raise_unsupported)


def _xformers_kernel(device: torch.device) -> AttentionFunction:
    if importlib.util.find_spec("xformers") is None:
        raise InputError("attention backend 'xformers' is not installed: pip install xformers, or use 'sdpa'")
    if device.type != "cuda":
        raise InputError(f"attention backend 'xformers' needs a model on CUDA, not on {device.type}: use 'sdpa'")
    try:
        ops = importlib.import_module("xformers.ops")
    except (ImportError, OSError) as error:
        raise InputError(f"attention backend 'xformers' is installed but cannot be imported: {error}") from error
    return xformers_attention(ops.memory_efficient_attention, ops.LowerTriangularMask)


BACKENDS: dict[str, Callable[[torch.device], NamedBackend]] = {
    "auto": _auto,
    "xformers": _xformers,
    "sdpa": lambda device: ("sdpa", SDPA),
    "eager": lambda device: ("eager", plain_attention),
}


def _with_fallback(attend: AttentionFunction, other: AttentionFunction) -> AttentionFunction:
    """Combine two functions: `attend` where it has a kernel, `other` elsewhere."""

    def either(*args: Any, **kwargs: Any) -> Tensor:
        try:
            return attend(*args, **kwargs)
        except NotImplementedError:
            return other(*args, **kwargs)

    return either


def _raise_unsupported(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    raise InputError(
        f"attention backend 'xformers' has no kernel for {query.dtype}, heads of {query.shape[-1]} on {query.device}: "
        "use 'auto' or 'sdpa'"
    )


def _device(target: Any, modules: list[nn.Module]) -> torch.device:
    """Return the device of the computation; under CPU offload the weights are on another one."""
    hooks = [getattr(module, "_hf_hook", None) for module in modules]
    places = [getattr(target, "_execution_device", None), *(getattr(hook, "execution_device", None) for hook in hooks)]
    places += [parameter.device for module in modules for parameter in module.parameters()]
    return torch.device(next((place for place in places if place is not None), "cpu"))


def _use_sdpa_processor(layer: nn.Module, stack: ExitStack) -> None:
    """Replace a layer's processor, until the stack closes, by diffusers' version that calls PyTorch's function."""
    processor = getattr(layer, "processor", None)
    if hasattr(processor, _DISPATCH):
        stack.enter_context(replaced(vars(processor), _DISPATCH, AttentionBackendName.NATIVE))
    twin = THROUGH_SDPA.get(type(processor))
    # PyTorch's function divides by √d; a layer with another scale keeps its processor.
    if twin is not None and getattr(layer, "scale_qk", True):
        space: Any = layer._modules if isinstance(processor, nn.Module) else vars(layer)
        stack.enter_context(replaced(space, "processor", _convert_processor(processor, twin)))


def _convert_processor(processor: Any, twin: type) -> Any:
    """Create a processor of another class with the weights of the given one; only IP-adapters' processors have any."""
    if not isinstance(processor, nn.Module):
        return twin()
    with torch.device("meta"):
        converted = twin(processor.hidden_size, processor.cross_attention_dim, processor.num_tokens, processor.scale)
    converted._modules.update(processor._modules)
    return converted


@dataclass
class _Route:
    """The backend of a layer; if `strict`, a call on which it has no effect raises InputError."""

    name: str
    attend: AttentionFunction
    strict: bool = True


def _route(layer: nn.Module, route: _Route, stack: ExitStack) -> None:
    """Route the attention of a layer through a backend, replacing an earlier route, until the stack closes."""
    routed = _ROUTE in vars(layer)
    stack.enter_context(replaced(vars(layer), _ROUTE, route))
    if not routed:
        stack.enter_context(replaced(vars(layer), "forward", _Routed(layer, layer.forward)))


@dataclass
class _Routed:
    """The forward of a routed layer; an object, not a closure, so that copies of a model copy it."""

    layer: nn.Module
    plain: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        route: _Route = vars(self.layer)[_ROUTE]
        if route.attend is SDPA and _computes_through_sdpa(self.layer):
            return self.plain(*args, **kwargs)
        with _SdpaOverride(route.attend) as mode:
            output = self.plain(*args, **kwargs)
        if route.strict and not mode.calls:
            raise InputError(
                f"attention backend {route.name!r} would do nothing: {type(self.layer.processor).__name__} does not "
                "compute through scaled_dot_product_attention; set another processor, or use 'auto'"
            )
        return output


def _computes_through_sdpa(layer: nn.Module) -> bool:
    """Return whether the layer's processor is known to use PyTorch's function; otherwise its calls are counted."""
    return type(layer.processor) in THROUGH_SDPA.values() or hasattr(layer.processor, _DISPATCH)


class _SdpaOverride(TorchFunctionMode):
    """A mode that replaces PyTorch's function by another one in this thread, and counts its calls."""

    def __init__(self, attend: AttentionFunction) -> None:
        super().__init__()
        self.attend, self.calls = attend, 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is SDPA:
            self.calls += 1
            func = self.attend
        return func(*args, **(kwargs or {}))


_MISSING = object()


@contextmanager
def replaced(space: dict[str, Any], name: str, value: Any) -> Iterator[None]:
    """Set `space[name]` to `value` in the block; afterwards, also on errors, restore or delete it.

    For an object, `space` is its `vars()`.
    """
    before = space.get(name, _MISSING)
    space[name] = value
    try:
        yield
    finally:
        if before is _MISSING:
            space.pop(name, None)
        else:
            space[name] = before
