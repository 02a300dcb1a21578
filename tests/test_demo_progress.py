"""Progress, time left and cost estimate of the Steer tab, against the clock of a test and counted evaluations."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zipfile import ZipFile

import pytest
from pairwise import hard_but

pytest.importorskip("gradio")

from steer.apps.demo.estimate import Paces, evaluations
from steer.apps.demo.progress import Progress, duration
from steer.apps.demo.run_view import run_view
from steer.apps.demo.steer_tab import archive_of, defaults_of, prompt_info, settings_of
from steer.apps.demo.steering import PromptResult, Step, steer_all
from steer.apps.methods import METHODS
from steer.apps.models import load_pipeline
from steer.apps.reward_specs import resolve_reward
from steer.apps.settings import METHOD_OPTIONS, SamplingConfig

ASKED: dict[str, Any] = {
    "reward": "brightness", "particles": 4, "lam": 5.0, "steps": 10, "guidance": 2.0, "iterations": 3, "seed": 5,
    "fresh": False, "model": "scenes", "compare": True, "adapter": False, "auto": True,
}  # fmt: skip


def test_the_remaining_time_is_that_of_a_constant_pace() -> None:
    now = 100.0
    progress = Progress(clock=lambda: now)
    assert "value" not in progress.status("Loading") and progress.seconds_left is None
    for step in range(1, 11):
        progress.update(Step(0, 2, "fk", step, 10, 0, 10).share)
        now += 3.0
    now -= 3.0  # 10 of 40 steps are done, at 3 s a step
    assert progress.seconds_left == pytest.approx(90)
    assert "Steering: 10 of 10, about 90 s left" in progress.status("Steering: 10 of 10")
    progress.update(Step(1, 2, "beside", 10, 10, 10, 0).share)
    assert progress.share == 1 and "left" not in progress.status("Base images: 10 of 10")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (7.4, "7 s"), (12, "10 s"), (48, "50 s"), (150, "2 min"), (9000, "2 h")]
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.few(1)
@pytest.mark.parametrize("method", hard_but(METHODS, "fk", "race", "reno", "best-of-n", "base"))
def test_the_estimate_is_the_count_of_the_run(method: str, tmp_path: Path) -> None:
    one_step = {"model": "scenes-turbo", "steps": 1, "guidance": 0.0, "reward": "scene-soft"}
    settings = settings_of(ASKED | {"method": method} | (one_step if method in ("reno", "noise-search") else {}))
    pipe, sent = load_pipeline(settings.model), list[Any]()
    pipe.set_progress_bar_config(disable=True)
    ticket: Any = SimpleNamespace(say=sent.append)
    steer_all(pipe, resolve_reward(settings.reward), ["a red star"], settings, tmp_path, ticket)
    made: PromptResult = sent[-1]
    counted = made.cost.nfe + (made.base_cost.nfe if made.base_cost else 0)
    assert evaluations(settings) == pytest.approx(counted, rel=0.1)
    shares = [one.share for one in sent if isinstance(one, Step)]
    assert shares == sorted(shares) and shares[-1] == 1
    with ZipFile(archive_of(made)) as archive:
        assert len(archive.namelist()) == len(made.images) + len(made.base) and archive.testzip() is None
    related = all(frame.ancestors for frame in made.frames)
    assert ('<details class="steer-folded"' in run_view(made.frames, made)) == (not related)


def test_seconds_follow_from_the_last_run_of_the_same_model_and_method() -> None:
    paces, settings = Paces(), SamplingConfig.of(method="best-of-n", particles=4, steps=10)
    assert paces.describe(settings, 2) == "About 80 denoiser evaluations."
    paces.add(settings, 40, 20.0)
    assert paces.describe(settings, 2) == "About 80 denoiser evaluations, 40 s at the pace of the last run."
    other = SamplingConfig.of(method="svdd", particles=4, steps=10)
    assert "pace" not in paces.describe(other, 1)


def test_every_method_can_be_chosen_and_has_words_of_its_own() -> None:
    assert METHODS.keys() == METHOD_OPTIONS.keys()
    assert len({one.label for one in METHODS.values()}) == len({one.hint for one in METHODS.values()}) == len(METHODS)


def test_the_particles_follow_the_method() -> None:
    numbers = {name: defaults_of(name, ["scenes"])["particles"] for name in METHOD_OPTIONS}
    assert numbers == dict.fromkeys(METHOD_OPTIONS, 4) | {"race": 12, "reno": 1, "noise-search": 1}


def test_the_hint_of_the_prompt_is_about_the_model() -> None:
    assert "scenes draws one to four" in prompt_info("scenes") and "draws" not in prompt_info("some/model")
