"""`steer sample` and `steer finetune`, killed, interrupted or without resources: a one-line message, then resumed."""

import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from child_processes import Ended, as_nobody, few_files, forked, killed_at, limited, open_to_all, started, steps_of
from commands import CONFIG, WORDS, Command, all_whole, finetuned, nothing_amiss, sampled
from conftest import cached_pipe
from reliability import Tally

from steer.apps import finetune_report
from steer.apps import sampling as sample

FULL = pytest.mark.hard
ENDS = {0: "had finished", 130: "ended with a message"}  # by exit code
NAMES = ["sample", pytest.param("finetune", marks=FULL)]


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Command]:
    """Both commands, with a tiny model of their own."""
    home = tmp_path_factory.mktemp("commands")
    cached_pipe("sd").save_pretrained(home / "tiny")
    (home / "prompts.txt").write_text("a red circle\na blue star\n")
    config = CONFIG | {"model": str(home / "tiny"), "prompts": str(home / "prompts.txt")}
    (home / "config.yaml").write_text(yaml.safe_dump(config))
    words = ("sample", "a red circle", "a blue star", "--model", str(home / "tiny"), *WORDS, "--out")
    return {
        "sample": Command(words, sampled, nothing_amiss),
        "finetune": Command(("finetune", str(home / "config.yaml"), "--resume", "--output-dir"), finetuned, all_whole),
    }


@pytest.fixture(scope="module")
def done(commands: dict[str, Command], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Output of undisturbed runs."""
    outputs = {}
    for name, command in commands.items():
        out = tmp_path_factory.mktemp("done") / name
        ended = command.forked(out)
        assert ended.code == 0, ended.output
        outputs[name] = command.left(out)
    return outputs


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable plots: they take longer than a tiny model."""
    monkeypatch.setattr(finetune_report, "write_grid", lambda *given: None)
    monkeypatch.setattr(finetune_report, "write_report", lambda *given: None)
    monkeypatch.setattr(sample, "_draw", lambda *given: None)


def resumes_to(command: Command, out: Path, expected: Any) -> bool:
    """Return whether the same command, run again, completes the output of an undisturbed run."""
    command.check(out)
    ended = command.forked(out)
    return ended.code == 0 and command.left(out) == expected


@pytest.mark.few(1)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("kills", [2, pytest.param(16, marks=FULL)])
def test_a_killed_run_resumes_to_the_result_of_an_undisturbed_run(
    commands: dict[str, Command],
    done: dict[str, Any],
    tmp_path: Path,
    name: str,
    kills: int,
) -> None:
    command, tally = commands[name], Tally()
    count = steps_of(lambda: command.run(tmp_path / "count"), tmp_path / "count")
    for number in range(kills):
        out = tmp_path / f"{number}"
        ended = killed_at(number * count // kills, lambda out=out: command.run(out), out)
        assert ended.code == -signal.SIGKILL, ended.output
        tally.count("kills", resumes_to(command, out, done[name]))
        shutil.rmtree(out, ignore_errors=True)
    assert count > kills and tally.lost == 0
    if kills >= 16:
        tally.note(f"steer {name}, kill -9, then resumed")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("times", [pytest.param(8, marks=FULL)])
def test_an_interrupted_run_resumes_to_the_result_of_an_undisturbed_run(
    commands: dict[str, Command],
    done: dict[str, Any],
    tmp_path: Path,
    name: str,
    times: int,
) -> None:
    command, tally, rng = commands[name], Tally(), random.Random(0)
    begun = time.monotonic()
    assert command.forked(tmp_path / "whole").code == 0
    length = time.monotonic() - begun
    for number in range(times):
        kind = (signal.SIGINT, signal.SIGTERM)[number % 2]
        out = tmp_path / f"{number}"
        child = started(lambda out=out: command.run(out), tmp_path / "output")
        time.sleep(rng.uniform(0.1, 1) * length)
        os.kill(child, kind)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output = (tmp_path / "output").read_text()
        assert code in (0, 130, -signal.SIGTERM) and "Traceback" not in output, output
        assert code != 130 or output.strip().splitlines()[-1].startswith("steer: interrupted"), output
        tally.count(ENDS.get(code, "ended"), resumes_to(command, out, done[name]))
    assert tally.lost == 0
    if times >= 8:
        tally.note(f"steer {name}, Ctrl-C and SIGTERM, then resumed")


def on_a_full_disk(number: int) -> Callable[[Callable[[], Any]], Any]:
    def run(action: Callable[[], Any]) -> None:
        with limited(resource.RLIMIT_FSIZE, (0, 30, 300, 1000, 3000, 6000, 12_000, 30_000)[number % 8]):
            action()

    return run


def with_few_files(number: int) -> Callable[[Callable[[], Any]], Any]:
    def run(action: Callable[[], Any]) -> None:
        with few_files(number):
            action()

    return run


LIMITS = {"a full disk": on_a_full_disk, "too few file handles": with_few_files}


@pytest.mark.hard
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", LIMITS)
@pytest.mark.parametrize("times", [2, pytest.param(8, marks=FULL)])
def test_a_run_without_resources_fails_with_one_line_and_resumes(
    commands: dict[str, Command],
    done: dict[str, Any],
    tmp_path: Path,
    name: str,
    kind: str,
    times: int,
) -> None:
    command, tally = commands[name], Tally()
    for number in range(0, 8, 8 // times):
        out = tmp_path / f"{number}"
        limit = LIMITS[kind](number)
        ended = forked(lambda limit=limit, out=out: limit(lambda: command.run(out)), out)
        single_line(ended)
        tally.count("done" if ended.code == 0 else "refused", resumes_to(command, out, done[name]))
    assert tally.lost == 0 and tally.outcomes["refused"]
    if times >= 8:
        tally.note(f"steer {name}, {kind}, then resumed")


@pytest.mark.parametrize("name", ["sample"])  # finetune: tests/test_finetune_cli.py
def test_a_read_only_folder_is_reported_in_one_line(
    commands: dict[str, Command],
    tmp_path: Path,
    name: str,
) -> None:
    command, out = commands[name], tmp_path / "out"
    out.mkdir()
    out.chmod(0o555)
    for place in (tmp_path, *(Path(word) for word in command.words if "/" in word)):
        open_to_all(place)
    out.chmod(0o555)

    def refused() -> None:
        as_nobody()
        command.run(out)

    ended = forked(refused, out)
    assert ended.code == 2 and "cannot write there (Permission denied)" in ended.output, ended.output
    single_line(ended)


def single_line(ended: Ended) -> None:
    """Assert exit code 0, or exit code 2 with a message of steer as last line, and no traceback."""
    assert ended.clean() and ended.code in (0, 2), (ended.code, ended.output)
