"""Folders written by `steer rewards train`: a card, reward.json, beside weights, for every kind of learned reward."""

import inspect
import json
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from steer.assets import REWARDS
from steer.errors import InputError
from steer.files import verify_checksums
from steer.reward import Reward, RewardError

logger = logging.getLogger(__name__)

CARD = "reward.json"
KINDS = {
    "heads": "steer.rewards.learned:Preference",
    "features": "steer.rewards.named_features:FeatureReward",
    "users": "steer.rewards.users:UserReward",
}


def preference(folder: str, **options: Any) -> Reward:
    """Open a learned reward: a folder of `steer rewards train`, or scenes, which is embedded.

    Options of a reward on CLIP features: aggregate, member, micro_batch, dtype; of a reward of users: user, like,
    aggregate, micro_batch.
    Raises RewardError for a folder without a learned reward, and for an option that its kind does not have.
    """
    module, name = KINDS[kind_of(folder)].split(":")
    made = getattr(import_module(module), name)
    try:
        inspect.signature(made).bind(folder, **options)
    except TypeError as error:
        raise RewardError(f"{folder} cannot take {', '.join(options)} ({error})") from error
    reward: Reward = made(folder, **options)
    return reward


def name_reward(name: str, folder: Path) -> str:
    """Name a folder of a learned reward in this process, and return the text that loads it: preference:NAME."""
    REWARDS["preference"][name] = folder
    return f"preference:{name}"


def kind_of(folder: str) -> str:
    """Return the kind of a learned reward by its reward.json; "heads" if it names none or cannot be read."""
    try:
        kind = json.loads((REWARDS["preference"].get(folder, Path(folder)) / CARD).read_text(encoding="utf-8"))["kind"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):  # the reader of that kind reports the problem
        return "heads"
    return kind if isinstance(kind, str) and kind in KINDS else "heads"


@dataclass(frozen=True)
class Card(ABC):
    """Contents of reward.json: how to build a reward, and the report of its training."""

    format: int = field(default=1, kw_only=True)

    @property
    @abstractmethod
    def is_valid(self) -> bool:
        """Return whether a reward can be built from it. Values of other types may raise TypeError or ValueError."""


def are_scales(means: Sequence[float], stds: Sequence[float]) -> bool:
    """Return whether means and deviations are finite, of equal number, at least one, and the deviations above 0."""
    return len(means) == len(stds) > 0 and all(map(math.isfinite, (*means, *stds))) and min(stds) > 0


C = TypeVar("C", bound=Card)


def read_card(folder: Path, form: type[C], weights: Iterable[Path], what: str) -> C:
    """Read the folder's reward.json as a card of class `form`, and verify the checksums of card and weights.

    what  the kind of reward, for messages
    Raises RewardError if a checksum does not match, or if reward.json is missing or invalid.
    """
    try:
        if unknown := verify_checksums(*(path for path in (folder / CARD, *weights) if path.is_file())):
            logger.info("%s: no checksum of %s, it is not verified", folder, unknown[0].name)
    except (InputError, OSError) as error:
        raise RewardError(str(error)) from error
    try:
        card = form(**json.loads((folder / CARD).read_text(encoding="utf-8")))
        valid = card.format == 1 and card.is_valid
    except FileNotFoundError as error:
        raise RewardError(f"{folder}: no {CARD} there; give a folder of `steer rewards train`, or scenes") from error
    except (OSError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise RewardError(f"{folder / CARD}: cannot be read ({str(error)[:80]})") from error
    if not valid:
        raise RewardError(f"{folder / CARD}: not the card of {what} of this version")
    return card


def write_card(path: Path, card: Card) -> None:
    """Write a card as JSON."""
    path.write_text(json.dumps(asdict(card), indent=1) + "\n", encoding="utf-8")
