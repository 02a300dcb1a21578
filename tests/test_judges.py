"""Judges: truth tables, win rates by hand, cyclic preferences, an endpoint that sees two images."""

import itertools
import json
import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_server import Request, completion, serve
from click.testing import CliRunner
from diffusers import StableDiffusionPipeline
from PIL import Image
from synthetic_preferences import images as planted_images
from synthetic_preferences import pairs_of, random_rows, tensors, tiny_clip, truth
from torch import Tensor

from steer import BestOfNPipeline, RewardError, Tournament, as_judge, load_judge, load_reward
from steer.apps.cli.main import steer as command
from steer.assets import MODELS
from steer.reward import compare, with_timeout
from steer.rewards.analysis import check_judge
from steer.rewards.compose import Calibration, reward_statistics
from steer.rewards.judges import Factor, HierarchyJudge
from steer.rewards.learned import GeneralPreference, LearnedReward, RewardTrainingConfig, train_reward
from steer.rewards.named_features import FeatureConfig, train_on_features
from steer.rewards.preference_pairs import read_pairs


def channel(number: int) -> Any:
    def value(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images[:, number].mean((1, 2))

    value.__name__ = "rgb"[number]
    return load_reward(value)


def flat(*colours: Sequence[float]) -> Tensor:
    return torch.tensor(colours)[:, :, None, None].expand(-1, -1, 8, 8).contiguous()


@pytest.mark.parametrize("order", itertools.permutations(range(3)))
def test_hierarchies_of_three_factors_follow_the_truth_table(order: tuple[int, ...]) -> None:
    """All combinations of ahead, level and behind; a difference within the margin of .1 is level."""
    judge = HierarchyJudge([Factor(channel(number), 0.1) for number in order])
    signs = list(itertools.product((-1, 0, 1), repeat=3))
    noise = [[0.3 * s if s else 0.05 for s in row] for row in signs]
    a, b = flat(*([0.5 + x / 2 for x in row] for row in noise)), flat(*([0.5 - x / 2 for x in row] for row in noise))
    expected = []
    for row in signs:
        deciding = next((row[number] for number in order if row[number]), 0)
        expected.append((deciding + 1) / 2)
    assert compare(judge, a, b, ["p"] * 27).tolist() == expected
    assert compare(judge, b, a, ["p"] * 27).tolist() == [1 - p for p in expected]


@pytest.mark.parametrize(
    ("transform", "margin"),
    [(lambda z: 7 * z, 2.1), (torch.exp, 0.6), (lambda z: z**3, 0.3), (torch.log, 1.0)],
    ids=["scale", "exp", "cube", "log"],
)
def test_only_order_and_margins_matter(transform: Callable[[Tensor], Tensor], margin: float) -> None:
    """A monotone transform of both factors, with the margin carried along, labels the same.

    Red is .1 to .2 or .8 to .9. The margins lie between the differences within these groups and across them.
    """

    def transformed(number: int) -> Any:
        def value(images: Tensor, prompts: Sequence[str]) -> Tensor:
            return transform(images[:, number].mean((1, 2)))

        return load_reward(value)

    colours = torch.rand(2, 40, 3, generator=torch.Generator().manual_seed(0))
    colours[..., 0] = 0.1 + 0.1 * colours[..., 0] + 0.7 * (colours[..., 2] > 0.5)
    a, b = (flat(*one.tolist()) for one in colours)
    plain = HierarchyJudge([Factor(channel(0), 0.3), Factor(channel(1))])
    labels = compare(plain, a, b, ["p"] * 40)
    judge = HierarchyJudge([Factor(transformed(0), margin), Factor(transformed(1))])
    assert torch.equal(compare(judge, a, b, ["p"] * 40), labels)
    assert not torch.equal(labels, compare(HierarchyJudge([Factor(channel(0))]), a, b, ["p"] * 40))


def test_margins_of_a_calibration_are_one_deviation(tmp_path: Path) -> None:
    scale = reward_statistics(torch.tensor([0.0, 0.5, 1.0]), ["p"] * 3)
    Calibration({"brightness": scale}, {}).save(tmp_path / "c.json")
    judge: Any = load_judge(f"hierarchy(brightness, colour:red > 0.2, from={tmp_path / 'c.json'})")
    assert [factor.margin for factor in judge.factors] == pytest.approx([0.5, 0.2])
    with pytest.raises(RewardError, match="jpeg"):
        load_judge(f"hierarchy(jpeg, from={tmp_path / 'c.json'})")


def test_judges_of_rewards_are_bradley_terry() -> None:
    a, b = flat([0.9, 0, 0], [0.2, 0, 0]), flat([0.4, 0, 0], [0.2, 0, 0])
    assert compare(as_judge(channel(0), 0.5), a, b, ["p", "q"]).tolist() == pytest.approx([1 / (1 + math.exp(-1)), 0.5])
    with pytest.raises(RewardError, match="temperature must be a number above 0"):
        as_judge(channel(0), 0)


class Cycle:
    """Red beats green beats blue beats red."""

    name = "cycle"

    def compare(self, images_a: Tensor, images_b: Tensor, prompts: Sequence[str]) -> Tensor:
        a, b = (images.mean((2, 3)).argmax(1) for images in (images_a, images_b))
        return torch.tensor([0.5, 1.0, 0.0])[(b - a) % 3]


COLOURS = ([1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0])


def test_win_rates_of_a_tournament() -> None:
    """Three of a cycle win half of their games; two prompts do not meet."""
    reward = Tournament(Cycle())
    wins = reward(flat(*COLOURS, COLOURS[0], COLOURS[1]), ["p", "p", "p", "q", "q"])
    assert wins.tolist() == [0.5, 0.5, 0.5, 1.0, 0.0]
    values = torch.rand(40, generator=torch.Generator().manual_seed(0))
    images = values[:, None, None, None].expand(-1, 3, 4, 4)
    rates = load_reward("tournament(hierarchy(brightness))")(images, ["p"] * 40)
    torch.testing.assert_close(rates, values.argsort().argsort() / 39.0)
    with pytest.raises(RewardError, match="has one image in this call"):
        reward(flat(*COLOURS), ["p", "p", "q"])


def test_a_pipeline_selects_by_a_tournament_whatever_its_chunks() -> None:
    pipe = StableDiffusionPipeline.from_pretrained(MODELS["scenes"])
    pipe.set_progress_bar_config(disable=True)
    call = {"num_particles": 3, "num_inference_steps": 2, "output_type": "pt"}
    outs = [
        BestOfNPipeline(pipe, reward)(
            ["a star", "a circle"], generator=torch.Generator().manual_seed(0), **call, chunk_size=1
        )
        for reward in (
            "brightness",
            "tournament(brightness)",
            with_timeout(load_reward("tournament(brightness) + jpeg:0"), 60),
        )
    ]
    for out in outs[1:]:
        torch.testing.assert_close(out.images, outs[0].images)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (torch.tensor([1.5]), "returned 1.5: it must return probabilities"),
        (torch.tensor([0.5, 0.5]), r"shape \(1,\)"),
        (torch.tensor([torch.nan]), "finite"),
    ],
)
def test_the_contract_of_judges_is_checked(output: Tensor, message: str) -> None:
    judge = Cycle()
    judge.compare = lambda *_: output  # type: ignore[method-assign]
    with pytest.raises(RewardError, match=message):
        compare(judge, flat(COLOURS[0]), flat(COLOURS[1]), ["p"])


def test_the_check_of_a_judge_compares_both_orders() -> None:
    images = flat(*COLOURS, COLOURS[0])
    good, biased, broken = Cycle(), Cycle(), Cycle()
    biased.compare = lambda a, b, prompts: Cycle().compare(a, b, prompts) * 0.9 + 0.1  # type: ignore[method-assign]
    broken.compare = lambda a, b, prompts: torch.tensor([2.0] * len(a))  # type: ignore[method-assign]
    results = [check_judge(judge, images, ["p"] * 4) for judge in (good, biased, broken)]
    assert [one.passed for one in results] == [True, False, False]
    assert results[1].detail == "P(a ≻ b) + P(b ≻ a) of 4 pairs differs from 1 by 0.1 (at most 1e-05)"
    assert "returned 2: it must return probabilities" in results[2].detail


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("hierarchy(colour:red > 0.1, brightness)", "hierarchy(colour:red > 0.1, brightness)"),
        ("judge:as-judge(brightness, temperature=0.2)", "as-judge(brightness, temperature=0.2)"),
        ("brightness + jpeg", "as-judge(brightness + jpeg)"),
        ("preference:scenes", "preference:scenes"),
        ("http://host/v1,model=m", "judge:http://host/v1,model=m"),
    ],
)
def test_judges_are_read_from_text(text: str, name: str) -> None:
    assert load_judge(text).name == name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hierarchy(brightness > -1)", "margins of at least 0"),
        ("hierarchy(brightness, lam=1)", "unknown option 'lam'"),
        ("hierarchie(brightness)", "unknown function 'hierarchie'"),
        ("as-judge(brightness, jpeg)", "takes one reward"),
    ],
)
def test_other_texts_are_refused(text: str, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        load_judge(text)
    with pytest.raises(RewardError, match="takes one judge"):
        load_reward("tournament(brightness, jpeg)")


def test_an_endpoint_sees_both_images_and_its_preference_for_the_first_cancels() -> None:
    """It says A with the odds of the brightness, doubled for whatever comes first."""

    def answer(request: Request) -> object:
        first, second = (float(image.mean()) for image in request.images)
        p = 2 * first / (2 * first + second)
        return completion("A", {"A": math.log(p), " b": math.log(1 - p), "The": -30.0})

    a, b = flat([0.8] * 3, [0.4] * 3), flat([0.2] * 3, [0.4] * 3)
    with serve(answer) as served:
        judge = load_judge(f"{served.url},model=m,cache=off")
        p = compare(judge, a, b, ["a star", "a circle"])
        both = p + compare(judge, b, a, ["a star", "a circle"])
    assert p.tolist() == pytest.approx([(8 / 9 + 1 - 1 / 3) / 2, 0.5], abs=1e-4)
    assert both.tolist() == pytest.approx([1, 1])
    assert len(served.requests) == 6  # of two equal images both orders are one question


PROMPTS = [
    f"a {thing}" for thing in ("star", "circle", "square", "triangle", "cross", "red star", "blue circle", "ring")
]


def coloured_pairs(folder: Path, prefers: Any, count: int = 320) -> Path:
    """Pairs of noisy images of one colour each, and the label of `prefers(a, b)`."""
    rng, rows = random.Random(0), []
    generator = torch.Generator().manual_seed(0)
    for k in range(count):
        a, b = rng.sample(range(3), 2)
        names = []
        for side, colour in zip("ab", (a, b), strict=True):
            pixels = 0.7 * flat(COLOURS[colour])[0] + 0.3 * torch.rand(3, 8, 8, generator=generator)
            Image.fromarray((pixels.permute(1, 2, 0) * 255).byte().numpy()).save(folder / f"{k}{side}.png")
            names.append(f"{k}{side}.png")
        rows.append({"image_a": names[0], "image_b": names[1], "prompt": PROMPTS[k % 8], "choice": prefers(a, b)})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "pairs.jsonl"


@pytest.mark.hard
def test_general_preferences_learn_a_cycle_and_rewards_do_not(tmp_path: Path) -> None:
    pairs = read_pairs(coloured_pairs(tmp_path, lambda a, b: float((b - a) % 3 == 1)))
    config = partial(RewardTrainingConfig, "scenes", steps=200, held_out=0.25, batch_size=32)
    general = train_reward(pairs, config(head="general"), tmp_path / "general", tmp_path / "runs-general")
    scalar = train_reward(pairs, config(head="pair"), tmp_path / "pair", tmp_path / "runs-pair")
    assert general["ensemble"]["accuracy"] >= 0.95
    assert scalar["ensemble"]["accuracy"] <= 0.7  # an order of three is right in two of three cases at best
    judge, images = load_judge(str(tmp_path / "general")), flat(*COLOURS)
    assert isinstance(judge, LearnedReward)
    p = compare(judge, images, images[[1, 2, 0]], ["a star"] * 3)
    assert (p > 0.8).all()
    torch.testing.assert_close(p + compare(judge, images[[1, 2, 0]], images, ["a star"] * 3), torch.ones(3))
    assert judge(images, ["a star"] * 3).isfinite().all()  # as a reward: against the bank
    assert load_reward(f"tournament({tmp_path / 'general'})")(images, ["a star"] * 3).tolist() == pytest.approx(
        [0.5] * 3, abs=0.2
    )


def test_a_reward_learns_the_labels_of_a_hierarchy(tmp_path: Path) -> None:
    """Bradley–Terry on the labels of two factors agrees with the hierarchy on .93 of unseen pairs."""
    judge, batch = load_judge("hierarchy(brightness > 0.02, colour:red)"), tensors(planted_images(500))

    def labelled(number: int, seed: int) -> tuple[Tensor, Tensor]:
        rows = random_rows(500, number, seed)
        return rows, compare(judge, batch[rows[:, 0]], batch[rows[:, 1]], ["x"] * number)

    rows, choice = labelled(600, 1)
    config = FeatureConfig("brightness, colour:red", held_out=0.0)
    train_on_features(pairs_of(500, rows, choice), config, tmp_path / "r", tmp_path / "work")
    rows, choice = labelled(400, 2)
    scores = load_reward(str(tmp_path / "r"))(batch, ["x"] * 500)
    assert ((scores[rows[:, 0]] > scores[rows[:, 1]]).float() == choice).float().mean() >= 0.93


def test_general_preferences_learn_an_order_as_bradley_terry_does(tmp_path: Path) -> None:
    rows = random_rows(400, 400, 1)
    pairs = pairs_of(400, rows, truth(400)[rows[:, 0]] > truth(400)[rows[:, 1]])
    accuracy = {}
    for head in ("general", "pair"):
        config = RewardTrainingConfig(tiny_clip(), head, steps=200, learning_rate=3e-3, held_out=0.25)
        report = train_reward(pairs, config, tmp_path / head, tmp_path / f"work-{head}")
        accuracy[head] = report["ensemble"]["accuracy"]
    assert accuracy["general"] >= accuracy["pair"] - 0.05 and accuracy["general"] > 0.8, accuracy


def test_general_preferences_are_skew_symmetric_exactly() -> None:
    torch.manual_seed(0)
    head, (a, b, text) = GeneralPreference(6), torch.randn(3, 10, 6).unbind(0)
    assert torch.equal(head.difference(a, b, text), -head.difference(b, a, text))
    assert torch.equal(head.difference(a, a, text), torch.zeros(10))


def test_a_learned_reward_compares_by_its_raw_difference() -> None:
    reward: Any = load_reward("preference:scenes,member=0")
    a, b = torch.rand(2, 3, 3, 64, 64, generator=torch.Generator().manual_seed(0)).unbind(0)
    prompts = ["a star", "a circle", "two stars"]
    deviation = reward._stds.item()
    expected = torch.sigmoid((reward(a, prompts) - reward(b, prompts)) * deviation)
    torch.testing.assert_close(compare(reward, a, b, prompts), expected, rtol=1e-4, atol=1e-6)


def test_the_command_labels_pairs_that_training_reads(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for k in range(4):
        Image.new("RGB", (8, 8), (60 * k, 0, 0)).save(folder / f"{k}.png")
    arguments = ["rewards", "pairs", "--by", "hierarchy(brightness)", "--images", str(folder), "--prompt", "a star"]
    result = CliRunner().invoke(command, [*arguments, "--out", str(tmp_path / "pairs.jsonl")])
    assert result.exit_code == 0 and "6 pairs" in result.output
    read = read_pairs(tmp_path / "pairs.jsonl")
    for a, b, choice in zip(read.a, read.b, read.labels.choice.tolist(), strict=True):
        assert choice == float(str(a) > str(b))
