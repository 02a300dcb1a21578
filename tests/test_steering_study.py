"""The contender tables of the embedded model: `evaluate` accepts each, and a stage writes what it returns."""

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from steer.apps.evaluation.run import Contender
from steer.apps.evaluation.spec import EvaluationSpec, prepare_contenders
from steer.apps.scenes import __main__ as stages
from steer.apps.scenes import studies
from steer.apps.scenes.studies import CONTENDER_TABLES, SAMPLING, ExactlyRight, Study, fk, prompts_of
from steer.rewards.parser import load_reward

OPTIONS = argparse.Namespace(
    model="scenes", particles=4, lam=None, reward_guidance=None, eta=None, large="scenes-large", reward="scene-soft"
)


@pytest.mark.parametrize("name", list(CONTENDER_TABLES))
def test_every_table_is_accepted_by_the_evaluation(name: str) -> None:
    spec = EvaluationSpec(("a circle",), None, {"scene-soft": load_reward("scene-soft")}, 1, SAMPLING)
    prepared = prepare_contenders(CONTENDER_TABLES[name].contenders(OPTIONS), spec)
    assert len({one.contender.name for one in prepared}) == len(prepared) > 2
    assert {one.settings.steps for one in prepared} == ({1, 2, 4, 20, 50} if name == "reno" else {20})


def test_an_ablation_changes_one_setting_of_the_standard_ones() -> None:
    standard, *others = CONTENDER_TABLES["ablations"].contenders(OPTIONS)
    for one in others:
        if one.method == "fk":
            changed = {key for key, value in one.options.items() if standard.options.get(key) != value}
            assert len(changed) == 1 and one.name.startswith(changed.pop())


def test_the_main_table_takes_the_settings_of_the_command() -> None:
    given = argparse.Namespace(**vars(OPTIONS) | {"lam": 5.0, "reward_guidance": 0.5, "eta": 0.5, "particles": 2})
    steered = CONTENDER_TABLES["evaluate"].contenders(given)[-1]
    assert steered.options == {"particles": 2, "lam": 5.0, "reward_guidance": 0.5, "eta": 0.5}


def test_prompts_are_the_same_ones_for_every_count() -> None:
    few, more, every = (prompts_of(argparse.Namespace(list="scenes-heldout", count=count)) for count in (3, 8, None))
    assert more[:3] == few and set(more) < set(every)


def test_exactly_right_is_one_where_the_scene_reward_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def scores(self: object, images: Tensor, prompts: object) -> Tensor:
        return torch.tensor([1.0, 0.75, 0.0])

    monkeypatch.setattr("steer.rewards.scene.SceneReward.__call__", scores)
    assert ExactlyRight()(torch.zeros(3, 3, 8, 8), ["a"] * 3).tolist() == [1, 0, 0]


def test_a_stage_writes_the_evaluation_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studies, "SAMPLING", {"steps": 4, "guidance": 4.0})
    table = Study("a small table", lambda options: [Contender(label="base"), fk(2)])
    monkeypatch.setitem(CONTENDER_TABLES, "steering", table)
    monkeypatch.setattr(sys, "argv", ["scenes", "steering", "--count", "2", "--out", str(tmp_path)])
    stages.main()
    report = json.loads((tmp_path / "steering/evaluation.json").read_text())
    base, steered = report["contenders"]
    assert report["rewards"] == ["scene-soft", "scene", "right"] and len(report["prompts"]) == 2
    assert (base["cost"]["nfe"], steered["cost"]["nfe"]) == (4, 8) and "difference" in steered["rewards"]["right"]
    runs = {path: path.stat().st_mtime_ns for path in (tmp_path / "steering/runs").glob("*.0.json")}
    stages.main()
    assert runs and runs == {path: path.stat().st_mtime_ns for path in (tmp_path / "steering/runs").glob("*.0.json")}
