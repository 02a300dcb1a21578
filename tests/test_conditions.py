"""Finetuning with images as conditions: each prompt has its own source, which reaches the pipeline and the reward."""

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
import yaml
from conftest import cached_pipe
from diffusers import StableDiffusionImg2ImgPipeline
from finetune_runs import METHODS
from torch import Tensor

from steer import TrainingConfig, TrainingResult
from steer.apps.finetuning import finetune, load_data, read_config
from steer.errors import InputError
from steer.training.rollout import Rows, Sampler, log_probs

RED, BLUE = (PIL.Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
SOURCES: dict[str, Mapping[str, Any]] = {"a": {"image": RED}, "b": {"image": BLUE}}


def img2img() -> Any:
    parts = deepcopy(cached_pipe("sd").components)  # which other tests share
    pipe = StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_every_row_starts_from_the_image_of_its_prompt() -> None:
    """The samples of a mixed batch are those of batches of one prompt, and a replay gives their log-densities."""
    call = {"strength": 0.5, "num_inference_steps": 6, "guidance_scale": 2.0}
    sampler = Sampler(img2img(), call, conditions=SOURCES)
    rows = Rows(("a", "b", "a"), (1, 2, 3), (4, 5, 6))
    mixed, images = sampler.rollout(rows)
    torch.testing.assert_close(log_probs(sampler, mixed), mixed.log_probs, rtol=1e-5, atol=1e-3)
    for text, places in (("a", [0, 2]), ("b", [1])):
        own = Sampler(img2img(), call | dict(SOURCES[text]))
        alone, of_prompt = own.rollout(rows.at(places))
        torch.testing.assert_close(mixed.latents[places], alone.latents, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(images[places], of_prompt, rtol=1e-4, atol=1e-4)


def train(folder: Path, reward: Any, **options: Any) -> TrainingResult:
    config = TrainingConfig(
        max_steps=2,
        train_batch_size=2,
        num_generations=2,
        micro_batch=4,
        num_inference_steps=6,
        lora_rank=2,
        learning_rate=0.01,
        eval_steps=2,
        call={"strength": 0.5},
    )
    return METHODS["grpo"][0](img2img(), reward, replace(config, output_dir=str(folder)), **options).train()


@pytest.mark.hard
def test_source_image_and_metadata_reach_the_reward(tmp_path: Path) -> None:
    received: set[tuple[str, tuple[int, ...], int]] = set()

    def likeness(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        for prompt, row in zip(prompts, metadata, strict=True):
            received.add((prompt, row["image"].getpixel((0, 0)), row["number"]))
        return images.mean((1, 2, 3))

    result = train(
        tmp_path,
        likeness,
        train_prompts=["a", "b"],
        conditions=[SOURCES["a"], SOURCES["b"]],
        metadata=[{"number": 1}, {"number": 2}],
        eval_prompts=["c"],
        eval_conditions=[{"image": RED}],
        eval_metadata=[{"number": 3}],
    )
    assert received == {("a", (255, 0, 0), 1), ("b", (0, 0, 255), 2), ("c", (255, 0, 0), 3)}
    assert all(record["grad_norm"] > 0 for record in result.records) and result.records[0]["kl"] == 0


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ([{"image": RED}], "conditions must be one mapping for each prompt, got 1 of them and 2 prompts"),
        ([{"image": RED}, {"image": BLUE}], "conditions: prompt 'a' has two different rows"),
        ([{"mask": RED}] * 2, "conditions: StableDiffusionImg2ImgPipeline takes no 'mask' for each prompt"),
        ([{"generator": 1}] * 2, "conditions: StableDiffusionImg2ImgPipeline takes no 'generator' for each prompt"),
    ],
)
def test_conditions_that_do_not_fit_are_refused(conditions: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        train(tmp_path, "brightness", train_prompts=["a", "a"], conditions=conditions)


@pytest.mark.hard
def test_a_table_gives_the_image_of_each_prompt_to_the_command(tmp_path: Path) -> None:
    """Paths start at the folder of the table, numbers stay numbers, and a training of the command runs with them."""
    for name, source in (("red", RED), ("blue", BLUE)):
        source.resize((64, 64)).save(tmp_path / f"{name}.png")
    rows = [{"prompt": "a", "image": "red.png", "strength": 0.5}, {"prompt": "b", "image": "blue.png", "strength": 0.5}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    img2img().save_pretrained(tmp_path / "model")
    keys = {"method": "grpo", "model": str(tmp_path / "model"), "reward": "brightness", "device": "cpu"}
    keys |= {"prompts": str(tmp_path / "rows.jsonl"), "output_dir": str(tmp_path / "run"), "log_with": []}
    keys |= {"max_steps": 1, "train_batch_size": 2, "num_generations": 2, "num_inference_steps": 6, "lora_rank": 2}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(keys | {"condition_columns": ["image", "strength"]}))
    config = read_config(str(tmp_path / "run.yaml"))
    first, second = load_data(config, False)["conditions"]
    assert first["image"].getpixel((0, 0)) == (255, 0, 0) and second["image"].getpixel((0, 0)) == (0, 0, 255)
    assert first["strength"] == 0.5
    assert finetune(config).records[0]["grad_norm"] > 0
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "image": "red.png"}\n{"prompt": "b"}\n')
    with pytest.raises(InputError, match="condition-columns: prompt 'b' has no 'image': every prompt needs one"):
        load_data(read_config(str(tmp_path / "run.yaml"), {"condition_columns": "[image]", "output_dir": "x"}), False)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "image": "none.png"}\n')
    with pytest.raises(InputError, match=r"condition-columns: .*none.png"):
        load_data(read_config(str(tmp_path / "run.yaml"), {"condition_columns": "[image]", "output_dir": "x"}), False)
