"""ImageReward v1.0: human preference for an image given its prompt (arXiv 2304.05977)."""

import re
from collections.abc import Sequence
from functools import partial
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from steer.reward import RewardError, token_count, with_truncation_warning
from steer.rewards import weights
from steer.rewards.images import PromptCache, at_least_float32, in_micro_batches, normalise, resize_and_crop
from steer.rewards.inputs import takes_any_images

WEIGHTS = weights.HubFile("zai-org/ImageReward", "ImageReward.pt", "5736be03b2652728fb87788c9797b0570450ab72")
VOCABULARY = weights.HubFile("google-bert/bert-base-uncased", "vocab.txt", "86b5e0934494bd15c9632b12f734a8a67f723594")
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # statistics of the raw scores, as published with the weights
TOKENS = 35  # per prompt: shorter ones are padded, longer ones cut
HEAD = 64  # width of an attention head in both towers

VISION, TEXT, SCORER = "blip.visual_encoder.", "blip.text_encoder.", "mlp.layers."
# Keys of the published file that no score needs: parts of BLIP's contrastive training, and the position ids.
UNUSED_KEYS = ("blip.vision_proj.", "blip.text_proj.", f"{TEXT}embeddings.position_ids")
# Key names of the visual encoder: published (timm) → transformers.
KEY_RENAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.(\d+)\.norm([12])\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.attn\.", r"encoder.layers.\1.self_attn."),
    (r"^blocks\.", "encoder.layers."),
)


class ImageReward:
    """Score standardised by the published mean and deviation: 0 is average, most images lie in −2..2.

    Images of any size are cropped to their middle square and resized (to 224 px officially); prompts are truncated to
    35 tokens. Differentiable. The model moves from the CPU to the device of the images; scores are fp32 there.

    path         a checkpoint in the layout of ImageReward.pt, of any size; None: download that one
    tokenizer    a folder with BERT's vocab.txt or tokenizer.json; None: download bert-base-uncased
    micro_batch  images per micro-batch; changes no score
    dtype        precision of the two towers: float32 (None), float16 or bfloat16; the scorer on top stays in fp32
    Raises RewardError if a file cannot be downloaded or read, or does not match, and for unknown options.
    """

    name = "imagereward"
    prompt_limit = TOKENS
    differentiable = True

    def __init__(
        self,
        *,
        path: str | None = None,
        tokenizer: str | None = None,
        micro_batch: int | str = 16,
        dtype: str | None = None,
    ) -> None:
        self._standardised = in_micro_batches(self._score, micro_batch)
        file = Path(path) if path is not None else WEIGHTS.fetch()
        self._network = _load(file)
        weights.cast(self._network, None)
        weights.cast(self._network.blip, dtype)
        self._tokenizer = _tokenizer(tokenizer, self._network.vocabulary)
        count = partial(token_count, self._tokenizer)
        self._tokens = PromptCache(with_truncation_warning("reward 'imagereward'", self._tokenize, count, TOKENS))

    @takes_any_images
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._standardised(images, prompts).float()

    def _score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Compute scores (N,) in the scorer's dtype."""
        images = weights.to_module_device(images, self._network)
        ids, mask = self._tokens(prompts).to(images.device).unbind(1)
        raw = self._network(normalise(resize_and_crop(at_least_float32(images), self._network.side)), ids, mask)
        return (raw - MEAN) / STD

    def _tokenize(self, prompts: list[str]) -> Tensor:
        """Tokenize prompts as (N, 2, 35): token ids, and the mask with 1 for a token, 0 for padding."""
        tokens = self._tokenizer(prompts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
        return torch.stack([tokens.input_ids, tokens.attention_mask], 1)


class _Network(nn.Module):
    """BLIP's two towers and the scorer, under the key names of the published file."""

    def __init__(self, vision: BlipVisionConfig, text: BlipTextConfig, sizes: Sequence[int]) -> None:
        super().__init__()
        self.side: int = vision.image_size
        self.vocabulary: int = text.vocab_size
        self.blip = nn.ModuleDict(
            {"visual_encoder": BlipVisionModel(vision), "text_encoder": BlipTextModel(text, add_pooling_layer=False)}
        )
        self.mlp = nn.ModuleDict(
            {"layers": weights.linear_layers(sizes, weights.LINEAR_LAYOUT)}
        )  # there are no activations between them

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Compute raw scores (N,) of pixels (N, 3, side, side) and of token ids and their mask, each (N, 35)."""
        image_states = self.blip["visual_encoder"](pixels).last_hidden_state
        # Bidirectional self-attention and cross-attention to the image: an encoder, though the config says decoder.
        text_states = self.blip["text_encoder"](
            ids, attention_mask=mask, encoder_hidden_states=image_states, is_decoder=False
        )
        first = text_states.last_hidden_state[:, 0]
        scorer = self.mlp["layers"]
        return scorer(first.to(next(scorer.parameters()).dtype))[:, 0]


def _load(path: Path) -> _Network:
    """Load the network of a checkpoint; its tensors determine the dimensions. Raises RewardError."""
    what = f"imagereward ({path})"
    state = weights.read_checkpoint(path)
    vision = _vision_config(state, what)
    text = _text_config(state, what, vision.hidden_size)
    for width in (vision.hidden_size, text.hidden_size):
        if width < HEAD or width % HEAD:
            problem = f"an encoder has width {width}, which is no multiple of {HEAD}"
            raise RewardError(f"{what}: not an ImageReward checkpoint: {problem}")
    layout = weights.LINEAR_LAYOUT
    sizes = [text.hidden_size, *(_shape(state, f"{SCORER}{k}.weight", 2, what)[0] for k in layout[:-1]), 1]
    # On the meta device: nothing is initialised needlessly, and no random number is drawn.
    with torch.device("meta"):
        network = _Network(vision, text, sizes)
    network.to_empty(device="cpu")
    weights.load_weights(network, {_renamed(key): tensor for key, tensor in state.items()}, what, UNUSED_KEYS)
    # The position ids are a non-persistent buffer.
    embeddings: Any = network.blip["text_encoder"].embeddings
    embeddings.position_ids = torch.arange(text.max_position_embeddings)[None]
    return network


def _renamed(key: str) -> str:
    if not key.startswith(VISION):
        return key
    name = key.removeprefix(VISION)
    return VISION + next((re.sub(old, new, name) for old, new in KEY_RENAMES if re.search(old, name)), name)


def _vision_config(state: weights.State, what: str) -> BlipVisionConfig:
    width, _, patch, _ = _shape(state, f"{VISION}patch_embed.proj.weight", 4, what)
    patches = _shape(state, f"{VISION}pos_embed", 3, what)[1] - 1
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=_shape(state, f"{VISION}blocks.0.mlp.fc1.weight", 2, what)[0],
        num_hidden_layers=_layers(state, f"{VISION}blocks."),
        num_attention_heads=max(width // HEAD, 1),
        image_size=patch * isqrt(max(patches, 0)),
        patch_size=patch,
        layer_norm_eps=1e-6,
    )


def _text_config(state: weights.State, what: str, image_width: int) -> BlipTextConfig:
    """Configure the text tower; `image_width` is the width of the visual tower, to which it attends."""
    vocabulary, width = _shape(state, f"{TEXT}embeddings.word_embeddings.weight", 2, what)
    positions = _shape(state, f"{TEXT}embeddings.position_embeddings.weight", 2, what)[0]
    if positions < TOKENS:
        raise RewardError(f"{what}: its text encoder has {positions} positions, ImageReward needs at least {TOKENS}")
    return BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=image_width,
        intermediate_size=_shape(state, f"{TEXT}encoder.layer.0.intermediate.dense.weight", 2, what)[0],
        num_hidden_layers=_layers(state, f"{TEXT}encoder.layer."),
        num_attention_heads=max(width // HEAD, 1),
        max_position_embeddings=positions,
        layer_norm_eps=1e-12,
        is_decoder=True,  # gives every layer its cross-attention
        # Unused; transformers would warn if a small vocabulary lacks them.
        bos_token_id=None,
        sep_token_id=None,
    )


def _shape(state: weights.State, key: str, dimensions: int, what: str) -> torch.Size:
    if key not in state or state[key].dim() != dimensions:
        got = f"is of shape {tuple(state[key].shape)}" if key in state else "is missing"
        raise RewardError(f"{what}: not an ImageReward checkpoint: {key} {got}, expected {dimensions} dimensions")
    return state[key].shape


def _layers(state: weights.State, prefix: str) -> int:
    """Count the layers under a prefix; a count, so that one stray key cannot ask for a thousand layers."""
    return len({key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)})


def _tokenizer(folder: str | None, vocabulary: int) -> Any:
    """Load BERT's tokenizer with the two tokens that BLIP added. Raises RewardError if it does not match."""
    # Download one file, then load a local folder: given the repository's name and no network, transformers 5 retries
    # for minutes and then silently returns a tokenizer of five tokens.
    try:
        path = Path(folder) if folder is not None else VOCABULARY.fetch().parent
    except RewardError as error:
        raise RewardError(f"{error}, and its tokenizer by tokenizer=FOLDER") from error
    if not any((path / name).is_file() for name in ("vocab.txt", "tokenizer.json")):
        raise RewardError(f"imagereward:tokenizer={folder}: name a folder with BERT's vocab.txt or tokenizer.json")
    tokenizer = BertTokenizer.from_pretrained(path, local_files_only=True)
    tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
    if len(tokenizer) != vocabulary:
        raise RewardError(
            f"imagereward: the tokenizer in {path} has {len(tokenizer)} tokens, the checkpoint {vocabulary}: "
            "name the folder of the tokenizer that it was trained with, tokenizer=…"
        )
    return tokenizer
