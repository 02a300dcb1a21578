"""Views of a pipeline: copies in which some components are replaced, on the same weights.

A view encodes each text once, has no safety checker, or has denoisers that return zeros; the pipeline is unchanged.
"""

import copy
import hashlib
import inspect
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from steer.diffusion.safety import SAFETY_CHECKER, PassThroughChecker
from steer.errors import UnsupportedPipelineError
from steer.reward import ENCODING_LOCK

logger = logging.getLogger(__name__)


def replace_parts(pipe: Any, parts: Mapping[int, Any]) -> Any:
    """Copy a pipeline, and the pipelines that it is made of, with some components replaced, by their id."""
    view = copy.copy(pipe)
    for name, value in vars(pipe).items():
        if id(value) in parts:
            vars(view)[name] = parts[id(value)]
        elif isinstance(value, DiffusionPipeline):
            vars(view)[name] = replace_parts(value, parts)
    return view


def with_decode(vae: Any, decode: Callable[..., Any]) -> Any:
    """Copy an autoencoder, on the same weights, with another decode."""
    other = copy.copy(vae)
    vars(other)["decode"] = decode
    return other


def batch_or_rows(decode: Callable[..., Any], rows: int) -> Callable[..., Any]:
    """Wrap a decode function to decode row by row a batch of `rows` that it refuses (Allegro's takes one video)."""

    def run(z: Tensor, *args: Any, **kwargs: Any) -> Any:
        try:
            return decode(z, *args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if len(z) != rows:
                raise
            logger.info("the autoencoder refuses %d rows (%s): decoding one by one", rows, error)
        given = [z, list(args), kwargs | {"return_dict": False}]
        calls = [tree_map_only(Tensor, partial(_row, row, rows), given) for row in range(rows)]
        return Output([torch.cat([decode(one, *more, **named)[0] for one, more, named in calls])])

    return run


def _row(row: int, rows: int, value: Tensor) -> Tensor:
    return value[row : row + 1] if value.dim() and len(value) == rows else value


def stages_of(pipe: Any) -> dict[str, Any]:
    """Return the pipelines that a combined pipeline is made of, by name."""
    return {name: value for name, value in vars(pipe).items() if isinstance(value, DiffusionPipeline)}


PROMPT_ARGUMENTS = {"prompt", "prompt_2"}  # of `encode_prompt` in pipelines with CLIP text encoders
ENCODED_TEXTS = "_encoded_texts"  # attribute of a view: outputs of the text encoders of a modular pipeline, by name


POST_PROCESSORS = ("safety_checker", "watermark")  # for finished images only


def without_side_effects(pipe: Any) -> Any:
    """Copy a pipeline for many runs within one call: text encoded once; no safety checker, watermark or progress bar.

    A safety checker would blacken intermediate images, and none of these supports gradients.
    """
    quiet = cache_text_encoding(pipe)
    vars(quiet).update({name: without_side_effects(stage) for name, stage in stages_of(pipe).items()})
    vars(quiet).update(dict.fromkeys(POST_PROCESSORS) | {"_progress_bar_config": {"disable": True}})
    checker = getattr(pipe, SAFETY_CHECKER, None)
    if hasattr(checker, "check_video_safety"):  # some pipelines refuse to run without a checker
        vars(quiet)[SAFETY_CHECKER] = PassThroughChecker()
    return quiet


def cache_text_encoding(pipe: Any) -> Any:
    """Copy a pipeline for one user call and its previews: each text is encoded once, without gradients.

    Copies of the copy share the cache.
    """
    once = copy.copy(pipe)
    if hasattr(pipe, "encode_prompt"):
        vars(once)["encode_prompt"] = cached_calls(torch.no_grad()(pipe.encode_prompt), {})
    else:
        vars(once).setdefault(ENCODED_TEXTS, {})
    return once


def encode_with_prefix(encode: Callable[..., Any], prefix: str) -> Callable[..., Any]:
    """Wrap an `encode_prompt` to put a text before every prompt, and before no negative prompt.

    The outputs have gradients of the text's embeddings, in any number of backward passes.
    """
    signature = inspect.signature(encode)

    def run(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        for name in PROMPT_ARGUMENTS & given.arguments.keys():
            given.arguments[name] = _prefixed(given.arguments[name], prefix)
        return tree_map_only(Tensor, shared_graph, encode(*given.args, **given.kwargs))

    return run


def _prefixed(prompt: Any, prefix: str) -> Any:
    """Put a text before a prompt or each of several; None stays None."""
    if isinstance(prompt, list | tuple):
        return [prefix + one for one in prompt]
    return prompt if prompt is None else prefix + prompt


def shared_graph(value: Tensor) -> Tensor:
    """Detach a tensor, but pass each gradient of the copy through the tensor's graph, which is kept.

    Each solver step has a backward pass of its own, which would free the graph of the text encoder.
    """
    if not value.requires_grad:
        return value
    leaf = value.detach().requires_grad_()
    leaf.register_hook(lambda gradient: value.backward(gradient, retain_graph=True))
    return leaf


def exclusive(encode: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an encoder of texts to run in one thread at a time."""

    @wraps(encode)
    def run(*args: Any, **kwargs: Any) -> Any:
        with ENCODING_LOCK:
            return encode(*args, **kwargs)

    return run


def cached_calls(function: Callable[..., Any], cache: dict[str, Any]) -> Callable[..., Any]:
    """Cache a function by its arguments: some pipelines encode the negative prompt in a separate call."""

    def cached_call(*args: Any, **kwargs: Any) -> Any:
        key = json.dumps(plain_values([args, kwargs]))
        if key not in cache:
            cache[key] = exclusive(function)(*args, **kwargs)
        return cache[key]

    return cached_call


def named_arguments(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a method's call by name, without `self`."""
    names = [name for name in inspect.signature(function).parameters if name != "self"]
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def plain_values(value: Any) -> Any:
    """Convert an argument to plain JSON values; images and tensors become a hash of their content."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(name): plain_values(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(one) for one in value]
    if isinstance(value, Tensor):
        value = value.detach().float().cpu()
    if not hasattr(value, "__array__") and not hasattr(value, "__array_interface__"):
        return type(value).__name__
    array = np.ascontiguousarray(value)
    return [list(array.shape), hashlib.sha256(array.tobytes()).hexdigest()]


DENOISERS = ("unet", "transformer", "transformer_2")
CONTROLNETS = ("controlnet",)
DENOISER_PACKAGES = ("diffusers.models.unets.", "diffusers.models.transformers.")


def denoising_modules(pipe: Any) -> dict[str, Any]:
    """Return the denoisers and ControlNets of a pipeline by name."""
    names = (*denoisers_in(pipe), *CONTROLNETS)
    return {name: module for name in names if (module := getattr(pipe, name, None)) is not None}


def denoisers_in(pipe: Any) -> list[str]:
    """Return the names of the pipeline's denoisers; the first is the one that is trained.

    Where none has a usual name, they are the components from diffusers' denoiser packages, without the prior's.
    """
    if known := [name for name in DENOISERS if getattr(pipe, name, None) is not None]:
        return known
    parts = getattr(pipe, "components", {})
    return [
        name
        for name, part in parts.items()
        if type(part).__module__.startswith(DENOISER_PACKAGES)
        and not name.startswith("prior_")
        and hasattr(part, "forward")
    ]


class ModuleProxy:
    """A proxy of a module that differs only in the result of its call."""

    def __init__(self, target: Any, call: Callable[..., Any]) -> None:
        self.__dict__.update(_target=target, _call=call)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        kind: type = self._target.__class__  # a proxy of a proxy reports the class of the module
        return kind

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._target, name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)


class Output(tuple[Tensor, ...]):
    """The output of a model, for callers that take `[0]` and for those that take `.sample`."""

    @property
    def sample(self) -> Tensor:
        return self[0]


@dataclass(frozen=True)
class _Shape:
    """The shape, dtype and device of a tensor of an output."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def zeros(self) -> Tensor:
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)


class OutputShapes:
    """The output shapes of modules by the shapes of their inputs, in lists, tuples and output classes."""

    def __init__(self) -> None:
        self._outputs: dict[Any, Any] = {}

    def recorded(self, pipe: Any) -> Any:
        """Return a view of a pipeline whose denoisers and ControlNets have their output shapes recorded."""
        modules = denoising_modules(pipe)
        proxies = {name: ModuleProxy(one, partial(self.call, name, one)) for name, one in modules.items()}
        return with_modules(pipe, proxies) if proxies else pipe

    def call(self, name: str, module: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a module and record the shape of its output."""
        key = self._key(name, args, kwargs)  # before the call: some modules remove entries from their lists
        output = module(*args, **kwargs)
        self._outputs[key] = tree_map_only(Tensor, lambda one: _Shape(tuple(one.shape), one.dtype, one.device), output)
        return output

    def zeros(self, name: str, module: Any, *args: Any, **kwargs: Any) -> Any:
        """Return zeros shaped like the module's output; inputs of a new shape cost one call without gradients."""
        key = self._key(name, args, kwargs)
        if key not in self._outputs:
            self._call_once(name, module, *args, **kwargs)
        # A copy: an output may hold a cache, which the pipeline clears at its end.
        return tree_map_only(_Shape, _Shape.zeros, copy.deepcopy(self._outputs[key]))

    def _call_once(self, name: str, module: Any, *args: Any, **kwargs: Any) -> None:
        try:
            with torch.no_grad():
                self.call(name, module, *args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, LookupError) as error:
            raise UnsupportedPipelineError(
                f"{name} cannot be left out of previews and replays ({type(error).__name__}: {error}): it keeps state "
                "between its calls"
            ) from error

    @staticmethod
    def _key(name: str, args: Any, kwargs: Any) -> Any:
        return name, tuple(tuple(one.shape) for one in tree_leaves([args, kwargs]) if torch.is_tensor(one))


def _zero_denoiser(denoiser: Any) -> ModuleProxy:
    """Return a proxy of a denoiser that predicts zeros without computing anything, in the shape of its latents."""
    channels = getattr(getattr(denoiser, "config", None), "out_channels", None)

    def zeros(*args: Any, **kwargs: Any) -> Any:
        x: Any = args[0] if args else kwargs["sample" if "sample" in kwargs else "hidden_states"]
        if isinstance(x, list):  # one tensor for each row, in the outputs too
            return ([torch.zeros_like(row) for row in x],)
        if x.dim() > 3:
            return Output([x.new_zeros((len(x), channels or x.shape[1], *x.shape[2:]))])
        shape = (*x.shape[:-1], channels or x.shape[-1])  # tokens
        return Output([x.new_zeros(shape)])

    return ModuleProxy(denoiser, zeros)


def _zero_controlnet(controlnet: Any) -> ModuleProxy:
    """Return a proxy of a ControlNet that adds nothing."""
    return ModuleProxy(controlnet, lambda *args, **kwargs: ([], None))


def zero_proxies(pipe: Any, shapes: OutputShapes | None = None) -> dict[str, ModuleProxy]:
    """Return a proxy with zero output for every denoiser and ControlNet of a pipeline, by name.

    shapes  shapes of their outputs, recorded in a run; None: shapes are guessed from the inputs
    """
    modules = denoising_modules(pipe)
    if shapes is not None:
        return {name: ModuleProxy(one, partial(shapes.zeros, name, one)) for name, one in modules.items()}
    return {
        name: _zero_controlnet(module) if name in CONTROLNETS else _zero_denoiser(module)
        for name, module in modules.items()
    }


def with_modules(pipe: Any, modules: Mapping[str, Any]) -> Any:
    """Copy a pipeline with some modules replaced. The pipeline itself stays unchanged.

    Offloading hooks belong to the pipeline's own modules, and the pipeline restores them itself.
    """
    return with_components(pipe, {**modules, "maybe_free_model_hooks": pipe.maybe_free_model_hooks})


def with_components(pipe: Any, components: Mapping[str, Any]) -> Any:
    """Copy a pipeline with some attributes replaced by name; components are replaced in its stages too."""
    own = {name: vars(pipe).get(name) for name in components}
    view = replace_parts(pipe, {id(part): components[name] for name, part in own.items() if part is not None})
    vars(view).update(components)
    return view


@contextmanager
def replace_modules(pipe: Any, modules: Mapping[str, ModuleProxy]) -> Iterator[Any]:
    """Yield a view of a pipeline with some modules replaced; after the block the view has the pipeline's own again."""
    view = with_modules(pipe, modules)
    try:
        yield view
    finally:
        vars(view).update({name: getattr(pipe, name) for name in modules})
