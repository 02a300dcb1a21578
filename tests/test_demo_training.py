"""The Finetune tab: trainings with live metrics, stopping, resuming, and weights for the Steer tab."""

import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("gradio")

import gradio as gr

from steer.apps.demo import training as training_module
from steer.apps.demo.finetune_tab import (
    FinetuneTab,
    Run,
    TrainingView,
    charts_view,
    samples_view,
    training_request,
)
from steer.apps.demo.labels import LabelRequest, LabelStore
from steer.apps.demo.progress import Progress
from steer.apps.demo.steering import Loading
from steer.apps.demo.studio import Studio, Ticket, Waiting, Weights
from steer.apps.demo.training import Asked, Evaluation, Trained, TrainingRequest, Update, configured, training
from steer.apps.finetuning import load_data
from steer.apps.models import find_adapter, load_pipeline
from steer.errors import InputError
from steer.pipelines.training.evaluation import Evaluator
from steer.pipelines.training.model_card import held_out_names
from steer.pipelines.training.state import read_logs
from steer.rewards.parser import load_reward
from steer.training.distributed import SINGLE_PROCESS

TINY = {"train_batch_size": "2", "num_generations": "2", "num_inference_steps": "3", "eval_prompts_count": "2"}
ASKED = TrainingRequest("d3po", "scenes", "brightness", "aesthetic:scenes", 3, 0.003, 4, 0.0, 3)
FIELD_VALUES: dict[str, Any] = {
    "method": "d3po",
    "reward": " brightness ",
    "held_out": "scene",
    "updates": 3,
    "learning_rate": 0.001,
    "rank": 4,
    "kl_weight": 0,
    "ask": False,
    "seed": 0,
    "model": "scenes",
}
SHARES = {"rollout_share", "reward_share", "update_share"}
LATER = {"seconds", "images_per_second"} | SHARES  # fields of records that differ between equal runs
SCRIPT = "<script>window.evil=1</script>"


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in TINY.items():
        monkeypatch.setitem(training_module.DEMO_CHANGES, key, value)


@pytest.fixture(scope="module")
def straight(studio: Studio) -> tuple[list[Any], Path]:
    """Events of a run without a stop, and its folder."""
    with pytest.MonkeyPatch.context() as patch:
        for key, value in TINY.items():
            patch.setitem(training_module.DEMO_CHANGES, key, value)
        folder = studio.home / "visitors" / "straight" / "run-1"
        return run(studio, ASKED, folder), folder


def run(
    studio: Studio,
    asked: TrainingRequest,
    folder: Path,
    resume: bool = False,
    stop: Callable[[Any], bool] = lambda event: False,
) -> list[Any]:
    """Events of a training, which is stopped at a given event."""
    ticket = studio.worker.submit(training(asked, folder, studio, resume))
    events = []
    for event in ticket.events():
        events.append(event)
        if stop(event):
            ticket.stop()
    return events


def of(kind: type, events: list[Any]) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


def plain(records: Any) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name not in LATER} for record in records]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "pytorch_lora_weights.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def until(true: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.01)


# ---- the job


def test_a_run_reports_every_update_and_ends_with_weights(straight: tuple[list[Any], Path]) -> None:
    events, folder = straight
    kinds = [type(event) for event in events if not isinstance(event, Waiting)]
    assert kinds == [Loading, Evaluation, Update, Update, Update, Evaluation, Trained]
    assert [event.record["step"] for event in of(Update, events)] == [1, 2, 3]
    assert [event.record["step"] for event in of(Evaluation, events)] == [0, 3]
    (trained,) = of(Trained, events)
    assert trained.result.step == 3 and trained.result.stopped is None
    assert [list(records) for records in (trained.result.records, trained.result.evaluations)] == [*read_logs(folder)]
    assert any(value.abs().max() > 0 for name, value in tensors(trained.weights.folder).items() if "lora_B" in name)


def test_a_fresh_model_with_the_weights_has_the_last_evaluation(
    studio: Studio, straight: tuple[list[Any], Path]
) -> None:
    events, folder = straight
    (trained,), last = of(Trained, events), of(Evaluation, events)[-1].record
    assert trained.weights == Weights(
        "scenes", folder / "final-3", "scenes, D3PO on brightness, 3 updates", "brightness", steps=3, guidance=1.0
    )
    config = configured(ASKED, folder, studio).training
    data = load_data(configured(ASKED, folder.parent / "other", studio), False)
    evaluator = Evaluator(data["eval_prompts"], load_reward("brightness"), [load_reward("aesthetic:scenes")])
    pipe = load_pipeline("scenes")
    with find_adapter(str(trained.weights.folder)).applied_to(pipe):
        record = evaluator.evaluate(pipe, config, 3, {"unet": pipe.unet}, lambda: None, SINGLE_PROCESS).record()
    for name in ("brightness", "aesthetic:scenes"):
        assert record[f"eval/{name}"] == pytest.approx(last[f"eval/{name}"], abs=1e-4)
    first = of(Evaluation, events)[0].record
    assert record["eval/brightness"] != pytest.approx(first["eval/brightness"], abs=1e-4), "training changed it"


def test_the_zip_holds_weights_and_card_and_no_server_path(straight: tuple[list[Any], Path]) -> None:
    (trained,) = of(Trained, straight[0])
    with zipfile.ZipFile(trained.archive) as file:
        names = {name.removeprefix("finetuned/") for name in file.namelist()}
        texts = [file.read(name) for name in file.namelist() if not name.endswith(".png")]
    assert {"README.md", "config.yaml", "metrics.jsonl", "final/pytorch_lora_weights.safetensors"} <= names
    assert {"plots/rewards.png", "samples/step-000003.png"} <= names and not any(
        "checkpoints" in name for name in names
    )
    assert not any(str(straight[1].parent).encode() in text or b"/tmp" in text for text in texts)


@pytest.mark.hard
def test_a_run_stopped_twice_and_finished_early_resumes_to_the_same_weights(
    studio: Studio, straight: tuple[list[Any], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "run-1"
    assert not of(Trained, run(studio, ASKED, folder, stop=lambda event: isinstance(event, Evaluation)))
    assert read_logs(folder)[0] == [] and (folder / "checkpoints").exists()
    run(studio, ASKED, folder, resume=True, stop=lambda event: isinstance(event, Update))
    made = len(read_logs(folder)[0])
    assert made in (1, 2)
    (here,) = of(Trained, run(studio, replace(ASKED, updates=made), folder, resume=True))
    assert here.result.weights_step == made and here.weights.folder.name == f"final-{made}"
    lent = tensors(here.weights.folder)
    events = run(studio, ASKED, folder, resume=True)
    (trained,), (whole,) = of(Trained, events), of(Trained, straight[0])
    assert plain(trained.result.records) == plain(whole.result.records)
    assert [one for one in trained.result.evaluations if one["step"] != made] == [*whole.result.evaluations]
    assert same(tensors(trained.weights.folder), tensors(whole.weights.folder))
    assert [event.record["step"] for event in of(Update, events)] == [*range(made + 1, 4)]
    assert same(lent, tensors(here.weights.folder)), "the weights loaded into Steer are unchanged"


def test_stop_takes_effect_within_one_denoiser_call(studio: Studio, tmp_path: Path) -> None:
    calls: list[bool] = []
    work = training(ASKED, tmp_path / "run-1", studio, resume=False)

    def watched(ticket: Ticket) -> None:
        inner = ticket.check

        def check(*given: Any) -> None:
            calls.append(ticket.stopped)
            if len(calls) == 20:
                ticket.stop()
            inner(*given)

        ticket.check = check  # type: ignore[method-assign]
        work(ticket)

    list(studio.worker.submit(watched).events())
    assert len(calls) == 20 and not any(calls)


def test_a_visitor_who_leaves_stops_the_run_and_keeps_its_checkpoint(studio: Studio, tmp_path: Path) -> None:
    folder = tmp_path / "run-1"
    events = studio.worker.submit(training(replace(ASKED, updates=200), folder, studio, resume=False)).events()
    while not isinstance(next(events), Update):
        pass
    events.close()  # type: ignore[attr-defined]
    until(lambda: studio.worker.pending == 0)
    assert list((folder / "checkpoints").glob("step-*")) and len(read_logs(folder)[0]) < 10


@pytest.mark.hard
def test_only_the_latest_run_keeps_its_checkpoints(studio: Studio, tmp_path: Path) -> None:
    (tmp_path / "run-1" / "checkpoints" / "step-00000001").mkdir(parents=True)
    events = run(studio, replace(ASKED, method="prdp", updates=2, kl_weight=0.5), tmp_path / "run-2")
    (trained,) = of(Trained, events)
    assert trained.weights.label == "scenes, PRDP on brightness, 2 updates"
    assert all(record["kl_weight"] == 0.5 and "error" in record for record in trained.result.records)
    assert not (tmp_path / "run-1" / "checkpoints").exists() and (tmp_path / "run-2" / "checkpoints").exists()


@pytest.mark.hard
def test_reward_backpropagation_raises_the_reward_of_held_out_prompts(studio: Studio, tmp_path: Path) -> None:
    asked = replace(ASKED, method="backprop", reward="brightness", held_out="colour:red", updates=5, learning_rate=0.01)
    (trained,) = of(Trained, run(studio, asked, tmp_path / "run-1"))
    first, last = (one["eval/brightness"][0] for one in trained.result.evaluations)
    assert last > first + 0.02, (first, last)
    with pytest.raises(InputError, match="'jpeg' is not differentiable"):
        run(studio, replace(asked, reward="jpeg"), tmp_path / "run-2")


@pytest.mark.hard
def test_training_uses_the_preferences_recorded_before_it_started(studio: Studio, tmp_path: Path) -> None:
    labels, folder = tmp_path / "labels", tmp_path / "v" / "run-1"
    book = LabelStore(labels, {"num_inference_steps": 3, "guidance_scale": 1.0})
    wish = LabelRequest("Ada", ("a red circle", "a blue star"))

    def choose() -> None:
        with studio.model("scenes") as pipe:
            book.choose("Ada", book.draw(pipe, wish, lambda: None).id, 0)

    choose()
    choose()
    asked = replace(ASKED, method="choices", updates=2, choices=labels)
    run(studio, asked, folder, stop=lambda event: isinstance(event, Update) and event.record["step"] == 1)
    choose()  # by another visitor, during the run
    (trained,) = of(Trained, run(studio, asked, folder, resume=True))
    assert trained.result.step == 2 and trained.weights.label == "scenes, D3PO on choices, 2 updates"
    assert held_out_names(trained.result.evaluations) == ["aesthetic:scenes"]
    with zipfile.ZipFile(trained.archive) as file:
        assert not any("lots.jsonl" in name for name in file.namelist())
        assert str(tmp_path) not in file.read("finetuned/README.md").decode()


@pytest.mark.hard
def test_a_constant_reward_ends_the_run_with_one_line(
    studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "flat_reward.py").write_text("import torch\ndef flat(images, prompts): return torch.zeros(len(images))")
    with pytest.raises(InputError, match="gave all 2 samples of every prompt the same score"):
        run(studio, replace(ASKED, reward="flat_reward:flat"), tmp_path / "run-1")


# ---- questions


@pytest.fixture
def asking(monkeypatch: pytest.MonkeyPatch) -> TrainingRequest:
    """A run that evaluates after every update and asks at each evaluation but the first."""
    monkeypatch.setattr(training_module, "MIN_EVAL_STEPS", 1)
    monkeypatch.setitem(training_module.DEMO_CHANGES, "ask_cost", "0")
    return replace(ASKED, ask=True)


def answered(studio: Studio, asked: TrainingRequest, folder: Path, answers: list[Any], **options: Any) -> list[Any]:
    """Events of a training whose questions are answered by the given functions, in order."""
    ticket = studio.worker.submit(training(asked, folder, studio, **{"resume": False} | options))
    events = []
    for event in ticket.events():
        events.append(event)
        if isinstance(event, Asked):
            answers.pop(0)(ticket)
    return events


def yes(ticket: Ticket) -> None:
    ticket.answer(True)
    ticket.answer(False)  # a second click does not count, and not for the next question


def no(ticket: Ticket) -> None:
    ticket.answer(False)


@pytest.mark.hard
def test_the_answer_no_keeps_the_best_weights_and_yes_changes_nothing(
    studio: Studio, straight: tuple[list[Any], Path], asking: TrainingRequest, tmp_path: Path
) -> None:
    events = answered(studio, asking, tmp_path / "run-1", [yes, yes, yes])
    questions, (whole,), (trained,) = of(Asked, events), of(Trained, straight[0]), of(Trained, events)
    assert questions and all(one.question.value > 0 for one in questions)
    assert plain(trained.result.records) == plain(whole.result.records) and trained.result.stopped is None
    (trained,) = of(Trained, answered(studio, asking, tmp_path / "run-2", [no]))
    last = questions[0].question.step
    evaluations = trained.result.evaluations
    best = max(evaluations, key=lambda one: one["eval/aesthetic:scenes"][0])["step"]
    assert (trained.result.step, trained.result.weights_step) == (last, best) and evaluations[-1]["step"] == last
    assert same(tensors(trained.weights.folder), tensors(tmp_path / "run-2" / "best"))
    assert "the answer was no" in (trained.result.stopped or "")


@pytest.mark.hard
@pytest.mark.parametrize("end", ["stop", "leave", "silence"])
def test_a_run_with_an_open_question_ends_within_a_second_with_a_checkpoint(
    studio: Studio, asking: TrainingRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    monkeypatch.setattr(training_module, "ANSWER_TIMEOUT", 0.3 if end == "silence" else 600.0)
    folder = tmp_path / "run-1"
    ticket = studio.worker.submit(training(asking, folder, studio, resume=False))
    events = ticket.events()
    asked = next(event for event in events if isinstance(event, Asked))
    ends = {"stop": ticket.stop, "leave": events.close, "silence": lambda: None}  # type: ignore[attr-defined]
    start = time.monotonic()
    ends[end]()
    until(lambda: studio.worker.pending == 0, seconds=1.5)
    assert time.monotonic() - start < 1.5 and not of(Trained, list(events))
    assert (folder / f"checkpoints/step-{asked.question.step:08d}").exists() and not (folder / "final").exists()
    if end == "silence":
        events = answered(studio, asking, folder, [yes] * 3, resume=True)
        assert of(Asked, events)[0] == asked, "the question is asked again"
        assert of(Trained, events)[0].result.step == 3


@pytest.mark.hard
def test_the_tab_shows_both_grids_and_forwards_the_answer(
    studio: Studio, tab: FinetuneTab, asking: TrainingRequest
) -> None:
    fields = FIELD_VALUES | {"ask": True, "learning_rate": 0.003, "seed": 3, "held_out": "aesthetic:scenes"}
    field_values = {tab.fields[name]: value for name, value in fields.items()}
    values: dict[Any, Any] = {}
    shown, last, eve = [], "", visitor("eve")
    for change in tab.begin(field_values, eve):
        if change.get(tab.asking, {}).get("visible") and change[tab.question] != last:
            last = change[tab.question]
            shown.append((change[tab.question], change[tab.status]))
            assert not tab.decline(visitor("ben"))[tab.asking]["visible"], "an answer of another visitor"
            assert not tab.decline(eve)[tab.asking]["visible"]
        values |= change
    (question, status) = shown[0]
    assert len(shown) == 1 and "the rewards disagree. Continue, or stop?" in status
    assert question.count("<figure") == 4 and "<h3>Kept: " in question and "m = " in question and "Δ = " in question
    assert values[tab.results]["visible"] and not values[tab.asking]["visible"]
    assert values[tab.run].trained.result.stopped.startswith("the answer was no")
    assert not tab.fit("choices", 1e-3, tab.defaults.value)[tab.fields["ask"]]["visible"]


# ---- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"updates": 0}, "updates must be 1 to 200"),
        ({"updates": 201}, "updates must be 1 to 200"),
        ({"updates": None}, "updates: the field is empty"),
        ({"updates": float("nan")}, "updates: the field is empty"),
        ({"rank": 65}, "rank must be 1 to 64"),
        ({"learning_rate": 0}, "the learning rate must be above 0"),
        ({"learning_rate": float("inf")}, "learning rate: the field is empty"),
        ({"kl_weight": -1}, "the KL weight must be at least 0"),
        ({"seed": -1}, "seed must be 0 to"),
        ({"method": "ddpo"}, "method 'ddpo': choose backprop, d3po, prdp, choices"),
        ({"model": "scenes-turbo"}, "cannot be finetuned here: choose scenes"),
        ({"model": "/etc"}, "cannot be finetuned here"),
        ({"held_out": "brightness"}, "the held-out reward equals the training reward"),
        ({"reward": "os:system"}, "here rewards have names"),
        ({"reward": "/etc/passwd"}, "here rewards have names"),
        ({"held_out": "my_file:reward"}, "here rewards have names"),
        ({"reward": None}, "here rewards have names"),
    ],
)
def test_impossible_requests_are_refused_in_one_line(studio: Studio, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as refused:
        training_request(FIELD_VALUES | change, studio)
    assert "\n" not in str(refused.value)


def test_a_component_of_the_trained_reward_cannot_be_held_out(studio: Studio, tmp_path: Path) -> None:
    asked = training_request(FIELD_VALUES | {"reward": "scene + brightness", "held_out": "scene"}, studio)
    (other := tmp_path / "run-1" / "checkpoints").mkdir(parents=True)
    work: Any = training(asked, tmp_path / "run-2", studio, resume=False)
    with pytest.raises(InputError, match="hold 'scene', which is trained on"):
        work(None)
    assert other.exists(), "the previous run can still be resumed"


def test_learning_from_preferences_without_any_is_refused(studio: Studio, tmp_path: Path) -> None:
    asked = training_request(FIELD_VALUES | {"method": "choices"}, studio)
    assert asked.choices == studio.home / "labels"
    with pytest.raises(InputError, match="nothing has been labelled yet"):
        training(asked, tmp_path, studio, resume=False)


# ---- views


def test_the_view_shows_the_time_left_and_why_training_ended(straight: tuple[list[Any], Path]) -> None:
    events, folder = straight
    now = 100.0
    story = TrainingView(4, progress=Progress(clock=lambda: now))
    assert story.after(Waiting(2)) and story.line == "Waiting: 2 runs come first."
    for _ in range(2):
        now += 20.0
        story.after(Update({"step": 1, "reward": 0.25, "kl": 0.0, "seconds": 20.0}))
    assert "Update 2 of 4, reward 0.25, KL 0, about 40 s left" in story.progress.status(story.line)
    assert story.conclusion().startswith("Stopped after 2 of 4 updates. Nothing is lost: Resume continues")
    assert TrainingView(4).conclusion() == "Stopped before the first update."
    whole = TrainingView(3)
    for event in events:
        whole.after(event)
    assert whole.conclusion().startswith("Done: 3 updates in ") and "brightness 0." in whole.conclusion()
    again = TrainingView.of(folder, 3)
    assert (again.records, again.evaluations) == (whole.records, whole.evaluations)
    assert again.frames == whole.frames
    with pytest.raises(TypeError, match="no event of a training"):
        story.after("else")


def test_a_significant_fall_of_the_held_out_reward_is_reported(straight: tuple[list[Any], Path]) -> None:
    (trained,) = of(Trained, straight[0])

    def conclusion(held_out: list[float], best: int = 3) -> str:
        evaluations = (
            {"step": 0, "eval/a": [0.1, 0.0, 0.2], "eval/b": [0.5, 0.4, 0.6]},
            {"step": 4, "eval/a": [0.3, 0.2, 0.4], "eval/b": held_out},
        )
        result = replace(trained.result, evaluations=evaluations, best_step=best)
        return TrainingView(4, list(result.records), trained=replace(trained, result=result)).conclusion()

    assert "exploiting" in conclusion([0.3, 0.2, 0.45]) and "faults" not in conclusion([0.45, 0.3, 0.6])
    assert "best after update 2" in conclusion([0.6, 0.5, 0.7], best=2) and "best" not in conclusion([0.6, 0.5, 0.7])


def test_the_views_show_every_evaluation_and_escape_input(straight: tuple[list[Any], Path]) -> None:
    _, folder = straight
    story = TrainingView.of(folder, 3)
    view = samples_view(story, "run-1")
    assert view.count('class="steer-frame steer-held"') == 2 and view.count('hidden=""') == 1
    assert view.count("<img ") == 4 and 'alt=""' not in view and 'data-label="after 3 updates"' in view
    charts = charts_view(story, "run-1")
    assert charts.count("<svg") >= 4 and "held-out reward: aesthetic:scenes" in charts and "<table" in charts
    evil = {"step": 0, f"eval/{SCRIPT}": [0.1, 0.0, 0.2], "eval/diversity": 0.0}
    odd = TrainingView(4, story.records, [evil], story.frames)
    assert "<script" not in samples_view(odd, SCRIPT) + charts_view(odd, SCRIPT)
    assert "steer-empty" in samples_view(TrainingView(0), "")


# ---- the tab


def visitor(name: str) -> Any:
    return SimpleNamespace(session_hash=name)


@pytest.fixture
def tab(studio: Studio) -> FinetuneTab:
    with gr.Blocks() as blocks:
        made = FinetuneTab(studio)
    assert blocks.fns and all(one.api_visibility == "private" for one in blocks.fns.values())
    return made


def last_values(changes: Iterator[dict[Any, Any]]) -> dict[Any, Any]:
    """The last value of every component that changed."""
    values: dict[Any, Any] = {}
    for change in changes:
        values |= change
    return values


def test_a_visitor_trains_resumes_and_loads_the_weights_into_steer(studio: Studio, tab: FinetuneTab) -> None:
    field_values = {tab.fields[name]: value for name, value in (FIELD_VALUES | {"updates": 1}).items()}
    values = last_values(tab.begin(field_values, visitor("ada")))
    done: Run = values[tab.run]
    assert done.folder == studio.home / "visitors" / "ada" / "finetune" / "run-1" and done.trained is not None
    assert "Done: 1 update in" in values[tab.status] and values[tab.results]["visible"] and values[tab.again]["visible"]
    assert not values[tab.finish]["visible"] and values[tab.archive]["value"] == str(done.trained.archive)
    assert str(studio.home) not in values[tab.samples] + values[tab.charts] + values[tab.status]
    assert tab.lend(done) == (done.trained.weights, gr.update(selected="steer"))
    more: Run = last_values(tab.resume(done, 2, visitor("ada")))[tab.run]
    assert more.trained is not None and more.trained.result.step == 2 and more.folder == done.folder


def test_a_refusal_is_a_warning_and_keeps_the_previous_run(studio: Studio, tab: FinetuneTab) -> None:
    field_values = {tab.fields[name]: value for name, value in (FIELD_VALUES | {"reward": f"os:{SCRIPT}"}).items()}
    with pytest.warns(UserWarning, match="&lt;script&gt;"):
        values = last_values(tab.begin(field_values, visitor("ben")))
    assert [*values] == [tab.status] and "<script" not in values[tab.status] and "alert" in values[tab.status]


def test_each_method_has_its_own_default_learning_rate(tab: FinetuneTab) -> None:
    usual, rate, rates = tab.defaults.value, 3e-4, []
    for method in ("d3po", "prdp", "choices"):
        change = tab.fit(method, rate, usual)
        usual, rate = change[tab.defaults], change[tab.fields["learning_rate"]]["value"]
        rates.append(rate)
    assert rates == [1e-3, 1.5e-3, 1e-3]
    choices, prdp = tab.fit("choices", rate, usual), tab.fit("prdp", rate, usual)
    assert not choices[tab.fields["reward"]]["visible"] and prdp[tab.fields["reward"]]["visible"]
    assert not prdp[tab.fields["model"]]["visible"], "it has one model"


def test_a_learning_rate_given_by_the_user_is_kept(tab: FinetuneTab) -> None:
    change = tab.fit("prdp", 0.002, tab.defaults.value)
    again = tab.fit("d3po", 0.002, change[tab.defaults])
    assert [one[tab.fields["learning_rate"]]["value"] for one in (change, again)] == [0.002, 0.002]


def test_an_invalid_seed_is_refused_in_one_line(tab: FinetuneTab) -> None:
    seed = tab.fields["seed"]
    assert seed.preprocess(-1) == -1 and seed.preprocess(1.5) == 1.5
