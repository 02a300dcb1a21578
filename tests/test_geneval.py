"""GenEval by a detector: requirements from prompts and metadata, rules on boxes by hand, a tiny OWLv2, drawn scenes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_vlm import tiny_owl
from torch import Tensor
from transformers import Owlv2ForObjectDetection, Owlv2Processor

from steer.apps.scenes.world import draw, random_scene
from steer.reward import RewardError, score
from steer.rewards.geneval import Box, Boxes, Clause, Geneval, Requirements, met, read_requirements, relations
from steer.rewards.parser import load_reward
from steer.rewards.scene import SceneReward, objects

IMAGE = torch.zeros(3, 100, 100)
CAT, DOG, CUP = Box(0, 40, 20, 60), Box(70, 45, 90, 65), Box(40, 0, 60, 20)


class Named:
    """Names colours from a table by the left side of the box."""

    def __init__(self, colours: Mapping[float, str]) -> None:
        self.colours = colours

    def name_colours(self, image: Tensor, boxes: Sequence[Box], kind: str) -> list[str]:
        return [self.colours[box.left] for box in boxes]


@pytest.mark.parametrize(
    ("prompt", "include", "exclude"),
    [
        ("a photo of a bench", [Clause("bench", 1)], []),
        ("a photo of three snowboards", [Clause("snowboard", 3)], [("snowboard", 4)]),
        ("a photo of a blue wine glass", [Clause("wine glass", 1, "blue")], []),
        ("a photo of a dog and a red cat.", [Clause("dog", 1), Clause("cat", 1, "red")], []),
        ("a dog right of a teddy bear", [Clause("teddy bear", 1), Clause("dog", 1, None, "right of", 0)], []),
        ("a dog to the left of two knives", [Clause("knif", 2), Clause("dog", 1, None, "left of", 0)], [("knif", 3)]),
        ("three boxes", [Clause("box", 3)], [("box", 4)]),
    ],
)
def test_prompts_of_genevals_forms_are_read(prompt: str, include: list[Clause], exclude: list[tuple[str, int]]) -> None:
    assert read_requirements(prompt, {}) == Requirements(tuple(include), tuple(exclude))


def test_metadata_of_geneval_comes_first() -> None:
    row: dict[str, Any] = {
        "include": [
            {"class": "cat", "count": 1},
            {"class": "dog", "count": 1, "color": "red", "position": ["right of", 0]},
        ],
        "exclude": [{"class": "cat", "count": 2}],
    }
    expected = Requirements((Clause("cat", 1), Clause("dog", 1, "red", "right of", 0)), (("cat", 2),))
    assert read_requirements("anything?", row) == expected
    for wrong in ({"include": [{"count": 1}]}, {"include": 3}, {"include": [{"class": "a", "count": "x"}]}):
        with pytest.raises(RewardError, match="is not GenEval's"):
            read_requirements("p", wrong)
    for prompt in ("", "what a day!", "a cat left of a dog above a cup", "7 cats"):
        with pytest.raises(RewardError, match=r"geneval: cannot read .* write 'three red apples'"):
            read_requirements(prompt, {})
    for prompt in ("seven apples", "a photo of a cat and twelve red dogs", "a dozen eggs"):
        with pytest.raises(RewardError, match=r"geneval: cannot read .* it counts to six"):
            read_requirements(prompt, {})


def test_relations_of_boxes_by_hand() -> None:
    assert relations(CAT, DOG) == {"left of"} and relations(DOG, CAT) == {"right of"}
    assert relations(CUP, Box(40, 60, 60, 80)) == {"above"} and relations(Box(40, 60, 60, 80), CUP) == {"below"}
    # 30 and 30 apart, less .1 (20 + 20): 26 / 42.4 = .61
    assert relations(Box(0, 0, 20, 20), Box(30, 30, 50, 50)) == {"left of", "above"}
    # 7 apart, less 4: 3/7
    assert relations(Box(0, 0, 20, 20), Box(7, 0, 27, 20)) == set() and relations(CAT, CAT) == set()


@pytest.mark.parametrize(
    ("prompt", "boxes", "expected"),
    [
        ("a cat", {"cat": [CAT]}, [True]),
        ("a cat", {}, [False]),
        ("two cats", {"cat": [CAT]}, [False, True]),
        ("two cats", {"cat": [CAT, DOG]}, [True, True]),
        ("two cats", {"cat": [CAT, DOG, CUP]}, [True, False]),
        ("a red cat", {"cat": [CAT]}, [True, True]),
        ("a blue cat", {"cat": [CAT]}, [True, False]),
        ("a red cat", {"cat": [DOG, CAT]}, [True, False]),  # the most confident one counts
        ("two red cats", {"cat": [CAT, DOG]}, [True, False, True]),
        ("a blue cat and a dog", {"cat": [CAT], "dog": [DOG]}, [True, False, True]),
        ("a cat left of a dog", {"cat": [CAT], "dog": [DOG]}, [True, True, True]),
        ("a cat right of a dog", {"cat": [CAT], "dog": [DOG]}, [True, True, False]),
        ("a cat left of a dog", {"cat": [CAT]}, [False, True, False]),
        ("a cat left of a red dog", {"cat": [CAT], "dog": [DOG]}, [True, False, True, False]),  # no right dog
    ],
)
def test_requirements_by_hand(prompt: str, boxes: Boxes, expected: list[bool]) -> None:
    namer = Named({CAT.left: "red", DOG.left: "blue", CUP.left: "green"})
    assert met(read_requirements(prompt, {}), boxes, IMAGE, namer) == expected


class Planted:
    """Boxes of a fixed picture."""

    def detect(self, image: Tensor, classes: Sequence[str]) -> Boxes:
        return {"cat": [CAT], "dog": [DOG]}


def test_the_score_is_the_share_and_strict_is_all_or_nothing() -> None:
    namer = Named({CAT.left: "red", DOG.left: "blue"})
    share = Geneval(detector=Planted(), namer=namer)
    strict = Geneval(detector=Planted(), namer=namer, strict="true")
    images, prompts = IMAGE[None].repeat(3, 1, 1, 1), ["a cat", "a blue cat", "a cat right of a dog"]
    assert score(share, images, prompts).tolist() == pytest.approx([1, 1 / 2, 2 / 3])
    assert score(strict, images, prompts).tolist() == [1, 0, 0]
    assert share.name == "geneval" and strict.name == "geneval,strict=true" and not share.differentiable


class SceneObjects:
    """A detector, and a namer of colours, that read drawn scenes exactly."""

    def detect(self, image: Tensor, classes: Sequence[str]) -> Boxes:
        boxes: dict[str, list[Box]] = {}
        self.colours = {}
        for thing in objects(image.permute(1, 2, 0).numpy()):
            box = Box(thing.x - 5, thing.y - 5, thing.x + 5, thing.y + 5)
            boxes.setdefault(thing.shape, []).append(box)
            self.colours[box] = thing.colour
        return boxes

    def name_colours(self, image: Tensor, boxes: Sequence[Box], kind: str) -> list[str]:
        return [self.colours[box] for box in boxes]


@pytest.mark.hard
def test_on_drawn_scenes_it_agrees_with_the_exact_reward() -> None:
    """500 pairs of scene and prompt, half of them of another scene: strict GenEval is 1 where `scene` is 1.

    `scene` also wants no other objects, which GenEval does not: those pairs are left out.
    """
    reader, agree, count, right = SceneObjects(), 0, 0, 0
    strict = Geneval(detector=reader, namer=reader, strict=True)
    exact = SceneReward()
    for number in range(500):
        rng = np.random.default_rng(number)
        scene, other = random_scene(rng), random_scene(rng)
        image = torch.from_numpy(draw(scene, rng)).permute(2, 0, 1)[None].float() / 255
        prompt = scene.prompt if number % 2 else other.prompt
        wanted = exact(image, [prompt]).item() == 1
        given = strict(image, [prompt]).item() == 1
        if given and not wanted and number % 2 == 0:  # what it asks for, among others
            continue
        count, agree, right = count + 1, agree + (wanted == given), right + wanted
    assert count > 480 and right > 240
    assert agree / count >= 0.99


def test_a_tiny_owl_runs_through_the_real_code(tmp_path: Path) -> None:
    """Boxes equal those of the model by hand: σ of the largest logit, centre and size to corners of a padded square."""
    from torchvision.ops import nms

    folder = tiny_owl(tmp_path / "owl")
    reward = load_reward(f"geneval:{folder},clip=scenes,threshold=0.01")
    image = torch.rand(3, 24, 48, generator=torch.Generator().manual_seed(0))
    boxes = reward._detector.detect(image, ["cat", "dog"])  # type: ignore[attr-defined]
    model, processor = Owlv2ForObjectDetection.from_pretrained(folder), Owlv2Processor.from_pretrained(folder)
    pixels = (image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    inputs = processor(text=[["a photo of a cat", "a photo of a dog"]], images=pixels, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    confidence, label = outputs.logits[0].max(-1)
    centre, size = outputs.pred_boxes[0, :, :2], outputs.pred_boxes[0, :, 2:]
    corners = torch.cat([centre - size / 2, centre + size / 2], -1) * 48  # the longer side
    assert sum(map(len, boxes.values())) > 0
    for k, name in enumerate(("cat", "dog")):
        rows = label == k
        kept = nms(corners[rows], confidence[rows].sigmoid(), 0.5)
        expected = corners[rows][kept]
        given = torch.tensor([[b.left, b.top, b.right, b.bottom] for b in boxes[name]]).reshape(-1, 4)
        assert torch.allclose(given, expected, atol=1e-3)
    scores = score(reward, image[None].repeat(2, 1, 1, 1), ["a red cat", "two dogs"])
    assert scores.shape == (2,) and scores.min() >= 0 and scores.max() <= 1


def test_options_that_cannot_be_are_one_line(tmp_path: Path) -> None:
    for text, message in (
        (f"geneval:{tmp_path}", f"detector '{tmp_path}'"),
        ("geneval:threshold=high", "threshold=high: use a number"),
        ("geneval:strict=perhaps", "strict=perhaps: use true or false"),
    ):
        with pytest.raises(RewardError, match=message):
            load_reward(text)
