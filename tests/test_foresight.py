"""Foresight: agreement of rewards on the way with the finished ones."""

import json
from pathlib import Path

import torch
from conftest import Steer, cached_pipe, call_kwargs
from gaussian import TOTAL, GaussianPipeline
from soft_rewards import redness

from steer.apps.evaluation.foresight import agreement, foresight, table
from steer.arguments import IMAGES_PER_PROMPT


def test_agreement_counts_pairs_by_hand() -> None:
    truth, guess = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.5, 0.2, 0.9]])
    assert agreement(guess, truth) == 0.5 and agreement(truth, truth) == 1.0 and agreement(-truth, truth) == 0.0


def test_a_whole_look_ahead_of_a_deterministic_run_foresees_everything() -> None:
    pipe = cached_pipe("sd3")
    left_out = (*IMAGES_PER_PROMPT, "prompt")
    call = {name: value for name, value in call_kwargs("sd3", 2, 5).items() if name not in left_out}
    result = foresight(pipe, redness, ["a", "b"], (1, 99), [0, 1], 4, None, call)
    assert [mean for mean, _, _ in result["agreement"]["99"]] == [1.0, 1.0]
    assert result["nfe"] == {"1": 5.0, "99": 5 + 4 + 3}
    assert "m = 99 | 1.00 [1.00, 1.00]" in table(result)


def test_noise_of_later_steps_is_not_foreseen() -> None:
    call = {"num_inference_steps": 10, "eta": 1.0, "reward_prompt": [""] * 8, "chunk_size": 1024}
    result = foresight(GaussianPipeline(), TOTAL, [""] * 8, (1,), [1, 7], 64, None, call)
    early, late = (mean for mean, _, _ in result["agreement"]["1"])
    assert 0.4 < early < 0.65 < late


def test_the_command_writes_a_table_and_a_figure(steer: Steer, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red star\ntwo blue circles\n")
    arguments = ["--reward", "scene-soft", "--judge", "scene-soft", "--steps", 6, "--at", "1,2", "--lookahead", 2]
    code, out, _ = steer("foresight", "scenes", "--prompts", tmp_path / "prompts.txt", "--out", tmp_path, *arguments)
    assert code == 0 and "| m = 2 |" in out
    figures = json.loads((tmp_path / "foresight.json").read_text())
    assert len(figures["agreement"]["2"]) == 2 and figures["nfe"] == {"2": 8.0}
    assert (tmp_path / "foresight.png").stat().st_size > 1000
