"""The embedded model of text: its law, its samples, and `steer sample` on it."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Steer
from PIL import Image
from torch import Tensor
from torch.nn.utils import parameters_to_vector
from torch.optim.lr_scheduler import LambdaLR

from steer import TEXT_MODELS, BestOfNPipeline, FKSteeringPipeline, InputError, MaskedDiffusionPipeline
from steer.apps.scenes.text import caption_law, parse_rate, random_order_loss, train_text
from steer.apps.scenes.world import TASKS, random_request
from steer.rewards.scene import parse
from steer.training.supervised import TrainingRun


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = MaskedDiffusionPipeline.from_pretrained(TEXT_MODELS["scenes-text"])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_law_of_the_prompts_is_that_of_their_generator() -> None:
    law = caption_law()
    assert sum(law.values()) == pytest.approx(1) and all(str(parse(text)) == text for text in law)
    rng, n = np.random.default_rng(0), 20_000
    counts: dict[str, int] = {}
    for _ in range(n):
        text = str(random_request(rng, str(rng.choice(list(TASKS), p=list(TASKS.values())))))
        counts[text] = counts.get(text, 0) + 1
    assert set(counts) <= set(law)
    common = {text: p for text, p in law.items() if n * p > 5}
    chi2 = sum((counts.get(text, 0) - n * p) ** 2 / (n * p) for text, p in common.items())
    assert abs(chi2 - len(common)) < 4 * (2 * len(common)) ** 0.5


@pytest.mark.hard
def test_samples_parse(pipe: Any) -> None:
    assert parse_rate(pipe, 300) >= 0.97
    folder = TEXT_MODELS["scenes-text"]
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 1.5e6


def test_a_training_resumes_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[Any] = []

    def counted(*given: Any) -> Tensor:
        steps.append(given)
        return random_order_loss(*given)

    def weights(folder: Path, *ends: int) -> Tensor:
        pipes = [train_text(folder, end) for end in ends]
        saved = MaskedDiffusionPipeline.from_pretrained(folder / "pipeline").denoiser
        assert all(map(torch.equal, saved.half().parameters(), copy.deepcopy(pipes[-1].denoiser).half().parameters()))
        return parameters_to_vector(pipes[-1].denoiser.parameters())

    monkeypatch.setattr("steer.apps.scenes.text.random_order_loss", counted)
    monkeypatch.setattr(TrainingRun, "_schedule", lambda run, optimiser: LambdaLR(optimiser, lambda step: 1.0))
    twice = weights(tmp_path / "twice", 2, 4)
    assert len(steps) == 4, "it began over"
    assert torch.equal(twice, weights(tmp_path / "once", 4))


def test_an_unknown_word_is_named(pipe: Any) -> None:
    with pytest.raises(InputError, match="'pink' is not in the vocabulary"):
        pipe("a pink circle")


@pytest.mark.hard
def test_fk_makes_more_good_texts_than_best_of_n(pipe: Any) -> None:
    """The share of all K texts that parse and say blue, over 200 prefixes: the difference is outside its interval."""
    first = sorted({" ".join(text.split()[:2]) for text in caption_law()})
    prompts = [first[place % len(first)] for place in range(200)]
    options: dict[str, Any] = {"num_particles": 4, "chunk_size": 800}
    shares = {}
    for kind, own in ((BestOfNPipeline, {}), (FKSteeringPipeline, {"lam": 5.0, "preview": "finish:2"})):
        steer = kind(pipe, "parses + says:blue")
        out = steer(prompts, generator=torch.Generator().manual_seed(0), **options, **own)
        shares[kind] = (out.rewards == 2).float().mean(1)
    gain = (shares[FKSteeringPipeline] - shares[BestOfNPipeline]).numpy()
    rng = np.random.default_rng(0)
    means = [rng.choice(gain, len(gain)).mean() for _ in range(2000)]
    assert np.quantile(means, 0.025) > 0


def test_steer_sample_writes_texts_report_and_ancestry(steer: Steer, tmp_path: Path) -> None:
    words = ["sample", "a red", "two", "--model", "scenes-text", "--reward", "parses + says:blue", "--lam", "5"]
    words += ["--steps", "10", "--out", str(tmp_path)]
    code, out, err = steer(*words)
    assert code == 0 and "texts.jsonl" in out, err
    lines = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    report = json.loads((tmp_path / "report.json").read_text())
    steered = [line for line in lines if line["prompt"] == "a red" and line["steered"]]
    assert len(lines) == 16 and len(steered) == 4 and all(line["text"].startswith("a red") for line in steered)
    assert [line["reward"] for line in steered] == sorted(report["prompts"][0]["rewards"], reverse=True)
    assert [line["text"] for line in steered] == report["prompts"][0]["texts"]
    assert (tmp_path / "ancestry.png").stat().st_size > 5000
    before = (tmp_path / "report.json").read_bytes()
    assert steer(*words)[0] == 0 and (tmp_path / "report.json").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "reno"], "optimises the noise of images"),
        (["--reward", "brightness"], "reward of texts"),
        (["--guidance", "3"], "--guidance"),
        (["--animation"], "--animation: model 'scenes-text' makes texts: leave it out"),
        (["--compile"], "--compile: model 'scenes-text' makes texts"),
        (["--micro-batch", "0"], "--micro-batch: model 'scenes-text' makes texts"),
        (["--offload", "model"], "--offload: model 'scenes-text' makes texts"),
        (["--attention", "sdpa"], "--attention: model 'scenes-text' makes texts"),
        (["--keep", "2"], "--keep: model 'scenes-text' makes texts"),
        (["--checklist", "scene"], "--checklist: model 'scenes-text' makes texts"),
    ],
)
def test_options_of_images_are_refused(steer: Steer, words: list[str], message: str, tmp_path: Path) -> None:
    code, _, err = steer("sample", "a red", "--model", "scenes-text", "--out", tmp_path / "out", *words)
    assert code != 0 and message in err


def test_images_of_an_expanded_prompt_are_scored_by_the_original(steer: Steer, tmp_path: Path) -> None:
    words = ["sample", "a red circle", "--expand", "scenes-text", "--reward", "scene", "--steps", "4"]
    assert steer(*words, "--particles", "2", "--out", tmp_path / "out")[0] == 0
    entry = json.loads((tmp_path / "out" / "report.json").read_text())["prompts"][0]
    assert entry["prompt"] == "a red circle" and entry["expanded"].startswith("a red circle")
    recipe = Image.open(tmp_path / "out" / entry["images"][0]).text  # type: ignore[attr-defined]
    assert entry["expanded"] in str(recipe)
    code, _, err = steer("sample", "a red dog", "--expand", "scenes-text", "--out", tmp_path / "other")
    assert code != 0 and "'dog' is not in the vocabulary" in err
