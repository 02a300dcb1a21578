"""Counts become pairs: the posterior against draws, exposure is no merit, the triplet loss, the command."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Steer
from synthetic_preferences import images, tensors, tiny_clip, truth

from steer.errors import InputError
from steer.reward import RewardError
from steer.rewards.counts import pairs_of_counts, probability_better, read_counts
from steer.rewards.learned import RewardTrainingConfig, train_reward
from steer.rewards.objectives import PreferenceLabels, triplet
from steer.rewards.parser import load_reward
from steer.rewards.preference_pairs import Captions, Pairs, read_pairs

COUNT = 400


def test_the_probability_is_that_of_draws_from_both_posteriors() -> None:
    rng = np.random.default_rng(0)
    for (shown_a, liked_a), (shown_b, liked_b) in (((10, 3), (200, 50)), ((1, 0), (0, 0)), ((5000, 900), (4000, 600))):
        a = rng.beta(0.5 + liked_a, 0.5 + shown_a - liked_a, 200_000)
        b = rng.beta(0.5 + liked_b, 0.5 + shown_b - liked_b, 200_000)
        assert probability_better((shown_a, liked_a), (shown_b, liked_b)) == pytest.approx((a > b).mean(), abs=0.005)
    assert probability_better((10, 3), (10, 3)) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.hard
def test_a_reward_of_posteriors_beats_one_of_raw_likes(tmp_path: Path) -> None:
    """Better images are shown less often, so that their likes are fewer: only the posterior corrects for it."""
    rng, value = np.random.default_rng(1), truth(COUNT)
    liked_share = torch.sigmoid(value).numpy()
    rank = value.argsort().argsort().numpy() / COUNT
    shown = np.exp(np.log(500) - rank * np.log(100) + rng.normal(0, 0.3, COUNT)).round() + 1
    liked = rng.binomial(shown.astype(int), liked_share).astype(float)
    captions = Captions(images(COUNT), tuple(f"a picture {k % 25}" for k in range(COUNT)))
    counts = list(zip(shown.tolist(), liked.tolist(), strict=True))
    posterior = pairs_of_counts(captions, counts)
    raw = pairs_of_counts(captions, counts, certainty=0.0)
    likes = dict(zip(captions.images, liked.tolist(), strict=True))
    choice = torch.tensor([float(likes[a] > likes[b]) for a, b in zip(raw.a, raw.b, strict=True)])  # type: ignore[index]
    naive = replace(raw, labels=PreferenceLabels(choice, torch.ones(len(raw))))
    config = RewardTrainingConfig(tiny_clip(), head="image", steps=150, learning_rate=3e-3, held_out=0.0)
    right = {}
    for name, pairs in (("posterior", posterior), ("raw", naive)):
        train_reward(pairs, config, tmp_path / name, tmp_path / f"work-{name}")
        scores = load_reward(str(tmp_path / name))(tensors(images(COUNT)), ["x"] * COUNT)
        right[name] = ((scores[::2] > scores[1::2]) == (value[::2] > value[1::2])).double()
    gain = right["posterior"] - right["raw"]
    assert gain.mean() > 1.96 * gain.std() / len(gain) ** 0.5, {name: one.mean() for name, one in right.items()}


def test_the_triplet_loss_by_hand() -> None:
    """relu(.3 − 2 Δ) of a clear, a near and a swapped pair; a tie does not count."""
    difference, choice = torch.tensor([0.5, 0.1, 0.1, 9.0]), torch.tensor([1.0, 1.0, 0.0, 0.5])
    expected = torch.tensor((0.0 + 0.1 + 0.5) / 3)
    torch.testing.assert_close(triplet(difference, PreferenceLabels(choice, torch.ones(4))), expected)
    expected = torch.tensor((0.2 + 1.0 + 1.4) / 3)
    torch.testing.assert_close(triplet(difference, PreferenceLabels(choice, torch.ones(4)), 1.2), expected)


@pytest.mark.hard
def test_triplets_train_a_similarity(tmp_path: Path) -> None:
    value = truth(COUNT)
    pairs = Pairs(
        images(COUNT)[:100:2],
        images(COUNT)[1:100:2],
        ("a picture",) * 50,
        PreferenceLabels((value[:100:2] > value[1:100:2]).float(), torch.ones(50)),
    )
    config = RewardTrainingConfig(
        tiny_clip(), "similarity", "triplet", True, steps=40, batch_size=32, learning_rate=3e-3, held_out=0.0
    )
    report = train_reward(pairs, config, tmp_path / "r", tmp_path / "work")
    assert report["ensemble"]["accuracy"] > 0.8
    wide = replace(config, margin=5.0)  # above 2 Δcos: every pair has a loss
    assert train_reward(pairs, wide, tmp_path / "w", tmp_path / "work-w")["ensemble"] != report["ensemble"]
    for wrong, message in (
        ({"margin": 0.0}, "margin must be above 0"),
        ({"margin": 0.3, "objective": "margin"}, "alone"),
    ):
        with pytest.raises(InputError, match=message):
            replace(config, **wrong)
    with pytest.raises(RewardError, match="compares cosines: add --head similarity"):
        train_reward(pairs, replace(config, head="pair"), tmp_path / "p", tmp_path / "work-p")


def test_the_command_writes_pairs(tmp_path: Path, steer: Steer) -> None:
    for number, image in enumerate(images(3)):
        (tmp_path / f"{number}.png").write_bytes(image)
    rows = [{"image": f"{k}.png", "prompt": "x", "shown": 100, "liked": (90, 10, 11)[k]} for k in range(3)]
    (tmp_path / "counts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = steer("rewards", "counts", tmp_path / "counts.jsonl", "--out", tmp_path / "pairs.jsonl")
    assert code == 0 and "2 pairs" in out, err
    choice = read_pairs(tmp_path / "pairs.jsonl").labels.choice
    assert len(choice) == 2 and (choice > 0.99).all()  # 0 before 1 and 2, and 1 against 2 is not certain
    (tmp_path / "counts.jsonl").write_text(json.dumps(rows[0] | {"liked": 101}) + "\n")
    with pytest.raises(RewardError, match="row 1: shown and liked must be counts, liked at most shown"):
        read_counts(tmp_path / "counts.jsonl")
    with pytest.raises(RewardError, match=r"no two images of a prompt differ with \|P − ½\| of at least 0.3"):
        pairs_of_counts(Captions(images(2), ("x", "x")), [(9, 3), (9, 3)])
    with pytest.raises(RewardError, match="no weights are public: give social:path=FILE"):
        load_reward("social")
