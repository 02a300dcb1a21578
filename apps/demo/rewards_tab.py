"""The Rewards tab: images that somebody drops, and what rewards say of them."""

from collections.abc import Iterator
from html import escape
from pathlib import Path

import gradio as gr

from steer.apps.demo.page import FAILED, MOST_CHARACTERS, PRIVATE, Change, line, public
from steer.apps.demo.reward_scores import MOST_FILES, Scores, check_asked, score_files
from steer.apps.demo.rewards_view import empty_view, names_view, scatter_view, scores_view
from steer.apps.demo.steer_fields import EXAMPLE
from steer.apps.demo.studio import Studio
from steer.apps.demo.worker import Ticket
from steer.apps.models import device_here
from steer.errors import InputError

SCRIPT = Path(__file__).parent / "run_view.js"  # keeps tables open when what is around them changes
# Those that need nothing from a network.
EMBEDDED = (
    "scene",
    "scene-soft",
    "preference:scenes",
    "aesthetic:scenes",
    "clip:scenes",
    "jpeg",
    "brightness",
)
TICKED = ("preference:scenes", "aesthetic:scenes", "clip:scenes")  # they say something of any image


class RewardsTab:
    """Its components and what they do."""

    def __init__(self, studio: Studio) -> None:
        self.studio, self.scores = studio, gr.State(None)
        script = SCRIPT.read_text()
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300):
                self._form()
            with gr.Column(scale=3, min_width=300):
                self.status = gr.HTML(line("Ready."), elem_id="rewards-status")
                self.by = gr.Dropdown([], label="Best first by", visible=False, elem_id="rewards-by")
                self.view = gr.HTML(empty_view(), js_on_load=script, elem_id="rewards-view")
                with gr.Row(visible=False) as self.axes:
                    self.across = gr.Dropdown([], label="Across", min_width=140, elem_id="rewards-across")
                    self.up = gr.Dropdown([], label="Up", min_width=140, elem_id="rewards-up")
                self.scatter = gr.HTML(js_on_load=script, elem_id="rewards-scatter")
        with gr.Accordion("What the rewards measure", open=False):
            gr.HTML(names_view(), elem_id="rewards-names")
        self._connect()

    def _form(self) -> None:
        self.files = gr.File(
            label=f"Images, up to {MOST_FILES}",
            file_count="multiple",
            file_types=["image"],
            height=180,
            elem_id="rewards-files",
        )
        self.prompt = gr.Textbox(
            label="Prompt",
            placeholder=EXAMPLE,
            max_length=MOST_CHARACTERS,
            info="What the images were to show, the same for all. Left empty: the prompts inside images of steer.",
            elem_id="rewards-prompt",
        )
        names = [*dict.fromkeys([*self.studio.rewards, *EMBEDDED])]
        ticked = [*self.studio.rewards, *TICKED]
        self.ticked = gr.CheckboxGroup(names, value=ticked, label="Rewards", elem_id="rewards-ticked")
        self.others = gr.Textbox(
            label="Others, by name",
            lines=2,
            info="One a line, such as colour:red or scene + jpeg:0.01. Some need files that this machine may not have.",
            elem_id="rewards-others",
        )
        with gr.Row():
            self.start = gr.Button("Score", variant="primary", elem_id="rewards-start")
            self.stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="rewards-stop")

    def _connect(self) -> None:
        live = [self.status, self.start, self.stop, self.scores, self.by, self.view, self.axes, self.across, self.up]
        asked = [self.files, self.prompt, self.ticked, self.others]
        ran = self.start.click(self.run, asked, [*live, self.scatter], concurrency_limit=None, **PRIVATE)
        ran.failure(self.fail, None, [self.status, self.start, self.stop], **PRIVATE)
        self.stop.click(self.studio.stop, None, None, queue=False, **PRIVATE)
        self.by.input(scores_view, [self.scores, self.by], self.view, **PRIVATE)
        for axis in (self.across, self.up):
            axis.input(scatter_view, [self.scores, self.across, self.up], self.scatter, **PRIVATE)

    def run(
        self, files: list[str] | None, prompt: str, ticked: list[str], others: str, request: gr.Request
    ) -> Iterator[Change]:
        """Scores the images, shown as it goes."""
        yield {self.start: gr.update(interactive=False), self.stop: gr.update(interactive=True)}
        try:
            specs = [*dict.fromkeys([*ticked, *filter(None, map(str.strip, (others or "").splitlines()))])]
            yield from self._run([Path(file) for file in files or ()], (prompt or "").strip(), specs, request)
        except InputError as error:
            gr.Warning(escape(public(str(error))))
            yield {self.status: line(str(error), "alert")}
        yield {self.start: gr.update(interactive=True), self.stop: gr.update(interactive=False)}

    def fail(self) -> Change:
        """After an error that `run` does not know."""
        ready = {self.start: gr.update(interactive=True), self.stop: gr.update(interactive=False)}
        return ready | {self.status: line(FAILED, "alert")}

    def _run(self, paths: list[Path], prompt: str, specs: list[str], request: gr.Request) -> Iterator[Change]:
        check_asked(paths, prompt, specs)

        def work(ticket: Ticket) -> None:
            score_files(paths, prompt, specs, self.studio.reward, ticket, device_here(self.studio.device))

        scores = None
        for event in self.studio.begin(request, work).events():
            if isinstance(event, Scores):
                scores = event
            else:
                yield {self.status: line(str(event))}
        yield {self.status: line("Stopped.")} if scores is None else self._shown(scores)

    def _shown(self, scores: Scores) -> Change:
        """All of it, the best by the first reward first, the first two against each other."""
        names, first = list(scores.rewards), scores.rewards[0]
        second = names[1] if len(names) > 1 else first
        several = len(names) > 1 and len(scores.rows) > 1
        images = "1 image" if len(scores.rows) == 1 else f"{len(scores.rows)} images"
        left = " Some were left out: see below." if scores.notes else ""
        inside = sum(row.inside for row in scores.rows)
        which = f" The prompts of {inside} of them are those inside the images." if inside else ""
        rewards = "reward" if len(names) == 1 else "rewards"
        return {
            self.status: line(f"Done: {images} by {len(names)} {rewards}.{which}{left}"),
            self.scores: scores,
            self.by: gr.update(choices=names, value=first, visible=several),
            self.view: scores_view(scores, first),
            self.axes: gr.update(visible=several),
            self.across: gr.update(choices=names, value=first),
            self.up: gr.update(choices=names, value=second),
            self.scatter: scatter_view(scores, first, second) if several else "",
        }
