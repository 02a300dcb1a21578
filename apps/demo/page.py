"""What all tabs share: events that are no endpoints, changes to components, what fields say, how it stands."""

import math
from html import escape
from typing import Any

from steer.errors import InputError

PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}  # of an event
Change = dict[Any, Any]  # by component
MOST_CHARACTERS = 500  # of a prompt


def line(text: str, role: str = "status") -> str:
    """One line about how it stands, which screen readers say too."""
    return f'<p class="steer-line" role="{role}">{escape(text)}</p>'


def number(name: str, value: float | None) -> float:
    """What a field says. Raises InputError where it is empty."""
    if value is None or not math.isfinite(value):
        raise InputError(f"{name}: the field is empty, give a number")
    return float(value)


def whole(name: str, value: float | None) -> int:
    """What a field of whole numbers says. Raises InputError where it is empty."""
    return round(number(name, value))
