"""Run the checks on cases of the zoo and write the matrix: `python -m zoo.matrix OUT.json [CASE …]` in tests/."""

import dataclasses
import json
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

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


def main() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    diffusers.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    signal.signal(signal.SIGPROF, _alarm)
    out, *words = sys.argv[1:]
    checks = [word for word in words if word in CHECKS] or list(CHECKS)
    names = [word for word in words if word in CASES] or list(CASES)  # in the order given
    path = Path(out)
    rows = json.loads(path.read_text()) if path.exists() else {}
    for name in names:
        start = time.monotonic()
        row = row_of(name, checks)
        if "build" in row:  # this environment lacks a class of it: what was recorded elsewhere stays
            sys.stdout.write(f"{name:45} {row['build']['reason']}\n")
            continue
        rows[name] = rows.get(name, {}) | row
        path.write_text(one_line_each(rows))
        states = " ".join(f"{check}={one['state']}" for check, one in rows[name].items())
        sys.stdout.write(f"{name:45} {time.monotonic() - start:5.1f}s {states}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
