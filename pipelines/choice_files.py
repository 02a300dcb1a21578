"""A folder of human choices, as it is read. Lines are only ever added, and a file is whole before a line names it.

settings.json       what every lot was drawn with: see `DrawnWith`
lots.jsonl          {"lot": ID, "prompts": […], "starts": […], "noises": […],
                     "images": [{"file": "images/ID-0.png", "sha256": of its pixels}, …],
                     "trajectories": {"file": "trajectories/ID.safetensors", "sha256": of its bytes, "stochastic": […]}
                     or null, where the seeds are to do}
choices.jsonl       {"lot": ID, "chosen": 0, "rejected": 1}, numbers of images, or {"lot": ID, "tie": true}, or
                    {"lot": ID, "undo": true, "annotator": NAME}: takes back all that NAME has said of the lot so far,
                    lines with the same "annotator"; without the key, those without it

A lot is some samples of one prompt from one x_T, drawn as one batch: drawn anew as that batch they are the same to the
last bit. Further keys, of who chose and when, are free.
"""

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from steer.errors import InputError
from steer.pipelines.round_file import trajectories_from
from steer.quiet import plain_values
from steer.trajectory import Rows, Trajectories

logger = logging.getLogger(__name__)

VERSION = 1
SETTINGS, LOTS, CHOICES = "settings.json", "lots.jsonl", "choices.jsonl"
ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
TYPES = {"version": int, "scheduler": dict, "call": dict, "eta": float}  # of other settings: text


@dataclass(frozen=True)
class DrawnWith:
    """What the samples of a folder were drawn with.

    call    arguments of the pipeline's call beside prompts and random numbers; plain values
    device  its kind: cpu, cuda …
    torch, diffusers  versions
    """

    pipeline: str
    model: str
    scheduler: dict[str, Any]
    call: dict[str, Any]
    eta: float
    storage: str
    dtype: str
    device: str
    torch: str
    diffusers: str
    version: int = VERSION

    @classmethod
    def of(cls, pipe: Any, call: Mapping[str, Any], eta: float, storage: str) -> "DrawnWith":
        """By a pipeline as it is."""
        told = json.loads(pipe.scheduler.to_json_string())
        return cls(
            pipeline=type(pipe).__name__,
            model=str(getattr(pipe.config, "_name_or_path", "")),
            scheduler={name: value for name, value in told.items() if name[0] != "_" or name == "_class_name"},
            call=json.loads(json.dumps(plain_values(call))),
            eta=float(eta),
            storage=storage,
            dtype=str(pipe.dtype).removeprefix("torch."),
            device=pipe.device.type,
            torch=torch.__version__,
            diffusers=diffusers.__version__,
        )

    @classmethod
    def read(cls, folder: Path) -> "DrawnWith":
        """The settings of a folder. Raises InputError where they are missing or none."""
        path = inside(folder, SETTINGS)
        try:
            told = json.loads(path.read_bytes())
        except (ValueError, RecursionError, OSError) as error:
            raise InputError(f"{path}: cannot be read as JSON ({error})") from error
        if not isinstance(told, dict) or told.get("version") != VERSION:
            raise InputError(f"{path}: not the settings of choices of version {VERSION}, which this steer reads")
        names = [one.name for one in fields(cls)]
        if wrong := [name for name in names if not isinstance(told.get(name), TYPES.get(name, str))]:
            raise InputError(f"{path}: {wrong[0]} is missing or of the wrong kind: let steer's ChoiceFolder write it")
        return cls(**{name: told[name] for name in names})

    def differences(self, other: "DrawnWith") -> dict[str, tuple[Any, Any]]:
        """What is not the same in both, by name; arguments of the call and values of the scheduler one by one."""
        mine, others = self._flat(), other._flat()
        names = sorted(mine.keys() | others.keys())
        return {name: (mine.get(name), others.get(name)) for name in names if mine.get(name) != others.get(name)}

    def _flat(self) -> dict[str, Any]:
        told = asdict(self)
        scheduler, call = told.pop("scheduler"), told.pop("call")
        return told | {f"scheduler.{name}": value for name, value in scheduler.items()} | call


@dataclass(frozen=True)
class Lot:
    """Samples of one prompt from one x_T, drawn as one batch.

    images        SHA-256 of the pixels of each
    trajectories  SHA-256 of their file and the steps that have a density; None where the seeds are to do
    """

    folder: Path
    id: str
    rows: Rows
    images: tuple[str, ...]
    trajectories: tuple[str, tuple[int, ...]] | None

    def image_file(self, number: int) -> str:
        """Its place in the folder."""
        return f"images/{self.id}-{number}.png"

    @property
    def trajectory_file(self) -> str:
        """Its place in the folder."""
        return f"trajectories/{self.id}.safetensors"

    def line(self) -> dict[str, Any]:
        """Its line in lots.jsonl."""
        images = [{"file": self.image_file(number), "sha256": told} for number, told in enumerate(self.images)]
        stored = None
        if self.trajectories is not None:
            told, steps = self.trajectories
            stored = {"file": self.trajectory_file, "sha256": told, "stochastic": list(steps)}
        rows = {name: list(values) for name, values in asdict(self.rows).items()}
        return {"lot": self.id, **rows, "images": images, "trajectories": stored}

    def load(self) -> Trajectories:
        """The stored trajectories. Raises InputError where they are missing or not what the line tells."""
        assert self.trajectories is not None
        path, (told, steps) = inside(self.folder, self.trajectory_file), self.trajectories
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != told:
            raise InputError(f"{path} is not the file that was recorded: its sha256 is another. Restore it")
        try:
            tensors = load(data)
        except SafetensorError as error:
            raise InputError(f"{path}: not a file of tensors ({error})") from error
        if not _fit(tensors, len(self.rows), steps):
            raise InputError(f"{path}: not trajectories of lot {self.id}: let steer's ChoiceFolder write them")
        return trajectories_from(tensors, asdict(self.rows) | {"stochastic": steps})


def _fit(tensors: Mapping[str, Tensor], rows: int, steps: tuple[int, ...]) -> bool:
    """Whether they are `rows` trajectories with these stochastic steps."""
    if tensors.keys() != {"latents", "log_probs"}:
        return False
    latents, log_probs = tensors["latents"], tensors["log_probs"]
    return (
        latents.dim() > 2
        and latents.is_floating_point()
        and len(latents) == rows
        and 0 < len(steps) <= latents.shape[1]
        and list(steps) == sorted({step for step in steps if 0 <= step < latents.shape[1]})
        and log_probs.shape == (rows, len(steps))
        and log_probs.dtype in (torch.float32, torch.float64)  # the first is of older folders
    )


def inside(folder: Path, name: str) -> Path:
    """The path of a plain file of the folder. Raises InputError where there is none, or what leads elsewhere."""
    path = folder / name
    if not path.is_symlink() and not path.exists():
        raise InputError(f"{path} is missing: restore it, or record the choices anew")
    if path.resolve() != folder.resolve() / name or not path.is_file():
        raise InputError(f"{path} is a link or no file: put the file itself there")
    return path


def read_lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """The rows of a file of JSON lines with their numbers.

    A last line that a crash broke off is left out, with a warning. Raises InputError for any other that is no object.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                logger.warning("%s, line %d: broken off by a crash, left out", path, number)
                break
            raise InputError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}: expected an object")
        found.append((number, row))
    return found


def standing(rows: Sequence[tuple[int, dict[str, Any]]]) -> list[tuple[int, dict[str, Any]]]:
    """The rows of choices.jsonl without those that were taken back, and without what takes back."""
    taken, found = set[str](), []
    for number, row in reversed(rows):
        said = json.dumps([row.get("lot"), row.get("annotator")])
        if row.get("undo") is True:
            taken.add(said)
        elif said not in taken:
            found.append((number, row))
    return found[::-1]
