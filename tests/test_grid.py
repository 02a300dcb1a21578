"""`steer grid`: cells as single runs, axes of any setting, resuming, refusals; completion and the time of --help."""

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from conftest import Steer
from PIL import Image

from steer.apps.cli.main import steer as root
from steer.apps.grids import Axis, plan_cells
from steer.apps.recipes import read_metadata
from steer.errors import InputError

FAST = ["--steps", "3", "--particles", "2", "--seed", "7", "--reward", "jpeg"]


def test_a_cell_is_the_best_image_of_a_run_with_its_settings(steer: Steer, tmp_path: Path) -> None:
    axes = ["--x", "lam=0,40", "--y", "negative-prompt=default|a blue cross, a star"]
    words = ["grid", "a red star", *FAST, *axes, "--out", tmp_path / "g"]
    code, out, err = steer(*words)
    assert code == 0 and "4 images, best" in out, err
    report = json.loads((tmp_path / "g/grid.json").read_text())
    assert [(cell["x"], cell["y"]) for cell in report["cells"]] == [
        *(("0", "default"), ("40", "default"), ("0", "a blue cross, a star"), ("40", "a blue cross, a star"))
    ]
    assert len({(tmp_path / "g" / cell["image"]).read_bytes() for cell in report["cells"]}) == 4
    one = ["sample", "a red star", *FAST, "--lam", "40", "--negative-prompt", "a blue cross, a star", "--no-compare"]
    assert steer(*one, "--out", tmp_path / "o")[0] == 0
    image = tmp_path / "g" / report["cells"][3]["image"]
    assert image.read_bytes() == (tmp_path / "o/000-a-red-star/00.png").read_bytes()
    assert report["cells"][3]["reward"] == read_metadata(image).reward
    assert Image.open(tmp_path / "g/grid.png").width > 2 * 192 + 130
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "g").glob("0*.png")}
    (tmp_path / "g/01-01.png").unlink()
    assert steer(*words)[0] == 0  # resumed: one image is missing
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "g").glob("0*.png")}
    assert [path.name for path in before if before[path] != after[path]] == ["01-01.png"]


def test_prompts_methods_and_arguments_of_the_call_are_axes(tmp_path: Path) -> None:
    x, y = Axis.read("prompt=a red star|a circle"), Axis.read("method=fk,base")
    cells = plan_cells(None, x, y, {"lam": 25.0, "call": {"guidance_rescale": "0.1"}}, tmp_path)
    assert [(cell.prompt, cell.settings.method) for cell in cells] == [
        *(("a red star", "fk"), ("a circle", "fk"), ("a red star", "base"), ("a circle", "base"))
    ]
    assert cells[0].settings.options.lam == 25 and not hasattr(cells[2].settings.options, "lam")
    cells = plan_cells("a", Axis.read("height=64,72"), Axis.read("guidance_rescale=0,0.5"), {"width": 64}, tmp_path)
    assert [cell.settings.height for cell in cells[:2]] == [64, 72]
    assert [json.loads(cell.settings.call) for cell in cells[1:3]] == [
        {"guidance_rescale": "0"},
        {"guidance_rescale": "0.5"},
    ]
    cells = plan_cells("a", Axis.read("seed=1,2,3"), None, {}, tmp_path)
    assert [cell.settings.seed for cell in cells] == [1, 2, 3] and cells[0].path.name == "00-00.png"


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (("lam",), "write NAME=VALUE,VALUE"),
        (("lam=1,1",), "the value '1' is repeated"),
        (("lamm=1,2",), "axis 'lamm' is no setting: did you mean lam"),
        (("compare=true",), "axis 'compare' is no setting"),
        (("steps=1,x",), "axis steps: 'x' is no value of it"),
        (("lam=1", "lam=2"), "both axes vary lam"),
        (("prompt=a|b",), "give the prompt as a word, or as an axis"),
        (("seed=1,2",), "seed is an axis and an option"),
        (("method=fk,fkk",), "unknown method 'fkk'"),
        (("scheduler=ddim,eulr",), "unknown scheduler 'eulr'"),
        (("model=scenes,scenes-text",), "model 'scenes-text' makes texts"),
        ((f"seed={','.join(map(str, range(401)))}",), "at most 400"),
    ],
)
def test_wrong_axes_are_refused(tmp_path: Path, axes: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        x, *y = map(Axis.read, axes)
        given = {"seed": 3} if message.startswith("seed") else {}
        plan_cells("a", x, y[0] if y else None, given, tmp_path)


def completed(words: str) -> list[str]:
    """The completions of the last word, as click computes them for bash."""
    env = {"_STEER_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    script = "import sys; sys.argv = ['steer']; from steer.apps.cli.main import main; main()"
    ran = subprocess.run([sys.executable, "-c", script], env={**os.environ, **env}, capture_output=True, text=True)
    assert not ran.stderr, ran.stderr
    return [line.partition(",")[2] for line in ran.stdout.splitlines()]


@pytest.mark.hard
def test_shells_complete_commands_options_and_names(steer: Steer) -> None:
    assert {"--negative-prompt", "--neighbours"} <= {*completed("steer sample --ne")}
    assert completed("steer sample --method re") == ["renoise", "reno"]
    assert "scene-soft" in completed("steer grid --reward scene")
    assert completed("steer sample --seed 1 --scheduler euler") == ["euler", "euler-a"]
    for shell in ("bash", "zsh", "fish"):
        code, out, _ = steer("completion", shell)
        assert code == 0 and "_STEER_COMPLETE" in out


HEAVY = (
    "torch",
    "diffusers",
    "transformers",
    "gradio",
    "numpy",
    "matplotlib",
    "PIL",
    "huggingface_hub",
    "scipy",
    "yaml",
)


def commands(command: click.Command = root, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    inner = getattr(command, "commands", {})
    return [path, *(one for name, sub in inner.items() for one in commands(sub, (*path, name)))]


def test_no_help_imports_a_heavy_library() -> None:
    """`--help` of any command: imports that take a second would slow down every shell completion."""
    script = (
        "import sys\nfrom steer.apps.cli.main import steer\n"
        f"for path in {commands()!r}:\n"
        "    try: steer([*path, '--help'], standalone_mode=False)\n"
        "    except SystemExit: pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stderr.strip() == "[]"


def test_help_answers_in_a_third_of_a_second_of_the_processor() -> None:
    """The least of five runs, of the processor's time: other programs on the machine cost none."""
    script = "import sys; sys.argv = ['steer', '--help']; from steer.apps.cli.main import main; main()"
    times = []
    for _ in range(5):
        before = os.times()
        subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
        after = os.times()
        times.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(times) < 0.3
