"""Rewards of users: two planted kinds are distinguished by groups and by latents, new users, refusals."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Steer
from PIL import Image
from synthetic_preferences import images, pairs_of, random_rows, tensors, tiny_clip, truth

from steer.apps.scenes.preferences import png
from steer.apps.scenes.training import training_scenes
from steer.reward import RewardError
from steer.rewards.learned import RewardTrainingConfig, train_reward
from steer.rewards.objectives import PreferenceLabels
from steer.rewards.parser import load_reward
from steer.rewards.preference_pairs import Pairs, write_pairs
from steer.rewards.users import UserReward, train_on_users

COUNT, USERS, EACH = 300, 40, 30
RECIPE = RewardTrainingConfig(backbone="", head="image", steps=250, batch_size=128, learning_rate=3e-3, held_out=0.2)


def recipe(**changes: Any) -> RewardTrainingConfig:
    return replace(RECIPE, **({"backbone": tiny_clip()} | changes))


def opinions(kinds: int = 2) -> Pairs:
    """Pairs of 40 users: those of even number prefer the truth, the others, of two kinds, its opposite."""
    rows = random_rows(COUNT, USERS * EACH, 1)
    users = torch.arange(USERS).repeat_interleave(EACH)
    sign = 1 - 2 * (users % kinds)
    choice = sign * (truth(COUNT)[rows[:, 0]] - truth(COUNT)[rows[:, 1]]) > 0
    return pairs_of(COUNT, rows, choice, [f"u{user}" for user in users.tolist()])


def agreement(reward: Any, sign: int) -> float:
    """The share of 300 new pairs that a reward orders as users of a kind do."""
    scores, rows = reward(tensors(images(COUNT)), ["a picture 1"] * COUNT), random_rows(COUNT, 300, 9)
    difference, true = (column[rows[:, 0]] - column[rows[:, 1]] for column in (scores, sign * truth(COUNT)))
    return ((difference > 0) == (true > 0)).float().mean().item()


def newcomer(folder: Path, sign: int, number: int = 10) -> Path:
    """A file of a few pairs of a user who is not among the 40."""
    rows = random_rows(COUNT, number, 7)
    choice = sign * (truth(COUNT)[rows[:, 0]] - truth(COUNT)[rows[:, 1]]) > 0
    write_pairs(folder / f"new{sign}.parquet", pairs_of(COUNT, rows, choice))
    return folder / f"new{sign}.parquet"


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("groups")
    return folder / "r", train_on_users(opinions(), recipe(), "groups", 2, folder / "r", folder / "work")


def test_two_kinds_of_users_are_distinguished(groups: tuple[Path, dict[str, Any]]) -> None:
    """The mean user has no preference, each user's weights are right on unseen prompts, and they show the kind."""
    folder, report = groups
    assert report["ensemble"]["accuracy"] >= 0.9 and report["shared"]["accuracy"] <= 0.7, report
    profiles = UserReward(str(folder)).profiles.argmax(1).tolist()
    common = [Counter(profiles[kind::2]).most_common(1)[0] for kind in (0, 1)]
    assert sum(count for _, count in common) / USERS >= 0.95 and common[0][0] != common[1][0]
    assert agreement(load_reward(f"preference:{folder},user=u0"), 1) >= 0.85
    assert agreement(load_reward(f"preference:{folder},user=u1"), -1) >= 0.85


def test_one_reward_for_all_does_not_fit_two_kinds(tmp_path: Path) -> None:
    report = train_reward(opinions(), recipe(), tmp_path / "bt", tmp_path / "work")
    assert report["ensemble"]["accuracy"] <= 0.6


def test_a_new_user_with_ten_pairs(groups: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, _ = groups
    for sign in (1, -1):
        assert agreement(load_reward(f"preference:{folder},like={newcomer(tmp_path, sign)}"), sign) >= 0.85
    reward = UserReward(str(folder))
    empty = torch.zeros(0, 16)
    prior = reward._net.prior(reward.profiles)
    torch.testing.assert_close(reward._net.fit(prior, empty, empty, empty, torch.zeros(0)), prior, atol=0.01, rtol=0)


def test_the_minimum_over_groups_is_that_of_both(groups: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = groups
    batch, texts = tensors(images(COUNT)[:6]), ["a picture 1"] * 6
    least = load_reward(f"preference:{folder},aggregate=min")
    single = UserReward(str(folder))
    scores = []
    for one in torch.eye(2):
        single.profile = one[None]
        scores.append(single(batch, texts))
    torch.testing.assert_close(least(batch, texts), torch.minimum(*scores))
    image = batch.clone().requires_grad_(True)
    least(image, texts).sum().backward()
    assert image.grad is not None and image.grad.abs().max() > 0


@pytest.mark.hard
def test_one_kind_of_users_is_learned_as_by_one_reward(tmp_path: Path) -> None:
    report = train_on_users(opinions(1), recipe(), "groups", 3, tmp_path / "r", tmp_path / "work")
    one = train_reward(opinions(1), recipe(), tmp_path / "bt", tmp_path / "work-bt")
    assert report["ensemble"]["accuracy"] >= one["ensemble"]["accuracy"] - 0.04


@pytest.mark.hard
def test_latent_vectors_tell_users_apart(tmp_path: Path) -> None:
    report = train_on_users(opinions(), recipe(steps=400), "latent", 4, tmp_path / "r", tmp_path / "work")
    assert report["ensemble"]["accuracy"] >= 0.85 and report["shared"]["accuracy"] <= 0.7, report
    for sign in (1, -1):
        assert agreement(load_reward(f"preference:{tmp_path / 'r'},like={newcomer(tmp_path, sign)}"), sign) >= 0.8


def test_what_does_not_fit_is_refused(groups: tuple[Path, dict[str, Any]], tmp_path: Path, steer: Steer) -> None:
    folder, _ = groups
    for options, message in (
        ("user=nobody", "no user 'nobody' among its 40: u0, u1"),
        ("user=u0,aggregate=min", "give one of user, like and aggregate"),
        ("aggregate=max", "groups have min and mean"),
        ("member=1", "cannot take member"),
    ):
        with pytest.raises(RewardError, match=message):
            load_reward(f"preference:{folder},{options}")
    for pairs, config, size, message in (
        (replace(opinions(), users=()), recipe(), 2, "need a column user for every pair; all of 1200 pairs have none"),
        (opinions(), recipe(members=2), 2, "leave out --members"),
        (opinions(), recipe(), 1, "--groups must be from 2 to 1000, got 1"),
    ):
        with pytest.raises(RewardError, match=message):
            train_on_users(pairs, config, "groups", size, tmp_path / "x", tmp_path / "work")
    card = json.loads((folder / "reward.json").read_text())
    (tmp_path / "reward.json").write_text(json.dumps(card | {"std": 0}))
    with pytest.raises(RewardError, match="not the card of a reward of users"):
        load_reward(str(tmp_path))
    write_pairs(tmp_path / "pairs.parquet", opinions().select(range(40)))
    words = ["--steps", 2, "--backbone", tiny_clip(), "--work", tmp_path / "w", "--out", tmp_path / "out"]
    code, out, err = steer("rewards", "train", tmp_path / "pairs.parquet", "--groups", 2, *words)
    assert code == 0 and "accuracy of the mean user" in out, err
    code, _, err = steer("rewards", "train", tmp_path / "pairs.parquet", "--groups", 2, "--latent", 2, *words)
    assert code == 2 and "give one of them" in err
    for more, message in (
        (["--groups", 2, "--head", "image"], "--head"),
        (["--features", "jpeg", "--steps", 3], "--steps"),
    ):
        code, _, err = steer("rewards", "train", tmp_path / "pairs.parquet", "--out", tmp_path / "out", *more)
        assert code == 2 and f"{message} is not an option of --" in err


@pytest.mark.hard
def test_two_kinds_of_users_of_scenes_are_distinguished(tmp_path: Path) -> None:
    """On drawn scenes and the embedded CLIP: half of 40 users prefer red objects to blue ones, half the reverse."""
    drawn, texts = training_scenes(300)
    files = [png(Image.fromarray(image)) for image in drawn.permute(0, 2, 3, 1).numpy()]
    value, rows = torch.tensor([("red" in text) - ("blue" in text) for text in texts]), random_rows(300, 3000, 1)
    rows = rows[value[rows[:, 0]] != value[rows[:, 1]]][:800]
    users = torch.arange(USERS).repeat_interleave(20)
    choice = (1 - 2 * (users % 2)) * (value[rows[:, 0]] - value[rows[:, 1]]) > 0
    a, b = (tuple(files[k] for k in column) for column in rows.T.tolist())
    prompts = tuple(f"scene {k % 20}" for k in range(800))
    pairs = Pairs(a, b, prompts, PreferenceLabels(choice.float(), torch.ones(800)), tuple(map(str, users.tolist())))
    report = train_on_users(pairs, recipe(backbone="scenes"), "groups", 2, tmp_path / "r", tmp_path / "work")
    profiles = UserReward(str(tmp_path / "r")).profiles.argmax(1)
    assert report["ensemble"]["accuracy"] >= 0.85, report["ensemble"]["accuracy"]
    assert (profiles[::2] == profiles[0]).float().mean() >= 0.95 and (
        profiles[1::2] != profiles[0]
    ).float().mean() >= 0.95
