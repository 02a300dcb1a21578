"""Full disk, read-only folder, too few file handles: a one-line message, and earlier files stay."""

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
from writers import NEW, OLD, WRITERS, form_in

from steer.errors import InputError
from steer.training.checkpoint import Checkpoints
from steer.training.supervised import read_state, write_state

FULL = pytest.mark.hard
SPACE = {"w": torch.arange(20_000.0)}


def checkpoint(folder: Path, step: int) -> None:
    tensors, values = content(step)
    Checkpoints(folder, keep=1).save(step, tensors | {"filling": SPACE}, values)


def checkpoint_in(folder: Path) -> str:
    newest, skipped = Checkpoints(folder).latest()
    return {1: OLD, 2: NEW}[newest.step] if newest and not skipped else "lost"


def state(folder: Path, step: int) -> None:
    write_state(folder / "state.pt", {"step": step, "states": [SPACE]})


def state_in(folder: Path) -> str:
    return {1: OLD, 2: NEW}[read_state(folder / "state.pt", torch.device("cpu"))["step"]]


ACTIONS: dict[str, tuple[Callable[[Path], Any], Callable[[Path], Any], Callable[[Path], str]]] = {
    "checkpoint": (lambda f: checkpoint(f, 1), lambda f: checkpoint(f, 2), checkpoint_in),
    "training state": (lambda f: state(f, 1), lambda f: state(f, 2), state_in),
    **{name: (one.before, one.write, lambda f, one=one: form_in(one, f)) for name, one in WRITERS.items()},
}
# These raise OSError, which the command line reports in one line.
RAISES_OS_ERROR = ("calibration", "report")


def as_input_error(name: str, write: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> None:
        try:
            write()
        except OSError as error:
            if name not in RAISES_OS_ERROR:
                raise
            raise InputError(f"{error.strerror}") from error

    return run


def count_outcome(tally: Tally, kind: str, ended: Ended, form: str) -> None:
    """Count a success with the new form, or a one-line refusal with the old form or the complete new one."""
    right = (NEW,) if ended.code == 0 else (OLD, NEW)
    assert ended.clean(), (kind, ended.code, ended.output)
    tally.count(f"{kind}, {'done' if ended.code == 0 else 'refused'}", form in right)


@pytest.mark.few(2)
@pytest.mark.parametrize("name", ACTIONS)
@pytest.mark.parametrize("count", [2, pytest.param(40, marks=FULL)])
def test_on_a_full_disk_earlier_files_stay(tmp_path: Path, name: str, count: int) -> None:
    """Under a limit of file size and, where mounting is permitted, on a tmpfs with few free pages."""
    before, write, read = ACTIONS[name]
    tally = Tally()
    for number in range(count):
        folder = tmp_path / f"size-{number}"
        before(folder)
        largest = max(path.stat().st_size for path in folder.rglob("*") if path.is_file()) + 200
        size = largest * number // count

        def within(folder: Path = folder, size: int = size) -> None:
            with limited(resource.RLIMIT_FSIZE, size):
                as_input_error(name, lambda: write(folder))()

        count_outcome(tally, "largest file", forked(within, folder), read(folder))
    for pages in range(count // 2):
        folder = tmp_path / f"disk-{pages}"
        folder.mkdir()
        (tmp_path / "verdict").write_text("mounting is not permitted")

        def on_it(folder: Path = folder, pages: int = pages) -> None:
            if not small_disk(folder, 1 << 24):
                return
            before(folder)
            (folder / "other").write_bytes(b"")
            with (folder / "other").open("wb", buffering=0) as file:  # leaves only some pages free
                file.write(b"\0" * max(_free(folder) - 4096 * pages, 0))
            code = 0
            try:
                as_input_error(name, lambda: write(folder))()
            except InputError as error:
                code = 70 if "\n" not in str(error) else 71
            (folder / "other").unlink()
            (tmp_path / "verdict").write_text(f"{code} {read(folder)}")

        ended = forked(on_it, folder)
        assert ended.code == 0, ended.output
        verdict = (tmp_path / "verdict").read_text()
        if verdict == "mounting is not permitted":
            tally.outcomes["small disks that could not be mounted"] = count // 2
            break
        code, _, form = verdict.partition(" ")
        count_outcome(tally, "small disk", Ended(int(code), ""), form)
    assert tally.lost == 0 and any("refused" in kind for kind in tally.outcomes), tally
    if count >= 40:
        tally.note(f"{name}, full disk")


def _free(folder: Path) -> int:
    usage = os.statvfs(folder)
    return usage.f_bavail * usage.f_bsize


@pytest.mark.few(3)
@pytest.mark.parametrize("name", ACTIONS)
@pytest.mark.parametrize("noted", [False, pytest.param(True, marks=FULL)])
def test_in_a_read_only_folder_earlier_files_stay(tmp_path: Path, name: str, noted: bool) -> None:
    before, write, read = ACTIONS[name]
    folder, tally = tmp_path / "folder", Tally()
    before(folder)
    open_to_all(tmp_path)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)

    def refused() -> None:
        as_nobody()
        as_input_error(name, lambda: write(folder))()

    ended = forked(refused, folder)
    assert ended.code == 70, ended.output
    count_outcome(tally, "read-only", ended, read(folder))
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755)
    write(folder)
    assert read(folder) == NEW and tally.lost == 0
    if noted:
        tally.note(f"{name}, read-only folder")


@pytest.mark.few(2)
@pytest.mark.parametrize("name", ACTIONS)
@pytest.mark.parametrize("most", [3, pytest.param(8, marks=FULL)])
def test_with_too_few_file_handles_earlier_files_stay(tmp_path: Path, name: str, most: int) -> None:
    before, write, read = ACTIONS[name]
    tally = Tally()
    for more in range(most):
        folder = tmp_path / f"{more}"
        before(folder)

        def few(folder: Path = folder, more: int = more) -> None:
            with few_files(more):
                as_input_error(name, lambda: write(folder))()

        count_outcome(tally, "files", forked(few, folder), read(folder))
    assert tally.lost == 0 and "files, refused" in tally.outcomes and "files, done" in tally.outcomes, tally
    if most == 8:
        tally.note(f"{name}, too few file handles")
