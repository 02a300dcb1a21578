"""Reward specifications of the command line, and the safe subset for untrusted text."""

import os
import re
import sys
from pathlib import Path

from steer.assets import CLIPS
from steer.reward import Reward, RewardError, with_timeout
from steer.rewards.grammar import NUMBER, PLUS, read_call, read_constraint, split
from steer.rewards.names import registered_name
from steer.rewards.parser import FILES, FUNCTIONS, load_reward
from steer.rewards.remote import ADDRESS


def resolve_reward(text: str, timeout: float | None = None) -> Reward:
    """Load the reward of a text; my_file:function is also looked up in the current folder.

    timeout  limit of each call in seconds; None: no limit
    """
    # The current folder is importable only for rewards without a name or an address.
    words = re.findall(r"([A-Za-z_][\w.]*):", re.sub(ADDRESS, "", text))
    if any(registered_name(word) is None for word in words):
        sys.path.append(str(Path.cwd()))
    return with_timeout(load_reward(text), timeout)


MAX_LENGTH, MAX_DEPTH = 2000, 10  # characters; parentheses
# An argument such as scenes, red, #ff0000 or ViT-L-14/openai: no option, no path but one below the current folder.
ARGUMENT = re.compile(rf"{NUMBER}|[\w#][\w#. -]*(/[\w-][\w.-]*)*")


def only_named_rewards(text: str) -> bool:
    """Return whether a specification is one reward that has a name, or a sum or function of such rewards."""
    if len(text) > MAX_LENGTH or text.count("(") > MAX_DEPTH:
        return False
    try:
        return all(_is_named(term) for term in split(text.strip(), PLUS))
    except RewardError:
        return False


def _is_named(term: str) -> bool:
    if call := read_call(term):
        # Parse with the grammar of the parser: a text that two grammars split differently would be a loophole.
        bare = [read_constraint(one)[0] if call.function == "product" else one for one in call.arguments]
        files = {"from", "paraphrases"} & set(call.options)
        return call.function in FUNCTIONS and not files and all(map(only_named_rewards, bare))
    name, *arguments = term.split(":")
    if any(argument not in CLIPS and os.path.exists(argument) for argument in arguments):  # an existing path is no name
        return False
    return registered_name(name) is not None and not term.endswith(FILES) and all(map(ARGUMENT.fullmatch, arguments))
