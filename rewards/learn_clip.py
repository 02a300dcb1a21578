"""Training a small CLIP from images and captions: what learned rewards stand on where no published one fits."""

import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from steer.reward import RewardError
from steer.rewards.clip_backbone import CONFIG, Backbone, open_clip_folder
from steer.rewards.learn import Recipe, claim, image_features
from steer.rewards.learned import configuration_files
from steer.rewards.objectives import contrastive
from steer.rewards.pairs import Captions, split_by_prompt
from steer.sums import staged_with_sums
from steer.training import Run, batch_at

logger = logging.getLogger(__name__)

WEIGHTS = "open_clip_model.safetensors"
LARGEST_SCALE = 100.0  # as CLIP's training clips it
CHOICES = 32  # captions to pick the right one from, in the report
MOST = 2000  # images in the report


def train_clip(
    captions: Captions, folder: Path, out: Path, work: Path, recipe: Recipe, device: str = "cpu"
) -> dict[str, Any]:
    """Trains a CLIP of the configuration in `folder` from its weights there, or afresh where it has none.

    Writes a folder that open_clip, and `clip:FOLDER`, load, and returns a report: how often a held-out image's own
    caption is picked from 32 different ones. An interrupted run in `work` goes on.
    """
    if not (folder / CONFIG).is_file():
        raise RewardError(f"--backbone {folder}: no {CONFIG} there; contrastive training needs an open_clip folder")
    recipe.check()
    claim(work, recipe, len(captions.prompts))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        backbone = open_clip_folder(folder, weights=(folder / WEIGHTS).is_file()).to(device)
    rows, held = split_by_prompt(captions.prompts, recipe.held_out, recipe.seed)

    def loss_at(step: int) -> Tensor:
        backbone.train()
        chosen = [rows[k] for k in batch_at(step, recipe.batch, len(rows), recipe.seed).tolist()]
        prompts = [captions.prompts[row] for row in chosen]
        scale = backbone.logit_scale.clamp(max=LARGEST_SCALE)
        features = image_features(backbone, [captions.images[row] for row in chosen])
        return contrastive(features, backbone.texts(prompts), scale, prompts)

    warmup = min(200, recipe.steps // 10)
    Run(work, recipe.steps, recipe.learning_rate, warmup=warmup).train([backbone], loss_at)
    backbone.eval()
    share = round(picked(backbone, captions, held), 4)
    report = {"captions": {"trained": len(rows), "held_out": len(held)}, "picked_of_32": share}
    copied = configuration_files(folder)
    with staged_with_sums(out, [WEIGHTS, *(path.name for path in copied)]) as new:
        _save(backbone.model, new[WEIGHTS])
        for path in copied:
            shutil.copyfile(path, new[path.name])
    logger.info("%s", report)
    return report


def _save(model: nn.Module, path: Path) -> None:
    save_file({key: value.detach().cpu().half().contiguous() for key, value in model.state_dict().items()}, path)


@torch.no_grad()
def picked(backbone: Backbone, captions: Captions, rows: list[int]) -> float:
    """Share of images whose own caption is nearest among 32 different ones, its own included; at most 2,000 images."""
    names = list(dict.fromkeys(captions.prompts[row] for row in rows))
    if len(names) < CHOICES:
        return float("nan")
    texts = dict(zip(names, backbone.texts(names), strict=True))
    right = []
    for row in rows[:MOST]:
        own = names.index(captions.prompts[row])
        others = [names[(own + k) % len(names)] for k in range(CHOICES)]
        similarity = torch.stack([texts[name] for name in others]) @ image_features(backbone, [captions.images[row]])[0]
        right.append(similarity.argmax().item() == 0)
    return sum(right) / len(right)
