"""Grids from the history, and presets in the browser: the same images as the command's, and refusals."""

import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("gradio")

import gradio as gr
from conftest import Steer

from steer.apps.demo import grid_panel
from steer.apps.demo.grid_panel import GridPanel
from steer.apps.demo.presets import BUILT_IN, KEPT, MAX_PRESETS, Presets
from steer.apps.demo.steer_tab import SteerTab, settings_of
from steer.apps.demo.studio import Studio, Ticket
from steer.apps.recipes import read_metadata

VISITOR: Any = SimpleNamespace(session_hash="ada", username=None)
SMALL = {"prompts": "a red star", "method": "fk", "reward": "brightness", "particles": 2, "steps": 3, "seed": 7}


@pytest.fixture(scope="module")
def studio(studio: Studio) -> Studio:
    studio.history.enter("ada", None)
    return studio


@pytest.fixture(scope="module")
def tabs(studio: Studio) -> tuple[SteerTab, GridPanel, Presets]:
    with gr.Blocks():
        steer = SteerTab(studio)
        return steer, GridPanel(studio, gr.Dropdown([])), Presets(studio, steer)


@pytest.fixture(scope="module")
def run(studio: Studio, tabs: tuple[SteerTab, GridPanel, Presets]) -> int:
    """A finished run; returns its number in the history."""
    steer = tabs[0]
    values = {field: SMALL.get(name, field.value) for name, field in steer.fields.items()}
    for _ in steer.run(values | {steer.weights: None}, VISITOR):
        pass
    return studio.history.runs("ada")[0].number


def sampled(panel: GridPanel, *given: Any) -> dict[Any, Any]:
    shown: dict[Any, Any] = {}
    for change in panel.run(*given, VISITOR):
        shown |= change
    return shown


def test_the_grid_of_a_run_is_that_of_the_command_it_shows(
    studio: Studio, tabs: tuple[SteerTab, GridPanel, Presets], run: int, steer: Steer, tmp_path: Path
) -> None:
    panel = tabs[1]
    shown = sampled(panel, run, "lam", "0, 40", "seed", "7,8")
    assert "Done: 4 images" in shown[panel.status], shown[panel.status]
    picture = Path(shown[panel.image]["value"])
    words = shlex.split(shown[panel.command]["value"])
    assert words[:2] == ["steer", "grid"] and "--seed" not in words
    code, _, err = steer(*words[1:], "--out", tmp_path)
    assert code == 0, err
    for name in ("grid.png", "00-00.png", "01-01.png"):
        assert (picture.parent / name).read_bytes() == (tmp_path / name).read_bytes(), name
    assert json.loads((tmp_path / "grid.json").read_text()) == json.loads((picture.parent / "grid.json").read_text())
    assert read_metadata(picture.parent / "01-00.png").settings.seed == 8
    before = (picture.parent / "00-00.png").stat().st_mtime_ns
    shown = sampled(panel, run, "lam", "0,40", None, "")  # of the same seed: nothing new
    assert "Done: 2 images" in shown[panel.status] and (picture.parent / "00-00.png").stat().st_mtime_ns == before


def test_a_stop_keeps_the_finished_images_of_a_grid(
    tabs: tuple[SteerTab, GridPanel, Presets], run: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    say = Ticket.say

    def stops(ticket: Ticket, event: Any) -> None:
        say(ticket, event)
        if event == 2:
            ticket.stop()

    monkeypatch.setattr(Ticket, "say", stops)
    panel = tabs[1]
    shown = sampled(panel, run, "seed", "11,12,13", None, "")
    assert "Stopped after 2 of 3 images" in shown[panel.status] and panel.image not in shown
    assert shown[panel.start]["interactive"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("seed", "1,2", "seed", "3,4"), "both axes vary seed"),
        (("seed", "", None, ""), "write NAME=VALUE"),
        (("seed", "x", None, ""), "is no value of it"),
        (("method", "race,teleport", None, ""), "teleport"),
        (("reward", "brightness,./folder", None, ""), "rewards have names"),
        (("reward", "evil_module:run", None, ""), "rewards have names"),
        (("steps", "5,5000", None, ""), "at most 100"),
        (("seed", ",".join(map(str, range(17))), None, ""), "at most 16 in this app"),
    ],
)
def test_a_grid_that_cannot_be_is_refused_and_loads_nothing(
    tabs: tuple[SteerTab, GridPanel, Presets], run: int, given: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid_panel, "write_grid", lambda *given, **more: pytest.fail("sampled"))
    panel = tabs[1]
    shown = sampled(panel, run, *given)
    assert message in shown[panel.status] and shown.keys() == {panel.status, panel.start, panel.stop}


# ---- presets


def asked(steer: SteerTab, presets: Presets, name: str | None, saved: Any = None, **values: Any) -> dict[Any, Any]:
    fields = {field: values.get(one, field.value) for one, field in steer.fields.items()}
    return fields | {presets.name: name, presets.saved: saved or {}, steer.weights: None}


def test_a_saved_preset_brings_the_settings_back_but_prompt_and_seed(
    tabs: tuple[SteerTab, GridPanel, Presets],
) -> None:
    steer, _, presets = tabs
    wanted = {
        "method": "fk",
        "lam": 40.0,
        "auto": False,
        "steps": 7,
        "negative_prompt": "blue",
        "width": 48,
        "height": 64,
    }
    change = presets.save(asked(steer, presets, "mine", **wanted, seed=5))
    saved = json.loads(json.dumps(change[presets.saved]))  # as a browser keeps it
    assert change[presets.name]["choices"] == [*BUILT_IN, "mine"]
    shown = presets.choose(asked(steer, presets, "mine", saved))
    assert not {steer.fields[name] for name in KEPT} & shown.keys()
    now = {name: shown.get(field, {}).get("value", field.value) for name, field in steer.fields.items()}
    before = {name: field.value for name, field in steer.fields.items()} | wanted
    assert settings_of(now) == settings_of(before)
    assert presets.delete({presets.name: "mine", presets.saved: saved})[presets.saved] == {}


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_presets_are_settings_of_the_app(tabs: tuple[SteerTab, GridPanel, Presets], name: str) -> None:
    steer, _, presets = tabs
    shown = presets.choose(asked(steer, presets, name))
    now = {one: shown.get(field, {}).get("value", field.value) for one, field in steer.fields.items()}
    settings = settings_of(now)
    assert settings.method == BUILT_IN[name]["method"]
    assert settings.particles == {"Best picture": 12, "Fast": 4, "Samples": 8}[name]
    assert settings.compare == BUILT_IN[name]["compare"] and settings.reward == steer.fields["reward"].value


SAVED = {"model": "scenes", "method": "fk", "reward": "jpeg", "particles": 2, "seed": 0, "steps": 8, "guidance": 2.0}


@pytest.mark.parametrize(
    ("name", "saved", "message"),
    [
        ("a", {"a": SAVED | {"reward": "evil_module:run"}}, "rewards have names"),
        ("a", {"a": SAVED | {"model": "/etc"}}, "does not have"),
        ("a", {"a": SAVED | {"particles": 10**9}}, "expected 0 to"),
        ("a", {"a": [1]}, "expected an object"),
        ("<b>", {"a": SAVED}, "Press Save to keep the present settings as &#x27;&lt;b&gt;"),
        ("a", "not an object", "Press Save"),
        ("a" * 100, {"a" * 100: SAVED}, "Press Save"),
    ],
)
def test_a_strange_preset_changes_no_field(
    tabs: tuple[SteerTab, GridPanel, Presets], name: str, saved: Any, message: str
) -> None:
    steer, _, presets = tabs
    change = presets.choose(asked(steer, presets, name, saved))
    assert list(change) == [steer.status] and message in change[steer.status]


@pytest.mark.parametrize(
    ("name", "count", "values", "message"),
    [
        ("Fast", 0, {}, "built in"),
        ("", 0, {}, "a name of 1 to 40"),
        (None, 0, {}, "a name of 1 to 40"),
        ("a\nb", 0, {}, "a name of 1 to 40"),
        ("b", MAX_PRESETS, {}, "delete one"),
        ("b", 0, {"steps": None}, "the field is empty"),
        ("b", 0, {"loras": ["a.safetensors"]}, "LoRA files"),
    ],
)
def test_a_preset_that_cannot_be_saved_is_refused(
    tabs: tuple[SteerTab, GridPanel, Presets], name: Any, count: int, values: Any, message: str
) -> None:
    steer, _, presets = tabs
    saved = {f"p{number}": SAVED for number in range(count)}
    change = presets.save(asked(steer, presets, name, saved, **values))
    assert list(change) == [steer.status] and message in change[steer.status]
    assert message == "built in" or "of yours" in presets.delete({presets.name: "x", presets.saved: {}})[steer.status]
