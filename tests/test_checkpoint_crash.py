"""Checkpoints of a process that dies, a disk that fills up or a power cut, at every single step of saving."""

import errno
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoint import names, save, version_of

from steer.errors import InputError
from steer.training import checkpoint as checkpoint_files
from steer.training.checkpoint import Checkpoint, Checkpoints


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fsync is called for is recorded; a real one takes long on a busy disk, and a real power cut is not made."""
    monkeypatch.setattr(os, "fsync", lambda number: None)


class Died(BaseException):
    pass


class Machine:
    """Records what is done to files, and fails in call number `fatal`; of a file half is written then.

    With `error` that call alone fails, as on a full disk; without, it is the last that a dying process makes.
    """

    def __init__(self, fatal: int = -1, error: OSError | None = None) -> None:
        self.fatal, self.error = fatal, error
        self.operations: list[str] = []
        self.paths: dict[int, Path] = {}
        self.synced: set[int] = set()  # files whose bytes are on the disk
        self.renamed: list[tuple[Path, Path]] = []  # and names that are not
        self.dead = False

    @contextmanager
    def running(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            opened = os.open

            def watched(path: Any, *args: Any, **options: Any) -> int:
                number = opened(path, *args, **options)
                self.paths[number] = Path(path)
                return number

            patch.setattr(os, "open", watched)
            for name in ("rename", "replace", "mkdir", "unlink", "rmdir", "fsync", "chmod"):
                patch.setattr(os, name, self._wrapped(name, getattr(os, name)))
            patch.setattr(Path, "write_text", self._wrapped("write", Path.write_text))
            patch.setattr(Path, "write_bytes", self._wrapped("write", Path.write_bytes))
            patch.setattr(checkpoint_files, "save_file", self._wrapped("write", checkpoint_files.save_file))
            yield

    def _wrapped(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if self.dead:
                raise Died
            first, last = (self.paths[one] if name == "fsync" else one for one in (args[0], args[-1]))
            path = Path(last if name == "write" and isinstance(last, Path) else first)
            target = f" → {Path(last).name}" if name in ("rename", "replace") else ""
            self.operations.append(re.sub("(new|trash)-[0-9a-f]{8}", r"\1", f"{name} {path.name}{target}"))
            ours = len(self.operations) - 1 == self.fatal
            if ours and self.error and name != "write":
                raise self.error
            try:
                result = original(*args, **options)
            except OSError:  # such as a folder that is there already
                if ours:
                    self._fail()
                raise
            self._remember(name, path, Path(last) if target else path, args[0])
            if ours:
                if name == "write":
                    os.truncate(path, path.stat().st_size // 2)
                self._fail()
            return result

        return call

    def _remember(self, name: str, path: Path, target: Path, number: Any) -> None:
        if name == "write":
            self.synced.discard(path.stat().st_ino)
        elif name in ("rename", "replace"):
            self.renamed.append((path, target))
        elif name == "fsync":
            self.synced.add(os.fstat(number).st_ino)
            self.renamed = [pair for pair in self.renamed if pair[0].parent != path]

    def _fail(self) -> None:
        if self.error:
            raise self.error
        self.dead = True
        raise Died

    def lose_power(self, folder: Path, names_too: bool) -> None:
        """What no fsync has brought to the disk is lost: bytes, and new names if `names_too`."""
        for file in folder.rglob("*"):
            if file.is_file() and file.stat().st_ino not in self.synced:
                os.truncate(file, 0)
        for source, target in reversed(self.renamed if names_too else []):
            if target.exists():
                os.rename(target, source)


def started(folder: Path, kind: str) -> Machine:
    """A folder as the next save finds it, and the machine that wrote it."""
    machine = Machine()
    with machine.running():
        save(folder, 1)
        if kind == "the same step":
            save(folder, 2)
        if kind == "left-overs":  # one of each kind
            save(folder, 2, version=1)
            (folder / "step-00000002").rename(folder / ".step-00000002.old")
            for name in (".step-00000003.new-00000000", ".step-00000001.trash-11111111"):
                (folder / name).mkdir()
                (folder / name / "state.json").write_text("{}")
    return machine


def consistent(folder: Path, atleast: int) -> Checkpoint:
    found, skipped = Checkpoints(folder).latest()
    assert found and found.step >= atleast and skipped == []
    version_of(found)
    return found


# The save under test, and the step that is there before it.
KINDS = {"the next step": (2, 1), "the same step": (2, 2), "left-overs": (3, 2)}


def calls(tmp_path: Path, kind: str) -> int:
    started(tmp_path / "count", kind)
    machine = Machine()
    with machine.running():
        save(tmp_path / "count", KINDS[kind][0], version=1)
    assert len(machine.operations) >= 20
    return len(machine.operations)


@pytest.mark.parametrize("power", ["stays", "is cut"])
@pytest.mark.parametrize("kind", KINDS)
def test_dying_at_any_step_leaves_a_whole_checkpoint(tmp_path: Path, kind: str, power: str) -> None:
    step, before = KINDS[kind]
    for fatal in range(calls(tmp_path, kind)):
        folder = tmp_path / f"{fatal}"
        machine = started(folder, kind)
        machine.operations, machine.fatal = [], fatal
        with machine.running(), pytest.raises(Died):
            save(folder, step, version=1)
        consistent(folder, before)
        for names_too in (False, True) if power == "is cut" else ():
            machine.lose_power(folder, names_too)
            consistent(folder, before)
        save(folder, step, version=1)
        assert version_of(consistent(folder, step)) == 1 and names(folder) == [f"step-0000000{step}"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_refuses_at_any_step_leaves_a_whole_checkpoint(tmp_path: Path, kind: str) -> None:
    step, before = KINDS[kind]
    refused = 0
    for fatal in range(total := calls(tmp_path, kind)):
        folder = tmp_path / f"{fatal}"
        started(folder, kind)
        machine = Machine(fatal, OSError(errno.ENOSPC, "No space left on device"))
        with machine.running():
            try:
                save(folder, step, version=1)
            except InputError as error:
                refused += 1
                assert re.search(rf"{folder}: saving step {step} failed .*No space left.*make room", str(error))
        consistent(folder, before)
        left = {*folder.glob(".*.new-*")} - {folder / ".step-00000003.new-00000000"}
        assert not left  # room is not taken by half a checkpoint
        save(folder, step, version=1)
        assert version_of(consistent(folder, step)) == 1 and names(folder) == [f"step-0000000{step}"]
    assert refused >= total - 1  # the folder that is there already is no error


def test_dying_again_and_again_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    rng = random.Random(0)
    for number in range(40):
        folder = tmp_path / f"{number}"
        machine, step, reached = started(folder, "the same step"), 2, 2
        for _ in range(3):
            machine.operations, machine.dead = [], False
            machine.fatal, step = rng.randrange(45), step + rng.randrange(2)
            try:
                with machine.running():
                    save(folder, step, version=rng.randrange(2))
            except Died:
                machine.lose_power(folder, names_too=rng.random() < 0.5)
                machine.renamed = []  # what was not lost is on the disk
            reached = consistent(folder, reached).step


def test_nothing_takes_its_name_before_it_is_on_the_disk(tmp_path: Path) -> None:
    save(tmp_path, 1)
    machine = Machine()
    with machine.running():
        save(tmp_path, 2)
    operations = [one for one in machine.operations if not one.startswith("chmod")]
    new, folder = ".step-00000002.new", tmp_path.name
    files = ["weights.safetensors", "none.safetensors", "state.json", "manifest.json"]
    assert operations[0] == f"mkdir {folder}" and operations[1] == f"mkdir {new}"
    assert operations[2:13] == [
        *(f"{verb} {file}" for file in files for verb in ("write", "fsync")),
        f"fsync {new}",
        f"rename {new} → step-00000002",
        f"fsync {folder}",
    ]
    assert operations[13:15] == ["rename step-00000001 → .step-00000001.trash", f"fsync {folder}"]
    assert {one.split()[0] for one in operations[15:]} == {"unlink", "rmdir"} and operations[
        -1
    ] == "rmdir .step-00000001.trash"


def test_another_checkpoint_of_a_step_is_hidden_before_it_is_removed(tmp_path: Path) -> None:
    path = save(tmp_path, 2)
    written = [(path / name).stat().st_mtime_ns for name in names(path)]
    machine = Machine()
    with machine.running():
        save(tmp_path, 2)  # equal: what is there stays
    assert [(path / name).stat().st_mtime_ns for name in names(path)] == written
    assert not [one for one in machine.operations if one.startswith("rename")]
    machine = Machine()
    with machine.running():
        save(tmp_path, 2, version=1)
    assert [one for one in machine.operations if one.startswith("rename") or one == f"fsync {tmp_path.name}"] == [
        "rename step-00000002 → .step-00000002.old",
        "rename .step-00000002.new → step-00000002",
        f"fsync {tmp_path.name}",
        "rename .step-00000002.old → .step-00000002.old.trash",
        f"fsync {tmp_path.name}",
    ]
    assert version_of(consistent(tmp_path, 2)) == 1 and names(tmp_path) == ["step-00000002"]


@pytest.mark.parametrize(
    ("keep", "pinned", "left"),
    [(1, (), [5]), (2, (), [4, 5]), (9, (), [1, 2, 3, 4, 5]), (1, (2,), [2, 5]), (2, [1, 5, 77], [1, 4, 5])],
)
def test_rotation_keeps_the_newest_and_the_pinned(tmp_path: Path, keep: int, pinned: Any, left: list[int]) -> None:
    for step in range(1, 6):
        save(tmp_path, step, keep=keep, pinned=pinned)
    assert names(tmp_path) == [f"step-0000000{step}" for step in left]
    assert all(version_of(Checkpoint.open(path)) == 0 for path in tmp_path.iterdir())


def test_taken_up_again_before_its_end_a_run_keeps_what_it_just_saved(tmp_path: Path) -> None:
    for step in (1, 3, 4):
        save(tmp_path, step, keep=3)
    save(tmp_path, 2, keep=1)
    assert names(tmp_path) == [f"step-0000000{step}" for step in (2, 3, 4)]
    save(tmp_path, 4, keep=1, version=1)
    assert names(tmp_path) == ["step-00000004"]


def test_a_disk_that_is_full_in_fact(tmp_path: Path) -> None:
    save(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    big = {"weights": {"w": torch.zeros(50_000)}}
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(InputError, match=r"saving step 2 failed .*File too large.*make room"):
            Checkpoints(tmp_path).save(2, big, {})
        with pytest.raises(InputError, match=r"saving step 2 failed .*File too large.*make room"):
            Checkpoints(tmp_path).save(2, {}, {"text": "x" * 200_000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == ["step-00000001"] and consistent(tmp_path, 1).step == 1
    with pytest.raises(InputError, match="saving step 1 failed"):
        save(tmp_path / "step-00000001" / "state.json", 1)  # a file is no folder


def killed_many_times(folder: Path, repeats: int) -> None:
    """In a process of its own: children that save without a pause, each killed at some moment."""
    os.fsync = lambda number: None  # a kill loses nothing that a power cut would
    rng, reached = random.Random(1), 0
    save(folder, 0)
    for _ in range(repeats):
        reading, writing = os.pipe()
        if (child := os.fork()) == 0:
            step = consistent(folder, reached).step
            while True:
                save(folder, step, version=1)
                step += 1
                save(folder, step)
                os.write(writing, b".")
        os.close(writing)
        for _ in range(2):  # however slow the machine is
            begun = time.monotonic()
            assert os.read(reading, 1)
        time.sleep(rng.uniform(0, time.monotonic() - begun))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        os.close(reading)
        assert consistent(folder, reached).step >= reached + 2
        reached = consistent(folder, reached).step
    save(folder, reached + 1)
    assert names(folder) == [f"step-{reached + 1:08d}"]


def test_a_process_that_is_killed_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    code = f"import pathlib, test_checkpoint_crash as t; t.killed_many_times(pathlib.Path({str(tmp_path)!r}), 15)"
    here = Path(__file__).parent
    subprocess.run([sys.executable, "-c", code], check=True, cwd=here, env=os.environ | {"PYTHONPATH": str(here)})
