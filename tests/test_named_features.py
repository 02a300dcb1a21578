"""Rewards over named features: planted weights from 300 pairs, signs, intervals, networks, refusals."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from synthetic_preferences import images, pairs_of, random_rows, tensors, tiny_clip
from torch import Tensor

from steer.apps.scenes.preferences import png
from steer.apps.scenes.training import training_scenes
from steer.reward import RewardError, score_components
from steer.rewards.learned import RewardTrainingConfig, train_reward
from steer.rewards.named_features import FeatureConfig, fit_weights, train_on_features
from steer.rewards.objectives import PreferenceLabels
from steer.rewards.parser import load_reward
from steer.rewards.preference_pairs import Pairs

NAMES = "brightness, colour:red, colour:blue, jpeg"
COUNT, FREE = 400, [(None, None)] * 2
PLANTED = torch.tensor([1.0, 2.0, 0.0, -1.0])


def z() -> Tensor:
    """The features, standardised over all images: (N, 4)."""
    batch = tensors(images(COUNT))
    values = torch.stack([load_reward(name)(batch, [""] * COUNT) for name in NAMES.split(", ")], 1)
    return (values - values.mean(0)) / values.std(0)


def pairs(number: int, seed: int, flips: float) -> Pairs:
    rows, values = random_rows(COUNT, number, seed), z() @ PLANTED
    choice = values[rows[:, 0]] > values[rows[:, 1]]
    flipped = torch.rand(number, generator=torch.Generator().manual_seed(seed)) < flips
    return pairs_of(COUNT, rows, choice ^ flipped)


def rightness(reward: Any, unseen: Pairs) -> Tensor:
    a, b = (reward(tensors(side), list(unseen.prompts)) for side in (unseen.a, unseen.b))
    return ((a > b) == unseen.labels.choice.bool()).double()


@pytest.mark.hard
def test_300_pairs_with_a_tenth_flipped_give_the_weights(tmp_path: Path) -> None:
    """The direction of the planted weights; more right than a head on CLIP features of the same pairs."""
    few, unseen = pairs(300, 1, 0.1), pairs(300, 2, 0.0)
    report = train_on_features(few, FeatureConfig(NAMES, held_out=0.0), tmp_path / "r", tmp_path / "work")
    reward = load_reward(f"preference:{tmp_path / 'r'}")
    weights = torch.tensor([*report["weights"].values()])
    assert torch.cosine_similarity(weights, PLANTED, 0) >= 0.98, weights
    assert list(report["weights"]) == NAMES.split(", ")
    card = json.loads((tmp_path / "r" / "reward.json").read_text())
    assert all(low <= weight <= high for (low, high), weight in zip(card["intervals"], weights.tolist(), strict=True))
    assert card["intervals"][1][0] > 0 > card["intervals"][3][1]
    head = RewardTrainingConfig(tiny_clip(), steps=150, learning_rate=3e-3, held_out=0.0)
    train_reward(few, head, tmp_path / "head", tmp_path / "work-head")
    gain = rightness(reward, unseen) - rightness(load_reward(str(tmp_path / "head")), unseen)
    assert gain.mean() > 1.96 * gain.std() / len(gain) ** 0.5


def test_the_components_add_up_and_the_weights_are_those_of_logistic_regression(tmp_path: Path) -> None:
    train_on_features(pairs(60, 3, 0.1), FeatureConfig("brightness, jpeg"), tmp_path / "r", tmp_path / "work")
    reward = load_reward(str(tmp_path / "r"))
    total, components = score_components(reward, tensors(images(COUNT)[:5]), ["x"] * 5)
    scale = json.loads((tmp_path / "r" / "reward.json").read_text())["scale"]
    torch.testing.assert_close(total, sum(components.values()) / scale)  # type: ignore[arg-type]
    assert list(components) == ["brightness", "jpeg"] and not reward.differentiable
    # One feature, difference ±1, three of four for a: σ(w) = 3/4 without a penalty.
    choice = torch.tensor([1.0, 1, 1, 0])
    assert fit_weights(torch.ones(4, 1), choice, FREE[:1], 0.0).item() == pytest.approx(
        torch.tensor(3.0).log().item(), 1e-4
    )


def test_signs_bound_the_weights(tmp_path: Path) -> None:
    config = FeatureConfig("brightness, colour:red, jpeg", signs="- ? +")
    report = train_on_features(pairs(100, 4, 0.0), config, tmp_path / "r", tmp_path / "work")
    brightness, red, jpeg = report["weights"].values()
    assert brightness <= 0 < red and jpeg == 0


def test_a_network_learns_what_no_weights_can(tmp_path: Path) -> None:
    """Preferred is the medium brightness; the reward is differentiable as its feature is."""
    rows, values = random_rows(COUNT, 300, 5), -z()[:, 0].abs()
    data = pairs_of(COUNT, rows, values[rows[:, 0]] > values[rows[:, 1]])
    right = {}
    for hidden in (0, 8):
        config = FeatureConfig("brightness", hidden=hidden, held_out=0.2)
        folder = tmp_path / f"r{hidden}"
        right[hidden] = train_on_features(data, config, folder, tmp_path / "work")["ensemble"]["accuracy"]
    assert right[0] < 0.65 and right[8] > 0.85
    image = tensors(images(COUNT)[:2]).requires_grad_(True)
    reward = load_reward(str(tmp_path / "r8"))
    reward(image, ["x"] * 2).sum().backward()
    assert reward.differentiable and image.grad is not None and image.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": "brightness, "}, "name 1 to 100 rewards, separated by ', '"),
        ({"features": "brightnes"}, "did you mean brightness"),
        ({"features": "os:system"}, "'os:system' is not a named reward"),
        ({"signs": "+"}, "give . - or . for each of 2 features"),
        ({"signs": "+ +", "hidden": 4}, "leave out --hidden"),
        ({"hidden": -1}, "--hidden must be from 0 to 1024, got -1"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    config = FeatureConfig(**({"features": "brightness, jpeg"} | changes))
    with pytest.raises(RewardError, match=message):
        train_on_features(pairs(20, 6, 0.0), config, tmp_path / "r", tmp_path / "work")


def test_scores_are_kept_for_one_reward_alone(tmp_path: Path) -> None:
    """Two folders of one name, and a folder that is trained again, are other features."""
    few, made = pairs(40, 7, 0.0), dict[str, list[float]]()
    for folder, reverse in (("a/r", False), ("b/r", True), ("a/r", True)):
        choice = 1 - few.labels.choice if reverse else few.labels.choice
        data = replace(few, labels=replace(few.labels, choice=choice))
        train_on_features(data, FeatureConfig("brightness, jpeg"), tmp_path / folder, tmp_path / "work")
        config = FeatureConfig(f"preference:{tmp_path / folder}", held_out=0.0)
        report = train_on_features(few, config, tmp_path / "r", tmp_path / "work")
        made.setdefault(folder, []).extend(report["weights"].values())
    assert made["a/r"][0] > 0 > made["b/r"][0] == made["a/r"][1]


def test_a_forged_card_is_refused(tmp_path: Path) -> None:
    card = {
        "features": ["os:system"],
        "means": [0],
        "stds": [1],
        "weights": [1],
        "intervals": [],
        "scale": 1,
        "hidden": 0,
    }
    for changes, message in (
        ({}, "'os:system' is not a named reward"),
        ({"features": [f"preference:{tmp_path}"]}, "contain themselves"),
        ({"stds": [0]}, "not the card of a reward over named features"),
        ({"extra": 1}, "cannot be read"),
    ):
        (tmp_path / "reward.json").write_text(json.dumps(card | {"kind": "features"} | changes))
        with pytest.raises(RewardError, match=message):
            load_reward(str(tmp_path))


SCENE_NAMES = "clip:scenes, brightness, jpeg"


def scene_features(count: int, names: str, prompt: str = "a red circle") -> tuple[list[bytes], Tensor]:
    """PNG files of drawn scenes, and standardised rewards of them: (N, F)."""
    drawn, _ = training_scenes(count)
    values = torch.stack([load_reward(name)(drawn, [prompt] * count).detach() for name in names.split(", ")], 1)
    files = [png(Image.fromarray(image)) for image in drawn.permute(0, 2, 3, 1).numpy()]
    return files, (values - values.mean(0)) / values.std(0)


def scene_pairs(files: list[bytes], truth: Tensor, rows: Tensor, seed: int, flips: float) -> Pairs:
    flipped = torch.rand(len(rows), generator=torch.Generator().manual_seed(seed)) < flips
    choice = (truth[rows[:, 0]] > truth[rows[:, 1]]) ^ flipped
    a, b = (tuple(files[k] for k in column) for column in rows.T.tolist())
    return Pairs(a, b, ("a red circle",) * len(rows), PreferenceLabels(choice.float(), torch.ones(len(rows))))


@pytest.mark.hard
def test_300_labels_of_scenes(tmp_path: Path) -> None:
    """On drawn scenes: the planted weights over the CLIP, brightness and jpeg, better than a head on the same pairs."""
    files, values = scene_features(300, SCENE_NAMES)
    planted = torch.tensor([2.0, -1.0, 1.0])
    few, unseen = (
        scene_pairs(files, values @ planted, random_rows(300, 300, seed), seed, flips)
        for seed, flips in ((1, 0.1), (2, 0.0))
    )
    report = train_on_features(few, FeatureConfig(SCENE_NAMES, held_out=0.0), tmp_path / "r", tmp_path / "work")
    assert torch.cosine_similarity(torch.tensor([*report["weights"].values()]), planted, 0) >= 0.98
    gain = lead(few, unseen, 200, tmp_path)
    assert gain.mean() > 1.96 * gain.std() / len(gain) ** 0.5


@pytest.mark.hard
def test_the_lead_of_named_features_is_gone_with_9000_labels(tmp_path: Path) -> None:
    """The person also likes something that no named feature measures: the head learns it, from many pairs. With a share
    of .3 named features still lead at 9,000 (by .035 ± .021), with .6 the head is level at 300."""
    files, values = scene_features(600, SCENE_NAMES)
    _, unnamed = scene_features(600, "clip:scenes", "a blue star")
    known = values @ torch.tensor([2.0, -1.0, 1.0])
    truth = known / known.std() + 0.42 * unnamed[:, 0]
    unseen = scene_pairs(files, truth, 400 + random_rows(200, 1000, 2), 2, 0.0)
    bounds = []
    for number, steps in ((300, 200), (9000, 1500)):
        data = scene_pairs(files, truth, random_rows(400, number, 1), 1, 0.1)
        gain = lead(data, unseen, steps, tmp_path / str(number))
        bounds.append((gain.mean() - 1.96 * gain.std() / len(gain) ** 0.5).item())
    assert bounds[0] > 0 >= bounds[1], bounds


def lead(data: Pairs, unseen: Pairs, steps: int, folder: Path) -> Tensor:
    """By how much named features are more right than a head on the same pairs, on each unseen one."""
    train_on_features(data, FeatureConfig(SCENE_NAMES, held_out=0.0), folder / "r", folder / "work")
    head = RewardTrainingConfig("scenes", steps=steps, held_out=0.0)
    train_reward(data, head, folder / "head", folder / "work-head")
    return rightness(load_reward(str(folder / "r")), unseen) - rightness(load_reward(str(folder / "head")), unseen)
