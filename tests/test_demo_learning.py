"""The buttons of the Label tab that learn from choices; uploads, and a history that cannot be written."""

import os
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

pytest.importorskip("gradio")

import gradio as gr
import httpx

from steer.apps.demo import label_learning
from steer.apps.demo.app import serve
from steer.apps.demo.finetune_tab import FinetuneTab, training_request
from steer.apps.demo.image_labels import TABLE, ImageLabelStore
from steer.apps.demo.label_learning import LabelLearning, LearningStep, NewReward, reward_training
from steer.apps.demo.label_tab import group_view
from steer.apps.demo.labels import LabelRequest
from steer.apps.demo.studio import Studio
from steer.apps.demo.training import DEMO_CHANGES, Trained, TrainingRequest, Update, training
from steer.apps.finetuning import read_config
from steer.errors import InputError
from steer.pipelines.training.image_pairs import read_image_pairs
from steer.rewards.inputs import as_batch
from steer.rewards.learned import LearnedReward

ADA = LabelRequest("Ada", ("own images",))
STEPS = 60
LEVELS = range(10, 250, 20)  # of red


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_learning, "CONFIG", replace(label_learning.CONFIG, steps=STEPS))
    for key, value in {"num_inference_steps": "3", "eval_prompts_count": "2"}.items():
        monkeypatch.setitem(DEMO_CHANGES, key, value)


def circle(red: int) -> Image.Image:
    """A circle on grey as `scenes` draws them, from blue to red."""
    image = Image.new("RGB", (64, 64), (235,) * 3)
    ImageDraw.Draw(image).ellipse((20, 18, 46, 44), (red, 0, 255 - red))
    return image


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Studio]:
    """An app over a folder of images of two prompts."""
    folder = tmp_path / "images"
    folder.mkdir()
    for level in LEVELS:
        circle(level).save(folder / f"{level}.png")
        (folder / f"{level}.txt").write_text("a star" if level % 40 == 10 else "a cross")
    made = Studio(("scenes",), labels=tmp_path / "labels", label_images=folder)
    yield made
    made.close()


def prefer_red(studio: Studio, most: int = 99) -> None:
    """Answer every pair by its redder image."""
    assert studio.label_images is not None and studio.labels is not None
    store = ImageLabelStore(studio.label_images, studio.labels)
    while most and (pair := store.offer(ADA)) is not None:
        a, b = (int(file.stem) for file in pair.files)
        store.choose("Ada", pair.id, int(b > a))
        most -= 1


def visitor(name: str) -> Any:
    return SimpleNamespace(session_hash=name)


def test_a_reward_learns_the_preference_and_has_a_name_at_once(own: Studio) -> None:
    prefer_red(own)
    with gr.Blocks():
        learning = LabelLearning(own)
    shown: dict[Any, Any] = {}
    lines = []
    for change in learning.begin(visitor("ada")):
        lines.append(str(change.get(learning.status, "")))
        shown |= change
    assert any(f"step {STEPS} of {2 * STEPS}" in one and 'max="1" value="0.500"' in one for one in lines)
    spec = shown[learning.spec]
    assert spec in shown[learning.status] and "accuracy" in shown[learning.status]
    assert shown[learning.results]["visible"] and shown[learning.start]["interactive"]
    own.check_reward(f"{spec} + brightness:0.5")  # by name, in sums too
    reward = own.reward(spec)
    images, _ = as_batch([circle(red) for red in (20, 120, 220)], "a star")
    scores = reward(images, ["a star"] * 3)
    assert scores[0] < scores[1] < scores[2]
    folder = own.home / "unpacked"
    with zipfile.ZipFile(shown[learning.archive]["value"]) as archive:
        archive.extractall(folder)
    opened = LearnedReward(str(folder / spec.partition(":")[2]))
    assert torch.allclose(opened(images, ["a star"] * 3), scores)


def test_a_stop_leaves_no_reward(own: Studio) -> None:
    prefer_red(own, 6)
    ticket, events = own.worker.submit(reward_training(own)), []
    for event in ticket.events():
        events.append(event)
        if isinstance(event, LearningStep):
            ticket.stop()
    assert not [one for one in events if isinstance(one, NewReward)]
    assert not list((own.home / "rewards").glob("*/reward.json"))


def test_without_labels_there_is_no_reward(own: Studio) -> None:
    with pytest.raises(InputError, match="nothing has been labelled yet"):
        reward_training(own)


@pytest.mark.hard
def test_the_model_is_finetuned_on_own_images_as_they_were_at_the_start(own: Studio, tmp_path: Path) -> None:
    prefer_red(own, 6)
    assert own.labels is not None
    asked = TrainingRequest("pairs", "scenes", "", "brightness", 2, 1e-3, 4, 0.0, 0, own.labels)
    folder, received = tmp_path / "runs" / "run-1", []
    ticket = own.worker.submit(training(asked, folder, own, resume=False))
    for event in ticket.events():
        received.append(event)
        if isinstance(event, Update):
            ticket.stop()
    whole, copied = read_image_pairs(own.labels / TABLE), read_image_pairs(folder / "choices" / TABLE)
    assert [one.resolve() for one in whole.a] == list(copied.a) and len(copied) == 6  # type: ignore[union-attr]
    prefer_red(own, 2)  # by somebody else, meanwhile
    (trained,) = [
        event
        for event in own.worker.submit(training(asked, folder, own, resume=True)).events()
        if isinstance(event, Trained)
    ]
    assert trained.result.step == 2 and trained.weights.label == "scenes, DPO on choices, 2 updates"


def test_the_finetune_tab_opens_with_the_method_of_the_labels(own: Studio) -> None:
    """DPO of images, without the weight of a KL that it does not have."""
    with gr.Blocks():
        tab, learning = FinetuneTab(own), LabelLearning(own)
        with gr.Tabs() as tabs:
            tab.started_by(learning.finetune, tabs)
    change = tab.choose_labels(tab.fields["learning_rate"].value, tab.defaults.value)
    assert change[tab.fields["method"]] == "pairs" and not change[tab.fields["kl_weight"]]["visible"]
    assert change[tab.fields["learning_rate"]]["value"] == read_config("dpo-scenes").training.learning_rate
    values = {name: field.value for name, field in tab.fields.items()} | {"method": "pairs", "model": "scenes"}
    asked = training_request(values | {"kl_weight": 0.5}, own)
    assert asked.kl_weight == 0 and asked.choices == own.labels
    with gr.Blocks():
        other = FinetuneTab(replace(own, label_images=None, home=own.home))
    assert other.choose_labels(1e-3, other.defaults.value)[other.fields["method"]] == "choices"


def test_the_view_has_a_button_and_a_key_to_zoom() -> None:
    assert 'data-zoom aria-keyshortcuts="Z"' in group_view(1, "x", "a star", [b"", b""])


def test_uploads_are_as_large_as_the_owner_says() -> None:
    studio = Studio(("scenes",), max_upload=2)
    before = os.environ.get("GRADIO_TEMP_DIR")
    app = serve(studio, server_name="127.0.0.1", prevent_thread_lock=True)
    try:
        address, sizes = f"{app.local_url}gradio_api/upload", (1_500_000, 3_000_000)
        files = [{"files": ("a.safetensors", bytes(size))} for size in sizes]
        codes = [httpx.post(address, files=one, timeout=120).status_code for one in files]
    finally:
        app.close()
        os.environ.pop("GRADIO_TEMP_DIR") if before is None else os.environ.update(GRADIO_TEMP_DIR=before)
        studio.close()
    assert codes == [200, 413] and Studio.max_upload == 512


def test_a_history_that_cannot_be_written_lasts_until_the_app_ends(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    studio = Studio(("scenes",), history_file=tmp_path / "file" / "history.sqlite")
    try:
        assert "cannot write" in studio.history_notice and studio.history_notice.endswith("until the app ends")
        assert "\n" not in studio.history_notice
        assert studio.history.runs("any") == [] and studio.history.path.parent == studio.home
    finally:
        studio.close()
    usual = Studio(("scenes",), history_file=tmp_path / "history.sqlite")
    assert not usual.history_notice and usual.history.path == tmp_path / "history.sqlite"
    usual.close()
