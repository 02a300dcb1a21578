"""Finetuning at equal seconds: the plans, the end by seconds, curves of a small run, the KL of evaluations."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from steer.apps.scenes import training
from steer.apps.scenes.__main__ import main as scenes_main
from steer.apps.scenes.finetuning import (
    TimeLimit,
    _interval,
    curves_table,
    draw_finetuning_curves,
    finetuning_study,
    first_reaching,
    read_plan,
    read_run,
)
from steer.apps.scenes.preferences import CHOICES_CALL, write_choices
from steer.apps.scenes.training import Recipe
from steer.assets import PROMPTS
from steer.errors import InputError
from steer.files import read_image
from steer.pipelines.training.preference_data import PreferenceFolder
from steer.rewards.aesthetic import aesthetic

STUDIES = Path(__file__).resolve().parent.parent / "docs/studies"
METHODS, GUARDS, LISTS = (read_plan(STUDIES / f"finetuning-{name}.yaml") for name in ("methods", "guards", "prompts"))
TINY = {"eval_prompts_count": "2", "train_batch_size": "1", "num_generations": "2", "num_inference_steps": "4"}


def test_every_run_of_the_plans_is_a_configuration_that_differs_in_its_method_or_guard_alone(tmp_path: Path) -> None:
    methods = {name: read_run(run, tmp_path) for name, run in METHODS.items()}
    assert list(methods) == ["grpo", "grpo-window", "ddpo", "d3po", "prdp", "nft", "awm", "dpo"]
    assert all(one.job.method == name.split("-")[0] and one.training.eval_kl for name, one in methods.items())
    online = [one.training for name, one in methods.items() if name != "dpo"]
    assert {(one.train_batch_size, one.num_generations, one.num_inference_steps) for one in online} == {(8, 8, 10)}
    guards = {name: read_run(run, tmp_path) for name, run in GUARDS.items()}
    plain = guards["unguarded"].plain()
    changed = {n: {k for k, v in one.plain().items() if v != plain.get(k)} for n, one in guards.items()}
    assert changed["kl-target"] == changed["kl-target-1"] == {"kl_weight", "kl_target_nats"}
    assert changed["kl-weight"] == {"kl_weight"}
    assert changed["kl-budget"] == {"kl_budget_nats"} and changed["multiplier"] == {"constraints", "dual_rate"}
    assert changed["early-stopping"] == {"early_stopping_patience"}
    assert guards["backprop-slope"].plain() == guards["backprop"].plain() | {"max_slope": 3.0}


def test_prompts_and_the_clip_are_compared_with_all_else_equal(tmp_path: Path) -> None:
    configs = {name: read_run(run, tmp_path) for name, run in LISTS.items() if name != "d3po-choices"}
    for method in ("ddpo", "prdp", "grpo-window", "nft"):
        many, few = (configs[f"{method}-{size}"] for size in ("many", "few"))
        assert many.training == few.training
        assert [len(PROMPTS[one.job.prompts].read_text().splitlines()) for one in (many, few)] == [1024, 32]
    clipped, unclipped = configs["prdp-off-policy"], configs["prdp-off-policy-unclipped"]
    assert replace(unclipped.training, clip=clipped.training.clip) == clipped.training
    assert unclipped.training.clip == 1e9 > clipped.training.clip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["finetuning", "--plan", "none.yaml"], "none.yaml: No such file or directory"),
        (["finetuning", "--plan", "list.yaml"], "list.yaml: a plan has two keys, shared and runs"),
        (["finetuning", "--only", "gpro"], "--only gpro: no run of the plan begins so; there are grpo, grpo-window,"),
        (["large", "--device", "cuda"], "large takes no --device, only autoencoder and check do: leave it out"),
    ],
)
def test_wrong_options_are_one_line(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.yaml").write_text("[1]\n")
    (tmp_path / "docs").symlink_to(STUDIES.parent)
    monkeypatch.setattr("sys.argv", ["scenes", *options])
    with pytest.raises(SystemExit) as stop:
        scenes_main()
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_recipes_are_named_by_their_beginnings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Trained(Exception):
        pass

    def train(folder: Path, vae: Any, recipe: Recipe, *args: Any, **options: Any) -> None:
        raise Trained(folder.name)

    monkeypatch.setattr(training, "train_denoiser", train)
    monkeypatch.setattr(training, "development_requests", list)
    with pytest.raises(Trained, match="text-4"):
        training.pilot(tmp_path, None, 1.0, ["text"])  # type: ignore[arg-type]
    with pytest.raises(
        InputError, match="--only tex-4: no recipe begins so; there are base, fixed, split-words, text-4,"
    ):
        training.pilot(tmp_path, None, 1.0, ["tex-4"])  # type: ignore[arg-type]


@pytest.mark.hard
def test_choices_fall_on_the_better_image_but_now_and_then(tmp_path: Path) -> None:
    for count in (3, 12):
        write_choices(tmp_path, "scenes", "aesthetic:scenes", count)
    kept = [json.loads(line) for line in (tmp_path / "choices.jsonl").read_text().splitlines()]
    folder = PreferenceFolder(tmp_path)
    assert len(kept) == len(folder.groups) == 12 and folder.provenance.call == CHOICES_CALL
    reward, right = aesthetic("scenes"), 0
    for choice in kept:
        group = folder.groups[choice["lot"]]
        images = [read_image(tmp_path / group.image_file(number)) for number in (0, 1)]
        values = [reward(image[None], [group.rows.prompts[0]]).item() for image in images]
        right += values[choice["chosen"]] > values[choice["rejected"]]
    assert 8 <= right < 12, "one in ten is wrong, and among these at least one is"


def test_a_run_ends_and_is_evaluated_by_the_seconds_of_its_updates() -> None:
    asked, limit = [], TimeLimit(16)  # an evaluation every 2 s
    for number in range(1, 13):
        control = SimpleNamespace(should_evaluate=False, should_training_stop=False)
        limit.on_step_end(None, SimpleNamespace(log_history=[{"seconds": 1.5}] * number), control)
        asked.append((control.should_evaluate, control.should_training_stop))
    assert [evaluated for evaluated, _ in asked] == [int(1.5 * n / 2) > int(1.5 * (n - 1) / 2) for n in range(1, 13)]
    assert [stop for _, stop in asked] == [1.5 * n >= 16 for n in range(1, 13)]


def test_intervals_and_first_times_by_hand() -> None:
    mean, low, high = _interval([np.array([0.0, 1.0]), np.array([0.0, 3.0])])[1]
    assert (mean, high - mean) == (2.0, pytest.approx(12.7062, abs=1e-3)) and low + high == pytest.approx(4)
    assert _interval([np.array([0.5])]) == [[0.5, 0.5, 0.5]]
    grid, values = np.array([0.0, 10.0, 20.0]), np.array([0.0, 0.5, 0.4])
    assert first_reaching(grid, values, 0.2) == pytest.approx(4.0) and first_reaching(grid, values, 0.6) is None
    assert first_reaching(grid, values, 0.0) == 0.0


def test_the_table_tells_when_each_run_reaches_the_end_of_the_first() -> None:
    def run(*by_seed: list[float]) -> dict[str, Any]:
        flat = [[0.0] * 3, [-0.1] * 3, [-0.4] * 3]
        mean = [[value] * 3 for value in np.mean(by_seed, 0)]
        return {"trained": mean, "hold_out": flat, "kl": flat, "images": flat, "trained_by_seed": by_seed}

    figures = {"reward": "r", "hold_out": "h", "seconds": [0.0, 10.0, 20.0], "seeds": 2}
    runs = {"slow": run([0, 0.5, 1.0], [0, 0.5, 1.0]), "fast": run([0, 1.0, 2.0], [0, 2.0, 4.0])}
    figures["runs"] = runs | {"one": run([0, 0.2, 0.5], [0, 1.0, 2.0]), "low": run([0, 0.1, 0.2], [0, 0.1, 0.2])}
    head, _, *rows = curves_table(figures).splitlines()
    slow, fast, one, low = (line.split(" | ")[-2:] for line in rows)
    assert "seconds to +1.000, as slow after 20" in head
    assert slow == ["20 (20 to 20)", "-0.400 |"]
    assert fast == ["7 (5 to 10)", "-0.067 |"]  # 1 of 1.5 each 10 s; of 2; of 1
    assert one == ["16 (10 to –)", "-0.285 |"] and low == ["–", "– |"]  # a seed of "one" ends at 0.5


def test_the_table_of_one_seed_has_no_intervals() -> None:
    one = {"trained": [[0.0] * 3, [1.5] * 3], "hold_out": [[0.0] * 3, [-0.25] * 3]}
    one |= {"kl": [[0.0] * 3, [9.0] * 3], "images": [[0.0] * 3, [640.0] * 3]}
    figures = {"reward": "r", "hold_out": "h", "seconds": [0.0, 10.0], "seeds": 1, "runs": {"a": one}}
    lines = curves_table(figures, reached=False).splitlines()
    assert lines[0] == "| run | r | h | √KL, √nats | images |" and lines[2] == "| a | +1.500 | -0.250 | 3.0 | 640 |"


@pytest.mark.hard
def test_a_tiny_study_trains_once_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = {name: {**METHODS[name], **TINY} for name in ("grpo", "nft")}
    runs |= {"dpo": {**METHODS["dpo"], **TINY, "train_batch_size": "2"}}
    figures = finetuning_study(runs, tmp_path, "scenes", "aesthetic:scenes", 0.5, 1, pairs=4)
    assert list(figures["runs"]) == ["grpo", "nft", "dpo"] and figures["seconds"][-1] == 0.5
    for one in figures["runs"].values():
        assert {len(one[name]) for name in ("trained", "hold_out", "kl", "images")} == {9}
        assert one["kl"][0][0] == 0 < one["kl"][-1][0] and one["trained"][0][0] == 0
    folder = tmp_path / "scenes-aesthetic-scenes"
    spent = [json.loads(line)["seconds"] for line in (folder / "grpo-0/metrics.jsonl").read_text().splitlines()]
    assert sum(spent[:-1]) < 0.5 <= sum(spent)
    monkeypatch.setattr("steer.apps.scenes.finetuning.finetune", None)  # finished runs are not trained again
    assert finetuning_study(runs, tmp_path, "scenes", "aesthetic:scenes", 0.5, 1, pairs=4) == figures
    assert [line.split(" | ")[0] for line in curves_table(figures).splitlines()[2:]] == ["| grpo", "| nft", "| dpo"]
    draw_finetuning_curves(figures, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
