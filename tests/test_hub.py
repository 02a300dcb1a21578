"""Rewards of the hub against published scores: `make test-hub`, with a network. The comparison is tested without."""

import os
import re
from pathlib import Path
from typing import Any

import families
import httpx
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    ControlNetModel,
    DiffusionPipeline,
    StableDiffusionControlNetPipeline,
)
from published import CONTROLNET, PIPELINES, PUBLISHED, RANGES, Published, mismatches
from torch import Tensor
from torchvision.utils import save_image

from steer import BestOfNPipeline
from steer.files import read_image
from steer.rewards import FACTS
from steer.rewards.aesthetic import PREDICTORS
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
def test_rewards_of_the_hub_load_and_score_in_their_range(name: str, tmp_path: Path) -> None:
    image, (low, high) = download(PUBLISHED[0].image), RANGES[name]
    save_image(image, tmp_path / "image.png")
    given: Any = ["a photo of a bird"] if name.startswith("perplexity") else image
    assert low <= score(given, "a photo of a bird", name.replace("IMAGE", str(tmp_path / "image.png"))).item() <= high


def images_of_a_cheap_call(pipe: DiffusionPipeline, family: str) -> int:
    """The number of images, or of frames, of best-of-2."""
    pipe.set_progress_bar_config(disable=True)
    best = BestOfNPipeline(pipe, "brightness")
    return len(best("a star", num_particles=2, num_inference_steps=2, **PIPELINES[family][1]).images)


@hub
@pytest.mark.parametrize("family", PIPELINES)
def test_a_pipeline_of_each_family_loads_and_is_steered(family: str) -> None:
    pipe = DiffusionPipeline.from_pretrained(PIPELINES[family][0])
    if family == "controlnet":
        net = ControlNetModel.from_pretrained(CONTROLNET)
        pipe = StableDiffusionControlNetPipeline.from_pipe(pipe, controlnet=net)
    elif family == "img2img":
        pipe = AutoPipelineForImage2Image.from_pipe(pipe)
    assert type(pipe) is type(families.cached_pipe(family))
    assert images_of_a_cheap_call(pipe, family) == 2


@pytest.mark.few(2)
@pytest.mark.parametrize("family", PIPELINES)
def test_the_cheap_call_fits_the_family(family: str) -> None:
    assert images_of_a_cheap_call(families.cached_pipe(family), family) == 2


def test_every_reward_of_a_hub_and_every_family_is_in_the_tables() -> None:
    """All rewards whose facts name the hub or the web as the source of their weights, and each published version."""
    listed = {name.partition(":")[0] for name in (*RANGES, *(row.reward for row in PUBLISHED))}
    assert listed == {name for name, facts in FACTS.items() if re.search(r"\b(hub|web)\b", facts.needs)}
    assert {f"aesthetic:{version}" for version in PREDICTORS} <= set(RANGES)
    assert set(PIPELINES) == set(families.PIPELINES)
    for row in PUBLISHED:
        assert row.source and 0 < row.tolerance < 0.1 * max(1.0, abs(row.value)), row
        assert row.image.startswith("http")
    assert all(low < high for low, high in RANGES.values())


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
