"""The purposes of `steer sample`: the best picture by search, or samples by Feynman–Kac steering."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Steer
from gaussian import GaussianPipeline
from soft_rewards import Soft, seeded

from steer import FKSettings, FKSteeringPipeline
from steer.apps.settings import SamplingConfig, choose_method, errors_with_flags
from steer.errors import InputError


@pytest.mark.parametrize(
    ("given", "purpose", "method"),
    [
        ({}, None, "race"),
        ({"lam": None, "particles": 8}, None, "race"),
        ({"lookahead": 2}, None, "race"),  # both have it
        ({"lam": 25.0}, None, "fk"),
        ({"potential": "max"}, None, "fk"),
        ({}, "samples", "fk"),
        ({}, "picture", "race"),
        ({"method": "beam"}, None, "beam"),
    ],
)
def test_a_purpose_chooses_the_method(given: dict[str, Any], purpose: str | None, method: str) -> None:
    assert SamplingConfig.of(**choose_method(given, purpose)).method == method


def test_the_search_has_twelve_starts_unless_others_are_given() -> None:
    assert SamplingConfig.of(**choose_method({})).particles == 12
    assert SamplingConfig.of(**choose_method({"particles": 8})).particles == 8


@pytest.mark.parametrize(
    ("given", "purpose", "texts", "message"),
    [
        ({"method": "fk"}, "samples", False, "purpose and method exclude each other"),
        ({}, "pictures", False, "unknown purpose 'pictures'|purpose 'pictures'"),
        ({}, "picture", True, "a text has no search"),
        ({"lam": 3.0}, "picture", False, "lam is an option of fk and svdd, not of race"),
    ],
)
def test_purposes_that_do_not_fit_are_refused(given: dict[str, Any], purpose: str, texts: bool, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SamplingConfig.of(**choose_method(given, purpose, texts))
    assert choose_method({}, None, texts=True)["method"] == "fk"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "beam", "beams": 3}, "--beams must divide --particles, got 3 of 4"),
        ({"lam": 1.0, "tempering": "best_of"}, "unknown tempering 'best_of': did you mean "),
        ({"particles": 2, "noise_candidates": 1}, "--noise-candidates must be at least the particles, 2"),
    ],
)
def test_the_command_line_names_the_flags_of_settings(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught, errors_with_flags():
        SamplingConfig.of(**given)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "message", ["reward 'best_of' failed: RuntimeError", "/home/me/model_config/a.png: cannot be read (num_particles)"]
)
def test_other_messages_reach_the_command_line_as_they_are(message: str) -> None:
    with pytest.raises(InputError) as caught, errors_with_flags():
        raise InputError(message)
    assert str(caught.value) == message


def test_the_command_searches_by_default_and_samples_on_request(steer: Steer, tmp_path: Path) -> None:
    words = ["sample", "a red circle", "--steps", 5, "--no-compare", "--seed", 1]
    code, out, _ = steer(*words, "--out", tmp_path / "picture")
    assert code == 0 and "1 prompts, scene-soft: best" in out and " s by race → " in out
    report = json.loads((tmp_path / "picture/report.json").read_text())
    entry = report["prompts"][0]
    assert report["settings"]["particles"] == 12 and len(entry["images"]) == 2
    assert entry["steps"] == [0] and report["cost"]["nfe"] == 12 * 5 + 2 * 4  # a look-ahead of all five steps
    code, out, _ = steer(*words, "--purpose", "samples", "--out", tmp_path / "samples")
    entry = json.loads((tmp_path / "samples/report.json").read_text())["prompts"][0]
    assert code == 0 and f"by fk, λ {entry['lam']:.3g} to {entry['lam']:.3g} → " in out and any(entry["log_weights"])


def test_a_preset_is_a_file_of_settings(steer: Steer, tmp_path: Path) -> None:
    (tmp_path / "preset.yaml").write_text("method: race\nparticles: 4\nbranches: 2\nrungs: 1:2\nsteps: 4\n")
    code, _, error = steer(
        *("sample", "a star", "--preset", tmp_path / "preset.yaml", "--no-compare", "--out", tmp_path / "o")
    )
    assert code == 0, error
    settings = json.loads((tmp_path / "o/report.json").read_text())["settings"]
    assert (settings["method"], settings["rungs"], settings["steps"]) == ("race", "1:2", 4)


def test_lam_is_chosen_at_the_first_rewards_that_differ() -> None:
    """Equal rewards at the first evaluation say nothing of λ: the second one leaves an ESS of half the particles."""
    pipe, calls = GaussianPipeline(), [0]
    assert FKSettings().lam == "auto"

    def blind_at_first(images: Any, prompts: Any) -> Any:
        calls[0] += 1
        return torch.zeros(len(images)) if calls[0] == 1 else images.sum((1, 2, 3))

    out = FKSteeringPipeline(pipe, Soft(blind_at_first, "blind"))(
        reward_prompt="", num_particles=8, eta=1.0, ess_threshold=1e-9, resample_steps=[3, 6], generator=seeded()
    )
    assert out.lam is not None and out.lam > 1
    assert out.ess[0].item() == pytest.approx(8) and out.ess[1].item() == pytest.approx(4, rel=1e-3)
    torch.testing.assert_close(out.log_weights, out.lam * out.rewards, atol=1e-2, rtol=1e-4)
