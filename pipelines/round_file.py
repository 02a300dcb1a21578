"""A round of samples as tensors and plain values, to be saved in the midst of it, whole: by however many processes."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor

from steer.batch import Batch, Reference
from steer.pipelines.rounds import Round
from steer.pipelines.samples import own_share
from steer.team import Team
from steer.trajectory import Rows, Trajectories


def trajectory_tensors(stored: Trajectories) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """One lot of rollouts."""
    told = {**asdict(stored.rows), "stochastic": stored.stochastic}
    return {"latents": stored.latents, "log_probs": stored.log_probs}, told


def trajectories_from(tensors: Mapping[str, Tensor], told: Mapping[str, Any]) -> Trajectories:
    """The rollouts that `trajectory_tensors` told of."""
    rows = Rows(tuple(told["prompts"]), tuple(told["starts"]), tuple(told["noises"]))
    return Trajectories(rows, tensors["latents"], tuple(told["stochastic"]), tensors["log_probs"])


def round_tensors(drew: Round) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All of a round; lossless."""
    tensors: dict[str, Tensor] = {}
    batches = []
    for number, (batch, rewards) in enumerate(zip(drew.batches, drew.rewards, strict=True)):
        tensors |= {f"{number}/signal": batch.rewards, f"{number}/rewards": rewards}
        chunks = []
        for place, (chunk, reference) in enumerate(zip(batch.chunks, batch.references, strict=True)):
            own, told = trajectory_tensors(chunk)
            kept = {name: value for name, value in vars(reference).items() if value is not None}
            own |= {f"reference {name}": value for name, value in kept.items()}
            tensors |= {f"{number}/{place}/{name}": value for name, value in own.items()}
            chunks.append(told)
        batches.append({"steps": list(batch.steps), "window": batch.window, "chunks": chunks})
    told = {"number": drew.number, "told": drew.told, "order": drew.order, "cursor": drew.cursor, "batches": batches}
    return tensors, told


def joined(drew: Round, team: Team) -> Round:
    """The round with the chunks of all processes."""
    batches = []
    for batch in drew.batches:
        chunks, references = team.gather(batch.chunks), team.gather(batch.references)
        batches.append(replace(batch, chunks=chunks, references=references))
    return replace(drew, batches=tuple(batches))


def shared_out(whole: Round, team: Team, size: int) -> Round:
    """What this process has of a whole round, in chunks of at most `size` rows."""
    batches = []
    for batch in whole.batches:
        stored, told = Trajectories.joined(batch.chunks), Reference.joined(batch.references)
        own = own_share(range(len(stored.rows)), team)
        parts = [own[first : first + size] for first in range(0, len(own), size)]
        chunks, references = [stored.at(part) for part in parts], [told.at(part) for part in parts]
        batches.append(replace(batch, chunks=chunks, references=references))
    return replace(whole, batches=tuple(batches))


def round_from(tensors: Mapping[str, Tensor], told: Mapping[str, Any]) -> Round:
    """The round that `round_tensors` told of."""
    batches, rewards = [], []
    for number, batch in enumerate(told["batches"]):
        chunks, references = [], []
        for place, about in enumerate(batch["chunks"]):
            start = f"{number}/{place}/"
            own = {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
            chunks.append(trajectories_from(own, about))
            residuals = own.get("reference residuals")
            references.append(Reference(residuals, own["reference deviations"], own["reference log_probs"]))
        batches.append(Batch(chunks, references, tuple(batch["steps"]), tensors[f"{number}/signal"], batch["window"]))
        rewards.append(tensors[f"{number}/rewards"])
    return Round(
        told["number"], tuple(batches), tuple(rewards), tuple(told["told"]), tuple(told["order"]), told["cursor"]
    )
