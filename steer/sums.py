"""Sums of files: what a disk or a copy has spoilt is told, and not loaded.

RUN/final/    pytorch_lora_weights.safetensors  SHA256SUMS      which `sha256sum -c SHA256SUMS` reads too

They tell damage, not forgery. What has none is read as it is: the files of others, and of older versions of steer.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from steer.errors import InputError
from steer.staged import staged, sync, write_text

SUMS = "SHA256SUMS"
LINE = re.compile(r"([0-9a-f]{64})  (.+)")
LARGEST = 1 << 20  # bytes that are read of sums that may come from anywhere
KEY = "sha256"  # of a JSON file that holds its own


def sum_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sums_text(files: Mapping[str, Path]) -> str:
    """What SHA256SUMS holds of some files, by their names in its folder. Raises OSError."""
    return "".join(f"{sum_of(path)}  {name}\n" for name, path in sorted(files.items()))


def write_sums(folder: Path) -> None:
    """Brings all files of a folder and below it to the disk, and writes their sums. Raises OSError."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path != folder / SUMS]
    for path in paths:
        sync(path)
    write_text(folder / SUMS, sums_text({path.relative_to(folder).as_posix(): path for path in paths}))


@contextmanager
def staged_with_sums(folder: Path, names: Sequence[str]) -> Iterator[dict[str, Path]]:
    """Gives the paths to write files of a folder to, by name; at the end they take their places, with their sums.

    After an exception all files of before stay. The sums come first: of a process that is killed while one file after
    the other takes its place, no mixture of old and new ones is read. Raises InputError where the disk refuses.
    """
    try:
        with ExitStack() as stack:  # the last one that is entered is the first that takes its place
            new = {name: stack.enter_context(staged(folder / name)) for name in names}
            sums = stack.enter_context(staged(folder / SUMS))
            yield new
            sums.write_text(sums_text(new), encoding="utf-8")
            for path in new.values():
                sync(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder} cannot be written ({error}); make room, the same command goes on") from error


def check_sums(*files: Path) -> list[Path]:
    """Holds files against the SHA256SUMS of their folder or the one above it; returns those that no sums tell of.

    Raises InputError for one whose sum is another, and for sums that are no such file; OSError.
    """
    unknown = []
    for path in files:
        places = [(folder, path.relative_to(folder).as_posix()) for folder in (path.parent, path.parent.parent)]
        told = next((sums[name] for folder, name in places if name in (sums := _read(folder / SUMS))), None)
        if told is None:
            unknown.append(path)
        elif sum_of(path) != told:
            raise InputError(f"{path} is damaged: its sha256 is not the one in {SUMS}; restore it from a copy")
    return unknown


def _read(path: Path) -> dict[str, str]:
    """The sums by name, none where the file is missing."""
    if not path.is_file():
        return {}
    if path.stat().st_size > LARGEST:
        raise InputError(f"{path} is too large for sums; restore it, or delete it to read the folder as it is")
    lines = [LINE.fullmatch(line) for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    if not all(lines):
        raise InputError(f"{path} is damaged; restore it, or delete it to read the folder as it is")
    return {line[2]: line[1] for line in lines if line}


def summed(told: Mapping[str, Any]) -> str:
    """JSON that holds, as its last key, the SHA-256 of the rest."""
    told = {name: value for name, value in told.items() if name != KEY}
    found = hashlib.sha256(json.dumps(told, indent=1).encode()).hexdigest()
    return json.dumps(told | {KEY: found}, indent=1) + "\n"


def unsummed(text: str) -> Any:
    """The value of a JSON text; of `summed` without the sum, once that is right.

    Raises ValueError for no JSON, InputError, which is one, where something was changed; and RecursionError.
    """
    told = json.loads(text)
    if not isinstance(told, dict) or KEY not in told:
        return told
    if text != summed(told):
        raise InputError(
            f"it was changed since it was written: its {KEY} is another; restore it, or delete its line {KEY!r} if the "
            "change was your own"
        )
    return {name: value for name, value in told.items() if name != KEY}
