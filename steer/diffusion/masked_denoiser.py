"""The denoiser of MDLM: a bidirectional transformer over tokens (arXiv 2406.07524; DiT, arXiv 2212.09748).

Parameter names and shapes match the published checkpoints (kuleshov-group/mdlm-owt), without the prefix `backbone.`.
"""

import math
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn
from torch.nn import functional as F

FREQUENCIES = 256  # in the embedding of the noise level
MAX_PERIOD = 10_000


class _LayerNorm(nn.Module):
    """Layer normalisation with a scale and no shift, computed in fp32."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        normalised = F.layer_norm(x.float(), x.shape[-1:]).to(x.dtype)
        return normalised * self.weight


class _Embedding(nn.Module):
    def __init__(self, tokens: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(tokens, dim) * dim**-0.5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.embedding[ids]


class _NoiseEmbedding(nn.Module):
    """Embedding of the noise level σ (N,): sines and cosines, and an MLP."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, sigma: Tensor) -> Tensor:
        half = FREQUENCIES // 2
        rates = torch.exp(-math.log(MAX_PERIOD) / half * torch.arange(half, device=sigma.device))
        angles = sigma.float()[:, None] * rates
        features = torch.cat([angles.cos(), angles.sin()], 1)
        embedded: Tensor = self.mlp(features.to(next(self.mlp.parameters()).dtype))
        return embedded


class _Rotary(nn.Module):
    """Rotary position embedding of queries and keys (N, heads, L, d) (arXiv 2104.09864), halves of d paired."""

    inv_freq: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", MAX_PERIOD ** (-torch.arange(0, dim, 2).float() / dim))

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[2], device=x.device).float()[:, None] * self.inv_freq.float()
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class _Block(nn.Module):
    """Attention and an MLP, modulated by the noise level."""

    def __init__(self, dim: int, heads: int, cond_dim: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = _LayerNorm(dim), _LayerNorm(dim)
        self.attn_qkv, self.attn_out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU("tanh"), nn.Linear(4 * dim, dim))
        self.adaLN_modulation = _zero(nn.Linear(cond_dim, 6 * dim))

    def forward(self, x: Tensor, condition: Tensor, rotary: _Rotary) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition)[:, None].chunk(6, -1)
        qkv = self.attn_qkv(self.norm1(x) * (1 + scale1) + shift1)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(rotary(q), rotary(k), v).transpose(1, 2).flatten(2)
        x = x + gate1 * F.dropout(self.attn_out(attended), self.dropout, self.training)
        hidden = self.mlp(self.norm2(x) * (1 + scale2) + shift2)
        return x + gate2 * F.dropout(hidden, self.dropout, self.training)


class _Output(nn.Module):
    def __init__(self, dim: int, tokens: int, cond_dim: int) -> None:
        super().__init__()
        self.norm_final, self.linear = _LayerNorm(dim), _zero(nn.Linear(dim, tokens))
        self.adaLN_modulation = _zero(nn.Linear(cond_dim, 2 * dim))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, -1)
        logits: Tensor = self.linear(self.norm_final(x) * (1 + scale) + shift)
        return logits


def _zero(linear: nn.Linear) -> nn.Linear:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class MaskedDenoiser(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers has no types
    """Predict the clean tokens of a partly masked sequence: ids (N, L) → logits (N, L, V).

    vocab_size         V, the mask included
    model_length       L, number of tokens of the training sequences
    time_conditioning  whether the noise level is an input; published models infer it from the number of masks
    """

    config_name = "config.json"

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        vocab_size: int = 50_258,
        model_length: int = 1024,
        hidden_dim: int = 768,
        cond_dim: int = 128,
        n_blocks: int = 12,
        n_heads: int = 12,
        dropout: float = 0.1,
        time_conditioning: bool = False,
    ) -> None:
        super().__init__()
        self.vocab_embed = _Embedding(vocab_size, hidden_dim)
        self.sigma_map = _NoiseEmbedding(cond_dim)
        self.rotary_emb = _Rotary(hidden_dim // n_heads)
        self.blocks = nn.ModuleList(_Block(hidden_dim, n_heads, cond_dim, dropout) for _ in range(n_blocks))
        self.output_layer = _Output(hidden_dim, vocab_size, cond_dim)

    def forward(self, ids: Tensor, sigma: Tensor | None = None, return_dict: bool = True) -> Any:
        """Return logits (N, L, V) of ids (N, L), or of relaxed tokens (N, L, V) whose rows sum to 1.

        sigma  noise level −log α_t (N,) of a model with time_conditioning
        """
        relaxed = ids.is_floating_point()
        x = ids.to(self.dtype) @ self.vocab_embed.embedding if relaxed else self.vocab_embed(ids)
        if sigma is None or not self.config.time_conditioning:
            sigma = torch.zeros(len(ids), device=ids.device)
        condition = F.silu(self.sigma_map(sigma))
        for block in self.blocks:
            x = block(x, condition, self.rotary_emb)
        logits = self.output_layer(x, condition)
        return Transformer2DModelOutput(logits) if return_dict else (logits,)
