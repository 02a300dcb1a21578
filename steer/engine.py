"""The gradient of any loss of a trajectory's log-probabilities, in the memory of one denoiser call.

L depends on the weights θ through ℓ = log pθ(x_s | x_t) (B, K, T) alone. By the chain rule

    ∇θ L = Σ_{b,k,t} c_bkt ∇θ ℓ_bkt,   c = ∂L/∂ℓ

so pass 1 takes ℓ without a graph and differentiates L there, and pass 2 goes over the steps one at a time and sends
back c_t · ℓ_t. Penalties are sums over steps of something that the step's own kernel tells: they join in pass 2.

Where a loss compares the samples of a prompt step by step, c_t follows from their ℓ_t alone: pass 2 finds both, and
there is no pass 1.

Of several processes each has some of the prompts. ℓ of all is small: it is gathered, so that every process knows the
whole L and its c, whatever the loss compares; in pass 2 each sends back its own rows.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Protocol, TypedDict

import torch
from torch import Tensor

from steer.batch import Batch, Reference
from steer.coefficients import AllSteps, Coefficients, OwnStep
from steer.errors import InputError
from steer.guards import kl
from steer.losses import LogProbs, Loss, Metrics
from steer.team import ALONE, Team, total
from steer.trajectory import Sampler, log_probs
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

    Returns L, and its metrics with `kl`, the mean KL(pθ ‖ p_ref) of a trajectory's steps in the window, in nats, and
    the penalties'.

    penalties    with their weights w_p; where S < T their sum is scaled up
    unchanged    the weights are those that drew the batch: pass 1 is not needed
    backward     what is called on each step's scalar (a scaler may come between)
    before_each  called before each chunk of rows
    before_last  called before the denoiser call whose backward is the last: then the processes' sums may be exchanged
    team         each process adds its own share, `count` times: the mean over processes is the gradient
    """
    old = batch.matrix([chunk.log_probs[:, list(batch.steps)] for chunk in batch.chunks], team)
    reference = batch.matrix([told.log_probs for told in batch.references], team)
    seen = LogProbs(old, old, reference, batch.chunks[0].elements)
    coefficients: Coefficients
    if not unchanged and _step_by_step(loss, batch, team):
        coefficients = OwnStep(seen, loss, batch, team)
    else:
        new = old if unchanged else batch.matrix(_pass_one(sampler, batch, before_each), team)
        coefficients = AllSteps(replace(seen, new=new), loss, batch, team)
    weights: dict[Penalty, float] = {kl: 0.0, **(penalties or {})}
    backward = counted(backward, len(batch.chunks) * len(batch.steps), before_last)
    found = _pass_two(sampler, batch, coefficients, weights, backward, before_each, team)
    value, metrics = coefficients.loss()
    told_all = {penalty.__name__: cost for penalty, cost in found.items()}
    return value, metrics | told_all | {"kl_per_step": found[kl] / batch.counted}


def _step_by_step(loss: Loss, batch: Batch, team: Team) -> bool:
    """Whether c of a step follows from its own ℓ, and the samples of a prompt are in one chunk, in every process."""
    whole = all(len(chunk.rows) % batch.rewards.shape[1] == 0 for chunk in batch.chunks)
    return bool(getattr(loss, "stepwise", False)) and all(team.gather([whole]))


def _pass_one(sampler: Sampler, batch: Batch, before_each: Callable[[], None]) -> list[Tensor]:
    """log pθ(x_s | x_t) (N, S) of each chunk, without a graph."""
    steps, found = list(batch.steps), []
    for chunk in batch.chunks:
        before_each()
        found.append(log_probs(sampler, chunk, steps)[:, steps])
    return found


def _pass_two(
    sampler: Sampler,
    batch: Batch,
    coefficients: Coefficients,
    weights: Mapping[Penalty, float],
    backward: Backward,
    before_each: Callable[[], None],
    team: Team,
) -> dict[Penalty, float]:
    """Sends back c_t · ℓ_t and the penalties, step by step; returns these, without their weights."""
    steps, found = list(batch.steps), dict.fromkeys(weights, 0.0)
    per_sample = batch.counted / len(steps) / batch.rewards.shape[:2].numel()
    for number, (chunk, told) in enumerate(zip(batch.chunks, batch.references, strict=True)):
        before_each()

        def back(t: int, p: Gaussian, x_s: Tensor, number: int = number, told: Reference = told) -> None:
            column = steps.index(t)
            log_prob = p.log_prob(x_s)
            sent = (coefficients(number, column, log_prob).to(p.mean.device) * log_prob).sum()
            for penalty, weight in weights.items():
                with torch.set_grad_enabled(weight != 0):
                    cost = per_sample * divergence(penalty, p, x_s, told, column).sum()
                found[penalty] += cost.item()
                sent = sent + weight * cost
            backward(team.count * sent)

        sampler.replay(chunk, back, steps, grad=True)
    return dict(zip(found, total(team, list(found.values())), strict=True))


def divergence(penalty: Penalty, p: Gaussian, x_s: Tensor, reference: Reference, column: int) -> Tensor:
    """The penalty (N,) of one step, from the means; without those of the reference, log pθ/p_ref of x_s for the KL.

    That one has the KL as its mean where pθ drew x_s. Raises InputError for any other penalty.
    """
    if (other := reference.kernel(column, x_s)) is not None:
        return penalty(p, other)
    if penalty is not kl:
        raise InputError(f"{penalty.__name__} needs the means of the reference: keep its residuals")
    return (p.log_prob(x_s) - reference.log_probs[:, column].to(p.mean.device)).detach()


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
