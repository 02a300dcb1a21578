"""Rewards of the hub against published scores: `make test-hub`, with a network. The comparison is tested without."""

import os
from pathlib import Path

import httpx
import pytest
import torch
from published import PIPELINES, PUBLISHED, RANGES, Published, mismatches
from torch import Tensor

from steer.files import read_image
from steer.rewards.parser import score

hub = pytest.mark.skipif(not os.environ.get("STEER_HUB"), reason="needs a network: make test-hub")


def download(url: str) -> Tensor:
    return read_image(httpx.get(url, follow_redirects=True, timeout=60).raise_for_status().content)


@hub
@pytest.mark.parametrize("name", sorted({row.reward for row in PUBLISHED}))
def test_published_scores(name: str) -> None:
    assert mismatches([row for row in PUBLISHED if row.reward == name], download) == []


@hub
@pytest.mark.parametrize("name", RANGES)
def test_rewards_of_the_hub_load_and_score_in_their_range(name: str) -> None:
    low, high = RANGES[name]
    assert low <= score(download(PUBLISHED[0].image), "a photo of a bird", name).item() <= high


@hub
@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_of_each_family_loads_and_is_steered(name: str) -> None:
    from diffusers import DiffusionPipeline

    from steer import BestOfNPipeline

    pipe = DiffusionPipeline.from_pretrained(name)
    out = BestOfNPipeline(pipe, "brightness")("a star", num_particles=2, num_inference_steps=2)
    assert len(out.images) >= 1


def test_the_table_names_a_source_and_a_tolerance_for_each_score() -> None:
    assert {row.reward.partition(":")[0] for row in PUBLISHED} == {"imagereward", "clip"}
    for row in PUBLISHED:
        assert row.source and 0 < row.tolerance < 0.1 * max(1.0, abs(row.value)), row
        assert row.image.startswith("http")


def test_the_comparison_accepts_the_value_and_names_another_one(tmp_path: Path) -> None:
    """On clip:scenes, whose cosine is computed here from its features."""
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    from steer.rewards.clip import load_backbone

    backbone = load_backbone("scenes")
    with torch.no_grad():
        cosine = (backbone.images(image[None]) @ backbone.texts(["a star"]).T).item()
    row = Published("clip:scenes", "a.png", "a star", cosine, 1e-4, "here")
    wrong = Published("clip:scenes", "a.png", "a star", cosine + 0.01, 1e-3, "nowhere")
    assert mismatches([row], lambda _: image) == []
    (line,) = mismatches([row, wrong], lambda _: image)
    assert line.startswith("clip:scenes on a.png, 'a star': ") and line.endswith("± 0.001 (nowhere)")
    absent = Published("clip:scenes", "a.png", "a star", float("nan"), 1e-3, "nan is no match")
    assert len(mismatches([absent], lambda _: image)) == 1
