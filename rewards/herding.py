"""Common errors of the members of an ensemble (Helping or Herding, arXiv 2312.09244)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steer.errors import InputError
from steer.rewards.inputs import rows_by_prompt
from steer.training.overoptimization import expected_best


@dataclass(frozen=True)
class Herding:
    """Correlations ρ (M, M) within prompts, and gains G (n, M, M): member j's mean score of member i's best of n.

    If G_ij / G_ii is near 1, member j rewards the same errors as member i: the ensemble cannot correct them.
    """

    names: tuple[str, ...]
    correlation: Tensor
    sizes: tuple[int, ...]
    gains: Tensor

    @property
    def shared(self) -> list[float]:
        """Return for each n the mean over pairs i ≠ j of G_ij / G_ii: 1 if all err together, 0 if independently."""
        count = len(self.names)
        own = self.gains.diagonal(dim1=1, dim2=2)[..., None]
        others = ~torch.eye(count, dtype=torch.bool)
        return [(gain / one)[others].mean().item() for gain, one in zip(self.gains, own, strict=True)]

    def figures(self) -> dict[str, Any]:
        """Return all figures as lists, for JSON."""
        return {
            "correlation": self.correlation.tolist(),
            "n": self.sizes,
            "gains": self.gains.tolist(),
            "shared": self.shared,
        }


def herding(names: Sequence[str], scores: Tensor, groups: Sequence[str]) -> Herding:
    """Measure ρ and G from scores (M, N) of images with N prompts; each prompt has the same number K of images.

        z_i = r_i standardised within its prompt,  ρ_ij = mean z_i z_j,
        G_ij(n) = mean over prompts of E[z_j(argmax z_i among n of the K)], without bias for n = 2, 4, 8 … K

    Jointly Gaussian scores have G_ij(n) / G_ii(n) = ρ_ij for every n. Raises InputError for fewer than two members or
    images of a prompt, unequal numbers of images, and a member that is constant within a prompt.
    """
    rows = rows_by_prompt(groups).values()
    sizes = set(map(len, rows))
    if len(scores) < 2 or len(sizes) != 1 or min(sizes) < 2:
        raise InputError(
            f"herding needs at least two rewards, and equally many images of each prompt, at least two: got "
            f"{len(scores)} rewards and {', '.join(map(str, sorted(sizes)))} images"
        )
    count = sizes.pop()
    z = torch.stack([_standardised(scores[:, some]) for some in rows], 1)  # (M, prompts, K)
    if bool((z == 0).all(-1).any()):
        member = int((z == 0).all(-1).any(1).nonzero()[0])
        raise InputError(f"reward {names[member]!r} gives all images of a prompt the same score: leave it out")
    ns = [2**k for k in range(1, count.bit_length()) if 2**k <= count]
    gains = [[[expected_best(one, other, n).mean() for other in z] for one in z] for n in ns]
    return Herding(tuple(names), (z[:, None] * z[None]).mean((-1, -2)), tuple(ns), torch.tensor(gains))


def _standardised(scores: Tensor) -> Tensor:
    """Standardise the scores (M, K) of a prompt's images; 0 if they are all equal."""
    r = scores.double()
    spread = r.std(-1, keepdim=True, correction=0)
    return (r - r.mean(-1, keepdim=True)) / spread.where(spread > 0, torch.inf)


def overrated(scores: Tensor, gold: Tensor, groups: Sequence[str]) -> list[int]:
    """Return the images that all members score above their prompt's mean but the truth scores below it, worst first.

    scores, gold  (M, N) and (N,), of images with N prompts `groups`; worst: the largest min_m z_m − z_gold
    """
    z = torch.zeros(len(scores) + 1, len(groups), dtype=torch.float64)
    for some in rows_by_prompt(groups).values():
        z[:, some] = _standardised(torch.cat([scores, gold[None]])[:, some])
    least, true = z[:-1].amin(0), z[-1]
    order = (least - true).argsort(descending=True, stable=True).tolist()
    return [row for row in order if least[row] > 0 > true[row]]


def render_herding(one: Herding) -> str:
    """Render the correlations, and the shared part of the gain by n."""
    width = max(map(len, one.names))
    lines = ["correlation within prompts"]
    for name, row in zip(one.names, one.correlation.tolist(), strict=True):
        lines.append(f"  {name:{width}}  " + "  ".join(f"{value:5.2f}" for value in row))
    lines.append("best of n: own gain, gain by the other members, shared share")
    for n, gain, shared in zip(one.sizes, one.gains, one.shared, strict=True):
        own = gain.diagonal().mean().item()
        other = (gain.sum().item() - gain.diagonal().sum().item()) / (len(one.names) * (len(one.names) - 1))
        lines.append(f"  {n:4}  {own:5.2f}  {other:5.2f}  {shared:5.2f}")
    return "\n".join(lines)
