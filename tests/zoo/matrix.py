"""Run the checks on cases of the zoo and write the matrix: `python -m zoo.matrix zoo/matrix.json` in tests/.

The file is written after each case, and other outcomes in it stay: run a part with CASE … and --checks CHECK …, and
what is not recorded yet, or was interrupted, with --missing.
"""

import argparse
import dataclasses
import json
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from steer.files import write_text
from steer.pipelines.compatibility import CHECKS, Outcome, PipelineCheck
from zoo.build import CASES, build, call_of

LIMIT = 150  # seconds of one check on the processor


class _OutOfTime(BaseException):
    pass


def _alarm(*_: object) -> None:
    raise _OutOfTime


def row_of(name: str, checks: list[str]) -> dict[str, dict[str, str]]:
    """Run the checks of one case."""
    row: dict[str, Any] = {}
    try:
        pipe = build(name)
    except Exception as error:  # noqa: BLE001  # reported in the matrix
        return {"build": {"state": "traceback", "reason": f"{type(error).__name__}: {error}".splitlines()[0]}}
    pipeline_check = PipelineCheck(pipe, call_of(name))
    for check in checks:
        signal.setitimer(signal.ITIMER_PROF, LIMIT)
        try:
            row |= pipeline_check.row([check])
        except _OutOfTime:
            row[check] = Outcome("traceback", f"took more than {LIMIT} s")
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    return {check: dataclasses.asdict(outcome) for check, outcome in row.items()}


def one_line_each(rows: dict[str, Any]) -> str:
    """Return the matrix as JSON with one line for each pipeline, in the order of their names."""
    lines = [f"{json.dumps(name)}: {json.dumps(rows[name], sort_keys=True)}" for name in sorted(rows)]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def parts(
    rows: Mapping[str, Any], names: Sequence[str], checks: Sequence[str], missing: bool
) -> Iterator[tuple[str, list[str]]]:
    """Yield the cases with the checks to run: all of them, or those without an outcome."""
    for name in names:
        own = [check for check in checks if not (missing and check in rows.get(name, {}))]
        if own:
            yield name, own


def arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(prog="python -m zoo.matrix", description=__doc__)
    parser.add_argument("out", type=Path, help="the matrix")
    parser.add_argument("cases", nargs="*", metavar="CASE", help="cases to run; by default all")
    parser.add_argument("--checks", nargs="+", choices=CHECKS, default=list(CHECKS), help="by default all")
    parser.add_argument("--missing", action="store_true", help="run only checks without an outcome in the matrix")
    given = parser.parse_args()
    if unknown := [name for name in given.cases if name not in CASES]:
        parser.error(f"unknown case {unknown[0]}: use names of zoo/cases.json")
    return given


def main() -> None:
    given = arguments()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    diffusers.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    signal.signal(signal.SIGPROF, _alarm)
    rows = json.loads(given.out.read_text()) if given.out.exists() else {}
    for name, checks in parts(rows, given.cases or list(CASES), given.checks, given.missing):
        start = time.monotonic()
        row = row_of(name, checks)
        if "build" in row:  # this environment lacks a class of it: what was recorded elsewhere stays
            sys.stdout.write(f"{name:45} {row['build']['reason']}\n")
            continue
        rows[name] = rows.get(name, {}) | row
        write_text(given.out, one_line_each(rows))
        states = " ".join(f"{check}={one['state']}" for check, one in row.items())
        sys.stdout.write(f"{name:45} {time.monotonic() - start:5.1f}s {states}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
