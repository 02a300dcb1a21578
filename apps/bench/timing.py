"""Two variants measured side by side: seconds in turns, peak bytes and FLOPs."""

import ctypes
import ctypes.util
import gc
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.benchmark import timer
from torch.utils.flop_counter import FlopCounterMode

PEAK_RESET = Path("/proc/self/clear_refs")  # Linux: writing 5 resets the peak to the current value
STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Check:
    """The largest absolute difference of two results, and whether particles have the same ancestors."""

    difference: float
    limit: float
    same_ancestors: bool = True

    @property
    def passed(self) -> bool:
        """Whether the two results are the same."""
        return self.difference <= self.limit and self.same_ancestors


def compare(first: Any, second: Any, limit: float) -> Check:
    """Compare two results tensor by tensor: ancestors, which are integers, exactly, other tensors within the limit."""
    pairs = list(zip(tree_leaves(first), tree_leaves(second), strict=True))
    ancestors = [torch.equal(a, b) for a, b in pairs if not a.is_floating_point()]
    return Check(max(difference(a, b) for a, b in pairs if a.is_floating_point()), limit, all(ancestors))


def difference(first: Tensor, second: Tensor) -> float:
    """Return the largest absolute difference; infinite if the shapes differ."""
    if first.shape != second.shape:
        return float("inf")
    return (first.float() - second.float()).abs().max().item() if first.numel() else 0.0


@dataclass(frozen=True)
class Variant:
    """One side of a comparison: each call of `run` does the same work and returns the same result.

    counted  whether FLOPs may be counted: counting would recompile a compiled denoiser
    """

    name: str
    run: Callable[[], Any]
    counted: bool = True


@dataclass(frozen=True)
class PreparedComparison:
    """A comparison that is ready to run: seconds of `over` / seconds of `under`.

    samples  number of images, or of samples to learn from, that one run of a variant makes
    check    compares the results of both variants
    """

    over: Variant
    under: Variant
    samples: int
    check: Callable[[Any, Any], Check] | None = None


@dataclass
class Measurement:
    """Measurements of a variant.

    seconds  wall time of each repeat
    cpu      seconds of this process's threads in each repeat: less disturbed by other load
    peak     maximum of bytes above those before the call; None if the system does not report them
    flops    FLOPs of one run (a multiplication and an addition are two); 0 if they are not counted
    """

    name: str
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    peak: int | None = None
    flops: int = 0


@dataclass(frozen=True)
class RepeatPolicy:
    """Rule to repeat until `seconds` are over, `least` to `most` times."""

    seconds: float
    least: int = 3
    most: int = 15


def seconds_of(run: Callable[[], Any]) -> tuple[float, float]:
    """Return seconds of one run and of its threads, by PyTorch's clock, which waits for the accelerator.

    `torch.utils.benchmark.Timer` itself runs twice before each measured run, and cannot take turns with another.
    """
    wall, cpu = timer(), time.process_time()
    run()
    return timer() - wall, time.process_time() - cpu


def measure(
    opened: PreparedComparison,
    measurements: tuple[Measurement, Measurement],
    device: torch.device,
    policy: RepeatPolicy,
) -> tuple[Any, Any]:
    """Run each variant once to warm up, then in turns A B A B …, then once each to count bytes and FLOPs.

    Each measurement is added immediately, so that it is kept after an interruption. Returns the results.
    """
    variants, started = (opened.over, opened.under), time.perf_counter()
    results = tuple(variant.run() for variant in variants)
    gc.collect()
    repeats, last = 0, 0.0
    # The time of one more turn is reserved for the run that counts.
    while repeats < policy.least or (
        repeats < policy.most and time.perf_counter() - started + 2 * last < policy.seconds
    ):
        turn = [seconds_of(variant.run) for variant in variants]
        for measured, (seconds, cpu) in zip(measurements, turn, strict=True):
            measured.seconds.append(seconds)
            measured.cpu.append(cpu)
        repeats, last = repeats + 1, sum(seconds for seconds, _ in turn)
    for variant, measured in zip(variants, measurements, strict=True):
        counter = FlopCounterMode(display=False) if variant.counted else None
        with counter or nullcontext():
            measured.peak = peak_of(variant.run, device)
        measured.flops = counter.get_total_flops() if counter else 0
    return results[0], results[1]


def peak_of(run: Callable[[], Any], device: torch.device) -> int | None:
    """Run, and return the maximum of bytes above those before; None if the system does not report them."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    known = reset_peak()
    before = _status("VmRSS") if known else 0
    run()
    return max(0, _status("VmHWM") - before) if known else None  # the kernel's current value is a page off


def reset_peak() -> bool:
    """Give free memory back to the system and reset its peak; False if the system cannot."""
    if sys.platform != "linux":
        return False
    name = ctypes.util.find_library("c")
    trim = getattr(ctypes.CDLL(name), "malloc_trim", None) if name else None
    if trim is not None:
        trim(0)  # else a run would reuse an earlier run's memory, and seem to need none
    try:
        PEAK_RESET.write_text("5")
    except OSError:
        return False
    return True


def _status(name: str) -> int:
    """Return the bytes in one line of this process's status."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
