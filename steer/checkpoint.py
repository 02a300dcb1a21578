"""Checkpoints of a training run: folders that are whole or not there at all, and that are verified before use.

runs/one/step-00000120/    weights.safetensors  optimiser.safetensors  optimiser.json  …  manifest.json

The manifest holds the size and SHA-256 of every file, and its own sum. Tensors and JSON only: no file can run code.
The sums tell damage, not forgery; yet a forged manifest can name plain files of its own folder and no other.
"""

import json
import os
import re
import secrets
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from steer.checkpoint_files import (
    FILE,
    MANIFEST,
    check_tensors,
    json_text,
    read_manifest,
    verify_file,
    write_files,
)
from steer.errors import InputError
from steer.staged import make_folder, sync

# The second name: a checkpoint that another one of its step is about to replace.
STEP = "([0-9]{8}|[1-9][0-9]{8,})"
PLACE = re.compile(rf"step-{STEP}|\.step-{STEP}\.old")


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
            for name, told in sorted(files.items()):
                verify_file(path / name, told)
            if extra := sorted({one.name for one in path.iterdir()} - {MANIFEST, *files}):
                raise InputError(f"{path / extra[0]} is not in the checkpoint's manifest; remove it")
        except OSError as error:
            raise InputError(f"{path} cannot be read as a checkpoint ({error}); choose another one") from error
        return cls(path, step)

    def file(self, name: str) -> Path:
        """The path of a file such as "weights.safetensors". Raises InputError where there is none."""
        path = self.path / name
        if not FILE.fullmatch(name) or not path.is_file():
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
            self._tidy()
            path = self._place(step, tensors, texts)
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
                found = Checkpoint.open(path)
                if found.step == step:
                    return found, skipped
                skipped.append(f"{path} holds step {found.step}; rename it or delete it")
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
        matches = [(PLACE.fullmatch(path.name), path) for path in paths]
        places = {int(match[1] or match[2]): path for match, path in matches if match}
        return dict(sorted(places.items()))

    def _place(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], texts: Mapping[str, str]) -> Path:
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

    def _tidy(self) -> None:
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
