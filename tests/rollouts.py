"""Tiny pipelines of one's own, a LoRA in them that has moved, and trajectories of both."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from conftest import PIPELINES, PROMPT, call_kwargs
from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from torch import Generator, nn

from steer.training.rollout import Rows, Trajectories
from steer.training.trainable import LoRA, Trainable

# Deviation of a moved LoRA's weights, such that some steps are tenths of a nat away from the reference.
MOVED = {
    "sd": 0.05,
    "img2img": 0.04,
    "controlnet": 0.05,
    "sdxl": 0.1,
    "sd3": 0.03,
    "flux": 0.3,
    "pixart": 0.1,
    "wan": 0.02,
}
TWO_PROMPTS = Rows((PROMPT, PROMPT, "a star", "a star"), (1, 1, 2, 2), (3, 4, 5, 6))
COUNTS = ("prompt", "num_images_per_prompt", "num_videos_per_prompt")


def fresh_pipe(name: str) -> DiffusionPipeline:
    """Another one each time, with the same weights: one that may be changed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = PIPELINES[name]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_of(name: str, steps: int = 4) -> dict[str, Any]:
    """Keyword arguments of a Sampler: those of a call without prompts and number of images."""
    return {key: value for key, value in call_kwargs(name, 1, steps).items() if key not in COUNTS}


def move(trained: Trainable, std: float, seed: int = 0) -> None:
    """Replace LoRA weights by Gaussian noise, or add noise to full weights."""
    generator = Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trained.parameters.values():
            noise = std * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise if isinstance(trained, LoRA) else parameter + noise)


def cut(stored: Trajectories, sizes: Sequence[int]) -> list[Trajectories]:
    """Chunks of so many rows each."""
    parts, first = [], 0
    for size in sizes:
        part, first = slice(first, first + size), first + size
        rows = Rows(stored.rows.prompts[part], stored.rows.starts[part], stored.rows.noises[part])
        parts.append(replace(stored, rows=rows, latents=stored.latents[part], log_probs=stored.log_probs[part]))
    return parts


@contextmanager
def counted(module: nn.Module) -> Iterator[list[int]]:
    """A list that gets the number of rows of every call of the module."""
    calls: list[int] = []
    handle = module.register_forward_hook(lambda _, args, kwargs, out: calls.append(len(out[0])), with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def random_lora(pipe: Any, folder: Path, spread: float) -> Path:
    """Add a LoRA to a pipeline whose factors B have this standard deviation, and save it in diffusers' format."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"]), "mine")
        for name, parameter in pipe.unet.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=spread)
    state, metadata = get_peft_model_state_dict(pipe.unet, adapter_name="mine"), pipe.unet.peft_config["mine"].to_dict()
    pipe.save_lora_weights(folder, unet_lora_layers=state, unet_lora_adapter_metadata=metadata)
    return folder
