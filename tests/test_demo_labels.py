"""The Label tab: each preference is recorded exactly once, and D3PO learns from the recorded folder."""

import json
import os
import random
import shlex
import signal
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

pytest.importorskip("gradio")

import gradio as gr
from finetune_runs import PLAIN, config_of
from PIL import Image
from preloaded import Forked

from steer import D3POTrainer
from steer.apps.cli.finetune import parse_overrides
from steer.apps.demo import label_tab as label_tab_module
from steer.apps.demo.label_tab import (
    Drawing,
    LabelSession,
    LabelTab,
    agreement,
    cohen,
    empty_view,
    fleiss,
    group_view,
    prompts_of,
)
from steer.apps.demo.labels import LabelRequest, LabelStore, Progress, command_of, label_folder, write_label_zip
from steer.apps.demo.steering import Loading
from steer.apps.demo.studio import Busy, Studio, Ticket, Waiting
from steer.apps.finetuning import load_data, read_config
from steer.errors import InputError
from steer.pipelines.training.events import Stopped
from steer.pipelines.training.preference_data import sampling_config_of
from steer.pipelines.training.preference_files import Preference, read_lines, read_preferences

CALL = {"num_inference_steps": 3, "guidance_scale": 1.0}
PROMPTS = ("a red circle", "a blue star")
ADA, BEN, CLEO = (LabelRequest(name, PROMPTS) for name in ("Ada", "Ben", "Cleo"))
# Fleiss' κ in the encyclopedia's example: ten subjects, fourteen raters, five categories. Rounded there to 0.210.
FOURTEEN = """0 0 0 0 14 | 0 2 6 4 2 | 0 0 3 5 6 | 0 3 9 2 0 | 2 2 8 1 1
 | 7 7 0 0 0 | 3 2 6 3 0 | 2 5 3 2 2 | 6 5 2 1 0 | 0 2 2 3 7"""


@pytest.fixture
def store(tmp_path: Path) -> LabelStore:
    return LabelStore(tmp_path / "choices", CALL)


def nothing() -> None:
    """Check that never interrupts sampling."""


def drawn(studio: Studio, store: LabelStore, label_request: LabelRequest, check: Callable[[], object] = nothing) -> str:
    with studio.model("scenes") as pipe:
        return store.draw(pipe, label_request, check).id


def next_group(studio: Studio, store: LabelStore, label_request: LabelRequest) -> str:
    """Group that a visitor is shown next: an existing one, or a new one."""
    offered = store.offer(label_request)
    return drawn(studio, store, label_request) if offered is None else offered.id


def session(studio: Studio, store: LabelStore, label_request: LabelRequest) -> LabelSession:
    return LabelSession(store, label_request, "scenes", studio.worker.submit, studio.model)


def lines(store: LabelStore) -> list[dict[str, Any]]:
    return [row for _, row in read_lines(store.path / "choices.jsonl")]


def until(true: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.01)


# ---- records


def test_preferences_are_read_back_from_the_folder(studio: Studio, store: LabelStore) -> None:
    three = LabelRequest("Ada", PROMPTS, 3)
    group, other, more = drawn(studio, store, three), drawn(studio, store, ADA), drawn(studio, store, ADA)
    assert store.choose("Ada", group, 1) and store.tie("Ada", other) and store.tie("Ada", more, bad=True)
    assert [{key: value for key, value in row.items() if key != "time"} for row in lines(store)] == [
        {"annotator": "Ada", "lot": group, "chosen": 1, "rejected": 0},
        {"annotator": "Ada", "lot": group, "chosen": 1, "rejected": 2},
        {"annotator": "Ada", "lot": other, "tie": True},
        {"annotator": "Ada", "bad": True, "lot": more, "tie": True},
    ]
    assert all(row["time"].endswith("+00:00") for row in lines(store))
    records = read_preferences(store.path)
    assert records.preferences == (Preference(group, 1, 0), Preference(group, 1, 2)) and records.ties == 2
    again = LabelStore(store.path)
    for one in (store, again):
        assert one.progress("Ada") == Progress(choices=1, ties=2, bad=1, undone=0)
        assert one.judgements() == {group: {"Ada": 1}, other: {"Ada": None}, more: {"Ada": None}}
    assert again.call == CALL, "the folder keeps its call"
    assert {one.rows.starts[0] for one in again.groups.values()} == set().union(
        *(one.rows.starts for one in again.groups.values())
    )
    assert len({noise for one in again.groups.values() for noise in one.rows.noises}) == 3 + 2 + 2


def test_a_group_is_judged_once_and_a_second_click_is_ignored(studio: Studio, store: LabelStore) -> None:
    group = drawn(studio, store, ADA)
    assert store.choose("Ada", group, 0)
    before = lines(store)
    assert not store.choose("Ada", group, 1) and not store.tie("Ada", group)
    with pytest.raises(InputError, match="there is no group 'x'"):
        store.choose("Ada", "x", 0)
    with pytest.raises(InputError, match="must be two different numbers below 2"):
        store.choose("Ben", group, 2)
    assert lines(store) == before and store.judgements() == {group: {"Ada": 0}}


def test_undo_appends_a_row_that_cancels_the_annotators_latest_preference(studio: Studio, store: LabelStore) -> None:
    three = LabelRequest("Ada", PROMPTS, 3)
    first, second = drawn(studio, store, three), drawn(studio, store, three)
    for name in ("Ada", "Ben"):
        store.choose(name, first, 0)
        store.choose(name, second, 2)
    before = (store.path / "choices.jsonl").read_bytes()
    assert store.undo("Ada") == store.groups[second]
    assert (store.path / "choices.jsonl").read_bytes().startswith(before)
    others = (Preference(first, 0, 1), Preference(first, 0, 2)) * 2 + (
        Preference(second, 2, 0),
        Preference(second, 2, 1),
    )
    assert sorted(map(repr, read_preferences(store.path).preferences)) == sorted(map(repr, others))
    assert store.judgements()[second] == {"Ben": 2} and store.progress("Ada").undone == 1
    assert store.choose("Ada", second, 1) and read_preferences(store.path).preferences[-1] == Preference(second, 1, 2)
    assert LabelStore(store.path).judgements() == store.judgements()
    assert [store.undo("Ada"), store.undo("Ada"), store.undo("Ada")] == [
        store.groups[second],
        store.groups[first],
        None,
    ]
    assert read_preferences(store.path).preferences == tuple(
        Preference(group, a, b) for group, a, b in ((first, 0, 1), (first, 0, 2), (second, 2, 0), (second, 2, 1))
    )
    assert LabelStore(store.path).progress("Ada") == Progress(0, 0, 0, 3)


def test_an_undo_is_matched_by_group_and_annotator(studio: Studio, store: LabelStore) -> None:
    group = drawn(studio, store, ADA)
    rows: list[dict[str, Any]] = [
        {"chosen": 0, "rejected": 1, "annotator": "Ada"},
        {"tie": True, "annotator": "Ben"},
        {"chosen": 1, "rejected": 0},
        {"undo": True, "annotator": "Ben"},
        {"undo": True, "annotator": "Nobody"},
    ]
    path = store.path / "choices.jsonl"
    path.write_text("".join(json.dumps({"lot": group} | row) + "\n" for row in rows))
    records = read_preferences(store.path)
    assert (records.preferences, records.ties) == ((Preference(group, 0, 1), Preference(group, 1, 0)), 0)
    with path.open("a") as file:
        file.write(json.dumps({"lot": group, "undo": True}) + "\n")  # of rows without an annotator
    assert read_preferences(store.path).preferences == (Preference(group, 0, 1),)
    with path.open("a") as file:
        file.write(json.dumps({"lot": "gone", "undo": True}) + "\n")
    with pytest.raises(InputError, match="line 7: group 'gone' is not in"):
        read_preferences(store.path)
    path.write_text("".join(json.dumps({"lot": group} | row) + "\n" for row in [{"chosen": 5, "rejected": 0}, rows[3]]))
    with pytest.raises(InputError, match="line 1: chosen must be"):
        LabelStore(store.path)


KILLED = """
import sys
from pathlib import Path
from steer.apps.demo.labels import LabelStore
book = LabelStore(Path(sys.argv[1]))
groups, number = [*book.groups], 0
while True:
    group, name = groups[number % len(groups)], f"A{number // len(groups)}"
    book.choose(name, group, number % 2)
    if number % 5 == 4:
        book.undo(name)
    sys.stdout.write(f"{name} {group} {number % 2} {number % 5 == 4}\\n")
    sys.stdout.flush()
    number += 1
"""


def test_a_kill_loses_no_saved_preference(studio: Studio, store: LabelStore) -> None:
    for _ in range(3):
        drawn(studio, store, ADA)
    process = Forked(["-c", KILLED, store.path], Path.cwd(), os.environ)
    lines = [process.stdout.readline()]
    time.sleep(random.Random(0).uniform(0.1, 0.3))
    process.kill()
    lines += process.stdout.readlines()
    assert process.wait() == -signal.SIGKILL and len(lines) > 3
    whole = [line.split() for line in lines if line.endswith("\n")]
    judgements = LabelStore(store.path).judgements()
    for name, group, chosen, undone in whole:
        assert judgements.get(group, {}).get(name) == (None if undone == "True" else int(chosen))
    assert sum(map(len, judgements.values())) - sum(undone == "False" for *_, undone in whole) in (0, 1)
    read_preferences(store.path)


def test_on_a_full_disk_nothing_is_recorded_and_one_line_reports_it(
    studio: Studio, store: LabelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = drawn(studio, store, ADA)

    def full(*args: Any, **more: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(store._folder), "write_preference", full)
    with pytest.raises(InputError, match=r"cannot write there .No space left on device.; make room, then try again"):
        store.choose("Ada", group, 0)
    monkeypatch.undo()
    assert store.judgements() == {} and store.choose("Ada", group, 0)


@pytest.mark.parametrize("name", ["", "x" * 41, "a\nb", "a\x00", "\u202eabc"])
def test_names_are_plain_and_short(name: str) -> None:
    with pytest.raises(InputError, match="the name must have 1 to 40 characters"):
        LabelRequest(name, PROMPTS)
    for images in (1, 5):
        with pytest.raises(InputError, match="images must be 2, 3, 4"):
            LabelRequest("Ada", PROMPTS, images)


# ---- assignment of groups to visitors


def test_every_third_group_is_shared_and_the_others_are_new(studio: Studio, store: LabelStore) -> None:
    first = []
    for _ in range(4):
        first.append(next_group(studio, store, ADA))
        store.choose("Ada", first[-1], 0)
    second = []
    for _ in range(6):
        second.append(next_group(studio, store, BEN))
        store.choose("Ben", second[-1], 0)
    assert len(set(first)) == 4 and len(set(second)) == 6
    assert [first.index(group) if group in first else None for group in second] == [None, None, 0, None, None, 1]
    assert next_group(studio, store, ADA) not in {*first, *second}
    assert {one.rows.prompts[0] for one in store.groups.values()} == set(PROMPTS)


def test_no_visitor_is_offered_a_group_in_use_or_of_other_prompts(studio: Studio, store: LabelStore) -> None:
    name = drawn(studio, store, ADA)
    group, secret = store.groups[name], LabelRequest("Cleo", ("something of mine",))
    own = drawn(studio, store, secret)
    store.choose("Cleo", own, 0)
    assert store.offer(BEN) is None and store.offer(ADA) is None
    store.release("Ada", [group])
    assert store.offer(replace(BEN, images=3)) is None and store.offer(BEN) == group and store.offer(ADA) is None
    for name in ("Ben", "Dora"):
        for _ in range(4):
            assert next_group(studio, store, LabelRequest(name, PROMPTS)) != own
    assert store.groups[own].rows.prompts == ("something of mine",) * 2


def test_a_folder_of_another_model_is_refused(studio: Studio, store: LabelStore) -> None:
    group = drawn(studio, store, ADA)
    settings = json.loads((store.path / "settings.json").read_text()) | {"model": "another"}
    (store.path / "settings.json").write_text(json.dumps(settings))
    again = LabelStore(store.path)
    assert again.choose("Ada", group, 0)
    with pytest.raises(InputError, match=r"made with model 'another', not .*: use another folder"):
        drawn(studio, again, ADA)


# ---- a visitor's session


def test_the_next_group_is_sampled_while_the_current_one_is_shown(studio: Studio, store: LabelStore) -> None:
    way = session(studio, store, ADA)
    events = list(way.advance())
    assert {type(event) for event in events} <= {Waiting, Loading, Drawing} and events[-1] == Drawing(2)
    shown = []
    for number in range(4):
        assert way.shown is not None
        shown.append(way.shown.id)
        until(lambda: way._next)  # sampled in the background
        assert way.answer(shown[-1], str(number % 2)) == ("Saved: left.", "Saved: right.")[number % 2]
        assert list(way.advance()) == [] and way.shown is not None
    assert len({*shown, way.shown.id}) == 5
    assert [row["chosen"] for row in lines(store)] == [0, 1, 0, 1]
    way.end()
    until(lambda: studio.worker.pending == 0)
    assert not store._assigned


def test_two_quick_answers_count_once_and_undo_shows_the_group_again(studio: Studio, store: LabelStore) -> None:
    way = session(studio, store, ADA)
    list(way.advance())
    group = way.shown.id if way.shown else ""
    threads = [threading.Thread(target=way.answer, args=(group, word)) for word in ("0", "1", "tie", "bad") * 5]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(lines(store)) == 1
    assert way.shown is None and way.answer(group, "undo") == "" and way.answer("", "0") == ""
    assert way.answer("", "undo") == "Undone: choose again." and way.shown is not None and way.shown.id == group
    assert way.answer("", "undo") == "", "a second press at once"
    assert way.answer(group, "undo") == "There is nothing to undo."
    for word in ("2", "-1", "x", "9" * 5000, "²", ""):
        with pytest.raises(InputError, match="is not an answer: choose one of the 2 images"):
            way.answer(group, word)
    assert way.answer(group, "bad") == "Saved: all bad."
    list(way.advance())
    other = way.shown.id if way.shown else ""
    assert other not in ("", group) and way.answer(other, "undo") == "Undone: choose again."
    assert way.answer(group, "tie") == "Saved: a tie." and list(way.advance()) == []
    assert way.shown is not None and way.shown.id == other, "it follows the undone group"
    way.end()


def test_stop_interrupts_sampling_between_two_steps_and_the_session_can_start_again(
    studio: Studio, store: LabelStore
) -> None:
    steps = []

    def at_the_second() -> None:
        steps.append(1)
        if len(steps) == 2:
            raise Stopped

    with pytest.raises(Stopped):
        drawn(studio, store, ADA, at_the_second)
    assert len(steps) == 2 and not store.groups and not (store.path / "lots.jsonl").exists()
    way = session(studio, store, ADA)
    events = way.advance()
    next(events)
    way.end()
    list(events)
    until(lambda: studio.worker.pending == 0)
    assert way.shown is None and not store._assigned and way.answer("", "undo") == "" and list(way.advance()) == []
    assert drawn(studio, store, ADA) in LabelStore(store.path).groups


def test_a_visitor_who_leaves_during_sampling_frees_the_worker(studio: Studio, store: LabelStore) -> None:
    busy = threading.Event()
    first = studio.worker.submit(lambda ticket: busy.wait(30) and None)
    way = session(studio, store, ADA)
    events = way.advance()
    assert next(events) == Waiting(1)
    events.close()  # type: ignore[attr-defined]
    busy.set()
    list(first.events())
    until(lambda: studio.worker.pending == 0)
    assert not store.groups


def test_a_failure_or_a_full_queue_is_reported_and_can_be_retried(studio: Studio, store: LabelStore) -> None:
    turns: list[Any] = [Busy("9 others are waiting"), studio.worker.submit, Busy("no"), studio.worker.submit]

    def submit(work: Callable[[Ticket], None]) -> Ticket:
        turn = turns.pop(0)
        if isinstance(turn, Busy):
            raise turn
        return turn(work)

    way = LabelSession(store, ADA, "scenes", submit, studio.model)
    with pytest.raises(Busy, match="9 others are waiting"):
        list(way.advance())
    list(way.advance())
    assert way.shown is not None and way._next == [], "a full queue for the group in advance is not an error"
    way.answer(way.shown.id, "0")
    way.model = "nowhere"
    with pytest.raises(InputError, match="not one of this app's"):
        list(way.advance())
    way.end()


# ---- agreement of annotators


def test_cohens_kappa_of_published_tables() -> None:
    table = {("yes", "yes"): 20, ("yes", "no"): 5, ("no", "yes"): 10, ("no", "no"): 15}
    assert cohen([pair for pair, count in table.items() for _ in range(count)]) == pytest.approx(0.4)
    one, other = ["-", "+", "-", "0", "+"], ["-", "+", "-", "0", "-"]  # in scikit-learn's documentation
    assert cohen(list(zip(one, other, strict=True))) == pytest.approx(0.6875)
    assert cohen([(0, 1), (1, 0)]) == pytest.approx(-1) and cohen([(0, 0), (1, 1)]) == pytest.approx(1)
    assert str(cohen([(0, 0)])) == "nan"


def test_fleiss_kappa_of_a_published_table() -> None:
    rows = [
        [category for category, n in enumerate(map(int, row.split())) for _ in range(n)] for row in FOURTEEN.split("|")
    ]
    assert fleiss(rows) == pytest.approx(0.20993, abs=1e-5)
    assert fleiss([[0, 0, 0], [1, 1, 1]]) == pytest.approx(1) and str(fleiss([[0, 0]])) == "nan"
    # by hand: P = (1 + 1/3) / 2, shares 3/5 and 2/5
    assert fleiss([[0, 0], [0, 1, 1]]) == pytest.approx((2 / 3 - 13 / 25) / (1 - 13 / 25))


def test_agreement_is_over_groups_with_two_or_more_annotators() -> None:
    assert agreement({}) is None and agreement({"x": {"Ada": 0}, "y": {"Ben": 0}}) is None
    pair = agreement(
        {"x": {"Ada": 0, "Ben": 0}, "y": {"Ben": 1, "Ada": None}, "z": {"Ada": 1}, "w": {"Ada": 1, "Ben": 1}}
    )
    assert pair is not None and (pair.annotators, pair.groups, pair.share) == (("Ada", "Ben"), 3, pytest.approx(2 / 3))
    assert pair.kappa == pytest.approx((2 / 3 - 3 / 9) / (1 - 3 / 9))  # by hand: Ada 0 – 1, Ben 0 1 1
    assert str(pair) == (
        "3 sets of images were judged by both of two people. They gave the same answer 67% of the time; "
        "Cohen's κ = 0.50, where 0 is chance and 1 is always."
    )
    three = agreement({"x": {"Ada": 0, "Ben": 0, "Cleo": 1}, "y": {"Ada": 1, "Ben": 1}})
    assert three is not None and three.share == pytest.approx(2 / 4)
    assert "two or more of 3 people" in str(three) and "Fleiss' κ" in str(three)
    same = str(agreement({"x": {"Ada": 0, "Ben": 0}}))
    assert same == "1 set of images was judged by both of two people. They gave the same answer 100% of the time."


# ---- use of the folder


@pytest.mark.hard
def test_d3po_learns_from_the_folder_by_the_command_shown(studio: Studio, store: LabelStore, tmp_path: Path) -> None:
    for number in range(3):
        group = next_group(studio, store, LabelRequest("Ada", PROMPTS, 2 + number % 2))
        store.choose("Ada", group, number % 2)
    store.tie("Ada", next_group(studio, store, ADA), bad=True)
    store.undo("Ada")
    changed = sampling_config_of(store.path) | {"max_steps": 2, "warmup_steps": 0, "micro_batch": 4}
    config = config_of("d3po", **PLAIN | changed, output_dir=str(tmp_path / "run"))
    with studio.model("scenes") as pipe:
        pass
    result = D3POTrainer(pipe, None, config, preferences=store.path).train()
    assert result.step == 2 and [record["pairs"] for record in result.records] == [2, 2]
    owners = Studio(models=("scenes",), labels=store.path)
    words = shlex.split(command_of(owners))
    assert words[:3] == ["steer", "finetune", "d3po-scenes"]
    config = read_config(words[2], parse_overrides(words[3:]) | {"output_dir": str(tmp_path / "out"), "device": "cpu"})
    assert load_data(config, False)["train_prompts"] == [] and config.job.preferences == str(store.path)
    assert config.training.num_inference_steps == 3 and config.training.num_generations == 2
    owners.close()
    assert store.path.exists(), "a folder given by the owner is kept"


def test_a_zip_is_the_folder(studio: Studio, store: LabelStore, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing has been chosen yet"):
        write_label_zip(store.path, tmp_path / "x.zip")
    group = drawn(studio, store, ADA)
    store.choose("Ada", group, 1)
    (store.path / "images" / "half.png.new").write_bytes(b"not yet whole")
    write_label_zip(store.path, tmp_path / "x.zip")
    with zipfile.ZipFile(tmp_path / "x.zip") as file:
        file.extractall(tmp_path / "there")
    assert read_preferences(tmp_path / "there" / "choices").digest() == read_preferences(store.path).digest()
    assert not (tmp_path / "there" / "choices" / "images" / "half.png.new").exists()


# ---- the tab


def visitor(name: str) -> Any:
    return SimpleNamespace(session_hash=name)


def press(tab: LabelTab, who: Any, group: str, word: str) -> list[Any]:
    return list(tab.answer(SimpleNamespace(group=group, answer=word), who))  # type: ignore[arg-type]


@pytest.fixture
def tab(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LabelTab]:
    monkeypatch.setattr(label_tab_module, "CALL", CALL)
    studio = Studio(models=("scenes",))
    with gr.Blocks():
        yield LabelTab(studio)
    studio.close()


def test_each_visitor_has_a_session_of_their_own(tab: LabelTab) -> None:
    ada, ben = visitor("a"), visitor("b")
    views = {}
    for who, name in ((ada, " Ada  <b>"), (ben, "Ben")):
        *_, last = tab.begin(name, "a red <script> star\n\n a red <script> star", 2, who)
        views[name] = last
        assert last[tab.view].count("<img") == 2 and "<script>" not in last[tab.view] + last[tab.progress]
        assert "a red &lt;script&gt; star" in last[tab.view]
    assert "Ada &lt;b&gt;: 0 choices" in views[" Ada  <b>"][tab.progress]
    shown = {key: one.shown.id for key, one in tab._visitors.items() if one.shown}
    assert len(set(shown.values())) == 2
    assert press(tab, visitor("c"), shown["a"], "0")[-1][tab.status].count("Press Start first") == 1
    before = press(tab, ben, shown["a"], "0")  # not the group that Ben is shown
    assert before[-1][tab.view].count(shown["b"]) == 1 and not (tab.store.path / "choices.jsonl").exists()
    last = press(tab, ada, shown["a"], "0")[-1]
    assert "Saved: left." in last[tab.status] and "1 choice, 0 ties, 0 undone" in last[tab.progress]
    updates = tab.begin("Ben", "", 3, ben)
    assert [*updates][-1][tab.view].count("<img") == 3
    ended = tab.end(ada)
    assert "Stopped" in ended[tab.status] and "press Start" in ended[tab.view]
    tab.forget(ben)
    assert not tab._visitors and not tab.store._assigned


def test_nothing_is_shown_after_stop_during_sampling(tab: LabelTab) -> None:
    who = visitor("a")
    views = tab.begin("Ada", "", 2, who)
    next(views)
    next(views)
    assert "Stopped" in tab.end(who)[tab.status]
    assert list(views) == []


def test_a_new_start_replaces_the_earlier_one(tab: LabelTab) -> None:
    who = visitor("a")
    before = tab.begin("Ada", "a star", 2, who)
    next(before)
    next(before)
    *_, last = tab.begin("Ada", "a cross", 2, who)
    assert "a cross" in last[tab.view] and list(before) == []
    tab.forget(who)


def test_a_sampling_error_is_reported_and_start_works_again(tab: LabelTab, monkeypatch: pytest.MonkeyPatch) -> None:
    who, tab.model = visitor("a"), "nowhere"
    *_, last = tab.begin("Ada", "a star", 2, who)
    assert "not one of this app" in last[tab.status] and "Press Start to try again" in last[tab.view]
    tab.model = "scenes"
    with monkeypatch.context() as patched:
        for error, message in (
            (torch.OutOfMemoryError(), "memory is full: fewer images at a time need less"),
            (OSError(28, "No space left on device", str(tab.studio.home / "x")), "No space left on device"),
        ):
            patched.setattr(tab.store, "draw", Mock(side_effect=error))
            *_, last = tab.begin("Ada", "a star", 2, who)
            assert message in last[tab.status] and str(tab.studio.home) not in last[tab.status]
        patched.setattr(tab.store, "draw", Mock(side_effect=RuntimeError("of another kind")))
        with pytest.raises(RuntimeError, match="of another kind"):
            list(tab.begin("Ada", "a star", 2, who))
    context = gr.context.Context.root_block
    assert context is not None
    events = {number for number, event in context.fns.items() if event.fn in (tab.begin, tab.answer)}
    assert {event.trigger_after for event in context.fns.values() if event.trigger_only_on_failure} >= events
    assert [*tab.begin("Ada", "", 2, who)][-1][tab.view].count("<img") == 2
    tab.forget(who)


def test_invalid_input_is_reported_in_the_status(tab: LabelTab) -> None:
    for name, prompts, message in (
        ("", "", "the name must have"),
        ("x" * 41, "", "the name must have"),
        ("Ada", "\n".join(map(str, range(201))), "201 prompts: at most 200"),
        ("Ada", "x" * 501, "a prompt of 501 characters: at most 500"),
    ):
        (only,) = tab.begin(name, prompts, 2, visitor("a"))
        assert message in only[tab.status] and 'role="alert"' in only[tab.status] and list(only) == [tab.status]
    with pytest.raises(InputError, match="give one or more, one a line"):
        prompts_of("", "someone/else")
    assert len(prompts_of("", "scenes")) > 500
    assert "nothing has been chosen yet" in tab.download(visitor("a"))[tab.status]


def test_preferences_without_a_folder_are_offered_as_a_zip(tab: LabelTab) -> None:
    who = visitor("a")
    list(tab.begin("Ada", "", 2, who))
    shown = tab._visitors["a"].shown
    assert shown is not None and tab.store.path == label_folder(tab.studio) == tab.studio.home / "labels"
    press(tab, who, shown.id, "1")
    path = Path(tab.download(who)[tab.file]["value"])
    assert path.is_relative_to(tab.studio.folder(who)) and zipfile.is_zipfile(path)


def test_the_tab_has_no_public_endpoint_and_no_download_of_an_owners_folder(tmp_path: Path) -> None:
    studio = Studio(models=("scenes",), labels=tmp_path / "it's mine")
    with gr.Blocks() as app:
        LabelTab(studio)
    assert {fn.api_visibility for fn in app.fns.values()} == {"private"}
    config = json.dumps(app.get_config_file(), default=str)
    assert "Make a zip" not in config and "it&#x27;s mine" in config
    assert shlex.split(command_of(studio))[4] == str(tmp_path / "it's mine")
    assert not (tmp_path / "it's mine").exists(), "no folder before the first group"
    studio.close()


def test_the_view_escapes_prompts_and_names_each_image() -> None:
    evil = "\"><script>alert(1)</script><img src=x onerror='alert(1)'>"
    view = group_view(3, "abc", evil, [b"1", b"2"])
    assert "<script" not in view and view.count("<img") == 2 and view.count('alt="') == 2
    assert 'data-turn="3" data-group="abc"' in view and 'aria-keyshortcuts="ArrowLeft"' in view
    assert "Both bad" in view and "All bad" in group_view(4, "abc", "a", [b"1", b"2", b"3"])
    assert "<script" not in empty_view(1, evil) and 'data-answer="undo"' in empty_view(1, "x", undo=True)


def test_images_are_those_of_the_folder(tab: LabelTab) -> None:
    list(tab.begin("Ada", "", 4, visitor("a")))
    shown = tab._visitors["a"].shown
    assert shown is not None
    sizes = [Image.open(tab.store.path / shown.image_file(number)).size for number in range(4)]
    assert sizes == [(64, 64)] * 4
    (tab.store.path / shown.image_file(2)).unlink()
    assert "-2.png is missing" in press(tab, visitor("a"), "stale", "0")[-1][tab.view]
