"""A few images out of many: high rewards, and little repetition, by a submodular objective."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from steer.errors import InputError

SIDE = 8  # of the downscaled images


@dataclass(frozen=True)
class Selection:
    """Rows in the order in which they were chosen, and the gain of each in the objective."""

    rows: tuple[int, ...]
    gains: tuple[float, ...]


def diverse(rewards: Tensor, features: Tensor, count: int, weight: float = 0.5) -> Selection:
    """Choose `count` of N images greedily by quality and coverage (facility location).

        f(S) = Σ_{i ∈ S} q_i + η Σ_{i ∈ U} max_{j ∈ S} sim_ij,   sim_ij = max(cos(x_i, x_j), 0)

    f is monotone and submodular, so that greedy choice reaches 1 − 1/e of the best subset (Nemhauser et al. 1978).

    rewards   (N,), or (M, N) of M rewards, whose ranks are averaged (Borda)
    features  (N, D) of the images
    weight    η ≥ 0; 0 chooses the highest rewards
    Raises InputError.
    """
    q = quality(rewards)
    if not 1 <= count <= len(q) or not weight >= 0 or len(features) != len(q):
        raise InputError(
            f"keep 1 to {len(q)} of {len(q)} images, with a weight of at least 0, got {count} and {weight}"
        )
    similarity = cosine(features)
    covered, rows, gains = torch.zeros_like(q), list[int](), list[float]()
    for _ in range(count):
        gain = q + weight * (similarity - covered[:, None]).clamp(min=0).sum(0)
        gain[rows] = -torch.inf
        rows.append(int(gain.argmax()))
        gains.append(gain[rows[-1]].item())
        covered = torch.maximum(covered, similarity[:, rows[-1]])
    return Selection(tuple(rows), tuple(gains))


def quality(rewards: Tensor) -> Tensor:
    """Return q (N,) ≥ 0 in deviations: of the rewards, or of the mean rank over M rewards (M, N)."""
    values = rewards.detach().double().cpu()
    if values.ndim == 2:
        values = values[0] if len(values) == 1 else values.argsort(1).argsort(1).double().mean(0)
    spread = values.std() if len(values) > 1 else values.new_zeros(())
    return (values - values.min()) / (spread if spread > 0 else 1)


def cosine(features: Tensor) -> Tensor:
    """Return max(cos(x_i, x_j), 0) (N, N)."""
    unit = F.normalize(features.detach().double().cpu(), dim=-1)
    return (unit @ unit.T).clamp(min=0)


def pixel_features(images: Tensor) -> Tensor:
    """Return images (N, 3, H, W) downscaled to 8 × 8 pixels, less their common mean: (N, 192)."""
    small = F.interpolate(images.float(), (SIDE, SIDE), mode="area").flatten(1)
    return small - small.mean(0)
