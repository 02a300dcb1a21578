"""Rewards by a CLIP: CLIPScore, PickScore, HPSv2.

All are differentiable through their preprocessing, cache the features of prompts and process images in micro-batches;
their weights move from the CPU to the device of the images. Common options, after the name:

path=FILE|FOLDER  local weights           dtype=float32|float16|bfloat16  precision of the model
micro_batch=N     images per micro-batch  preprocess=crop|pad             as CLIP, or as HPSv2
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer

from steer.assets import CLIPS
from steer.files import verify_checksums
from steer.registry import choose, nearest
from steer.reward import RewardError, token_count, with_truncation_warning
from steer.rewards.images import (
    CLIP_MEAN,
    CLIP_STD,
    PREPROCESS,
    Preprocess,
    PromptCache,
    at_least_float32,
    in_micro_batches,
    normalise,
    resize_and_crop,
)
from steer.rewards.inputs import takes_any_images
from steer.rewards.weights import (
    NO_NETWORK,
    HubFile,
    cast,
    check_dtype,
    check_keys,
    load_weights,
    read_checkpoint,
    to_module_device,
)
from steer.tables import one_line

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
BACKGROUND = "background.safetensors"  # features of images of all kinds, for `like:FOLDER`
DEFAULT_CLIP = "openai/clip-vit-large-patch14"
LAION_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
PICKSCORE = "yuvalkirstain/PickScore_v1"
REVISIONS = {
    DEFAULT_CLIP: "32bd64288804d66eefd0ccbe215aa642df71cc41",
    LAION_H: "1c2b8495b28150b8a4922ee1c8edee224c284c0c",
    PICKSCORE: "a4e4367c6dfa7288a00c550414478f865b875800",
}
# Some models pad their vocabulary: a tokenizer may have fewer tokens, by up to this share.
VOCABULARY_SLACK = 0.1


class Backbone(nn.Module):
    """Encoder of images (N, 3, H, W) in [0, 1] and of prompts, into one space of D dimensions.

    model        the open_clip or transformers module
    image, text  its two encoders: pixels (N, 3, size, size) → (N, D), token ids (N, L) → (N, D)
    layers       pixels → the image embedding (N, D) and the mean over places of the middle layer (N, W)
    tokenize     prompts → token ids (N, L), padded to a fixed length
    size         input pixels per side
    limit        maximum number of tokens of a prompt;  count: prompt → number of its tokens
    """

    def __init__(
        self,
        model: nn.Module,
        image: Callable[[Tensor], Tensor],
        text: Callable[[Tensor], Tensor],
        layers: Callable[[Tensor], tuple[Tensor, Tensor]],
        tokenize: Callable[[list[str]], Tensor],
        size: int,
        limit: int,
        count: Callable[[str], int],
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
    ) -> None:
        super().__init__()
        self.model = model
        self.size, self.mean, self.std = size, tuple(mean), tuple(std)
        self.limit, self.count = limit, count
        self._image, self._text, self._layers, self._tokenize = image, text, layers, tokenize

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the weights, in which features are computed."""
        return next(self.model.parameters()).dtype

    @property
    def width(self) -> int:
        """Return D."""
        with torch.no_grad():
            return self.texts([""]).shape[-1]

    @property
    def logit_scale(self) -> Tensor:
        """Return exp of the learned log temperature; about 100 for published models."""
        scale: Any = self.model.logit_scale
        return at_least_float32(scale).exp()

    def images(self, images: Tensor, preprocess: Preprocess = resize_and_crop) -> Tensor:
        """Encode images as vectors (N, D) of unit length, at least fp32; differentiable."""
        return F.normalize(at_least_float32(self._image(self._pixels(images, preprocess))), dim=-1)

    def image_layers(self, images: Tensor) -> Tensor:
        """Encode images by two layers: (N, D + W), the embedding of unit length and the mean of the middle layer."""
        last, middle = map(at_least_float32, self._layers(self._pixels(images, resize_and_crop)))
        return torch.cat([F.normalize(last, dim=-1), middle], 1)

    def _pixels(self, images: Tensor, preprocess: Preprocess) -> Tensor:
        return normalise(preprocess(at_least_float32(images), self.size), self.mean, self.std).to(self.dtype)

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Encode prompts as vectors (N, D) of unit length, at least fp32."""
        ids = self._tokenize(list(prompts)).to(next(self.model.parameters()).device)
        return F.normalize(at_least_float32(self._text(ids)), dim=-1)

    def prompt_cache(self, reward: str) -> PromptCache:
        """Return a cache of prompt features for a reward, which warns of prompts longer than the limit."""
        return PromptCache(with_truncation_warning(f"reward {reward!r}", self.texts, self.count, self.limit))


def open_clip_backbone(model: Any, tokenizer: Any) -> Backbone:
    """Wrap an open_clip model and its tokenizer."""
    size = model.visual.image_size
    mean, std = model.visual.preprocess_cfg["mean"], model.visual.preprocess_cfg["std"]
    side = size[0] if isinstance(size, tuple | list) else size

    def count(prompt: str) -> int:
        if hasattr(tokenizer, "tokenizer"):  # a tokenizer of transformers
            return token_count(tokenizer.tokenizer, prompt)
        return len(tokenizer.encode(prompt)) + 2  # with the start and end tokens

    def layers(pixels: Tensor) -> tuple[Tensor, Tensor]:
        out = model.visual.forward_intermediates(pixels)
        blocks = out["image_intermediates"]
        return out["image_features"], blocks[(len(blocks) - 1) // 2].mean((2, 3))

    limit = int(tokenizer.context_length)
    return Backbone(model, model.encode_image, model.encode_text, layers, tokenizer, side, limit, count, mean, std)


def transformers_backbone(model: CLIPModel, tokenizer: Any) -> Backbone:
    """Wrap a CLIPModel of transformers and its tokenizer. Raises RewardError if they do not match."""
    _check_vocabulary(len(tokenizer), model.config.text_config.vocab_size)
    length = model.config.text_config.max_position_embeddings
    tokens = partial(tokenizer, padding="max_length", max_length=length, truncation=True, return_tensors="pt")

    def layers(pixels: Tensor) -> tuple[Tensor, Tensor]:
        out = model.get_image_features(pixel_values=pixels, output_hidden_states=True)
        return out.pooler_output, out.hidden_states[len(out.hidden_states) // 2][:, 1:].mean(1)  # no class token

    return Backbone(
        model,
        lambda pixels: model.get_image_features(pixel_values=pixels).pooler_output,
        lambda ids: model.get_text_features(input_ids=ids).pooler_output,
        layers,
        lambda prompts: tokens(prompts).input_ids,
        model.config.vision_config.image_size,
        length,
        partial(token_count, tokenizer),
    )


def _check_vocabulary(known: int, expected: int) -> None:
    """Raise RewardError if the tokenizer has `known` tokens and the model `expected`, and they do not match.

    transformers silently builds a tokenizer with a handful of tokens if its files are missing.
    """
    if not (1 - VOCABULARY_SLACK) * expected <= known <= expected:
        raise RewardError(f"its tokenizer has {known} tokens, the model {expected}; are the tokenizer's files there?")


def load_backbone(name: str, tokenizer: str | None = None) -> Backbone:
    """Load a CLIP: an embedded one, ARCHITECTURE/TAG of open_clip, ORGANISATION/NAME on the hub, or a folder of either.

    tokenizer  another repository or folder to take a transformers tokenizer from
    Repositories in REVISIONS are loaded at that revision, others at their newest. Pixels are normalised by OpenAI's
    mean and deviation for a transformers CLIP, and by its configuration for an open_clip one. Weights are fp32.
    Raises RewardError, with one line that names the CLIP, if it cannot be loaded. Code in a folder is never run.
    """
    architecture, _, tag = name.partition("/")
    folder = clip_folder(name)
    if (folder / CONFIG).is_file():
        return open_clip_folder(folder)
    if folder.is_dir() and not (folder / "config.json").is_file():  # transformers would use its default configuration
        raise RewardError(f"CLIP {name!r} has neither {CONFIG} nor config.json")
    with loading(f"CLIP {name!r}", "" if folder.is_dir() else NO_NETWORK):
        if architecture in open_clip.list_models() and not folder.is_dir():
            return _load_open_clip(architecture, tag)
        return _load_transformers(name, tokenizer)


def clip_folder(name: str) -> Path:
    """Return the folder of an embedded CLIP, or the given folder."""
    return CLIPS.get(name, Path(name))


def open_clip_folder(folder: Path, weights: bool = True) -> Backbone:
    """Load a folder of open_clip's format: open_clip_config.json, the tokenizer's files, open_clip_model.safetensors.

    weights  False: an untrained model of that configuration
    Raises RewardError, with one line that names the folder. Code in it is never run.
    """
    with loading(f"CLIP {str(folder)!r}"):
        verify_checksums(*sorted(path for path in folder.iterdir() if path.is_file()))
        config = json.loads((folder / CONFIG).read_text())["model_cfg"]
        _check_folder(folder, config)
        name = f"local-dir:{folder}"
        tokenizer: Any = open_clip.get_tokenizer(name)
        known = len(tokenizer.tokenizer) if hasattr(tokenizer, "tokenizer") else tokenizer.vocab_size
        _check_vocabulary(known, config["text_cfg"].get("vocab_size", open_clip.CLIPTextCfg.vocab_size))
        model = open_clip.create_model(name, load_weights=weights, require_pretrained=weights)
        return open_clip_backbone(model, tokenizer)


def open_clip_architecture(name: str) -> Backbone:
    """Build an untrained open_clip model from its architecture's name or the folder of its configuration."""
    folder = clip_folder(name)
    if folder.is_dir():
        return open_clip_folder(folder, weights=False)
    if name not in open_clip.list_models():
        raise RewardError(f"model={name}: not an architecture of open_clip, nor a folder with its configuration")
    with loading(f"CLIP {name!r}", NO_NETWORK):
        return open_clip_backbone(open_clip.create_model(name), open_clip.get_tokenizer(name))


def _load_open_clip(architecture: str, tag: str) -> Backbone:
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if tag not in tags:
        near = nearest(tag, tags)
        raise RewardError(f"no weights {tag!r} are published: write {architecture}/TAG, TAG being {near}")
    # open_clip only warns if the architecture's GELU is not the one that the weights were trained with.
    quick = bool(open_clip.get_pretrained_cfg(architecture, tag).get("quick_gelu"))
    model = open_clip.create_model(architecture, pretrained=tag, force_quick_gelu=quick)
    return open_clip_backbone(model, open_clip.get_tokenizer(architecture))


def _load_transformers(name: str, tokenizer: str | None) -> Backbone:
    # transformers only warns about missing keys and initialises them; a configuration could ask for any attention.
    model, info = CLIPModel.from_pretrained(
        name,
        revision=REVISIONS.get(name),
        local_files_only=Path(name).is_dir(),
        dtype=torch.float32,
        attn_implementation="sdpa",
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    mismatched = {key for key, *_ in info["mismatched_keys"]}
    problems = {"missing": info["missing_keys"], "unexpected": info["unexpected_keys"]}
    check_keys(f"CLIP {name!r}", problems | {"of another shape": mismatched})
    source = tokenizer or name
    read = CLIPTokenizer.from_pretrained(source, revision=REVISIONS.get(source), local_files_only=Path(source).is_dir())
    return transformers_backbone(model, read)


def _check_folder(folder: Path, config: dict[str, Any]) -> None:
    """Raise RewardError if a folder asks for a loader that may run code, or for files from elsewhere."""
    unsupported = [key for key in ("tokenizer_kwargs", "hf_model_name") if config["text_cfg"].get(key)]
    unsupported += ["timm_model_name"] if ":" in str(config["vision_cfg"].get("timm_model_name")) else []
    for file in (folder / "tokenizer_config.json", folder / "config.json"):
        if file.is_file() and "auto_map" in json.loads(file.read_text()):
            unsupported.append("auto_map")
    if unsupported:
        raise RewardError(f"CLIP {str(folder)!r}: {' and '.join(unsupported)} are not read from a folder; remove them")


@contextmanager
def loading(what: str, remedy: str = "") -> Iterator[None]:
    """Guard loading by other libraries: warnings pass, the random state is kept, errors become one line."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)  # open_clip logs every step at the root

    def keep(record: logging.LogRecord) -> bool:
        """Drop warnings about weights that are loaded and checked after the model is built."""
        message = record.getMessage()
        other = message.startswith("Multiple checkpoints found") and "member-0.safetensors" in message
        return not other and not message.startswith("No pretrained weights loaded for model")

    logging.root.addFilter(keep)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    except RewardError as error:
        raise RewardError(str(error) if what in str(error) else f"{what}: {error}") from error
    except Exception as error:  # two libraries and untrusted files: the errors are not documented
        info = f"{what} cannot be loaded: {one_line(error)}"
        raise RewardError(f"{info}; {remedy}" if remedy else info) from error
    finally:
        logging.disable(before)
        logging.root.removeFilter(keep)


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


# Functions of the cosine of image and text, −1..1 (published models: about 0.1..0.4), and CLIP's learned scale exp(t).
UNITS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "cosine": lambda similarity, scale: similarity,
    "logit": lambda similarity, scale: scale * similarity,  # CLIP's training logit, about 100 times the cosine
    # 0..100 (CLIPScore, arXiv 2104.08718, rescaled as is common now).
    "clipscore": lambda similarity, scale: 100 * similarity.clamp(min=0),
}


class ClipReward:
    """Similarity of image and prompt by a CLIP: (N,) in one of the units above, at least fp32.

    `load` is called after the options are validated. The published temperature stays in fp32 whatever the dtype:
    rounded to half precision it would change all scores by up to 2 %.
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
        self._texts = self.backbone.prompt_cache(name)

    @takes_any_images
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._batched(to_module_device(images, self.backbone), prompts)

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
    """Load CLIPScore (arXiv 2104.08718) with any CLIP: scenes, ARCHITECTURE/TAG, ORGANISATION/NAME, a folder.

    unit  cosine (default), logit or clipscore
    """
    name = "clip" if model == DEFAULT_CLIP else f"clip:{model}"
    name = reward_name(name, unit=(unit, "cosine"), preprocess=(preprocess, "crop"))
    return ClipReward(name, partial(load_backbone, model), unit, preprocess, micro_batch, dtype)


def pickscore(
    *, path: str | None = None, unit: str = "logit", micro_batch: str | int = MICRO_BATCH, dtype: str | None = None
) -> ClipReward:
    """Load PickScore v1 (arXiv 2305.01569): exp(t) cos(image, text), about 15..25; often divided by 26.

    path  a local folder as CLIPModel.save_pretrained writes it, with its tokenizer
    """
    if path and not Path(path).is_dir():
        raise RewardError(f"pickscore:path={path}: no such folder")
    # The published repository has no tokenizer: PickScore uses the tokenizer of the CLIP that it is finetuned from.
    load = partial(load_backbone, path or PICKSCORE, None if path else LAION_H)
    return ClipReward(reward_name("pickscore", unit=(unit, "logit")), load, unit, "crop", micro_batch, dtype)


def _finetuned(reward: str, source: str | HubFile, model: str, unused: Sequence[str] = ()) -> Backbone:
    """Build an open_clip model and load finetuned weights, a state dict without a key prefix."""
    file = source.fetch() if isinstance(source, HubFile) else source
    tensors = read_checkpoint(file)
    backbone = open_clip_architecture(model)
    load_weights(backbone.model, tensors, f"{reward}: {file}", unused)
    return backbone


def hps(
    version: str,
    *,
    path: str | None = None,
    model: str = "ViT-H-14",
    preprocess: str = "pad",
    micro_batch: str | int = MICRO_BATCH,
    dtype: str | None = None,
) -> ClipReward:
    """Load Human Preference Score v2 or v2.1 (arXiv 2306.09341): the cosine, about 0.2..0.35.

    path        a local checkpoint in place of the hub's HPS_v2_compressed.pt or HPS_v2.1_compressed.pt
    model       architecture of the checkpoint, a name or folder of open_clip
    preprocess  pad: the official one, the whole image with black bars; crop: CLIP's, used by ReNO
    """
    load = partial(_finetuned, version, path or HPS[version], model)
    name = reward_name(version, preprocess=(preprocess, "pad"))
    return ClipReward(name, load, "cosine", preprocess, micro_batch, dtype)


hpsv2 = partial(hps, "hpsv2")
hpsv21 = partial(hps, "hpsv2.1")


def social(
    *,
    path: str | None = None,
    model: str = "ViT-L-14-quickgelu",
    micro_batch: str | int = MICRO_BATCH,
    dtype: str | None = None,
) -> ClipReward:
    """Load a Social Reward (arXiv 2402.09872): the cosine by OpenAI's ViT-L/14, finetuned on a platform's counts.

    path   checkpoint, a state dict of OpenAI's CLIP; required, because none is public
    model  architecture of the checkpoint, a name or folder of open_clip
    """
    if path is None:
        raise RewardError("social: no weights are public: give social:path=FILE, or train your own on counts")
    counts = ("input_resolution", "context_length", "vocab_size")  # keys of OpenAI's scripted models
    return ClipReward(
        "social", partial(_finetuned, "social", path, model, counts), "cosine", "crop", micro_batch, dtype
    )


def reward_name(name: str, **options: tuple[str, str]) -> str:
    """Append to a name the options that change scores and differ from their default, each as (given, default).

    Calibrations and components are keyed by name: two scales must not share a name.
    """
    return ",".join([name, *(f"{option}={given}" for option, (given, usual) in options.items() if given != usual)])
