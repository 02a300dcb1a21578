"""`steer sample`'s switches of speed and memory, and its particle schedules: the same images, and fewer rows."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Steer, cached_pipe, replaced
from PIL import Image

from steer.apps import methods as room
from steer.apps.methods import ComputeOptions
from steer.apps.settings import SamplingConfig

WORDS = ["sample", "a red circle", "--steps", 4, "--particles", 4, "--lam", 40, "--seed", 3]


def pixels(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.rglob("0*/*.png"))]).astype(int)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("plain")


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "words",
    [
        ["--attention", "eager"],
        ["--micro-batch", 3],
        ["--micro-batch", 0, "--attention", "sdpa"],
    ],
)
def test_switches_change_no_image(steer: Steer, tmp_path: Path, plain: Path, words: list[Any]) -> None:
    assert steer(*WORDS, "--out", plain)[0] == 0
    code, _, err = steer(*WORDS, *words, "--out", tmp_path)
    assert code == 0, err
    assert abs(pixels(tmp_path) - pixels(plain)).max() <= 1  # rounding of batches of other shapes, in 255 levels
    before, after = (json.loads((folder / "report.json").read_text()) for folder in (plain, tmp_path))
    assert before["settings"] == after["settings"]
    assert before["prompts"][0]["ancestors"] == after["prompts"][0]["ancestors"]


@pytest.mark.hard
def test_rows_go_in_as_asked(steer: Steer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int | None] = []
    real = room.micro_batched

    def watched(pipe: Any, rows: int | None) -> Any:
        asked.append(rows)
        return real(pipe, rows)

    monkeypatch.setattr(room, "micro_batched", watched)
    assert steer(*WORDS, "--micro-batch", 5, "--out", tmp_path / "a")[0] == 0
    assert steer(*WORDS, "--micro-batch", 0, "--no-compare", "--out", tmp_path / "b")[0] == 0
    assert asked == [5, 5, None]  # steered and base; as many as the memory takes


@pytest.mark.hard
def test_the_pipeline_is_as_it_was_and_compiled_views_are_given() -> None:
    pipe = cached_pipe("sd")
    own = dict(vars(pipe))
    with ComputeOptions(compiled=True, micro_batch=2)(pipe) as view:
        assert view is not pipe and view.unet is not pipe.unet
    assert vars(pipe) == own
    with ComputeOptions()(pipe) as view:
        assert view is pipe


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--attention", "flash"], "unknown attention backend 'flash'"),
        (["--micro-batch", -1], "--micro-batch must be at least 0, got -1"),
        (["--particle-schedule", "3"], "--particle-schedule: write STEP:PARTICLES,… such as 8:4,14:2, got '3'"),
        (["--particle-schedule", "2:2,2:1"], "--particle-schedule: a step is there twice"),
        (
            ["--particle-schedule", "1:3,2:3"],
            "--particle-schedule: 3 particles from step 2 on, of 3: they must be fewer and fewer",
        ),
        (["--particle-schedule", "3:2"], "particle_schedule: 3 is not from 0 to 2, in a run of 4 steps"),
        (["--target-reward", "nan"], "--target-reward must be a finite number"),
        (
            ["--asynchronous-rewards", "--reward-guidance", 1],
            "--asynchronous-rewards: --reward-guidance needs the gradient",
        ),
    ],
)
def test_what_cannot_be_is_one_line(steer: Steer, tmp_path: Path, words: list[Any], message: str) -> None:
    code, _, err = steer(*WORDS, *words, "--out", tmp_path)
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1


@pytest.mark.hard
def test_particles_get_fewer_and_the_image_says_so(steer: Steer, tmp_path: Path) -> None:
    code, _, err = steer(*WORDS, "--particle-schedule", "1:3,2:1", "--out", tmp_path / "o")
    assert code == 0, err
    report = json.loads((tmp_path / "o" / "report.json").read_text())
    entry = report["prompts"][0]
    assert [len(rewards) for rewards in entry["step_rewards"]] == [4, 3] and len(entry["images"]) == 1
    assert entry["cost"]["nfe"] == 4 + 4 + 3 + 1 and report["settings"]["particle_schedule"] == "1:3,2:1"
    code, out, _ = steer("sample", "--replay", tmp_path / "o" / entry["images"][0], "--out", tmp_path / "again")
    assert code == 0 and "the same pixels" in out


def test_rewards_are_read_beside_the_denoiser_and_the_image_says_so(steer: Steer, tmp_path: Path) -> None:
    code, _, err = steer(
        *replaced(WORDS, "--lam", 200), "--asynchronous-rewards", "--ess-threshold", 1, "--out", tmp_path / "o"
    )
    assert code == 0, err
    report = json.loads((tmp_path / "o" / "report.json").read_text())
    entry = report["prompts"][0]
    assert entry["steps"] == [1] and report["settings"]["asynchronous_rewards"]
    code, out, _ = steer("sample", "--replay", tmp_path / "o" / entry["images"][0], "--out", tmp_path / "again")
    assert code == 0 and "the same pixels" in out


def test_a_target_reward_ends_the_evaluations(steer: Steer, tmp_path: Path) -> None:
    assert steer(*WORDS, "--target-reward", -100, "--out", tmp_path)[0] == 0
    entry = json.loads((tmp_path / "report.json").read_text())["prompts"][0]
    assert len(entry["steps"]) == 1 and len(entry["images"]) == 1 and len(entry["base"]["images"]) == 4


def test_an_evaluation_takes_runs_of_fewer_images(steer: Steer, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\na blue star\n")
    words = ["evaluate", "--prompts", tmp_path / "prompts.txt", "--method", "fk", "--reward", "scene-soft"]
    words += ["--steps", 4, "--particles", 4, "--kl-prompts", 0, "--seeds", 2, "--out", tmp_path / "e"]
    code, _, err = steer(*words, "--particle-schedule", "1:2", "--target-reward", 0.45)
    assert code == 0, err
    contender = json.loads((tmp_path / "e" / "evaluation.json").read_text())["contenders"][0]
    counts = {len(run["rewards"]["scene-soft"]) for run in contender["runs"]}
    assert counts <= {1, 2} and len(contender["runs"]) == 4
    picked = [run["rewards"]["scene-soft"][0] for run in contender["runs"]]
    assert contender["rewards"]["scene-soft"]["picked"][0] == pytest.approx(sum(picked) / 4, abs=1e-6)


def test_settings_are_words_that_are_numbers() -> None:
    def schedule(words: str) -> dict[int, int]:
        return SamplingConfig.of(particles=8, particle_schedule=words).options.particle_schedule

    assert schedule(" ") == {} and schedule(" 14:2, 8:4 ") == {14: 2, 8: 4}
