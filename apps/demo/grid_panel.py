"""The grid of the History tab: a run with every pair of values of two settings, drawn as by `steer grid`."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import count
from pathlib import Path
from typing import Any

import gradio as gr

from steer.apps.demo.fields import check_limits, label_of
from steer.apps.demo.history import Run
from steer.apps.demo.progress import Progress
from steer.apps.demo.steering import Loading, as_command, scheduler_applied
from steer.apps.demo.studio import PRIVATE, RUNS, Change, JobTab, Studio, Ticket, Waiting, guarded, line
from steer.apps.grids import FIXED, Axis, plan_cells, rewards_of, write_grid
from steer.apps.methods import DisableAdapter
from steer.apps.plots import short
from steer.apps.settings import SamplingConfig
from steer.errors import InputError

# Axes, with initial values.
AXES = {
    "method": "race,fk,best-of-n,base",
    "reward": "scene-soft,aesthetic:scenes",
    "lam": "5,10,25",
    "seed": "1,2,3",
    "steps": "10,20,40",
    "guidance": "2,4,8",
}
MAX_CELLS = 16  # cells for one visitor on a shared machine


def grid_job(studio: Studio, run: Run, axes: Sequence[Axis], out: Path) -> tuple[int, Callable[[Ticket], None]]:
    """Return the number of images of a run's grid, and the job for the worker, which sends counts and the report.

    Raises InputError for a run with adapters, and for values that this app does not allow.
    """
    if run.config.lora is not None:
        raise InputError("a grid here has no finetuned weights or LoRA files: use `steer grid --lora`")
    x, y = axes[0], axes[1] if len(axes) > 1 else None
    left_out = {*FIXED, *(axis.name for axis in axes)}
    given = {name: value for name, value in run.config.plain().items() if name not in left_out}
    cells = plan_cells(run.prompt, x, y, given, out)
    if len(cells) > MAX_CELLS:
        raise InputError(f"{len(cells)} images: a grid has at most {MAX_CELLS} in this app; give fewer values")
    for cell in cells:
        check_limits(cell.settings)
    rewards = rewards_of(cells, studio.reward)

    def work(ticket: Ticket) -> None:
        done = count(1)

        @contextmanager
        def opened(settings: SamplingConfig) -> Iterator[tuple[Any, DisableAdapter]]:
            ticket.say(Loading(settings.model))
            with studio.model(settings.model) as pipe, scheduler_applied(pipe, settings.scheduler):
                yield pipe, nullcontext

        def on_image() -> None:
            ticket.say(next(done))

        ticket.say(write_grid(x, y, cells, rewards, opened, out, on_image, on_step=lambda _: ticket.check()))

    return len(cells), work


class GridPanel(JobTab):
    """The components and their events; create it inside the History tab. `chosen` names the run."""

    def __init__(self, studio: Studio, chosen: gr.Dropdown) -> None:
        self.studio, self.axes = studio, list[Any]()
        for title, first in (("Columns", "seed"), ("Rows", None)):
            with gr.Row():
                choices: list[Any] = [(label_of(name), name) for name in AXES]
                choices = choices if first else [("(none)", None), *choices]
                name = gr.Dropdown(choices, value=first, label=title, elem_id=f"grid-{title.lower()}")
                hint = "Separated by commas; all other settings are those of the run above"
                values = gr.Textbox(AXES.get(first or "", ""), label=f"Values of the {title.lower()}", info=hint)
            name.input(lambda axis: AXES.get(axis or "", ""), name, values, queue=False, **PRIVATE)
            self.axes += [name, values]
        self._job_buttons("Sample grid", "grid")
        self.status = gr.HTML(line(f"Up to {MAX_CELLS} images of one prompt."), elem_id="grid-status")
        look: dict[str, Any] = {"interactive": False, "visible": False}
        self.image = gr.Image(
            show_label=False,
            type="filepath",
            format="png",
            buttons=["download", "fullscreen"],
            elem_id="grid-image",
            **look,
        )
        self.command = gr.Textbox(label="Command", lines=4, buttons=["copy"], elem_id="grid-command", **look)
        live = [self.status, self.start, self.stop, self.image, self.command]
        self._connect_job(self.start.click(self.run, [chosen, *self.axes], live, **RUNS))

    @guarded
    def run(
        self, number: int | None, x: str, x_values: str, y: str | None, y_values: str, request: gr.Request
    ) -> Iterator[Change]:
        run = self.studio.history.image_run(str(request.session_hash), number)
        named = ((x, x_values), (y, y_values))
        axes = [Axis.read(f"{name}={values}") for name, values in named if name is not None]
        if not axes:
            raise InputError("grid: choose a setting for the columns")
        out = self.studio.folder(request) / "grid"  # images of the last grid are kept there and reused
        total, work = grid_job(self.studio, run, axes, out)
        ticket, progress, done, report = self.studio.begin(request, work), Progress(), 0, None
        for event in ticket.events():
            match event:
                case Waiting() | Loading():
                    yield {self.status: progress.status(str(event))}
                case int():
                    done = event
                    progress.update(done / total)
                    yield {self.status: progress.status(f"{done} of {total} images")}
                case _:
                    report = event
        if report is None:
            yield {self.status: line(f"Stopped after {done} of {total} images: the same grid resumes.")}
            return
        best = max(report["cells"], key=lambda cell: cell["reward"])
        at = ", ".join(f"{axis.name} {best[key]}" for key, axis in zip("xy", axes, strict=False))
        yield {
            self.status: line(f"Done: {total} images, the highest reward {short(best['reward'])} at {at}."),
            self.image: gr.update(value=str(out / "grid.png"), visible=True),
            self.command: gr.update(value=as_command(run.prompt, run.config, axes), visible=True),
        }
