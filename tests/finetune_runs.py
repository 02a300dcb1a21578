"""Tiny finetuning runs, the same in every process."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from steer import (
    D3POTrainer,
    DDPOTrainer,
    FilteredTrainer,
    GRPOTrainer,
    PRDPTrainer,
    RewardBackpropTrainer,
    TrainingConfig,
    TrainingResult,
)

METHODS: dict[str, Callable[[Any], Any]] = {
    "d3po": lambda pipe: D3POTrainer(pipe, "brightness"),
    "d3po-trajectory": lambda pipe: D3POTrainer(pipe, "brightness", trajectory=True),
    "prdp": lambda pipe: PRDPTrainer(pipe, "brightness", beta=0.0003, clip=0.5),
    "ddpo": lambda pipe: DDPOTrainer(pipe, "brightness", history=4, enough=4),
    "grpo": lambda pipe: GRPOTrainer(pipe, "brightness"),
    "filtered": lambda pipe: FilteredTrainer(pipe, "brightness"),
    "reward-backprop": lambda pipe: RewardBackpropTrainer(pipe, "brightness", last_steps=2),
}
PROMPTS = ("a red circle", "a blue star", "two green squares")
HELD_OUT = ("a yellow cross", "three stars")
# Rounds of two updates gone over twice: checkpoints after every third update fall amid them.
SETTINGS = TrainingConfig(
    max_steps=7,
    seed=5,
    train_batch_size=2,
    num_generations=2,
    steps_per_generation=2,
    num_iterations=2,
    micro_batch=2,
    num_inference_steps=3,
    guidance_scale=3.0,
    call={"height": 8, "width": 8},
    lora_rank=2,
    learning_rate=0.01,
    warmup_steps=3,
    ema_decay=0.9,
    kl_weight=0.1,
    kl_target=0.5,
    eval_steps=3,
    save_steps=3,
)
PLAIN = {"steps_per_generation": 1, "num_iterations": 1}  # what reward backpropagation asks for


def settings_of(method: str, **changed: Any) -> TrainingConfig:
    return replace(SETTINGS, **(PLAIN if method == "reward-backprop" else {}) | changed)


def train(
    method: str, pipe: Any, folder: str | Path, settings: TrainingConfig | None = None, **options: Any
) -> TrainingResult:
    given = {"eval_prompts": HELD_OUT, "eval_rewards": ["colour:red"], "resume": True} | options
    return METHODS[method](pipe).train(PROMPTS, folder, settings or settings_of(method), **given)
