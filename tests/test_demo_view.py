"""The view of a run: its images, its tree, its curves and its table, against the frames they were made from."""

import base64
import io
import json
import math
import os
import re
import shutil
import statistics
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from PIL import Image, ImageColor

pytest.importorskip("gradio")

from steer.apps.demo.markup import table
from steer.apps.demo.run_view import EMPTY_TEXT, ancestor_paths, full_lineages, run_view
from steer.apps.demo.steer_tab import settings_of
from steer.apps.demo.steering import Frame, PromptResult
from steer.apps.plots import chart, draw_series, mark_integers, set_title, short
from steer.apps.recipes import Recipe
from steer.apps.sampling import SavedImage
from steer.pipelines.base import Cost

EVIL = "\"><script>alert(1)</script><img src=x onerror='alert(2)'>&amp;"
PARENTS = ((0, 0, 2), (1, 1, 2), (2, 0, 1))  # of three particles at three evaluations
REWARDS = ((0.1, 0.2, 0.3), (0.4, -0.5, 0.6), (0.25, 0.75, 0.5))
FINISHED = (0.9, 0.7, 0.8)  # by slot
COLOURS = ("red", "lime", "blue")
FOLDER = Path(__file__).parent.parent / "apps" / "demo"


def frame(
    number: int, rewards: Sequence[float], ancestors: Sequence[int] | None, ess: float | None = 1.5, total: int = 20
) -> Frame:
    images = tuple(Image.new("RGB", (20, 20), (10 * slot, 20 * number, 0)) for slot in range(len(rewards)))
    return Frame(4 * number + 1, total, images, tuple(rewards), ess, None if ancestors is None else tuple(ancestors))


def three_evaluations() -> list[Frame]:
    return [frame(number, REWARDS[number], PARENTS[number]) for number in range(3)]


def result_of(folder: Path, rewards: Sequence[float] = FINISHED, prompt: str = EVIL) -> PromptResult:
    """Finished images, best first, each in the colour of its slot (COLOURS)."""
    settings = settings_of(
        {"method": "fk", "reward": "brightness", "particles": len(rewards), "lam": 5.0, "steps": 20, "guidance": 2.0}
        | {"iterations": 3, "seed": 5, "fresh": False, "model": "scenes", "compare": False, "adapter": False}
    )
    order, pictures = sorted(range(len(rewards)), key=lambda slot: -rewards[slot]), []
    for rank, slot in enumerate(order):
        path = folder / f"{rank}.png"
        Image.new("RGB", (600, 300), COLOURS[slot % len(COLOURS)]).save(path)
        recipe = Recipe(prompt, settings, False, rank, rewards[slot], {}, "", "0", "0", "0", "cpu", "float32")
        pictures.append(SavedImage(path, recipe))
    return PromptResult(prompt, settings, tuple(pictures), tuple(order), (), Cost(1, 1, 1, 1.0), None)


def parsed(html: str) -> ElementTree.Element:
    return ElementTree.fromstring(html)


def by_class(root: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    return [each for each in root.iter() if name in each.get("class", "").split()]


def words(root: ElementTree.Element) -> str:
    """Visible text and texts for screen readers, without the images themselves."""
    attributes = [value for each in root.iter() for key, value in each.items() if key not in ("src", "href", "style")]
    return " ".join([*root.itertext(), *attributes])


def line_chart(title: str, name: str, points: Sequence[tuple[float, ...]], x_range: tuple[float, float]) -> str:
    return chart(lambda axes: draw_series(axes, title, name, points, x_range))


def marks(root: ElementTree.Element) -> list[ElementTree.Element]:
    """The markers of a chart: each names its values."""
    return [mark for mark in root.iter("use") if mark.find("title") is not None]


def rows_of(root: ElementTree.Element) -> list[list[str]]:
    return [["".join(cell.itertext()) for cell in row] for row in root.iter("tr")]


# ancestry


def test_lineages_of_a_genealogy_by_hand() -> None:
    lineages = {key: set(line) for key, line in full_lineages(ancestor_paths(PARENTS, 3)).items()}
    assert lineages[0, 1] == {(0, 1)}, "no particle continues it"
    assert lineages[0, 0] == {(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (3, 1), (3, 2)}
    assert lineages[1, 0] == {(0, 0), (1, 0)}
    assert lineages[2, 0] == {(0, 0), (1, 1), (2, 0), (3, 1)}
    assert lineages[3, 0] == {(0, 2), (1, 2), (2, 2), (3, 0)}


@st.composite
def genealogies(draw: Callable[[Any], Any]) -> tuple[int, list[list[int]]]:
    size = draw(st.integers(1, 7))
    row = st.lists(st.integers(0, size - 1), min_size=size, max_size=size)
    return size, draw(st.lists(row, max_size=6))


def walked(size: int, parents: list[list[int]], key: tuple[int, int]) -> set[tuple[int, int]]:
    """Lineage of a dot, by testing every other dot as ancestor or descendant."""

    def is_ancestor(older: tuple[int, int], younger: tuple[int, int]) -> bool:
        column, slot = younger
        while column > older[0]:
            column, slot = column - 1, parents[column - 1][slot]
        return (column, slot) == older

    every = [(column, slot) for column in range(len(parents) + 1) for slot in range(size)]
    return {other for other in every if is_ancestor(other, key) or is_ancestor(key, other)}


@given(genealogies())
def test_lineages_equal_a_walk_through_every_pair(genealogy: tuple[int, list[list[int]]]) -> None:
    size, parents = genealogy
    lineages = full_lineages(ancestor_paths(parents, size))
    assert len(lineages) == size * (len(parents) + 1)
    for key, line in lineages.items():
        assert len(line) == len(set(line)) and set(line) == walked(size, parents, key)


def test_dots_name_their_lineage_and_thick_lines_lead_to_finished_images(tmp_path: Path) -> None:
    tree = by_class(parsed(run_view(three_evaluations(), result_of(tmp_path))), "steer-tree")[0]
    dots = {dot.attrib["data-key"]: set(dot.attrib["data-path"].split()) for dot in by_class(tree, "steer-dot")}
    assert len(dots) == 12 and dots["2-0"] == {"0-0", "1-1", "2-0", "3-1"} and dots["0-1"] == {"0-1"}
    links = {link.attrib["data-key"]: "steer-alive" in link.attrib["class"] for link in by_class(tree, "steer-link")}
    assert links == {"1-0": False, "1-1": True, "1-2": True} | {
        f"{column}-{slot}": True for column in (2, 3) for slot in range(3)
    }
    assert all(dot.get("role") == "button" and dot.get("tabindex") == "0" for dot in by_class(tree, "steer-dot"))
    assert by_class(tree, "steer-dot")[4].get("aria-label") == "particle 2 at step 5, reward -0.5"


def test_during_a_run_thick_lines_lead_to_the_latest_evaluation() -> None:
    parents = ((0, 0, 2), (1, 1, 1), (2, 2, 2))
    root = parsed(run_view([frame(number, REWARDS[number], parents[number]) for number in range(3)], None))
    links = {link.attrib["data-key"]: "steer-alive" in link.attrib["class"] for link in by_class(root, "steer-link")}
    assert links == {"1-0": False, "1-1": True, "1-2": False, "2-0": True, "2-1": True, "2-2": True}


def test_dots_are_in_columns_of_evaluations_and_rows_of_slots() -> None:
    root = parsed(run_view(three_evaluations(), None))
    spots = {}
    for dot in by_class(root, "steer-dot"):
        spots[dot.attrib["data-key"]] = tuple(map(float, re.findall(r"[\d.]+", dot.attrib["transform"])))
    assert len({x for x, _ in spots.values()}) == len({y for _, y in spots.values()}) == 3
    assert spots["0-2"][0] < spots["1-2"][0] and spots["0-1"][1] < spots["0-2"][1]
    for link in by_class(root, "steer-link"):
        column, slot = map(int, link.attrib["data-key"].split("-"))
        ends = [float(number) for number in re.findall(r"[\d.]+", link.attrib["d"])]
        assert tuple(ends[:2]) == spots[f"{column - 1}-{PARENTS[column - 1][slot]}"]
        assert tuple(ends[-2:]) == spots[f"{column}-{slot}"]


def test_colours_span_the_rewards_of_the_whole_run() -> None:
    root = parsed(run_view(three_evaluations(), None))
    marks = {dot.attrib["data-key"]: by_class(dot, "steer-mark")[0].get("fill") for dot in by_class(root, "steer-dot")}
    assert marks["1-1"] == "#440154" and marks["2-1"] == "#fde725", "both ends of viridis"
    assert "reward -0.5" in words(root) and "0.75" in words(by_class(root, "steer-shades")[0])


# images


def colour(uri: str) -> tuple[tuple[int, int], tuple[int, int, int]]:
    image = Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/jpeg;base64,"))))
    return image.size, image.resize((1, 1)).getpixel((0, 0))  # type: ignore[return-value]


def test_the_latest_evaluation_is_shown_and_the_others_are_in_the_page() -> None:
    root = parsed(run_view(three_evaluations(), None))
    frames = by_class(root, "steer-frame")
    assert [each.get("data-label") for each in frames] == ["step 1 of 20", "step 5 of 20", "step 9 of 20"]
    assert [each.get("hidden") is None for each in frames] == [False, False, True]
    scrubber = by_class(root, "steer-scrubber")[0]
    assert (scrubber.get("max"), scrubber.get("value"), scrubber.get("aria-valuetext")) == ("2", "2", "step 9 of 20")
    alts = [image.get("alt") for image in frames[1].iter("img")]
    assert alts[:2] == ["particle 1 at step 5, reward 0.4", "particle 2 at step 5, reward -0.5"]
    assert alts[2] == "particle 3 at step 5, reward 0.6, the highest"
    for number, each in enumerate(frames):
        for slot, image in enumerate(each.iter("img")):
            _, pixel = colour(image.attrib["src"])
            assert all(abs(a - b) < 5 for a, b in zip(pixel, (10 * slot, 20 * number, 0), strict=True))


def test_finished_images_are_in_the_slots_of_their_particles(tmp_path: Path) -> None:
    root = parsed(run_view(three_evaluations(), result_of(tmp_path)))
    frames = by_class(root, "steer-frame")
    last = frames[-1]
    assert len(frames) == 4 and last.get("data-label") == "finished" and last.get("hidden") is None
    for slot, image in enumerate(last.iter("img")):
        size, pixel = colour(image.attrib["src"])
        assert size == (256, 128)
        assert all(abs(a - b) < 5 for a, b in zip(pixel, ImageColor.getrgb(COLOURS[slot]), strict=True))
        assert image.attrib["alt"].startswith(f"particle {slot + 1} finished, reward {FINISHED[slot]}")
    assert [cell.get("data-key") for cell in by_class(root, "steer-best")][-1] == "3-0"


def test_each_run_has_its_own_mark(tmp_path: Path) -> None:
    def mark(*arguments: Any) -> str:
        return parsed(run_view(*arguments)).attrib["data-run"]

    frames = three_evaluations()
    assert mark(frames[:1], None) == mark(frames, None) == mark(frames, result_of(tmp_path)) != mark(frames[1:], None)


# curves and numbers


def test_the_table_has_the_values_of_the_frames(tmp_path: Path) -> None:
    root = by_class(parsed(run_view(three_evaluations(), result_of(tmp_path))), "steer-table")[0]
    head, *rows = rows_of(root)
    assert head == [
        "step",
        "lowest reward",
        "mean",
        "highest",
        "ESS",
        "first particles alive",
        "ancestors of the next",
    ]
    assert [row[0] for row in rows] == ["step 1", "step 5", "step 9", "finished"]
    for row, rewards in zip(rows, (*REWARDS, FINISHED), strict=True):
        assert [float(cell) for cell in row[1:4]] == pytest.approx(
            [min(rewards), statistics.fmean(rewards), max(rewards)], abs=5e-4
        )
    assert [row[4] for row in rows] == ["1.5", "1.5", "1.5", "–"]
    assert [row[5] for row in rows] == ["3", "2", "2", "2"], "2 of 3 from step 5 on: particle 2 had no descendant"
    assert [row[6] for row in rows] == ["1, 1, 3", "2, 2, 3", "3, 1, 2", "–"]
    assert root.find("caption") is not None and all(th.get("scope") in ("row", "col") for th in root.iter("th"))


def test_curves_show_rewards_ess_and_surviving_particles(tmp_path: Path) -> None:
    root = parsed(run_view(three_evaluations(), result_of(tmp_path)))
    rewards, ess, living = by_class(root, "steer-chart")
    assert [title.text for title in rewards.iter("title")][1:] == [
        "mean, 1: 0.2", "mean, 5: 0.167", "mean, 9: 0.5", "mean, 20: 0.8"
    ]  # fmt: skip
    assert len(bands(rewards)) == 1 and not bands(ess) and len(marks(ess)) == 3
    assert [title.text for title in living.iter("title")][1:] == [
        "living, 1: 3", "living, 5: 2", "living, 9: 2", "living, 20: 2"
    ]  # fmt: skip


def bands(root: ElementTree.Element) -> list[ElementTree.Element]:
    return [each for each in root.iter() if "fill-opacity" in each.get("style", "")]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=12), st.integers(-1000, 1000))
@limits(max_examples=30, deadline=None)  # plotting takes longer on a busy machine
def test_points_of_a_chart_keep_their_order_and_stay_inside(values: list[float], start: int) -> None:
    points = [(start + number, value) for number, value in enumerate(values)]
    root = parsed(line_chart("a", "b", points, (start, start + len(points) - 1)))
    svg = next(root.iter("svg"))
    width, height = map(float, svg.attrib["viewBox"].split()[2:])
    spots = [(float(dot.attrib["x"]), float(dot.attrib["y"])) for dot in marks(svg)]
    assert len(spots) == len(points)
    assert all(0 <= x <= width and 0 <= y <= height for x, y in spots)
    assert all(a <= b for (a, _), (b, _) in pairwise(spots))
    by_value = [y for _, (_, y) in sorted(zip(values, spots, strict=True), key=lambda pair: pair[0])]
    assert all(above >= below for above, below in pairwise(by_value)), "more is higher up"


@pytest.mark.parametrize("values", [(0.5, 0.5), (0.0, 0.0), (1e-7, 2e-7), (123456.0, 123457.0), (-1.0, 1e9)])
def test_tick_labels_are_distinct_and_in_order(values: tuple[float, float]) -> None:
    svg = next(parsed(line_chart("a", "b", [*enumerate(values)], (0, 1))).iter("svg"))
    texts = [text.text or "" for text in svg.iter("text") if "text-anchor: end" in text.get("style", "")]
    labels = [float(text.replace("−", "-")) for text in texts]
    assert len(labels) >= 2 and labels == sorted(set(labels))


def test_values_that_are_not_finite_leave_a_gap() -> None:
    points = [(1, 1.0), (2, 2.0), (3, math.nan), (4, 3.0), (5, math.inf), (6, 1.0)]
    root = parsed(line_chart("a", "b", points, (1, 6)))
    (line,) = [path for path in root.iter("path") if "fill: none; stroke: var(--steer-hue-1)" in path.get("style", "")]
    assert line.attrib["d"].count("L") == 1, "one line of two points"
    assert len(marks(root)) == 4
    assert line_chart("a", "b", [(1, math.nan)], (1, 6)) == ""


def test_a_chart_states_first_and_last_value_of_each_line() -> None:
    def panel(axes: Any) -> None:
        axes.plot([0, 1, 4], [1.0, 3.0, 2.5], label="train")
        axes.plot([2], [0.125], label="held out")
        axes.legend()
        set_title(axes, "a & b")
        mark_integers(axes, "step")

    root = parsed(chart(panel))
    assert "".join(root[0].itertext()) == "a & b" == next(root.iter("title")).text
    assert next(root.iter("desc")).text == "train: 1 at 0, 2.5 at 4. held out: 0.125 at 2"
    assert {"train", "held out", "step"} <= {text.text for text in root.iter("text")}


def test_a_chart_takes_the_colours_of_the_page_and_ids_are_unique() -> None:
    first, second = (parsed(line_chart("a", "b", [(0, 1.0), (1, 2.0)], (0, 1))) for _ in range(2))
    assert not re.search("#[0-9a-f]{6}", ElementTree.tostring(first, encoding="unicode"))
    names, others = ({each.get("id") for each in root.iter()} - {None} for root in (first, second))
    assert names and not names & others, "two charts may share a page"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.12345, "0.123"), (1234.5, "1234"), (123.4, "123"), (2e7, "2e+07"), (0.0, "0"), (-0.5, "-0.5")]
    + [(value, "–") for value in (None, math.nan, math.inf, -math.inf)],
)
def test_numbers_are_short(value: float | None, text: str) -> None:
    assert short(value) == text


# edge cases


def test_untrusted_text_is_escaped(tmp_path: Path) -> None:
    curve = line_chart(EVIL, EVIL, [(0, 1.0, 0.5, 1.5)], (0, 0))
    rows = table(EVIL, [EVIL, "b"], [[EVIL, EVIL], ["x", None]])
    for html in (curve, rows):
        root = parsed(html)
        assert not [*root.iter("script")] and not [*root.iter("img")] and EVIL in words(root)
    assert "script" not in run_view(three_evaluations(), result_of(tmp_path)) and "alert" not in run_view(
        (), result_of(tmp_path)
    )


def test_before_the_first_evaluation_there_is_a_hint() -> None:
    root = parsed(run_view((), None))
    assert "".join(root.itertext()) == EMPTY_TEXT and len([*root.iter()]) == 2


def test_one_particle_has_no_ancestry(tmp_path: Path) -> None:
    root = parsed(run_view([frame(0, (0.1,), (0,), 1.0), frame(1, (0.2,), (0,), 1.0)], result_of(tmp_path, (0.3,))))
    assert not by_class(root, "steer-tree") and not by_class(root, "steer-band") and not by_class(root, "steer-best")
    assert len(by_class(root, "steer-frame")) == 3 and len(by_class(root, "steer-chart")) == 1
    assert rows_of(root)[1] == ["step 1", "0.1", "0.1", "0.1"]


def test_a_run_without_resampling_has_no_ancestry(tmp_path: Path) -> None:
    root = parsed(run_view([frame(number, REWARDS[number], None, None) for number in range(3)], result_of(tmp_path)))
    assert not by_class(root, "steer-tree") and rows_of(root)[0] == ["step", "lowest reward", "mean", "highest"]
    assert len(by_class(root, "steer-chart")) == 1


def test_finished_images_without_evaluations_are_shown(tmp_path: Path) -> None:
    root = parsed(run_view((), result_of(tmp_path)))
    assert len(by_class(root, "steer-cell")) == 3 and not by_class(root, "steer-tree")
    assert by_class(root, "steer-scrubber")[0].get("max") == "0"


def test_a_run_stopped_after_one_evaluation_is_shown() -> None:
    root = parsed(run_view(three_evaluations()[:1], None))
    assert len(by_class(root, "steer-dot")) == 3 and not by_class(root, "steer-link")
    assert [each.get("aria-disabled") for each in root.iter("button")] == ["true", "true"]
    assert len(by_class(root, "steer-chart")) == 3


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rewards_that_are_not_finite_are_not_shown(value: float, tmp_path: Path) -> None:
    frames = [frame(0, (value, 0.5, 0.25), PARENTS[0], math.nan), frame(1, (value,) * 3, PARENTS[1], None)]
    root = parsed(run_view(frames, result_of(tmp_path, (0.1, value, 0.3))))
    assert not re.search(r"\b(nan|inf|infinity|none)\b", words(root).replace(" none ", " "), re.IGNORECASE)
    assert rows_of(root)[1][1:5] == ["0.25", "0.375", "0.5", "–"] and rows_of(root)[2][1:4] == ["–"] * 3
    marks = [mark.get("fill") for mark in by_class(root, "steer-mark")]
    assert marks[0] == "none" and "none" not in marks[1:3], "a dot without a colour"
    assert parsed(run_view(frames[1:], None)) is not None


def test_thirty_two_particles_at_twelve_evaluations_fit_the_tree() -> None:
    parents = [(7 * slot + number) % 32 for number in range(12) for slot in range(32)]
    frames = [
        frame(
            number, [math.sin(slot + number) for slot in range(32)], parents[32 * number : 32 * number + 32], total=50
        )
        for number in range(12)
    ]
    root = parsed(run_view(frames, None))
    tree, dots = by_class(root, "steer-tree")[0], by_class(root, "steer-dot")
    assert len(dots) == 12 * 32 and len(by_class(root, "steer-cell")) == 12 * 32
    for dot in dots:
        x, y = map(float, re.findall(r"[\d.]+", dot.attrib["transform"]))
        assert 0 < x < float(tree.attrib["width"]) and 0 < y < float(tree.attrib["height"])


# in a browser

PAGE = """value => {
    const element = document.querySelector('#view');
    element.innerHTML = value;
    const watchers = [];
    Function('element', 'trigger', 'watch', SCRIPT)(element, () => {}, (_, callback) => watchers.push(callback));
    window.update = next => { element.innerHTML = next; watchers.forEach(callback => callback()); };
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    with playwright.sync_playwright() as running:
        made = running.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page with the script on an empty view; update(html) is what Gradio does with a new value."""
    made, errors = browser.new_page(viewport={"width": 360, "height": 800}), []
    made.on("pageerror", lambda error: errors.append(str(error)))
    made.set_content(f"<style>{(FOLDER / 'style.css').read_text()}</style><div id=view></div>")
    made.evaluate(PAGE.replace("SCRIPT", json.dumps((FOLDER / "run_view.js").read_text())), run_view((), None))
    yield made
    made.close()
    assert not errors


def shown_step(page: Any) -> str:
    shown = page.locator(".steer-frame:visible")
    assert shown.count() == 1 and shown.get_attribute("data-label") == page.locator(".steer-reading").inner_text()
    return str(page.locator(".steer-reading").inner_text())


def lit(page: Any, kind: str) -> set[str]:
    return set(page.eval_on_selector_all(f".{kind}.steer-lit", "all => all.map(each => each.dataset.key)"))


@pytest.mark.browser
def test_the_scrubber_stays_at_a_chosen_step_and_otherwise_follows_the_latest(page: Any, tmp_path: Path) -> None:
    frames = three_evaluations()
    for count in (1, 2):
        page.evaluate("update", run_view(frames[:count], None))
        assert shown_step(page) == f"step {4 * count - 3} of 20"
    page.locator(".steer-scrubber").press("ArrowLeft")
    page.locator("summary").click()
    page.evaluate("update", run_view(frames, None))
    assert shown_step(page) == "step 1 of 20" and page.locator(".steer-table").is_visible()
    for _ in range(2):
        page.get_by_label("Later").click()
    assert shown_step(page) == "step 9 of 20"
    page.evaluate("update", run_view(frames, result_of(tmp_path)))
    assert shown_step(page) == "finished"
    for _ in range(3):
        page.get_by_label("Earlier").click()
    assert shown_step(page) == "step 1 of 20"
    page.evaluate("update", run_view(frames[1:], None))
    assert shown_step(page) == "step 9 of 20", "a new run is followed again"


@pytest.mark.browser
def test_a_click_or_a_key_toggles_the_highlight_of_a_lineage(page: Any, tmp_path: Path) -> None:
    page.evaluate("update", run_view(three_evaluations(), None))
    page.locator('.steer-dot[data-key="2-0"]').click()
    assert lit(page, "steer-dot") == lit(page, "steer-cell") == {"0-0", "1-1", "2-0"}
    assert lit(page, "steer-link") == {"1-1", "2-0"}
    page.evaluate("update", run_view(three_evaluations(), result_of(tmp_path)))
    assert lit(page, "steer-link") == {"1-1", "2-0", "3-1"}, "still lit, and grown"
    page.locator('.steer-dot[data-key="2-0"]').click()
    assert not lit(page, "steer-dot") and not page.locator("[aria-pressed=true]").count()
    page.locator('.steer-dot[data-key="0-1"]').focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowUp")
    for on, off in (("Enter", "Enter"), ("Space", "Escape")):
        page.keyboard.press(on)
        assert lit(page, "steer-dot") == {"0-0", "1-0"}
        page.keyboard.press(off)
        assert not lit(page, "steer-dot")
    assert page.locator('.steer-dot[tabindex="0"]').count() == 1, "one stop of Tab"


@pytest.mark.browser
def test_on_a_phone_only_the_tree_scrolls_sideways(page: Any, tmp_path: Path) -> None:
    page.evaluate("update", run_view(three_evaluations(), result_of(tmp_path)))
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    wide = "all => all.filter(each => each.scrollWidth > each.clientWidth + 1).map(each => each.className)"
    assert page.eval_on_selector_all("#view div, #view figure", wide) == ["steer-scroll"] * 2, "and the table's box"
