"""Annotators that choose between two images as people do: by what they value, and not always right.

An annotator who values images v(a), v(b) chooses a with probability σ((v(a) − v(b)) / patience): Bradley and Terry's
model. Two images of equal value are a tie.
"""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from steer.apps.scenes.preferences import EACH, Row, write_rows
from steer.images import read_image

GOLD_PATIENCE = 0.15  # difference of the exact reward at which the better image is chosen 73 % of the time
TASTE_PATIENCE = 0.05
FOREGROUND = 0.25  # distance in RGB from the background at which a pixel belongs to an object


def composition(image: np.ndarray) -> float:
    """What the annotators of aesthetic pairs value in an image (H, W, 3) in [0, 1]: objects that fill the picture
    and balance around its middle. Share of pixels covered minus twice the distance of their centre from the middle,
    in sides of the image."""
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    covered = np.linalg.norm(image - np.median(border, axis=0), axis=-1) > FOREGROUND
    if not covered.any():
        return -1.0
    middle = np.array(
        [(np.mean(places) + 0.5) / side for places, side in zip(np.nonzero(covered), covered.shape, strict=True)]
    )
    return float(covered.mean() - 2 * np.linalg.norm(middle - 0.5))


def choose(value_a: float, value_b: float, patience: float, rng: np.random.Generator) -> str:
    """a, b or tie."""
    if value_a == value_b:
        return "tie"
    return "a" if rng.random() < 1 / (1 + np.exp((value_b - value_a) / patience)) else "b"


def pairs_of(samples: Sequence[Row], values: Sequence[float], patience: float, rng: np.random.Generator) -> list[Row]:
    """Every two of the images that were made for a prompt together, with the choice between them and its strength."""
    pairs: list[Row] = []
    for start in range(0, len(samples), EACH):
        for first, second in combinations(range(start, min(start + EACH, len(samples))), 2):
            a, b = (first, second) if rng.random() < 0.5 else (second, first)
            choice = choose(values[a], values[b], patience, rng)
            images = {"image_a": samples[a]["image"], "image_b": samples[b]["image"]}
            strength = abs(values[a] - values[b])
            pairs.append({"prompt": samples[a]["prompt"], **images, "choice": choice, "strength": strength})
    return pairs


def write_pairs(samples_folder: Path, out: Path) -> dict[str, Any]:
    """Writes preference-pairs.parquet, chosen by gold, and aesthetic-pairs.parquet, chosen by composition."""
    samples = [row for path in sorted(samples_folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    taste = [composition(read_image(row["image"]).permute(1, 2, 0).numpy()) for row in samples]
    gold = [row["gold"] for row in samples]
    counts = {}
    for name, values, patience in (("preference", gold, GOLD_PATIENCE), ("aesthetic", taste, TASTE_PATIENCE)):
        pairs = pairs_of(samples, values, patience, np.random.default_rng(2026))
        write_rows(pairs, out / f"{name}-pairs.parquet")
        counts[name] = len(pairs)
    return {"samples": len(samples), "pairs": counts}
