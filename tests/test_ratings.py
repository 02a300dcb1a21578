"""Rewards from ratings: the noise ceiling, ratings before preferences, units, refusals."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Steer
from synthetic_preferences import SIDE, images, pairs_of, prompts, random_rows, tensors, tiny_clip, truth

from steer.reward import RewardError
from steer.rewards.analysis import pairwise_agreement
from steer.rewards.learned import RewardTrainingConfig, train_reward
from steer.rewards.parser import load_reward
from steer.rewards.preference_pairs import Pairs, Ratings, read_ratings
from steer.rewards.ratings import train_on_ratings

COUNT, NOISE = 900, 0.5
RECIPE = RewardTrainingConfig(
    backbone="", head="image", objective="rating", steps=250, batch_size=64, learning_rate=3e-3, held_out=0.2
)


def recipe(**changes: Any) -> RewardTrainingConfig:
    return replace(RECIPE, **({"backbone": tiny_clip()} | changes))


def stars(seed: int = 0) -> Ratings:
    """Ratings around 3 with a deviation of one star, plus noise of half a star."""
    noise = torch.randn(COUNT, generator=torch.Generator().manual_seed(seed))
    return Ratings(images(COUNT), prompts(COUNT), 3 + truth(COUNT) + NOISE * noise)


def test_ratings_are_predicted_up_to_their_noise(tmp_path: Path) -> None:
    """R² of the truth itself is 1 − σ²/Var(y) = .8; the score of the reward is in stars."""
    ratings = stars()
    report = train_on_ratings(ratings, recipe(), tmp_path / "r", tmp_path / "work")
    assert report["unit"] == "rating" and report["ratings"]["trained"] == 720
    noise = (ratings.ratings - 3 - truth(COUNT)).var()
    ceiling = 1 - (noise / ratings.ratings.var()).item()
    assert abs(report["ensemble"]["r2"] - ceiling) < 0.05, (report["ensemble"], ceiling)
    assert report["ensemble"]["pearson"] > 0.85 and report["ensemble"]["pair_accuracy"] > 0.75
    scores = load_reward(str(tmp_path / "r"))(tensors(ratings.images[:64]), list(ratings.prompts[:64]))
    assert abs(scores.mean() - (3 + truth(COUNT)[:64]).mean()) < 0.25
    assert torch.corrcoef(torch.stack([scores, truth(COUNT)[:64]]))[0, 1] > 0.9


def preferences(number: int, seed: int) -> Pairs:
    """Preferences between images by the truth, with noise; the strength is 1, 2 or 3."""
    rows, generator = random_rows(COUNT, number, seed), torch.Generator().manual_seed(seed)
    difference = truth(COUNT)[rows[:, 0]] - truth(COUNT)[rows[:, 1]]
    chosen = torch.rand(number, generator=generator) < torch.sigmoid(1.5 * difference)
    return pairs_of(COUNT, rows, chosen, strength=difference.abs().round().clamp(1, 3))


def accuracy(folder: Path) -> float:
    """The share of image pairs that a reward orders as the truth does."""
    scores = load_reward(str(folder))(tensors(images(COUNT)[-300:]), ["x"] * 300)
    return pairwise_agreement(scores, truth(COUNT)[-300:], ["x"] * 300)


@pytest.mark.hard
def test_ratings_then_preferences_are_not_below_either_alone(tmp_path: Path) -> None:
    """HelpSteer2's order, on three seeds: 100 ratings, then 100 pairs; a win or a tie within .01."""
    both, alone = [], []
    for seed in range(3):
        few = recipe(held_out=0.0, steps=100, seed=seed)
        rated, paired, started = (tmp_path / f"{name}-{seed}" for name in ("rated", "paired", "both"))
        train_on_ratings(stars(seed).select(range(100)), few, rated, tmp_path / f"w0-{seed}")
        pairs, bt = preferences(100, seed), replace(few, objective="scaled-bradley-terry")
        train_reward(pairs, bt, paired, tmp_path / f"w1-{seed}")
        train_reward(pairs, replace(bt, start=str(rated), learning_rate=1e-3), started, tmp_path / f"w2-{seed}")
        both.append(accuracy(started))
        alone.append([accuracy(rated), accuracy(paired)])
    means = torch.tensor(alone).mean(0)
    assert sum(both) / 3 >= means.max() - 0.01, (both, alone)


def test_a_start_is_the_trained_reward_itself(tmp_path: Path) -> None:
    ratings, short = stars().select(range(100)), recipe(steps=5)
    train_on_ratings(ratings, short, tmp_path / "r", tmp_path / "work")
    still = replace(short, start=str(tmp_path / "r"), steps=1, learning_rate=1e-12)
    train_on_ratings(ratings, still, tmp_path / "s", tmp_path / "work-2")
    image, first, second = torch.rand(1, 3, SIDE, SIDE), *(load_reward(str(tmp_path / name)) for name in "rs")
    torch.testing.assert_close(first(image, ["x"]), second(image, ["x"]))
    with pytest.raises(RewardError, match=r"a reward with --head image --backbone .*; train with the same"):
        train_on_ratings(ratings, replace(still, head="pair"), tmp_path / "t", tmp_path / "work-3")


def table(folder: Path, *rows: object) -> Path:
    (folder / "a.png").write_bytes(images(COUNT)[0])
    (folder / "ratings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "ratings.jsonl"


RATED = {"image": "a.png", "prompt": "x", "rating": 4}


def test_tables_of_ratings(tmp_path: Path) -> None:
    loaded = read_ratings(table(tmp_path, RATED, RATED | {"rating": None}, RATED | {"rating": 2.5}))
    assert loaded.ratings.tolist() == [4, 2.5] and loaded.prompts == ("x", "x")
    (tmp_path / "stars.csv").write_text('file_name,caption,stars\na.png,"a cat, 2",5\na.png,7,1\n')
    loaded = read_ratings(tmp_path / "stars.csv")
    assert loaded.ratings.tolist() == [5, 1] and loaded.prompts == ("a cat, 2", "7")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image_a": "a.png", "image_b": "a.png", "prompt": "x", "choice": "a"}, "rating needs columns of an image"),
        (RATED | {"rating": "good"}, "row 1: rating must be a number, got 'good'"),
        (RATED | {"image": "gone.png"}, "row 1: 'image' is neither an existing image file nor its bytes"),
        ({"image": "a.png", "prompt": "x", "rating": None}, "needs columns of an image|rating is empty in all 1 rows"),
    ],
)
def test_other_tables_are_refused_in_one_line(tmp_path: Path, row: object, message: str) -> None:
    with pytest.raises(RewardError, match=message) as raised:
        read_ratings(table(tmp_path, row))
    assert "\n" not in str(raised.value)


def test_the_command_trains_on_ratings(tmp_path: Path, steer: Steer) -> None:
    path = table(tmp_path, *(RATED | {"rating": k % 3, "prompt": f"p{k}"} for k in range(12)))
    words = [
        "--objective",
        "rating",
        "--steps",
        2,
        "--batch-size",
        4,
        "--work",
        tmp_path / "work",
        "--backbone",
        tiny_clip(),
    ]
    code, out, err = steer("rewards", "train", path, "--out", tmp_path / "out", *words)
    assert code == 0 and "R² " in out, err
    code, _, err = steer("rewards", "train", path, "--out", tmp_path / "two")
    assert code == 2 and "ratings are read by --objective rating" in err
    code, _, err = steer("rewards", "train", path, "--out", tmp_path / "two", *words, "--head", "general")
    assert code == 2 and "--head general does not learn from ratings" in err
    code, _, err = steer("rewards", "train", path, "--out", tmp_path / "two", *words, "--label-smoothing", 0.1)
    assert code == 2 and "--label-smoothing is not an option of --objective rating" in err
