"""Preferences as files: JSON lines or parquet, one row a pair of images of a prompt and which was chosen."""

import json
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steer.images import read_image
from steer.reward import RewardError
from steer.rewards.aggregate import is_number
from steer.rewards.objectives import Choices

Row = dict[str, Any]
Source = Path | bytes  # an image file, or the bytes of one
WORDS = {"a": 1.0, "b": 0.0, "tie": 0.5}
LARGEST = 1e6  # strength
AT_ONCE = 256  # rows of a table


@dataclass(frozen=True)
class Captions:
    """Images and what each shows: rows "image", "prompt"."""

    images: tuple[Source, ...]
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class Pairs:
    """Pairs of images of one prompt: rows "image_a", "image_b", "prompt", "choice" (a, b, tie, or a number from
    0 to 1: how surely a) and perhaps "strength" (≥ 0)."""

    a: tuple[Source, ...]
    b: tuple[Source, ...]
    prompts: tuple[str, ...]
    choices: Choices

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, rows: Sequence[int]) -> "Pairs":
        """Some of the pairs."""
        a, b = (tuple(column[row] for row in rows) for column in (self.a, self.b))
        return Pairs(a, b, tuple(self.prompts[row] for row in rows), self.choices[torch.tensor(rows, dtype=torch.long)])


def read_rows(path: Path) -> list[Row]:
    """The rows of a .jsonl or .parquet file. Raises RewardError that names the file, and the line where it can."""
    readers = {".jsonl": _json_lines, ".parquet": _parquet}
    if path.suffix.lower() not in readers:
        raise RewardError(f"{path}: pairs are read from {' and '.join(readers)} files")
    if not path.is_file():
        raise RewardError(f"{path}: no such file of pairs")
    rows = readers[path.suffix.lower()](path)
    if not rows:
        raise RewardError(f"{path}: no rows in this file")
    return rows


def _json_lines(path: Path) -> list[Row]:
    rows = []
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RewardError(f"{path}: cannot be read as lines of text ({str(error)[:80]})") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise RewardError(f"{path}, line {number}: not JSON ({error})") from error
            if not isinstance(row, dict):
                raise RewardError(f"{path}, line {number}: expected an object")
            rows.append(row)
    return rows


def _parquet(path: Path) -> list[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise RewardError(f"{path}: parquet needs pyarrow: pip install 'steer-diffusion[train]'") from error
    try:
        with path.open("rb") as opened, parquet.ParquetFile(opened) as file:
            # A part at a time: a forged file says that it holds more than memory does.
            return [row for batch in file.iter_batches(AT_ONCE) for row in batch.to_pylist()]
    except (pyarrow.ArrowException, OSError) as error:
        raise RewardError(f"{path}: not a parquet file that can be read ({str(error)[:80]})") from error


def read_captions(path: Path) -> Captions:
    """Rows of images and prompts. Raises RewardError that names file and row."""
    rows = read_rows(path)
    read = [(_image(path, n, row, "image"), _text(path, n, row)) for n, row in enumerate(rows, start=1)]
    images, prompts = zip(*read, strict=True)
    return Captions(images, prompts)


def read_pairs(path: Path) -> Pairs:
    """Rows of pairs. Raises RewardError that names file and row."""
    rows = read_rows(path)
    read = [
        (_image(path, n, row, "image_a"), _image(path, n, row, "image_b"), _text(path, n, row))
        for n, row in enumerate(rows, start=1)
    ]
    choice = [_choice(path, n, row) for n, row in enumerate(rows, start=1)]
    strength = [_strength(path, n, row) for n, row in enumerate(rows, start=1)]
    a, b, prompts = zip(*read, strict=True)
    return Pairs(a, b, prompts, Choices(torch.tensor(choice), torch.tensor(strength)))


def _image(path: Path, number: int, row: Row, column: str) -> Source:
    """The file named, from the folder of the table on, or the bytes (as data sets on the hub have them)."""
    value = row.get(column)
    value = value.get("bytes") or value.get("path") if isinstance(value, dict) else value
    if isinstance(value, bytes):
        return value
    if isinstance(value, str) and os.path.isfile(path.parent / value):  # False, too, for what can be no name
        return path.parent / value
    raise RewardError(f"{path}, row {number}: {column!r} is neither an image file that is there nor its bytes")


def _text(path: Path, number: int, row: Row) -> str:
    if not isinstance(prompt := row.get("prompt"), str):
        raise RewardError(f'{path}, row {number}: expected a text under "prompt"')
    return prompt


def _choice(path: Path, number: int, row: Row) -> float:
    value = row.get("choice")
    if isinstance(value, str) and value in WORDS:
        return WORDS[value]
    if is_number(value) and 0 <= value <= 1:
        return float(value)
    raise RewardError(f"{path}, row {number}: choice must be a, b, tie or a number from 0 to 1, got {value!r:.40}")


def _strength(path: Path, number: int, row: Row) -> float:
    value = row.get("strength")
    if value is None:
        return 1.0
    if is_number(value) and 0 <= value <= LARGEST:
        return float(value)
    raise RewardError(f"{path}, row {number}: strength must be a number from 0 to {LARGEST:g}, got {value!r:.40}")


def load_images(sources: Sequence[Source], fit: Callable[[Tensor], Tensor]) -> Tensor:
    """A batch (N, 3, size, size) of images of any sizes; `fit` brings each, as (1, 3, H, W), to (1, 3, size, size)."""
    return torch.cat([fit(read_image(source)[None]) for source in sources])


def split_by_prompt(prompts: Sequence[str], share: float, seed: int = 0) -> tuple[list[int], list[int]]:
    """Rows to train on and rows held out: about `share` of the prompts, each with all of its rows on one side."""
    names = sorted(set(prompts))
    random.Random(seed).shuffle(names)
    count = min(max(round(share * len(names)), 1), len(names) - 1) if share > 0 and len(names) > 1 else 0
    held = set(names[:count])
    rows = range(len(prompts))
    return [row for row in rows if prompts[row] not in held], [row for row in rows if prompts[row] in held]
