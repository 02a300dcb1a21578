"""The files of one checkpoint: tensors, JSON, and the manifest with the size and SHA-256 of each."""

import hashlib
import json
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from steer.errors import InputError
from steer.staged import sync

VERSION = 1
MANIFEST = "manifest.json"
LARGEST = 1 << 20  # bytes that are read of one that may come from anywhere
NAME = re.compile(r"[A-Za-z0-9_-]+")
FILE = re.compile(rf"(?!manifest\.json){NAME.pattern}\.(safetensors|json)")  # no folders, no links out of this one

Told = Mapping[str, Any]  # of one file: size in bytes, sha256 in hexadecimal


def check_tensors(name: str, named: Mapping[str, Tensor]) -> None:
    """Raises InputError for what cannot be saved as NAME.safetensors: dense tensors (any shape) by name can."""
    if not NAME.fullmatch(name):
        raise InputError(f"a file of tensors named {name!r}: use letters, digits, - and _")
    for key, value in named.items():
        if not isinstance(key, str) or key == "__metadata__":
            raise InputError(f"{name} has a tensor named {key!r}; choose another name")
        if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_meta:
            raise InputError(f"{name}: {key!r} is no dense tensor; put other values among the JSON ones")


def json_text(name: str, value: Any) -> str:
    """One text for equal values. Raises InputError for what JSON cannot hold or would change."""
    if not NAME.fullmatch(name) or f"{name}.json" == MANIFEST:
        raise InputError(f"a JSON file named {name!r}: use letters, digits, - and _, and not 'manifest'")
    try:
        text = json.dumps(value, sort_keys=True, allow_nan=False, indent=1) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{name} is not plain JSON ({error}); non-finite numbers belong into a tensor") from error
    if strange := [key for key in _keys(value) if not isinstance(key, str)]:
        raise InputError(f"{name} has the key {strange[0]!r}, which JSON would make a text; use texts as keys")
    return text


def _keys(value: Any) -> Iterator[Any]:
    """The keys of all dictionaries in a value."""
    if isinstance(value, Mapping):
        yield from value
    for one in value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ():
        yield from _keys(one)


def write_files(folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], texts: Mapping[str, str]) -> None:
    """Fills a folder: every file is on the disk before the manifest is written, and that before this returns.

    Raises OSError, and SafetensorError where safetensors cannot write.
    """
    mode = folder.stat().st_mode & 0o666  # what others may do with new files here; safetensors lets nobody else read
    paths = []
    for name, named in tensors.items():
        paths.append(folder / f"{name}.safetensors")
        # Copies, because safetensors refuses views that share memory.
        save_file({key: named[key].detach().to("cpu", copy=True).contiguous() for key in sorted(named)}, paths[-1])
        paths[-1].chmod(mode)
        sync(paths[-1])
    for name, text in texts.items():
        paths.append(folder / f"{name}.json")
        paths[-1].write_text(text, encoding="utf-8")
        sync(paths[-1])
    files = {path.name: {"size": path.stat().st_size, "sha256": _sum(path)} for path in paths}
    (folder / MANIFEST).write_bytes(_rendered(step, files))
    sync(folder / MANIFEST)
    sync(folder)


def read_manifest(folder: Path) -> tuple[int, dict[str, Told]]:
    """The step, and what is told of each file by its name; a changed byte of the manifest is noticed.

    Raises InputError where it is missing, unreadable, of another version or leads out of the folder, and OSError.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; give one that holds a checkpoint, such as run/step-00000120")
    if not path.exists():
        raise InputError(f"{path} is missing; give the folder of a checkpoint, such as run/step-00000120")
    if _plain_size(path) > LARGEST:
        raise InputError(f"{path} is too large for a manifest; choose another checkpoint")
    content = path.read_bytes()
    try:
        told = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no manifest ({error}); choose another checkpoint") from error
    if not isinstance(told, dict) or told.get("version") != VERSION:
        raise InputError(f"{path} is no manifest of version {VERSION}, which this steer reads; choose another one")
    step, files = told.get("step"), told.get("files")
    if type(step) is not int or step < 0 or not isinstance(files, dict) or not all(map(_well_formed, files.values())):
        raise InputError(f"{path} is no manifest: step or files are wrong; choose another checkpoint")
    if strange := [name for name in files if not FILE.fullmatch(name)]:
        raise InputError(f"{path} names {strange[0]!r}, which is no file of a checkpoint; do not trust it")
    if content != _rendered(step, files):
        raise InputError(f"{path} is damaged: its sha256 is another; choose another checkpoint")
    return step, files


def verify_file(path: Path, told: Told) -> None:
    """Raises InputError where a file is missing, no plain file, or not what the manifest tells of it; and OSError."""
    if (size := _plain_size(path)) != told["size"]:
        raise InputError(f"{path} has {size} bytes, not {told['size']}; choose another checkpoint")
    if _sum(path) != told["sha256"]:
        raise InputError(f"{path} is damaged: its sha256 is another; choose another checkpoint")


def _plain_size(path: Path) -> int:
    """Bytes of a file. Raises InputError where there is none, or something that leads elsewhere."""
    try:
        found = path.lstat()
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing; choose another checkpoint") from error
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{path} is a link, a folder or a device, not a file; choose another checkpoint")
    return found.st_size


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _well_formed(told: Any) -> bool:
    keys = {"size": int, "sha256": str}
    return isinstance(told, dict) and {key: type(value) for key, value in told.items()} == keys


def _rendered(step: int, files: Mapping[str, Told]) -> bytes:
    """The whole manifest, the only one that is right for these files."""
    about = {"version": VERSION, "step": step, "files": files}
    own = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    return (json.dumps(about | {"sha256": own}, sort_keys=True, indent=1) + "\n").encode()
