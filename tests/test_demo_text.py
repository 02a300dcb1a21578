"""The Text tab: live tokens of every step, finished texts, and what it refuses."""

import itertools
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Steer

pytest.importorskip("gradio")

import gradio as gr

from steer.apps.demo.app import build
from steer.apps.demo.steering import as_command
from steer.apps.demo.studio import Studio
from steer.apps.demo.text_steering import TextFrame, TextResult, Token, text_steering
from steer.apps.demo.text_tab import TextTab, text_settings, text_view
from steer.apps.settings import SamplingConfig
from steer.errors import InputError

ASKED: dict[str, Any] = {
    "prompt": "a red",
    "method": "fk",
    "reward": "parses + says:blue",
    "particles": 4,
    "lam": 5.0,
    "auto": False,
    "steps": 8,
    "seed": 3,
    "model": "scenes-text",
    "compare": True,
}
VISITOR = SimpleNamespace(session_hash="visitor-1")


def events(studio: Studio, **changes: Any) -> list[Any]:
    asked = ASKED | changes
    return list(studio.worker.submit(text_steering(studio, asked["prompt"], text_settings(asked))).events())


@pytest.mark.parametrize("method", ["fk", "best-of-n", "base"])
def test_tokens_open_step_by_step_until_the_text_is_finished(studio: Studio, method: str) -> None:
    received = events(studio, method=method)
    frames, (made,) = ([one for one in received if isinstance(one, kind)] for kind in (TextFrame, TextResult))
    assert [frame.step for frame in frames] == list(range(1, 9)) and frames[0].total == 8
    masked = [sum(token.masked for text in frame.texts for token in text) for frame in frames]
    assert masked[0] > masked[4] > 0 and masked[-1] == 0 and masked == sorted(masked, reverse=True)
    finished = [" ".join(token.word for token in text) for text in frames[-1].texts]
    assert sorted(finished) == sorted(one.text for one in made.texts) and len(made.base) == (
        0 if method == "base" else 4
    )
    assert all(text.startswith("a red") for text in finished)
    guessed = [token.word for text in frames[2].texts for token in text if token.masked]
    assert any(guessed), "the model's guesses are shown"
    if method == "fk":
        assert any(frame.rewards and frame.ess and frame.ancestors for frame in frames)
        assert [one.reward for one in made.texts] == sorted((one.reward for one in made.texts), reverse=True)


def test_the_strength_is_chosen_unless_it_is_given(studio: Studio) -> None:
    with gr.Blocks():
        tab = TextTab(studio)
    assert tab.fields["auto"].value is True
    assert text_settings(ASKED | {"auto": True}).options.lam == "auto"
    assert text_settings(ASKED | {"auto": False}).options.lam == text_settings(ASKED).options.lam == 5.0
    assert text_settings(ASKED | {"auto": True, "method": "base"}).plain().get("lam") is None
    for lam, auto, number in (("auto", True, 5.0), (7.0, False, 7.0)):
        changes = tab.fill("a red", SamplingConfig.of(method="fk", model="scenes-text", lam=lam))
        assert (changes[tab.fields["auto"]]["value"], changes[tab.fields["lam"]]["value"]) == (auto, number)


def test_open_tokens_are_those_of_the_ancestors(studio: Studio) -> None:
    """A resampled particle keeps the words that were open in its ancestor."""
    frames = [one for one in events(studio, reward="says:blue", lam=20.0) if isinstance(one, TextFrame)]
    moved = 0
    for before, after in itertools.pairwise(frames):
        for slot, text in enumerate(after.texts):
            parent = slot if after.ancestors is None else after.ancestors[slot]
            moved += parent != slot
            words = [token.word for token in before.texts[parent] if not token.masked]
            rest = iter(token.word for token in text if not token.masked)
            assert all(word in rest for word in words)
    assert moved > 0


def test_the_command_makes_the_same_texts(studio: Studio, steer: Steer, tmp_path: Path) -> None:
    made = events(studio)[-1]
    words = shlex.split(as_command(made.prompt, made.settings))[1:]
    assert steer(*words, "--out", tmp_path)[0] == 0
    written = (tmp_path / "texts.jsonl").read_text()
    assert all(f'"text": "{one.text}"' in written for one in made.texts)


def test_words_are_escaped_and_masks_are_named() -> None:
    frame = TextFrame(1, 2, ((Token("<b>", False), Token("", True), Token("star", True)),), (0.5,), 1.0, (0,))
    html = text_view([frame], None)
    assert "&lt;b&gt;" in html and "[…]" in html and "[star]" in html and "ESS before resampling 1" in html


def test_the_tab_shows_a_run_and_refuses_what_it_cannot_do(studio: Studio) -> None:
    with gr.Blocks():
        tab = TextTab(studio)

    def run(**changes: Any) -> dict[Any, Any]:
        shown: dict[Any, Any] = {}
        given = {field: (ASKED | changes)[name] for name, field in tab.fields.items()}
        for change in tab.run(given, VISITOR):
            shown |= change
        return shown

    shown = run()
    assert re.search(r"Done: 4 texts in .* seed 3", shown[tab.status]) and "--model scenes-text" in shown[tab.command]
    assert "base 1" in shown[tab.view] and "says:blue" in shown[tab.view]
    assert "&#x27;pink&#x27; is not in the vocabulary" in run(prompt="a pink")[tab.status]
    assert "reward of texts" in run(reward="brightness")[tab.status]
    assert "rewards have names" in run(reward="bigram:/etc/passwd")[tab.status]
    assert "at most" in run(particles=100)[tab.status]
    assert "reward: the field is empty, give a name" in run(reward=None)[tab.status]
    assert "steps: the field is empty, give a number" in run(steps=None)[tab.status]
    assert tab.fit("base") == [gr.update(visible=False)] * 2  # the strength, and its choice


def test_the_app_has_the_tab_where_the_model_is_installed(studio: Studio) -> None:
    def labels(one: Studio) -> list[str]:
        return [block.label for block in build(one).blocks.values() if isinstance(block, gr.Tab)]

    assert "Text" in labels(studio)
    bare = Studio(models=("scenes",), text_models=())
    try:
        assert "Text" not in labels(bare)
        with pytest.raises(InputError, match="not one of this app's"), bare.model("scenes-text"):
            pass
    finally:
        bare.close()
