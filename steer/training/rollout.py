"""Rollouts of a diffusers pipeline: drawn step by step from Gaussian kernels, stored, and replayed with gradients.

Every step is p(x_s | x_t) of `steer.diffusion.schedules` with one η; a replay sets the stored x_s, so that each step
can be differentiated, and freed, by itself.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal, Protocol

import torch
from torch import Generator, Tensor
from torch.utils._pytree import tree_map_only

from steer.audio import as_scored
from steer.diffusion.differentiable import differentiable_images
from steer.diffusion.precision import HALF, Precision, in_float32
from steer.diffusion.preview import filter_call_kwargs
from steer.diffusion.rehearsal import check_verified
from steer.diffusion.rows import RowsCall
from steer.diffusion.schedules import Dynamics, check_dynamics, step_levels
from steer.diffusion.seeds import derived_seed, seeded_normal
from steer.diffusion.step_hooks import RunEnded, SolverStep, scheduler_of
from steer.diffusion.views import (
    ModuleProxy,
    OutputShapes,
    denoisers_in,
    denoising_modules,
    encode_with_prefix,
    with_components,
    without_side_effects,
)
from steer.errors import InputError


class Kernel(Protocol):
    """The transition p(x_s | x_t) of one step: a `Gaussian` of latents, or a `MaskedKernel` of tokens.

    scale       a number of the step that a stored reference keeps
    statistics  (N, …), from which, with the scale, `from_statistics` restores the kernel of a reference
    """

    @property
    def scale(self) -> Tensor: ...

    def log_prob(self, x_s: Tensor, /) -> Tensor: ...

    def kl(self, other: Any, /) -> Tensor: ...

    def statistics(self, x_s: Tensor, /) -> Tensor: ...

    def from_statistics(self, statistics: Tensor, scale: Tensor, x_s: Tensor, /) -> "Kernel": ...


ReplayCallback = Callable[[int, Kernel, Tensor], None]
NoisyCallback = Callable[[int, SolverStep, Tensor], None]
MAX_START_SIGNAL = 0.15  # largest α/σ at which a run's start, pure noise, can replace a noised sample


def blocks(numbers: range, size: int) -> list[range]:
    """Split numbers into consecutive blocks of at most `size`."""
    return [numbers[first : first + size] for first in range(0, len(numbers), size)]


@dataclass(frozen=True)
class Rows:
    """The prompt, the seed of x_T and the seed of the noise of each of N trajectories."""

    prompts: tuple[str, ...]
    starts: tuple[int, ...]
    noises: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    def split(self, size: int) -> list["Rows"]:
        """Split into consecutive blocks of at most `size` rows."""
        return [self.at(block) for block in blocks(range(len(self)), size)]

    def at(self, numbers: Collection[int]) -> "Rows":
        """Select rows."""
        return Rows(*(tuple(column[number] for number in numbers) for column in vars(self).values()))


@dataclass(frozen=True)
class Trajectories:
    """N rollouts, on the CPU.

    latents    (N, S, …) after each of the S transitions, in the storage dtype; only the last from `Sampler.sample`
    stochastic the T transitions that have a density (τ > 0)
    log_probs  (N, T) fp64, nats: log p(x_s | x_t) of the policy that drew them
    """

    rows: Rows
    latents: Tensor
    stochastic: tuple[int, ...]
    log_probs: Tensor

    @property
    def elements(self) -> int:
        """D, the number of latent elements of a sample."""
        return self.latents[0, 0].numel()

    def at(self, numbers: Collection[int]) -> "Trajectories":
        """Select rows."""
        some = list(numbers)
        return replace(self, rows=self.rows.at(some), latents=self.latents[some], log_probs=self.log_probs[some])

    @staticmethod
    def concatenate(components: Sequence["Trajectories"]) -> "Trajectories":
        """Concatenate the rows of trajectories with the same steps."""
        columns = zip(*(vars(part.rows).values() for part in components), strict=True)
        rows = Rows(*(tuple(chain.from_iterable(column)) for column in columns))
        latents = torch.cat([part.latents for part in components])
        step_log_probs = torch.cat([part.log_probs for part in components])
        return replace(components[0], rows=rows, latents=latents, log_probs=step_log_probs)


WindowKind = Literal["first", "random", "sliding"]


@dataclass(frozen=True)
class StepWindow:
    """A window of successive solver steps with noise; all others are steps of the ODE (MixGRPO, arXiv 2507.21802).

    first    the first steps
    random   at random within the first half of the steps, if it fits there (Flow-GRPO-Fast, arXiv 2505.05470)
    sliding  from the first steps to the last, then from the first again

    size    number of steps
    number  the seed of a random window; the number of shifts by one step of a sliding window
    skip    last steps with noise that no window reaches; the very last step of a run is never in a window
    """

    kind: WindowKind
    size: int
    number: int = 0
    skip: int = 0

    def steps(self, total: int) -> range:
        """Return the steps with noise, of 0 … total − 1. Raises InputError where the window does not fit."""
        available = total - 1 - self.skip
        if not 1 <= self.size <= available:
            raise InputError(
                f"window_size must be from 1 to {available}, the steps that can have noise, got {self.size}: lower it, "
                "or raise num_inference_steps"
            )
        places = max(total // 2, self.size) if self.kind == "random" else available
        places = min(places, available) - self.size + 1
        first = 0
        if self.kind == "random":
            first = int(torch.randint(places, (), generator=Generator().manual_seed(self.number)))
        elif self.kind == "sliding":
            first = self.number % places
        return range(first, first + self.size)


class Sampler:
    """A sampler of trajectories of a pipeline, on its own weights; each text is encoded once.

    call       arguments of the pipeline's own call, equal for all rows; prompts and seeds come with the rows
    eta        η of every step, above 0 and at most 1
    storage    dtype of stored latents
    prepared   trained denoisers by name, as prepared by accelerate, called in place of the pipeline's own
    precision  precision of the denoiser: float32, whatever its weights and autocast are, since log-ratios in half
               precision are mostly rounding; or the model's own
    autocast   whether `prepared` enters an autocast to half precision
    dynamics   the law of the noise; with any other than ddim, `eta` is the noise level a
    conditions  further arguments of the call by prompt, like a source image; rows of one prompt are one batch, rows of
               several prompts have a call each, in lock step
    prompt_prefix  text before every prompt whose embedding is trained: prompts are then encoded in every run

    Raises InputError for a scheduler whose noise levels are unknown or do not fit the dynamics.
    """

    def __init__(
        self,
        pipe: Any,
        call: Mapping[str, Any],
        eta: float = 1.0,
        storage: torch.dtype = torch.float32,
        prepared: Mapping[str, Callable[..., Any]] | None = None,
        precision: Precision = "float32",
        autocast: bool = False,
        dynamics: Dynamics = "ddim",
        conditions: Mapping[str, Mapping[str, Any]] | None = None,
        prompt_prefix: str = "",
    ) -> None:
        if not 0 < eta <= 1:
            raise InputError(f"eta must be above 0 and at most 1, got {eta}: steps without noise have no density")
        check_verified(scheduler_of(pipe))
        unknown = [name for name in call if name not in filter_call_kwargs(pipe, call)]
        if unknown:
            raise InputError(f"{type(pipe).__name__} takes no argument {unknown[0]!r}")
        check_dynamics(pipe.scheduler, dynamics)
        self.eta, self.storage, self._call, self.dynamics = eta, storage, dict(call), dynamics
        denoisers = [getattr(pipe, name) for name in denoisers_in(pipe)]
        self.several = len(denoisers) > 1  # a step calls one of them, maybe an untrained one
        self._precision_context = in_float32(denoisers, autocast) if precision == "float32" else nullcontext
        self._gate = _DenoiserGate(self._precision_context)
        self._conditions = conditions or {}
        self._form = 0  # number of the form of a call for several rows, see `RowsCall`
        quiet = without_side_effects(pipe)
        if prompt_prefix:  # a cached encoding would be stale after an update, and has no gradients
            vars(quiet)["encode_prompt"] = encode_with_prefix(pipe.encode_prompt, prompt_prefix)
        self._pipe = with_components(differentiable_images(quiet), self._gate.around(pipe, prepared or {}))

    def rollout(self, rows: Rows, window: StepWindow | None = None) -> tuple[Trajectories, Tensor]:
        """Draw the rows as one batch; also return their images (N, 3, H, W) or videos (N, F, 3, H, W), in [0, 1].

        x_s is rounded through model and storage dtype before its density is evaluated, so that a replay reproduces it.

        window  the steps with noise; None: all
        """
        latents, log_probs, stochastic = [], [], []

        def draw(solver_step: SolverStep) -> tuple[None, Tensor] | None:
            dtype = _latent_dtype(solver_step)
            if window is not None and solver_step.k not in window.steps(solver_step.total):
                latents.append(solver_step.ode_step().to(dtype).to(self.storage).cpu())
                return None, latents[-1].to(solver_step.prev.device, dtype)
            kernel = solver_step.exact_kernel(self.eta, self.dynamics)
            x_s = solver_step.prev.to(dtype)
            if noisy := bool(kernel.std > 0):
                stochastic.append(solver_step.k)
                x_s, step_log_probs = kernel.draw(self._noise(rows, solver_step.k, solver_step.x), dtype, self.storage)
                log_probs.append(step_log_probs.cpu())
            latents.append(x_s.to(self.storage).cpu())
            return (None, x_s) if noisy or dtype != solver_step.prev.dtype else None

        with torch.no_grad():
            images = self._run(rows, draw)
        if not stochastic:
            raise InputError("no step of this run has noise: there is nothing to learn. Use more steps")
        trajectories = Trajectories(rows, torch.stack(latents, 1), tuple(stochastic), torch.stack(log_probs, 1))
        return trajectories, as_scored(images)

    def ode_images(self, rows: Rows) -> Tensor:
        """Return the images of the rows by steps of the ODE alone, shaped as by `rollout`."""

        def step(solver_step: SolverStep) -> tuple[None, Tensor]:
            return None, solver_step.ode_step().to(_latent_dtype(solver_step))

        with torch.no_grad():
            return as_scored(self._run(rows, step))

    def replay(
        self, stored: Trajectories, at: ReplayCallback, only: Collection[int] | None = None, grad: bool = False
    ) -> None:
        """Call `at(t, kernel, x_s)` for each stochastic step t = 0 … T − 1: p(· | x_t) by the current weights, and x_s.

        With `grad` the kernel's mean (N, …) has a graph, freed before the next step unless the callback keeps it.

        only  the steps t to visit; for others the denoiser is not called
        """
        wanted = {k: t for t, k in enumerate(stored.stochastic) if only is None or t in only}

        def force(solver_step: SolverStep) -> tuple[None, Tensor]:
            x_s = stored.latents[:, solver_step.k].to(solver_step.prev.device, _latent_dtype(solver_step))
            if solver_step.k in wanted:
                with self._precision_context():  # its backward pass may recompute blocks of the denoiser
                    at(wanted[solver_step.k], solver_step.exact_kernel(self.eta, self.dynamics), x_s)
            self._gate.open = solver_step.k + 1 in wanted
            return None, x_s

        with self._gate.run(0 in wanted), torch.set_grad_enabled(grad):
            self._run(stored.rows, force, decode=False)

    def finish(self, stored: Trajectories, last: int) -> Tensor:
        """Resample the last `last` solver steps by the current weights, with the stored noise, and keep the graph.

        No density is computed: the denoiser is evaluated in the precision of the model. The run starts at the stored
        latents before these steps; the denoiser is not called for earlier steps. Returns images (N, 3, H, W) or videos
        (N, F, 3, H, W), in [0, 1].
        """
        first = stored.latents.shape[1] - last

        def resample_tail(solver_step: SolverStep) -> tuple[None, Tensor]:
            self._gate.open = solver_step.k + 1 >= first
            if solver_step.k < first:
                return None, stored.latents[:, solver_step.k].to(solver_step.prev)
            kernel = solver_step.kernel(self.eta, dynamics=self.dynamics)
            if solver_step.k not in stored.stochastic:
                return None, kernel.mean
            return None, kernel.mean + kernel.std * self._noise(stored.rows, solver_step.k, kernel.mean)

        with self._gate.run(first == 0, nullcontext), torch.enable_grad():
            return self._run(stored.rows, resample_tail).float()

    def sample(self, rows: Rows, denoise: bool = True) -> tuple[Trajectories, Tensor]:
        """Sample the rows by the pipeline's own solver as one batch; return clean latents, and images like `rollout`.

        The trajectories hold only the clean latents (N, 1, …), zeros as log-probabilities, and as `stochastic` the
        steps whose noise levels `noised` can use: all but a first step that is far from pure noise.

        denoise  False: predict zeros without calling the denoiser, for the shapes alone
        """
        latents, usable = list[Tensor](), list[int]()

        def keep(solver_step: SolverStep) -> None:
            before = step_levels(solver_step.scheduler, solver_step.t, solver_step.index)[0]
            if solver_step.k > 0 or before.alpha / before.sigma <= MAX_START_SIGNAL:
                usable.append(solver_step.k)
            latents[:] = [solver_step.prev.to(self.storage).cpu()]

        with self._gate.run(denoise), torch.no_grad():
            images = self._run(rows, keep)
        stored = Trajectories(rows, latents[0][:, None], tuple(usable), torch.zeros(len(rows), len(usable)))
        return stored, as_scored(images)

    def decode(self, stored: Trajectories) -> Tensor:
        """Return the images (N, 3, H, W) in [0, 1] of the last stored latents, without calling the denoiser."""

        def force(solver_step: SolverStep) -> tuple[None, Tensor]:
            return None, stored.latents[:, -1].to(solver_step.prev)

        with self._gate.run(False), torch.no_grad():
            return as_scored(self._run(stored.rows, force))

    def noised(
        self, stored: Trajectories, at: NoisyCallback, only: Collection[int] | None = None, grad: bool = False
    ) -> None:
        """Call `at(t, solver_step, x0)` for each usable step t, with the denoiser evaluated at x_t = α_t x0 + σ_t ε.

        ε depends on the seed of a row's noise and on the step, not on the noise that drew x0. A first step is at the
        pipeline's own start, as in sampling. With `grad` the output of the denoiser has a graph, as in `replay`.

        only  the steps t to visit; for others the denoiser is not called
        """
        wanted = {k: t for t, k in enumerate(stored.stochastic) if only is None or t in only}
        fresh = tuple(derived_seed(seed, "forward start") for seed in stored.rows.noises)

        def force(solver_step: SolverStep) -> tuple[None, Tensor]:
            x0 = stored.latents[:, -1].to(solver_step.x.device, torch.float32)
            if solver_step.k in wanted:
                with self._precision_context():
                    at(wanted[solver_step.k], solver_step, x0)
            self._gate.open = solver_step.k + 1 in wanted
            alpha, sigma = step_levels(solver_step.scheduler, solver_step.t, solver_step.index)[1]
            noise = self._noise(stored.rows, solver_step.k + 1, x0, "forward")
            return None, (alpha.to(x0) * x0 + sigma.to(x0) * noise).to(_latent_dtype(solver_step))

        with self._gate.run(0 in wanted), torch.set_grad_enabled(grad):
            self._run(replace(stored.rows, starts=fresh), force, decode=False)

    def _noise(self, rows: Rows, k: int, like: Tensor, stream: str = "step") -> Tensor:
        return seeded_normal(rows.noises, torch.empty_like(like, dtype=torch.float32), [f"{stream} {k}"] * len(rows))

    def _run(self, rows: Rows, on_step: Callable[[SolverStep], Any], decode: bool = True) -> Tensor:
        """Run the pipeline; without `decode` only to the last solver step, since not all pipelines return latents."""
        generators = [Generator().manual_seed(seed) for seed in rows.starts]
        call = self._rows_call(rows)
        call.start_at(self._form)
        given = {"generator": generators, "output_type": "pt"}
        try:
            return call.run(self._pipe, on_step if decode else _stopping(on_step), given, grad=False)
        except RunEnded:
            return torch.empty(0)
        finally:
            self._form = call.place

    def _rows_call(self, rows: Rows) -> RowsCall:
        prompt = {"prompt": list(rows.prompts)} if takes_prompts(self._pipe) else {}
        each = [self._conditions.get(text, NO_CONDITION) for text in rows.prompts]
        alike = all(one is each[0] for one in each)
        call = self._call | prompt | dict(each[0] if alike else {})
        return RowsCall(self._pipe, call, len(rows), 1, one_condition=True, each=None if alike else each)


NO_CONDITION: Mapping[str, Any] = {}


def _stopping(on_step: Callable[[SolverStep], Any]) -> Callable[[SolverStep], Any]:
    def step(solver_step: SolverStep) -> Any:
        override = on_step(solver_step)
        if solver_step.k + 1 >= solver_step.total:
            raise RunEnded
        return override

    return step


def _latent_dtype(solver_step: SolverStep) -> torch.dtype:
    """Return the dtype of the latents: half precision is kept where the denoiser's output is float32."""
    return solver_step.x.dtype if solver_step.x.dtype in HALF else solver_step.prev.dtype


def takes_prompts(pipe: Any) -> bool:
    """Return whether a pipeline's call takes a prompt; an unconditional pipeline takes a batch size instead."""
    return "prompt" in filter_call_kwargs(pipe, {"prompt": None})


class _DenoiserGate:
    """A gate around a pipeline's denoisers: while it is closed, they return zeros without computing anything.

    precision_context  the precision of the calls
    """

    def __init__(self, precision_context: Callable[[], AbstractContextManager[None]]) -> None:
        self.open, self.precision_context = True, precision_context
        self._shapes = OutputShapes()

    @contextmanager
    def run(
        self, is_open: bool, precision_context: Callable[[], AbstractContextManager[None]] | None = None
    ) -> Iterator[None]:
        """Begin a run with the gate open or closed, with another precision if given; open the gate at the end."""
        before = self.precision_context
        self.open, self.precision_context = is_open, precision_context or before
        try:
            yield
        finally:
            self.open, self.precision_context = True, before

    def around(self, pipe: Any, prepared: Mapping[str, Callable[..., Any]]) -> dict[str, ModuleProxy]:
        gated = {}
        for name, module in denoising_modules(pipe).items():
            call = _in_dtype_of(module, prepared[name]) if name in prepared else module
            gated[name] = ModuleProxy(module, self._guarded(name, call))
        return gated

    def _guarded(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            if not self.open:
                return self._shapes.zeros(name, call, *args, **kwargs)
            with self.precision_context():
                return self._shapes.call(name, call, *args, **kwargs)

        return guarded


def _in_dtype_of(module: Any, prepared: Callable[..., Any]) -> Callable[..., Any]:
    """Cast the fp32 output of a prepared denoiser to the module's dtype, which latents and decoder expect."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return tree_map_only(Tensor, lambda value: value.to(module.dtype), prepared(*args, **kwargs))

    return call


def log_probs(sampler: Sampler, stored: Trajectories, only: Collection[int] | None = None) -> Tensor:
    """Return log p(x_s | x_t) (N, T) of stored steps by the current weights, without a graph; omitted steps are 0."""
    outputs = torch.zeros_like(stored.log_probs)

    def keep(t: int, kernel: Kernel, x_s: Tensor) -> None:
        outputs[:, t] = kernel.log_prob(x_s).cpu()

    sampler.replay(stored, keep, only)
    return outputs
