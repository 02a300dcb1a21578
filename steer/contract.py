"""What a reward is, and the contract that every call is held to."""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from steer.background import Modes
from steer.errors import InputError

CPU = torch.device("cpu")  # where scores are


class RewardError(InputError):
    """A reward that is not there, or that broke its contract."""


@runtime_checkable
class Reward(Protocol):
    """Scores images; higher is better.

    `__call__(images, prompts)` takes images (N, 3, H, W) in [0, 1] and one prompt per image and returns
    (N,) fp32. `differentiable` says whether gradients flow back to the images.
    """

    @property
    def name(self) -> str: ...

    @property
    def differentiable(self) -> bool: ...

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor: ...


@runtime_checkable
class Composite(Reward, Protocol):
    """A reward made of others: `parts` are their scores, each (N,), by name; `total` makes its own score of them."""

    def parts(self, images: Tensor, prompts: Sequence[str]) -> Mapping[str, Tensor]: ...

    def total(self, parts: Mapping[str, Tensor], prompts: Sequence[str]) -> Tensor: ...


def score(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Calls a reward and checks what it returns: (N,) floats, all finite; on the CPU in fp32, gradients kept.

    Raises RewardError, which names the reward, where it raises or breaks the contract.
    """
    _paired(images, prompts)
    return _checked(reward.name, prompts, _called(reward.name, lambda: reward(images, prompts)))


def score_parts(reward: Reward, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """The score, as `score` gives it, and those of its parts by name; a reward without parts has none."""
    if not isinstance(reward, Composite):
        return score(reward, images, prompts), {}
    _paired(images, prompts)
    found = _called(reward.name, lambda: dict(reward.parts(images, prompts)))
    parts = {name: _checked(f"{reward.name}/{name}", prompts, scores) for name, scores in found.items()}
    total = _called(reward.name, lambda: reward.total(parts, prompts))
    return _checked(reward.name, prompts, total), parts


def _paired(images: Tensor, prompts: Sequence[str]) -> None:
    if isinstance(prompts, str):
        raise RewardError(f"a reward takes a list of prompts, one an image, got one text: {prompts[:40]!r}")
    if len(images) != len(prompts):
        raise RewardError(f"a reward takes one prompt an image, got {len(prompts)} prompts and {len(images)} images")


def _called(name: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except RewardError:
        raise
    except Exception as error:  # foreign code: whatever it raises is reported as the reward's failure
        told = " ".join(str(error).split())
        raise RewardError(f"reward {name!r} failed: {type(error).__name__}: {told}") from error


def _checked(name: str, prompts: Sequence[str], scores: Any) -> Tensor:
    if not torch.is_tensor(scores) or tuple(scores.shape) != (len(prompts),):
        got = tuple(scores.shape) if torch.is_tensor(scores) else type(scores).__name__
        raise RewardError(f"reward {name!r} must return a tensor of shape ({len(prompts)},), got {got}")
    if not scores.is_floating_point():
        raise RewardError(f"reward {name!r} must return floats, got {scores.dtype}")
    if scores.layout != torch.strided or scores.is_meta:
        raise RewardError(
            f"reward {name!r} must return a dense tensor with values, got {scores.layout}, {scores.device}"
        )
    single = scores.float()  # where a large fp64 number becomes infinite
    if not single.isfinite().all():
        row = int((~single.isfinite()).nonzero()[0])
        raise RewardError(
            f"reward {name!r} returned {scores[row].item()} for image {row}, prompt {prompts[row]!r}: "
            "rewards must be finite in fp32"
        )
    return single.cpu()


class TimedCall(threading.Thread):
    """The thread of one call that has a limit."""


def calls_left_behind() -> bool:
    """Whether a call that took too long is still going on in this process.

    Then the interpreter must not be shut down: Python (before 3.14) ends such a thread inside PyTorch's C++, which
    aborts the process. `os._exit` is the way out, as the command line takes it.
    """
    return any(isinstance(thread, TimedCall) for thread in threading.enumerate())


class Timed:
    """A reward whose calls may take at most so many seconds.

    Each call runs in a thread of its own. Python cannot end a thread: one that hangs is left behind, and ends
    with the process, see `calls_left_behind`. Raises RewardError, which names the reward, where the time is up.
    """

    def __init__(self, reward: Reward, seconds: float) -> None:
        if not seconds > 0:
            raise RewardError(f"the timeout of reward {reward.name!r} must be above 0 seconds, got {seconds}")
        self.name, self.differentiable = reward.name, reward.differentiable
        self._reward, self._seconds = reward, seconds

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._in_time(lambda: self._reward(images, prompts), images.device)

    def _in_time(self, call: Callable[[], Any], device: torch.device) -> Any:
        outcome: dict[str, Any] = {}
        modes = Modes(device)

        def run() -> None:
            try:
                with modes():
                    outcome["value"] = call()
            except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
                outcome["error"] = error

        thread = TimedCall(target=run, name=f"reward {self.name}", daemon=True)
        thread.start()
        thread.join(min(self._seconds, threading.TIMEOUT_MAX))
        if thread.is_alive():
            raise RewardError(
                f"reward {self.name!r} took longer than its {self._seconds:g} s: give it more, or mend it"
            )
        if "error" in outcome:
            raise outcome["error"]
        return outcome["value"]


class TimedComposite(Timed):
    """The same for a reward made of others, which go on being reported one by one."""

    def __init__(self, reward: Composite, seconds: float) -> None:
        super().__init__(reward, seconds)
        self._composite = reward

    def parts(self, images: Tensor, prompts: Sequence[str]) -> Mapping[str, Tensor]:
        return self._in_time(lambda: self._composite.parts(images, prompts), images.device)

    def total(self, parts: Mapping[str, Tensor], prompts: Sequence[str]) -> Tensor:
        return self._in_time(lambda: self._composite.total(parts, prompts), CPU)


def with_timeout(reward: Reward, seconds: float | None) -> Reward:
    """The reward with a limit in seconds on every call; None: no limit."""
    if seconds is None:
        return reward
    return TimedComposite(reward, seconds) if isinstance(reward, Composite) else Timed(reward, seconds)
