"""MPS, the Multi-dimensional Preference Score: CLIP-H with image tokens that attend to the words of a condition.

Source: Zhang et al., CVPR 2024; github.com/Kwai-Kolors/MPS.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from steer.registry import choose
from steer.reward import RewardError, token_count, with_truncation_warning
from steer.rewards import weights
from steer.rewards.clip import LAION_H, REVISIONS, loading
from steer.rewards.images import PromptCache, at_least_float32, in_micro_batches, normalise, resize_and_crop
from steer.rewards.inputs import takes_any_images

# The words of the condition that the published checkpoint was trained with, "overall".
CONDITIONS = {
    "overall": "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, "
    "instance, texture, quantity, attributes, position, number, location, word, things."
}
THRESHOLD = 0.3  # minimum similarity of a word to the condition, relative to the prompt's most similar word
UNUSED_KEYS = ("model.text_model.embeddings.position_ids", "model.vision_model.embeddings.position_ids")
CACHED_PROMPTS = 256  # prompts with 78 vectors each


class MPS:
    """exp(t) · cos(prompt, image tokens fused with the prompt's words that concern the condition); differentiable.

    path         the model's state dict. The published file is a pickle of the whole model, which would run code: load
                 it once in a separate, trusted environment, and save its `state_dict()`
    base         a folder with CLIP's configuration and tokenizer; None: LAION's CLIP-H on the hub
    condition    overall;  micro_batch: images per micro-batch;  dtype: precision of CLIP and the fusion
    Raises RewardError if a file cannot be read or does not match.
    """

    name = "mps"
    differentiable = True

    def __init__(
        self,
        *,
        path: str | None = None,
        base: str | None = None,
        condition: str = "overall",
        micro_batch: str | int = 16,
        dtype: str | None = None,
    ) -> None:
        words = choose("condition", condition, CONDITIONS)
        self._batched = in_micro_batches(self._score, micro_batch)
        if path is None:
            raise RewardError(
                "mps: the published checkpoint is a pickle, which is not downloaded: convert it to a state dict and "
                "name that, mps:path=MPS.pth"
            )
        self._tokenizer, self._network = _load(Path(path), base or LAION_H)
        weights.cast(self._network, dtype)
        self.prompt_limit = self._limit = self._network.clip.config.text_config.max_position_embeddings
        count = partial(token_count, self._tokenizer)
        encode = with_truncation_warning("reward 'mps'", self._encode, count, self._limit)
        self._texts, self._condition = PromptCache(encode, CACHED_PROMPTS), self._encode([words])[0, :-1]

    @takes_any_images
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._batched(weights.to_module_device(images, self._network), prompts)

    def _score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        texts = self._texts(prompts).to(images.device)
        words, whole = texts[:, :-1], texts[:, -1]
        # (N, L): the similarity of each word of the prompt to the nearest word of the condition.
        similarity = torch.einsum("nld,cd->nlc", words, self._condition.to(images.device)).amax(2)
        relevant = similarity / similarity.amax(1, keepdim=True) > THRESHOLD
        network = self._network
        size = network.clip.config.vision_config.image_size
        pixels = normalise(resize_and_crop(at_least_float32(images), size)).to(words.dtype)
        tokens = network.clip.visual_projection(network.clip.vision_model(pixels).last_hidden_state)
        fused = network.cross_model(tokens, words, relevant)[:, 0]
        cosine = F.cosine_similarity(at_least_float32(fused), at_least_float32(whole))
        return at_least_float32(network.clip.logit_scale).exp() * cosine

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> Tensor:
        """Encode prompts as (N, L + 1, D): the projected tokens and, last, the projected pooled state."""
        ids = self._tokenizer(
            prompts, padding="max_length", max_length=self._limit, truncation=True, return_tensors="pt"
        ).input_ids
        clip = self._network.clip
        states = clip.text_model(ids.to(clip.logit_scale.device))
        return clip.text_projection(torch.cat([states.last_hidden_state, states.pooler_output[:, None]], 1))


class _Network(nn.Module):
    """CLIP and the fusion of its tokens; the published names are model.* and cross_model.*."""

    def __init__(self, config: CLIPConfig, layers: int, heads: int, head: int, mult: int) -> None:
        super().__init__()
        self.clip = CLIPModel(config)
        self.cross_model = _Fusion(config.projection_dim, layers, heads, head, mult)


class _Fusion(nn.Module):
    """Layers of cross-attention to the words, then self-attention; each parallel to a SwiGLU, with a residual."""

    def __init__(self, width: int, layers: int, heads: int, head: int, mult: int) -> None:
        super().__init__()
        pairs = [(_Cross(width, heads, head, mult), _Self(width, heads, head, mult)) for _ in range(layers)]
        wrapped = ([nn.ModuleDict({"fn": one}) for one in pair] for pair in pairs)  # the published keys have .fn.
        self.layers = nn.ModuleList([nn.ModuleList(pair) for pair in wrapped])

    def forward(self, tokens: Tensor, words: Tensor, relevant: Tensor) -> Tensor:
        layers: Any = self.layers
        for cross, own in layers:
            tokens = tokens + cross["fn"](tokens, words, relevant)
            tokens = tokens + own["fn"](tokens)
        return tokens


class _SwiGLU(nn.Module):
    """silu(gate) · value (arXiv 2002.05202); the gate is the second half."""

    def forward(self, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, -1)
        return F.silu(gate) * value


def _attend(queries: Tensor, keys: Tensor, values: Tensor, open_keys: Tensor | None = None) -> Tensor:
    """Multi-query attention (arXiv 1911.02150): queries (N, H, I, d), one head of keys and values (N, J, d)."""
    mask = None if open_keys is None else open_keys[:, None, None]
    out = F.scaled_dot_product_attention(queries, keys[:, None], values[:, None], attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


class _Cross(nn.Module):
    """Cross-attention of image tokens to the relevant words."""

    def __init__(self, width: int, heads: int, head: int, mult: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, heads * head, bias=False)
        self.to_kv = nn.Linear(width, 2 * head, bias=False)
        self.to_out = nn.Linear(heads * head, width, bias=False)
        inner = mult * width
        self.ff = nn.Sequential(nn.Linear(width, 2 * inner, bias=False), _SwiGLU(), nn.Linear(inner, width, bias=False))

    def forward(self, tokens: Tensor, words: Tensor, relevant: Tensor) -> Tensor:
        x = self.norm(tokens)
        queries = self.to_q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        keys, values = self.to_kv(words).chunk(2, -1)
        return self.to_out(_attend(queries, keys, values, relevant)) + self.ff(x)


class _Self(nn.Module):
    """Self-attention of image tokens with rotary positions."""

    def __init__(self, width: int, heads: int, head: int, mult: int) -> None:
        super().__init__()
        self.heads, self.parts = heads, (heads * head, head, head, 2 * mult * width)
        self.norm = nn.LayerNorm(width)
        self.rotary_emb = nn.Module()
        self.rotary_emb.register_buffer("inv_freq", torch.zeros(head // 2))
        self.fused_attn_ff_proj = nn.Linear(width, sum(self.parts), bias=False)
        self.attn_out = nn.Linear(heads * head, width, bias=False)
        self.ff_out = nn.Sequential(_SwiGLU(), nn.Linear(mult * width, width, bias=False))

    def forward(self, tokens: Tensor) -> Tensor:
        queries, keys, values, hidden = self.fused_attn_ff_proj(self.norm(tokens)).split(self.parts, -1)
        queries = queries.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        frequencies: Any = self.rotary_emb.inv_freq
        angles = torch.arange(tokens.shape[1], device=tokens.device)[:, None] * frequencies.float()
        angles = torch.cat([angles, angles], -1)
        queries, keys = (_rotate(one, angles) for one in (queries, keys))
        return self.attn_out(_attend(queries, keys, values)) + self.ff_out(hidden)


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate pairs (x_k, x_{k + d/2}) by angles (L, d) (arXiv 2104.09864)."""
    first, second = x.chunk(2, -1)
    return (x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()).to(x.dtype)


def _load(path: Path, base: str) -> tuple[CLIPTokenizer, Any]:
    """Load tokenizer and network of a state dict. Raises RewardError."""
    what, local = f"mps ({path})", Path(base).is_dir()
    state = weights.read_checkpoint(path)
    first = "cross_model.layers.0.0.fn."
    parts = [state.get(f"{first}{part}.weight", torch.empty(0)) for part in ("to_q", "to_kv", "ff.0")]
    if not all(part.dim() == 2 for part in parts):
        raise RewardError(f"{what}: not a state dict of MPS: {first}to_q, to_kv and ff.0 must have matrices")
    (inner, width), both, wide = parts[0].shape, len(parts[1]), len(parts[2])
    with loading(what, "" if local else weights.NO_NETWORK):
        config = CLIPConfig.from_pretrained(base, revision=REVISIONS.get(base), local_files_only=local)
        tokenizer = CLIPTokenizer.from_pretrained(base, revision=REVISIONS.get(base), local_files_only=local)
        layers = len({key.split(".")[2] for key in state if key.startswith("cross_model.layers.")})
        with torch.device("meta"):
            network = _Network(config, layers, max(2 * inner // both, 1), both // 2, wide // (2 * width))
        network.to_empty(device="cpu")
        for tower in (network.clip.text_model, network.clip.vision_model):  # non-persistent buffers
            embeddings: Any = tower.embeddings
            embeddings.position_ids = torch.arange(embeddings.position_embedding.num_embeddings)[None]
        renamed = {key: tensor for key, tensor in state.items() if not key.startswith(UNUSED_KEYS)}
        renamed = {
            f"clip.{key.removeprefix('model.')}" if key.startswith("model.") else key: tensor
            for key, tensor in renamed.items()
        }
        weights.load_weights(network, renamed, what)
    return tokenizer, network
