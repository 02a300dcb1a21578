"""Every pipeline of the zoo against the outcomes recorded in zoo/matrix.json: popular ones here, all with `hard`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROMPT, sd
from diffusers import StableDiffusionPipeline
from zoo.build import CASES, build, call_of
from zoo.matrix import parts
from zoo.page import PAGE, page, table
from zoo.popular import POPULAR

from steer.diffusion import lookahead
from steer.diffusion.batching import ActiveRows
from steer.diffusion.lookahead import LookAhead
from steer.pipelines.compatibility import CHECKS, PipelineCheck

RECORDED = json.loads((Path(__file__).parent / "zoo" / "matrix.json").read_text())
QUICK = ("steps", "swap", "fk", "preview")  # of the popular ones in `make test`
SEARCH = ("lookahead", "race")


def states(name: str, checks: tuple[str, ...]) -> dict[str, str]:
    row = PipelineCheck(build(name), call_of(name)).row(checks)
    return {check: f"{outcome.state} {outcome.reason}".strip() for check, outcome in row.items()}


def recorded(name: str, checks: tuple[str, ...]) -> dict[str, str]:
    row = RECORDED[name]
    return {check: f"{row[check]['state']} {row[check]['reason']}".strip() for check in checks if check in row}


@pytest.mark.few(4)
@pytest.mark.parametrize("name", [name for name in POPULAR if name in RECORDED])
def test_popular_pipelines_are_steered_exactly(name: str) -> None:
    checks = tuple(check for check in QUICK if check in RECORDED[name])
    assert states(name, checks) == recorded(name, checks)


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["Flux", "HunyuanVideo", "ZImage"])
def test_pipelines_look_ahead_and_race(name: str) -> None:
    assert states(name, SEARCH) == dict.fromkeys(SEARCH, "ok")


def test_a_second_modality_has_no_look_ahead() -> None:
    refused = "refused LTX2Pipeline denoises a second modality beside the latents: use lookahead=1"
    assert states("LTX2", SEARCH) == dict.fromkeys(SEARCH, refused)


def test_a_wrong_look_ahead_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps to another level than that of the solver predict other images, in as many evaluations."""
    right = lookahead.gaussian_transition
    monkeypatch.setattr(lookahead, "gaussian_transition", lambda x, x0, t, s, eta: right(x, 0.5 * x0, t, s, eta))
    assert states("Flux", SEARCH)["lookahead"].startswith("differs the look-ahead over all steps that are left")


def test_a_wrong_winner_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The denoiser evaluates the dropped rows in place of the active ones."""
    right = ActiveRows._active_rows_in
    monkeypatch.setattr(ActiveRows, "_active_rows_in", lambda self, batch: right(self, batch) + 1)
    assert states("ZImage", SEARCH)["race"].startswith("differs the winner of a race")


def test_evaluations_that_are_not_counted_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LookAhead, "evaluations", property(lambda self: 0, lambda self, value: None), raising=False)
    outcomes = states("Flux", SEARCH)
    assert outcomes["lookahead"] == "differs 8 denoiser evaluations are counted, not 12"
    assert outcomes["race"] == "differs 6 denoiser evaluations are counted, not 8"


def test_the_page_shows_checks_that_are_not_recorded() -> None:
    rows = {"A": {"race": {"state": "ok", "reason": ""}}, "B": {}}
    shown = table(rows)
    assert "race: 1 of 1 (1 not recorded)" in shown and "look-ahead: 0 of 0 (2 not recorded)" in shown
    header, a, b = (shown.splitlines()[line].split("|") for line in (2, 4, 5))
    assert a[header.index(" race ")] == " ✓ " and b[header.index(" race ")].strip() == ""


def test_missing_checks_are_the_ones_without_an_outcome() -> None:
    rows = {"A": {"fk": {}, "race": {}}, "B": {"fk": {}}}
    assert list(parts(rows, "ABC", ("fk", "race"), True)) == [("B", ["race"]), ("C", ["fk", "race"])]
    assert list(parts(rows, "A", ("fk", "race"), False)) == [("A", ["fk", "race"])]


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["Flux2Klein", "ZImageInpaint"])
def test_a_search_starts_from_every_draw_of_the_plain_call(name: str) -> None:
    """Flux 2 packs its noise; the inpainted region of Z-Image follows the noise that its image starts from."""
    assert states(name, ("reno",)) == {"reno": "ok"}


@pytest.mark.parametrize("name", ["StableCascadeCombined"])
def test_combined_pipelines_are_steered_in_the_stage_that_makes_the_images(name: str) -> None:
    assert states(name, ("preview", "fk")) == {"preview": "ok", "fk": "ok"}


def test_a_pipeline_that_runs_its_solver_twice_names_its_stages() -> None:
    state = states("VisualCloze", ("fk",))["fk"]
    assert state.endswith("steer one of its stages by itself: pipe.generation_pipe or pipe.upsampling_pipe")


@pytest.mark.hard
@pytest.mark.parametrize("name", RECORDED)
def test_every_pipeline_has_its_recorded_outcomes(name: str) -> None:
    checks = tuple(check for check in CHECKS if check in RECORDED[name])
    assert states(name, checks) == recorded(name, checks)


def test_a_pipeline_of_ones_own_is_checked(
    steer: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_pipeline.py").write_text("from conftest import sd as make\n")
    monkeypatch.chdir(tmp_path)
    call = json.dumps({"height": 8, "width": 8})
    code, out, err = steer("check-pipeline", "own_pipeline:make", "--call", call, "--json", tmp_path / "row.json")
    assert code == 0, out + err
    assert {line.split()[0]: line.split()[1] for line in out.splitlines()} == dict.fromkeys(CHECKS, "ok")
    assert json.loads((tmp_path / "row.json").read_text())["pipeline"] == "StableDiffusionPipeline"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("no_module:pipe", "no_module:pipe cannot be imported"),
        ("json:loads", "json:loads must make a pipeline without arguments"),
        ("json:decoder", "json:decoder is a module without a scheduler"),
    ],
)
def test_what_is_no_pipeline_is_named(steer: Callable[..., tuple[int, str, str]], model: str, message: str) -> None:
    code, _, err = steer("check-pipeline", model)
    assert code == 2 and message in err


def test_a_wrong_result_is_reported() -> None:
    """A pipeline whose images depend on how often it was called differs from its own plain call."""

    class Drifting(StableDiffusionPipeline):
        calls = 0

        @torch.no_grad()
        def __call__(self, prompt: str, num_inference_steps: int = 4, generator: Any = None) -> Any:
            type(self).calls += 1
            out = super().__call__(prompt, 8, 8, num_inference_steps, generator=generator, output_type="pt")
            return (out.images + 0.01 * type(self).calls,)

    pipe = sd()
    pipe.set_progress_bar_config(disable=True)
    pipe.__class__ = Drifting
    outcome = PipelineCheck(pipe, {"prompt": PROMPT, "num_inference_steps": 2}).row(["steps"])["steps"]
    assert outcome.state == "differs" and outcome.reason == "a watched run differs by 0.01"


def test_the_page_shows_the_recorded_matrix() -> None:
    text = PAGE.read_text()
    assert page(text, RECORDED) == text


def test_the_zoo_is_recorded_without_tracebacks() -> None:
    assert set(RECORDED) <= set(CASES)
    wrong = {
        f"{name} {check}: {outcome['reason']}"
        for name, row in RECORDED.items()
        for check, outcome in row.items()
        if outcome["state"] == "traceback"
    }
    assert not wrong
