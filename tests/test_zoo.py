"""Every pipeline of the zoo against the outcomes recorded in zoo/matrix.json: popular ones here, all with `hard`."""

import json
from pathlib import Path

import pytest
from zoo.build import CASES, build, call_of
from zoo.popular import POPULAR

from steer.pipelines.compatibility import CHECKS, PipelineCheck

RECORDED = json.loads((Path(__file__).parent / "zoo" / "matrix.json").read_text())
QUICK = ("steps", "swap", "fk", "preview")  # of the popular ones in `make test`


def states(name: str, checks: tuple[str, ...]) -> dict[str, str]:
    row = PipelineCheck(build(name), call_of(name)).row(checks)
    return {check: f"{outcome.state} {outcome.reason}".strip() for check, outcome in row.items()}


def recorded(name: str, checks: tuple[str, ...]) -> dict[str, str]:
    row = RECORDED[name]
    return {check: f"{row[check]['state']} {row[check]['reason']}".strip() for check in checks if check in row}


@pytest.mark.parametrize("name", [name for name in POPULAR if name in RECORDED])
def test_popular_pipelines_are_steered_exactly(name: str) -> None:
    checks = tuple(check for check in QUICK if check in RECORDED[name])
    assert states(name, checks) == recorded(name, checks)


@pytest.mark.hard
@pytest.mark.parametrize("name", RECORDED)
def test_every_pipeline_has_its_recorded_outcomes(name: str) -> None:
    checks = tuple(check for check in CHECKS if check in RECORDED[name])
    assert states(name, checks) == recorded(name, checks)


def test_the_zoo_is_recorded_without_tracebacks() -> None:
    assert set(RECORDED) <= set(CASES)
    wrong = {
        f"{name} {check}: {outcome['reason']}"
        for name, row in RECORDED.items()
        for check, outcome in row.items()
        if outcome["state"] == "traceback"
    }
    assert not wrong
