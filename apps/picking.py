"""`steer sample --keep` and `steer pick`: a few images out of many, good and different."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steer.apps.reward_specs import resolve_reward
from steer.apps.scoring import ImageWithPrompt, score_each
from steer.diverse import diverse, pixel_features
from steer.errors import InputError
from steer.files import dumps_with_checksum, read_image, write_text

SIDE = 64  # pixels to which images of several sizes are resized


def check_keep(keep: int | None, weight: float | None, particles: int) -> None:
    """Raise InputError for invalid options."""
    if keep is None and weight is not None:
        raise InputError("--diverse chooses among the images: add --keep N")
    if keep is not None and keep > particles:
        raise InputError(f"--keep {keep} of --particles {particles}: keep at most as many")


def keep_diverse(report: dict[str, Any], out: Path, keep: int, weight: float) -> dict[str, Any]:
    """Choose `keep` images of each prompt of a run, write their ranks and gains to report.json, return the report."""
    for entry in report["prompts"]:
        rewards, features = torch.tensor(entry["rewards"]), features_of([out / name for name in entry["images"]])
        chosen = diverse(rewards, features, min(keep, len(rewards)), weight)
        entry["kept"] = {"ranks": list(chosen.rows), "gains": [round(gain, 6) for gain in chosen.gains]}
    write_text(out / "report.json", dumps_with_checksum(report))
    return report


def features_of(paths: Sequence[Path], model: str | None = None) -> Tensor:
    """Return features (N, D) of image files: downscaled pixels, or the features of a CLIP."""
    if model is None:
        images = [torch.nn.functional.adaptive_avg_pool2d(read_image(path), SIDE) for path in paths]
        return pixel_features(torch.stack(images))
    from steer.rewards.clip import load_backbone
    from steer.rewards.learned import image_features

    with torch.no_grad():
        return image_features(load_backbone(model), list(paths)).cpu()


def pick(
    shown: Sequence[ImageWithPrompt],
    rewards: Sequence[str],
    keep: int,
    weight: float,
    model: str | None,
    device: str,
    represent: bool = False,
    at_least: int | None = None,
) -> list[dict[str, Any]]:
    """Choose images by rewards and diversity: rows of image, rewards and gain, in the order of the choice.

    represent  choose an image of high rank for each reward;  at_least: minimum number of images of each prompt
    """
    paths, prompts = [one.path for one in shown], [one.prompt or "" for one in shown]
    scores = score_each(map(resolve_reward, rewards), paths, prompts, device)
    quota: dict[str, Any] = {} if at_least is None else {"groups": prompts, "at_least": at_least}
    chosen = diverse(scores, features_of(paths, model), keep, weight, represent=represent, **quota)
    return [
        {
            "image": str(paths[row]),
            "rewards": dict(zip(rewards, scores[:, row].tolist(), strict=True)),
            "gain": round(gain, 6),
        }
        for row, gain in zip(chosen.rows, chosen.gains, strict=True)
    ]
