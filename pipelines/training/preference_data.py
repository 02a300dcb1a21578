"""Learning from human choices: pairs of stored trajectories, or of such as are drawn anew and proven to be the same."""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from steer.errors import InputError
from steer.files import make_folder, staged, sync, write_text
from steer.pipelines.training.config import DTYPES, TrainingConfig
from steer.pipelines.training.method import (
    BeforeEach,
    chosen_steps,
    half_precision,
    own_share,
    prompts_at,
    sampler_of,
    window_of,
)
from steer.pipelines.training.preference_files import (
    CHOICES,
    LOTS,
    SETTINGS,
    Choice,
    DrawnWith,
    Lot,
    Recorded,
    check_choices,
    inside,
    pixel_hash,
    pixels_of,
    read_choices,
    read_lots,
)
from steer.pipelines.training.rollouts import Round, learning_order, references_of, trajectory_tensors
from steer.training.distributed import DistributedContext
from steer.training.gradient import Batch, Reference
from steer.training.rollout import Rows, Sampler, Trajectories, log_probs
from steer.training.trainable import Trainable


class PreferenceFolder:
    """A folder that choices are written to; see `steer.pipelines.training.preference_files` for the format.

    call = {"num_inference_steps": 20, "guidance_scale": 5.0}
    folder = PreferenceFolder.create("choices", pipe, call)
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
    ) -> "PreferenceFolder":
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
    def create_as(cls, path: Path, drawn: DrawnWith) -> "PreferenceFolder":
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


__all__ = ["PreferenceDataset", "PreferenceFolder", "Unjudged", "check_choices", "settings_of"]

REGENERATED = "regenerated"  # folder, in that of a run, of samples that were drawn anew
MUST_MATCH = ("pipeline", "scheduler", "call", "eta", "storage")  # of a folder and a run; other things may differ
# Nats per latent element between the log-probabilities that were stored and those of the reference, largest of all
# steps: above what bf16 makes of the last ones, whose τ is small (hundredths), far below another model's (whole nats).
OTHER_MODEL = 0.3


class Unjudged:
    """Stands where a method has no reward."""

    name = "none"
    differentiable = False

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        raise InputError("this method was made without a reward: give it one (for evaluations, eval_rewards will do)")


def settings_of(folder: str | Path) -> dict[str, Any]:
    """What TrainingConfig must be to learn from a folder; the others are free."""
    drawn = DrawnWith.read(Path(folder))
    call = dict(drawn.call)
    own: dict[str, Any] = {name: call.pop(name) for name in ("num_inference_steps", "guidance_scale") if name in call}
    return own | {"call": call, "eta": drawn.eta, "storage": drawn.storage, "num_generations": 2}


@dataclass(frozen=True)
class PreferenceDataset:
    """Pairs of samples of which a human preferred one: the chosen one has the reward 1, the other 0.

    lots  with their trajectories, by name
    """

    recorded: Recorded
    lots: Mapping[str, Lot]
    settings: TrainingConfig

    @classmethod
    def of(cls, folder: Path, pipe: Any, settings: TrainingConfig, run: Path) -> "PreferenceDataset":
        """The choices of a folder, for a run that trains `pipe`, which is still what they were drawn with.

        Lots without trajectories, as far as the run needs them, are drawn anew and kept in the run's folder.
        """
        recorded = read_choices(folder)
        _check_settings(recorded, pipe, settings)
        rounds = math.ceil(
            settings.max_steps / (settings.steps_per_generation * settings.num_iterations)
        )  # whole ones are drawn
        used = _choices_at(recorded, settings, 0, rounds * settings.steps_per_generation * settings.train_batch_size)
        lots = {choice.lot: recorded.lots[choice.lot] for choice in used}
        missing = [lot for lot in lots.values() if lot.trajectories is None]
        return cls(recorded, lots | _drawn_anew(missing, recorded, pipe, settings, run / REGENERATED), settings)

    def about(self) -> dict[str, Any]:
        return {"choices": f"{len(self.recorded.choices)} with the hash {self.recorded.digest()[:16]}"}

    def round(
        self, number: int, sampler: Sampler, trainable: Trainable, before_each: BeforeEach, team: DistributedContext
    ) -> Round:
        """The choices of every update of a round, in a stream over all of them in one new order after another."""
        size, seed = self.settings.train_batch_size, self.settings.seed
        batches, told = [], []
        for update in range(
            number * self.settings.steps_per_generation, (number + 1) * self.settings.steps_per_generation
        ):
            own = own_share(range(update * size, (update + 1) * size), team)
            chunks = self._chunks(_choices_at(self.recorded, self.settings, own.start, len(own)))
            half = half_precision(trainable.denoiser, self.settings)
            window = window_of(len(chunks[0].stochastic), self.settings, half is not None)
            steps = chosen_steps(window, self.settings.timestep_fraction, seed, f"update {update}")
            references = references_of(sampler, trainable, chunks, steps, before_each, self.settings)
            _check_reference(chunks, references, steps)
            old = []
            for chunk in chunks:
                before_each()
                # A round's samples count as today's policy's, and the first one is held against its replay, all steps.
                old.append(replace(chunk, log_probs=log_probs(sampler, chunk, steps if number else None)))
            batches.append(Batch(old, references, steps, torch.tensor([[1.0, 0.0]] * size), window))
            told.append({"turn": update * size / len(self.recorded.choices)})
        order = learning_order(len(batches), self.settings.num_iterations, seed, number)
        return Round(number, tuple(batches), tuple(batch.rewards for batch in batches), tuple(told), order)

    def _chunks(self, choices: Sequence[Choice]) -> list[Trajectories]:
        """Chosen and rejected, pair after pair, in chunks for the denoiser."""
        lots = {name: self.lots[name].load() for name in dict.fromkeys(choice.lot for choice in choices)}
        pairs = [lots[choice.lot].at([choice.chosen, choice.rejected]) for choice in choices]
        first = pairs[0]
        for choice, pair in zip(choices, pairs, strict=True):
            if pair.stochastic != first.stochastic or pair.latents.shape != first.latents.shape:
                raise InputError(
                    f"{self.recorded.folder}: lots {choices[0].lot} and {choice.lot} have trajectories of shapes "
                    f"{tuple(first.latents.shape[1:])} and {tuple(pair.latents.shape[1:])}: one folder is for one size"
                )
        whole, size = Trajectories.joined(pairs), self.settings.micro_batch
        numbers = range(len(whole.rows))
        return [whole.at(numbers[place : place + size]) for place in numbers[::size]]


def _choices_at(recorded: Recorded, settings: TrainingConfig, position: int, count: int) -> list[Choice]:
    numbers = [str(number) for number in range(len(recorded.choices))]
    return [recorded.choices[int(one)] for one in prompts_at(position, count, numbers, settings.seed)]


def _check_settings(recorded: Recorded, pipe: Any, settings: TrainingConfig) -> None:
    """Raises InputError where a run's samples would not be made as those of the folder were."""
    if settings.num_generations != 2:
        raise InputError(f"num_generations must be 2, got {settings.num_generations}: a choice is between two")
    here = DrawnWith.of(pipe, settings.arguments, settings.eta, settings.storage)
    other = replace(recorded.drawn, **{name: getattr(here, name) for name in MUST_MATCH})
    for name, (there, asked) in recorded.drawn.differences(other).items():
        raise InputError(
            f"{name} is {_said(asked)} in this run and was {_said(there)} when {recorded.folder} was recorded: a "
            "choice is learnt from as its samples were drawn, use the same (see "
            "steer.pipelines.training.preference_data.settings_of)"
        )


def _said(value: Any) -> str:
    return "not given" if value is None else repr(value)


def _check_reference(chunks: Sequence[Trajectories], references: Sequence[Reference], steps: Sequence[int]) -> None:
    """Raises InputError where the model that training begins with cannot have drawn the samples."""
    for chunk, told in zip(chunks, references, strict=True):
        apart = (told.log_probs - chunk.log_probs[:, list(steps)]).abs().max().item() / chunk.elements
        if not apart <= OTHER_MODEL:
            raise InputError(
                f"the trajectories of the choices about {chunk.rows.prompts[0]!r:.60} have other log-probabilities by "
                f"this model ({apart:.2g} nats per latent element apart, at most {OTHER_MODEL:g}): another one drew "
                "them. Train the model that the choices were recorded with"
            )


def _drawn_anew(
    lots: Sequence[Lot], recorded: Recorded, pipe: Any, settings: TrainingConfig, folder: Path
) -> dict[str, Lot]:
    """The lots with trajectories in `folder`, each drawn as the batch that it was, its images being the same.

    It comes before a training changes the pipeline: neither an adapter nor another precision is in it yet.
    """
    if not lots:
        return {}
    kept, sampler = PreferenceFolder.create_as(folder, recorded.drawn), sampler_of(pipe, settings)
    here = DrawnWith.of(pipe, settings.arguments, settings.eta, settings.storage)
    for lot in tqdm(lots, unit="lot", disable=None, desc="drawing anew what was chosen from"):
        if (known := kept.lots.get(lot_name(lot.rows))) is not None and known.images == lot.images:
            continue  # by this run, before it was stopped
        drew, images = sampler.rollout(lot.rows)
        for number, (image, told) in enumerate(zip(images, lot.images, strict=True)):
            if pixel_hash(pixels_of(image)) != told:
                raise InputError(_differs(lot, number, recorded.drawn, here))
        kept.write_lot(drew, images)
    return {lot.id: kept.lots[lot_name(lot.rows)] for lot in lots}


def _differs(lot: Lot, number: int, drawn: DrawnWith, here: DrawnWith) -> str:
    apart = [f"{name} {there!r} then, {now!r} now" for name, (there, now) in drawn.differences(here).items()]
    why = "; ".join(apart) or "the settings are the same, so the weights are not, or the device is another of its kind"
    return (
        f"{inside(lot.folder, lot.image_file(number))}: drawn anew from its seed the image is another one, so that its "
        f"trajectory is lost ({why}): go back to what it was drawn with, or record choices with keep_trajectories"
    )
