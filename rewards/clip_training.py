"""Contrastive training of a CLIP on images and captions."""

import logging
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from steer.files import atomic_write_with_checksums
from steer.reward import RewardError
from steer.rewards import objectives
from steer.rewards.clip import BACKGROUND, CONFIG, WEIGHTS, Backbone, open_clip_folder
from steer.rewards.example import MIN_OTHERS, write_background
from steer.rewards.images import resize_and_crop
from steer.rewards.learned import (
    configuration_files,
    image_features,
    weight_to_save,
    write_run_config,
)
from steer.rewards.preference_pairs import Captions, load_images, split_by_prompt
from steer.rewards.training_config import RewardTrainingConfig
from steer.training.supervised import TrainingRun, batch_at

logger = logging.getLogger(__name__)

MAX_BACKGROUND = 64  # held-out images whose features are stored, for rewards from example images
MAX_LOGIT_SCALE = 100.0  # as in CLIP's training
CAPTION_CANDIDATES = 32  # captions to pick the right one from, in the report
MAX_REPORT_IMAGES = 2000  # images in the report


def train_clip(
    captions: Captions, folder: Path, out: Path, work: Path, config: RewardTrainingConfig, device: str = "cpu"
) -> dict[str, Any]:
    """Train a CLIP with the configuration in `folder`, from the weights there or from scratch.

    Writes a folder that open_clip and `clip:FOLDER` can load, and returns a report: how often a held-out image's own
    caption is picked from 32 different ones. An interrupted run in `work` resumes.
    """
    if not (folder / CONFIG).is_file():
        raise RewardError(f"--backbone {folder}: no {CONFIG} there; contrastive training needs an open_clip folder")
    write_run_config(work, config, captions)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        backbone = open_clip_folder(folder, weights=(folder / WEIGHTS).is_file()).to(device)
    rows, held = split_by_prompt(captions.prompts, config.held_out, config.seed)

    def loss_at(step: int) -> Tensor:
        backbone.train()
        chosen = [rows[k] for k in batch_at(step, config.batch_size, len(rows), config.seed).tolist()]
        prompts = [captions.prompts[row] for row in chosen]
        scale = backbone.logit_scale.clamp(max=MAX_LOGIT_SCALE)
        features = image_features(backbone, [captions.images[row] for row in chosen])
        return objectives.contrastive(features, backbone.texts(prompts), scale, prompts)

    warmup = min(200, config.steps // 10)
    TrainingRun(work, config.steps, config.learning_rate, warmup=warmup).train([backbone], loss_at)
    backbone.eval()
    share = round(caption_accuracy(backbone, captions, held), 4)
    report = {"captions": {"trained": len(rows), "held_out": len(held)}, "caption_accuracy_of_32": share}
    config_files, others = configuration_files(folder), held[:MAX_BACKGROUND]
    names = [WEIGHTS, *(path.name for path in config_files)]
    with atomic_write_with_checksums(out, names + [BACKGROUND] * (len(others) >= MIN_OTHERS)) as new:
        save_file(
            {key: weight_to_save(value, half=True) for key, value in backbone.model.state_dict().items()}, new[WEIGHTS]
        )
        for path in config_files:
            shutil.copyfile(path, new[path.name])
        if BACKGROUND in new:
            images = load_images([captions.images[row] for row in others], partial(resize_and_crop, size=backbone.size))
            with torch.no_grad():
                write_background(new[BACKGROUND], new[WEIGHTS], backbone.image_layers(images.to(device)))
    logger.info("%s", report)
    return report


@torch.no_grad()
def caption_accuracy(backbone: Backbone, captions: Captions, rows: list[int]) -> float:
    """Return the share of images nearest to their own caption among 32 different ones; at most 2,000 images."""
    names = list(dict.fromkeys(captions.prompts[row] for row in rows))
    if len(names) < CAPTION_CANDIDATES:
        return float("nan")
    texts = dict(zip(names, backbone.texts(names), strict=True))
    right = []
    for row in rows[:MAX_REPORT_IMAGES]:
        own = names.index(captions.prompts[row])
        others = [names[(own + k) % len(names)] for k in range(CAPTION_CANDIDATES)]
        similarity = torch.stack([texts[name] for name in others]) @ image_features(backbone, [captions.images[row]])[0]
        right.append(similarity.argmax().item() == 0)
    return sum(right) / len(right)
