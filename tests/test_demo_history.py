"""The history of finished runs: visitors, limits, kills; and links to settings."""

import json
import os
import secrets
import sqlite3
import threading
import time
import zipfile
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs

import pytest
from PIL import Image
from preloaded import Forked

pytest.importorskip("gradio")

import gradio as gr

from steer.apps.demo.history import History, Limits, default_path
from steer.apps.demo.history_tab import HistoryTab, changed_settings, runs_view
from steer.apps.demo.label_tab import LabelTab
from steer.apps.demo.labels import label_folder
from steer.apps.demo.links import MAX_CHARACTERS, PARAMETER, link_of, read_link
from steer.apps.demo.rewards_tab import RewardsTab
from steer.apps.demo.steer_tab import SteerTab, fields_from_settings, settings_of
from steer.apps.demo.steering import Frame
from steer.apps.demo.studio import Studio
from steer.apps.demo.text_steering import ScoredText, TextResult
from steer.apps.demo.text_tab import TextTab, text_settings
from steer.apps.methods import METHODS
from steer.apps.recipes import Recipe, image_hash, read_metadata, write_png
from steer.apps.sampling import SavedImage
from steer.apps.settings import SamplingConfig
from steer.errors import InputError
from steer.pipelines.base import Cost
from steer.rewards.preference_pairs import read_pairs

MODELS = ("scenes", "scenes-turbo")
ASKED: dict[str, Any] = {
    "method": "fk",
    "reward": "brightness",
    "particles": 3,
    "lam": 60.0,
    "auto": False,
    "steps": 8,
    "guidance": 2.0,
    "iterations": 3,
    "seed": 5,
    "fresh": False,
    "model": "scenes",
    "compare": True,
    "adapter": False,
}


def saved(folder: Path, rewards: tuple[float, ...] = (0.5, 0.9, 0.1), **changes: Any) -> list[SavedImage]:
    """Write finished images of one run, of distinct colours."""
    folder.mkdir(parents=True, exist_ok=True)
    settings, images = settings_of(ASKED | changes), []
    for rank, reward in enumerate(rewards):
        image = Image.new("RGB", (32, 32), (60 * rank, 10, settings.seed % 256))
        recipe = Recipe("a red star", settings, False, rank, reward, {}, image_hash(image), "0", "0", "0", "cpu", "f32")
        write_png(image, path := folder / f"{settings.seed}-{rank}.png", recipe)
        images.append(SavedImage(path, recipe))
    return images


def local(folder: Path, **limits: Any) -> History:
    return History(folder / "history.sqlite", shared=False, limits=Limits(**limits))


def test_a_run_is_read_back_after_a_restart_and_restores_its_settings(tmp_path: Path) -> None:
    images = saved(tmp_path)
    number = local(tmp_path).record("page", images, images[2:], 1.5)
    history = local(tmp_path)
    (run,) = history.runs("another page")
    assert (run.number, run.prompt, run.rewards, run.best) == (number, "a red star", (0.5, 0.9, 0.1), 1)
    assert (run.base_reward, run.seconds) == (0.1, 1.5) and abs(run.time - time.time()) < 60
    pngs = history.images("another page", number)
    assert pngs == [one.path.read_bytes() for one in images]
    recipe = read_metadata(pngs[0])
    assert settings_of(fields_from_settings(recipe.prompt, recipe.settings, MODELS)) == settings_of(ASKED)
    assert (tmp_path / "history.sqlite").stat().st_mode & 0o077 == 0, "other users of the machine cannot read it"


WRITER = """
import sys
from pathlib import Path
from steer.apps.demo.history import History
from steer.apps.recipes import read_metadata
from steer.apps.sampling import SavedImage
folder = Path(sys.argv[1])
history = History(folder / "history.sqlite", shared=False)
images = [SavedImage(path, read_metadata(path)) for path in sorted(folder.glob("*.png"))]
while True:
    print(history.record("page", images), flush=True)
"""


def test_a_killed_process_leaves_whole_runs(tmp_path: Path) -> None:
    pngs = [one.path.read_bytes() for one in saved(tmp_path)]
    process = Forked(["-c", WRITER, tmp_path], tmp_path, os.environ)
    written = [int(process.stdout.readline()) for _ in range(3)]
    time.sleep(0.05)  # into a write, most likely
    process.kill()
    written += map(int, process.stdout.read().split())
    process.wait()
    history = local(tmp_path)
    numbers = [run.number for run in history.runs("page")]
    assert {*written[-100:]} <= {*numbers}, "each run that was reported as written"
    assert all(history.images("page", number) == pngs for number in numbers)
    assert sqlite3.connect(history.path).execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert history.record("page", saved(tmp_path)) > max(written)


def test_the_oldest_runs_are_deleted_beyond_the_limits_and_the_file_shrinks(tmp_path: Path) -> None:
    few = local(tmp_path / "few", runs=3)
    numbers = [few.record("page", saved(tmp_path, seed=seed)) for seed in range(5)]
    assert [run.number for run in few.runs("page")] == numbers[:1:-1]
    images = saved(tmp_path)
    size = sum(one.path.stat().st_size for one in images)
    small = local(tmp_path / "small", bytes=8 * size)
    for _ in range(40):
        small.record("page", images)
    assert 4 <= len(small.runs("page")) <= 7
    assert small.path.stat().st_size < 8 * size + 2**17
    one = local(tmp_path / "one", bytes=size - 1)
    assert len(one.images("page", one.record("page", images))) < 3, "the first images that fit"
    with pytest.raises(InputError, match="at most 100 fit"):
        local(tmp_path / "none", bytes=100).record("page", images)
    orphans = "SELECT count(*) FROM images WHERE run NOT IN (SELECT number FROM runs)"
    assert sqlite3.connect(small.path).execute(orphans).fetchone() == (0,)


def test_visitors_of_a_shared_app_see_their_own_runs_only(tmp_path: Path) -> None:
    history = History(tmp_path / "history.sqlite", limits=Limits(total_runs=3))
    ada = secrets.token_urlsafe(32)
    history.enter("ada-1", ada)
    history.enter("ben-1", "forged <script>")
    history.enter("ben-2", "forged <script>")
    assert len({history.owner(page) for page in ("ada-1", "ben-1", "ben-2")}) == 3
    number = history.record("ada-1", saved(tmp_path))
    assert history.runs("ben-1") == []
    for read in (history.run, history.images):
        with pytest.raises(InputError, match="not there any more"):
            read("ben-1", number)
    history.delete("ben-1", number)
    history.delete("ben-1")
    history.leave("ada-1")
    with pytest.raises(InputError, match="reload"):
        history.runs("ada-1")
    history.enter("ada-2", ada)
    assert [run.number for run in history.runs("ada-2")] == [number], "after a reload of the page"
    history.enter("cleo", ada, user="cleo")
    assert history.runs("cleo") == [], "the same browser with another login"
    assert ada.encode() not in history.path.read_bytes()
    for seed in range(3):
        history.record("ben-1", saved(tmp_path, seed=seed))
    assert history.runs("ada-2") == [] and len(history.runs("ben-1")) == 3, "the total is bounded too"


def test_deleted_and_old_runs_are_gone_from_the_file(tmp_path: Path) -> None:
    history = local(tmp_path)
    history.record("page", saved(tmp_path, seed=77))
    kept = history.record("page", saved(tmp_path, seed=78))
    history.delete("page", kept - 1)
    assert [run.settings["seed"] for run in history.runs("page")] == [78]
    assert b'"seed": 77' not in history.path.read_bytes()
    time.sleep(0.02)
    assert local(tmp_path, seconds=0.01).runs("page") == []


def test_several_threads_write_at_the_same_time(tmp_path: Path) -> None:
    images, history = saved(tmp_path), local(tmp_path)
    threads = [threading.Thread(target=lambda: [history.record("page", images) for _ in range(5)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(history.runs("page")) == 20


def test_a_file_that_is_no_history_is_kept_aside_and_one_that_is_gone_is_not_made_again(tmp_path: Path) -> None:
    path = tmp_path / "history.sqlite"
    path.write_bytes(b"no database, but long enough to be read as the header of one" * 20)
    history = local(tmp_path)
    assert history.runs("page") == [] and (tmp_path / "history.sqlite.old").read_bytes().startswith(b"no database")
    path.unlink()
    with pytest.raises(InputError, match="unable to open"):
        history.record("page", saved(tmp_path))
    assert not path.exists()
    with pytest.raises(InputError, match="cannot write"):
        History(path / "file" / "history.sqlite") if path.write_text("") == 0 else None
    images = saved(tmp_path / "gone")
    images[0].path.unlink()
    with pytest.raises(InputError, match="images of this run are gone"):
        local(tmp_path / "new").record("page", images)


def test_the_file_of_a_user_is_in_their_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_path() == tmp_path / "steer" / "demo" / "history.sqlite"


def test_a_closed_app_leaves_no_folder_behind(tmp_path: Path) -> None:
    studio = Studio(("scenes",), home=tmp_path / "home")
    visitor: Any = SimpleNamespace(session_hash="late")
    assert studio.folder(visitor).is_dir()
    studio.close()
    studio.forget(visitor)  # the page is closed after the app
    assert not studio.home.exists()
    with pytest.raises(InputError, match="the app has ended"):
        studio.folder(visitor)
    with pytest.raises(InputError, match="unable to open"):
        studio.history.enter("late", None)
        studio.history.runs("late")
    assert not studio.home.exists()


def given(link: str) -> str:
    """The value that the server reads from a link."""
    return parse_qs(link.removeprefix("?"))[PARAMETER][0]


@pytest.mark.parametrize("method", METHODS)
def test_a_link_holds_all_settings(method: str) -> None:
    asked = ASKED | {"method": method, "particles": 6, "reward": "preference:scenes + jpeg:0.5", "compare": False}
    settings = settings_of(asked | ({"model": "scenes-turbo", "steps": 1} if method == "reno" else {}))
    prompt = 'a "red" star & 50 % <b>é</b> 星'
    link = link_of(prompt, settings)
    assert link.isascii() and " " not in link and read_link(given(link)) == (prompt, settings)
    assert settings_of(fields_from_settings(prompt, settings, MODELS)) == settings


def test_no_link_is_made_that_cannot_be_opened() -> None:
    settings = settings_of(ASKED)
    with pytest.raises(InputError, match="zip of the Finetune tab"):
        link_of("a star", SamplingConfig.of(**settings.plain() | {"lora": "finetuned/final"}))
    with pytest.raises(InputError, match=f"at most {MAX_CHARACTERS}"):
        link_of("星" * 1000, settings)


PLAIN = {"model": "scenes", "method": "fk", "reward": "jpeg", "particles": 2, "seed": 0, "steps": 8, "guidance": 2.0}
HOSTILE: list[tuple[Any, str]] = [
    ("{", "not JSON"),
    ("[" * 5000, "not JSON"),
    ("9" * 5000, "not JSON"),
    (" " * 6001, "at most 6000"),
    ([], "expected a prompt and settings"),
    ({"prompt": "a", "settings": PLAIN, "more": 1}, "expected a prompt and settings"),
    ({"prompt": "a\nb", "settings": PLAIN}, "one line of text"),
    ({"prompt": "\ud800", "settings": PLAIN}, "one line of text"),
    ({"prompt": "a" * 501, "settings": PLAIN}, "at most 500"),
    ({"prompt": "a", "settings": [1]}, "expected an object"),
    ({"prompt": "a", "settings": {"model": "scenes"}}, "is missing"),
    ({"prompt": "a", "settings": PLAIN | {"__class__": 1}}, "unknown key"),
    ({"prompt": "a", "settings": PLAIN | {"particles": 10**9}}, "expected 0 to"),
    ({"prompt": "a", "settings": PLAIN | {"particles": 17}}, "at most 16 in this app"),
    ({"prompt": "a", "settings": PLAIN | {"steps": "8"}}, "expected int or null"),
    ({"prompt": "a", "settings": PLAIN | {"guidance": float("nan")}}, "finite"),
    ({"prompt": "a", "settings": PLAIN | {"model": "/etc"}}, "which this app does not have"),
    ({"prompt": "a", "settings": PLAIN | {"method": "teleport"}}, "unknown method"),
    ({"prompt": "a", "settings": PLAIN | {"lora": "/etc/passwd"}}, "no finetuned weights are loaded"),
    ({"prompt": "a", "settings": PLAIN | {"vae": "/etc/passwd"}}, "has no field here"),
    ({"prompt": "a", "settings": PLAIN | {"reward": "evil_module:run"}}, "rewards have names"),
    ({"prompt": "a", "settings": PLAIN | {"reward": "./folder"}}, "rewards have names"),
]


@pytest.fixture(scope="module")
def tab() -> Any:
    studio = Studio(MODELS)
    with gr.Blocks(), gr.Tabs() as tabs, gr.Tab("History"):
        given = SteerTab(studio), TextTab(studio), LabelTab(studio), RewardsTab(studio)
        yield HistoryTab(studio, *given, tabs)
    studio.close()


def opened(tab: HistoryTab, text: str | None) -> dict[Any, Any]:
    query = {} if text is None else {PARAMETER: text}
    return tab.open_link(None, SimpleNamespace(query_params=query))  # type: ignore[arg-type]


@pytest.mark.parametrize(("data", "message"), HOSTILE)
def test_a_strange_link_changes_no_field_and_loads_nothing(
    tab: HistoryTab, monkeypatch: pytest.MonkeyPatch, data: Any, message: str
) -> None:
    monkeypatch.setattr("steer.apps.demo.studio.resolve_reward", lambda spec: pytest.fail(f"loaded {spec}"))
    change = opened(tab, data if isinstance(data, str) else json.dumps(data))
    assert list(change) == [tab.steer.status] and message in change[tab.steer.status]


def test_a_link_fills_the_form_and_a_page_without_one_stays(tab: HistoryTab) -> None:
    link = link_of("two blue squares", settings_of(ASKED))
    change = opened(tab, given(link))
    assert change.keys() <= {*tab.form}, "the outputs of the event"
    shown = {name: change[field]["value"] for name, field in tab.steer.fields.items()}
    assert shown["prompts"] == "two blue squares" and settings_of(shown) == settings_of(ASKED)
    assert list(opened(tab, None)) == [tab.steer.status]


def test_the_tab_restores_shares_sends_and_deletes_a_run(tab: HistoryTab, tmp_path: Path) -> None:
    page: Any = SimpleNamespace(session_hash="page", username=None)
    tab.enter(None, page)
    made = SimpleNamespace(images=saved(tmp_path), base=(), cost=SimpleNamespace(seconds=2.0))
    tab.steer.remember(page, made)  # type: ignore[arg-type]
    shown = tab.refresh(None, None, page)
    (number,) = shown[tab.numbers]
    assert "1 run in" in shown[tab.status] and "a red star" in shown[tab.view] and shown[tab.first]["value"] == number
    restored = tab.restore(number, None, page)
    assert restored[tab.steer.fields["seed"]]["value"] == 5 and restored[tab.tabs].selected == "steer"
    assert read_link(given(tab.share(number, page)[tab.link]["value"]))[1] == settings_of(ASKED)
    sent = tab.send(number, page)[tab.rewards.files]
    assert [Path(path).read_bytes() for path in sent] == [one.path.read_bytes() for one in made.images]
    tab.clear(False, page)
    assert tab.studio.history.runs("page"), "the visitor did not confirm"
    tab.delete(number, None, page)
    assert "not there any more" in tab.restore(number, None, page)[tab.status]
    assert tab.refresh(number, None, page)[tab.first]["value"] is None


PAGE: Any = SimpleNamespace(session_hash="another", username=None)


def frame(step: int, *rewards: float) -> Frame:
    """Previews of one colour for each step."""
    return Frame(step, 8, tuple(Image.new("RGB", (16, 16), (step, 9, 9)) for _ in rewards), rewards)


def test_a_stopped_run_is_kept_with_its_last_scored_previews(tab: HistoryTab) -> None:
    tab.enter(None, PAGE)
    settings, unknown = settings_of(ASKED), float("nan")
    tab.steer.remember_previews(PAGE, "a red star", settings, [frame(1, unknown, unknown)])
    assert not tab.studio.history.runs("another"), "nothing is scored"
    frames = [frame(1, unknown, unknown), frame(3, 0.1, 0.2), frame(5, 0.4, 0.3), frame(6, 0.5, unknown)]
    tab.steer.remember_previews(PAGE, "a red star", settings, frames)
    (run,) = tab.studio.history.runs("another")
    assert (run.prompt, run.config, run.rewards) == ("a red star", settings, (0.4, 0.3))
    with Image.open(BytesIO(tab.studio.history.images("another", run.number)[0])) as image:
        assert image.getpixel((0, 0)) == (5, 9, 9) and not image.info, "no recipe: it cannot be made again"
    assert "seed 5 · stopped at step 5 of 8" in tab.refresh(None, None, PAGE)[tab.view]
    assert tab.restore(run.number, None, PAGE)[tab.steer.fields["steps"]]["value"] == 8
    assert read_link(given(tab.share(run.number, PAGE)[tab.link]["value"]))[1] == settings
    tab.clear(True, PAGE)


def test_texts_are_kept_and_restored_into_their_tab(tab: HistoryTab) -> None:
    tab.enter(None, PAGE)
    assert tab.text is not None
    asked = {name: field.value for name, field in tab.text.fields.items()}
    settings = text_settings(asked | {"seed": 4, "lam": 7.0})
    texts = ScoredText("a red <star>", 2.0, {}), ScoredText("a red cross", 1.0, {})
    tab.text.remember(PAGE, TextResult("a red", settings, texts, texts[1:], Cost(1, 0, 0, 2.0)))
    (run,) = tab.studio.history.runs("another")
    assert (run.prompt, run.config, run.rewards, run.base_reward) == ("a red", settings, (2.0, 1.0), 1.0)
    assert "a red &lt;star&gt; · a red cross" in tab.refresh(None, None, PAGE)[tab.view], "texts that can be read"
    with Image.open(BytesIO(run.thumbnail)) as image:
        assert image.convert("L").getextrema() < (60, 255), "letters on white"
    restored = tab.restore(run.number, None, PAGE)
    shown = {name: restored[field]["value"] for name, field in tab.text.fields.items()}
    assert shown["prompt"] == "a red" and text_settings(shown) == settings and restored[tab.tabs].selected == "text"
    for handler in (tab.share, tab.send, tab.label):
        assert "this run made texts" in handler(run.number, PAGE)[tab.status]
    assert [*tab.grid.run(run.number, "seed", "1,2", None, "", PAGE)][-2][tab.grid.status].count("made texts") == 1
    tab.clear(True, PAGE)


def test_the_images_of_a_run_are_labelled_in_pairs(tab: HistoryTab, tmp_path: Path) -> None:
    tab.enter(None, PAGE)
    images, labels = saved(tmp_path), tab.labels
    number = tab.studio.history.record("another", images)
    sent = tab.label(number, PAGE)
    assert "3 pairs of the run" in sent[labels.status] and sent[tab.tabs].selected == "label"
    shown = [*labels.begin("Ada", "", 2, PAGE)][-1]
    for _ in range(3):
        assert shown[labels.view].count("<img") == 2 and "a red star" in shown[labels.view]
        group = labels._visitors["another"].shown
        assert group is not None
        event: Any = SimpleNamespace(group=group.id, answer="1")
        shown = [*labels.answer(event, PAGE)][-1]
    assert "thank you" in shown[labels.status] and "3 choices" in shown[labels.progress]
    (table,) = label_folder(tab.studio).glob("run-*/pairs.jsonl")
    pairs = read_pairs(table)
    assert len(pairs.prompts) == 3 and {*pairs.prompts} == {"a red star"}
    with zipfile.ZipFile(labels.download(PAGE)[labels.file]["value"]) as archive:
        assert sum(name.endswith(("pairs.jsonl", ".png")) for name in archive.namelist()) == 4
    labels.end(PAGE)
    assert [*labels.begin("Ada", "", 2, PAGE)][-1][labels.view].count("a red star") == 0, "sampled images again"
    labels.end(PAGE)
    alone = tab.studio.history.record("another", saved(tmp_path, (0.5,)))
    assert "one image" in tab.label(alone, PAGE)[tab.status]
    tab.clear(True, PAGE)


def test_of_two_runs_the_best_images_and_the_changed_settings_are_shown(tmp_path: Path) -> None:
    history = local(tmp_path)
    first = history.record("page", saved(tmp_path, seed=1))
    second = history.record("page", saved(tmp_path, rewards=(2.0,), seed=2, method="base"))
    third = history.record("page", saved(tmp_path, seed=1))
    runs = [(history.run("page", number), history.images("page", number)) for number in (first, second, third)]
    changed = {name: pair for name, *pair in changed_settings(runs[0][0], runs[1][0])}
    assert changed["seed"] == [1, 2] and changed["method"] == ["fk", "base"] and changed["lam"] == [60.0, None]
    assert not {"steps", "prompt", "reward", "guidance"} & {*changed}
    view = runs_view(runs[:2])
    assert view.count("<img") == 2 and "Changed settings" in view and "brightness" not in view
    assert "are the same" in runs_view([runs[0], runs[2]])
    assert "brightness" in runs_view(runs[:1])
