"""Rows of prompt files as people have them: text, JSON, JSON lines, CSV, TSV, parquet; UTF-8 or UTF-16."""

import codecs
import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steer.apps.hub_files import in_a_line, some
from steer.errors import InputError

COLUMN, TAG = "prompt", "tag"
NAMES = (("prompt", "prompts"), ("text", "texts", "caption", "captions"))  # columns of prompts; the first kind wins
MOST, LARGEST = 10_000_000, 4_000_000_000  # rows of a table, and characters in them
AT_ONCE = 1024  # rows
# Longer marks first: that of UTF-32 begins with that of UTF-16.
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
DELIMITERS = ",;\t"


@dataclass(frozen=True)
class PromptRow:
    """A row of a prompt file: its prompt, and the other columns by name, without empty cells."""

    prompt: str
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """Rows as {column: value}, each with its place for messages, and columns that are not read (of images)."""

    rows: Sequence[tuple[str, dict[str, Any]]]
    unread: Sequence[str] = ()


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark. Raises InputError, OSError."""
    data = path.read_bytes()
    encoding = next((name for mark, name in MARKS if data.startswith(mark)), "utf-8-sig")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        what = "not UTF-8 text" if encoding == "utf-8-sig" else f"not UTF-8 text, nor {encoding.upper()} as it begins"
        raise InputError(f"{path}: {what} (byte {error.start}): save it as UTF-8") from error


def chosen(names: Sequence[str], column: str | None, where: str) -> str | None:
    """The column of the prompts: the one asked for, else one called prompt, text or caption, in any letters.

    None where there is none. Raises InputError where several could be it.
    """
    if column is not None:
        alike = [name for name in names if name.strip().lower() == column.strip().lower()]
        return column if column in names else next(iter(alike), None)
    if COLUMN in names:
        return COLUMN
    for kind in NAMES:
        found = [name for name in names if name.strip().lower() in kind]
        if len(found) > 1:
            raise InputError(f"{where}: {some(found)} could each be the prompts: choose one with --prompt-column")
        if found:
            return found[0]
    return None


def others(names: Sequence[str]) -> str:
    """The end of a message about a column that is not there."""
    return f"; choose the column, there are {some([str(name) for name in names])}" if any(names) else ""


def expected(column: str | None, kind: str, names: Sequence[str]) -> str:
    """The middle of that message."""
    return f'expected {kind} "{column or COLUMN}" (--prompt-column names another){others(names)}'


def kind_of(value: object) -> str:
    """The name of a value's type, as JSON has it where it is null."""
    return "null" if value is None else type(value).__name__


def _lines(path: Path) -> list[str]:
    """Lines that end as files end them; other separators of Unicode may stand inside a prompt."""
    return read_text(path).replace("\r\n", "\n").split("\n")


def _text(path: Path, column: str | None) -> Table:
    if column is not None:
        raise InputError(f"{path}: a .txt file has no columns, leave out column {column!r}")
    return Table([(f"{path}, line {n}", {COLUMN: line}) for n, line in enumerate(_lines(path), start=1)])


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error})") from error


def _json_lines(path: Path, column: str | None) -> Table:
    rows = []
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            record = _parsed(line, where := f"{path}, line {number}")
            rows.append((where, _record(record, where, column)))
    return Table(rows)


def _record(record: Any, where: str, column: str | None) -> dict[str, Any]:
    """An object with its prompt; a text alone is one."""
    if isinstance(record, str):
        return {column or COLUMN: record}
    names = list(record) if isinstance(record, dict) else []
    key = chosen(names, column, where)
    if key is None or not isinstance(record[key], str):
        if key is not None:
            raise InputError(f'{where}: expected an object with a text under "{key}", got {kind_of(record[key])}')
        raise InputError(f"{where}: {expected(column, 'an object with a text under', names)}")
    return dict(record)


def _json(path: Path, column: str | None) -> Table:
    told = _parsed(read_text(path), str(path)) if path.stat().st_size else []
    return Table([(where, _record(one, where, column)) for where, one in _records(told, path, column)])


def _records(told: Any, path: Path, column: str | None) -> Iterator[tuple[str, Any]]:
    """Of a list; of an object with lists as columns; of one with a list, or an object, for each tag."""
    if isinstance(told, list):
        yield from ((f"{path}, entry {n}", one) for n, one in enumerate(told, start=1))
        return
    if not isinstance(told, dict):
        raise InputError(f"{path}: expected a list of prompts or objects, got {kind_of(told)}")
    key = chosen(list(told), column, str(path))
    if key is not None and isinstance(told[key], str):
        yield str(path), told
    elif key is not None and isinstance(told[key], list) and not any(isinstance(one, dict) for one in told[key]):
        lengths = {name: len(one) if isinstance(one, list) else 1 for name, one in told.items()}
        if uneven := [name for name, length in lengths.items() if length != lengths[key]]:
            raise InputError(f"{path}: {lengths[key]} values under {key!r}, {lengths[uneven[0]]} under {uneven[0]!r}")
        columns = {name: one if isinstance(one, list) else [one] for name, one in told.items()}
        yield from ((f"{path}, entry {n + 1}", {c: v[n] for c, v in columns.items()}) for n in range(lengths[key]))
    else:
        yield from _tagged(told, path, column)


def _tagged(told: Mapping[str, Any], path: Path, column: str | None) -> Iterator[tuple[str, Any]]:
    """Of {tag: [prompt or object, …]} and {name: object}: the key of a list is the tag of its entries."""
    for key, value in told.items():
        for number, one in enumerate(value if isinstance(value, list) else [value], start=1):
            where = f"{path}, {key!r:.60}, entry {number}"
            if not isinstance(one, dict) and not (isinstance(one, str) and isinstance(value, list)):
                raise InputError(f"{path}: {expected(column, 'a list under', list(told))}")
            record = {column or COLUMN: one} if isinstance(one, str) else one
            yield where, ({TAG: key} if len(told) > 1 else {}) | record


def _csv(path: Path, column: str | None) -> Table:
    text = read_text(path)
    head = text.lstrip("\r\n").partition("\n")[0]
    return _of_cells(path, _cells(path, text, max(DELIMITERS, key=head.count)), column)


def _tsv(path: Path, column: str | None) -> Table:
    text = read_text(path)
    try:
        cells = _cells(path, text, "\t")
    except InputError:  # quotes that are letters: tables of tabs are often written without quoting
        lines = text.replace("\r\n", "\n").split("\n")
        cells = [(number, line.split("\t")) for number, line in enumerate(lines, start=1)]
    return _of_cells(path, cells, column)


def _cells(path: Path, text: str, delimiter: str) -> list[tuple[int, list[str]]]:
    """The number of the last line of each row, and its cells."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        return [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not a table that can be read ({error})") from error


def _of_cells(path: Path, rows: Sequence[tuple[int, list[str]]], column: str | None) -> Table:
    filled = [(number, row) for number, row in rows if any(cell.strip() for cell in row)]
    header = [name.strip() for name in (filled[0][1] if filled else [])]
    line = f"{path}, line {filled[0][0] if filled else 1}"
    name = chosen(header, column, line)
    if name is None:
        raise InputError(f"{line}: {expected(column, 'a column named', header)}")
    if twice := [one for one in header if one and header.count(one) > 1]:
        raise InputError(f"{line}: the column {twice[0]!r} is there twice: leave one of them out")
    found = []
    for number, row in filled[1:]:
        if len(row) <= header.index(name):
            raise InputError(f"{path}, line {number}: no column {header.index(name) + 1}")
        if any(cell.strip() for cell in row[len(header) :]):
            raise InputError(
                f"{path}, line {number}: {len(row)} values for {len(header)} columns: put a prompt with the separator "
                "in it in quotes"
            )
        found.append((f"{path}, line {number}", {one: cell for one, cell in zip(header, row, strict=False) if one}))
    return Table(found)


def _parquet(path: Path, column: str | None) -> Table:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f"{path}: parquet needs pyarrow: pip install 'steer-diffusion[train]'") from error
    try:
        with path.open("rb") as opened, parquet.ParquetFile(opened) as file:
            names = file.schema_arrow.names
            name = chosen(names, column, str(path))
            if name is None:
                raise InputError(f"{path}: {expected(column, 'a column named', names)}")
            if file.schema_arrow.field(name).type.num_fields:
                kind = f"{file.schema_arrow.field(name).type!s:.80}"
                raise InputError(f'{path}: expected texts under "{name}", got {kind}')
            plain = [one for one in dict.fromkeys(names) if one == name or _is_plain(pyarrow, file.schema_arrow, one)]
            rows = _rows_of(path, file, plain)
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: not a parquet file that can be read ({in_a_line(error)})") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row[name], str):
            raise InputError(f'{path}, row {number}: expected a text under "{name}", got {kind_of(row[name])}')
    unread = [one for one in names if one not in plain]
    return Table([(f"{path}, row {number}", row) for number, row in enumerate(rows, start=1)], unread)


def _is_plain(pyarrow: Any, schema: Any, name: str) -> bool:
    """Whether a column of a parquet file holds texts or numbers: images beside the prompts are not read."""
    if schema.names.count(name) > 1:
        return False
    kind, types = schema.field(name).type, pyarrow.types
    kind = kind.value_type if types.is_dictionary(kind) else kind
    tests = (types.is_string, types.is_large_string, types.is_integer, types.is_floating, types.is_boolean)
    return any(test(kind) for test in tests)


def _rows_of(path: Path, file: Any, names: Sequence[str]) -> list[dict[str, Any]]:
    """Some columns of a parquet file, a part at a time: some hundred bytes can stand for gigabytes."""
    told = file.metadata
    if told.num_rows > MOST:
        raise InputError(f"{path}: {told.num_rows} rows; at most {MOST} are read")
    rows: list[dict[str, Any]] = []
    size = 0
    for batch in file.iter_batches(AT_ONCE, columns=list(names)):
        rows += (part := batch.to_pylist())
        size += sum(len(value) for row in part for value in row.values() if isinstance(value, str | bytes))
        if size > LARGEST:
            raise InputError(f"{path}: more than {LARGEST} characters of text")
    if len(rows) != told.num_rows:
        raise InputError(f"{path}: not a parquet file that can be read ({len(rows)} of {told.num_rows} rows)")
    return rows


READERS: dict[str, Callable[[Path, str | None], Table]] = {
    ".txt": _text,
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
}


def filled(value: Any) -> bool:
    """Whether a cell holds something: not empty, null or nan, as tables write what is missing."""
    if isinstance(value, str):
        return bool(value.strip())
    return value is not None and not (isinstance(value, float) and math.isnan(value))
