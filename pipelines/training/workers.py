"""Rollouts and rewards by Ray actors, on one machine or many: `rollout_workers`, `reward_workers`. Ray is optional.

Samples depend only on the weights and on the rows' seeds, so that any actor draws the same samples as the process
itself. Ray restarts a dead actor and repeats its work.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import cycle
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from steer.errors import InputError
from steer.pipelines.training.config import TrainingConfig
from steer.pipelines.training.method import OnChunk, Samples, TrainingMethod, sampler_of
from steer.pipelines.training.preparation import accelerator_of, trainable_of
from steer.registry import nearest
from steer.reward import Metadata, Reward, Texts, compares_images, score, takes_videos, with_lock
from steer.rewards.compose import map_plain, plain_rewards
from steer.training.rollout import Rows, StepWindow
from steer.training.trainable import set_parameter

MAX_RESTARTS = 3  # restarts of one actor, and of one piece of its work
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_", "ACCELERATE_", "FSDP_")  # by torchrun, accelerate
Draw = Callable[..., Samples]


class RolloutWorker:
    """An actor with a copy of the pipeline, which draws micro-batches with the weights of each call."""

    def __init__(
        self, pipe: Any, config: TrainingConfig, draw: Draw, conditions: Any, device: str, numerics: "Numerics"
    ) -> None:
        for name in [name for name in os.environ if name.startswith(LAUNCHER_VARIABLES)]:
            del os.environ[name]  # an actor is not a process of the launched run, though such a process may start it
        numerics.apply()
        self.pipe, self.config, self._draw, self._conditions = pipe.to(device), config, draw, conditions
        self.trainable = trainable_of(self.pipe, config)
        accelerator = accelerator_of(config, Path(config.output_dir), device == "cpu")
        denoisers = self.trainable.denoisers.items()
        self.prepared, self.version = {name: accelerator.prepare(one) for name, one in denoisers}, 0

    def draw(self, version: int, weights: Sequence[Any], rows: Rows, window: StepWindow | None) -> Samples:
        """Draw the rows. `weights`: a list with a reference to the weights of `version`; only new ones are fetched."""
        import ray

        if version != self.version:
            parameters = self.trainable.parameters
            for name, value in ray.get(weights[0]).items():
                set_parameter(parameters[name], value)
            self.sampler = sampler_of(self.pipe, self.config, self.prepared, conditions=self._conditions)
            self.version = version
        trajectories, images = self._draw(self.sampler, rows, window)
        return trajectories, images.to("cpu")


class RayRollouts:
    """The actors of one process that draw its samples."""

    def __init__(self, pipe: Any, config: TrainingConfig, draw: Draw, conditions: Any, share: float) -> None:
        import ray

        self._ray, self._version, self._weights = ray, 0, list[Any]()
        device = pipe.device
        try:
            # On the CPU, as an actor has another GPU. The reference is kept for actors that are restarted.
            self._stored = store(pipe.to("cpu"), type(pipe).__name__)
        finally:
            pipe.to(device)
        config = replace(config, init_adapter=None)  # each task brings all weights
        self._conditions = store(conditions, "conditions")
        given = self._stored, config, draw, self._conditions, device.type, Numerics()
        self.actors = [actor_of(RolloutWorker, share).remote(*given) for _ in range(config.rollout_workers)]

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Put these weights in Ray's store, for the next draws; actors fetch them by reference."""
        self._version, self._weights = self._version + 1, [self._ray.put(dict(weights))]

    def draw(self, chunks: Sequence[Rows], window: StepWindow | None, on_chunk: OnChunk) -> Iterator[Samples]:
        """Draw micro-batches by the actors in turn, and yield their samples and images in order."""
        turns = zip(cycle(self.actors), chunks, strict=False)
        pending = [actor.draw.remote(self._version, self._weights, rows, window) for actor, rows in turns]
        for one in pending:
            on_chunk()
            yield result(one)


class RewardWorker:
    """An actor with a copy of a reward."""

    def __init__(self, reward: Reward, device: str, numerics: "Numerics") -> None:
        numerics.apply()
        self.reward, self.device = reward, device

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None) -> Tensor:
        """Score images and validate the result."""
        with torch.no_grad():
            return score(self.reward, images.to(self.device), prompts, metadata)


class RayReward:
    """A reward that actors compute in turn, without gradients."""

    images, differentiable = "pt", False

    def __init__(self, reward: Reward, count: int, device: str, share: float) -> None:
        self.name, self.compares_images, self.takes_videos = reward.name, compares_images(reward), takes_videos(reward)
        self._stored = store(reward, reward.name)  # kept for actors that are restarted
        given = self._stored, device, Numerics()
        self.actors = [actor_of(RewardWorker, share).remote(*given) for _ in range(count)]
        self._turns = cycle(self.actors)

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None = None) -> Tensor:
        rows = None if metadata is None else list(metadata)
        samples = images if isinstance(images, Texts) else images.detach()
        return result(next(self._turns).score.remote(samples.to("cpu"), list(prompts), rows))


@dataclass(frozen=True)
class Numerics:
    """Switches that can change the last bit of a result, by default as in this process."""

    threads: int = field(default_factory=torch.get_num_threads)
    precision: str = field(default_factory=torch.get_float32_matmul_precision)

    def apply(self) -> None:
        """Set the switches in this process."""
        torch.set_num_threads(self.threads)
        torch.set_float32_matmul_precision(self.precision)


def store(value: Any, name: str) -> Any:
    """Put a pipeline or a reward with its weights in Ray's store; return the reference. Raises InputError."""
    import ray

    try:
        return ray.put(value)
    except (TypeError, AttributeError, RuntimeError, ray.cloudpickle.pickle.PicklingError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{name} cannot be sent to Ray workers ({reason:.160}): compute it in this process") from error


def actor_of(kind: type, share: float) -> Any:
    """Return a class as Ray's class of actors, each with a share of a GPU, restarted up to MAX_RESTARTS times."""
    import ray

    return ray.remote(num_gpus=share, max_restarts=MAX_RESTARTS, max_task_retries=MAX_RESTARTS)(kind)


def result(pending: Any) -> Any:
    """Wait for an actor's result. Raises the InputError of its work, or InputError for an actor that died too often."""
    import ray
    from ray.exceptions import RayActorError, RayTaskError

    try:
        return ray.get(pending)
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, InputError) else error) from None
    except RayActorError as error:
        reason = str(error).strip().splitlines()[-1]
        raise InputError(
            f"a Ray worker ended and cannot be started again ({reason:.200}): fix it, then resume"
        ) from error


def gpu_share(device: str, count: int) -> float:
    """Return the share of a GPU of each of `count` actors, 1 over a whole number; 0 on the CPU.

    Raises InputError where the model is on a GPU and Ray has none.
    """
    import ray

    if device == "cpu":
        return 0.0
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if not gpus:
        raise InputError("rollout_workers and reward_workers: the model is on a GPU, and Ray's machines have none")
    return 1 / math.ceil(count / gpus)


def num_workers(reward: Reward) -> int:
    """Return how many calls of a reward may run at once: the largest number of workers of any component, or 0."""
    return max(len(one.actors) if isinstance(one, RayReward) else 0 for one in plain_rewards(reward).values())


def one_local_call(reward: Reward) -> Reward:
    """Return a reward whose components without workers compute in one thread at a time: they may share memory."""
    lock = Lock()
    return map_plain(reward, lambda one: one if isinstance(one, RayReward) else with_lock(one, lock))


@contextmanager
def worker_processes(trainer: TrainingMethod[Any]) -> Iterator[None]:
    """Give a trainer the workers of its configuration in the block: they draw its rollouts and compute its rewards.

    Raises InputError for a reward that the trainer does not have.
    """
    config: TrainingConfig = trainer.config
    if not (config.rollout_workers or config.reward_workers):
        yield
        return
    own = trainer.reward, *trainer.eval_rewards
    known = {name: one for reward in own for name, one in plain_rewards(reward).items()}
    if unknown := [name for name in config.reward_workers if name not in known]:
        near = nearest(unknown[0], known)
        raise InputError(f"reward_workers: no reward is named {unknown[0]!r}: did you mean {near}?")
    if config.rollout_workers and trainer.preferences is not None:
        raise InputError("rollout_workers draw samples, and preferences need none: leave one out")
    device = trainer.pipe.device.type
    with _connection() as ray:
        share = gpu_share(device, config.rollout_workers + sum(config.reward_workers.values()))
        rewards = {name: RayReward(known[name], count, device, share) for name, count in config.reward_workers.items()}
        actors = [actor for reward in rewards.values() for actor in reward.actors]
        try:
            trainer.reward, *others = (map_plain(one, lambda part: rewards.get(part.name, part)) for one in own)
            trainer.eval_rewards = tuple(others)
            if config.rollout_workers:
                trainer.workers = RayRollouts(trainer.pipe, config, trainer.draw, trainer.conditions_by_prompt, share)
                actors += trainer.workers.actors
            yield
        finally:
            trainer.workers = None
            trainer.reward, *others = own
            trainer.eval_rewards = tuple(others)
            for actor in actors:
                ray.kill(actor)


@contextmanager
def _connection() -> Iterator[Any]:
    """Connect to the cluster of RAY_ADDRESS, or start Ray on this machine, unless there is a connection."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        yield ray
        return
    ray.init(include_dashboard=None if "RAY_ADDRESS" in os.environ else False, logging_level="warning")
    try:
        yield ray
    finally:
        ray.shutdown()
