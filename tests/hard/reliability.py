"""Figures of the hard tests: out/reliability.json, from which docs/reliability.md is filled.

python tests/hard/reliability.py    prints the table
"""

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve().parents[2] / "out" / "reliability.json"


@dataclass
class Tally:
    """How often something was tried, and what came of it.

    survived  what was there before, or what was being written, is read as it was; or the input was refused in a line
    lost      what was there before is gone, or something wrong is read
    outcomes  counts by kind
    """

    tries: int = 0
    survived: int = 0
    lost: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)

    def count(self, kind: str, good: bool = True) -> None:
        """One more try."""
        self.tries += 1
        self.survived += good
        self.lost += not good
        self.outcomes[kind] = self.outcomes.get(kind, 0) + 1

    def note(self, name: str) -> None:
        """Writes it among the figures of the other tests."""
        note(name, asdict(self))


def note(name: str, figures: dict[str, Any]) -> None:
    """Writes figures among those of the other tests."""
    FILE.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    FILE.write_text(json.dumps(dict(sorted((known | {name: figures}).items())), indent=1) + "\n")


def table() -> str:
    """The figures as the page shows them: what was tried, and then what was measured."""
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
