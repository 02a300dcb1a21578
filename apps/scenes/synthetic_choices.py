"""Choices as people would record them, by an annotator who is wrong now and then."""

from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from steer.apps.models import load_pipeline
from steer.apps.prompts import find_prompts
from steer.apps.specs import reward_here
from steer.pipelines.choices import ChoiceFolder
from steer.seeds import derived_seed
from steer.trajectory import Rows, Sampler

CALL = {"num_inference_steps": 10, "guidance_scale": 1.0}  # those of the configuration d3po-scenes
CHOICES = 500
WRONG = 0.1  # share of choices that fall on the worse image
VALUED = "aesthetic:scenes"  # what the annotator goes by


def write_choices(folder: Path, count: int = CHOICES) -> None:
    """`count` pairs of images of training prompts from one noise each, and a choice between the two; goes on where it
    stopped."""
    pipe, reward = load_pipeline("scenes"), reward_here(VALUED)
    pipe.set_progress_bar_config(disable=True)
    kept, sampler = ChoiceFolder.create(folder, pipe, CALL), Sampler(pipe, CALL)
    prompts = find_prompts("scenes-training")
    done = len((folder / "choices.jsonl").read_text().splitlines()) if (folder / "choices.jsonl").exists() else 0
    for number in tqdm(range(done, count), desc="choices", initial=done, total=count, disable=None):
        prompt = prompts[number % len(prompts)]
        start, *noises = (derived_seed(number, name) for name in ("start", "a", "b"))
        drew, images = sampler.rollout(Rows((prompt, prompt), (start, start), tuple(noises)))
        with torch.no_grad():
            first, second = reward(images, [prompt, prompt]).tolist()
        better = int(second > first)
        chosen = better ^ bool(np.random.default_rng(number).random() < WRONG)
        kept.write_choice(kept.write_lot(drew, images), chosen=chosen, rejected=1 - chosen)
