"""All noise searches of one call, from iteration to iteration: what they share, whatever moves them."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from steer.errors import InputError
from steer.noise import Search, norms
from steer.particles import Particles
from steer.pipelines.noise_to_image import NoiseToImage
from steer.pipelines.output import Iteration, Start, SteeringOutput
from steer.pipelines.search_file import SearchFile
from steer.reward import RewardError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Moved:
    """One iteration: images (B·K, 3, H, W), rewards (B, K) and parts at `noise` (B·K, …), the searches after it, and
    why they can go no further, if so."""

    images: Tensor
    rewards: Tensor
    parts: Mapping[str, Tensor]
    noise: Tensor
    search: Search
    stopped: str | None = None


class Move(Protocol):
    """What a method does in one iteration; its text tells all of its settings but the target."""

    @property
    def target(self) -> float | None: ...

    def __call__(self, chain: NoiseToImage, search: Search, number: int) -> Moved: ...


def check_target(target: float | None) -> None:
    """Raises InputError for one that no reward reaches, or all do."""
    if target is not None and not math.isfinite(target):
        raise InputError(f"target must be finite, got {target}")


class NoiseRun:
    """A run to the last iteration, the end of all searches, an observer's word or a failure.

    A reward that fails in the first iteration raises its RewardError; later the best so far is kept. Raises
    InputError for a number of iterations below 1, and for the state file of another run.
    """

    def __init__(
        self,
        chain: NoiseToImage,
        move: Move,
        search: Search,
        iterations: int,
        state_file: str | Path | None = None,
        observer: Callable[[Iteration], bool | None] | None = None,
    ) -> None:
        if iterations < 1:
            raise InputError(f"iterations must be at least 1, got {iterations}")
        self.chain, self.move, self.iterations, self.observer = chain, move, iterations, observer
        # A search that was finished stays where it is: another target is another run.
        aim = {} if move.target is None else {"target": move.target}
        self.file = SearchFile(state_file, {"move": str(move), **chain.about(), **aim})
        self.search, self.trace = self.file.load(chain.start.device, iterations) or (search, [])
        self.stopped: str | None = None

    def _iterate(self, number: int) -> bool:
        """One iteration; true where the run ends with it."""
        try:
            moved = self.move(self.chain, self.search, number)
        except RewardError as error:
            if number == 0:
                raise
            self.stopped = f"{error} (iteration {number})"
            return True
        self.search, self.stopped, shape = moved.search, moved.stopped, moved.rewards.shape
        lengths, best = norms(moved.noise).cpu().view(shape), self.search.best_rewards.view(shape)
        self.trace.append(Iteration(number, self.iterations, moved.rewards, moved.parts, lengths, best))
        if self.stopped:
            return True
        self.file.save(self.search, self.trace)
        return bool(self.observer and self.observer(replace(self.trace[-1], images=moved.images)))

    def output(self, output_type: str) -> SteeringOutput:
        """Iterates to the end; the best iterate of each search, drawn once more by the plain pipeline."""
        population = self.chain.population
        for number in population.pipe.progress_bar(range(len(self.trace), self.iterations)):
            if self.search.finished.all() or self._iterate(number):
                break
        if self.stopped:
            logger.warning("%s; the best so far is returned", self.stopped)
        noise = self.search.best_noise.to(self.chain.dtype)
        images = self.chain(noise)
        rewards, parts = self._scores_of_the_best() if self.stopped else population.score(images)
        out = population.output(images, rewards, parts, Particles.start(*rewards.shape), output_type=output_type)
        start = Start(noise, tuple(self.chain.seeds)).rows(population.rows(out.order).tolist())
        return replace(out, start=start, trace=tuple(self.trace), stopped=self.stopped)

    def _scores_of_the_best(self) -> tuple[Tensor, dict[str, Tensor]]:
        """As they were in the trace: a reward that failed is not asked again."""
        at = torch.stack([one.rewards for one in self.trace]).argmax(0, keepdim=True)
        names = self.trace[0].parts
        parts = {name: torch.stack([one.parts[name] for one in self.trace]).gather(0, at)[0] for name in names}
        return self.trace[-1].best, parts
