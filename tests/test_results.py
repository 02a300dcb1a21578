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
    spent = {"seconds": 1.0}
    runs = [{"prompt": n, "rewards": {"scene-soft": row, RIGHT: row}, "cost": spent} for n, row in enumerate(images)]
    cost = {"nfe": nfe, "decodes": float(len(images[0])), "seconds": 1.0}
    own = {
        "name": name,
        "model": "scenes",
        "method": "base" if name == "base" else "best-of-n",
        "options": {},
        "particles": len(images[0]),
        "cost": cost,
    }
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


def race(study: dict[str, Any], evaluations: float, right: list[float]) -> dict[str, Any]:
    """A race whose picked images have the given rewards."""
    parts = dict.fromkeys(("picked", "two", "highest", "all"), right)
    own = {
        "name": "race 4",
        "method": "race",
        "options": {"particles": 4},
        "rewards": {"scene-soft": parts, "right": parts},
    }
    return study["contenders"][0] | own | {"cost": {"nfe": evaluations, "decodes": 1.0}}


def test_differences_are_paired_with_best_of_n_at_the_same_cost(study: dict[str, Any]) -> None:
    unit = 20 + results.DECODING
    middle = race(study, 2**0.5 * unit - results.DECODING, [1.0, 1.0])  # halfway from 1 to 2 in the logarithm
    both = study | {"contenders": [*study["contenders"], middle]}
    # the picked images of best-of-n have 0 and 1 at n = 1 and 2; the first two have 0 and 1, then ½ and ½
    assert results.excess(both, middle, "right", "picked").tolist() == pytest.approx([1.0, 0.0])
    assert results.excess(both, middle, "right", "two").tolist() == pytest.approx([0.75, 0.25])
    rows = results.equal_cost(both).splitlines()
    assert rows[0] == "| search | cost | best image right | its scene-soft | first two right |"
    assert rows[2:] == ["| race 4 | 1.4 | +.500 [.000, 1.000] | +.500 [.000, 1.000] | – |"]


def test_a_search_beyond_the_largest_best_of_n_is_not_compared(study: dict[str, Any]) -> None:
    beyond = race(study, 80.0, [1.0, 1.0])
    assert len(results.equal_cost(study | {"contenders": [*study["contenders"], beyond]}).splitlines()) == 2


def test_seconds_are_medians_of_the_runs(study: dict[str, Any]) -> None:
    base, best = study["contenders"]
    timed = study | {"contenders": [base | {"seconds": [9.0, 0.5, 0.5]}, best | {"seconds": [0.75]}]}
    assert results.seconds(timed).splitlines()[3] == "| best-of-2 | 2.0 | 0.75 | 1.5 |"


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
    large = dict(study["contenders"][0], name="scenes-large", model="scenes-large")
    two = dict(study["contenders"][1], name="scenes-large, best-of-2", model="scenes-large")
    middle = race(study, 30.0, [1.0, 1.0])
    drawn = []
    monkeypatch.setattr(results, "save_figure", lambda figure, path: drawn.append(figure))
    results.draw_search(study | {"contenders": [*study["contenders"], middle, large, two]}, tmp_path / "search.png")
    over_cost, right, soft = drawn[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in over_cost.get_lines()}
    unit = 20 + results.DECODING
    assert lines == {
        "best-of-n": [[1.0, 0.5], [(40 + 2 * results.DECODING) / unit, 0.5]],
        "scenes-large, best-of-n": [
            [(n * 20 * results.EVALUATION["scenes-large"] + n * results.DECODING) / unit, 0.5] for n in (1, 2)
        ],
    }
    for axes in (right, soft):
        points = [line.get_xydata().tolist() for line in axes.get_lines() if line.get_marker() == "o"]
        assert points == [[[0.5, 0.0]]]
    assert [label.get_text() for label in right.get_yticklabels()] == ["race 4"]


def test_a_gradient_costs_two_more_evaluations_of_everything() -> None:
    forward = contender("best-of-2", [[0.0, 0.0]], 2.0) | {"model": "scenes-turbo"}
    assert results.cost(forward) == 2 * (0.5 + results.DECODING)
    half = forward | {"cost": forward["cost"] | {"gradients": 1.0}}
    assert results.cost(half) == 2 * results.cost(forward)


@pytest.mark.few(1)
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
