"""Human preferences as training data: pairs of trajectories, stored or sampled again from seeds."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from steer.errors import InputError
from steer.files import atomic_write, make_folder, sync, write_errors, write_text
from steer.pipelines.training.config import DTYPES, TrainingConfig
from steer.pipelines.training.method import (
    OnChunk,
    chosen_steps,
    num_training_steps_of,
    process_shard,
    sampler_of,
    shuffled_at,
    skips_low_noise_steps,
)
from steer.pipelines.training.preference_files import (
    GROUPS,
    PREFERENCES,
    SETTINGS,
    Preference,
    PreferenceRecords,
    SampleGroup,
    SampleProvenance,
    file_inside,
    pixel_hash,
    pixels_of,
    read_groups,
    read_preferences,
)
from steer.pipelines.training.rollouts import RolloutBuffer, batch_order, references_of, trajectories_to_tensors
from steer.training.distributed import DistributedContext
from steer.training.gradient import Batch
from steer.training.rollout import Rows, Sampler, Trajectories, blocks, log_probs
from steer.training.trainable import Trainable

TRY_AGAIN = "make room, then try again"  # what helps after a failed write


class PreferenceFolder:
    """Writer of a preference dataset; see `steer.pipelines.training.preference_files` for the format.

    call = {"num_inference_steps": 20, "guidance_scale": 5.0}
    folder = PreferenceFolder.create("my-preferences", pipe, call)
    sampler = Sampler(pipe, call)
    group = folder.write_group(*sampler.rollout(Rows(("a star",) * 2, starts=(1, 1), noises=(2, 3))))
    folder.write_preference(group, chosen=1, rejected=0)

    Data of a call that has returned survive a crash. Only one program may write at a time. Raises InputError for a disk
    error; the group is then not recorded.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.provenance = SampleProvenance.read(self.path)
        self.groups = read_groups(self.path) if (self.path / GROUPS).exists() else {}

    @classmethod
    def create(
        cls, path: str | Path, pipe: Any, call: Mapping[str, Any], eta: float = 1.0, latents_dtype: str = "float32"
    ) -> "PreferenceFolder":
        """Create a folder, or open a folder of the same provenance, for samples of `Sampler(pipe, call, eta, …)`.

        latents_dtype  dtype of the sampler's latents, by name
        Raises InputError for a folder of another provenance, and for arguments that a training cannot read back.
        """
        if type(call.get("num_inference_steps")) is not int:
            raise InputError("num_inference_steps must be among the arguments of the call: a training needs the same")
        to_json = partial(json.dumps, allow_nan=False)
        if odd := [name for name, value in call.items() if not _accepts(to_json, value)]:
            raise InputError(f"{odd[0]} is not a plain value: the arguments of recorded calls must fit in JSON")
        if latents_dtype not in DTYPES:
            raise InputError(f"latents_dtype must be one of {', '.join(DTYPES)}, got {latents_dtype!r}")
        return cls.create_as(Path(path), SampleProvenance.of(pipe, call, eta, latents_dtype))

    @classmethod
    def create_as(cls, path: Path, provenance: SampleProvenance) -> "PreferenceFolder":
        """Create or open a folder for samples of this provenance."""
        if not (path / SETTINGS).exists():
            with write_errors(path, TRY_AGAIN):
                write_text(path / SETTINGS, json.dumps(asdict(provenance), indent=1) + "\n")
        result = cls(path)
        for name, (there, here) in result.provenance.diff(provenance).items():
            raise InputError(f"{path} holds samples made with {name} {there!r}, not {here!r}: use another folder")
        return result

    def write_group(self, sampled: Trajectories, images: Tensor, keep_trajectories: bool = True) -> str:
        """Write samples of one prompt from one x_T, one batch of a sampler; return the name of the group.

        keep_trajectories  False: a training samples them again from seeds, with the same model, device and versions
        Rows that are already recorded are not written again.
        """
        rows = sampled.rows
        self._check(sampled, images)
        pixels = [pixels_of(image) for image in images]
        hashes = tuple(pixel_hash(one) for one in pixels)
        name = group_id(rows)
        if (known := self.groups.get(name)) is not None:
            if known.images != hashes:
                raise InputError(f"{self.path}: group {name} is there with other images: another model drew them")
            return name
        data = save(trajectories_to_tensors(sampled)[0]) if keep_trajectories else b""
        stored = (hashlib.sha256(data).hexdigest(), sampled.stochastic) if keep_trajectories else None
        group = SampleGroup(self.path, name, rows, hashes, stored)
        with write_errors(self.path, TRY_AGAIN):
            for number, one in enumerate(pixels):
                with atomic_write(self.path / group.image_file(number)) as new:
                    Image.fromarray(one).save(new, "PNG")
            if keep_trajectories:
                with atomic_write(self.path / group.trajectory_file) as new:
                    new.write_bytes(data)
            append_line(self.path / GROUPS, group.line())
        self.groups[name] = group
        return name

    def write_preference(self, group: str, chosen: int, rejected: int, **more: Any) -> None:
        """Record that image `chosen` of a group is preferred to image `rejected`; `more` are further plain values."""
        count = len(self._group(group).rows)
        if chosen == rejected or not (0 <= chosen < count and 0 <= rejected < count):
            raise InputError(f"chosen {chosen} and rejected {rejected} must be two different numbers below {count}")
        with write_errors(self.path, TRY_AGAIN):
            append_line(self.path / PREFERENCES, more | {"lot": group, "chosen": chosen, "rejected": rejected})

    def write_tie(self, group: str, **more: Any) -> None:
        """Record that no image of a group is preferred."""
        with write_errors(self.path, TRY_AGAIN):
            append_line(self.path / PREFERENCES, more | {"lot": self._group(group).id, "tie": True})

    def _group(self, name: str) -> SampleGroup:
        if name not in self.groups:
            raise InputError(f"{self.path} has no group {name!r:.70}: write the group before its preferences")
        return self.groups[name]

    def _check(self, sampled: Trajectories, images: Tensor) -> None:
        rows = sampled.rows
        if len(rows) < 2 or len(set(rows.prompts)) > 1 or len(set(rows.starts)) > 1:
            raise InputError("a group is two or more samples of one prompt from one x_T: give all one prompt and start")
        if len(set(rows.noises)) < len(rows):
            raise InputError("two samples of this group have the same noise: they are one image, give each a seed")
        if images.dim() != 4 or len(images) != len(rows):
            raise InputError(f"images of shape {tuple(images.shape)} must be ({len(rows)}, 3, height, width)")
        if sampled.latents.dtype != DTYPES[self.provenance.latents_dtype]:
            raise InputError(
                f"these trajectories hold {sampled.latents.dtype}, the folder is for {self.provenance.latents_dtype}"
            )


def group_id(rows: Rows) -> str:
    """Return the name of a group, equal for equal rows: a group that is written twice is recorded once."""
    return hashlib.sha256(json.dumps(asdict(rows)).encode()).hexdigest()[:16]


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Append a line and sync it to disk; remove a last line that a crash cut off."""
    line = json.dumps(row).encode() + b"\n"
    make_folder(path.parent)
    with path.open("a+b") as file:
        file.seek(0)
        content = file.read()
        last = content[content.rfind(b"\n") + 1 :]
        if _accepts(json.loads, last):
            line = b"\n" + line  # an editor left out the end of the line
        elif last:
            file.truncate(len(content) - len(last))
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
    sync(path.parent)


def _accepts(convert: Callable[[Any], Any], value: Any) -> bool:
    try:
        convert(value)
    except (TypeError, ValueError):
        return False
    return True


REGENERATED = "regenerated"  # subfolder of a run for samples that were drawn again
MUST_MATCH = ("pipeline", "scheduler", "call", "eta", "latents_dtype")  # fields that must be equal in folder and run
# Largest difference of any step between stored log-probabilities and the reference's, in nats per latent element: above
# the error of bf16 in the last steps, whose τ is small (hundredths), and far below another model's (whole nats).
MAX_LOG_PROB_DIFFERENCE = 0.3


class NoReward:
    """The reward of a method that learns from preferences alone."""

    name = "none"
    differentiable = False

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        raise InputError("this trainer was created without a reward: give it one, or preferences")


def sampling_config_of(folder: str | Path) -> dict[str, Any]:
    """Return the fields of TrainingConfig that a preference dataset fixes."""
    provenance = SampleProvenance.read(Path(folder))
    call = dict(provenance.call)
    own: dict[str, Any] = {name: call.pop(name) for name in ("num_inference_steps", "guidance_scale") if name in call}
    return own | {"call": call, "eta": provenance.eta, "latents_dtype": provenance.latents_dtype, "num_generations": 2}


@dataclass(frozen=True)
class PreferenceDataset:
    """Pairs of samples of which a person preferred one: the chosen sample has the reward 1, the other 0.

    groups  groups with their trajectories, by name
    """

    records: PreferenceRecords
    groups: Mapping[str, SampleGroup]
    config: TrainingConfig

    @classmethod
    def of(cls, folder: Path, pipe: Any, config: TrainingConfig) -> "PreferenceDataset":
        """Read the preferences of a folder for a run that trains `pipe`, which must still be the model of the samples.

        Groups without trajectories, if the run needs them, are sampled again and kept in the run's folder.
        """
        records = read_preferences(folder)
        _check_settings(records, pipe, config)
        updates, passes, size = config.steps_per_generation, config.num_iterations, config.train_batch_size
        num_rollouts = math.ceil(config.max_steps / (updates * passes))  # drawn as a whole
        used = _preferences_at(records, config, 0, num_rollouts * updates * size)
        groups = {preference.group: records.groups[preference.group] for preference in used}
        missing = [group for group in groups.values() if group.trajectories is None]
        again = _regenerate(missing, records, pipe, config, Path(config.output_dir) / REGENERATED)
        return cls(records, groups | again, config)

    def config_dict(self) -> dict[str, Any]:
        """Return the plain values that determine the samples."""
        return {"preferences": f"{len(self.records.preferences)} with the hash {self.records.digest()[:16]}"}

    def collect(
        self, number: int, sampler: Sampler, trainable: Trainable, on_chunk: OnChunk, context: DistributedContext
    ) -> RolloutBuffer:
        """Collect the preferences of every update of a rollout, from a stream of shuffled passes over all."""
        config, size, updates = self.config, self.config.train_batch_size, self.config.steps_per_generation
        skip = skips_low_noise_steps(trainable.pipe, config)
        batches, metrics = [], []
        for update in range(number * updates, (number + 1) * updates):
            own = process_shard(range(update * size, (update + 1) * size), context)
            chunks = self._chunks(_preferences_at(self.records, config, own.start, len(own)))
            total = len(chunks[0].stochastic)
            learned = num_training_steps_of(total, config, skip)
            steps = chosen_steps(learned, config.timestep_fraction, config.seed, f"update {update}")
            references = references_of(sampler, trainable, chunks, steps, on_chunk, config)
            for chunk, reference in zip(chunks, references, strict=True):
                _check_reference(chunk, reference.log_probs, steps)
            if number == 0 and (others := [step for step in range(total) if step not in steps]):
                with trainable.reference():  # the last steps, which are not learned from, tell models apart best
                    for chunk in chunks:
                        _check_reference(chunk, log_probs(sampler, chunk, others)[:, others], others)
            old = []
            for chunk in chunks:
                on_chunk()
                # Samples count as the present policy's; the first batch is compared with its replay at all steps.
                old.append(replace(chunk, log_probs=log_probs(sampler, chunk, steps if number else None)))
            batches.append(Batch(old, references, steps, torch.tensor([[1.0, 0.0]] * size), learned))
            metrics.append({"turn": update * size / len(self.records.preferences)})
        order = batch_order(len(batches), config.num_iterations, config.seed, number)
        return RolloutBuffer(number, tuple(batches), tuple(batch.rewards for batch in batches), tuple(metrics), order)

    def _chunks(self, preferences: Sequence[Preference]) -> list[Trajectories]:
        """Return chosen and rejected samples, pair after pair, in chunks for the denoiser."""
        groups = {name: self.groups[name].load() for name in {preference.group for preference in preferences}}
        pairs = [groups[preference.group].at([preference.chosen, preference.rejected]) for preference in preferences]
        first = pairs[0]
        for preference, pair in zip(preferences, pairs, strict=True):
            if pair.stochastic != first.stochastic or pair.latents.shape != first.latents.shape:
                raise InputError(
                    f"{self.records.folder}: groups {preferences[0].group} and {preference.group} have trajectories of "
                    f"shapes {tuple(first.latents.shape[1:])} and {tuple(pair.latents.shape[1:])}: one folder is for "
                    "one size"
                )
        whole = Trajectories.concatenate(pairs)
        return [whole.at(block) for block in blocks(range(len(whole.rows)), self.config.micro_batch)]


def _preferences_at(records: PreferenceRecords, config: TrainingConfig, position: int, count: int) -> list[Preference]:
    size = len(records.preferences)
    return [records.preferences[number] for number in shuffled_at(position, count, size, config.seed)]


def _check_settings(records: PreferenceRecords, pipe: Any, config: TrainingConfig) -> None:
    """Raise InputError where a run would not draw samples as the folder's samples were drawn."""
    if config.num_generations != 2:
        raise InputError(f"num_generations must be 2, got {config.num_generations}: a preference compares two samples")
    here = SampleProvenance.of(pipe, config.call_kwargs, config.noise_level, config.latents_dtype)
    other = replace(records.provenance, **{name: getattr(here, name) for name in MUST_MATCH})
    for name, values in records.provenance.diff(other).items():
        there, asked = ("not given" if value is None else repr(value) for value in values)
        raise InputError(
            f"{name} is {asked} in this run and was {there} when {records.folder} was recorded: train with the "
            "arguments that the samples were made with (see "
            "steer.pipelines.training.preference_data.sampling_config_of)"
        )


def _check_reference(chunk: Trajectories, reference: Tensor, steps: Sequence[int]) -> None:
    """Raise InputError where the initial model of the training cannot have drawn the samples.

    reference: (N, steps) log-probabilities by that model
    """
    difference = (reference - chunk.log_probs[:, list(steps)]).abs().max().item() / chunk.elements
    if not difference <= MAX_LOG_PROB_DIFFERENCE:
        raise InputError(
            f"the trajectories of the preferences about {chunk.rows.prompts[0]!r:.60} have other log-probabilities "
            f"by this model ({difference:.2g} nats per latent element apart, at most {MAX_LOG_PROB_DIFFERENCE:g}): "
            "another one drew them. Train the model that the preferences were recorded with"
        )


def _regenerate(
    groups: Sequence[SampleGroup], records: PreferenceRecords, pipe: Any, config: TrainingConfig, folder: Path
) -> dict[str, SampleGroup]:
    """Sample groups again, each in its original batch, and verify the images; return the groups with trajectories.

    This happens before a training changes the pipeline, which has neither an adapter nor another precision yet.
    """
    if not groups:
        return {}
    kept, sampler = PreferenceFolder.create_as(folder, records.provenance), sampler_of(pipe, config)
    here = SampleProvenance.of(pipe, config.call_kwargs, config.noise_level, config.latents_dtype)
    for group in tqdm(groups, unit="group", disable=None, desc="sampling the recorded images again"):
        if (known := kept.groups.get(group_id(group.rows))) is not None and known.images == group.images:
            continue  # already sampled by this run before it was stopped
        sampled, images = sampler.rollout(group.rows)
        for number, (image, digest) in enumerate(zip(images, group.images, strict=True)):
            if pixel_hash(pixels_of(image)) != digest:
                raise InputError(_regeneration_error(group, number, records.provenance, here))
        kept.write_group(sampled, images)
    return {group.id: kept.groups[group_id(group.rows)] for group in groups}


def _regeneration_error(group: SampleGroup, number: int, provenance: SampleProvenance, here: SampleProvenance) -> str:
    difference = [f"{name} {there!r} then, {now!r} now" for name, (there, now) in provenance.diff(here).items()]
    same = "the settings are the same, so the weights are not, or the device is another of its kind"
    why = "; ".join(difference) or same
    return (
        f"{file_inside(group.folder, group.image_file(number))}: sampled again from its seed the image is another "
        f"one, so that its trajectory is lost ({why}): restore what it was sampled with, or record "
        "preferences with keep_trajectories"
    )
