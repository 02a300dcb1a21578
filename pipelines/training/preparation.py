"""Preparation of a model for training: the accelerator, the adapter, gradient checkpointing."""

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState

from steer.errors import InputError
from steer.pipelines.training.config import TrainingConfig
from steer.training.trainable import ContextToken, FullFinetuning, LoRA, Trainable, get_denoisers


def accelerator_of(config: TrainingConfig, folder: Path, cpu: bool) -> Accelerator:
    """Create the accelerator. Raises InputError for a precision or a tracker that is not available."""
    if cpu and config.mixed_precision == "fp16":
        raise InputError("mixed_precision fp16 needs a GPU: on the CPU use bf16 or no")
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != config.mixed_precision:
        AcceleratorState._reset_state()  # an earlier run of this process had another precision
    try:
        return Accelerator(
            mixed_precision=config.mixed_precision,
            log_with=list(config.log_with) or None,
            project_dir=folder,
            cpu=cpu,
            device_placement=False,  # the pipeline stays on its device
        )
    except (ImportError, ValueError) as error:
        raise InputError(f"log_with {', '.join(config.log_with)}: {str(error).splitlines()[0]}") from error


def trainable_of(pipe: Any, config: TrainingConfig) -> Trainable:
    """Return a LoRA in the denoiser, all of its weights, or a token as trainable parameters; all else is frozen."""
    if config.gradient_checkpointing:
        for denoiser in get_denoisers(pipe, config.denoiser).values():
            enable_gradient_checkpointing(denoiser)
    if config.prompt_prefix:
        return ContextToken(pipe)
    if config.lora_rank == 0:
        return FullFinetuning(pipe)
    lora = LoRA(
        pipe,
        config.lora_rank,
        config.lora_alpha,
        config.lora_target_modules,
        config.seed,
        use_dora=config.use_dora,
        use_rslora=config.use_rslora,
        denoiser=config.denoiser,
    )
    if config.init_adapter is not None:
        lora.load_initial_adapter(config.init_adapter)
    return lora


def enable_gradient_checkpointing(denoiser: Any) -> None:
    """Turn on gradient checkpointing. Raises InputError where the denoiser does not support it, or no block does."""
    if getattr(denoiser, "_supports_gradient_checkpointing", False):
        denoiser.enable_gradient_checkpointing()
    if not any(getattr(part, "gradient_checkpointing", False) for part in denoiser.modules()):
        raise InputError(f"gradient_checkpointing: {type(denoiser).__name__} has none: leave it out")
