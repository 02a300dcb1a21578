"""Options that people expect of a trainer: schedules, optimisers, adapters of peft, background rewards, trackers."""

import json
import math
import sys
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.optimization import get_scheduler
from finetune_runs import config_of, train
from test_finetune_config import LEAST, written
from test_finetune_run import SHORT, fresh
from test_trainable import differs, image, move
from torch import Tensor, nn

from steer import GRPOConfig
from steer.apps.finetuning import FinetuneConfig, FinetuneJob, load_data, read_config, summary
from steer.apps.prompts import PromptRow, metadata_of
from steer.errors import InputError
from steer.pipelines.training.evaluation import EvalResult
from steer.pipelines.training.method import TrainingResult
from steer.pipelines.training.preparation import enable_gradient_checkpointing
from steer.pipelines.training.tracking import log_samples
from steer.pipelines.training.trainer import throughput
from steer.training.checkpoint import Checkpoint, Checkpoints, load_optimiser, optimiser_tensors
from steer.training.optimisers import BITSANDBYTES, optimiser_class
from steer.training.rollout import Sampler
from steer.training.trainable import LoRA

QUICK = SHORT | {"warmup_steps": 0, "max_steps": 2, "save_steps": 1, "eval_steps": 9}
PLAIN: dict[str, Any] = {"eval_prompts": (), "eval_rewards": ()}
TIMES = {"seconds", "images_per_second", "rollout_share", "reward_share", "update_share"}


def half_cosine(share: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * share))


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("constant", {}, [1, 1, 1, 1, 1]),
        ("constant_with_warmup", {"num_warmup_steps": 2}, [0, 0.5, 1, 1, 1]),
        ("linear", {"num_warmup_steps": 1}, [0, 1, 3 / 4, 2 / 4, 1 / 4]),
        ("cosine", {}, [half_cosine(k / 5) for k in range(5)]),
        ("cosine_with_restarts", {"num_cycles": 2}, [half_cosine(2 * k / 5 % 1) for k in range(5)]),
        ("polynomial", {"power": 2.0}, [(1 - k / 5) ** 2 for k in range(5)]),
    ],
)
def test_a_schedule_follows_its_closed_form(name: Any, options: dict[str, Any], expected: list[float]) -> None:
    optimiser = optimiser_class("sgd")([nn.Parameter(torch.ones(1))], lr=0.1)
    schedule = get_scheduler(name, optimiser, **{"num_warmup_steps": 0, "num_training_steps": 5} | options)
    rates = []
    for _ in range(5):
        rates.append(schedule.get_last_lr()[0])
        optimiser.step()
        schedule.step()
    assert rates == pytest.approx([0.1 * one for one in expected], abs=1e-6)  # polynomial ends at 1e-7


def test_a_run_is_resumed_with_another_length(tmp_path: Path) -> None:
    """A cosine of two updates, then of four: the rates are those of the present length, at the updates so far."""
    config = config_of("grpo", **QUICK | {"lr_scheduler_type": "cosine"})
    train("grpo", fresh(), tmp_path, config, **PLAIN)
    result = train("grpo", fresh(), tmp_path, replace(config, max_steps=4), **PLAIN)
    expected = [0.01 * half_cosine(share) for share in (0, 1 / 2, 2 / 4, 3 / 4)]
    assert [record["learning_rate"] for record in result.records] == pytest.approx(expected)
    linear = replace(config, max_steps=5, lr_scheduler_type="linear", learning_rate=0.002)
    assert train("grpo", fresh(), tmp_path, linear, **PLAIN).records[-1]["learning_rate"] == pytest.approx(0.002 / 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_scheduler_type": "constant", "warmup_steps": 3}, "constant has no warmup, got warmup_steps 3"),
        ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type"),
        ({"optim": "adamw_9bit"}, "optim"),
        ({"use_dora": True, "lora_rank": 0}, "use_dora and use_rslora are for a LoRA"),
    ],
)
def test_options_that_do_not_fit_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        GRPOConfig(**options)


@pytest.mark.parametrize("name", BITSANDBYTES)
def test_optimisers_of_8_bits_name_the_missing_package(name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delitem(sys.modules, "bitsandbytes.optim", raising=False)
    with pytest.raises(InputError, match=f"optim {name} needs bitsandbytes: pip install bitsandbytes"):
        GRPOConfig(optim=name)


def test_sgd_is_an_optimiser_too(tmp_path: Path) -> None:
    """One step of it by hand: w ← w − rate (g + decay w)."""
    weight = nn.Parameter(torch.tensor([2.0, -1.0]))
    optimiser = optimiser_class("sgd")([weight], lr=0.1, weight_decay=0.5)
    (weight * torch.tensor([3.0, 4.0])).sum().backward()
    optimiser.step()
    assert weight.tolist() == pytest.approx([2 - 0.1 * (3 + 1), -1 - 0.1 * (4 - 0.5)])
    assert train("grpo", fresh(), tmp_path, config_of("grpo", **QUICK | {"optim": "sgd"}), **PLAIN).step == 2
    with pytest.raises(InputError, match="another optim"):
        train("grpo", fresh(), tmp_path, config_of("grpo", **QUICK | {"max_steps": 3}), **PLAIN)


@pytest.mark.parametrize("name", ["adamw_8bit", "lion_8bit"])
def test_moments_in_8_bits_are_restored_bit_for_bit(name: Any, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def weight() -> nn.Parameter:
        return nn.Parameter(torch.linspace(-1, 1, 8192, device=device).view(64, 128))  # smaller ones keep 32 bits

    def step(one: nn.Parameter, optimiser: Any, number: int) -> None:
        noise = torch.randn(one.shape, generator=torch.Generator().manual_seed(number))
        one.grad = noise.to(device)
        optimiser.step()

    first, second = weight(), weight()
    whole, resumed = (optimiser_class(name)([one], lr=1e-2, weight_decay=0.1) for one in (first, second))
    for number in range(3):
        step(first, whole, number)
    tensors, values = optimiser_tensors(whole)
    assert tensors["0.state1"].dtype == torch.uint8
    saved = Checkpoint.open(Checkpoints(tmp_path).save(1, {"optimiser": tensors}, {"optimiser": values}))
    load_optimiser(resumed, saved.tensors("optimiser"), saved.json("optimiser"))
    second.data.copy_(first.data)
    for number in range(3, 6):
        step(first, whole, number)
        step(second, resumed, number)
    assert torch.equal(first, second)


def test_dora_starts_at_the_reference_and_loads_in_diffusers(tmp_path: Path) -> None:
    pipe, base = fresh(), image(fresh())
    lora = LoRA(pipe, 2, use_dora=True)
    norms = {name: value for name, value in lora.parameters.items() if "magnitude" in name}
    assert norms and all(value.requires_grad for value in norms.values())
    assert torch.equal(image(pipe), base)
    for value in norms.values():  # of these alone
        value.data *= 1.5
    assert differs(image(pipe), base)
    move(lora, 0.3)
    there = image(pipe)
    with lora.reference():
        assert torch.equal(image(pipe), base)
    assert torch.equal(image(pipe), there)
    lora.write(lora.state(), tmp_path)
    loaded = fresh()
    loaded.load_lora_weights(tmp_path)
    torch.testing.assert_close(image(loaded), there, atol=1e-6, rtol=0)
    again = fresh()
    LoRA(again, 2, use_dora=True).load_initial_adapter(str(tmp_path))
    assert torch.equal(image(again), there)
    with pytest.raises(InputError, match="give use_dora: true, as it has"):
        LoRA(fresh(), 2).load_initial_adapter(str(tmp_path))


def test_rslora_is_a_lora_of_a_larger_alpha(tmp_path: Path) -> None:
    """α/√r is (α √r)/r."""
    pipe, plain = fresh(), fresh()
    ranked, other = LoRA(pipe, 4, 3.0, use_rslora=True), LoRA(plain, 4, 6.0)
    for one in (ranked, other):
        move(one, 0.3)
    torch.testing.assert_close(image(pipe), image(plain), atol=1e-6, rtol=0)
    with ranked.reference():
        assert torch.equal(image(pipe), image(fresh()))
    ranked.write(ranked.state(), tmp_path)
    loaded = fresh()
    loaded.load_lora_weights(tmp_path)
    torch.testing.assert_close(image(loaded), image(pipe), atol=1e-6, rtol=0)


def test_adapter_options_train(tmp_path: Path) -> None:
    result = train(
        "grpo", fresh(), tmp_path, config_of("grpo", **QUICK | {"use_dora": True, "use_rslora": True}), **PLAIN
    )
    assert result.step == 2 and result.records[0]["grad_norm"] > 0


def test_gradient_checkpointing_that_would_do_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="gradient_checkpointing: Linear has none"):
        enable_gradient_checkpointing(nn.Linear(2, 2))
    unet = fresh().unet
    enable_gradient_checkpointing(unet)
    assert any(getattr(part, "gradient_checkpointing", False) for part in unet.modules())


class Waiting:
    """A reward that, for its first images, waits for the next micro-batch to be sampled."""

    name, differentiable = "waiting", False

    def __init__(self) -> None:
        self.sampled, self.threads = threading.Event(), list[str]()

    def __call__(self, images: Tensor, prompts: Any) -> Tensor:
        self.threads.append(threading.current_thread().name)
        if len(self.threads) == 1 and threading.current_thread() is not threading.main_thread():
            assert self.sampled.wait(60), "the next micro-batch was not sampled meanwhile"
        return images.mean((1, 2, 3))


def test_asynchronous_rewards_give_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rollout, weights, records = Sampler.rollout, [], []
    for name, asynchronous in (("one", False), ("two", True)):
        reward, calls = Waiting(), list[int]()

        def counted(*args: Any, reward: Waiting = reward, calls: list[int] = calls, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == 2:
                reward.sampled.set()
            return rollout(*args, **kwargs)

        monkeypatch.setattr(Sampler, "rollout", counted)
        pipe = fresh()
        config = config_of("grpo", **QUICK | {"asynchronous_rewards": asynchronous, "micro_batch": 2})
        result = train("grpo", pipe, tmp_path / name, config, reward=reward, **PLAIN)
        records.append([{k: v for k, v in one.items() if k not in TIMES} for one in result.records])
        weights.append({name: value.clone() for name, value in pipe.unet.state_dict().items()})
        assert all(thread.startswith("steer-background") for thread in reward.threads) == asynchronous
    assert records[0] == records[1]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


class Slow:
    """A reward that waits, in the background, until all micro-batches of the rollout are sampled."""

    name, differentiable = "slow", False

    def __init__(self, sampled: threading.Event, events: list[str]) -> None:
        self.sampled, self.events = sampled, events

    def __call__(self, images: Tensor, prompts: Any) -> Tensor:
        if threading.current_thread() is not threading.main_thread():
            self.sampled.wait(5)
        self.events.append("scored")
        return images.mean((1, 2, 3))


def test_all_updates_of_a_rollout_are_sampled_before_their_rewards_are_awaited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two updates of one rollout, each of one micro-batch: with one reward at a time in turn they alternate."""
    rollout, orders, weights = Sampler.rollout, [], []
    for name, asynchronous in (("one", False), ("two", True)):
        sampled, events = threading.Event(), list[str]()

        def drawn(*args: Any, sampled: threading.Event = sampled, events: list[str] = events, **options: Any) -> Any:
            output = rollout(*args, **options)
            events.append("sampled")
            if events.count("sampled") == 2:
                sampled.set()
            return output

        monkeypatch.setattr(Sampler, "rollout", drawn)
        pipe = fresh()
        options = {"asynchronous_rewards": asynchronous, "micro_batch": 4, "max_steps": 2, "steps_per_generation": 2}
        config = config_of("grpo", **QUICK | options | {"num_iterations": 1})
        train("grpo", pipe, tmp_path / name, config, reward=Slow(sampled, events), eval_prompts=())
        orders.append(events)
        weights.append({name: value.clone() for name, value in pipe.unet.state_dict().items()})
    assert orders == [["sampled", "scored"] * 2, ["sampled"] * 2 + ["scored"] * 2]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_throughput_and_its_shares(tmp_path: Path) -> None:
    assert throughput(8, 4.0, 3.0, 1.0) == {
        "seconds": 4.0,
        "images_per_second": 2.0,
        "rollout_share": 0.5,
        "reward_share": 0.25,
        "update_share": 0.25,
    }
    records = ({"reward": 0.0} | throughput(32, 4.0, 3.0, 1.0), {"reward": 1.0} | throughput(32, 12.0, 0.0, 0.0))
    config = FinetuneConfig(FinetuneJob("grpo", "jpeg", prompts="x"), GRPOConfig(), SimpleNamespace())  # type: ignore[arg-type]
    line = summary(config, TrainingResult(2, None, None, None, records, ()))
    assert line.startswith("grpo: 2 updates in 16 s (4 images/s: rollouts 12%, rewards 6%, updates 81%), jpeg")
    result = train("grpo", fresh(), tmp_path, config_of("grpo", **QUICK), **PLAIN)
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(logged) == len(result.records) == 2
    for record in logged:
        assert sum(record[f"{phase}_share"] for phase in ("rollout", "reward", "update")) == pytest.approx(1)
        assert record["rollout_share"] > 0 and record["update_share"] > 0


@dataclass
class Tracker:
    name: str
    tables: list[dict[str, Any]] = field(default_factory=list)

    def log_table(self, table_name: str, columns: Any, data: Any, step: int) -> None:
        self.tables.append({"name": table_name, "columns": columns, "data": data, "step": step})

    def log_images(self, values: dict[str, Any], step: int, **options: Any) -> None:
        self.tables.append({"values": values, "step": step} | options)


def test_trackers_get_the_samples_of_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = ModuleType("wandb")
    wandb.Image = lambda pixels: ("image", pixels.shape, int(pixels[0, 0, 0]))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    images = torch.stack([torch.full((3, 4, 4), k / 4) for k in range(4)])
    rewards = {"scene": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "jpeg": torch.tensor([[5.0, 6.0], [7.0, 8.0]])}
    trackers = Tracker("wandb"), Tracker("tensorboard"), Tracker("trackio")
    log_samples(trackers, EvalResult(20, ("a star", "a cross"), rewards, 0.1, images))
    table = trackers[0].tables[0]
    assert (table["name"], table["step"]) == ("samples", 20)
    assert table["columns"] == ["step", "prompt", "image", "scene", "jpeg"]
    assert [row[1] for row in table["data"]] == ["a star", "a star", "a cross", "a cross"]
    assert table["data"][2] == [20, "a cross", ("image", (4, 4, 3), 128), 3.0, 7.0]
    shown = trackers[1].tables[0]
    assert shown["values"]["samples"].shape == (4, 4, 4, 3) and shown["dataformats"] == "NHWC"
    assert not trackers[2].tables


def test_columns_of_a_table_of_prompts_are_metadata(tmp_path: Path) -> None:
    rows = [PromptRow("a", {"Tag": "two", "include": [{"class": "dog"}], "id": 3}), PromptRow("b", {"tag": "one"})]
    assert metadata_of(rows, ["tag", "include"]) == [{"tag": "two", "include": [{"class": "dog"}]}, {"tag": "one"}]
    with pytest.raises(InputError, match="no prompt has a column 'tags'; choose the column, there are"):
        metadata_of(rows, ["tags"])
    table = tmp_path / "p.jsonl"
    table.write_text("".join(json.dumps({"prompt": p, "count": n}) + "\n" for p, n in (("a", 1), ("b", 2))))
    changes = {"prompts": str(table), "output_dir": str(tmp_path / "run"), "log_with": "[]"}
    config = read_config(written(tmp_path, LEAST), changes | {"metadata_columns": "[count]"})
    assert load_data(config, False)["metadata"] == [{"count": 1}, {"count": 2}]
    with pytest.raises(InputError, match="--metadata-columns"):
        load_data(read_config(written(tmp_path, LEAST), changes | {"metadata_columns": "[number]"}), False)
