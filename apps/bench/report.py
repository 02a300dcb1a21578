"""What a benchmark found: JSON, a table for the screen and a picture."""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter
from torch._dynamo.exc import TorchDynamoException

from steer.apps.bench.comparisons import COMPARISONS, Comparison
from steer.apps.bench.sizes import ceilings
from steer.apps.bench.subject import Subject
from steer.apps.bench.timing import Check, Measurement, Prediction, RepeatPolicy, measure
from steer.apps.evaluation.spec import versions
from steer.apps.plots import COLORMAP, FAINT, INK, plain_text
from steer.errors import InputError
from steer.files import atomic_write, write_text

Json = dict[str, Any]


def new_report(device: torch.device, quick: bool, seconds: float) -> Json:
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


def add_comparison(
    report: Json,
    name: str,
    about: str,
    samples: int,
    measurements: tuple[Measurement, Measurement],
    check: Check | None,
    predicted: Prediction | None,
) -> None:
    """Puts a comparison into a report, as far as it got."""
    over, under = measurements
    report["runs"][name] = {"about": about, "variants": {one.name: _summary(one, samples) for one in measurements}}
    report["ratios"][name] = median(over.seconds) / median(under.seconds)
    if report["device"].startswith("cpu") and all(over.cpu + under.cpu):
        report["cpu_ratios"][name] = median(over.cpu) / median(under.cpu)
    if over.peak is not None and under.peak:
        report["memory_ratios"][name] = over.peak / under.peak
    if check is not None:
        report["checks"][name] = asdict(check) | {"passed": check.passed}
    if predicted is not None:
        report["predicted"][name] = asdict(predicted)


def _summary(measured: Measurement, samples: int) -> Json:
    low, middle, high = quartiles(measured.seconds)
    entry = {"median": middle, "quartiles": [low, high], "repeats": len(measured.seconds), "seconds": measured.seconds}
    entry["cpu_seconds"] = measured.cpu
    entry["samples_per_second"] = samples / middle
    return entry | {"peak_bytes": measured.peak, "rows": measured.counts, "parts": measured.parts}


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
        rows.append(
            (name, f"{ratio:.3f}", f"{low:.2f}–{high:.2f}", busy, _format_prediction(report, name), shown, agree)
        )
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


def _format_prediction(report: Json, name: str) -> str:
    entry = report["predicted"].get(name)
    if entry is None:
        return ""
    if entry["ratio"] is not None:
        return f"{entry['ratio']:.3f}"
    bound = entry["at_most"]  # infinite where the part is as good as all of it
    return "" if bound is None or math.isinf(bound) else f"≤ {bound:.2f}"


MEASURED_COLOUR, PREDICTED_COLOUR = colormaps[COLORMAP](0.15), colormaps[COLORMAP](0.7)
ROW = 0.34  # inches of a ratio


def draw(report: Json, path: Path) -> Path | None:
    """Writes a PNG; None where nothing was measured."""
    names = list(report["ratios"])
    if not names:
        return None
    figure = Figure(figsize=(12, 1.6 + ROW * max(len(names), 4)), dpi=120, layout="constrained")
    ratios, parts = figure.subplots(1, 2)
    _draw_ratios(ratios, report, names)
    _draw_parts(parts, report, names)
    where = f"{report['device']}, {report['threads']} thread{'s' * (report['threads'] != 1)}"
    figure.suptitle(f"{where}{'; ' * bool(report['note'])}{report['note']}", size=9, x=0.01, ha="left", color=INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as new:
        figure.savefig(new, format="png")
    return path


def _draw_ratios(axes: Axes, report: Json, names: list[str]) -> None:
    for row, name in enumerate(names):
        low, high = spread(report["runs"][name])
        axes.plot([low, high], [row, row], color=MEASURED_COLOUR, lw=2)
        axes.plot(
            report["ratios"][name],
            row,
            "o",
            color=MEASURED_COLOUR,
            ms=6,
            label="found, quartiles" if row == 0 else None,
        )
        prediction = report["predicted"].get(name) or {"ratio": None}
        if prediction["ratio"] is not None:
            axes.plot(prediction["ratio"], row, "D", mfc="white", mec=PREDICTED_COLOUR, ms=6, zorder=1)
    axes.plot([], [], "D", mfc="white", mec=PREDICTED_COLOUR, label="predicted", ls="")
    axes.axvline(1, color=INK, lw=0.9, ls=":", zorder=0)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks([0.5, 1, 2, 4])
    axes.set_yticks(range(len(names)), [plain_text(name, 44) for name in names])
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, ncols=2, loc="upper left", bbox_to_anchor=(-0.02, -0.05))
    _finish(axes, "ratio of seconds")


def _draw_parts(axes: Axes, report: Json, names: list[str]) -> None:
    """Seconds of both variants of each ratio, by the part that took them."""
    parts = sorted({part for name in names for one in _variants(report, name) for part in one["parts"]})
    colors = {part: colormaps[COLORMAP](place / max(len(parts), 1)) for place, part in enumerate(parts)}
    for row, name in enumerate(names):
        for one, aside in zip(_variants(report, name), (-0.18, 0.18), strict=True):
            left = 0.0
            for part, seconds in one["parts"].items():
                axes.barh(row + aside, seconds, 0.3, left=left, color=colors[part])
                left += seconds
            axes.barh(row + aside, max(one["median"] - left, 0), 0.3, left=left, color=FAINT)
    for part, color in [*colors.items(), ("all else", FAINT)]:
        axes.barh(0, 0, color=color, label=part)
    axes.set_yticks([])
    axes.invert_yaxis()
    # Below the axes: bars may be anywhere inside.
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, ncols=3, loc="upper left", bbox_to_anchor=(-0.02, -0.05))
    _finish(axes, "seconds; above the first variant, below the second")


def _variants(report: Json, name: str) -> list[dict[str, Any]]:
    return list(report["runs"][name]["variants"].values())


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, size=9, loc="left", color=INK)
    axes.tick_params(labelsize=8, color=FAINT, labelcolor=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.grid(axis="x", color=FAINT, lw=0.4, alpha=0.6)


Say = Callable[[str], None]
ALWAYS_MEASURED = 4  # comparisons that are measured at least once, even when the time is over


@dataclass
class Bench:
    """A benchmark that is under way.

    file     JSON, written after every comparison
    seconds  for all of it: repeats are as many as fit, at least `least`
    quick    without the comparisons that take minutes to make ready
    say      where its lines go
    """

    file: Path
    seconds: float
    quick: bool
    say: Say
    least: int = 3
    most: int = 15
    report: Json = field(default_factory=dict)

    def run(self, subjects: Sequence[tuple[str, Callable[[], Subject]]], device: torch.device) -> Json:
        """Measures every subject; each is made when its turn comes, and gone after it.

        Ctrl-C, and every error, leave what was measured in the JSON.
        """
        self.report = new_report(device, self.quick, self.seconds)
        write(self.report, self.file)
        if self.report["note"]:
            self.say(self.report["note"])
        started = time.perf_counter()
        for number, (name, make) in enumerate(subjects):
            # What there is left is shared equally by the subjects that are to come.
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
            reason = comparison.fits(subject)
            if reason is None and left <= 0 and number >= ALWAYS_MEASURED:
                reason = "no time left: give it more --seconds"
            if reason is None:
                share = max(left, 0.0) / (len(names) - number)
                pace = RepeatPolicy(share, self.least if left > 0 else 1, self.most)
                reason = self._measure(subject, prefix + name, comparison, pace)
            if reason is not None:
                self.report["skipped"][prefix + name] = reason
                self.say(f"{prefix + name}: not measured ({reason})")
            write(self.report, self.file)
        self.report["ceilings"][subject.name] = ceilings(subject, self.quick)

    def _measure(self, subject: Subject, name: str, comparison: Comparison, pace: RepeatPolicy) -> str | None:
        """One comparison; why it could not be measured, if so."""
        self.say(f"{name} … {comparison.about}")
        measurements: tuple[Measurement, Measurement] | None = None
        check: Check | None = None
        predicted: Prediction | None = None
        try:
            with comparison.open(subject) as opened:
                measurements = Measurement(opened.over.name), Measurement(opened.under.name)
                results = measure(opened, measurements, subject.module_names, subject.device, pace)
                check = opened.check and opened.check(*results)
            predicted = comparison.predict(subject)(*measurements)
        except (InputError, torch.OutOfMemoryError, TorchDynamoException) as error:
            return " ".join(str(error).split())[:300] or type(error).__name__
        finally:
            if measurements is not None and all(measured.seconds for measured in measurements):
                add_comparison(
                    self.report, name, comparison.about, comparison.samples(subject), measurements, check, predicted
                )
        ratio = self.report["ratios"][name]
        self.say(f"  {ratio:.3f}" + ("" if check is None or check.passed else f"  NOT THE SAME: {asdict(check)}"))
        return None
