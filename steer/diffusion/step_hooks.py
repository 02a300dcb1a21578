"""Step hooks: observe, replace or resample the solver steps of any diffusers pipeline, which stays unchanged."""

import copy
import functools
import hashlib
import inspect
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from steer.diffusion.kernels import fused_gaussian, has_kernel
from steer.diffusion.precision import HALF, widest
from steer.diffusion.schedules import (
    Gaussian,
    Scheduler,
    check_verified,
    gaussian_transition,
    mid_transition,
    predict_x0,
    step_levels,
    total_transitions,
)
from steer.diffusion.token_hooks import is_token_scheduler, view_class
from steer.errors import InputError


class UnsupportedPipelineError(InputError):
    """A pipeline, as called, whose solver steps cannot be hooked."""


@dataclass
class SolverStep:
    """A completed transition x_t → x_s of the solver.

    k       number of the transition, from 0, of `total`
    t       timestep of x
    x       latents before the transition, (N, …)
    output  output of the denoiser, guidance included
    prev    latents after it (diffusers' prev_sample), where the next step starts
    calls   denoiser calls of the transition
    """

    k: int
    t: Any
    x: Tensor
    scheduler: Scheduler
    index: int
    output: Tensor = field(repr=False)
    prev: Tensor = field(init=False)
    total: int = field(init=False)
    calls: int = 1

    @functools.cached_property
    def _x0(self) -> Tensor:
        return predict_x0(self.scheduler, self.output, self.t, self.x, self.index)

    def x0(self) -> Tensor:
        """Return x̂0, the predicted clean latents: fp32, shaped like x. Computed on the first call."""
        return self._x0

    def exact_kernel(self, eta: float) -> Gaussian:
        """Return the Gaussian step p(x_s | x_t) with noise η in fp64: log-ratios are differences of large sums."""
        levels, dtype = step_levels(self.scheduler, self.t, self.index), widest(self.x.device)
        x0 = predict_x0(self.scheduler, self.output, self.t, self.x, self.index, dtype)
        return gaussian_transition(self.x, x0, *levels, eta)

    def kernel(self, eta: float, rows: Tensor | None = None) -> Gaussian:
        """Return the Gaussian step p(x_s | x_t) with noise η, of all particles or of `rows` (repeats allowed)."""
        levels = step_levels(self.scheduler, self.t, self.index)
        if has_kernel(self.x, self.output) and not self.scheduler.config.get("thresholding"):
            x, output = (self.x, self.output) if rows is None else (self.x[rows], self.output[rows])
            return fused_gaussian(self.scheduler, x, output, *levels, eta)
        x, x0 = (self.x, self.x0()) if rows is None else (self.x[rows], self.x0()[rows])
        return gaussian_transition(x, x0, *levels, eta)


StepOverride = tuple[Tensor | None, Tensor | None]
OnStep = Callable[[SolverStep], StepOverride | None]


@contextmanager
def hook_steps(pipe: Any, on_step: OnStep, *, rows: int | None = None, grad: bool = True) -> Iterator[Any]:
    """Yield a view of a diffusers pipeline with step hooks; call it like the pipeline itself.

    After each transition `on_step(solver_step)` is called. It returns None (no change) or
    `(ancestors, next_latents)`, each or both None: `ancestors` (N,) int64 is the particle that each row continues,
    multistep solver history included; `next_latents` (N, …) replace the latents of the rows after that.

    `rows`: number of particles that the scheduler must receive. `grad=False` runs the solver without gradients.
    The pipeline, its scheduler and its configuration stay unchanged; several views may run at once.

    Raises InputError for a scheduler that is not verified, and UnsupportedPipelineError for a pipeline that edits its
    latents between the steps or never steps its own scheduler.
    """
    if is_token_scheduler(pipe.scheduler):
        yield view_class(pipe)(pipe, on_step, rows)
        return
    check_verified(pipe.scheduler)
    tracker = _Tracker(pipe, on_step, rows, grad)
    view = copy.copy(pipe)
    vars(view)["scheduler"] = _tracked_scheduler(pipe.scheduler, tracker)
    if hasattr(view, "encode_prompt"):
        vars(view)["encode_prompt"] = _exclusive(view.encode_prompt)
    yield view
    if not tracker.transitions:
        raise UnsupportedPipelineError(f"{type(pipe).__name__} never stepped its own scheduler: it cannot be steered")


@dataclass
class _Tracker:
    """The state of a view between scheduler calls."""

    pipe: Any
    on_step: OnStep
    rows: int | None
    grad: bool
    transitions: int = 0
    total: int = 0
    last: Tensor | None = None
    pending: SolverStep | None = None
    copied: bool = False

    def step(self, scheduler: Scheduler, plain_step: Callable[..., Any], arguments: dict[str, Any]) -> tuple[Any, ...]:
        """Make one scheduler step, report its transition once complete, and apply the override."""
        x, t, output = arguments["sample"], arguments["timestep"], arguments["model_output"]
        self._check(arguments)
        with torch.set_grad_enabled(self.grad and torch.is_grad_enabled()):
            out = tuple(plain_step(scheduler, **arguments, return_dict=False))
        index = (getattr(scheduler, "step_index", None) or 0) - 1
        if self.pending is None:
            self.pending = SolverStep(self.transitions, t, x, scheduler, index, output)
        else:
            self.pending.calls += 1
        if not mid_transition(scheduler):
            solver_step, self.pending, self.transitions = self.pending, None, self.transitions + 1
            self.total = self.total or total_transitions(scheduler, solver_step.t, t)
            solver_step.prev, solver_step.total = out[0], self.total
            out = self._apply(self.on_step(solver_step) or (None, None), scheduler, out, x)
        self.last = out[0]
        return out

    def _check(self, arguments: dict[str, Any]) -> None:
        x = arguments["sample"]
        if arguments.get("per_token_timesteps") is not None:
            raise UnsupportedPipelineError(
                "per-token timesteps have no single noise level: this pipeline cannot be steered"
            )
        if self.rows and len(x) != self.rows:
            raise UnsupportedPipelineError(f"the scheduler was given {len(x)} rows for {self.rows} particles")
        if self.last is not None and x is not self.last and not _same(x, self.last):
            raise UnsupportedPipelineError(
                f"{type(self.pipe).__name__} edits its latents between the steps (inpainting, or a callback): "
                "it cannot be steered"
            )

    def _apply(self, override: StepOverride, scheduler: Scheduler, out: tuple[Any, ...], x: Tensor) -> tuple[Any, ...]:
        ancestors, next_latents = override
        if ancestors is not None:
            self._check_resampling()
            for name, value in scheduler.__dict__.items():
                scheduler.__dict__[name] = _reindexed(value, ancestors, out[0])
            out = _reindexed(out, ancestors, out[0])
        if next_latents is None:
            return out
        _reset_solver_memory(scheduler)
        # Half-precision latents keep their dtype where the denoiser's output is float32: the decoder expects it.
        latents = next_latents.to(x.dtype if x.dtype in HALF else out[0].dtype)
        # After the last step x̂0 is the latents themselves, and some pipelines decode that output of the step.
        return latents, *([latents] if self.transitions == self.total else out[1:2]), *out[2:]

    def _check_resampling(self) -> None:
        if self.copied:
            raise UnsupportedPipelineError(
                f"{type(self.pipe).__name__} also steps copies of its scheduler (a second modality, or views): "
                "resampling would leave them behind"
            )
        denoiser = getattr(self.pipe, "transformer", None) or getattr(self.pipe, "unet", None)
        if getattr(denoiser, "is_cache_enabled", False):
            raise UnsupportedPipelineError(
                "disable the feature cache of the denoiser: its state per sample cannot be resampled"
            )


def _same(x: Tensor, last: Tensor) -> bool:
    return x.shape == last.shape and torch.equal(x, last.to(x))


def _reindexed(value: Any, ancestors: Tensor, like: Tensor) -> Any:
    """Take the rows `ancestors` of every tensor, also in lists, that has one row per particle."""
    if torch.is_tensor(value):
        per_particle = value.dim() == like.dim() and len(value) == len(like)
        return value[ancestors.to(value.device)] if per_particle else value
    if type(value) in (list, tuple):
        return type(value)(_reindexed(item, ancestors, like) for item in value)
    return value


def _reset_solver_memory(scheduler: Scheduler) -> None:
    """Reset solver state that would replace new latents by those of an earlier step."""
    if hasattr(scheduler, "last_sample"):  # the corrector of UniPC and SASolver
        scheduler.last_sample = None
    if hasattr(scheduler, "order_list"):  # DPMSolverSinglestep, between its two or three steps from one sample
        scheduler.model_outputs = [None] * len(scheduler.model_outputs)


def _tracked_scheduler(base: Scheduler, tracker: _Tracker) -> Scheduler:
    """Copy a scheduler into a subclass of its own class whose `step` goes through the tracker."""
    cls = type(base)
    leaves = [leaf for leaf in tree_leaves(vars(base)) if torch.is_tensor(leaf) and leaf.requires_grad]
    tracked = copy.deepcopy(base, {id(leaf): leaf.detach() for leaf in leaves})
    signature = inspect.signature(cls.step)

    @functools.wraps(cls.step)
    def step(self: Scheduler, *args: Any, **kwargs: Any) -> Any:
        if self is not tracked:
            tracker.copied = True
            return cls.step(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        arguments = {name: value for name, value in bound.arguments.items() if name != "self"}
        return_dict = arguments.pop("return_dict", True)
        out = tracker.step(self, cls.step, arguments)
        if not return_dict:
            return out
        x0 = out[1] if len(out) > 1 else None
        return SimpleNamespace(prev_sample=out[0], pred_original_sample=x0, denoised=x0)

    def deepcopy(self: Scheduler, memo: dict[int, Any]) -> Scheduler:
        """Copy the scheduler without tracking, for pipelines that copy it."""
        tracker.copied = True
        plain = copy.copy(self)
        plain.__class__ = cls
        return copy.deepcopy(plain, memo)

    members = {"step": step, "__deepcopy__": deepcopy, "__module__": cls.__module__}
    tracked.__class__ = type(cls.__name__, (cls,), members)
    return tracked


POST_PROCESSORS = ("safety_checker", "watermark")  # of finished images only
# A fast tokenizer stores the padding of the current call: threads that share one would use each other's.
ENCODING_LOCK = threading.RLock()


def without_side_effects(pipe: Any) -> Any:
    """Copy a pipeline for many runs within one call: text encoded once; no safety checker, watermark or progress bar.

    A safety checker would blacken intermediate images, and none of these supports gradients.
    """
    without_side_effects = cache_text_encoding(pipe)
    vars(without_side_effects).update(dict.fromkeys(POST_PROCESSORS) | {"_progress_bar_config": {"disable": True}})
    return without_side_effects


def cache_text_encoding(pipe: Any) -> Any:
    """Copy a pipeline for one user call and its previews: each text is encoded once, without gradients.

    Copies of the copy share the cache.
    """
    once = copy.copy(pipe)
    if hasattr(pipe, "encode_prompt"):
        vars(once)["encode_prompt"] = _cached_calls(torch.no_grad()(pipe.encode_prompt))
    return once


def _exclusive(encode: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an encoder of texts to run in one thread at a time."""

    @functools.wraps(encode)
    def exclusive(*args: Any, **kwargs: Any) -> Any:
        with ENCODING_LOCK:
            return encode(*args, **kwargs)

    return exclusive


def _cached_calls(function: Callable[..., Any]) -> Callable[..., Any]:
    """Cache a function by its arguments: some pipelines encode the negative prompt in a separate call."""
    cache: dict[str, Any] = {}

    def cached_call(*args: Any, **kwargs: Any) -> Any:
        key = json.dumps(plain_values([args, kwargs]))
        if key not in cache:
            cache[key] = _exclusive(function)(*args, **kwargs)
        return cache[key]

    return cached_call


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


def denoising_modules(pipe: Any) -> dict[str, Any]:
    """Return the denoisers and ControlNets of a pipeline by name."""
    modules = {name: getattr(pipe, name, None) for name in (*DENOISERS, *CONTROLNETS)}
    return {name: module for name, module in modules.items() if module is not None}


def denoisers_in(pipe: Any) -> list[str]:
    """Return the names of the pipeline's denoisers; the first is the one that is trained."""
    return [name for name in denoising_modules(pipe) if name in DENOISERS]


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

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)


class Output(tuple[Tensor, ...]):
    """The output of a model, for callers that take `[0]` and for those that take `.sample`."""

    @property
    def sample(self) -> Tensor:
        return self[0]


def zero_denoiser(denoiser: Any) -> ModuleProxy:
    """Return a proxy of a denoiser that predicts zeros without computing anything."""
    channels = getattr(getattr(denoiser, "config", None), "out_channels", None)

    def zeros(*args: Any, **kwargs: Any) -> Any:
        x: Tensor = args[0] if args else kwargs["sample" if "sample" in kwargs else "hidden_states"]
        if x.dim() > 3:
            return Output([x.new_zeros((len(x), channels or x.shape[1], *x.shape[2:]))])
        shape = (*x.shape[:-1], channels or x.shape[-1])  # tokens
        return Output([x.new_zeros(shape)])

    return ModuleProxy(denoiser, zeros)


def zero_controlnet(controlnet: Any) -> ModuleProxy:
    """Return a proxy of a ControlNet that adds nothing."""
    return ModuleProxy(controlnet, lambda *args, **kwargs: ([], None))


def zero_proxies(pipe: Any) -> dict[str, ModuleProxy]:
    """Return a proxy without output for every denoiser and ControlNet of a pipeline, by name."""
    return {
        name: zero_controlnet(module) if name in CONTROLNETS else zero_denoiser(module)
        for name, module in denoising_modules(pipe).items()
    }


def with_modules(pipe: Any, modules: Mapping[str, Any]) -> Any:
    """Copy a pipeline with some modules replaced. The pipeline itself stays unchanged.

    Offloading hooks are on its own modules, and it restores them itself.
    """
    view = copy.copy(pipe)
    vars(view).update(modules, maybe_free_model_hooks=pipe.maybe_free_model_hooks)
    return view


@contextmanager
def replace_modules(pipe: Any, modules: Mapping[str, ModuleProxy]) -> Iterator[Any]:
    """Yield a view of a pipeline with some modules replaced; after the block it has its own again."""
    view = with_modules(pipe, modules)
    try:
        yield view
    finally:
        vars(view).update({name: getattr(pipe, name) for name in modules})


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


SAFETY_CHECKER = "safety_checker"


class DeferredSafetyChecker:
    """A pipeline's safety checker that returns its images unchanged and keeps its verdict.

    flags     (N,) bool of the last batch; None before the first
    replaced  (N, 3, H, W) in [0, 1]: the checker's output for that batch
    """

    def __init__(self, checker: Any) -> None:
        self.checker = checker
        self.flags: Tensor | None = None
        self.replaced: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["checker"], name)

    def __call__(self, images: Any, **kwargs: Any) -> tuple[Any, list[bool]]:
        """Check the images, keep the verdict, and return the images with no flag set."""
        given = images.clone() if isinstance(images, Tensor) else copy.copy(images)
        replaced, flags = self.checker(images=given, **kwargs)
        self.flags = torch.as_tensor(flags, dtype=torch.bool).flatten().cpu()
        self.replaced = torch.as_tensor(replaced).detach()
        return images, [False] * len(self.flags)


def with_deferred_checker(pipe: Any) -> tuple[Any, DeferredSafetyChecker | None]:
    """Copy a pipeline with a deferred safety checker; returns the copy and the checker, None where it has none."""
    if getattr(pipe, SAFETY_CHECKER, None) is None:
        return pipe, None
    view, deferred = copy.copy(pipe), DeferredSafetyChecker(getattr(pipe, SAFETY_CHECKER))
    vars(view)[SAFETY_CHECKER] = deferred
    return view, deferred
