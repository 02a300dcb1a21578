"""Prompts that are cut: a warning once for each, wherever a tokenizer reads less than there is."""

from typing import Any

import pytest
import torch
from conftest import cached_pipe
from diffusers import StableDiffusionPipeline

from steer import BestOfNPipeline
from steer.assets import MODELS
from steer.reward import score, warn_if_pipeline_truncates, warn_if_truncated
from steer.rewards.analysis import check_reward
from steer.rewards.parser import load_reward

LONG = "a red circle and " * 30


@pytest.fixture(autouse=True)
def forgotten() -> None:
    warn_if_truncated.cache_clear()


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "steer.reward"]


def test_a_prompt_that_the_pipeline_cuts_is_warned_about_once(caplog: pytest.LogCaptureFixture) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(MODELS["scenes"])
    pipe.set_progress_bar_config(disable=True)
    method, limit = BestOfNPipeline(pipe, "brightness"), pipe.tokenizer.model_max_length
    tokens = len(pipe.tokenizer(LONG).input_ids)
    assert tokens > limit
    for _ in range(2):
        method([LONG, "a star"], num_particles=1, num_inference_steps=1, negative_prompt=["", ""])
    (line,) = told(caplog)
    assert line.startswith(f"steer: tokenizer of StableDiffusionPipeline truncates prompts to {limit} tokens")
    assert f"has {tokens}" in line
    assert repr(LONG)[:50] in line and len(line.splitlines()) == 1
    warn_if_pipeline_truncates(pipe, [LONG + "b"], {})
    assert len(told(caplog)) == 2, "another prompt"


def test_every_tokenizer_has_its_own_limit(caplog: pytest.LogCaptureFixture) -> None:
    pipe = cached_pipe("sd3")
    for length in (16, 500):
        warn_if_truncated.cache_clear()
        caplog.clear()
        warn_if_pipeline_truncates(pipe, [LONG], {"max_sequence_length": length})
        own = pipe.tokenizer.model_max_length
        by_tokenizer = {line.split()[1]: int(line.split("reads ")[1].split()[0]) for line in told(caplog)}
        expected = {"tokenizer": own, "tokenizer_2": own} | ({"tokenizer_3": 16} if length == 16 else {})
        assert by_tokenizer == expected


@pytest.mark.parametrize("name", ["clip:scenes", "preference:scenes", "brightness + clip:scenes"])
def test_a_prompt_that_a_reward_cuts_is_warned_about_once(name: str, caplog: pytest.LogCaptureFixture) -> None:
    reward: Any = load_reward(name)
    images, limit = torch.rand(2, 3, 64, 64), reward.prompt_limit
    for _ in range(2):
        score(reward, images, [LONG, "a star"])
    (line,) = told(caplog)
    assert f"to {limit} tokens" in line and "reward " in line
    cut = score(reward, images[:1], [LONG]) - score(reward, images[:1], [LONG + " three blue stars"])
    assert cut.abs().max() < 1e-6
    finding = next(one for one in check_reward(reward, images, ["a star", "a circle"]) if one.name == "prompt limit")
    assert finding.passed is None and f"reads {limit} tokens of a prompt" in finding.detail


def test_a_reward_without_a_limit_says_that_none_is_known() -> None:
    found = check_reward(load_reward("brightness"), torch.rand(2, 3, 8, 8), ["a", "b"])
    assert "no limit is known" in next(one for one in found if one.name == "prompt limit").detail
