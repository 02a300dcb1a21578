"""What the learned rewards of scenes are trained on: images of the embedded model, labelled by noisy gold."""

import io
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from tqdm.auto import tqdm

from steer.apps.models import load_pipeline
from steer.apps.scenes.world import TASKS, is_held_out, random_request
from steer.pipelines import BestOfNPipeline

logger = logging.getLogger(__name__)

TOGETHER = 8  # prompts in one call
PART = 160  # prompts in one file
EACH = 4  # images of a prompt
CALL = {"num_inference_steps": 20, "guidance_scale": 4.0}

Row = dict[str, Any]


def trained_prompts(count: int) -> list[str]:
    """Prompt number n depends on n alone; none is held out, tasks come as often as in training."""
    prompts = []
    for number in range(count):
        rng = np.random.default_rng(number)
        while is_held_out(request := random_request(rng, str(rng.choice(list(TASKS), p=list(TASKS.values()))))):
            continue
        prompts.append(str(request))
    return prompts


def png(image: Image.Image) -> bytes:
    """An image as the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Writes a parquet file, whole or not at all."""
    staged = path.with_suffix(".new")
    pq.write_table(pa.Table.from_pylist(list(rows)), staged)
    staged.replace(path)


def sample_prompts(folder: Path, model: str, count: int) -> Iterator[Path]:
    """Four images of each of `count` prompts and their exact rewards, part by part; parts that are there stay."""
    folder.mkdir(parents=True, exist_ok=True)
    pipe = load_pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    best = BestOfNPipeline(pipe, "scene")
    prompts = trained_prompts(count)
    for first in tqdm(range(0, count, PART), desc="samples", unit="part", disable=None):
        path = folder / f"{first:05d}.parquet"
        if not path.exists():
            rows: list[Row] = []
            for start in range(first, min(first + PART, count), TOGETHER):
                some = prompts[start : min(start + TOGETHER, count)]
                generator = torch.Generator().manual_seed(start)
                out = best(some, num_particles=EACH, generator=generator, **CALL)
                texts = [prompt for prompt in some for _ in range(EACH)]
                gold = out.rewards.flatten().tolist()
                rows += [
                    {"prompt": prompt, "image": png(image), "gold": value}
                    for prompt, image, value in zip(texts, out.images, gold, strict=True)
                ]
            write_rows(rows, path)
            logger.info("%s: gold %.3f", path, np.mean([row["gold"] for row in rows]))
        yield path
