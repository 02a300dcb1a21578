"""Kill -9 before every file operation of writers and at random times: the earlier or the new content is read."""

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
from writers import WRITERS, form_in

from steer.training.checkpoint import Checkpoints

BIG = {"filling": {"w": torch.arange(300_000.0)}}  # a save takes long enough to be killed inside a file
KEEP = [1, 2]
FULL = pytest.mark.hard


def save(folder: Path, step: int, keep: int, version: int = 0) -> None:
    tensors, values = content(step, version)
    Checkpoints(folder, keep).save(step, tensors | BIG, values, pinned=[1] if keep > 1 else [])


def newest(folder: Path) -> int:
    """Step from which a run would resume; assert that this and all other checkpoints are valid."""
    newest_checkpoint, skipped = Checkpoints(folder).latest()
    assert newest_checkpoint is not None and skipped == []
    version_of(newest_checkpoint)
    assert torch.equal(newest_checkpoint.tensors("filling")["w"], BIG["filling"]["w"])
    return newest_checkpoint.step


def saving(folder: Path, keep: int, pipe_end: int) -> Callable[[], None]:
    """Save steps in a loop, and write each finished step to a pipe."""

    def run() -> None:
        os.fsync = lambda number: None  # type: ignore[assignment] # written data survives SIGKILL without it
        last, _ = Checkpoints(folder).latest()
        step = last.step if last else 0
        while True:
            step += 1
            save(folder, step, keep, version=1)
            save(folder, step, keep)  # the same step with other content
            os.write(pipe_end, step.to_bytes(8, "little"))

    return run


def killed_at_random(folder: Path, keep: int, rng: random.Random) -> tuple[int, int]:
    """Kill a child at a random time; return the last step that it finished, and the newest valid checkpoint."""
    reading, writing = os.pipe()
    child = started(saving(folder, keep, writing), folder.parent / "output")
    os.close(writing)
    assert len(os.read(reading, 8)) == 8, (folder.parent / "output").read_text()  # it has started
    time.sleep(rng.uniform(0, 0.03))
    os.kill(child, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    with os.fdopen(reading, "rb") as pipe:
        steps = pipe.read()
    return int.from_bytes(steps[-8:], "little") if steps else 0, newest(folder)


@pytest.mark.parametrize("kills", [6, pytest.param(200, marks=FULL)])
def test_after_a_kill_at_a_random_time_the_last_finished_save_is_read(tmp_path: Path, kills: int) -> None:
    tally, rng = Tally(), random.Random(0)
    for number in range(kills):
        keep = KEEP[number % len(KEEP)]
        folder = tmp_path / f"keep-{keep}"
        done, kept_step = killed_at_random(folder, keep, rng)
        tally.count("in a save" if list(folder.glob(".step-*")) else "between saves", done <= kept_step)
    # When a kill happens depends on the load of the machine: a quarter of them inside a save is enough.
    assert tally.survived == kills and tally.outcomes["in a save"] >= kills // 4
    if kills >= 200:
        tally.note("checkpoint, kill -9 at random times")


@pytest.mark.few(1)
@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("every", [17, pytest.param(1, marks=FULL)])
def test_after_a_kill_before_any_file_operation_the_previous_save_is_read(
    tmp_path: Path, keep: int, every: int
) -> None:
    def folder_at(name: str) -> Path:
        for step in (1, 2, 3):
            save(tmp_path / name, step, keep)
        return tmp_path / name

    tally, count = Tally(), 0
    for step in (3, 4):  # overwrite the last one; save the next one
        write: Callable[[Path], Callable[[], None]] = lambda f, s=step: lambda: save(f, s, keep, version=1)  # type: ignore[misc] # noqa: E731
        count = steps_of(write(folder_at(f"count-{step}")), tmp_path / f"count-{step}")
        for fatal in range(0, count, every):
            folder = folder_at(f"{step}-{fatal}")
            assert killed_at(fatal, write(folder), folder).code == -signal.SIGKILL
            kept_step = newest(folder)
            tally.count("before the step" if kept_step < step else "at the step", kept_step >= 3)
            save(folder, step + 1, keep)  # and the run resumes
            assert newest(folder) == step + 1 and not list(folder.glob(".*"))
    assert count >= 20 and tally.lost == 0
    if every == 1:
        tally.note(f"checkpoint, kill -9 before each step of saving, keep {keep}")


@pytest.mark.few(1)
@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("every", [11, pytest.param(1, marks=FULL)])
def test_other_files_survive_a_kill_before_any_file_operation(tmp_path: Path, name: str, every: int) -> None:
    writer = WRITERS[name]
    counted = tmp_path / "count"
    writer.before(counted)
    count, tally = steps_of(lambda: writer.write(counted), counted), Tally()
    for fatal in range(0, count, every):
        folder = tmp_path / f"{fatal}"
        writer.before(folder)
        ended = killed_at(fatal, lambda folder=folder: writer.write(folder), folder)
        assert ended.code == -signal.SIGKILL, ended.output
        form = form_in(writer, folder)
        tally.count(form, form in writer.expected)
        again = forked(lambda folder=folder: writer.write(folder), folder)
        assert again.code == 0 and writer.read(folder) == "new", (fatal, again.output)
    assert count and tally.lost == 0, tally
    if every == 1:
        tally.note(f"{name}, kill -9 before each step of writing")
