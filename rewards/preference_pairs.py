"""Preference files: JSON or parquet tables, and the folders that the demo records."""

import itertools
import json
import logging
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steer.arguments import is_number
from steer.files import read_image
from steer.reward import RewardError
from steer.rewards.objectives import PreferenceLabels

TableRow = Mapping[str, Any]


@dataclass(frozen=True)
class LabelledPair:
    """Two images as in the table, their prompt, and the label: 1 (a preferred), 0 (b), ½ (tie), None (no label)."""

    a: Any
    b: Any
    prompt: Any
    choice: float | None


@dataclass(frozen=True)
class TableFormat:
    """Format of a table.

    images  the columns of images, for messages
    needed  required columns beside the prompt
    pairs   the pairs of a row; raises ValueError with a message for an invalid row
    """

    images: tuple[str, ...]
    needed: tuple[str, ...]
    pairs: Callable[[TableRow, Any], Iterator[LabelledPair]]


PROMPTS = ("prompt", "caption", "text")  # columns of the prompt, the first that is there


def two_labels(a: str, b: str, row: TableRow, prompt: Any) -> Iterator[LabelledPair]:
    """Read label_0 and label_1, or label_0 alone: 1 preferred, ½ a tie (Pick-a-Pic, arXiv 2305.01569)."""
    first = row.get("label_0")
    if row.get("has_label") is False or first is None:
        yield LabelledPair(row.get(a), row.get(b), prompt, None)
        return
    second = row.get("label_1")
    second = 1 - first if second is None and is_number(first) else second
    for name, value in (("label_0", first), ("label_1", second)):
        if not is_number(value) or not 0 <= value <= 1:
            raise ValueError(f"{name} must be a number from 0 to 1, got {value!r:.40}")
    assert first is not None and second is not None
    yield LabelledPair(row.get(a), row.get(b), prompt, preferred(first, second))


def first_is_preferred(a: str, b: str, row: TableRow, prompt: Any) -> Iterator[LabelledPair]:
    """Read columns of the preferred and of the other image (HPDv3, arXiv 2508.03789; DPO)."""
    yield LabelledPair(row.get(a), row.get(b), prompt, 1.0)


def scored_list(images: str, scores: str, sign: int, row: TableRow, prompt: Any) -> Iterator[LabelledPair]:
    """Read lists of images and of scores, every two images a pair; sign −1: ranks, of which the lowest is preferred."""
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
        yield LabelledPair(files[i], files[j], prompt, choice)


def preferred(first: float, second: float) -> float:
    """Return 1 where the first is higher, 0 where the second is, ½ where they are equal."""
    return 0.5 if first == second else float(first > second)


def _two(a: str, b: str, *labels: str) -> TableFormat:
    read = two_labels if labels else first_is_preferred
    return TableFormat((a, b), (a, b, *labels), lambda row, prompt: read(a, b, row, prompt))


def _list(images: str, scores: str, sign: int) -> TableFormat:
    return TableFormat((images,), (images, scores), lambda row, prompt: scored_list(images, scores, sign, row, prompt))


FORMATS = (
    _two("jpg_0", "jpg_1", "label_0"),  # Pick-a-Pic
    _two("image_0", "image_1", "label_0"),
    _list("image_path", "human_preference", 1),  # HPDv2, training
    _list("image_path", "rank", -1),  # HPDv2, test
    _list("generations", "ranking", -1),  # ImageReward
    _two("path1", "path2"),  # HPDv3
    _two("chosen", "rejected"),  # DPO
)
PAIR_COLUMNS = "image_a, image_b, prompt, choice"


def format_of(columns: Sequence[str]) -> TableFormat | None:
    """Return the format of a table with these columns, or None."""
    if not any(name in columns for name in PROMPTS):
        return None
    return next((one for one in FORMATS if all(name in columns for name in one.needed)), None)


def known_columns() -> str:
    """List the columns of every format, for a message."""
    return " | ".join([PAIR_COLUMNS, *(", ".join([*one.needed, "prompt"]) for one in FORMATS)])


def labelled_pairs(where: str, rows: Sequence[TableRow], kind: TableFormat) -> Iterator[tuple[int, LabelledPair]]:
    """Yield the pairs of all rows, with row numbers from 1 on. Raises RewardError that names file and row."""
    for number, row in enumerate(rows, start=1):
        prompt = next((row[name] for name in PROMPTS if row.get(name) is not None), None)
        try:
            yield from ((number, pair) for pair in kind.pairs(row, prompt))
        except ValueError as error:
            raise RewardError(f"{where}, row {number}: {error}") from error


logger = logging.getLogger(__name__)

PREFERENCES, GROUPS = "choices.jsonl", "lots.jsonl"  # of a preference dataset, as the demo's Label tab records it
Row = dict[str, Any]
Source = Path | bytes  # an image file, or the bytes of one
CHOICE_VALUES = {"a": 1.0, "b": 0.0, "tie": 0.5}
MAX_STRENGTH = 1e6  # strength
PARQUET_BATCH = 256  # rows of a table


@dataclass(frozen=True)
class Captions:
    """Images and their captions: rows "image", "prompt"."""

    images: tuple[Source, ...]
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class Pairs:
    """Pairs of images of one prompt: rows "image_a", "image_b", "prompt", "choice" (a, b, tie, or the
    probability of a, 0..1) and optionally "strength" (≥ 0)."""

    a: tuple[Source, ...]
    b: tuple[Source, ...]
    prompts: tuple[str, ...]
    labels: PreferenceLabels

    def __len__(self) -> int:
        return len(self.prompts)

    def select(self, rows: Sequence[int]) -> "Pairs":
        """Return the pairs at some rows."""
        a, b = (tuple(column[row] for row in rows) for column in (self.a, self.b))
        return Pairs(a, b, tuple(self.prompts[row] for row in rows), self.labels[torch.tensor(rows, dtype=torch.long)])


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a .jsonl, .parquet or .json file (a list). Raises RewardError that names the file, and the line
    where it can."""
    readers = {".jsonl": _json_lines, ".parquet": _parquet, ".json": _json_list}
    if path.suffix.lower() not in readers:
        raise RewardError(f"{path}: pairs are read from .jsonl and .parquet files, and from .json with a list of rows")
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


def _json_list(path: Path) -> list[Row]:
    try:
        rows = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise RewardError(f"{path}: cannot be read as JSON ({str(error)[:80]})") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise RewardError(f"{path}: expected a list of objects")
    return rows


def _parquet(path: Path) -> list[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise RewardError(f"{path}: parquet needs pyarrow: pip install 'steer-diffusion[train]'") from error
    try:
        with path.open("rb") as opened, parquet.ParquetFile(opened) as file:
            # In batches: a forged file may claim more rows than memory holds.
            return [row for batch in file.iter_batches(PARQUET_BATCH) for row in batch.to_pylist()]
    except (pyarrow.ArrowException, OSError) as error:
        raise RewardError(f"{path}: not a parquet file that can be read ({str(error)[:80]})") from error


def read_captions(path: Path, images: Path | None = None) -> Captions:
    """Read rows of images and prompts. Raises RewardError that names file and row.

    images  the folder that image paths are relative to; by default, and for missing files, the table's folder
    """
    rows = read_rows(path)
    folders = _folders(path, images)
    read = [(_image(path, n, row.get("image"), "image", folders), _text(path, n, row)) for n, row in enumerate(rows, 1)]
    files, prompts = zip(*read, strict=True)
    return Captions(files, prompts)


def read_pairs(path: Path, images: Path | None = None) -> Pairs:
    """Read the pairs of a table of a known format, or of a preference dataset. Raises RewardError that names file
    and row, or the columns where the kind is not known.

    images  the folder that image paths are relative to; by default, and for missing files, the table's folder
    """
    path = path / PREFERENCES if path.is_dir() else path
    rows = read_rows(path)
    folders = _folders(path, images)
    if any("lot" in row for row in rows):
        return _labelled_pairs(path, _active_preferences(path, rows), folders)
    columns = _columns(rows)
    if kind := format_of(columns) if not {"image_a", "image_b"} & set(columns) else None:
        return _labelled_pairs(path, _rows_of_kind(path, rows, kind), folders)
    if not {"image_a", "image_b"} & set(columns):
        raise RewardError(f"{path}: unknown columns {', '.join(columns)[:200]}; expected one of: {known_columns()}")
    read = [
        (
            _image(path, n, row.get("image_a"), "image_a", folders),
            _image(path, n, row.get("image_b"), "image_b", folders),
            _text(path, n, row),
        )
        for n, row in enumerate(rows, start=1)
    ]
    choice = [_choice(path, n, row) for n, row in enumerate(rows, start=1)]
    strength = [_strength(path, n, row) for n, row in enumerate(rows, start=1)]
    a, b, prompts = zip(*read, strict=True)
    return Pairs(a, b, prompts, PreferenceLabels(torch.tensor(choice), torch.tensor(strength)))


def _columns(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _folders(path: Path, images: Path | None) -> list[Path]:
    if images is not None and not images.is_dir():
        raise RewardError(f"{images}: no such folder of images")
    return [path.parent] if images is None else [images, path.parent]


NamedPair = tuple[int, tuple[str, str], LabelledPair]


def _rows_of_kind(path: Path, rows: Sequence[Row], kind: TableFormat) -> list[NamedPair]:
    names = kind.images if len(kind.images) == 2 else kind.images * 2
    return [(number, (names[0], names[1]), pair) for number, pair in labelled_pairs(str(path), rows, kind)]


def _active_preferences(path: Path, rows: Sequence[Row]) -> list[NamedPair]:
    """Return the preferences of a dataset that their annotator did not undo."""
    groups = {row["lot"]: row for row in read_rows(path.parent / GROUPS) if isinstance(row.get("lot"), str)}
    undone, active = set[str](), list[NamedPair]()
    for number, row in reversed(list(enumerate(rows, start=1))):
        annotation_key = json.dumps([row.get("lot"), row.get("annotator")])
        if row.get("undo") is True:
            undone.add(annotation_key)
        elif annotation_key not in undone:
            active.append((number, ("chosen", "rejected"), _pair_of_group(path, number, row, groups)))
    return active[::-1]


def _pair_of_group(path: Path, number: int, row: Row, groups: dict[str, Row]) -> LabelledPair:
    name = row.get("lot")
    group = groups.get(name) if isinstance(name, str) else None
    if group is None:
        raise RewardError(f"{path}, row {number}: lot {name!r:.70} is not in {GROUPS}")
    if row.get("tie") is True:
        return LabelledPair(None, None, "", 0.5)
    try:
        files = [group["images"][row[key]]["file"] for key in ("chosen", "rejected") if type(row[key]) is int]
        chosen, rejected = files
        return LabelledPair(chosen, rejected, group["prompts"][0], 1.0)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise RewardError(
            f"{path}, row {number}: chosen and rejected must be numbers of images of lot {name}"
        ) from error


def _labelled_pairs(path: Path, rows: Sequence[NamedPair], folders: Sequence[Path]) -> Pairs:
    """Load decided pairs; ties and pairs without a label are counted in one line and left out."""
    ties = sum(pair.choice == 0.5 for _, _, pair in rows)
    unlabelled = sum(pair.choice is None for _, _, pair in rows)
    skipped = f"{ties} ties and {unlabelled} pairs without a label of {len(rows)} pairs"
    kept = [one for one in rows if one[2].choice not in (0.5, None)]
    if not kept:
        raise RewardError(f"{path}: no preferences to train on: {skipped}")
    if ties or unlabelled:
        logger.warning("%s: skipped %s", path, skipped)
    read = []
    for number, (first, second), pair in kept:
        images = (_image(path, number, pair.a, first, folders), _image(path, number, pair.b, second, folders))
        read.append((*images, _prompt(path, number, pair.prompt)))
    a, b, prompts = zip(*read, strict=True)
    choice = torch.tensor([pair.choice for _, _, pair in kept])
    return Pairs(a, b, prompts, PreferenceLabels(choice, torch.ones_like(choice)))


def _image(path: Path, number: int, value: Any, column: str, folders: Sequence[Path]) -> Source:
    """Return the path of a file below one of the folders, or its bytes (as datasets on the hub have them)."""
    value = value.get("bytes") or value.get("path") if isinstance(value, dict) else value
    if isinstance(value, bytes):
        return value
    for folder in folders if isinstance(value, str) else ():
        if os.path.isfile(folder / value):  # False for invalid names, too
            return folder / value
    raise RewardError(f"{path}, row {number}: {column!r} is neither an existing image file nor its bytes")


def _text(path: Path, number: int, row: Row) -> str:
    return _prompt(path, number, next((row[name] for name in PROMPTS if row.get(name) is not None), None))


def _prompt(path: Path, number: int, prompt: Any) -> str:
    if not isinstance(prompt, str):
        raise RewardError(f'{path}, row {number}: expected a text under "prompt"')
    return prompt


def _choice(path: Path, number: int, row: Row) -> float:
    value = row.get("choice")
    if isinstance(value, str) and value in CHOICE_VALUES:
        return CHOICE_VALUES[value]
    if is_number(value) and 0 <= value <= 1:
        return float(value)
    raise RewardError(f"{path}, row {number}: choice must be a, b, tie or a number from 0 to 1, got {value!r:.40}")


def _strength(path: Path, number: int, row: Row) -> float:
    value = row.get("strength")
    if value is None:
        return 1.0
    if is_number(value) and 0 <= value <= MAX_STRENGTH:
        return float(value)
    raise RewardError(f"{path}, row {number}: strength must be a number from 0 to {MAX_STRENGTH:g}, got {value!r:.40}")


def load_images(sources: Sequence[Source], fit: Callable[[Tensor], Tensor]) -> Tensor:
    """Load images of any sizes as (N, 3, size, size); `fit` brings each, as (1, 3, H, W), to (1, 3, size, size)."""
    return torch.cat([fit(read_image(source)[None]) for source in sources])


def split_by_prompt(prompts: Sequence[str], share: float, seed: int = 0) -> tuple[list[int], list[int]]:
    """Split rows into training and held-out: about `share` of the prompts, each with all of its rows."""
    names = sorted(set(prompts))
    random.Random(seed).shuffle(names)
    count = min(max(round(share * len(names)), 1), len(names) - 1) if share > 0 and len(names) > 1 else 0
    held = set(names[:count])
    rows = range(len(prompts))
    return [row for row in rows if prompts[row] not in held], [row for row in rows if prompts[row] in held]
