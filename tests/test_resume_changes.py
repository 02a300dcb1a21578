"""Runs that are resumed with other settings, and runs that start from a trained adapter."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_runs import config_of, train
from safetensors.torch import load_file, save_file
from test_finetune_run import SHORT, fresh
from test_trainable import image

from steer.errors import InputError
from steer.training.trainable import LoRA

WARM = SHORT | {"warmup_steps": 0, "max_steps": 2, "save_steps": 1}


def test_a_run_is_resumed_with_another_learning_rate(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train("grpo", fresh(), tmp_path, config_of("grpo", **WARM))
    changed = WARM | {"learning_rate": 0.002, "weight_decay": 0.0, "max_steps": 4, "eval_steps": 2}
    with caplog.at_level(logging.WARNING):
        result = train("grpo", fresh(), tmp_path, config_of("grpo", **changed))
    assert [record["learning_rate"] for record in result.records] == [0.01, 0.01, 0.002, 0.002]
    for line in (
        "resumed with another learning_rate: 0.002, before it was 0.01",
        "resumed with another max_steps: 4, before it was 2",
        "resumed with another eval_steps: 2, before it was 1",
    ):
        assert caplog.messages.count(line) == 1
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        train("grpo", fresh(), tmp_path, config_of("grpo", **changed))
    assert "resumed with another" not in caplog.text
    with pytest.raises(InputError, match=r"another lora_rank \(2 there, 3 here\)"):
        train("grpo", fresh(), tmp_path, config_of("grpo", **changed | {"lora_rank": 3}))


def trained(folder: Path, alpha: float | None = None) -> Any:
    """A pipeline with a trained LoRA, which is in a folder too."""
    pipe = fresh()
    lora = LoRA(pipe, 2, alpha)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for parameter in lora.parameters.values():
            parameter.data.normal_(std=0.3)
    lora.write(lora.state(), folder)
    return pipe


def test_a_lora_starts_from_a_trained_one_and_has_it_as_its_reference(tmp_path: Path) -> None:
    there = image(trained(tmp_path, 5.0))
    pipe = fresh()
    lora = LoRA(pipe, 2, 5.0)
    assert not torch.equal(image(pipe), there)
    lora.load_initial_adapter(str(tmp_path))
    assert torch.equal(image(pipe), there)
    for parameter in lora.parameters.values():
        parameter.data += 0.1
    moved = image(pipe)
    assert not torch.equal(moved, there)
    with lora.reference():
        assert torch.equal(image(pipe), there)
    assert torch.equal(image(pipe), moved)


@pytest.mark.hard
def test_the_first_rollout_is_the_adapters_model(tmp_path: Path) -> None:
    """The rewards of the first update are those of diffusers' pipeline with the adapter loaded; KL begins at 0."""
    trained(tmp_path / "lora")
    config = config_of("grpo", **WARM | {"kl_weight": 0.1, "init_adapter": str(tmp_path / "lora")})
    first = train("grpo", fresh(), tmp_path / "run", config)
    loaded = fresh()
    loaded.load_lora_weights(tmp_path / "lora", adapter_name="own")
    other = train("grpo", loaded, tmp_path / "other", config_of("grpo", **WARM | {"kl_weight": 0.1}))
    bare = train("grpo", fresh(), tmp_path / "bare", config_of("grpo", **WARM | {"kl_weight": 0.1}))
    assert first.records[0]["reward"] == pytest.approx(other.records[0]["reward"], abs=1e-6)
    assert first.records[0]["reward"] != pytest.approx(bare.records[0]["reward"], abs=1e-4)
    assert first.records[0]["kl"] == pytest.approx(0, abs=1e-6) and first.records[1]["kl"] > 0
    with pytest.raises(InputError, match="belongs to a run with another init_adapter"):
        train("grpo", fresh(), tmp_path / "run", config_of("grpo", **WARM | {"kl_weight": 0.1}))
    longer = config_of("grpo", **WARM | {"kl_weight": 0.1, "init_adapter": config.init_adapter, "max_steps": 3})
    assert train("grpo", fresh(), tmp_path / "run", longer).step == 3


@pytest.mark.hard
def test_an_adapter_that_does_not_fit_is_one_line(tmp_path: Path) -> None:
    trained(tmp_path, 5.0)
    for options, message in (
        ({"rank": 3, "alpha": 5.0}, "is of rank 2: give lora_rank: 2"),
        ({"rank": 2}, "its alpha is 5: give lora_alpha: 5"),
        ({"rank": 2, "alpha": 5.0, "targets": ["to_q"]}, "give its lora_target_modules"),
    ):
        with pytest.raises(InputError, match=message):
            LoRA(fresh(), **options).load_initial_adapter(str(tmp_path))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no LoRA file"):
        LoRA(fresh(), 2).load_initial_adapter(str(tmp_path / "nowhere"))
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(load_file(file) | {"unet.conv_out.weight": torch.ones(1)}, file)
    with pytest.raises(InputError, match=r"conv_out\.weight is not in both"):
        LoRA(fresh(), 2).load_initial_adapter(str(tmp_path))
