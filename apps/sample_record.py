"""What `steer sample` has on disk of a run: report.json and, of several processes, finished/ until it is merged.

Each process writes an entry for each prompt that it finishes, whole, to a file of its own, so that none waits for
another and a killed run loses nothing. The next run, of any number of processes, reads them all.
"""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from steer.apps.sample_settings import SampleSettings
from steer.apps.system_errors import refusal
from steer.errors import InputError
from steer.pipelines import Cost
from steer.staged import write_text
from steer.sums import summed, unsummed

Report = dict[str, Any]
Entry = dict[str, Any]
REPORT, FINISHED = "report.json", "finished"
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


@dataclass(frozen=True)
class Record:
    """The entries of the prompts that are finished, by their number in the list.

    told  what report.json says beside them: model, method, settings
    """

    out: Path
    told: Report
    entries: dict[int, Entry]

    def missing(self, count: int, animation: bool) -> list[int]:
        """The numbers, of `count` prompts, whose entry or one of whose files is not there, or cut off."""
        return [n for n in range(count) if not _whole(self.entries.get(n, {}), self.out, animation)]

    def keep(self, number: int, entry: Entry, alone: bool) -> None:
        """Writes the entry of a finished prompt: to report.json where this process is alone, else beside it."""
        self.entries[number] = entry
        part = self.out / FINISHED / f"{number:05d}.json"
        if alone:
            self.save()
            part.unlink(missing_ok=True)
        else:
            write_text(part, summed(self.told | {"number": number, "prompts": [entry]}))

    def save(self) -> Report:
        """Writes report.json, as far as no prompt is missing in between, and returns it."""
        entries: list[Entry] = []
        while len(entries) in self.entries:
            entries.append(self.entries[len(entries)])
        report = self.told | {"prompts": entries, "cost": total_cost(entries)}
        write_text(self.out / REPORT, summed(report))
        return report

    def merged(self, count: int) -> Report:
        """The report of all `count` prompts, on disk too, where there is now no other record of them.

        Raises InputError where one is not there.
        """
        self.entries.update(_finished(self.out, self.told["settings"]))
        report = self.save()
        if len(report["prompts"]) < count:
            raise InputError(
                f"--out {self.out} lacks prompt {len(report['prompts']) + 1} of {count}: processes on several machines "
                "need one folder that all of them see"
            )
        shutil.rmtree(self.out / FINISHED, ignore_errors=True)
        return report


def open_record(
    out: Path, prompts: Sequence[str], settings: SampleSettings, columns: Sequence[Mapping[str, Any]] = ()
) -> Record:
    """The record in `out` as far as it got, or a new one.

    columns  of each prompt's row
    Raises InputError where the folder cannot take this run.
    """
    check_writable(out)
    path = out / REPORT
    given = asdict(settings)
    told: Report = {"model": settings.model, "method": settings.method}
    entries: dict[int, Entry] = {}
    if path.exists():
        old = _read(path, out, given)
        told |= {name: value for name, value in old.items() if name not in ("prompts", "cost")}
        entries.update(enumerate(old["prompts"]))
    entries.update(_finished(out, given))
    for number, entry in entries.items():
        if number >= len(prompts) or not isinstance(entry, dict) or entry.get("prompt") != prompts[number]:
            raise InputError(f"--out {out} holds a run of other prompts; choose another --out")
        if (dict(columns[number]) if columns else {}) != entry.get("columns", {}):
            raise InputError(f"--out {out} holds a run with other columns of prompt {number + 1}; choose another --out")
        if not _is_entry(entry):
            raise InputError(f"--out {out}: prompt {number + 1} in its report is none of steer; choose another --out")
    return Record(out, told | {"settings": given}, entries)


def check_writable(out: Path) -> None:
    """Makes the folder. Raises InputError where nothing can be written to it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / ".writable", "")
        (out / ".writable").unlink()
    except OSError as error:
        raise InputError(f"--out {out}: cannot write there ({error.strerror})") from error


@contextmanager
def writing_to(out: Path) -> Iterator[None]:
    """What the disk refuses inside ends as an InputError that names the folder."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"--out {out}: {refusal(error)}; finished prompts are kept, the same command goes on"
        ) from error


def total_cost(entries: Sequence[Entry]) -> dict[str, float]:
    """Over all prompts; older entries count no gradients."""
    return {cost.name: sum(entry["cost"].get(cost.name, 0) for entry in entries) for cost in fields(Cost)}


def _finished(out: Path, given: Mapping[str, Any]) -> dict[int, Entry]:
    """Entries that are not merged yet. Raises InputError for those of another run."""
    found: dict[int, Entry] = {}
    for path in sorted((out / FINISHED).glob("*.json")):
        part = _read(path, out, given)
        if type(number := part.get("number")) is not int or len(part["prompts"]) != 1:
            raise InputError(f"{path} is not a report of steer; choose another --out")
        found[number] = part["prompts"][0]
    return found


def _read(path: Path, out: Path, given: Mapping[str, Any]) -> Report:
    """A report in `out`, or one of a single prompt. Raises InputError where it is none, or of other settings."""
    try:
        old = unsummed(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--out {out}: cannot read {path.name} ({error.strerror})") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a report of steer ({error}); choose another --out") from error
    if not (isinstance(old, dict) and isinstance(old.get("settings"), dict) and isinstance(old.get("prompts"), list)):
        raise InputError(f"{path} is not a report of steer; choose another --out")
    younger = {one.name: one.default for one in fields(SampleSettings) if one.default is not MISSING}
    for name, value in given.items():
        if (there := (younger | old["settings"]).get(name)) != value:
            raise InputError(
                f"--out {path.parent} holds a run with {name} {there!r}, not {value!r}; choose another --out"
            )
    return old


def _is_entry(entry: Entry) -> bool:
    """Whether what is read of it here has the kinds that steer writes."""
    base, cost = entry.get("base", {}), entry.get("cost")
    if not isinstance(base, dict) or not isinstance(cost, dict):
        return False
    lists = (entry.get("images", []), base.get("images", []))
    return all(isinstance(one, list) for one in lists) and all(type(one) in (int, float) for one in cost.values())


def _whole(entry: Entry, out: Path, animation: bool) -> bool:
    """Whether all files of an entry are there to their ends, inside the output folder."""
    names = [*entry.get("images", [None]), *entry.get("base", {}).get("images", [])]
    names += [entry["noise"]] if "noise" in entry else []
    names += [entry.get("animation")] if animation else []
    return all(isinstance(name, str) and ".." not in name and _ends(out / name) for name in names)


def _ends(path: Path) -> bool:
    """Whether a file is there, and a PNG to its end, which a power cut or a broken copy may have taken."""
    if not os.path.isfile(path) or not path.stat().st_size:  # which a name that is too long is not, to Path an error
        return False
    with path.open("rb") as file:
        file.seek(-min(len(PNG_END), path.stat().st_size), os.SEEK_END)
        return path.suffix != ".png" or file.read() == PNG_END
