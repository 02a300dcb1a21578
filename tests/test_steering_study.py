"""The studies in docs/studies: `steer evaluate` accepts each, and runs one with settings of the command line."""

import argparse
import json
from pathlib import Path

import click
import pytest
import torch
from conftest import Steer
from torch import Tensor

from steer.apps.cli.evaluate import evaluate as command
from steer.apps.evaluation.spec import Contender, EvaluationSpec, PreparedContender, prepare_contenders
from steer.apps.scenes.__main__ import prompts_of
from steer.apps.scenes.world import RIGHT, right
from steer.apps.settings import ALL_OPTIONS
from steer.rewards.parser import load_reward

FOLDER = Path(__file__).resolve().parent.parent / "docs/studies"
STUDIES = sorted(path for path in FOLDER.glob("*.yaml") if not path.stem.startswith(("finetuning", "overoptimisation")))


def read(path: Path) -> tuple[click.Context, list[PreparedContender]]:
    """The options of a settings file as click reads them, and its contenders as the evaluation prepares them."""
    context = command.make_context("evaluate", ["--settings", str(path)])
    names = ("steps", "guidance", "particles", "seed", *ALL_OPTIONS)
    options = {name: value for name in names if (value := context.params.get(name)) is not None}
    rewards = {name: load_reward(name) for name in context.params["rewards"]}
    contenders = [Contender.of(settings) for settings in context.params["contenders"]]
    return context, prepare_contenders(contenders, EvaluationSpec(("a circle",), None, rewards, 1, options))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_is_accepted_by_the_evaluation(path: Path) -> None:
    context, prepared = read(path)
    steers = "aesthetic:scenes" if path.stem == "values" else "scene-soft"
    assert context.params["rewards"] == (steers, "scene", RIGHT)
    assert context.params["batch"] == (1 if path.stem == "search-seconds" else 32)  # one prompt in a call, or several
    assert len({one.contender.name for one in prepared}) == len(prepared) > 2
    steps = {"reno": {1, 2, 4, 20}, "accuracy": {1, 2, 4, 10, 20, 50}}
    assert {one.settings.steps for one in prepared} == steps.get(path.stem, {20})
    assert {one.settings.guidance for one in prepared} == {4.0}
    assert {one.settings.options.lam for one in prepared if one.contender.method == "fk"} <= {
        25.0,
        5.0,
        10.0,
        60.0,
        "auto",
    }


def test_the_study_of_overoptimisation_makes_plain_images_in_one_call_each() -> None:
    context = command.make_context("evaluate", ["--settings", str(FOLDER / "overoptimisation.yaml")])
    assert context.params["contenders"] == ({"label": "base", "particles": 256},)
    assert context.params["rewards"][0] == "scene" and context.params["num_prompts"] == 40


def test_an_ablation_changes_one_setting_of_the_standard_ones() -> None:
    _, (standard, *others) = read(FOLDER / "ablations.yaml")
    for one in (other.contender for other in others):
        if one.method == "fk":
            assert len(set(one.options.items()) - set(standard.contender.options.items())) == 1


def test_prompts_are_the_same_ones_for_every_count() -> None:
    few, more, every = (prompts_of(argparse.Namespace(list="scenes-heldout", count=count)) for count in (3, 8, None))
    assert more[:3] == few and set(more) < set(every)


def test_exactly_right_is_one_where_the_scene_reward_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def scores(self: object, images: Tensor, prompts: object) -> Tensor:
        return torch.tensor([1.0, 0.75, 0.0])

    monkeypatch.setattr("steer.rewards.scene.SceneReward.__call__", scores)
    assert right(torch.zeros(3, 3, 8, 8), ["a"] * 3).tolist() == [1, 0, 0]


def test_a_settings_file_is_evaluated_and_the_command_line_takes_its_place(steer: Steer, tmp_path: Path) -> None:
    text = (FOLDER / "steering.yaml").read_text()
    file = tmp_path / "small.yaml"
    lines = [line for line in text.splitlines() if "contenders" in line or not line.startswith("  -")]
    file.write_text("\n".join([*lines, "  - {label: base}", "  - {method: fk, particles: 2, lam: 25.0}"]))
    words = ["evaluate", "--settings", file, "--num-prompts", 2, "--steps", 4, "--out", tmp_path / "out"]
    assert steer(*words)[0] == 0
    report = json.loads((tmp_path / "out/evaluation.json").read_text())
    base, steered = report["contenders"]
    assert report["rewards"] == ["scene-soft", "scene", RIGHT] and len(report["prompts"]) == 2
    assert (base["name"], base["particles"], steered["particles"]) == ("base", 1, 2)
    assert (base["cost"]["nfe"], steered["cost"]["nfe"]) == (4, 8) and "difference" in steered["rewards"][RIGHT]
    runs = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/runs").glob("*.0.json")}
    assert steer(*words)[0] == 0
    assert runs and runs == {path: path.stat().st_mtime_ns for path in (tmp_path / "out/runs").glob("*.0.json")}
