"""The study of cheap previews: ranks by hand, and a tiny run of all of it."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from steer.apps.models import load_pipeline
from steer.apps.scenes import __main__ as stages
from steer.apps.scenes import evaluate
from steer.apps.scenes import steering_studies as study
from steer.apps.scenes.steering_studies import rank_correlation, read_steps
from steer.diffusion.preview import LinearPreview


def test_ranks_by_hand() -> None:
    """ρ = 1 − 6 Σ d² / (K (K² − 1)) where nothing is equal."""
    truth, guess = torch.tensor([0.1, 0.4, 0.2, 0.9]), torch.tensor([5.0, 9.0, 8.0, 7.0])
    # Ranks 1, 3, 2, 4 and 1, 4, 3, 2: d = 0, −1, −1, 2.
    assert rank_correlation(truth, guess) == pytest.approx(1 - 6 * 6 / (4 * 15))
    assert rank_correlation(truth, truth.exp()) == pytest.approx(1) == -rank_correlation(truth, -truth)


def test_equal_rewards_share_a_rank() -> None:
    # Ranks 1.5, 1.5, 3 and 1, 2, 3: covariance of −.5, −.5, 1 with −1, 0, 1, over the square roots of 1.5 and 2.
    found = rank_correlation(torch.tensor([0.0, 0.0, 1.0]), torch.tensor([1.0, 2.0, 3.0]))
    assert found == pytest.approx(1.5 / math.sqrt(1.5 * 2))
    nearly = torch.tensor([0.0, 1e-9, 1.0])  # what rounding components is equal
    assert rank_correlation(nearly, torch.tensor([1.0, 2.0, 3.0])) == pytest.approx(found)


def test_without_an_order_there_is_none_to_find() -> None:
    same, apart = torch.full((4,), 0.3), torch.arange(4.0)
    assert math.isnan(rank_correlation(same, apart)) and math.isnan(rank_correlation(same, same))
    assert rank_correlation(apart, same) == 0


def test_rewards_are_read_where_steering_reads_them() -> None:
    assert read_steps(20) == [8, 11, 14, 17]


def test_prompts_without_an_order_are_left_out_and_counted() -> None:
    nan = float("nan")
    rows = {
        ("r", "full", "full"): [[1.0, 1.0]],
        ("r", "tiny", "full"): [[0.5, nan], [1.0, nan], [0.0, nan]],
        ("other", "tiny", "full"): [[9.0, 9.0]],
    }
    table = study._table(rows, "r")
    assert set(table) == {"tiny"}
    assert table["tiny"]["with full"][0][0] == 0.5 and table["tiny"]["with full"][1] is None
    assert table["tiny"]["without order, full"] == [0, 3]


def test_refitting_with_nothing_new_is_fitting_once() -> None:
    pipe = load_pipeline("scenes")
    first, second = (torch.randn(3, 8, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(2))
    linear = LinearPreview(pipe, {"prompt": "a star", "num_images_per_prompt": 3, "guidance_scale": 4.0})
    with torch.no_grad():
        once = [linear(x0) for x0 in (first, first, second)]
        again = study.refitted_previews(pipe.vae, [first, first], 3)
        for expected, found in zip(once[:2], again, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        assert not torch.allclose(study.refitted_previews(pipe.vae, [first, second], 1)[1], once[2], atol=1e-2)


def test_a_study_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    monkeypatch.setattr(study, "REPEATS", 1)
    monkeypatch.setattr(study, "REWARDS", ("scene-soft",))
    monkeypatch.setattr(study, "SIZE", 3)
    monkeypatch.setattr(study, "REFITTED", (1,))
    monkeypatch.setattr(evaluate, "CALL", {"num_inference_steps": 10, "guidance_scale": 4.0})
    real = study.rank_correlation
    monkeypatch.setattr(study, "rank_correlation", lambda a, b: (seen.append(a), real(a, b))[1])
    words = ["study", "preview-study", "--count", "2", "--json", str(tmp_path / "found.json")]
    monkeypatch.setattr(sys, "argv", words)
    stages.main()
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["prompts"] == 2 and found["settings"]["steps"] == [4, 6, 7, 8]
    table = found["correlation"]["scene-soft"]
    assert table["linear"]["with full"][0][0] == 1  # its first previews are the full decoder's
    assert set(table) == {"full", "tiny", "linear", "linear, refitted by 1"} and "with full" not in table["full"]
    assert len(table["tiny"]["with finished"]) == 4
    assert set(found["seconds"]) == {n + end for n in ("full", "tiny", "linear") for end in ("", ", first")}
    decodes = {name: row["decodes"] for name, row in found["steering"].items()}
    assert decodes == {"full": 3 * 5, "tiny": 3, "linear": 3 * 2}
    assert len(seen) == 2 * 4 * 8
