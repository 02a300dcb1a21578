"""Asking whether a run continues: the worth of it against draws, questions of records, and runs that ask."""

import math
import os
import pty
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from rollouts import fresh_pipe
from safetensors.torch import load_file
from soft_rewards import seeded
from torch.distributions import Normal

from steer import GRPOConfig, GRPOTrainer
from steer.apps.asking import TerminalAnswers
from steer.errors import InputError
from steer.pipelines.disagreement import value_of_asking
from steer.pipelines.training.asking import REFUSED, UNANSWERED, Question, question_of
from steer.pipelines.training.evaluation import EvalResult, Evaluator
from steer.pipelines.training.trainer import INTERRUPTED


@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (0.3, 0.7), (-0.3, 0.7), (2.0, 1.0)])
def test_the_worth_of_asking_is_that_of_a_million_draws(mean: float, deviation: float) -> None:
    draws = mean + deviation * torch.randn(1_000_000, generator=seeded(0)).double()
    gains = draws.clamp(min=0)
    error = gains.std().item() / 1000
    assert value_of_asking(mean, deviation) == pytest.approx(gains.mean().item() - max(mean, 0), abs=4 * error)


def test_asking_is_worth_most_where_nothing_is_known_but_the_disagreement() -> None:
    assert value_of_asking(0.0, 2.0) == pytest.approx(2 / math.sqrt(2 * math.pi))
    assert value_of_asking(0.7, 0.0) == value_of_asking(0.0, 0.0) == 0
    values = [value_of_asking(mean, 1.0) for mean in (0.0, 0.5, 1.0, 3.0, 6.0, 40.0)]
    assert values == sorted(values, reverse=True) and values[-2] < 1e-9 and values[-1] == 0
    assert value_of_asking(-0.4, 0.3) == value_of_asking(0.4, 0.3)
    truth = 0.4 * Normal(0, 1).cdf(torch.tensor(2.0)) + 0.2 * math.exp(-2) / math.sqrt(2 * math.pi) - 0.4
    assert value_of_asking(0.4, 0.2) == pytest.approx(float(truth), rel=1e-4)


def record(step: int, **means: float) -> dict[str, Any]:
    rewards = {f"eval/{name}": [mean, mean - 1, mean + 1] for name, mean in means.items()}
    return {"step": step, **rewards, "eval/deviation/proxy": 2.0, "eval/deviation/truth": 0.5, "eval/diversity": 0.1}


def question(*records: dict[str, Any], cost: float = 0.05) -> Question | None:
    state: Any = SimpleNamespace(evaluations=list(records), step=records[-1]["step"])
    return question_of(state, GRPOConfig(ask=True, ask_cost=cost))


def test_a_question_compares_with_the_best_earlier_evaluation() -> None:
    records = record(0, proxy=0.0, truth=1.0), record(5, proxy=1.0, truth=1.2), record(10, proxy=3.0, truth=1.0)
    asked = question(*records)
    assert asked is not None and (asked.step, asked.kept_step) == (10, 5)
    assert asked.gains == pytest.approx({"proxy": 1.0, "truth": -0.4})  # 2/2 and −.2/.5
    assert (asked.mean, asked.deviation) == pytest.approx((0.3, 0.7))
    assert asked.value == value_of_asking(asked.mean, asked.deviation)
    assert question(*records, cost=asked.value) is None, "not worth more than it costs"
    assert question(records[0]) is None
    assert question(record(0, proxy=0.0, truth=1.0), record(5, proxy=2.0, truth=1.5)) is None, "the gains agree"
    state: Any = SimpleNamespace(evaluations=list(records), step=11)
    assert question_of(state, GRPOConfig(ask=True)) is None, "no evaluation of this update"
    assert question_of(SimpleNamespace(evaluations=list(records), step=10), GRPOConfig()) is None  # type: ignore[arg-type]


def test_the_members_of_an_ensemble_are_asked_each() -> None:
    records = []
    for step, (first, second, truth) in enumerate([(0.0, 0.0, 1.0), (2.0, -1.0, 1.5)]):
        members = {"e[0]": torch.tensor([[first - 1, first + 1]]), "e[1]": torch.tensor([[second - 2, second + 2]])}
        held_out = torch.tensor([[truth - 1, truth + 1]])
        rewards = {"e": torch.stack([*members.values()]).mean(0), "truth": held_out}
        records.append(EvalResult(step, ("a",), rewards, 0.0, torch.zeros(2, 3, 1, 1), members).record())
    asked = question(*records)
    assert asked is not None and asked.gains == pytest.approx({"member/e[0]": 2.0, "member/e[1]": -0.5, "truth": 0.5})


# -- runs: evaluations are scripted, so that the rewards disagree at update 2 ----------------------------------------

MEANS = {0: (0.0, 1.0), 1: (1.0, 2.0), 2: (5.0, 1.0), 3: (3.0, 4.0)}
SMALL: dict[str, Any] = {
    "train_batch_size": 1, "num_generations": 2, "num_inference_steps": 2, "lora_rank": 2, "micro_batch": 2,
    "lora_target_modules": ("to_q",), "max_steps": 3, "eval_steps": 1, "save_steps": 1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate(self: Evaluator, pipe: Any, config: Any, step: int, *rest: Any) -> EvalResult:
        proxy, truth = (torch.tensor([[mean - 1.0], [mean + 1.0]]) for mean in MEANS[step])
        return EvalResult(step, ("a", "b"), {"brightness": proxy, "jpeg": truth}, 0.0, torch.zeros(2, 3, 8, 8))

    monkeypatch.setattr(Evaluator, "evaluate", evaluate)


def trainer(folder: Path, on_question: Any = None, **options: Any) -> GRPOTrainer:
    config = GRPOConfig(output_dir=str(folder), ask=True, **SMALL | options)
    held_out: dict[str, Any] = {"eval_prompts": ["a", "b"], "eval_rewards": ["jpeg"], "on_question": on_question}
    return GRPOTrainer(fresh_pipe("sd"), "brightness", config, train_prompts=["a star"], **held_out)


@pytest.mark.hard
def test_no_keeps_the_best_weights_and_yes_continues(tmp_path: Path) -> None:
    asked: list[Question] = []

    def answer(yes: bool) -> Callable[..., bool]:
        return lambda question, check: bool(asked.append(question)) or yes

    result = trainer(tmp_path / "no", answer(False)).train()
    assert (result.step, result.stopped, result.weights_step, result.best_step) == (2, REFUSED, 1, 1)
    final, best = (tmp_path / "no" / name / "pytorch_lora_weights.safetensors" for name in ("final", "best"))
    kept, truth = load_file(final), load_file(best)
    assert kept.keys() == truth.keys() and all(torch.equal(kept[name], truth[name]) for name in truth)
    result = trainer(tmp_path / "yes", answer(True)).train()
    assert (result.step, result.stopped, result.weights_step) == (3, None, 3)
    assert [(one.step, one.kept_step) for one in asked] == [(2, 1)] * 2


@pytest.mark.hard
def test_a_run_without_an_answer_waits_in_its_checkpoint(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", lambda question, check: True).train()
    result = trainer(tmp_path / "parts").train()
    assert (result.step, result.stopped, result.weights) == (2, UNANSWERED, None)
    again = trainer(tmp_path / "parts").train(resume_from_checkpoint=True)
    assert (again.step, again.stopped) == (2, UNANSWERED), "it does not continue by itself"
    last = trainer(tmp_path / "parts", lambda question, check: True).train(resume_from_checkpoint=True)
    assert last.step == 3 and last.records[-1]["loss"] == whole.records[-1]["loss"]


def test_ask_needs_two_rewards(tmp_path: Path) -> None:
    config = GRPOConfig(output_dir=str(tmp_path), ask=True, **SMALL)
    with pytest.raises(InputError, match="ask compares several rewards: give eval_prompts and eval_rewards"):
        GRPOTrainer(fresh_pipe("sd"), "brightness", config, train_prompts=["a star"], eval_prompts=["a"]).train()


# -- the terminal -----------------------------------------------------------------------------------------------------


@pytest.fixture
def typing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A terminal as standard input; returns a function that types into it."""
    master, slave = pty.openpty()
    with os.fdopen(slave) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        yield lambda text: os.write(master, text.encode())
    os.close(master)


@pytest.mark.parametrize(("text", "answer"), [("y\n", True), ("Yes\n", True), ("\n", False), ("n\n", False)])
def test_the_terminal_is_asked(text: str, answer: bool, typing: Any, tmp_path: Path, capsys: Any) -> None:
    asked = question(record(0, proxy=0.0, truth=1.0), record(5, proxy=3.0, truth=0.9))
    assert asked is not None
    typing(text)
    assert TerminalAnswers(tmp_path)(asked, lambda: None) is answer
    printed = capsys.readouterr().err
    assert "the rewards disagree about update 5: proxy +1.50, truth -0.20" in printed and "continue? [y/N]" in printed
    assert f"{tmp_path}/samples/step-000000.png" in printed and f"{tmp_path}/samples/step-000005.png" in printed
    assert "gain +0.65 ± 0.85" in printed and f"{asked.value:.3f}" in printed


def test_without_a_terminal_nobody_answers_but_yes_does_once(tmp_path: Path) -> None:
    asked = Question(5, 0, {"a": 1.0}, 0.0, 1.0, 0.4)
    answers = TerminalAnswers(tmp_path, agreed=True)
    assert [answers(asked, lambda: None) for _ in range(2)] == [True, None]


def test_ctrl_c_while_asking_ends_within_a_second_with_a_checkpoint(typing: Any, tmp_path: Path) -> None:
    pressed: list[float] = []

    def press() -> None:
        pressed.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    answers = TerminalAnswers(tmp_path)

    def on_question(question: Question, check: Callable[[], None]) -> bool | None:
        threading.Timer(0.5, press).start()
        try:
            return answers(question, check)
        finally:
            pressed.append(time.monotonic())

    result = trainer(tmp_path, on_question).train()
    assert (result.step, result.stopped) == (2, INTERRUPTED) and pressed[1] - pressed[0] < 1
    assert (tmp_path / "checkpoints" / "step-00000002").is_dir()


def test_the_command_ends_with_code_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from steer.apps import finetuning
    from steer.apps.cli.finetune import finetune
    from steer.pipelines.training.method import TrainingResult

    given: list[tuple[bool, bool]] = []

    def run(config: Any, resume: bool, agreed: bool) -> TrainingResult:
        given.append((resume, agreed))
        return TrainingResult(2, UNANSWERED, None, 1, (), ())

    monkeypatch.setattr(finetuning, "finetune", run)
    result = CliRunner().invoke(finetune, ["prdp-scenes", "--ask", "--resume", "--yes"])
    assert result.exit_code == 3 and "to continue, add --resume --yes" in result.output
    assert given == [(True, True)]
