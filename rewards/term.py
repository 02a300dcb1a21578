"""One term of a sum, REWARD[:WEIGHT], as it is read and as it is written: what is written is read as the same."""

import re
from collections.abc import Callable

from steer.reward import RewardError, takes_number
from steer.rewards.grammar import NUMBER, PLUS, number_text, split
from steer.rewards.remote_protocol import is_remote, read_weight


def read_term(text: str, takes: Callable[[str], bool] = takes_number) -> tuple[str, float]:
    """The reward of a term and its weight. Behind a reward that takes a number, and a host, a number is no weight.

    takes  whether the reward of a name takes a number
    """
    if is_remote(text):
        return read_weight(text)
    name, *rest = text.split(":")
    if rest and re.fullmatch(NUMBER, rest[-1]) and (len(rest) > 1 or not takes(name)):
        return text.rpartition(":")[0], float(rest[-1])
    return text, 1.0


def atom_text(reward: str, weight: float, takes: bool) -> str:
    """A reward that has a name, with a weight: the shortest text that is read as both, in sum(…) where no other is.

    takes  whether the reward takes a number
    """
    plain = [reward] if weight == 1 else []
    for text in (*plain, f"{reward}:{number_text(weight)}"):
        if read_term(text, lambda name: takes) == (reward, weight):
            return text
    return f"sum({reward}):{number_text(weight)}"


def composed_text(rewards: str, weight: float) -> str:
    """The text of rewards that are one, with a weight; in sum(…) where it would else belong to the last of them."""
    if weight == 1:
        return rewards
    try:
        alone = len(split(rewards, PLUS)) == 1 and read_term(rewards, lambda name: False)[1] == 1
    except RewardError:  # a name with half a parenthesis, for people alone
        alone = True
    return f"{rewards if alone else f'sum({rewards})'}:{number_text(weight)}"
