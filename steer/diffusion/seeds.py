"""Random numbers of a row that depend on its own seed alone, whatever batch it runs in."""

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Generator, Tensor


def seeded_normal(seeds: Sequence[int], like: Tensor, streams: Sequence[str]) -> Tensor:
    """Standard normal numbers shaped like (N, …), each row from its own seed and the name of its stream."""
    mixed = [derived_seed(seed, stream) for seed, stream in zip(seeds, streams, strict=True)]
    rows = [torch.randn(like.shape[1:], generator=Generator().manual_seed(seed)) for seed in mixed]
    return torch.stack(rows).to(like)


def derived_seed(seed: int, stream: str) -> int:
    """A seed, 0 to 2^56, for one named use of another: different names share no numbers."""
    return int.from_bytes(hashlib.sha256(f"{seed} {stream}".encode()).digest()[:7], "big")


def get_random_state() -> dict[str, Tensor]:
    """Of PyTorch's global generators, for what draws from these: the CPU's, and the present GPU's once it is in use."""
    gpu = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {}
    return {"cpu": torch.get_rng_state()} | gpu


def set_random_state(state: Mapping[str, Tensor]) -> None:
    """Takes back what `get_random_state` told."""
    torch.set_rng_state(state["cpu"].clone())  # a view into other states ends the process
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].clone())
