"""Registries: implementations by name, with suggestions for unknown names."""

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

from steer.errors import InputError

Option = TypeVar("Option")

CUTOFF = 0.6  # similarity (difflib's ratio) from which a name is suggested
MIN_PREFIX = 3  # characters of an abbreviation: "sys" suggests "systematic"
MAX_LISTED = 16  # names that a message lists where none is near


def near_names(name: str, known: Iterable[str]) -> list[str]:
    """Return at most 3 known names near `name`: those that begin with it, then the most alike; in any case."""
    by_case = {one.casefold(): one for one in sorted(known, reverse=True)}
    word = name.casefold()
    near = difflib.get_close_matches(word, by_case, n=3, cutoff=CUTOFF)
    longer = [one for one in sorted(by_case) if len(word) >= MIN_PREFIX and one.startswith(word)]
    return [by_case[one] for one in dict.fromkeys([*longer, *near])][:3]


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the known names near `name`, or all of them where none is, as text: "a or b"."""
    known = sorted(set(known))
    return " or ".join(near_names(name, known) or known)


def did_you_mean(name: str, known: Iterable[str], see: str, others: Mapping[str, str] | None = None) -> str:
    """Return the end of a message about an unknown name: the near names, all names of a short list, or `see`.

    see     where the names are listed, such as "`steer rewards` lists them"
    others  words for the same in other libraries or commands, to the text to write here; a text such as
            "generator=…" counts as the name before its "="
    """
    known = sorted(set(known))
    other = (others or {}).get(name, "")
    if other.partition("=")[0] in known:
        return f"did you mean {other}?"
    listed = near_names(name, known) or (known if len(known) <= MAX_LISTED else [])
    return f"did you mean {' or '.join(listed)}?" if listed else see


def choose(kind: str, option: str | Option, table: Mapping[str, Option]) -> Option:
    """Look up an option by name; an object is returned as is. Raises InputError with the nearest names."""
    if not isinstance(option, str):
        return option
    if option not in table:
        raise InputError(f"unknown {kind} {option!r}: did you mean {nearest(option, table)}?")
    return table[option]
