"""What an evaluation has on disk while it goes on: runs/, with a file for each contender and process.

A file is written whole after each group of prompts; a killed run loses the group that it was at. The next run, of any
number of processes, reads them all.
"""

import hashlib
import json
import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from PIL import Image

from steer import __version__
from steer.apps.evaluation_contest import DEFAULTS, Contest, Entrant
from steer.errors import InputError
from steer.staged import staged, write_text

RUNS, IMAGES, IDENTITY = "runs", "images", "contest.json"
Json = dict[str, Any]


@dataclass
class Stored:
    """What there is of one contender.

    runs       by place of the prompt, its runs in the order of the seeds: see `steer.apps.evaluation_runs`
    diversity  by place of the prompt; None for one seed
    kl         of finetuned weights, by the number of prompts
    made       with which versions, on what device
    """

    about: Json
    runs: dict[int, list[Json]] = field(default_factory=dict)
    diversity: dict[int, float | None] = field(default_factory=dict)
    kl: Json = field(default_factory=dict)
    made: list[Json] = field(default_factory=list)

    def text(self) -> str:
        """As a file holds it."""
        prompts = [{"place": n, "runs": self.runs[n], "diversity": self.diversity[n]} for n in sorted(self.runs)]
        told = {"contender": self.about, "made": self.made, "kl": self.kl}
        return json.dumps(told | {"prompts": prompts}, ensure_ascii=False)

    def add(self, other: "Stored") -> None:
        """Takes in what another process had."""
        self.runs |= other.runs
        self.diversity |= other.diversity
        self.kl |= other.kl
        self.made += [one for one in other.made if one not in self.made]


def versions(device: torch.device) -> Json:
    """Of what decides numbers and seconds."""
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})"
    packages = {"steer": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__}
    return packages | {"transformers": transformers.__version__, "device": named}


def key_of(name: str) -> str:
    """A contender's name as that of a file: no two have one."""
    words = re.sub("[^a-z0-9.]+", "-", name.lower()).strip("-.")[-40:].lstrip("-.")
    return f"{words}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Store:
    """The folder of an evaluation."""

    out: Path

    def open(self, contest: Contest) -> None:
        """Makes the folder, or goes on with it. Raises InputError where it cannot take this contest."""
        try:
            write_text(self.out / ".writable", "")
            (self.out / ".writable").unlink()
        except OSError as error:
            raise InputError(f"--out {self.out}: cannot write there ({error.strerror})") from error
        path, told = self.out / RUNS / IDENTITY, contest.identity()
        if not path.exists():
            write_text(path, json.dumps(told, indent=1, ensure_ascii=False))
            return
        old = _read(path)
        if not isinstance(old.get("options"), dict):
            raise InputError(f"{path} is no evaluation of steer; choose another --out")
        if old.get("prompts") != told["prompts"]:
            raise InputError(f"--out {self.out} holds an evaluation of other prompts; choose another --out")
        both = [(name, old.get(name), told[name]) for name in ("rewards", "seeds")]
        there = DEFAULTS | old["options"]
        both += [(name, there.get(name), value) for name, value in told["options"].items()]
        if other := next((one for one in both if one[1] != one[2]), None):
            name, before, now = other
            raise InputError(
                f"--out {self.out} holds an evaluation with {name} {before!r}, not {now!r}; choose another --out"
            )

    def read(self, entrant: Entrant, process: int | None = None) -> Stored:
        """What there is of a contender, from all processes or from one. Raises InputError for another of that name."""
        found = Stored(entrant.about)
        pattern = f"{key_of(entrant.contender.name)}.{'*' if process is None else process}.json"
        for path in sorted((self.out / RUNS).glob(pattern)):
            found.add(_stored(path, entrant))
        return found

    def write(self, stored: Stored, process: int) -> None:
        """Replaces what this process had of a contender."""
        write_text(self.out / RUNS / f"{key_of(stored.about['name'])}.{process}.json", stored.text())

    def search(self, name: str, place: int, number: int) -> Path:
        """Where a run of a method that iterates keeps its state."""
        return self.out / RUNS / f"{key_of(name)}.{place}.{number}.safetensors"

    def image(self, name: str, place: int) -> Path:
        """Where the image of a contender for a prompt of the grid lies."""
        return self.out / IMAGES / key_of(name) / f"{place:04d}.png"

    def keep_images(self, name: str, images: Iterable[tuple[int, Image.Image]]) -> None:
        """Writes images of the grid, by the place of their prompts."""
        for place, image in images:
            with staged(self.image(name, place)) as new:
                image.save(new, format="PNG")


def _stored(path: Path, entrant: Entrant) -> Stored:
    told, name = _read(path), entrant.contender.name
    about = told.get("contender")
    if not isinstance(about, dict) or not isinstance(told.get("prompts"), list):
        raise InputError(f"{path} is no evaluation of steer; delete it, or choose another --out")
    for what, value in entrant.about.items():
        if about.get(what) != value:
            other = "its weights have changed" if what == "weights" else f"it has {what} {about.get(what)!r} there"
            raise InputError(f"{path.parent.parent} holds another contender {name!r}: {other}; choose another --out")
    found = Stored(about, kl=told.get("kl", {}), made=told.get("made", []))
    try:
        for one in told["prompts"]:
            found.runs[one["place"]], found.diversity[one["place"]] = one["runs"], one["diversity"]
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: its runs are not as steer writes them ({error!r}); delete it") from error
    return found


def _read(path: Path) -> Json:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--out {path.parent.parent}: cannot read {path.name} ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no evaluation of steer ({error}); choose another --out") from error
    if not isinstance(told, dict):
        raise InputError(f"{path} is no evaluation of steer; choose another --out")
    return told
