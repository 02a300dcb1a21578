"""Fixtures of all tests, and the hooks of a session; `conftest.NAME` is also each name of `families`.

xdist's controller reads this file and runs no test: what imports torch is imported where it is used.
"""

import gc
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import settings
from pairwise import harden

settings.register_profile("same every time", derandomize=True)
settings.load_profile("same every time")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    harden(items)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Freeze all that the imports made: a later `gc.collect()` need not walk it, nor a fork copy it."""
    gc.collect()
    gc.freeze()
    if "preloaded" in sys.modules and not session.config.option.collectonly:
        sys.modules["preloaded"].fork_parent()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # extensions report what nobody frees as leaked


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(importlib.import_module("families"), name)


@pytest.fixture(autouse=True, scope="module")
def no_gradients_of_other_files() -> Iterator[None]:
    """Clear gradients after each module: pytest-xdist may run any other module next in the same process."""
    yield
    if (families := sys.modules.get("families")) is not None:
        families.forget_gradients()


@pytest.fixture(autouse=True, scope="session")
def no_waiting_for_the_disk() -> Iterator[None]:
    """Files are not brought to the disk here: tests of power cuts count these calls, and a wrong file is an error."""
    with mock.patch("os.fsync", os.fstat):
        yield


@pytest.fixture(scope="session")
def pipe_of() -> Callable[[str], Any]:
    """The tiny pipeline of a family, built once: do not change it, take `with_scheduler` or a copy."""
    from families import cached_pipe

    return cached_pipe


Steer = Callable[..., tuple[int, str, str]]

REWARD = """
from pathlib import Path
import torch

def fails_on_stars(images, prompts):
    if "star" in prompts[0] and not Path(__file__).with_name("fixed").exists():
        raise RuntimeError("stars are too bright")
    return images.mean((1, 2, 3))

def not_a_number(images, prompts):
    return torch.full((len(images),), float("nan"))

def wrong_shape(images, prompts):
    return torch.zeros(len(images) + 1)
"""


@pytest.fixture
def steer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Steer:
    """Runs the command in this process: (exit code, stdout, stderr)."""
    from steer.apps.cli import main as cli

    (tmp_path / "own_rewards.py").write_text(REWARD)
    (tmp_path / "broken_module.py").write_text("def x(:\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_rewards", raising=False)

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["steer", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


def replaced(words: Sequence[object], *changes: object) -> list[object]:
    """The words of a command with others of its options: those with one value take the place of the earlier ones."""
    from steer.apps.cli import main as cli
    from steer.apps.cli.options import is_single_valued

    command = cli.steer.commands[str(words[0])]
    single = {name: option for option in command.params if is_single_valued(option) for name in option.opts}
    new = {single[str(word)] for word in changes if str(word) in single}
    kept: list[object] = []
    waiting = iter(words)
    for word in waiting:
        option = single.get(str(word))
        if option not in new or option is None:
            kept.append(word)
        elif not getattr(option, "is_flag", False):
            next(waiting)
    return [*kept, *changes]


@pytest.fixture(scope="module")
def studio() -> Iterator[Any]:
    """The state that the tabs of the demo share, over two embedded models; closing it deletes its folder."""
    from steer.apps.demo.studio import Studio  # needs gradio

    made = Studio(models=("scenes", "scenes-turbo"))
    yield made
    made.close()
    assert not made.home.exists()


@pytest.fixture
def tab(studio: Any) -> Any:
    """The Steer tab over `studio`."""
    import gradio as gr

    from steer.apps.demo.steer_tab import SteerTab

    with gr.Blocks():
        return SteerTab(studio)
