"""Figures of the hard tests: out/reliability.json, from which docs/reliability.md is filled.

python tests/hard/reliability.py    prints the table
"""

import fcntl
import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve().parents[2] / "out" / "reliability.json"


@dataclass
class Tally:
    """Counts of trials and of their outcomes.

    survived  the earlier or the new content is read unchanged, or the input is refused with a one-line message
    lost      the earlier content is gone, or a wrong value is read
    outcomes  counts by kind
    """

    tries: int = 0
    survived: int = 0
    lost: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)

    def count(self, kind: str, good: bool = True) -> None:
        """Add one trial."""
        self.tries += 1
        self.survived += good
        self.lost += not good
        self.outcomes[kind] = self.outcomes.get(kind, 0) + 1

    def note(self, name: str) -> None:
        """Add the counts to out/reliability.json."""
        note(name, asdict(self))


def note(name: str, figures: dict[str, Any]) -> None:
    """Add figures to out/reliability.json."""
    FILE.parent.mkdir(parents=True, exist_ok=True)
    with FILE.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of the other workers; released when the file is closed
        known = json.loads(FILE.read_text()) if FILE.exists() else {}
        FILE.write_text(json.dumps(dict(sorted((known | {name: figures}).items())), indent=1) + "\n")


def table() -> str:
    """Figures as two Markdown tables: counts of trials, then measurements."""
    tried = ["| what | tries | survived | lost | how |", "|---|---|---|---|---|"]
    measured = ["| what | figures |", "|---|---|"]
    for name, one in json.loads(FILE.read_text()).items():
        if {"tries", "survived", "lost", "outcomes"} <= one.keys():
            how = ", ".join(f"{kind} {count:,}" for kind, count in sorted(one["outcomes"].items()))
            tried.append(f"| {name} | {one['tries']:,} | {one['survived']:,} | {one['lost']:,} | {how} |")
        else:
            measured.append(f"| {name} | {', '.join(f'{what} {value:,}' for what, value in one.items())} |")
    return "\n".join([*tried, "", *measured])


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
