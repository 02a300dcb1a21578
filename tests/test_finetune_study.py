"""The finetuning study: its table by hand, its choices, and a small run of it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from steer import TrainingResult
from steer.apps.finetuning import METHODS
from steer.apps.scenes import finetune_studies as finetune_runs
from steer.apps.scenes import finetune_studies as finetune_study
from steer.apps.scenes.finetune_studies import (
    RUN_CONFIGS,
    FinishedRun,
    RunConfig,
    differences,
    draw_guards,
    draw_methods,
    read_evaluations,
    row,
    study,
)
from steer.apps.scenes.preferences import ANNOTATOR_REWARD, write_choices
from steer.apps.scenes.preferences import CHOICES_CALL as CALL
from steer.assets import PROMPTS
from steer.pipelines.training.preference_data import PreferenceFolder
from steer.rewards.aesthetic import aesthetic

NAMES = ("aesthetic:scenes", "scene")


def finished(run_config: RunConfig, rises: tuple[float, float], last: int = 20) -> FinishedRun:
    """A run whose seen prompts, 48 that come twice, rose by the first number, and whose unseen ones by the second."""
    seen = [f"seen {number % 48}" for number in range(96)]
    unseen = [f"unseen {number}" for number in range(96)]
    exact_rewards = {}
    for step in (0, 10, 20):
        values = [0.5 + step / 20 * rises[0]] * 96 + [0.1 + step / 20 * rises[1]] * 96
        exact_rewards[step] = {"prompts": [*seen, *unseen], "rewards": dict.fromkeys(NAMES, values)}
    records = tuple({"step": step, "kl": float(step), "seconds": 2.0} for step in range(1, 21))
    return FinishedRun(run_config, TrainingResult(20, None, Path("w"), last, records, (), last), exact_rewards)


def test_a_row_is_what_a_hand_finds() -> None:
    run_config = RunConfig("prdp-scenes", "prdp, few prompts")
    told = row(run_config.shows, [finished(run_config, (0.2, 0.1)), finished(run_config, (0.4, 0.3))])
    assert told["seeds"] == 2 and told["images"] == 20 * 32 and told["seconds"] == 40 and told["kl"] == 18.0
    seen, unseen = (told["rewards"]["scene"][half] for half in ("seen", "unseen"))
    assert seen == {"base": 0.5, "end": 0.8, "rise": [pytest.approx(0.3)] * 3, "by_seed": [0.2, 0.4]}
    assert unseen["rise"] == [pytest.approx(0.2)] * 3 and unseen["base"] == 0.1
    assert [point[:2] for point in told["curves"]["scene"]["seen"]] == [[0, 0], [10, 0.15], [20, pytest.approx(0.3)]]


def test_what_a_guard_kept_is_what_counts() -> None:
    run_config = RunConfig("d3po-scenes", "guarded")
    told = row("guarded", [finished(run_config, (0.2, 0.1), last=10)])
    assert told["kept"] == [10] and told["rewards"]["scene"]["seen"]["rise"] == [pytest.approx(0.1)] * 3


def test_methods_are_compared_prompt_by_prompt() -> None:
    plans = {method: RunConfig(f"{method}-scenes", f"{method}, many prompts") for method in ("prdp", "ddpo")}
    groups = {
        plans["prdp"].shows: [finished(plans["prdp"], (0.3, 0.2))],
        plans["ddpo"].shows: [finished(plans["ddpo"], (0.1, -0.1))],
    }
    assert differences(groups)["prdp minus ddpo, many prompts"]["scene"] == {
        "seen": [pytest.approx(0.2)] * 3,
        "unseen": [pytest.approx(0.3)] * 3,
    }


def test_plans_are_equal_but_for_what_they_compare(tmp_path: Path) -> None:
    told = {name: run_config.read(tmp_path) for name, run_config in RUN_CONFIGS.items() if name != "d3po-choices"}
    assert {config.job.method for config in told.values()} <= set(METHODS)
    compared = [config for name, config in told.items() if name.split("-")[1] in ("few", "many")]
    images = {(c.training.train_batch_size, c.training.num_generations, c.training.max_steps) for c in compared}
    assert images == {(4, 8, 60)} and {c.training.steps_per_generation for c in compared} == {2}
    assert {len(PROMPTS[c.job.prompts].read_text().splitlines()) for c in compared if c.job.prompts} == {32, 1024}
    clipped, unclipped = told["prdp-stale"], told["prdp-stale-unclipped"]
    assert (
        replace(unclipped.training, clip=clipped.training.clip) == clipped.training
        and unclipped.training.clip == 1e9 > clipped.training.clip
    )


def test_choices_fall_on_the_better_image_but_now_and_then(tmp_path: Path) -> None:
    write_choices(tmp_path, 3)
    write_choices(tmp_path, 12)
    kept = [json.loads(line) for line in (tmp_path / "choices.jsonl").read_text().splitlines()]
    folder = PreferenceFolder(tmp_path)
    assert len(kept) == len(folder.groups) == 12 and folder.provenance.call == CALL
    reward, right = aesthetic(ANNOTATOR_REWARD.partition(":")[2]), 0
    from steer.files import read_image

    for choice in kept:
        lot = folder.groups[choice["lot"]]
        images = [read_image(tmp_path / lot.image_file(number)) for number in (0, 1)]
        values = [reward(image[None], [lot.rows.prompts[0]]).item() for image in images]
        right += values[choice["chosen"]] > values[choice["rejected"]]
    assert 8 <= right < 12, "one in ten is wrong, and among these at least one is"


def test_a_small_study_runs_and_goes_on_without_doing_anything_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"max_steps": "2", "eval_steps": "2", "train_batch_size": "1", "num_generations": "2"}
    small |= {"num_inference_steps": "3"}
    monkeypatch.setattr(finetune_runs, "NUM_EVAL_PROMPTS", 2)
    monkeypatch.setitem(finetune_study.HALVES, "seen", slice(None, 2))
    monkeypatch.setitem(finetune_study.HALVES, "unseen", slice(2, None))
    chosen = ("prdp-few-0", "ddpo-few-0", "d3po-unguarded", "d3po-watched", "d3po-guarded")
    plans = {name: replace(RUN_CONFIGS[name], changes={**RUN_CONFIGS[name].changes, **small}) for name in chosen}
    monkeypatch.setattr(finetune_runs, "RUN_CONFIGS", plans)
    found: dict[str, Any] = study(tmp_path, [])
    assert [told["updates"] for told in found["rows"]] == [[2]] * 5
    assert set(found["differences"]) == {"prdp minus ddpo, few prompts"}
    assert set(read_evaluations(tmp_path / "prdp-few-0")) == {0, 2}
    draw_methods(found, tmp_path / "methods.png")
    draw_guards(found, tmp_path / "guards.png")
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("methods.png", "guards.png"))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/judged/*.json")}
    assert json.dumps(study(tmp_path, ["prdp"])["rows"]) == json.dumps(found["rows"][:1])
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/judged/*.json")}
