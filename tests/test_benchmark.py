"""One-to-many accuracy: by hand, against its integral for Gaussians, against best-of-n; the command."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import Steer
from scipy.integrate import quad
from scipy.stats import norm
from synthetic_preferences import images as planted_images
from torch import Tensor

from steer.errors import InputError
from steer.rewards.analysis import spearman
from steer.rewards.benchmark import best_of_n_gain, image_questions, one_to_many

SIGMAS = [0.1 * 1.5**k for k in range(12)]
QUESTIONS, WRONG, GAP = 4000, 9, 1.0


def test_by_hand() -> None:
    """Ranks 1 (of 3), 2 (a tie loses); the third question has no wrong candidate."""
    one = one_to_many(torch.tensor([3.0, 1.0, 5.0]), torch.tensor([2.0, 0.0, 1.0, 0.0]), [0, 0, 1, 1])
    assert (one.questions, one.candidates) == (2, 2.0)
    assert (one.one_to_one, one.one_to_many, one.reciprocal_rank) == (0.75, 0.5, 0.75)
    with pytest.raises(InputError, match="needs wrong candidates"):
        one_to_many(torch.ones(3), torch.ones(0), [])


def test_right_images_are_the_best_of_their_prompt() -> None:
    gold, prompts = torch.tensor([1.0, 0.0, 1.0, 0.5, 0.2, 0.1]), ["a"] * 4 + ["b"] * 2
    assert image_questions(gold, prompts, least=2) == [(0, [1, 3]), (2, [1, 3])]
    assert image_questions(gold, prompts, least=1)[-1] == (4, [5])
    assert best_of_n_gain(torch.tensor([0.0, 2, 1, 2, 5, 5]), gold, prompts) == pytest.approx((0.25 - 0.625) / 2)


def accuracies(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """One-to-many and one-to-one accuracy and best-of-n gain (on other images) of twelve rewards, truth + σ·noise."""
    generator = torch.Generator().manual_seed(seed)
    owner = [question for question in range(QUESTIONS) for _ in range(WRONG)]
    gold = torch.randn(500 * 16, generator=generator)
    prompts = [str(k // 16) for k in range(len(gold))]
    rows = []
    for sigma in SIGMAS:
        right = GAP + sigma * torch.randn(QUESTIONS, generator=generator)
        one = one_to_many(right, sigma * torch.randn(QUESTIONS * WRONG, generator=generator), owner)
        picked = best_of_n_gain(gold + sigma * torch.randn(gold.shape, generator=generator), gold, prompts)
        rows.append((one.one_to_many, one.one_to_one, picked))
    many, single, gain = torch.tensor(rows, dtype=torch.float64).T
    return many, single, gain


def test_gaussian_rewards_have_the_accuracy_of_the_integral() -> None:
    """P(right above all k) = ∫ φ(u) Φ(u + δ/σ)^k du and P(above one) = Φ(δ/(σ√2)), within 3 standard errors."""
    many, single, _ = accuracies(0)
    for sigma, got, one in zip(SIGMAS, many.tolist(), single.tolist(), strict=True):
        exact = quad(lambda u, s=sigma: norm.pdf(u) * norm.cdf(u + GAP / s) ** WRONG, -10, 10)[0]
        assert abs(got - exact) <= 3 * math.sqrt(exact * (1 - exact) / QUESTIONS) + 1e-9, sigma
        # Pairs of one question share its right candidate: at most the error of so many questions.
        assert abs(one - norm.cdf(GAP / (sigma * 2**0.5))) <= 3 * 0.5 / math.sqrt(QUESTIONS), sigma
    assert bool((many.diff() <= 0).all()) and bool((single.diff() <= 0).all()) and many[-1] < 0.5 < single[-1]


def test_one_to_many_orders_rewards_as_best_of_n_does() -> None:
    """At least as well as one-to-one, which is at its ceiling for good rewards."""
    many, single, gain = accuracies(1)
    assert spearman(many, gain) >= spearman(single, gain) and spearman(many, gain) > 0.95


def test_the_command(tmp_path: Path, steer: Steer) -> None:
    """Wrong images by --gold, changed prompts, and the correlation over rewards; what cannot be asked is refused."""
    for number, image in enumerate(planted_images(12)):
        (tmp_path / f"{number}.png").write_bytes(image)
    rows = [{"image": f"{number}.png", "prompt": "a red circle"} for number in range(12)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rewards = ("brightness", "jpeg", "scene-soft")
    code, out, err = steer("rewards", "benchmark", *rewards, "--images", tmp_path, "--gold", "brightness")
    table = [line.split() for line in out.splitlines() if line.startswith("brightness")]
    assert code == 0 and len(table) == 2, err
    # One right image with one changed prompt, which brightness does not read; 11 wrong images, all below.
    assert table[0][1:3] == ["changed", "prompts"] and table[0][3:8] == ["1", "1.0", "0%", "0%", "0.50"]
    assert table[1][5:10] == ["1", "11.0", "100%", "100%", "1.00"] and float(table[1][10]) > 0
    assert out.count("Spearman with the gain") == 4
    code, out, _ = steer("rewards", "benchmark", "jpeg", "--images", tmp_path)
    assert code == 0 and len(out.splitlines()) == 2 and "best-of-n" not in out
    (tmp_path / "prompts.jsonl").write_text('{"image": "0.png", "prompt": "a tree"}\n')
    code, _, err = steer("rewards", "benchmark", "jpeg", "--images", tmp_path)
    assert code == 2 and "no right image has a prompt" in err and err.count("\n") == 1
