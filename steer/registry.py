"""Options by name, with the nearest names where there is none."""

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

from steer.errors import InputError

Option = TypeVar("Option")


def nearest(name: str, known: Iterable[str]) -> str:
    """The known names most like `name`, or all of them, as words to show: "a or b"."""
    known = sorted(known)
    return " or ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known)


def choose(kind: str, option: str | Option, table: Mapping[str, Option]) -> Option:
    """An option by name, or the option itself. Raises InputError that names the nearest ones."""
    if not isinstance(option, str):
        return option
    if option not in table:
        raise InputError(f"unknown {kind} {option!r}: did you mean {nearest(option, table)}?")
    return table[option]
