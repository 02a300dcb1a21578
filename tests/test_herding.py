"""Herding: the closed form for Gaussian scores, the estimator against brute force, the command."""

import json
from itertools import combinations
from pathlib import Path

import pytest
import torch
from conftest import Steer
from test_written_rewards import drawn_scenes

from steer.errors import InputError
from steer.rewards.herding import herding, overrated


@pytest.mark.parametrize("rho", [0.2, 0.5, 0.9])
def test_gaussian_members_share_the_share_of_their_correlation(rho: float) -> None:
    """E[z_j | i picks] = ρ E[max of n]: G_ij / G_ii = ρ for every n, within 3 standard errors (from 12 runs)."""
    shares = []
    for seed in range(12):
        draws = torch.randn(2, 400, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        both = torch.stack([draws[0], rho * draws[0] + (1 - rho**2) ** 0.5 * draws[1]])
        result = herding(("a", "b"), both.flatten(1), [str(k) for k in range(400) for _ in range(16)])
        assert result.sizes == (2, 4, 8, 16)
        shares.append([result.correlation[0, 1].item(), *result.shared])
    values = torch.tensor(shares, dtype=torch.float64)
    error = values.std(0) / 12**0.5
    assert ((values.mean(0) - rho).abs() < 3 * error + 0.01).all()


def test_the_gain_is_that_of_all_subsets() -> None:
    scores = torch.randn(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = herding(("a", "b"), scores, ["p"] * 4)
    z = (scores - scores.mean(1, keepdim=True)) / scores.std(1, keepdim=True, correction=0)
    picks = [max(two, key=lambda k: z[0, k].item()) for two in combinations(range(4), 2)]
    assert result.gains[0, 0, 1].item() == pytest.approx(z[1, picks].mean().item())
    assert result.gains[1, 0, 1].item() == pytest.approx(z[1, z[0].argmax()].item())
    twice = herding(("a", "a"), scores[[0, 0]], ["p"] * 4)
    assert twice.shared == pytest.approx([1, 1])


def test_what_cannot_be_measured_is_refused() -> None:
    scores = torch.rand(2, 4)
    for given, groups, message in (
        (scores[:1], "pppp", "at least two rewards"),
        (scores, "pqqq", "equally many images"),
        (scores, "pqrs", "at least two: got 2 rewards and 1 images"),
        (torch.ones(2, 4), "pppp", "reward 'a' gives all images of a prompt the same score"),
    ):
        with pytest.raises(InputError, match=message):
            herding(("a", "b"), given, list(groups))


def test_the_command_prints_correlations_and_shares(steer: Steer, tmp_path: Path) -> None:
    folder = drawn_scenes(tmp_path / "scenes", 8)
    (folder / "prompts.jsonl").unlink()
    words = ["rewards", "herding", "brightness", "jpeg", "--images", folder, "--prompt", "a star"]
    code, out, err = steer(*words, "--gold", "brightness:0", "--optimised", folder, "--out", tmp_path / "h.json")
    assert code == 0, err
    assert "correlation within prompts" in out and "shared share" in out and out.splitlines()[-2].split()[0] == "8"
    figures = json.loads((tmp_path / "h.json").read_text())
    base, optimised = figures["folders"]
    assert figures["rewards"] == ["brightness", "jpeg"] and base == optimised and base["n"] == [2, 4, 8]
    assert base["shared"][-1] == pytest.approx(float(out.splitlines()[-2].split()[-1]), abs=0.005)
    worst = base["overrated"][0]
    assert worst["scores"][2] == pytest.approx(1 - worst["scores"][0])
    assert out.splitlines()[-1].endswith(
        f"{len(base['overrated'])}, the worst " + ", ".join(Path(one["image"]).name for one in base["overrated"][:5])
    )


def test_overrated_images_by_hand() -> None:
    """Above the mean of the prompt by both members, below it by the truth; the largest difference of z first."""
    members = torch.tensor([[0.0, 1, 2, 3, 5, 5], [0, 3, 1, 2, 5, 9]])
    gold = torch.tensor([4.0, 4, 0, 1, 0, 1])
    assert overrated(members, gold, ["p"] * 4 + ["q"] * 2) == [3]
    assert overrated(members, -members[0], ["p"] * 6) == [5, 4]
