"""MAP-Elites over the starting noise: many good images that differ in chosen ways (Mouret, Clune, arXiv 1504.04909).

The archive of a prompt has a cell for each interval of one or two descriptors (any rewards, or the first principal axes
of the CLIP features of the first images; after TAXONS, arXiv 1909.05508), with the best image there, its elite. A child
is a neighbour of an elite, √(1 − d²) ε + d u, and replaces the elite of its own cell where its reward is higher. Its
parent is drawn among the cells that had the fewest children, so that new cells come first (as in SERENE, arXiv
2102.03140), or, with probability ¼, is the best elite, so that the best reward keeps up with a noise search.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from steer.diffusion.seeds import derived_seed, seeded_normal
from steer.errors import InputError
from steer.noise import Search, neighbour
from steer.pipelines.base import Elites, SteeringOutput, SteeringPipeline, steering_call
from steer.pipelines.particle_batch import ParticleBatch
from steer.pipelines.reno import IterationResult, NoiseRun, NoiseToImage, best_of
from steer.pipelines.settings import MapElitesSettings, Prompts
from steer.reward import score
from steer.rewards.clip import DEFAULT_CLIP, load_backbone
from steer.rewards.grammar import COMMA, split
from steer.rewards.parser import load_reward
from steer.rewards.weights import to_module_device

PCA = "pca"  # in `describe`: principal axes of CLIP features
SPAN = 3.5  # the cells divide this many deviations of a descriptor on each side of its mean over the first images
SIDE = 64  # pixels of an elite's picture
BEST_PARENT = 0.25  # share of the children whose parent is the best elite


class MapElitesPipeline(SteeringPipeline):
    """MAP-Elites over the starting noise of a pipeline: the best images of different cells.

    out = MapElitesPipeline(pipe, "scene-soft")("a star", num_particles=8, describe="brightness, colour:red")
    """

    @steering_call(MapElitesSettings)
    def __call__(self, prompt: Prompts, settings: MapElitesSettings, call: dict[str, Any]) -> SteeringOutput:
        """Fill the archive of each prompt; all other arguments go to the pipeline's own `__call__`.

        Every iteration makes K children. The images are the elites of the K cells of highest reward; where fewer are
        filled, the best elite is repeated. Output and errors are as in `ReNOPipeline`.
        """
        s = settings
        shape = s.shape
        names, describe = load_descriptors(s.describe, s.cells, len(shape))
        particle_batch = ParticleBatch(
            self.pipe, self.reward, prompt, s.num_particles, call, s.reward_prompt, s.chunk_size
        )
        if len(particle_batch.prompts) * s.first_batches < 2:
            raise InputError("first_batches: 1 first image has no spread to divide into cells: give at least 2")
        generate = NoiseToImage(particle_batch)
        rule = MapElites(describe, names, shape, s.distance, s.first_batches, s.target_reward)
        search = Archive.empty(generate.start, len(particle_batch.prompts) // s.num_particles, shape).stored_in(
            Search.start(generate.start)
        )
        run = NoiseRun(generate, rule, search, s.iterations, s.state_file, s.on_iteration)
        out, archive = run.output(s.output_type), Archive.of(run.search)
        elites = Elites(archive.pictures, archive.rewards, names, shape, archive.low, archive.high)
        return replace(out, elites=elites)


Describe = Callable[[Tensor, Sequence[str]], Tensor]  # features (N, F) of images and prompts


def load_descriptors(text: str, cells: str, count: int) -> tuple[tuple[str, ...], Describe]:
    """Return the names and the function of `count` descriptors: rewards, or pca[:CLIP], the features of a CLIP.

    Raises InputError where rewards and `cells` do not fit each other.
    """
    kind, _, model = text.partition(":")
    if kind == PCA:
        backbone = load_backbone(model or DEFAULT_CLIP).eval()
        names = tuple(f"{text} axis {number + 1}" for number in range(count))
        return names, lambda images, prompts: backbone.images(to_module_device(_frames(images), backbone))
    rewards = [load_reward(name) for name in split(text, COMMA)]
    if len(rewards) != count:
        raise InputError(f"cells {cells!r} are of {count} descriptors, describe names {len(rewards)}")
    names = tuple(reward.name for reward in rewards)
    return names, lambda images, prompts: torch.stack([score(one, images, prompts).cpu() for one in rewards], 1)


def _frames(images: Tensor) -> Tensor:
    """Return images (N, 3, H, W), or the middle frames of videos (N, F, 3, H, W)."""
    return images[:, images.shape[1] // 2] if images.ndim == 5 else images


def pictures_of(images: Tensor) -> Tensor:
    """Scale images (N, 3, H, W), or the middle frames of videos (N, F, 3, H, W), to (N, 3, 64, 64) of 8 bits."""
    small = F.interpolate(_frames(images).float().nan_to_num().clamp(0, 1), (SIDE, SIDE), mode="area")
    return (small * 255).round().byte().cpu()


@dataclass(frozen=True)
class Archive:
    """Elites of B prompts over C cells: noise (B, C, …), rewards (B, C), −∞ where a cell is empty; and the intervals.

    pictures   (B, C, 3, 64, 64) of 8 bits
    children   (B, C) number of children made from the elites of a cell
    low, high  (D,) ends of the range of each descriptor, NaN before the first images
    axes       (F, D), from F features to the descriptors; the identity where the descriptors are rewards
    """

    noise: Tensor
    rewards: Tensor
    pictures: Tensor
    children: Tensor
    low: Tensor
    high: Tensor
    axes: Tensor

    @classmethod
    def empty(cls, like: Tensor, prompts: int, shape: Sequence[int]) -> "Archive":
        """Return an archive without elites, for noise shaped like (N, …)."""
        count, unknown = math.prod(shape), torch.full((len(shape),), math.nan)
        noise = like.new_zeros(prompts, count, *like.shape[1:])
        rewards = torch.full((prompts, count), -torch.inf)
        pictures = torch.zeros(prompts, count, 3, SIDE, SIDE, dtype=torch.uint8)
        return cls(noise, rewards, pictures, torch.zeros_like(rewards), unknown, unknown.clone(), torch.eye(len(shape)))

    @classmethod
    def of(cls, search: Search) -> "Archive":
        """Return the archive in the state of a search."""
        state = search.state
        rewards, pictures, children = (state[name].cpu() for name in ("elite_rewards", "pictures", "children"))
        return cls(state["elites"], rewards, pictures, children, state["low"], state["high"], state["axes"].cpu())

    def stored_in(self, search: Search) -> Search:
        """Return a search with the archive in its state, so that its checkpoint contains the archive."""
        state = {"elites": self.noise, "elite_rewards": self.rewards, "pictures": self.pictures}
        state |= {"children": self.children, "low": self.low, "high": self.high, "axes": self.axes}
        return replace(search, state=state)

    @property
    def filled(self) -> Tensor:
        """Return whether each cell has an elite (B, C)."""
        return self.rewards > -torch.inf

    def spanning(self, features: Tensor) -> "Archive":
        """Return an archive whose cells divide mean ± SPAN deviations of the descriptors of features (N, F).

        The descriptors are the features themselves if there are D, else their first D principal components.
        """
        axes = self.axes
        if features.shape[1] != len(self.low):
            directions = torch.linalg.eigh(torch.cov(features.T, correction=0)).eigenvectors
            axes = directions[:, -len(self.low) :].flip(1)  # eigenvalues ascend
        described = features @ axes
        mean, std = described.mean(0), described.std(0).clamp(min=1e-6)
        return replace(self, low=mean - SPAN * std, high=mean + SPAN * std, axes=axes)

    def cells(self, features: Tensor, shape: Sequence[int]) -> Tensor:
        """Return the cell (N,) of features (N, F); values outside belong to the outer cells."""
        described = features @ self.axes
        number = torch.zeros(len(described), dtype=torch.long)
        for column, size in enumerate(shape):
            share = (described[:, column] - self.low[column]) / (self.high[column] - self.low[column])
            number = number * size + (share * size).long().clamp(0, size - 1)
        return number

    def with_children(self, noise: Tensor, images: Tensor, rewards: Tensor, cells: Tensor) -> "Archive":
        """Return the archive with children, noise and images (B·K, …), in place of the elites with lower reward."""
        elites, best, per_prompt = self.noise.clone(), self.rewards.clone(), len(noise) // len(self.noise)
        pictures, own = self.pictures.clone(), pictures_of(images)
        for row, (value, cell) in enumerate(zip(rewards.tolist(), cells.tolist(), strict=True)):
            prompt = row // per_prompt
            if value > best[prompt, cell]:
                best[prompt, cell], elites[prompt, cell], pictures[prompt, cell] = value, noise[row], own[row]
        return replace(self, noise=elites, rewards=best, pictures=pictures)

    def parents(self, seeds: Sequence[int], stream: str) -> tuple[Tensor, "Archive"]:
        """Draw a parent per row, the elite of a cell with the fewest children or the best; return noise and counts."""
        per_prompt, chosen, children = len(seeds) // len(self.noise), [], self.children.clone()
        for row, seed in enumerate(seeds):
            prompt = row // per_prompt
            counts = children[prompt].masked_fill(~self.filled[prompt], torch.inf)
            least = (counts == counts.min()).nonzero()[:, 0]
            generator = Generator().manual_seed(derived_seed(seed, f"{stream} {row}"))
            cell = least[int(torch.randint(len(least), (1,), generator=generator))]
            if torch.rand(1, generator=generator) < BEST_PARENT:
                cell = self.rewards[prompt].argmax()
            children[prompt, cell] += 1
            chosen.append(self.noise[prompt, cell])
        return torch.stack(chosen), replace(self, children=children)

    def top(self, count: int) -> tuple[Tensor, Tensor]:
        """Return noise (B·K, …) and rewards (B·K,) of each prompt's best `count` elites, repeated if too few."""
        order = self.rewards.argsort(1, descending=True)
        order = torch.cat([order, order[:, :1].expand(-1, max(count - order.shape[1], 0))], 1)[:, :count]
        rewards = self.rewards.gather(1, order)
        order = torch.where(rewards > -torch.inf, order, order[:, :1])
        rows = torch.arange(len(order))[:, None]
        return self.noise[rows, order].flatten(0, 1), self.rewards.gather(1, order).flatten()


@dataclass(frozen=True)
class MapElites:
    """One iteration: a child of an elite for each row; the first iteration evaluates `first` batches of new noise.

    describe  function to the features of images, from which the D descriptors are computed
    names     names of the descriptors, by which a state file identifies them
    shape     number of intervals of each descriptor; the cells are all combinations
    distance  d, from an elite's noise to its child's
    first     batches of new noise in the first iteration
    target    reward at which a search is finished
    """

    describe: Describe = field(repr=False)
    names: tuple[str, ...]
    shape: tuple[int, ...]
    distance: float = 0.5
    first: int = 4
    target: float | None = field(default=None, repr=False)

    def __call__(self, generate: NoiseToImage, search: Search, number: int) -> IterationResult:
        """Evaluate children, update the archive, and keep its best elites as the best of the search."""
        archive, seeds = Archive.of(search), generate.seeds
        results, described = [], []
        for place in range(1 if number else self.first):
            if number:
                parents, archive = archive.parents(seeds, f"parent {number}")
                u = seeded_normal(seeds, parents, [f"child {number} {row}" for row in range(len(seeds))])
                noise = neighbour(parents, u, self.distance)
            else:
                streams = [f"first {place} {row}" for row in range(len(seeds))]
                noise = seeded_normal(seeds, generate.start, streams) if place else generate.start
            images = generate.fast_images(noise)
            rewards, components = generate.particle_batch.score(images)
            with torch.no_grad():
                described.append(self.describe(images, generate.particle_batch.prompts).cpu().float())
            results.append(IterationResult(images, rewards, components, noise, search))
        if not number:
            archive = archive.spanning(torch.cat(described))
        for result, values in zip(results, described, strict=True):
            cells = archive.cells(values, self.shape)
            archive = archive.with_children(result.noise, result.images, result.rewards.flatten(), cells)
        noise, best = archive.top(len(seeds) // len(archive.noise))
        updated = replace(
            archive.stored_in(search), noise=noise, best_noise=noise.clone(), best_rewards=best, peak=best.clone()
        )
        return replace(best_of(results), search=updated.finish_at_target(self.target))
