"""One visitor's way through the lots: the one that is shown, and the next, which is drawn while they look."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from steer.apps.demo.labels import LabelBook, Wish
from steer.apps.demo.steering import Loading
from steer.apps.demo.worker import Busy, Ticket
from steer.errors import InputError
from steer.pipelines.choice_files import Lot

TIE, BAD, UNDO = "tie", "bad", "undo"
SAVED = {TIE: "Saved: a tie.", BAD: "Saved: all bad."}
STALE = ""  # nothing to say of an answer to what is no longer shown


@dataclass(frozen=True)
class Drawing:
    """So many images are being drawn."""

    images: int

    def __str__(self) -> str:
        return f"Drawing {self.images} images …"


class Labelling:
    """What an annotator is shown and answers; threads may use it at once.

    model   its name
    submit  takes a job to the worker, as `Worker.submit`
    lend    gives the pipeline to a job
    """

    def __init__(
        self,
        book: LabelBook,
        wish: Wish,
        model: str,
        submit: Callable[[Callable[[Ticket], None]], Ticket],
        lend: Callable[[str], AbstractContextManager[Any]],
    ) -> None:
        self.book, self.wish, self.model = book, wish, model
        self.shown: Lot | None = None
        self.ended = False
        self._submit, self._lend = submit, lend
        self._next: list[Lot] = []
        self._ticket: Ticket | None = None
        self._lock = threading.RLock()

    def advance(self) -> Iterator[Any]:
        """Shows a lot, where none is shown; yields what there is to say while it is drawn. Left early, it stops that.

        Raises InputError where it cannot be drawn, or too many wait.
        """
        if self._step(must=True):
            return
        if (ticket := self._ticket) is not None:
            yield from ticket.events()
        self._step(must=False)

    def _step(self, must: bool) -> bool:
        """Shows the next lot if it is there, and sees to the one after it; whether one is shown, or none will be.

        must  say so where too many wait; else it is tried again when a lot is needed
        """
        with self._lock:
            if not self.ended:
                self._find(must and self.shown is None)
            if self.shown is None and self._next:
                self.shown = self._next.pop(0)
                self._find(False)
            return self.ended or self.shown is not None

    @property
    def _drawing(self) -> bool:
        return self._ticket is not None and not self._ticket.future.done()

    def _find(self, must: bool) -> None:
        """Sees to it that there is a next lot, or that one is being drawn."""
        if self._next or self._drawing:
            return
        if (found := self.book.offer(self.wish)) is not None:
            self._next.append(found)
            return
        try:
            self._ticket = self._submit(self._draw)
        except Busy:
            if must:
                raise

    def _draw(self, ticket: Ticket) -> None:
        ticket.say(Loading(self.model))
        with self._lend(self.model) as pipe:
            ticket.say(Drawing(self.wish.images))
            lot = self.book.draw(pipe, self.wish, ticket.check)
        with self._lock:
            self._next.append(lot)
            if self.ended:
                self.end()

    def answer(self, lot: str, answer: str) -> str:
        """Takes an answer to what is shown: the number of an image, tie, bad or undo. Returns what is to be said.

        lot  that was shown when they answered, or nothing; the answer to another than is shown is left out
        Raises InputError for what is no answer, and where it could not be recorded.
        """
        with self._lock:
            if self.ended or lot != (self.shown.id if self.shown else ""):
                return STALE
            if answer == UNDO:
                return self._undo()
            if self.shown is None:
                return STALE
            said = self._recorded(self.shown, answer)
            self.shown = None
            return said

    def _recorded(self, lot: Lot, answer: str) -> str:
        numbers = {str(number): number for number in range(len(lot.rows))}
        if answer in SAVED:
            self.book.tie(self.wish.annotator, lot.id, bad=answer == BAD)
            return SAVED[answer]
        if answer not in numbers:
            raise InputError(f"{answer!r:.40} is no answer: choose one of the {len(numbers)} images")
        self.book.choose(self.wish.annotator, lot.id, numbers[answer])
        return f"Saved: {name_of(numbers[answer], len(numbers))}."

    def _undo(self) -> str:
        taken = self.book.undo(self.wish.annotator)
        if taken is None:
            return "There is nothing to take back."
        self._next[:0] = [] if self.shown is None else [self.shown]
        self.shown = taken
        return "Taken back: choose again."

    def end(self) -> None:
        """Stops drawing, and gives back what was not judged."""
        with self._lock:
            self.ended = True
            if self._ticket is not None:
                self._ticket.stop()
            self.book.release(self.wish.annotator, [*self._next, *([self.shown] if self.shown else [])])
            self._next, self.shown = [], None


def name_of(number: int, images: int) -> str:
    """What an image of so many is called: left or right, or by its number."""
    return ("left", "right")[number] if images == 2 else f"image {number + 1}"
