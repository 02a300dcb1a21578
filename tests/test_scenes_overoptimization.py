"""Best-of-n from one sample, and the annotators of scenes, against hand-made truths."""

from itertools import combinations

import numpy as np
import pytest
import torch

from steer.apps.prompts import load_prompts
from steer.apps.scenes import analyses
from steer.apps.scenes.preferences import choose, composition, pairs_of
from steer.apps.scenes.training import training_scenes
from steer.rewards.compose import mean, robust, worst
from steer.rewards.parser import load_reward
from steer.training.overoptimization import best_of_n_kl, expected_best


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
def test_expected_best_is_the_mean_over_all_subsets(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    proxy, value = (torch.randn(2, 6, generator=generator) for _ in range(2))
    for row in range(2):
        picked = [value[row, max(some, key=lambda k: proxy[row, k].item())] for some in combinations(range(6), n)]
        assert expected_best(proxy, value, n)[row].item() == pytest.approx(np.mean(picked), abs=1e-6)


def test_one_of_one_is_the_mean_and_one_of_all_the_best() -> None:
    proxy = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(expected_best(proxy, proxy, 1), proxy.double().mean(1))
    assert torch.allclose(expected_best(proxy, proxy, 256), proxy.double().amax(1))


def test_kl_of_best_of_n() -> None:
    assert best_of_n_kl(1) == 0
    assert best_of_n_kl(4) == pytest.approx(np.log(4) - 0.75)


def test_curves_of_an_evaluation_by_hand() -> None:
    """Two prompts × two images: best-of-two by a proxy is its favourite, best-of-one the mean."""
    runs = [
        {"rewards": {"scene": [1.0, 0.5], "ensemble": [0.0, 0.0], "other": [2.0, 1.0]}, "components": {}},
        {"rewards": {"scene": [0.0, 0.5], "ensemble": [0.0, 0.0], "other": [1.0, 2.0]}, "components": {}},
    ]
    for run in runs:  # the first member likes the first image, the second, of two, by far the second one
        run["components"] = {"ensemble": {"a": [1.0, 0.0], "b": [0.0, 3.0]}}
    report = {"rewards": ["scene", "ensemble", "other"], "contenders": [{"runs": runs}]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(analyses, "SIZES", (1, 2))
        curves = analyses.curves(report, "ensemble")
    gold = {name: [mean for mean, _, _ in kinds["gold"]] for name, kinds in curves["proxies"].items()}
    assert gold["picked by the exact reward"] == [0.5, 0.75] and gold["other"] == [0.5, 0.75]
    assert gold["one member"] == [0.5, 0.5] and gold["mean of 2"] == [0.5, 0.5]
    assert gold["worst of 2"] == gold["robust of 2"] == [0.5, 0.5]
    assert curves["prompts"] == curves["images"] == 2
    assert curves["against_one_member"]["other"][1][0] == 0.25


@pytest.mark.hard
def test_robust_picks_of_an_embedded_ensemble_lie_between_those_of_mean_and_minimum() -> None:
    """One of 256 drawn scenes for each of twelve held-out prompts, by the four members of preference:scenes."""
    images, reward = training_scenes(256, first=10_000)[0] / 255, load_reward("preference:scenes")
    with torch.no_grad():
        prompts = load_prompts("scenes-heldout")[:12]
        members = torch.stack([reward.members(images, [prompt] * 256) for prompt in prompts], 1)
    picks = [aggregate(members).argmax(1, keepdim=True) for aggregate in (mean, robust, worst)]
    by_mean, by_both, by_least = (members.mean(0).gather(1, rows).mean().item() for rows in picks)
    assert by_least < by_both < by_mean
    by_mean, by_both, by_least = (members.amin(0).gather(1, rows).mean().item() for rows in picks)
    assert by_mean < by_both < by_least


def test_annotators_choose_by_bradley_and_terry() -> None:
    rng = np.random.default_rng(0)
    choices = [choose(0.5, 0.2, 0.15, rng) for _ in range(4000)]
    assert choices.count("a") / 4000 == pytest.approx(1 / (1 + np.exp(-2)), abs=0.02)
    assert choose(0.5, 0.5, 0.15, rng) == "tie"


def test_pairs_stay_within_one_prompt() -> None:
    samples = [{"prompt": prompt, "image": f"{prompt}{k}".encode()} for prompt in "xy" for k in range(4)]
    pairs = pairs_of(samples, [0.0, 0.1, 0.2, 0.3] * 2, 0.1, np.random.default_rng(0))
    assert len(pairs) == 2 * 6
    assert all(pair["image_a"][:1] == pair["image_b"][:1] == pair["prompt"].encode() for pair in pairs)
    assert sorted({round(pair["strength"], 6) for pair in pairs}) == [0.1, 0.2, 0.3]


def test_composition_likes_large_and_central() -> None:
    def square(x: int, y: int, half: int) -> np.ndarray:
        image = np.ones((64, 64, 3), np.float32)
        image[y - half : y + half, x - half : x + half] = (0.9, 0.1, 0.1)
        return image

    central, aside, small = (composition(square(*place)) for place in ((32, 32, 12), (14, 14, 12), (32, 32, 6)))
    assert central > small > aside
    assert central == pytest.approx(24 * 24 / 64**2, abs=0.02)
    assert composition(np.ones((64, 64, 3), np.float32)) == -1
