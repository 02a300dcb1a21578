"""Lower bounds of the truth: coverage under plantings, the weights of members, files, and the reward in the grammar."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Steer
from test_analysis import sample_scenes
from test_compose import A, B, showing
from torch import Tensor

from steer import score
from steer.errors import InputError
from steer.reward import RewardError
from steer.rewards.analysis import contrasts
from steer.rewards.conformal import LowerBound, LowerBoundReward, fit_lower_bound, fit_pinball, read_bound
from steer.rewards.parser import load_reward

NAMES = ("a", "b", "c")


def planted(kind: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Scores (3, N) of members and the truth (N,)."""
    rng = np.random.default_rng(seed)
    y = rng.standard_normal(count)
    noise = rng.standard_normal((3, count))
    if kind == "heteroscedastic":  # the members differ where they err
        members = y + noise * np.exp(rng.standard_normal(count)) * 0.5
    elif kind == "biased":
        members = np.stack([y + 0.2 * noise[0], 3 * y + 5 + 1.5 * noise[1], y - 4 + noise[2]])
    else:  # one good member, two useless ones
        members = np.stack([y + 0.2 * noise[0], noise[1], noise[2]])
    return torch.from_numpy(members), torch.from_numpy(y)


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["heteroscedastic", "biased", "useless"])
def test_a_bound_covers_fresh_images(kind: str) -> None:
    """Marginally over calibrations: the share of fresh images with truth ≥ bound is at least the level, and not 1."""
    shares = []
    for seed in range(20):
        scores, truth = planted(kind, 200, seed)
        bound = fit_lower_bound(NAMES, scores, truth, [str(k) for k in range(200)], "truth", 0.9)
        fresh, own = planted(kind, 1000, 1000 + seed)
        shares.append((own >= bound.of(fresh)).double().mean().item())
    error = np.std(shares) / math.sqrt(len(shares))
    assert np.mean(shares) >= 0.9 - 2 * error and np.mean(shares) < 0.95


@pytest.mark.hard
def test_a_bound_of_real_rewards_covers_fresh_scenes() -> None:
    """The truth is the exact score of pictures of which half have a changed prompt; 12 halves calibrate."""
    images, prompts = sample_scenes(400, seed=5)
    rng = np.random.default_rng(6)
    for row in range(0, 400, 2):
        if changed := contrasts(prompts[row]):
            prompts[row] = changed[rng.integers(len(changed))].prompt
    *scores, truth = (
        score(images, prompts, name) for name in ("scene-soft", "clip:scenes", "preference:scenes", "scene")
    )
    r, y = torch.stack(scores).double(), truth.double()
    covered = []
    for seed in range(12):
        own, fresh = torch.randperm(400, generator=torch.Generator().manual_seed(seed)).chunk(2)
        bound = fit_lower_bound(NAMES, r[:, own], y[own], [str(k) for k in own.tolist()], "scene", 0.9, seed)
        covered.append((y[fresh] >= bound.of(r[:, fresh])).double().mean().item())
    assert np.mean(covered) >= 0.9 - 2 * np.std(covered) / math.sqrt(12)


def test_the_weights_find_the_good_member_and_disagreement_lowers_the_bound() -> None:
    scores, truth = planted("useless", 400, 0)
    bound = fit_lower_bound(NAMES, scores, truth, [str(k) for k in range(400)], "truth", 0.9)
    assert bound.weights[0] > 0.8 and sum(bound.weights) == pytest.approx(1)
    scores, truth = planted("heteroscedastic", 400, 0)
    bound = fit_lower_bound(NAMES, scores, truth, [str(k) for k in range(400)], "truth", 0.9)
    assert sum(w * c for w, (*_, c) in zip(bound.weights, bound.quantiles, strict=True)) < 0


def test_a_bound_is_tighter_than_the_minimum_less_a_margin_of_the_same_coverage() -> None:
    """Where members differ in quality. Where all are alike and disagree where they err, the minimum is as good."""
    gaps = []
    for kind in ("biased", "useless"):
        scores, truth = planted(kind, 400, 3)
        bound = fit_lower_bound(NAMES, scores, truth, [str(k) for k in range(400)], "truth", 0.9)
        least = scores.amin(0)
        margin = torch.quantile(least - truth, 0.9)
        fresh, own = planted(kind, 2000, 4)
        gaps.append(((own - bound.of(fresh)).mean() - (own - (fresh.amin(0) - margin)).mean()).item())
    assert max(gaps) < 0


def test_quantile_regression_equals_quantiles_and_the_simplex_holds() -> None:
    y = np.random.default_rng(0).standard_normal(101)
    assert fit_pinball(np.ones((101, 1)), y, 0.25)[0] == pytest.approx(np.sort(y)[25])  # the 26th of 101
    weights = fit_pinball(np.stack([y, -y], 1), y, 0.5, simplex=True)
    assert weights == pytest.approx([1, 0], abs=1e-9)


def test_the_bound_by_hand_and_its_slope(tmp_path: Path) -> None:
    bound = LowerBound(
        ("a", "b"), "t", 0.9, 50, (0.0, 1.0), (1.0, 2.0), ((1.0, 2.0, 0.0), (0.0, 1.0, -1.0)), (0.75, 0.25), 0.5
    )
    bound.save(tmp_path / "bound.json")
    assert read_bound(tmp_path / "bound.json") == bound
    reward = LowerBoundReward([A, B], bound)
    # z = 1 and (5 − 1)/2 = 2: disagreement ½; .75 (1 + 2·1) + .25 (5 − ½) − .5
    assert score(showing([[1.0], [5.0]]), [""], reward).item() == pytest.approx(2.25 + 1.125 - 0.5)
    scores = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(bound.of, (scores,))
    with pytest.raises(RewardError, match=r"lower\(b, a\): its bound is of a, b: give these, in this order"):
        LowerBoundReward([B, A], bound)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a bound of"),
        ("[]", "not a bound of"),
        ('{"scales": {}}', "not a bound of"),
        ('{"bound": {"names": ["a"]}}', "not a bound of"),
        (
            '{"bound": {"names": ["a"], "truth": "t", "level": 0.9, "count": 5, "means": [0], "stds": [0], '
            '"quantiles": [[0, 1, 0]], "weights": [1], "margin": 0}}',
            "columns that do not fit",
        ),
    ],
)
def test_a_file_that_is_no_bound_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "b.json").write_text(text)
    with pytest.raises(RewardError, match=message):
        load_reward(f"lower(brightness, from={tmp_path / 'b.json'})")


def test_what_cannot_be_bounded_is_refused() -> None:
    scores, truth = planted("useless", 60, 0)
    groups = [str(k) for k in range(60)]
    with pytest.raises(InputError, match="at least 40 images, got 20"):
        fit_lower_bound(NAMES, scores[:, :20], truth[:20], groups[:20], "t", 0.9)
    with pytest.raises(InputError, match=r"--level 0.99 needs at least 198 images, got 60"):
        fit_lower_bound(NAMES, scores, truth, groups, "t", 0.99)
    with pytest.raises(InputError, match="reward 'b' gives every image the same score"):
        fit_lower_bound(NAMES, scores * torch.tensor([[1.0], [0.0], [1.0]]), truth, groups, "t", 0.9)
    with pytest.raises(RewardError, match=r"lower\(…\) needs a bound: lower\(A, B, from=FILE\)"):
        load_reward("lower(brightness)")


def test_the_command_fits_a_bound_that_the_grammar_reads(steer: Steer, tmp_path: Path) -> None:
    from test_written_rewards import drawn_scenes

    folder, file = drawn_scenes(tmp_path / "scenes", 48), tmp_path / "bound.json"
    rewards = ["scene-soft", "brightness", "colour:red"]
    options = ["--bound", "scene", "--level", 0.8, "--images", folder, "--out", file, "--optimised", folder]
    code, out, err = steer("rewards", "calibrate", *rewards, *options)
    assert code == 0, err
    assert "scene ≥ bound on 80% of fresh images (48 images); weights: scene-soft" in out
    assert "holds on" in out and "of 48 optimised images" in out
    assert json.loads(file.read_text())["bound"]["names"] == rewards
    reward = load_reward(f"lower({', '.join(rewards)}, from={file})")
    assert reward.name == "lower(scene-soft, brightness, colour:red)" and reward.differentiable
    assert score(torch.rand(2, 3, 64, 64), ["a star", "a circle"], reward).shape == (2,)
