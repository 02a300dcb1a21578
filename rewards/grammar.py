"""The grammar of `steer.rewards.parser`, independent of the rewards themselves."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from steer.arguments import is_number
from steer.reward import RewardError

NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
PLUS, COMMA = r"\s\+\s", r",\s"  # between terms, between arguments


@dataclass(frozen=True)
class Call:
    """A parsed function of rewards: its rewards or constraints, its options, its weight."""

    function: str
    arguments: tuple[str, ...]
    options: Mapping[str, str]
    weight: float

    def number(self, option: str, default: float) -> float:
        """Return an option as a number. Raises RewardError if it is not a number."""
        given = self.options.get(option)
        if given is None:
            return default
        if not re.fullmatch(NUMBER, given) or not is_number(float(given)):
            raise RewardError(f"{self.function}(…): {option} must be a finite number, got {given!r:.80}")
        return float(given)


def format_number(number: float) -> str:
    """Write a number as the shortest text that `NUMBER` matches and that parses to the same number."""
    short = f"{number:g}"
    return short if float(short) == number else repr(float(number))


def read_call(text: str) -> Call | None:
    """Parse "function(A, B, option=value):WEIGHT"; None for any other text."""
    if not (parsed := re.fullmatch(rf"([a-z-]+)\((.*)\)(?::({NUMBER}))?", text, re.DOTALL)):
        return None
    function, inside, weight = parsed[1], split(parsed[2], COMMA), float(parsed[3] or 1)
    options = [piece.split("=", 1) for piece in inside if re.match(r"[a-z]+=", piece)]
    if len(dict(options)) < len(options):
        raise RewardError(f"{function}(…): an option is given twice")
    arguments = tuple(piece for piece in inside if not re.match(r"[a-z]+=", piece))
    if not all(arguments):
        raise RewardError(f"{function}(…) needs at least one reward, and none that is empty")
    return Call(function, arguments, dict(options), weight)


def read_constraint(text: str) -> tuple[str, str, float]:
    """Parse "REWARD > NUMBER" into three parts. Raises RewardError for any other text."""
    if not (parsed := re.fullmatch(rf"(.+?)\s*([<>])\s*({NUMBER})", text, re.DOTALL)):
        raise RewardError(f"product(…): {text!r:.80} is no constraint; write REWARD > NUMBER or REWARD < NUMBER")
    return parsed[1], parsed[2], float(parsed[3])


def split(text: str, separator: str) -> list[str]:
    """Split a text at a separator (a pattern) outside of parentheses."""
    pieces, depth, start = [], 0, 0
    for token in re.finditer(rf"\(|\)|{separator}", text):
        depth += {"(": 1, ")": -1}.get(token[0], 0)
        if depth < 0:
            break
        if depth == 0 and token[0] not in "()":
            pieces.append(text[start : token.start()])
            start = token.end()
    if depth != 0:
        raise RewardError(f"reward {text!r:.80}: a parenthesis is not closed, or never opened")
    return [part.strip() for part in (*pieces, text[start:])]
