"""A CLIP of either maker (open_clip, transformers) behind one face: images and prompts to features."""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import torch
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPModel

from steer.assets import CLIPS
from steer.choices import nearest
from steer.reward import RewardError
from steer.rewards.preprocess import CLIP_MEAN, CLIP_STD, Preprocess, normalise, resize_and_crop
from steer.rewards.weights import NO_NETWORK

CONFIG = "open_clip_config.json"
DEFAULT_CLIP = "openai/clip-vit-large-patch14"
LAION_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
PICKSCORE = "yuvalkirstain/PickScore_v1"
REVISIONS = {
    DEFAULT_CLIP: "32bd64288804d66eefd0ccbe215aa642df71cc41",
    LAION_H: "1c2b8495b28150b8a4922ee1c8edee224c284c0c",
    PICKSCORE: "a4e4367c6dfa7288a00c550414478f865b875800",
}
# What loading a folder or a hub repository may raise: files that are missing, broken or of another model.
LOADING = (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError, HFValidationError)


class Backbone(nn.Module):
    """Features of images (N, 3, H, W) in [0, 1] and of prompts, in one space of D dimensions.

    model        the open_clip or transformers module
    image, text  its two encoders: pixels (N, 3, size, size) → (N, D), token ids (N, L) → (N, D)
    tokenize     prompts → token ids (N, L), padded to one length whatever the prompts
    size         pixels per side that it sees
    """

    def __init__(
        self,
        model: nn.Module,
        image: Callable[[Tensor], Tensor],
        text: Callable[[Tensor], Tensor],
        tokenize: Callable[[list[str]], Tensor],
        size: int,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
    ) -> None:
        super().__init__()
        self.model = model
        self.size, self.mean, self.std = size, tuple(mean), tuple(std)
        self._image, self._text, self._tokenize = image, text, tokenize

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights; features are computed in it."""
        return next(self.model.parameters()).dtype

    @property
    def width(self) -> int:
        """D."""
        with torch.no_grad():
            return self.texts([""]).shape[-1]

    @property
    def logit_scale(self) -> Tensor:
        """exp of the learned log temperature; about 100 for published models."""
        scale: Any = self.model.logit_scale
        return _wide(scale).exp()

    def images(self, images: Tensor, preprocess: Preprocess = resize_and_crop) -> Tensor:
        """(N, D), of unit length, at least fp32; differentiable."""
        pixels = normalise(preprocess(_wide(images), self.size), self.mean, self.std)
        return F.normalize(_wide(self._image(pixels.to(self.dtype))), dim=-1)

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """(N, D), of unit length, at least fp32."""
        ids = self._tokenize(list(prompts)).to(next(self.model.parameters()).device)
        return F.normalize(_wide(self._text(ids)), dim=-1)


def _wide(tensor: Tensor) -> Tensor:
    """At least fp32; fp64 stays."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def open_clip_backbone(model: nn.Module, tokenizer: Callable[[list[str]], Tensor]) -> Backbone:
    """Of an open_clip model and its tokenizer."""
    made: Any = model
    size = made.visual.image_size
    mean, std = made.visual.preprocess_cfg["mean"], made.visual.preprocess_cfg["std"]
    side = size[0] if isinstance(size, tuple | list) else size
    return Backbone(made, made.encode_image, made.encode_text, tokenizer, side, mean, std)


def transformers_backbone(model: CLIPModel, tokenizer: Any) -> Backbone:
    """Of a CLIPModel of transformers and its tokenizer. Raises ValueError where they do not belong together."""
    known, wanted = len(tokenizer), model.config.text_config.vocab_size
    if known != wanted:  # what transformers makes of a tokenizer whose files it did not find has a handful of words
        raise ValueError(f"its tokenizer knows {known} tokens, the model {wanted}; are the tokenizer's files there?")
    length = model.config.text_config.max_position_embeddings

    def tokenize(prompts: list[str]) -> Tensor:
        options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
        ids: Tensor = tokenizer(prompts, **options).input_ids
        return ids

    return Backbone(
        model,
        lambda pixels: model.get_image_features(pixel_values=pixels).pooler_output,
        lambda ids: model.get_text_features(input_ids=ids).pooler_output,
        tokenize,
        model.config.vision_config.image_size,
    )


def load_backbone(name: str, tokenizer: str | None = None) -> Backbone:
    """A CLIP by name: embedded, ARCHITECTURE/TAG of open_clip, ORGANISATION/NAME on the hub, a folder of either maker.

    tokenizer  another repository or folder to take a transformers tokenizer from
    Repositories in REVISIONS come at that revision, others at their newest.
    Raises RewardError, one line that names it, where it cannot be loaded. No code of a folder is run.
    """
    architecture, _, tag = name.partition("/")
    folder = clip_folder(name)
    try:
        if (folder / CONFIG).is_file():
            return open_clip_folder(folder)
        if architecture in open_clip.list_models() and not Path(name).is_dir():
            return _published(architecture, tag)
        model = CLIPModel.from_pretrained(name, revision=REVISIONS.get(name))
        read = AutoTokenizer.from_pretrained(tokenizer or name, revision=REVISIONS.get(tokenizer or name))
        return transformers_backbone(model, read)
    except LOADING as error:
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise RewardError(f"CLIP {name!r} cannot be loaded: {reason[:160]}; {NO_NETWORK}") from error


def clip_folder(name: str) -> Path:
    """Where an embedded CLIP, or one in a folder, lies."""
    return CLIPS.get(name, Path(name))


def _published(architecture: str, tag: str) -> Backbone:
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if tag not in tags:
        near = nearest(tag, tags)
        raise RewardError(f"CLIP {architecture!r} has no weights {tag!r}: write {architecture}/TAG, TAG being {near}")
    with _quiet():
        model = open_clip.create_model(architecture, pretrained=tag)
    return open_clip_backbone(model, open_clip.get_tokenizer(architecture))


def open_clip_folder(folder: Path, weights: bool = True) -> Backbone:
    """A folder in open_clip's own format: open_clip_config.json, the tokenizer's files, open_clip_model.safetensors.

    weights  False: a fresh model of that configuration
    """
    config = json.loads((folder / CONFIG).read_text())["model_cfg"]
    # These options would reach a loader that may run a repository's code.
    if config["text_cfg"].get("tokenizer_kwargs") or config["text_cfg"].get("hf_model_name"):
        raise RewardError(
            f"{folder / CONFIG}: tokenizer_kwargs and hf_model_name are not read from a folder; remove them"
        )
    name = f"local-dir:{folder}"
    with _quiet():
        model = open_clip.create_model(name, load_weights=weights, require_pretrained=weights)
        return open_clip_backbone(model, open_clip.get_tokenizer(name))


@contextmanager
def _quiet() -> Iterator[None]:
    """open_clip tells the root logger about every step, and warns of what was asked for."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
