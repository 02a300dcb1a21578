"""`steer demo`: what is refused before anything listens."""

import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("gradio")

from click.testing import CliRunner

from steer.apps.cli.demo import demo
from steer.apps.demo.app import check_address
from steer.apps.demo.studio import Studio
from steer.errors import InputError


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is, before each test and after it: the command sets variables for the libraries that it imports."""
    for name in ("HF_HUB_OFFLINE", "GRADIO_ANALYTICS_ENABLED"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("words", "offline"), [([], "1"), (["--reward", "pickscore"], None), (["--model", "some/model"], None)]
)
def test_the_hub_is_asked_only_where_the_owner_names_what_it_has(words: list[str], offline: str | None) -> None:
    CliRunner().invoke(demo, ["--host", "0.0.0.0", *words])  # refused, but only once the environment is set
    assert os.environ.get("HF_HUB_OFFLINE") == offline and os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.7", "::", "example.org"])
def test_nobody_else_is_let_in_without_a_password(host: str) -> None:
    with pytest.raises(InputError, match=f"--host {host} lets others in: give --auth USER:PASSWORD"):
        check_address(host, False, None)
    check_address(host, False, ("user", "password"))


def test_a_public_address_needs_a_password() -> None:
    with pytest.raises(InputError, match="--share lets others in"):
        check_address("127.0.0.1", True, None)
    check_address("127.0.0.1", True, ("user", "password"))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_this_machine_needs_none(host: str) -> None:
    check_address(host, False, None)


@pytest.mark.parametrize("auth", ["user", "user:", ":password", ""])
def test_half_a_password_is_refused(auth: str) -> None:
    result = CliRunner().invoke(demo, ["--auth", auth])
    assert isinstance(result.exception, InputError) and "must be USER:PASSWORD" in str(result.exception)


def test_the_start_names_each_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*given: object) -> None:
        raise InputError("not free")

    monkeypatch.setattr("steer.apps.demo.app.launch", refused)
    printed = CliRunner().invoke(demo, []).output.splitlines()
    assert printed[0] == "steer demo: loading PyTorch, diffusers and gradio …"
    assert re.match("steer demo: building the page for scenes.* …", printed[1])


def test_a_variant_is_for_models_that_are_not_embedded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    loaded: dict[str, Any] = {}

    def load(name: str, *given: Any, variant: str | None) -> Any:
        loaded[name] = variant
        return SimpleNamespace(set_progress_bar_config=lambda disable: None)

    def launch(studio: Studio, *given: object) -> None:
        for name in ("mine", "scenes"):
            with studio.model(name):
                pass
        raise InputError("enough")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("steer.apps.demo.studio.load_pipeline", load)
    monkeypatch.setattr("steer.apps.demo.app.launch", launch)
    CliRunner().invoke(demo, ["--model", "mine", "--variant", "fp16"])
    assert loaded == {"mine": "fp16", "scenes": None}


def test_the_command_refuses_before_it_loads_anything() -> None:
    result = CliRunner().invoke(demo, ["--host", "0.0.0.0"])
    assert isinstance(result.exception, InputError) and "--host 0.0.0.0 lets others in" in str(result.exception)
