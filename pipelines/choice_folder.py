"""Recording human choices: samples with what they follow from, and which of two was preferred."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors.torch import save
from torch import Tensor

from steer.errors import InputError
from steer.pipelines.choice_files import CHOICES, LOTS, SETTINGS, DrawnWith, Lot
from steer.pipelines.choice_reading import pixel_hash, pixels_of, read_lots
from steer.pipelines.finetune_settings import DTYPES
from steer.pipelines.round_file import trajectory_tensors
from steer.staged import make_folder, staged, sync, write_text
from steer.trajectory import Rows, Trajectories


class ChoiceFolder:
    """A folder that choices are written to; see `steer.pipelines.choice_files` for the format.

    call = {"num_inference_steps": 20, "guidance_scale": 5.0}
    folder = ChoiceFolder.create("choices", pipe, call)
    sampler = Sampler(pipe, call)
    lot = folder.write_lot(*sampler.rollout(Rows(("a star",) * 2, starts=(1, 1), noises=(2, 3))))
    folder.write_choice(lot, chosen=1, rejected=0)

    After a crash all that was returned from is there. One program at a time may write. Raises InputError where the
    disk refuses; then nothing of a lot counts.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.drawn = DrawnWith.read(self.path)
        self.lots = read_lots(self.path) if (self.path / LOTS).exists() else {}

    @classmethod
    def create(
        cls, path: str | Path, pipe: Any, call: Mapping[str, Any], eta: float = 1.0, storage: str = "float32"
    ) -> "ChoiceFolder":
        """A new folder, or one that was begun with the same settings, for what `Sampler(pipe, call, eta, …)` draws.

        storage  dtype of the sampler's latents, by name
        Raises InputError for a folder of other settings, and for those that a training could not take from it.
        """
        if type(call.get("num_inference_steps")) is not int:
            raise InputError("num_inference_steps must be among the arguments of the call: a training needs the same")
        if odd := [name for name, value in call.items() if not _is_plain(value)]:
            raise InputError(f"{odd[0]} is no plain value: choices are recorded of calls that JSON can hold")
        if storage not in DTYPES:
            raise InputError(f"storage must be one of {', '.join(DTYPES)}, got {storage!r}")
        return cls.create_as(Path(path), DrawnWith.of(pipe, call, eta, storage))

    @classmethod
    def create_as(cls, path: Path, drawn: DrawnWith) -> "ChoiceFolder":
        """A new folder, or one that was begun, for samples that were drawn with `drawn`."""
        if not (path / SETTINGS).exists():
            with _writing(path):
                write_text(path / SETTINGS, json.dumps(asdict(drawn), indent=1) + "\n")
        found = cls(path)
        for name, (there, here) in found.drawn.differences(drawn).items():
            raise InputError(f"{path} holds samples drawn with {name} {there!r}, not {here!r}: use another folder")
        return found

    def write_lot(self, drew: Trajectories, images: Tensor, keep_trajectories: bool = True) -> str:
        """Writes samples of one prompt from one x_T, one batch as a sampler drew it; returns the name of the lot.

        keep_trajectories  else a training draws them anew from their seeds, on the same model, device and versions
        Rows that are there already are not written again.
        """
        rows = drew.rows
        self._check(drew, images)
        pixels = [pixels_of(image) for image in images]
        hashes = tuple(pixel_hash(one) for one in pixels)
        name = lot_name(rows)
        if (known := self.lots.get(name)) is not None:
            if known.images != hashes:
                raise InputError(f"{self.path}: lot {name} is there with other images: another model drew them")
            return name
        data = save(trajectory_tensors(drew)[0]) if keep_trajectories else b""
        stored = (hashlib.sha256(data).hexdigest(), drew.stochastic) if keep_trajectories else None
        lot = Lot(self.path, name, rows, hashes, stored)
        with _writing(self.path):
            for number, one in enumerate(pixels):
                with staged(self.path / lot.image_file(number)) as new:
                    Image.fromarray(one).save(new, "PNG")
            if keep_trajectories:
                with staged(self.path / lot.trajectory_file) as new:
                    new.write_bytes(data)
            append_line(self.path / LOTS, lot.line())
        self.lots[name] = lot
        return name

    def write_choice(self, lot: str, chosen: int, rejected: int, **more: Any) -> None:
        """Image `chosen` of a lot was preferred to image `rejected`; `more` are plain values of one's own."""
        count = len(self._lot(lot).rows)
        if chosen == rejected or not (0 <= chosen < count and 0 <= rejected < count):
            raise InputError(f"chosen {chosen} and rejected {rejected} must be two different numbers below {count}")
        with _writing(self.path):
            append_line(self.path / CHOICES, more | {"lot": lot, "chosen": chosen, "rejected": rejected})

    def write_tie(self, lot: str, **more: Any) -> None:
        """No image of a lot was preferred."""
        with _writing(self.path):
            append_line(self.path / CHOICES, more | {"lot": self._lot(lot).id, "tie": True})

    def _lot(self, name: str) -> Lot:
        if name not in self.lots:
            raise InputError(f"{self.path} has no lot {name!r:.70}: write the lot before its choices")
        return self.lots[name]

    def _check(self, drew: Trajectories, images: Tensor) -> None:
        rows = drew.rows
        if len(rows) < 2 or len(set(rows.prompts)) > 1 or len(set(rows.starts)) > 1:
            raise InputError("a lot is two or more samples of one prompt from one x_T: all prompts and starts the same")
        if len(set(rows.noises)) < len(rows):
            raise InputError("two samples of this lot have the same noise: they are one image, give each its own seed")
        if images.dim() != 4 or len(images) != len(rows):
            raise InputError(f"images of shape {tuple(images.shape)} must be ({len(rows)}, 3, height, width)")
        if drew.latents.dtype != DTYPES[self.drawn.storage]:
            raise InputError(f"these trajectories hold {drew.latents.dtype}, the folder is for {self.drawn.storage}")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: it cannot be written there ({error.strerror}): make room, then try again") from error


def lot_name(rows: Rows) -> str:
    """The same for the same rows: what is written twice is there once."""
    return hashlib.sha256(json.dumps(asdict(rows)).encode()).hexdigest()[:16]


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Adds a line and brings it to the disk; one that a crash broke off goes."""
    line = json.dumps(row).encode() + b"\n"
    make_folder(path.parent)
    with path.open("a+b") as file:
        file.seek(0)
        told = file.read()
        last = told[told.rfind(b"\n") + 1 :]
        if _is_json(last):
            line = b"\n" + line  # somebody's editor left the end of the line out
        elif last:
            file.truncate(len(told) - len(last))
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
    sync(path.parent)


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True
