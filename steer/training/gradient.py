"""The gradient of any loss on a trajectory's log-probabilities, in the memory of one denoiser call.

L depends on the weights θ through ℓ = log pθ(x_s | x_t) (B, K, T) alone. By the chain rule

    ∇θ L = Σ_{b,k,t} c_bkt ∇θ ℓ_bkt,   c = ∂L/∂ℓ

so pass 1 computes ℓ without a graph and differentiates L with respect to it, and pass 2 visits the steps one at a time
and backpropagates c_t · ℓ_t. Penalties are sums over steps of functions of the step's own kernel: pass 2 adds them.

Where a loss compares the samples of a prompt step by step, c_t depends on their ℓ_t alone: pass 2 computes both, and
pass 1 is skipped.

With several processes, each has some of the prompts. The small matrix ℓ is gathered from all processes, so that each
computes the whole L and its c; in pass 2 each process backpropagates its own rows.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, TypedDict

import torch
from torch import Tensor

from steer.errors import InputError
from steer.reward import Reward, mean_over_frames, score_components
from steer.training.distributed import SINGLE_PROCESS, DistributedContext, sum_over_processes
from steer.training.guards import SlopeLimit, kl
from steer.training.losses import LogProbs, Loss, Metrics
from steer.training.rollout import Kernel, Sampler, Trajectories, log_probs


@dataclass(frozen=True)
class Reference:
    """Log-probabilities and kernels of the reference policy at S chosen steps.

    residuals   statistics (N, S, …) of its kernels, where a penalty needs them: (μ_ref − x_s)/τ; for tokens log x_ref
    deviations  scales (S,) of its kernels: τ; for tokens the probability that a place opens
    log_probs   (N, S) fp64, nats
    """

    residuals: Tensor | None
    deviations: Tensor
    log_probs: Tensor

    def at(self, numbers: Collection[int]) -> "Reference":
        """Select rows."""
        rows = list(numbers)
        residuals = None if self.residuals is None else self.residuals[rows]
        return replace(self, residuals=residuals, log_probs=self.log_probs[rows])

    @staticmethod
    def concatenate(components: Sequence["Reference"]) -> "Reference":
        """Concatenate the rows of references with the same steps."""
        kept = [part.residuals for part in components if part.residuals is not None]
        log_probs = torch.cat([part.log_probs for part in components])
        return replace(components[0], residuals=torch.cat(kept) if kept else None, log_probs=log_probs)

    def kernel(self, column: int, p: Kernel, x_s: Tensor) -> Kernel | None:
        """Return p_ref(· | x_t) at a chosen step with policy kernel p and sample x_s; None without residuals."""
        if self.residuals is None:
            return None
        return p.from_statistics(self.residuals[:, column], self.deviations[column], x_s)


def reference_of(
    sampler: Sampler, stored: Trajectories, steps: Sequence[int], dtype: torch.dtype | None = torch.float32
) -> Reference:
    """Evaluate the current weights as the reference.

    dtype  dtype of the residuals; None if no penalty needs them. bfloat16 is stored as float16, of the same size
    """
    dtype = torch.float16 if dtype == torch.bfloat16 else dtype
    log_probs, deviations, residuals = [], [], []

    def keep(t: int, kernel: Kernel, x_s: Tensor) -> None:
        log_probs.append(kernel.log_prob(x_s).cpu())
        deviations.append(kernel.scale.cpu())
        if dtype is not None:
            residuals.append(kernel.statistics(x_s).to(dtype).cpu())

    sampler.replay(stored, keep, steps)
    kept = torch.stack(residuals, 1) if residuals else None
    return Reference(kept, torch.stack(deviations), torch.stack(log_probs, 1))


@dataclass(frozen=True)
class Batch:
    """B prompts × K samples, prompt after prompt, in chunks of rows that go through the denoiser together.

    chunks             trajectories of this process's prompts
    references         references of the chunks; empty where neither loss, penalty nor log needs them
    steps              the stochastic steps of the gradient, ascending: S of the learned steps
    rewards            (B, K), or (B, K, M) for a loss of several rewards; of all processes
    num_learned_steps  losses and penalties sum over the first this many of the T stochastic steps; None: all
    """

    chunks: Sequence[Trajectories]
    references: Sequence[Reference]
    steps: Sequence[int]
    rewards: Tensor
    num_learned_steps: int | None = None

    @property
    def num_summed_steps(self) -> int:
        """Number of steps in a sum over a trajectory."""
        return self.num_learned_steps or self.chunks[0].log_probs.shape[1]

    def matrix(self, values: Sequence[Tensor], context: DistributedContext = SINGLE_PROCESS) -> Tensor:
        """Gather (N, S) of each chunk from all processes as one (B, K, S)."""
        return torch.cat(context.gather(values)).view(*self.rewards.shape[:2], len(self.steps))

    def local_rows(self, matrix: Tensor, context: DistributedContext = SINGLE_PROCESS) -> Sequence[Tensor]:
        """Return views (n, S) of the gathered (B, K, S), one for each of this process's chunks."""
        return (
            matrix.flatten(0, 1)
            .chunk(context.world_size)[context.rank]
            .split([len(chunk.rows) for chunk in self.chunks])
        )


Backward = Callable[[Tensor], None]


class Penalty(Protocol):
    """A penalty (pθ, p_ref) → (N,) of one step; its name is the name of its metric."""

    __name__: str

    def __call__(self, p: Kernel, reference: Kernel, /) -> Tensor: ...


class GradientOptions(TypedDict):
    """Options of a gradient; see `two_pass_gradient`."""

    penalties: Mapping[Penalty, float]
    on_policy: bool
    backward: Backward
    on_chunk: Callable[[], None]
    before_last: Callable[[], None]
    context: DistributedContext


def two_pass_gradient(
    sampler: Sampler,
    batch: Batch,
    loss: Loss,
    *,
    penalties: Mapping[Penalty, float] | None = None,
    on_policy: bool = False,
    backward: Backward = Tensor.backward,
    on_chunk: Callable[[], None] = lambda: None,
    before_last: Callable[[], None] = lambda: None,
    context: DistributedContext = SINGLE_PROCESS,
) -> tuple[float, Metrics]:
    """Add ∇θ [L + Σ_p w_p · mean over samples of Σ_t p(pθ, p_ref)] to the weights' .grad.

    Returns L and its metrics. Where the batch has references, the metrics include the penalties and `kl`, the mean
    KL(pθ ‖ p_ref) of a trajectory's steps in the window, in nats.

    penalties    penalties with their weights w_p; where S < T their sum is scaled up
    on_policy    whether the current weights drew the batch: pass 1 is then skipped
    backward     called with each step's scalar (for a gradient scaler)
    on_chunk     called before each chunk of rows
    before_last  called before the denoiser call of the last backward: from then on gradients may be synchronised
    context      each process adds `world_size` times its own part: the mean over processes is the gradient
    """
    steps = list(batch.steps)
    coefficients, final_loss = _pass_one(sampler, batch, loss, on_policy, on_chunk, context)
    weights = penalty_weights(batch, penalties or {})
    backward = past_untrained(before_last_call(backward, len(batch.chunks) * len(steps), before_last), sampler)
    totals = dict.fromkeys(weights, 0.0)
    per_sample = batch.num_summed_steps / len(steps) / batch.rewards.shape[:2].numel()
    for number, chunk in enumerate(batch.chunks):
        on_chunk()

        def backward_step(t: int, p: Kernel, x_s: Tensor, number: int = number) -> None:
            column = steps.index(t)
            log_prob = p.log_prob(x_s)
            scalar_loss = (coefficients(number, column, log_prob).to(log_prob.device) * log_prob).sum()
            for penalty, weight in weights.items():
                with torch.set_grad_enabled(weight != 0):
                    cost = per_sample * divergence(penalty, p, x_s, batch.references[number], column).sum()
                totals[penalty] += cost.item()
                scalar_loss = scalar_loss + weight * cost
            backward(context.world_size * scalar_loss)

        sampler.replay(chunk, backward_step, steps, grad=True)
    value, metrics = final_loss()
    costs = dict(zip(totals, sum_over_processes(context, list(totals.values())), strict=True))
    penalty_means = {penalty.__name__: cost for penalty, cost in costs.items()}
    return value, metrics | per_step(penalty_means, batch.num_summed_steps)


def penalty_weights(batch: Batch, penalties: Mapping[Penalty, float]) -> dict[Penalty, float]:
    """Return the weights of the divergences to compute: the penalties, and the KL wherever there is a reference.

    Raises InputError for penalties without a reference.
    """
    if penalties and not batch.references:
        raise InputError("penalties compare with the reference: give the batch its references")
    return {kl: 0.0, **penalties} if batch.references else {}


def per_step(penalty_means: Metrics, steps: int) -> Metrics:
    """Add `kl_per_step` to the metrics of the penalties, where these include the KL of a trajectory."""
    name = kl.__name__
    return penalty_means | ({"kl_per_step": penalty_means[name] / steps} if name in penalty_means else {})


Coefficients = Callable[[int, int, Tensor], Tensor]  # (chunk, column, ℓ (n,)) → c (n,) of one step of a chunk


def _pass_one(
    sampler: Sampler,
    batch: Batch,
    loss: Loss,
    on_policy: bool,
    on_chunk: Callable[[], None],
    context: DistributedContext,
) -> tuple[Coefficients, Callable[[], tuple[float, Metrics]]]:
    """Return c = ∂L/∂ℓ of this process's chunks, and a function that returns L and its metrics after all steps."""
    steps = list(batch.steps)
    new = [chunk.log_probs[:, steps].clone() for chunk in batch.chunks]  # ℓ of this process, the old ones at first
    old = batch.matrix(new, context)
    references = [chunk_reference.log_probs for chunk_reference in batch.references]
    reference = batch.matrix(references, context) if references else None

    def differentiate(values: Tensor) -> tuple[float, Metrics, Sequence[Tensor]]:
        leaf = values.clone().requires_grad_(True)
        with torch.enable_grad():
            value, metrics = loss(LogProbs(leaf, old, reference, batch.chunks[0].elements), batch.rewards)
            (c,) = torch.autograd.grad(value, leaf)
        return value.item(), metrics, batch.local_rows(c, context)

    def stepwise_coefficient(chunk: int, column: int, log_prob: Tensor) -> Tensor:
        new[chunk][:, column] = log_prob.detach().cpu()
        values = old.clone()  # a step depends on no other step: the others' ℓ may stay at their old values
        batch.local_rows(values, context)[chunk][:, column] = new[chunk][:, column]
        return differentiate(values)[2][chunk][:, column]

    # Pass 1 is skipped where every chunk, in every process, has all samples of its prompts.
    whole = all(len(chunk.rows) % batch.rewards.shape[1] == 0 for chunk in batch.chunks)
    if not on_policy and loss.stepwise and all(context.gather([whole])):
        return stepwise_coefficient, lambda: differentiate(batch.matrix(new, context))[:2]
    if not on_policy:
        for chunk, values in zip(batch.chunks, new, strict=True):
            on_chunk()
            values.copy_(log_probs(sampler, chunk, steps)[:, steps])
    value, metrics, full = differentiate(old if on_policy else batch.matrix(new, context))
    return lambda chunk, column, log_prob: full[chunk][:, column], lambda: (value, metrics)


def divergence(penalty: Penalty, p: Kernel, x_s: Tensor, reference: Reference, column: int) -> Tensor:
    """Return the penalty (N,) of one step from the means; without the reference's means, an estimate of the KL.

    The estimate, log pθ(x_s)/p_ref(x_s), has the KL as its mean where pθ drew x_s. Raises InputError for any other
    penalty.
    """
    if (other := reference.kernel(column, p, x_s)) is not None:
        return penalty(p, other)
    if penalty is not kl:
        raise InputError(f"{penalty.__name__} needs the means of the reference: store its residuals")
    log_prob = p.log_prob(x_s).detach()
    return log_prob - reference.log_probs[:, column].to(log_prob.device)


def past_untrained(backward: Backward, sampler: Sampler) -> Backward:
    """Wrap `backward` to skip steps of an untrained denoiser, in pipelines where a step calls one of several."""
    if not sampler.several:
        return backward
    return lambda scalar: backward(scalar) if scalar.requires_grad else None


def before_last_call(backward: Backward, times: int, before_last: Callable[[], None]) -> Backward:
    """Wrap `backward`, to be called `times` times, to call `before_last` before the last call."""
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


def reward_gradient(
    sampler: Sampler,
    batch: Batch,
    reward: Reward,
    last_steps: int,
    *,
    limit: SlopeLimit | None = None,
    penalties: Mapping[Penalty, float],
    on_policy: bool,
    backward: Backward,
    on_chunk: Callable[[], None],
    before_last: Callable[[], None] = lambda: None,
    context: DistributedContext = SINGLE_PROCESS,
) -> tuple[float, Metrics]:
    """Add ∇θ [−mean reward + Σ_p w_p · mean over samples of Σ_t p(pθ, p_ref)] to the weights' .grad.

    The sums go over the batch's steps, at their stored x_t: a penalty depends on the policy there, not on the path to
    x_t. Returns −mean reward and, where the batch has references, the penalties of these steps with `kl`, in nats. The
    graph holds k denoiser calls and the decoder. The other options are as in `two_pass_gradient`.

    limit  a bound on the slope of the reward at each image; its unit is measured first, in the first update

    Raises InputError where the current weights did not draw the batch.
    """
    if not on_policy:
        raise InputError("reward backpropagation needs samples of the current weights: draw new ones")
    count, steps = sum(len(chunk.rows) for chunk in batch.chunks), list(batch.steps)  # of each process
    weights = penalty_weights(batch, penalties)
    value, totals = 0.0, dict.fromkeys(weights, 0.0)
    count_all = len(batch.chunks) * (1 + len(steps) * bool(penalties))
    backward = past_untrained(before_last_call(backward, count_all, before_last), sampler)
    limit = limit or SlopeLimit(None)
    if limit.factor is not None and limit.base is None:
        slopes = [reward_slopes(sampler.finish(chunk, last_steps), reward, chunk) for chunk in batch.chunks]
        limit.base = torch.cat(context.gather(slopes)).median().item()
    for number, chunk in enumerate(batch.chunks):
        on_chunk()
        images = limit.apply(sampler.finish(chunk, last_steps), count)
        rewards = _rewards(images, reward, chunk)
        if sampler.several and not rewards.requires_grad:
            raise InputError(f"no denoiser that is trained is called in the last {last_steps} steps: raise last_steps")
        value -= rewards.sum().item() / count
        backward(-rewards.sum().to(images.device) / count)

        def backward_step(t: int, p: Kernel, x_s: Tensor, number: int = number) -> None:
            there = batch.references[number]
            costs = {one: divergence(one, p, x_s, there, steps.index(t)).sum() / count for one in weights}
            for penalty, cost in costs.items():
                totals[penalty] += cost.item()
            if penalties:
                backward(torch.stack([weights[penalty] * cost for penalty, cost in costs.items()]).sum())

        if weights:
            sampler.replay(chunk, backward_step, steps, grad=bool(penalties))
    value, *costs = (one / context.world_size for one in sum_over_processes(context, [value, *totals.values()]))
    penalty_means = {penalty.__name__: cost for penalty, cost in zip(weights, costs, strict=True)}
    return value, per_step(penalty_means, len(steps))


def _rewards(images: Tensor, reward: Reward, chunk: Trajectories) -> Tensor:
    """Return the rewards (n,) of the images of a chunk, with a graph."""
    return mean_over_frames(images, partial(score_components, reward, prompts=chunk.rows.prompts), reward)[0]


def reward_slopes(images: Tensor, reward: Reward, chunk: Trajectories) -> Tensor:
    """Return ‖∂r/∂x‖ (n,) at the images of a chunk, on the CPU."""
    leaf = images.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(_rewards(leaf, reward, chunk).sum(), leaf)
    return gradient.float().flatten(1).norm(dim=1).cpu()
