"""Preference files: tables of pairs or ratings, data sets of the hub, and the folders that the demo records."""

import hashlib
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
from steer.errors import InputError
from steer.files import atomic_write, read_image, write_text
from steer.reward import RewardError
from steer.rewards.inputs import rows_by_prompt
from steer.rewards.objectives import PreferenceLabels
from steer.tables import (
    DATA_SET,
    check_columns,
    data_files,
    numbered_lines,
    open_parquet,
    parse_cells,
    parse_json,
    read_text,
    select_split,
)

logger = logging.getLogger(__name__)

PROMPTS = ("prompt", "caption", "text")  # columns of the prompt; the first existing one counts
USERS = ("user", "user_id", "annotator", "user_hash")  # columns of the annotator
IMAGES = ("image", "image_path", "file_name", "path")  # columns of the image, in rows with one image
RATINGS = ("rating", "stars", "overall_rating", "score")
PREFERENCES, GROUPS = "choices.jsonl", "lots.jsonl"  # files of a preference dataset of the demo's Label tab
CHOICE_VALUES = {"a": 1.0, "b": 0.0, "tie": 0.5}
MAX_STRENGTH = 1e6  # largest valid strength
PARQUET_BATCH = 256  # rows of a table, read at a time
Row = dict[str, Any]
Source = Path | bytes  # an image file, or the bytes of one
# Image a, image b, the label: 1 (a preferred), 0 (b), ½ (tie) or None (no label), and the strength of the preference.
LabelledPair = tuple[Any, Any, float | None, float]
# The number of a row, from 1, the columns of its images, its prompt, one of its pairs, its user.
NumberedPair = tuple[int, tuple[str, str], Any, LabelledPair, str | None]
NumberedRow = tuple[int, Row]


@dataclass(frozen=True)
class TableFormat:
    """Format of a table.

    images  the columns of the images a and b, for messages
    needed  required columns besides the prompt
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
    """Read the columns of the preferred and of the other image (HPDv3, arXiv 2508.03789; DPO)."""
    yield row.get(a), row.get(b), 1.0, 1.0


def scored_list(images: str, scores: str, sign: int, row: Row) -> Iterator[LabelledPair]:
    """Read lists of images and scores, and pair every two images; sign −1: ranks, the lowest is preferred."""
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
    """Return 1 if the first is higher, 0 if the second is, ½ if they are equal."""
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
    _list("file_path", "human_preference", 1),
    _list("image_path", "rank", -1),  # HPDv2, test; ImageRewardDB has a row for each image
    _list("file_path", "rank", -1),
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
    """Pairs of images, each pair of one prompt, with their labels.

    Rows "image_a", "image_b", "prompt", "choice" (a, b, tie, or the probability of a, 0..1) and optionally "strength"
    (≥ 0) and "user"; `users` is empty if no row has a user.
    """

    a: tuple[Source, ...]
    b: tuple[Source, ...]
    prompts: tuple[str, ...]
    labels: PreferenceLabels
    users: tuple[str | None, ...] = ()

    @property
    def columns(self) -> tuple[tuple[Source, ...], ...]:
        """Return the images a and the images b."""
        return self.a, self.b

    def __len__(self) -> int:
        return len(self.prompts)

    def select(self, rows: Sequence[int]) -> "Pairs":
        """Return the pairs of the given rows."""
        a, b = (tuple(column[row] for row in rows) for column in (self.a, self.b))
        labels = self.labels[torch.tensor(rows, dtype=torch.long)]
        users = tuple(self.users[row] for row in rows) if self.users else ()
        return Pairs(a, b, tuple(self.prompts[row] for row in rows), labels, users)


@dataclass(frozen=True)
class Ratings:
    """Images and their ratings (N,): rows "image", "prompt", "rating" (a number; also stars, overall_rating, score)."""

    images: tuple[Source, ...]
    prompts: tuple[str, ...]
    ratings: Tensor

    @property
    def columns(self) -> tuple[tuple[Source, ...], ...]:
        """Return the images, as one column."""
        return (self.images,)

    def __len__(self) -> int:
        return len(self.prompts)

    def select(self, rows: Sequence[int]) -> "Ratings":
        """Return the ratings of the given rows."""
        images = tuple(self.images[row] for row in rows)
        return Ratings(
            images, tuple(self.prompts[row] for row in rows), self.ratings[torch.tensor(rows, dtype=torch.long)]
        )


def rows_digest(data: Captions | Pairs | Ratings) -> str:
    """Return a digest of all columns. A file counts by name and size, so that a moved data set is the same."""

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return value.name, value.stat().st_size
        if isinstance(value, bytes):
            return hashlib.sha256(value).hexdigest()
        return value.tolist() if isinstance(value, Tensor) else vars(value)

    return hashlib.sha256(json.dumps(vars(data), default=plain).encode()).hexdigest()


def table_files(path: Path) -> Iterator[Path]:
    """Return the files of a table: a file itself, or the files of a folder or of a data set. Raises InputError.

    A folder has a single table, or the parquet files of a training split; for ORGANISATION/NAME[:SPLIT] on the hub, the
    files of the split are downloaded.
    """
    if path.is_dir():
        names = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
        tables = [path / name for name in select_split(names, "train", tuple(READERS))]
        if not tables or (tables[0].suffix.lower() != ".parquet" and len(tables) > 1):
            count = f"{len(tables)} tables" if tables else "no table"
            raise RewardError(f"{path}: {count} in this folder: name one file ({', '.join(READERS)})")
        yield from tables
        return
    if path.suffix.lower() not in READERS and not path.exists() and (named := DATA_SET.fullmatch(path.as_posix())):
        yield from data_files(named[1], named[2] or "train", (".parquet", ".jsonl", ".json"), "pairs")
        return
    if path.suffix.lower() not in READERS:
        formats = ".jsonl and .parquet files, .csv, .tsv, and .json with a list of rows"
        raise RewardError(f"{path}: pairs are read from {formats}; a data set of the hub is ORGANISATION/NAME")
    if not path.is_file():
        raise RewardError(f"{path}: no such file of pairs")
    yield path


def read_rows(path: Path, limit: int | None = None) -> list[Row]:
    """Read the rows of a table (`table_files`). Raises RewardError that names the file and, if possible, the line.

    limit  read only the first rows; only the files of a data set that contain them are downloaded and read
    """
    all_rows = (row for file in table_files(path) for row in READERS[file.suffix.lower()](file))
    try:
        rows = list(itertools.islice(all_rows, limit))
    except InputError as error:
        raise RewardError(str(error)) from error
    except OSError as error:
        raise RewardError(f"{path}: cannot be read ({error.strerror})") from error
    if not rows:
        raise RewardError(f"{path}: no rows in this file")
    return rows


def _json_lines(path: Path) -> list[Row]:
    rows = [(where, parse_json(line, where)) for where, line in numbered_lines(path) if line.strip()]
    if wrong := [where for where, row in rows if not isinstance(row, dict)]:
        raise InputError(f"{wrong[0]}: expected an object")
    return [row for _, row in rows]


def _json_list(path: Path) -> list[Row]:
    rows = parse_json(read_text(path), str(path))
    if isinstance(rows, dict) and len(rows) == 1:  # {"train": [row, …]}
        rows = next(iter(rows.values()))
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path}: expected a list of objects")
    return rows


def _parquet(path: Path) -> list[Row]:
    with open_parquet(path) as file:  # in batches: a forged file may claim more rows than memory holds
        return [row for batch in file.iter_batches(PARQUET_BATCH) for row in batch.to_pylist()]


def _cells(path: Path) -> list[Row]:
    """Read a .csv or .tsv file; numbers, lists, true and false are parsed, empty cells are left out."""
    (place, names), *rows = parse_cells(path, "\t" if path.suffix.lower() == ".tsv" else None) or [("", [])]
    names = [name.strip() for name in names]
    check_columns(place, names)
    if wrong := [place for place, cells in rows if any(cell.strip() for cell in cells[len(names) :])]:
        raise InputError(
            f"{wrong[0]}: more cells than the {len(names)} columns: quote texts that contain the separator"
        )
    return [
        {name: _value(name, cell) for name, cell in zip(names, cells, strict=False) if cell.strip()}
        for _, cells in rows
        if any(map(str.strip, cells))
    ]


def _value(name: str, cell: str) -> Any:
    try:
        return cell if name in PROMPTS else json.loads(cell.lower() if cell in ("True", "False") else cell)
    except (ValueError, RecursionError):
        return cell


READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _json_lines,
    ".parquet": _parquet,
    ".json": _json_list,
    ".csv": _cells,
    ".tsv": _cells,
}


def read_ratings(path: Path, images: Path | None = None, limit: int | None = None) -> Ratings:
    """Read rows of an image, a prompt and a rating; rows without a rating are left out. Raises RewardError.

    images  the folder that image paths are relative to; by default, and for missing files, the table's folder
    limit   read only the first rows
    """
    rows, folders = read_rows(path, limit), _folders(path, images)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    image, rating = (next((name for name in known if name in columns), None) for known in (IMAGES, RATINGS))
    if image is None or rating is None:
        wanted = f"an image ({', '.join(IMAGES)}), a prompt and a rating ({', '.join(RATINGS)})"
        raise RewardError(f"{path}: --objective rating needs columns of {wanted}; there are {', '.join(columns)[:200]}")
    rated = [(number, row) for number, row in enumerate(rows, 1) if row.get(rating) is not None]
    if wrong := [(number, row[rating]) for number, row in rated if not is_number(row[rating])]:
        raise RewardError(f"{path}, row {wrong[0][0]}: {rating} must be a number, got {wrong[0][1]!r:.40}")
    if not rated:
        raise RewardError(f"{path}: no ratings to train on: {rating} is empty in all {len(rows)} rows")
    if skipped := len(rows) - len(rated):
        logger.warning("%s: skipped %d rows without a rating of %d rows", path, skipped, len(rows))
    files = tuple(_image(path, number, row.get(image), image, folders) for number, row in rated)
    prompts = tuple(_text(path, number, _prompt(row)) for number, row in rated)
    return Ratings(files, prompts, torch.tensor([float(row[rating]) for _, row in rated]))


def read_captions(path: Path, images: Path | None = None, limit: int | None = None) -> Captions:
    """Read rows of images and prompts. Raises RewardError that names file and row.

    images  the folder that image paths are relative to; by default, and for missing files, the table's folder
    limit   read only the first rows
    """
    rows = read_rows(path, limit)
    folders = _folders(path, images)
    read = [
        (_image(path, n, row.get("image"), "image", folders), _text(path, n, _prompt(row)))
        for n, row in enumerate(rows, 1)
    ]
    files, prompts = zip(*read, strict=True)
    return Captions(files, prompts)


def read_pairs(path: Path, images: Path | None = None, limit: int | None = None) -> Pairs:
    """Read the pairs of a table of a known format, or of a preference dataset.

    Raises RewardError that names file and row, or the columns if the format is not known.

    Ties and pairs without a label are left out, except the ties of rows with a choice.

    images  the folder that image paths are relative to; by default, and for missing files, the table's folder
    limit   read only the first rows
    """
    path = path / PREFERENCES if (path / PREFERENCES).exists() else path
    rows = list(enumerate(read_rows(path, limit), start=1))
    folders = _folders(path, images)
    columns = list(dict.fromkeys(name for _, row in rows for name in row))
    if "lot" in columns:
        pairs = _decided(path, _active_preferences(path, rows))
    elif {*PAIRS.images} & {*columns}:
        pairs = _pairs_of(path, rows, PAIRS)
    elif kind := next((one for one in FORMATS if {*one.needed} <= {*columns} and {*PROMPTS} & {*columns}), None):
        pairs = _decided(path, _pairs_of(path, _one_row_a_prompt(rows, kind), kind))
    else:
        raise RewardError(f"{path}: {_unknown_columns(columns)}")
    read = [
        (
            _image(path, number, a, names[0], folders),
            _image(path, number, b, names[1], folders),
            _text(path, number, prompt),
        )
        for number, names, prompt, (a, b, _, _), _ in pairs
    ]
    first, second, prompts = zip(*read, strict=True)
    choice, strength = (torch.tensor([pair[column] for _, _, _, pair, _ in pairs]) for column in (2, 3))
    users = tuple(user for *_, user in pairs)
    return Pairs(first, second, prompts, PreferenceLabels(choice, strength), users if any(users) else ())


def _unknown_columns(columns: Sequence[str]) -> str:
    known = ["image_a, image_b, prompt, choice", *(", ".join([*one.needed, "prompt"]) for one in FORMATS)]
    ratings = "; ratings are read by --objective rating" if {*RATINGS} & {*columns} and {*IMAGES} & {*columns} else ""
    return f"unknown columns {', '.join(columns)[:200]}; expected one of: {' | '.join(known)}{ratings}"


def _one_row_a_prompt(rows: Sequence[NumberedRow], kind: TableFormat) -> Sequence[NumberedRow]:
    """Group rows of one image each by prompt_id, else by prompt, into rows of lists, if a format has lists."""
    images, scores = kind.needed[:2]
    if kind.images != (images, images) or isinstance(rows[0][1].get(images), list | None):
        return rows
    groups: dict[str, list[NumberedRow]] = {}
    for number, row in rows:
        groups.setdefault(json.dumps([row.get("prompt_id"), _prompt(row)], default=str), []).append((number, row))
    gathered = [
        (some, {name: [row.get(name) for _, row in some] for name in (images, scores)}) for some in groups.values()
    ]
    return [(some[0][0], some[0][1] | lists) for some, lists in gathered if len(some) > 1]


def _folders(path: Path, images: Path | None) -> list[Path]:
    if images is not None and not images.is_dir():
        raise RewardError(f"{images}: no such folder of images")
    own = path if path.is_dir() else path.parent
    return [own] if images is None else [images, own]


def _prompt(row: Row) -> Any:
    return next((row[name] for name in PROMPTS if row.get(name) is not None), None)


def _user(row: Row) -> str | None:
    user = next((row[name] for name in USERS if row.get(name) is not None), None)
    return str(user) if isinstance(user, str | int) else None


def _pairs_of(path: Path, rows: Sequence[NumberedRow], kind: TableFormat) -> list[NumberedPair]:
    """Return the pairs of all rows. Raises RewardError that names file and row."""
    pairs: list[NumberedPair] = []
    for number, row in rows:
        try:
            pairs += ((number, kind.images, _prompt(row), pair, _user(row)) for pair in kind.pairs(row))
        except ValueError as error:
            raise RewardError(f"{path}, row {number}: {error}") from error
    return pairs


def _decided(path: Path, pairs: Sequence[NumberedPair]) -> list[NumberedPair]:
    """Leave out ties and pairs without a label, and log their numbers. Raises RewardError if no pair is left."""
    ties, unlabelled = (sum(one[3][2] == choice for one in pairs) for choice in (0.5, None))
    skipped = f"{ties} ties and {unlabelled} pairs without a label of {len(pairs)} pairs"
    if ties + unlabelled == len(pairs):
        raise RewardError(f"{path}: no preferences to train on: {skipped}")
    if ties or unlabelled:
        logger.warning("%s: skipped %s", path, skipped)
    return [one for one in pairs if one[3][2] not in (0.5, None)]


def _active_preferences(path: Path, rows: Sequence[NumberedRow]) -> list[NumberedPair]:
    """Return the preferences of a dataset that their annotator did not undo."""
    groups = {row["lot"]: row for row in read_rows(path.parent / GROUPS) if isinstance(row.get("lot"), str)}
    active = [(number, row, *_pair_of_group(path, number, row, groups)) for number, row in drop_undone(rows)]
    return [(number, ("chosen", "rejected"), prompt, pair, _user(row)) for number, row, prompt, pair in active]


def drop_undone(rows: Sequence[NumberedRow]) -> list[NumberedRow]:
    """Drop the rows of choices.jsonl that were undone, and the undo rows."""
    undone, kept = set[str](), list[NumberedRow]()
    for number, row in reversed(rows):
        annotation_key = json.dumps([row.get("lot"), row.get("annotator")])
        if row.get("undo") is True:
            undone.add(annotation_key)
        elif annotation_key not in undone:
            kept.append((number, row))
    return kept[::-1]


def _pair_of_group(path: Path, number: int, row: Row, groups: Mapping[Any, Row]) -> tuple[Any, LabelledPair]:
    """Return the prompt and the pair of a recorded preference. Raises RewardError."""
    name = row.get("lot")
    if not isinstance(name, str) or name not in groups:
        raise RewardError(f"{path}, row {number}: group {name!r:.70} is not in {GROUPS}")
    if row.get("tie") is True:
        return "", (None, None, 0.5, 1.0)
    try:
        files = [one["file"] for one in groups[name]["images"]]
        chosen, rejected = (row[key] for key in ("chosen", "rejected"))
        if chosen == rejected or not all(type(one) is int and 0 <= one < len(files) for one in (chosen, rejected)):
            raise ValueError(chosen, rejected)
        return groups[name]["prompts"][0], (files[chosen], files[rejected], 1.0, 1.0)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        problem = f"chosen and rejected must be numbers of two images of group {name}"
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


def check_output(path: Path, sources: Sequence[Source]) -> None:
    """Raise RewardError for a file to which `write_pairs` cannot write pairs of these images."""
    suffix = path.suffix.lower()
    if suffix != ".parquet" and (suffix != ".jsonl" or any(isinstance(one, bytes) for one in sources)):
        raise RewardError(f"{path}: pairs are written to .jsonl files, or .parquet where images are bytes in the table")


def write_pairs(path: Path, pairs: Pairs, columns: Mapping[str, Sequence[Any]] | None = None) -> None:
    """Write pairs, and further columns, as a table that `read_pairs` reads. Raises RewardError, OSError.

    path  .jsonl, with the paths of images relative to it; .parquet if images are bytes
    The column strength is left out if every strength is 1.
    """
    check_output(path, (*pairs.a, *pairs.b))

    def cells(sources: Sequence[Source]) -> list[Any]:
        return [one if isinstance(one, bytes) else os.path.relpath(one, path.parent) for one in sources]

    choice, strength = ([round(n, 6) for n in one.tolist()] for one in (pairs.labels.choice, pairs.labels.strength))
    table = {"image_a": cells(pairs.a), "image_b": cells(pairs.b), "prompt": pairs.prompts, "choice": choice}
    table |= {"strength": strength} if set(strength) != {1.0} else {}
    table |= ({"user": pairs.users} if pairs.users else {}) | dict(columns or {})
    if path.suffix.lower() == ".parquet":
        import pyarrow
        from pyarrow import parquet

        with atomic_write(path) as new:
            parquet.write_table(pyarrow.table(table), new)
        return
    rows = zip(*table.values(), strict=True)
    write_text(path, "".join(json.dumps(dict(zip(table, row, strict=True))) + "\n" for row in rows))


def draw_pairs(prompts: Sequence[str], limit: int, seed: int) -> list[tuple[int, int]]:
    """Draw pairs of rows of each prompt, at most `limit` per prompt, without repetition."""
    generator, drawn = random.Random(seed), list[tuple[int, int]]()
    for rows in rows_by_prompt(prompts).values():
        pairs = list(itertools.combinations(rows, 2))
        drawn += generator.sample(pairs, min(limit, len(pairs)))
    return drawn


def load_images(sources: Sequence[Source], fit: Callable[[Tensor], Tensor]) -> Tensor:
    """Load images of any sizes as (N, 3, size, size); `fit` converts each from (1, 3, H, W) to (1, 3, size, size)."""
    return torch.cat([fit(read_image(source)[None]) for source in sources])


def split_by_prompt(prompts: Sequence[str], share: float, seed: int = 0) -> tuple[list[int], list[int]]:
    """Split rows into training and held-out: about `share` of the prompts, each with all of its rows."""
    names = sorted(set(prompts))
    random.Random(seed).shuffle(names)
    count = min(max(round(share * len(names)), 1), len(names) - 1) if share > 0 and len(names) > 1 else 0
    held = set(names[:count])
    rows = range(len(prompts))
    return [row for row in rows if prompts[row] not in held], [row for row in rows if prompts[row] in held]
