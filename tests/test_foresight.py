"""Foresight: agreement of intermediate rewards with those of the finished images."""

import json
import math
from pathlib import Path

import pytest
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
    """Pairs of Gaussians with correlation ρ are ranked alike with probability 1/2 + asin(ρ)/π."""
    pipe, steps = GaussianPipeline(), [3, 8]
    call = {"num_inference_steps": 12, "eta": 1.0, "reward_prompt": [""] * 8, "chunk_size": 1024}
    result = foresight(pipe, TOTAL, [""] * 8, (1,), steps, 96, None, call)
    transitions, (_, std) = pipe.transitions(12, 1.0), pipe.distribution(12, 1.0)
    for step, (mean, _, _) in zip(steps, result["agreement"]["1"], strict=True):
        variance = 1.0
        for gain, _, tau in transitions[:step]:
            variance = gain**2 * variance + tau**2
        correlation = math.prod(gain for gain, _, _ in transitions[step:]) * math.sqrt(variance) / std
        assert mean == pytest.approx(0.5 + math.asin(correlation) / math.pi, abs=0.05)


def test_the_command_writes_a_table_and_a_figure(steer: Steer, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red star\ntwo blue circles\n")
    arguments = ["--reward", "scene-soft", "--judge", "scene-soft", "--steps", 6, "--at", "2,1,2", "--lookahead", 2]
    code, out, _ = steer("foresight", "scenes", "--prompts", tmp_path / "prompts.txt", "--out", tmp_path, *arguments)
    assert code == 0 and "| m = 2 |" in out
    figures = json.loads((tmp_path / "foresight.json").read_text())
    assert figures["steps"] == [1, 2] and len(figures["agreement"]["2"]) == 2 and figures["nfe"] == {"2": 8.0}
    assert (tmp_path / "foresight.png").stat().st_size > 1000
