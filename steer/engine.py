"""The gradient of any loss of a trajectory's log-probabilities, in the memory of one denoiser call.

L depends on the weights θ through ℓ = log pθ(x_s | x_t) (B, K, T) alone. By the chain rule

    ∇θ L = Σ_{b,k,t} c_bkt ∇θ ℓ_bkt,   c = ∂L/∂ℓ

so pass 1 takes ℓ without a graph and differentiates L there, and pass 2 goes over the steps one at a time and sends
back c_t · ℓ_t. Penalties are sums over steps of something that the step's own kernel tells: they join in pass 2.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypedDict

import torch
from torch import Tensor

from steer.guards import kl
from steer.losses import LogProbs, Loss, Metrics
from steer.trajectory import Sampler, Trajectories, log_probs
from steer.transition import Gaussian

Backward = Callable[[Tensor], None]


class Penalty(Protocol):
    """(pθ, p_ref) of one step → (N,), and a name to be told by."""

    __name__: str

    def __call__(self, p: Gaussian, reference: Gaussian, /) -> Tensor: ...


class GradientOptions(TypedDict):
    """How a run asks for a gradient; see `two_pass_gradient`."""

    penalties: Mapping[Penalty, float]
    unchanged: bool
    backward: Backward
    before_each: Callable[[], None]


@dataclass(frozen=True)
class Reference:
    """What the reference policy says of S chosen steps: means (N, S, …) fp32, τ (S,), log-probs (N, S) in nats."""

    means: Tensor
    deviations: Tensor
    log_probs: Tensor

    def kernel(self, column: int, like: Tensor) -> Gaussian:
        """Its p(x_s | x_t) at one of those steps."""
        return Gaussian(self.means[:, column].to(like.device), self.deviations[column].to(like.device))


def reference_of(sampler: Sampler, stored: Trajectories, steps: Sequence[int]) -> Reference:
    """By today's weights: call it where these are the reference's."""
    told: list[tuple[Tensor, Tensor, Tensor]] = []

    def keep(t: int, kernel: Gaussian, x_s: Tensor) -> None:
        told.append((kernel.mean.cpu(), kernel.std.cpu(), kernel.log_prob(x_s).cpu()))

    sampler.replay(stored, keep, steps)
    means, deviations, log_probs = zip(*told, strict=True)
    return Reference(torch.stack(means, 1), torch.stack(deviations), torch.stack(log_probs, 1))


@dataclass(frozen=True)
class Batch:
    """B prompts × K samples, prompt after prompt, in chunks of rows that go through the denoiser together.

    steps    the stochastic steps to learn from, ascending: S of all T
    rewards  (B, K), or (B, K, M) where a loss takes several
    """

    chunks: Sequence[Trajectories]
    references: Sequence[Reference]
    steps: Sequence[int]
    rewards: Tensor

    def matrix(self, values: Sequence[Tensor]) -> Tensor:
        """(N, S) of each chunk as one (B, K, S)."""
        return torch.cat(list(values)).view(*self.rewards.shape[:2], len(self.steps))


def two_pass_gradient(
    sampler: Sampler,
    batch: Batch,
    loss: Loss,
    *,
    penalties: Mapping[Penalty, float] | None = None,
    unchanged: bool = False,
    backward: Backward = Tensor.backward,
    before_each: Callable[[], None] = lambda: None,
) -> tuple[float, Metrics]:
    """Adds ∇θ [L + Σ_p w_p · mean over samples of Σ_t p(pθ, p_ref)] to the weights' .grad.

    Returns L, and its metrics with `kl`, the mean KL(pθ ‖ p_ref) of whole trajectories in nats, and the penalties'.

    penalties    with their weights w_p; where S < T their sum is scaled up
    unchanged    the weights are those that drew the batch: pass 1 is not needed
    backward     what is called on each step's scalar (a scaler may come between)
    before_each  called before each chunk of rows
    """
    steps = list(batch.steps)
    old = [chunk.log_probs[:, steps] for chunk in batch.chunks]
    new = old
    if not unchanged:  # pass 1
        new = []
        for chunk in batch.chunks:
            before_each()
            new.append(log_probs(sampler, chunk, steps)[:, steps])
    leaf = batch.matrix(new).clone().requires_grad_(True)
    reference = batch.matrix([told.log_probs for told in batch.references])
    value, metrics = loss(LogProbs(leaf, batch.matrix(old), reference, batch.chunks[0].elements), batch.rewards)
    (c,) = torch.autograd.grad(value, leaf)

    shares = c.flatten(0, 1).split([len(chunk.rows) for chunk in batch.chunks])
    per_sample = batch.chunks[0].log_probs.shape[1] / len(steps) / c[..., 0].numel()
    weights: dict[Penalty, float] = {kl: 0.0}
    weights.update(penalties or {})
    found = dict.fromkeys(weights, 0.0)
    for chunk, told, share in zip(batch.chunks, batch.references, shares, strict=True):  # pass 2
        before_each()

        def back(t: int, p: Gaussian, x_s: Tensor, share: Tensor = share, told: Reference = told) -> None:
            column = steps.index(t)
            other = told.kernel(column, p.mean)
            total = (share[:, column].to(p.mean.device) * p.log_prob(x_s)).sum()
            for penalty, weight in weights.items():
                with torch.set_grad_enabled(weight != 0):
                    cost = per_sample * penalty(p, other).sum()
                found[penalty] += cost.item()
                total = total + weight * cost
            backward(total)

        sampler.replay(chunk, back, steps, grad=True)
    told_all = {penalty.__name__: cost for penalty, cost in found.items()}
    return value.item(), metrics | told_all | {"kl_per_step": found[kl] / batch.chunks[0].log_probs.shape[1]}
