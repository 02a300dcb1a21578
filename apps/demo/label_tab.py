"""The Label tab: annotators choose between images of one prompt."""

import hashlib
import math
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from html import escape
from itertools import combinations, count
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.context import Context

from steer.apps.demo.image_labels import ImageLabelStore, ImagePair, write_images
from steer.apps.demo.label_learning import LabelLearning
from steer.apps.demo.labels import (
    ARCHIVE_FOLDER,
    IMAGES,
    LONGEST_NAME,
    RUN,
    AnswerStore,
    LabelRequest,
    LabelStore,
    command_of,
    goal_text,
    label_folder,
    storage_notice,
    write_label_zip,
)
from steer.apps.demo.pictures import data_uri
from steer.apps.demo.steering import Loading
from steer.apps.demo.studio import (
    PRIVATE,
    RUNS,
    Busy,
    Change,
    JobTab,
    Studio,
    Ticket,
    line,
    plural,
    prompts_in,
    public,
)
from steer.apps.errors import wrap_errors
from steer.apps.prompts import load_prompts
from steer.apps.scenes.preferences import CHOICES_CALL as CALL
from steer.assets import MODELS
from steer.errors import InputError
from steer.pipelines.training.preference_files import SampleGroup, file_inside

TIE, BAD, UNDO, SKIP = "tie", "bad", "undo", "skip"
SAVED = {TIE: "Saved: a tie.", BAD: "Saved: all bad."}
Group = SampleGroup | ImagePair
NO_MESSAGE = ""  # message for an answer to a group that is no longer shown


@dataclass(frozen=True)
class Drawing:
    """An event: images are being sampled."""

    images: int

    def __str__(self) -> str:
        return f"Sampling {self.images} images …"


class LabelSession:
    """The groups of images that an annotator sees and answers; thread-safe.

    model   name of the model
    submit  submits a job to the worker, as `Worker.submit` does
    lend    a context that yields the pipeline to a job
    """

    def __init__(
        self,
        store: AnswerStore,
        label_request: LabelRequest,
        model: str,
        submit: Callable[[Callable[[Ticket], None]], Ticket],
        lend: Callable[[str], AbstractContextManager[Any]],
    ) -> None:
        self.store, self.label_request, self.model = store, label_request, model
        self.shown: Group | None = None
        self.ended = False
        self._submit, self._lend = submit, lend
        self._next: list[Group] = []
        self._ticket: Ticket | None = None
        self._lock = threading.RLock()

    def advance(self) -> Iterator[Any]:
        """Show the next group; yields events while it is sampled. Closing the iterator early stops the sampling.

        Raises InputError if the group cannot be sampled, or if too many jobs wait.
        """
        if self._step(must=True):
            return
        if (ticket := self._ticket) is not None:
            yield from ticket.events()
        self._step(must=False)

    def _step(self, must: bool) -> bool:
        """Show the next group if there is one, and prepare another. Returns whether one is shown, or none will be.

        must  raise Busy if too many jobs wait; else the next call tries again
        """
        with self._lock:
            if not self.ended:
                self._find(must and self.shown is None)
            if self.shown is None and self._next:
                self.shown = self._next.pop(0)
                self._find(False)
            return self.ended or self.shown is not None

    def _find(self, must: bool) -> None:
        """Offer a stored group, or start to sample one."""
        if self._next or (self._ticket is not None and not self._ticket.future.done()):
            return
        if (offered := self.store.offer(self.label_request)) is not None:
            self._next.append(offered)
            return
        if not isinstance(self.store, LabelStore):
            if must:
                raise InputError("Every pair that is yours has an answer: thank you. Stop ends this list.")
            return
        try:
            self._ticket = self._submit(self._draw)
        except Busy:
            if must:
                raise

    def _draw(self, ticket: Ticket) -> None:
        ticket.say(Loading(self.model))
        assert isinstance(self.store, LabelStore), "it samples"
        kept, hint = "the answers are kept", "fewer images at a time need less"
        with wrap_errors("sampling", kept, hint), self._lend(self.model) as pipe:
            ticket.say(Drawing(self.label_request.images))
            group = self.store.draw(pipe, self.label_request, ticket.check)
        with self._lock:
            self._next.append(group)
            if self.ended:
                self.end()

    def answer(self, group: str, answer: str) -> str:
        """Record an answer: the number of an image, tie, bad or undo. Returns a message.

        group  the group shown when the annotator answered, or ""; an answer to a group no longer shown is ignored
        Raises InputError for an unknown answer, and if the answer cannot be recorded.
        """
        with self._lock:
            if self.ended or group != (self.shown.id if self.shown else ""):
                return NO_MESSAGE
            if answer == UNDO:
                return self._undo()
            if self.shown is None:
                return NO_MESSAGE
            if answer == SKIP:
                self.store.skip(self.label_request.annotator, self.shown.id)
                message = "Skipped: left to others."
            else:
                message = self._recorded(self.shown, answer)
            self.shown = None
            return message

    def _recorded(self, group: Group, answer: str) -> str:
        count = len(group.files) if isinstance(group, ImagePair) else len(group.rows)
        numbers = {str(number): number for number in range(count)}
        if answer in SAVED:
            self.store.tie(self.label_request.annotator, group.id, bad=answer == BAD)
            return SAVED[answer]
        if answer not in numbers:
            raise InputError(f"{answer!r:.40} is not an answer: choose one of the {len(numbers)} images")
        self.store.choose(self.label_request.annotator, group.id, numbers[answer])
        return f"Saved: {name_of(numbers[answer], len(numbers))}."

    def _undo(self) -> str:
        taken = self.store.undo(self.label_request.annotator)
        if taken is None:
            return "There is nothing to undo."
        self._next[:0] = [] if self.shown is None else [self.shown]
        self.shown = taken
        return "Undone: choose again."

    def end(self) -> None:
        with self._lock:
            self.ended = True
            if self._ticket is not None:
                self._ticket.stop()
            self.store.release(self.label_request.annotator, [*self._next, *([self.shown] if self.shown else [])])
            self._next, self.shown = [], None


def name_of(number: int, images: int) -> str:
    """Return the name of an image: left or right for two images, else its number."""
    return ("left", "right")[number] if images == 2 else f"image {number + 1}"


IDLE_TEXT = "Say who you are and press Start: the images to choose between appear here."
ARROWS = ("←", "→")


def group_view(turn: int, group: str, prompt: str, pictures: Sequence[bytes]) -> str:
    """Return the view of two to four images side by side.

    turn      a different number for each view, so that the page updates it
    group     name of the group, returned with the answer
    pictures  PNG files
    """
    count = len(pictures)
    figures = "".join(_figure(number, count, prompt, picture) for number, picture in enumerate(pictures))
    none, better = ("Both bad", "better") if count == 2 else ("All bad", "best")
    words = ((TIE, "Tie", "T"), (BAD, none, "B"), (SKIP, "Skip", "S"), (UNDO, "Undo", "U"))
    rest = "".join(_button(*one) for one in words)
    zoom = '<button type="button" data-zoom aria-keyshortcuts="Z">Zoom <kbd aria-hidden="true">Z</kbd></button>'
    return (
        f'<section class="steer-label" data-turn="{turn}" data-group="{escape(group, quote=True)}" tabindex="-1" '
        f'aria-label="{count} images to choose between">'
        f'<p class="steer-asked">Which is the {better} image of <q>{escape(prompt)}</q>?</p>'
        f'<div class="steer-group steer-group-{count}">{figures}</div>'
        f'<div class="steer-answers">{rest}{zoom}</div></section>'
    )


def empty_view(turn: int, text: str = IDLE_TEXT, undo: bool = False) -> str:
    """Return a view without images that gives the reason, with a button if the last answer can be undone."""
    button = f'<div class="steer-answers">{_button(UNDO, "Undo", "U")}</div>' if undo else ""
    return (
        f'<section class="steer-label" data-turn="{turn}" data-group="">'
        f'<p class="steer-empty">{escape(text)}</p>{button}</section>'
    )


def _figure(number: int, count: int, prompt: str, picture: bytes) -> str:
    name = name_of(number, count).capitalize()
    alt = escape(f"{name}, of: {prompt}", quote=True)
    key = ARROWS[number] if count == 2 else str(number + 1)
    image = f'<img src="{data_uri(picture)}" alt="{alt}" data-image="{number}">'
    return f"<figure>{image}{_button(str(number), name, key)}</figure>"


def _button(answer: str, text: str, key: str) -> str:
    shortcut = "ArrowLeft" if key == "←" else "ArrowRight" if key == "→" else key
    return (
        f'<button type="button" data-answer="{answer}" aria-keyshortcuts="{shortcut}">'
        f'{text} <kbd aria-hidden="true">{key}</kbd></button>'
    )


NO_AGREEMENT_TEXT = "How far people agree shows once two of them have judged the same images."


@dataclass(frozen=True)
class Agreement:
    """Agreement of annotators on the groups that two or more of them answered.

    annotators  their names
    share       share of equal answers among all pairs of answers to one group, 0..1
    kappa       Cohen's κ of two annotators, Fleiss' κ of more, at most 1; NaN if chance alone would agree
    """

    annotators: tuple[str, ...]
    groups: int
    share: float
    kappa: float

    def __str__(self) -> str:
        people = len(self.annotators)
        who = "both of two people" if people == 2 else f"two or more of {people} people"
        sets = "set of images was" if self.groups == 1 else "sets of images were"
        description = f"{self.groups} {sets} judged by {who}. They gave the same answer {self.share:.0%} of the time"
        name = "Cohen's" if people == 2 else "Fleiss'"
        kappa = "" if math.isnan(self.kappa) else f"; {name} κ = {self.kappa:.2f}, where 0 is chance and 1 is always"
        return f"{description}{kappa}."


def agreement(judgements: Mapping[str, Mapping[str, Hashable]]) -> Agreement | None:
    """Measure the agreement of answers by group and annotator; None while no group has two."""
    several = [given for given in judgements.values() if len(given) > 1]
    if not several:
        return None
    names = tuple(sorted({name for given in several for name in given}))
    pairs = [pair for given in several for pair in combinations(given.values(), 2)]
    share = sum(a == b for a, b in pairs) / len(pairs)
    if len(names) == 2:
        return Agreement(names, len(several), share, cohen([(given[names[0]], given[names[1]]) for given in several]))
    return Agreement(names, len(several), share, fleiss([list(given.values()) for given in several]))


def cohen(pairs: Sequence[tuple[Hashable, Hashable]]) -> float:
    """Return κ = (p_o − p_e) / (1 − p_e), p_e = Σ_c p_1(c) p_2(c) from two annotators' own shares (Cohen 1960)."""
    count = len(pairs)
    p_o = sum(a == b for a, b in pairs) / count
    first, second = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    p_e = sum(first[c] * second[c] for c in first) / count**2
    return (p_o - p_e) / (1 - p_e) if p_e < 1 else math.nan


def fleiss(rows: Sequence[Sequence[Hashable]]) -> float:
    """Return κ = (P − p_e) / (1 − p_e), p_e = Σ_c p(c)² from the shares of all judgements (Fleiss 1971).

    rows  the answers to each group, two or more; P is the mean over groups of the share of equal pairs
    """
    counts = [Counter(row) for row in rows]
    alike = [
        sum(n * (n - 1) for n in count.values()) / (len(row) * (len(row) - 1))
        for count, row in zip(counts, rows, strict=True)
    ]
    total = sum(map(len, rows))
    p_e = sum((n / total) ** 2 for n in sum(counts, Counter[Hashable]()).values())
    return (sum(alike) / len(alike) - p_e) / (1 - p_e) if p_e < 1 else math.nan


FOLDER = Path(__file__).parent
OTHER_CALL = {"num_inference_steps": 20, "guidance_scale": 5.0}  # call of models that are not embedded, as in d3po-sdxl
PROMPTS = "scenes-training"
MAX_PROMPTS = 200
LOADING_TEXT, STOPPED_TEXT = "The next images are being sampled.", "Stopped. All your choices are saved."


class LabelTab(JobTab):
    """The components and their events. All annotators see images of the studio's first model.

    Create it inside the app's Blocks. Raises InputError for a corrupt folder of preferences.
    """

    def __init__(self, studio: Studio) -> None:
        self.studio, self.model = studio, studio.models[0]
        self.store: AnswerStore
        if studio.label_images is not None:
            self.store = ImageLabelStore(studio.label_images, label_folder(studio))
        else:
            self.store = LabelStore(label_folder(studio), CALL if self.model in MODELS else OTHER_CALL)
        self._lock = threading.Lock()
        self._visitors: dict[str, LabelSession] = {}
        self._runs: dict[str, ImageLabelStore] = {}  # stores of images of the history, by the visitor who labels them
        self._turns = count()
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=280):
                self._form()
            with gr.Column(scale=3, min_width=300):
                self.status = gr.HTML(line("Ready."), elem_id="label-status")
                self.view = gr.HTML(
                    empty_view(next(self._turns)),
                    js_on_load=(FOLDER / "label_view.js").read_text(),
                    css_template=(FOLDER / "label_view.css").read_text(),
                    elem_id="label-view",
                )
                self.progress = gr.HTML(elem_id="label-progress")
                self.learning = LabelLearning(studio)
                self._place()
        self._connect()

    def _form(self) -> None:
        self.name = gr.Textbox(
            label="Your name", max_length=LONGEST_NAME, info="It is kept with your choices.", elem_id="label-name"
        )
        empty = "Left empty: simple scenes." if self.model in MODELS else ""
        sampled = self.studio.label_images is None
        self.prompts = gr.Textbox(
            label="Prompts",
            lines=3,
            info=f"One a line, kept with the images. {empty}",
            elem_id="label-prompts",
            visible=sampled,
        )
        self.images = gr.Radio(
            [*IMAGES], value=IMAGES[0], label="Images at a time", elem_id="label-images", visible=sampled
        )
        self.goal = gr.Number(
            50, label="Goal", info="Answers that you plan to give; 0: none.", precision=0, elem_id="label-goal"
        )
        self._job_buttons("Start", "label")

    def _place(self) -> None:
        with gr.Accordion("Where the choices are", open=False):
            gr.HTML(f'<p class="steer-note">{escape(storage_notice(self.studio))}</p>', elem_id="label-place")
            gr.Code(command_of(self.studio), label="The same as a command", lines=1, interactive=False, wrap_lines=True)
            if self.studio.labels is None:
                self.zip = gr.Button("Make a zip of all choices", elem_id="label-zip")
                self.file = gr.File(label="Choices", interactive=False, visible=False, elem_id="label-file")

    def _connect(self) -> None:
        asked, live = (
            [self.name, self.prompts, self.images, self.goal],
            [self.status, self.view, self.progress, self.stop],
        )
        # Blur the field in which Enter was pressed: otherwise shortcuts would be typed there.
        leave = "(...given) => { document.activeElement?.blur(); return given; }"
        events = [begin(self.begin, asked, live, js=leave, **RUNS) for begin in (self.start.click, self.name.submit)]
        # Several events at a time allow an undo while a group is sampled: an answer names its group.
        events.append(self.view.answer(self.answer, None, live, trigger_mode="multiple", **RUNS))
        for event in events:
            event.failure(self.fail, None, [self.status, self.start, self.stop], **PRIVATE)
        self.stop.click(self.end, None, live, queue=False, **PRIVATE)
        if self.studio.labels is None:
            self.zip.click(self.download, None, [self.file, self.status], **PRIVATE)
        assert Context.root_block is not None
        Context.root_block.unload(self.forget)

    def begin(
        self, name: str, text: str, images: int, request: gr.Request, goal: float | None = None
    ) -> Iterator[Change]:
        try:
            store = self._runs.get(str(request.session_hash), self.store)
            own = isinstance(store, ImageLabelStore)
            prompts = ("own images",) if own else prompts_of(text, self.model)
            label_request = LabelRequest(" ".join(name.split()), prompts, 2 if own else int(images), int(goal or 0))
        except InputError as error:
            yield {self.status: line(str(error), "alert")}
            return
        session = LabelSession(store, label_request, self.model, self.studio.worker.submit, self.studio.model)
        self._replace(request, session)
        yield {self.stop: gr.update(interactive=True)}
        yield from self._advance(session, "")

    def take(self, pngs: Sequence[bytes], prompt: str, request: gr.Request) -> Change:
        """Offer the images of a run to a visitor, in pairs, until they press Stop. Raises InputError for one image.

        The images and the table of the answers are in a separate folder beside the other choices.
        """
        if len(pngs) < 2:
            raise InputError("history: this run has one image, and labels need two to choose between")
        folder = label_folder(self.studio) / f"{RUN}{hashlib.sha256(b''.join(pngs)).hexdigest()[:12]}"
        write_images(folder, pngs, prompt)
        with self._lock:
            same = (store for store in [*self._runs.values()] if store.path == folder)  # used by another page
            store = self._runs[str(request.session_hash)] = next(same, None) or ImageLabelStore(folder, folder)
        self._replace(request, None)
        pairs = plural(len(store.pairs), "pair")
        return self._now(None, line(f"{pairs} of the run: say who you are and press Start. Stop ends this list."))

    def answer(self, event: gr.EventData, request: gr.Request) -> Iterator[Change]:
        if (session := self._visitors.get(str(request.session_hash))) is None:
            yield self._now(None, line("Press Start first.", "alert"))
            return
        try:
            message = session.answer(str(event.group), str(event.answer))
        except InputError as error:
            yield self._now(session, line(str(error), "alert"))
            return
        yield from self._advance(session, message)

    def _advance(self, session: LabelSession, message: str) -> Iterator[Change]:
        """Show the progress until a group is ready; nothing after the session has ended."""
        status, empty = line(message or "Choose by button or by key."), LOADING_TEXT
        try:
            for event in session.advance():
                if session.ended:
                    return
                yield self._now(session, line(f"{message} {event}".strip()))
        except InputError as error:
            status, empty = line(f"{message} {public(str(error))}".strip(), "alert"), "Press Start to try again."
        if not session.ended:
            yield self._now(session, status, empty)

    def _now(self, session: LabelSession | None, status: str, empty: str = LOADING_TEXT) -> Change:
        """Return the current view; `empty` is shown while there is no group."""
        turn, group = next(self._turns), session.shown if session else None
        if session is None or session.ended:
            view = empty_view(turn)
        elif group is None:
            view = empty_view(turn, empty, undo=True)
        else:
            view = _images(turn, group)
        return {self.status: status, self.view: view, self.progress: self._progress(session)}

    def _progress(self, session: LabelSession | None) -> str:
        if session is None:
            return ""
        name, judgements = session.label_request.annotator, session.store.judgements()
        lines = (
            f"{name}: {session.store.progress(name)}",
            goal_text(session.label_request, judgements),
            str(agreement(judgements) or NO_AGREEMENT_TEXT),
        )
        return "".join(f'<p class="steer-note">{escape(one)}</p>' for one in lines)

    def end(self, request: gr.Request) -> Change:
        self._runs.pop(str(request.session_hash), None)
        session = self._replace(request, None)
        return self._now(session, line(STOPPED_TEXT)) | {self.stop: gr.update(interactive=False)}

    def forget(self, request: gr.Request) -> None:
        """End the session of a visitor who left."""
        self._runs.pop(str(request.session_hash), None)
        self._replace(request, None)

    def _replace(self, request: gr.Request, session: LabelSession | None) -> LabelSession | None:
        """End a visitor's session, and start another one if given. Returns the ended session."""
        visitor = str(request.session_hash)
        with self._lock:
            before = self._visitors.pop(visitor, None)
            if session is not None:
                self._visitors[visitor] = session
        if before is not None:
            before.end()
        return before

    def download(self, request: gr.Request) -> Change:
        """Download all preferences as one file."""
        try:
            path = self.studio.folder(request) / f"{ARCHIVE_FOLDER}.zip"
            write_label_zip(self.store.path, path)
        except InputError as error:
            return {self.status: line(str(error), "alert")}
        return {self.file: gr.update(value=str(path), visible=True)}


def _images(turn: int, group: Group) -> str:
    try:
        if isinstance(group, ImagePair):
            return group_view(turn, group.id, group.prompt, group.pictures())
        files = [file_inside(group.folder, group.image_file(number)) for number in range(len(group.rows))]
    except InputError as error:  # the files have been removed
        return empty_view(turn, public(str(error)))
    return group_view(turn, group.id, group.rows.prompts[0], [file.read_bytes() for file in files])


def prompts_of(text: str, model: str) -> tuple[str, ...]:
    """Read the prompts of a field, one per line; by default the embedded list. Raises InputError."""
    if prompts := prompts_in(text, MAX_PROMPTS):
        return tuple(dict.fromkeys(prompts))
    if model not in MODELS:
        raise InputError("prompts: give one or more, one a line; the embedded list is for the embedded models")
    return tuple(load_prompts(PROMPTS))
