"""Rewards that compare image and prompt in a CLIP's space: CLIPScore, PickScore, HPSv2.

All are computed from tensors, differentiable through their preprocessing, with the prompts' features remembered
and images taken in micro-batches; their weights go from the CPU to the device of the images. Common options, after the
name:

path=FILE|FOLDER  local weights      dtype=float32|float16|bfloat16  of the model
micro_batch=N     images at a time   preprocess=crop|pad             CLIP's own, or HPSv2's
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from steer.choices import choose
from steer.reward import RewardError
from steer.rewards.batches import PromptCache, in_micro_batches
from steer.rewards.clip_backbone import (
    DEFAULT_CLIP,
    LAION_H,
    PICKSCORE,
    Backbone,
    load_backbone,
    open_clip_architecture,
)
from steer.rewards.preprocess import PREPROCESS
from steer.rewards.weights import HubFile, cast, check_dtype, load_weights, placed, read_checkpoint
from steer.truncation import noting_cuts

Unit = Callable[[Tensor, float], Tensor]

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


def cosine(similarity: Tensor, logit_scale: float) -> Tensor:
    """cos(image, text), −1..1; of published models about 0.1..0.4."""
    return similarity


def logit(similarity: Tensor, logit_scale: float) -> Tensor:
    """exp(t) cos(image, text): what the CLIP was trained on, about 100 times the cosine."""
    return logit_scale * similarity


def clipscore(similarity: Tensor, logit_scale: float) -> Tensor:
    """100 max(cos(image, text), 0), 0..100 (CLIPScore, arXiv 2104.08718, in the scale that is usual now)."""
    return 100 * similarity.clamp(min=0)


UNITS: dict[str, Unit] = {"cosine": cosine, "logit": logit, "clipscore": clipscore}


class ClipReward:
    """Similarity of image and prompt by a CLIP: (N,) in one of the units above, at least fp32.

    `load` makes the CLIP, once the options are known to be good. The published temperature is kept in full
    precision whatever the dtype: half of it would move all scores by up to 2 %.
    """

    differentiable = True

    def __init__(
        self,
        name: str,
        load: Callable[[], Backbone],
        unit: str,
        preprocess: str,
        micro_batch: str | int,
        dtype: str | None,
    ) -> None:
        self.name = name
        self._unit, self._preprocess = choose("unit", unit, UNITS), choose("preprocess", preprocess, PREPROCESS)
        self._batched = in_micro_batches(self._score, micro_batch)
        check_dtype(dtype)
        self.backbone = load()
        self._logit_scale = self.backbone.logit_scale.item()
        cast(self.backbone, dtype)
        self.prompt_limit = self.backbone.limit
        encode = noting_cuts(f"reward {name!r}", self.backbone.texts, self.backbone.count, self.backbone.limit)
        self._texts = PromptCache(encode)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._batched(placed(images, self.backbone), prompts)

    def _score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        image = self.backbone.images(images, self._preprocess)
        similarity = (image * self._texts(prompts).to(image.device)).sum(-1)
        return self._unit(similarity, self._logit_scale)


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
    name = "clip" if model == DEFAULT_CLIP else f"clip:{model}"
    name = named(name, unit=(unit, "cosine"), preprocess=(preprocess, "crop"))
    return ClipReward(name, partial(load_backbone, model), unit, preprocess, micro_batch, dtype)


def pickscore(
    *, path: str | None = None, unit: str = "logit", micro_batch: str | int = MICRO_BATCH, dtype: str | None = None
) -> ClipReward:
    """PickScore v1 (arXiv 2305.01569): exp(t) cos(image, text), about 15..25; often divided by 26.

    path  a local folder as CLIPModel.save_pretrained writes it, with its tokenizer
    """
    if path and not Path(path).is_dir():
        raise RewardError(f"pickscore:path={path}: no such folder")
    # The published repository has no tokenizer of its own: it is that of the CLIP that it was tuned from.
    load = partial(load_backbone, path or PICKSCORE, None if path else LAION_H)
    return ClipReward(named("pickscore", unit=(unit, "logit")), load, unit, "crop", micro_batch, dtype)


def hps(
    version: str,
    *,
    path: str | None = None,
    model: str = "ViT-H-14",
    preprocess: str = "pad",
    micro_batch: str | int = MICRO_BATCH,
    dtype: str | None = None,
) -> ClipReward:
    """Human Preference Score v2 or v2.1 (arXiv 2306.09341): the cosine, about 0.2..0.35.

    path        a local checkpoint in place of the hub's HPS_v2_compressed.pt or HPS_v2.1_compressed.pt
    model       its architecture, a name or folder of open_clip
    preprocess  pad: the official one, the whole picture with black bars; crop: CLIP's own, as ReNO has it
    """

    def load() -> Backbone:
        file = path or HPS[version].fetch()
        tensors = read_checkpoint(file)
        backbone = open_clip_architecture(model)
        load_weights(backbone.model, tensors, f"{version}: {file}")
        return backbone

    name = named(version, preprocess=(preprocess, "pad"))
    return ClipReward(name, load, "cosine", preprocess, micro_batch, dtype)


hpsv2 = partial(hps, "hpsv2")
hpsv21 = partial(hps, "hpsv2.1")


def named(name: str, **options: tuple[str, str]) -> str:
    """A reward's name with the options that change its scores, where they are not the usual: (given, usual) each.

    Calibrations and parts go by name: two scales must not share one.
    """
    return ",".join([name, *(f"{option}={given}" for option, (given, usual) in options.items() if given != usual)])
