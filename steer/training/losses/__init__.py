"""Losses of finetuning from rewards, as functions of log-probabilities (B, K, T) and rewards (B, K).

With T stochastic steps (τ > 0) from noise to an image, sample k of prompt b, policy π and reference π_ref:

r̂_t = log π(x_s | x_t) − log π_ref(x_s | x_t)
r̂   = Σ_t r̂_t = log π(τ)/π_ref(τ), the implicit reward of a whole trajectory (DPO, arXiv 2305.18290)

A loss is a function of the matrices (B, K, T) and (B, K) alone, without access to a model.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from steer.arguments import Settings, argument
from steer.errors import InputError

Metrics = dict[str, float]
Unit = Literal["nat", "element"]
EPS = 1e-6  # added to the standard deviation of rewards, so that rounding differences do not count


@dataclass(frozen=True)
class LogProbs:
    """log p(x_s | x_t) of the T stochastic steps of K samples for each of B prompts.

    new        (B, K, T) fp64, nats summed over a sample's elements, of the trained policy; may require grad
    old        (B, K, T) of the policy that drew the samples, a constant
    reference  (B, K, T) of the reference policy, a constant; None where neither loss nor log needs it
    elements   D ≥ 1, elements per sample

    Raises InputError where the shapes differ or there is no step.
    """

    new: Tensor
    old: Tensor
    reference: Tensor | None
    elements: int

    def __post_init__(self) -> None:
        given = [one for one in (self.new, self.old, self.reference) if one is not None]
        shapes = [tuple(tensor.shape) for tensor in given]
        if len(set(shapes)) > 1 or len(shapes[0]) != 3 or 0 in shapes[0]:
            raise InputError(
                f"log-probabilities (new, old, reference) of shapes {shapes} must all be one (prompts, samples, steps)"
            )
        if self.elements < 1:
            raise InputError(f"elements must be at least 1, got {self.elements}")

    def per(self, unit: Unit) -> "LogProbs":
        """Convert from nats to a unit: element divides by D, as β and ε of DDPO and D3PO assume."""
        scale = 1 / self.elements if unit == "element" else 1.0
        reference = None if self.reference is None else self.reference * scale
        return replace(self, new=self.new * scale, old=self.old * scale, reference=reference)

    def required_reference(self) -> Tensor:
        """Return the reference's log-probabilities. Raises InputError if they were not computed."""
        if self.reference is None:
            raise InputError("this loss compares with the reference policy: compute its log-probabilities")
        return self.reference.detach()

    def implicit_rewards(self) -> Tensor:
        """Return r̂_t = new − reference (B, K, T), differentiable w.r.t. `new` alone."""
        return self.new - self.required_reference()


class Loss(Protocol):
    """A loss of finetuning: a frozen dataclass of its hyperparameters, called once per update.

    whole_trajectory  the loss couples all steps of a sample, and cannot be computed from some of the steps
    stepwise          the derivative w.r.t. a step of a prompt's samples depends on that step of these samples alone:
                      the gradient needs no first pass over all steps
    uses_reference    the loss depends on `log_probs.reference`, which else is evaluated only for penalties and logs
    """

    whole_trajectory: ClassVar[bool] = False
    stepwise: ClassVar[bool] = False
    uses_reference: ClassVar[bool] = True

    def __call__(self, log_probs: LogProbs, signal: Tensor, /) -> tuple[Tensor, Metrics]:
        """Return the loss, a scalar differentiable w.r.t. `log_probs.new` alone, and metrics, plain numbers.

        signal: rewards (B, K), higher is better; a loss may document other inputs. Raises InputError for others.
        """
        ...


def checked_rewards(log_probs: LogProbs, rewards: Tensor, group: int = 1, several: bool = False) -> Tensor:
    """Return the rewards with the device and dtype of the log-probabilities.

    rewards   (B, K), or with `several` also (B, K, M)
    group     smallest number of samples per prompt for the loss

    Raises InputError for another shape, too few samples, or a reward that is not finite.
    """
    prompts, samples = log_probs.new.shape[:2]
    if rewards.shape[:2] != (prompts, samples) or rewards.dim() not in ((2, 3) if several else (2,)):
        rest = " or (prompts, samples, rewards)" if several else ""
        raise InputError(
            f"rewards of shape {tuple(rewards.shape)} must be (prompts, samples) = ({prompts}, {samples}){rest}"
        )
    if samples < group:
        raise InputError(f"num_generations {samples} must be at least {group}: this loss compares samples")
    if count := int((~rewards.isfinite()).sum()):
        raise InputError(f"rewards must be finite, {count} of {rewards.numel()} are not: fix or drop these samples")
    return rewards.detach().to(log_probs.new)


def accuracy(implicit: Tensor, better: Tensor) -> float:
    """Return the fraction (0..1) of pairs that r̂ (B, K) ranks like the rewards; ties count half, NaN without pairs.

    better: (B, K, K) true where the first of two samples of a prompt has the higher reward.
    """
    difference = (implicit[:, :, None] - implicit[:, None, :]).detach()[better]
    return float((difference.sign() / 2 + 0.5).mean()) if len(difference) else torch.nan


# Preferences without a reward model: D3PO (arXiv 2311.13231), for each pair of a winner w and a loser l of one prompt:
#
# per step    − (1/T) Σ_t log sigmoid(β (r̂_t^w − r̂_t^l))      (an image's preference is applied to every step)
# trajectory  − log sigmoid(β Σ_t (r̂_t^w − r̂_t^l))            (DPO, arXiv 2305.18290, on whole trajectories)
#
# The authors' code clamps the ratio π/π_ref to 1 ± 0.1, which keeps the loss within [0.683, 0.703] and has no gradient
# outside. There is no clamp here.
#
# Where preferences follow Bradley and Terry, P(w ≻ l) = sigmoid(r^w − r^l), the trajectory form is minimised by
# π(τ) ∝ π_ref(τ) exp(r(τ)/β). The form per step, in general, is not: it credits each step with the others' effect.


def dominates(rewards: Tensor) -> Tensor:
    """Return (B, K, K), true where the first of two samples of a prompt is the winner.

    rewards (B, K), or (B, K, M) for Pareto dominance: no worse in all M, better in one. Ties and incomparable pairs
    are false in both orders.
    """
    rewards = rewards if rewards.dim() == 3 else rewards[..., None]
    first, second = rewards[:, :, None], rewards[:, None]
    return (first >= second).all(-1) & (first > second).any(-1)


def preference_metrics(log_probs: LogProbs, better: Tensor) -> Metrics:
    """Return the metrics of preference losses, over all pairs of the batch.

    accuracy  fraction (0..1) of pairs whose winner has the higher implicit reward; ties count half
    margin    nats, mean of Σ_t (r̂_t^w − r̂_t^l)
    pairs     number of pairs; without any, accuracy and margin are NaN
    """
    implicit = log_probs.implicit_rewards().detach().sum(-1)
    margins = (implicit[:, :, None] - implicit[:, None, :])[better]
    margin = float(margins.mean()) if len(margins) else torch.nan
    return {"accuracy": accuracy(implicit, better), "margin": margin, "pairs": float(len(margins))}


@dataclass(frozen=True)
class D3PO(Settings, Loss):
    """D3PO as published: every step of the winner is preferred to the same step of the loser.

    beta  > 0, per `unit`; published 0.1 for log-probabilities averaged over the elements
    unit  unit of the log-probabilities: element or nat

    Takes rewards (B, K), or (B, K, M), where a winner is better in one and worse in none. K ≥ 2.
    The loss is the mean over pairs and steps; without a pair, loss and gradient are 0.
    """

    beta: float = argument(0.1, "(0, inf)")
    unit: Unit = "element"
    stepwise: ClassVar[bool] = True

    def __call__(self, log_probs: LogProbs, rewards: Tensor) -> tuple[Tensor, Metrics]:
        better = dominates(checked_rewards(log_probs, rewards, group=2, several=True))
        implicit = log_probs.per(self.unit).implicit_rewards()  # r̂_t (B, K, T)
        if self.whole_trajectory:
            implicit = implicit.sum(-1)  # r̂ (B, K)
        logits = self.beta * (implicit[:, :, None] - implicit[:, None, :])[better]  # (pairs, T), or (pairs,)
        loss = -logsigmoid(logits).sum() / max(logits.numel(), 1)  # a sum: it has a gradient (0) without any pair
        return loss, preference_metrics(log_probs, better)


@dataclass(frozen=True)
class D3POTrajectory(D3PO):
    """DPO on whole trajectories, too large for D3PO's authors (over 100 GB); computed one step at a time here.

    beta  > 0, per `unit`. The weight of KL(π ‖ π_ref) of the whole trajectory against the reward, as for the sum of
          D3PO's steps: hence the same 0.1. The first gradient is T times D3PO's.

    The loss is the mean over pairs.
    """

    whole_trajectory: ClassVar[bool] = True
    stepwise: ClassVar[bool] = False


# Regression of reward differences on differences of r̂: PRDP (arXiv 2402.08714), for each pair (a, b) of one prompt:
#
# l(r̂)  = (r̂^a − r̂^b − (r^a − r^b)/β)²
# loss   = mean over pairs of max(l(r̂), l(clip(r̂)))
# clip   : each r̂_t into [r̂old_t − ε, r̂old_t + ε], where r̂old_t = log π_old(x_s | x_t) − log π_ref(x_s | x_t)
#
# It is zero for all pairs exactly where π(τ) ∝ π_ref(τ) exp(r(τ)/β), the optimum of E r − β KL(π ‖ π_ref).


@dataclass(frozen=True)
class PRDP(Settings, Loss):
    """PRDP, in nats summed over elements and steps; the reductions of the published β and ε are not documented.

    beta  > 0, reward per nat. Start from std(r)/10: trajectories with rewards a standard deviation apart then differ
          by 10 nats. The default assumes rewards standardised to a deviation of 1; sweep it otherwise.
    clip  ε > 0, nats per step, inf for none: how far a step may move before new samples are drawn. At 0.1, 20 steps
          can move by 2 nats, a fifth of these 10, while fp32 sums over 10⁴ elements are accurate to 10⁻³ nats.

    Takes rewards (B, K), K ≥ 2. Right after sampling π = π_old and the clip has no effect: make several updates.
    Metrics, over all pairs of the batch:

    accuracy  fraction (0..1) of pairs of different rewards that r̂ ranks alike; ties count half, NaN without a pair
    clipped   fraction of steps out of the proximal range
    error     nats, root mean square of r̂^a − r̂^b − (r^a − r^b)/β
    """

    beta: float = argument(0.1, "(0, inf)")
    clip: float = argument(0.1, "(0, inf]")
    whole_trajectory: ClassVar[bool] = True

    def __call__(self, log_probs: LogProbs, rewards: Tensor) -> tuple[Tensor, Metrics]:
        rewards = checked_rewards(log_probs, rewards, group=2)
        implicit = log_probs.implicit_rewards()  # r̂_t (B, K, T)
        before = log_probs.old.detach() - log_probs.required_reference()  # r̂old_t
        proximal = implicit.clamp(before - self.clip, before + self.clip)
        target = _differences(rewards) / self.beta
        error = _differences(implicit.sum(-1)) - target
        error_clipped = _differences(proximal.sum(-1)) - target
        loss = torch.maximum(error**2, error_clipped**2).mean()
        return loss, {
            "accuracy": accuracy(implicit.sum(-1), rewards[:, :, None] > rewards[:, None, :]),
            "clipped": float((proximal != implicit).float().mean()),
            "error": float((error.detach() ** 2).mean().sqrt()),
        }


def _differences(values: Tensor) -> Tensor:
    """Return (B, K) → (B, K(K−1)/2): value of a minus value of b, for every a < b."""
    a, b = torch.triu_indices(values.shape[1], values.shape[1], offset=1, device=values.device)
    return values[:, a] - values[:, b]


# Self-play against a judge: DNO (arXiv 2404.03715). With r_t = E_{y ~ π_t} P(x ≻ y), the win rate against the
# policy π_t that drew the samples, for each pair (a, b) of one prompt:
#
# z    = β Σ_t log π/π_t (a) − the same of b
# loss = mean over pairs of −c log sigmoid(z) − (1 − c) log sigmoid(−z),   c = sigmoid((r_t^a − r_t^b)/T)
#
# At T = 1 it is minimised by π ∝ π_t exp(r_t/β), soft policy iteration: the average of the iterates approaches the Nash
# equilibrium of the judge's game, which exists even if the preferences are not transitive.


@dataclass(frozen=True)
class DNO(Settings, Loss):
    """Direct Nash optimisation: differences of win rates as soft labels, about the policy that drew the samples.

    beta         > 0, per `unit`, as in D3POTrajectory: the smaller, the further a rollout moves the policy
    temperature  T > 0 of the labels: 1 as published, near 0 for winners and losers (DNO's practical form)
    unit         unit of the log-probabilities: element or nat

    Takes win rates (B, K), K ≥ 2. Metrics: accuracy, the fraction of pairs of different win rates that log π/π_t ranks
    alike (ties count half); labels, the mean of |2c − 1|.
    """

    beta: float = argument(0.1, "(0, inf)")
    temperature: float = argument(1.0, "(0, inf)")
    unit: Unit = "element"
    whole_trajectory: ClassVar[bool] = True
    uses_reference: ClassVar[bool] = False

    def __call__(self, log_probs: LogProbs, rewards: Tensor) -> tuple[Tensor, Metrics]:
        rewards, scaled = checked_rewards(log_probs, rewards, group=2), log_probs.per(self.unit)
        moved = (scaled.new - scaled.old.detach()).sum(-1)  # log π/π_t (B, K)
        logits = self.beta * _differences(moved)
        labels = torch.sigmoid(_differences(rewards) / self.temperature)
        loss = -(labels * logsigmoid(logits) + (1 - labels) * logsigmoid(-logits)).mean()
        return loss, {
            "accuracy": accuracy(moved, rewards[:, :, None] > rewards[:, None, :]),
            "labels": float((2 * labels - 1).abs().mean()),
        }


# Distillation of a posterior: BRAIn (arXiv 2402.02479). With G the event that a sample is good, p(G | τ) ∝ exp(r/γ), or
# sigmoid((r − r̄)/γ), the target is p_ref(τ | G) ∝ p_ref(τ) p(G | τ). Over a prompt's K samples of π_old:
#
# α    = softmax_K[log p_ref/π_old (τ) + log p(G | τ)],   β = softmax_K[log π/π_old (τ)]
# loss = −Σ α log β,   gradient −Σ (α − β) ∇log π(τ): β is the self-normalised baseline
#
# It is the listwise form of PRDP: α = β for all samples exactly where π(τ) ∝ p_ref(τ) p(G | τ). With two samples, the
# arg max in place of α and π_old = p_ref it is DPO.


@dataclass(frozen=True)
class BRAIn(Settings, Loss):
    """BRAIn: learns from all samples of a prompt at once, towards the reference conditioned on good samples.

    gamma  γ > 0, in the unit of the reward: differences of γ are a factor e in p(G | τ)
    form   form of p(G | τ): exp(r/γ); or sigmoid((r − r̄)/γ) about the mean of the prompt's samples, which gives less
           weight to the very best
    clip   ε > 0, nats per step, inf for none: a step that differs from π_old by more has no gradient, as in PRDP
    unit   unit of the log-probabilities in both softmaxes. In nats, one entry of a softmax is 1 as soon as samples
           differ by a few nats; per element, the optimum of exp is p_ref exp(D r/γ)

    Takes rewards (B, K), K ≥ 2. Metrics: ess, the effective share of samples in α, (0, 1]; clipped, the fraction of
    steps out of range.
    """

    gamma: float = argument(1.0, "(0, inf)")
    form: Literal["exp", "sigmoid"] = "exp"
    clip: float = argument(0.1, "(0, inf]")
    unit: Unit = "element"
    whole_trajectory: ClassVar[bool] = True

    def __call__(self, log_probs: LogProbs, rewards: Tensor) -> tuple[Tensor, Metrics]:
        rewards = checked_rewards(log_probs, rewards, group=2)
        scale = 1 / log_probs.elements if self.unit == "element" else 1.0
        old = log_probs.old.detach()
        good = rewards / self.gamma
        if self.form == "sigmoid":
            good = logsigmoid(good - good.mean(1, keepdim=True))
        alpha = (scale * (log_probs.required_reference() - old).sum(-1) + good).softmax(1)
        moved = log_probs.new - old  # (B, K, T)
        proximal = moved.clamp(-self.clip, self.clip)
        losses = [-(alpha * (scale * one.sum(-1)).log_softmax(1)).sum(1) for one in (moved, proximal)]
        ess = 1 / alpha.square().sum(1) / alpha.shape[1]
        clipped = (proximal != moved).float().mean()
        return torch.maximum(*losses).mean(), {"ess": float(ess.mean()), "clipped": float(clipped)}


# Importance-sampled policy gradients: DDPO (arXiv 2305.13301) and GRPO (Flow-GRPO, arXiv 2505.05470). With the ratio
# ρ_t = π(x_s | x_t)/π_old(x_s | x_t) and an advantage A per sample, both minimise PPO's (arXiv 1707.06347)
#
# loss = mean over samples and steps of max(−A ρ_t, −A clip(ρ_t, 1 − ε, 1 + ε))
#
# They differ in the advantage: it is an input of DDPO, while GRPO standardises the rewards of each prompt's samples.


def clipped_objective(log_probs: LogProbs, advantages: Tensor, clip: float) -> tuple[Tensor, Metrics]:
    """Return the loss above for advantages (B, K), with ρ in the unit of the log-probabilities.

    Metrics: clipped, the fraction (0..1) of steps with ρ_t out of range; ratio, the largest |ρ_t − 1|.
    """
    ratio = (log_probs.new - log_probs.old.detach()).exp()
    negated_advantages = -advantages[..., None]
    loss = torch.maximum(negated_advantages * ratio, negated_advantages * ratio.clamp(1 - clip, 1 + clip)).mean()
    deviation = (ratio.detach() - 1).abs()
    return loss, {"clipped": float((deviation > clip).float().mean()), "ratio": float(deviation.max())}


def group_advantages(rewards: Tensor, scale: bool) -> Tensor:
    """Return A = (r − mean_K)/(std_K + 10⁻⁶) of rewards (B, K), or r − mean_K; exactly 0 for equal rewards."""
    advantages = rewards - rewards.mean(1, keepdim=True)
    if scale:
        advantages = advantages / (rewards.std(1, correction=0, keepdim=True) + EPS)
    # a mean of equal numbers may be off by its last bit
    return torch.where(rewards.amax(1, keepdim=True) > rewards.amin(1, keepdim=True), advantages, 0.0)


@dataclass(frozen=True)
class DDPO(Settings, Loss):
    """DDPO's importance-sampling estimator, one ratio per step.

    clip            ε > 0, inf for none; published 1e-4 for log-probabilities averaged over the elements
    unit            unit of the log-probabilities: element or nat
    advantage_clip  > 0, inf for none: advantages are clipped to ± this; 5 in the authors' ddpo-pytorch

    The signal is advantages (B, K), already normalised (steer.training.losses.PerPromptStatTracker).
    """

    clip: float = argument(1e-4, "(0, inf]")
    unit: Unit = "element"
    advantage_clip: float = argument(5.0, "(0, inf]")
    stepwise: ClassVar[bool] = True
    uses_reference: ClassVar[bool] = False

    def __call__(self, log_probs: LogProbs, signal: Tensor) -> tuple[Tensor, Metrics]:
        advantages = checked_rewards(log_probs, signal).clamp(-self.advantage_clip, self.advantage_clip)
        return clipped_objective(log_probs.per(self.unit), advantages, self.clip)


@dataclass(frozen=True)
class GRPO(Settings, Loss):
    """GRPO: the samples of a prompt are one another's baseline.

    clip   ε > 0, inf for none; 1e-4 in the authors' Flow-GRPO code (1e-5 to 1e-3 by task), averaged over the elements
    unit   unit of the log-probabilities: element or nat
    scale  divide by the group's standard deviation (over K, not K − 1, as in the authors' code); false is Dr. GRPO
           (arXiv 2503.20783), which does not upweight prompts whose samples hardly differ

    Takes rewards (B, K), K ≥ 2. A prompt with equal rewards contributes nothing: advantages 0.
    """

    clip: float = argument(1e-4, "(0, inf]")
    unit: Unit = "element"
    scale: bool = True
    stepwise: ClassVar[bool] = True
    uses_reference: ClassVar[bool] = False

    def __call__(self, log_probs: LogProbs, rewards: Tensor) -> tuple[Tensor, Metrics]:
        advantages = group_advantages(checked_rewards(log_probs, rewards, group=2), self.scale)
        return clipped_objective(log_probs.per(self.unit), advantages, self.clip)


class PerPromptStatTracker:
    """A tracker of the last `size` rewards of every prompt, for DDPO's advantages; saved and restored with a run.

    A = (r − mean)/(std + 10⁻⁶) over the prompt's latest rewards, including the current ones, once there are enough;
    until then, over the rewards of the whole batch.

    size       rewards per prompt, at least 2; published 16
    min_count  2..size, rewards needed before the prompt's own statistics are used; published 16
    """

    def __init__(self, size: int = 16, min_count: int = 16) -> None:
        if not 2 <= min_count <= size:
            raise InputError(f"min_count must be from 2 to size, got {min_count} and {size}")
        self.size, self.min_count = size, min_count
        self._rewards: dict[str, deque[float]] = {}

    def __call__(self, prompts: Sequence[str], rewards: Tensor) -> Tensor:
        """Record rewards (B, K) of B prompts (repeats allowed) and return their advantages (B, K) fp32.

        Raises InputError, and records nothing, where shapes differ or a reward is not finite.
        """
        if rewards.dim() != 2 or len(prompts) != len(rewards):
            raise InputError(f"rewards of shape {tuple(rewards.shape)} must be ({len(prompts)} prompts, samples)")
        if not rewards.isfinite().all():
            raise InputError("rewards must be finite: fix or drop the samples where they are not")
        exact = rewards.detach().double().cpu()
        for prompt, row in zip(prompts, exact.tolist(), strict=True):
            self._rewards.setdefault(prompt, deque(maxlen=self.size)).extend(row)
        rows = []
        for prompt, row in zip(prompts, exact, strict=True):
            own = self._rewards[prompt]
            known = torch.tensor(own, dtype=torch.float64) if len(own) >= self.min_count else exact
            rows.append((row - known.mean()) / (known.std(correction=0) + EPS))
        return torch.stack(rows).to(rewards.device, torch.float32)

    def state(self) -> dict[str, Any]:
        """Return the rewards for JSON, which keeps floats to the last bit."""
        return {"rewards": {prompt: list(rewards) for prompt, rewards in self._rewards.items()}}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore from `state`. Raises InputError for anything else."""
        if not isinstance(saved := state.get("rewards"), Mapping):
            raise InputError("the saved tracker has no rewards: start with a new one")
        self._rewards = {prompt: deque(rewards, maxlen=self.size) for prompt, rewards in saved.items()}


@dataclass(frozen=True)
class Filtered(Settings, Loss):
    """Reward-filtered finetuning: maximise the likelihood of each prompt's best samples (RAFT, arXiv 2304.06767).

    loss = − mean over the best n = max(1, keep·K rounded) samples of each prompt and all steps of (1/D) log π(x_s|x_t)

    The loss does not keep the policy near the reference: add a KL penalty (`steer.training.gradient`).

    keep  fraction of samples, above 0 and at most 1; at least one sample is kept. 0.25 is the best of four.

    Takes rewards (B, K); of equal rewards the earlier sample is kept. Of rewards (B, K, M) the Pareto front is kept in
    place of the best n: the samples that no other dominates (Parrot, arXiv 2401.05675). Each prompt counts alike.
    Metrics: kept, samples per prompt; lift, the mean reward (the sum of the M) of the kept samples minus the mean of
    all.
    """

    keep: float = argument(0.25, "(0, 1]")
    stepwise: ClassVar[bool] = True
    uses_reference: ClassVar[bool] = False

    def __call__(self, log_probs: LogProbs, rewards: Tensor) -> tuple[Tensor, Metrics]:
        rewards = checked_rewards(log_probs, rewards, several=True)
        kept = self.kept(rewards).to(rewards)
        shares = kept / kept.sum(1, keepdim=True)
        loss = -(shares[..., None] * log_probs.per("element").new).sum(1).mean()
        total = rewards.sum(-1) if rewards.dim() == 3 else rewards
        lift = (shares * total).sum(1).mean() - total.mean()
        return loss, {"kept": float(kept.sum(1).mean()), "lift": float(lift)}

    def kept(self, rewards: Tensor) -> Tensor:
        """Return (B, K), true for the samples to imitate of rewards (B, K) or (B, K, M)."""
        if rewards.dim() == 3:
            return ~dominates(rewards).any(1)
        count = max(1, round(self.keep * rewards.shape[1]))
        best = rewards.argsort(dim=1, descending=True, stable=True)[:, :count]
        return torch.zeros_like(rewards, dtype=torch.bool).scatter(1, best, True)
