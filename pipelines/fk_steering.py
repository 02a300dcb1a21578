"""Feynman–Kac steering of a diffusers pipeline (arXiv 2501.06848)."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Generator, Tensor, nn

from steer.arguments import coerce_arguments
from steer.diffusion.batching import ActiveRows, is_offloaded
from steer.diffusion.differentiable import computes_in_fp16, differentiable, per_sample_gradients
from steer.diffusion.schedules import can_resample_noise, copies_diverge, draw_guided, matches_gaussian_kernel
from steer.diffusion.step_hooks import SolverStep, StepOverride, UnsupportedPipelineError
from steer.errors import InputError
from steer.pipelines.base import ResamplingInfo, SteeringOutput, SteeringPipeline, route_eta
from steer.pipelines.particle_batch import DRAWS, ParticleBatch, check_output_type
from steer.registry import choose
from steer.reward import Reward, RewardError, Submit, run_in_background
from steer.smc.particles import FeynmanKac, Particles
from steer.smc.potentials import POTENTIALS, TEMPERINGS, Potential, Tempering
from steer.smc.resampling import RESAMPLERS, Resampler

ResampleResult = tuple[Particles, Tensor | None]  # and their ancestors (B, n); None: all stay where they are


class Algorithm(Protocol):
    """What rewards (B, K) of x̂0 do to the particles of a run, and which of them (B, count) the slots go on from."""

    @property
    def lam(self) -> float: ...

    def reweight(self, particles: Particles, rewards: Tensor, progress: float) -> Particles: ...

    def select(self, particles: Particles, generator: Generator, count: int | None = None) -> ResampleResult: ...


SelectionRule = Callable[[Algorithm, Particles, int, Generator], ResampleResult]


def resample_down(algorithm: Algorithm, particles: Particles, count: int, generator: Generator) -> ResampleResult:
    """`count` of K as the algorithm draws them: of the same distribution, unbiased."""
    return algorithm.select(particles, generator, count)


def top_k(algorithm: Algorithm, particles: Particles, count: int, generator: Generator) -> ResampleResult:
    """The `count` of K with the highest reward of x̂0: a search, which draws from no known distribution."""
    survivors = top_k_indices(particles.path.rewards[-1], count)
    return particles.resample(survivors, torch.ones(len(survivors), dtype=torch.bool)), survivors


def top_k_indices(rewards: Tensor, count: int) -> Tensor:
    """Places (B, count) of the highest of rewards (B, M), ascending; of equal ones the lower place."""
    return rewards.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(dim=1).values


PARTICLE_SCHEDULE_RULES: dict[str, SelectionRule] = {"resample": resample_down, "top_k": top_k}


@dataclass(frozen=True)
class ResamplingSchedule:
    """Of every prompt of a run alike.

    requested_steps   solver steps, from 0, at which rewards are read; None: the method's own
    particle_schedule  {solver step: particles that go on from it}, fewer and fewer; rewards are read there too
    rule  which go on where there are to be fewer: drawn by their weights, or the best
    target  once r(x̂0) of a particle is as high, the best one alone goes on, and no more rewards are read
    """

    requested_steps: Iterable[int] | None = None
    particle_schedule: Mapping[int, int] = field(default_factory=dict)
    rule: str = "resample"
    target: float | None = None

    def __post_init__(self) -> None:
        if self.requested_steps is not None:
            object.__setattr__(self, "requested_steps", frozenset(self.requested_steps))
        choose("particle_schedule_rule", self.rule, PARTICLE_SCHEDULE_RULES)
        if self.target is not None and not math.isfinite(self.target):
            raise InputError(f"target_reward must be a finite number, got {self.target}")

    def check_size(self, size: int) -> None:
        """Raises InputError where the numbers of particles are not fewer and fewer, from `size` on."""
        before = size
        for step, count in sorted(self.particle_schedule.items()):
            if not 1 <= count < before:
                raise InputError(
                    f"particle_schedule: {count} particles from step {step} on, of {before}: they must be fewer and "
                    "fewer, and at least 1"
                )
            before = count

    @property
    def reduces_particles(self) -> bool:
        """Whether a run may go on with fewer particles than it began with."""
        return bool(self.particle_schedule) or self.target is not None

    @property
    def is_search(self) -> bool:
        """Whether particles may be chosen for being the best, which leaves no weights."""
        return self.target is not None or (bool(self.particle_schedule) and self.rule == "top_k")

    def rule_at(self, step: int, size: int) -> tuple[SelectionRule, int]:
        """How those of `size` particles are chosen that go on from this step, and how many they are."""
        count = self.particle_schedule.get(step, size)
        return (PARTICLE_SCHEDULE_RULES[self.rule] if count < size else resample_down), count

    def reaches_target(self, rewards: Tensor) -> bool:
        """Whether one of the rewards (1, K) is as high as the target."""
        return self.target is not None and bool((rewards >= self.target).any())

    def steps(self, default_steps: Iterable[int], first: int, last: int, total: int, name: str) -> frozenset[int]:
        """The steps asked for, or the method's `default_steps`, and those at which particles get fewer.

        Raises InputError for others than `first` to `last`, in a run of `total` steps; `name`: the caller's argument.
        """
        for argument, steps in ((name, self.requested_steps or ()), ("particle_schedule", self.particle_schedule)):
            if wrong := sorted(step for step in steps if not first <= step <= last):
                raise InputError(f"{argument}: {wrong[0]} is not from {first} to {last}, in a run of {total} steps")
        evaluated_steps = (
            {min(step, last) for step in default_steps} if self.requested_steps is None else self.requested_steps
        )
        return frozenset(step for step in evaluated_steps if step >= first) | frozenset(self.particle_schedule)


DEFAULT_STEPS = (0.4, 0.55, 0.7, 0.85)  # where rewards are read, as shares of the run


@dataclass(frozen=True)
class StepReport:
    """What an observer is told after a solver step: number `step` of `total`; where rewards were read, the evaluation
    and the images (B·K, 3, H, W) of x̂0, of K particles that were left, that they were read from."""

    step: int
    total: int
    evaluation: ResamplingInfo | None = None
    previews: Tensor | None = None


@dataclass(frozen=True)
class IntermediateRewards:
    """What x̂0 promises at one step, of the K particles that are left: images (B·K, 3, H, W), rewards (B, K) and, in a
    guided run, ∇r of all rows of the batch."""

    previews: Tensor
    rewards: Tensor
    gradient: Tensor | None = None


class Run:
    """The particles of one call, and what happens to them at each solver step."""

    first = 0  # the first step at which rewards may be read
    reward_delay = 0  # steps from there to where particles are resampled by them
    steps_argument = "resample_steps"  # what the caller knows those steps as

    def __init__(
        self,
        algorithm: Algorithm,
        particle_batch: ParticleBatch,
        eta: float | None,
        resampling_eta: float,
        schedule: ResamplingSchedule,
        observer: Callable[[StepReport], None] | None,
    ) -> None:
        schedule.check_size(particle_batch.size)
        self.algorithm, self.particle_batch, self.schedule, self.observer = (
            algorithm,
            particle_batch,
            schedule,
            observer,
        )
        self.eta, self.resampling_eta = eta, resampling_eta  # of every step, None: the solver's own; where resampled
        self.steps: frozenset[int] = frozenset()  # at which rewards are read: known at the first
        self.target_reached = self.from_search = (
            False  # a particle has reached the target; some were chosen for being the best
        )
        self.particles = Particles.start(particle_batch.groups, particle_batch.size)
        self.history: list[ResamplingInfo] = []

    def sample(self) -> Tensor:
        """Runs the pipeline to its end: the finished images (B·K, 3, H, W) of the K particles that are left."""
        return self.particle_batch.sample(self.on_solver_step)

    def on_solver_step(self, solver_step: SolverStep) -> StepOverride:
        """One solver step: weigh the particles by r(x̂0), resample them, move them on."""
        if not self._evaluates_at(solver_step):
            self._notify(StepReport(solver_step.k, solver_step.total))
            return None, self._next_latents(solver_step, None, None)
        intermediate = self._intermediate_rewards(solver_step)
        rows = self._reweight_and_resample(intermediate, solver_step.k, solver_step)
        return rows, self._next_latents(solver_step, rows, intermediate)

    def _reweight_and_resample(
        self, intermediate: IntermediateRewards, step: int, solver_step: SolverStep
    ) -> Tensor | None:
        """Weighs the particles by what was read at a step, and resamples them at this event: the rows that the slots
        go on from, None: all stay."""
        reweighted = self.algorithm.reweight(self.particles, intermediate.rewards, step / solver_step.total)
        self.particles, ancestors = self._select(reweighted, step)
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
        """The particles that go on and their ancestors; None: all stay where they are."""
        self.target_reached = self.schedule.reaches_target(reweighted.path.rewards[-1])
        rule, count = (top_k, 1) if self.target_reached else self.schedule.rule_at(step, self.particle_batch.alive)
        self.from_search = self.from_search or rule is top_k
        return rule(self.algorithm, reweighted, count, self.particle_batch.rng)

    def _intermediate_rewards(self, solver_step: SolverStep) -> IntermediateRewards:
        return self._score_x0(solver_step.x0())

    def _score_x0(self, x0: Tensor) -> IntermediateRewards:
        """What the images that x̂0 stands for are worth."""
        previews = self.particle_batch.preview(x0)
        rewards, _ = self.particle_batch.score(previews)
        return IntermediateRewards(previews, rewards)

    def _next_latents(
        self, solver_step: SolverStep, rows: Tensor | None, intermediate: IntermediateRewards | None
    ) -> Tensor | None:
        """Latents of the slots after this step; None: those of the solver.

        Where a reading may copy particles, all of them take the Gaussian kernel, whether they are resampled or not: a
        kernel that depended on the weights would change the law that the weights refer to.
        """
        copying = intermediate is not None and self.particle_batch.alive > 1 and self._needs_resampling()
        resampling = copying and self._resamples_noise(solver_step.scheduler)
        eta = self.resampling_eta if resampling else self.eta
        return None if eta is None else solver_step.kernel(eta, rows).sample(self.particle_batch.rng)

    def _resamples_noise(self, scheduler: Any) -> bool:
        return self.eta is not None or matches_gaussian_kernel(scheduler)

    def _evaluates_at(self, solver_step: SolverStep) -> bool:
        """Whether rewards are read at this step. Settled at the first: copies need a noisy step after them to part."""
        if solver_step.k == 0:
            last = solver_step.total - self.reward_delay - (2 if self._resamples_noise(solver_step.scheduler) else 3)
            default_steps = self._default_steps(solver_step.total)
            self.steps = self.schedule.steps(default_steps, self.first, last, solver_step.total, self.steps_argument)
            if not self.steps and self._needs_resampling():
                raise UnsupportedPipelineError(
                    f"a run of {solver_step.total} steps has none to resample at: use best-of-N, or more steps"
                )
        return solver_step.k in self.steps and not self.target_reached

    def _default_steps(self, total: int) -> Iterable[int]:
        return (round(share * total) for share in DEFAULT_STEPS)

    def _needs_resampling(self) -> bool:
        return self.particle_batch.size > 1 and self.algorithm.lam != 0

    def _notify(self, report: StepReport) -> None:
        if self.observer:
            self.observer(report)


class AsynchronousRun(Run):
    """A run whose potentials G_j(x̂0(x_t)) multiply the weights one step after x_t.

    G_j is a function of the path up to x_t: whether it is multiplied there or a step later, before any further reading,
    the product over the path is the same, and with it what the weighted particles are drawn from.
    """

    reward_delay = 1
    background: Callable[[torch.device], AbstractContextManager[Submit]] = staticmethod(run_in_background)
    submit: Submit  # while the pipeline runs
    pending: Callable[[], IntermediateRewards] | None = None

    def sample(self) -> Tensor:
        """Runs the pipeline to its end: the finished images (B·K, 3, H, W) of the K particles that are left."""
        check_not_offloaded(self.particle_batch.pipe)
        with self.background(torch.device(self.particle_batch.pipe.device)) as self.submit:
            return super().sample()

    def on_solver_step(self, solver_step: SolverStep) -> StepOverride:
        """One solver step: resample by what was read at the step before, begin to read, move on."""
        rows: Tensor | None = None
        intermediate: IntermediateRewards | None = None
        if self.pending is None:
            self._notify(StepReport(solver_step.k, solver_step.total))
        else:
            intermediate, self.pending = self.pending(), None
            rows = self._reweight_and_resample(intermediate, solver_step.k - self.reward_delay, solver_step)
        if self._evaluates_at(solver_step):
            x0 = solver_step.x0() if rows is None else solver_step.x0()[rows]
            self.pending = self.submit(lambda: self._score_x0(x0))
        return rows, self._next_latents(solver_step, rows, intermediate)


def check_not_offloaded(pipe: Any) -> None:
    """Raises InputError where the pipeline's components take turns on the device: then two cannot compute at once."""
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    if moved := [name for name, module in modules.items() if is_offloaded(module)]:
        raise InputError(f"overlap: {', '.join(moved)} are offloaded and take turns on the device: leave overlap out")


class GuidedRun(Run):
    """A run of the Gaussian kernel, drawn from N(mean + γ τ² λ_j ∇r(x̂0(x_t)), τ² I) wherever rewards are read.

    The population's pipeline is a `differentiable` twin. Between the steps nothing but latents is kept: those that the
    next gradient is taken at ask for one, and have no past.
    """

    first = 1  # x_T comes out of the pipeline without a graph

    def __init__(
        self,
        algorithm: FeynmanKac,
        particle_batch: ParticleBatch,
        guidance: float,
        eta: float,
        schedule: ResamplingSchedule,
        observer: Callable[[StepReport], None] | None,
    ) -> None:
        super().__init__(algorithm, particle_batch, eta, eta, schedule, observer)
        self.guidance = guidance
        self.half = computes_in_fp16(particle_batch.pipe)

    def sample(self) -> Tensor:
        """Runs the pipeline to its end: the finished images (B·K, 3, H, W) of the K particles that are left."""
        with torch.enable_grad():
            return super().sample().detach()

    def _intermediate_rewards(self, solver_step: SolverStep) -> IntermediateRewards:
        previews = self.particle_batch.preview(solver_step.x0())
        if not previews.requires_grad:
            raise UnsupportedPipelineError(
                f"{type(self.particle_batch.pipe).__name__} lets no gradients through: use reward_guidance=0"
            )
        rewards, _ = self.particle_batch.score(previews)
        return IntermediateRewards(previews.detach(), rewards.detach(), self._gradient(solver_step, rewards))

    def _gradient(self, solver_step: SolverStep, rewards: Tensor) -> Tensor:
        name, gradient = self.particle_batch.reward.name, per_sample_gradients(rewards, solver_step.x, self.half)
        if gradient is None:
            raise RewardError(f"reward {name!r} says that it is differentiable, but gives no gradients")
        if not gradient.isfinite().all():
            raise RewardError(f"the gradient of reward {name!r} is not finite at step {solver_step.k}")
        self.particle_batch.count_gradients(rewards.numel())
        return gradient

    @torch.no_grad()
    def _next_latents(
        self, solver_step: SolverStep, rows: Tensor | None, intermediate: IntermediateRewards | None
    ) -> Tensor:
        kernel = solver_step.kernel(self.resampling_eta, rows)  # which is that of every step
        if intermediate is None or intermediate.gradient is None:
            moved = kernel.sample(self.particle_batch.rng)
        else:
            # Particles and gradients go to their slots together.
            gradient = intermediate.gradient if rows is None else intermediate.gradient[rows]
            moved, log_ratio = draw_guided(kernel, self._strengths(gradient) * gradient, self.particle_batch.rng)
            alive_log_ratio = self.particle_batch.live.of(log_ratio).cpu().view_as(self.particles.log_weights)
            self.particles = self.particles.correct(alive_log_ratio)
        return moved.to(solver_step.prev.dtype).requires_grad_(
            solver_step.k + 1 in self.steps and not self.target_reached
        )

    def _strengths(self, like: Tensor) -> Tensor:
        """γ λ_j of every row, (B·K, 1, …)."""
        strengths = self.guidance * self.history[-1].strength.repeat_interleave(self.particle_batch.size, dim=0)
        return strengths.to(like).view(-1, *[1] * (like.dim() - 1))

    def _default_steps(self, total: int) -> Iterable[int]:
        return range(self.first, total)

    def _needs_resampling(self) -> bool:
        return self.algorithm.lam != 0


def check_guidance(scheduler: Any, reward: Reward, guidance: float, eta: float, asynchronous: bool) -> None:
    """Raise InputError, or CannotSteer for a solver without the kernel, where steps cannot lean towards the reward."""
    if asynchronous:
        raise InputError(
            "asynchronous_rewards: with reward_guidance the step needs the gradient: leave one of them out"
        )
    if not 0 <= guidance < math.inf:
        raise InputError(f"reward_guidance must be at least 0 and finite, got {guidance}")
    if not 0 < eta <= 1:
        raise InputError(f"with reward_guidance eta must be above 0 and at most 1, got {eta}: steps need noise to lean")
    if not reward.differentiable:
        raise InputError(f"reward {reward.name!r} is not differentiable: use reward_guidance=0, or a reward that is")
    if not can_resample_noise(scheduler):
        raise UnsupportedPipelineError(
            f"{type(scheduler).__name__} has no Gaussian kernel for reward_guidance to lean on: use another one, for "
            "example pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config), or reward_guidance=0"
        )


__all__ = ["FKSteeringPipeline", "StepReport"]


class FKSteeringPipeline(SteeringPipeline):
    """Particles that are weighed by the reward of x̂0 on their way, and resampled.

    pipe = StableDiffusionPipeline.from_pretrained(...)
    steer = FKSteeringPipeline(pipe, reward="scene-soft")
    out = steer("a red circle left of a blue star", num_particles=4, lam=25.0)
    out.images[0], out.rewards[0, 0]
    """

    @coerce_arguments
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        num_particles: int = 4,
        lam: float = 10.0,
        potential: str | Potential = "difference",
        resampler: str | Resampler = "systematic",
        tempering: str | Tempering = "constant",
        resample_steps: Iterable[int] | None = None,
        ess_threshold: float = 0.5,
        reward_guidance: float = 0.0,
        particle_schedule: Mapping[int, int] | None = None,
        particle_schedule_rule: str = "resample",
        target_reward: float | None = None,
        asynchronous_rewards: bool = False,
        eta: float | None = None,
        draw: str = "best",
        preview: Any = "full",
        chunk_size: int = 8,
        reward_prompt: str | Sequence[str] | None = None,
        on_step: Callable[[StepReport], None] | None = None,
        output_type: str = "pil",
        **call: Any,
    ) -> SteeringOutput:
        """Steers one call; every other argument goes to the pipeline's own `__call__`.

        prompt          one, or several: each has particles of its own
        num_particles   K, in place of num_images_per_prompt
        lam             λ: the result is drawn from p(x0) exp(λ r(x0)); 0 gives the pipeline's own batch
        potential       difference, max, sum, now, or a function of a path's rewards
        resampler       systematic, stratified, residual, ssp, multinomial, or a function
        tempering       of λ along the run: constant, geometric, ess, or a function
        resample_steps  solver steps, from 0, at which rewards are read; by default at 40, 55, 70 and 85 % of the run,
                        with reward_guidance at all of them from 1 on
        ess_threshold   resample when ESS < threshold · K (adaptive); 1: at every one of those steps (scheduled)
        reward_guidance γ: where rewards are read, steps lean by γ τ² λ_j ∇r(x̂0), and the weights pay for it; 1 is
                        DAS. The reward must be differentiable
        particle_schedule       {solver step: particles of each prompt that are kept from it on}, fewer and fewer;
                        rewards are evaluated there too. The others cost nothing from there on, and have no images
        particle_schedule_rule  which are kept: "resample", by their weights, or "top_k", a search (see target_reward)
        target_reward   once r(x̂0) of a particle is as high where rewards are read, it alone goes on and no more are
                        read: for one prompt a call. It is a search: log-weights and log-normaliser are then 0
        asynchronous_rewards    decode and score x̂0 in the background (on CUDA in a stream of its own) while the
                        denoiser makes the next step, and resample by it then: one step later
        eta             noise η of every step, 0..1. By default, and with 0, the solver's own steps, except that at
                        each step of resample_steps from which several particles go on (with overlap one later) all
                        of them take the Gaussian kernel with η = 1, whatever their weights: p(x0) is the distribution
                        of that chain. With λ = 0, one particle, or a solver whose own noise follows another kernel it
                        is the pipeline's own. With reward_guidance all steps are the kernel's, by default with η = 1
        draw            the first image of each prompt: "best", of the highest reward, or "weighted", one draw by the
                        final weights. The others follow by their rewards
        preview         what decodes x̂0 for the reward: "full", the pipeline's own VAE; "linear", a map that is fitted
                        to the first previews; or a small autoencoder of diffusers. Finished images are the VAE's
        chunk_size      images decoded and scored at a time
        reward_prompt   what the reward reads instead of the prompt (needed with prompt_embeds)
        on_step         an observer of every solver step; what it raises ends the run
        output_type     pil, np, pt or latent

        Raises InputError for arguments that do not fit, CannotSteer (an InputError) for a pipeline or scheduler that
        cannot be steered, RewardError (an InputError) for a reward that breaks its contract.
        """
        check_output_type(output_type)
        algorithm = FeynmanKac(
            lam,
            choose("potential", potential, POTENTIALS),
            choose("resampler", resampler, RESAMPLERS),
            choose("tempering", tempering, TEMPERINGS),
            ess_threshold,
        )
        schedule = ResamplingSchedule(resample_steps, particle_schedule or {}, particle_schedule_rule, target_reward)
        live, pipe, noise = ActiveRows(), self.pipe, 1.0 if eta is None else eta
        kernel_eta: float | None = None
        check_draw(draw, schedule)
        if reward_guidance != 0:
            check_guidance(pipe.scheduler, self.reward, reward_guidance, noise, asynchronous_rewards)
            pipe = differentiable(pipe, one_call=True)
        else:
            if num_particles > 1 and lam != 0:
                check_copies_diverge(pipe.scheduler)
            call, kernel_eta = route_eta(pipe, call, eta)
        pipe = live.view(pipe) if schedule.reduces_particles else pipe
        particle_batch = ParticleBatch(
            pipe, self.reward, prompt, num_particles, call, reward_prompt, chunk_size, preview, live
        )
        if target_reward is not None and particle_batch.groups > 1:
            raise InputError("target_reward: several prompts would reach it at different steps: one prompt a call")
        if reward_guidance != 0:
            run: Run = GuidedRun(algorithm, particle_batch, reward_guidance, noise, schedule, on_step)
        else:
            kind = AsynchronousRun if asynchronous_rewards else Run
            # A step without noise would not part copies: where particles may be resampled η = 0 becomes 1.
            run = kind(algorithm, particle_batch, kernel_eta, eta or 1.0, schedule, on_step)
        images = run.sample()
        rewards, components = particle_batch.score(images)
        # What was chosen for being the best is a draw from no known distribution.
        from_search = Particles.start(*rewards.shape)
        particles = from_search if run.from_search else algorithm.finish(run.particles, rewards)
        return particle_batch.output(images, rewards, components, particles, run.history, output_type, draw)


def check_draw(draw: str, schedule: ResamplingSchedule) -> None:
    """Raise InputError for an unknown draw, or one by weights in a search, which has none."""
    choose("draw", draw, DRAWS)
    if draw != "best" and schedule.is_search:
        raise InputError(
            f"draw={draw!r}: target_reward and particle_schedule_rule='top_k' leave no weights: use draw='best'"
        )


def check_copies_diverge(scheduler: Any) -> None:
    """Raises CannotSteer for a deterministic solver without a Gaussian kernel: resampled copies would stay one."""
    if not copies_diverge(scheduler):
        raise UnsupportedPipelineError(
            f"{type(scheduler).__name__} is deterministic and has no Gaussian kernel: resampled particles would never "
            "part. Use another one, for example pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)"
        )
