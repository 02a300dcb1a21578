"""`steer bench` from end to end: its report, what it refuses, and what Ctrl-C leaves."""

import json
import math
import re
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from bench_subject import PARTICLES, tiny_subject
from conftest import Steer

from steer.apps.bench import comparisons as against_naive
from steer.apps.bench import timing as clock
from steer.apps.bench.comparisons import COMPARISONS
from steer.apps.bench.report import Bench, draw, table

NAMED = ["fk_over_plain_batch", "naive_fk_over_ours", "naive_reno_over_ours", "naive_d3po_over_ours"]
CPU = torch.device("cpu")


def bench_of(file: Path, seconds: float) -> tuple[Bench, list[str]]:
    messages: list[str] = []
    return Bench(file, seconds, quick=True, say=messages.append), messages


@pytest.mark.hard
def test_the_command_measures_the_embedded_model(steer: Steer, tmp_path: Path) -> None:
    """With no time to spare: the main ratios are measured once all the same."""
    file = tmp_path / "new" / "bench.json"
    words = ["--quick", "--device", "cpu", "--steps", 4, "--particles", 2, "--json", file, "--seconds", 0.01]
    code, out, err = steer("bench", *words)
    assert code == 0, err
    report = json.loads(file.read_text())
    assert report["complete"] and report["quick"] and report["threads"] >= 1
    assert report["device"].startswith("cpu") and report["versions"]["torch"]
    assert report["gpu"] is not None or ("no GPU" in report["note"] and "no GPU" in err)
    assert list(report["ratios"]) == NAMED and all(name in out for name in NAMED)
    assert all(report["checks"][name]["passed"] for name in NAMED)
    assert "--seconds" in report["skipped"]["whole_fk_over_plain_batch"]
    ceilings = report["ceilings"]["scenes"]
    assert ceilings["matrix_flops"] > 0 < ceilings["denoiser_flops"] and not ceilings["fused"]
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.hard
def test_a_report_of_every_ratio(tmp_path: Path) -> None:
    bench, messages = bench_of(tmp_path / "bench.json", 3600.0)  # two repeats of each, however slow the machine is
    bench.least = bench.most = 2
    bench.run([("tiny", tiny_subject), ("again", tiny_subject)], CPU)
    subject = tiny_subject()
    report = json.loads((tmp_path / "bench.json").read_text())
    quick = [name for name, comparison in COMPARISONS.items() if comparison.quick]
    every = {prefix + name for prefix in ("", "again: ") for name in quick}
    assert set(report["ratios"]) == every - {name for name in every if "xformers" in name}
    assert "xformers" in report["skipped"]["xformers_off_over_on"]
    shown = table(report)
    for name, ratio in report["ratios"].items():
        assert math.isfinite(ratio) and ratio > 0 and name in shown and any(name in line for line in messages)
        kind, (over, under) = name.removeprefix("again: "), report["runs"][name]["variants"].values()
        assert ratio == pytest.approx(fmean(a / b for a, b in zip(over["seconds"], under["seconds"], strict=True)))
        for one in (over, under):
            assert one["repeats"] == len(one["seconds"]) == len(one["cpu_seconds"]) == 2
            samples = 2 * subject.pairs if re.search("d3po|grpo|ddpo", kind) else PARTICLES
            assert one["samples_per_second"] * one["median"] == pytest.approx(samples)
            assert one["quartiles"][0] <= one["median"] <= one["quartiles"][1]
            assert one["peak_bytes"] is None or one["peak_bytes"] >= 0
        assert math.isfinite(report["cpu_ratios"][name])
        if "overlapped" in name:  # FLOPs of another thread are not counted
            assert name not in report["flop_ratios"]
        else:
            assert report["flop_ratios"][name] > 0
    assert all(check["passed"] for check in report["checks"].values()) and set(NAMED) <= set(report["checks"])
    assert draw(report, tmp_path / "bench.png") is not None


@pytest.mark.hard
def test_ctrl_c_leaves_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, calls = clock.seconds_of, 0

    def interrupted(run: Any) -> tuple[float, float]:
        nonlocal calls
        calls += 1
        if calls == 10:  # in the second turn of the second comparison
            raise KeyboardInterrupt
        return plain(run)

    monkeypatch.setattr(clock, "seconds_of", interrupted)
    bench, _ = bench_of(tmp_path / "bench.json", 60.0)
    bench.most = 3
    with pytest.raises(KeyboardInterrupt):
        bench.run([("tiny", tiny_subject)], CPU)
    report = json.loads((tmp_path / "bench.json").read_text())
    assert not report["complete"] and list(report["ratios"]) == NAMED[:2]
    repeats = [[v["repeats"] for v in report["runs"][name]["variants"].values()] for name in NAMED[:2]]
    assert repeats == [[3, 3], [1, 1]]
    assert NAMED[1] in table(report)


def test_the_command_tells_where_the_interrupted_report_is(
    steer: Steer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(run: Any) -> tuple[float, float]:
        raise KeyboardInterrupt

    monkeypatch.setattr(clock, "seconds_of", interrupted)
    file = tmp_path / "bench.json"
    code, _, err = steer("bench", "--quick", "--device", "cpu", "--steps", 3, "--particles", 2, "--json", file)
    assert code == 130 and f"all measurements so far are in {file}" in err and "Traceback" not in err
    assert not json.loads(file.read_text())["complete"]


@pytest.mark.hard
def test_results_that_differ_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(against_naive, "TOLERANCE", -1.0)
    bench, messages = bench_of(tmp_path / "bench.json", 0.01)
    report = bench.run([("tiny", tiny_subject)], CPU)
    assert not any(check["passed"] for check in report["checks"].values())
    assert "DIFFER" in table(report) and any("NOT THE SAME" in line for line in messages)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--model", "sd16"], "sd15"),
        (["--device", "abacus"], "--device 'abacus'"),
        (["--resolution", 100], "--resolution must be a multiple of 64"),
        (["--steps", 2], "--steps"),
        (["--particles", 1], "--particles"),
        (["--seconds", 0], "--seconds"),
        (["--json", "picture.png"], "picture.png"),
        (["--json", "."], "this is a folder"),
        (["--json", "file/bench.json"], "cannot write"),
    ],
)
def test_bad_input_is_one_line(
    words: list[object], named: str, steer: Steer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    code, _, err = steer("bench", "--quick", *words)
    assert code == 2 and named in err and len(err.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("*.png"))
