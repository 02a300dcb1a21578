"""Training data of the learned rewards of scenes: images of the embedded model, labelled by the noisy exact reward."""

import io
import json
import logging
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from tqdm.auto import tqdm

from steer.apps.models import load_pipeline
from steer.apps.prompts import load_prompts
from steer.apps.reward_specs import resolve_reward
from steer.apps.scenes.training import CALL, LENGTH, build_tokenizer, training_scenes
from steer.apps.scenes.world import TASKS, is_held_out, random_request
from steer.diffusion.seeds import derived_seed
from steer.files import atomic_write, read_image
from steer.pipelines.selection import BestOfNPipeline
from steer.pipelines.training.preference_data import PreferenceFolder
from steer.training.rollout import Rows, Sampler

logger = logging.getLogger(__name__)

IMAGES_PER_CALL = 32  # images in one call
PART = 640  # images in one file
IMAGES_PER_PROMPT = 4  # images of a prompt

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
    """Encode an image as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Write a parquet file atomically."""
    with atomic_write(path) as new:
        pq.write_table(pa.Table.from_pylist(list(rows)), new)


def sample_prompts(
    folder: Path,
    model: str,
    prompts: Sequence[str],
    each: int = IMAGES_PER_PROMPT,
    reward: str = "scene",
    call: Mapping[str, Any] = CALL,
) -> None:
    """Sample `each` images of every prompt with their rewards, in files of 640; existing files are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    pipe = load_pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    best = BestOfNPipeline(pipe, reward)
    part, prompts_per_call = PART // each, IMAGES_PER_CALL // each
    for first in tqdm(range(0, len(prompts), part), desc="samples", unit="file", disable=None):
        path = folder / f"{first:05d}.parquet"
        if not path.exists():
            rows: list[Row] = []
            for start in range(first, min(first + part, len(prompts)), prompts_per_call):
                some = list(prompts[start : min(start + prompts_per_call, first + part)])
                generator = torch.Generator().manual_seed(start)
                out = best(some, num_particles=each, generator=generator, **call).in_slot_order()
                texts = [prompt for prompt in some for _ in range(each)]
                gold = out.rewards.flatten().tolist()
                rows += [
                    {"prompt": prompt, "image": png(image), "gold": value}
                    for prompt, image, value in zip(texts, out.images, gold, strict=True)
                ]
            write_rows(rows, path)
            logger.info("%s: gold %.3f", path, np.mean([row["gold"] for row in rows]))


def new_clip_folder(folder: Path) -> None:
    """Write the configuration of the CLIP of scenes and its tokenizer, without weights, in open_clip's format."""
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
    """Write `count` drawn scenes and their prompts; scene n is number n of the denoiser's training."""
    images, prompts = training_scenes(count)
    pictures = [png(Image.fromarray(image)) for image in images.permute(0, 2, 3, 1).numpy()]
    write_rows([{"image": i, "prompt": p} for i, p in zip(pictures, prompts, strict=True)], path)


GOLD_TEMPERATURE = 0.15  # difference of the exact reward at which the better image is chosen 73 % of the time
COMPOSITION_TEMPERATURE = 0.05
FOREGROUND = 0.25  # distance in RGB from the background at which a pixel belongs to an object


def composition(image: np.ndarray) -> float:
    """The value of an image (H, W, 3) in [0, 1] for annotators of aesthetic pairs: objects fill the picture and balance
    around its middle. Share of pixels covered minus twice the distance of their centre from the middle,
    in sides of the image."""
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    covered = np.linalg.norm(image - np.median(border, axis=0), axis=-1) > FOREGROUND
    if not covered.any():
        return -1.0
    middle = np.array(
        [(np.mean(places) + 0.5) / side for places, side in zip(np.nonzero(covered), covered.shape, strict=True)]
    )
    return float(covered.mean() - 2 * np.linalg.norm(middle - 0.5))


def choose(value_a: float, value_b: float, temperature: float, rng: np.random.Generator) -> str:
    """Choose a, b or tie, by Bradley and Terry's model; at temperature 0 the higher value."""
    if value_a == value_b:
        return "tie"
    if temperature == 0:
        return "a" if value_a > value_b else "b"
    return "a" if rng.random() < 1 / (1 + np.exp((value_b - value_a) / temperature)) else "b"


def pairs_of(
    samples: Sequence[Row], values: Sequence[float], temperature: float, rng: np.random.Generator
) -> list[Row]:
    """All pairs of the images of a prompt, with the choice between them and its strength."""
    pairs: list[Row] = []
    for start in range(0, len(samples), IMAGES_PER_PROMPT):
        for first, second in combinations(range(start, min(start + IMAGES_PER_PROMPT, len(samples))), 2):
            a, b = (first, second) if rng.random() < 0.5 else (second, first)
            choice = choose(values[a], values[b], temperature, rng)
            images = {"image_a": samples[a]["image"], "image_b": samples[b]["image"]}
            strength = abs(values[a] - values[b])
            pairs.append({"prompt": samples[a]["prompt"], **images, "choice": choice, "strength": strength})
    return pairs


def write_pairs(samples_folder: Path, out: Path) -> dict[str, Any]:
    """Write preference-pairs.parquet, labelled by the exact reward, and aesthetic-pairs.parquet, by composition."""
    samples = [row for path in sorted(samples_folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    taste = [composition(read_image(row["image"]).permute(1, 2, 0).numpy()) for row in samples]
    gold = [row["gold"] for row in samples]
    counts = {}
    for name, values, temperature in (
        ("preference", gold, GOLD_TEMPERATURE),
        ("aesthetic", taste, COMPOSITION_TEMPERATURE),
    ):
        pairs = pairs_of(samples, values, temperature, np.random.default_rng(2026))
        write_rows(pairs, out / f"{name}-pairs.parquet")
        counts[name] = len(pairs)
    return {"samples": len(samples), "pairs": counts}


def write_labelled_pairs(folder: Path, model: str, reward: str, prompts: Sequence[str]) -> Path:
    """Write pairs.parquet: two images of every prompt, of which the one with the higher reward is preferred."""
    sample_prompts(folder, model, prompts, 2, reward, CHOICES_CALL)
    samples = [row for path in sorted(folder.glob("[0-9]*.parquet")) for row in pq.read_table(path).to_pylist()]
    values, rng = [row["gold"] for row in samples], np.random.default_rng(2026)
    pairs = [
        pair
        for first in range(0, len(samples), 2)
        for pair in pairs_of(samples[first : first + 2], values[first : first + 2], 0.0, rng)
    ]
    write_rows(pairs, folder / "pairs.parquet")
    return folder / "pairs.parquet"


CHOICES_CALL = {"num_inference_steps": 10, "guidance_scale": 1.0}  # as in the configuration d3po-scenes
CHOICES = 500
LABEL_NOISE = 0.1  # share of choices that fall on the worse image


def write_choices(folder: Path, model: str, reward: str, count: int = CHOICES) -> None:
    """Write `count` pairs of images of training prompts, each from one noise, and the choice of a simulated annotator
    who errs in LABEL_NOISE of them; resumes an unfinished folder."""
    pipe, scored = load_pipeline(model), resolve_reward(reward)
    pipe.set_progress_bar_config(disable=True)
    dataset, sampler = PreferenceFolder.create(folder, pipe, CHOICES_CALL), Sampler(pipe, CHOICES_CALL)
    prompts = load_prompts("scenes-training")
    done = len((folder / "choices.jsonl").read_text().splitlines()) if (folder / "choices.jsonl").exists() else 0
    for number in tqdm(range(done, count), desc="choices", initial=done, total=count, disable=None):
        prompt = prompts[number % len(prompts)]
        start, *noises = (derived_seed(number, name) for name in ("start", "a", "b"))
        trajectories, images = sampler.rollout(Rows((prompt, prompt), (start, start), tuple(noises)))
        with torch.no_grad():
            first, second = scored(images, [prompt, prompt]).tolist()
        better = int(second > first)
        chosen = better ^ bool(np.random.default_rng(number).random() < LABEL_NOISE)
        dataset.write_preference(dataset.write_group(trajectories, images), chosen=chosen, rejected=1 - chosen)
