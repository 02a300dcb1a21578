"""What the learned rewards of scenes are trained on: images of the embedded model, labelled by noisy gold."""

import io
import json
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
from steer.apps.scenes.evaluate import CALL
from steer.apps.scenes.tokenizer import LENGTH, build_tokenizer
from steer.apps.scenes.training import training_scenes
from steer.apps.scenes.world import TASKS, is_held_out, random_request
from steer.pipelines import BestOfNPipeline
from steer.staged import staged

logger = logging.getLogger(__name__)

TOGETHER = 32  # images in one call, where a prompt has no more
PART = 640  # images in one file
EACH = 4  # images of a prompt

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
    with staged(path) as new:
        pq.write_table(pa.Table.from_pylist(list(rows)), new)


def sample_prompts(folder: Path, model: str, prompts: Sequence[str], each: int) -> Iterator[Path]:
    """`each` images of every prompt and their exact rewards, in files of 640; files that are there stay."""
    folder.mkdir(parents=True, exist_ok=True)
    pipe = load_pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    best = BestOfNPipeline(pipe, "scene")
    part, together = max(PART // each, 1), max(TOGETHER // each, 1)
    for first in tqdm(range(0, len(prompts), part), desc="samples", unit="file", disable=None):
        path = folder / f"{first:05d}.parquet"
        if not path.exists():
            rows: list[Row] = []
            for start in range(first, min(first + part, len(prompts)), together):
                some = list(prompts[start : min(start + together, first + part)])
                generator = torch.Generator().manual_seed(start)
                out = best(some, num_particles=each, generator=generator, **CALL).in_slot_order()
                texts = [prompt for prompt in some for _ in range(each)]
                gold = out.rewards.flatten().tolist()
                rows += [
                    {"prompt": prompt, "image": png(image), "gold": value}
                    for prompt, image, value in zip(texts, out.images, gold, strict=True)
                ]
            write_rows(rows, path)
            logger.info("%s: gold %.3f", path, np.mean([row["gold"] for row in rows]))
        yield path


def new_clip_folder(folder: Path) -> None:
    """Writes the configuration of the CLIP of scenes and its tokenizer, without weights, in open_clip's format."""
    tokenizer = build_tokenizer(folder)
    for name in ("vocab.json", "merges.txt"):  # tokenizer.json holds both
        (folder / name).unlink(missing_ok=True)
    vision = {"image_size": 64, "patch_size": 8, "width": 128, "layers": 4, "head_width": 32}
    text = {"context_length": LENGTH, "vocab_size": len(tokenizer), "width": 128, "heads": 4, "layers": 2}
    model = {"embed_dim": 128, "vision_cfg": vision, "text_cfg": text | {"hf_tokenizer_name": "scenes"}}
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    config = {"model_cfg": model, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=1) + "\n")


def write_captions(path: Path, count: int) -> None:
    """`count` drawn scenes and their prompts; scene n is number n of the denoiser's training."""
    images, prompts = training_scenes(count)
    pictures = [png(Image.fromarray(image)) for image in images.permute(0, 2, 3, 1).numpy()]
    write_rows([{"image": i, "prompt": p} for i, p in zip(pictures, prompts, strict=True)], path)
