"""Preference strength and cleaning: planted flips are detected, retraining gains, tables and refusals."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Steer
from synthetic_preferences import images, pairs_of, random_rows, tensors, tiny_clip, truth
from torch import Tensor

from steer.reward import RewardError
from steer.rewards.learned import RewardTrainingConfig, train_reward
from steer.rewards.objectives import PreferenceLabels, bradley_terry, margin
from steer.rewards.parser import load_reward
from steer.rewards.preference_pairs import Pairs, read_pairs
from steer.rewards.strength import FLIPPED, KEPT, Strengths, clean, measure_strength

COUNT = 500
RECIPE = RewardTrainingConfig(
    backbone="", head="image", members=2, steps=150, batch_size=64, learning_rate=3e-3, held_out=0.0
)


def recipe(**changes: Any) -> RewardTrainingConfig:
    return replace(RECIPE, **({"backbone": tiny_clip()} | changes))


def decided(number: int, seed: int) -> Tensor:
    """Pairs whose truth differs by more than half a deviation."""
    rows = random_rows(COUNT, 3 * number, seed)
    return rows[(truth(COUNT)[rows[:, 0]] - truth(COUNT)[rows[:, 1]]).abs() > 0.5][:number]


def labelled(rows: Tensor, flipped: Tensor | None = None) -> Pairs:
    choice = truth(COUNT)[rows[:, 0]] > truth(COUNT)[rows[:, 1]]
    return pairs_of(COUNT, rows, choice if flipped is None else choice ^ flipped)


def rightness(folder: Path, rows: Tensor) -> Tensor:
    """1 for each pair that a reward orders as the truth does."""
    scores = load_reward(str(folder))(tensors(images(COUNT)), ["x"] * COUNT)
    guessed, true = (column[rows[:, 0]] > column[rows[:, 1]] for column in (scores, truth(COUNT)))
    return (guessed == true).double()


@pytest.mark.hard
def test_planted_flips_are_detected_and_cleaning_does_no_harm(tmp_path: Path) -> None:
    """A fifth of the labels is wrong: .8 of the flipped ones were. The retrained reward is level (no gain measured)."""
    rows, unseen = decided(250, 1), random_rows(COUNT, 800, 2)
    wrong = torch.rand(250, generator=torch.Generator().manual_seed(3)) < 0.2
    pairs = labelled(rows, wrong)
    strengths = measure_strength(pairs, recipe(), 3, tmp_path / "work")
    cleaned, changes = clean(pairs, strengths, flip=0.15, soften=0.1)
    flipped = torch.tensor([change == FLIPPED for change in changes])
    assert wrong[flipped].float().mean() >= 0.8 and flipped.sum() >= 25
    assert torch.equal(cleaned.labels.choice[flipped], 1 - pairs.labels.choice[flipped])
    right = {}
    arms: dict[str, tuple[Pairs, dict[str, Any]]] = {
        "plain": (pairs, {}),
        "noise": (pairs, {"label_noise": 0.2}),
        "cleaned": (cleaned, {}),
    }
    for name, (table, changed) in arms.items():
        train_reward(table, recipe(members=1, steps=300, **changed), tmp_path / name, tmp_path / f"work-{name}")
        right[name] = rightness(tmp_path / name, unseen)
    means = {name: one.mean().item() for name, one in right.items()}
    assert means["cleaned"] >= max(means["plain"], means["noise"]) - 0.02, means


@pytest.mark.hard
@pytest.mark.parametrize("seed", [11, 61, 71])
def test_right_labels_stay(seed: int, tmp_path: Path) -> None:
    """No wrong labels planted: none is flipped, and so many stay that training on them is level with plain."""
    pairs = labelled(decided(250, seed))
    cleaned, changes = clean(pairs, measure_strength(pairs, recipe(), 3, tmp_path / "work"))
    assert FLIPPED not in changes and changes.count(KEPT) >= 248
    assert (cleaned.labels.choice - pairs.labels.choice).abs().max() < 0.5


def test_the_bands_by_hand() -> None:
    choice = torch.tensor([1.0, 1, 0, 0.5, 1])
    pairs = pairs_of(COUNT, random_rows(COUNT, 5, 0), choice)
    differences = torch.tensor([[-2.0, 3, 1, -9, 0.5], [-4, 1, 1, -9, 0.5]])
    cleaned, changes = clean(pairs, Strengths(differences), flip=0.25, soften=0.25)
    # Agreements: −3, 2, −1, a tie, .5. The first is flipped, the third becomes σ(1).
    assert changes == ["flipped", "kept", "softened", "kept", "kept"]
    expected = torch.tensor([0, 1, torch.sigmoid(torch.tensor(1.0)), 0.5, 1])
    torch.testing.assert_close(cleaned.labels.choice, expected)
    torch.testing.assert_close(cleaned.labels.strength, torch.tensor([3.0, 2, 1, 9, 0.5]))
    agreed = Strengths(differences.abs() * (2 * choice - 1))
    assert set(clean(pairs, agreed, flip=1.0, soften=0.0)[1]) == {"kept"}
    with pytest.raises(RewardError, match="shares from 0 to 1, together at most 1"):
        clean(pairs, agreed, flip=0.9, soften=0.2)


def test_the_margin_by_hand() -> None:
    """At a strength of 0 it is Bradley–Terry; else −log σ(Δ − s) for the preferred side."""
    difference, choice = torch.tensor([1.0, -2.0]), torch.tensor([1.0, 0.0])
    none = PreferenceLabels(choice, torch.zeros(2))
    torch.testing.assert_close(margin(difference, none), bradley_terry(difference, none))
    strong = margin(difference, PreferenceLabels(choice, torch.tensor([0.5, 1.5])))
    torch.testing.assert_close(strong, -torch.sigmoid(torch.tensor([0.5, 0.5])).log().mean())


def test_the_command_writes_pairs_that_are_read(tmp_path: Path, steer: Steer) -> None:
    for number, image in enumerate(images(COUNT)[:8]):
        (tmp_path / f"{number}.png").write_bytes(image)
    rows = [
        {"image_a": f"{k % 8}.png", "image_b": f"{(k + 3) % 8}.png", "prompt": "x", "choice": "ab"[k % 2]}
        for k in range(12)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row | {"user": "ada"}) + "\n" for row in rows))
    words = ["--work", tmp_path / "work", "--backbone", tiny_clip(), "--steps", 3, "--batch-size", 4, "--folds", 2]
    out = tmp_path / "sub" / "cleaned.jsonl"
    (tmp_path / "sub").mkdir()
    code, printed, err = steer("rewards", "strength", tmp_path / "pairs.jsonl", "--out", out, *words)
    assert code == 0 and "of 12 labels flipped" in printed, err
    read = read_pairs(out)
    assert len(read) == 12 and read.users == ("ada",) * 12 and out.with_suffix(".png").exists()
    assert set(json.loads(out.read_text().splitlines()[0])) >= {"strength", "spread", "change"}
    code, _, err = steer("rewards", "strength", tmp_path / "pairs.jsonl", "--out", out, "--head", "similarity")
    assert code == 2 and "strength is measured by heads on a frozen CLIP" in err
