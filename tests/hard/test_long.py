"""Long runs in one process: memory, open files, threads, tensors and temporary files do not grow."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from long_run import RUNS, Level, kinds, steer_for_long, train_for_long
from reliability import note

SCRIPT = Path(__file__).with_name("long_run.py")
MOST = 4.0  # kilobytes per call: a few megabytes in a long run; a leaked tensor is detected by its count
COUNTS = {"steering": 2000, "training": 500}


def resources_of_process(what: str, count: int, folder: Path) -> list[Level]:
    """Run in a new process, and return its resources after a warm-up of one fifth."""
    (folder / "temporary").mkdir()
    environment = os.environ | {"TMPDIR": str(folder / "temporary"), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, SCRIPT, what, str(count), str(folder)], env=environment, check=True, timeout=3000)
    levels = [Level(**json.loads(line)) for line in (folder / "levels.jsonl").read_text().splitlines()]
    assert levels[-1].done == count
    return levels[len(levels) // 5 :]


def spans(levels: list[Level]) -> dict[str, tuple[int, int]]:
    """Minimum and maximum of each resource."""
    values = {name: [getattr(one, name) for one in levels] for name in ("handles", "threads", "tensors", "temporary")}
    return {name: (min(series), max(series)) for name, series in values.items()}


@pytest.mark.hard
@pytest.mark.parametrize("what", RUNS)
def test_nothing_grows_in_a_long_run(what: str, tmp_path: Path) -> None:
    count = COUNTS[what]
    levels = resources_of_process(what, count, tmp_path)
    slope = float(np.polyfit([one.done for one in levels], [one.resident for one in levels], 1)[0])
    half = len(levels) // 2
    early, late = spans(levels[:half]), spans(levels[half:])
    figures = {"calls": count, "kilobytes per call": round(slope, 3), "kilobytes at the end": levels[-1].resident}
    note(f"long run: {what}", figures | {f"most {name}": most for name, (_, most) in late.items()})
    assert slope <= MOST
    for name, (_, most) in late.items():
        assert most <= early[name][1], name


@pytest.mark.hard
def test_repeated_calls_do_not_grow(tmp_path: Path) -> None:
    """A short version: each kind of call three times, the first as a warm-up."""
    size = len(kinds())
    _, second, third = steer_for_long(3 * size, size, tmp_path)
    assert third.done == 3 * size and not grown(second, third)


@pytest.mark.hard
def test_repeated_updates_do_not_grow(tmp_path: Path) -> None:
    _, second, third = train_for_long(12, 4, tmp_path)  # a rollout serves two updates, in two iterations
    assert not grown(second, third)
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) <= 3


def grown(before: Level, after: Level) -> dict[str, tuple[int, int]]:
    """Resources that grew. They may shrink: threads of other tests in this process may end."""
    pairs = {name: (getattr(before, name), getattr(after, name)) for name in ("handles", "threads", "tensors")}
    return {name: (early, late) for name, (early, late) in pairs.items() if late > early}
