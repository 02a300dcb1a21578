"""`steer tune`: candidates of equal cost, the best one, and the preset that `steer sample` reads."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Steer, cached_pipe, call_kwargs
from soft_rewards import Soft

from steer.apps.evaluation.tune import CONTROL, picture_candidates, sample_candidates, table, tune
from steer.arguments import IMAGES_PER_PROMPT
from steer.errors import InputError
from steer.pipelines.racing import race_cost


@pytest.mark.parametrize("budget", [60, 104, 160, 208])
def test_all_candidates_cost_at_most_the_budget(budget: int) -> None:
    names = [one.name for one in picture_candidates(budget, 20)]
    assert len(names) == len({*names}) and names[0] == CONTROL
    for one in picture_candidates(budget, 20):
        if one.method == "race":
            cost = race_cost(one.particles, one.options["rungs"], 20, one.options["lookahead"])
        elif one.method == "drafts":
            cost = one.options["drafts"] * one.options["draft_steps"] + 20
        else:
            cost = one.particles * 20
        assert 0 < cost <= budget, one.name
    for one in sample_candidates(budget, 20):
        extra = (one.options["lookahead"] - 1) * len(one.options["resample_steps"]) if one.method == "fk" else 0
        assert one.particles * (20 + extra) <= budget, one.name


def test_the_measured_beam_search_is_a_candidate() -> None:
    (beam,) = [one for one in picture_candidates(208, 20) if one.name == "beam 2 × 4 at 5,8,12 m=3"]
    assert (beam.method, beam.particles, beam.options["branches"]) == ("race", 8, 4)


@pytest.mark.hard
def test_the_best_mean_is_the_preset_and_finished_candidates_are_kept(tmp_path: Path) -> None:
    pipe = cached_pipe("sd")
    call = {
        name: value
        for name, value in call_kwargs("sd", 2, 5).items()
        if name not in (*IMAGES_PER_PROMPT, "prompt") and not hasattr(value, "shape")
    }
    scored = [0]

    def count(images: Any, prompts: Any) -> Any:
        scored[0] += len(images)
        return images[:, 0].mean((1, 2))

    arguments = (pipe, Soft(count, "red"), ["a star"], 20, tmp_path)
    results = tune(*arguments, call=call)
    assert all(nfe <= 20 for nfe in results["nfe"].values()) and len(results["scores"]) > 5
    highest = max(sum(scores) for scores in results["scores"].values())
    assert sum(results["scores"][results["best"]]) == highest
    before = scored[0]
    assert tune(*arguments, call=call)["best"] == results["best"] and scored[0] == before, "nothing ran again"
    stored = json.loads((tmp_path / "tune.json").read_text())
    assert stored["scores"] == results["scores"] and table(results).count("\n") == len(results["scores"]) + 1
    with pytest.raises(InputError, match="holds a tuning of other prompts or settings"):
        tune(pipe, Soft(count, "red"), ["a star"], 21, tmp_path, call=call)
    with pytest.raises(InputError, match="budget: 9 evaluations are fewer than two images of 5 steps"):
        tune(pipe, Soft(count, "red"), ["a star"], 9, tmp_path / "small", call=call)


def test_the_command_writes_a_preset_that_sample_reads(steer: Steer, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red star\n")
    words = ["--reward", "scene-soft", "--prompts", tmp_path / "prompts.txt", "--steps", 4, "--budget", 8]
    code, out, error = steer("tune", "scenes", *words, "--out", tmp_path / "tune")
    assert code == 0 and "best: " in out, error
    preset = yaml.safe_load((tmp_path / "tune/preset.yaml").read_text())
    assert {"model": "scenes", "reward": "scene-soft", "steps": 4}.items() <= preset.items()
    code, _, error = steer(
        *("sample", "a star", "--preset", tmp_path / "tune/preset.yaml", "--no-compare", "--out", tmp_path / "o")
    )
    assert code == 0, error
    settings = json.loads((tmp_path / "o/report.json").read_text())["settings"]
    assert all(settings[name] == value for name, value in preset.items())
    code, _, error = steer("tune", "scenes", *words, "--lam", 5, "--out", tmp_path / "other")
    assert code == 2 and "--lam is the strength of --purpose samples" in error
    code, _, error = steer(
        *("tune", "scenes", *words, "--purpose", "samples", "--lam", "strong", "--out", tmp_path / "other")
    )
    assert code == 2 and "lam must be a number, or auto, got 'strong'" in error
    code, _, error = steer("tune", "scenes", *words, "--purpose", "samples", "--out", tmp_path / "other")
    assert code == 0, error
    header = json.loads((tmp_path / "other/tune.json").read_text())["header"]
    assert (header["purpose"], header["lam"]) == ("samples", "auto")


@pytest.mark.hard
def test_a_strength_is_chosen_by_best_of_n_once_for_all_candidates(tmp_path: Path) -> None:
    pipe, call = cached_pipe("sd"), {"num_inference_steps": 5}
    made: list[tuple[int, torch.Tensor]] = []

    def red(images: Any, prompts: Any) -> Any:
        rewards = images[:, 0].mean((1, 2))
        made.append((len(images), rewards))
        return rewards

    arguments = (pipe, Soft(red, "red"), ["a star", "two stars"], 20, tmp_path, "samples")
    results = tune(*arguments, "auto", call)
    first = torch.stack([rewards for _, rewards in made[:2]]).double()  # four images each of two prompts
    weights = (results["lam"] * first).exp()
    assert (weights.sum(1) ** 2 / (weights**2).sum(1)).mean().item() == pytest.approx(2, rel=1e-3)
    same = tune(*arguments[:4], tmp_path / "number", "samples", results["lam"], call)
    assert results["scores"] == same["scores"] and results["preset"] == same["preset"]
    before = len(made)
    assert tune(*arguments, "auto", call)["preset"] == results["preset"] and len(made) == before, "nothing ran again"
    with pytest.raises(InputError, match="all images of each prompt have the same reward"):
        tune(
            pipe,
            Soft(lambda images, prompts: torch.zeros(len(images)), "0"),
            ["a"],
            20,
            tmp_path / "0",
            "samples",
            "auto",
            call,
        )
