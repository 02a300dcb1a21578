"""Random numbers of a row that depend on its own seed alone, whatever batch it runs in."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Generator, Tensor


def drawn(seeds: Sequence[int], like: Tensor, streams: Sequence[str]) -> Tensor:
    """Standard normal numbers shaped like (N, …), each row from its own seed and the name of its stream."""
    mixed = [derived_seed(seed, stream) for seed, stream in zip(seeds, streams, strict=True)]
    rows = [torch.randn(like.shape[1:], generator=Generator().manual_seed(seed)) for seed in mixed]
    return torch.stack(rows).to(like)


def derived_seed(seed: int, stream: str) -> int:
    """A seed, 0 to 2^56, for one named use of another: different names share no numbers."""
    return int.from_bytes(hashlib.sha256(f"{seed} {stream}".encode()).digest()[:7], "big")
