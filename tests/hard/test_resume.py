"""Runs that are killed at random and go on, alone and in twos: at the end every bit is that of an undisturbed run."""

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
from process_groups import Launched, Team
from reliability import Tally
from test_finetune import assert_same_end

from steer.files import loads_with_checksum
from steer.training.checkpoint import Checkpoints

FULL = pytest.mark.hard
UPDATES = 7
COUNTS = {1: "one process", 2: "two processes"}


def training(method: str, out: Path, every: int = 3) -> Action:
    """Seven updates with averages, held-out prompts and a best one; in a child, whose models are its own."""
    config = config_of(method, max_steps=UPDATES, save_steps=every)
    return lambda: train(method, cached_pipe("sd"), out, config)


def done_by(actions: list[Action], out: Path) -> list[Ended]:
    """How those end who run it together, all of them well."""
    ended = Team.begun(actions, out).ended()
    assert all(one.code == 0 for one in ended), ended
    return ended


@dataclass(frozen=True)
class Whole:
    """A run that nobody disturbed: its folder, how long an update took, and its steps of the file system."""

    out: Path
    update: float
    steps: int

    @classmethod
    def of(cls, method: str, count: int, home: Path) -> "Whole":
        cached_pipe("sd")  # before the children, or each would build it
        out, told = home / f"{method}-{count}", home / "steps"
        action = training(method, out)

        def counted() -> None:
            with Steps(out) as steps:
                action()
            told.write_text(str(steps.count))

        begun = time.monotonic()
        done_by([counted, *[action] * (count - 1)], out)
        return cls(out, (time.monotonic() - begun) / UPDATES, int(told.read_text()))


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Whole]:
    """Made once each."""
    return cache(lambda method, count: Whole.of(method, count, tmp_path_factory.mktemp("whole")))


def updates_of(out: Path) -> int:
    """How many updates the run tells of."""
    series = out / "metrics.jsonl"
    return series.read_text().count("\n") if series.exists() else 0


def at_a_moment(rng: random.Random, actions: list[Action], out: Path, whole: Whole) -> list[Ended]:
    """All are killed at once."""
    return killed_by_the_clock(rng, actions, out, whole, range(len(actions)))


def one_of_them(rng: random.Random, actions: list[Action], out: Path, whole: Whole) -> list[Ended]:
    """The last one is killed; others have to end by themselves."""
    return killed_by_the_clock(rng, actions, out, whole, [len(actions) - 1])


def killed_by_the_clock(
    rng: random.Random, actions: list[Action], out: Path, whole: Whole, members: Iterable[int]
) -> list[Ended]:
    """Some are killed within the time of an update from the end of some update, or from where it goes on."""
    last = rng.randrange(min(updates_of(out), UPDATES - 1), UPDATES)
    context = Team.begun(actions, out)
    context.wait_until(lambda: updates_of(out) >= last and (out / "checkpoints").exists())
    time.sleep(rng.uniform(0, whole.update))
    context.kill(members)
    return context.ended()


def before_a_step(rng: random.Random, actions: list[Action], out: Path, whole: Whole) -> list[Ended]:
    """The one that writes is killed before a step of the file system; others have to end by themselves."""
    first, fatal = actions[0], rng.randrange(whole.steps * max(1, UPDATES - updates_of(out)) // UPDATES)

    def dying() -> None:
        with Steps(out, fatal):
            first()

    return Team.begun([dying, *actions[1:]], out).ended()


Cut = Callable[[random.Random, list[Action], Path, Whole], list[Ended]]
CUTS: dict[int, list[Cut]] = {
    1: [at_a_moment, before_a_step],
    2: [at_a_moment, before_a_step, one_of_them],
}


@pytest.mark.hard
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("method", ["d3po", "prdp"])
@pytest.mark.parametrize("runs", [12])
def test_a_run_that_is_killed_and_killed_again_ends_the_same_to_the_last_bit(
    wholes: Callable[[str, int], Whole], tmp_path: Path, method: str, count: int, runs: int
) -> None:
    whole, tally, rng = wholes(method, count), Tally(), random.Random(f"{method} {count}")
    for number in range(runs):
        out = tmp_path / f"{number}"
        for again in range(1 + number % 3):
            cut = CUTS[count][(number + again) % len(CUTS[count])]
            tally.count(what_became(cut(rng, [training(method, out, 1 + number % 3)] * count, out, whole), cut, out))
        done_by([training(method, out)] * count, out)
        assert_same_end(whole.out, out)
    assert tally.outcomes.get("was done", 0) <= tally.tries // 3
    if runs >= 12:
        tally.note(f"steer finetune, {method}, {COUNTS[count]}, kill -9 one to three times, then the same command")


def what_became(ended: list[Ended], cut: Cut, out: Path) -> str:
    """Where one was killed the others say in a line that it is gone, unless they were told to end before they saw it;
    and what is saved is whole."""
    found, skipped = Checkpoints(out / "checkpoints").latest()
    assert skipped == []
    if all(one.code == 0 for one in ended):
        return "was done"
    assert any(one.code == -signal.SIGKILL for one in ended), ended
    assert all(one.code in (-signal.SIGKILL, -signal.SIGTERM) or one.clean() for one in ended), ended
    return "before there was a checkpoint" if found is None else cut.__name__.replace("_", " ")


@pytest.mark.few(1)
@pytest.mark.parametrize("amid", ["prepare", "backward"])
def test_of_two_processes_of_which_one_is_gone_the_other_says_so_in_a_line(tmp_path: Path, amid: str) -> None:
    """Where accelerate makes them talk: when the denoiser is shared, and when the gradients are."""
    out = tmp_path / "run"
    action = training("d3po", out)

    def dying() -> None:
        setattr(Accelerator, amid, lambda *given: os.kill(os.getpid(), signal.SIGKILL))
        action()

    other, killed = Team.begun([action, dying], out).ended(patience=60)
    assert killed.code == -signal.SIGKILL and other.code == REFUSED, other
    assert other.said.startswith("another process of this run ended prematurely: see its output")


@pytest.mark.hard
@pytest.mark.parametrize("method", ["d3po", "prdp"])
def test_a_run_of_torchrun_that_is_killed_twice_ends_the_same_to_the_last_bit(tmp_path: Path, method: str) -> None:
    """The launcher and its processes, all at once; `steer finetune --resume` goes on."""
    cached_pipe("sd").save_pretrained(tmp_path / "tiny")
    (tmp_path / "prompts.txt").write_text("a red circle\na blue star\n")
    told = CONFIG | {"method": method, "model": str(tmp_path / "tiny"), "prompts": str(tmp_path / "prompts.txt")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(told | {"max_steps": 12, "save_steps": 2, "ema_decay": 0.9}))
    words = ["finetune", str(tmp_path / "config.yaml"), "--resume", "--output-dir"]
    whole, out, tally, rng = tmp_path / "whole", tmp_path / "killed", Tally(), random.Random(method)
    undisturbed = Launched([*words, str(whole)], tmp_path / "said").ended()
    assert undisturbed.code == 0, undisturbed.said
    for updates in (rng.randrange(2, 6), rng.randrange(6, 11)):
        run = Launched([*words, str(out)], tmp_path / "said")
        run.wait_until(lambda updates=updates: updates_of(out) >= updates)
        time.sleep(rng.uniform(0, 0.2))
        assert run.kill() == 2, run.log.read_text()
        found, skipped = Checkpoints(out / "checkpoints").latest()
        assert found and found.step < 12 and skipped == []
        tally.count("kills")
    again = Launched([*words, str(out)], tmp_path / "said").ended()
    assert again.code == 0, again.said
    assert finetuned(out) == finetuned(whole)
    for name in ("weights", "optimiser", "average", "random"):
        kept, other = ((at / f"checkpoints/step-00000012/{name}.safetensors").read_bytes() for at in (whole, out))
        assert kept == other, name
    tally.note(f"steer finetune, {method}, torchrun of two processes, kill -9 twice, then the same command")


NUMBERS = ["two", "three", "four", "five", "six", "seven", "eight", "nine"]
COLOURS, SHAPES = ["red", "green", "blue", "yellow", "purple"], ["circles", "squares", "triangles", "stars", "crosses"]
PROMPTS = [" ".join(words) for words in product(NUMBERS, COLOURS, SHAPES)]


def made(out: Path) -> dict[str, int]:
    """The prompts that are finished, and when the last file of each was written."""
    if not (out / "report.json").exists():
        return {}
    entries = loads_with_checksum((out / "report.json").read_text())["prompts"]
    assert len({one["prompt"] for one in entries}) == len(entries)
    return {one["prompt"]: max((out / name).stat().st_mtime_ns for name in one["images"]) for one in entries}


@pytest.mark.hard
@pytest.mark.parametrize(("count", "kills"), [(200, 12)])
def test_samples_of_many_prompts_are_each_made_once_however_often_it_is_killed(
    tmp_path: Path, count: int, kills: int
) -> None:
    """One command again and again, now on one process, now on two; what was finished is not made again."""
    cached_pipe("sd").save_pretrained(tmp_path / "tiny")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:count]))
    words = ("sample", "--prompts", str(tmp_path / "prompts.txt"), "--model", str(tmp_path / "tiny"), *WORDS, "--out")
    command, rng, tally = Command(words, sampled, nothing_amiss), random.Random(count), Tally()
    out, before, expected = tmp_path / "killed", dict[str, int](), tmp_path / "whole"
    done_by([lambda: command.run(expected)], expected)
    for number, at in enumerate(sorted(rng.sample(range(count - 1), kills))):
        context = Team.begun([lambda: command.run(out)] * (1 + number % 2), out)
        context.wait_until(lambda at=at: (out / "report.json").exists() and len(list(out.glob("[0-9]*-*"))) > at)
        time.sleep(rng.uniform(0, 0.1))
        context.kill(range(len(context.children)))
        ended = context.ended()
        assert all(one.code in (0, -signal.SIGKILL) for one in ended), ended
        assert before.items() <= (before := made(out)).items()
        tally.count(f"{len(ended)} of one run" if any(one.code for one in ended) else "was done")
    done_by([lambda: command.run(out)], out)
    assert before.items() <= made(out).items()
    assert [one["prompt"] for one in loads_with_checksum((out / "report.json").read_text())["prompts"]] == PROMPTS[
        :count
    ]
    assert len(list(out.glob("[0-9]*-*"))) == count and not (out / "finished").exists()
    assert command.left(out) == command.left(expected) and tally.outcomes.get("was done", 0) <= kills // 2
    if kills >= 12:
        tally.note("steer sample, 200 prompts, kill -9 again and again, then the same command")
