"""The runs of `steer bench`: subject after subject, comparison after comparison, on disk after each."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch._dynamo.exc import TorchDynamoException

from steer.apps.bench.ceilings import ceilings
from steer.apps.bench.clock import Check, Measured, Pace, measure
from steer.apps.bench.comparisons import COMPARISONS, Comparison
from steer.apps.bench.predict import Predicted
from steer.apps.bench.report import Json, described, outcome, write
from steer.apps.bench.subject import Subject
from steer.errors import InputError

Say = Callable[[str], None]
FIRST = 4  # comparisons that are measured at least once, even when the time is over


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
        self.report = described(device, self.quick, self.seconds)
        write(self.report, self.file)
        if self.report["note"]:
            self.say(self.report["note"])
        started = time.perf_counter()
        for number, (name, make) in enumerate(subjects):
            # What there is left is shared equally by the subjects that are to come.
            left = self.seconds - (time.perf_counter() - started)
            with self._kept():
                self._measure_all(make(), "" if number == 0 else f"{name}: ", left / (len(subjects) - number))
        self.report["complete"] = True
        write(self.report, self.file)
        return self.report

    @contextmanager
    def _kept(self) -> Iterator[None]:
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
            if reason is None and left <= 0 and number >= FIRST:
                reason = "no time left: give it more --seconds"
            if reason is None:
                share = max(left, 0.0) / (len(names) - number)
                pace = Pace(share, self.least if left > 0 else 1, self.most)
                reason = self._measure(subject, prefix + name, comparison, pace)
            if reason is not None:
                self.report["skipped"][prefix + name] = reason
                self.say(f"{prefix + name}: not measured ({reason})")
            write(self.report, self.file)
        self.report["ceilings"][subject.name] = ceilings(subject, self.quick)

    def _measure(self, subject: Subject, name: str, comparison: Comparison, pace: Pace) -> str | None:
        """One comparison; why it could not be measured, if so."""
        self.say(f"{name} … {comparison.about}")
        found: tuple[Measured, Measured] | None = None
        check: Check | None = None
        predicted: Predicted | None = None
        try:
            with comparison.open(subject) as opened:
                found = Measured(opened.over.name), Measured(opened.under.name)
                results = measure(opened, found, subject.kinds, subject.device, pace)
                check = opened.check and opened.check(*results)
            predicted = comparison.predict(subject)(*found)
        except (InputError, torch.OutOfMemoryError, TorchDynamoException) as error:
            return " ".join(str(error).split())[:300] or type(error).__name__
        finally:
            if found is not None and all(measured.seconds for measured in found):
                outcome(self.report, name, comparison.about, comparison.samples(subject), found, check, predicted)
        ratio = self.report["ratios"][name]
        self.say(f"  {ratio:.3f}" + ("" if check is None or check.passed else f"  NOT THE SAME: {asdict(check)}"))
        return None
