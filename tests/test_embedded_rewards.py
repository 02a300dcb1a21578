"""The rewards that come with the project: what they know of scenes, and what they do not."""

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from steer.apps.scenes.preferences import composition
from steer.apps.scenes.world import draw, random_scene
from steer.assets import CLIPS, REWARDS
from steer.reward import score, score_components
from steer.rewards.analysis import consistency
from steer.rewards.parser import load_reward

EMBEDDED = ("clip:scenes", "preference:scenes", "aesthetic:scenes")
FRESH = 50_000_000  # scenes from this number on were never trained on


@pytest.fixture(scope="module")
def scenes() -> tuple[Tensor, list[str]]:
    images, prompts = [], []
    for number in range(FRESH, FRESH + 120):
        rng = np.random.default_rng(number)
        scene = random_scene(rng)
        images.append(draw(scene, rng))
        prompts.append(scene.prompt)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255, prompts


@pytest.mark.parametrize("spec", EMBEDDED)
def test_they_load_verified_and_without_a_word(spec: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        load_reward(spec)
    assert not caplog.messages


@pytest.mark.parametrize("spec", EMBEDDED)
def test_gradients_reach_the_pixels(spec: str, scenes: tuple[Tensor, list[str]]) -> None:
    images = scenes[0][:2].clone().requires_grad_()
    reward = load_reward(spec)
    assert reward.differentiable and reward.name == spec
    score(reward, images, scenes[1][:2]).sum().backward()
    assert images.grad is not None and images.grad.abs().amax((1, 2, 3)).min() > 0


def test_plain_open_clip_loads_the_clip(scenes: tuple[Tensor, list[str]]) -> None:
    name = f"local-dir:{CLIPS['scenes']}"
    model, _, _ = open_clip.create_model_and_transforms(name)
    model.eval()
    with torch.no_grad():
        image = model.encode_image((scenes[0][:4] - 0.5) / 0.5, normalize=True)
        text = model.encode_text(open_clip.get_tokenizer(name)(scenes[1][:4]), normalize=True)
        expected = (image * text).sum(-1)
        assert torch.allclose(score(load_reward("clip:scenes"), scenes[0][:4], scenes[1][:4]), expected, atol=1e-5)


def test_the_clip_reads_colours_and_counts_but_hardly_where_things_are(scenes: tuple[Tensor, list[str]]) -> None:
    result = consistency(load_reward("clip:scenes"), *scenes)
    assert result["colour"].share > 0.97
    assert result["binding"].share > 0.85
    assert result["count"].share > 0.8
    assert result["relation"].share < 0.8  # as published ones: what a proxy is blind to


def test_the_preference_reward_prefers_the_right_scene(scenes: tuple[Tensor, list[str]]) -> None:
    images, prompts = scenes
    others = images.roll(1, 0)
    reward = load_reward("preference:scenes")
    right, wrong = score(reward, images, prompts), score(reward, others, prompts)
    assert (right > wrong).float().mean() > 0.9


def test_an_ensemble_is_its_members(scenes: tuple[Tensor, list[str]]) -> None:
    images, prompts = scenes[0][:8], scenes[1][:8]
    worst, components = score_components(load_reward("preference:scenes,aggregate=min"), images, prompts)
    assert list(components) == [f"preference:scenes[{k}]" for k in range(4)]
    assert torch.allclose(worst, torch.stack(list(components.values())).amin(0))
    assert (score(load_reward("preference:scenes"), images, prompts) > worst).all()


def test_the_aesthetic_reward_likes_what_its_annotators_liked(scenes: tuple[Tensor, list[str]]) -> None:
    images, prompts = scenes
    reward = load_reward("aesthetic:scenes")
    scores = score(reward, images, prompts)
    taste = [composition(image.permute(1, 2, 0).numpy()) for image in images]
    assert spearmanr(scores, taste).statistic > 0.4
    assert torch.equal(scores, score(reward, images, prompts[::-1]))  # whatever the prompt says


def test_they_are_small() -> None:
    folders: list[Path] = [CLIPS["scenes"], *(kinds["scenes"] for kinds in REWARDS.values())]
    assert sum(path.stat().st_size for folder in folders for path in folder.iterdir()) < 10e6
