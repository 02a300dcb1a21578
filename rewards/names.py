"""Names of rewards: the built-in table, entry points of plugins, module:attribute."""

import inspect
import math
import re
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from steer.errors import InputError
from steer.registry import did_you_mean
from steer.reward import (
    METADATA_PARAMETERS,
    Metadata,
    Reward,
    RewardError,
    RewardProxy,
    _validated_scores,
    attribute,
    evaluate,
    parameters_of,
)
from steer.rewards import REWARDS
from steer.rewards.inputs import takes_any_samples


class _FunctionReward(RewardProxy):
    """A reward from a function or another callable; gradients flow if its attribute `differentiable` is true."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self._function = _in_standard_order(function)
        name = attribute(function, "name", None)
        self.name = name if isinstance(name, str) else attribute(function, "__name__", type(function).__name__)
        self.differentiable = bool(attribute(function, "differentiable", False))

    @takes_any_samples
    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None = None) -> Tensor:
        return _validated_scores(self.name, prompts, evaluate(self._function, images, prompts, metadata))


ARGUMENTS = ("images", "prompts")
LISTED = "`steer rewards` lists the names"


def _in_standard_order(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that is called as (images, prompts, …), whatever the order of these two parameters.

    A function with these parameters in another order, as keyword-only parameters or in **kwargs, or with only one of
    them, is called by keyword; a function of one parameter with another name is called with the images. Any other
    function is returned as it is.
    """
    by_name = parameters_of(function)
    if by_name is None:
        return function
    parameters = by_name.values()
    positional = [one.name for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    any_keyword = any(one.kind is one.VAR_KEYWORD for one in parameters)
    by_keyword = [name for name in ARGUMENTS if name in by_name or any_keyword]
    swapped = positional[:1] == ["prompts"] or positional[1:2] == ["images"]
    two = len(positional) > 1 or any(one.kind is one.VAR_POSITIONAL for one in parameters)
    if two and not swapped:
        return function

    def call(images: Any, prompts: Any, **rest: Any) -> Any:
        given = {"images": images, "prompts": prompts}
        return function(**{name: given[name] for name in by_keyword}, **rest) if by_keyword else function(images)

    standard = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ARGUMENTS]
    standard = [by_name.get(one.name, one).replace(kind=one.kind, default=one.empty) for one in standard]
    others = [one.replace(kind=one.KEYWORD_ONLY) for one in parameters if one.name in METADATA_PARAMETERS]
    others += [one for one in parameters if one.kind is one.VAR_KEYWORD]
    wrapped: Any = call
    wrapped.__signature__ = inspect.Signature([*standard, *others])
    wrapped.__name__ = attribute(function, "__name__", type(function).__name__)
    wrapped.images, wrapped.differentiable = (attribute(function, name, None) for name in ("images", "differentiable"))
    return call


def reward_names() -> dict[str, str]:
    """Return all named rewards, built in or from entry points `steer.rewards`: name → one line about it.

    Reads tables only: it imports no reward, and no torch beyond the imports of this module.
    """
    plugins = {point.name: f"{point.value} (plugin)" for point in entry_points(group="steer.rewards")}
    return plugins | {name: about for name, (_, about) in REWARDS.items()}


def registered_name(name: str) -> str | None:
    """Return the named reward of a name: itself, or the only one that differs from it in case alone; None: no such."""
    names = reward_names()
    alike = [name] if name in names else [one for one in names if one.casefold() == name.casefold()]
    return alike[0] if len(alike) == 1 else None


def make_reward(atom: str) -> Reward:
    """Make the reward of one NAME[:ARGUMENT][,option=value…].

    NAME is looked up among the built-in rewards, then the entry points `steer.rewards`, both in any case where that is
    unambiguous, then as module:attribute.
    """
    name, _, argument = atom.strip().partition(":")
    factory = _factory(name)
    if factory is not None:
        return _as_reward(_make(factory, name, argument))
    if argument and ("." in name or (name.isidentifier() and _is_module(name))):
        return _as_reward(_attribute(f"{name}:{argument}"))
    raise RewardError(f"unknown reward {atom!r}: {did_you_mean(name, reward_names(), LISTED)}")


def takes_number(name: str) -> bool:
    """Return whether a number after NAME: is the reward's own argument (`takes_number = True`), not a weight."""
    return bool(getattr(_factory(name), "takes_number", False))


def option_number(name: str, given: str | float, above: float = -math.inf) -> float:
    """Read an option of a reward as a finite number above a bound. Raises RewardError."""
    try:
        number = float(given)
    except ValueError:
        number = math.nan
    if not above < number < math.inf:
        raise RewardError(f"{name}={given}: use a number" + (f" above {above:g}" if math.isfinite(above) else ""))
    return number


def option_count(name: str, given: str | int) -> int:
    """Read an option of a reward as a whole number of at least 1. Raises RewardError."""
    if not str(given).isdecimal() or int(given) < 1:
        raise RewardError(f"{name}={given}: use a positive integer")
    return int(given)


def _factory(name: str) -> Any:
    """Return the factory of a named reward, or None."""
    known = name if name in REWARDS else registered_name(name)
    if known in REWARDS:
        return _attribute(REWARDS[known][0])
    return next((_attribute(point.value) for point in entry_points(group="steer.rewards") if point.name == known), None)


def _is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ValueError:  # __main__ has none
        return False


def _attribute(path: str) -> Any:
    module, _, attribute = path.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except Exception as error:  # third-party code: its import may raise anything
        raise RewardError(f"cannot load reward {path!r}: {type(error).__name__}: {error}") from error


def _make(factory: Callable[..., Any], name: str, argument: str) -> Any:
    positional, options = _arguments(argument)
    try:
        inspect.signature(factory).bind(*positional, **options)
    except ValueError as error:  # C code may have no signature
        raise RewardError(f"reward {name!r} cannot be made: {error}") from error
    except TypeError as error:
        wrong = f"cannot take {argument!r} ({error})" if options else None
        wrong = wrong or (f"takes no argument, got {argument!r}" if positional else "needs an argument, NAME:ARGUMENT")
        raise RewardError(f"reward {name!r} {wrong}") from error
    try:
        return factory(*positional, **options)
    except RewardError:
        raise
    except InputError as error:
        raise RewardError(f"reward {name!r}: {error}") from error
    except Exception as error:  # third-party code: its construction may raise anything
        raise RewardError(f"reward {name!r} cannot be made: {type(error).__name__}: {error}") from error


def _arguments(argument: str) -> tuple[tuple[str, ...], dict[str, str]]:
    """Split the text after the colon: "A,b=c" → (("A",), {"b": "c"}). A comma separates only before option=."""
    first, *rest = re.split(r",(?=[a-z_]+=)", argument)
    named = [first, *rest] if re.match(r"[a-z_]+=", first) else rest
    positional = () if first in named or not first else (first,)
    check_given_once([option.partition("=")[0] for option in named])
    return positional, dict(option.split("=", 1) for option in named)


def check_given_once(options: Sequence[str]) -> None:
    """Raise RewardError for a repeated option of a reward."""
    if repeated := [name for name in options if options.count(name) > 1]:
        raise RewardError(f"{repeated[0]}= is given {options.count(repeated[0])} times: give it once")


def _as_reward(made: Any) -> Reward:
    if isinstance(made, type):
        made = _make(made, made.__name__, "")
    if isinstance(made, Reward) and _in_standard_order(made) is made:
        return made
    if callable(made):
        return _FunctionReward(made)
    raise RewardError(f"a reward is a callable (images, prompts) → scores or a name, got {type(made).__name__}")
