"""Step hooks: observe, replace or resample the solver steps of any diffusers pipeline, which stays unchanged."""

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from diffusers.guiders.guider_utils import BaseGuidance
from torch import Tensor
from torch.utils._pytree import tree_leaves

from steer.diffusion.kernels import fused_gaussian, has_kernel
from steer.diffusion.precision import HALF, widest
from steer.diffusion.rehearsal import check_verified
from steer.diffusion.schedules import (
    Dynamics,
    Gaussian,
    Level,
    Scheduler,
    gaussian_transition,
    mid_transition,
    predict_x0,
    step_levels,
    total_transitions,
)
from steer.diffusion.token_hooks import is_token_scheduler, view_class
from steer.diffusion.views import (
    batch_or_rows,
    exclusive,
    replace_parts,
    stages_of,
    with_decode,
)
from steer.errors import UnsupportedPipelineError


@dataclass
class SolverStep:
    """A completed transition x_t → x_s of the solver.

    k       number of the transition, from 0, of `total`
    t       timestep of x
    x       latents before the transition, (N, …)
    output  output of the denoiser, guidance included
    prev    latents after the transition (diffusers' prev_sample), where the next step starts
    calls   denoiser calls of the transition
    """

    k: int
    t: Any
    x: Tensor
    scheduler: Scheduler
    index: int
    output: Tensor = field(repr=False)
    prev: Tensor = field(init=False, repr=False)
    total: int = field(init=False)
    calls: int = 1
    own_x0: Tensor | None = field(default=None, repr=False)  # x̂0 that the pipeline itself passes to the scheduler

    @functools.cached_property
    def _x0(self) -> Tensor:
        if self.own_x0 is not None:
            return self.own_x0.float()
        return predict_x0(self.scheduler, self.output, self.t, self.x, self.index)

    def x0(self) -> Tensor:
        """Return x̂0, the predicted clean latents: fp32, shaped like x. Computed on the first call."""
        return self._x0

    def ode_step(self) -> Tensor:
        """Return x_s (N, …), fp32, of the first-order ODE step without noise: DDIM's, or Euler's for flow matching."""
        before, after = step_levels(self.scheduler, self.t, self.index)
        return gaussian_transition(self.x, self.x0(), before, Level(*after), 0.0).mean

    def exact_kernel(self, eta: float, dynamics: Dynamics = "ddim") -> Gaussian:
        """Return the Gaussian step p(x_s | x_t) with noise η in fp64: log-ratios are differences of large sums."""
        levels, dtype = step_levels(self.scheduler, self.t, self.index), widest(self.x.device)
        if self.own_x0 is not None:
            x0 = self.own_x0.to(dtype)
        else:
            x0 = predict_x0(self.scheduler, self.output, self.t, self.x, self.index, dtype)
        return gaussian_transition(self.x, x0, *levels, eta, dynamics)

    def kernel(self, eta: float, rows: Tensor | None = None, dynamics: Dynamics = "ddim") -> Gaussian:
        """Return the Gaussian step p(x_s | x_t) with noise η, of all particles or of `rows` (repeats allowed)."""
        levels = step_levels(self.scheduler, self.t, self.index)
        plain = self.own_x0 is None and has_kernel(self.x, self.output)
        if plain and not self.scheduler.config.get("thresholding"):
            x, output = (self.x, self.output) if rows is None else (self.x[rows], self.output[rows])
            return fused_gaussian(self.scheduler, x, output, *levels, eta, dynamics)
        x, x0 = (self.x, self.x0()) if rows is None else (self.x[rows], self.x0()[rows])
        return gaussian_transition(x, x0, *levels, eta, dynamics)


StepOverride = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Continue:
    """An override in lock step: the latents to continue with; the scheduler already has the solver's memory."""

    latents: Tensor


OnStep = Callable[[SolverStep], StepOverride | Continue | None]


@contextmanager
def hook_steps(pipe: Any, on_step: OnStep, *, rows: int | None = None, grad: bool = True) -> Iterator[Any]:
    """Yield a view of a diffusers pipeline with step hooks; call it like the pipeline itself.

    After each transition `on_step(solver_step)` is called. It returns None (no change) or
    `(ancestors, next_latents)`, each or both None: `ancestors` (N,) int64 is the particle that each row continues,
    multistep solver history included; `next_latents` (N, …) then replace the latents of the rows. Edits that the
    pipeline makes between the steps, as for inpainting, are part of the transition and follow their particles.

    `rows`: number of particles that the scheduler must receive; an autoencoder that refuses as many at once decodes row
    by row. `grad=False` runs the solver without gradients.
    The pipeline, its scheduler and its configuration stay unchanged; several views may run at once.

    Raises InputError for a scheduler that is not verified. Raises UnsupportedPipelineError for a pipeline that has no
    scheduler, never steps its scheduler, or has steps without a common noise level.
    """
    scheduler = scheduler_of(pipe)
    if is_token_scheduler(scheduler):
        yield view_class(pipe)(pipe, on_step, rows)
        return
    with torch._C.DisableTorchFunction():  # a caller may replace the call's draws, but not the rehearsal's
        check_verified(scheduler)
    tracker = _Tracker(pipe, on_step, rows, grad)
    # A guider stores the step and an average of one call, and a preview is another call.
    guiders = {id(part): copy.deepcopy(part) for part in vars(pipe).values() if isinstance(part, BaseGuidance)}
    tracker.guiders = list(guiders.values())
    parts: dict[int, Any] = {id(scheduler): _tracked_scheduler(scheduler, tracker), **guiders}
    if rows is not None and rows > 1 and hasattr(vae := vars(pipe).get("vae"), "decode"):
        parts[id(vae)] = with_decode(vae, batch_or_rows(vae.decode, rows))
    view = replace_parts(pipe, parts)
    if hasattr(view, "encode_prompt"):
        vars(view)["encode_prompt"] = exclusive(view.encode_prompt)
    yield view
    if not tracker.transitions:
        raise UnsupportedPipelineError(f"{type(pipe).__name__} never stepped its own scheduler: it cannot be steered")


def scheduler_of(pipe: Any) -> Scheduler:
    """Return the scheduler of a pipeline. Raises UnsupportedPipelineError where it has none."""
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None or not hasattr(scheduler, "step"):
        raise UnsupportedPipelineError(
            f"{type(pipe).__name__} has no scheduler with solver steps: it cannot be steered"
        )
    return scheduler


@dataclass
class _Tracker:
    """The state of a view between scheduler calls.

    origin   (N,) the initial row that each row continues, None before any resampling
    copies   number of transitions of each copy that the pipeline itself made of its scheduler, by id
    guiders  guiders of the view; the running averages of their guidance follow the ancestors
    """

    pipe: Any
    on_step: OnStep
    rows: int | None
    grad: bool
    transitions: int = 0
    total: int = 0
    pending: SolverStep | None = None
    origin: Tensor | None = None
    copies: dict[int, int] = field(default_factory=dict)
    followed: dict[int, Tensor] = field(default_factory=dict)  # ancestors by number of the transition
    guiders: list[Any] = field(default_factory=list)

    def step(self, scheduler: Scheduler, plain_step: Callable[..., Any], bound: inspect.BoundArguments) -> Any:
        """Make one scheduler step, report its transition once complete, and apply the override."""
        arguments = bound.arguments
        if OWN_X0 in arguments and arguments[OWN_X0] is None and _passes_argument(self.pipe, OWN_X0):
            return plain_step(*bound.args, **bound.kwargs)  # a conversion to x̂0, which the next step receives
        t = arguments.get("timestep")
        x, output = self._checked(arguments.get("sample"), arguments.get("model_output"), t, arguments)
        with torch.set_grad_enabled(self.grad and torch.is_grad_enabled()):
            out = plain_step(*bound.args, **bound.kwargs)
        index = (getattr(scheduler, "step_index", None) or 0) - 1
        if self.pending is None:
            t = t.flatten()[:1] if torch.is_tensor(t) and t.dim() else t  # one for all rows
            own_x0 = arguments.get(OWN_X0)
            self.pending = SolverStep(self.transitions, t, x, scheduler, index, output, own_x0=own_x0)
        else:
            self.pending.calls += 1
        if not mid_transition(scheduler):
            solver_step, self.pending, self.transitions = self.pending, None, self.transitions + 1
            self.total = self.total or total_transitions(
                scheduler, solver_step.t, solver_step.t if torch.is_tensor(t) and t.dim() else t
            )
            solver_step.prev, solver_step.total = _first(out), self.total
            override = self.on_step(solver_step)
            if override is not None and self.transitions > self.total:
                raise UnsupportedPipelineError(
                    f"{type(self.pipe).__name__} runs its solver several times in one call (autoregressive, or in "
                    f"stages): {_remedy_of_stages(self.pipe)}"
                )
            out = self._apply(override or (None, None), scheduler, out, x)
        return out

    def follow(self, scheduler: Scheduler, plain_step: Callable[..., Any], bound: inspect.BoundArguments) -> Any:
        """Make one step of a copy of the scheduler (a second modality): its rows follow the same ancestors."""
        out = plain_step(*bound.args, **bound.kwargs)
        number = self.copies[id(scheduler)]
        self.copies[id(scheduler)] = number + 1
        ancestors = self.followed.get(number)
        if ancestors is None:
            return out
        scheduler.__dict__.update(_reindexed_state(scheduler, ancestors, _first(out)))
        return _reindexed(out, ancestors, _first(out))

    def rows_of_particles(self, tensor: Tensor) -> Tensor:
        """Reorder the rows of a tensor that the pipeline made at the start as its particles have moved since."""
        if self.origin is None or tensor.dim() == 0 or len(tensor) != len(self.origin):
            return tensor
        return tensor[self.origin.to(tensor.device)]

    def _checked(self, x: Any, output: Any, t: Any, arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the latents and the output of a step. Raises UnsupportedPipelineError where they do not fit."""
        name = type(self.pipe).__name__
        several = torch.is_tensor(t) and t.dim() > 0 and bool((t != t.flatten()[0]).any())
        if several or arguments.get("per_token_timesteps") is not None:
            raise UnsupportedPipelineError(
                "per-token timesteps have no single noise level: this pipeline cannot be steered"
            )
        if not (torch.is_tensor(x) and torch.is_tensor(output) and x.is_floating_point()):
            raise UnsupportedPipelineError(
                f"{name} has discrete or no latents: there is no x̂0 between its steps, so it cannot be steered"
            )
        if self.rows and (x.dim() == 0 or len(x) != self.rows):
            raise UnsupportedPipelineError(f"the scheduler was given {len(x)} rows for {self.rows} particles")
        return x, output

    def _apply(self, override: StepOverride | Continue, scheduler: Scheduler, out: Any, x: Tensor) -> Any:
        if isinstance(override, Continue):
            return _with_latents(out, override.latents, None)
        ancestors, next_latents = override
        if ancestors is not None:
            self._check_resampling()
            prev = _first(out)
            for memory in self.memories(scheduler):
                vars(memory).update(_reindexed_state(memory, ancestors, prev))
            out = _reindexed(out, ancestors, prev)
            self.followed[self.transitions - 1] = ancestors
            self.origin = ancestors if self.origin is None else self.origin.to(ancestors.device)[ancestors]
        if next_latents is None:
            return out
        _reset_solver_memory(scheduler)
        # Half-precision latents keep their dtype where the denoiser's output is float32: the decoder expects it.
        latents = next_latents.to(x.dtype if x.dtype in HALF else _first(out).dtype)
        # After the last step x̂0 is the latents themselves, and some pipelines decode that output of the step.
        return _with_latents(out, latents, latents if self.transitions == self.total else None)

    def memories(self, scheduler: Scheduler) -> list[Any]:
        """Return the objects that hold state of the rows between the steps.

        The scheduler, and running averages of adaptive projected guidance in guiders or a local variable (ACE-Step).
        """
        code, frame = inspect.unwrap(type(self.pipe).__call__).__code__, inspect.currentframe()
        while frame is not None and frame.f_code is not code:
            frame = frame.f_back
        local = [] if frame is None else [*frame.f_locals.values()]
        parts = [*local, *(part for guider in self.guiders for part in vars(guider).values())]
        return [scheduler, *(part for part in parts if hasattr(part, "running_average"))]

    def _check_resampling(self) -> None:
        if any(number >= self.transitions for number in self.copies.values()):
            raise UnsupportedPipelineError(
                f"{type(self.pipe).__name__} steps a copy of its scheduler before the scheduler itself: resampling "
                "would leave the copy behind"
            )
        denoiser = getattr(self.pipe, "transformer", None) or getattr(self.pipe, "unet", None)
        if getattr(denoiser, "is_cache_enabled", False):
            raise UnsupportedPipelineError(
                "disable the feature cache of the denoiser: its state per sample cannot be resampled"
            )


def _remedy_of_stages(pipe: Any) -> str:
    """Return the remedy for a pipeline that runs its solver several times."""
    stages = [f"pipe.{name}" for name in stages_of(pipe)]
    return f"steer one of its stages by itself: {' or '.join(stages)}" if stages else "it cannot be steered"


OWN_X0 = "pred_original_sample"  # argument of EDM's step


def _passes_argument(pipe: Any, name: str) -> bool:
    """Return whether the call of a pipeline passes an argument of this name to some function."""
    constants = inspect.unwrap(type(pipe).__call__).__code__.co_consts
    return any(isinstance(names, tuple) and name in names for names in constants)


def _first(out: Any) -> Tensor:
    """Return the latents after a step: the first entry of the scheduler's output."""
    latents: Tensor = out[0]
    return latents


def _with_latents(out: Any, latents: Tensor, x0: Tensor | None) -> Any:
    """Replace the latents of a scheduler's output, and x̂0 beside them where given."""
    if isinstance(out, Mapping):
        names = [one.name for one in fields(out)]  # type: ignore[arg-type]
        values = [latents, *([getattr(out, names[1]) if x0 is None else x0] if len(names) > 1 else [])]
        rest = {name: getattr(out, name) for name in names[2:]}
        return type(out)(**dict(zip(names, values, strict=False)) | rest)
    return type(out)((latents, *(out[1:2] if x0 is None or len(out) < 2 else (x0,)), *out[2:]))


def _reindexed(value: Any, ancestors: Tensor, like: Tensor) -> Any:
    """Take the rows `ancestors` of every tensor, also in lists and outputs, that has one row per particle."""
    if torch.is_tensor(value):
        per_particle = value.dim() == like.dim() and len(value) == len(like)
        return value[ancestors.to(value.device)] if per_particle else value
    if isinstance(value, Mapping) and is_dataclass(value):
        return type(value)(**{one.name: _reindexed(getattr(value, one.name), ancestors, like) for one in fields(value)})
    if type(value) in (list, tuple):
        return type(value)(_reindexed(item, ancestors, like) for item in value)
    return value


def _reindexed_state(memory: Any, ancestors: Tensor, like: Tensor) -> dict[str, Any]:
    return {name: _reindexed(value, ancestors, like) for name, value in vars(memory).items() if name not in HOOKED}


def _reset_solver_memory(scheduler: Scheduler) -> None:
    """Reset solver state that would replace new latents by latents of an earlier step."""
    if hasattr(scheduler, "last_sample"):  # the corrector of UniPC and SASolver
        scheduler.last_sample = None
    if hasattr(scheduler, "order_list"):  # DPMSolverSinglestep, between its two or three steps from one sample
        scheduler.model_outputs = [None] * len(scheduler.model_outputs)


HOOKED = ("step", "add_noise", "scale_noise")  # methods of a tracked scheduler that its instance replaces


class _Hook:
    """A method of one scheduler instance; a copy of the scheduler gets a hook of its own.

    tracked  whether this is the scheduler of the view, not a copy that the pipeline made of it
    """

    def __init__(self, tracker: _Tracker, scheduler: Scheduler, name: str, tracked: bool = True) -> None:
        self.tracker, self.scheduler, self.name, self.tracked = tracker, scheduler, name, tracked
        self.__name__ = name
        self.__signature__ = inspect.signature(self._plain)
        if not tracked:
            tracker.copies.setdefault(id(scheduler), 0)

    @property
    def _plain(self) -> Callable[..., Any]:
        method: Callable[..., Any] = getattr(type(self.scheduler), self.name).__get__(self.scheduler)
        return method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.name != "step":
            return self._plain(*map(self._moved, args), **{name: self._moved(one) for name, one in kwargs.items()})
        bound = self.__signature__.bind(*args, **kwargs)
        bound.apply_defaults()
        run = self.tracker.step if self.tracked else self.tracker.follow
        return run(self.scheduler, self._plain, bound)

    def _moved(self, value: Any) -> Any:
        return self.tracker.rows_of_particles(value) if torch.is_tensor(value) and value.dim() > 1 else value

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Hook":
        return _Hook(self.tracker, memo[id(self.scheduler)], self.name, tracked=False)


def has_second_modality(scheduler: Scheduler) -> bool:
    """Return whether the pipeline also steps a copy of this scheduler, which is the scheduler of a solver step."""
    return bool(vars(scheduler)["step"].tracker.copies)


def memories_of(scheduler: Scheduler) -> list[Any]:
    """Return the objects that hold state of the rows between the steps, for the view with this scheduler."""
    memories: list[Any] = vars(scheduler)["step"].tracker.memories(scheduler)
    return memories


def without_hooks(scheduler: Scheduler) -> Scheduler:
    """Return a shallow copy of a scheduler without the hooks of a view, to be copied without effect on the run."""
    plain = copy.copy(scheduler)
    for name in HOOKED:
        vars(plain).pop(name, None)
    return plain


def _tracked_scheduler(base: Scheduler, tracker: _Tracker) -> Scheduler:
    """Copy a scheduler, with the same class; `step` and the noising methods go through the tracker."""
    leaves = [leaf for leaf in tree_leaves(vars(base)) if torch.is_tensor(leaf) and leaf.requires_grad]
    tracked = copy.deepcopy(without_hooks(base), {id(leaf): leaf.detach() for leaf in leaves})
    hooks = {name: _Hook(tracker, tracked, name) for name in HOOKED if hasattr(tracked, name)}
    vars(tracked).update(hooks)
    return tracked


class RunEnded(BaseException):
    """Exception by which a hook ends a run early, with the `value` for which the run was made.

    Not a subclass of Exception: pipelines, and the attempts at a call's forms (`rows`), must not catch it.
    """

    def __init__(self, value: Any = None) -> None:
        super().__init__()
        self.value = value
