"""Resampling schemes: log-weights (B, K) → ancestors (B, K), each row a group of its own.

All are unbiased: particle i gets K·w_i offspring on average. Weights of −inf are never drawn. Drawn in
float64 on the CPU, so that one seed gives one answer on every device.
"""

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from steer.errors import InputError

Resampler = Callable[[Tensor, Generator], Tensor]


def _weights(log_weights: Tensor) -> Tensor:
    """Normalised weights (B, K), float64. Raises InputError where a group has no weight at all, or NaN."""
    weights = log_weights.detach().cpu().double().softmax(-1)
    if not weights.isfinite().all():
        raise InputError("a group of particles has no finite weight: every log-weight is -inf, or one is NaN or +inf")
    return weights


def _uniform(shape: tuple[int, ...], generator: Generator) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def _at(positions: Tensor, weights: Tensor) -> Tensor:
    """The particle at each position in [0, 1) of the cumulative weights."""
    cumulative = weights.cumsum(-1)
    cumulative = cumulative / cumulative[..., -1:]
    below_one = torch.tensor(1.0, dtype=torch.float64).nextafter(torch.tensor(0.0, dtype=torch.float64))
    return torch.searchsorted(cumulative, positions.minimum(below_one), right=True)


def _copies(counts: Tensor) -> Tensor:
    """Offspring counts (B, K) → ancestors (B, K)."""
    return torch.stack([torch.arange(len(row)).repeat_interleave(row) for row in counts])


def systematic(log_weights: Tensor, generator: Generator) -> Tensor:
    """One uniform per group, a comb of K teeth: each particle gets ⌊K w⌋ or ⌈K w⌉ offspring (Kitagawa 1996)."""
    weights = _weights(log_weights)
    groups, size = weights.shape
    return _at((torch.arange(size) + _uniform((groups, 1), generator)) / size, weights)


def stratified(log_weights: Tensor, generator: Generator) -> Tensor:
    """One uniform in each of K equal strata (Kitagawa 1996)."""
    weights = _weights(log_weights)
    size = weights.shape[-1]
    return _at((torch.arange(size) + _uniform(tuple(weights.shape), generator)) / size, weights)


def multinomial(log_weights: Tensor, generator: Generator) -> Tensor:
    """K independent draws (Gordon et al. 1993): the most noise of all schemes. Ancestors come sorted."""
    weights = _weights(log_weights)
    return _at(_uniform(tuple(weights.shape), generator).sort(-1).values, weights)


def residual(log_weights: Tensor, generator: Generator) -> Tensor:
    """⌊K w⌋ offspring for certain, the rest drawn from what is left over (Liu and Chen 1998)."""
    weights = _weights(log_weights)
    groups, size = weights.shape
    certain = (size * weights + 1e-12).floor()
    counts = certain.long()
    for group in range(groups):
        open_places = int(size - counts[group].sum())
        if open_places:
            rest = (size * weights[group] - certain[group]).clamp(min=0)
            sampled = _at(_uniform((open_places,), generator), rest)
            counts[group] += torch.bincount(sampled, minlength=size)
    return _copies(counts)


def ssp(log_weights: Tensor, generator: Generator) -> Tensor:
    """Srinivasan sampling process (Gerber, Chopin and Whiteley 2019): ⌊K w⌋ or ⌈K w⌉ offspring."""
    weights = _weights(log_weights)
    groups, size = weights.shape
    draws = _uniform((groups, size), generator).tolist()
    return _copies(torch.stack([_ssp_counts((size * weights[g]).tolist(), draws[g]) for g in range(groups)]))


def subsample(ancestors: Tensor, count: int, generator: Generator) -> Tensor:
    """`count` of the ancestors (B, K), each with the same chance: every K/count-th, from a random place on.

    Unbiased like the scheme that drew them: particle i gets count·w_i offspring on average. Of ancestors in order, as
    all schemes here give them, those of `systematic` stay systematic where count divides K.
    """
    groups, size = ancestors.shape
    places = (torch.arange(count) + _uniform((groups, 1), generator)) * (size / count)
    return ancestors.gather(1, places.long().clamp(max=size - 1))


def _ssp_counts(expected: list[float], draws: list[float]) -> Tensor:
    """Walks over the particles, moving fractions between two open ones until one of them is whole."""
    counts = [int(e + 1e-12) for e in expected]
    fractions = [max(e - count, 0.0) for e, count in zip(expected, counts, strict=True)]
    i = 0
    for j in range(1, len(expected)):
        up = min(fractions[j], 1 - fractions[i])  # i may rise by this
        down = min(fractions[i], 1 - fractions[j])  # or fall by this
        i_gains = up if draws[j] * (up + down) < down else -down  # up with probability down / (up + down)
        fractions[i] += i_gains
        fractions[j] -= i_gains
        if fractions[i] > 1 - 1e-9:
            counts[i], i = counts[i] + 1, j
        elif fractions[i] < 1e-9:
            i = j
        elif fractions[j] > 1 - 1e-9:
            counts[j], fractions[j] = counts[j] + 1, 0.0
    if sum(counts) < len(expected):  # the fraction that rounding left open
        counts[i] += 1
    return torch.tensor(counts)


RESAMPLERS: dict[str, Resampler] = {
    "systematic": systematic,
    "stratified": stratified,
    "residual": residual,
    "ssp": ssp,
    "multinomial": multinomial,
}
