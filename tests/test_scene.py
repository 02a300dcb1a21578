"""The scene reward against scenes that are drawn, and the language against itself."""

import json
from collections import Counter
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steer.apps.scenes.training import FRESH, training_scenes
from steer.apps.scenes.world import (
    HELD_OUT,
    LISTS,
    TASKS,
    TRAINING,
    TUNING,
    implied,
    is_held_out,
    random_request,
    random_scene,
    true_requests,
    write_prompt_lists,
)
from steer.assets import PROMPTS, TEXT_LISTS
from steer.reward import RewardError
from steer.rewards.scene import (
    COLOURS,
    RELATIONS,
    SHAPES,
    Phrase,
    SceneRequest,
    SceneReward,
    SceneSoftReward,
    objects,
    parse,
    requirements,
)
from steer.training.supervised import batch_at

requests = st.builds(
    lambda seed, task: random_request(np.random.default_rng(seed), task),
    st.integers(0, 2**32),
    st.sampled_from([*TASKS]),
)


@given(request=requests)
@settings(max_examples=300, deadline=None)
def test_parse_is_the_inverse_of_print(request: SceneRequest) -> None:
    assert parse(str(request)) == request
    assert parse(f" A photo of {request}. ") == request
    assert request.canonical.canonical == request.canonical


@pytest.mark.parametrize(
    ("prompt", "task"),
    [
        ("a circle", "single_object"),
        ("a circle and a star", "two_object"),
        ("three crosses", "counting"),
        ("a red circle", "colors"),
        ("a circle to the left of a star", "position"),
        ("a red circle and a blue star", "color_attr"),
    ],
)
def test_each_task_of_geneval_has_its_wording(prompt: str, task: str) -> None:
    assert parse(prompt).task == task


@pytest.mark.parametrize(
    "prompt", ["", "a dog", "a red", "five circles", "a circle and a circle", "a circle and a star and a cross"]
)
def test_what_the_language_lacks_is_refused_with_an_example(prompt: str) -> None:
    with pytest.raises(RewardError, match="three red circles"):
        parse(prompt)


@pytest.fixture(scope="module", params=[600, pytest.param(2000, marks=pytest.mark.hard)])
def fresh(request: pytest.FixtureRequest) -> tuple[torch.Tensor, list[str]]:
    images, prompts = training_scenes(request.param, first=FRESH)
    return images.float() / 255, prompts


@pytest.mark.few(1)
def test_the_exact_reward_accepts_fresh_scenes_and_refuses_wrong_captions(
    fresh: tuple[torch.Tensor, list[str]],
) -> None:
    images, prompts = fresh
    assert (SceneReward()(images, prompts) == 1).float().mean() >= 0.995
    scenes = [random_scene(np.random.default_rng(FRESH + k)) for k in range(len(prompts))]
    others = prompts[1:] + prompts[:1]
    wrong = [k for k, scene in enumerate(scenes) if parse(others[k]).canonical not in true_requests(scene.things)]
    accepted = SceneReward()(images[wrong], [others[k] for k in wrong]) == 1
    assert len(wrong) > 0.75 * len(prompts) and accepted.float().mean() <= 0.01


@pytest.mark.parametrize(
    ("prompt", "wrong"),
    [
        ("a red circle left of a blue star", "a red circle right of a blue star"),
        ("a red circle left of a blue star", "a blue circle left of a red star"),
        ("three green crosses", "two green crosses"),
        ("three green crosses", "three red crosses"),
        ("a yellow square", "a yellow circle"),
    ],
)
def test_one_swapped_word_costs_both_rewards(prompt: str, wrong: str) -> None:
    from steer.apps.scenes.world import draw

    rng = np.random.default_rng(0)
    pictures = np.stack([draw(random_scene(rng, parse(prompt)), rng) for _ in range(8)])
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    for reward in (SceneReward(), SceneSoftReward()):
        assert (reward(images, [prompt] * 8) > reward(images, [wrong] * 8)).all()


def test_the_fraction_counts_requirements() -> None:
    image = np.full((64, 64, 3), 0.95)
    image[10:26, 10:26] = COLOURS["red"]
    detected = objects(image)
    assert [(thing.colour, thing.shape) for thing in detected] == [("red", "square")]
    both = SceneRequest((Phrase(1, "red", "square"), Phrase(1, "blue", "star")), "left of")
    expected = {"2 objects": False, "a square": True, "a red square": True}
    assert requirements(both, detected) == expected | {"a star": False, "a blue star": False, "left of": False}
    images, prompt = torch.from_numpy(image).permute(2, 0, 1)[None], "a red square left of a blue star"
    assert SceneReward().checklist(images, [prompt]) == [requirements(both, detected)]
    assert SceneReward()(images, [prompt]).item() == pytest.approx(2 / 6)


def test_the_exact_reward_reads_larger_images_too(fresh: tuple[torch.Tensor, list[str]]) -> None:
    images, prompts = fresh
    large = torch.nn.functional.interpolate(images[:200], scale_factor=4, mode="bilinear")
    assert (SceneReward()(large, prompts[:200]) == 1).float().mean() > 0.97


@pytest.mark.hard
def test_the_soft_reward_still_tells_blurry_scenes_apart(fresh: tuple[torch.Tensor, list[str]]) -> None:
    images, prompts = fresh[0][:300], fresh[1][:300]
    others = prompts[1:] + prompts[:1]
    wrongly = torch.tensor([parse(a).canonical != parse(b).canonical for a, b in zip(prompts, others, strict=True)])
    for blur, error_text in ((1, 0.93), (4, 0.88), (8, 0.7)):
        blurry = torch.nn.functional.interpolate(torch.nn.functional.avg_pool2d(images, blur), size=64, mode="bilinear")
        right, wrong = (SceneSoftReward()(blurry, texts) for texts in (prompts, others))
        assert ((right >= 0) & (right <= 1)).all()
        assert (right > wrong)[wrongly].float().mean() > error_text


def test_the_soft_reward_has_gradients_of_its_pixels() -> None:
    images, prompts = training_scenes(4)
    pixels = (images.double() / 255).requires_grad_()
    SceneSoftReward()(pixels, prompts).sum().backward()
    assert pixels.grad is not None
    direction = torch.sign(pixels.grad)
    step = 1e-3 * direction
    with torch.no_grad():
        higher, lower = (SceneSoftReward()((pixels + sign * step), prompts).sum() for sign in (1, -1))
    assert higher > lower


def test_training_scenes_are_their_numbers_and_hold_nothing_back_wrongly() -> None:
    images, prompts = training_scenes(20, first=40)
    again, texts = training_scenes(5, first=50)
    assert torch.equal(images[10:15], again) and prompts[10:15] == texts
    for number in range(400):
        scene = random_scene(np.random.default_rng(number))
        assert not is_held_out(scene.request)
        assert not any(map(is_held_out, true_requests(scene.things)))


def test_batches_of_an_epoch_cover_it() -> None:
    rows = torch.cat([batch_at(step, 10, 100) for step in range(20, 30)])
    assert rows.sort().values.tolist() == list(range(100))


def test_prompt_lists_are_fixed_and_disjoint_and_reach_every_task() -> None:
    from steer.apps.prompts import load_prompts

    held_out, tuning = (load_prompts(str(PROMPTS[name])) for name in ("scenes-heldout", "scenes-tuning"))
    assert len(held_out) >= 200 and len(set(held_out)) == len(held_out)
    assert all(is_held_out(parse(prompt)) for prompt in held_out)
    assert not any(is_held_out(parse(prompt)) for prompt in tuning)
    assert {parse(prompt).task for prompt in held_out} == set(HELD_OUT)
    assert {parse(prompt).task for prompt in tuning} == set(TUNING) == set(TASKS)
    assert not {parse(p).canonical for p in held_out} & {parse(p).canonical for p in tuning}
    assert len(COLOURS) * len(SHAPES) == 30


@pytest.mark.hard
def test_prompt_lists_are_what_their_function_writes(tmp_path: Path) -> None:
    write_prompt_lists(tmp_path)
    assert {path.stem for path in tmp_path.iterdir()} == set(LISTS) == set(PROMPTS) - set(TEXT_LISTS)
    for name in LISTS:
        assert PROMPTS[name].read_bytes() == (tmp_path / f"{name}.jsonl").read_bytes()


def listed(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in PROMPTS[name].read_text().splitlines()]


def test_training_prompts_are_tagged_and_balanced_as_far_as_there_are_others() -> None:
    records = listed("scenes-training")
    assert all(str(parse(record["prompt"])) == record["prompt"] for record in records)
    assert all(parse(record["prompt"]).task == record["tag"] for record in records)
    assert len({record["prompt"] for record in records}) == len(records) == 599
    tags = Counter(record["tag"] for record in records)
    assert tags == TRAINING and list(tags) == list(TASKS) and tags["position"] == tags["color_attr"]
    large = [parse(r["prompt"]) for r in records if r["tag"] in ("position", "color_attr")]
    for words, share in ((RELATIONS, 0.5 / 4), (SHAPES, 2 / 5), (COLOURS, 2 / 6)):
        for word in words:  # each about as often as each other
            assert 0.6 * share < sum(word in str(request) for request in large) / len(large) < 1.5 * share


def everything() -> set[SceneRequest]:
    """All that the language can ask with up to four of a kind, or with two kinds both coloured or both not."""
    ones = {
        SceneRequest((Phrase(count, colour, shape),))
        for count in (1, 2, 3, 4)
        for colour in (None, *COLOURS)
        for shape in SHAPES
    }
    pairs = [(None, None), *permutations(COLOURS, 2)]
    twos = {
        SceneRequest((Phrase(1, first, a), Phrase(1, second, b)), relation)
        for a, b in permutations(SHAPES, 2)
        for first, second in pairs
        for relation in (None, *RELATIONS)
    }
    return ones | twos


def test_training_prompts_share_nothing_with_the_other_lists_nor_with_what_is_held_out() -> None:
    held_out, tuning, training = ([parse(record["prompt"]) for record in listed(name)] for name in list(LISTS)[:3])
    # What a request holds true in every scene of it, found another way: its words, left out where they can be.
    for request in training:
        uncoloured = parse(" ".join(word for word in str(request).split() if word not in COLOURS))
        components = [request, uncoloured, *(replace(part, relation=None) for part in (request, uncoloured))]
        assert not any(map(is_held_out, components))
    assert not {r.canonical for r in training} & {r.canonical for r in held_out}
    assert not set(training) & set(tuning)
    others = {r.canonical for r in tuning if r.task != "two_object"}
    assert not others & {r.canonical for r in training}
    # Of the small tasks nothing is left out that could be in.
    rest = {
        r for r in everything() - set(tuning) if not any(map(is_held_out, implied(r))) and r.canonical not in others
    }
    for task in ("single_object", "two_object", "counting", "colors"):
        assert {r for r in rest if r.task == task} == {r for r in training if r.task == task}


def test_every_training_prompt_can_be_drawn_and_its_scene_has_the_full_exact_reward() -> None:
    from steer.apps.scenes.world import draw

    prompts, rng = [record["prompt"] for record in listed("scenes-training")], np.random.default_rng(0)
    pictures = np.stack([draw(random_scene(rng, parse(prompt)), rng) for prompt in prompts])
    rewards = SceneReward()(torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255, prompts)
    assert torch.isfinite(rewards).all() and (rewards == 1).float().mean() >= 0.995
