"""Events of a running training: calls of callbacks, and signals that end the run."""

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from steer.errors import InputError
from steer.pipelines.training.config import TrainingConfig
from steer.pipelines.training.distributed import AccelerateContext
from steer.pipelines.training.state import RunState

EVENTS = ("on_train_begin", "on_step_end", "on_log", "on_evaluate", "on_save", "on_train_end")
TRACKERS = {"Wandb": "wandb", "Trackio": "trackio", "Comet": "comet_ml", "MLflow": "mlflow", "SwanLab": "swanlab"}
# Callbacks of transformers that read arguments of its own loop, and what does the same here.
REPLACEMENTS = {
    "EarlyStoppingCallback": "set early_stopping_patience in the configuration, with eval_prompts and eval_rewards",
    "DefaultFlowCallback": "set eval_steps and save_steps in the configuration",
    **{f"{name}Callback": f"set log_with=({tracker!r},) in the configuration" for name, tracker in TRACKERS.items()},
}
INTEGRATIONS = "transformers.integrations."  # trackers, which read a transformers configuration from the model


def read_callbacks(callbacks: Sequence[Any]) -> tuple[Any, ...]:
    """Return the callbacks, each class among them called without arguments, as transformers does.

    Raises InputError for an object without any of EVENTS, and for a callback of transformers in REPLACEMENTS.
    """
    if not isinstance(callbacks, Iterable) or isinstance(callbacks, str):
        raise InputError(f"callbacks must be a list, got {callbacks!r:.60}: write callbacks=[…]")
    for one in callbacks:
        kind = one if isinstance(one, type) else type(one)
        own = [base.__name__ for base in kind.__mro__ if base.__module__.startswith("transformers.")]
        if replaced := [name for name in own if name in REPLACEMENTS]:
            raise InputError(f"callbacks: {replaced[0]} is for transformers' Trainer: {REPLACEMENTS[replaced[0]]}")
        if not any(hasattr(one, event) for event in EVENTS):
            raise InputError(f"callbacks: {one!r:.60} has none of the methods {', '.join(EVENTS)}")
    return tuple(one() if isinstance(one, type) else one for one in callbacks)


def _is_integration(callback: Any) -> bool:
    return any(base.__module__.startswith(INTEGRATIONS) for base in type(callback).__mro__)


class Events:
    """The events of transformers' callbacks, with transformers' TrainerState and TrainerControl.

    These classes are imported only if there are callbacks, because they load much of transformers.
    """

    def __init__(
        self, callbacks: Sequence[Any], config: TrainingConfig, state: RunState, context: AccelerateContext
    ) -> None:
        self.callbacks, self.config, self.state, self.context = callbacks, config, state, context
        if callbacks:
            from transformers import TrainerControl, TrainerState

            self.control: Any = TrainerControl()
            self.trainer_state = TrainerState(
                max_steps=config.max_steps,
                eval_steps=config.eval_steps,
                save_steps=config.save_steps,
                train_batch_size=config.train_batch_size,
                is_local_process_zero=context.is_main_process,
                is_world_process_zero=context.is_main_process,
            )

    def call(self, event: str, **details: Any) -> None:
        """Call one event of every callback; `details` are further keyword arguments."""
        if not self.callbacks:
            return
        state = self.trainer_state
        state.global_step, state.log_history = self.state.step, self.state.records
        state.best_global_step = self.state.early_stopping.best_step
        model = {"model": self.state.trainable.denoiser}
        for callback in self.callbacks:
            if (function := getattr(callback, event, None)) is not None:
                given = details if _is_integration(callback) else details | model
                self.control = function(self.config, state, self.control, **given) or self.control

    def asked(self, name: str) -> bool:
        """Whether a callback of any process set this field of the TrainerControl; unset the field."""
        if not self.callbacks:
            return False
        asked = self.context.any(bool(getattr(self.control, name)))
        setattr(self.control, name, False)
        return asked


SIGNALS = (signal.SIGINT, signal.SIGTERM)
SIGNAL_INTERVAL = 1.0  # seconds within which repeated signals are one request


class Stopped(Exception):
    """Exception that ends a run at a point from which it can resume."""


class StopRequest:
    """A request to end the run.

    any_process  whether any process of the run has the request, as a signal reaches each process at another time
    """

    def __init__(self, any_process: Callable[[bool], bool] = bool) -> None:
        self.requested, self._agreed, self._first = False, any_process, 0.0

    def check(self) -> None:
        """Raise Stopped once the end is requested."""
        if self._agreed(self.requested):
            raise Stopped

    def check_own(self) -> None:
        """Raise Stopped once the end of this process is requested; other processes need not call this method."""
        if self.requested:
            raise Stopped

    def _request(self, number: int, frame: FrameType | None) -> None:
        # A second Ctrl-C ends the run at once. Launchers send signals twice, but not so far apart.
        if self.requested and number == signal.SIGINT and time.monotonic() - self._first > SIGNAL_INTERVAL:
            raise KeyboardInterrupt
        if not self.requested:
            self.requested, self._first = True, time.monotonic()


@contextmanager
def stop_request(any_process: Callable[[bool], bool] = bool) -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM of the main thread into a request while the block runs."""
    request = StopRequest(any_process)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request._request) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set by Python
