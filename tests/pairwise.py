"""Selection of the cases that `make test` runs; `make test-hard` runs the others.

Of tests with three or more parameters these are all-pairs combinations, of tests marked `few(n)` n cases.
"""

import zlib
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
    """Marks as hard what all pairs do not need, and then all but the few."""
    items = list(items)
    _all_pairs(items)
    _few(items)


def _all_pairs(items: Iterable[pytest.Item]) -> None:
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


def _few(items: Iterable[pytest.Item]) -> None:
    """`@pytest.mark.few(n)`: n cases, spread over the list. The name of a test says where they begin: tests of one list
    (of model families, of solvers) run different ones."""
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("few") and not item.get_closest_marker("hard"):
            tests.setdefault(item.nodeid.split("[")[0], []).append(item)
    for name, cases in tests.items():
        count = cases[0].get_closest_marker("few").args[0]
        first = zlib.crc32(name.encode()) % len(cases)
        kept = {(first + number * len(cases) // count) % len(cases) for number in range(count)}
        for number, item in enumerate(cases):
            if number not in kept:
                item.add_marker("hard")


def hard_but(names: Iterable[object], *kept: object) -> list[object]:
    """Parameters of which `make test` runs those few, `make test-hard` the others."""
    return [name if name in kept else pytest.param(name, marks=pytest.mark.hard) for name in names]


def _names(given: str | Sequence[str]) -> list[str]:
    return [name.strip() for name in (given.split(",") if isinstance(given, str) else given)]
