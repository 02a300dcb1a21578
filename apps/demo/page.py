"""What all tabs share: events that are no endpoints, changes to components, what fields say, how it stands."""

import math
import random
import re
import tempfile
from html import escape
from pathlib import Path
from typing import Any

from steer.errors import InputError

PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}  # of an event
Change = dict[Any, Any]  # by component
MOST_CHARACTERS = 500  # of a prompt
RANDOM, LARGEST_SEED = -1, 2**53  # the seed that stands for a new one; above the other, a browser's numbers have gaps
FAILED = "The run failed. What was wrong is in the message on this page, or else in the app's log."
# An absolute path after a space, a quote, a bracket or a colon: all of it before its last name; no part of an address.
FOLDERS = re.compile(r"""(?<![^\s'"`(\[{=,:])(?:/(?!/)|[A-Za-z]:\\)(?:[^/\\\s'"`:]+[/\\])*(?=[\w.-])""")


def public(text: str) -> str:
    """A message without places on the owner's disk: of a file, its name stays."""
    for place in (tempfile.gettempdir(), str(Path.cwd()), str(Path.home())):  # which may have spaces in them
        text = text.replace(f"{place}/", "/") if len(place) > 1 else text
    return FOLDERS.sub("", text)


def line(text: str, role: str = "status") -> str:
    """One line about how it stands, which screen readers say too."""
    return f'<p class="steer-line" role="{role}">{escape(public(text))}</p>'


def number(name: str, value: float | None) -> float:
    """What a field says. Raises InputError where it is empty."""
    if value is None or not math.isfinite(value):
        raise InputError(f"{name}: the field is empty, give a number")
    return float(value)


def whole(name: str, value: float | None) -> int:
    """What a field of whole numbers says. Raises InputError where it is empty, or says a fraction."""
    found = number(name, value)
    if not found.is_integer():
        raise InputError(f"{name} must be a whole number, got {found:g}")
    return int(found)


def seed_of(value: float | None, fresh: bool = False) -> int:
    """The seed of a field; a new one for −1, or where one is wanted for every run. Raises InputError."""
    if fresh or value == RANDOM:
        return random.randrange(2**32)
    seed = whole("seed", value)
    if not 0 <= seed <= LARGEST_SEED:
        raise InputError(f"seed must be 0 to {LARGEST_SEED}, or {RANDOM} for a new one, got {seed}")
    return seed
