"""docs/quickstart.ipynb runs from top to bottom, and what it says it shows is there."""

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

NOTEBOOK = Path(__file__).parents[1] / "docs" / "quickstart.ipynb"


STEPS = ["9", "12", "15", "18"]  # at which its steered run compares the particles


def test_every_cell_runs_and_three_rows_of_images_are_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process: a kernel takes seconds to start, and has the test below."""
    shown: list[Any] = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, cell.id, "exec"), names)
    assert len(shown) == 3 and all(isinstance(one, Image.Image) for one in shown)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("step")] == STEPS


@pytest.mark.hard
def test_a_kernel_runs_it_and_has_the_images_as_png() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    ran = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    outputs = [output for cell in ran.cells for output in cell.get("outputs", ())]
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    lines = [line for output in outputs for line in output.get("text", "").splitlines()]
    assert [line.split()[1] for line in lines if line.startswith("step")] == STEPS


def test_it_is_kept_without_outputs() -> None:
    kept = nbformat.read(NOTEBOOK, as_version=4)
    assert not [cell for cell in kept.cells if cell.get("outputs") or cell.get("execution_count")]
