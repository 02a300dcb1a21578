"""Checkpoints of a training run: folders that are complete or absent, and verified before use.

runs/one/step-00000120/    weights.safetensors  optimiser.safetensors  optimiser.json  …  manifest.json

The manifest holds the size and SHA-256 of every file, and its own checksum. Tensors and JSON only: no file can run
code. The checksums detect corruption, not forgery; but even a forged manifest can name only plain files of its folder.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from steer.errors import InputError
from steer.files import file_sha256, make_folder, sync, write_errors
from steer.training.trainable import shard_like, whole

VERSION = 1
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 1 << 20  # limit for a manifest from an untrusted source
NAME = re.compile(r"[A-Za-z0-9_-]+")
FILE_NAME = re.compile(rf"(?!manifest\.json){NAME.pattern}\.(safetensors|json)")  # no paths out of the folder

FileRecord = Mapping[str, Any]  # size of a file in bytes, sha256 in hexadecimal


def check_tensors(name: str, named: Mapping[str, Tensor]) -> None:
    """Raise InputError unless the tensors can be saved as NAME.safetensors: dense, of any shape, by string names."""
    if not NAME.fullmatch(name):
        raise InputError(f"a file of tensors named {name!r}: use letters, digits, - and _")
    for key, value in named.items():
        if not isinstance(key, str) or key == "__metadata__":
            raise InputError(f"{name} has a tensor named {key!r}; choose another name")
        if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_meta:
            raise InputError(f"{name}: {key!r} is not a dense tensor; save other values as JSON")


def json_text(name: str, value: Any) -> str:
    """Serialise a value to JSON, equal values to equal text. Raises InputError where JSON would change the value."""
    if not NAME.fullmatch(name) or f"{name}.json" == MANIFEST:
        raise InputError(f"a JSON file named {name!r}: use letters, digits, - and _, and not 'manifest'")
    try:
        text = json.dumps(value, sort_keys=True, allow_nan=False, indent=1) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{name} is not plain JSON ({error}); save non-finite numbers in a tensor") from error
    if strange := [key for key in _keys(value) if not isinstance(key, str)]:
        raise InputError(f"{name} has the key {strange[0]!r}, which JSON would convert to a string; use string keys")
    return text


def _keys(value: Any) -> Iterator[Any]:
    """Yield the keys of all dictionaries in a value."""
    if isinstance(value, Mapping):
        yield from value
    for one in value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ():
        yield from _keys(one)


def write_files(folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], texts: Mapping[str, str]) -> None:
    """Write all files of a checkpoint to disk, the manifest last.

    Raises OSError, and SafetensorError where safetensors cannot write.
    """
    mode = folder.stat().st_mode & 0o666  # permissions of new files here; safetensors makes files private
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
    files = {path.name: {"size": path.stat().st_size, "sha256": file_sha256(path)} for path in paths}
    (folder / MANIFEST).write_bytes(_manifest_bytes(step, files))
    sync(folder / MANIFEST)
    sync(folder)


def read_manifest(folder: Path) -> tuple[int, dict[str, FileRecord]]:
    """Return the step, and the record of each file by its name; the manifest's own checksum is verified.

    Raises OSError; InputError for a manifest that is missing, unreadable, of another version or naming files elsewhere.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give one with a checkpoint, such as run/step-00000120")
    if not path.exists():
        raise InputError(f"{path} is missing; give the folder of a checkpoint, such as run/step-00000120")
    if _plain_size(path) > MAX_MANIFEST_BYTES:
        raise InputError(f"{path} is too large for a manifest; choose another checkpoint")
    content = path.read_bytes()
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a manifest ({error}); choose another checkpoint") from error
    if not isinstance(record, dict) or record.get("version") != VERSION:
        raise InputError(f"{path} is not a manifest of version {VERSION}; choose another checkpoint")
    step, files = record.get("step"), record.get("files")
    if type(step) is not int or step < 0 or not isinstance(files, dict) or not all(map(_well_formed, files.values())):
        raise InputError(f"{path} is not a manifest: step or files are malformed; choose another checkpoint")
    if strange := [name for name in files if not FILE_NAME.fullmatch(name)]:
        raise InputError(f"{path} refers to {strange[0]!r}, which is not a file of a checkpoint; do not trust it")
    if content != _manifest_bytes(step, files):
        raise InputError(f"{path} is corrupt: checksum mismatch; choose another checkpoint")
    return step, files


def _plain_size(path: Path) -> int:
    """Return the size of a file in bytes. Raises InputError where it is missing or not a regular file."""
    try:
        candidate = path.lstat()
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing; choose another checkpoint") from error
    if not stat.S_ISREG(candidate.st_mode):
        raise InputError(f"{path} is a link, a folder or a device, not a file; choose another checkpoint")
    return candidate.st_size


def _well_formed(record: Any) -> bool:
    keys = {"size": int, "sha256": str}
    return isinstance(record, dict) and {key: type(value) for key, value in record.items()} == keys


def _manifest_bytes(step: int, files: Mapping[str, FileRecord]) -> bytes:
    """Return the manifest of these files, byte for byte."""
    body = {"version": VERSION, "step": step, "files": files}
    own = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return (json.dumps(body | {"sha256": own}, sort_keys=True, indent=1) + "\n").encode()


# The second form: a checkpoint about to be replaced by another one of the same step.
STEP = "([0-9]{8}|[1-9][0-9]{8,})"
FOLDER_NAME = re.compile(rf"step-{STEP}|\.step-{STEP}\.old")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder that was verified when opened."""

    path: Path
    step: int

    @classmethod
    def open(cls, path: str | Path) -> "Checkpoint":
        """Open and verify the checkpoint in a folder. Raises InputError with the file and what is wrong with it."""
        path = Path(path)
        try:
            step, files = read_manifest(path)
            for name, record in sorted(files.items()):
                size = _plain_size(path / name)
                if size != record["size"] or file_sha256(path / name) != record["sha256"]:
                    reason = "checksum mismatch" if size == record["size"] else f"{size} bytes, not {record['size']}"
                    raise InputError(f"{path / name} is corrupt: {reason}; choose another checkpoint")
            if extra := sorted({one.name for one in path.iterdir()} - {MANIFEST, *files}):
                raise InputError(f"{path / extra[0]} is not in the checkpoint's manifest; remove it")
        except OSError as error:
            raise InputError(f"{path} cannot be read as a checkpoint ({error}); choose another one") from error
        return cls(path, step)

    def file(self, name: str) -> Path:
        """Return the path of a file such as "weights.safetensors". Raises InputError where it is missing."""
        path = self.path / name
        if not FILE_NAME.fullmatch(name) or not path.is_file():
            raise InputError(f"checkpoint {self.path} has no {name!r}; choose one of the same kind of run")
        return path

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Load NAME.safetensors on the CPU. Raises InputError where it is missing."""
        path = self.file(f"{name}.safetensors")
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path} cannot be read ({error}); choose another checkpoint") from error

    def json(self, name: str) -> Any:
        """Load NAME.json, tuples as lists. Raises InputError where it is missing."""
        path = self.file(f"{name}.json")
        try:
            return json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path} cannot be read ({error}); choose another checkpoint") from error


class Checkpoints:
    """The newest `keep` checkpoints of one run in one folder, written by one process at a time."""

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        if keep < 1:
            raise InputError(f"keep must be at least 1, got {keep}")
        self.folder, self.keep = Path(folder), keep

    def save(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        values: Mapping[str, Any],
        *,
        pinned: Collection[int] = (),
    ) -> Path:
        """Write NAME.safetensors and NAME.json of every entry; return the folder once it is on the disk.

        After a crash at any moment the newest complete checkpoint is this one or the one before. Equal content gives
        equal bytes. Saving a step again replaces its checkpoint unless that is complete and equal. Afterwards
        checkpoints older than the newest `keep` are deleted, except the steps in `pinned`; later steps, of a run
        resumed from an earlier step, are kept until the run reaches them.

        Raises InputError for values that are neither tensors nor plain JSON (save non-finite numbers in a tensor), and
        where writing fails.
        """
        if step < 0:
            raise InputError(f"the step of a checkpoint must be at least 0, got {step}")
        for name, named in tensors.items():
            check_tensors(name, named)
        texts = {name: json_text(name, value) for name, value in values.items()}
        hint = "make room or choose a writable folder; the last complete checkpoint is kept"
        with write_errors(f"{self.folder}: saving step {step} failed", hint):
            make_folder(self.folder)
            self._recover()
            path = self._write_folder(step, tensors, texts)
            self._rotate(step, pinned)
        return path

    def latest(self) -> tuple[Checkpoint | None, list[str]]:
        """Return the newest checkpoint that verifies, or None; and one line about each newer one that fails to.

        Raises InputError where the folder cannot be read.
        """
        skipped: list[str] = []
        for step, path in reversed(self.places().items()):
            try:
                candidate = Checkpoint.open(path)
                if candidate.step == step:
                    return candidate, skipped
                skipped.append(f"{path} holds step {candidate.step}; rename it or delete it")
            except InputError as error:
                skipped.append(str(error))
        return None, skipped

    def places(self) -> dict[int, Path]:
        """Return the folders by step, in ascending order, unverified. Raises InputError where they cannot be listed."""
        try:
            # In this order a checkpoint about to be replaced precedes its replacement.
            paths = sorted(self.folder.iterdir()) if self.folder.exists() else []
            paths = [path for path in paths if path.is_dir() and not path.is_symlink()]
        except OSError as error:
            raise InputError(f"{self.folder} cannot be read as a folder of checkpoints ({error})") from error
        matches = [(FOLDER_NAME.fullmatch(path.name), path) for path in paths]
        places = {int(match[1] or match[2]): path for match, path in matches if match}
        return dict(sorted(places.items()))

    def _write_folder(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], texts: Mapping[str, str]) -> Path:
        """Write a hidden folder to disk completely, then rename it."""
        path = self.folder / f"step-{step:08d}"
        new, old = (self.folder / f".{path.name}.{kind}" for kind in (f"new-{secrets.token_hex(4)}", "old"))
        try:
            new.mkdir()
            write_files(new, step, tensors, texts)
            if not _same(path, new):
                if os.path.lexists(path):
                    os.rename(path, old)
                os.rename(new, path)
            sync(self.folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)
        self._remove([old] if old.exists() else [])
        return path

    def _rotate(self, step: int, pinned: Collection[int]) -> None:
        past = {number: path for number, path in self.places().items() if number <= step}
        kept = {*[*past][-self.keep :], *pinned}
        self._remove([path for number, path in past.items() if number not in kept])

    def _remove(self, paths: Collection[Path]) -> None:
        """Rename folders to hidden ones before deleting them: no partial checkpoint is visible under its name."""
        hidden = [self.folder / f".{path.name.lstrip('.')}.trash-{secrets.token_hex(4)}" for path in paths]
        for path, trash in zip(paths, hidden, strict=True):
            os.rename(path, trash)
        if hidden:
            sync(self.folder)
        for trash in hidden:
            shutil.rmtree(trash)

    def _recover(self) -> None:
        """Clean up after a crash: delete partial folders, restore a checkpoint that was about to be replaced."""
        for old in self.folder.glob(".step-*.old"):
            path = self.folder / old.name.removeprefix(".").removesuffix(".old")
            if path.exists():
                self._remove([old])
            else:
                os.rename(old, path)
        for kind in ("new", "trash"):
            for path in self.folder.glob(f".step-*.{kind}-*"):
                shutil.rmtree(path)


def _same(path: Path, new: Path) -> bool:
    """Return whether a valid checkpoint with the new one's manifest exists. Raises InputError for a link or a file."""
    if not os.path.lexists(path):
        return False
    if path.is_symlink() or not path.is_dir():
        raise InputError(f"{path} is not a folder, but a checkpoint must be written there; remove it")
    try:
        Checkpoint.open(path)
    except InputError:
        return False
    return (path / MANIFEST).read_bytes() == (new / MANIFEST).read_bytes()


def optimiser_tensors(optimiser: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an optimiser's state: tensors by NUMBER.NAME (of a parameter) or groups.NUMBER.NAME, all else for JSON.

    The tensors are the optimiser's own: copy or write them before its next step. Under FSDP they are gathered: every
    process must call this function.
    """
    saved = Optimizer.state_dict(optimiser)  # bitsandbytes' own nests tensors in further mappings
    tensors: dict[str, Tensor] = {}
    state: dict[str, dict[str, Any]] = {}
    for number, slots in saved["state"].items():
        state[str(number)] = {name: value for name, value in slots.items() if not isinstance(value, Tensor)}
        tensors |= {f"{number}.{name}": whole(value) for name, value in slots.items() if isinstance(value, Tensor)}
    groups: list[dict[str, Any]] = []
    for number, group in enumerate(saved["param_groups"]):  # a learning rate may be a tensor
        groups.append({name: value for name, value in group.items() if not isinstance(value, Tensor)})
        tensors |= {f"groups.{number}.{name}": value for name, value in group.items() if isinstance(value, Tensor)}
    return tensors, {"kind": type(optimiser).__name__, "shapes": _shapes(optimiser), "state": state, "groups": groups}


def load_optimiser(optimiser: Optimizer, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Restore an optimiser of the same parameters from `optimiser_tensors`, on their devices.

    Exact to the bit where the state has the dtype of its parameter, to which torch casts it, as in AdamW. Raises
    InputError for the state of another kind of optimiser or of other parameters; the optimiser is then unchanged.
    """
    if (kind := values.get("kind")) != type(optimiser).__name__:
        raise InputError(f"the saved optimiser is {kind}, not {type(optimiser).__name__}; choose another checkpoint")
    if values.get("shapes") != _shapes(optimiser):
        raise InputError("the saved optimiser has parameters of other shapes; choose a checkpoint of this model")
    try:
        state = {int(number): dict(slots) for number, slots in values["state"].items()}
        groups = [dict(group) for group in values["groups"]]
        parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
        for name, tensor in tensors.items():
            *kind, number, key = name.split(".")
            place = (groups if kind == ["groups"] else state)[int(number)]
            alike = kind != ["groups"] and tensor.shape == parameters[int(number)].shape
            place[key] = shard_like(tensor, parameters[int(number)]) if alike else tensor
            place[key] = place[key].clone()  # torch would share the tensor
        for group, present in zip(groups, optimiser.param_groups, strict=True):
            # JSON has no tuples.
            group |= {
                k: tuple(v) for k, v in group.items() if isinstance(v, list) and isinstance(present.get(k), tuple)
            }
        optimiser.load_state_dict({"state": state, "param_groups": groups})
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"the saved optimiser does not fit ({error}); choose another checkpoint") from error


def _shapes(optimiser: Optimizer) -> list[list[list[int]]]:
    """Return the shapes of the parameters in every group."""
    return [[list(parameter.shape) for parameter in group["params"]] for group in optimiser.param_groups]
