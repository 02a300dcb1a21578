"""docs/results.py: tables of the pages from JSON files, against means and differences by hand."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from torch.utils.flop_counter import FlopCounterMode

from steer.apps.models import load_pipeline

FILE = Path(__file__).resolve().parent.parent / "docs/results.py"
SPEC = importlib.util.spec_from_file_location("results", FILE)
assert SPEC is not None and SPEC.loader is not None
results = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(results)
RIGHT = "steer.apps.scenes.world:right"


def contender(name: str, images: list[list[float]], nfe: float) -> dict[str, Any]:
    """A contender of an evaluation.json of two prompts, with the rewards of the images of each; the first is picked."""
    runs = [{"prompt": n, "rewards": {"scene-soft": row, RIGHT: row}} for n, row in enumerate(images)]
    cost = {"nfe": nfe, "decodes": float(len(images[0])), "seconds": 1.0}
    own = {"name": name, "model": "scenes", "method": name, "options": {}, "particles": len(images[0]), "cost": cost}
    return own | {"diversity": None, "environments": [{"torch": "2"}], "runs": runs}


@pytest.fixture
def study() -> dict[str, Any]:
    contenders = [contender("base", [[0.0], [1.0]], 20.0), contender("best-of-2", [[0.0, 1.0], [1.0, 0.0]], 40.0)]
    prompts = [{"prompt": "a circle", "tag": "one"}, {"prompt": "a star", "tag": "two"}]
    report = {"prompts": prompts, "seeds": 1, "rewards": ["scene-soft", RIGHT], "contenders": contenders}
    kept: dict[str, Any] = results.kept(report)
    return kept


def test_every_table_of_the_pages_is_that_of_its_file() -> None:
    for page in results.pages():
        assert results.filled(page.read_text()) == page.read_text(), f"{page.name}: run python docs/results.py"


def test_a_study_keeps_the_picked_image_and_the_mean_of_each_prompt(study: dict[str, Any]) -> None:
    base, best = study["contenders"]
    assert base["rewards"]["right"] == {
        "picked": [0.0, 1.0],
        "two": [0.0, 1.0],
        "all": [0.0, 1.0],
        "highest": [0.0, 1.0],
    }
    assert best["rewards"]["right"] == {
        "picked": [0.0, 1.0],
        "two": [0.5, 0.5],
        "all": [0.5, 0.5],
        "highest": [1.0, 1.0],
    }
    assert study["prompts"] == 2 and study["tags"] == ["one", "two"]
    assert json.loads(json.dumps(study)) == study


def test_a_study_grows_by_contenders_of_the_same_prompts(study: dict[str, Any]) -> None:
    first, second = ({**study, "contenders": [one]} for one in study["contenders"])
    assert results.added(first, second)["contenders"] == study["contenders"]
    changed = dict(study["contenders"][0], options={"eta": 1.0})
    assert results.added(study, first | {"contenders": [changed]})["contenders"] == [changed, study["contenders"][1]]
    with pytest.raises(SystemExit, match="other prompts"):
        results.added(study | {"tags": ["one", "one"]}, first)


def test_a_search_is_shown_with_its_cost_in_plain_images(study: dict[str, Any]) -> None:
    rows = results.search(study).splitlines()
    assert rows[0] == "| search | cost | best image right | its scene-soft | first two right | any right |"
    assert (
        rows[3]
        == "| best-of-2 | 2.0 | .500 [.000, 1.000] | .500 [.000, 1.000] | .500 [.500, .500] | 1.000 [1.000, 1.000] |"
    )


def test_differences_are_paired_and_leave_out_the_control(study: dict[str, Any]) -> None:
    rows = results.search(study, against="base").splitlines()
    assert len(rows) == 3 and rows[0].startswith("| minus base |")
    assert rows[2].startswith("| best-of-2 | 2.0 | +.000 [.000, .000] |")  # 0 − 0 and 1 − 1
    assert "| +.000 [−.500, .500] |" in rows[2]  # ½ − 0 and ½ − 1
    assert rows[2].endswith("| +.500 [.000, 1.000] |")  # 1 − 0 and 1 − 1


def test_accuracy_is_by_task(study: dict[str, Any]) -> None:
    rows = results.accuracy(study, rows=["base"]).splitlines()
    assert rows[0] == "| model | steps | all prompts | one (1) | two (1) |"
    assert rows[2] == "| scenes | 20 | .500 [.000, 1.000] | .000 [.000, .000] | 1.000 [1.000, 1.000] |"


def test_a_page_gets_its_tables_between_comments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "DOCS", tmp_path)
    figures = {"prompts": 1, "particles": 2, "steps": [3], "agreement": {"1": [[0.5, 0.4, 0.6]]}, "nfe": {"1": 20.0}}
    (tmp_path / "f.json").write_text(json.dumps(figures))
    page = "before\n<!-- results agreement f.json -->\nold\n<!-- end -->\nafter\n"
    once = results.filled(page)
    assert "| x̂0 | 0.50 [0.40, 0.60] | 20 |" in once and "old" not in once
    assert once.startswith("before\n") and once.endswith("-->\nafter\n") and results.filled(once) == once


def test_a_figure_joins_the_numbers_of_particles_of_one_method(
    study: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fk, race = (
        dict(study["contenders"][1], name=name, cost={"nfe": 60.0, "decodes": 2.0})
        for name in ("fk 6, m = 3", "race 4")
    )
    large = dict(study["contenders"][0], name="scenes-large", model="scenes-large")
    two = dict(study["contenders"][1], name="scenes-large, best-of-2", model="scenes-large")
    drawn = []
    monkeypatch.setattr(results, "save_figure", lambda figure, path: drawn.append(figure))
    results.draw_search(study | {"contenders": [*study["contenders"], fk, race, large, two]}, tmp_path / "search.png")
    for axes in drawn[0].axes:
        lines = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
        unit = 20 + results.DECODING
        assert lines == {
            "best-of-n": [[1.0, 0.5], [(40 + 2 * results.DECODING) / unit, 0.5]],
            "fk, m = 3": [[(60 + 2 * results.DECODING) / unit, 0.5]],
            "race": [[(60 + 2 * results.DECODING) / unit, 0.5]],
            "scenes-large, best-of-n": [
                [(n * 20 * results.EVALUATION["scenes-large"] + n * results.DECODING) / unit, 0.5] for n in (1, 2)
            ],
        }


def test_a_gradient_costs_two_more_evaluations_of_everything() -> None:
    forward = contender("best-of-2", [[0.0, 0.0]], 2.0) | {"model": "scenes-turbo"}
    assert results.cost(forward) == 2 * (0.5 + results.DECODING)
    half = forward | {"cost": forward["cost"] | {"gradients": 1.0}}
    assert results.cost(half) == 2 * results.cost(forward)


@pytest.mark.parametrize("name", sorted(results.EVALUATION))
def test_the_cost_of_an_evaluation_is_that_of_its_flops(name: str) -> None:
    def flops(model: str) -> int:
        pipe = load_pipeline(model)
        pipe.set_progress_bar_config(disable=True)
        counts = []
        for steps in (1, 2):
            with FlopCounterMode(display=False) as counter:
                pipe("a star", num_inference_steps=steps, guidance_scale=4.0, output_type="latent")
            counts.append(counter.get_total_flops())
        return counts[1] - counts[0]

    assert flops(name) / flops("scenes") == pytest.approx(results.EVALUATION[name], rel=0.01)


def test_every_figure_of_the_pages_has_its_file(tmp_path: Path) -> None:
    for name, (draw, file) in results.FIGURES.items():
        draw(json.loads((results.DOCS / file).read_text()), tmp_path / name)
        assert (tmp_path / name).stat().st_size > 0 and (results.DOCS / name).exists()
