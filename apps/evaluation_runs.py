"""The runs of one contender: images of groups of prompts, judged by all rewards, and what is kept of them."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from steer.apps.evaluation_contest import APART, Contest, Entrant, Together
from steer.apps.evaluation_store import Json, Store, Stored
from steer.apps.finetune_grids import thumbnail
from steer.apps.methods import METHODS
from steer.apps.named_errors import errors_named, named
from steer.frames import over_frames
from steer.pipelines import Cost, SteeringOutput
from steer.pipelines.held_out import diversity
from steer.pipelines.method import route_eta
from steer.reward import Reward, score_parts

SCORED = 8  # images scored at a time


@dataclass
class Bench:
    """Where one contender makes its images.

    pipe     the pipeline that wears what it wears
    batch    images made at a time, where the method can
    shown    places of the prompts whose images are kept for the grid
    """

    contest: Contest
    entrant: Entrant
    store: Store
    pipe: Any
    batch: int
    shown: Collection[int]
    _picked: dict[int, list[Tensor]] = field(default_factory=dict)

    def make(self, group: range, stored: Stored) -> None:
        """Makes the images of a group of prompts, all seeds, and adds what is known of them to `stored`.

        A run is {"seed", "rewards": by name those of the K images, as the method gives them: best first, but of
        `base`, which picks none; "stopped": why it ended before its time; "cost": its share of that of its call}.
        """
        todo = [(place, number) for place in group for number in range(self.contest.seeds)]
        size, self._picked = self._together(), {place: [] for place in group}
        runs: dict[int, list[Json]] = {place: [] for place in group}
        for start in range(0, len(todo), size):
            some = todo[start : start + size]
            for (place, _), run in zip(some, self._called(some), strict=True):
                runs[place].append(run)
        stored.runs |= runs
        for place, images in self._picked.items():
            stored.diversity[place] = diversity(torch.stack(images), len(images)) if len(images) > 1 else None
        self.store.keep_images(self._name, self._pictures())

    @property
    def _name(self) -> str:
        return self.entrant.contender.name

    def _together(self) -> int:
        """Runs in one call. Where η is the seam's own, the noise of the steps is shared by the runs of a call."""
        own_noise = route_eta(self.pipe, {}, self.entrant.settings.eta)[1] is None
        apart = self.entrant.contender.method in APART and own_noise
        return max(1, self.batch // self.entrant.particles) if apart else 1

    def _called(self, some: Sequence[tuple[int, int]]) -> Iterator[Json]:
        """One call of the method, and its runs one by one."""
        contest = self.contest
        prompts, seeds = [contest.prompts[n] for n, _ in some], tuple(contest.seed_of(n, s) for n, s in some)
        reward, file = contest.rewards[contest.first], self.store.search(self._name, *some[0])
        job = Together(self.pipe, reward, prompts, self.entrant.settings, file, seeds=seeds)
        with blamed(f"{self._name}, prompt {prompts[0]!r}"):
            output = METHODS[self.entrant.contender.method].run(job)
            scores = {contest.first: output.rewards} | self._judged(output, prompts)
        file.unlink(missing_ok=True)
        flags = output.nsfw_content_detected
        size = output.rewards.shape[1]  # fewer than there were particles, where they got fewer
        for row, (place, _) in enumerate(some):
            self._picked[place].append(output.images[row * size].detach().float().cpu().clamp(0, 1))
            yield {
                "seed": seeds[row],
                "rewards": {name: values[row].tolist() for name, values in scores.items()},
                "stopped": output.stopped,
                **({} if flags is None else {"nsfw_content_detected": flags[row].tolist()}),
                "cost": {what: spent / len(some) for what, spent in asdict(output.cost).items()},
            }

    def _judged(self, output: SteeringOutput, prompts: Sequence[str]) -> dict[str, Tensor]:
        """What the other rewards say of the finished images: (B, K) each."""
        size = output.rewards.shape[1]
        read = [prompt for prompt in prompts for _ in range(size)]
        others = [name for name in self.contest.rewards if name != self.contest.first]
        return {name: judged(self.contest.rewards[name], output.images, read).view(-1, size) for name in others}

    def _pictures(self) -> Iterator[tuple[int, Image.Image]]:
        for place in set(self._picked) & set(self.shown):
            yield place, thumbnail(self._picked[place][0])


@torch.no_grad()
def judged(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Scores (N,) of images (N, 3, H, W), or of videos (N, F, 3, H, W)."""
    found = []
    for start in range(0, len(images), SCORED):
        cut = slice(start, start + SCORED)
        score: Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]] = partial(score_parts, reward, prompts=prompts[cut])
        found.append(over_frames(images[cut].float().clamp(0, 1), score)[0])
    return torch.cat(found)


@contextmanager
def blamed(whose: str) -> Iterator[None]:
    """Whatever ends a contender says whose it is."""
    less = "a smaller --batch or fewer --particles need less"
    with errors_named(whose, "finished prompts are kept", less), named(whose):
        yield


def missing(entrant: Entrant, stored: Stored, contest: Contest, batch: int) -> list[range]:
    """The groups of prompts that are not whole yet."""
    return [group for group in entrant.groups(contest, batch) if not all(place in stored.runs for place in group)]


def mean_cost(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of one run, as `Cost` has it; older runs count nothing of what is younger."""
    return {cost.name: sum(run["cost"].get(cost.name, 0) for run in runs) / len(runs) for cost in fields(Cost)}
