"""Labelling one's own images: pairs, the planned overlap, skips, the table that rewards learn from."""

import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

pytest.importorskip("gradio")

from conftest import Steer

from steer.apps.demo.image_labels import ImageLabelStore, pairs_of
from steer.apps.demo.label_tab import LabelSession, group_view
from steer.apps.demo.labels import LabelRequest, Progress, goal_text
from steer.errors import InputError
from steer.files import read_image
from steer.rewards.preference_pairs import read_pairs

ADA, BEN, CLEO = (LabelRequest(name, ("own images",), 2, 6) for name in ("Ada", "Ben", "Cleo"))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Four images of one prompt and three of another: 6 + 3 pairs."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(7):
        Image.new("RGB", (2000, 10), (number * 30, 0, 0)).save(folder / f"{number}.jpg")
        (folder / f"{number}.txt").write_text("a star" if number < 4 else "a cross")
    return folder


@pytest.fixture
def store(images: Path, tmp_path: Path) -> ImageLabelStore:
    return ImageLabelStore(images, tmp_path / "labels")


def answer_all(store: ImageLabelStore, request: LabelRequest, most: int = 99) -> list[str]:
    """Answer every pair that is offered by its first image; return their ids."""
    given: list[str] = []
    while len(given) < most and (pair := store.offer(request)) is not None:
        assert store.choose(request.annotator, pair.id, 0)
        given.append(pair.id)
    return given


def test_pairs_are_all_pairs_of_a_prompt_in_the_same_order(images: Path) -> None:
    pairs = pairs_of(images)
    expected = {frozenset(pair) for group in ("0123", "456") for pair in combinations(group, 2)}
    assert {frozenset(file.stem for file in pair.files) for pair in pairs} == expected and len(pairs) == 9
    assert pairs == pairs_of(images) and [pair.shared for pair in pairs] == [True, False, False] * 3
    assert {pair.prompt for pair in pairs if pair.files[0].stem < "4"} == {"a star"}
    assert all(picture.startswith(b"\x89PNG") for picture in pairs[0].pictures())


def test_annotators_see_the_pixels_that_a_reward_learns_from(tmp_path: Path) -> None:
    """The sensor of a phone lies on its side, and a transparent pixel has any colour."""
    phone, exif = Image.new("RGB", (40, 20), "red"), Image.Exif()
    phone.paste("blue", (20, 0, 40, 20))
    exif[0x0112] = 6
    phone.save(tmp_path / "phone.png", exif=exif)
    Image.new("RGBA", (20, 40), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    for name in ("phone", "clear"):
        (tmp_path / f"{name}.txt").write_text("a star")
    (pair,) = pairs_of(tmp_path)
    for path, picture in zip(pair.files, pair.pictures(), strict=True):
        assert torch.equal(read_image(picture), read_image(path))


def test_shared_pairs_come_to_everyone_and_the_others_to_one(store: ImageLabelStore) -> None:
    ada, ben = answer_all(store, ADA, 4), answer_all(store, BEN)
    cleo = answer_all(store, CLEO)
    shared = {pair.id for pair in store.pairs.values() if pair.shared}
    assert shared <= {*ben} and {*cleo} == shared, "nothing else is left for the third"
    assert {*ada} & {*ben} == shared & {*ada} and {*ada, *ben} == store.pairs.keys()
    words = "7 of 6 answered, 3 of them by others too (2 planned). The goal is reached."
    assert goal_text(BEN, store.judgements()) == words
    assert goal_text(ADA, store.judgements()).startswith("4 of 6 answered, 2 of them by others too (2 planned).")


def test_the_table_is_what_a_reward_learns_from(store: ImageLabelStore, images: Path, tmp_path: Path) -> None:
    one, two, three = (store.offer(ADA) for _ in range(3))
    assert one and two and three
    store.choose("Ada", one.id, 1)
    store.tie("Ada", two.id)
    store.tie("Ada", three.id, bad=True)
    assert store.progress("Ada") == Progress(choices=1, ties=2, bad=1, undone=0)
    assert not store.choose("Ada", one.id, 0), "answered already"
    pairs = read_pairs(tmp_path / "labels" / "pairs.jsonl")
    assert pairs.labels.choice.tolist() == [0.0, 0.5, 0.5]
    assert list(pairs.prompts) == [one.prompt, two.prompt, three.prompt]
    again = ImageLabelStore(images, tmp_path / "labels")
    answers = {one.id: {"Ada": 1}, two.id: {"Ada": None}, three.id: {"Ada": None}}
    assert again.judgements() == store.judgements() == answers
    assert again.undo("Ada") == three and again.undo("Ben") is None
    assert three.id not in again.judgements() and again.progress("Ada").undone == 1
    with pytest.raises(InputError, match="there is no pair 'x'"):
        store.choose("Ada", "x", 0)


def test_a_table_of_other_images_is_refused(store: ImageLabelStore, images: Path, tmp_path: Path) -> None:
    answer_all(store, ADA, 2)
    table = tmp_path / "labels" / "pairs.jsonl"
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    for changed, message in (
        (json.dumps(rows[0] | {"prompt": "another"}), "is of other images"),
        (json.dumps(rows[0] | {"pair": "99"}), "is of other images"),
        ("[]", "line 1: expected an object"),
        ("{", "line 1: not JSON"),
    ):
        table.write_text(changed + "\n")
        with pytest.raises(InputError, match=message):
            ImageLabelStore(images, tmp_path / "labels")


def test_a_skipped_pair_is_left_to_others(store: ImageLabelStore) -> None:
    never: Callable[..., Any] = lambda *_: pytest.fail("nothing is sampled")  # noqa: E731
    session = LabelSession(store, ADA, "scenes", never, never)
    assert list(session.advance()) == [] and session.shown is not None
    skipped = session.shown.id
    assert session.answer(skipped, "skip") == "Skipped: left to others."
    assert list(session.advance()) == [] and session.shown is not None and session.shown.id != skipped
    assert store.progress("Ada") == Progress(0, 0, 0, 0)
    assert (pair := store.offer(BEN)) is not None and pair.id == skipped
    while session.shown is not None:
        assert session.answer(session.shown.id, "0") == "Saved: left."
        try:
            list(session.advance())
        except InputError as error:
            assert "Every pair that is yours has an answer" in str(error)
    assert {pair for pair, answers in store.judgements().items() if "Ada" in answers} == {*store.pairs} - {skipped}


def test_the_view_has_a_button_and_a_key_to_skip() -> None:
    assert 'data-answer="skip" aria-keyshortcuts="S"' in group_view(1, "x", "a star", [b"", b""])


def test_goals_are_in_range() -> None:
    with pytest.raises(InputError, match="the goal must be from 0"):
        LabelRequest("Ada", ("a",), 2, -1)
    assert goal_text(LabelRequest("Ada", ("a",)), {}) == "0 answered, 0 of them by others too."


def test_the_table_has_a_folder(steer: Steer, images: Path) -> None:
    code, _, err = steer("demo", "--label-images", images)
    assert code == 2 and "--label-images needs --labels FOLDER" in err
