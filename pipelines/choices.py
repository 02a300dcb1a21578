"""Learning from human choices: pairs of stored trajectories, or of such as are drawn anew and proven to be the same."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from steer.batch import Batch, Reference
from steer.errors import InputError
from steer.pipelines.choice_files import DrawnWith, Lot, inside
from steer.pipelines.choice_folder import ChoiceFolder, lot_name
from steer.pipelines.choice_reading import Choice, Recorded, check_choices, pixel_hash, pixels_of, read_choices
from steer.pipelines.finetune_settings import FinetuneSettings
from steer.pipelines.rounds import Round, learning_order, references_of
from steer.pipelines.samples import (
    BeforeEach,
    chosen_steps,
    half_precision,
    own_share,
    prompts_at,
    sampler_of,
    window_of,
)
from steer.team import Team
from steer.trainable import Trainable
from steer.trajectory import Sampler, Trajectories, log_probs

__all__ = ["ChoiceFolder", "HumanChoices", "Unjudged", "check_choices", "settings_of"]

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
    """What FinetuneSettings must be to learn from a folder; the others are free."""
    drawn = DrawnWith.read(Path(folder))
    call = dict(drawn.call)
    own: dict[str, Any] = {name: call.pop(name) for name in ("num_inference_steps", "guidance_scale") if name in call}
    return own | {"call": call, "eta": drawn.eta, "storage": drawn.storage, "samples_per_prompt": 2}


@dataclass(frozen=True)
class HumanChoices:
    """Pairs of samples of which a human preferred one: the chosen one has the reward 1, the other 0.

    lots  with their trajectories, by name
    """

    recorded: Recorded
    lots: Mapping[str, Lot]
    settings: FinetuneSettings

    @classmethod
    def of(cls, folder: Path, pipe: Any, settings: FinetuneSettings, run: Path) -> "HumanChoices":
        """The choices of a folder, for a run that trains `pipe`, which is still what they were drawn with.

        Lots without trajectories, as far as the run needs them, are drawn anew and kept in the run's folder.
        """
        recorded = read_choices(folder)
        _check_settings(recorded, pipe, settings)
        rounds = math.ceil(settings.max_steps / (settings.steps_per_round * settings.passes))  # whole ones are drawn
        used = _choices_at(recorded, settings, 0, rounds * settings.steps_per_round * settings.prompts_per_step)
        lots = {choice.lot: recorded.lots[choice.lot] for choice in used}
        missing = [lot for lot in lots.values() if lot.trajectories is None]
        return cls(recorded, lots | _drawn_anew(missing, recorded, pipe, settings, run / REGENERATED), settings)

    def about(self) -> dict[str, Any]:
        return {"choices": f"{len(self.recorded.choices)} with the hash {self.recorded.digest()[:16]}"}

    def round(self, number: int, sampler: Sampler, trainable: Trainable, before_each: BeforeEach, team: Team) -> Round:
        """The choices of every update of a round, in a stream over all of them in one new order after another."""
        size, seed = self.settings.prompts_per_step, self.settings.seed
        batches, told = [], []
        for update in range(number * self.settings.steps_per_round, (number + 1) * self.settings.steps_per_round):
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
        order = learning_order(len(batches), self.settings.passes, seed, number)
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


def _choices_at(recorded: Recorded, settings: FinetuneSettings, position: int, count: int) -> list[Choice]:
    numbers = [str(number) for number in range(len(recorded.choices))]
    return [recorded.choices[int(one)] for one in prompts_at(position, count, numbers, settings.seed)]


def _check_settings(recorded: Recorded, pipe: Any, settings: FinetuneSettings) -> None:
    """Raises InputError where a run's samples would not be made as those of the folder were."""
    if settings.samples_per_prompt != 2:
        raise InputError(f"samples_per_prompt must be 2, got {settings.samples_per_prompt}: a choice is between two")
    here = DrawnWith.of(pipe, settings.arguments, settings.eta, settings.storage)
    other = replace(recorded.drawn, **{name: getattr(here, name) for name in MUST_MATCH})
    for name, (there, asked) in recorded.drawn.differences(other).items():
        raise InputError(
            f"{name} is {_said(asked)} in this run and was {_said(there)} when {recorded.folder} was recorded: a "
            "choice is learnt from as its samples were drawn, use the same (see steer.pipelines.choices.settings_of)"
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
    lots: Sequence[Lot], recorded: Recorded, pipe: Any, settings: FinetuneSettings, folder: Path
) -> dict[str, Lot]:
    """The lots with trajectories in `folder`, each drawn as the batch that it was, its images being the same.

    It comes before a training changes the pipeline: neither an adapter nor another precision is in it yet.
    """
    if not lots:
        return {}
    kept, sampler = ChoiceFolder.create_as(folder, recorded.drawn), sampler_of(pipe, settings)
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
