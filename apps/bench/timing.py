"""Two variants measured side by side: seconds in turns, peak bytes, FLOPs, and rows through each module."""

import ctypes
import ctypes.util
import gc
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_leaves
from torch.utils.benchmark import timer
from torch.utils.flop_counter import FlopCounterMode

PEAK_RESET = Path("/proc/self/clear_refs")  # Linux: writing 5 sets the peak back to the present
STATUS = Path("/proc/self/status")
ModuleNames = Mapping[type, str]  # classes of modules whose rows are counted, and their names


@dataclass(frozen=True)
class Check:
    """The largest absolute difference of two results, and whether particles had the same ancestors."""

    difference: float
    limit: float
    same_ancestors: bool = True

    @property
    def passed(self) -> bool:
        """Whether the two results are the same."""
        return self.difference <= self.limit and self.same_ancestors


@dataclass(frozen=True)
class Variant:
    """One way to do it: each call of `run` does the same work and returns the same result.

    counted  whether FLOPs and rows may be counted: hooks would recompile a compiled denoiser
    """

    name: str
    run: Callable[[], Any]
    counted: bool = True


@dataclass(frozen=True)
class PreparedComparison:
    """A comparison that is ready: seconds of `over` / seconds of `under`; `check` compares what they returned."""

    over: Variant
    under: Variant
    check: Callable[[Any, Any], Check] | None = None


@dataclass
class Measurement:
    """Measurements of a variant.

    seconds  of each repeat
    cpu      seconds of this process's threads in each repeat: less disturbed by other load
    peak     bytes above those before the call, at most; None where the system cannot tell
    flops    of one run (a multiplication and an addition are two); 0 where they are not counted
    rows     that went through the denoiser, the decoder, the text encoders and the reward
    """

    name: str
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    peak: int | None = None
    flops: int = 0
    rows: dict[str, int] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """Seconds of the middle repeat."""
        return median(self.seconds)


@dataclass(frozen=True)
class RepeatPolicy:
    """Repeat until `seconds` are over, `least` to `most` times."""

    seconds: float
    least: int = 3
    most: int = 15


def seconds_of(run: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of one run and of the process's threads in it, by PyTorch's clock, which waits for the accelerator.

    `torch.utils.benchmark.Timer` itself runs twice before each measured run, and cannot take turns with another.
    """
    wall, cpu = timer(), time.process_time()
    run()
    return timer() - wall, time.process_time() - cpu


def measure(
    opened: PreparedComparison,
    measurements: tuple[Measurement, Measurement],
    module_names: ModuleNames,
    device: torch.device,
    policy: RepeatPolicy,
) -> tuple[Any, Any]:
    """Run each variant once to warm up, then in turns A B A B …, then once each to count bytes, FLOPs and rows.

    Measurements are added at once, so that they stay when the rest is interrupted. Returns the results.
    """
    variants, started = (opened.over, opened.under), time.perf_counter()
    results = tuple(variant.run() for variant in variants)
    gc.collect()
    repeats, last = 0, 0.0
    # As much as one more turn is left for the run that counts.
    while repeats < policy.least or (
        repeats < policy.most and time.perf_counter() - started + 2 * last < policy.seconds
    ):
        turn = [seconds_of(variant.run) for variant in variants]
        for measured, (seconds, cpu) in zip(measurements, turn, strict=True):
            measured.seconds.append(seconds)
            measured.cpu.append(cpu)
        repeats, last = repeats + 1, sum(seconds for seconds, _ in turn)
    for variant, measured in zip(variants, measurements, strict=True):
        flops = FlopCounterMode(display=False) if variant.counted else None
        with _peak(device) as peak, _rows(module_names if variant.counted else {}) as rows, flops or nullcontext():
            variant.run()
        measured.peak, measured.rows = peak[0] if peak else None, rows
        measured.flops = flops.get_total_flops() if flops else 0
    return results[0], results[1]


def difference(first: Tensor, second: Tensor) -> float:
    """The largest absolute difference; infinite where the shapes differ."""
    if first.shape != second.shape:
        return float("inf")
    return (first.float() - second.float()).abs().max().item() if first.numel() else 0.0


@contextmanager
def _peak(device: torch.device) -> Iterator[list[int]]:
    """Yield a list that holds the peak of the block after it, where the system can tell."""
    peak: list[int] = []
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.append(torch.cuda.max_memory_allocated(device) - before)
    elif reset_peak():
        before = _status("VmRSS")
        yield peak
        peak.append(_status("VmHWM") - before)
    else:
        yield peak


def reset_peak() -> bool:
    """Give free memory back to the system and reset its peak; False where the system cannot."""
    if sys.platform != "linux":
        return False
    name = ctypes.util.find_library("c")
    trim = getattr(ctypes.CDLL(name), "malloc_trim", None) if name else None
    if trim is not None:
        trim(0)  # else a run would reuse memory that an earlier one left, and seem to need nothing
    try:
        PEAK_RESET.write_text("5")
    except OSError:
        return False
    return True


def _status(name: str) -> int:
    """Bytes of one line of this process's status."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


@contextmanager
def _rows(module_names: ModuleNames) -> Iterator[dict[str, int]]:
    """Count the rows of the modules' calls, copies of modules included.

    Calls that keep a graph are counted apart: a backward pass goes through them.
    """
    rows: dict[str, int] = {}

    def count(module: nn.Module, given: Any, output: Any) -> None:
        if type(module) in module_names:
            first = next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
            name = module_names[type(module)] + (" with a graph" if first.requires_grad else "")
            rows[name] = rows.get(name, 0) + len(first)

    handle = register_module_forward_hook(count) if module_names else None
    try:
        yield rows
    finally:
        if handle is not None:
            handle.remove()
