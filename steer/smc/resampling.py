"""Resampling schemes: log-weights (B, K) → ancestors (B, K), each row an independent group.

All are unbiased: particle i gets K·w_i offspring in expectation. Log-weights of −inf are never drawn. Draws are made in
float64 on the CPU, so that one seed gives the same ancestors on every device.
"""

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from steer.errors import InputError

Resampler = Callable[[Tensor, Generator], Tensor]


def _weights(log_weights: Tensor) -> Tensor:
    """Return normalised weights (B, K), float64. Raises InputError where a group has only zero weights, or NaN."""
    weights = log_weights.detach().cpu().double().softmax(-1)
    if not weights.isfinite().all():
        raise InputError("a group of particles has no finite weight: every log-weight is -inf, or one is NaN or +inf")
    return weights


def _uniform(shape: tuple[int, ...], generator: Generator) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def _at(positions: Tensor, weights: Tensor) -> Tensor:
    """Return the particle at each position in [0, 1) of the cumulative weights."""
    cumulative = weights.cumsum(-1)
    cumulative = cumulative / cumulative[..., -1:]
    below_one = torch.tensor(1.0, dtype=torch.float64).nextafter(torch.tensor(0.0, dtype=torch.float64))
    return torch.searchsorted(cumulative, positions.minimum(below_one), right=True)


def _copies(counts: Tensor) -> Tensor:
    """Expand offspring counts (B, K) to ancestors (B, K)."""
    return torch.stack([torch.arange(len(row)).repeat_interleave(row) for row in counts])


def systematic(log_weights: Tensor, generator: Generator) -> Tensor:
    """Draw one uniform per group and K evenly spaced positions: ⌊K w⌋ or ⌈K w⌉ offspring each (Kitagawa 1996)."""
    weights = _weights(log_weights)
    groups, size = weights.shape
    return _at((torch.arange(size) + _uniform((groups, 1), generator)) / size, weights)


def stratified(log_weights: Tensor, generator: Generator) -> Tensor:
    """Draw one uniform in each of K equal strata (Kitagawa 1996)."""
    weights = _weights(log_weights)
    size = weights.shape[-1]
    return _at((torch.arange(size) + _uniform(tuple(weights.shape), generator)) / size, weights)


def multinomial(log_weights: Tensor, generator: Generator) -> Tensor:
    """Draw K independent, sorted ancestors (Gordon et al. 1993): the scheme with the largest variance."""
    weights = _weights(log_weights)
    return _at(_uniform(tuple(weights.shape), generator).sort(-1).values, weights)


def residual(log_weights: Tensor, generator: Generator) -> Tensor:
    """Give ⌊K w⌋ offspring to each particle and draw the rest from the residual weights (Liu and Chen 1998)."""
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
    """Draw by the Srinivasan sampling process (Gerber, Chopin and Whiteley 2019): ⌊K w⌋ or ⌈K w⌉ offspring."""
    weights = _weights(log_weights)
    groups, size = weights.shape
    draws = _uniform((groups, size), generator).tolist()
    return _copies(torch.stack([_ssp_counts((size * weights[g]).tolist(), draws[g]) for g in range(groups)]))


def subsample(ancestors: Tensor, count: int, generator: Generator) -> Tensor:
    """Draw `count` of the ancestors (B, K), each with equal probability: every K/count-th, from a random offset.

    Unbiased like the scheme that drew them: particle i gets count·w_i offspring in expectation. All schemes here return
    sorted ancestors; a draw by `systematic` remains systematic where count divides K.
    """
    groups, size = ancestors.shape
    places = (torch.arange(count) + _uniform((groups, 1), generator)) * (size / count)
    return ancestors.gather(1, places.long().clamp(max=size - 1))


def _ssp_counts(expected: list[float], draws: list[float]) -> Tensor:
    """Visit the particles in order, shifting probability between two fractions until one of them is 0 or 1."""
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
    if sum(counts) < len(expected):  # a fraction left over by rounding
        counts[i] += 1
    return torch.tensor(counts)


RESAMPLERS: dict[str, Resampler] = {
    "systematic": systematic,
    "stratified": stratified,
    "residual": residual,
    "ssp": ssp,
    "multinomial": multinomial,
}
