"""Masked diffusion over tokens: the SUBS parameterisation and its transition kernel (MDLM, arXiv 2406.07524).

A token of the clean sequence x is masked at time t with probability 1 − α_t, α_t = 1 − t:

    q(z_t | x) = Cat(α_t x + (1 − α_t) m)
    p(z_s | z_t) = Cat(((1 − α_s) m + (α_s − α_t) x_θ(z_t)) / (1 − α_t))   at masked places, z_t elsewhere

so that a masked place opens with probability (t − s)/t, as a draw from x_θ.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from steer.errors import InputError


def subs(logits: Tensor, ids: Tensor, mask_id: int) -> Tensor:
    """Return log x_θ (N, L, V) fp32 from logits (N, L, V): no mask as a clean token, open places are copied.

    ids (N, L) int64 are z_t. Logits may have fewer tokens than the ids where the mask is the last one.
    """
    logits = logits.float()
    if logits.shape[-1] <= mask_id:
        logits = torch.nn.functional.pad(logits, (0, mask_id + 1 - logits.shape[-1]), value=-torch.inf)
    masked_out = torch.arange(logits.shape[-1], device=logits.device) == mask_id
    log_x0 = logits.masked_fill(masked_out, -torch.inf).log_softmax(-1)
    copied = torch.nn.functional.one_hot(ids, logits.shape[-1]).bool()
    return torch.where((ids == mask_id)[..., None], log_x0, torch.where(copied, 0.0, -torch.inf))


def draw_tokens(log_probs: Tensor, generator: Generator | None) -> Tensor:
    """Draw tokens (N, L) from log-probabilities (N, L, V), on the generator's own device."""
    device = generator.device if generator else log_probs.device
    flat = log_probs.detach().exp().flatten(0, -2).to(device)
    return torch.multinomial(flat, 1, generator=generator).view(log_probs.shape[:-1]).to(log_probs.device)


def _uniform(like: Tensor, generator: Generator | None) -> Tensor:
    device = generator.device if generator else like.device
    return torch.rand(like.shape, generator=generator, device=device, dtype=torch.float64).to(like.device)


def _opens_independently(masked: Tensor, rate: float, generator: Generator | None) -> Tensor:
    """Open each masked place with probability `rate`."""
    return masked & (_uniform(masked, generator) < rate)


def _log_prob_independent(masked: Tensor, opened: Tensor, rate: float) -> Tensor:
    p = torch.tensor(rate, dtype=torch.float64, device=masked.device)
    stays = masked & ~opened
    zero = torch.zeros((), dtype=torch.float64, device=masked.device)
    # −inf · 0 is not a number: choose, do not multiply.
    return (torch.where(opened, p.log(), zero) + torch.where(stays, (1 - p).log(), zero)).sum(1)


def _opens_balanced(masked: Tensor, rate: float, generator: Generator | None) -> Tensor:
    """Open ⌊rate·m⌋ or ⌈rate·m⌉ of the m masked places, a uniformly drawn subset."""
    low, fraction = _expected_count(masked, rate)
    count = low + (_uniform(low, generator) < fraction)
    rank = torch.where(masked, _uniform(masked, generator), 2.0).argsort(1).argsort(1)
    return masked & (rank < count[:, None])


def _expected_count(masked: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """Return the whole part and the fraction of the expected number of opened places, each (N,)."""
    expected = masked.sum(1).double() * rate
    low = (expected + 1e-9).floor()
    return low, (expected - low).clamp(min=0)


def _log_prob_balanced(masked: Tensor, opened: Tensor, rate: float) -> Tensor:
    low, fraction = _expected_count(masked, rate)
    total, count = masked.sum(1).double(), opened.sum(1).double()
    p = torch.where(count == low, 1 - fraction, torch.where(count == low + 1, fraction, 0.0))
    subsets = torch.lgamma(total + 1) - torch.lgamma(count + 1) - torch.lgamma(total - count + 1)
    return p.log() - subsets


# Rules that draw the places to open in a step. Both open every masked place with the same probability (t − s)/t.
# Places that open together are independent given z_t: `balanced` opens at most one in a step while there are at least
# as many steps left as masked places, and then draws from the law of the denoiser in a random order (T → ∞).
Draw = Callable[[Tensor, float, Generator | None], Tensor]
OPENINGS: dict[str, tuple[Draw, Callable[[Tensor, Tensor, float], Tensor]]] = {
    "independent": (_opens_independently, _log_prob_independent),
    "balanced": (_opens_balanced, _log_prob_balanced),
}


@dataclass(frozen=True)
class MaskedKernel:
    """The transition p(z_s | z_t) of a masked diffusion.

    ids      z_t (N, L) int64
    log_x0   log x_θ (N, L, V), as `subs` returns it
    rate     (t − s)/t, probability that a masked place opens, in [0, 1]
    mask_id  the masked token
    opening  rule that draws the places: a name of OPENINGS
    """

    ids: Tensor
    log_x0: Tensor
    rate: float
    mask_id: int
    opening: str = "independent"

    @property
    def masked(self) -> Tensor:
        return self.ids == self.mask_id

    @property
    def scale(self) -> Tensor:
        """(t − s)/t, which a stored reference keeps beside the `statistics` of a step."""
        return torch.tensor(self.rate, dtype=torch.float64)

    def statistics(self, z_s: Tensor) -> Tensor:
        """Return log x_θ (N, L, V), the only part of the kernel that depends on the policy."""
        return self.log_x0

    def from_statistics(self, statistics: Tensor, scale: Tensor, z_s: Tensor) -> "MaskedKernel":
        """Return the kernel of another policy at the same step from its `statistics`."""
        return replace(self, log_x0=statistics.to(self.ids.device), rate=float(scale))

    def at(self, rows: Sequence[int]) -> "MaskedKernel":
        """Select rows."""
        return replace(self, ids=self.ids[list(rows)], log_x0=self.log_x0[list(rows)])

    def sample(self, generator: Generator | None) -> Tensor:
        """Draw z_s (N, L) int64."""
        opened = OPENINGS[self.opening][0](self.masked, self.rate, generator)
        return torch.where(opened, draw_tokens(self.log_x0, generator), self.ids)

    def log_prob(self, z_s: Tensor) -> Tensor:
        """Return log p(z_s | z_t) in nats (N,), fp64; −inf where an open place changes."""
        opened = self.masked & (z_s != self.mask_id)
        tokens = self.log_x0.double().gather(2, z_s[..., None])[..., 0]
        kept = (self.masked | (z_s == self.ids)).all(1)
        log_prob = OPENINGS[self.opening][1](self.masked, opened, self.rate) + torch.where(opened, tokens, 0.0).sum(1)
        return torch.where(kept, log_prob, -torch.inf)

    def kl(self, other: "MaskedKernel") -> Tensor:
        """Return KL(self ‖ other) in nats (N,), fp64: Σ over masked places of rate · KL(x_θ ‖ x'_θ).

        Raises InputError for kernels of different states or opening probabilities.
        """
        same = self.opening == other.opening and self.mask_id == other.mask_id and abs(self.rate - other.rate) < 1e-9
        if not same or not torch.equal(self.ids, other.ids):
            raise InputError("KL needs two kernels of one state z_t and one step: evaluate both at the same step")
        return self.rate * token_kl(self.log_x0, other.log_x0, self.masked)


def token_kl(log_p: Tensor, log_q: Tensor, places: Tensor) -> Tensor:
    """Return Σ_l KL(p_l ‖ q_l) in nats (N,), fp64, of log-probabilities (N, L, V) over the places (N, L)."""
    p, q = log_p.double(), log_q.double()
    ratio = torch.where(p > -torch.inf, p - q, 0.0)  # 0 log 0 = 0
    return torch.where(places, (p.exp() * ratio).sum(-1), 0.0).sum(1)
