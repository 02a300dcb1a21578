"""Recipes for the denoiser at equal processor time, judged on combinations that are in no other list."""

import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import Generator, Tensor

from steer.apps.scenes.autoencoder import encode
from steer.apps.scenes.denoiser import PILOT, Recipe, token_ids, train_denoiser, velocity_loss
from steer.apps.scenes.evaluate import CALL, interval
from steer.apps.scenes.lists import requests_of
from steer.apps.scenes.world import draw, is_held_out, random_request, random_scene
from steer.rewards.scene import SceneReward
from steer.rewards.scene_language import SceneRequest

logger = logging.getLogger(__name__)
DEVELOPMENT = 200  # requests with a relation; the held-out list has every held-out request of the other tasks
FRESH = 20_000_000  # scenes from this number on are never trained on


def development_requests() -> list[SceneRequest]:
    """Combinations that training never sees and that are not in the held-out list either."""
    reserved = {request.canonical for request in requests_of("scenes-heldout")}
    rng = np.random.default_rng(FRESH)
    drawn = dict.fromkeys(random_request(rng, "position") for _ in range(20_000))
    return [r for r in drawn if is_held_out(r) and r.canonical not in reserved][:DEVELOPMENT]


@torch.no_grad()
def validation_loss(pipe: StableDiffusionPipeline, requests: list[SceneRequest]) -> list[float]:
    """Unweighted v-loss of one scene of each request at 50 … 950 of 1,000 training timesteps, ten of them."""
    images = []
    for number, request in enumerate(requests):
        rng = np.random.default_rng(FRESH + number)
        images.append(draw(random_scene(rng, request), rng))
    x0 = encode(pipe.vae, torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))
    noise = torch.randn(x0.shape, generator=Generator().manual_seed(FRESH))
    states = pipe.text_encoder(token_ids(pipe.tokenizer, list(map(str, requests))))[0]

    def at(t: int) -> float:
        times = torch.full((len(x0),), t)
        return round(velocity_loss(pipe.unet, states, x0, times, noise, Recipe()).item(), 4)

    return [at(t) for t in range(50, 1000, 100)]


def accuracy(pipe: Any, requests: list[SceneRequest], each: int = 2, **call: Any) -> Tensor:
    """Share of `each` unsteered images that are right, of every request (P,)."""
    pipe.set_progress_bar_config(disable=True)
    right = []
    for start in range(0, len(requests), 32):
        prompts = [str(request) for request in requests[start : start + 32]]
        generator = Generator().manual_seed(start)
        images = pipe(prompts, num_images_per_prompt=each, generator=generator, output_type="pt", **CALL | call).images
        scores = SceneReward()(images, [prompt for prompt in prompts for _ in range(each)])
        right.append((scores == 1).float().view(len(prompts), each).mean(1))
    return torch.cat(right)


def pilot(folder: Path, vae: AutoencoderKL, seconds: float, only: list[str]) -> None:
    """Train each recipe for so much processor time and append its figures to folder/pilot.jsonl."""
    requests = development_requests()
    for name in only or PILOT:
        record: dict[str, Any] = {"recipe": name, "seconds": seconds}
        # steps far beyond: no decay, so that all stop at the constant rate
        pipe = train_denoiser(folder / name, vae, PILOT[name], 10**6, seconds=time.process_time() + seconds)
        log = [json.loads(line) for line in (folder / name / "log.jsonl").read_text().splitlines()]
        losses = validation_loss(pipe, requests)
        record |= {"steps": log[-1]["step"], "loss": round(float(np.mean(losses)), 4), "losses": losses}
        record["right"] = interval(accuracy(pipe, requests))
        logger.info("%s", record)
        with (folder / "pilot.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
