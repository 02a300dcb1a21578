"""Checkpoints of a training run: folders that are whole or not there at all, and that are verified before use.

runs/one/step-00000120/    weights.safetensors  optimiser.safetensors  optimiser.json  …  manifest.json

The manifest holds the size and SHA-256 of every file, and its own sum. Tensors and JSON only: no file can run code.
The sums tell damage, not forgery; yet a forged manifest can name plain files of its own folder and no other.
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
from steer.files import make_folder, sync
from steer.training.trainable import shard_like, whole

VERSION = 1
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 1 << 20  # bytes that are read of one that may come from anywhere
NAME = re.compile(r"[A-Za-z0-9_-]+")
FILE_NAME = re.compile(rf"(?!manifest\.json){NAME.pattern}\.(safetensors|json)")  # no folders, no links out of this one

FileRecord = Mapping[str, Any]  # of one file: size in bytes, sha256 in hexadecimal


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
    files = {path.name: {"size": path.stat().st_size, "sha256": _sha256(path)} for path in paths}
    (folder / MANIFEST).write_bytes(_manifest_bytes(step, files))
    sync(folder / MANIFEST)
    sync(folder)


def read_manifest(folder: Path) -> tuple[int, dict[str, FileRecord]]:
    """The step, and what is told of each file by its name; a changed byte of the manifest is noticed.

    Raises InputError where it is missing, unreadable, of another version or leads out of the folder, and OSError.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; give one that holds a checkpoint, such as run/step-00000120")
    if not path.exists():
        raise InputError(f"{path} is missing; give the folder of a checkpoint, such as run/step-00000120")
    if _plain_size(path) > MAX_MANIFEST_BYTES:
        raise InputError(f"{path} is too large for a manifest; choose another checkpoint")
    content = path.read_bytes()
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no manifest ({error}); choose another checkpoint") from error
    if not isinstance(record, dict) or record.get("version") != VERSION:
        raise InputError(f"{path} is no manifest of version {VERSION}, which this steer reads; choose another one")
    step, files = record.get("step"), record.get("files")
    if type(step) is not int or step < 0 or not isinstance(files, dict) or not all(map(_well_formed, files.values())):
        raise InputError(f"{path} is no manifest: step or files are wrong; choose another checkpoint")
    if strange := [name for name in files if not FILE_NAME.fullmatch(name)]:
        raise InputError(f"{path} names {strange[0]!r}, which is no file of a checkpoint; do not trust it")
    if content != _manifest_bytes(step, files):
        raise InputError(f"{path} is damaged: its sha256 is another; choose another checkpoint")
    return step, files


def verify_file(path: Path, record: FileRecord) -> None:
    """Raises InputError where a file is missing, no plain file, or not what the manifest tells of it; and OSError."""
    if (size := _plain_size(path)) != record["size"]:
        raise InputError(f"{path} has {size} bytes, not {record['size']}; choose another checkpoint")
    if _sha256(path) != record["sha256"]:
        raise InputError(f"{path} is damaged: its sha256 is another; choose another checkpoint")


def _plain_size(path: Path) -> int:
    """Bytes of a file. Raises InputError where there is none, or something that leads elsewhere."""
    try:
        candidate = path.lstat()
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing; choose another checkpoint") from error
    if not stat.S_ISREG(candidate.st_mode):
        raise InputError(f"{path} is a link, a folder or a device, not a file; choose another checkpoint")
    return candidate.st_size


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _well_formed(record: Any) -> bool:
    keys = {"size": int, "sha256": str}
    return isinstance(record, dict) and {key: type(value) for key, value in record.items()} == keys


def _manifest_bytes(step: int, files: Mapping[str, FileRecord]) -> bytes:
    """The whole manifest, the only one that is right for these files."""
    body = {"version": VERSION, "step": step, "files": files}
    own = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return (json.dumps(body | {"sha256": own}, sort_keys=True, indent=1) + "\n").encode()


# The second name: a checkpoint that another one of its step is about to replace.
STEP = "([0-9]{8}|[1-9][0-9]{8,})"
FOLDER_NAME = re.compile(rf"step-{STEP}|\.step-{STEP}\.old")


@dataclass(frozen=True)
class Checkpoint:
    """A folder that verified when it was opened."""

    path: Path
    step: int

    @classmethod
    def open(cls, path: str | Path) -> "Checkpoint":
        """The checkpoint in a folder, wherever it lies. Raises InputError naming the file and what is wrong with it."""
        path = Path(path)
        try:
            step, files = read_manifest(path)
            for name, record in sorted(files.items()):
                verify_file(path / name, record)
            if extra := sorted({one.name for one in path.iterdir()} - {MANIFEST, *files}):
                raise InputError(f"{path / extra[0]} is not in the checkpoint's manifest; remove it")
        except OSError as error:
            raise InputError(f"{path} cannot be read as a checkpoint ({error}); choose another one") from error
        return cls(path, step)

    def file(self, name: str) -> Path:
        """The path of a file such as "weights.safetensors". Raises InputError where there is none."""
        path = self.path / name
        if not FILE_NAME.fullmatch(name) or not path.is_file():
            raise InputError(f"checkpoint {self.path} holds no {name!r}; choose one of the same kind of run")
        return path

    def tensors(self, name: str) -> dict[str, Tensor]:
        """What NAME.safetensors holds, on the CPU. Raises InputError where it is missing."""
        path = self.file(f"{name}.safetensors")
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path} cannot be read ({error}); choose another checkpoint") from error

    def json(self, name: str) -> Any:
        """What NAME.json holds, tuples as lists. Raises InputError where it is missing."""
        path = self.file(f"{name}.json")
        try:
            return json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path} cannot be read ({error}); choose another checkpoint") from error


class Checkpoints:
    """The newest `keep` checkpoints of one run in one folder, written by one process at a time."""

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        if keep < 1:
            raise InputError(f"keep is {keep}; keep 1 checkpoint or more")
        self.folder, self.keep = Path(folder), keep

    def save(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        values: Mapping[str, Any],
        *,
        pinned: Collection[int] = (),
    ) -> Path:
        """Writes NAME.safetensors and NAME.json of every entry; returns the folder once it is on the disk.

        After a crash at any moment the newest whole checkpoint is this one or the one before. Equal content gives
        equal bytes. The same step again replaces what is there unless that is whole and equal. At the end those older
        than the newest `keep` go, except the steps in `pinned`; later steps, which a run has that was taken up again
        before its end, stay until they are reached.

        Raises InputError for what is neither tensors nor plain JSON (non-finite numbers belong into a tensor), and
        where the disk refuses.
        """
        if step < 0:
            raise InputError(f"step {step} of a checkpoint: count steps from 0")
        for name, named in tensors.items():
            check_tensors(name, named)
        texts = {name: json_text(name, value) for name, value in values.items()}
        try:
            make_folder(self.folder)
            self._recover()
            path = self._write_folder(step, tensors, texts)
            self._rotate(step, pinned)
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{self.folder}: saving step {step} failed ({error}); make room there or choose a folder that can be "
                "written, the last whole checkpoint stays"
            ) from error
        return path

    def latest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest that verifies, None without one; and a line about each newer one: what is wrong with it.

        Raises InputError where the folder cannot be read.
        """
        skipped: list[str] = []
        for step, path in reversed(self._places().items()):
            try:
                candidate = Checkpoint.open(path)
                if candidate.step == step:
                    return candidate, skipped
                skipped.append(f"{path} holds step {candidate.step}; rename it or delete it")
            except InputError as error:
                skipped.append(str(error))
        return None, skipped

    @staticmethod
    def verify(path: str | Path) -> None:
        """Raises InputError naming the file that is missing, changed, unknown or no file, or the manifest."""
        Checkpoint.open(path)

    def _places(self) -> dict[int, Path]:
        """The folders by step, the lowest first."""
        try:
            # In this order the one that is about to be replaced comes before the one that replaces it.
            paths = sorted(self.folder.iterdir()) if self.folder.exists() else []
            paths = [path for path in paths if path.is_dir() and not path.is_symlink()]
        except OSError as error:
            raise InputError(f"{self.folder} cannot be read as a folder of checkpoints ({error})") from error
        matches = [(FOLDER_NAME.fullmatch(path.name), path) for path in paths]
        places = {int(match[1] or match[2]): path for match, path in matches if match}
        return dict(sorted(places.items()))

    def _write_folder(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], texts: Mapping[str, str]) -> Path:
        """Writes a hidden folder, brings all of it to the disk, and only then gives it its name."""
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
        past = {number: path for number, path in self._places().items() if number <= step}
        kept = {*[*past][-self.keep :], *pinned}
        self._remove([path for number, path in past.items() if number not in kept])

    def _remove(self, paths: Collection[Path]) -> None:
        """Hides folders before it empties them: half a checkpoint is never seen under its name."""
        hidden = [self.folder / f".{path.name.lstrip('.')}.trash-{secrets.token_hex(4)}" for path in paths]
        for path, trash in zip(paths, hidden, strict=True):
            os.rename(path, trash)
        if hidden:
            sync(self.folder)
        for trash in hidden:
            shutil.rmtree(trash)

    def _recover(self) -> None:
        """Clears up after a crash: what was being written or removed goes, what was being replaced comes back."""
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
    """Whether a whole checkpoint with the manifest of the new one is there. Raises InputError for a link or a file."""
    if not os.path.lexists(path):
        return False
    if path.is_symlink() or not path.is_dir():
        raise InputError(f"{path} is in the way of a checkpoint; remove it")
    try:
        Checkpoint.open(path)
    except InputError:
        return False
    return (path / MANIFEST).read_bytes() == (new / MANIFEST).read_bytes()


def optimiser_tensors(optimiser: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Its state: tensors by NUMBER.NAME (of a parameter) or groups.NUMBER.NAME, and all else for a JSON file.

    The tensors are the optimiser's own: copy or write them before its next step. What FSDP has divided comes whole; all
    processes have to ask.
    """
    saved = optimiser.state_dict()
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
    """Brings an optimiser of the same parameters to the state that `optimiser_tensors` gave, on their devices.

    Bit for bit where the state has the type of its parameter (torch casts it to that), as in AdamW. Raises InputError
    for the state of another kind of optimiser, or of other parameters; the optimiser is then as it was.
    """
    if (kind := values.get("kind")) != type(optimiser).__name__:
        raise InputError(f"the saved optimiser is {kind}, not {type(optimiser).__name__}; choose another checkpoint")
    if values.get("shapes") != _shapes(optimiser):
        raise InputError("the saved optimiser is of parameters in other shapes; choose a checkpoint of this model")
    try:
        state = {int(number): dict(slots) for number, slots in values["state"].items()}
        groups = [dict(group) for group in values["groups"]]
        parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
        for name, tensor in tensors.items():
            *kind, number, key = name.split(".")
            place = (groups if kind == ["groups"] else state)[int(number)]
            alike = kind != ["groups"] and tensor.shape == parameters[int(number)].shape
            place[key] = shard_like(tensor, parameters[int(number)]) if alike else tensor
            place[key] = place[key].clone()  # torch would keep ours
        for group, present in zip(groups, optimiser.param_groups, strict=True):
            # JSON has no tuples.
            group |= {
                k: tuple(v) for k, v in group.items() if isinstance(v, list) and isinstance(present.get(k), tuple)
            }
        optimiser.load_state_dict({"state": state, "param_groups": groups})
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"the saved optimiser does not fit ({error}); choose another checkpoint") from error


def _shapes(optimiser: Optimizer) -> list[list[list[int]]]:
    """Of the parameters in every group."""
    return [[list(parameter.shape) for parameter in group["params"]] for group in optimiser.param_groups]
