"""Prompts as people have them: rows of files, embedded lists, data sets of the hub."""

import logging
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from steer.apps.hub_files import data_files, in_a_line, some
from steer.apps.processes import speaks
from steer.apps.prompt_rows import COLUMN, READERS, TAG, PromptRow, chosen, filled, kind_of, others
from steer.assets import PROMPTS
from steer.choices import nearest
from steer.errors import InputError

logger = logging.getLogger(__name__)
HUB = (".parquet", ".tsv", ".jsonl", ".txt")  # others come as the parquet that the hub makes of every data set
LONGEST = 100_000  # characters of a prompt: far beyond what any text encoder reads


def find_prompts(source: str, column: str | None = None) -> list[str]:
    """Prompts by the name of an embedded list, from a file (`read_prompts`), or from a data set of the hub.

    source  a name in `steer.assets.PROMPTS`; a file; ORGANISATION/NAME or ORGANISATION/NAME:SPLIT (by default train;
            with a configuration, or another folder of the data set, FOLDER/SPLIT). A file that is there comes first.
    column  of a table, a key of JSON lines: as in `read_rows`
    Other columns are named in one line of the log. Raises InputError. With HF_HUB_OFFLINE=1 data sets come from the
    hub's cache.
    """
    return [row.prompt for row in _rows(source, column, ())]


def find_tagged(source: str, column: str | None = None, tag: str | None = None) -> tuple[list[str], list[str] | None]:
    """The prompts of `find_prompts`, and the tag of each: the task, the category.

    tag  the column of the tags, which must be there; by default "tag", and no tags where there is no such text
    """
    rows = _rows(source, column, (tag or TAG,))
    if tag is None and not any(TAG in map(str.lower, row.columns) for row in rows):
        return [row.prompt for row in rows], None
    tags: list[str] = []
    for row in rows:
        name = next((name for name in row.columns if name.lower() == (tag or TAG).lower()), None)
        if name is not None and isinstance(row.columns[name], str):
            tags.append(row.columns[name].strip())
        elif tag is None:
            return [one.prompt for one in rows], None
        else:
            got = f", got {kind_of(row.columns[name])}" if name is not None else others(list(row.columns))
            raise InputError(f'{source}: expected a text under "{tag}" beside the prompt {row.prompt!r:.60}{got}')
    return [row.prompt for row in rows], tags


def _rows(source: str, column: str | None, used: Collection[str]) -> list[PromptRow]:
    """The rows of a source. Columns that are neither prompts nor `used` are logged."""
    found = _found(source)
    files = [found] if isinstance(found, Path) else found
    tables = [_read(path, column) for path in files]
    rows, unread = [row for table, _ in tables for row in table], [name for _, names in tables for name in names]
    if not rows:
        raise InputError(
            f"{found}: no prompts in this file"
            if isinstance(found, Path)
            else f"data set {source!r}: no prompts in {some([path.name for path in found])}"
        )
    if source not in PROMPTS:
        note_unused(source, [*unused_columns(rows, used), *dict.fromkeys(unread)])
    return rows


def note_unused(source: object, names: Sequence[str]) -> None:
    """Log the columns of a source that have no use, in one line, by one of several processes."""
    if names and speaks():
        logger.warning("steer: %s", InputError(f"{source}: columns without a use here: {some(names)}"))


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
    return data_files(named[1], named[2] or "train", HUB)


def read_prompts(path: Path, column: str | None = None) -> list[str]:
    """The prompts of a file, in order: `read_rows` without the other columns."""
    return [row.prompt for row in read_rows(path, column)]


def read_rows(path: Path, column: str | None = None) -> list[PromptRow]:
    """The rows of a file, in order: .txt (a prompt a line), .jsonl, .json, .csv, .tsv or .parquet.

    Rows without a prompt are left out, and of a row the empty cells.

    column  key or column of the prompts, in small letters or large; by default prompt, else text or caption
    Raises InputError that names the file, and the line or row where there is one.
    """
    if not (rows := _read(path, column)[0]):
        raise InputError(f"{path}: no prompts in this file")
    return rows


def unused_columns(rows: Sequence[PromptRow], used: Collection[str] = ()) -> list[str]:
    """The columns of rows that are not in use, in order."""
    return [name for name in dict.fromkeys(name for row in rows for name in row.columns) if name.lower() not in used]


def _read(path: Path, column: str | None) -> tuple[list[PromptRow], list[str]]:
    """The rows of a file, and the columns that are not read."""
    if path.suffix.lower() not in READERS:
        raise InputError(f"{path}: prompts are read from {', '.join(READERS)} files")
    try:
        table = READERS[path.suffix.lower()](path, column)
    except OSError as error:
        raise InputError(f"{path}: cannot read the prompt file ({error.strerror or in_a_line(error)})") from error
    rows = []
    for where, cells in table.rows:
        key = chosen(list(cells), column, where) or COLUMN
        if prompt := cells[key].strip():
            check_prompt(prompt, str(path))
            columns = {name.strip(): value for name, value in cells.items() if name != key and filled(value)}
            rows.append(PromptRow(prompt, columns))
    return rows, list(table.unread)


def check_prompt(prompt: str, where: str) -> None:
    """Raises InputError, which begins with `where`, for what no tokenizer or image file can hold."""
    if len(prompt) > LONGEST:
        raise InputError(f"{where}: a prompt of {len(prompt)} characters: at most {LONGEST}, {prompt!r:.40}…")
    if found := re.search("[\0\ud800-\udfff]", prompt):
        raise InputError(f"{where}: the prompt {prompt!r:.70} holds {found[0]!r}, which is no text: leave it out")
