"""What all tabs share: events that are no endpoints, changes to components, a line about how it stands."""

from html import escape
from typing import Any

PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}  # of an event
Change = dict[Any, Any]  # by component


def line(text: str, role: str = "status") -> str:
    """One line about how it stands, which screen readers say too."""
    return f'<p class="steer-line" role="{role}">{escape(text)}</p>'
