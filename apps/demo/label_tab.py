"""The Label tab: images of one prompt, and which of them somebody prefers."""

import threading
from collections.abc import Iterator
from html import escape
from itertools import count
from pathlib import Path

import gradio as gr
from gradio.context import Context

from steer.apps.demo.label_agreement import NOBODY, agreement
from steer.apps.demo.label_folder import ZIPPED, command_of, label_folder, place_told, write_zip
from steer.apps.demo.label_view import empty_view, lot_view
from steer.apps.demo.labelling import Labelling
from steer.apps.demo.labels import IMAGES, LONGEST_NAME, LabelBook, Progress, Wish
from steer.apps.demo.page import MOST_CHARACTERS, PRIVATE, Change, line, public
from steer.apps.demo.studio import Studio
from steer.apps.prompts import find_prompts
from steer.apps.scenes.synthetic_choices import CALL
from steer.assets import MODELS
from steer.errors import InputError
from steer.pipelines.choice_files import Lot, inside

HERE = Path(__file__).parent
OTHER_CALL = {"num_inference_steps": 20, "guidance_scale": 5.0}  # of models that are not embedded, as in d3po-sdxl
PROMPTS = "scenes-training"
MOST_PROMPTS = 200
COMING, STOPPED = "The next images are on their way.", "Stopped. All that you chose is saved."


class LabelTab:
    """Its components and what they do. Images are of the first of the studio's models, for all annotators.

    To be made inside the app's Blocks. Raises InputError for a broken folder of labels.
    """

    def __init__(self, studio: Studio) -> None:
        self.studio, self.model = studio, studio.models[0]
        self.book = LabelBook(label_folder(studio), CALL if self.model in MODELS else OTHER_CALL)
        self._lock = threading.Lock()
        self._visitors: dict[str, Labelling] = {}
        self._turns = count()
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=280):
                self._form()
            with gr.Column(scale=3, min_width=300):
                self.status = gr.HTML(line("Ready."), elem_id="label-status")
                self.view = gr.HTML(
                    empty_view(next(self._turns)),
                    js_on_load=(HERE / "label_view.js").read_text(),
                    css_template=(HERE / "label_view.css").read_text(),
                    elem_id="label-view",
                )
                self.progress = gr.HTML(elem_id="label-progress")
                self._place()
        self._connect()

    def _form(self) -> None:
        self.name = gr.Textbox(
            label="Your name", max_length=LONGEST_NAME, info="It is kept with your choices.", elem_id="label-name"
        )
        empty = "Left empty: simple scenes." if self.model in MODELS else ""
        self.prompts = gr.Textbox(
            label="Prompts", lines=3, info=f"One a line, kept with the images. {empty}", elem_id="label-prompts"
        )
        self.images = gr.Radio([*IMAGES], value=IMAGES[0], label="Images at a time", elem_id="label-images")
        with gr.Row():
            self.start = gr.Button("Start", variant="primary", elem_id="label-start")
            self.stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="label-stop")

    def _place(self) -> None:
        with gr.Accordion("Where the choices are", open=False):
            gr.HTML(f'<p class="steer-note">{escape(place_told(self.studio))}</p>', elem_id="label-place")
            gr.Code(
                command_of(self.studio),
                label="Learn from them",
                language=None,
                lines=1,
                interactive=False,
                wrap_lines=True,
            )
            if self.studio.labels is None:
                self.zip = gr.Button("Make a zip of all choices", elem_id="label-zip")
                self.file = gr.File(label="Choices", interactive=False, visible=False, elem_id="label-file")

    def _connect(self) -> None:
        asked, live = [self.name, self.prompts, self.images], [self.status, self.view, self.progress, self.stop]
        # Out of the field that Enter was pressed in: otherwise keys would be typed there.
        leave = "(...given) => { document.activeElement?.blur(); return given; }"
        for begin in (self.start.click, self.name.submit):
            begin(self.begin, asked, live, js=leave, concurrency_limit=None, **PRIVATE)
        # More than one at a time, for an undo while a lot is drawn: an answer names the lot that was seen.
        self.view.answer(self.answer, None, live, concurrency_limit=None, trigger_mode="multiple", **PRIVATE)
        self.stop.click(self.end, None, live, queue=False, **PRIVATE)
        if self.studio.labels is None:
            self.zip.click(self.download, None, [self.file, self.status], **PRIVATE)
        assert Context.root_block is not None
        Context.root_block.unload(self.forget)

    def begin(self, name: str, text: str, images: int, request: gr.Request) -> Iterator[Change]:
        """Shows the first lot."""
        try:
            wish = Wish(" ".join(name.split()), prompts_of(text, self.model), int(images))
        except InputError as error:
            yield {self.status: line(str(error), "alert")}
            return
        labelling = Labelling(self.book, wish, self.model, self.studio.worker.submit, self.studio.model)
        self._replace(request, labelling)
        yield {self.stop: gr.update(interactive=True)}
        yield from self._advance(labelling, "")

    def answer(self, event: gr.EventData, request: gr.Request) -> Iterator[Change]:
        """Records what somebody answered, and shows the next lot."""
        if (labelling := self._visitors.get(str(request.session_hash))) is None:
            yield self._now(None, line("Press Start first.", "alert"))
            return
        try:
            said = labelling.answer(str(event.lot), str(event.answer))
        except InputError as error:
            yield self._now(labelling, line(str(error), "alert"))
            return
        yield from self._advance(labelling, said)

    def _advance(self, labelling: Labelling, said: str) -> Iterator[Change]:
        """What there is to see until a lot is shown; nothing once it was ended: who ended it says so."""
        status, empty = line(said or "Choose by button or by key."), COMING
        try:
            for event in labelling.advance():
                if labelling.ended:
                    return
                yield self._now(labelling, line(f"{said} {event}".strip()))
        except InputError as error:
            status, empty = line(f"{said} {error}".strip(), "alert"), "Press Start to try again."
        if not labelling.ended:
            yield self._now(labelling, status, empty)

    def _now(self, labelling: Labelling | None, status: str, empty: str = COMING) -> Change:
        """What is to be seen; `empty` where a lot is not there yet."""
        turn, lot = next(self._turns), labelling.shown if labelling else None
        if labelling is None or labelling.ended:
            view = empty_view(turn)
        elif lot is None:
            view = empty_view(turn, empty, undo=True)
        else:
            view = _images(turn, lot)
        return {self.status: status, self.view: view, self.progress: self._progress(labelling)}

    def _progress(self, labelling: Labelling | None) -> str:
        if labelling is None:
            return ""
        name = labelling.wish.annotator
        lines = (f"{name}: {told(self.book.progress(name))}", str(agreement(self.book.judgements()) or NOBODY))
        return "".join(f'<p class="steer-note">{escape(one)}</p>' for one in lines)

    def end(self, request: gr.Request) -> Change:
        """Ends what a visitor began."""
        labelling = self._replace(request, None)
        return self._now(labelling, line(STOPPED)) | {self.stop: gr.update(interactive=False)}

    def forget(self, request: gr.Request) -> None:
        """Stops drawing for a visitor, and gives back what they have not judged."""
        self._replace(request, None)

    def _replace(self, request: gr.Request, labelling: Labelling | None) -> Labelling | None:
        """Puts another labelling, or none, in the place of a visitor's, which ends and is returned."""
        visitor = str(request.session_hash)
        with self._lock:
            before = self._visitors.pop(visitor, None)
            if labelling is not None:
                self._visitors[visitor] = labelling
        if before is not None:
            before.end()
        return before

    def download(self, request: gr.Request) -> Change:
        """All choices as one file."""
        try:
            path = self.studio.folder(request) / f"{ZIPPED}.zip"
            write_zip(self.book.path, path)
        except InputError as error:
            return {self.status: line(str(error), "alert")}
        return {self.file: gr.update(value=str(path), visible=True)}


def _images(turn: int, lot: Lot) -> str:
    try:
        files = [inside(lot.folder, lot.image_file(number)) for number in range(len(lot.rows))]
    except InputError as error:  # somebody took them away
        return empty_view(turn, public(str(error)))
    return lot_view(turn, lot.id, lot.rows.prompts[0], [file.read_bytes() for file in files])


def prompts_of(text: str, model: str) -> tuple[str, ...]:
    """The prompts of a field, one a line; of none, the embedded list. Raises InputError where that does not fit."""
    prompts = tuple(dict.fromkeys(one.strip() for one in text.splitlines() if one.strip()))
    if not prompts and model in MODELS:
        return tuple(find_prompts(PROMPTS))
    if not prompts:
        raise InputError("prompts: give one or more, one a line; the embedded list is for the embedded models")
    if len(prompts) > MOST_PROMPTS or max(map(len, prompts)) > MOST_CHARACTERS:
        raise InputError(f"prompts: at most {MOST_PROMPTS} of them, each of at most {MOST_CHARACTERS} characters")
    return prompts


def told(done: Progress) -> str:
    """What somebody did, in words."""
    ties = f"{done.ties} {'tie' if done.ties == 1 else 'ties'}" + (f" ({done.bad} all bad)" if done.bad else "")
    return f"{done.choices} {'choice' if done.choices == 1 else 'choices'}, {ties}, {done.undone} taken back."
