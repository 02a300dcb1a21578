"""The numbers of a finetuning run, whatever the method."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from steer.diffusion.precision import Precision
from steer.errors import InputError
from steer.training.trainable import ATTENTION

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

POSITIVE_FIELDS = (
    "max_steps",
    "train_batch_size",
    "num_generations",
    "steps_per_generation",
    "num_iterations",
    "micro_batch",
    "num_inference_steps",
    "eval_steps",
    "num_generations_eval",
    "save_steps",
    "save_total_limit",
)


@dataclass(frozen=True)
class TrainingConfig:
    """One update learns from `train_batch_size` prompts × `num_generations` samples.

    max_steps            updates in all
    seed                 of everything that is random
    train_batch_size     B
    num_generations   K
    steps_per_generation      updates whose samples are drawn together, by one policy
    num_iterations               how often a round's samples are gone over
    micro_batch          rows in one call of the denoiser; the gradients of an update's micro-batches are added up
    num_inference_steps  solver steps, in training and in evaluation
    guidance_scale       the same in both; by default the pipeline's own
    eta                  η of every step, above 0 and at most 1
    skip_low_noise_steps how many of the last steps with noise, whose τ is lowest, are left out of loss, KL and
                         penalties, by the policy, the old one and the reference alike; None: 2, and at most half of
                         them, where weights or autocast are half precision, else 0
    log_prob_precision   of the denoiser wherever it gives log-probabilities and KL: float32, whatever the weights'
                         dtype and mixed_precision are, or model: that of these (checked before the first update)
    timestep_fraction    share of the steps in that window that an update learns from; the denoiser is called for no
                         others
    latents_dtype              dtype of stored latents, and of what is kept of the reference where a penalty needs it
    call                 further arguments of the pipeline's call
    lora_rank            of the adapter; 0 trains all of the denoiser
    lora_alpha           by default the rank
    lora_target_modules         ends of the names of the layers with an adapter
    init_adapter         a trained LoRA, of this rank, alpha and targets, to start from: a folder such as RUN/final, or
                         its .safetensors file; the reference is then the model with it
    gradient_checkpointing  recompute the denoiser's blocks on the way back
    mixed_precision      no, fp16 or bf16, as accelerate has them; of log-probabilities see log_prob_precision
    learning_rate        of AdamW, reached after `warmup_steps`
    max_grad_norm        longer gradients are shortened to it
    ema_decay            of an average of the weights, which is evaluated and exported in their place; 0: none
    kl_weight            β of the KL to the reference, per nat summed over the elements and steps of a trajectory
    kl_target, kl_budget see `steer.training.guards.KLControl`; nats summed over the elements and steps of a trajectory
    chi_square_weight    of `steer.training.guards.chi_square`, which has no unit, summed over the steps of a trajectory
    eval_steps           updates between evaluations, which are also made before the first and after the last
    num_generations_eval         images of each held-out prompt
    early_stopping_patience             see `steer.training.guards.HoldOutWatch`
    save_steps     updates between checkpoints
    save_total_limit     the newest ones; the best by the held-out reward stays as well
    log_with             names of trackers, as accelerate knows them: tensorboard, wandb, trackio …
    """

    max_steps: int = 100
    seed: int = 0
    train_batch_size: int = 8
    num_generations: int = 4
    steps_per_generation: int = 1
    num_iterations: int = 1
    micro_batch: int = 16
    num_inference_steps: int = 20
    guidance_scale: float | None = None
    eta: float = 1.0
    skip_low_noise_steps: int | None = None
    log_prob_precision: Precision = "float32"
    timestep_fraction: float = 1.0
    latents_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    call: Mapping[str, Any] = field(default_factory=dict)
    lora_rank: int = 16
    lora_alpha: float | None = None
    lora_target_modules: tuple[str, ...] = ATTENTION
    init_adapter: str | None = None
    gradient_checkpointing: bool = False
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    learning_rate: float = 1e-4
    warmup_steps: int = 0
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    ema_decay: float = 0.0
    kl_weight: float = 0.0
    kl_target: float | None = None
    kl_budget: float | None = None
    chi_square_weight: float = 0.0
    eval_steps: int = 20
    num_generations_eval: int = 1
    early_stopping_patience: int = 0
    save_steps: int = 20
    save_total_limit: int = 2
    log_with: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in POSITIVE_FIELDS:
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lora_rank", "warmup_steps", "weight_decay", "patience", "chi_square_weight", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= (self.skip_low_noise_steps or 0) < self.num_inference_steps:
            raise InputError(
                f"skip_low_noise_steps must be from 0 to num_inference_steps - 1, got {self.skip_low_noise_steps}"
            )
        if self.seed >= 2**63:
            raise InputError(f"seed must be below 2^63, got {self.seed}")
        for name in ("learning_rate", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("eta", "timestep_fraction"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"{name} must be above 0 and at most 1, got {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"ema_decay must be at least 0 and below 1, got {self.ema_decay}")
        if self.init_adapter is not None and self.lora_rank == 0:
            raise InputError("init_adapter starts from a LoRA, and lora_rank 0 trains all weights: leave one out")
        if self.guidance_scale is not None and not math.isfinite(self.guidance_scale):
            raise InputError(f"guidance_scale must be a finite number, got {self.guidance_scale}")

    @property
    def needs_divergence(self) -> bool:
        """Whether anything depends on the KL or χ² to the reference, so that this is computed and not estimated."""
        return bool(self.kl_weight or self.kl_budget or self.chi_square_weight)

    @property
    def call_kwargs(self) -> dict[str, Any]:
        """What the pipeline is called with, the same for every row."""
        sampling = {"num_inference_steps": self.num_inference_steps, "guidance_scale": self.guidance_scale}
        return dict(self.call) | {name: value for name, value in sampling.items() if value is not None}
