"""Files: atomic writes, checksums, images from outside."""

import errno
import hashlib
import json
import os
import re
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError
from torch import Tensor

from steer.errors import InputError

# What file systems answer that bring a folder to the disk by themselves (some of those over a network).
SYNC_UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
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
    with atomic_write(path) as new:
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
        if not folder or error.errno not in SYNC_UNSUPPORTED:
            raise
    finally:
        os.close(number)


CHECKSUMS = "SHA256SUMS"
LINE = re.compile(r"([0-9a-f]{64})  (.+)")
MAX_CHECKSUMS_BYTES = 1 << 20  # bytes that are read of sums that may come from anywhere
CHECKSUM_KEY = "sha256"  # of a JSON file that holds its own


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum_lines(files: Mapping[str, Path]) -> str:
    """What SHA256SUMS holds of some files, by their names in its folder. Raises OSError."""
    return "".join(f"{file_sha256(path)}  {name}\n" for name, path in sorted(files.items()))


def write_checksums(folder: Path) -> None:
    """Brings all files of a folder and below it to the disk, and writes their sums. Raises OSError."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path != folder / CHECKSUMS]
    for path in paths:
        sync(path)
    write_text(folder / CHECKSUMS, checksum_lines({path.relative_to(folder).as_posix(): path for path in paths}))


@contextmanager
def atomic_write_with_checksums(folder: Path, names: Sequence[str]) -> Iterator[dict[str, Path]]:
    """Gives the paths to write files of a folder to, by name; at the end they take their places, with their sums.

    After an exception all files of before stay. The sums come first: of a process that is killed while one file after
    the other takes its place, no mixture of old and new ones is read. Raises InputError where the disk refuses.
    """
    try:
        with ExitStack() as stack:  # the last one that is entered is the first that takes its place
            new = {name: stack.enter_context(atomic_write(folder / name)) for name in names}
            checksums = stack.enter_context(atomic_write(folder / CHECKSUMS))
            yield new
            checksums.write_text(checksum_lines(new), encoding="utf-8")
            for path in new.values():
                sync(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder} cannot be written ({error}); make room, the same command goes on") from error


def verify_checksums(*files: Path) -> list[Path]:
    """Holds files against the SHA256SUMS of their folder or the one above it; returns those that no sums tell of.

    Raises InputError for one whose sum is another, and for sums that are no such file; OSError.
    """
    unknown = []
    for path in files:
        places = [(folder, path.relative_to(folder).as_posix()) for folder in (path.parent, path.parent.parent)]
        stored = next(
            (checksums[name] for folder, name in places if name in (checksums := _read(folder / CHECKSUMS))), None
        )
        if stored is None:
            unknown.append(path)
        elif file_sha256(path) != stored:
            raise InputError(f"{path} is damaged: its sha256 is not the one in {CHECKSUMS}; restore it from a copy")
    return unknown


def _read(path: Path) -> dict[str, str]:
    """The sums by name, none where the file is missing."""
    if not path.is_file():
        return {}
    if path.stat().st_size > MAX_CHECKSUMS_BYTES:
        raise InputError(f"{path} is too large for sums; restore it, or delete it to read the folder as it is")
    lines = [LINE.fullmatch(line) for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    if not all(lines):
        raise InputError(f"{path} is damaged; restore it, or delete it to read the folder as it is")
    return {line[2]: line[1] for line in lines if line}


def dumps_with_checksum(stored: Mapping[str, Any]) -> str:
    """JSON that holds, as its last key, the SHA-256 of the rest."""
    stored = {name: value for name, value in stored.items() if name != CHECKSUM_KEY}
    digest = hashlib.sha256(json.dumps(stored, indent=1).encode()).hexdigest()
    return json.dumps(stored | {CHECKSUM_KEY: digest}, indent=1) + "\n"


def loads_with_checksum(text: str) -> Any:
    """The value of a JSON text; of `dumps_with_checksum` without the sum, once that is right.

    Raises ValueError for no JSON, InputError, which is one, where something was changed; and RecursionError.
    """
    stored = json.loads(text)
    if not isinstance(stored, dict) or CHECKSUM_KEY not in stored:
        return stored
    if text != dumps_with_checksum(stored):
        raise InputError(
            f"it was changed since it was written: its {CHECKSUM_KEY} is another; restore it, or delete its "
            f"line {CHECKSUM_KEY!r} if the change was your own"
        )
    return {name: value for name, value in stored.items() if name != CHECKSUM_KEY}


FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # no other: some formats start outside programs
MAX_PIXELS = 1 << 26  # 8192 x 8192: a few bytes can ask for more than any memory holds
DECODE_ERRORS = (  # what Pillow raises; IndexError at a colour profile that has no end, TypeError at tags of a TIFF
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    TypeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def read_image(path: Path | bytes) -> Tensor:
    """An image file, or the bytes of one, as (3, H, W) in [0, 1]: upright as its EXIF says, transparency on white.

    Of an animation the first picture; 16 bits a pixel are brought to 8. Raises InputError where it cannot be read as an
    image, or is larger than 8192 x 8192 pixels.
    """
    name = f"an image of {len(path)} bytes" if isinstance(path, bytes) else path
    try:
        with Image.open(BytesIO(path) if isinstance(path, bytes) else path, formats=FORMATS) as file:
            _check(file, name)
            image = _to_8_bits(ImageOps.exif_transpose(file)).convert("RGBA")
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(f"{name}: not an image that can be read") from error
    except DECODE_ERRORS as error:
        raise InputError(f"{name}: cannot read the image ({getattr(error, 'strerror', None) or error})") from error
    white = Image.new("RGBA", image.size, "white")
    pixels = np.asarray(Image.alpha_composite(white, image).convert("RGB"))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def _check(file: Image.Image, name: object) -> None:
    """Raises InputError for what would fill the memory, and what has no right reading; no pixel is decoded yet."""
    width, height = file.size
    if width * height > MAX_PIXELS:
        raise InputError(f"{name}: {width} x {height} pixels: at most {MAX_PIXELS}, make it smaller")
    if file.mode in ("I", "F"):
        raise InputError(f"{name}: 32 bits a pixel do not say how bright white is: save it with 8 or 16")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits as grey of 8, which Pillow would cut off above 255; other images as they are."""
    if not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image)
    grey = Image.fromarray((values / 257).round().astype(np.uint8))
    opaque = Image.fromarray(np.where(values == image.info.get("transparency", -1), 0, 255).astype(np.uint8))
    return Image.merge("LA", (grey, opaque))
