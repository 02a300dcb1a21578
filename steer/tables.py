"""Tables: text files in any Unicode encoding, and the files of data sets on the hub."""

import codecs
import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

from steer.errors import InputError

# UTF-32 first: its mark begins with the mark of UTF-16.
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_text(path: Path) -> str:
    """Read a text file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark. Raises InputError, OSError."""
    try:
        data = path.read_bytes()
    except ValueError as error:  # a null byte
        raise InputError(f"{str(path)!r}: not the name of a file") from error
    encoding = next((name for mark, name in BYTE_ORDER_MARKS if data.startswith(mark)), "utf-8-sig")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        kind = "UTF-8 text" if encoding == "utf-8-sig" else f"the {encoding.upper()} text of its byte order mark"
        raise InputError(f"{path}: not {kind} (byte {error.start}): save it as UTF-8") from error


def numbered_lines(path: Path) -> list[tuple[str, str]]:
    """Split a text file at line ends alone, since texts may contain other Unicode separators; each with its place."""
    lines = read_text(path).replace("\r\n", "\n").split("\n")
    return [(f"{path}, line {number}", line) for number, line in enumerate(lines, start=1)]


def parse_json(text: str, where: str) -> Any:
    """Parse JSON. Raises InputError, which begins with `where`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error})") from error


@contextmanager
def open_parquet(path: Path) -> Iterator[Any]:
    """Open a parquet file as a pyarrow.parquet.ParquetFile. Raises InputError without pyarrow and for a broken file."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f"{path}: parquet needs pyarrow: pip install 'steer-diffusion[train]'") from error
    try:
        with path.open("rb") as opened, parquet.ParquetFile(opened) as file:
            yield file
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:  # texts are decoded as they are read
        raise InputError(f"{path}: not a parquet file that can be read ({one_line(error)})") from error


DELIMITERS = ",;\t"


def parse_cells(path: Path, delimiter: str | None = None) -> list[tuple[str, list[str]]]:
    """Parse the cells of each row of a .csv or .tsv file, with its place: file and last line.

    delimiter  by default the most frequent one of the first line. Raises InputError.
    """
    text = read_text(path)
    head = text.lstrip("\r\n").partition("\n")[0]
    delimiter = delimiter or max(DELIMITERS, key=head.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        return [(f"{path}, line {reader.line_num}", row) for row in reader]
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not a readable table ({error})") from error


def check_columns(place: str, names: Sequence[str]) -> None:
    """Raise InputError for a repeated name; columns without a name are no columns."""
    if repeated := [name for name in names if name and names.count(name) > 1]:
        raise InputError(f"{place}: column {repeated[0]!r} is repeated: remove one")


DATA_SET = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?::([\w./-]+))?")  # ORGANISATION/NAME[:SPLIT] on the hub
CONVERTED = "refs/convert/parquet"  # the hub converts nearly every data set to CONFIG/SPLIT/0000.parquet
SPLITS = {"train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval"}
SHARD = r"(.+)-\d+-of-(\d+)(-[0-9a-f]+)?"  # as in train-00000-of-00003
NO_DATA = {"readme", "license", "requirements"}  # text files that hold no prompts
MAX_SHOWN = 8  # names in a message
MAX_ERROR_LENGTH = 160  # characters of another library's message


def data_files(data_set: str, split: str, formats: Sequence[str], kind: str = "prompts") -> Iterator[Path]:
    """Download the files of a split lazily to the hub's cache, in the first available format.

    The data set's own files come before the hub's conversion to parquet.

    split    a name, or FOLDER/NAME if several folders (configurations) have such a split
    formats  suffixes, best first
    kind     kind of data, for messages
    Raises InputError. With HF_HUB_OFFLINE=1 only the cache is read.
    """
    import huggingface_hub

    available: list[str] = []
    for revision in (None, CONVERTED):
        listed = _list_files(data_set, revision, kind)
        available += listed
        if names := _select_folder(data_set, split, select_split(listed, split, formats)):
            shard = re.fullmatch(SHARD, Path(names[0]).stem)
            if huggingface_hub.constants.HF_HUB_OFFLINE and shard and len(names) < int(shard[2]):
                raise InputError(
                    f"data set {data_set!r}: {len(names)} of {int(shard[2])} files are in the hub's cache: "
                    "unset HF_HUB_OFFLINE (no --offline) once to download the others"
                )
            download = partial(huggingface_hub.hf_hub_download, data_set, repo_type="dataset", revision=revision)
            for name in names:
                with _hub_errors(data_set, kind):
                    path = Path(download(name))
                yield path
            return
    empty = "it is empty, or (HF_HUB_OFFLINE=1) not in the hub's cache"
    content = f"only {summarize_names(available)}" if available else empty
    raise InputError(f"data set {data_set!r}: no {', '.join(formats)} files of split {split!r}: {content}")


def summarize_names(names: Sequence[str]) -> str:
    """Join the first names, and count the others."""
    more = f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else ""
    return ", ".join(names[:MAX_SHOWN]) + more


def one_line(error: Exception) -> str:
    """Shorten the message of another library to one line."""
    return " ".join(str(error).split())[:MAX_ERROR_LENGTH] or type(error).__name__


def _list_files(data_set: str, revision: str | None, kind: str) -> list[str]:
    """List the files of a data set at a revision; none without such a revision or, offline, without a cached copy."""
    import huggingface_hub
    from huggingface_hub import constants, errors

    with _hub_errors(data_set, kind):
        try:
            if not constants.HF_HUB_OFFLINE:
                # list_repo_files retries for half a minute without a network.
                files = huggingface_hub.HfApi().dataset_info(data_set, revision=revision).siblings
                return [file.rfilename for file in files or ()]
            folder = huggingface_hub.snapshot_download(
                data_set, repo_type="dataset", revision=revision, local_files_only=True
            )
        except (errors.RevisionNotFoundError, errors.LocalEntryNotFoundError):
            return []
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())


def select_split(names: Iterable[str], split: str, formats: Sequence[str]) -> list[str]:
    """Select the files of a split; if no file name contains a split, all belong to train."""
    paths = ((name, Path(name.lower())) for name in names)
    known = [name for name, path in paths if path.suffix in formats and path.stem not in NO_DATA]
    wanted = set(split.lower().split("/"))
    if not any(_words(name) & SPLITS for name in known):
        wanted -= {"train"}
    matching = sorted(name for name in known if wanted <= _words(name))
    by_format = ([name for name in matching if name.lower().endswith(suffix)] for suffix in formats)
    return next(filter(None, by_format), [])


def _words(name: str) -> set[str]:
    """Split a path into words: its folders, and `train` for train-00000-of-00003.parquet or my_train2.jsonl."""
    *folders, stem = Path(name.lower()).with_suffix("").parts
    shard = re.fullmatch(SHARD, stem)
    return {*folders, shard[1]} if shard else {*folders, stem, *re.split("[^a-z]+", stem)}


def _select_folder(data_set: str, split: str, names: list[str]) -> list[str]:
    """Select the files of one folder: the only one, the top one, or the default configuration. Raises InputError."""
    folders = sorted({name.rpartition("/")[0] for name in names})
    plain = [folder for folder in folders if not folder or "default" in folder.split("/")] or folders
    if len(plain) > 1:
        options = [folder if split in folder.split("/") else f"{folder}/{split}" for folder in folders if folder]
        raise InputError(
            f"data set {data_set!r} has {summarize_names(options)}: name one, like {data_set}:{options[0]}"
        )
    return [name for name in names if name.rpartition("/")[0] in plain]


@contextmanager
def _hub_errors(data_set: str, kind: str) -> Iterator[None]:
    """Turn errors of huggingface_hub into InputErrors of one line."""
    from huggingface_hub import errors

    # OSError, and the error of the HTTP library that this version of huggingface_hub uses.
    network = cast(tuple[type[Exception], ...], (*errors.HfHubHTTPError.__bases__, ValueError, RuntimeError))
    try:
        yield
    except errors.GatedRepoError as error:
        page = f"https://huggingface.co/datasets/{data_set}"
        raise InputError(f"data set {data_set!r} is gated: accept its terms at {page}, then: hf auth login") from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"{kind} {data_set!r}: no such file, no such data set on the hub (if it is private: hf auth login)"
        ) from error
    except network as error:
        raise InputError(
            f"{kind} {data_set!r}: no such file, and as a data set of the hub it cannot be read: {one_line(error)}; "
            "without a network set HF_HUB_OFFLINE=1 if it is cached, or name a file"
        ) from error
