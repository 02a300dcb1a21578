"""What a reward is, how one is found by name, and the contract that every call is held to."""

import inspect
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from steer.choices import nearest
from steer.errors import InputError

BUILT_IN = "steer.rewards"  # the package whose REWARDS table names the built-in ones


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


class _Named:
    """A plain function as a reward."""

    differentiable = False

    def __init__(self, function: Callable[[Tensor, Sequence[str]], Tensor]) -> None:
        self._function = function
        self.name = getattr(function, "__name__", type(function).__name__)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._function(images, prompts)


def score(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Calls a reward and checks what it returns: (N,) floats, all finite; on the CPU in fp32, gradients kept.

    Raises RewardError, which names the reward, where it raises or breaks the contract.
    """
    try:
        scores = reward(images, prompts)
    except RewardError:
        raise
    except Exception as error:  # foreign code: whatever it raises is reported as the reward's failure
        raise RewardError(f"reward {reward.name!r} failed: {type(error).__name__}: {error}") from error
    if not torch.is_tensor(scores) or tuple(scores.shape) != (len(prompts),):
        got = tuple(scores.shape) if torch.is_tensor(scores) else type(scores).__name__
        raise RewardError(f"reward {reward.name!r} must return a tensor of shape ({len(prompts)},), got {got}")
    if not scores.is_floating_point():
        raise RewardError(f"reward {reward.name!r} must return floats, got {scores.dtype}")
    if not scores.isfinite().all():
        row = int((~scores.isfinite()).nonzero()[0])
        raise RewardError(
            f"reward {reward.name!r} returned {scores[row].item()} for image {row}, prompt {prompts[row]!r}: "
            "rewards must be finite"
        )
    return scores.float().cpu()


def reward_names() -> dict[str, str]:
    """Every reward that has a name, built in or from entry points `steer.rewards`: name → one line about it.

    Reads tables only: no reward, and not torch beyond this module, is imported for it.
    """
    plugins = {point.name: f"{point.value} (plugin)" for point in entry_points(group="steer.rewards")}
    built_in = {name: about for name, (_, about) in import_module(BUILT_IN).REWARDS.items()}
    return plugins | built_in


def load_reward(reward: Any) -> Reward:
    """A Reward from a Reward, a function (images, prompts) → (N,), or a specification.

    A specification is NAME, or NAME:ARGUMENT where the reward takes one. NAME is looked up among the built-in
    rewards, then the entry points `steer.rewards`, then as module:attribute.
    Raises RewardError with the nearest names where there is none.
    """
    if not isinstance(reward, str):
        return _as_reward(reward)
    name, _, argument = reward.strip().partition(":")
    found = _find(name, argument)
    if found is None:
        near = nearest(name, reward_names())
        raise RewardError(f"unknown reward {reward!r}: did you mean {near}? `steer rewards` lists them")
    return _as_reward(found)


def _find(name: str, argument: str) -> Any:
    """The reward that a specification means, made; None where there is none."""
    built_in = import_module(BUILT_IN).REWARDS
    if name in built_in:
        return _make(_attribute(built_in[name][0]), name, argument)
    for point in entry_points(group="steer.rewards"):
        if point.name == name:
            return _make(_attribute(point.value), name, argument)
    if argument and ("." in name or (name.isidentifier() and _is_module(name))):
        return _attribute(f"{name}:{argument}")
    return None


def _is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ValueError:  # __main__ has none
        return False


def _attribute(path: str) -> Any:
    module, _, attribute = path.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except Exception as error:  # foreign code: whatever its import raises
        raise RewardError(f"cannot load reward {path!r}: {type(error).__name__}: {error}") from error


def _make(factory: Callable[..., Any], name: str, argument: str) -> Any:
    given = (argument,) if argument else ()
    try:
        inspect.signature(factory).bind(*given)
    except TypeError as error:
        wrong = f"takes no argument, got {argument!r}" if argument else "needs an argument, NAME:ARGUMENT"
        raise RewardError(f"reward {name!r} {wrong}") from error
    try:
        return factory(*given)
    except RewardError:
        raise
    except Exception as error:  # foreign code: whatever its construction raises
        raise RewardError(f"reward {name!r} cannot be made: {type(error).__name__}: {error}") from error


def _as_reward(found: Any) -> Reward:
    made = _make(found, found.__name__, "") if isinstance(found, type) else found
    if isinstance(made, Reward):
        return made
    if callable(made):
        return _Named(made)
    raise RewardError(f"a reward is a callable (images, prompts) → scores or a name, got {type(made).__name__}")
