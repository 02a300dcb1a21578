"""Trackers of a training: scalars, and the samples of evaluations as a table of Weights & Biases."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator

from steer.audio import is_audio
from steer.pipelines.training.config import TrainingConfig
from steer.pipelines.training.evaluation import EvalResult
from steer.pipelines.training.method import Record
from steer.reward import Texts

MAX_TABLE_ROWS = 64  # images of one evaluation given to trackers


@contextmanager
def trackers(accelerator: Accelerator, config: TrainingConfig) -> Iterator[None]:
    """Start the trackers of `log_with`, and finish them after the block."""
    if config.log_with:
        accelerator.init_trackers("steer")
    try:
        yield
    finally:
        for tracker in accelerator.trackers:  # end_training would end the process group as well
            tracker.finish()


def scalars(record: Record) -> dict[str, float]:
    """Return the values that trackers plot; for [mean, low, high], the mean; none by prompt."""
    plotted = {name: value for name, value in record.items() if not isinstance(value, dict)}
    return {name: value[0] if isinstance(value, list) else value for name, value in plotted.items()}


def log_samples(trackers: Sequence[Any], evaluated: EvalResult) -> None:
    """Give the images of an evaluation to the trackers that take images.

    wandb        a table `samples`: step, prompt, image and the value of every reward
    tensorboard  images `samples`: at most 64, evenly spaced
    """
    images = evaluated.images
    if isinstance(images, Texts) or is_audio(images) or images.ndim != 4:  # these stay in the folder of the run
        return
    count = min(len(images), MAX_TABLE_ROWS)
    chosen = [place * len(images) // count for place in range(count)]
    pixels = (images[chosen].clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    for tracker in trackers:
        if tracker.name == "wandb":
            columns, rows = sample_table(evaluated, chosen, pixels)
            tracker.log_table("samples", columns=columns, data=rows, step=evaluated.step)
        elif tracker.name == "tensorboard":
            tracker.log_images({"samples": pixels}, step=evaluated.step, dataformats="NHWC")


def sample_table(evaluated: EvalResult, chosen: Sequence[int], pixels: Any) -> tuple[list[str], list[list[Any]]]:
    """Return columns and rows of a wandb table of the chosen images, with their pixels (N, H, W, 3) in 8 bits."""
    from wandb import Image

    samples = len(evaluated.images) // len(evaluated.prompts)
    rewards = {name: values.flatten().tolist() for name, values in evaluated.rewards.items()}
    rows = [
        [evaluated.step, evaluated.prompts[k // samples], Image(one), *(values[k] for values in rewards.values())]
        for k, one in zip(chosen, pixels, strict=True)
    ]
    return ["step", "prompt", "image", *rewards], rows
