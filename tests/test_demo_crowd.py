"""Twenty visitors and one worker: order, refusals that leave the form as it was, memory, and a killed server."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("gradio")

import gradio as gr

from steer.apps.demo.finetune_tab import FinetuneTab
from steer.apps.demo.history import History
from steer.apps.demo.rewards_tab import RewardsTab
from steer.apps.demo.steer_tab import SteerTab
from steer.apps.demo.studio import MAX_WAITING_JOBS, JobTab, Studio, Ticket
from steer.apps.demo.text_tab import TextTab
from steer.apps.recipes import read_metadata

VISITORS = [f"visitor{number}" for number in range(20)]
SMALL: dict[str, Any] = {"prompts": "a red star", "method": "base", "reward": "brightness", "particles": 1, "steps": 1}
SMALL |= {"compare": False, "seed": 3}
MEGABYTE = 2**20


@pytest.fixture
def studio() -> Iterator[Studio]:
    made = Studio(("scenes",))
    for name in VISITORS:
        made.history.enter(name, None)
    yield made
    made.close()


def visitor(name: str) -> Any:
    return SimpleNamespace(session_hash=name, username=None)


def given(tab: Any, changes: dict[str, Any]) -> dict[Any, Any]:
    fields = {field: changes.get(name, field.value) for name, field in tab.fields.items()}
    return fields | ({tab.weights: None} if hasattr(tab, "weights") else {})


def press(tab: SteerTab, name: str, **changes: Any) -> list[dict[Any, Any]]:
    """Press Steer, and wait for the end: all changes of the page."""
    return list(tab.run(given(tab, SMALL | changes), visitor(name)))


class Held:
    """A job that holds the worker while visitors arrive one after the other, each in a thread."""

    def __init__(self, tab: SteerTab) -> None:
        self.tab, self.free = tab, threading.Event()
        self.pages: dict[str, list[dict[Any, Any]]] = {}
        self.threads: list[threading.Thread] = []
        worker = tab.studio.worker
        worker.submit(self._hold)

    def _hold(self, ticket: Ticket) -> None:
        self.free.wait(60)

    def arrive(self, name: str) -> None:
        """Press Steer as a visitor, and return once that waits or is refused."""
        shown = self.pages[name] = list[dict[Any, Any]]()

        def read() -> None:
            for change in self.tab.run(given(self.tab, SMALL), visitor(name)):
                shown.append(change)

        thread = threading.Thread(target=read)
        thread.start()
        self.threads.append(thread)
        deadline = time.monotonic() + 60
        while not any("waiting" in str(change.get(self.tab.status, "")).lower() for change in shown):
            assert time.monotonic() < deadline, shown
            time.sleep(0.01)

    def release(self) -> None:
        self.free.set()
        for thread in self.threads:
            thread.join(120)
            assert not thread.is_alive()


def served_order(studio: Studio) -> list[str]:
    """The visitors with finished runs, in the order of their ends."""
    runs = [(run.number, name) for name in VISITORS for run in studio.history.runs(name)]
    return [name for _, name in sorted(runs)]


def last(changes: list[dict[Any, Any]], component: Any) -> str:
    return str([change[component] for change in changes if component in change][-1])


def test_twenty_visitors_are_served_in_the_order_of_their_arrival_and_the_rest_is_refused(
    studio: Studio, tab: SteerTab
) -> None:
    held = Held(tab)
    for name in VISITORS:
        held.arrive(name)
    first, rest = VISITORS[:MAX_WAITING_JOBS], VISITORS[MAX_WAITING_JOBS:]
    for number, name in enumerate(first):
        count = "1 run comes" if number == 0 else f"{number + 1} runs come"
        assert f"Waiting: {count} first." in last(held.pages[name], tab.status), "the one that holds the worker counts"
    for name in rest:
        with_status = [change for change in held.pages[name] if tab.status in change]
        assert "others are waiting for their turn" in with_status[-1][tab.status]
        assert not {*tab.fields.values(), tab.view, tab.results.box} & {key for one in held.pages[name] for key in one}
    held.release()
    assert served_order(studio) == first
    for name in rest:
        assert "Done" in last(press(tab, name), tab.status)
    assert served_order(studio) == VISITORS, "each once"
    assert studio.worker.pending == 0


def test_a_visitor_who_presses_ten_times_has_one_place_behind_the_others(studio: Studio, tab: SteerTab) -> None:
    held = Held(tab)
    eager, *others = VISITORS[:4]
    held.arrive(eager)
    for name in others:
        held.arrive(name)
    for _ in range(9):
        held.arrive(eager)
    assert studio.worker.pending == 1 + len(others) + 1
    held.release()
    assert served_order(studio) == [*others, eager]


def resident() -> int:
    """The bytes of memory that this process holds."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc")
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_and_files_of_visitors_are_bounded(studio: Studio, tab: SteerTab) -> None:
    for name in VISITORS[:4]:
        press(tab, name)
    before = resident()
    for _ in range(2):
        for name in VISITORS:
            press(tab, name)
    assert resident() - before < 64 * MEGABYTE, "40 runs"
    folders = [len([*(studio.home / "visitors" / name / "steer").iterdir()]) for name in VISITORS]
    assert max(folders) <= 2, "the last run, which the page may still load, and this one"
    for name in VISITORS:
        studio.forget(visitor(name))
    assert not [*(studio.home / "visitors").iterdir()] and not studio._running


SERVER = """
import sys, threading, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import gradio as gr
import test_demo_crowd as crowd
from steer.apps.demo.steer_tab import SteerTab
from steer.apps.demo.studio import Busy, Studio, Worker
studio = Studio(("scenes",), worker=Worker(20), home=Path(sys.argv[2]), history_file=Path(sys.argv[3]))
with gr.Blocks():
    tab = SteerTab(studio)
def visit(name):
    while "Done" in crowd.last(crowd.press(tab, name), tab.status):
        print(name, flush=True)
arrived = threading.Event()
studio.worker.submit(lambda ticket: arrived.wait(60))  # nobody's first turn ends before everybody waits
threads = [threading.Thread(target=visit, args=[name]) for name in crowd.VISITORS]
for thread in threads:
    thread.start()
while studio.worker.pending <= len(crowd.VISITORS):
    time.sleep(0.01)
arrived.set()
for thread in threads:  # executors take no work once the main thread has ended
    thread.join()
"""


@pytest.mark.hard
def test_a_server_that_is_killed_among_twenty_visitors_keeps_every_run_that_was_shown(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    file = tmp_path / "history.sqlite"
    words = [str(Path(__file__).parent), str(tmp_path / "home"), str(file)]
    process = subprocess.Popen([sys.executable, "-c", SERVER, *words], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    shown = [process.stdout.readline().strip() for _ in range(25)]
    os.kill(process.pid, signal.SIGKILL)
    shown += process.stdout.read().split()
    process.wait()
    assert {*shown[:20]} == {*VISITORS}, "each one's first turn comes before anybody's second"
    history = History(file, shared=False)
    runs = history.runs("page")
    assert len(runs) >= min(len(shown), history.limits.runs)
    for run in runs:
        assert [read_metadata(png).prompt for png in history.images("page", run.number)] == ["a red star"]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"prompts": " "}, "the prompt is empty"),
    ({"prompts": "a\nb\nc\nd\ne"}, "5 prompts: at most 4"),
    ({"prompts": "a" * 501}, "a prompt of 501 characters"),
    ({"steps": None}, "the field is empty"),
    ({"particles": 10**6}, "at most"),
    ({"seed": -3}, "seed must be 0 to"),
    ({"seed": 1.5}, "seed must be a whole number"),
    ({"reward": "teleport"}, "teleport"),
    ({"reward": "/etc/passwd"}, "rewards have names"),
    ({"width": 5000}, "at most 1024"),
    ({"width": 72}, "give both"),
    ({"width": 7, "height": 64}, "7"),
    ({"scheduler": "teleport"}, "teleport"),
    ({"scheduler": "flow-euler"}, "flow-euler"),
    ({"negative_prompt": "a" * 501}, "shorten it"),
    ({"loras": [f"{n}.safetensors" for n in range(5)]}, "5 LoRA files"),
    ({"loras": ["a.safetensors"], "lora_weights": "1, 2"}, "2 for 1 files"),
    ({"adapter": True}, "no finetuned weights"),
    ({"model": "/srv/etc"}, "model &#x27;etc&#x27; is not one of this app"),
]


@pytest.mark.few(6)
@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_a_refusal_leaves_the_form_as_it_was(
    studio: Studio, tab: SteerTab, changes: dict[str, Any], message: str
) -> None:
    asked = SMALL | changes
    shown = press(tab, VISITORS[0], **changes)
    assert message in last(shown, tab.status) and 'role="alert"' in last(shown, tab.status)
    assert shown[-1][tab.start]["interactive"] and not shown[-1][tab.stop]["interactive"]
    for change in shown:
        for name, field in tab.fields.items():
            assert field not in change or change[field] == asked.get(name, field.value), name
    assert not studio.history.runs(VISITORS[0]) and "Done" in last(press(tab, VISITORS[0]), tab.status)


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (TextTab, {"particles": 10**6}, "at most"),
        (TextTab, {"reward": "bigram:/etc/passwd"}, "rewards have names"),
        (FinetuneTab, {"updates": 10**6}, "updates must be 1 to"),
        (FinetuneTab, {"held_out": "/etc/passwd"}, "rewards have names"),
        (FinetuneTab, {"learning_rate": None}, "learning rate"),
        (FinetuneTab, {"method": "choices"}, "nothing has been labelled yet"),
    ],
)
def test_a_refusal_in_another_tab_does_too(
    studio: Studio, kind: type[JobTab], changes: dict[str, Any], message: str
) -> None:
    with gr.Blocks():
        tab: Any = kind(studio)  # type: ignore[call-arg]
    run = tab.begin if kind is FinetuneTab else tab.run
    shown = list(run(given(tab, changes), visitor("visitor0")))
    assert message in last(shown, tab.status)
    assert {key for change in shown for key in change} - {tab.start, tab.stop} == {tab.status}


def test_a_refusal_of_images_leaves_them_and_the_scores_before(studio: Studio, tmp_path: Path) -> None:
    with gr.Blocks():
        tab = RewardsTab(studio)
    shown = list(tab.run([], "", ["brightness"], "", visitor("visitor0")))
    assert "drop some first" in last(shown, tab.status)
    assert {key for change in shown for key in change} == {tab.status, tab.start, tab.stop}
