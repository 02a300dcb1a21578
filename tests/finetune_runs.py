"""Tiny finetuning runs, the same in every process."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from steer.pipelines import (
    D3POPipeline,
    DDPOPipeline,
    FilteredPipeline,
    FinetuneResult,
    FinetuneSettings,
    GRPOPipeline,
    PRDPPipeline,
    RewardBackpropPipeline,
)

METHODS: dict[str, Callable[[Any], Any]] = {
    "d3po": lambda pipe: D3POPipeline(pipe, "brightness"),
    "d3po-trajectory": lambda pipe: D3POPipeline(pipe, "brightness", trajectory=True),
    "prdp": lambda pipe: PRDPPipeline(pipe, "brightness", beta=0.0003, clip=0.5),
    "ddpo": lambda pipe: DDPOPipeline(pipe, "brightness", history=4, enough=4),
    "grpo": lambda pipe: GRPOPipeline(pipe, "brightness"),
    "filtered": lambda pipe: FilteredPipeline(pipe, "brightness"),
    "reward-backprop": lambda pipe: RewardBackpropPipeline(pipe, "brightness", last_steps=2),
}
PROMPTS = ("a red circle", "a blue star", "two green squares")
HELD_OUT = ("a yellow cross", "three stars")
# Rounds of two updates gone over twice: checkpoints after every third update fall amid them.
SETTINGS = FinetuneSettings(
    max_steps=7,
    seed=5,
    prompts_per_step=2,
    samples_per_prompt=2,
    steps_per_round=2,
    passes=2,
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
    eval_every=3,
    checkpoint_every=3,
)
PLAIN = {"steps_per_round": 1, "passes": 1}  # what reward backpropagation asks for


def settings_of(method: str, **changed: Any) -> FinetuneSettings:
    return replace(SETTINGS, **(PLAIN if method == "reward-backprop" else {}) | changed)


def train(
    method: str, pipe: Any, folder: str | Path, settings: FinetuneSettings | None = None, **options: Any
) -> FinetuneResult:
    given = {"eval_prompts": HELD_OUT, "eval_rewards": ["colour:red"], "resume": True} | options
    return METHODS[method](pipe).train(PROMPTS, folder, settings or settings_of(method), **given)
