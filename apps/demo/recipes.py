"""The same run outside the app: as Python, and as a command."""

import shlex
from typing import Any

from steer.apps.sample_settings import SampleSettings

CLASSES = {
    "fk": "FKSteeringPipeline",
    "best-of-n": "BestOfNPipeline",
    "base": "BestOfNPipeline",
    "reno": "ReNOPipeline",
}
# Of the command.
OPTIONS = ("model", "lora", "method", "reward", "particles", "steps", "guidance", "lam", "iterations", "seed")
PYTHON = """import torch
from steer.apps.models import load_pipeline
from steer.pipelines import {name}

pipe = load_pipeline({model!r}{dtype})
{worn}out = {name}(pipe, reward={reward!r})(
    {prompt!r},
{arguments}
    generator=torch.Generator().manual_seed({seed}),
){ordered}
out.images[0].save("best.png")
print(out.rewards)
"""


def as_python(prompt: str, settings: SampleSettings) -> str:
    """A program that makes the same images."""
    arguments: dict[str, Any] = {
        "num_particles": settings.particles,
        "num_inference_steps": settings.steps,
        "guidance_scale": settings.guidance,
    }
    if settings.method == "fk":
        arguments["lam"] = settings.lam
    if settings.method == "reno":
        arguments["iterations"] = settings.iterations
    return PYTHON.format(
        name=CLASSES[settings.method],
        model=settings.model,
        dtype=f", dtype={settings.dtype!r}" if settings.dtype else "",
        worn=f"pipe.load_lora_weights({settings.lora!r})  # unpacked\n" if settings.lora else "",
        reward=settings.reward,
        prompt=prompt,
        arguments="\n".join(f"    {name}={value!r}," for name, value in arguments.items() if value is not None),
        seed=settings.seed,
        ordered=".in_slot_order()" if settings.method == "base" else "",
    )


def as_command(prompt: str, settings: SampleSettings) -> str:
    """A line for a shell that makes the same images."""
    given = {name: value for name in OPTIONS if (value := getattr(settings, name)) is not None}
    words = [
        word
        for name, value in given.items()
        for word in (f"--{name}", f"{value:g}" if isinstance(value, float) else str(value))
    ]
    dashed = ["--", prompt] if prompt.startswith("-") else [prompt]
    return shlex.join(["steer", "sample", *words, *([] if settings.compare else ["--no-compare"]), *dashed])
