"""A round of samples as tensors and plain values, to be saved in the midst of it."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from steer.engine import Batch, Reference
from steer.pipelines.rounds import Round
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
            own |= {f"reference {name}": value for name, value in vars(reference).items()}
            tensors |= {f"{number}/{place}/{name}": value for name, value in own.items()}
            chunks.append(told)
        batches.append({"steps": list(batch.steps), "chunks": chunks})
    told = {"number": drew.number, "told": drew.told, "order": drew.order, "cursor": drew.cursor, "batches": batches}
    return tensors, told


def round_from(tensors: Mapping[str, Tensor], told: Mapping[str, Any]) -> Round:
    """The round that `round_tensors` told of."""
    batches, rewards = [], []
    for number, batch in enumerate(told["batches"]):
        chunks, references = [], []
        for place, about in enumerate(batch["chunks"]):
            start = f"{number}/{place}/"
            own = {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
            chunks.append(trajectories_from(own, about))
            references.append(Reference(*(own[f"reference {name}"] for name in ("means", "deviations", "log_probs"))))
        batches.append(Batch(chunks, references, tuple(batch["steps"]), tensors[f"{number}/signal"]))
        rewards.append(tensors[f"{number}/rewards"])
    return Round(
        told["number"], tuple(batches), tuple(rewards), tuple(told["told"]), tuple(told["order"]), told["cursor"]
    )
