"""Registries: implementations by name, with suggestions for unknown names."""

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

from steer.errors import InputError

Option = TypeVar("Option")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the known names closest to `name`, or all of them, as text: "a or b"."""
    known = sorted(known)
    return " or ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known)


def choose(kind: str, option: str | Option, table: Mapping[str, Option]) -> Option:
    """Look up an option by name; an object is returned as is. Raises InputError with the nearest names."""
    if not isinstance(option, str):
        return option
    if option not in table:
        raise InputError(f"unknown {kind} {option!r}: did you mean {nearest(option, table)}?")
    return table[option]
