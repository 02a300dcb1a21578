"""The seam: watch, replace or resample the solver steps of any diffusers pipeline, and leave it untouched."""

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from steer.errors import InputError
from steer.kernels import fused_gaussian, has_kernel
from steer.precision import HALF, widest
from steer.schedule import Scheduler, check_verified, in_the_middle, predict_x0, total_transitions
from steer.transition import Gaussian, gaussian_transition, step_levels


class CannotSteer(InputError):
    """This pipeline, as called, gives its solver steps no place to act on."""


@dataclass
class Event:
    """One transition x_t → x_s of the solver, just made.

    k       number of the transition, from 0, of `total`
    t       timestep of x
    x       latents before the transition, (N, …)
    output  what the denoiser said of them, guidance included
    prev    latents after it (diffusers' prev_sample), what the next step will start from
    calls   denoiser calls that it took
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
        """x̂0, the denoiser's guess of the end from x: fp32, shaped like x. Computed when first asked for."""
        return self._x0

    def exact_kernel(self, eta: float) -> Gaussian:
        """The Gaussian step p(x_s | x_t) with noise η, in fp64: log-ratios are differences of large sums."""
        levels, dtype = step_levels(self.scheduler, self.t, self.index), widest(self.x.device)
        x0 = predict_x0(self.scheduler, self.output, self.t, self.x, self.index, dtype)
        return gaussian_transition(self.x, x0, *levels, eta)

    def kernel(self, eta: float, rows: Tensor | None = None) -> Gaussian:
        """The Gaussian step p(x_s | x_t) with noise η, of all particles or of those in `rows` (with repeats)."""
        levels = step_levels(self.scheduler, self.t, self.index)
        if has_kernel(self.x, self.output) and not self.scheduler.config.get("thresholding"):
            x, output = (self.x, self.output) if rows is None else (self.x[rows], self.output[rows])
            return fused_gaussian(self.scheduler, x, output, *levels, eta)
        x, x0 = (self.x, self.x0()) if rows is None else (self.x[rows], self.x0()[rows])
        return gaussian_transition(x, x0, *levels, eta)


Answer = tuple[Tensor | None, Tensor | None]
OnStep = Callable[[Event], Answer | None]


@contextmanager
def steered(pipe: Any, on_step: OnStep, *, rows: int | None = None, grad: bool = True) -> Iterator[Any]:
    """Yields a view of a diffusers pipeline; call it like the pipeline itself.

    After each transition `on_step(event)` is called. It returns None (nothing changes) or
    `(ancestors, next_latents)`, each or both None: `ancestors` (N,) int64 says which particle each slot
    goes on from, multistep solver history included; `next_latents` (N, …) are the latents of the slots
    after that.

    `rows`: number of particles that the scheduler must see. `grad=False` runs the solver without grad.
    The pipeline, its scheduler and its configuration stay as they were; several views may run at once.

    Raises InputError for a scheduler that is not verified and CannotSteer for a pipeline that edits its
    latents between the steps, or never steps its own scheduler.
    """
    check_verified(pipe.scheduler)
    tracker = _Tracker(pipe, on_step, rows, grad)
    view = copy.copy(pipe)
    vars(view)["scheduler"] = _watched(pipe.scheduler, tracker)
    yield view
    if not tracker.transitions:
        raise CannotSteer(f"{type(pipe).__name__} never stepped its own scheduler: it cannot be steered")


@dataclass
class _Tracker:
    """What a view remembers from one scheduler call to the next."""

    pipe: Any
    on_step: OnStep
    rows: int | None
    grad: bool
    transitions: int = 0
    total: int = 0
    last: Tensor | None = None
    event: Event | None = None
    copied: bool = False

    def step(self, scheduler: Scheduler, plain_step: Callable[..., Any], arguments: dict[str, Any]) -> tuple[Any, ...]:
        """One call of the scheduler's step: makes it, reports it once its transition is over, applies the answer."""
        x, t, output = arguments["sample"], arguments["timestep"], arguments["model_output"]
        self._check(arguments)
        with torch.set_grad_enabled(self.grad and torch.is_grad_enabled()):
            out = tuple(plain_step(scheduler, **arguments, return_dict=False))
        index = (getattr(scheduler, "step_index", None) or 0) - 1
        if self.event is None:
            self.event = Event(self.transitions, t, x, scheduler, index, output)
        else:
            self.event.calls += 1
        if not in_the_middle(scheduler):
            event, self.event, self.transitions = self.event, None, self.transitions + 1
            self.total = self.total or total_transitions(scheduler, event.t, t)
            event.prev, event.total = out[0], self.total
            out = self._apply(self.on_step(event) or (None, None), scheduler, out, x)
        self.last = out[0]
        return out

    def _check(self, arguments: dict[str, Any]) -> None:
        x = arguments["sample"]
        if arguments.get("per_token_timesteps") is not None:
            raise CannotSteer("per-token timesteps have no single noise level: this pipeline cannot be steered")
        if self.rows and len(x) != self.rows:
            raise CannotSteer(f"the scheduler was given {len(x)} rows for {self.rows} particles")
        if self.last is not None and x is not self.last and not _same(x, self.last):
            raise CannotSteer(
                f"{type(self.pipe).__name__} edits its latents between the steps (inpainting, or a callback): "
                "it cannot be steered"
            )

    def _apply(self, answer: Answer, scheduler: Scheduler, out: tuple[Any, ...], x: Tensor) -> tuple[Any, ...]:
        ancestors, next_latents = answer
        if ancestors is not None:
            self._check_resampling()
            for name, value in scheduler.__dict__.items():
                scheduler.__dict__[name] = _reindexed(value, ancestors, out[0])
            out = _reindexed(out, ancestors, out[0])
        if next_latents is None:
            return out
        _start_from_here(scheduler)
        # A denoiser that answers in float32 leaves latents in half precision, and a decoder after them, as they are.
        latents = next_latents.to(x.dtype if x.dtype in HALF else out[0].dtype)
        # At the end x̂0 is the latents themselves, and some pipelines decode that output of the step.
        return latents, *([latents] if self.transitions == self.total else out[1:2]), *out[2:]

    def _check_resampling(self) -> None:
        if self.copied:
            raise CannotSteer(
                f"{type(self.pipe).__name__} also steps copies of its scheduler (a second modality, or views): "
                "resampling would leave them behind"
            )
        denoiser = getattr(self.pipe, "transformer", None) or getattr(self.pipe, "unet", None)
        if getattr(denoiser, "is_cache_enabled", False):
            raise CannotSteer("disable the feature cache of the denoiser: its state per sample cannot be resampled")


def _same(x: Tensor, last: Tensor) -> bool:
    return x.shape == last.shape and torch.equal(x, last.to(x))


def _reindexed(value: Any, ancestors: Tensor, like: Tensor) -> Any:
    """Takes the rows `ancestors` of every tensor, alone or in a list, that holds one row per particle."""
    if torch.is_tensor(value):
        per_particle = value.dim() == like.dim() and len(value) == len(like)
        return value[ancestors.to(value.device)] if per_particle else value
    if type(value) in (list, tuple):
        return type(value)(_reindexed(item, ancestors, like) for item in value)
    return value


def _start_from_here(scheduler: Scheduler) -> None:
    """Keeps solvers that go back to latents of an earlier step from passing over new ones."""
    if hasattr(scheduler, "last_sample"):  # the corrector of UniPC and SASolver
        scheduler.last_sample = None
    if hasattr(scheduler, "order_list"):  # DPMSolverSinglestep, amid its two or three steps from one place
        scheduler.model_outputs = [None] * len(scheduler.model_outputs)


def _watched(base: Scheduler, tracker: _Tracker) -> Scheduler:
    """A copy of a scheduler, of a subclass of its own class, whose `step` goes through the tracker."""
    cls = type(base)
    leaves = [leaf for leaf in tree_leaves(vars(base)) if torch.is_tensor(leaf) and leaf.requires_grad]
    watched = copy.deepcopy(base, {id(leaf): leaf.detach() for leaf in leaves})
    signature = inspect.signature(cls.step)

    @functools.wraps(cls.step)
    def step(self: Scheduler, *args: Any, **kwargs: Any) -> Any:
        if self is not watched:
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
        """A pipeline that copies its scheduler gets a plain one."""
        tracker.copied = True
        plain = copy.copy(self)
        plain.__class__ = cls
        return copy.deepcopy(plain, memo)

    members = {"step": step, "__deepcopy__": deepcopy, "__module__": cls.__module__}
    watched.__class__ = type(cls.__name__, (cls,), members)
    return watched
