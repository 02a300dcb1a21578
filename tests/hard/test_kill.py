"""Kill -9 at every step of writing and at random moments: what was there before, or what was being written, is read."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from child_processes import forked, killed_at, started, steps_of
from reliability import Tally
from test_checkpoint import content, version_of
from writers import WRITERS, held

from steer.training.checkpoint import Checkpoints

BIG = {"filling": {"w": torch.arange(300_000.0)}}  # so that a save takes long enough to be hit in the midst of a file
KEEP = [1, 2]
FULL = pytest.mark.hard


def save(folder: Path, step: int, keep: int, version: int = 0) -> None:
    tensors, values = content(step, version)
    Checkpoints(folder, keep).save(step, tensors | BIG, values, pinned=[1] if keep > 1 else [])


def newest(folder: Path) -> int:
    """The step that a run would go on from, after a look at all of it. Everything else that is seen is whole, too."""
    found, skipped = Checkpoints(folder).latest()
    assert found is not None and skipped == []
    version_of(found)
    assert torch.equal(found.tensors("filling")["w"], BIG["filling"]["w"])
    return found.step


def saving(folder: Path, keep: int, told: int) -> Callable[[], None]:
    """Saves step after step without a pause, and tells of each that is done."""

    def run() -> None:
        os.fsync = lambda number: None  # type: ignore[assignment] # a kill loses nothing that a power cut would
        found, _ = Checkpoints(folder).latest()
        step = found.step if found else 0
        while True:
            step += 1
            save(folder, step, keep, version=1)
            save(folder, step, keep)  # the same step with other content
            os.write(told, step.to_bytes(8, "little"))

    return run


def killed_at_random(folder: Path, keep: int, rng: random.Random) -> tuple[int, int]:
    """The last step that was told to be done before a child was killed at a random moment, and the newest whole one."""
    reading, writing = os.pipe()
    child = started(saving(folder, keep, writing), folder.parent / "said")
    os.close(writing)
    assert len(os.read(reading, 8)) == 8, (folder.parent / "said").read_text()  # it has begun
    time.sleep(rng.uniform(0, 0.03))
    os.kill(child, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    with os.fdopen(reading, "rb") as pipe:
        steps = pipe.read()
    return int.from_bytes(steps[-8:], "little") if steps else 0, newest(folder)


@pytest.mark.parametrize("kills", [6, pytest.param(200, marks=FULL)])
def test_of_a_save_that_is_killed_at_a_random_moment_one_interval_is_lost_at_most(tmp_path: Path, kills: int) -> None:
    tally, rng = Tally(), random.Random(0)
    for number in range(kills):
        keep = KEEP[number % len(KEEP)]
        folder = tmp_path / f"keep-{keep}"
        done, found = killed_at_random(folder, keep, rng)
        tally.count("in a save" if list(folder.glob(".step-*")) else "between saves", done <= found)
    # Where a kill falls depends on the load of the machine: a quarter of them inside a save is power enough.
    assert tally.survived == kills and tally.outcomes["in a save"] >= kills // 4
    if kills >= 200:
        tally.note("checkpoint, kill -9 at random times")


@pytest.mark.few(1)
@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("every", [17, pytest.param(1, marks=FULL)])
def test_a_save_that_is_killed_at_any_of_its_steps_loses_that_save_at_most(
    tmp_path: Path, keep: int, every: int
) -> None:
    def folder_at(name: str) -> Path:
        for step in (1, 2, 3):
            save(tmp_path / name, step, keep)
        return tmp_path / name

    tally, count = Tally(), 0
    for step in (3, 4):  # the last one once more, and the next one
        write: Callable[[Path], Callable[[], None]] = lambda f, s=step: lambda: save(f, s, keep, version=1)  # type: ignore[misc] # noqa: E731
        count = steps_of(write(folder_at(f"count-{step}")), tmp_path / f"count-{step}")
        for fatal in range(0, count, every):
            folder = folder_at(f"{step}-{fatal}")
            assert killed_at(fatal, write(folder), folder).code == -signal.SIGKILL
            found = newest(folder)
            tally.count("before the step" if found < step else "at the step", found >= 3)
            save(folder, step + 1, keep)  # and the run goes on
            assert newest(folder) == step + 1 and not list(folder.glob(".*"))
    assert count >= 20 and tally.lost == 0
    if every == 1:
        tally.note(f"checkpoint, kill -9 before each step of saving, keep {keep}")


@pytest.mark.few(1)
@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("every", [11, pytest.param(1, marks=FULL)])
def test_what_is_written_beside_checkpoints_survives_a_kill_at_any_step(tmp_path: Path, name: str, every: int) -> None:
    writer = WRITERS[name]
    counted = tmp_path / "count"
    writer.before(counted)
    count, tally = steps_of(lambda: writer.write(counted), counted), Tally()
    for fatal in range(0, count, every):
        folder = tmp_path / f"{fatal}"
        writer.before(folder)
        ended = killed_at(fatal, lambda folder=folder: writer.write(folder), folder)
        assert ended.code == -signal.SIGKILL, ended.said
        found = held(writer, folder)
        tally.count(found, found in writer.expected)
        again = forked(lambda folder=folder: writer.write(folder), folder)
        assert again.code == 0 and writer.read(folder) == "new", (fatal, again.said)
    assert count and tally.lost == 0, tally
    if every == 1:
        tally.note(f"{name}, kill -9 before each step of writing")
