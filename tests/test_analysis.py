"""Looking at rewards: checks that catch broken ones, contrast prompts, agreement of two, reports."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from steer.apps.scenes.world import TASKS, draw, random_request, random_scene
from steer.apps.scoring import (
    draw_scatter,
    images_with_prompts,
    render_check_results,
    render_consistency,
    score_all,
    score_consistency,
)
from steer.errors import InputError
from steer.files import read_image
from steer.reward import Reward
from steer.rewards.analysis import (
    CHECKS,
    CheckResult,
    Consistency,
    check_reward,
    compare,
    consistency,
    contrasts,
    kendall,
    pairwise_agreement,
    spearman,
    starc_distance,
)
from steer.rewards.colour import Brightness, ColourMatch
from steer.rewards.jpeg import JpegCompressibility
from steer.rewards.parser import load_reward
from steer.rewards.scene import SceneReward, SceneSoftReward, parse


def sample_scenes(count: int, seed: int) -> tuple[Tensor, list[str]]:
    rng = np.random.default_rng(seed)
    scenes = [random_scene(rng, random_request(rng, list(TASKS)[k % len(TASKS)])) for k in range(count)]
    pictures = np.stack([draw(scene, rng) for scene in scenes])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255, [scene.prompt for scene in scenes]


IMAGES, PROMPTS = sample_scenes(6, seed=0)


def made(call: Callable[[Tensor, Sequence[str]], Any], differentiable: bool = False) -> Reward:
    class Made:
        name = "made"

        def __init__(self) -> None:
            self.differentiable = differentiable

        def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            return call(images, prompts)

    return Made()


def check_results(reward: Reward, images: Tensor = IMAGES, prompts: Sequence[str] = PROMPTS) -> dict[str, CheckResult]:
    results = check_reward(reward, images, prompts)
    assert [finding.name for finding in results] == list(CHECKS)
    assert all("\n" not in finding.detail for finding in results)
    return {finding.name: finding for finding in results}


def failed(reward: Reward) -> set[str]:
    return {name for name, finding in check_results(reward).items() if finding.passed is False}


def mean(images: Tensor) -> Tensor:
    return images.mean((1, 2, 3))


@pytest.mark.parametrize(
    "reward",
    [SceneSoftReward(), SceneReward(), ColourMatch("red"), Brightness(), Brightness(0.3), JpegCompressibility()],
    ids=lambda reward: reward.name,
)
def test_good_rewards_pass(reward: Reward) -> None:
    assert not failed(reward)


@pytest.mark.hard
def test_the_gradient_check_passes_a_reward_with_kinks_wherever_it_stands() -> None:
    for seed in range(1, 5):
        results = check_reward(SceneSoftReward(), *sample_scenes(4, seed))
        assert next(finding for finding in results if finding.name == "gradient").passed


def test_a_reward_that_changes_its_mind_is_caught() -> None:
    calls = []

    def call(images: Tensor, prompts: Sequence[str]) -> Tensor:
        calls.append(1)
        return mean(images) + 0.25 * len(calls)

    assert "determinism" in failed(made(call))
    assert check_results(made(call))["determinism"].detail == "two calls differ by at most 0.25"


def test_a_reward_that_returns_one_buffer_again_and_again_is_seen_through() -> None:
    buffer, calls = torch.zeros(len(IMAGES)), []

    def call(images: Tensor, prompts: Sequence[str]) -> Tensor:
        calls.append(1)
        return buffer.copy_(torch.full((len(IMAGES),), float(len(calls))))

    assert "determinism" in failed(made(call))


@pytest.mark.parametrize(
    "call",
    [
        lambda images, prompts: mean(images.detach()) - images.detach().mean(),
        lambda images, prompts: mean(images.detach()) + torch.arange(len(images)),
    ],
    ids=["depends on its neighbours", "depends on its place"],
)
def test_a_reward_that_depends_on_the_batch_is_caught(call: Callable[..., Tensor]) -> None:
    assert failed(made(call)) == {"batch invariance"}


class Tilted(torch.autograd.Function):
    """The mean, with a gradient that is wrong by a factor."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, factor: Tensor) -> Tensor:  # type: ignore[override]
        ctx.shape, ctx.factor = images.shape, factor
        return mean(images)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        right = slope.view(-1, 1, 1, 1).expand(ctx.shape) / math.prod(ctx.shape[1:])
        return ctx.factor * right, None


RED_ONLY = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1)


@pytest.mark.parametrize("factor", [torch.tensor(2.0), torch.tensor(-1.0), torch.tensor(0.0), RED_ONLY])
def test_a_wrong_gradient_is_caught(factor: Tensor) -> None:
    assert failed(made(lambda images, prompts: Tilted.apply(images, factor), differentiable=True)) == {"gradient"}
    right = made(lambda images, prompts: Tilted.apply(images, torch.tensor(1.0)), differentiable=True)
    assert not failed(right)


def test_claims_about_gradients_must_hold() -> None:
    detached = check_results(made(lambda images, prompts: mean(images.detach()), differentiable=True))["gradient"]
    assert detached.passed is False and "no gradient reaches" in detached.detail
    unsaid = check_results(made(lambda images, prompts: mean(images)))["gradient"]
    assert unsaid.passed is False and "differentiable = False" in unsaid.detail
    through_numpy = made(lambda images, prompts: torch.from_numpy(images.numpy().mean((1, 2, 3))))
    assert check_results(through_numpy)["gradient"].passed
    infinite = made(lambda images, prompts: (mean(images) - mean(images)).sqrt(), differentiable=True)
    assert check_results(infinite)["gradient"] == CheckResult("gradient", False, "the gradient has nan or inf")
    constant = made(lambda images, prompts: 0 * mean(images), differentiable=True)
    assert check_results(constant)["gradient"].passed and "flat" in check_results(constant)["gradient"].detail


@pytest.mark.parametrize("differentiable", [False, True])
def test_a_reward_that_writes_into_the_images_is_caught(differentiable: bool) -> None:
    def call(images: Tensor, prompts: Sequence[str]) -> Tensor:
        scores = mean(images) if differentiable else mean(images.detach())
        images.detach().mul_(0.5)
        return scores

    assert failed(made(call, differentiable)) == {"images unmodified"}


@pytest.mark.parametrize(
    ("returned", "message"), [(torch.nan, "returned nan for image 0"), (torch.inf, "returned inf for image 0")]
)
def test_scores_that_are_not_finite_break_the_contract(returned: float, message: str) -> None:
    results = check_results(made(lambda images, prompts: torch.full((len(images),), returned)))
    assert results["contract"].passed is False and message in results["contract"].detail
    assert all(finding.passed is None for name, finding in results.items() if name != "contract")


def test_a_reward_that_raises_fails_its_check_and_no_other() -> None:
    def call(images: Tensor, prompts: Sequence[str]) -> Tensor:
        if len(images) == 1:
            raise ValueError("needs a batch\nof two")
        return mean(images.detach())

    assert failed(made(call)) == {"batch invariance"}
    assert "needs a batch of two" in check_results(made(call))["batch invariance"].detail


def test_prompt_sensitivity_is_reported_and_judged_by_nobody() -> None:
    by_length = made(lambda images, prompts: torch.tensor([float(len(prompt)) for prompt in prompts]))
    results = check_results(by_length, IMAGES[:2], ["a", "abc"])["prompt sensitivity"]
    assert results.passed is None and results.detail == "another prompt changes 100% of the scores, by 2 on average"
    same = check_results(by_length, IMAGES[:2], ["a red cat"] * 2)["prompt sensitivity"]  # against "a blue cat"
    assert same.detail == "another prompt changes 100% of the scores, by 1 on average"
    assert "needs two prompts" in check_results(by_length, IMAGES[:1], ["a cat"])["prompt sensitivity"].detail
    assert check_results(by_length, IMAGES[:1], ["a cat"])["batch invariance"].passed is None


def test_images_and_prompts_that_do_not_fit_are_refused() -> None:
    for images in (IMAGES[0], IMAGES[:0], IMAGES[:, :1], (IMAGES * 255).byte()):
        with pytest.raises(InputError, match=r"floats \(N, 3, H, W\)"):
            check_reward(Brightness(), images, PROMPTS)
    with pytest.raises(InputError, match="got 1 for 6 images"):
        check_reward(Brightness(), IMAGES, PROMPTS[:1])


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a dog", []),
        ("a red dog", ["colour: a blue dog"]),
        ("A RED dog", ["colour: A BLUE dog"]),
        ("Blue and yellow", ["colour: Purple and yellow", "colour: Blue and purple"]),
        ("an orange car", ["colour: a blue car"]),
        ("a photo of an orange", []),
        ("an orange on a red plate", ["colour: an orange on a blue plate"]),
        ("a grey cat and a gray dog", ["colour: a blue cat and a gray dog", "colour: a grey cat and a blue dog"]),
        (
            "a red car and an orange bus",
            [
                "colour: a blue car and an orange bus",
                "colour: a red car and a blue bus",
                "binding: an orange car and a red bus",
            ],
        ),
        ("a crimson cat", ["colour: a blue cat"]),
        ("a scarlet, blue, yellow, violet, green and black flag", []),
        ("a bored, reddish, blackened shredder", []),
        ("one cat", []),
        ("two cats", ["count: three cats"]),
        ("Ten cats", ["count: Nine cats"]),
        ("tenders, often", []),
        ("a cat to the left of a dog", ["relation: a cat to the right of a dog"]),
        ("a cat in  front of a dog", ["relation: a cat behind a dog"]),
        ("Behind a dog", ["relation: In front of a dog"]),
        ("a cat on top of a box", ["relation: a cat under a box"]),
        ("a cat under a box", ["relation: a cat on top of a box"]),
        ("a cat above a box", ["relation: a cat below a box"]),
        ("a cat left a dog, undergrowth", []),
    ],
)
def test_contrasts_change_one_fact(prompt: str, expected: list[str]) -> None:
    assert [f"{contrast.kind}: {contrast.prompt}" for contrast in contrasts(prompt)] == expected


@pytest.mark.parametrize("prompt", ["a black and white photo", "a red, white cat", "a red ball and a blue ball"])
def test_colours_are_not_exchanged_where_that_says_the_same(prompt: str) -> None:
    assert {contrast.kind for contrast in contrasts(prompt)} == {"colour"}


@pytest.mark.hard
def test_contrasts_of_scenes_are_scenes_and_false() -> None:
    images, prompts = sample_scenes(240, seed=1)
    kinds = set()
    for image, prompt in zip(images, prompts, strict=True):
        if SceneReward()(image[None], [prompt]) < 1:
            continue
        for contrast in contrasts(prompt):
            kinds.add(contrast.kind)
            assert parse(contrast.prompt).task == parse(prompt).task
            assert SceneReward()(image[None], [contrast.prompt]) < 1, (prompt, contrast)
    assert kinds == {"colour", "binding", "count", "relation"}


@pytest.mark.hard
def test_the_soft_reward_prefers_the_prompt_over_its_contrasts() -> None:
    results = consistency(SceneSoftReward(), *sample_scenes(240, seed=2))
    assert list(results) == ["colour", "binding", "count", "relation", "all"]
    assert all(kind.share > 0.9 and kind.pairs >= 40 and kind.margin > 0.1 for kind in results.values())


def test_consistency_by_hand() -> None:
    scores = {"two red cats": 1.0, "two blue cats": 0.5, "three red cats": 1.0, "a cat": 9.0, "a red cat": 0.0}
    reward = made(lambda images, prompts: torch.tensor([scores.get(prompt, 0.25) for prompt in prompts]))
    results = consistency(reward, IMAGES[:3], ["two red cats", "a cat", "a red cat"])
    assert results == {
        "colour": Consistency(0.5, 2, pytest.approx((0.5 - 0.25) / 2)),  # one right, one wrong
        "count": Consistency(0.5, 1, 0.0),  # a tie
        "all": Consistency(0.5, 3, pytest.approx(0.25 / 3)),
    }
    assert consistency(reward, IMAGES[:1], ["a cat"]) == {}
    assert consistency(Brightness(), IMAGES, PROMPTS)["all"].share == 0.5


def test_agreement_by_hand() -> None:
    a, b, prompts = [1.0, 2.0, 3.0, 10.0, 11.0], [1.0, 3.0, 2.0, 5.0, 5.0], ["p", "p", "p", "q", "q"]
    results = compare(torch.tensor(a), torch.tensor(b), prompts)
    # Within p: 12 and 13 alike, 23 unlike; within q: a tie.
    assert results.pairwise_agreement == pytest.approx((1 + 1 + 0 + 0.5) / 4)
    # Ranks 1 2 3 4 5 and 1 3 2 4.5 4.5; 8 pairs alike, 1 unlike, 1 tied in b.
    assert results.spearman == pytest.approx(8.5 / math.sqrt(10 * 9.5))
    assert results.kendall == pytest.approx(7 / math.sqrt(10 * 9))
    # Canonical (−1 0 1 −½ ½) and (−1 1 0 0 0): their cosine is 1 / √(2.5 · 2).
    assert results.starc == pytest.approx(math.sqrt((1 - 1 / math.sqrt(5)) / 2))
    assert results.n == 5


def test_undefined_correlations_are_nan() -> None:
    assert math.isnan(spearman([1.0, 1.0], [0.0, 1.0])) and math.isnan(kendall([1.0, 2.0], [3.0, 3.0]))
    alone = compare([1.0, 2.0], [1.0, 2.0], ["p", "q"])
    assert alone.spearman == pytest.approx(1) and math.isnan(alone.pairwise_agreement) and math.isnan(alone.starc)


@pytest.mark.parametrize(
    ("a", "b", "prompts", "message"),
    [
        ([1.0, 2.0], [1.0], ["p", "p"], "scores of the same images"),
        ([1.0, 2.0], [1.0, 2.0], ["p"], "scores of the same images"),
        ([[1.0, 2.0]], [[1.0, 2.0]], ["p"], "one number each"),
        ([1.0], [1.0], ["p"], "at least 2 images"),
        ([1.0, math.nan], [1.0, 2.0], ["p", "p"], "finite"),
    ],
)
def test_scores_that_do_not_belong_together_are_refused(a: Any, b: Any, prompts: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        compare(a, b, prompts)


scored = st.lists(
    st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3), st.sampled_from("pqr")), min_size=2, max_size=12
).map(lambda rows: tuple(map(list, zip(*rows, strict=True))))


@given(rows=scored)
def test_starc_is_a_distance_from_0_to_1(rows: tuple[list[float], list[float], list[str]]) -> None:
    a, b, groups = rows
    distance = starc_distance(a, b, groups)
    assert 0 <= distance <= 1 + 1e-12
    assert starc_distance(b, a, groups) == pytest.approx(distance)
    assert starc_distance(a, a, groups) == 0


@given(
    scores=st.lists(st.integers(-50, 50), min_size=3, max_size=9, unique=True),
    scale=st.floats(0.1, 10),
    shifts=st.tuples(st.floats(-100, 100), st.floats(-100, 100)),
)
def test_starc_sees_neither_scale_nor_a_shift_of_a_prompt(
    scores: list[int], scale: float, shifts: tuple[float, float]
) -> None:
    groups = ["pq"[k % 2] for k in range(len(scores))]
    a = np.array(scores, dtype=float)
    other = scale * a + np.array([shifts[k % 2] for k in range(len(scores))])
    assert starc_distance(a, other, groups) == pytest.approx(0, abs=1e-6)
    assert starc_distance(a, -other, groups) == pytest.approx(1)
    assert pairwise_agreement(a, other, groups) == 1 and pairwise_agreement(a, -other, groups) == 0


def test_a_constant_is_half_way_from_every_reward() -> None:
    groups = ["p", "p", "q", "q"]
    assert starc_distance([0.1, 0.1, 0.7, 0.7], [1.0, 2.0, 3.0, 5.0], groups) == pytest.approx(0.5)
    assert starc_distance([0.1, 0.1, 0.7, 0.7], [1.0, 1.0, 1.0, 1.0], groups) == 0


def write_images(folder: Path, *names: str, size: int = 8) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (size, size), (51 * number, 0, 0)).save(folder / name)


def test_prompts_of_a_folder_come_from_its_report(tmp_path: Path) -> None:
    write_images(tmp_path, "grid.png", "001-b/00.png", "000-a/00.png", "000-a/base-00.png")
    entries = [
        {"prompt": "b", "images": ["001-b/00.png"]},
        {"prompt": "a", "images": ["000-a/00.png"], "base": {"images": ["000-a/base-00.png"], "rewards": [0]}},
    ]
    (tmp_path / "report.json").write_text(json.dumps({"prompts": entries}))
    paths, prompts = images_with_prompts(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in paths] == ["000-a/00.png", "000-a/base-00.png", "001-b/00.png"]
    assert prompts == ["a", "a", "b"]
    with pytest.raises(InputError, match=r"has its prompts in report\.json"):
        images_with_prompts(tmp_path, "another")


def test_prompts_of_a_folder_come_from_lines_or_are_one_for_all(tmp_path: Path) -> None:
    write_images(tmp_path, "b.JPG", "sub/a.png", "c.webp")
    (tmp_path / "notes.txt").write_text("no image")
    assert images_with_prompts(tmp_path, "all") == (
        [tmp_path / "b.JPG", tmp_path / "c.webp", tmp_path / "sub/a.png"],
        ["all"] * 3,
    )
    with pytest.raises(InputError, match=r"report\.json.*prompts\.jsonl.*one prompt for all"):
        images_with_prompts(tmp_path)
    lines = [{"image": "sub/a.png", "prompt": "x"}, {"image": "b.JPG", "prompt": "y"}]
    (tmp_path / "prompts.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    assert images_with_prompts(tmp_path) == ([tmp_path / "b.JPG", tmp_path / "sub/a.png"], ["y", "x"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": "../secret.png", "prompt": "x"}', "leads out of"),
        ('{"image": "/etc/secret.png", "prompt": "x"}', "leads out of"),
        ('{"image": "link.png", "prompt": "x"}', "leads out of"),
        ('{"image": "gone.png", "prompt": "x"}', "no image 'gone.png'"),
        ('{"image": "a.png"}', "line 1: expected"),
        ("[1]", "line 1: expected"),
        ("{", "line 1: not JSON"),
        ("", "no images"),
    ],
)
def test_a_list_of_prompts_that_is_wrong_is_refused_by_its_line(tmp_path: Path, line: str, message: str) -> None:
    write_images(tmp_path, "secret.png", "folder/a.png")
    (tmp_path / "folder" / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "folder" / "prompts.jsonl").write_text(line)
    with pytest.raises(InputError, match=message):
        images_with_prompts(tmp_path / "folder")


@pytest.mark.parametrize(
    "report",
    [
        "[]",
        "{",
        "{}",
        "3",
        '{"prompts": []}',
        '{"prompts": [3]}',
        '{"prompts": [{"prompt": "x"}]}',
        '{"prompts": [{"images": ["a.png"]}]}',
        '{"prompts": [{"prompt": "x", "images": 3}]}',
        '{"prompts": [{"prompt": "x", "images": [3]}]}',
        '{"prompts": [{"prompt": 3, "images": ["a.png"]}]}',
        '{"prompts": [{"prompt": "x", "images": [], "base": 3}]}',
    ],
)
def test_a_report_that_is_none_is_refused(tmp_path: Path, report: str) -> None:
    write_images(tmp_path, "a.png")
    (tmp_path / "report.json").write_text(report)
    with pytest.raises(InputError, match=r"report\.json"):
        images_with_prompts(tmp_path)


def test_a_line_may_have_a_column_named_like_a_checksum(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x", "sha256": "00"}')
    assert images_with_prompts(tmp_path) == ([tmp_path / "a.png"], ["x"])


def test_files_of_any_size_are_scored_in_their_order(tmp_path: Path) -> None:
    write_images(tmp_path, *(f"a{k}.png" for k in range(5)))
    write_images(tmp_path, "b0.png", "b1.png", size=5)
    paths, prompts = images_with_prompts(tmp_path, "x")
    sizes: list[tuple[int, ...]] = []

    def red(images: Tensor, texts: Sequence[str]) -> Tensor:
        sizes.append(tuple(images.shape))
        return images[:, 0].mean((1, 2))

    scores = score_all(made(red), paths, prompts, batch=2)
    assert scores.tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 0, 0.2])
    assert sizes == [(2, 3, 8, 8), (2, 3, 8, 8), (1, 3, 8, 8), (2, 3, 5, 5)]
    assert len(score_all(made(red), [], [])) == 0
    with pytest.raises(InputError, match="at least 1"):
        score_all(made(red), paths, prompts, batch=0)


def test_images_that_are_compared_are_scored_in_one_call(tmp_path: Path) -> None:
    write_images(tmp_path, *(f"a{k:02}.png" for k in range(17)))
    reward, (paths, prompts) = load_reward("tournament(brightness)"), images_with_prompts(tmp_path, "x")
    expected = reward(torch.stack([read_image(path) for path in paths]), prompts)
    torch.testing.assert_close(score_all(reward, paths, prompts), expected)
    write_images(tmp_path, "b0.png", "b1.png", size=5)
    with pytest.raises(InputError, match="compares images, and these have several sizes"):
        score_all(reward, *images_with_prompts(tmp_path, "x"))


def test_consistency_of_files_is_that_of_their_images(tmp_path: Path) -> None:
    pixels = (IMAGES * 255).round().byte().permute(0, 2, 3, 1).numpy()
    paths = [tmp_path / f"{k}.png" for k in range(len(pixels))]
    for path, picture in zip(paths, pixels, strict=True):
        Image.fromarray(picture).save(path)
    results, expected = (
        score_consistency(SceneSoftReward(), paths, PROMPTS, 4),
        consistency(SceneSoftReward(), IMAGES, PROMPTS),
    )
    assert {kind: (row.share, row.pairs) for kind, row in results.items()} == {
        kind: (row.share, row.pairs) for kind, row in expected.items()
    }
    assert score_consistency(SceneSoftReward(), paths[:1], ["a circle"]) == {}


@pytest.mark.parametrize("kinds", [2, 11])
def test_the_scatter_is_drawn_for_few_and_many_prompts(tmp_path: Path, kinds: int) -> None:
    a, prompts = torch.rand(22, generator=torch.Generator().manual_seed(0)), [f"_${k % kinds}" for k in range(22)]
    path = draw_scatter("a", a, "$b_", 1 - a, prompts, compare(a, 1 - a, prompts), tmp_path / "scatter.png")
    with Image.open(path) as picture:
        assert picture.width == 768 and len(picture.convert("RGB").getcolors(10**6) or []) > 50


def test_findings_and_consistency_as_text() -> None:
    text = render_check_results(
        [CheckResult("contract", True, "x"), CheckResult("gradient", False, "y"), CheckResult("a", None, "z")]
    )
    assert text == "ok      contract  x\nFAILED  gradient  y\n-       a         z"
    table = render_consistency({"count": Consistency(0.75, 4, 0.125), "all": Consistency(0.75, 4, 0.125)})
    assert table.splitlines()[1].split() == ["count", "75.0%", "4", "0.125"]
    assert len({len(line) for line in table.splitlines()}) == 1


class FirstWords:
    """Counts red among the first words of a prompt."""

    name, differentiable = "first-words", False

    def __init__(self, words: int) -> None:
        self.words = words

    def __call__(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return torch.tensor([float("red" in prompt.split()[: self.words]) for prompt in prompts])


@pytest.mark.parametrize(
    ("words", "detail"),
    [
        (5, "no limit is known; measured: words behind the first 5 change no score"),
        (77, "no limit is known; measured: words behind the first 77 change no score"),
        (600, "no limit is known; the last of 512 words still changes a score"),
        (0, "no limit is known"),
    ],
)
def test_the_limit_of_prompts_is_measured(words: int, detail: str) -> None:
    images = torch.rand(2, 3, 8, 8)
    results = {one.name: one for one in check_reward(FirstWords(words), images, ["red", "blue"])}
    assert results["prompt limit"].detail == detail
    assert "MiB" in results["memory"].detail
    assert [one.name for one in check_reward(FirstWords(3), images, ["a", "b"], ["contract"])] == ["contract"]
