"""The app: its tabs, how it looks, and where it listens."""

import os
from pathlib import Path
from typing import Any

import gradio as gr

from steer.apps.demo.api import PublicApi
from steer.apps.demo.finetune_tab import FinetuneTab
from steer.apps.demo.label_tab import LabelTab
from steer.apps.demo.rewards_tab import RewardsTab
from steer.apps.demo.steer_tab import SteerTab
from steer.apps.demo.studio import Studio
from steer.errors import InputError

STYLE = Path(__file__).parent / "style.css"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
MOST_UPLOADED = "10mb"
MOST_QUEUED = 64  # events of all visitors that wait
KEPT = (600, 6 * 3600)  # seconds: how often files that nobody needs are looked for, and how old they then are
INTRODUCTION = "Images that score higher by a reward you choose, and a look at how they got there."


def build(studio: Studio) -> gr.Blocks:
    """The app over a studio, not yet launched."""
    with gr.Blocks(title="steer", analytics_enabled=False, delete_cache=KEPT) as app:
        gr.Markdown(f"# steer\n{INTRODUCTION}")
        with gr.Tabs() as tabs:
            with gr.Tab("Steer", id="steer"):
                steer = SteerTab(studio)
            with gr.Tab("Label", id="label"):
                LabelTab(studio)
            with gr.Tab("Finetune", id="finetune"):
                finetune = FinetuneTab(studio)
            with gr.Tab("Rewards", id="rewards"):
                RewardsTab(studio)
        finetune.loaded(steer.weights, tabs)
        PublicApi(studio)
        app.unload(studio.forget)
    app.queue(max_size=MOST_QUEUED, default_concurrency_limit=8)
    return app


def check_address(host: str, share: bool, auth: tuple[str, str] | None) -> None:
    """Raises InputError where others could reach the app, and anybody could use it."""
    if auth is None and (share or host not in LOOPBACK):
        where = "--share" if share else f"--host {host}"
        raise InputError(f"{where} lets others in: give --auth USER:PASSWORD with it")


def launch(studio: Studio, host: str, port: int | None, auth: tuple[str, str] | None, share: bool) -> gr.Blocks:
    """Serves the app from a thread. Raises InputError for an address that is not safe, or not free."""
    check_address(host, share, auth)
    try:
        return serve(studio, server_name=host, server_port=port, auth=auth, share=share, prevent_thread_lock=True)
    except OSError as error:
        raise InputError(f"--host {host}, --port {port}: cannot listen there ({error})") from error


def serve(studio: Studio, **address: Any) -> gr.Blocks:
    """Serves the app as gradio's `launch` is told; who may reach it is for the caller to decide."""
    os.environ["GRADIO_TEMP_DIR"] = str(studio.home / "served")  # what gradio serves lies with the rest
    app = build(studio)
    app.launch(
        **address,
        max_file_size=MOST_UPLOADED,
        ssr_mode=False,
        theme=theme(),
        css_paths=[STYLE],
        footer_links=["api"],
        enable_monitoring=False,
        quiet=True,
    )
    return app


def theme() -> gr.themes.Base:
    """Gradio's plain theme, with the fonts that the machine has: nothing is fetched."""
    return gr.themes.Base(
        primary_hue="blue",
        font=("system-ui", "sans-serif"),
        font_mono=("ui-monospace", "monospace"),
    )
