"""Prompts as people have them: text, JSON lines, tables; embedded lists; data sets of the hub."""

import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from steer.apps.hub_files import data_files, in_a_line, some
from steer.assets import PROMPTS
from steer.choices import nearest
from steer.errors import InputError

COLUMN, TAG = "prompt", "tag"
LONGEST = 100_000  # characters of a prompt: far beyond what any text encoder reads
MOST, LARGEST = 10_000_000, 4_000_000_000  # rows of a table, and characters in them
AT_ONCE = 1024  # rows


def find_prompts(source: str, column: str | None = None) -> list[str]:
    """Prompts by the name of an embedded list, from a file (`read_prompts`), or from a data set of the hub.

    source  a name in `steer.assets.PROMPTS`; a file; ORGANISATION/NAME or ORGANISATION/NAME:SPLIT (by default train;
            with a configuration, or another folder of the data set, FOLDER/SPLIT). A file that is there comes first.
    column  of a table, a key of JSON lines: as in `read_prompts`
    Raises InputError. With HF_HUB_OFFLINE=1 data sets come from the hub's cache.
    """
    found = _found(source)
    if isinstance(found, Path):
        return read_prompts(found, column)
    if not (prompts := [prompt for path in found for prompt in _read(path, column)]):
        raise InputError(f"data set {source!r}: no prompts in {some([path.name for path in found])}")
    return prompts


def find_tagged(source: str, column: str | None = None, tag: str | None = None) -> tuple[list[str], list[str] | None]:
    """The prompts of `find_prompts`, and the tag of each: the task, the category.

    tag  the column of the tags, which must be there; by default "tag", and no tags where there is no such text
    """
    prompts, found = find_prompts(source, column), _found(source)
    files = [found] if isinstance(found, Path) else found
    try:
        tags = [one for path in files for one in _tags(path, column, tag or TAG)]
    except InputError:
        if tag is not None:
            raise
        return prompts, None
    return prompts, tags


def _found(source: str) -> Path | list[Path]:
    """The file of prompts, or those of a data set."""
    if source in PROMPTS:
        return PROMPTS[source]
    path, named = Path(source), re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?::([\w./-]+))?", source)
    if os.path.isfile(source) or path.suffix.lower() in READERS:
        return path
    if os.path.isdir(source):
        hub = f" (or a split of the data set of the hub, {source}:train)" if named else ""
        raise InputError(f"{source}: a folder; name a file in it{hub}")
    if not named:
        raise InputError(
            f"unknown prompts {source!r:.80}: use {nearest(source, PROMPTS)}, a file that is there "
            f"({', '.join(READERS)}), or a data set of the hub, ORGANISATION/NAME[:SPLIT]"
        )
    return data_files(named[1], named[2] or "train", tuple(reversed(READERS)))


def read_prompts(path: Path, column: str | None = None) -> list[str]:
    """The prompts of a file, in order: .txt (one a line), .jsonl, .tsv or .parquet; empty ones are left out.

    column  key or column that holds them, in small letters or large; by default "prompt"
    Raises InputError that names the file, and the line or row where there is one.
    """
    if not (prompts := _read(path, column)):
        raise InputError(f"{path}: no prompts in this file")
    return prompts


def _read(path: Path, column: str | None) -> list[str]:
    if path.suffix.lower() not in READERS:
        raise InputError(f"{path}: prompts are read from {', '.join(READERS)} files")
    try:
        prompts = READERS[path.suffix.lower()](path, column)
    except OSError as error:
        raise InputError(f"{path}: cannot read the prompt file ({error.strerror or in_a_line(error)})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from error
    found = [stripped for prompt in prompts if (stripped := prompt.strip())]
    for prompt in found:
        check_prompt(prompt, str(path))
    return found


def check_prompt(prompt: str, where: str) -> None:
    """Raises InputError, which begins with `where`, for what no tokenizer or image file can hold."""
    if len(prompt) > LONGEST:
        raise InputError(f"{where}: a prompt of {len(prompt)} characters: at most {LONGEST}, {prompt!r:.40}…")
    if found := re.search("[\0\ud800-\udfff]", prompt):
        raise InputError(f"{where}: the prompt {prompt!r:.70} holds {found[0]!r}, which is no text: leave it out")


def _tags(path: Path, column: str | None, tag: str) -> list[str]:
    """Those beside the prompts that `_read` gives."""
    reader = READERS[path.suffix.lower()]
    return [one.strip() for prompt, one in zip(reader(path, column), reader(path, tag), strict=True) if prompt.strip()]


def _text(path: Path, column: str | None) -> list[str]:
    if column is not None:
        raise InputError(f"{path}: a .txt file has no columns, leave out column {column!r}")
    return _lines(path)


def _json_lines(path: Path, column: str | None) -> list[str]:
    prompts = []
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: not JSON ({error})") from error
        names = list(record) if isinstance(record, dict) else []
        key = _chosen(names, column)
        if key is None or not isinstance(record[key], str):
            got = f", got {_kind(record[key])}" if key is not None else _others(names)
            raise InputError(f'{path}, line {number}: expected an object with a text under "{column or COLUMN}"{got}')
        prompts.append(record[key])
    return prompts


def _table(path: Path, column: str | None) -> list[str]:
    rows = [line.split("\t") if line.strip() else [] for line in _lines(path)]
    header = [name.strip() for name in rows[0]]
    name = _chosen(header, column)
    if name is None:
        raise InputError(f'{path}, line 1: expected a column named "{column or COLUMN}"{_others(header)}')
    place = header.index(name)
    for number, row in enumerate(rows[1:], start=2):
        if row and len(row) <= place:
            raise InputError(f"{path}, line {number}: no column {place + 1}")
    return [row[place] for row in rows[1:] if row]


def _parquet(path: Path, column: str | None) -> list[str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f"{path}: parquet needs pyarrow: pip install 'steer-diffusion[train]'") from error
    try:
        with path.open("rb") as opened, parquet.ParquetFile(opened) as file:
            names = file.schema_arrow.names
            name = _chosen(names, column)
            values = [] if name is None else _column(path, file, name)
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: not a parquet file that can be read ({in_a_line(error)})") from error
    if name is None:
        raise InputError(f'{path}: expected a column named "{column or COLUMN}"{_others(names)}')
    for number, value in enumerate(values, start=1):
        if not isinstance(value, str):
            raise InputError(f'{path}, row {number}: expected a text under "{name}", got {_kind(value)}')
    return values


def _column(path: Path, file: Any, name: str) -> list[Any]:
    """What one column of a parquet file holds, that one alone: tables of the hub often hold images beside it.

    A part at a time: some hundred bytes can stand, or say that they stand, for gigabytes.
    """
    column, told = file.schema_arrow.field(name), file.metadata
    if column.type.num_fields:
        raise InputError(f'{path}: expected texts under "{name}", got {column.type!s:.80}')
    if told.num_rows > MOST:
        raise InputError(f"{path}: {told.num_rows} rows; at most {MOST} are read")
    values: list[Any] = []
    size = 0
    for batch in file.iter_batches(AT_ONCE, columns=[name]):
        values += (part := batch.column(0).to_pylist())
        if (size := size + sum(len(value) for value in part if isinstance(value, str | bytes))) > LARGEST:
            raise InputError(f"{path}: more than {LARGEST} characters of text")
    if len(values) != told.num_rows:
        raise InputError(f"{path}: not a parquet file that can be read ({len(values)} of {told.num_rows} rows)")
    return values


READERS: dict[str, Callable[[Path, str | None], list[str]]] = {
    ".txt": _text,
    ".jsonl": _json_lines,
    ".tsv": _table,
    ".parquet": _parquet,
}


def _lines(path: Path) -> list[str]:
    """Lines that end as files end them; other separators of Unicode may stand inside a prompt."""
    return path.read_text(encoding="utf-8-sig").replace("\r\n", "\n").split("\n")


def _chosen(names: Sequence[str], column: str | None) -> str | None:
    wanted = column or COLUMN
    alike = (name for name in names if name.strip().lower() == wanted.lower())
    return wanted if wanted in names else next(alike, None)


def _others(names: Sequence[str]) -> str:
    return f"; choose the column, there are {some(names)}" if any(names) else ""


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__
