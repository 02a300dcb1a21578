"""MAP-Elites: the archive by hand, cells filled against random search, a rare reward, resuming, the picture."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Steer
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from steer import MODELS, MapElitesPipeline
from steer.errors import InputError
from steer.noise import Search
from steer.pipelines.map_elites import Archive, MapElites
from steer.pipelines.reno import Neighbours
from steer.pipelines.settings import MapElitesSettings


class Chain:
    """Images of one pixel, which is the noise; the reward is a function of it."""

    def __init__(self, reward: Any, rows: int, seed: int, prompts: int = 1) -> None:
        self.start = torch.randn(rows, 3, 1, 1, generator=torch.Generator().manual_seed(seed))
        self.seeds, self.particle_batch, self.reward = tuple(range(seed * 100, seed * 100 + rows)), self, reward
        self.prompts, self.calls = ["x"] * rows, 0
        self.groups = prompts

    def fast_images(self, noise: Tensor) -> Tensor:
        self.calls += len(noise)
        return noise

    def score(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.reward(images).view(self.groups, -1), {}


def run(rule: MapElites, chain: Any, iterations: int) -> Archive:
    search = Archive.empty(chain.start, chain.groups, rule.shape).stored_in(Search.start(chain.start))
    for number in range(iterations):
        search = rule(chain, search, number).search
    return Archive.of(search)


def rule(**changes: Any) -> MapElites:
    def describe(images: Tensor, prompts: Any) -> Tensor:
        return images[:, :2, 0, 0]

    return replace(MapElites(describe, ("first", "second"), (8, 8)), **changes)


def flat(images: Tensor) -> Tensor:
    return -images[:, 2, 0, 0].abs()


def test_the_archive_by_hand() -> None:
    archive = Archive.empty(torch.zeros(2, 1), 1, (2, 3))
    archive = replace(archive, low=torch.tensor([0.0, 0.0]), high=torch.tensor([1.0, 1.0]))
    described = torch.tensor([[0.2, 0.1], [0.9, 0.5], [-7.0, 9.0], [0.5, 1.0]])
    cells = archive.cells(described, (2, 3))
    assert cells.tolist() == [0, 4, 2, 5]
    noise, rewards = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([1.0, 5.0, 2.0])
    images = torch.tensor([0.2, 0.4, 0.6])[:, None, None, None].expand(-1, 3, 32, 16)
    archive = archive.with_children(noise, images, rewards, torch.tensor([0, 4, 0]))
    assert archive.pictures[0, :, 2, 63, 63].tolist() == [153, 0, 0, 0, 102, 0]
    assert archive.filled.sum() == 2 and archive.noise[0, [0, 4], 0].tolist() == [3, 2]
    kept, best = archive.top(3)
    assert kept[:, 0].tolist() == [2, 3, 2] and best.tolist() == [5, 2, 5]  # the best is repeated
    parents, archive = archive.parents(range(50), "s")
    assert parents[:, 0].tolist().count(2) == 25 and archive.children[0].tolist() == [25, 0, 0, 0, 25, 0]
    crowded = replace(archive, children=torch.tensor([[0.0, 0, 0, 0, 9999, 0]]))  # the best elite has had most children
    assert 150 < crowded.parents(range(800), "s")[0][:, 0].tolist().count(2) < 250


@pytest.mark.hard
def test_more_cells_are_filled_than_by_random_search_at_equal_evaluations() -> None:
    """320 evaluations each, eight runs; distance 1 makes every child independent of its parent: random search."""
    filled, best = {0.5: [], 1.0: []}, {0.5: [], 1.0: []}  # type: ignore[var-annotated]
    for seed in range(8):
        for distance in filled:
            chain = Chain(flat, 8, seed)
            archive = run(rule(distance=distance), chain, 37)
            assert chain.calls == 320
            filled[distance].append(float(archive.filled.sum()))
            best[distance].append(archive.rewards.max().item())
    gain = torch.tensor(filled[0.5]) - torch.tensor(filled[1.0])
    assert gain.mean() > 1.96 * gain.std() / 8**0.5, filled
    assert sum(best[0.5]) / 8 > -0.1


def near(images: Tensor) -> Tensor:
    return -(images[:, :, 0, 0] - torch.tensor([1.0, -0.5, 1.5])).square().sum(1)


def rugged(images: Tensor) -> Tensor:
    return (4 * images[:, :, 0, 0]).cos().sum(1) - (images[:, 2, 0, 0] - 1.5).square()


@pytest.mark.hard
@pytest.mark.parametrize("reward", [flat, near, rugged])
def test_the_best_reward_is_not_below_that_of_noise_search_at_equal_evaluations(reward: Any) -> None:
    """328 evaluations each, sixteen runs: no loss outside its 95 % interval."""
    gain = torch.zeros(16)
    for seed in range(16):
        ours, other = Chain(reward, 8, seed), Chain(reward, 8, seed)
        best, search = run(rule(), ours, 38).rewards.max(), Search.start(other.start)
        for number in range(11):
            search = Neighbours()(other, search, number).search  # type: ignore[arg-type]
        assert ours.calls == other.calls == 328
        gain[seed] = best - search.best_rewards.max()
    assert gain.mean() >= -1.96 * gain.std() / 16**0.5, gain


def test_principal_axes_describe_images() -> None:
    """Five features, two of which vary more: the cells are those of these two, up to signs."""
    scales, generator = torch.tensor([0.1, 5.0, 0.1, 2.0, 0.1]), torch.Generator().manual_seed(0)
    features = 3 + scales * torch.randn(500, 5, generator=generator)
    empty = Archive.empty(torch.zeros(1, 1), 1, (4, 4))
    archive = empty.spanning(features)
    signs = archive.axes[[1, 3], [0, 1]].sign()
    assert archive.axes.shape == (5, 2) and archive.axes[[1, 3], [0, 1]].abs().min() > 0.99
    both = features[:, [1, 3]] * signs
    same = archive.cells(features, (4, 4)) == empty.spanning(both).cells(both, (4, 4))
    assert same.float().mean() > 0.95


@pytest.mark.hard
def test_a_reward_that_one_cell_pays_is_found() -> None:
    """Both descriptors must be above 2.3: 1 in 9,000 draws. At least three times as often as by random search."""
    successes = {0.5: 0, 1.0: 0}
    for seed in range(24):
        for distance in successes:
            chain = Chain(lambda images: ((images[:, :2, 0, 0] > 2.3).all(1)).float(), 8, seed)
            successes[distance] += bool(run(rule(distance=distance), chain, 57).rewards.max() == 1)
    assert successes[0.5] >= 3 * max(successes[1.0], 1), successes


def test_prompts_have_archives_of_their_own() -> None:
    chain = Chain(lambda images: torch.arange(8.0), 8, 1, prompts=2)
    archive = run(rule(), chain, 5)
    assert archive.rewards[0].max() == 3 and archive.rewards[1][archive.filled[1]].min() >= 4


@pytest.fixture(scope="module")
def pipe() -> Any:
    made = StableDiffusionPipeline.from_pretrained(MODELS["scenes"])
    made.set_progress_bar_config(disable=True)
    return made


CALL: dict[str, Any] = {"num_particles": 2, "num_inference_steps": 1, "first_batches": 2, "cells": "3x2"}


@pytest.mark.few(1)
def test_a_pipeline_returns_elites_of_different_cells_and_resumes(pipe: Any, tmp_path: Path) -> None:
    search = MapElitesPipeline(pipe, "brightness")

    def call(iterations: int, **more: Any) -> Any:
        generator = torch.Generator().manual_seed(0)
        return search("a star", iterations=iterations, generator=generator, output_type="pt", **CALL, **more)

    whole, state = call(3), tmp_path / "search.safetensors"
    call(2, state_file=state)
    resumed = call(3, state_file=state)
    assert torch.equal(whole.images, resumed.images) and whole.rewards.shape == (1, 2)
    assert whole.rewards[0, 0] > whole.rewards[0, 1]
    elites = whole.elites
    assert elites.names == ("brightness", "jpeg") and elites.shape == (3, 2) and elites.rewards.shape == (1, 6)
    assert torch.equal(elites.pictures, resumed.elites.pictures)
    best = elites.pictures[0, elites.rewards[0].argmax()].float() / 255
    torch.testing.assert_close(best, whole.images[0].float(), atol=2 / 255, rtol=0)
    torch.testing.assert_close(whole.trace[-1].best.sort(descending=True).values, whole.rewards, atol=1e-4, rtol=0)
    axes = search("a star", iterations=2, describe="pca:scenes", output_type="pt", **CALL).elites
    assert axes.names == ("pca:scenes axis 1", "pca:scenes axis 2") and axes.rewards.isfinite().sum() > 1
    with pytest.raises(InputError, match="first_batches: 1 first image has no spread"):
        search("a star", **CALL | {"num_particles": 1, "first_batches": 1})
    with pytest.raises(InputError, match="cells '8' are of 1 descriptors, describe names 2"):
        search("a star", cells="8")
    with pytest.raises(InputError, match="cells must be a number such as 8, or two such as 8x8"):
        MapElitesSettings(cells="8x8x8")


def test_the_command_draws_the_archive(steer: Steer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every filled cell is drawn at its place, and the report has its reward."""
    drawn: list[tuple[int, int, float]] = []
    monkeypatch.setattr(
        "steer.apps.archives.Canvas.cell",
        lambda self, picture, rewards, left, top, *size: drawn.append((left, top, rewards[0])),
    )
    words = ["sample", "a star", "--method", "map-elites", "--particles", 2, "--cells", "3x2", "--steps", 1]
    words += ["--iterations", 2, "--first-batches", 2, "--reward", "brightness", "--no-compare", "--out", tmp_path]
    code, _, err = steer(*words)
    assert code == 0, err
    archive = json.loads((tmp_path / "report.json").read_text())["prompts"][0]["archive"]
    assert archive["describe"] == ["brightness", "jpeg"] and archive["cells"] == [3, 2]
    filled = {cell: value for cell, value in enumerate(archive["rewards"]) if value is not None}
    places = sorted({left for left, _, _ in drawn}), sorted({top for _, top, _ in drawn})
    assert len(archive["rewards"]) == 6 and len(drawn) >= len(filled) >= 1
    cells = drawn[: len(filled)]
    assert [value for _, _, value in cells] == list(filled.values()) and all(places)
    assert Image.open(tmp_path / archive["image"]).width > 2 * 96
    values = torch.tensor([archive["low"], archive["high"]])
    assert bool((values[0] < values[1]).all())
