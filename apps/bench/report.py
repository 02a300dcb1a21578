"""What a benchmark found: JSON, a table for the screen and a picture."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from steer.apps.bench.clock import Check, Measured
from steer.apps.bench.predict import Predicted
from steer.apps.evaluation_store import versions
from steer.errors import InputError
from steer.staged import write_text

Json = dict[str, Any]


def described(device: torch.device, quick: bool, seconds: float) -> Json:
    """A report of nothing yet: where it runs, and with what."""
    packages = versions(device)
    has_gpu = torch.cuda.is_available()
    note = "" if has_gpu else "no GPU here: CUDA kernels, xformers and CUDA graphs are not measured, their twins are"
    if has_gpu and device.type != "cuda":
        note = "there is a GPU, and it is not used: --device cuda"
    return {
        "complete": False,
        "device": packages.pop("device"),
        "gpu": torch.cuda.get_device_name() if has_gpu else None,
        "note": note,
        "versions": packages,
        "threads": torch.get_num_threads(),
        "quick": quick,
        "seconds": seconds,
        "subjects": {},
        "ratios": {},
        "cpu_ratios": {},
        "memory_ratios": {},
        "predicted": {},
        "checks": {},
        "runs": {},
        "ceilings": {},
        "skipped": {},
    }


def outcome(
    report: Json,
    name: str,
    about: str,
    samples: int,
    found: tuple[Measured, Measured],
    check: Check | None,
    predicted: Predicted | None,
) -> None:
    """Puts a comparison into a report, as far as it got."""
    over, under = found
    report["runs"][name] = {"about": about, "variants": {one.name: _told(one, samples) for one in found}}
    report["ratios"][name] = median(over.seconds) / median(under.seconds)
    if report["device"].startswith("cpu") and all(over.cpu + under.cpu):
        report["cpu_ratios"][name] = median(over.cpu) / median(under.cpu)
    if over.peak is not None and under.peak:
        report["memory_ratios"][name] = over.peak / under.peak
    if check is not None:
        report["checks"][name] = asdict(check) | {"passed": check.passed}
    if predicted is not None:
        report["predicted"][name] = asdict(predicted)


def _told(measured: Measured, samples: int) -> Json:
    low, middle, high = quartiles(measured.seconds)
    told = {"median": middle, "quartiles": [low, high], "repeats": len(measured.seconds), "seconds": measured.seconds}
    told["cpu_seconds"] = measured.cpu
    told["samples_per_second"] = samples / middle
    return told | {"peak_bytes": measured.peak, "rows": measured.counts, "parts": measured.parts}


def quartiles(seconds: list[float]) -> tuple[float, float, float]:
    """The first, the second and the third."""
    low, middle, high = quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    return low, middle, high


def write(report: Json, file: Path) -> None:
    """Replaces the JSON. Raises InputError where it cannot be written."""
    try:
        write_text(file, json.dumps(_finite(report), indent=1, ensure_ascii=False))
    except OSError as error:
        raise InputError(f"--json {file}: cannot write there ({error.strerror})") from error


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: they become null."""
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(report: Json) -> str:
    """A line for each ratio: found, spread, foretold, memory, and whether results agree."""
    rows = [("ratio of seconds", "found", "spread", "CPU time", "predicted", "memory", "results")]
    for name, ratio in report["ratios"].items():
        memory, check = report["memory_ratios"].get(name), report["checks"].get(name)
        low, high = spread(report["runs"][name])
        agree = "" if check is None else f"same to {check['difference']:.0e}" if check["passed"] else "DIFFER"
        shown = "" if memory is None else f"{memory:.2f}"
        cpu = report["cpu_ratios"].get(name)
        busy = "" if cpu is None else f"{cpu:.3f}"
        rows.append((name, f"{ratio:.3f}", f"{low:.2f}–{high:.2f}", busy, _foretold(report, name), shown, agree))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    reasons: dict[str, list[str]] = {}
    for name, why in report["skipped"].items():
        reasons.setdefault(why, []).append(name)
    return "\n".join([*lines, *(f"not measured ({why}): {', '.join(names)}" for why, names in reasons.items())])


def spread(run: Json) -> tuple[float, float]:
    """Quartiles of the ratio, turn by turn."""
    over, under = (variant["seconds"] for variant in run["variants"].values())
    low, _, high = quartiles([a / b for a, b in zip(over, under, strict=False)])
    return low, high


def _foretold(report: Json, name: str) -> str:
    told = report["predicted"].get(name)
    if told is None:
        return ""
    if told["ratio"] is not None:
        return f"{told['ratio']:.3f}"
    bound = told["at_most"]  # infinite where the part is as good as all of it
    return "" if bound is None or math.isinf(bound) else f"≤ {bound:.2f}"
