"""Distributed training: the gradients of one process, checkpoints of several, and a process that dies."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_child import fresh, gradients
from finetune_runs import METHODS, config_of, train
from preloaded import environment_with, run_two
from safetensors import safe_open
from safetensors.torch import load_file

from steer.errors import InputError
from steer.training.checkpoint import Checkpoints
from steer.training.distributed import SINGLE_PROCESS, sum_over_processes

TESTS = Path(__file__).parent


def launched(folder: Path, *what: str) -> subprocess.CompletedProcess[str]:
    """Two gloo processes. accelerate launch --cpu --num_processes 2 would silently begin one."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(TESTS / "distributed_child.py"), str(folder), *what]
    return subprocess.run(
        command, env=environment_with(TESTS), capture_output=True, text=True, timeout=600, check=False
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of two processes."""
    folder = tmp_path_factory.mktemp("two")
    words = [TESTS / "distributed_child.py", folder, "first", "gradients", "resumed", "interrupted"]
    ended = run_two(words, Path.cwd(), environment_with(TESTS))
    assert ended.returncode == 0, ended.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    ended = run_two([TESTS / "distributed_child.py", folder, "sharded"], Path.cwd(), environment_with(TESTS))
    assert ended.returncode == 0, ended.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def single_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the two have: more of them round otherwise, and a chain of steps amplifies it
    gradients(folder)
    torch.set_num_threads(threads)
    return folder


def metrics(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["metrics"])


@pytest.mark.hard
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_have_the_gradient_of_one_with_twice_the_batch(
    method: str, made: Path, single_process: Path
) -> None:
    one, two, other = (
        load_file(path / f"{method}-{n}.safetensors") for path, n in ((single_process, 0), (made, 0), (made, 1))
    )
    assert all(torch.equal(two[name], other[name]) for name in one), "both have the same"
    longest = max(value.abs().max() for value in one.values())
    assert longest > 0
    assert max((two[name] - value).abs().max() for name, value in one.items()) <= 1e-5 * longest
    whole, half = metrics(single_process / f"{method}-0.safetensors"), metrics(made / f"{method}-1.safetensors")
    assert (whole.pop("processes"), half.pop("processes")) == (1, 2)
    assert whole.pop("rows") == 2 * half.pop("rows") == 12
    assert half == pytest.approx(whole, rel=1e-4, abs=1e-6, nan_ok=True)


def lines(folder: Path) -> list[dict[str, Any]]:
    kept = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in one.items() if not name.endswith(("second", "seconds", "share"))}
        for one in kept
    ]


@pytest.mark.hard
@pytest.mark.parametrize("method", ["prdp", "ddpo"])
def test_a_run_of_two_processes_resumes_bit_for_bit(method: str, made: Path) -> None:
    straight, parted = (made / f"{method}-{name}" for name in ("straight", "parted"))
    assert (parted / "checkpoints" / "step-00000003" / "rollout.json").exists(), "inside a rollout buffer"
    assert lines(parted) == lines(straight) and lines(parted)[-1]["processes"] == 2
    first, second = ((path / "evaluations.jsonl").read_text() for path in (straight, parted))
    assert [json.loads(first.splitlines()[-1])] == [json.loads(second.splitlines()[-1])]
    for name in ("weights", "optimiser", "average", "random"):
        kept, again = (
            load_file(path / "checkpoints/step-00000004" / f"{name}.safetensors") for path in (straight, parted)
        )
        assert kept.keys() == again.keys() and all(torch.equal(kept[key], again[key]) for key in kept)


@pytest.mark.hard
def test_one_process_resumes_a_run_of_two(made: Path, tmp_path: Path) -> None:
    """From a checkpoint inside a rollout buffer: the result equals theirs up to rounding."""
    (tmp_path / "run").mkdir()
    (made / "prdp-parted" / "checkpoints" / "step-00000003").rename(tmp_path / "kept")
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "kept").rename(tmp_path / "run" / "checkpoints" / "step-00000003")
    result = train("prdp", fresh(), tmp_path / "run", config_of("prdp", max_steps=4))
    assert result.step == 4
    there = json.loads((made / "prdp-straight" / "metrics.jsonl").read_text().splitlines()[-1])
    here = result.records[-1]
    assert here["processes"] == 1
    for name in ("loss", "reward", "kl", "grad_norm"):
        assert here[name] == pytest.approx(there[name], rel=1e-3)


@pytest.mark.hard
def test_a_signal_to_one_process_stops_all_at_the_same_place(made: Path) -> None:
    ends = [json.loads((made / f"interrupted-{n}.json").read_text()) for n in (0, 1)]
    assert ends[0] == ends[1] and ends[0]["stopped"] == "interrupted" and 0 < ends[0]["step"] < 50
    newest_checkpoint, skipped = Checkpoints(made / "interrupted" / "checkpoints").latest()
    assert newest_checkpoint and not skipped and newest_checkpoint.json("state")["step"] == ends[0]["step"]


@pytest.mark.hard
def test_a_process_that_dies_ends_the_run_within_a_minute(tmp_path: Path) -> None:
    ended = launched(tmp_path, "killed")
    assert ended.returncode != 0
    assert time.time() - float((tmp_path / "died.txt").read_text()) < 60
    newest_checkpoint, skipped = Checkpoints(tmp_path / "dies" / "checkpoints").latest()
    assert newest_checkpoint and not skipped, "what was saved before is whole"


def test_prompts_that_cannot_be_shared_out_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from steer.pipelines.training import distributed as context

    class Three(context.AccelerateContext):
        def __init__(self, accelerator: Any) -> None:
            super().__init__(accelerator)
            self.world_size = 3

    monkeypatch.setattr("steer.pipelines.training.trainer.AccelerateContext", Three)
    with pytest.raises(InputError, match="train_batch_size must be a multiple of the 3 processes, got 2"):
        train("grpo", fresh(), tmp_path)


def test_a_sum_over_one_process_is_what_it_has() -> None:
    assert sum_over_processes(SINGLE_PROCESS, [1.5, -2.0]) == [1.5, -2.0]


@pytest.mark.hard
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_sharded_weights_learn_what_whole_ones_do_and_resume_bit_for_bit(
    kind: str, sharded: Path, tmp_path: Path
) -> None:
    """FSDP2: every parameter of the denoiser lies in two components; a file holds whole ones."""
    straight, parted = (sharded / f"{kind}-{name}" for name in ("straight", "parted"))
    assert lines(parted) == lines(straight)
    for name in ("weights", "optimiser", "average", "random"):
        kept, again = (
            load_file(path / "checkpoints/step-00000004" / f"{name}.safetensors") for path in (straight, parted)
        )
        assert kept.keys() == again.keys() and all(torch.equal(kept[key], again[key]) for key in kept)
    pipe = fresh()
    config = config_of("prdp", max_steps=4, **{"lora": {}, "full": {"lora_rank": 0}}[kind])
    result = train("prdp", pipe, tmp_path, config)
    assert result.weights
    name = {"lora": "final/pytorch_lora_weights.safetensors", "full": "final/unet/diffusion_pytorch_model.safetensors"}
    single_process, divided = (load_file(path / name[kind]) for path in (tmp_path, straight))
    assert single_process.keys() == divided.keys()
    # Four steps of Adam, 0.01 each in the end: what rounding turns round is less than a hundredth of that.
    assert max((divided[key] - value).abs().max() for key, value in single_process.items()) < 1e-4
    if kind == "full":
        assert json.loads((straight / "final/unet/config.json").read_text())["_class_name"] == type(pipe.unet).__name__
