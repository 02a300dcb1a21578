"""Which rewards a text from a stranger may name: those that have a name here, and nothing that lies in a file.

Any other specification imports code (package.module:attribute, a YAML file that names one) or reads a file.
"""

import os
import re

from steer.assets import CLIPS
from steer.contract import RewardError
from steer.reward import reward_names
from steer.rewards.expression import FILES, FUNCTIONS
from steer.rewards.grammar import NUMBER, PLUS, read_call, read_constraint, split

LONGEST, DEEPEST = 2000, 10  # characters; parentheses
# An argument such as scenes, red, #ff0000 or ViT-L-14/openai: no path but one below the current folder, no option.
ARGUMENT = re.compile(rf"{NUMBER}|[\w#][\w#. -]*(/[\w-][\w.-]*)*")


def names_alone(text: str) -> bool:
    """Whether a specification is one reward that has a name, or a sum or function of such rewards."""
    if len(text) > LONGEST or text.count("(") > DEEPEST:
        return False
    try:
        return all(_is_named(term) for term in split(text.strip(), PLUS))
    except RewardError:
        return False


def _is_named(term: str) -> bool:
    if call := read_call(term):
        # By the reader's own grammar: a text that the two took apart in two ways would be a way in.
        bare = [read_constraint(one)[0] if call.function == "product" else one for one in call.arguments]
        return call.function in FUNCTIONS and "from" not in call.options and all(map(names_alone, bare))
    name, *arguments = term.split(":")
    if any(argument not in CLIPS and os.path.exists(argument) for argument in arguments):  # what lies here is no name
        return False
    return name in reward_names() and not term.endswith(FILES) and all(map(ARGUMENT.fullmatch, arguments))
