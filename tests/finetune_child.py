"""A training in a process of its own, to be killed: python finetune_child.py METHOD MODEL FOLDER."""

import sys
from typing import Any, TextIO

from finetune_runs import train

from steer.apps.models import load_pipeline


class Printer:
    """Writes the number of every update."""

    def __init__(self, lines: TextIO) -> None:
        self.lines = lines

    def on_log(self, args: Any, state: Any, control: Any, **details: Any) -> None:
        self.lines.write(f"{state.global_step}\n")


if __name__ == "__main__":
    method, model, folder = sys.argv[1:]
    pipe = load_pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    with open(sys.stdout.fileno(), "w", buffering=1, closefd=False) as lines:
        train(method, pipe, folder, callbacks=[Printer(lines)])
