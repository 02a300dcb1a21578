"""Herding: the closed form for Gaussian scores, the estimator against brute force, the command."""

from itertools import combinations
from pathlib import Path

import pytest
import torch
from conftest import Steer
from test_written_rewards import drawn_scenes

from steer.errors import InputError
from steer.rewards.herding import herding


@pytest.mark.parametrize("rho", [0.2, 0.5, 0.9])
def test_gaussian_members_share_the_share_of_their_correlation(rho: float) -> None:
    """E[z_j | i picks] = ρ E[max of n]: G_ij / G_ii = ρ for every n, within 3 standard errors (from 12 runs)."""
    shares = []
    for seed in range(12):
        draws = torch.randn(2, 400, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        both = torch.stack([draws[0], rho * draws[0] + (1 - rho**2) ** 0.5 * draws[1]])
        found = herding(("a", "b"), both.flatten(1), [str(k) for k in range(400) for _ in range(16)])
        assert found.sizes == (2, 4, 8, 16)
        shares.append([found.correlation[0, 1].item(), *found.shared])
    values = torch.tensor(shares, dtype=torch.float64)
    error = values.std(0) / 12**0.5
    assert ((values.mean(0) - rho).abs() < 3 * error + 0.01).all()


def test_the_gain_is_that_of_all_subsets() -> None:
    scores = torch.randn(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = herding(("a", "b"), scores, ["p"] * 4)
    z = (scores - scores.mean(1, keepdim=True)) / scores.std(1, keepdim=True, correction=0)
    picks = [max(two, key=lambda k: z[0, k].item()) for two in combinations(range(4), 2)]
    assert found.gains[0, 0, 1].item() == pytest.approx(z[1, picks].mean().item())
    assert found.gains[1, 0, 1].item() == pytest.approx(z[1, z[0].argmax()].item())
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
    code, out, err = steer("rewards", "herding", "brightness", "jpeg", "--images", folder, "--prompt", "a star")
    assert code == 0, err
    assert "correlation within prompts" in out and "shared share" in out and out.splitlines()[-1].split()[0] == "8"
