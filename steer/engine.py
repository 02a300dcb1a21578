"""The gradient of any loss of a trajectory's log-probabilities, in the memory of one denoiser call.

L depends on the weights θ through ℓ = log pθ(x_s | x_t) (B, K, T) alone. By the chain rule

    ∇θ L = Σ_{b,k,t} c_bkt ∇θ ℓ_bkt,   c = ∂L/∂ℓ

so pass 1 takes ℓ without a graph and differentiates L there, and pass 2 goes over the steps one at a time and sends
back c_t · ℓ_t. Penalties are sums over steps of something that the step's own kernel tells: they join in pass 2.

Of several processes each has some of the prompts. ℓ of all is small: it is gathered, so that every process knows the
whole L and its c, whatever the loss compares; in pass 2 each sends back its own rows.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypedDict

import torch
from torch import Tensor

from steer.guards import kl
from steer.losses import LogProbs, Loss, Metrics
from steer.team import ALONE, Team, total
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
    before_last: Callable[[], None]
    team: Team


@dataclass(frozen=True)
class Reference:
    """What the reference policy says of S chosen steps: means (N, S, …) fp32, τ (S,), log-probs (N, S) in nats."""

    means: Tensor
    deviations: Tensor
    log_probs: Tensor

    def at(self, numbers: Collection[int]) -> "Reference":
        """Of some rows."""
        some = list(numbers)
        return replace(self, means=self.means[some], log_probs=self.log_probs[some])

    @staticmethod
    def joined(parts: Sequence["Reference"]) -> "Reference":
        """Of all their rows; they have the same steps."""
        means, log_probs = torch.cat([part.means for part in parts]), torch.cat([part.log_probs for part in parts])
        return replace(parts[0], means=means, log_probs=log_probs)

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

    chunks, references  of several processes, those of this one's prompts
    steps    the stochastic steps to learn from, ascending: S of all T
    rewards  (B, K), or (B, K, M) where a loss takes several; of all processes
    """

    chunks: Sequence[Trajectories]
    references: Sequence[Reference]
    steps: Sequence[int]
    rewards: Tensor

    def matrix(self, values: Sequence[Tensor], team: Team = ALONE) -> Tensor:
        """(N, S) of each chunk, of all processes, as one (B, K, S)."""
        return torch.cat(team.gather(values)).view(*self.rewards.shape[:2], len(self.steps))


def two_pass_gradient(
    sampler: Sampler,
    batch: Batch,
    loss: Loss,
    *,
    penalties: Mapping[Penalty, float] | None = None,
    unchanged: bool = False,
    backward: Backward = Tensor.backward,
    before_each: Callable[[], None] = lambda: None,
    before_last: Callable[[], None] = lambda: None,
    team: Team = ALONE,
) -> tuple[float, Metrics]:
    """Adds ∇θ [L + Σ_p w_p · mean over samples of Σ_t p(pθ, p_ref)] to the weights' .grad.

    Returns L, and its metrics with `kl`, the mean KL(pθ ‖ p_ref) of whole trajectories in nats, and the penalties'.

    penalties    with their weights w_p; where S < T their sum is scaled up
    unchanged    the weights are those that drew the batch: pass 1 is not needed
    backward     what is called on each step's scalar (a scaler may come between)
    before_each  called before each chunk of rows
    before_last  called before the denoiser call whose backward is the last: then the processes' sums may be exchanged
    team         each process adds its own share, `count` times: the mean over processes is the gradient
    """
    new = _pass_one(sampler, batch, unchanged, before_each)
    old = [chunk.log_probs[:, list(batch.steps)] for chunk in batch.chunks]
    leaf = batch.matrix(new, team).clone().requires_grad_(True)
    reference = batch.matrix([told.log_probs for told in batch.references], team)
    elements = batch.chunks[0].elements
    value, metrics = loss(LogProbs(leaf, batch.matrix(old, team), reference, elements), batch.rewards)
    (c,) = torch.autograd.grad(value, leaf)

    weights: dict[Penalty, float] = {kl: 0.0, **(penalties or {})}
    backward = counted(backward, len(batch.chunks) * len(batch.steps), before_last)
    found = _pass_two(sampler, batch, c, weights, backward, before_each, team)
    told_all = {penalty.__name__: cost for penalty, cost in found.items()}
    return value.item(), metrics | told_all | {"kl_per_step": found[kl] / batch.chunks[0].log_probs.shape[1]}


def _pass_one(sampler: Sampler, batch: Batch, unchanged: bool, before_each: Callable[[], None]) -> list[Tensor]:
    """log pθ(x_s | x_t) (N, S) of each chunk, without a graph."""
    steps, found = list(batch.steps), []
    for chunk in batch.chunks:
        if unchanged:
            found.append(chunk.log_probs[:, steps])
        else:
            before_each()
            found.append(log_probs(sampler, chunk, steps)[:, steps])
    return found


def _pass_two(
    sampler: Sampler,
    batch: Batch,
    c: Tensor,
    weights: Mapping[Penalty, float],
    backward: Backward,
    before_each: Callable[[], None],
    team: Team,
) -> dict[Penalty, float]:
    """Sends back c_t · ℓ_t and the penalties, step by step; returns these, without their weights."""
    steps, found = list(batch.steps), dict.fromkeys(weights, 0.0)
    per_sample = batch.chunks[0].log_probs.shape[1] / len(steps) / c[..., 0].numel()
    shares = c.flatten(0, 1).chunk(team.count)[team.index].split([len(chunk.rows) for chunk in batch.chunks])
    for chunk, told, share in zip(batch.chunks, batch.references, shares, strict=True):
        before_each()

        def back(t: int, p: Gaussian, x_s: Tensor, share: Tensor = share, told: Reference = told) -> None:
            column = steps.index(t)
            other = told.kernel(column, p.mean)
            sent = (share[:, column].to(p.mean.device) * p.log_prob(x_s)).sum()
            for penalty, weight in weights.items():
                with torch.set_grad_enabled(weight != 0):
                    cost = per_sample * penalty(p, other).sum()
                found[penalty] += cost.item()
                sent = sent + weight * cost
            backward(team.count * sent)

        sampler.replay(chunk, back, steps, grad=True)
    return dict(zip(found, total(team, list(found.values())), strict=True))


def counted(backward: Backward, times: int, before_last: Callable[[], None]) -> Backward:
    """`backward`, to be called so many times; once all but one are done, it calls `before_last`."""
    left = times

    def call(scalar: Tensor) -> None:
        nonlocal left
        backward(scalar)
        left -= 1
        if left == 1:
            before_last()

    if left == 1:
        before_last()
    return call
