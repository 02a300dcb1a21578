"""The finetuning study: its plan, its preferences, and a small run of it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from steer.apps.finetuning import METHODS
from steer.apps.scenes.finetuning import finetuning_study, read_plan, read_run
from steer.apps.scenes.preferences import ANNOTATOR_REWARD, write_choices
from steer.apps.scenes.preferences import CHOICES_CALL as CALL
from steer.assets import PROMPTS
from steer.files import read_image
from steer.pipelines.training.preference_data import PreferenceFolder
from steer.rewards.aesthetic import aesthetic

RUN_CONFIGS = read_plan(Path(__file__).resolve().parent.parent / "docs/studies/finetuning.yaml")


def test_runs_are_equal_but_for_what_they_compare(tmp_path: Path) -> None:
    configs = {name: read_run(run, tmp_path) for name, run in RUN_CONFIGS.items() if name != "d3po-preferences"}
    assert len(RUN_CONFIGS) == 22 and {config.job.method for config in configs.values()} <= set(METHODS)
    compared = [config for name, config in configs.items() if name.split("-")[1] in ("few", "many")]
    images = {(c.training.train_batch_size, c.training.num_generations, c.training.max_steps) for c in compared}
    assert images == {(4, 8, 60)} and {c.training.steps_per_generation for c in compared} == {2}
    assert {len(PROMPTS[c.job.prompts].read_text().splitlines()) for c in compared if c.job.prompts} == {32, 1024}
    clipped, unclipped = configs["prdp-off-policy"], configs["prdp-off-policy-unclipped"]
    assert replace(unclipped.training, clip=clipped.training.clip) == clipped.training
    assert unclipped.training.clip == 1e9 > clipped.training.clip


@pytest.mark.hard
def test_choices_fall_on_the_better_image_but_now_and_then(tmp_path: Path) -> None:
    write_choices(tmp_path, 3)
    write_choices(tmp_path, 12)
    kept = [json.loads(line) for line in (tmp_path / "choices.jsonl").read_text().splitlines()]
    folder = PreferenceFolder(tmp_path)
    assert len(kept) == len(folder.groups) == 12 and folder.provenance.call == CALL
    reward, right = aesthetic(ANNOTATOR_REWARD.partition(":")[2]), 0
    for choice in kept:
        lot = folder.groups[choice["lot"]]
        images = [read_image(tmp_path / lot.image_file(number)) for number in (0, 1)]
        values = [reward(image[None], [lot.rows.prompts[0]]).item() for image in images]
        right += values[choice["chosen"]] > values[choice["rejected"]]
    assert 8 <= right < 12, "one in ten is wrong, and among these at least one is"


@pytest.mark.hard
def test_a_small_study_is_trained_once_and_evaluated_on_seen_and_unseen_prompts(
    tmp_path: Path,
) -> None:
    small = {"max_steps": "1", "eval_steps": "1", "train_batch_size": "1", "num_generations": "2"}
    small |= {"num_inference_steps": "3", "eval_prompts_count": "2"}
    runs = {name: {**RUN_CONFIGS[name], **small} for name in ("prdp-few-0", "d3po-early-stopping-kl")}
    reports = finetuning_study(runs, tmp_path, count=2)
    assert set(reports) == {"scenes-few", "scenes-training"}
    base, finetuned = reports["scenes-few"]["contenders"]
    assert base["lora"] is None and finetuned["lora"] == str(tmp_path / "prdp-few-0/final")
    assert {tag: task["prompts"] for tag, task in finetuned["tasks"].items()} == {"seen": 2, "unseen": 2}
    assert list(finetuned["rewards"]) == ["aesthetic:scenes", "scene", "jpeg"] and finetuned["kl"] is not None
    assert "difference" in finetuned["rewards"]["scene"]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/final/*")}
    assert before and set(finetuning_study(runs, tmp_path, ["prdp"], count=2)) == {"scenes-few"}
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/final/*")}
