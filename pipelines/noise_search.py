"""Zero-order search over the starting noise (arXiv 2501.09732, "Zero-Order Search"): needs values of a reward only."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steer.arguments import coerced
from steer.errors import InputError
from steer.noise import Search, neighbour, over_rows
from steer.pipelines.method import SteeringMethod
from steer.pipelines.noise_run import Moved, NoiseRun, check_target
from steer.pipelines.noise_to_image import NoiseToImage
from steer.pipelines.output import Iteration, SteeringOutput
from steer.pipelines.population import Population, check_output_type
from steer.seeds import drawn


class NoiseSearchPipeline(SteeringMethod):
    """Noise from whose neighbours the best is taken, again and again; the control of gradient-based optimisation."""

    @coerced
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        num_particles: int = 1,
        iterations: int = 12,
        neighbours: int = 4,
        distance: float = 0.5,
        target: float | None = None,
        state_file: str | Path | None = None,
        chunk_size: int = 8,
        reward_prompt: str | Sequence[str] | None = None,
        on_iteration: Callable[[Iteration], bool | None] | None = None,
        output_type: str = "pil",
        **call: Any,
    ) -> SteeringOutput:
        """Searches the noise of one call; every other argument goes to the pipeline's own `__call__`.

        neighbours  images made in each iteration, of every search
        distance    d of √(1 − d²) ε + d u, above 0 and at most 1; 1 is best-of-N

        The first iteration looks at ε itself. All else is as in `ReNOPipeline`, but for the steps and the guidance: by
        default they are the pipeline's own.
        """
        check_output_type(output_type)
        move = Neighbours(neighbours, distance, target)
        population = Population(self.pipe, self.reward, prompt, num_particles, call, reward_prompt, chunk_size)
        chain = NoiseToImage(population)
        run = NoiseRun(chain, move, Search.start(chain.start), iterations, state_file, on_iteration)
        return run.output(output_type)


@dataclass(frozen=True)
class Neighbours:
    """One iteration: so many neighbours of the best noise so far, and the best of them all kept."""

    count: int = 4
    distance: float = 0.5
    target: float | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_target(self.target)
        if self.count < 1:
            raise InputError(f"neighbours must be at least 1, got {self.count}")
        if not 0 < self.distance <= 1:
            raise InputError(f"distance must be above 0 and at most 1, got {self.distance}")

    def __call__(self, chain: NoiseToImage, search: Search, number: int) -> Moved:
        pivot, candidates = search.best_noise, []
        for place in range(self.count if number else 1):
            u = drawn(chain.seeds, pivot, [f"neighbour {number} {place}"] * len(pivot))
            # A finished search is seen again as it was, while others of its batch go on.
            noise = over_rows(search.finished, pivot, neighbour(pivot, u, self.distance)) if number else pivot
            images = chain.quickly(noise)
            rewards, parts = chain.population.score(images)
            search = replace(search, noise=noise).record(rewards.flatten())
            candidates.append(Moved(images, rewards, parts, noise, search))
        found = best_of(candidates)
        return replace(found, search=found.search.reach(self.target))


def best_of(candidates: Sequence[Moved]) -> Moved:
    """For each image the candidate with the highest reward; the searches of the last."""
    at = torch.stack([one.rewards for one in candidates]).argmax(0)
    rows = range(at.numel())

    def chosen(tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack([tensors[place][row] for row, place in zip(rows, at.flatten().tolist(), strict=True)])

    names = candidates[0].parts
    return Moved(
        chosen([one.images for one in candidates]),
        chosen([one.rewards.flatten() for one in candidates]).view_as(at),
        {name: chosen([one.parts[name].flatten() for one in candidates]).view_as(at) for name in names},
        chosen([one.noise for one in candidates]),
        candidates[-1].search,
    )
