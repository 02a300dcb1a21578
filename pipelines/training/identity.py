"""The identity of a training: the plain values that must be equal when its checkpoints are resumed."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from steer.diffusion.views import plain_values
from steer.errors import InputError
from steer.pipelines.training.evaluation import Evaluator
from steer.pipelines.training.method import TrainingMethod
from steer.pipelines.training.rollouts import RolloutSource
from steer.training.checkpoint import Checkpoint
from steer.training.trainable import fingerprint

# Fields that may differ when a run is resumed; differences are logged.
RESUMABLE_FIELDS = {
    *("learning_rate", "weight_decay", "max_grad_norm", "max_steps", "micro_batch", "gradient_checkpointing"),
    *("eval_steps", "early_stopping_patience", "ask", "ask_cost", "save_steps", "save_total_limit", "kl_budget_nats"),
    *("kl_every", "log_with", "asynchronous_rewards", "rollout_workers", "reward_workers"),
    *("lr_scheduler_type", "lr_num_cycles", "lr_power"),
}


def identity_of(
    trainer: TrainingMethod[Any], source: RolloutSource, evaluator: Evaluator
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the plain values that must be equal when a run is resumed, and the values that may differ."""
    pipe, conditions = trainer.pipe, trainer.conditions_by_prompt
    values = {name: plain_values(value) for name, value in asdict(trainer.config).items() if name != "output_dir"}
    identity = {
        "method": type(trainer).__name__,
        "reward": trainer.reward.name,
        **source.config_dict(),
        "eval_prompts": list(evaluator.prompts),
        "eval_rewards": [reward.name for reward in evaluator.held_out],
        **({"conditions": plain_values(conditions)} if conditions else {}),
        # The model's name without its folder: a run resumes after its folder, or the checkout, was moved.
        "model": f"{type(pipe).__name__} {Path(getattr(pipe.config, '_name_or_path', '')).name}".strip(),
        "weights": fingerprint(pipe),
        "scheduler": pipe.scheduler.to_json_string(),
        **{name: value for name, value in values.items() if name not in RESUMABLE_FIELDS},
    }
    return identity, {name: value for name, value in values.items() if name in RESUMABLE_FIELDS}


def check_identity(identity: Mapping[str, Any], saved: Checkpoint) -> None:
    """Raise InputError for a checkpoint of another run."""
    there = saved.json("identity")
    for name, value in identity.items():
        if there.get(name) != value:
            difference = "" if len(str(value)) > 60 else f" ({there.get(name)!r} there, {value!r} here)"
            raise InputError(
                f"{saved.path} belongs to a run with another {name}{difference}: choose another output_dir"
            )
