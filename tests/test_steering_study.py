"""The steering study: what it concludes from given results by hand, and a tiny run of all of it that goes on."""

import json
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator

from steer import FKSteeringPipeline
from steer.apps.models import load_pipeline
from steer.apps.scenes import __main__ as stages
from steer.apps.scenes import steering_studies as steering_ablations
from steer.apps.scenes import steering_studies as steering_study
from steer.apps.scenes.evaluate import (
    STEERING,
    BestOfN,
    Cost,
    NoiseSearch,
    Point,
    PromptResults,
    ResultCache,
    SteeringMethod,
)
from steer.apps.scenes.steering_studies import ablations, contenders, draw_ablations, draw_steering, variants
from steer.apps.scenes.steering_studies import steering_study as study
from steer.assets import MODELS
from steer.errors import InputError
from steer.rewards.scene import SceneReward

CALL = {"num_inference_steps": 4, "guidance_scale": 4.0}
PROMPTS = ["a red circle", "two blue stars", "a green cross"]


def results(prompts: int, images: int, seconds: float = 8.0) -> PromptResults:
    generator = Generator().manual_seed(0)
    proxy = torch.rand(prompts, images, generator=generator)
    exact = torch.randint(0, 4, (prompts, images), generator=generator) / 3
    return PromptResults(proxy, exact, Cost(evaluations=images * 20.0, decodes=float(images), seconds=seconds))


def test_best_of_n_is_the_mean_over_subsets_and_costs_its_share() -> None:
    found, samples = results(3, 6), BestOfN("best-of-n", 6, sizes=(1, 2, 4, 6))
    points = samples.points(found)
    assert [point.size for point in points] == [1, 2, 4, 6]
    for point in points:
        n = int(point.size)
        for row in range(3):
            subsets = list(combinations(range(6), n))
            picks = [max(some, key=lambda k: found.proxy[row, k].item()) for some in subsets]
            met = sum(found.exact[row, pick].item() for pick in picks) / len(picks)
            right = sum(found.exact[row, pick].item() == 1 for pick in picks) / len(picks)
            assert point.met[row].item() == pytest.approx(met) and point.right[row].item() == pytest.approx(right)
        assert (point.spent.evaluations, point.spent.seconds) == (20 * n, pytest.approx(8 * n / 6))
    between = samples.best_of(found, 2.25)
    assert torch.allclose(between.met, 0.75 * points[1].met + 0.25 * samples.best_of(found, 3).met)


def test_equal_cost_is_equal_cost() -> None:
    found, samples = results(3, 4), BestOfN("best-of-n", 4)
    at_seconds, at_evaluations = samples.at_seconds(found, 5.0), samples.at_evaluations(found, 60.0)
    assert at_seconds is not None and at_seconds.size == 2.5 and at_seconds.spent.seconds == 5.0
    assert at_evaluations is not None and at_evaluations.size == 3 and at_evaluations.spent.evaluations == 60
    assert samples.at_seconds(found, 8.1) is None and samples.at_evaluations(found, 81.0) is None


def test_a_search_is_judged_after_every_iteration_at_what_it_took_until_then() -> None:
    found, search = results(2, 3), NoiseSearch("search", 3, neighbours=4)
    points = search.points(found)
    assert [point.size for point in points] == [1, 5, 9]
    assert [point.spent.seconds for point in points] == pytest.approx(
        [8 * n / 10 for n in (1, 5, 9)]
    )  # one more at the end
    for column, point in enumerate(points):
        assert torch.equal(point.met, found.exact[:, column])
        assert point.right.tolist() == [float(value == 1) for value in found.exact[:, column].tolist()]


def test_a_difference_is_over_the_prompts_that_both_have() -> None:
    def point(right: Sequence[float]) -> Point:
        values = torch.tensor(right)
        return Point(1, values, values, values, None, Cost(1, 1, 1))

    told = point([1.0, 1.0, 0.0, 1.0]).minus(point([0.0, 1.0]))
    assert told["prompts"] == 2 and told["right"][0] == 0.5
    assert told["right"][1] == 0 and told["right"][2] == 1


def tiny(large: str = "no-such-model") -> list[SteeringMethod]:
    return contenders(sizes=(1, 4), part=2, large=large)


def test_the_study_runs_and_goes_on_without_doing_anything_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, options in (("SVDD", {"eta": 0.0}), ("BEAM", {"beams": 2})):  # a run of 4 has no step 17
        monkeypatch.setattr(steering_study, name, options)
    found = study(tmp_path, "scene-soft", PROMPTS, tiny(), CALL)
    assert set(found["panels"]) == {"3", "2"}
    assert {name: [row["size"] for row in rows] for name, rows in found["panels"]["2"].items()} == {
        **{"best-of-n": [1, 4], "FK": [1, 4], "zero-order search": [1, 5]},
        **{"SVDD": [4], "SVDD, as published": [4], "beam search": [4]},
    }
    assert set(found["panels"]["3"]) == {"best-of-n", "FK"}
    assert {row["prompts"] for rows in found["panels"]["2"].values() for row in rows} == {2}
    for name, rows in found["panels"]["3"].items():
        assert [row["evaluations"] for row in rows] == [4, 16], name
        assert all(row["prompts"] == 3 and row["seconds"] > 0 for row in rows)
    svdd, plain = found["panels"]["2"]["SVDD"][0], found["panels"]["2"]["best-of-n"][1]
    assert svdd["decodes"] == 4 * 4 and plain["decodes"] == 4  # at three steps and the end
    compared = [(one["of"], one["size"], one["against"]) for one in found["differences"]["2"]]
    assert ("FK", 4, "best-of-n, equal evaluations") in compared and ("SVDD", 4, "FK, K = 4") in compared
    draw_steering(found, tmp_path / "study.png")
    assert (tmp_path / "study.png").stat().st_size > 20_000

    ran: list[str] = []
    monkeypatch.setattr(SteeringMethod, "run", _told(ran, SteeringMethod.run))
    monkeypatch.setattr(NoiseSearch, "run", _told(ran, NoiseSearch.run))
    assert study(tmp_path, "scene-soft", PROMPTS, tiny(), CALL) == found and ran == []
    (tmp_path / "fk-4/0000.json").unlink()
    again = study(tmp_path, "scene-soft", PROMPTS, tiny(), CALL)
    assert ran == ["FK"]
    same = [[{**row, "seconds": 0} for row in rows] for rows in found["panels"]["3"].values()]
    assert [[{**row, "seconds": 0} for row in rows] for rows in again["panels"]["3"].values()] == same
    ran.clear()
    with_large = study(tmp_path, "scene-soft", PROMPTS, tiny(str(MODELS["scenes-turbo"])), CALL)
    assert ran == ["scenes-turbo"]
    assert with_large["panels"]["3"]["FK"] == again["panels"]["3"]["FK"]
    named = {(one["of"], one["against"]) for one in with_large["differences"]["3"]}
    assert {("FK", "scenes-turbo, unsteered"), ("scenes-turbo", "best-of-n, equal seconds")} <= named
    with pytest.raises(InputError, match="other settings or prompts"):
        study(tmp_path, "scene-soft", PROMPTS, tiny(), CALL | {"guidance_scale": 2.0})


def _told(ran: list[str], run: Any) -> Any:
    def told(self: SteeringMethod, *arguments: Any) -> PromptResults:
        ran.append(self.name)
        return run(self, *arguments)  # type: ignore[no-any-return]

    return told


def test_what_is_kept_is_what_the_pipeline_gives(tmp_path: Path) -> None:
    one = SteeringMethod("FK", 2, FKSteeringPipeline, STEERING)
    (found,) = ResultCache(tmp_path, "scene-soft", CALL).run([one], PROMPTS[:2])
    pipe = load_pipeline("scenes", "cpu")
    pipe.set_progress_bar_config(disable=True)
    out = FKSteeringPipeline(pipe, "scene-soft")(
        PROMPTS[:2], num_particles=2, lam=25.0, generator=Generator().manual_seed(0), output_type="pt", **CALL
    )
    exact = SceneReward()(out.images, [prompt for prompt in PROMPTS[:2] for _ in range(2)])
    assert torch.equal(found.proxy, out.rewards) and torch.equal(found.exact, exact.view(2, 2))
    assert (found.spent.evaluations, found.spent.decodes) == (out.cost.nfe / 2, out.cost.decodes / 2)
    (point,) = one.points(found)
    assert torch.equal(point.met, exact.view(2, 2)[:, 0])
    assert point.all_right is not None and torch.equal(point.all_right, (exact.view(2, 2) == 1).double().mean(1))


def test_ablations_change_one_setting_at_a_time(tmp_path: Path) -> None:
    changed = variants({"λ": {"5": {"lam": 5.0}, "25": {}}, "η": {"0": {}, "1": {"eta": 1.0}}}, {"SVDD": {}})
    found = ablations(tmp_path, "scene-soft", PROMPTS[:2], changed, CALL)
    assert {path.name for path in tmp_path.iterdir()} == {"standard-4", "λ-5-4", "η-1-4", "svdd-4", "best-of-n-4"}
    rows = found["factors"]
    assert {factor: list(values) for factor, values in rows.items()} == {
        **{"λ": ["5", "25"], "η": ["0", "1"], "method": ["FK", "best-of-4", "SVDD"]}
    }
    assert rows["λ"]["25"] == rows["η"]["0"] == rows["method"]["FK"]
    assert rows["λ"]["25"]["standard"] and rows["λ"]["25"]["minus_standard"]["right"] == [0, 0, 0]
    assert rows["λ"]["5"]["options"] == {"lam": 5.0} and rows["η"]["1"]["options"] == {"lam": 25.0, "eta": 1.0}
    assert not rows["λ"]["5"]["standard"]
    draw_ablations(found, tmp_path / "ablations.png")
    assert (tmp_path / "ablations.png").stat().st_size > 20_000
    every = [one for values in variants().values() for one in values.values()]
    assert len({one.key for one in every}) == len(set(every))  # no two share a folder


@pytest.mark.parametrize("stage", ["steering", "ablations"])
def test_the_stages_write_numbers_and_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    monkeypatch.setattr(steering_study, "contenders", lambda large: [BestOfN("best-of-n", 1, sizes=(1,))])
    monkeypatch.setattr(steering_ablations, "variants", lambda: variants({"η": {"0": {}}}, {}))
    words = [stage, "--count", "1", "--out", tmp_path, "--json", tmp_path / "found.json"]
    monkeypatch.setattr(sys, "argv", ["scenes", *map(str, words)])
    stages.main()
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["prompts"] == 1 and found["settings"]["num_inference_steps"] == 20
    assert (tmp_path / "found.png").exists() and list((tmp_path / stage).rglob("*.json"))
