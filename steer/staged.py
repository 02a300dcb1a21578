"""A file that is whole or not there at all: written beside its place, brought to the disk, then renamed."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What file systems answer that bring a folder to the disk by themselves (some of those over a network).
UNNEEDED = (errno.EINVAL, errno.ENOTSUP)


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Gives the name to write to, `path` with .new after it, which takes the place of `path` at the end.

    Folders above it are made. After an exception in the block the file of before stays, and nothing beside it; what a
    killed process leaves is written over by the next. Raises OSError as any writing does.
    """
    new = path.with_name(path.name + ".new")
    make_folder(path.parent)
    try:
        yield new
        sync(new)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """All of the file in UTF-8 or, after a crash, all of the one before. Raises OSError."""
    with staged(path) as new:
        new.write_text(text, encoding="utf-8")


def make_folder(path: Path) -> None:
    """Makes a folder and those above it, so that they outlive a power cut. Raises OSError."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing):
        sync(folder.parent)


def sync(path: Path) -> None:
    """Returns when the bytes of a file, or the names in a folder, are on the disk. Raises OSError."""
    folder = path.is_dir()
    if folder and os.name == "nt":
        return  # Windows opens no folders
    number = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(number)
    except OSError as error:
        if not folder or error.errno not in UNNEEDED:
            raise
    finally:
        os.close(number)
