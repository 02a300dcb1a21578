"""Tiny finetuning runs, the same in every process."""

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
from steer.pipelines.training.evaluation import EvalResult
from steer.pipelines.training.trainer import Trainer

# Of every method and form: its trainer, and the options that differ from the defaults of its configuration.
METHODS: dict[str, tuple[type[Trainer[Any]], dict[str, Any]]] = {
    "d3po": (D3POTrainer, {}),
    "d3po-trajectory": (D3POTrainer, {"trajectory": True}),
    "prdp": (PRDPTrainer, {"beta": 0.0003, "clip": 0.5}),
    "ddpo": (DDPOTrainer, {"history": 4, "min_history": 4}),
    "grpo": (GRPOTrainer, {}),
    "filtered": (FilteredTrainer, {}),
    "reward-backprop": (RewardBackpropTrainer, {"last_steps": 2}),
}
PROMPTS = ("a red circle", "a blue star", "two green squares")
HELD_OUT = ("a yellow cross", "three stars")
# A rollout serves two updates, in two iterations: checkpoints after every third update fall inside a rollout.
BASE = TrainingConfig(
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
    kl_target_nats=0.5,
    kl_every=1,
    eval_steps=3,
    save_steps=3,
)
PLAIN = {"steps_per_generation": 1, "num_iterations": 1}  # what reward backpropagation asks for


def config_of(method: str, **changed: Any) -> Any:
    """The configuration of a method's tiny run."""
    trainer, options = METHODS[method]
    return trainer.config_class(**vars(BASE) | options | (PLAIN if method == "reward-backprop" else {}) | changed)


class Recorder:
    """A callback that keeps the metrics of updates and the evaluations."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []
        self.evaluations: list[EvalResult] = []

    def on_log(self, args: Any, state: Any, control: Any, **details: Any) -> None:
        self.logs.append(details["logs"])

    def on_evaluate(self, args: Any, state: Any, control: Any, **details: Any) -> None:
        self.evaluations.append(details["evaluation"])


def trainer_of(method: str, pipe: Any, folder: str | Path, config: TrainingConfig | None = None, **options: Any) -> Any:
    """A trainer of the method by brightness, with held-out prompts."""
    given = {"train_prompts": PROMPTS, "eval_prompts": HELD_OUT, "eval_rewards": ["colour:red"]} | options
    reward = given.pop("reward", "brightness")
    return METHODS[method][0](pipe, reward, replace(config or config_of(method), output_dir=str(folder)), **given)


def train(
    method: str,
    pipe: Any,
    folder: str | Path,
    config: TrainingConfig | None = None,
    resume: bool = True,
    **options: Any,
) -> TrainingResult:
    return trainer_of(method, pipe, folder, config, **options).train(resume_from_checkpoint=resume)
