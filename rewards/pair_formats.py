"""Preference tables as data sets publish them, row by row as pairs: which image was preferred, and of which prompt."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steer.reward import RewardError
from steer.rewards.aggregate import is_number

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Labelled:
    """Two images as a table has them, their prompt, and whether the first is preferred: 1, 0, ½; None: no label."""

    a: Any
    b: Any
    prompt: Any
    choice: float | None


@dataclass(frozen=True)
class Format:
    """How a kind of table is read.

    images  the columns of images, for messages
    needed  columns beside the prompt that a table must have to be of this kind
    pairs   the pairs of a row; raises ValueError, whose text says what is wrong, for a row that is not of this kind
    """

    images: tuple[str, ...]
    needed: tuple[str, ...]
    pairs: Callable[[Row, Any], Iterator[Labelled]]


PROMPTS = ("prompt", "caption", "text")  # columns of the prompt, the first that is there


def two_labels(a: str, b: str, row: Row, prompt: Any) -> Iterator[Labelled]:
    """Columns label_0 and label_1, or label_0 alone: 1 the preferred one, ½ a tie (Pick-a-Pic, arXiv 2305.01569)."""
    first = row.get("label_0")
    if row.get("has_label") is False or first is None:
        yield Labelled(row.get(a), row.get(b), prompt, None)
        return
    second = row.get("label_1")
    second = 1 - first if second is None and is_number(first) else second
    for name, value in (("label_0", first), ("label_1", second)):
        if not is_number(value) or not 0 <= value <= 1:
            raise ValueError(f"{name} must be a number from 0 to 1, got {value!r:.40}")
    assert first is not None and second is not None
    yield Labelled(row.get(a), row.get(b), prompt, preferred(first, second))


def first_is_preferred(a: str, b: str, row: Row, prompt: Any) -> Iterator[Labelled]:
    """Columns of the preferred and of the other image (HPDv3, arXiv 2508.03789; DPO)."""
    yield Labelled(row.get(a), row.get(b), prompt, 1.0)


def scored_list(images: str, scores: str, sign: int, row: Row, prompt: Any) -> Iterator[Labelled]:
    """Lists of images and of their scores, every two of them a pair; sign −1: of ranks, the lowest is preferred."""
    files, values = row.get(images), row.get(scores)
    if not isinstance(files, list) or len(files) < 2:
        raise ValueError(f"{images} must be a list of two or more images, got {files!r:.40}")
    if values is None:
        values = [None] * len(files)
    if not isinstance(values, list) or len(values) != len(files):
        raise ValueError(f"{scores} must be a list of {len(files)}, one for each of {images}, got {values!r:.40}")
    if wrong := [value for value in values if value is not None and not is_number(value)]:
        raise ValueError(f"{scores} must hold numbers, got {wrong[0]!r:.40}")
    for i, j in itertools.combinations(range(len(files)), 2):
        known = values[i] is not None and values[j] is not None
        choice = preferred(sign * values[i], sign * values[j]) if known else None
        yield Labelled(files[i], files[j], prompt, choice)


def preferred(first: float, second: float) -> float:
    """1 where the first is higher, 0 where the second is, ½ where they are equal."""
    return 0.5 if first == second else float(first > second)


def _two(a: str, b: str, *labels: str) -> Format:
    read = two_labels if labels else first_is_preferred
    return Format((a, b), (a, b, *labels), lambda row, prompt: read(a, b, row, prompt))


def _list(images: str, scores: str, sign: int) -> Format:
    return Format((images,), (images, scores), lambda row, prompt: scored_list(images, scores, sign, row, prompt))


FORMATS = (
    _two("jpg_0", "jpg_1", "label_0"),  # Pick-a-Pic
    _two("image_0", "image_1", "label_0"),
    _list("image_path", "human_preference", 1),  # HPDv2, training
    _list("image_path", "rank", -1),  # HPDv2, test
    _list("generations", "ranking", -1),  # ImageReward
    _two("path1", "path2"),  # HPDv3
    _two("chosen", "rejected"),  # DPO
)
WANTED = "image_a, image_b, prompt, choice"


def format_of(columns: Sequence[str]) -> Format | None:
    """The kind of a table with these columns; None: none that is known."""
    if not any(name in columns for name in PROMPTS):
        return None
    return next((one for one in FORMATS if all(name in columns for name in one.needed)), None)


def wanted() -> str:
    """The columns of every kind, for a message."""
    return " | ".join([WANTED, *(", ".join([*one.needed, "prompt"]) for one in FORMATS)])


def labelled(where: str, rows: Sequence[Row], kind: Format) -> Iterator[tuple[int, Labelled]]:
    """The pairs of all rows, each with its row's number from 1 on. Raises RewardError that names file and row."""
    for number, row in enumerate(rows, start=1):
        prompt = next((row[name] for name in PROMPTS if row.get(name) is not None), None)
        try:
            yield from ((number, pair) for pair in kind.pairs(row, prompt))
        except ValueError as error:
            raise RewardError(f"{where}, row {number}: {error}") from error
