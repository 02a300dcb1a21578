"""The History tab: the visitor's finished runs, a comparison of two, and their transfer to the other tabs."""

import time
from collections.abc import Sequence
from html import escape
from io import BytesIO
from statistics import fmean
from typing import Any

import gradio as gr
from PIL import Image

from steer.apps.demo.grid_panel import GridPanel
from steer.apps.demo.history import STOPPED, TEXTS, Run
from steer.apps.demo.label_tab import LabelTab
from steer.apps.demo.links import PARAMETER, link_of, read_link
from steer.apps.demo.markup import table
from steer.apps.demo.pictures import data_uri
from steer.apps.demo.rewards_tab import MAX_FILES, RewardsTab
from steer.apps.demo.steer_tab import SteerTab, fields_from_settings
from steer.apps.demo.studio import PRIVATE, Change, Studio, Weights, line, plural, refusing
from steer.apps.demo.text_tab import TextTab
from steer.apps.plots import short
from steer.errors import InputError

EMPTY_TEXT = "The runs of the Steer and Text tabs appear here."
SIDE = 640  # pixels of a compared image
STYLE = """
.steer-pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(12rem, 1fr)); gap: 1rem; }
.steer-pair figure { margin: 0; }
.steer-pair img { width: 100%; max-width: 26rem; image-rendering: auto; border-radius: 6px; }
"""
ADDRESS = "query => query && location.origin + location.pathname + query"
# The secret that identifies a browser's runs; without storage it lasts as long as the page.
TOKEN = """() => {
    const bytes = String.fromCharCode(...crypto.getRandomValues(new Uint8Array(32)));
    const fresh = btoa(bytes).replaceAll('+', '-').replaceAll('/', '_').replaceAll('=', '');
    try {
        const token = localStorage.getItem('steer-history') || fresh;
        localStorage.setItem('steer-history', token);
        return [token];
    } catch {
        return [fresh];
    }
}"""
CONFIRM = "() => [confirm('Delete all runs of your history?')]"
Runs = Sequence[tuple[Run, Sequence[bytes]]]  # runs with their PNGs


def name_of(run: Run) -> str:
    """Name a run by time, method, seed, reward, stop and prompt."""
    when = time.strftime("%d %b %H:%M", time.localtime(run.time))
    prompt = run.prompt if len(run.prompt) <= 40 else f"{run.prompt[:39]}…"
    stopped = f" · stopped at {run.settings[STOPPED]}" if STOPPED in run.settings else ""
    made = f"{run.settings['method']} seed {run.settings['seed']}{stopped}"
    return f"{when} · {made} · {short(max(run.rewards))} · {prompt}"


def changed_settings(first: Run, second: Run) -> list[tuple[str, Any, Any]]:
    """List the settings that differ: name, and the value of each run; None if its method has no such setting."""
    one, other = ({"prompt": run.prompt, **run.settings} for run in (first, second))
    names = dict.fromkeys([*one, *other])
    return [(name, one.get(name), other.get(name)) for name in names if one.get(name) != other.get(name)]


def runs_view(runs: Runs) -> str:
    """Return the best images of one or two runs side by side, with results and settings (for two: differing ones)."""
    if not runs:
        return f'<p class="steer-empty">{EMPTY_TEXT}</p>'
    entries = [run for run, _ in runs]
    heads = ["first", "second"] if len(runs) > 1 else ["value"]
    figures = "".join(_figure(run, pngs) for run, pngs in runs)
    results: list[list[object]] = [
        ["highest reward", *(max(run.rewards) for run in entries)],
        ["mean reward", *(fmean(run.rewards) for run in entries)],
        ["highest reward of the base images", *(run.base_reward for run in entries)],
        ["images", *(len(run.rewards) for run in entries)],
        ["seconds", *(run.seconds for run in entries)],
    ]
    if len(runs) == 1:
        rows = [(name, value) for name, value in entries[0].settings.items() if value is not None]
        settings = table("Settings", ["setting", *heads], [(name, str(value)) for name, value in rows])
    elif rows_changed := changed_settings(*entries):
        cells = [(name, *(None if value is None else str(value) for value in pair)) for name, *pair in rows_changed]
        settings = table("Changed settings", ["setting", *heads], cells)
    else:
        settings = '<p class="steer-note">Prompt and settings are the same.</p>'
    return f'<div class="steer-pair">{figures}</div>{settings}{table("Results", ["", *heads], results)}'


def _figure(run: Run, pngs: Sequence[bytes]) -> str:
    with Image.open(BytesIO(pngs[run.best])) as image:
        source = data_uri(image, SIDE)
    name = escape(name_of(run), quote=True)
    return f'<figure><img src="{source}" alt="best image of {name}"/><figcaption>{name}</figcaption></figure>'


class HistoryTab:
    """The components and their events; create it inside the app's Blocks.

    token   the browser's secret, which identifies the runs of a visitor of a shared app
    chosen  the components that name one or two runs;  live: all components that a change of the runs updates
    form    components of the Steer tab that restored settings update;  text: the Text tab, or None
    """

    def __init__(
        self,
        studio: Studio,
        steer: SteerTab,
        text: TextTab | None,
        labels: LabelTab,
        rewards: RewardsTab,
        tabs: gr.Tabs,
    ) -> None:
        self.studio, self.steer, self.text, self.labels, self.rewards = studio, steer, text, labels, rewards
        self.tabs = tabs
        self.token = gr.Textbox(visible=False)
        self.numbers = gr.State(())  # numbers of the runs in the gallery
        self.form = [steer.status, steer.defaults, *steer.fields.values(), *steer.chips.components]
        self._layout()
        self.chosen = [self.first, self.second]
        self.live = [self.status, self.gallery, self.numbers, *self.chosen, self.view, self.link, self.files]
        self._connect()

    def _layout(self) -> None:
        self.status = gr.HTML(line(EMPTY_TEXT), elem_id="history-status")
        look: dict[str, Any] = {"columns": 8, "fit_columns": False, "height": 240, "object_fit": "contain"}
        self.gallery = gr.Gallery(
            label="Runs, newest first", elem_id="history-runs", interactive=False, allow_preview=False, **look
        )
        with gr.Row():
            self.first = gr.Dropdown([], label="Run", min_width=280, elem_id="history-first")
            self.second = gr.Dropdown([], label="Compare with", min_width=280, elem_id="history-second")
        with gr.Row():
            self.restore_button = gr.Button("Restore", variant="primary", elem_id="history-restore")
            self.link_button = gr.Button("Link to the settings", elem_id="history-share")
            self.files_button = gr.Button("Download images", elem_id="history-download")
            self.rewards_button = gr.Button("Send images to Rewards", elem_id="history-rewards")
            self.label_button = gr.Button("Send images to Label", elem_id="history-label")
        self.link = gr.Textbox(label="Link", visible=False, interactive=False, buttons=["copy"], elem_id="history-link")
        self.files = gr.File(label="Images", visible=False, file_count="multiple", interactive=False)
        self.view = gr.HTML(runs_view(()), css_template=STYLE, elem_id="history-view")
        with gr.Accordion("Grid of two settings", open=False, elem_id="history-grid"):
            self.grid = GridPanel(self.studio, self.first)
        with gr.Row():
            self.delete_button = gr.Button("Delete this run", variant="stop", elem_id="history-delete")
            self.clear_button = gr.Button("Delete all runs", variant="stop", elem_id="history-clear")
        self.sure = gr.Checkbox(False, visible=False)

    def _connect(self) -> None:
        for field in self.chosen:
            field.input(self.show, self.chosen, self.live, **PRIVATE)
        self.gallery.select(self.pick, [self.numbers, self.second], self.live, **PRIVATE)
        back = [self.status, self.tabs, *self.form]
        back += [self.text.status, *self.text.fields.values()] if self.text else []
        self.restore_button.click(self.restore, [self.first, self.steer.weights], back, **PRIVATE)
        written = self.link_button.click(self.share, self.first, [self.status, self.link], **PRIVATE)
        written.then(None, self.link, self.link, js=ADDRESS, **PRIVATE)
        self.files_button.click(self.download, self.first, [self.status, self.files], **PRIVATE)
        sent = [self.status, self.tabs, self.rewards.files]
        self.rewards_button.click(self.send, self.first, sent, **PRIVATE)
        offered = [self.status, self.tabs, self.labels.status, self.labels.view, self.labels.progress]
        self.label_button.click(self.label, self.first, offered, **PRIVATE)
        self.delete_button.click(self.delete, self.chosen, self.live, **PRIVATE)
        self.clear_button.click(self.clear, self.sure, self.live, js=CONFIRM, **PRIVATE)

    def enter(self, token: str | None, request: gr.Request) -> None:
        self.studio.history.enter(str(request.session_hash), token, request.username)

    @refusing
    def refresh(self, first: int | None, second: int | None, request: gr.Request) -> Change:
        """Show all runs, with one or two of them chosen: the newest if the first no longer exists."""
        runs = {run.number: run for run in self.studio.history.runs(str(request.session_hash))}
        choices = [(name_of(run), number) for number, run in runs.items()]
        first = first if first in runs else next(iter(runs), None)
        second = second if second in runs else None
        text = f"{plural(len(runs), 'run')} in your history." if runs else EMPTY_TEXT
        pictures = [(Image.open(BytesIO(run.thumbnail)), short(max(run.rewards))) for run in runs.values()]
        return {
            self.status: line(text),
            self.gallery: gr.update(value=pictures, selected_index=None),
            self.numbers: tuple(runs),
            self.first: gr.update(choices=choices, value=first),
            self.second: gr.update(choices=[("(none)", None), *choices], value=second),
        } | self._view(request, first, second)

    def _view(self, request: gr.Request, first: int | None, second: int | None) -> Change:
        session, history = str(request.session_hash), self.studio.history
        numbers = [number for number in (first, second) if number is not None]
        pairs = [(history.run(session, number), history.images(session, number)) for number in numbers]
        hidden = gr.update(value=None, visible=False)
        return {self.view: runs_view(pairs), self.link: hidden, self.files: hidden}

    @refusing
    def show(self, first: int | None, second: int | None, request: gr.Request) -> Change:
        return self._view(request, first, second)

    @refusing
    def pick(self, numbers: Sequence[int], second: int | None, event: gr.SelectData, request: gr.Request) -> Change:
        """Choose the run of the clicked thumbnail."""
        if event.index >= len(numbers):
            raise InputError("history: this run is not there any more, choose another one")
        first = numbers[event.index]
        return {self.first: first} | self._view(request, first, second)

    @refusing
    def restore(self, number: int | None, weights: Weights | None, request: gr.Request) -> Change:
        """Set the fields of the Steer or the Text tab as they were for a run, and open the tab."""
        run = self.studio.history.run(str(request.session_hash), number)
        if self.text and TEXTS in run.settings:
            return {self.tabs: gr.Tabs(selected="text")} | self.text.fill(run.prompt, run.config)
        values = fields_from_settings(run.prompt, run.config, self.studio.models, weights)
        text = "Settings of the run restored: press Steer for the same images."
        return {self.tabs: gr.Tabs(selected="steer")} | self.steer.fill(values, weights, text)

    @refusing
    def share(self, number: int | None, request: gr.Request) -> Change:
        """Write a link that fills the form of the Steer tab."""
        run = self.studio.history.image_run(str(request.session_hash), number)
        link = link_of(run.prompt, run.config)
        return {self.link: gr.update(value=link, visible=True), self.status: line("Copy the link.")}

    def open_link(self, weights: Weights | None, request: gr.Request) -> Change:
        """Fill the form of the Steer tab from the page's address, if it has settings."""
        if (text := request.query_params.get(PARAMETER)) is None:
            return {self.steer.status: gr.skip()}
        try:
            prompt, settings = read_link(text)
            self.studio.check_reward(settings.reward)
            values = fields_from_settings(prompt, settings, self.studio.models, weights)
        except InputError as error:
            return {self.steer.status: line(f"Nothing was filled in. {error}", "alert")}
        return self.steer.fill(values, weights, "Settings of the link: press Steer to run them.")

    def _files(self, request: gr.Request, number: int | None) -> list[str]:
        """Write the images of a run into the visitor's folder."""
        pngs = self.studio.history.images(str(request.session_hash), number)
        folder = self.studio.folder(request) / "history" / f"run-{number}"
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"run{number}-image{rank + 1}.png" for rank in range(len(pngs))]
        for path, png in zip(paths, pngs, strict=True):
            path.write_bytes(png)
        return [str(path) for path in paths]

    @refusing
    def download(self, number: int | None, request: gr.Request) -> Change:
        return {self.files: gr.update(value=self._files(request, number), visible=True)}

    @refusing
    def send(self, number: int | None, request: gr.Request) -> Change:
        """Put the images of a run into the Rewards tab, and open the tab."""
        self.studio.history.image_run(str(request.session_hash), number)
        return {self.rewards.files: self._files(request, number)[:MAX_FILES], self.tabs: gr.Tabs(selected="rewards")}

    @refusing
    def label(self, number: int | None, request: gr.Request) -> Change:
        """Offer the images of a run in the Label tab, and open the tab."""
        session, history = str(request.session_hash), self.studio.history
        run, pngs = history.image_run(session, number), history.images(session, number)
        return self.labels.take(pngs, run.prompt, request) | {self.tabs: gr.Tabs(selected="label")}

    @refusing
    def delete(self, first: int | None, second: int | None, request: gr.Request) -> Change:
        if first is None:
            raise InputError("history: choose a run to delete")
        self.studio.history.delete(str(request.session_hash), first)
        return self.refresh(None, second, request)

    @refusing
    def clear(self, sure: bool, request: gr.Request) -> Change:
        if sure:
            self.studio.history.delete(str(request.session_hash))
        return self.refresh(None, None, request)
