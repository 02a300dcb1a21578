"""One call of a pipeline for each particle, in lock step: all wait at each solver step for one joint decision.

For pipelines that cannot make several images in one call. The calls run in threads that take turns: one at a time.
"""

import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack

from steer.diffusion.preview import first_output
from steer.diffusion.step_hooks import HOOKED, Continue, OnStep, SolverStep, StepOverride, hook_steps, memories_of
from steer.errors import UnsupportedPipelineError
from steer.reward import ThreadContext


class _Stopped(BaseException):
    """Exception that ends a particle's call after the call of another particle has failed."""


class _Turn:
    """The call of one particle in a thread of its own, which runs only between `resume` and its next solver step."""

    def __init__(self, call: Callable[[OnStep], Tensor], device: torch.device) -> None:
        self._resumed, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._call, self._context = call, ThreadContext(device)
        self._modes = _get_current_function_mode_stack()  # modes that replace draws apply to one thread
        self.step: SolverStep | None = None
        self.override: StepOverride | Continue | None = None
        self.images: Tensor | None = None
        self.error: BaseException | None = None
        self._stop = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def resume(self) -> None:
        """Run up to the next solver step, or to the end. Raises the error of the call."""
        self.step = None
        self._resumed.release()
        self._paused.acquire()
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        """End the call, wherever it is."""
        self._stop = True
        self._resumed.release()
        self._thread.join()

    def _run(self) -> None:
        self._resumed.acquire()
        try:
            if not self._stop:
                with ExitStack() as stack:
                    for mode in self._modes:
                        stack.enter_context(mode)
                    stack.enter_context(self._context())
                    self.images = self._call(self._at_step)
        except BaseException as error:  # noqa: BLE001  # raised again by `resume`, in the caller's thread
            self.error = error
        self._paused.release()

    def _at_step(self, solver_step: SolverStep) -> StepOverride | Continue | None:
        self.step = solver_step
        self._paused.release()
        self._resumed.acquire()
        if self._stop:
            raise _Stopped
        return self.override


def run_in_lock_step(pipe: Any, calls: Sequence[Mapping[str, Any]], on_step: OnStep, grad: bool) -> Tensor:
    """Run one call for each particle; `on_step` receives the solver steps of all as one step, and overrides it.

    Returns the images (N, …). Raises UnsupportedPipelineError where the calls differ in their steps or shapes.
    """

    def caller(call: Mapping[str, Any]) -> Callable[[OnStep], Tensor]:
        def run(at_step: OnStep) -> Tensor:
            with hook_steps(pipe, at_step, grad=grad) as view:
                return first_output(view(**call))

        return run

    turns = [_Turn(caller(call), pipe.device) for call in calls]
    try:
        while True:
            for turn in turns:
                turn.resume()
            if all(turn.images is not None for turn in turns):
                return torch.cat([_with_rows(turn.images) for turn in turns])
            _decide(pipe, turns, on_step)
    finally:
        for turn in turns:
            turn.stop()


def _with_rows(images: Tensor | None) -> Tensor:
    assert images is not None
    return images if len(images) == 1 else images[None]


def _decide(pipe: Any, turns: Sequence[_Turn], on_step: OnStep) -> None:
    """Join the steps of all particles, and give each its part of the override."""
    steps = [turn.step for turn in turns if turn.step is not None]
    if len(steps) < len(turns) or len({(one.k, one.total, one.x.shape) for one in steps}) > 1:
        raise UnsupportedPipelineError(
            f"{type(pipe).__name__} takes other steps or sizes for other particles: steer one particle a call"
        )
    joint = joined_step(steps)
    override = on_step(joint) or (None, None)
    if isinstance(override, Continue):
        raise TypeError("a joint step is overridden by ancestors and latents")
    ancestors, latents = override
    prevs = [one.prev for one in steps]
    if ancestors is not None:
        rows = ancestors.tolist()
        memories = [memories_of(one.scheduler) for one in steps]
        states = [[_state(memory) for memory in own] for own in memories]
        for own, row in zip(memories, rows, strict=True):
            for memory, state in zip(own, states[row], strict=True):
                vars(memory).update(copy.deepcopy(state))
        prevs = [prevs[row] for row in rows]
    for place, turn in enumerate(turns):
        if latents is not None:
            turn.override = None, latents[place].reshape(prevs[place].shape)
        else:
            turn.override = None if ancestors is None else Continue(prevs[place])


def _state(memory: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(memory).items() if name not in HOOKED}


def joined_step(steps: Sequence[SolverStep]) -> SolverStep:
    """Join the solver steps of several one-particle calls into one step of all particles."""
    first = steps[0]

    def joined(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(tensors)) if first.x.shape[0] == 1 else torch.stack(list(tensors))

    joint = SolverStep(
        first.k,
        first.t,
        joined([one.x for one in steps]),
        first.scheduler,
        first.index,
        joined([one.output for one in steps]),
        calls=first.calls,
        own_x0=None if first.own_x0 is None else joined([one.own_x0 for one in steps if one.own_x0 is not None]),
    )
    joint.prev, joint.total = joined([one.prev for one in steps]), first.total
    return joint
