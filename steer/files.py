"""Files: atomic writes, checksums and reading of images."""

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

# Errors of file systems that cannot sync a folder (some network file systems).
SYNC_UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP)


@contextmanager
def write_errors(place: object, hint: str = "make room, and run the command again to resume") -> Iterator[None]:
    """Turn a write error in the block into an InputError that names the place and the remedy."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{place}: cannot write there ({reason}); {hint}") from error


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Write a file atomically: yields `path`.new, which replaces `path` at the end of the block.

    Missing parent folders are created. After an exception in the block the previous file remains and the new one is
    deleted; the remains of a killed process are overwritten by the next write. Raises OSError.
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
    """Write UTF-8 text atomically. Raises OSError."""
    with atomic_write(path) as new:
        new.write_text(text, encoding="utf-8")


def user_cache(name: str) -> Path:
    """Return a folder in this user's cache, which may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "steer" / name


def make_folder(path: Path) -> None:
    """Create a folder and its parents durably: they survive a power cut. Raises OSError."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing):
        sync(folder.parent)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk. Raises OSError."""
    folder = path.is_dir()
    if folder and os.name == "nt":
        return  # Windows cannot open folders
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
MAX_CHECKSUMS_BYTES = 1 << 20  # limit for a SHA256SUMS from an untrusted source
CHECKSUM_KEY = "sha256"  # key of the checksum that a JSON file contains


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum_lines(files: Mapping[str, Path]) -> str:
    """Return the text of SHA256SUMS for files by their names relative to its folder. Raises OSError."""
    return "".join(f"{file_sha256(path)}  {name}\n" for name, path in sorted(files.items()))


def write_checksums(folder: Path) -> None:
    """Flush all files below a folder to the disk and write their checksums to SHA256SUMS. Raises OSError."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path != folder / CHECKSUMS]
    for path in paths:
        sync(path)
    write_text(folder / CHECKSUMS, checksum_lines({path.relative_to(folder).as_posix(): path for path in paths}))


@contextmanager
def atomic_write_with_checksums(folder: Path, names: Sequence[str]) -> Iterator[dict[str, Path]]:
    """Write several files of a folder and their checksums: yields the paths to write to, by name.

    After an exception all previous files remain. The checksums are replaced first: a process killed between two
    replacements leaves a mixture of old and new files that fails verification. Raises InputError where writing fails.
    """
    with write_errors(folder), ExitStack() as stack:  # the last one entered is the first to replace its file
        new = {name: stack.enter_context(atomic_write(folder / name)) for name in names}
        checksums = stack.enter_context(atomic_write(folder / CHECKSUMS))
        yield new
        checksums.write_text(checksum_lines(new), encoding="utf-8")
        for path in new.values():
            sync(path)


def verify_checksums(*files: Path) -> list[Path]:
    """Verify files against the SHA256SUMS of their folder or its parent; return those without a checksum.

    Raises InputError for a checksum mismatch or a malformed SHA256SUMS, and OSError.
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
            raise InputError(f"{path} is corrupt: checksum mismatch with {CHECKSUMS}; restore it from a copy")
    return unknown


def _read(path: Path) -> dict[str, str]:
    """Return the checksums by name; none where the file is missing."""
    if not path.is_file():
        return {}
    if path.stat().st_size > MAX_CHECKSUMS_BYTES:
        raise InputError(f"{path} is too large for checksums; restore it, or delete it to skip verification")
    lines = [LINE.fullmatch(line) for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    if not all(lines):
        raise InputError(f"{path} is corrupt; restore it, or delete it to skip verification")
    return {line[2]: line[1] for line in lines if line}


def dumps_with_checksum(stored: Mapping[str, Any]) -> str:
    """Serialise a mapping to JSON with the SHA-256 of the rest as its last key."""
    stored = {name: value for name, value in stored.items() if name != CHECKSUM_KEY}
    digest = hashlib.sha256(json.dumps(stored, indent=1).encode()).hexdigest()
    return json.dumps(stored | {CHECKSUM_KEY: digest}, indent=1) + "\n"


def loads_with_checksum(text: str) -> Any:
    """Parse JSON; verify and remove the checksum of `dumps_with_checksum`, where there is one.

    Raises ValueError for invalid JSON, InputError (a ValueError) for a checksum mismatch, and RecursionError.
    """
    stored = json.loads(text)
    if not isinstance(stored, dict) or CHECKSUM_KEY not in stored:
        return stored
    if text != dumps_with_checksum(stored):
        raise InputError(
            f"checksum mismatch: the file was changed after it was written; restore it, or delete its "
            f"{CHECKSUM_KEY!r} line to accept the change"
        )
    return {name: value for name, value in stored.items() if name != CHECKSUM_KEY}


def read_json(path: Path, kind: str = "JSON", hint: str = "") -> dict[str, Any]:
    """Read a JSON object, and verify and remove its checksum, where there is one.

    kind, hint  "a report of steer" and the remedy, for the message
    Raises InputError for a file that cannot be read, a checksum mismatch, and anything but a JSON object.
    """
    try:
        stored = loads_with_checksum(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot read it ({error.strerror})") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not {kind} ({error}){hint}") from error
    if not isinstance(stored, dict):
        raise InputError(f"{path} is not {kind} (no object by name){hint}")
    return stored


FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # no others: Pillow runs external programs for some
MAX_PIXELS = 1 << 26  # 8192 x 8192: a small file can decode to more than fits in memory
DECODE_ERRORS = (  # raised by Pillow; IndexError for a truncated colour profile, TypeError for TIFF tags
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


IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")  # image files of a folder


def read_image(path: Path | bytes) -> Tensor:
    """Read an image file, or its bytes, as (3, H, W) in [0, 1]: EXIF rotation applied, transparency on white.

    An animation gives its first frame; 16 bits per channel are reduced to 8. Raises InputError for a file that is not a
    readable image, or larger than 8192 x 8192 pixels.
    """
    name = f"an image of {len(path)} bytes" if isinstance(path, bytes) else path
    try:
        with Image.open(BytesIO(path) if isinstance(path, bytes) else path, formats=FORMATS) as file:
            _check(file, name)
            image = _to_8_bits(ImageOps.exif_transpose(file)).convert("RGBA")
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(f"{name}: not a readable image format: save it as PNG or JPEG") from error
    except DECODE_ERRORS as error:
        raise InputError(f"{name}: cannot read the image ({getattr(error, 'strerror', None) or error})") from error
    white = Image.new("RGBA", image.size, "white")
    pixels = np.asarray(Image.alpha_composite(white, image).convert("RGB"))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def _check(file: Image.Image, name: object) -> None:
    """Raise InputError for images that are too large or have no defined brightness; no pixel is decoded yet."""
    width, height = file.size
    if width * height > MAX_PIXELS:
        raise InputError(f"{name}: {width} x {height} pixels, at most {MAX_PIXELS} are allowed: make it smaller")
    if file.mode in ("I", "F"):
        raise InputError(f"{name}: 32 bits per pixel have no defined white level: save it with 8 or 16")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Convert 16-bit grey, which Pillow would clip at 255, to 8 bits; other images are returned unchanged."""
    if not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image)
    grey = Image.fromarray((values / 257).round().astype(np.uint8))
    opaque = Image.fromarray(np.where(values == image.info.get("transparency", -1), 0, 255).astype(np.uint8))
    return Image.merge("LA", (grey, opaque))
