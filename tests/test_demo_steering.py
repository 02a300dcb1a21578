"""The Steer tab: live evaluations, finished images, and equality with the command line."""

import shlex
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from rollouts import random_lora

pytest.importorskip("gradio")

from steer.apps import sampling as sample_module
from steer.apps.cli.sample import sample
from steer.apps.demo.run_view import RunView, run_view
from steer.apps.demo.steer_tab import MAX_PROMPTS, fields_from_recipe, prompts_of, settings_of
from steer.apps.demo.steering import Frame, PromptResult, Step, as_command, as_python, steer_all, steering
from steer.apps.demo.studio import Studio, Weights
from steer.apps.models import load_pipeline
from steer.apps.prompts import PromptRow
from steer.apps.recipes import read_metadata
from steer.apps.settings import SHARED, SamplingConfig
from steer.errors import InputError

ASKED: dict[str, Any] = {
    "method": "fk",
    "reward": "brightness",
    "particles": 3,
    "lam": 60.0,
    "steps": 8,
    "guidance": 2.0,
    "iterations": 3,
    "seed": 5,
    "fresh": False,
    "model": "scenes",
    "compare": True,
    "adapter": False,
}
ADAPTER = Weights("scenes", Path("finetuned/final"), "of a test", None, 8, 2.0)
PROMPT = "a red circle and a blue star"
ODD = 'it\'s a $(rm) `b` "c"'


def events(studio: Studio, settings: SamplingConfig, folder: Path, *prompts: str) -> list[Any]:
    reward = studio.reward(settings.reward)

    def work(ticket: Any) -> None:
        with studio.model(settings.model) as pipe:
            steer_all(pipe, reward, prompts or (PROMPT,), settings, folder, ticket)

    return list(studio.worker.submit(work).events())


def of(kind: type, events_: list[Any]) -> list[Any]:
    return [event for event in events_ if isinstance(event, kind)]


@pytest.mark.few(1)
@pytest.mark.parametrize("method", ["fk", "race", "best-of-n", "base", "reno"])
def test_every_method_shows_evaluations_before_the_end(studio: Studio, tmp_path: Path, method: str) -> None:
    model = {"model": "scenes-turbo", "steps": 1, "guidance": 0} if method == "reno" else {}
    reward = {"reward": "scene-soft"} if method == "reno" else {}
    events_ = events(studio, settings_of(ASKED | model | reward | {"method": method}), tmp_path)
    frames, (made,) = of(Frame, events_), of(PromptResult, events_)
    race = method == "race"  # of three starts, one continues from the first step on
    assert len(frames) >= 3 - race and events_[-1] is made
    assert len({frame.images[0].tobytes() for frame in frames}) >= 3 - race, "previews that differ"
    left = [len(frame.images) for frame in frames]
    assert left == [len(frame.rewards) for frame in frames] == [3, *[1 if race else 3] * (len(frames) - 1)]
    assert all((frame.ancestors is None) == (method == "reno") for frame in frames)
    if method == "fk":  # a look-ahead from the first step on, without rewards
        assert [(frame.step, len(frame.known)) for frame in frames[:3]] == [(1, 0), (2, 0), (frames[2].step, 3)]
        assert "<svg" in run_view(frames, made) and "unknown" in frames[0].describe(0)
    assert [one.recipe.reward for one in made.images] == sorted(
        (one.recipe.reward for one in made.images), reverse=True
    ) or method == "base"
    assert len(made.base) == (0 if method == "base" else len(made.images))
    assert (made.base_cost is None) == (method in ("base", "best-of-n"))
    steps = of(Step, events_)
    assert steps[-1].step == steps[-1].total and all(step.count == 1 for step in steps)


def test_images_tell_their_settings_and_base_images_are_the_plain_batch(studio: Studio, tmp_path: Path) -> None:
    settings = settings_of(ASKED)
    (made,) = of(PromptResult, events(studio, settings, tmp_path))
    with studio.model("scenes") as pipe:
        generator = torch.Generator().manual_seed(settings.seed)
        plain = pipe(
            PROMPT, num_images_per_prompt=3, num_inference_steps=8, guidance_scale=2.0, generator=generator
        ).images
    assert [Image.open(one.path).tobytes() for one in made.base] == [image.tobytes() for image in plain]
    for picture in made.images:
        assert read_metadata(picture.path) == picture.recipe and picture.recipe.settings == settings
    fields = fields_from_recipe(made.images[0].recipe, studio.models)
    assert settings_of(fields) == settings and fields["prompts"] == PROMPT


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    folder = random_lora(load_pipeline("scenes"), tmp_path_factory.mktemp("weights"), 0.3)
    return Weights("scenes", folder, "scenes, D3PO on brightness, 3 updates", "brightness", 8, 2.0)


@pytest.mark.hard
@pytest.mark.parametrize("method", ["base", "fk"])
def test_finetuned_weights_are_applied_to_the_images_and_not_to_the_base_images(
    studio: Studio, weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    asked = ASKED | {"method": method}
    (before,) = of(PromptResult, events(studio, settings_of(asked | {"method": "base"}), tmp_path / "before"))
    settings = settings_of(asked | {"adapter": True}, weights)
    work = steering(studio, [PROMPT], settings, tmp_path / "adapter", weights)
    (made,) = of(PromptResult, list(studio.worker.submit(work).events()))
    (after,) = of(PromptResult, events(studio, settings_of(asked | {"method": "base"}), tmp_path / "after"))
    first, beside, last = (
        [Image.open(one.path).tobytes() for one in some] for some in (before.images, made.base, after.images)
    )
    assert first == beside == last, "the studio's pipeline is what it was"
    assert not {Image.open(one.path).tobytes() for one in made.images} & {*first}
    assert made.base_cost is not None and settings.lora == "finetuned/final"
    assert fields_from_recipe(made.images[0].recipe, studio.models, weights)["adapter"]
    with pytest.raises(InputError, match="no finetuned weights are loaded here"):
        fields_from_recipe(made.images[0].recipe, studio.models)
    shutil.copytree(weights.folder, tmp_path / "finetuned" / "final")  # as the zip unpacks
    monkeypatch.chdir(tmp_path)
    exec(compile(as_python(PROMPT, settings), "program", "exec"), {})
    assert Image.open("best.png").tobytes() == Image.open(made.images[0].path).tobytes()


def test_weights_of_another_model_are_refused(weights: Weights) -> None:
    with pytest.raises(InputError, match="the finetuned weights are those of scenes"):
        settings_of(ASKED | {"adapter": True, "model": "scenes-turbo"}, weights)


@pytest.mark.parametrize(("field", "name"), [("seed", "seed"), ("lam", "strength"), ("steps", "steps")])
def test_a_field_that_was_emptied_is_named(field: str, name: str) -> None:
    with pytest.raises(InputError, match=f"{name}: the field is empty, give a number"):
        settings_of(ASKED | {field: None})


def test_what_a_visitor_left_is_gone_once_their_job_has_ended(studio: Studio) -> None:
    visitor: Any = SimpleNamespace(session_hash="leaver")
    begun, left, folder = threading.Event(), threading.Event(), studio.folder(visitor)

    def work(ticket: Any) -> None:
        begun.set()
        assert left.wait(10)
        (folder / "finetune").mkdir(parents=True)  # the last write of a job that is being stopped

    ticket = studio.begin(visitor, work)
    assert begun.wait(10)
    studio.forget(visitor)
    left.set()
    ticket.future.exception(10)
    studio.worker.submit(lambda ticket: None).future.result(10)  # after the callbacks of the one before
    assert not folder.exists()
    studio.folder(visitor)
    studio.forget(visitor)
    assert not folder.exists()


def test_several_prompts_come_one_after_the_other(studio: Studio, tmp_path: Path) -> None:
    events_ = events(studio, settings_of(ASKED | {"compare": False}), tmp_path, "a star", "a cross")
    run = RunView()
    shown = [(event, run.after(event), run.frames) for event in events_]
    assert [one.prompt for one in run.finished] == ["a star", "a cross"]
    assert all(len(one.frames) == len(of(Frame, events_)) / 2 for one in run.finished)
    assert {frames for event, _, frames in shown if isinstance(event, Step) and event.step == 1} == {()}
    assert run.conclusion(False).startswith("Done: 2 prompts in ")


def test_stop_acts_within_one_solver_step(studio: Studio, tmp_path: Path) -> None:
    settings, steps = settings_of(ASKED | {"steps": 50}), []
    reward = studio.reward(settings.reward)

    def work(ticket: Any) -> None:
        with studio.model(settings.model) as pipe:
            inner = ticket.say

            def say(event: Any) -> None:
                inner(event)
                steps.append(event)
                if isinstance(event, Step) and event.step == 7:
                    ticket.stop()

            ticket.say = say
            steer_all(pipe, reward, [PROMPT], settings, tmp_path, ticket)

    ticket = studio.worker.submit(work)
    assert not of(PromptResult, list(ticket.events()))
    assert max(step.step for step in of(Step, steps)) == 7 and ticket.stopped


def test_the_command_asks_for_the_same_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(sample_module, "sample", lambda *events_: given.append(events_) or {"prompts": [], "cost": {}})
    for change in (
        {},
        {"method": "reno", "model": "scenes-turbo", "compare": False},
        {"lam": 0.1234567, "guidance": 1234567.5},
        {"adapter": True},
    ):
        settings = settings_of(ASKED | change, ADAPTER)
        for prompt in (PROMPT, ODD, f"-{ODD}"):
            words = shlex.split(as_command(prompt, settings))
            assert words[:2] == ["steer", "sample"]
            CliRunner().invoke(sample, words[2:])
            prompts, asked, *_ = given.pop()
            assert prompts == [PromptRow(prompt)] and asked == settings


@pytest.mark.few(1)
@pytest.mark.parametrize("method", ["fk", "best-of-n", "base", "reno"])
def test_the_program_makes_the_same_images(
    studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    model = {"model": "scenes-turbo", "steps": 1, "guidance": 0, "reward": "scene-soft"} if method == "reno" else {}
    settings = settings_of(ASKED | model | {"method": method, "compare": False})
    (made,) = of(PromptResult, events(studio, settings, tmp_path))
    monkeypatch.chdir(tmp_path)
    exec(compile(as_python(PROMPT, settings), "program", "exec"), {})
    assert Image.open("best.png").tobytes() == Image.open(made.images[0].path).tobytes()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" \n ", "the prompt is empty"),
        ("a\n" * (MAX_PROMPTS + 1), "5 prompts: at most 4"),
        ("a" * 501, "a prompt of 501 characters"),
    ],
)
def test_prompts_that_cannot_be_are_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        prompts_of(text)


def test_settings_beyond_the_app_are_refused(studio: Studio) -> None:
    with pytest.raises(InputError, match="particles can be at most 16"):
        settings_of(ASKED | {"particles": 17})
    for spec in ("os:system", "evil.yaml", "scene-soft + builtins:exec", "../reward"):
        with pytest.raises(InputError, match="here rewards have names"):
            studio.reward(spec)
    for model in ("/etc", "../scenes", "stabilityai/sdxl-turbo"):
        with pytest.raises(InputError, match="not one of this app's"), studio.model(model):
            pass
    for hash_ in ("../x", "", "a/b", None):
        with pytest.raises(InputError, match="no session"):
            studio.folder(SimpleNamespace(session_hash=hash_))  # type: ignore[arg-type]


def test_what_the_fields_cannot_ask_for_is_not_restored(studio: Studio, tmp_path: Path) -> None:
    (made,) = of(PromptResult, events(studio, settings_of(ASKED | {"compare": False}), tmp_path))
    recipe = made.images[0].recipe
    for change, message in (
        ({"potential": "sum"}, "made with potential 'sum'"),
        ({"method": "svdd", "lam": 3.0}, "made with lam 3.0"),
        ({"model": "/etc/passwd"}, "model '/etc/passwd'"),
        ({"steps": None}, "made with steps None"),
        ({"particles": 64}, "particles can be at most 16"),
    ):
        names = SHARED if "method" in change else recipe.settings.plain()
        values = {name: value for name, value in recipe.settings.plain().items() if name in names}
        other = replace(recipe, settings=SamplingConfig.of(**values | change))
        with pytest.raises(InputError, match=message):
            fields_from_recipe(other, studio.models)
