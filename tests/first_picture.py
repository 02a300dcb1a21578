"""Work until the first picture of a run in the Steer tab: PYTHONPATH=CHECKOUT python tests/first_picture.py [METHOD]

Of any version of the app, with its fields as they are. Counts denoiser calls, and the processor's seconds, which other
work on the machine hardly changes; seconds in a browser: test_browser_demo.py, `-k first_picture`.
"""

import sys
import time
from types import SimpleNamespace
from typing import Any
from unittest import mock

import gradio as gr
import torch
from diffusers import UNet2DConditionModel
from torch.nn.modules.module import register_module_forward_hook

from steer.apps.demo.steer_tab import SteerTab
from steer.apps.demo.steering import Frame
from steer.apps.demo.studio import Studio, Ticket


def main(method: str | None = None) -> None:
    torch.set_num_threads(1)
    calls, started, first = 0, 0.0, ""

    def count(module: object, given: object, output: object) -> None:
        nonlocal calls
        calls += isinstance(module, UNet2DConditionModel)

    def say(ticket: Ticket, event: Any, original: Any = Ticket.say) -> None:
        nonlocal first
        if isinstance(event, Frame):
            first = first or so_far()
        original(ticket, event)

    def so_far() -> str:
        return f"{time.process_time() - started:.2f} s, {calls} denoiser calls"

    register_module_forward_hook(count)
    studio, visitor = Studio(("scenes",)), SimpleNamespace(session_hash="visitor", username=None)
    if (history := getattr(studio, "history", None)) is not None:
        history.enter("visitor", None)
    with gr.Blocks():
        tab: Any = SteerTab(studio)
    given = {field: field.value for field in tab.fields.values()} | {tab.weights: None}
    given |= {} if method is None else {tab.fields["method"]: method, tab.fields["particles"]: 4}
    for seed in (0, 1, 2):  # the first run loads the model
        calls, started, first = 0, time.process_time(), ""
        with mock.patch.object(Ticket, "say", say):
            list(tab.run(given | {tab.fields["seed"]: seed}, visitor))
        print(f"{given[tab.fields['method']]}: first picture {first}; end {so_far()}", flush=True)  # noqa: T201
    studio.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
