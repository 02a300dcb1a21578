"""All pairs instead of full products: of tests with three or more parameters, `make test` runs as few combinations as
hold every pair of values, `make test-hard` the others."""

from collections.abc import Iterable, Sequence
from itertools import combinations

import pytest


def covering(rows: Sequence[tuple[object, ...]], strength: int = 2) -> list[int]:
    """The numbers of rows that hold all values of any `strength` columns that any row holds, taken greedily."""
    pairs = [set(combinations(enumerate(row), strength)) for row in rows]
    missing, kept = set().union(*pairs), []
    while missing:
        kept.append(max(range(len(rows)), key=lambda n: len(pairs[n] & missing)))
        missing -= pairs[kept[-1]]
    return sorted(kept)


def harden(items: Iterable[pytest.Item]) -> None:
    """Marks as hard what all pairs do not need."""
    combined: dict[str, list[tuple[tuple[object, ...], pytest.Item]]] = {}
    for item in items:
        columns = [_names(mark.args[0]) for mark in item.iter_markers("parametrize")]
        if isinstance(item, pytest.Function) and len(columns) >= 3 and not item.get_closest_marker("hard"):
            # A value is one object in all rows. `callspec.indices` would not do: pytest numbers the rows there.
            row = tuple(tuple(id(item.callspec.params[name]) for name in names) for names in columns)
            combined.setdefault(item.nodeid.split("[")[0], []).append((row, item))
    for tests in combined.values():
        kept = set(covering([row for row, _ in tests]))
        for number, (_, item) in enumerate(tests):
            if number not in kept:
                item.add_marker("hard")


def hard_but(names: Iterable[object], *kept: object) -> list[object]:
    """Parameters of which `make test` runs those few, `make test-hard` the others."""
    return [name if name in kept else pytest.param(name, marks=pytest.mark.hard) for name in names]


def _names(given: str | Sequence[str]) -> list[str]:
    return [name.strip() for name in (given.split(",") if isinstance(given, str) else given)]
