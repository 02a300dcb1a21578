"""softmax(QKᵀ/√d) V in other ways than PyTorch's own `scaled_dot_product_attention`, with its arguments."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor


class Attend(Protocol):
    """Q (B, H, L, d), K (B, H, S, d), V (B, H, S, e) → (B, H, L, e); the mask broadcasts to (B, H, L, S): true where a
    key is seen, or a number that is added to its score."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor: ...


# softmax(QKᵀ/√d + M) V  (Vaswani et al. 2017, arXiv 1706.03762, eq. 1; M: the mask)
def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The formula itself, all scores in memory: the slow twin of every other backend."""
    key, value = (_for_every_head(x, query, enable_gqa) for x in (key, value))
    d = query.shape[-1]
    scores = query @ key.transpose(-2, -1) * (d**-0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        scores = scores + _added(attn_mask, scores.dtype)
    return torch.dropout(scores.softmax(-1), dropout_p, True) @ value


def xformers_attention(kernel: Callable[..., Tensor], causal: Callable[[], Any]) -> Attend:
    """`xformers.ops.memory_efficient_attention` with PyTorch's arguments; `causal`: xformers' own causal mask.

    It wants (B, L, H, d), and a mask of full shape in the queries' dtype, whose rows start at multiples of 8 numbers.
    It raises NotImplementedError for a dtype or head size that it has no kernel for.
    """

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        key, value = (_for_every_head(x, query, enable_gqa) for x in (key, value))
        bias: Any = None
        if is_causal:
            bias = causal()
        elif attn_mask is not None:
            bias = _aligned(_added(attn_mask, query.dtype), (*query.shape[:-1], key.shape[-2]))
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return kernel(q, k, v, attn_bias=bias, p=dropout_p, scale=scale).transpose(1, 2)

    return attend


def _for_every_head(x: Tensor, query: Tensor, grouped: bool) -> Tensor:
    """K or V of heads that several heads of the query share, once for each of them."""
    return x.repeat_interleave(query.shape[1] // x.shape[1], 1) if grouped else x


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as numbers to add to the scores."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, float("-inf"))


def _aligned(bias: Tensor, shape: tuple[int, ...]) -> Tensor:
    whole = bias.new_zeros((*shape[:-1], -(-shape[-1] // 8) * 8))
    whole[..., : shape[-1]] = bias
    return whole[..., : shape[-1]]
