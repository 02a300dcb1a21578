"""`steer bench` as a command: its report, what it refuses, and what Ctrl-C leaves."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from conftest import Steer

from steer.apps.bench import against_naive, clock

NAMED = ("fk_over_plain_batch", "naive_fk_over_ours", "naive_reno_over_ours", "naive_d3po_over_ours")
SMALL = ["bench", "--quick", "--device", "cpu", "--steps", 4, "--particles", 2]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Kept from the one run that is made of all comparisons."""
    return {}


def test_a_report_of_every_ratio(steer: Steer, tmp_path: Path) -> None:
    file = tmp_path / "new" / "bench.json"
    code, out, err = steer(*SMALL, "--json", file, "--seconds", 60)
    assert code == 0, err
    report = json.loads(file.read_text())
    assert report["complete"] and report["quick"] and report["threads"] >= 1
    assert report["device"].startswith("cpu") and report["versions"]["torch"]
    assert report["gpu"] is not None or ("no GPU" in report["note"] and "no GPU" in err)
    assert set(NAMED) < set(report["ratios"])
    assert {"whole_fk_over_plain_batch", "shared_prompt_off_over_on", "sdpa_off_over_on"} < set(report["ratios"])
    assert "compiled_off_over_on" not in report["ratios"]  # takes minutes
    assert "xformers" in report["skipped"]["xformers_off_over_on"]
    for name, ratio in report["ratios"].items():
        assert math.isfinite(ratio) and ratio > 0 and name in out
        over, under = report["runs"][name]["variants"].values()
        assert ratio == pytest.approx(over["median"] / under["median"])
        for one in (over, under):
            assert one["repeats"] == len(one["seconds"]) >= 3
            assert one["quartiles"][0] <= one["median"] <= one["quartiles"][1]
            assert one["peak_bytes"] is None or one["peak_bytes"] >= 0
        assert math.isfinite(report["predicted"][name]["share"])
    assert all(check["passed"] for check in report["checks"].values()) and set(NAMED) <= set(report["checks"])
    assert report["ceilings"]["scenes"]["matrix_flops"] > report["ceilings"]["scenes"]["denoiser_flops"] > 0
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_time_that_is_over_leaves_the_main_ratios(steer: Steer, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    code, _, err = steer(*SMALL, "--json", file, "--seconds", 0.01)
    report = json.loads(file.read_text())
    assert code == 0, err
    assert set(report["ratios"]) == set(NAMED)
    assert "--seconds" in report["skipped"]["whole_fk_over_plain_batch"]


def test_ctrl_c_leaves_what_was_measured(steer: Steer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, calls = clock.seconds_of, 0

    def interrupted(run: Any, device: Any) -> float:
        nonlocal calls
        calls += 1
        if calls == 6:  # in the second turn of the second comparison, which has one turn then
            raise KeyboardInterrupt
        return plain(run, device)

    monkeypatch.setattr(clock, "seconds_of", interrupted)
    file = tmp_path / "bench.json"
    code, out, err = steer(*SMALL, "--json", file, "--seconds", 0.01)
    report = json.loads(file.read_text())
    assert code == 130 and f"what was measured is in {file}" in err
    assert not report["complete"] and set(report["ratios"]) == set(NAMED[:2]) and NAMED[1] in out
    assert report["runs"][NAMED[0]]["variants"]["plain"]["repeats"] == 1


def test_results_that_differ_are_told(steer: Steer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(against_naive, "SAME", -1.0)
    code, out, err = steer(*SMALL, "--json", tmp_path / "bench.json", "--seconds", 0.01)
    assert code == 1 and "DIFFER" in out and "differ" in err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--model", "sd16"], "'sd15'"),
        (["--device", "abacus"], "--device 'abacus'"),
        (["--resolution", 100], "--resolution must be a multiple of 64"),
        (["--steps", 2], "--steps"),
        (["--particles", 1], "--particles"),
        (["--seconds", 0], "--seconds"),
        (["--json", "picture.png"], "picture.png"),
        (["--json", "."], "cannot write"),
    ],
)
def test_bad_input_is_one_line(
    words: list[object], named: str, steer: Steer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = steer("bench", "--quick", *words)
    assert code == 2 and named in err and len(err.strip().splitlines()) <= 2 and "Traceback" not in err
    assert not list(tmp_path.rglob("*.png"))
