"""The configuration of a training: the arguments that all methods share, each written once.

Python (`TrainingConfig`, `GRPOConfig` …), the YAML files and options of `steer finetune`, the model card and the app
derive from these dataclasses. Names are those of TRL, transformers and accelerate where they mean the same.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from steer.diffusion.precision import Precision
from steer.errors import InputError
from steer.training.guards import KLControl
from steer.training.losses import Loss
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
NON_NEGATIVE_FIELDS = (
    "lora_rank",
    "warmup_steps",
    "weight_decay",
    "early_stopping_patience",
    "chi_square_weight",
    "seed",
)


@dataclass(frozen=True)
class TrainingConfig:
    """Arguments that all methods share. One update learns from `train_batch_size` prompts × `num_generations` samples.

    output_dir           folder of metrics.jsonl, evaluations.jsonl, checkpoints/, best/ and final/
    max_steps            number of updates
    seed                 of every random number of the run
    train_batch_size     B, prompts per update, over all processes
    num_generations      K, samples per prompt
    steps_per_generation updates per rollout: their samples are drawn together, by one policy
    num_iterations       passes over the samples of a rollout
    micro_batch          rows per call of the denoiser; the gradients of an update's micro-batches are accumulated
    num_inference_steps  solver steps, in training and evaluation
    guidance_scale       in training and evaluation; None: the default of the pipeline
    eta                  η of every step, above 0 and at most 1
    skip_low_noise_steps the last stochastic steps (lowest τ) that loss, KL and penalties leave out, for new, old and
                         reference policy alike; None: 2, and at most half of the steps, where weights or autocast are
                         half precision, else 0
    log_prob_precision   of the denoiser where it computes log-probabilities and KL: float32, whatever the dtype of the
                         weights and mixed_precision; or model, theirs (checked before the first update)
    timestep_fraction    share of the remaining steps that an update learns from; the others cost no denoiser call
    latents_dtype        of stored latents, and of the reference residuals where a penalty needs them
    call                 further arguments of the pipeline's call
    lora_rank            of the adapter; 0 trains all weights of the denoiser
    lora_alpha           None: the rank
    lora_target_modules  suffixes of the names of the layers that get an adapter
    init_adapter         trained LoRA of the same rank, alpha and targets to start from: a folder such as RUN/final or
                         its .safetensors file; the reference is then the model with this LoRA
    gradient_checkpointing  recompute the blocks of the denoiser in the backward pass
    mixed_precision      no, fp16 or bf16, as in accelerate; for log-probabilities see log_prob_precision
    learning_rate        of AdamW, after `warmup_steps` of linear warmup
    max_grad_norm        gradients are clipped to this norm
    ema_decay            decay of an exponential moving average of the weights, evaluated and exported in their place;
                         0: none
    kl_weight            β of the KL to the reference, per nat summed over the elements and steps of a trajectory
    kl_target_nats, kl_budget_nats  see `steer.training.guards.KLControl`; nats summed over the elements and steps of a
                         trajectory
    chi_square_weight    of `steer.training.guards.chi_square`, which has no unit, summed over the steps of a trajectory
    eval_steps           updates between evaluations; one more comes before the first update and after the last
    num_generations_eval images per held-out prompt
    early_stopping_patience  evaluations in a row with a higher trained and a lower held-out reward that end the
                         training, see `steer.training.guards.EarlyStopping`; 0: never
    save_steps           updates between checkpoints
    save_total_limit     newest checkpoints to keep; the best by the held-out reward stays as well
    log_with             trackers, as in accelerate: tensorboard, wandb, trackio …
    """

    title: ClassVar[str] = "Finetuning"  # of the method
    paper: ClassVar[tuple[str, str]] = ("", "")  # its title and arXiv number

    output_dir: str = "trainer_output"
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
    kl_target_nats: float | None = None
    kl_budget_nats: float | None = None
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
        for name in NON_NEGATIVE_FIELDS:
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
        self.kl_control()

    def kl_control(self) -> KLControl:
        """The control of the KL weight before the first update. Raises InputError for weights that it cannot move."""
        return KLControl(self.kl_weight, self.kl_target_nats, self.kl_budget_nats)

    @property
    def needs_divergence(self) -> bool:
        """Whether anything depends on the KL or χ² to the reference, so that this is computed and not estimated."""
        return bool(self.kl_weight or self.kl_budget_nats or self.chi_square_weight)

    @property
    def call_kwargs(self) -> dict[str, Any]:
        """The arguments of the pipeline's call, the same for every row."""
        sampling = {"num_inference_steps": self.num_inference_steps, "guidance_scale": self.guidance_scale}
        return dict(self.call) | {name: value for name, value in sampling.items() if value is not None}


@dataclass(frozen=True)
class LossConfig(TrainingConfig):
    """TrainingConfig of a method that minimises a loss of log-probabilities and rewards.

    Raises InputError for arguments that the loss can do nothing with.
    """

    min_generations: ClassVar[int] = 2

    @abstractmethod
    def loss(self) -> Loss:
        """The loss with the options of this configuration."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss().whole_trajectory and self.timestep_fraction < 1:
            raise InputError(
                f"timestep_fraction must be 1, got {self.timestep_fraction}: the loss of {self.title} ties all steps "
                "of a trajectory together"
            )
        if self.num_generations < self.min_generations:
            raise InputError(
                f"num_generations must be at least {self.min_generations}, got {self.num_generations}: {self.title} "
                "compares the samples of a prompt"
            )
