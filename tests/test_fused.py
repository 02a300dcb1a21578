"""fused(REWARD): the mean over wordings by hand, invariance, gradients, files that are refused, contrasts of scenes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from steer import load_reward, score, score_components
from steer.apps.reward_specs import only_named_rewards
from steer.apps.scenes.world import captions, draw, random_scene
from steer.reward import RewardError
from steer.rewards.analysis import contrasts
from steer.rewards.fused import FusedReward, read_paraphrases, scene_wordings
from steer.rewards.scene import parse
from steer.training.overoptimization import interval

VALUES = {"a dog": 1.0, "a hound": 2.0, "ein Hund": 6.0, "a cat": 5.0}


def worded(images: Tensor, prompts: Sequence[str], metadata: Any = None) -> Tensor:
    extra = [row["extra"] for row in metadata] if metadata else [0.0] * len(prompts)
    return images.mean((1, 2, 3)) * torch.tensor([VALUES[p] for p in prompts]) + torch.tensor(extra)


worded.differentiable = True  # type: ignore[attr-defined]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a dog", "paraphrases": ["a hound", "ein Hund"]}) + "\n")
    return tmp_path / "p.jsonl"


def test_the_mean_over_wordings_by_hand_and_the_same_for_each(table: Path) -> None:
    reward = FusedReward(load_reward(worded), read_paraphrases(table))
    images = torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    scores = score(images, ["a dog", "ein Hund", "a hound", "a cat"], reward)
    torch.testing.assert_close(scores, images.mean((1, 2, 3)) * torch.tensor([3.0, 3, 3, 5]))
    same = score(images[:1].expand(3, -1, -1, -1), ["a dog", "ein Hund", "a hound"], reward)
    assert len(set(same.tolist())) == 1 and reward.differentiable
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    torch.testing.assert_close(gradient[0], torch.full((3, 4, 4), 3 / 48))
    rows = [{"extra": 1.0}, {"extra": 2.0}]
    given, plain = (score(images[:2], ["a dog", "a cat"], reward, one) for one in (rows, None))
    torch.testing.assert_close(given - plain, torch.tensor([1.0, 2.0]))


def test_wordings_of_scenes_mean_the_same() -> None:
    assert scene_wordings("a red star below a circle") == ("a circle above a red star", "a red star below a circle")
    assert set(scene_wordings("two blue stars and a cross")) == {
        "a cross and two blue stars",
        "two blue stars and a cross",
    }
    assert scene_wordings("A photo of three red circles.") == ("three red circles",)
    rng = np.random.default_rng(0)
    for _ in range(100):
        prompt = captions(random_scene(rng))[0]
        assert {parse(one).canonical for one in scene_wordings(prompt)} == {parse(prompt).canonical}


def test_from_text_with_components_and_in_functions(table: Path) -> None:
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    texts = ["a red star left of a blue cross", "a blue cross right of a red star"]
    reward = load_reward("min(fused(preference:scenes), jpeg)")
    _, components = score_components(images, texts, reward)
    own = [score(images, [text] * 2, "preference:scenes") for text in texts]
    torch.testing.assert_close(components["fused(preference:scenes)"], (own[0] + own[1]) / 2, atol=1e-5, rtol=1e-5)
    assert load_reward(f"fused(brightness, paraphrases={table})").name == f"fused(brightness, paraphrases={table})"
    assert only_named_rewards("fused(brightness)") and not only_named_rewards(f"fused(jpeg, paraphrases={table})")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            '{"prompt": "a", "paraphrases": ["b"]}\n{"prompt": "c", "paraphrases": ["a"]}',
            "row 2: 'a' is in an earlier row",
        ),
        ('{"prompt": "a", "paraphrases": "b"}', r'row 1: expected \{"prompt": TEXT'),
        ('{"prompt": "a", "paraphrases": [" "]}', r'row 1: expected \{"prompt": TEXT'),
        ("", "no rows in this file"),
    ],
)
def test_other_files_are_refused_in_one_line(rows: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(rows)
    with pytest.raises(RewardError, match=message) as caught:
        load_reward(f"fused(brightness, paraphrases={tmp_path}/p.jsonl)")
    assert "\n" not in str(caught.value)


def test_a_prompt_without_known_wordings_is_refused_by_name() -> None:
    with pytest.raises(RewardError, match=r"no other wordings of 'a dog' are known: give them, fused\(REWARD, para"):
        score(torch.rand(1, 3, 8, 8), "a dog", "fused(brightness)")
    with pytest.raises(RewardError, match="takes one reward, got 2"):
        load_reward("fused(brightness, jpeg)")


@pytest.mark.hard
def test_fusing_wordings_finds_more_contrasts() -> None:
    """On 200 right images the 95 % bootstrap interval of the paired difference is above 0: .044 [.004, .085]."""
    plain, fused = contrast_shares(["clip:scenes", "fused(clip:scenes)"], 200)
    mean, low, _ = interval(fused - plain)
    assert low > 0 and mean < 0.2


def contrast_shares(rewards: Sequence[str], count: int) -> Tensor:
    """Share of contrasts below the prompt (rewards, images) on right images of two kinds of objects."""
    rng, images, prompts = np.random.default_rng(1), list[Tensor](), list[str]()
    while len(prompts) < count:
        scene = random_scene(rng)
        two = [text for text in captions(scene) if len(parse(text).phrases) == 2 and contrasts(text)]
        if two:
            prompts.append(two[int(rng.integers(len(two)))])
            images.append(torch.from_numpy(draw(scene, rng)).permute(2, 0, 1).float() / 255)
    rows = [row for row, prompt in enumerate(prompts) for _ in contrasts(prompt)]
    wrong = [one.prompt for prompt in prompts for one in contrasts(prompt)]
    batch, shares = torch.stack(images), []
    for text in rewards:
        reward = load_reward(text)
        with torch.no_grad():
            right = score(batch, prompts, reward)[rows]
            better = (right > score(batch[rows], wrong, reward)).double()
        shares.append(torch.zeros(count, dtype=torch.float64).index_add(0, torch.tensor(rows), better))
    return torch.stack(shares) / torch.bincount(torch.tensor(rows))
