"""`steer sample` and `steer finetune` on a tiny model, as children of this process, and what they leave."""

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from child_processes import Ended, forked
from safetensors.torch import load_file

from steer.apps.cli import main as cli
from steer.files import loads_with_checksum
from steer.training.checkpoint import Checkpoints

WORDS = ["--steps", "2", "--particles", "2", "--reward", "brightness", "--guidance", "3", "--lam", "5"]
CONFIG: dict[str, Any] = {
    "method": "prdp",
    "reward": "brightness",
    "beta": 0.001,
    "max_steps": 3,
    "train_batch_size": 2,
    "num_generations": 2,
    "num_inference_steps": 2,
    "micro_batch": 4,
    "lora_rank": 2,
    "learning_rate": 0.01,
    "call": {"height": 8, "width": 8},
    "save_steps": 1,
    "save_total_limit": 1,
    "log_with": [],
}


@dataclass(frozen=True)
class Command:
    """A command whose output folder is its last word, and what a finished run of it leaves: the same each time."""

    words: tuple[str, ...]
    left: Callable[[Path], Any]
    check: Callable[[Path], None]

    def run(self, out: Path) -> None:
        """In a child."""
        sys.argv = ["steer", *self.words, str(out)]
        cli.main()

    def forked(self, out: Path) -> Ended:
        """A child that runs it."""
        return forked(lambda: self.run(out), out)


def sampled(out: Path) -> Any:
    report = loads_with_checksum((out / "report.json").read_text())
    for one in (report, *report["prompts"]):
        del one["cost"]["seconds"]
    images = {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("0*/*.png"))}
    return json.dumps(report), {name: hashlib.sha256(data).hexdigest() for name, data in images.items()}


def nothing_amiss(out: Path) -> None:
    """What is there of a report reads."""
    if (out / "report.json").exists():
        loads_with_checksum((out / "report.json").read_text())


def finetuned(out: Path) -> Any:
    """Its numbers: safetensors writes the words of the header in any order."""
    named = load_file(out / "final/pytorch_lora_weights.safetensors")
    return {name: value.numpy().tobytes() for name, value in named.items()}


def all_whole(out: Path) -> None:
    """No checkpoint under its name is damaged."""
    _, skipped = Checkpoints(out / "checkpoints").latest()
    assert skipped == []
