"""Rewards that compare image and prompt in a CLIP's space: CLIPScore, PickScore, HPSv2.

All are computed from tensors, differentiable through their preprocessing, with the prompts' features remembered
and images taken in micro-batches; they follow the images to their device. Common options, after the name:

path=FILE|FOLDER  local weights      dtype=float32|float16|bfloat16  of the model
micro_batch=N     images at a time   preprocess=crop|pad             CLIP's own, or HPSv2's
"""

from collections.abc import Callable, Sequence

import open_clip
from torch import Tensor

from steer.choices import choose
from steer.reward import RewardError
from steer.rewards.batches import PromptCache, in_micro_batches
from steer.rewards.clip_backbone import (
    DEFAULT_CLIP,
    LAION_H,
    PICKSCORE,
    Backbone,
    clip_folder,
    load_backbone,
    open_clip_backbone,
    open_clip_folder,
)
from steer.rewards.preprocess import PREPROCESS, Preprocess
from steer.rewards.weights import HubFile, cast, load_weights, read_checkpoint

Unit = Callable[[Tensor, Tensor], Tensor]

MICRO_BATCH = 16
HPS_REVISION = "697403c78157020a1ae59d23f111aa58ced35b0a"
HPS = {
    "hpsv2": HubFile("xswu/HPSv2", "HPS_v2_compressed.pt", HPS_REVISION),
    "hpsv2.1": HubFile(
        "xswu/HPSv2",
        "HPS_v2.1_compressed.pt",
        HPS_REVISION,
        "c57a38fb4a2f7e7c15bf00da2ea377cdf165448b4dd1052a484c215a998c9837",
    ),
}


def cosine(similarity: Tensor, logit_scale: Tensor) -> Tensor:
    """cos(image, text), −1..1; of published models about 0.1..0.4."""
    return similarity


def logit(similarity: Tensor, logit_scale: Tensor) -> Tensor:
    """exp(t) cos(image, text): what the CLIP was trained on, about 100 times the cosine."""
    return logit_scale * similarity


def clipscore(similarity: Tensor, logit_scale: Tensor) -> Tensor:
    """100 max(cos(image, text), 0), 0..100 (CLIPScore, arXiv 2104.08718, in the scale that is usual now)."""
    return 100 * similarity.clamp(min=0)


UNITS: dict[str, Unit] = {"cosine": cosine, "logit": logit, "clipscore": clipscore}


class ClipReward:
    """Similarity of image and prompt by a CLIP: (N,) in one of the units above, at least fp32."""

    differentiable = True

    def __init__(
        self,
        name: str,
        backbone: Backbone,
        unit: Unit,
        preprocess: Preprocess,
        micro_batch: str | int,
        dtype: str | None,
    ) -> None:
        self.name = name
        self.backbone = backbone
        cast(backbone, dtype)
        self._unit, self._preprocess = unit, preprocess
        self._texts = PromptCache(backbone.texts)
        self._batched = in_micro_batches(self._score, micro_batch)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.backbone.to(images.device)
        return self._batched(images, prompts)

    def _score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        image = self.backbone.images(images, self._preprocess)
        similarity = (image * self._texts(prompts).to(image.device)).sum(-1)
        return self._unit(similarity, self.backbone.logit_scale)


def clip(
    model: str = DEFAULT_CLIP,
    *,
    unit: str = "cosine",
    preprocess: str = "crop",
    micro_batch: str | int = MICRO_BATCH,
    dtype: str | None = None,
) -> ClipReward:
    """CLIPScore (arXiv 2104.08718) by any CLIP: scenes, ARCHITECTURE/TAG of open_clip, ORGANISATION/NAME, a folder.

    unit  cosine (default), logit or clipscore
    """
    backbone = load_backbone(model)
    name = "clip" if model == DEFAULT_CLIP else f"clip:{model}"
    options = choose("unit", unit, UNITS), choose("preprocess", preprocess, PREPROCESS), micro_batch
    return ClipReward(name, backbone, *options, dtype)


def pickscore(
    *, path: str | None = None, unit: str = "logit", micro_batch: str | int = MICRO_BATCH, dtype: str | None = None
) -> ClipReward:
    """PickScore v1 (arXiv 2305.01569): exp(t) cos(image, text), about 15..25; often divided by 26.

    path  a local folder as CLIPModel.save_pretrained writes it, with its tokenizer
    """
    # The published repository has no tokenizer of its own: it is that of the CLIP that it was tuned from.
    backbone = load_backbone(path or PICKSCORE, None if path else LAION_H)
    options = choose("unit", unit, UNITS), PREPROCESS["crop"], micro_batch
    return ClipReward("pickscore", backbone, *options, dtype)


def _hps(
    name: str, path: str | None, model: str, preprocess: str, micro_batch: str | int, dtype: str | None
) -> ClipReward:
    tensors = read_checkpoint(path) if path else read_checkpoint(HPS[name].fetch(), HPS[name].sha256)
    backbone = _open_clip_architecture(model)
    load_weights(backbone.model, tensors, f"{name}: {path or HPS[name].filename}")
    options = UNITS["cosine"], choose("preprocess", preprocess, PREPROCESS), micro_batch
    return ClipReward(name, backbone, *options, dtype)


def hpsv2(
    *,
    path: str | None = None,
    model: str = "ViT-H-14",
    preprocess: str = "pad",
    micro_batch: str | int = MICRO_BATCH,
    dtype: str | None = None,
) -> ClipReward:
    """Human Preference Score v2 (arXiv 2306.09341): the cosine, about 0.2..0.35.

    path        a local HPS_v2_compressed.pt
    model       its architecture, a name or folder of open_clip
    preprocess  pad: the official one, the whole picture with black bars; crop: CLIP's own, as ReNO has it
    """
    return _hps("hpsv2", path, model, preprocess, micro_batch, dtype)


def hpsv21(
    *,
    path: str | None = None,
    model: str = "ViT-H-14",
    preprocess: str = "pad",
    micro_batch: str | int = MICRO_BATCH,
    dtype: str | None = None,
) -> ClipReward:
    """Human Preference Score v2.1: as `hpsv2`, from a local HPS_v2.1_compressed.pt or the hub's."""
    return _hps("hpsv2.1", path, model, preprocess, micro_batch, dtype)


def _open_clip_architecture(model: str) -> Backbone:
    """An open_clip model without weights, by name or by the folder of its configuration."""
    if clip_folder(model).is_dir():
        return open_clip_folder(clip_folder(model), weights=False)
    if model not in open_clip.list_models():
        raise RewardError(f"model={model}: not an architecture of open_clip, nor a folder with its configuration")
    return open_clip_backbone(open_clip.create_model(model), open_clip.get_tokenizer(model))
