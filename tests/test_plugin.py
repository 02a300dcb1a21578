"""A reward in a package of its own: built, installed and used as a stranger would."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import preloaded
import pytest

ROOT = Path(__file__).resolve().parent.parent
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs Python where `tests/plugin` is installed; it is built from a copy, so that the checkout stays as it is."""
    assert find_spec("setuptools"), "the example plugin is built with setuptools: pip install -e '.[dev]'"
    source, target = tmp_path_factory.mktemp("plugin") / "source", tmp_path_factory.mktemp("installed")
    shutil.copytree(ROOT / "tests" / "plugin", source, ignore=shutil.ignore_patterns("__pycache__"))
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    pip = [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(source)]
    made = subprocess.run(pip, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout + made.stderr

    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(target), str(ROOT)])}
        return preloaded.run(arguments, Path.cwd(), environment)

    return run


def test_it_is_listed(installed: Run) -> None:
    listed = installed("-m", "steer.apps.cli.main", "rewards")
    assert listed.returncode == 0, listed.stderr
    lines = [line.split(maxsplit=1) for line in listed.stdout.splitlines()]
    assert ["warmth", "warmth:Warmth (plugin)"] in lines
    assert "jpeg" in {line[0] for line in lines}


CODE = """
import sys

import torch
from steer.reward import score, score_components
from steer.rewards.names import takes_number
from steer.rewards.parser import load_reward

images = torch.tensor([0.7, 0.4, 0.2]).view(1, 3, 1, 1).expand(2, 3, 8, 8).clone().requires_grad_()
total, components = score_components(load_reward("warmth + jpeg:0.1"), images, ["", ""])
assert list(components) == ["warmth", "jpeg"]
assert torch.allclose(components["warmth"], torch.full((2,), 0.5))
assert torch.allclose(total, components["warmth"] + 0.1 * components["jpeg"])

assert takes_number("warmth")
near = load_reward("warmth:0.2:10 + brightness:0")
assert near.name == "warmth:0.2:10 + brightness:0" and near.differentiable
score(near, images, ["", ""]).sum().backward()
assert images.grad.abs().sum() > 0
assert abs(score(load_reward("warmth:0.2"), images, ["", ""])[0].item() + 0.3) < 1e-6

for wrong, message in [
    ("warmth:much", "reward 'warmth' cannot be made: ValueError"),
    ("warmth:a=1", "reward 'warmth' cannot take 'a=1'"),
    ("warmt", "did you mean warmth"),
]:
    try:
        load_reward(wrong)
    except ValueError as error:
        assert message in str(error), error
    else:
        raise AssertionError(wrong)

sys.modules["warmth"] = None  # as if its file were gone
try:
    load_reward("warmth")
except ValueError as error:
    assert str(error).startswith("cannot load reward 'warmth:Warmth': ModuleNotFoundError"), error
    print("done")
"""


def test_it_is_a_reward_like_any_other(installed: Run) -> None:
    used = installed("-c", CODE)
    assert (used.returncode, used.stdout) == (0, "done\n"), used.stderr
    assert {path.name for path in (ROOT / "tests" / "plugin").iterdir()} <= {
        "pyproject.toml",
        "warmth.py",
        "__pycache__",
    }
