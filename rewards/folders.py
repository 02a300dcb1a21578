"""Rewards from the folders that `steer rewards train` writes, of every kind."""

import inspect
import json
from importlib import import_module
from pathlib import Path
from typing import Any

from steer.assets import REWARDS
from steer.reward import Reward, RewardError

CARD = "reward.json"
KINDS = {
    "heads": "steer.rewards.learned:Preference",
    "features": "steer.rewards.named_features:FeatureReward",
    "users": "steer.rewards.users:UserReward",
}


def preference(folder: str, **options: Any) -> Reward:
    """Open a learned reward: a folder of `steer rewards train`, or scenes, which is embedded.

    Options of a reward of CLIP features: aggregate, member, micro_batch, dtype; of users: user, like, aggregate,
    micro_batch.
    Raises RewardError for a folder that is none, and for an option that its kind does not have.
    """
    module, name = KINDS[kind_of(folder)].split(":")
    made = getattr(import_module(module), name)
    try:
        inspect.signature(made).bind(folder, **options)
    except TypeError as error:
        raise RewardError(f"{folder} cannot take {', '.join(options)} ({error})") from error
    reward: Reward = made(folder, **options)
    return reward


def kind_of(folder: str) -> str:
    """Return the kind of a learned reward by its reward.json; "heads" where it names none or cannot be read."""
    try:
        kind = json.loads((REWARDS["preference"].get(folder, Path(folder)) / CARD).read_text(encoding="utf-8"))["kind"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):  # its own reader names the problem
        return "heads"
    return kind if isinstance(kind, str) and kind in KINDS else "heads"
