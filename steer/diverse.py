"""Selection of a few images out of many, with high rewards and little repetition, by a submodular objective."""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from steer.errors import InputError

SIDE = 8  # pixels of the downscaled images


@dataclass(frozen=True)
class DiverseSelection:
    """Rows in the order in which they were chosen, and the gain of each in the objective."""

    rows: tuple[int, ...]
    gains: tuple[float, ...]


def diverse(
    rewards: Tensor,
    features: Tensor,
    count: int,
    weight: float = 0.5,
    *,
    represent: bool = False,
    groups: Sequence[Hashable] = (),
    at_least: int = 1,
) -> DiverseSelection:
    """Choose `count` of N images greedily by quality and coverage (facility location).

        f(S) = Σ_{i ∈ S} q_i + η Σ_{i ∈ U} max_{j ∈ S} sim_ij,   sim_ij = max(cos(x_i, x_j), 0)

    f is monotone and submodular, so greedy selection reaches 1 − 1/e of the best subset (Nemhauser et al. 1978).

    rewards    (N,), or (M, N) of M rewards, whose ranks are averaged (Borda)
    features   (N, D) of the images
    weight     η ≥ 0; 0 chooses the highest rewards
    represent  use Σ_m max_{i ∈ S} rank_m(i) in place of Σ q_i: each of the M rewards ranks some chosen image high
               (Chamberlin, Courant 1983)
    groups     the group of each image; at least `at_least` images of each group are chosen
    Raises InputError.
    """
    q = quality(rewards)
    _check(count, weight, len(q), len(features), groups, at_least)
    cover = weight * cosine(features)  # (U, N): coverage of image i by image j
    if represent:
        cover, q = torch.cat([ranks(rewards), cover]), torch.zeros_like(q)
    covered, rows, gains = cover.new_zeros(len(cover)), list[int](), list[float]()
    missing = dict.fromkeys(groups, at_least)
    while len(rows) < count:
        gain = q + (cover - covered[:, None]).clamp(min=0).sum(0)
        gain[rows] = -torch.inf
        if groups and sum(missing.values()) == count - len(rows):
            gain[[row for row, group in enumerate(groups) if not missing[group]]] = -torch.inf
        rows.append(int(gain.argmax()))
        gains.append(gain[rows[-1]].item())
        covered = torch.maximum(covered, cover[:, rows[-1]])
        if groups:
            missing[groups[rows[-1]]] = max(missing[groups[rows[-1]]] - 1, 0)
    return DiverseSelection(tuple(rows), tuple(gains))


def _check(count: int, weight: float, images: int, features: int, groups: Sequence[Hashable], at_least: int) -> None:
    if not 1 <= count <= images or not weight >= 0 or features != images:
        raise InputError(
            f"keep 1 to {images} of {images} images, with a weight of at least 0, got {count} and {weight}"
        )
    sizes = Counter(groups).values()
    if sizes and (len(groups) != images or min(sizes) < at_least or at_least * len(sizes) > count):
        raise InputError(
            f"at least {at_least} of each of {len(sizes)} groups, of {min(sizes)} or more images, does not fit into "
            f"{count}: keep more, or ask for fewer of each"
        )


def quality(rewards: Tensor) -> Tensor:
    """Return q (N,) ≥ 0, in standard deviations of the rewards (N,) or of the mean rank over M rewards (M, N)."""
    several = rewards.ndim == 2 and len(rewards) > 1
    values = ranks(rewards).mean(0) if several else rewards.detach().double().cpu().flatten()
    spread = values.std() if len(values) > 1 else values.new_zeros(())
    return (values - values.min()) / (spread if spread > 0 else 1)


def ranks(rewards: Tensor) -> Tensor:
    """Return the rank of each image in standard deviations (M, N), 0 for the lowest reward; M = 1 for rewards (N,)."""
    order = rewards.detach().double().cpu().view(-1, rewards.shape[-1]).argsort(1).argsort(1).double()
    return order / order.std(1, correction=0, keepdim=True).clamp(min=0.5)  # two images: a deviation of one half


def cosine(features: Tensor) -> Tensor:
    """Return max(cos(x_i, x_j), 0) (N, N)."""
    unit = F.normalize(features.detach().double().cpu(), dim=-1)
    return (unit @ unit.T).clamp(min=0)


def pixel_features(images: Tensor) -> Tensor:
    """Return images (N, 3, H, W) downscaled to 8 × 8 pixels, with their common mean subtracted: (N, 192)."""
    small = F.interpolate(images.float(), (SIDE, SIDE), mode="area").flatten(1)
    return small - small.mean(0)
