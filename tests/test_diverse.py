"""A few images out of many: against brute force, planted clusters, monotone in the weight, the commands."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from conftest import Steer
from diffusers import StableDiffusionPipeline
from synthetic_preferences import images
from torch import Tensor

from steer.apps.prompts import load_prompts
from steer.assets import MODELS
from steer.diverse import cosine, diverse, pixel_features, quality
from steer.errors import InputError
from steer.pipelines.selection import BestOfNPipeline


def objective(rows: tuple[int, ...], q: Tensor, similarity: Tensor, weight: float) -> float:
    return (q[list(rows)].sum() + weight * similarity[:, list(rows)].amax(1).sum()).item()


@pytest.mark.hard
def test_greedy_reaches_its_bound_on_random_instances() -> None:
    """At least 1 − 1/e of the best of all subsets of 4 of 12, and the best itself without a weight."""
    generator = torch.Generator().manual_seed(0)
    for number in range(200):
        rewards, features = torch.randn(12, generator=generator), torch.randn(12, 3, generator=generator)
        weight = (0.0, 0.5, 2.0)[number % 3]
        q, similarity = quality(rewards), cosine(features)
        best = max(objective(rows, q, similarity, weight) for rows in itertools.combinations(range(12), 4))
        chosen = diverse(rewards, features, 4, weight)
        reached = objective(chosen.rows, q, similarity, weight)
        assert reached >= (1 - 1 / torch.e) * best and sum(chosen.gains) == pytest.approx(reached)
        if weight == 0:
            assert reached == pytest.approx(best) and list(chosen.rows) == rewards.argsort(descending=True)[:4].tolist()


def test_one_of_each_cluster_is_chosen() -> None:
    """Three clusters of five near-duplicates, of which one cluster has the highest rewards."""
    generator = torch.Generator().manual_seed(1)
    centres = torch.eye(3).repeat_interleave(5, 0)
    features = centres + 0.05 * torch.randn(15, 3, generator=generator)
    rewards = torch.tensor([2.0] * 5 + [1.0] * 5 + [0.5] * 5) + 0.01 * torch.randn(15, generator=generator)
    assert {row // 5 for row in diverse(rewards, features, 3, 2.0).rows} == {0, 1, 2}
    assert {row // 5 for row in diverse(rewards, features, 3, 0.0).rows} == {0}


def test_coverage_rises_and_quality_falls_with_the_weight() -> None:
    """The means over 200 instances, strictly. In each the best subset is monotone, but greedy choice need not be: its
    first image depends on the weight, and in about a fifth of the instances coverage dips somewhere."""
    generator = torch.Generator().manual_seed(2)
    coverage, kept = torch.zeros(2, 200, 5, dtype=torch.float64)
    for number in range(200):
        rewards, features = torch.randn(12, generator=generator), torch.randn(12, 3, generator=generator)
        q, similarity = quality(rewards), cosine(features)
        for column, weight in enumerate((0.0, 0.2, 0.5, 2.0, 100.0)):
            rows = list(diverse(rewards, features, 4, weight).rows)
            coverage[number, column], kept[number, column] = similarity[:, rows].amax(1).sum(), q[rows].sum()
    assert (coverage.mean(0).diff() > 0).all() and (kept.mean(0).diff() < 0).all()
    assert (kept[:, :1] >= kept - 1e-9).all()


def test_several_rewards_are_ranked() -> None:
    """Borda: the second image is second for both, no other is better on average; units do not matter."""
    rewards = torch.tensor([[3.0, 2, 1, 0], [0, 200, 100, 300]])
    assert diverse(rewards, torch.eye(4), 1, 0.0).rows == (1,)
    torch.testing.assert_close(quality(torch.ones(3)), torch.zeros(3, dtype=torch.float64))


def test_every_reward_is_represented() -> None:
    """Chamberlin-Courant against brute force; the best image of the second reward is not among those of mean ranks."""
    rewards = torch.tensor([[5.0, 4, 3, 2, 1, 0], [4, 3, 2, 1, 0, 5]])
    assert diverse(rewards, torch.eye(6), 2, 0.0).rows == (0, 1)
    assert diverse(rewards, torch.eye(6), 2, 0.0, represent=True).rows == (0, 5)
    generator = torch.Generator().manual_seed(3)
    for _ in range(50):
        rewards, features = torch.randn(3, 8, generator=generator), torch.randn(8, 3, generator=generator)
        order, similarity = rewards.argsort(1).argsort(1) / (63 / 12) ** 0.5, cosine(features)

        def value(rows: tuple[int, ...], order: Tensor = order, similarity: Tensor = similarity) -> float:
            return (order[:, list(rows)].amax(1).sum() + 0.5 * similarity[:, list(rows)].amax(1).sum()).item()

        chosen = diverse(rewards, features, 3, 0.5, represent=True)
        assert value(chosen.rows) >= (1 - 1 / torch.e) * max(map(value, itertools.combinations(range(8), 3)))
        assert sum(chosen.gains) == pytest.approx(value(chosen.rows))


def test_every_group_has_its_images() -> None:
    """Quotas are met by the best of each group, and the other places are free."""
    rewards, groups = torch.arange(9.0).flip(0), "aaaaaabbc"
    for at_least, count, expected in ((1, 3, {0, 6, 8}), (1, 5, {0, 1, 2, 6, 8}), (1, 9, {*range(9)})):
        assert {*diverse(rewards, torch.eye(9), count, 0.0, groups=groups, at_least=at_least).rows} == expected
    assert {*diverse(rewards, torch.eye(9), 4, 0.0, groups="aaaaabbbb", at_least=2).rows} == {0, 1, 5, 6}
    for at_least, count in ((2, 9), (1, 2)):
        with pytest.raises(InputError, match=f"at least {at_least} of each of 3 groups, .* does not fit into {count}"):
            diverse(rewards, torch.eye(9), count, groups=groups, at_least=at_least)


def test_what_does_not_fit_is_refused() -> None:
    for count, weight in ((0, 0.5), (5, 0.5), (2, -1.0)):
        with pytest.raises(InputError, match="keep 1 to 4 of 4 images"):
            diverse(torch.rand(4), torch.rand(4, 2), count, weight)


def test_pixels_tell_images_apart() -> None:
    one, two = torch.rand(3, 16, 16), torch.rand(3, 16, 16)
    similarity = cosine(pixel_features(torch.stack([one, one + 0.01, two])))
    assert similarity[0, 1] > 0.95 > similarity[0, 2]


def test_the_commands(tmp_path: Path, steer: Steer) -> None:
    for number, image in enumerate(images(6)):
        (tmp_path / f"{number}.png").write_bytes(image)
    code, out, err = steer("pick", tmp_path, "--reward", "brightness", "--reward", "jpeg", "--keep", 2)
    picked = json.loads(out)["picked"]
    assert code == 0 and len(picked) == 2 and set(picked[0]["rewards"]) == {"brightness", "jpeg"}, err
    code, out, _ = steer("pick", tmp_path, "--reward", "brightness", "--keep", 3, "--at-least", 2, "--represent")
    assert code == 0 and len(json.loads(out)["picked"]) == 3
    code, _, err = steer("pick", tmp_path, "--reward", "brightness", "--keep", 7)
    assert code == 2 and "keep 1 to 6 of 6 images" in err
    words = ["sample", "a red circle", "--particles", 3, "--method", "best-of-n", "--steps", 1, "--no-compare"]
    code, _, err = steer(*words, "--keep", 2, "--out", tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert code == 0 and len(report["prompts"][0]["kept"]["ranks"]) == 2 and len(report["prompts"][0]["images"]) == 3
    code, _, err = steer(*words, "--keep", 4, "--out", tmp_path / "two")
    assert code == 2 and "--keep 4 of --particles 3" in err
    code, _, err = steer(*words, "--diverse", 1, "--out", tmp_path / "two")
    assert code == 2 and "add --keep N" in err


def test_the_grid_shows_the_kept_images_with_their_checklists(
    steer: Steer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells: list[list[float]] = []
    monkeypatch.setattr("steer.apps.plots.Canvas.cell", lambda self, picture, rewards, *place: cells.append(rewards))
    ticks: list[dict[str, bool]] = []
    monkeypatch.setattr("steer.apps.plots._draw_checklist", lambda canvas, checks, left, top: ticks.append(checks))
    words = ["sample", "a red circle", "--steps", 2, "--particles", 3, "--no-compare", "--method", "base"]
    assert steer(*words, "--keep", 1, "--checklist", "scene", "--out", tmp_path)[0] == 0
    entry = json.loads((tmp_path / "report.json").read_text())["prompts"][0]
    (rank,) = entry["kept"]["ranks"]
    assert len(cells) == len(ticks) == 3 + 1 and cells[-1] == [entry["rewards"][rank]]
    assert ticks[-1] == ticks[rank]
    code, _, err = steer("sample", "a red", "--model", "scenes-text", "--checklist", "scene", "--out", tmp_path / "t")
    assert code == 2 and "--checklist: model 'scenes-text' makes texts" in err


@pytest.mark.hard
def test_four_of_sixteen_scenes_differ_more_at_little_cost() -> None:
    """Held-out prompts: the distance of the four images rises outside its interval, at .1 deviations of the reward."""
    pipe = StableDiffusionPipeline.from_pretrained(MODELS["scenes"])
    pipe.set_progress_bar_config(disable=True)
    best = BestOfNPipeline(pipe, "scene-soft")
    gain, lost = [], []
    for number, prompt in enumerate(load_prompts("scenes-heldout")[::20][:8]):
        generator = torch.Generator().manual_seed(number)
        out = best(
            prompt, num_particles=16, num_inference_steps=10, guidance_scale=4, generator=generator, output_type="pt"
        )
        images, rewards = out.images.flatten(0, -4), out.rewards[0]
        features = pixel_features(images)
        top, chosen = list(range(4)), list(diverse(rewards, features, 4, 0.5).rows)
        distance = [(1 - cosine(features[rows])).sum() / 12 for rows in (top, chosen)]
        gain.append((distance[1] - distance[0]).item())
        lost.append(((rewards[top].mean() - rewards[chosen].mean()) / rewards.std()).item())
    gains = torch.tensor(gain)
    assert gains.mean() > 1.96 * gains.std() / len(gains) ** 0.5, (gain, lost)
    assert sum(lost) / len(lost) < 0.1, (gain, lost)
