"""Prompts from files, embedded lists and data sets of the hub."""

import inspect
import json
import logging
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from steer.apps.processes import is_main_process
from steer.apps.settings import SamplingConfig
from steer.arguments import IMAGES_PER_PROMPT, annotations_of, coerce_value
from steer.assets import PROMPTS
from steer.errors import InputError
from steer.registry import did_you_mean, nearest
from steer.tables import (
    DATA_SET,
    check_columns,
    data_files,
    numbered_lines,
    one_line,
    open_parquet,
    parse_cells,
    parse_json,
    read_text,
    summarize_names,
)

T = TypeVar("T")
COLUMN, TAG = "prompt", "tag"
NAMES = (("prompt", "prompts"), ("text", "texts", "caption", "captions"))  # columns of prompts; the first kind wins
MAX_ROWS, MAX_CHARACTERS = 10_000_000, 4_000_000_000  # rows of a table, and characters in them
BATCH_ROWS = 1024  # rows read at a time


@dataclass(frozen=True)
class PromptRow:
    """A row of a prompt file: the prompt, and the other non-empty columns by name."""

    prompt: str
    columns: Mapping[str, Any] = field(default_factory=dict)


# The records of a file, each with its place for messages, and the names of skipped columns, such as images.
Table = tuple[Iterable[tuple[str, Any]], Sequence[str]]


def find_column(names: Sequence[str], column: str | None, where: str) -> str | None:
    """Find the column of the prompts: `column`, else prompt, else text or caption, ignoring case.

    None if it is missing. Raises InputError if several columns qualify.
    """
    exact, kinds = (COLUMN, NAMES) if column is None else (column, [(column.strip().lower(),)])
    if exact in names:
        return exact
    for kind in kinds:
        result = [name for name in names if name.strip().lower() in kind]
        if len(result) > 1 and column is None:
            choices = summarize_names(result)
            raise InputError(f"{where}: {choices} could each be the prompts: choose one with --prompt-column")
        if result:
            return result[0]
    return None


def list_columns(names: Sequence[str]) -> str:
    """Return the end of a message about a missing column: the existing columns."""
    return f"; choose the column, there are {summarize_names([str(name) for name in names])}" if any(names) else ""


def describe_expected(column: str | None, kind: str, names: Sequence[str]) -> str:
    """Describe the expected column, and the existing columns."""
    return f'expected {kind} "{column or COLUMN}" (--prompt-column names another){list_columns(names)}'


def type_name(value: object) -> str:
    """Name a value's type; None is JSON's null."""
    return "null" if value is None else type(value).__name__


def _text(path: Path, column: str | None) -> Table:
    if column is not None:
        raise InputError(f"{path}: a .txt file has no columns, leave out column {column!r}")
    return numbered_lines(path), ()


def _json_lines(path: Path, column: str | None) -> Table:
    return ((where, parse_json(line, where)) for where, line in numbered_lines(path) if line.strip()), ()


def _prompt_and_columns(record: Any, where: str, column: str | None) -> tuple[str, dict[str, Any]]:
    """Split a record, a plain text or an object, into its prompt and the other columns that have a value."""
    cells = {column or COLUMN: record} if isinstance(record, str) else record
    names = list(cells) if isinstance(cells, dict) else []
    key = find_column(names, column, where)
    if key is None:
        raise InputError(f"{where}: {describe_expected(column, 'an object with a text under', names)}")
    if not isinstance(cells[key], str):
        raise InputError(f'{where}: expected a text under "{key}", got {type_name(cells[key])}')
    others = {name.strip(): value for name, value in cells.items() if name != key and has_value(value)}
    return cells[key].strip(), others


def _json(path: Path, column: str | None) -> Table:
    content = parse_json(read_text(path), str(path)) if path.stat().st_size else []
    return _records(content, path, column), ()


def _records(content: Any, path: Path, column: str | None) -> Iterator[tuple[str, Any]]:
    """Iterate over the records of a list, of an object of columns, or of an object of tags."""
    if isinstance(content, list):
        yield from ((f"{path}, entry {n}", one) for n, one in enumerate(content, start=1))
        return
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a list of prompts or objects, got {type_name(content)}")
    key = find_column(list(content), column, str(path))
    if key is not None and isinstance(content[key], str):
        yield str(path), content
    elif key is not None and isinstance(content[key], list) and not any(isinstance(one, dict) for one in content[key]):
        lengths = {name: len(one) if isinstance(one, list) else 1 for name, one in content.items()}
        if uneven := [name for name, length in lengths.items() if length != lengths[key]]:
            raise InputError(f"{path}: {lengths[key]} values under {key!r}, {lengths[uneven[0]]} under {uneven[0]!r}")
        columns = {name: one if isinstance(one, list) else [one] for name, one in content.items()}
        yield from ((f"{path}, entry {n + 1}", {c: v[n] for c, v in columns.items()}) for n in range(lengths[key]))
    else:
        yield from _tagged_records(content, path, column)


def _tagged_records(content: Mapping[str, Any], path: Path, column: str | None) -> Iterator[tuple[str, Any]]:
    """Iterate over {tag: [prompt or object, …]} and {name: object}: keys become the tags of their records."""
    for key, value in content.items():
        for number, one in enumerate(value if isinstance(value, list) else [value], start=1):
            where = f"{path}, {key!r:.60}, entry {number}"
            if not isinstance(one, dict) and not (isinstance(one, str) and isinstance(value, list)):
                raise InputError(f"{path}: {describe_expected(column, 'a list under', list(content))}")
            record = {column or COLUMN: one} if isinstance(one, str) else one
            yield where, ({TAG: key} if len(content) > 1 else {}) | record


def _csv(path: Path, column: str | None) -> Table:
    return _table_from_cells(path, parse_cells(path), column), ()


def _tsv(path: Path, column: str | None) -> Table:
    try:
        cells = parse_cells(path, "\t")
    except InputError:  # quotes are plain characters: many .tsv files are written without quoting
        cells = [(where, line.split("\t")) for where, line in numbered_lines(path)]
    return _table_from_cells(path, cells, column), ()


def _table_from_cells(
    path: Path, rows: Sequence[tuple[str, list[str]]], column: str | None
) -> list[tuple[str, dict[str, str]]]:
    (line, names), *full_rows = [row for row in rows if any(map(str.strip, row[1]))] or [(f"{path}, line 1", [])]
    header = [name.strip() for name in names]
    name = find_column(header, column, line)
    if name is None:
        raise InputError(f"{line}: {describe_expected(column, 'a column named', header)}")
    check_columns(line, header)
    for where, row in full_rows:
        if len(row) <= header.index(name):
            raise InputError(f"{where}: no column {header.index(name) + 1}")
        if any(cell.strip() for cell in row[len(header) :]):
            problem = f"{len(row)} values for {len(header)} columns"
            raise InputError(f"{where}: {problem}: quote prompts that contain the separator")
    return [(where, {one: cell for one, cell in zip(header, row, strict=False) if one}) for where, row in full_rows]


def _parquet(path: Path, column: str | None) -> Table:
    with open_parquet(path) as file:
        names = file.schema_arrow.names
        name = find_column(names, column, str(path))
        if name is None:
            raise InputError(f"{path}: {describe_expected(column, 'a column named', names)}")
        if file.schema_arrow.field(name).type.num_fields:
            kind = f"{file.schema_arrow.field(name).type!s:.80}"
            raise InputError(f'{path}: expected texts under "{name}", got {kind}')
        plain = [one for one in dict.fromkeys(names) if one == name or _is_plain(file.schema_arrow, one)]
        rows = _parquet_rows(path, file, plain)
    skipped = [one for one in names if one not in plain]
    return [(f"{path}, row {number}", row) for number, row in enumerate(rows, start=1)], skipped


def _is_plain(schema: Any, name: str) -> bool:
    """Tell whether a column of a parquet file holds texts or numbers: images are skipped."""
    from pyarrow import types

    if schema.names.count(name) > 1:
        return False
    kind = schema.field(name).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    tests = (types.is_string, types.is_large_string, types.is_integer, types.is_floating, types.is_boolean)
    return any(test(kind) for test in tests)


def _parquet_rows(path: Path, file: Any, names: Sequence[str]) -> list[dict[str, Any]]:
    """Read columns of a parquet file in batches: a few hundred bytes can expand to gigabytes."""
    content = file.metadata
    if content.num_rows > MAX_ROWS:
        raise InputError(f"{path}: {content.num_rows} rows; at most {MAX_ROWS} are read")
    rows: list[dict[str, Any]] = []
    size = 0
    for batch in file.iter_batches(BATCH_ROWS, columns=list(names)):
        rows += (part := batch.to_pylist())
        size += sum(len(value) for row in part for value in row.values() if isinstance(value, str | bytes))
        if size > MAX_CHARACTERS:
            raise InputError(f"{path}: more than {MAX_CHARACTERS} characters of text")
    if len(rows) != content.num_rows:
        raise InputError(f"{path}: not a parquet file that can be read ({len(rows)} of {content.num_rows} rows)")
    return rows


READERS: dict[str, Callable[[Path, str | None], Table]] = {
    ".txt": _text,
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
}


def has_value(value: Any) -> bool:
    """Tell whether a cell has a value: not empty, null or nan."""
    return bool(value.strip()) if isinstance(value, str) else value is not None and value == value


logger = logging.getLogger(__name__)
HUB = (".parquet", ".tsv", ".jsonl", ".txt")  # other formats are read from the hub's conversion to parquet
MAX_PROMPT_LENGTH = 100_000  # characters: far more than any text encoder reads


def load_prompts(source: str, column: str | None = None) -> list[str]:
    """Load prompts from an embedded list, a file (`read_rows`) or a data set of the hub.

    source  a name in `steer.assets.PROMPTS`; a file; ORGANISATION/NAME or ORGANISATION/NAME:SPLIT (by default train;
            FOLDER/SPLIT for a configuration or another folder). An existing file comes first.
    column  column of a table or key of JSON lines, as in `read_rows`
    Unused columns are logged in one line. Raises InputError. With HF_HUB_OFFLINE=1 data sets are read from the hub's
    cache.
    """
    return [row.prompt for row in load_rows(source, column, ())]


def evenly_chosen(rows: Sequence[T], count: int | None) -> list[T]:
    """Return `count` evenly spaced rows; all rows if there are no more, or for None."""
    count = min(count or len(rows), len(rows))
    return [rows[place * len(rows) // count] for place in range(count)]


def load_tagged_prompts(
    source: str, column: str | None = None, tag: str | None = None
) -> tuple[list[str], list[str] | None]:
    """Load prompts as `load_prompts` does, and the tag (task, category) of each.

    tag  column of the tags, which must exist; by default "tag", with None as tags if there is no such column
    """
    rows, name = load_rows(source, column, (tag or TAG,)), (tag or TAG).lower()
    cells = [next((value for key, value in row.columns.items() if key.lower() == name), None) for row in rows]
    prompts, tags = [row.prompt for row in rows], [cell.strip() for cell in cells if isinstance(cell, str)]
    if tag is None:
        return prompts, tags if len(tags) == len(prompts) else None
    for row, cell in zip(rows, cells, strict=True):
        if not isinstance(cell, str):
            problem = list_columns(list(row.columns)) if cell is None else f", got {type_name(cell)}"
            raise InputError(f'{source}: expected a text under "{tag}" beside the prompt {row.prompt!r:.60}{problem}')
    return prompts, tags


def load_rows(source: str, column: str | None, used: Collection[str]) -> list[PromptRow]:
    """Load the rows of a source as `load_prompts` does, and log the columns that are neither prompts nor `used`."""
    files = _locate(source)
    tables = [_read(path, column) for path in files]
    rows, skipped = [row for table, _ in tables for row in table], [name for _, names in tables for name in names]
    if not rows and files == [Path(source)]:
        raise InputError(f"{source}: no prompts in this file")
    if not rows:
        raise InputError(f"data set {source!r}: no prompts in {summarize_names([path.name for path in files])}")
    if source not in PROMPTS:
        note_unused(source, [*unused_columns(rows, [name.lower() for name in used]), *dict.fromkeys(skipped)])
    return rows


def metadata_of(rows: Sequence[PromptRow], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the named columns as the metadata of each prompt. Raises InputError for a column that no row has."""
    known = {name.lower(): name for row in rows for name in row.columns}
    if rows and (missing := [name for name in names if name.lower() not in known]):
        raise InputError(f"no prompt has a column {missing[0]!r}{list_columns(list(known.values()))}")
    wanted = {name.lower(): name for name in names}
    return [{wanted[k.lower()]: value for k, value in row.columns.items() if k.lower() in wanted} for row in rows]


def note_unused(source: object, names: Sequence[str]) -> None:
    """Log the unused columns of a source in one line, in the main process."""
    if names and is_main_process():
        logger.warning("steer: %s", InputError(f"{source}: unused columns: {summarize_names(names)}"))


def _locate(source: str) -> list[Path]:
    """Locate the file of a source, or the files of a data set."""
    if source in PROMPTS:
        return [PROMPTS[source]]
    path, named = Path(source), DATA_SET.fullmatch(source)
    if os.path.isfile(source) or path.suffix.lower() in READERS:
        return [path]
    if os.path.isdir(source):
        hub = f" (or a split of the data set of the hub, {source}:train)" if named else ""
        raise InputError(f"{source}: a folder; name a file in it{hub}")
    if not named:
        raise InputError(
            f"unknown prompts {source!r:.80}: use {nearest(source, PROMPTS)}, an existing file "
            f"({', '.join(READERS)}), or a data set of the hub, ORGANISATION/NAME[:SPLIT]"
        )
    return list(data_files(named[1], named[2] or "train", HUB))


def read_rows(path: Path, column: str | None = None) -> list[PromptRow]:
    """Read the rows of a file, in order: .txt (one prompt per line), .jsonl, .json, .csv, .tsv or .parquet.

    Rows without a prompt and empty cells are dropped.

    column  key or column of the prompts, ignoring case; by default prompt, else text or caption
    Raises InputError that names the file and, if possible, the line or row.
    """
    if not (rows := _read(path, column)[0]):
        raise InputError(f"{path}: no prompts in this file")
    return rows


def unused_columns(rows: Sequence[PromptRow], used: Collection[str] = ()) -> list[str]:
    """List the columns of rows that are not in `used`, in order."""
    return [name for name in dict.fromkeys(name for row in rows for name in row.columns) if name.lower() not in used]


def _read(path: Path, column: str | None) -> tuple[list[PromptRow], Sequence[str]]:
    """Read the rows of a file, and the names of skipped columns."""
    if path.suffix.lower() not in READERS:
        raise InputError(f"{path}: prompts are read from {', '.join(READERS)} files")
    try:
        records, skipped = READERS[path.suffix.lower()](path, column)
    except OSError as error:
        raise InputError(f"{path}: cannot read the prompt file ({error.strerror or one_line(error)})") from error
    rows = []
    for where, record in records:
        prompt, columns = _prompt_and_columns(record, where, column)
        if prompt:
            check_prompt(prompt, str(path))
            rows.append(PromptRow(prompt, columns))
    return rows, skipped


def check_prompt(prompt: str, where: str) -> None:
    """Raise InputError, which begins with `where`, for a prompt that a tokenizer or PNG cannot hold."""
    if len(prompt) > MAX_PROMPT_LENGTH:
        raise InputError(f"{where}: a prompt of {len(prompt)} characters: at most {MAX_PROMPT_LENGTH}, {prompt!r:.40}…")
    if result := re.search("[\0\ud800-\udfff]", prompt):
        raise InputError(f"{where}: the prompt {prompt!r:.70} holds {result[0]!r}, which is not text: remove it")


# Columns that set a setting of `steer sample`: {column: setting}.
SETTINGS = {"seed": "seed", "guidance_scale": "guidance", "num_inference_steps": "steps", "eta": "eta"}
# Arguments that steering itself sets, or that a cell cannot contain.
RESERVED_ARGUMENTS = (
    *("prompt", "generator", "latents", "num_images_per_prompt", "num_videos_per_prompt", "batch_size"),
    *("output_type", "return_dict", "callback", "callback_steps"),
    *("callback_on_step_end", "callback_on_step_end_tensor_inputs"),
)
LARGEST_SIZES = {"height": 8192, "width": 8192}  # pixels: a recipe is untrusted
MAX_VALUE = 100_000


@dataclass(frozen=True)
class SampleRequest:
    """A prompt to sample, with its settings and arguments of the pipeline's call."""

    prompt: str
    settings: SamplingConfig
    arguments: Mapping[str, Any]


def row_config(row: PromptRow, settings: SamplingConfig) -> SamplingConfig:
    """Apply the seed, guidance, steps and η of a row to the settings of the run.

    Raises InputError for an invalid value.
    """
    given = {name: SETTINGS[name.lower()] for name in row.columns if name.lower() in SETTINGS}
    hints, where = SamplingConfig.hints(), f"prompt {row.prompt!r:.60}, column"
    overrides = {to: cell(f"{where} {name!r}", hints[to], row.columns[name]) for name, to in given.items()}
    try:
        return replace(settings, **overrides) if overrides else settings
    except InputError as error:
        raise InputError(f"prompt {row.prompt!r:.60}: {error}") from error


def sample_requests(rows: Sequence[PromptRow], settings: SamplingConfig, pipe: Any) -> list[SampleRequest]:
    """Turn rows into requests for a pipeline.

    The n-th of equal rows without a seed column has seed + n, so that their images differ.
    Raises InputError for a value that is invalid for the pipeline's argument.
    """
    result: list[SampleRequest] = []
    before: dict[str, int] = {}
    hints = argument_names(type(pipe))
    for row in rows:
        given = {name.lower(): (name, value) for name, value in row.columns.items() if name.lower() in hints}
        where = f"prompt {row.prompt!r:.60}, column"
        arguments = {key: cell(f"{where} {name!r}", hints[key], value) for key, (name, value) in given.items()}
        config = row_config(row, settings)
        check_size(config.call_arguments | arguments, f"prompt {row.prompt!r:.60}: ")
        if "seed" not in map(str.lower, row.columns):
            key = json.dumps([row.prompt, arguments, config.steps, config.guidance, config.eta], sort_keys=True)
            number = before[key] = before.get(key, -1) + 1
            config = replace(config, seed=(config.seed + number) % 2**63)
        result.append(SampleRequest(row.prompt, config, arguments))
    return result


def check_size(arguments: Mapping[str, Any], where: str = "") -> None:
    """Raise InputError if the arguments of a call have only a height or only a width."""
    sizes = [name for name in ("height", "width") if arguments.get(name) is not None]
    if len(sizes) == 1:
        raise InputError(f"{where}{sizes[0]} alone is ignored by several pipelines of diffusers: give height and width")


def argument_names(kind: type[Any]) -> dict[str, Any]:
    """Collect the call arguments of a pipeline class that a cell may set: {name: annotation}."""
    hints = annotations_of(kind.__call__)
    names = [name for name in inspect.signature(kind.__call__).parameters if name in hints]
    return {
        name: hints[name]
        for name in names
        if name not in (*RESERVED_ARGUMENTS, *SETTINGS) and _takes_plain_value(hints[name])
    }


# Settings in place of arguments of the call.
FLAGS = {name: f"--{setting}" for name, setting in SETTINGS.items()} | dict.fromkeys(IMAGES_PER_PROMPT, "--particles")


def call_arguments(kind: type[Any], settings: SamplingConfig) -> dict[str, Any]:
    """Return the call arguments of a pipeline class that the settings give: `call`, size, negative prompt.

    Raises InputError for an argument that the call does not take, or an invalid value.
    """
    given = settings.call_arguments
    hints = argument_names(kind) if given else {}
    for name in given:
        if name in hints:
            continue
        flag = f"--{name.replace('_', '-')}" if name in ("negative_prompt", "height", "width") else f"--call {name}"
        if name in FLAGS:
            raise InputError(f"{flag}: this is a setting of its own: use {FLAGS[name]}")
        if name in RESERVED_ARGUMENTS:
            raise InputError(f"{flag}: steering sets this argument itself: leave it out")
        if name in inspect.signature(kind.__call__).parameters:
            raise InputError(f"{flag}: {kind.__name__} takes an object here, which a text cannot give: use Python")
        hint = did_you_mean(name, hints, f"see the arguments of {kind.__name__}.__call__")
        raise InputError(f"{flag}: {kind.__name__} has no such argument: {hint}")
    return {name: cell(f"argument {name!r}", hints[name], value) for name, value in given.items()}


def check_arguments(arguments: Any, where: str) -> dict[str, Any]:
    """Check the arguments in an untrusted image: plain values in range. Raises InputError."""
    if not isinstance(arguments, dict) or len(arguments) > 64:
        raise InputError(f"{where}: expected an object of at most 64 arguments")
    for name, value in arguments.items():
        values = value if isinstance(value, list) else [value]
        if len(values) > 64 or not all(_is_plain_value(name, one) for one in values):
            raise InputError(f"{where}: {name!r:.40}: expected texts or numbers in range, got {value!r:.40}")
    return arguments


def _is_plain_value(name: str, value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= MAX_VALUE and "\0" not in value
    return value is None or (isinstance(value, int | float) and abs(value) <= LARGEST_SIZES.get(name, MAX_VALUE))


def cell(where: str, hint: Any, value: Any) -> Any:
    """Convert a cell to the annotation of an argument: texts are parsed if the annotation has numbers.

    Raises InputError that begins with `where`.
    """
    if isinstance(value, str) and "str" not in str(hint):
        try:
            value = json.loads(value.strip().lower())
        except ValueError as error:
            problem = f"{value!r:.60} is not a value of it"
            raise InputError(f"{where}: {problem}: leave the cell empty for the default") from error
    return coerce_value(where, hint, value)


def _takes_plain_value(hint: Any) -> bool:
    """Tell whether an annotation takes a text, a number or a boolean, and no images or functions."""
    text = str(hint)
    plain = any(kind in text for kind in ("str", "int", "float", "bool"))
    return plain and not any(kind in text for kind in ("Image", "Tensor", "Callable", "Callback", "dict", "Dict"))
