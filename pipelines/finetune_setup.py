"""What a finetuning run is made of: accelerate, and the weights that are trained."""

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState

from steer.errors import InputError
from steer.pipelines.finetune_settings import FinetuneSettings
from steer.trainable import Full, LoRA, Trainable, denoiser_of


def accelerator_of(settings: FinetuneSettings, folder: Path, cpu: bool) -> Accelerator:
    """Raises InputError for a precision or a tracker that there is not here."""
    if cpu and settings.mixed_precision == "fp16":
        raise InputError("mixed_precision fp16 needs a GPU: on the CPU use bf16 or no")
    AcceleratorState._reset_state()  # an earlier run of this process may have had another precision
    try:
        return Accelerator(
            mixed_precision=settings.mixed_precision,
            log_with=list(settings.log_with) or None,
            project_dir=folder,
            cpu=cpu,
            device_placement=False,  # the pipeline is where its owner put it
        )
    except (ImportError, ValueError) as error:
        raise InputError(f"log_with {', '.join(settings.log_with)}: {str(error).splitlines()[0]}") from error


def trainable_of(pipe: Any, settings: FinetuneSettings) -> Trainable:
    """A LoRA in the denoiser, or all of it; everything else is frozen."""
    if settings.gradient_checkpointing:
        denoiser_of(pipe)[1].enable_gradient_checkpointing()
    if settings.lora_rank == 0:
        return Full(pipe)
    return LoRA(pipe, settings.lora_rank, settings.lora_alpha, settings.lora_targets, settings.seed)
