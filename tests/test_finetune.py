"""Finetuning runs from end to end, on a tiny pipeline: learning, guards, stopping, resuming."""

import json
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PIPELINES
from finetune_runs import METHODS, Recorder, config_of, train
from pairwise import hard_but
from preloaded import Forked
from safetensors.torch import load_file

from steer.apps.models import load_pipeline
from steer.files import CHECKSUMS, verify_checksums


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These models are too small for two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion in a folder."""
    folder = tmp_path_factory.mktemp("model")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        PIPELINES["sd"]().save_pretrained(folder)
    return folder


def loaded(model: Path) -> Any:
    pipe = load_pipeline(str(model), "cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def newest(folder: Path) -> Path:
    return max((folder / "checkpoints").glob("step-*"))


def assert_same_end(one: Path, other: Path) -> None:
    """Every tensor, every logged value but the times, and the exported weights are equal to the last bit."""
    first, second = newest(one), newest(other)
    assert first.name == second.name
    names = {path.name for path in first.iterdir()}
    assert names == {path.name for path in second.iterdir()}
    for name in names - {"state.json", "manifest.json"}:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    states = [json.loads((path / "state.json").read_text()) for path in (first, second)]
    for state in states:
        state["records"] = [json.loads(line) for line in state["records"]]
        for record in state["records"]:
            assert record.pop("seconds") > 0 and record.pop("images_per_second") > 0
            shares = [record.pop(f"{phase}_share") for phase in ("rollout", "reward", "update")]
            assert sum(shares) == pytest.approx(1) and min(shares) >= 0
    assert states[0] == states[1]
    for weights in ("final", "best"):
        names = sorted(path.name for path in (one / weights).iterdir())
        assert CHECKSUMS in names and not verify_checksums(
            *(folder / weights / name for folder in (one, other) for name in names if name != CHECKSUMS)
        )
        for name in names:
            if name == CHECKSUMS:  # of files that hold the same in any order
                continue
            tensors = [load_file(folder / weights / name) for folder in (one, other)]
            assert tensors[0].keys() == tensors[1].keys()
            assert all(torch.equal(value, tensors[1][key]) for key, value in tensors[0].items())


@pytest.mark.parametrize("method", hard_but(["d3po", "prdp", "ddpo"], "d3po"))
def test_killed_anywhere_and_resumed_it_ends_the_same_to_the_last_bit(method: str, model: Path, tmp_path: Path) -> None:
    train(method, loaded(model), tmp_path / "whole")
    command = [Path(__file__).with_name("finetune_child.py"), method, model, tmp_path / "killed"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[:2])),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    child = Forked(command, tmp_path, environment)
    lines = [child.stdout.readline() for _ in range(random.Random(method).randint(1, 6))]
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert all(line.strip() for line in lines)
    result = train(method, loaded(model), tmp_path / "killed")
    assert result.step == 7 and len(result.records) == 7
    assert_same_end(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.hard
@pytest.mark.parametrize("method", hard_but(METHODS, "ddpo"))
def test_stopped_at_any_denoiser_call_and_resumed_it_ends_the_same(method: str, model: Path, tmp_path: Path) -> None:
    whole = train(method, loaded(model), tmp_path / "whole")
    assert whole.stopped is None and whole.weights == tmp_path / "whole" / "final" / "pytorch_lora_weights.safetensors"
    chosen, pauses = random.Random(method), 0
    for _ in range(30):
        pipe = loaded(model)
        interrupt_after(pipe, chosen.randint(10, 30))
        result = train(method, pipe, tmp_path / "stopped")
        if result.stopped is None:
            break
        pauses += 1
        assert result.stopped == "interrupted" and result.weights is None
    assert pauses > 1 and result.step == 7
    assert_same_end(tmp_path / "whole", tmp_path / "stopped")


def interrupt_after(pipe: Any, calls: int) -> None:
    """SIGTERM to this process when the denoiser is called for the so-manieth time."""
    count = 0

    def hook(*_: Any) -> None:
        nonlocal count
        count += 1
        if count == calls:
            os.kill(os.getpid(), signal.SIGTERM)

    pipe.unet.register_forward_pre_hook(hook)


@pytest.mark.hard
@pytest.mark.parametrize("method", hard_but(METHODS, "reward-backprop"))
def test_the_reward_rises(method: str, model: Path, tmp_path: Path) -> None:
    """All weights of the tiny denoiser learn brightness in a few updates, on prompts that they were not trained on."""
    config = config_of(
        method,
        max_steps=15,
        train_batch_size=3,
        num_generations=16,
        micro_batch=48,
        steps_per_generation=1,
        num_iterations=1,
        num_inference_steps=6,
        lora_rank=0,
        learning_rate=0.002,
        warmup_steps=0,
        ema_decay=0.0,
        kl_weight=0.0,
        kl_target_nats=None,
        eval_steps=15,
        num_generations_eval=64,
    )
    recorder = Recorder()
    result = train(method, loaded(model), tmp_path, config, callbacks=[recorder])
    evaluated = recorder.evaluations
    gain = evaluated[-1].rewards["brightness"] - evaluated[0].rewards["brightness"]  # of the same seeds
    assert gain.mean() > 4 * gain.std() / gain.numel() ** 0.5
    assert result.records[0]["kl"] == 0 < result.records[-1]["kl"]
    assert result.weights == tmp_path / "final" / "unet"
