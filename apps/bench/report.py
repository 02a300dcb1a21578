"""The report of a benchmark: JSON, a table for the screen and a picture."""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter
from torch._dynamo.exc import TorchDynamoException

from steer.apps.bench.comparisons import COMPARISONS, Comparison
from steer.apps.bench.sizes import ceilings
from steer.apps.bench.subject import Subject
from steer.apps.bench.timing import Check, Measurement, RepeatPolicy, measure
from steer.apps.evaluation.report import aligned
from steer.apps.evaluation.spec import versions
from steer.apps.plots import COLORMAP, DPI, INK, plain_text, save_figure, set_title, style_axes
from steer.errors import InputError
from steer.files import write_errors, write_text

Json = dict[str, Any]
# Tables of the report, each keyed by the name of a subject or a comparison.
TABLES = ("subjects", "ratios", "cpu_ratios", "memory_ratios", "flop_ratios", "checks", "runs", "ceilings", "skipped")


def new_report(device: torch.device, quick: bool, seconds: float) -> Json:
    """Create an empty report with the device and the versions."""
    packages = versions(device)
    has_gpu = torch.cuda.is_available()
    note = "" if has_gpu else "no GPU here: CUDA kernels, xformers and CUDA graphs are not measured"
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
    } | {name: {} for name in TABLES}


def add_comparison(
    report: Json, name: str, about: str, samples: int, over: Measurement, under: Measurement, check: Check | None
) -> None:
    """Add a comparison to a report, with its measurements so far."""
    report["runs"][name] = {"about": about, "variants": {one.name: _summary(one, samples) for one in (over, under)}}
    report["ratios"][name] = ratios(over.seconds, under.seconds)[1]
    if report["device"].startswith("cpu") and all(over.cpu + under.cpu):
        report["cpu_ratios"][name] = ratios(over.cpu, under.cpu)[1]
    if over.peak is not None and under.peak:
        report["memory_ratios"][name] = over.peak / under.peak
    if check is not None:
        known = check.difference if math.isfinite(check.difference) else None  # JSON has no infinity
        report["checks"][name] = asdict(check) | {"passed": check.passed, "difference": known}
    if over.flops and under.flops:
        report["flop_ratios"][name] = over.flops / under.flops


def _summary(measured: Measurement, samples: int) -> Json:
    low, middle, high = quartiles(measured.seconds)
    return {
        "median": middle,
        "quartiles": [low, high],
        "repeats": len(measured.seconds),
        "seconds": measured.seconds,
        "cpu_seconds": measured.cpu,
        "samples_per_second": samples / middle,
        "peak_bytes": measured.peak,
        "flops": measured.flops,
    }


def ratios(over: list[float], under: list[float]) -> tuple[float, float, float]:
    """Return the three quartiles of the ratio, turn by turn: what slows the machine slows both sides of a turn."""
    return quartiles([a / b for a, b in zip(over, under, strict=False)])


def quartiles(seconds: list[float]) -> tuple[float, float, float]:
    """Return the three quartiles."""
    low, middle, high = quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    return low, middle, high


def write(report: Json, file: Path) -> None:
    """Replace the JSON file. Raises InputError if it cannot be written."""
    with write_errors(f"--json {file}", "make room, or choose another file"):
        write_text(file, json.dumps(report, indent=1, ensure_ascii=False))


def table(report: Json) -> str:
    """Format a line for each ratio: seconds, spread, CPU time, FLOPs, memory, and whether results agree."""
    rows = [("ratio of seconds", "measured", "spread", "CPU time", "FLOPs", "memory", "results")]
    for name, ratio in report["ratios"].items():
        check, (low, high) = report["checks"].get(name), spread(report["runs"][name])
        agree = "" if check is None else f"same to {check['difference']:.0e}" if check["passed"] else "DIFFER"
        others = [report[kind].get(name) for kind in ("cpu_ratios", "flop_ratios", "memory_ratios")]
        cpu, flops, memory = ("" if other is None else f"{other:.2f}" for other in others)
        rows.append((name, f"{ratio:.3f}", f"{low:.2f}–{high:.2f}", cpu, flops, memory, agree))
    reasons: dict[str, list[str]] = {}
    for name, why in report["skipped"].items():
        reasons.setdefault(why, []).append(name)
    return "\n".join([aligned(rows), *(f"not measured ({why}): {', '.join(names)}" for why, names in reasons.items())])


def spread(run: Json) -> tuple[float, float]:
    """Return the first and third quartile of the ratio over turns."""
    low, _, high = ratios(*(variant["seconds"] for variant in run["variants"].values()))
    return low, high


SECONDS_COLOUR, FLOPS_COLOUR = colormaps[COLORMAP](0.15), colormaps[COLORMAP](0.7)
ROW = 0.34  # inches per ratio


def draw(report: Json, path: Path) -> Path | None:
    """Draw the ratios of seconds with their quartiles, beside ratios of FLOPs; None if nothing was measured."""
    names = list(report["ratios"])
    if not names:
        return None
    figure = Figure(figsize=(9, 1.6 + ROW * max(len(names), 4)), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for row, name in enumerate(names):
        axes.plot(spread(report["runs"][name]), [row, row], color=SECONDS_COLOUR, lw=2)
    axes.plot([*report["ratios"].values()], range(len(names)), "o", color=SECONDS_COLOUR, label="seconds, quartiles")
    if flops := {row: report["flop_ratios"][name] for row, name in enumerate(names) if name in report["flop_ratios"]}:
        hollow: dict[str, Any] = {"mfc": "white", "mec": FLOPS_COLOUR, "ls": "", "zorder": 1}
        axes.plot([*flops.values()], [*flops], "D", label="FLOPs", **hollow)
    axes.axvline(1, color=INK, lw=0.9, ls=":", zorder=0)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks([0.5, 1, 2, 4])
    axes.set_yticks(range(len(names)), [plain_text(name, 44) for name in names])
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, ncols=2, loc="upper left", bbox_to_anchor=(-0.02, -0.05))
    set_title(axes, "ratio")
    style_axes(axes, "x")
    where = f"{report['device']}, {report['threads']} thread{'s' * (report['threads'] != 1)}"
    figure.suptitle(f"{where}{'; ' * bool(report['note'])}{report['note']}", size=9, x=0.01, ha="left", color=INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    return save_figure(figure, path)


Say = Callable[[str], None]
ALWAYS_MEASURED = 4  # comparisons that are measured at least once, even when the time is over


@dataclass
class Bench:
    """A benchmark.

    file     JSON, written after every comparison
    seconds  time for all comparisons: as many repeats as fit, `least` to `most`
    quick    skip the comparisons that take minutes to prepare
    say      writes a line of progress
    """

    file: Path
    seconds: float
    quick: bool
    say: Say
    least: int = 3
    most: int = 15
    report: Json = field(default_factory=dict)

    def run(self, subjects: Sequence[tuple[str, Callable[[], Subject]]], device: torch.device) -> Json:
        """Measure every subject, one in memory at a time.

        After Ctrl-C or an error the JSON holds all measurements so far.
        """
        self.report = new_report(device, self.quick, self.seconds)
        write(self.report, self.file)
        if self.report["note"]:
            self.say(self.report["note"])
        started = time.perf_counter()
        for number, (name, make) in enumerate(subjects):
            # The remaining subjects share the remaining time equally.
            left = self.seconds - (time.perf_counter() - started)
            with self._write_on_exit():
                self._measure_all(make(), "" if number == 0 else f"{name}: ", left / (len(subjects) - number))
        self.report["complete"] = True
        write(self.report, self.file)
        return self.report

    @contextmanager
    def _write_on_exit(self) -> Iterator[None]:
        try:
            yield
        finally:
            write(self.report, self.file)

    def _measure_all(self, subject: Subject, prefix: str, seconds: float) -> None:
        names = [name for name, comparison in COMPARISONS.items() if comparison.quick or not self.quick]
        self.report["subjects"][subject.name] = subject.about()
        end = time.perf_counter() + seconds
        for number, name in enumerate(names):
            comparison, left = COMPARISONS[name], end - time.perf_counter()
            if left <= 0 and number >= ALWAYS_MEASURED:
                reason: str | None = "no time left: give it more --seconds"
            else:
                share = max(left, 0.0) / (len(names) - number)
                pace = RepeatPolicy(share, self.least if left > 0 else 1, self.most)
                reason = self._measure(subject, prefix + name, comparison, pace)
            if reason is not None:
                self.report["skipped"][prefix + name] = reason
                self.say(f"{prefix + name}: not measured ({reason})")
            write(self.report, self.file)
        self.report["ceilings"][subject.name] = ceilings(subject, self.quick)

    def _measure(self, subject: Subject, name: str, comparison: Comparison, pace: RepeatPolicy) -> str | None:
        """Measure one comparison. Returns the reason if it cannot be measured."""
        self.say(f"{name} … {comparison.about}")
        check: Check | None = None
        try:
            with comparison.open(subject) as opened:
                over, under = Measurement(opened.over.name), Measurement(opened.under.name)
                try:
                    results = measure(opened, (over, under), subject.device, pace)
                    check = opened.check and opened.check(*results)
                finally:
                    if over.seconds and under.seconds:
                        add_comparison(self.report, name, comparison.about, opened.samples, over, under, check)
        except (InputError, torch.OutOfMemoryError, TorchDynamoException) as error:
            return " ".join(str(error).split())[:300] or type(error).__name__
        ratio = self.report["ratios"][name]
        self.say(f"  {ratio:.3f}" + ("" if check is None or check.passed else f"  NOT THE SAME: {asdict(check)}"))
        return None
