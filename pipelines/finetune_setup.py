"""What a finetuning run is made of: accelerate, and the weights that are trained."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState

from steer.errors import InputError
from steer.pipelines.finetune_method import FinetuningMethod
from steer.pipelines.finetune_settings import FinetuneSettings
from steer.pipelines.held_out import Exam
from steer.pipelines.rounds import Source
from steer.quiet import plain_values
from steer.trainable import Full, LoRA, Trainable, denoiser_of, fingerprint

# What may differ when a run is resumed: logged where it does.
FREE = {
    "learning_rate",
    "weight_decay",
    "max_grad_norm",
    "max_steps",
    "micro_batch",
    "gradient_checkpointing",
    "eval_every",
    "patience",
    "checkpoint_every",
    "keep_checkpoints",
    "kl_budget",
    "log_with",
}


def accelerator_of(settings: FinetuneSettings, folder: Path, cpu: bool) -> Accelerator:
    """Raises InputError for a precision or a tracker that there is not here."""
    if cpu and settings.mixed_precision == "fp16":
        raise InputError("mixed_precision fp16 needs a GPU: on the CPU use bf16 or no")
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != settings.mixed_precision:
        AcceleratorState._reset_state()  # an earlier run of this process had another precision
    try:
        accelerator = Accelerator(
            mixed_precision=settings.mixed_precision,
            log_with=list(settings.log_with) or None,
            project_dir=folder,
            cpu=cpu,
            device_placement=False,  # the pipeline is where its owner put it
        )
    except (ImportError, ValueError) as error:
        raise InputError(f"log_with {', '.join(settings.log_with)}: {str(error).splitlines()[0]}") from error
    return accelerator


def trainable_of(pipe: Any, settings: FinetuneSettings) -> Trainable:
    """A LoRA in the denoiser, or all of it; everything else is frozen."""
    if settings.gradient_checkpointing:
        denoiser_of(pipe)[1].enable_gradient_checkpointing()
    if settings.lora_rank == 0:
        return Full(pipe)
    lora = LoRA(pipe, settings.lora_rank, settings.lora_alpha, settings.lora_targets, settings.seed)
    if settings.init_adapter is not None:
        lora.start_from(settings.init_adapter)
    return lora


def changeable_of(settings: FinetuneSettings) -> dict[str, Any]:
    """Settings that may differ when the run is resumed, as plain values."""
    return {name: plain_values(value) for name, value in asdict(settings).items() if name in FREE}


def identity_of(method: FinetuningMethod, source: Source, exam: Exam, settings: FinetuneSettings) -> dict[str, Any]:
    """What makes a run this run, as plain values."""
    pipe = method.pipe
    told = {name: value for name, value in asdict(settings).items() if name not in FREE}
    return {
        **method.about(),
        **source.about(),
        **exam.about(),
        # By its own name, wherever it lies: a run goes on after its folder, or the checkout, was moved.
        "model": f"{type(pipe).__name__} {Path(getattr(pipe.config, '_name_or_path', '')).name}".strip(),
        "weights": fingerprint(pipe),
        "scheduler": pipe.scheduler.to_json_string(),
        **{name: plain_values(value) for name, value in told.items()},
    }
