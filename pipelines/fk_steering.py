"""Feynman–Kac steering of a diffusers pipeline (arXiv 2501.06848)."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Generator, Tensor, nn

from steer.assets import ADAPTERS
from steer.diffusion.batching import ActiveRows, is_offloaded
from steer.diffusion.differentiable import computes_in_fp16, differentiable, per_sample_gradients
from steer.diffusion.lookahead import coarse_steps, few_step_adapter
from steer.diffusion.rehearsal import check_verified
from steer.diffusion.schedules import draw_guided, has_other_noise
from steer.diffusion.short_schedule import check_movable
from steer.diffusion.step_hooks import SolverStep, StepOverride
from steer.diffusion.value import Value, check_use, load_value, value_of_reward
from steer.errors import InputError, UnsupportedPipelineError
from steer.pipelines.base import ResamplingInfo, SteeringOutput, SteeringPipeline, route_eta, steering_call
from steer.pipelines.disagreement import agreed, disagreements, term_signs
from steer.pipelines.particle_batch import ParticleBatch
from steer.pipelines.settings import ADAPTER, FKSettings, IntermediateSettings, Prompts, StepSettings
from steer.pipelines.token_batch import batch_class
from steer.reward import Reward, RewardError, Submit, run_in_background
from steer.rewards.compose import linear_terms
from steer.smc.particles import FeynmanKac, Particles

ResampleResult = tuple[Particles, Tensor | None]  # particles, and ancestors (B, n); None: all stay


class Algorithm(Protocol):
    """A rule that reweights particles by intermediate rewards (B, K) and selects ancestors (B, count) of the slots.

    `FeynmanKac` resamples by weight; `Selection` (SVDD, beam search) keeps the best.
    """

    @property
    def lam(self) -> float: ...

    def reweight(self, particles: Particles, rewards: Tensor, progress: float) -> Particles: ...

    def select(self, particles: Particles, generator: Generator, count: int | None = None) -> ResampleResult: ...


SelectionRule = Callable[[Algorithm, Particles, int, Generator], ResampleResult]


def resample_down(algorithm: Algorithm, particles: Particles, count: int, generator: Generator) -> ResampleResult:
    """Draw `count` of K particles by their weights: unbiased, so the distribution stays the same."""
    return algorithm.select(particles, generator, count)


def top_k(algorithm: Algorithm, particles: Particles, count: int, generator: Generator) -> ResampleResult:
    """Keep the `count` of K particles with the highest intermediate reward: a search, without a known distribution."""
    survivors = top_k_indices(particles.path.rewards[-1], count)
    return particles.resample(survivors, torch.ones(len(survivors), dtype=torch.bool)), survivors


def top_k_indices(rewards: Tensor, count: int) -> Tensor:
    """Return the ascending indices (B, count) of the highest rewards of (B, M); the lower index wins ties."""
    return rewards.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(dim=1).values


PARTICLE_SCHEDULE_RULES: dict[str, SelectionRule] = {"resample": resample_down, "top_k": top_k}


@dataclass(frozen=True)
class ResamplingSchedule:
    """The solver steps with intermediate rewards, and the particles that continue from them; the same for all prompts.

    requested_steps    solver steps, from 0, with intermediate rewards; None: the method's default
    particle_schedule  {solver step: particles that continue from it}; rewards are evaluated there too
    rule               selects the particles that continue where their number falls (`PARTICLE_SCHEDULE_RULES`)
    target             a particle with this intermediate reward continues alone, without further evaluations
    """

    requested_steps: Iterable[int] | None = None
    particle_schedule: Mapping[int, int] = field(default_factory=dict)
    rule: str = "resample"
    target: float | None = None

    @property
    def reduces_particles(self) -> bool:
        """Whether a run may end with fewer particles than it starts with."""
        return bool(self.particle_schedule) or self.target is not None

    def rule_at(self, step: int, size: int) -> tuple[SelectionRule, int]:
        """Return the rule that selects the particles that continue from a step among `size`, and their number."""
        count = self.particle_schedule.get(step, size)
        return (PARTICLE_SCHEDULE_RULES[self.rule] if count < size else resample_down), count

    def reaches_target(self, rewards: Tensor) -> bool:
        """Return whether one of the rewards (1, K) reaches the target."""
        return self.target is not None and bool((rewards >= self.target).any())

    def steps(self, default_steps: Iterable[int], first: int, last: int, total: int, name: str) -> frozenset[int]:
        """Return the steps with intermediate rewards: the requested or default steps, and the schedule's.

        Raises InputError for steps outside `first` to `last` in a run of `total` steps; `name`: the caller's argument.
        """
        for argument, steps in ((name, self.requested_steps or ()), ("particle_schedule", self.particle_schedule)):
            if wrong := sorted(step for step in steps if not first <= step <= last):
                raise InputError(f"{argument}: {wrong[0]} is not from {first} to {last}, in a run of {total} steps")
        default = {min(step, last) for step in default_steps}
        evaluated_steps = default if self.requested_steps is None else self.requested_steps
        return frozenset(step for step in evaluated_steps if step >= first) | frozenset(self.particle_schedule)


PREVIEW_LOOKAHEAD = 3  # coarse steps of previews for an observer alone
DEFAULT_STEPS = (0.4, 0.55, 0.7, 0.85)  # steps with intermediate rewards, as shares of the run


@dataclass(frozen=True)
class StepReport:
    """Progress for an observer after solver step `step` of `total`.

    evaluation  intermediate rewards, if the step has any
    previews    images (B·K, 3, H, W) of the K particles left from which rewards were computed; also at `preview_steps`
    """

    step: int
    total: int
    evaluation: ResamplingInfo | None = None
    previews: Tensor | None = None


@dataclass(frozen=True)
class IntermediateRewards:
    """Intermediate rewards at one step.

    The images (B·K, 3, H, W) of x̂0, their rewards (B, K) and components, and in a guided run ∇r (B·K, …). A learned
    value gives rewards alone.
    """

    previews: Tensor | None
    rewards: Tensor
    components: Mapping[str, Tensor] = field(default_factory=dict)
    gradient: Tensor | None = None


def route_kernel_eta(pipe: Any, call: dict[str, Any], s: IntermediateSettings) -> tuple[dict[str, Any], float | None]:
    """Route η as `route_eta` does; with GLASS transitions an η above 0 goes to the kernel."""
    return (call, s.eta) if s.kernel == "glass" and s.eta else route_eta(pipe, call, s.eta)


def learned_value(s: IntermediateSettings, pipeline: SteeringPipeline, call: Mapping[str, Any]) -> Value | None:
    """Return the learned value of the settings, if any.

    Raises InputError for a value of another model or reward; one of another kind of call is logged.
    """
    if s.value is None:
        return None
    terms: dict[str, float] = {}
    for term in linear_terms(pipeline.reward):
        terms[term.name] = terms.get(term.name, 0.0) + term.weight
    value = value_of_reward(load_value(s.value, pipeline.pipe), s.value, pipeline.reward.name, terms)
    check_use(value, s.value, pipeline.pipe, call)
    return value


Agreement = Callable[[int, IntermediateRewards, Tensor], Tensor]


def agreement_of(s: FKSettings, reward: Reward) -> Agreement | None:
    """Return a function that decides for each prompt (B,) whether to resample its particles; None: nobody is asked.

    Raises InputError for a reward without members or terms.
    """
    if (answer := s.on_disagreement) is None:
        return None
    sign = term_signs(reward)

    def agree(step: int, intermediate: IntermediateRewards, ancestors: Tensor) -> Tensor:
        assert intermediate.previews is not None  # a learned value has no terms: refused by the settings
        questions = disagreements(step, intermediate.components, sign, ancestors, intermediate.previews)
        return agreed(questions, s.ask_cost, answer)

    return agree


class Run:
    """K particles for each prompt in one call of the pipeline (Algorithm 1 of arXiv 2501.06848).

    for each solver step t → s:
        x_s ~ p(x_s | x_t)                             where the step has no intermediate rewards
        r_j = r(x̂0(x_t))                               _intermediate_rewards
        w ← w · G_j(r_1, …, r_j)                       algorithm.reweight
        if ESS(w) < threshold · K: a ~ Resample(w)     algorithm.select; then all w are equal
        x_s ~ p(x_s | x_t^a)                           _next_latents
    """

    first = 0  # first step that may have intermediate rewards
    reward_delay = 0  # steps from an evaluation to its resampling
    steps_argument = "resample_steps"  # the caller's name of the steps with intermediate rewards

    def __init__(
        self,
        algorithm: Algorithm,
        particle_batch: ParticleBatch,
        eta: float | None,
        schedule: ResamplingSchedule,
        s: StepSettings,
        value: Value | None = None,
    ) -> None:
        """Create a run on a particle batch.

        eta    noise of every step that the kernel draws; None: the solver's own
        s      settings: the observer and its previews, λ and the kernel
        value  learned value in place of intermediate rewards
        """
        self.algorithm, self.particle_batch, self.schedule, self.value = algorithm, particle_batch, schedule, value
        self.settings, self.preview_steps = s, frozenset(s.preview_steps or ())
        # Copies do not diverge in a step without noise: where particles may be resampled η = 0 becomes 1.
        self.eta, self.resampling_eta = eta, s.eta or 1.0
        self.auto_strength = isinstance(s, FKSettings) and s.lam == "auto"  # λ is to be chosen by the first rewards
        self.agrees = agreement_of(s, particle_batch.reward) if isinstance(s, FKSettings) else None
        # Inner steps of a GLASS transition in place of the Gaussian kernel.
        self.glass_steps = s.glass_steps if isinstance(s, IntermediateSettings) and s.kernel == "glass" else 0
        self.steps: frozenset[int] = frozenset()  # steps with intermediate rewards; set by `begin`
        self.target_reached = self.from_search = False  # a particle met the target; particles were selected by reward
        self.particles = Particles.start(particle_batch.groups, particle_batch.size)
        self.history: list[ResamplingInfo] = []

    def sample(self) -> Tensor:
        """Run the pipeline; return the finished images (B·K, 3, H, W) of the K particles left."""
        return self.particle_batch.sample(self.on_solver_step)

    def on_solver_step(self, solver_step: SolverStep) -> StepOverride:
        """Make a solver step, after `begin` at the first; return ancestors of the slots and their next latents."""
        total = solver_step.total
        if solver_step.k == 0:
            if self.glass_steps:
                check_movable(solver_step.scheduler)
            self.begin(total, solver_step.scheduler)
            if wrong := sorted(step for step in self.preview_steps if not 0 <= step < total):
                raise InputError(f"preview_steps: {wrong[0]} is not from 0 to {total - 1}, in a run of {total} steps")
        return self._make_step(solver_step)

    def begin(self, total: int, scheduler: Any) -> None:
        """Set the steps with intermediate rewards. Raises InputError for steps that a run of `total` does not have."""
        # Copies diverge by the noise of a later step; the last step has none.
        last = total - self.reward_delay - (2 if self._resamples_noise(scheduler) else 3)
        self.steps = self.schedule.steps(self._default_steps(total), self.first, last, total, self.steps_argument)
        if not self.steps and self._needs_resampling():
            raise UnsupportedPipelineError(
                f"a run of {total} steps has none to resample at: use best-of-N, or more steps"
            )

    def _make_step(self, solver_step: SolverStep) -> StepOverride:
        """Reweight and resample the particles, and draw their next latents."""
        if not self._evaluates_at(solver_step.k):
            self._notify(StepReport(solver_step.k, solver_step.total, previews=self._observed(solver_step)))
            return None, self._next_latents(solver_step, None, None)
        intermediate = self._intermediate_rewards(solver_step)
        rows = self._reweight_and_resample(intermediate, solver_step.k, solver_step)
        return rows, self._next_latents(solver_step, rows, intermediate)

    def _reweight_and_resample(
        self, intermediate: IntermediateRewards, step: int, solver_step: SolverStep
    ) -> Tensor | None:
        """Reweight by rewards of `step`, resample at `solver_step`; return ancestor rows of slots, None if all stay."""
        progress = step / solver_step.total
        self._choose_strength(intermediate.rewards, progress)
        reweighted = self.algorithm.reweight(self.particles, intermediate.rewards, progress)
        self.particles, ancestors = self._select(reweighted, step)
        if ancestors is not None and self.agrees is not None and ancestors.shape == intermediate.rewards.shape:
            self.particles, ancestors = self._as_agreed(
                reweighted, ancestors, self.agrees(step, intermediate, ancestors)
            )
        stay = torch.arange(self.particle_batch.alive).expand_as(intermediate.rewards)
        evaluation = ResamplingInfo(
            step,
            intermediate.rewards,
            reweighted.path.strengths[-1],
            reweighted.ess,
            stay if ancestors is None else ancestors,
        )
        self.history.append(evaluation)
        self._notify(StepReport(solver_step.k, solver_step.total, evaluation, intermediate.previews))
        return None if ancestors is None else self.particle_batch.set_ancestors(ancestors).to(solver_step.x.device)

    def _select(self, reweighted: Particles, step: int) -> ResampleResult:
        """Select the particles that continue; return them and their ancestors, None: all stay."""
        self.target_reached = self.schedule.reaches_target(reweighted.path.rewards[-1])
        rule, count = (top_k, 1) if self.target_reached else self.schedule.rule_at(step, self.particle_batch.alive)
        self.from_search = self.from_search or rule is top_k
        return rule(self.algorithm, reweighted, count, self.particle_batch.rng)

    def _as_agreed(self, reweighted: Particles, ancestors: Tensor, agreed: Tensor) -> ResampleResult:
        """Resample only the prompts with `agreed` (B,) true; the others keep their particles and weights."""
        resampled = (self.particles.log_weights == 0).all(1)  # resampling leaves equal weights
        ancestors = torch.where(agreed[:, None], ancestors, torch.arange(ancestors.shape[1]))
        return reweighted.resample(ancestors, resampled & agreed), ancestors

    def _intermediate_rewards(self, solver_step: SolverStep) -> IntermediateRewards:
        if self.value is not None:
            return IntermediateRewards(self._observed(solver_step), self.particle_batch.values(self.value, solver_step))
        return self._score_x0(self.particle_batch.predict(solver_step))

    def _choose_strength(self, rewards: Tensor, progress: float) -> None:
        """Choose λ, if it is "auto", by the first rewards (B, K) that differ within a prompt."""
        if self.auto_strength and isinstance(self.algorithm, FeynmanKac):
            chosen = self.algorithm.at_half_ess(self.particles, rewards, progress)
            if chosen.lam > 0 or progress == 1.0:
                self.algorithm, self.auto_strength = chosen, False

    def finish(self, rewards: Tensor) -> Particles:
        """Return the particles; in Feynman–Kac steering, with the terminal factor of the final rewards (B, K)."""
        if not isinstance(self.algorithm, FeynmanKac):
            return self.particles
        self._choose_strength(rewards, 1.0)
        if self.from_search:  # particles selected by reward are draws from no known distribution
            return Particles.start(*rewards.shape)
        return self.algorithm.finish(self.particles, rewards)  # log G_end = λ r(x0) − Σ_j log G_j

    def _observed(self, solver_step: SolverStep) -> Tensor | None:
        """Return previews for the observer alone, at the requested steps."""
        if self.settings.on_step is None or solver_step.k not in self.preview_steps:
            return None
        with torch.no_grad():
            return self.particle_batch.preview(self.particle_batch.predict(solver_step, PREVIEW_LOOKAHEAD)).detach()

    def _score_x0(self, x0: Tensor) -> IntermediateRewards:
        """Decode and score x̂0."""
        previews = self.particle_batch.preview(x0)
        return IntermediateRewards(previews, *self.particle_batch.score(previews))

    def _next_latents(
        self, solver_step: SolverStep, rows: Tensor | None, intermediate: IntermediateRewards | None
    ) -> Tensor | None:
        """Return the latents of the slots after this step; None: the solver's own.

        Where particles may be resampled, all of them take the Gaussian kernel, whether they are resampled or not: a
        kernel that depended on the weights would change the distribution that the weights refer to.
        """
        copying = intermediate is not None and self.particle_batch.alive > 1 and self._needs_resampling()
        resampling = copying and self._resamples_noise(solver_step.scheduler)
        eta = self.resampling_eta if resampling else self.eta
        return None if eta is None else self._draw(solver_step, eta, rows)

    def _draw(self, solver_step: SolverStep, eta: float, rows: Tensor | None = None) -> Tensor:
        """Draw x_s (N, …) of all rows, each continuing one of `rows`, by the Gaussian kernel or a GLASS transition.

        With η = 0 it is the Gaussian kernel's mean: a GLASS transition would still draw x0 given x_t.
        """
        if self.glass_steps and eta > 0:
            return self.particle_batch.glass(solver_step, eta, rows, self.glass_steps)
        return solver_step.kernel(eta, rows).sample(self.particle_batch.rng)

    def _resamples_noise(self, scheduler: Any) -> bool:
        return self.eta is not None or not has_other_noise(scheduler)

    def _evaluates_at(self, step: int) -> bool:
        """Return whether a step has intermediate rewards."""
        return step in self.steps and not self.target_reached

    def _default_steps(self, total: int) -> Iterable[int]:
        return (round(share * total) for share in DEFAULT_STEPS)

    def _needs_resampling(self) -> bool:
        return self.particle_batch.size > 1 and self.algorithm.lam != 0

    def _notify(self, report: StepReport) -> None:
        if self.settings.on_step:
            self.settings.on_step(report)


class AsynchronousRun(Run):
    """A run whose potentials G_j(x̂0(x_t)) multiply the weights one step after x_t.

    G_j is a function of the path up to x_t. If it is multiplied one step later, before the next evaluation, the product
    over the path is the same, and so is the distribution of the weighted particles.
    """

    reward_delay = 1
    background: Callable[[torch.device], AbstractContextManager[Submit]] = staticmethod(run_in_background)
    submit: Submit  # while the pipeline runs
    pending: Callable[[], IntermediateRewards] | None = None

    def sample(self) -> Tensor:
        """Run the pipeline; return the finished images (B·K, 3, H, W) of the K particles left."""
        check_not_offloaded(self.particle_batch.pipe)
        with self.background(torch.device(self.particle_batch.pipe.device)) as self.submit:
            return super().sample()

    def _make_step(self, solver_step: SolverStep) -> StepOverride:
        """Resample by the rewards of the previous step, and submit x̂0 of this step to the background."""
        rows: Tensor | None = None
        intermediate: IntermediateRewards | None = None
        if self.pending is None:
            self._notify(StepReport(solver_step.k, solver_step.total, previews=self._observed(solver_step)))
        else:
            intermediate, self.pending = self.pending(), None
            rows = self._reweight_and_resample(intermediate, solver_step.k - self.reward_delay, solver_step)
        if self._evaluates_at(solver_step.k):
            x0 = solver_step.x0() if rows is None else solver_step.x0()[rows]
            self.pending = self.submit(lambda: self._score_x0(x0))
        return rows, self._next_latents(solver_step, rows, intermediate)


def check_not_offloaded(pipe: Any) -> None:
    """Raise InputError where the pipeline's components take turns on the device, as two cannot compute at once then."""
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    if moved := [name for name, module in modules.items() if is_offloaded(module)]:
        raise InputError(
            f"asynchronous_rewards: {', '.join(moved)} are offloaded and take turns on the device: leave it out"
        )


class GuidedRun(Run):
    """A run of the Gaussian kernel, drawn from N(mean + γ τ² λ_j ∇r(x̂0(x_t)), τ² I) at steps with rewards.

    The pipeline of the particle batch is a `differentiable` copy. Only latents are kept between the steps, as leaves of
    the graph; they require a gradient where the next step takes one.
    """

    first = 1  # x_T comes out of the pipeline without a graph
    differentiates_steps = True  # whether the gradient goes back to x_t

    settings: FKSettings

    def sample(self) -> Tensor:
        """Run the pipeline; return the finished images (B·K, 3, H, W) of the K particles left."""
        with torch.set_grad_enabled(self.differentiates_steps):
            return super().sample().detach()

    def _intermediate_rewards(self, solver_step: SolverStep) -> IntermediateRewards:
        previews = self.particle_batch.preview(solver_step.x0())
        if not previews.requires_grad:
            raise UnsupportedPipelineError(
                f"{type(self.particle_batch.pipe).__name__} lets no gradients through: use reward_guidance=0"
            )
        rewards, components = self.particle_batch.score(previews)
        gradient = self._gradient(f"reward {self.particle_batch.reward.name!r}", rewards, solver_step.x, solver_step.k)
        parts = {name: one.detach() for name, one in components.items()}
        return IntermediateRewards(previews.detach(), rewards.detach(), parts, gradient)

    def _gradient(self, name: str, rewards: Tensor, x: Tensor, step: int) -> Tensor:
        """Return ∇ of rewards (B, K) by latents x (N, …). Raises RewardError with `name` where there is none."""
        gradient = per_sample_gradients(rewards, x, computes_in_fp16(self.particle_batch.pipe))
        if gradient is None:
            raise RewardError(f"{name} has no gradients: use reward_guidance=0, or a differentiable one")
        if not gradient.isfinite().all():
            raise RewardError(f"the gradient of {name} is not finite at step {step}")
        self.particle_batch.count_gradients(rewards.numel())
        return gradient

    @torch.no_grad()
    def _next_latents(
        self, solver_step: SolverStep, rows: Tensor | None, intermediate: IntermediateRewards | None
    ) -> Tensor:
        kernel = solver_step.kernel(self.resampling_eta, rows)  # the kernel of every step
        if intermediate is None or intermediate.gradient is None:
            moved = kernel.sample(self.particle_batch.rng)
        else:
            # Particles and gradients go to their slots together.
            gradient = intermediate.gradient if rows is None else intermediate.gradient[rows]
            moved, log_ratio = draw_guided(kernel, self._strengths(gradient) * gradient, self.particle_batch.rng)
            alive_log_ratio = self.particle_batch.live.of(log_ratio).cpu().view_as(self.particles.log_weights)
            self.particles = self.particles.correct(alive_log_ratio)
        needed = self.differentiates_steps and self._evaluates_at(solver_step.k + 1)
        return moved.to(solver_step.prev.dtype).requires_grad_(needed)

    def _strengths(self, like: Tensor) -> Tensor:
        """Return γ λ_j of every row, (B·K, 1, …)."""
        strengths = self.settings.reward_guidance * self.history[-1].strength.repeat_interleave(
            self.particle_batch.size, dim=0
        )
        return strengths.to(like).view(-1, *[1] * (like.dim() - 1))

    def _default_steps(self, total: int) -> Iterable[int]:
        return range(self.first, total)

    def _needs_resampling(self) -> bool:
        return self.algorithm.lam != 0


# The optimal proposal for the potentials exp(λ (V_s(x_s) − V_t(x_t))) is q ∝ p(x_s | x_t) exp(λ V_s(x_s)). With V_s
# linear around the mean m of p (local linearisation: Doucet, Godsill & Andrieu, Statistics and Computing 10, 2000):
#
#     V_s(x_s) ≈ V_s(m) + ∇V_s(m)·(x_s − m)    ⇒    q = N(m + τ² λ ∇V_s(m), τ² I)
#
# Where V_s is linear, exp(λ V_s(x_s)) p(x_s | x_t)/q(x_s | x_t) = E_p[exp(λ V_s(x_s)) | x_t] does not depend on x_s.
class ValueGuidedRun(GuidedRun):
    """A run drawn from N(m + γ τ² λ_j ∇V_s(m), τ² I) at the kernel's mean m(x_t), at steps with values.

    V_s is the value at the level after the step. Nothing is decoded: the graph holds V_s and one more evaluation of the
    denoiser, at m. The weights are corrected as in `GuidedRun`, so the law is exact for any V.
    """

    first = 0
    differentiates_steps = False

    def _intermediate_rewards(self, solver_step: SolverStep) -> IntermediateRewards:
        at_x_t = Run._intermediate_rewards(self, solver_step)
        assert self.value is not None
        mean = solver_step.kernel(self.resampling_eta).mean.detach().requires_grad_()
        with torch.enable_grad():
            values = self.particle_batch.values(self.value, self.particle_batch.next_step(solver_step, mean))
            return replace(at_x_t, gradient=self._gradient("value", values, mean, solver_step.k))


def check_guidance(scheduler: Any, reward: Reward | None, eta: float) -> None:
    """Raise InputError where the steps cannot be guided by the reward; None: by a value, which needs no such reward."""
    if eta == 0:
        raise InputError("with reward_guidance eta must be above 0 and at most 1, got 0: guided steps need noise")
    if reward is not None and not reward.differentiable:
        raise InputError(f"reward {reward.name!r} is not differentiable: use reward_guidance=0, or a reward that is")
    check_verified(scheduler)


def with_asset(lookahead: int | str) -> int | str:
    """Replace the name of an embedded adapter in a look-ahead, such as lora:scenes-lcm, by its path."""
    name = str(lookahead).removeprefix(ADAPTER)
    return f"{ADAPTER}{ADAPTERS[name]}" if name in ADAPTERS and name != lookahead else lookahead


def run_particles(
    pipeline: SteeringPipeline,
    prompt: Prompts,
    s: StepSettings,
    call: dict[str, Any],
    make_run: Callable[[ParticleBatch], Run],
    *,
    pipe: Any = None,
    size: int | None = None,
    lookahead: int | str = 1,
    draw: str = "best",
    **options: Any,
) -> SteeringOutput:
    """Sample the particles of one call by a run, and score them.

    pipe     copy of the pipeline to call in its place
    size     K, if it differs from the settings
    options  `preview` and `live` of `ParticleBatch`
    """
    pipe = pipeline.pipe if pipe is None else pipe
    with few_step_adapter(pipeline.pipe, with_asset(lookahead)) as adapter:
        particle_batch = batch_class(pipe)(
            *(pipe, pipeline.reward, prompt, size or s.num_particles, call, s.reward_prompt, s.chunk_size),
            lookahead=coarse_steps(lookahead),
            adapter=adapter,
            **options,
        )
        run = make_run(particle_batch)
        images = run.sample()
    rewards, components = particle_batch.score(images)
    particles = run.finish(rewards)
    output = particle_batch.output(images, rewards, components, particles, run.history, s.output_type, draw)
    return replace(output, lam=run.algorithm.lam) if isinstance(run.algorithm, FeynmanKac) else output


__all__ = ["FKSettings", "FKSteeringPipeline", "StepReport"]


class FKSteeringPipeline(SteeringPipeline):
    """Feynman–Kac steering: particles reweighted by the reward of the predicted clean image, and resampled.

    pipe = StableDiffusionPipeline.from_pretrained(...)
    steer = FKSteeringPipeline(pipe, reward="scene-soft")
    out = steer("a red circle left of a blue star", num_particles=4, lam=25.0)
    out.images[0], out.rewards[0, 0]
    """

    @steering_call(FKSettings)
    def __call__(self, prompt: Prompts, settings: FKSettings, call: dict[str, Any]) -> SteeringOutput:
        """Steer one call of the pipeline; all other arguments go to the pipeline's own `__call__`.

        The images are draws from p(x0) exp(λ r(x0)): each particle's weight ends as Π_j G_j · G_end = exp(λ r(x0)).

        Raises InputError for arguments that do not fit, UnsupportedPipelineError (an InputError) for a pipeline or
        scheduler that cannot be steered, RewardError (an InputError) for a reward that breaks its contract.
        """
        s, pipe, live, eta = settings, self.pipe, ActiveRows(), settings.eta
        algorithm = FeynmanKac(
            1.0 if s.lam == "auto" else float(s.lam),
            s.implementation("potential"),
            s.implementation("resampler"),
            s.implementation("tempering"),
            s.ess_threshold,
        )
        schedule = ResamplingSchedule(
            s.resample_steps, s.particle_schedule or {}, s.particle_schedule_rule, s.target_reward
        )
        if s.reward_guidance:
            eta = 1.0 if eta is None else eta
            check_guidance(pipe.scheduler, self.reward if s.value is None else None, eta)
            pipe = differentiable(pipe, one_call=True)
        else:
            call, eta = route_kernel_eta(pipe, call, s)
        pipe = live.view(pipe) if schedule.reduces_particles else pipe

        def make_run(particle_batch: ParticleBatch) -> Run:
            if s.target_reward is not None and particle_batch.groups > 1:
                raise InputError("target_reward: several prompts would reach it at different steps: one prompt a call")
            guided = GuidedRun if s.value is None else ValueGuidedRun
            kind: type[Run] = guided if s.reward_guidance else AsynchronousRun if s.asynchronous_rewards else Run
            return kind(algorithm, particle_batch, eta, schedule, s, learned_value(s, self, call))

        batch: dict[str, Any] = {"pipe": pipe, "live": live, "lookahead": s.lookahead, "preview": s.preview}
        return run_particles(self, prompt, s, call, make_run, **batch, draw=s.draw)
