"""Preference files: JSON or parquet tables, and the folders that the demo records."""

import itertools
import json
import logging
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steer.arguments import is_number
from steer.files import read_image
from steer.reward import RewardError
from steer.rewards.objectives import PreferenceLabels

logger = logging.getLogger(__name__)

PROMPTS = ("prompt", "caption", "text")  # columns of the prompt, the first that is there
PREFERENCES, GROUPS = "choices.jsonl", "lots.jsonl"  # of a preference dataset, as the demo's Label tab records it
CHOICE_VALUES = {"a": 1.0, "b": 0.0, "tie": 0.5}
MAX_STRENGTH = 1e6  # strength
PARQUET_BATCH = 256  # rows of a table
Row = dict[str, Any]
Source = Path | bytes  # an image file, or the bytes of one
# Image a, image b, the label: 1 (a preferred), 0 (b), ½ (tie) or None (no label), and the strength of the preference.
LabelledPair = tuple[Any, Any, float | None, float]
# A row's number from 1 on, the columns of its images, its prompt, one of its pairs.
NumberedPair = tuple[int, tuple[str, str], Any, LabelledPair]


@dataclass(frozen=True)
class TableFormat:
    """Format of a table.

    images  the columns of the images a and b, for messages
    needed  required columns beside the prompt
    pairs   the pairs of a row; raises ValueError with a message for an invalid row
    """

    images: tuple[str, str]
    needed: tuple[str, ...]
    pairs: Callable[[Row], Iterator[LabelledPair]]


def probability(row: Row) -> Iterator[LabelledPair]:
    """Read image_a, image_b, choice (a, b, tie or the probability of a) and strength (1 by default)."""
    given, strength = row.get("choice"), row.get("strength")
    choice = CHOICE_VALUES.get(given) if isinstance(given, str) else given
    if not is_number(choice) or not 0 <= choice <= 1:
        raise ValueError(f"choice must be a, b, tie or a number from 0 to 1, got {given!r:.40}")
    strength = 1.0 if strength is None else strength
    if not is_number(strength) or not 0 <= strength <= MAX_STRENGTH:
        raise ValueError(f"strength must be a number from 0 to {MAX_STRENGTH:g}, got {strength!r:.40}")
    yield row.get("image_a"), row.get("image_b"), float(choice), float(strength)


def two_labels(a: str, b: str, row: Row) -> Iterator[LabelledPair]:
    """Read label_0 and label_1, or label_0 alone: 1 preferred, ½ a tie (Pick-a-Pic, arXiv 2305.01569)."""
    first: Any = row.get("label_0")
    second: Any = row.get("label_1")
    choice = None
    if row.get("has_label") is not False and first is not None:
        second = 1 - first if second is None and is_number(first) else second
        for name, value in (("label_0", first), ("label_1", second)):
            if not is_number(value) or not 0 <= value <= 1:
                raise ValueError(f"{name} must be a number from 0 to 1, got {value!r:.40}")
        choice = preferred(first, second)
    yield row.get(a), row.get(b), choice, 1.0


def first_is_preferred(a: str, b: str, row: Row) -> Iterator[LabelledPair]:
    """Read columns of the preferred and of the other image (HPDv3, arXiv 2508.03789; DPO)."""
    yield row.get(a), row.get(b), 1.0, 1.0


def scored_list(images: str, scores: str, sign: int, row: Row) -> Iterator[LabelledPair]:
    """Read lists of images and of scores, every two images a pair; sign −1: ranks, of which the lowest is preferred."""
    files, values = row.get(images), row.get(scores)
    if not isinstance(files, list) or len(files) < 2:
        raise ValueError(f"{images} must be a list of two or more images, got {files!r:.40}")
    values = [None] * len(files) if values is None else values
    if not isinstance(values, list) or len(values) != len(files):
        raise ValueError(f"{scores} must be a list of {len(files)}, one for each of {images}, got {values!r:.40}")
    if wrong := [value for value in values if value is not None and not is_number(value)]:
        raise ValueError(f"{scores} must hold numbers, got {wrong[0]!r:.40}")
    for (a, first), (b, second) in itertools.combinations(zip(files, values, strict=True), 2):
        yield a, b, None if None in (first, second) else preferred(sign * first, sign * second), 1.0


def preferred(first: float, second: float) -> float:
    """Return 1 where the first is higher, 0 where the second is, ½ where they are equal."""
    return 0.5 if first == second else float(first > second)


def _two(a: str, b: str, *labels: str) -> TableFormat:
    return TableFormat((a, b), (a, b, *labels), partial(two_labels if labels else first_is_preferred, a, b))


def _list(images: str, scores: str, sign: int) -> TableFormat:
    return TableFormat((images, images), (images, scores), partial(scored_list, images, scores, sign))


PAIRS = TableFormat(("image_a", "image_b"), ("image_a", "image_b"), probability)
FORMATS = (
    _two("jpg_0", "jpg_1", "label_0"),  # Pick-a-Pic
    _two("image_0", "image_1", "label_0"),
    _list("image_path", "human_preference", 1),  # HPDv2, training
    _list("image_path", "rank", -1),  # HPDv2, test
    _list("generations", "ranking", -1),  # ImageReward
    _two("path1", "path2"),  # HPDv3
    _two("chosen", "rejected"),  # DPO
)


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
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise RewardError(f"{path}, line {number}: not JSON ({error})") from error
            if not isinstance(rows[-1], dict):
                raise RewardError(f"{path}, line {number}: expected an object")
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
    read = [
        (_image(path, n, row.get("image"), "image", folders), _text(path, n, _prompt(row)))
        for n, row in enumerate(rows, 1)
    ]
    files, prompts = zip(*read, strict=True)
    return Captions(files, prompts)


def read_pairs(path: Path, images: Path | None = None) -> Pairs:
    """Read the pairs of a table of a known format, or of a preference dataset. Raises RewardError that names file
    and row, or the columns where the kind is not known.

    Ties and pairs without a label are left out, except the ties of rows with a choice.

    images  the folder that image paths are relative to; by default, and for missing files, the table's folder
    """
    path = path / PREFERENCES if path.is_dir() else path
    rows = read_rows(path)
    folders = _folders(path, images)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if "lot" in columns:
        pairs = _decided(path, _active_preferences(path, rows))
    elif {*PAIRS.images} & {*columns}:
        pairs = _pairs_of(path, rows, PAIRS)
    elif kind := next((one for one in FORMATS if {*one.needed} <= {*columns} and {*PROMPTS} & {*columns}), None):
        pairs = _decided(path, _pairs_of(path, rows, kind))
    else:
        known = ["image_a, image_b, prompt, choice", *(", ".join([*one.needed, "prompt"]) for one in FORMATS)]
        raise RewardError(f"{path}: unknown columns {', '.join(columns)[:200]}; expected one of: {' | '.join(known)}")
    read = [
        (
            _image(path, number, a, names[0], folders),
            _image(path, number, b, names[1], folders),
            _text(path, number, prompt),
        )
        for number, names, prompt, (a, b, _, _) in pairs
    ]
    first, second, prompts = zip(*read, strict=True)
    choice, strength = (torch.tensor([pair[column] for *_, pair in pairs]) for column in (2, 3))
    return Pairs(first, second, prompts, PreferenceLabels(choice, strength))


def _folders(path: Path, images: Path | None) -> list[Path]:
    if images is not None and not images.is_dir():
        raise RewardError(f"{images}: no such folder of images")
    return [path.parent] if images is None else [images, path.parent]


def _prompt(row: Row) -> Any:
    return next((row[name] for name in PROMPTS if row.get(name) is not None), None)


def _pairs_of(path: Path, rows: Sequence[Row], kind: TableFormat) -> list[NumberedPair]:
    """Return the pairs of all rows. Raises RewardError that names file and row."""
    pairs: list[NumberedPair] = []
    for number, row in enumerate(rows, start=1):
        try:
            pairs += ((number, kind.images, _prompt(row), pair) for pair in kind.pairs(row))
        except ValueError as error:
            raise RewardError(f"{path}, row {number}: {error}") from error
    return pairs


def _decided(path: Path, pairs: Sequence[NumberedPair]) -> list[NumberedPair]:
    """Leave out ties and pairs without a label, and log their numbers. Raises RewardError where no pair is left."""
    ties, unlabelled = (sum(pair[2] == choice for *_, pair in pairs) for choice in (0.5, None))
    skipped = f"{ties} ties and {unlabelled} pairs without a label of {len(pairs)} pairs"
    if ties + unlabelled == len(pairs):
        raise RewardError(f"{path}: no preferences to train on: {skipped}")
    if ties or unlabelled:
        logger.warning("%s: skipped %s", path, skipped)
    return [one for one in pairs if one[3][2] not in (0.5, None)]


def _active_preferences(path: Path, rows: Sequence[Row]) -> list[NumberedPair]:
    """Return the preferences of a dataset that their annotator did not undo."""
    groups = {row["lot"]: row for row in read_rows(path.parent / GROUPS) if isinstance(row.get("lot"), str)}
    undone, active = set[str](), list[NumberedPair]()
    for number, row in reversed(list(enumerate(rows, start=1))):
        annotation_key = json.dumps([row.get("lot"), row.get("annotator")])
        if row.get("undo") is True:
            undone.add(annotation_key)
        elif annotation_key not in undone:
            prompt, pair = _pair_of_group(path, number, row, groups)
            active.append((number, ("chosen", "rejected"), prompt, pair))
    return active[::-1]


def _pair_of_group(path: Path, number: int, row: Row, groups: Mapping[Any, Row]) -> tuple[Any, LabelledPair]:
    """Return the prompt and the pair of a recorded preference. Raises RewardError."""
    name = row.get("lot")
    if not isinstance(name, str) or name not in groups:
        raise RewardError(f"{path}, row {number}: lot {name!r:.70} is not in {GROUPS}")
    if row.get("tie") is True:
        return "", (None, None, 0.5, 1.0)
    try:
        files = [groups[name]["images"][row[key]]["file"] for key in ("chosen", "rejected") if type(row[key]) is int]
        chosen, rejected = files
        return groups[name]["prompts"][0], (chosen, rejected, 1.0, 1.0)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        problem = f"chosen and rejected must be numbers of images of lot {name}"
        raise RewardError(f"{path}, row {number}: {problem}") from error


def _image(path: Path, number: int, value: Any, column: str, folders: Sequence[Path]) -> Source:
    """Return the path of a file below one of the folders, or its bytes (as datasets on the hub have them)."""
    value = value.get("bytes") or value.get("path") if isinstance(value, dict) else value
    if isinstance(value, bytes):
        return value
    for folder in folders if isinstance(value, str) else ():
        if os.path.isfile(folder / value):  # False for invalid names, too
            return folder / value
    raise RewardError(f"{path}, row {number}: {column!r} is neither an existing image file nor its bytes")


def _text(path: Path, number: int, prompt: Any) -> str:
    if not isinstance(prompt, str):
        raise RewardError(f'{path}, row {number}: expected a text under "prompt"')
    return prompt


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
