"""Two ways to do one thing, measured side by side: seconds in turns, bytes, and the calls that each one makes."""

import ctypes
import ctypes.util
import gc
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import tree_leaves

MEASURED_MEMORY = Path("/proc/self/clear_refs")  # Linux: writing 5 sets the peak back to what there is now
STATUS = Path("/proc/self/status")
ModuleNames = Mapping[type, str]  # classes of modules whose calls are counted, and what they are called


@dataclass(frozen=True)
class Check:
    """How far two results are apart, the largest absolute difference; and whether particles had the same ancestors."""

    difference: float
    limit: float
    same_ancestors: bool = True

    @property
    def passed(self) -> bool:
        """Whether the two are one result."""
        return self.difference <= self.limit and self.same_ancestors


@dataclass(frozen=True)
class Variant:
    """One way to do it: each call of `run` does the same work and returns the same result.

    counted  whether its calls may be counted: hooks would have a compiled denoiser compiled anew
    """

    name: str
    run: Callable[[], Any]
    counted: bool = True


@dataclass(frozen=True)
class PreparedComparison:
    """A comparison that is ready: the seconds of `over` are divided by those of `under`; `check` looks at what they
    returned."""

    over: Variant
    under: Variant
    check: Callable[[Any, Any], Check] | None = None


@dataclass
class Measurement:
    """What was found of a variant.

    seconds  of each repeat
    cpu      seconds of this process's threads in each repeat: less disturbed by what else a machine does
    peak     bytes above what there was before the call, at most; None where this system does not tell
    counts   rows that went through the denoiser, the decoder, the text encoders and the reward
    parts    seconds that they took
    """

    name: str
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    peak: int | None = None
    counts: dict[str, int] = field(default_factory=dict)
    parts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RepeatPolicy:
    """How long a comparison may take: repeats go on until `seconds` are over, `least` to `most` times."""

    seconds: float
    least: int = 3
    most: int = 15


def measure(
    opened: PreparedComparison,
    measurements: tuple[Measurement, Measurement],
    module_names: ModuleNames,
    device: torch.device,
    pace: RepeatPolicy,
) -> tuple[Any, Any]:
    """One warm-up of each, then A B A B …, then one run of each in which calls and bytes are counted.

    What is measured goes into `measurements` at once, so that it is there when the rest is
    broken off. Returns the results.
    """
    variants, started = (opened.over, opened.under), time.perf_counter()
    results = tuple(variant.run() for variant in variants)
    gc.collect()
    repeats, last = 0, 0.0
    # As much as one more turn is left for the run that counts.
    while repeats < pace.least or (repeats < pace.most and time.perf_counter() - started + 2 * last < pace.seconds):
        turn = []
        for variant in variants:
            cpu = time.process_time()
            turn.append((seconds_of(variant.run, device), time.process_time() - cpu))
        for measured, (seconds, cpu) in zip(measurements, turn, strict=True):
            measured.seconds.append(seconds)
            measured.cpu.append(cpu)
        repeats, last = repeats + 1, sum(seconds for seconds, _ in turn)
    for variant, measured in zip(variants, measurements, strict=True):
        with _peak(device) as peak, _counting(module_names if variant.counted else {}, device) as (counts, parts):
            variant.run()
        measured.peak, measured.counts, measured.parts = peak[0] if peak else None, counts, parts
    return results[0], results[1]


def difference(first: Tensor, second: Tensor) -> float:
    """The largest absolute difference; infinite where the shapes differ."""
    if first.shape != second.shape:
        return float("inf")
    return (first.float() - second.float()).abs().max().item() if first.numel() else 0.0


def synchronise(device: torch.device) -> None:
    """Returns when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """Of one run, until the device has done it."""
    synchronise(device)
    started = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - started


@contextmanager
def _peak(device: torch.device) -> Iterator[list[int]]:
    """Gives a list into which the peak of the block is put at its end, where it can be told."""
    measurements: list[int] = []
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield measurements
        measurements.append(torch.cuda.max_memory_allocated(device) - before)
        return
    if not _resets():
        yield measurements
        return
    before = _status("VmRSS")
    yield measurements
    measurements.append(_status("VmHWM") - before)


def _resets() -> bool:
    """Gives memory that is free back to the system, and sets its peak back. False where this system cannot."""
    if sys.platform != "linux":
        return False
    name = ctypes.util.find_library("c")
    trim = getattr(ctypes.CDLL(name), "malloc_trim", None) if name else None
    if trim is not None:
        trim(0)  # else a run would live in what an earlier one left, and seem to need nothing
    try:
        MEASURED_MEMORY.write_text("5")
    except OSError:
        return False
    return True


def _status(name: str) -> int:
    """Bytes of one line of this process's status."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


@contextmanager
def _counting(module_names: ModuleNames, device: torch.device) -> Iterator[tuple[dict[str, int], dict[str, float]]]:
    """Counts the rows of the modules' calls and times them, copies of modules included. Steps of which a graph is kept
    are counted apart: the way back goes through them."""
    counts: dict[str, int] = {}
    parts: dict[str, float] = {}
    began: list[float] = []

    def before(module: nn.Module, given: Any) -> None:
        if type(module) in module_names:
            synchronise(device)
            began.append(time.perf_counter())

    def after(module: nn.Module, given: Any, output: Any) -> None:
        if type(module) in module_names:
            synchronise(device)
            seconds = time.perf_counter() - began.pop()
            first = next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
            name = module_names[type(module)] + (" with a graph" if first.requires_grad else "")
            counts[name] = counts.get(name, 0) + len(first)
            parts[name] = parts.get(name, 0.0) + seconds

    if not module_names:
        yield counts, parts
        return
    handles = [register_module_forward_pre_hook(before), register_module_forward_hook(after)]
    try:
        yield counts, parts
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Prediction:
    """share   of the slower variant's seconds that the other does without, 0..1 (below 0: it does more)
    ratio   that follows; None where a part gets faster by an unknown factor
    at_most where so: what it would be if that part took no time
    """

    share: float
    ratio: float | None = None
    at_most: float | None = None


Predict = Callable[[Measurement, Measurement], Prediction]


# Amdahl 1967: if a share s of the time is saved, what is left is 1 − s, and the ratio is 1 / (1 − s).
def amdahl(share: float) -> float:
    """The ratio of the whole to what is left."""
    return 1 / (1 - share) if share < 1 else float("inf")


def predict_by_counts(over: Measurement, under: Measurement) -> Prediction:
    """Every part costs in both what a row of it costs in `over` (or in `under`, where only that one has it).

    Of a variant whose calls cannot be counted nothing is foretold."""
    if not under.counts:
        return Prediction(0.0)
    saved = 0.0
    for part in over.counts.keys() | under.counts.keys():
        counted_side = over if over.counts.get(part) else under
        row = counted_side.parts[part] / counted_side.counts[part]
        saved += row * (over.counts.get(part, 0) - under.counts.get(part, 0))
    share = saved / median(over.seconds)
    return Prediction(share, amdahl(share))


def bounded(share: float) -> Prediction:
    """A share of the time gets faster, nobody knows how much."""
    return Prediction(share, at_most=amdahl(share))
