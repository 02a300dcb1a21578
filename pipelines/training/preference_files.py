"""The files of a preference dataset. Lines are only appended, and a file is complete before a line names it.

settings.json       the provenance of all samples: see `SampleProvenance`
lots.jsonl          {"lot": ID, "prompts": […], "starts": […], "noises": […],
                     "images": [{"file": "images/ID-0.png", "sha256": of its pixels}, …],
                     "trajectories": {"file": "trajectories/ID.safetensors", "sha256": of its bytes, "stochastic": […]}
                     or null: sampled again from the seeds}
choices.jsonl       {"lot": ID, "chosen": 0, "rejected": 1}, numbers of images, or {"lot": ID, "tie": true}, or
                    {"lot": ID, "undo": true, "annotator": NAME}: removes all earlier lines of NAME on the group,
                    which have the same "annotator"; without the key, all earlier lines without an annotator

A group ("lot" in the files) consists of samples of one prompt from one x_T, drawn as one batch: sampled again in this
batch, they are equal to the last bit. Further keys, such as annotator and time, are free.
"""

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from steer.diffusion.views import plain_values
from steer.errors import InputError
from steer.files import read_image
from steer.pipelines.training.rollouts import trajectories_from_tensors
from steer.rewards.preference_pairs import drop_undone
from steer.training.rollout import Rows, Trajectories

logger = logging.getLogger(__name__)

VERSION = 1
SETTINGS, GROUPS, PREFERENCES = "settings.json", "lots.jsonl", "choices.jsonl"
ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
TYPES = {"version": int, "scheduler": dict, "call": dict, "eta": float}  # types of settings; all others are text


@dataclass(frozen=True)
class SampleProvenance:
    """The provenance of a folder's samples: model, arguments and versions.

    call    arguments of the pipeline's call except prompts and random numbers; plain values
    device  kind of device: cpu, cuda …
    torch, diffusers  versions
    """

    pipeline: str
    model: str
    scheduler: dict[str, Any]
    call: dict[str, Any]
    eta: float
    latents_dtype: str
    dtype: str
    device: str
    torch: str
    diffusers: str
    version: int = VERSION

    @classmethod
    def of(cls, pipe: Any, call: Mapping[str, Any], eta: float, latents_dtype: str) -> "SampleProvenance":
        """Describe a pipeline and the arguments of its call."""
        loaded = json.loads(pipe.scheduler.to_json_string())
        return cls(
            pipeline=type(pipe).__name__,
            model=str(getattr(pipe.config, "_name_or_path", "")),
            scheduler={name: value for name, value in loaded.items() if name[0] != "_" or name == "_class_name"},
            call=json.loads(json.dumps(plain_values(call))),
            eta=float(eta),
            latents_dtype=latents_dtype,
            dtype=str(pipe.dtype).removeprefix("torch."),
            device=pipe.device.type,
            torch=torch.__version__,
            diffusers=diffusers.__version__,
        )

    @classmethod
    def read(cls, folder: Path) -> "SampleProvenance":
        """Read the provenance of a folder. Raises InputError where it is missing or malformed."""
        path = file_inside(folder, SETTINGS)
        try:
            loaded = json.loads(path.read_bytes())
        except (ValueError, RecursionError, OSError) as error:
            raise InputError(f"{path}: cannot be read as JSON ({error})") from error
        if not isinstance(loaded, dict) or loaded.get("version") != VERSION:
            raise InputError(f"{path}: not a preference dataset of version {VERSION}, which this steer reads")
        names = [one.name for one in fields(cls)]
        if wrong := [name for name in names if not isinstance(loaded.get(name), TYPES.get(name, str))]:
            raise InputError(
                f"{path}: {wrong[0]} is missing or of the wrong kind: let steer's PreferenceFolder write it"
            )
        return cls(**{name: loaded[name] for name in names})

    def diff(self, other: "SampleProvenance") -> dict[str, tuple[Any, Any]]:
        """Return the differences by name; arguments of the call and values of the scheduler are compared one by one."""
        mine, others = self._flat(), other._flat()
        names = sorted(mine.keys() | others.keys())
        return {name: (mine.get(name), others.get(name)) for name in names if mine.get(name) != others.get(name)}

    def _flat(self) -> dict[str, Any]:
        values = asdict(self)
        scheduler, call = values.pop("scheduler"), values.pop("call")
        return values | {f"scheduler.{name}": value for name, value in scheduler.items()} | call


@dataclass(frozen=True)
class SampleGroup:
    """Samples of one prompt from one x_T, drawn as one batch.

    images        SHA-256 of the pixels of each image
    trajectories  SHA-256 of the trajectory file, and the stochastic steps; None: to be sampled again from the seeds
    """

    folder: Path
    id: str
    rows: Rows
    images: tuple[str, ...]
    trajectories: tuple[str, tuple[int, ...]] | None

    def image_file(self, number: int) -> str:
        """The file of an image, relative to the folder."""
        return f"images/{self.id}-{number}.png"

    @property
    def trajectory_file(self) -> str:
        """The file of the trajectories, relative to the folder."""
        return f"trajectories/{self.id}.safetensors"

    def line(self) -> dict[str, Any]:
        """The group's line in lots.jsonl."""
        images = [{"file": self.image_file(number), "sha256": digest} for number, digest in enumerate(self.images)]
        stored = None
        if self.trajectories is not None:
            digest, steps = self.trajectories
            stored = {"file": self.trajectory_file, "sha256": digest, "stochastic": list(steps)}
        rows = {name: list(values) for name, values in asdict(self.rows).items()}
        return {"lot": self.id, **rows, "images": images, "trajectories": stored}

    def load(self) -> Trajectories:
        """Load the stored trajectories. Raises InputError where they are missing or do not match their line."""
        assert self.trajectories is not None
        path, (digest, steps) = file_inside(self.folder, self.trajectory_file), self.trajectories
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != digest:
            raise InputError(f"{path} is not the file that was recorded: its sha256 is another. Restore it")
        try:
            tensors = load(data)
        except SafetensorError as error:
            raise InputError(f"{path}: not a file of tensors ({error})") from error
        if not _fit(tensors, len(self.rows), steps):
            raise InputError(f"{path}: not trajectories of group {self.id}: let steer's PreferenceFolder write them")
        return trajectories_from_tensors(tensors, asdict(self.rows) | {"stochastic": steps})


def _fit(tensors: Mapping[str, Tensor], rows: int, steps: tuple[int, ...]) -> bool:
    """Whether tensors are `rows` trajectories with these stochastic steps."""
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
        and log_probs.dtype in (torch.float32, torch.float64)  # older folders have float32
    )


def file_inside(folder: Path, name: str) -> Path:
    """The path of a plain file of the folder. Raises InputError for a missing file or a link that leads elsewhere."""
    path = folder / name
    if not path.is_symlink() and not path.exists():
        raise InputError(f"{path} is missing: restore it, or record the preferences again")
    if path.resolve() != folder.resolve() / name or not path.is_file():
        raise InputError(f"{path} is a link or no file: put the file itself there")
    return path


def read_lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Read the rows of a file of JSON lines with their numbers.

    A last line that a crash cut off is left out, with a warning. Raises InputError for any other line but an object.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    selected = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                logger.warning("%s, line %d: cut off by a crash, left out", path, number)
                break
            raise InputError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}: expected an object")
        selected.append((number, row))
    return selected


IMAGE_PAIR_KEYS = {"image", "images", "image_a", "image_b", "image_0", "image_1", "jpg_0", "jpg_1"}
MAX_SEED = 1 << 63  # torch's seeds are below this number
IMAGE_PAIRS_UNSUPPORTED = (
    "plain image pairs. D3PO learns from the denoising trajectory of both images (stored latents, or seed and "
    "settings), which an image does not tell; pairs of images alone are for Diffusion-DPO, another method. Record the "
    "preferences on images of steer: steer.pipelines.training.preference_data.PreferenceFolder writes them with their "
    "trajectories"
)


@dataclass(frozen=True)
class Preference:
    """A preference between two images of a group, by their numbers."""

    group: str
    chosen: int
    rejected: int


@dataclass(frozen=True)
class PreferenceRecords:
    """The preferences of a folder that were not undone; ties are counted and left out."""

    folder: Path
    provenance: SampleProvenance
    groups: Mapping[str, SampleGroup]
    preferences: tuple[Preference, ...]
    ties: int

    def digest(self) -> str:
        """Hash the preferences in their order, with their provenance and groups."""
        digest = hashlib.sha256(repr(self.provenance).encode())
        for preference in self.preferences:
            group = self.groups[preference.group]
            digest.update(repr((preference.chosen, preference.rejected, group.rows, group.images)).encode())
        return digest.hexdigest()


def read_preferences(folder: Path) -> PreferenceRecords:
    """Read a folder, and verify every file of its preferences against the recorded hashes."""
    if folder.is_file():
        raise InputError(
            f"{folder} is a file. A preference dataset is a folder; image pairs in a file are {IMAGE_PAIRS_UNSUPPORTED}"
        )
    if not folder.is_dir():
        raise InputError(f"{folder}: no such preference dataset")
    if not (folder / PREFERENCES).exists():
        raise InputError(f"{folder} has no {PREFERENCES}: it is not a preference dataset, or nothing is annotated yet")
    path = file_inside(folder, PREFERENCES)
    rows = read_lines(path)
    for number, row in rows:
        if "lot" not in row and IMAGE_PAIR_KEYS & row.keys():
            raise InputError(f"{path}, line {number}: these are {IMAGE_PAIRS_UNSUPPORTED}")
    provenance, groups = SampleProvenance.read(folder), read_groups(folder)
    read = {number: parse_preference(f"{path}, line {number}", row, groups) for number, row in rows}
    loaded = [read[number] for number, _ in drop_undone(rows)]
    preferences = tuple(preference for preference in loaded if preference is not None)
    if not preferences:
        raise InputError(f"{path} holds no preference beside {len(loaded)} ties: there is nothing to learn from")
    if ties := len(loaded) - len(preferences):
        logger.warning("%s: %d ties of %d annotations are left out", path, ties, len(loaded))
    for group in dict.fromkeys(groups[preference.group] for preference in preferences):
        for number, stored in enumerate(group.images):
            image = file_inside(folder, group.image_file(number))
            if pixel_hash(pixels_of(read_image(image))) != stored:
                raise InputError(
                    f"{image} is not the image that was recorded: its pixels have another hash. Restore it"
                )
        if group.trajectories is not None:
            group.load()
    return PreferenceRecords(folder, provenance, groups, preferences, ties)


def read_groups(folder: Path) -> dict[str, SampleGroup]:
    """Read the groups of a folder by their names, without verifying their files."""
    path, groups = file_inside(folder, GROUPS), dict[str, SampleGroup]()
    for number, row in read_lines(path):
        group = _group(f"{path}, line {number}", folder, row)
        if groups.setdefault(group.id, group) != group:
            raise InputError(
                f"{path}, line {number}: group {group.id} is recorded twice with different contents: remove one of both"
            )
    return groups


def pixels_of(image: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """(3, H, W) in [0, 1] as it is saved: (H, W, 3), 0 to 255."""
    return (image.float().cpu() * 255).round().byte().permute(1, 2, 0).contiguous().numpy()


def pixel_hash(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> str:
    """SHA-256 of "H W 3 " and the bytes of (H, W, 3), independent of the compression of a PNG."""
    shape = "".join(f"{size} " for size in pixels.shape)
    return hashlib.sha256(shape.encode() + pixels.tobytes()).hexdigest()


def _group(place: str, folder: Path, row: Mapping[str, Any]) -> SampleGroup:
    name, images, stored, trajectories = row.get("lot"), row.get("images"), row.get("trajectories"), None
    if not isinstance(name, str) or not ID.fullmatch(name):
        raise InputError(f'{place}: "lot" must be a name of letters, digits, - and _, got {name!r:.40}')
    rows = _rows(place, row)
    if not isinstance(images, list) or not all(_is_hashed(one) for one in images):
        raise InputError(f'{place}: images must be a list of {{"file": …, "sha256": …}}')
    if stored is not None:
        steps = stored.get("stochastic") if _is_hashed(stored) else None
        if not isinstance(steps, list) or any(type(step) is not int for step in steps):
            raise InputError(f'{place}: trajectories must be null or {{"file": …, "sha256": …, "stochastic": […]}}')
        trajectories = stored["sha256"], tuple(steps)
    group = SampleGroup(folder, name, rows, tuple(one["sha256"] for one in images), trajectories)
    if len(rows) < 2 or len(set(zip(rows.prompts, rows.starts, strict=True))) > 1 or len(images) != len(rows):
        raise InputError(
            f"{place}: a group is two or more images of one prompt from one start (x_T), with a line of all three for "
            f"each; here are prompts {len(set(rows.prompts))}, starts {len(set(rows.starts))}, samples {len(rows)}, "
            f"images {len(images)}"
        )
    if strange := [named for named in _named(row) if named not in _named(group.line())]:
        raise InputError(
            f"{place}: {strange[0]!r:.60} is no file of group {name}: its first one is {group.image_file(0)}"
        )
    return group


def _named(row: Mapping[str, Any]) -> list[Any]:
    """The files that a line names, each with its place in the line."""
    stored = [row["trajectories"]] if row.get("trajectories") else []
    return [(number, one.get("file")) for number, one in enumerate([*row["images"], *stored])]


def _rows(place: str, row: Mapping[str, Any]) -> Rows:
    columns = [row.get(name) for name in ("prompts", "starts", "noises")]
    prompts, starts, noises = (tuple(column) if isinstance(column, list) else () for column in columns)
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise InputError(f"{place}: prompts must be texts")
    if not all(type(seed) is int and 0 <= seed < MAX_SEED for seed in starts + noises):
        raise InputError(f"{place}: starts and noises must be seeds, whole numbers from 0 to {MAX_SEED - 1}")
    if not 0 < len(prompts) == len(starts) == len(noises):
        raise InputError(f"{place}: prompts, starts and noises must be lists with one entry for each image")
    return Rows(prompts, starts, noises)


def _is_hashed(one: Any) -> bool:
    return isinstance(one, dict) and isinstance(one.get("file"), str) and isinstance(one.get("sha256"), str)


def parse_preference(place: str, row: Mapping[str, Any], groups: Mapping[str, SampleGroup]) -> Preference | None:
    """Parse a line of choices.jsonl; return None for a tie or an undo.

    place  file and line, for the message
    Raises InputError for a line that fits no group.
    """
    name = row.get("lot")
    if not isinstance(name, str) or name not in groups:
        raise InputError(f"{place}: group {name!r:.70} is not in {GROUPS}: record the group before its preferences")
    if row.get("tie") is True or row.get("undo") is True:
        return None
    numbers, count = (row.get("chosen"), row.get("rejected")), len(groups[name].rows)
    for key, value in zip(("chosen", "rejected"), numbers, strict=True):
        if type(value) is not int or not 0 <= value < count:
            raise InputError(f"{place}: {key} must be the number of an image, 0 to {count - 1}, got {value!r:.40}")
    chosen, rejected = numbers
    if chosen == rejected:
        raise InputError(f'{place}: chosen and rejected are both {chosen}: two images, or "tie": true')
    return Preference(name, int(chosen or 0), int(rejected or 0))
