"""`steer sample` and `steer finetune` on a tiny model, as child processes, and the contents of their outputs."""

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
    """A command whose last argument is its output folder, and a deterministic summary of that folder."""

    words: tuple[str, ...]
    left: Callable[[Path], Any]
    check: Callable[[Path], None]

    def run(self, out: Path) -> None:
        """Run it in this process, which must be a child."""
        sys.argv = ["steer", *self.words, str(out)]
        cli.main()

    def forked(self, out: Path) -> Ended:
        """Run it in a child."""
        return forked(lambda: self.run(out), out)


def sampled(out: Path) -> Any:
    report = loads_with_checksum((out / "report.json").read_text())
    for one in (report, *report["prompts"]):
        del one["cost"]["seconds"]
    images = {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("0*/*.png"))}
    return json.dumps(report), {name: hashlib.sha256(data).hexdigest() for name, data in images.items()}


def nothing_amiss(out: Path) -> None:
    """Assert that the report, if there is one, has a valid checksum."""
    if (out / "report.json").exists():
        loads_with_checksum((out / "report.json").read_text())


def finetuned(out: Path) -> Any:
    """Bytes of each tensor: safetensors does not write the header in a fixed order."""
    named = load_file(out / "final/pytorch_lora_weights.safetensors")
    return {name: value.numpy().tobytes() for name, value in named.items()}


def all_whole(out: Path) -> None:
    """Assert that no checkpoint is corrupt."""
    _, skipped = Checkpoints(out / "checkpoints").latest()
    assert skipped == []
