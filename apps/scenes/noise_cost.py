"""What ReNO costs: memory with and without recomputed activations, a batch of prompts against single runs."""

import multiprocessing
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from steer.apps.models import load_pipeline
from steer.apps.scenes.noise_study import RENO
from steer.apps.scenes.preferences import trained_prompts
from steer.pipelines import ReNOPipeline
from steer.pipelines.noise_gradient import Backprop

PROMPTS = 8
SEEDS = 4
STEPS = 10  # solver steps that the gradient goes through, of the multi-step model
REWARD = "scene-soft"


def _peak() -> float:
    """The most memory that this process has had, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(model: str, checkpointing: bool, steps: int, iterations: int) -> tuple[float, float]:
    """In a process of its own: MB beyond what the loaded model and one image took, seconds an iteration."""
    pipe = load_pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    pipe("a circle", num_inference_steps=1)
    before, started = _peak(), time.monotonic()
    ReNOPipeline(pipe, REWARD)(
        trained_prompts(PROMPTS),
        num_particles=SEEDS,
        iterations=iterations,
        gradient=Backprop(checkpointing),
        generator=torch.Generator().manual_seed(0),
        num_inference_steps=steps,
        **RENO,
    )
    return round(_peak() - before), round((time.monotonic() - started) / iterations, 2)


def _alone(*arguments: Any) -> tuple[float, float]:
    """`measure` in a fresh process: memory that was once had is not given back in the old one."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(measure, *arguments).result()


def costs(model: str, turbo: str) -> dict[str, Any]:
    """Peak memory and time of both ways back, at few and at more iterations; the time of a batch and of single runs."""
    memory = {
        f"{name}, {steps} steps, {iterations} iterations, checkpointing {'on' if on else 'off'}": dict(
            zip(("MB", "seconds"), _alone(name, on, steps, iterations), strict=True)
        )
        for name, steps in ((model, STEPS), (turbo, 1))
        for iterations in (2, 8)
        for on in (True, False)
    }
    return {"images": PROMPTS * SEEDS, "memory": memory, "batch": batch_ratio(turbo)}


def batch_ratio(model: str, iterations: int = 10) -> dict[str, float]:
    """Seconds of eight prompts in one batch and one after the other, in turns, the better of three each."""
    pipe, prompts = load_pipeline(model), trained_prompts(PROMPTS)
    pipe.set_progress_bar_config(disable=True)
    reno, options = ReNOPipeline(pipe, REWARD), {"iterations": iterations, **RENO}
    together, single = [], []
    for _ in range(3):
        together.append(reno(prompts, **options).cost.seconds)
        single.append(sum(reno(prompt, **options).cost.seconds for prompt in prompts))
    best = min(together), min(single)
    return {"batch": round(best[0], 2), "single": round(best[1], 2), "ratio": round(best[1] / best[0], 2)}
