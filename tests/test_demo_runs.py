"""One run after another in the app: fresh state, kept settings, seeds, names, and messages without server paths."""

import errno
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pairwise import hard_but
from PIL import Image

pytest.importorskip("gradio")

import gradio as gr

from steer.apps.demo import run_view as run_view_module
from steer.apps.demo import steering as steering_module
from steer.apps.demo.app import PublicApi
from steer.apps.demo.rewards_tab import RewardsTab
from steer.apps.demo.steer_tab import SteerTab
from steer.apps.demo.steering import PromptResult, Step
from steer.apps.demo.studio import Studio, Ticket, Weights, line, public, seed_of
from steer.apps.methods import METHODS
from steer.errors import InputError

VISITOR: Any = SimpleNamespace(session_hash="ada")
SMALL: dict[str, Any] = {"prompts": "a red star", "reward": "brightness", "particles": 3, "steps": 4, "guidance": 2}
RENO: dict[str, Any] = {"model": "scenes-turbo", "reward": "scene-soft", "steps": 1, "guidance": 0, "iterations": 3}


@pytest.fixture(autouse=True)
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing the curves takes four times as long as these runs; test_demo_view.py and test_demo_steering.py do it."""
    monkeypatch.setattr(run_view_module, "_curves", lambda columns, paths: "")


def handler_values(tab: SteerTab, **values: Any) -> dict[Any, Any]:
    """Inputs of a handler: the values of the fields, some of them changed, and the states."""
    given = {field: values.get(name, field.value) for name, field in tab.fields.items()}
    return given | {tab.weights: values.get("weights"), tab.defaults: values.get("defaults", tab.defaults.value)}


def run(tab: SteerTab, **values: Any) -> dict[Any, Any]:
    """All that a run changes on the page, by component."""
    shown: dict[Any, Any] = {}
    for change in tab.run(handler_values(tab, **SMALL | values), VISITOR):
        shown |= change
    return shown


def result_of(tab: SteerTab, shown: dict[Any, Any]) -> PromptResult:
    assert shown.get(tab.finished), shown[tab.status]
    made: PromptResult = shown[tab.finished][0]
    return made


def asked(method: str) -> dict[str, Any]:
    return {"method": method} | (RENO if METHODS[method].is_iterative else {})


# ---- state of the run before


@pytest.mark.few(1)
@pytest.mark.parametrize("method", hard_but(METHODS, "race", "reno"))
def test_the_second_run_is_as_good_as_the_first(tab: SteerTab, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = result_of(tab, run(tab, **asked(method), seed=1))
    pixels = [Image.open(one.path).tobytes() for one in first.images]
    say = Ticket.say

    def stops(ticket: Ticket, event: Any) -> None:
        say(ticket, event)
        if isinstance(event, Step):
            ticket.stop()

    monkeypatch.setattr(Ticket, "say", stops)
    assert "Stopped" in run(tab, **asked(method), seed=2)[tab.status]
    monkeypatch.undo()
    assert "Done" in run(tab, **asked(method) | {"prompts": "a blue cross"}, seed=3)[tab.status], "after a stop"
    again = result_of(tab, run(tab, **asked(method), seed=1))
    assert [Image.open(one.path).tobytes() for one in again.images] == pixels


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("phase", "status", "finished"),
    [("fk", "Stopped. Nothing was finished.", False), ("beside", "Stopped: 1 prompt", True)],
)
def test_a_stopped_run_leaves_in_the_history_what_it_has(
    tab: SteerTab, studio: Studio, monkeypatch: pytest.MonkeyPatch, phase: str, status: str, finished: bool
) -> None:
    say = Ticket.say

    def stops(ticket: Ticket, event: Any) -> None:
        say(ticket, event)
        if isinstance(event, Step) and (event.phase, event.step) == (phase, 6 if phase == "fk" else 1):
            ticket.stop()

    monkeypatch.setattr(Ticket, "say", stops)
    studio.history.enter("ada", None)
    shown = run(tab, method="fk", steps=8, seed=9)
    assert status in shown[tab.status]
    (kept,) = studio.history.runs("ada")
    assert kept.settings["seed"] == 9 and len(kept.rewards) == 3 and ("stopped" in kept.settings) is not finished
    if finished:
        made = result_of(tab, shown)
        assert not made.base and kept.rewards == tuple(one.recipe.reward for one in made.images)
    studio.history.delete("ada")


def test_a_run_after_one_that_failed(tab: SteerTab, studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device", str(studio.home / "visitors" / "ada" / "x.png"))

    with monkeypatch.context() as patched:
        patched.setattr(steering_module, "write_images", full)
        shown = run(tab)
    assert "No space left on device" in shown[tab.status] and str(studio.home) not in shown[tab.status]
    assert shown[tab.start]["interactive"] and not shown[tab.stop]["interactive"]
    assert "Done" in run(tab)[tab.status]


def test_an_error_of_another_kind_leaves_the_button_as_it_was(tab: SteerTab, studio: Studio) -> None:
    with gr.Blocks():
        tabs = SteerTab(studio), RewardsTab(studio)
        context = gr.context.Context.root_block
    assert context is not None
    for one in tabs:
        ((click, target),) = [
            (number, event) for number, event in context.fns.items() if event.fn and event.fn.__name__ == "run"
            and getattr(event.fn, "__self__", None) is one
        ]  # fmt: skip
        after = [event for event in context.fns.values() if event.trigger_after == click]
        assert [event.trigger_only_on_failure for event in after] == [True], target
        change = one.fail()
        assert change[one.start]["interactive"] and "failed" in change[one.status]


# ---- messages


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/srv/demo/x/search.safetensors belongs to another run", "search.safetensors belongs to another run"),
        ("model '/srv/models/mine': no model_index.json", "model 'mine': no model_index.json"),
        ("[Errno 13] Permission denied: '/var/lib/a b'", "[Errno 13] Permission denied: 'a b'"),
        ("--out /a/b/c: cannot write there", "--out c: cannot write there"),
        ("see https://example.org/a/b, and/or org/name, 3 / 4", "see https://example.org/a/b, and/or org/name, 3 / 4"),
        ("a tag </script> stays", "a tag </script> stays"),
        (r"C:\Users\ada\x.png: not a PNG", "x.png: not a PNG"),
    ],
)
def test_messages_name_files_without_their_folders(text: str, shown: str) -> None:
    assert public(text) == shown


def test_no_error_on_any_way_to_a_visitor_names_a_server_path(
    tab: SteerTab, studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "owner" / "secret.bin"
    (image := tmp_path / "a.png").write_bytes(b"none")

    def refused(*given: Any, **named: Any) -> Any:
        raise InputError(f"{place} is damaged; restore it")

    with gr.Blocks():
        rewards, api = RewardsTab(studio), PublicApi(studio)
    monkeypatch.setattr(studio, "reward", refused)
    messages = [run(tab)[tab.status], tab.restore(str(image), None)[tab.status]]
    with pytest.warns(UserWarning) as warned:
        for change in rewards.run([str(image)], "", ["brightness"], "", VISITOR):
            messages += [change[rewards.status]] if rewards.status in change else []
    messages += [str(one.message) for one in warned]
    with pytest.raises(gr.Error) as error:
        api.steer("a star", "fk", "brightness", 1, 1, 1, 1, 1, 0, "scenes", VISITOR)
    messages.append(str(error.value))
    assert sum("secret.bin" in one for one in messages) >= 4
    assert not [one for one in messages if "owner" in one or str(tmp_path) in one]
    assert "owner" not in line(f"cannot read {place}")


# ---- what is compared


@pytest.mark.few(1)
@pytest.mark.parametrize("method", ["fk", "reno"])
def test_the_slider_compares_best_with_best_and_all_base_images_are_there(tab: SteerTab, method: str) -> None:
    for seed in range(20):
        shown = run(tab, **asked(method), seed=seed)
        made = result_of(tab, shown)
        base = [one.recipe.reward for one in made.base]
        if base[0] < max(base):
            break
    rewards = {str(one.path): one.recipe.reward for one in (*made.base, *made.images)}
    left, right = shown[tab.results.slider]["value"]
    assert rewards[left] == max(base) > base[0]
    assert rewards[right] == max(one.recipe.reward for one in made.images)
    paths, captions = zip(*shown[tab.results.gallery]["value"], strict=True)
    assert list(paths) == [str(one.path) for one in made.base]
    assert [caption.startswith("★") for caption in captions] == [path == left for path in paths]


def test_best_of_n_is_not_compared_with_itself(tab: SteerTab) -> None:
    shown = run(tab, method="best-of-n")
    assert not shown[tab.results.slider]["visible"] and len(shown[tab.results.gallery]["value"]) == 3
    assert "Best of N picks among the base images" in shown[tab.results.table]


# ---- settings


def switch(tab: SteerTab, values: dict[str, Any], **change: Any) -> dict[str, Any]:
    """The values of the fields after the method was changed."""
    values = values | change
    update = tab.fit(handler_values(tab, **values))
    for name, field in tab.fields.items():
        if "value" in update.get(field, {}):
            values[name] = update[field]["value"]
    return values | {"defaults": update[tab.defaults]}


def test_a_switch_keeps_what_was_set_and_moves_what_was_left_alone(tab: SteerTab) -> None:
    start = {name: field.value for name, field in tab.fields.items()}
    fresh = switch(tab, start, method="reno")
    assert (fresh["steps"], fresh["guidance"], fresh["model"]) == (1, 0, "scenes-turbo")
    back = switch(tab, fresh, method="fk")
    assert (back["steps"], back["guidance"], back["model"]) == (20, 4, "scenes")
    values = start | {"steps": 35, "guidance": 7.5}
    for method in ("best-of-n", "reno", "base", "fk"):
        values = switch(tab, values, method=method)
        assert (values["steps"], values["guidance"]) == (35, 7.5), method
    assert values["model"] == "scenes"
    set_to_renos = switch(tab, start, method="best-of-n", steps=1)
    assert switch(tab, switch(tab, set_to_renos, method="reno"), method="fk")["steps"] == 1


def test_loaded_weights_keep_what_was_set(tab: SteerTab, tmp_path: Path) -> None:
    weights = Weights("scenes", tmp_path, "mine", "aesthetic:scenes", 8, 2.0)
    change = tab.load_adapter(handler_values(tab, weights=weights, steps=35, reward="jpeg"))
    assert "value" not in change.get(tab.fields["steps"], {}) and "value" not in change.get(tab.fields["reward"], {})
    assert change[tab.fields["guidance"]]["value"] == 2.0 and change[tab.fields["model"]]["value"] == "scenes"
    defaults = tab.load_adapter(handler_values(tab, weights=weights))
    assert defaults[tab.fields["reward"]]["value"] == "aesthetic:scenes"
    assert defaults[tab.fields["steps"]]["value"] == 8


# ---- seeds


def test_a_random_seed_is_drawn_shown_and_named(tab: SteerTab) -> None:
    assert tab.fields["seed"].minimum is None, "Gradio would refuse −1 before anybody could say why"
    seeds = []
    for _ in range(2):
        shown = run(tab, method="base", seed=-1)
        seeds.append(result_of(tab, shown).settings.seed)
        assert shown[tab.fields["seed"]] == seeds[-1] >= 0 and shown[tab.fields["fresh"]] is True
        assert f"Done: 1 prompt in" in shown[tab.status] and f"seed {seeds[-1]}." in shown[tab.status]  # noqa: F541
    assert seeds[0] != seeds[1]
    assert "seed 7." in run(tab, method="base", seed=7)[tab.status]


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-2, "seed must be 0 to 9007199254740992, or -1 for a new one, got -2"),
        (2**60, "seed must be 0 to 9007199254740992"),
        (1.5, "seed must be a whole number, got 1.5"),
        (None, "seed: the field is empty"),
    ],
)
def test_a_seed_that_cannot_be_is_named_and_leaves_no_done(tab: SteerTab, value: Any, message: str) -> None:
    shown = run(tab, seed=value)
    assert message in shown[tab.status] and "alert" in shown[tab.status] and shown[tab.start]["interactive"]
    with pytest.raises(InputError, match="seed"):
        seed_of(value)


def test_the_endpoint_draws_a_seed_too(studio: Studio) -> None:
    with gr.Blocks():
        api = PublicApi(studio)
    _, report = api.steer("a star", "base", "brightness", 1, 1, 1, 1, 1, -1, "scenes", VISITOR)
    assert report["settings"]["seed"] >= 0


# ---- names


@pytest.mark.hard
def test_files_of_different_runs_have_different_names(tab: SteerTab) -> None:
    names: list[str] = []
    prompts = {"prompts": "a star\na star"}, {"prompts": "星"}
    for change in ({"method": "race"}, {"seed": 8}, {}, {"steps": 5}, *prompts):
        shown = run(tab, **{"method": "base"} | change)
        for one in shown[tab.finished]:
            names += [picture.path.name for picture in (*one.images, *one.base)]
    assert len(set(names)) == len(names)
    assert names[0].startswith("a-red-star-race-seed0-run-") and names[0].endswith("-00.png")
    assert any("-base-" in name for name in names) and any(name.startswith("星-") for name in names)


def test_old_runs_make_room(tab: SteerTab, studio: Studio) -> None:
    for _ in range(4):
        run(tab, method="base", particles=1, steps=1)
    assert len([*(studio.folder(VISITOR) / "steer").iterdir()]) <= 2


# ---- prompts inside images


@pytest.mark.few(1)
@pytest.mark.parametrize("prompt", ["", "a blue cross"])
def test_rewards_take_the_prompt_inside_our_images(
    tab: SteerTab, studio: Studio, tmp_path: Path, prompt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [
        str(result_of(tab, run(tab, method="base", prompts=one)).images[0].path) for one in ("a red star", "a star")
    ]
    Image.new("RGB", (64, 64)).save(other := tmp_path / "other.png")
    scored: list[str] = []

    def brightness(images: torch.Tensor, prompts: Any) -> torch.Tensor:
        scored.extend(prompts)
        return images.mean((1, 2, 3))

    brightness.name, brightness.differentiable = "brightness", False  # type: ignore[attr-defined]
    find: Callable[[str], Any] = lambda spec: brightness  # noqa: E731
    monkeypatch.setattr(studio, "reward", find)
    with gr.Blocks():
        rewards = RewardsTab(studio)
    assert not rewards.prompt.value, "as the page opens, images say their own"
    shown: dict[Any, Any] = {}
    for change in rewards.run([*files, str(other)], prompt, ["brightness"], "", VISITOR):
        shown |= change
    assert scored == ([prompt] * 3 if prompt else ["a red star", "a star", ""])
    assert ("The prompts of 2 of them are those inside the images" in shown[rewards.status]) == (not prompt)
    assert ("its own prompt: a red star" in shown[rewards.view]) == (not prompt)
