"""A full disk, a folder that may not be written, too few files: one line, and what was there before stays."""

import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from child_processes import Ended, as_nobody, few_files, forked, limited, open_to_all, small_disk
from reliability import Tally
from test_checkpoint import content
from writers import NEW, OLD, WRITERS, held

from steer.errors import InputError
from steer.training.checkpoint import Checkpoints
from steer.training.supervised import read_state, write_state

FULL = pytest.mark.hard
SPACE = {"w": torch.arange(20_000.0)}


def checkpoint(folder: Path, step: int) -> None:
    tensors, values = content(step)
    Checkpoints(folder, keep=1).save(step, tensors | {"filling": SPACE}, values)


def checkpoint_in(folder: Path) -> str:
    found, skipped = Checkpoints(folder).latest()
    return {1: OLD, 2: NEW}[found.step] if found and not skipped else "lost"


def state(folder: Path, step: int) -> None:
    write_state(folder / "state.pt", {"step": step, "states": [SPACE]})


def state_in(folder: Path) -> str:
    return {1: OLD, 2: NEW}[read_state(folder / "state.pt", torch.device("cpu"))["step"]]


ACTIONS: dict[str, tuple[Callable[[Path], Any], Callable[[Path], Any], Callable[[Path], str]]] = {
    "checkpoint": (lambda f: checkpoint(f, 1), lambda f: checkpoint(f, 2), checkpoint_in),
    "training state": (lambda f: state(f, 1), lambda f: state(f, 2), state_in),
    **{name: (one.before, one.write, lambda f, one=one: held(one, f)) for name, one in WRITERS.items()},
}
# At its own expense the calibration raises OSError, for the command line to tell: see test_refused_commands.
RAISES_OS_ERROR = ("calibration", "report")


def as_in_a_line(name: str, write: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> None:
        try:
            write()
        except OSError as error:
            if name not in RAISES_OS_ERROR:
                raise
            raise InputError(f"{error.strerror}") from error

    return run


def judged(tally: Tally, kind: str, ended: Ended, found: str) -> None:
    """Done, and the new is there; or refused in a line, and the old is, or the new where it was whole by then."""
    right = (NEW,) if ended.code == 0 else (OLD, NEW)
    assert ended.clean(), (kind, ended.code, ended.said)
    tally.count(f"{kind}, {'done' if ended.code == 0 else 'refused'}", found in right)


@pytest.mark.few(2)
@pytest.mark.parametrize("name", ACTIONS)
@pytest.mark.parametrize("count", [2, pytest.param(40, marks=FULL)])
def test_on_a_disk_that_is_full_the_old_stays(tmp_path: Path, name: str, count: int) -> None:
    """No file may grow beyond a size; and, where this machine lets a process have one, a disk of a few pages."""
    before, write, read = ACTIONS[name]
    tally = Tally()
    for number in range(count):
        folder = tmp_path / f"size-{number}"
        before(folder)
        largest = max(path.stat().st_size for path in folder.rglob("*") if path.is_file()) + 200
        size = largest * number // count

        def within(folder: Path = folder, size: int = size) -> None:
            with limited(resource.RLIMIT_FSIZE, size):
                as_in_a_line(name, lambda: write(folder))()

        judged(tally, "largest file", forked(within, folder), read(folder))
    for pages in range(count // 2):
        folder = tmp_path / f"disk-{pages}"
        folder.mkdir()
        (tmp_path / "verdict").write_text("no disk of one's own")

        def on_it(folder: Path = folder, pages: int = pages) -> None:
            if not small_disk(folder, 1 << 24):
                return
            before(folder)
            (folder / "other").write_bytes(b"")
            with (folder / "other").open("wb", buffering=0) as file:  # all but some pages are another's
                file.write(b"\0" * max(_free(folder) - 4096 * pages, 0))
            code = 0
            try:
                as_in_a_line(name, lambda: write(folder))()
            except InputError as error:
                code = 70 if "\n" not in str(error) else 71
            (folder / "other").unlink()
            (tmp_path / "verdict").write_text(f"{code} {read(folder)}")

        ended = forked(on_it, folder)
        assert ended.code == 0, ended.said
        verdict = (tmp_path / "verdict").read_text()
        if verdict == "no disk of one's own":
            tally.outcomes["small disks that could not be had here"] = count // 2
            break
        code, _, found = verdict.partition(" ")
        judged(tally, "small disk", Ended(int(code), ""), found)
    assert tally.lost == 0 and any("refused" in kind for kind in tally.outcomes), tally
    if count >= 40:
        tally.note(f"{name}, full disk")


def _free(folder: Path) -> int:
    told = os.statvfs(folder)
    return told.f_bavail * told.f_bsize


@pytest.mark.few(3)
@pytest.mark.parametrize("name", ACTIONS)
@pytest.mark.parametrize("noted", [False, pytest.param(True, marks=FULL)])
def test_in_a_folder_that_may_not_be_written_the_old_stays(tmp_path: Path, name: str, noted: bool) -> None:
    before, write, read = ACTIONS[name]
    folder, tally = tmp_path / "folder", Tally()
    before(folder)
    open_to_all(tmp_path)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)

    def refused() -> None:
        as_nobody()
        as_in_a_line(name, lambda: write(folder))()

    ended = forked(refused, folder)
    assert ended.code == 70, ended.said
    judged(tally, "read-only", ended, read(folder))
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755)
    write(folder)
    assert read(folder) == NEW and tally.lost == 0
    if noted:
        tally.note(f"{name}, read-only folder")


@pytest.mark.few(2)
@pytest.mark.parametrize("name", ACTIONS)
@pytest.mark.parametrize("most", [3, pytest.param(8, marks=FULL)])
def test_with_too_few_files_the_old_stays(tmp_path: Path, name: str, most: int) -> None:
    before, write, read = ACTIONS[name]
    tally = Tally()
    for more in range(most):
        folder = tmp_path / f"{more}"
        before(folder)

        def few(folder: Path = folder, more: int = more) -> None:
            with few_files(more):
                as_in_a_line(name, lambda: write(folder))()

        judged(tally, "files", forked(few, folder), read(folder))
    assert tally.lost == 0 and "files, refused" in tally.outcomes and "files, done" in tally.outcomes, tally
    if most == 8:
        tally.note(f"{name}, too few files")
