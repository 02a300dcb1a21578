"""Look-ahead: predicted clean latents by a few more evaluations of the denoiser, through the pipeline itself.

x̂0 of a single evaluation is blurry early in a run, and its reward ranks particles badly. Φ_m(x_t) instead makes m
deterministic solver steps on a coarse grid from x_t to the end,

    x_s = α_s x̂0(x_t) + σ_s ε̂,  ε̂ = (x_t − α_t x̂0)/σ_t      (DDIM, arXiv 2010.02502, with η = 0)

The first step is free: the run has just computed x̂0(x_t). The pipeline is called again from x_t on, with a copy of its
scheduler that has the timesteps of the grid: guidance, ControlNets and conditions stay as in the user's call.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from steer.diffusion.lora_layers import enabled_adapters, lora_layers, switch_adapters
from steer.diffusion.preview import short_call
from steer.diffusion.rows import RowsCall
from steer.diffusion.schedules import Level, gaussian_transition, level
from steer.diffusion.short_schedule import at_places, transition_starts
from steer.diffusion.step_hooks import HOOKED, OnStep, RunEnded, SolverStep, StepOverride, has_second_modality
from steer.diffusion.views import (
    ModuleProxy,
    OutputShapes,
    denoising_modules,
    with_components,
    without_side_effects,
    zero_proxies,
)
from steer.errors import InputError, UnsupportedPipelineError

Adapter = Callable[[], AbstractContextManager[Any]]


class LookAhead:
    """Φ_m for one call of `pipe`: maps a solver step of the run to predicted clean latents (N, …), fp32.

    pipe         the pipeline, as in the run
    call         the run's call, which is repeated for a few steps
    steps        m, number of coarse steps from x_t to the end, at most as many as the run has left; 1 gives x̂0
    shapes       shapes of the denoisers' outputs, recorded in the run
    adapter      context that applies a few-step LoRA adapter (LCM, Turbo), which gives x̂0 in one evaluation
    evaluations  denoiser calls of all rows in the last look-ahead

    Raises UnsupportedPipelineError for pipelines whose denoisers keep state between calls, and for those with a second
    modality beside the latents.
    """

    def __init__(
        self,
        pipe: Any,
        call: RowsCall,
        steps: int,
        shapes: OutputShapes | None = None,
        adapter: Adapter | None = None,
    ) -> None:
        self._pipe, self._call, self._shapes, self.steps = without_side_effects(pipe), call, shapes, steps
        self._adapter = adapter
        self.evaluations = 0

    def at_least(self, steps: int) -> "LookAhead":
        """Return this look-ahead, or a copy with `steps` steps if it has fewer; an adapter needs only one."""
        if self._adapter is not None or self.steps >= steps:
            return self
        return LookAhead(self._pipe, self._call, steps, self._shapes)

    def __call__(self, solver_step: SolverStep) -> Tensor:
        self.evaluations = 0
        places, levels = coarse_grid(solver_step, self.steps)
        if self._adapter is not None:
            places = [places[0], places[0]]  # from x_t to x_t: the denoiser with the adapter is evaluated there
        if len(places) == 1:
            return solver_step.x0()
        _check_stateless(self._pipe, solver_step)
        pipe, silent = self._short_pipe(solver_step, places)

        def on_step(short_step: SolverStep) -> StepOverride:
            place = short_step.k
            x, x0 = (solver_step.x, solver_step.x0()) if place == 0 else (short_step.x, short_step.x0())
            self.evaluations += place > 0
            silent.clear()
            if place + 1 == len(places):
                raise RunEnded(x0)
            if self._adapter is not None:
                return None, x
            return None, gaussian_transition(x, x0, levels[place], levels[place + 1], 0.0).mean

        adapter = self._adapter or nullcontext
        with torch.no_grad(), adapter():
            x0: Tensor = self._run(pipe, on_step, len(places), "it has no look-ahead, use lookahead=1")
        return x0

    def denoise(self, solver_step: SolverStep, s: Tensor, sigma: Tensor) -> Tensor:
        """Return E[z | S] for S = z + σ ε (N, …), by one evaluation of all rows at that level, through the pipeline.

        Raises UnsupportedPipelineError for a solver without noise levels between its steps.
        """
        _check_stateless(self._pipe, solver_step)
        place = coarse_grid(solver_step, 1)[0][0]
        pipe, silent = self._short_pipe(solver_step, [place, place], float(sigma))

        def on_step(short_step: SolverStep) -> StepOverride:
            silent.clear()
            if short_step.k == 1:
                raise RunEnded(short_step.x0())
            timestep = torch.as_tensor(short_step.scheduler.timesteps)[1]
            at = level(short_step.scheduler, timestep, 1)
            _check_level(at, sigma, short_step.scheduler)
            return None, at.alpha.to(s) * s

        with torch.no_grad():
            x0: Tensor = self._run(pipe, on_step, 2, "use kernel='gaussian'")
        return x0

    def next_step(self, solver_step: SolverStep, x: Tensor) -> SolverStep:
        """Return the step after `solver_step` from latents x (N, …), by one evaluation of all rows, with its graph.

        It has x̂0 and the denoiser's output, but no latents after it. Raises UnsupportedPipelineError as `denoise` does.
        """
        _check_stateless(self._pipe, solver_step)
        places = _places_left(solver_step)[:2]
        pipe, silent = self._short_pipe(solver_step, places)

        def on_step(short_step: SolverStep) -> StepOverride:
            silent.clear()
            if short_step.k == 1:
                raise RunEnded(short_step)
            return None, x

        short: SolverStep = self._run(pipe, on_step, 2, "use reward_guidance=0")
        there = replace(short, k=solver_step.k + 1, scheduler=solver_step.scheduler, index=places[1], own_x0=short.x0())
        there.total = solver_step.total
        return there

    def _run(self, pipe: Any, on_step: OnStep, steps: int, remedy: str) -> Any:
        """Run a short pipe until `on_step` ends the run; return the value that it ends with."""
        try:
            self._call.run(pipe, on_step, {}, change=self._change)
        except RunEnded as ended:
            return ended.value
        name = type(pipe).__name__
        raise UnsupportedPipelineError(
            f"{name} makes fewer than {steps} solver steps when it is called for as many: {remedy}"
        )

    def _change(self, call: Mapping[str, Any]) -> dict[str, Any]:
        # A distilled adapter has the guidance in its weights.
        guidance = {} if self._adapter is None else {"guidance_scale": 1.0}
        return short_call(call) | guidance

    def _short_pipe(
        self, solver_step: SolverStep, places: list[int], ratio: float | None = None
    ) -> tuple[Any, list[bool]]:
        """Return a view of the pipeline for a run over `places`, and a list: while not empty, denoisers predict zeros.

        With `ratio`, the last place is moved to the level σ/α = `ratio`.
        """
        silent, view = [True], self._pipe
        zeros = zero_proxies(view, self._shapes)

        def gate(name: str, module: Any) -> ModuleProxy:
            return ModuleProxy(module, lambda *args, **kwargs: (zeros[name] if silent else module)(*args, **kwargs))

        changed: dict[str, Any] = {name: gate(name, module) for name, module in denoising_modules(view).items()}
        changed |= {"scheduler": at_places(solver_step.scheduler, places, HOOKED, ratio)}
        changed |= {"maybe_free_model_hooks": lambda: None}
        return with_components(view, changed), silent


MAX_LEVEL_ERROR = 0.1  # relative error of σ/α: timesteps may be whole numbers


def _check_level(at: Level, ratio: Tensor, scheduler: Any) -> None:
    """Raise UnsupportedPipelineError where the level of a short run is not σ/α = ratio."""
    if abs(float(at.sigma) - float(ratio * at.alpha)) > MAX_LEVEL_ERROR * float(ratio * at.alpha):
        raise UnsupportedPipelineError(
            f"{type(scheduler).__name__} has no level σ/α = {float(ratio):.3g} between its steps: use kernel='gaussian'"
        )


def coarse_steps(lookahead: int | str) -> int:
    """Return the number of coarse steps of a `lookahead` setting; an adapter takes one."""
    return 1 if isinstance(lookahead, str) else lookahead


LORA, NAME = "lora:", "steer_lookahead"


def _load_adapter(pipe: Any, path: str, modules: list[Any]) -> None:
    """Load an adapter beside the pipeline's own. Raises InputError if it cannot be read or is of another model."""
    try:
        pipe.load_lora_weights(path, adapter_name=NAME)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise InputError(f"lookahead: cannot load {path} as a LoRA adapter ({str(error)[:160]})") from error
    if not lora_layers(modules, NAME):  # diffusers ignores names that it does not know
        raise InputError(f"lookahead: {path} is an adapter of another model: no layer fits {type(pipe).__name__}")


@contextmanager
def few_step_adapter(pipe: Any, lookahead: int | str) -> Iterator[Adapter | None]:
    """Load the LoRA adapter of a `lookahead` setting "lora:PATH" beside the pipeline's own, switched off.

    Yields a context that enables it beside the adapters that are already enabled; None if the setting is a number of
    steps. The block restores the pipeline. Raises InputError for a pipeline without adapters or an unreadable file.
    """
    if not isinstance(lookahead, str):
        yield None
        return
    path, modules = lookahead.removeprefix(LORA), list(denoising_modules(pipe).values())
    if not hasattr(pipe, "load_lora_weights"):
        raise InputError(f"lookahead: {type(pipe).__name__} loads no LoRA adapters: use a number of steps")
    if not Path(path).exists() and path.count("/") != 1:
        raise InputError(
            f"lookahead: there is no {path}: give a folder or file of a LoRA adapter, or ORGANISATION/NAME"
        )
    parameters = [one for module in modules for one in module.parameters()]
    trainable = [one.requires_grad for one in parameters]
    own = enabled_adapters(modules)

    @contextmanager
    def enabled() -> Iterator[None]:
        switch_adapters(modules, {layer: [*own.get(layer, ()), NAME] for layer in lora_layers(modules, NAME)} | own)
        try:
            yield
        finally:
            switch_adapters(modules, own)

    try:
        _load_adapter(pipe, path, modules)
        switch_adapters(modules, own)
        yield enabled
    finally:
        if own:
            pipe.delete_adapters(NAME)
        else:
            pipe.unload_lora_weights()
        switch_adapters(modules, own)
        for parameter, before in zip(parameters, trainable, strict=True):
            parameter.requires_grad_(before)


def coarse_grid(solver_step: SolverStep, steps: int) -> tuple[list[int], list[Level]]:
    """Return the places of m evenly spaced transitions from this one to the end, in `timesteps`, and their levels."""
    left = _places_left(solver_step)
    count = min(steps, len(left))
    places = [left[round(place * len(left) / count)] for place in range(count)]
    timesteps = torch.as_tensor(solver_step.scheduler.timesteps)
    first = level(solver_step.scheduler, solver_step.t, solver_step.index)
    return places, [first, *(level(solver_step.scheduler, timesteps[place], place) for place in places[1:])]


def _places_left(solver_step: SolverStep) -> list[int]:
    """Return the places in `timesteps` of the transitions from this one on."""
    return transition_starts(solver_step.scheduler)[solver_step.k - solver_step.total :]


def _check_stateless(pipe: Any, solver_step: SolverStep) -> None:
    """Raise UnsupportedPipelineError where a second run inside a step would change the run itself."""
    name = type(pipe).__name__
    if has_second_modality(solver_step.scheduler):
        raise UnsupportedPipelineError(f"{name} denoises a second modality beside the latents: use lookahead=1")
    if any(getattr(module, "is_cache_enabled", False) for module in denoising_modules(pipe).values()):
        raise UnsupportedPipelineError(
            f"{name}: disable the feature cache of the denoiser, or use lookahead=1: its state is that of the run"
        )
