"""DRAKES on scenes-text: the share of texts that say a word, and the share that still parses, on held-out prefixes."""

import logging
import time
from typing import Any

import torch
from torch import Generator, Tensor

from steer.apps.models import load_pipeline
from steer.apps.prompts import load_prompts
from steer.assets import TEXT_LISTS
from steer.pipelines.training.drakes import DRAKESTrainer
from steer.pipelines.training.evaluation import interval
from steer.rewards.parser import load_reward

logger = logging.getLogger(__name__)
WORD, STEPS, BATCH, TEMPERATURE, LEARNING_RATE = "blue", 10, 48, 0.5, 3e-4
DRAWS, EVALUATION_STEPS, EVERY = 20, 20, 50  # texts of a prefix, their solver steps, updates between evaluations


def shares(pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
    """Return the shares (P,) of a prefix's texts that say the word, and that parse; the same seed in every call."""
    rows = [prompt for prompt in prompts for _ in range(DRAWS)]
    texts = pipe(rows, EVALUATION_STEPS, Generator().manual_seed(1), return_dict=False)[0]
    return {
        name: load_reward(name)(texts, rows).view(len(prompts), DRAWS).mean(1) for name in (f"says:{WORD}", "parses")
    }


def drakes_study(model: str, updates: int, kl_weight: float) -> dict[str, Any]:
    """Train, and return [mean, low, high] over the held-out prefixes of both shares and of their rise."""
    pipe = load_pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    train, held_out = map(load_prompts, TEXT_LISTS)
    settings: dict[str, Any] = {
        "kl_weight": kl_weight,
        "num_inference_steps": STEPS,
        "train_batch_size": BATCH,
        "temperature": TEMPERATURE,
        "learning_rate": LEARNING_RATE,
    }
    order = torch.randperm(len(train), generator=Generator().manual_seed(0)).tolist()
    trainer = DRAKESTrainer(pipe, f"says:{WORD}", **settings)
    base, generator, start = shares(pipe, held_out), Generator().manual_seed(0), time.process_time()
    evaluations, history = [_row(0, base, base)], list[dict[str, float]]()
    while len(history) < updates:
        shift = len(history) * BATCH % len(train)
        prompts = [train[place] for place in order[shift:] + order[:shift]]
        history += trainer.train(prompts, min(EVERY, updates - len(history)), generator)
        evaluations.append(_row(len(history), shares(pipe, held_out), base))
        logger.info("%s, KL %.3f, %.0f s", evaluations[-1], history[-1]["kl"], time.process_time() - start)
    return {
        **settings,
        "reward": f"says:{WORD}",
        "prefixes": [len(train), len(held_out)],
        "seconds": round(time.process_time() - start),
        "evaluations": evaluations,
        "history": [{name: round(value, 4) for name, value in one.items()} for one in history],
    }


def _row(update: int, now: dict[str, Tensor], base: dict[str, Tensor]) -> dict[str, Any]:
    row: dict[str, Any] = {"update": update}
    for name, values in now.items():
        row |= {name: interval(values), f"{name} rise": interval(values - base[name])}
    return row
