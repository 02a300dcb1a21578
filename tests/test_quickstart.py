"""docs/quickstart.ipynb runs from top to bottom and shows the gain that it prints; so do its stored outputs."""

import re
from pathlib import Path
from statistics import fmean

import nbformat
import pytest
from nbclient import NotebookClient
from pairwise import hard_but

NOTEBOOK = Path(__file__).parents[1] / "docs" / "quickstart.ipynb"
GAIN = re.compile(r"(.+?) +scene-soft ([\d.]+) → ([\d.]+) +scene ([\d.]+) → ([\d.]+)")


@pytest.fixture(scope="module")
def stored() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def ran() -> nbformat.NotebookNode:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    return NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()


def lines_of(notebook: nbformat.NotebookNode) -> list[str]:
    """The printed lines."""
    outputs = [
        output for cell in notebook.cells for output in cell.get("outputs", ()) if output.get("name") == "stdout"
    ]
    return [line for output in outputs for line in output.text.splitlines()]


def gains(notebook: nbformat.NotebookNode) -> dict[str, list[float]]:
    """By prompt: `scene-soft` before and after, `scene` before and after."""
    matches = filter(None, map(GAIN.fullmatch, lines_of(notebook)))
    return {match[1]: [float(number) for number in match.groups()[1:]] for match in matches}


@pytest.mark.parametrize("which", hard_but(["stored", "ran"], "stored"))
def test_it_shows_three_rows_of_images_and_a_gain(which: str, request: pytest.FixtureRequest) -> None:
    notebook = request.getfixturevalue(which)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    lines = lines_of(notebook)
    assert [line.split()[1] for line in lines if line.startswith("step")] == ["9", "12", "15", "18"]
    columns = [*zip(*gains(notebook).values(), strict=True)]
    assert len(columns[0]) == 3
    soft, soft_steered, scene, scene_steered = map(fmean, columns)
    assert soft_steered > soft + 0.1, "by the reward that steered"
    assert scene_steered > scene + 0.1, "by the one that did not"
    before, after = (float(one) for one in re.findall(r"-?\d+\.\d+", lines[-1]))
    assert lines[-1].startswith("redness") and after > before + 0.01


@pytest.mark.hard
def test_the_stored_outputs_are_of_the_present_models(
    stored: nbformat.NotebookNode, ran: nbformat.NotebookNode
) -> None:
    """By the images without steering, which are the same up to rounding on every machine."""
    for prompt, values in gains(ran).items():
        assert gains(stored)[prompt][0::2] == pytest.approx(values[0::2], abs=0.05)


def test_the_stored_outputs_are_of_one_run(stored: nbformat.NotebookNode) -> None:
    cells = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    assert not [output for cell in cells for output in cell.outputs if output.get("name") == "stderr"]
