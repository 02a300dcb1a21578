"""Misbehaving rewards in this process: one line within the timeout, exit code 2, finished prompts kept."""

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Steer
from PIL import Image
from server_processes import REWARDS

from steer.reward import RewardError, score

MISBEHAVING = """
import torch

def returns(made):
    def reward(images, prompts):
        fine = images.mean((1, 2, 3))
        return made(fine) if "star" in prompts[0] else fine
    reward.__name__ = "odd"
    return reward

nan = returns(lambda fine: fine * float("nan"))
inf = returns(lambda fine: fine + float("inf"))
minus_inf = returns(lambda fine: fine - float("inf"))
booleans = returns(lambda fine: fine > 0)
shape = returns(lambda fine: fine[:, None].expand(-1, 2))
none = returns(lambda fine: None)
meta = returns(lambda fine: fine.to("meta"))
sparse = returns(lambda fine: fine.to_sparse())
raises = returns(lambda fine: fine[99])
huge = returns(lambda fine: fine.sub(0.5).sign() * 1e30)
minus_huge = returns(lambda fine: fine * 0 - 1e30)
constant = returns(lambda fine: fine * 0 + 7)
"""
WRONG = {
    "nan": "returned nan for image 0",
    "inf": "returned inf for image 0",
    "minus_inf": "returned -inf for image 0",
    "booleans": "must return floats, got torch.bool",
    "shape": "must return a tensor of shape (",
    "none": "must return a tensor of shape (",
    "meta": "must return a dense tensor with values",
    "sparse": "must return a dense tensor with values",
    "raises": "failed: IndexError",
}
WORDS = ["a circle", "a star", "--steps", 3, "--particles", 2, "--no-compare"]


def alternated(kinds: Iterable[str]) -> list[Any]:
    """Each kind under one of the two methods; `make test-hard` has the others."""
    methods = [(kind, ("fk", "best-of-n")[:: (-1) ** number]) for number, kind in enumerate(kinds)]
    others = [pytest.param(kind, other, marks=pytest.mark.hard) for kind, (_, other) in methods]
    return [*((kind, method) for kind, (method, _) in methods), *others]


@pytest.mark.few(3)
@pytest.mark.parametrize(("kind", "method"), alternated(WRONG))
def test_what_is_wrong_ends_the_run_in_one_line_and_finished_prompts_stay(
    steer: Steer, tmp_path: Path, kind: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "own_odd", raising=False)
    (tmp_path / "own_odd.py").write_text(MISBEHAVING)
    code, _, err = steer("sample", *WORDS, "--method", method, "--reward", f"own_odd:{kind}", "--out", tmp_path / "out")
    assert code == 2 and f"reward 'odd' {WRONG[kind]}" in err and len(err.strip().splitlines()) == 1
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [entry["prompt"] for entry in report["prompts"]] == ["a circle"]


@pytest.mark.few(1)
@pytest.mark.parametrize(("kind", "method"), alternated(["huge", "minus_huge", "constant"]))
def test_what_is_only_odd_does_no_harm(
    steer: Steer, tmp_path: Path, kind: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "own_odd", raising=False)
    (tmp_path / "own_odd.py").write_text(MISBEHAVING)
    code, _, err = steer("sample", *WORDS, "--method", method, "--reward", f"own_odd:{kind}", "--out", tmp_path / "out")
    assert code == 0, err
    entry = json.loads((tmp_path / "out" / "report.json").read_text())["prompts"][1]
    assert torch.tensor(entry["rewards"]).isfinite().all() and len(entry["images"]) == 2


@pytest.mark.parametrize("result", [torch.zeros(2, device="meta"), torch.zeros(2).to_sparse()])
def test_scores_without_values_are_an_error_of_the_contract(result: torch.Tensor) -> None:
    class Odd:
        name, differentiable = "odd", False

        def __call__(self, images: torch.Tensor, prompts: object) -> torch.Tensor:
            return result

    with pytest.raises(RewardError, match="reward 'odd' must return a dense tensor with values"):
        score(Odd(), torch.zeros(2, 3, 4, 4), ["a", "b"])


@pytest.mark.hard
@pytest.mark.parametrize("kind", ["spins", "hangs"])
def test_a_process_whose_reward_hangs_ends_with_its_line_and_code(tmp_path: Path, kind: str) -> None:
    """The interpreter must not be shut down under a thread inside PyTorch: that aborts, exit code 134."""
    (tmp_path / "own_served.py").write_text(REWARDS)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    words = ["score", "a.png", "--prompt", "a star", "--reward", f"own_served:{kind}", "--reward-timeout", "0.5"]
    ended = subprocess.run(
        [sys.executable, "-m", "steer.apps.cli.main", *words], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert ended.stderr == f"steer: reward '{kind}' timed out after 0.5 s: raise its timeout, or fix the reward\n"
    assert ended.returncode == 2 and ended.stdout == ""
