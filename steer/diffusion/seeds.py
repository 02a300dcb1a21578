"""Random numbers that depend on the seed of a row alone, not on its batch."""

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Generator, Tensor

Generators = Generator | list[Generator]


def seeded_normal(seeds: Sequence[int], like: Tensor, streams: Sequence[str]) -> Tensor:
    """Draw standard normal numbers shaped like (N, …), each row from its own seed and stream name."""
    mixed = [derived_seed(seed, stream) for seed, stream in zip(seeds, streams, strict=True)]
    rows = [torch.randn(like.shape[1:], generator=Generator().manual_seed(seed)) for seed in mixed]
    return torch.stack(rows).to(like)


def derived_seed(seed: int, stream: str) -> int:
    """Derive a seed, 0 to 2^56, for a named stream: different names give independent numbers."""
    return int.from_bytes(hashlib.sha256(f"{seed} {stream}".encode()).digest()[:7], "big")


def get_random_state() -> dict[str, Tensor]:
    """Return the state of PyTorch's global generators: the CPU's, and the current GPU's once it is in use."""
    gpu = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {}
    return {"cpu": torch.get_rng_state()} | gpu


def set_random_state(state: Mapping[str, Tensor]) -> None:
    """Restore the state from `get_random_state`."""
    torch.set_rng_state(state["cpu"].clone())  # set_rng_state crashes on a view
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].clone())


def list_generators(generator: Generator | Sequence[Generator] | None) -> list[Generator]:
    """Return none, one or several generators as a list."""
    return [generator] if isinstance(generator, Generator) else list(generator or ())


def copy_generators(generator: Generator | Sequence[Generator]) -> Generators:
    """Copy one or several generators in their present state."""
    if not isinstance(generator, Generator):
        return [Generator(one.device).set_state(one.get_state()) for one in generator]
    return Generator(generator.device).set_state(generator.get_state())


def spread_generators(given: Sequence[Generator], groups: int, size: int) -> list[Generator]:
    """Return `size` generators for each of B groups: the given ones (n for each group), further ones seeded from them.

    A list whose length is no multiple of B is returned unchanged.
    """
    each, rest = divmod(len(given), groups)
    if rest or not each:
        return list(given)
    rows = [given[group * each : (group + 1) * each] for group in range(groups)]
    return [
        own[k] if k < each else Generator().manual_seed(derived_seed(own[0].initial_seed(), f"start {k}"))
        for own in rows
        for k in range(size)
    ]
