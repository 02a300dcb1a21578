"""Questions of a training to the user at the terminal."""

import select
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import click

from steer.pipelines.training.asking import Question

INTERVAL = 0.2  # seconds between two checks for a request to end the run
UNANSWERED_EXIT = 3  # exit code of a run that needs an answer


@dataclass
class TerminalAnswers:
    """Asks in the terminal: prints a question with its grids, and reads y or N. Without a terminal there is no answer.

    out     folder of the run
    agreed  answer the next question with yes, without asking (`--yes`)
    """

    out: Path
    agreed: bool = False

    def __call__(self, question: Question, check: Callable[[], None]) -> bool | None:
        """Return True for y, False for anything else; None without a terminal."""
        click.echo(describe(question, self.out), err=True)
        if self.agreed:
            self.agreed = False
            return True
        if not sys.stdin.isatty():
            return None
        click.echo("continue? [y/N] ", err=True, nl=False)
        return read_line(sys.stdin, check).strip().lower() in ("y", "yes")


def describe(question: Question, out: Path) -> str:
    """Describe a question in a few lines."""
    gains = ", ".join(f"{name} {gain:+.2f}" for name, gain in question.gains.items())
    before, after = (out / "samples" / f"step-{step:06d}.png" for step in (question.kept_step, question.step))
    return (
        f"steer: the rewards disagree about update {question.step}: {gains}, in standard deviations, since update "
        f"{question.kept_step}\n  gain {question.mean:+.2f} ± {question.deviation:.2f}; asking is worth "
        f"{question.value:.3f}\n  before: {before}\n  now:    {after}"
    )


def read_line(stream: TextIO, check: Callable[[], None]) -> str:
    """Read a line, and call `check` several times a second while waiting."""
    if sys.platform != "win32":  # select does not take terminals there
        while not select.select([stream], [], [], INTERVAL)[0]:
            check()
    check()
    return stream.readline()
