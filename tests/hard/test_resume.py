"""Runs on one and two processes, killed at random and resumed, are bit-identical to undisturbed runs."""

import os
import random
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import yaml
from accelerate import Accelerator
from child_processes import REFUSED, Action, Ended, Steps
from commands import CONFIG, WORDS, Command, finetuned, nothing_amiss, sampled
from conftest import cached_pipe
from finetune_runs import config_of, train
from process_groups import Launched, ProcessGroup
from reliability import Tally
from test_finetune import assert_same_end

from steer.files import loads_with_checksum
from steer.training.checkpoint import Checkpoints

FULL = pytest.mark.hard
UPDATES = 7
COUNTS = {1: "one process", 2: "two processes"}


def training(method: str, out: Path, every: int = 3) -> Action:
    """Seven updates with averaged weights, evaluations and early stopping; to be run in a child."""
    config = config_of(method, max_steps=UPDATES, save_steps=every)
    return lambda: train(method, cached_pipe("sd"), out, config)


def finish(actions: list[Action], out: Path) -> list[Ended]:
    """Run actions as one group of processes; assert that all succeed."""
    ended = ProcessGroup.begun(actions, out).ended()
    assert all(one.code == 0 for one in ended), ended
    return ended


@dataclass(frozen=True)
class Whole:
    """An undisturbed run: its folder, seconds per update, and number of file operations."""

    out: Path
    update: float
    steps: int

    @classmethod
    def of(cls, method: str, count: int, home: Path) -> "Whole":
        cached_pipe("sd")  # before the forks, or each would build it
        out, count_file = home / f"{method}-{count}", home / "steps"
        action = training(method, out)

        def counted() -> None:
            with Steps(out) as steps:
                action()
            count_file.write_text(str(steps.count))

        begun = time.monotonic()
        finish([counted, *[action] * (count - 1)], out)
        return cls(out, (time.monotonic() - begun) / UPDATES, int(count_file.read_text()))


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Whole]:
    """Undisturbed runs, one of each kind."""
    return cache(lambda method, count: Whole.of(method, count, tmp_path_factory.mktemp("whole")))


def updates_of(out: Path) -> int:
    """Number of updates in the metrics of a run."""
    series = out / "metrics.jsonl"
    return series.read_text().count("\n") if series.exists() else 0


def at_a_random_time(rng: random.Random, actions: list[Action], out: Path, whole: Whole) -> list[Ended]:
    """Kill all processes at once."""
    return killed_during_an_update(rng, actions, out, whole, range(len(actions)))


def one_of_them(rng: random.Random, actions: list[Action], out: Path, whole: Whole) -> list[Ended]:
    """Kill the last process; the others must end by themselves."""
    return killed_during_an_update(rng, actions, out, whole, [len(actions) - 1])


def killed_during_an_update(
    rng: random.Random, actions: list[Action], out: Path, whole: Whole, members: Iterable[int]
) -> list[Ended]:
    """Kill some processes during a random update, or during the first one after resuming."""
    last = rng.randrange(min(updates_of(out), UPDATES - 1), UPDATES)
    context = ProcessGroup.begun(actions, out)
    context.wait_until(lambda: updates_of(out) >= last and (out / "checkpoints").exists())
    time.sleep(rng.uniform(0, whole.update))
    context.kill(members)
    return context.ended()


def before_a_step(rng: random.Random, actions: list[Action], out: Path, whole: Whole) -> list[Ended]:
    """Kill the writing process before a random file operation; the others must end by themselves."""
    first, fatal = actions[0], rng.randrange(whole.steps * max(1, UPDATES - updates_of(out)) // UPDATES)

    def dying() -> None:
        with Steps(out, fatal):
            first()

    return ProcessGroup.begun([dying, *actions[1:]], out).ended()


Cut = Callable[[random.Random, list[Action], Path, Whole], list[Ended]]
CUTS: dict[int, list[Cut]] = {
    1: [at_a_random_time, before_a_step],
    2: [at_a_random_time, before_a_step, one_of_them],
}


@pytest.mark.hard
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("method", ["d3po", "prdp"])
@pytest.mark.parametrize("runs", [12])
def test_a_run_killed_repeatedly_resumes_bit_for_bit(
    wholes: Callable[[str, int], Whole], tmp_path: Path, method: str, count: int, runs: int
) -> None:
    whole, tally, rng = wholes(method, count), Tally(), random.Random(f"{method} {count}")
    for number in range(runs):
        out = tmp_path / f"{number}"
        for again in range(1 + number % 3):
            cut = CUTS[count][(number + again) % len(CUTS[count])]
            tally.count(outcome_of(cut(rng, [training(method, out, 1 + number % 3)] * count, out, whole), cut, out))
        finish([training(method, out)] * count, out)
        assert_same_end(whole.out, out)
    assert tally.outcomes.get("had finished", 0) <= tally.tries // 3
    if runs >= 12:
        tally.note(f"steer finetune, {method}, {COUNTS[count]}, kill -9 one to three times, then resumed")


def outcome_of(ended: list[Ended], cut: Cut, out: Path) -> str:
    """Name the outcome of a kill. Other processes report it in one line or get SIGTERM; all checkpoints are valid."""
    newest, skipped = Checkpoints(out / "checkpoints").latest()
    assert skipped == []
    if all(one.code == 0 for one in ended):
        return "had finished"
    assert any(one.code == -signal.SIGKILL for one in ended), ended
    assert all(one.code in (-signal.SIGKILL, -signal.SIGTERM) or one.clean() for one in ended), ended
    return "before the first checkpoint" if newest is None else cut.__name__.replace("_", " ")


@pytest.mark.few(1)
@pytest.mark.parametrize("amid", ["prepare", "backward"])
def test_when_one_of_two_processes_dies_the_other_reports_it_in_one_line(tmp_path: Path, amid: str) -> None:
    """During the first synchronisation, of the denoiser, and during that of the gradients."""
    out = tmp_path / "run"
    action = training("d3po", out)

    def dying() -> None:
        setattr(Accelerator, amid, lambda *given: os.kill(os.getpid(), signal.SIGKILL))
        action()

    other, killed = ProcessGroup.begun([action, dying], out).ended(patience=60)
    assert killed.code == -signal.SIGKILL and other.code == REFUSED, other
    assert other.output.startswith("another process of this run ended prematurely: see its output")


@pytest.mark.hard
@pytest.mark.parametrize("method", ["d3po", "prdp"])
def test_a_torchrun_run_killed_twice_resumes_bit_for_bit(tmp_path: Path, method: str) -> None:
    """Launcher and processes are killed at once; `steer finetune --resume` resumes."""
    cached_pipe("sd").save_pretrained(tmp_path / "tiny")
    (tmp_path / "prompts.txt").write_text("a red circle\na blue star\n")
    config = CONFIG | {"method": method, "model": str(tmp_path / "tiny"), "prompts": str(tmp_path / "prompts.txt")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config | {"max_steps": 12, "save_steps": 2, "ema_decay": 0.9}))
    words = ["finetune", str(tmp_path / "config.yaml"), "--resume", "--output-dir"]
    whole, out, tally, rng = tmp_path / "whole", tmp_path / "killed", Tally(), random.Random(method)
    undisturbed = Launched([*words, str(whole)], tmp_path / "output").ended()
    assert undisturbed.code == 0, undisturbed.output
    for updates in (rng.randrange(2, 6), rng.randrange(6, 11)):
        run = Launched([*words, str(out)], tmp_path / "output")
        run.wait_until(lambda updates=updates: updates_of(out) >= updates)
        time.sleep(rng.uniform(0, 0.2))
        assert run.kill() == 2, run.log.read_text()
        newest, skipped = Checkpoints(out / "checkpoints").latest()
        assert newest and newest.step < 12 and skipped == []
        tally.count("kills")
    again = Launched([*words, str(out)], tmp_path / "output").ended()
    assert again.code == 0, again.output
    assert finetuned(out) == finetuned(whole)
    for name in ("weights", "optimiser", "average", "random"):
        kept, other = ((at / f"checkpoints/step-00000012/{name}.safetensors").read_bytes() for at in (whole, out))
        assert kept == other, name
    tally.note(f"steer finetune, {method}, torchrun of two processes, kill -9 twice, then resumed")


NUMBERS = ["two", "three", "four", "five", "six", "seven", "eight", "nine"]
COLOURS, SHAPES = ["red", "green", "blue", "yellow", "purple"], ["circles", "squares", "triangles", "stars", "crosses"]
PROMPTS = [" ".join(words) for words in product(NUMBERS, COLOURS, SHAPES)]


def made(out: Path) -> dict[str, int]:
    """Finished prompts, with the time of the last file of each."""
    if not (out / "report.json").exists():
        return {}
    entries = loads_with_checksum((out / "report.json").read_text())["prompts"]
    assert len({one["prompt"] for one in entries}) == len(entries)
    return {one["prompt"]: max((out / name).stat().st_mtime_ns for name in one["images"]) for one in entries}


@pytest.mark.hard
@pytest.mark.parametrize(("count", "kills"), [(200, 12)])
def test_after_repeated_kills_every_prompt_is_sampled_once(tmp_path: Path, count: int, kills: int) -> None:
    """The same command, alternately on one process and on two; finished prompts are not sampled again."""
    cached_pipe("sd").save_pretrained(tmp_path / "tiny")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:count]))
    words = ("sample", "--prompts", str(tmp_path / "prompts.txt"), "--model", str(tmp_path / "tiny"), *WORDS, "--out")
    command, rng, tally = Command(words, sampled, nothing_amiss), random.Random(count), Tally()
    out, before, expected = tmp_path / "killed", dict[str, int](), tmp_path / "whole"
    finish([lambda: command.run(expected)], expected)
    for number, at in enumerate(sorted(rng.sample(range(count - 1), kills))):
        context = ProcessGroup.begun([lambda: command.run(out)] * (1 + number % 2), out)
        context.wait_until(lambda at=at: (out / "report.json").exists() and len(list(out.glob("[0-9]*-*"))) > at)
        time.sleep(rng.uniform(0, 0.1))
        context.kill(range(len(context.children)))
        ended = context.ended()
        assert all(one.code in (0, -signal.SIGKILL) for one in ended), ended
        assert before.items() <= (before := made(out)).items()
        tally.count(f"{len(ended)} of one run" if any(one.code for one in ended) else "had finished")
    finish([lambda: command.run(out)], out)
    assert before.items() <= made(out).items()
    assert [one["prompt"] for one in loads_with_checksum((out / "report.json").read_text())["prompts"]] == PROMPTS[
        :count
    ]
    assert len(list(out.glob("[0-9]*-*"))) == count and not (out / "finished").exists()
    assert command.left(out) == command.left(expected) and tally.outcomes.get("had finished", 0) <= kills // 2
    if kills >= 12:
        tally.note("steer sample, 200 prompts, killed repeatedly by kill -9, then resumed")
