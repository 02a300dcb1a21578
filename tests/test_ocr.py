"""The OCR reward: the real engine on words in a real font."""

import logging
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from steer.reward import Reward, RewardError, score
from steer.rewards.ocr import Ocr, distance_within, edit_distance, normalised, quoted, similarity, text_score

TEXTS = st.text("abcd", max_size=7)
SAYS_HELLO = 'a sign that says "hello world"'


def picture(*lines: str, colour: str = "black", background: str = "white") -> Tensor:
    """(1, 3, 240, 320) in [0, 1]: the lines below one another."""
    render_text = Image.new("RGB", (320, 240), background)
    for row, line in enumerate(lines):
        place = (20, 10 + 70 * row)
        ImageDraw.Draw(render_text).text(place, line, fill=colour, font=ImageFont.load_default(size=40))
    return torch.from_numpy(np.array(render_text)).permute(2, 0, 1)[None].float() / 255


@pytest.fixture(scope="module")
def reward() -> Ocr:
    return Ocr()


@pytest.mark.hard
def test_the_words_are_read(reward: Ocr, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    """Silently; prompts with other words, images with more or no words score less."""
    caplog.set_level(logging.DEBUG)
    assert isinstance(reward, Reward) and reward.name == "ocr" and not reward.differentiable
    hello, blank = picture("HELLO WORLD"), torch.ones(1, 3, 240, 320)
    images = torch.cat([hello, hello, blank, picture("HELLO WORLD", "50% OFF")])
    moon = 'a sign that says "goodbye moon"'
    scores = score(reward, images, [SAYS_HELLO, moon, SAYS_HELLO, SAYS_HELLO])
    assert scores.shape == (4,) and scores.dtype == torch.float32 and not scores.requires_grad
    right, wrong, none, more = scores.tolist()
    assert right == 1 and none == 0
    assert wrong < 0.4
    assert 0.5 < more < 0.95
    assert capfd.readouterr() == ("", "") and not caplog.records


@pytest.mark.hard
def test_an_image_alone_is_read_as_in_a_batch(reward: Ocr) -> None:
    red, lines = picture("RED", colour="red", background="navy"), picture("HELLO", "WORLD")
    alone = [score(reward, red, ['"red"']), score(reward, lines, [SAYS_HELLO])]
    assert torch.equal(score(reward, torch.cat([lines, red]), [SAYS_HELLO, '"red"']), torch.cat(alone[::-1]))
    assert [one.item() for one in alone] == [1, 1]


def test_nothing_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*_: object) -> None:
        raise AssertionError("the engine wants the network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    assert score(Ocr(), torch.rand(1, 3, 16, 16).half(), [SAYS_HELLO]).item() == 0


def test_a_prompt_without_quotations_is_refused(reward: Ocr) -> None:
    with pytest.raises(RewardError, match="prompt 'a cat' quotes no words: put the text of the image into double"):
        score(reward, torch.ones(2, 3, 64, 64), [SAYS_HELLO, "a cat"])


def test_a_missing_engine_is_an_error_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(RewardError, match=r"^ocr: .*rapidocr.*: pip install 'steer-diffusion\[ocr\]'$"):
        Ocr()


def test_a_missing_system_library_is_one_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = "libGL.so.1: cannot open shared object file"
    (tmp_path / "rapidocr.py").write_text(f"raise ImportError({missing!r})")
    monkeypatch.delitem(sys.modules, "rapidocr", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RewardError, match=f"^ocr: {missing}: install libgl1, or replace opencv-python"):
        Ocr()


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ('a sign that says "hello world"', ["hello world"]),
        ("a sign that says “hello”", ["hello"]),
        ("ein Schild „Guten Tag“ im Regen", ["Guten Tag"]),
        ("un panneau « Bonjour »", ["Bonjour"]),
        ('"open" on a door, "closed" on another', ["open", "closed"]),
        ('"one" and “two”', ["one", "two"]),
        ('a shirt that says "don\'t panic"', ["don't panic"]),
        ("a 6\" nail that says 'hi'", ["hi"]),
        ('a 6" nail and an 8" board', []),
        ('a 6" nail, "hi" written on it', ["hi"]),
        ('the number "42"', ["42"]),
        ("a sign that says 'hello world'", ["hello world"]),
        ("a shirt that says 'don't panic', in red", ["don't panic"]),
        ("a shirt that says ‘don’t panic’", ["don’t panic"]),
        ("don't look at the dogs' park, it's closed", []),
        ("the ‘dogs’ park", ["dogs"]),
        ("a '90s car", []),
        ("rock 'n' roll and rock ‘n’ roll", []),
        ('an empty "" and a blank " " sign', []),
        ('a blank " " sign and "go"', ["go"]),
        ('a lone " mark', []),
        ("一个牌子写着“你好”", ["你好"]),
        ("a cat", []),
        ("", []),
    ],
)
def test_quotations_of_prompts(prompt: str, words: list[str]) -> None:
    assert quoted(prompt) == words


@pytest.mark.parametrize(
    ("one", "other", "all_of_it", "within"),
    [
        ("", "", 0, 0),
        ("abc", "", 3, 3),
        ("", "abc", 3, 0),
        ("kitten", "sitting", 3, 2),  # sittin
        ("flaw", "lawn", 2, 1),
        ("open", "weareopennow", 8, 0),
        ("open", "weareopnnow", 8, 1),
    ],
)
def test_edit_distances_by_hand(one: str, other: str, all_of_it: int, within: int) -> None:
    assert edit_distance(one, other) == all_of_it
    assert distance_within(one, other) == within


@given(TEXTS, TEXTS, TEXTS)
def test_edit_distance_is_a_metric(one: str, other: str, third: str) -> None:
    assert edit_distance(one, other) == edit_distance(other, one)
    assert (edit_distance(one, other) == 0) == (one == other)
    assert edit_distance(one, third) <= edit_distance(one, other) + edit_distance(other, third)
    assert abs(len(one) - len(other)) <= edit_distance(one, other) <= max(len(one), len(other))
    assert 0 <= similarity(one, other) <= 1


@given(TEXTS, TEXTS)
def test_the_distance_within_is_the_least_over_all_stretches(target: str, text: str) -> None:
    ends = range(len(text) + 1)
    assert distance_within(target, text) == min(edit_distance(target, text[i:j]) for i in ends for j in ends if i <= j)


@given(st.lists(TEXTS.filter(bool), min_size=1, max_size=3), st.lists(TEXTS, max_size=4))
def test_scores_stay_within_0_and_1_and_1_is_the_text_itself(words: list[str], lines: list[str]) -> None:
    assert 0 <= text_score(words, lines) <= 1
    assert (text_score(words, lines) == 1) == ("".join(words) == "".join(lines))


def test_scores_by_hand() -> None:
    assert text_score(["Hello  World"], ["HELLO", "WORLD"]) == 1
    assert text_score(["hello"], []) == 0
    assert text_score(["open"], ["open", "late"]) == pytest.approx((1 + 4 / 8) / 2)
    assert text_score(["open"], ["oven"]) == pytest.approx(3 / 4)
    assert text_score(["ab", "cd"], ["cd", "ab"]) == pytest.approx((1 + 0) / 2)


def test_what_is_compared() -> None:
    assert normalised(" Straße！ it’s\n“ＯＫ”") == 'strasse!it\'s"ok"'
