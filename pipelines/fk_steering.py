"""Feynman–Kac steering of a diffusers pipeline (arXiv 2501.06848)."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Generator, Tensor, nn

from steer.arguments import coerced
from steer.diffusion.batching import LiveRows, is_offloaded
from steer.diffusion.differentiable import computes_in_fp16, differentiable, own_gradients
from steer.diffusion.schedules import can_redraw, copies_part, draw_guided, redraws
from steer.diffusion.step_hooks import CannotSteer, SolverStep, StepOverride
from steer.errors import InputError
from steer.pipelines.base import Evaluation, SteeringOutput, SteeringPipeline, route_eta
from steer.pipelines.particle_batch import DRAWS, ParticleBatch, check_output_type
from steer.registry import choose
from steer.reward import Begin, Reward, RewardError, in_background
from steer.smc.particles import FeynmanKac, Particles
from steer.smc.potentials import POTENTIALS, TEMPERINGS, Potential, Tempering
from steer.smc.resampling import RESAMPLERS, Resampler

Selected = tuple[Particles, Tensor | None]  # and their ancestors (B, n); None: all stay where they are


class Algorithm(Protocol):
    """What rewards (B, K) of x̂0 do to the particles of a run, and which of them (B, count) the slots go on from."""

    @property
    def lam(self) -> float: ...

    def weigh(self, particles: Particles, rewards: Tensor, progress: float) -> Particles: ...

    def select(self, particles: Particles, generator: Generator, count: int | None = None) -> Selected: ...


Choice = Callable[[Algorithm, Particles, int, Generator], Selected]


def drawn(algorithm: Algorithm, particles: Particles, count: int, generator: Generator) -> Selected:
    """`count` of K as the algorithm draws them: of the same distribution, unbiased."""
    return algorithm.select(particles, generator, count)


def best(algorithm: Algorithm, particles: Particles, count: int, generator: Generator) -> Selected:
    """The `count` of K with the highest reward of x̂0: a search, which draws from no known distribution."""
    kept = highest(particles.path.rewards[-1], count)
    return particles.resample(kept, torch.ones(len(kept), dtype=torch.bool)), kept


def highest(rewards: Tensor, count: int) -> Tensor:
    """Places (B, count) of the highest of rewards (B, M), ascending; of equal ones the lower place."""
    return rewards.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(dim=1).values


CHOICES: dict[str, Choice] = {"resample": drawn, "top_k": best}


@dataclass(frozen=True)
class ResamplingSchedule:
    """Of every prompt of a run alike.

    asked   solver steps, from 0, at which rewards are read; None: the method's own
    particle_schedule  {solver step: particles that go on from it}, fewer and fewer; rewards are read there too
    choice  which go on where there are to be fewer: drawn by their weights, or the best
    target  once r(x̂0) of a particle is as high, the best one alone goes on, and no more rewards are read
    """

    asked: Iterable[int] | None = None
    particle_schedule: Mapping[int, int] = field(default_factory=dict)
    choice: str = "resample"
    target: float | None = None

    def __post_init__(self) -> None:
        if self.asked is not None:
            object.__setattr__(self, "asked", frozenset(self.asked))
        choose("particle_schedule_rule", self.choice, CHOICES)
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
    def narrows(self) -> bool:
        """Whether a run may go on with fewer particles than it began with."""
        return bool(self.particle_schedule) or self.target is not None

    @property
    def searches(self) -> bool:
        """Whether particles may be chosen for being the best, which leaves no weights."""
        return self.target is not None or (bool(self.particle_schedule) and self.choice == "top_k")

    def selects(self, step: int, size: int) -> tuple[Choice, int]:
        """How those of `size` particles are chosen that go on from this step, and how many they are."""
        count = self.particle_schedule.get(step, size)
        return (CHOICES[self.choice] if count < size else drawn), count

    def reached(self, rewards: Tensor) -> bool:
        """Whether one of the rewards (1, K) is as high as the target."""
        return self.target is not None and bool((rewards >= self.target).any())

    def steps(self, own: Iterable[int], first: int, last: int, total: int, name: str) -> frozenset[int]:
        """The steps asked for, or the method's `own`, and those at which particles get fewer: from `first` to `last`.

        Raises InputError for others, in a run of `total` steps; `name` is what the caller knows them as.
        """
        for told, steps in ((name, self.asked or ()), ("particle_schedule", self.particle_schedule)):
            if wrong := sorted(step for step in steps if not first <= step <= last):
                raise InputError(f"{told}: {wrong[0]} is not from {first} to {last}, in a run of {total} steps")
        usual = {min(step, last) for step in own} if self.asked is None else self.asked
        return frozenset(step for step in usual if step >= first) | frozenset(self.particle_schedule)


DEFAULT_STEPS = (0.4, 0.55, 0.7, 0.85)  # where rewards are read, as shares of the run


@dataclass(frozen=True)
class StepReport:
    """What an observer is told after a solver step: number `step` of `total`; where rewards were read, the evaluation
    and the images (B·K, 3, H, W) of x̂0, of K particles that were left, that they were read from."""

    step: int
    total: int
    evaluation: Evaluation | None = None
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
    lag = 0  # steps from there to where particles are resampled by them
    steps_asked = "resample_steps"  # what the caller knows those steps as

    def __init__(
        self,
        algorithm: Algorithm,
        population: ParticleBatch,
        eta: float | None,
        resampling_eta: float,
        plan: ResamplingSchedule,
        observer: Callable[[StepReport], None] | None,
    ) -> None:
        plan.check_size(population.size)
        self.algorithm, self.population, self.plan, self.observer = algorithm, population, plan, observer
        self.eta, self.resampling_eta = eta, resampling_eta  # of every step, None: the solver's own; where resampled
        self.steps: frozenset[int] = frozenset()  # at which rewards are read: known at the first
        self.settled = self.searched = False  # a particle has reached the target; some were chosen for being the best
        self.particles = Particles.start(population.groups, population.size)
        self.history: list[Evaluation] = []

    def sample(self) -> Tensor:
        """Runs the pipeline to its end: the finished images (B·K, 3, H, W) of the K particles that are left."""
        return self.population.sample(self.on_event)

    def on_event(self, event: SolverStep) -> StepOverride:
        """One solver step: weigh the particles by r(x̂0), resample them, move them on."""
        if not self._reads_at(event):
            self._tell(StepReport(event.k, event.total))
            return None, self._moved(event, None, None)
        reading = self._read(event)
        rows = self._resampled(reading, event.k, event)
        return rows, self._moved(event, rows, reading)

    def _resampled(self, reading: IntermediateRewards, step: int, event: SolverStep) -> Tensor | None:
        """Weighs the particles by what was read at a step, and resamples them at this event: the rows that the slots
        go on from, None: all stay."""
        weighed = self.algorithm.weigh(self.particles, reading.rewards, step / event.total)
        self.particles, ancestors = self._select(weighed, step)
        stay = torch.arange(self.population.alive).expand_as(reading.rewards)
        evaluation = Evaluation(
            step, reading.rewards, weighed.path.strengths[-1], weighed.ess, stay if ancestors is None else ancestors
        )
        self.history.append(evaluation)
        self._tell(StepReport(event.k, event.total, evaluation, reading.previews))
        return None if ancestors is None else self.population.follow(ancestors).to(event.x.device)

    def _select(self, weighed: Particles, step: int) -> Selected:
        """The particles that go on and their ancestors; None: all stay where they are."""
        self.settled = self.plan.reached(weighed.path.rewards[-1])
        choice, count = (best, 1) if self.settled else self.plan.selects(step, self.population.alive)
        self.searched = self.searched or choice is best
        return choice(self.algorithm, weighed, count, self.population.rng)

    def _read(self, event: SolverStep) -> IntermediateRewards:
        return self._read_off(event.x0())

    def _read_off(self, x0: Tensor) -> IntermediateRewards:
        """What the images that x̂0 stands for are worth."""
        previews = self.population.preview(x0)
        rewards, _ = self.population.score(previews)
        return IntermediateRewards(previews, rewards)

    def _moved(self, event: SolverStep, rows: Tensor | None, reading: IntermediateRewards | None) -> Tensor | None:
        """Latents of the slots after this step; None: those of the solver.

        Where a reading may copy particles, all of them take the Gaussian kernel, whether they are resampled or not: a
        kernel that depended on the weights would change the law that the weights refer to.
        """
        copying = reading is not None and self.population.alive > 1 and self._needs_steps()
        resampling = copying and self._redraws(event.scheduler)
        eta = self.resampling_eta if resampling else self.eta
        return None if eta is None else event.kernel(eta, rows).sample(self.population.rng)

    def _redraws(self, scheduler: Any) -> bool:
        return self.eta is not None or redraws(scheduler)

    def _reads_at(self, event: SolverStep) -> bool:
        """Whether rewards are read at this step. Settled at the first: copies need a noisy step after them to part."""
        if event.k == 0:
            last = event.total - self.lag - (2 if self._redraws(event.scheduler) else 3)
            own = self._default_steps(event.total)
            self.steps = self.plan.steps(own, self.first, last, event.total, self.steps_asked)
            if not self.steps and self._needs_steps():
                raise CannotSteer(f"a run of {event.total} steps has none to resample at: use best-of-N, or more steps")
        return event.k in self.steps and not self.settled

    def _default_steps(self, total: int) -> Iterable[int]:
        return (round(share * total) for share in DEFAULT_STEPS)

    def _needs_steps(self) -> bool:
        return self.population.size > 1 and self.algorithm.lam != 0

    def _tell(self, report: StepReport) -> None:
        if self.observer:
            self.observer(report)


class AsynchronousRun(Run):
    """A run whose potentials G_j(x̂0(x_t)) multiply the weights one step after x_t.

    G_j is a function of the path up to x_t: whether it is multiplied there or a step later, before any further reading,
    the product over the path is the same, and with it what the weighted particles are drawn from.
    """

    lag = 1
    beside: Callable[[torch.device], AbstractContextManager[Begin]] = staticmethod(in_background)
    begin: Begin  # while the pipeline runs
    pending: Callable[[], IntermediateRewards] | None = None

    def sample(self) -> Tensor:
        """Runs the pipeline to its end: the finished images (B·K, 3, H, W) of the K particles that are left."""
        check_stays(self.population.pipe)
        with self.beside(torch.device(self.population.pipe.device)) as self.begin:
            return super().sample()

    def on_event(self, event: SolverStep) -> StepOverride:
        """One solver step: resample by what was read at the step before, begin to read, move on."""
        rows: Tensor | None = None
        reading: IntermediateRewards | None = None
        if self.pending is None:
            self._tell(StepReport(event.k, event.total))
        else:
            reading, self.pending = self.pending(), None
            rows = self._resampled(reading, event.k - self.lag, event)
        if self._reads_at(event):
            x0 = event.x0() if rows is None else event.x0()[rows]
            self.pending = self.begin(lambda: self._read_off(x0))
        return rows, self._moved(event, rows, reading)


def check_stays(pipe: Any) -> None:
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
        population: ParticleBatch,
        guidance: float,
        eta: float,
        plan: ResamplingSchedule,
        observer: Callable[[StepReport], None] | None,
    ) -> None:
        super().__init__(algorithm, population, eta, eta, plan, observer)
        self.guidance = guidance
        self.half = computes_in_fp16(population.pipe)

    def sample(self) -> Tensor:
        """Runs the pipeline to its end: the finished images (B·K, 3, H, W) of the K particles that are left."""
        with torch.enable_grad():
            return super().sample().detach()

    def _read(self, event: SolverStep) -> IntermediateRewards:
        previews = self.population.preview(event.x0())
        if not previews.requires_grad:
            raise CannotSteer(f"{type(self.population.pipe).__name__} lets no gradients through: use reward_guidance=0")
        rewards, _ = self.population.score(previews)
        return IntermediateRewards(previews.detach(), rewards.detach(), self._gradient(event, rewards))

    def _gradient(self, event: SolverStep, rewards: Tensor) -> Tensor:
        name, gradient = self.population.reward.name, own_gradients(rewards, event.x, self.half)
        if gradient is None:
            raise RewardError(f"reward {name!r} says that it is differentiable, but gives no gradients")
        if not gradient.isfinite().all():
            raise RewardError(f"the gradient of reward {name!r} is not finite at step {event.k}")
        self.population.count_gradients(rewards.numel())
        return gradient

    @torch.no_grad()
    def _moved(self, event: SolverStep, rows: Tensor | None, reading: IntermediateRewards | None) -> Tensor:
        kernel = event.kernel(self.resampling_eta, rows)  # which is that of every step
        if reading is None or reading.gradient is None:
            moved = kernel.sample(self.population.rng)
        else:
            # Particles and gradients go to their slots together.
            gradient = reading.gradient if rows is None else reading.gradient[rows]
            moved, log_ratio = draw_guided(kernel, self._strengths(gradient) * gradient, self.population.rng)
            living = self.population.live.of(log_ratio).cpu().view_as(self.particles.log_weights)
            self.particles = self.particles.correct(living)
        return moved.to(event.prev.dtype).requires_grad_(event.k + 1 in self.steps and not self.settled)

    def _strengths(self, like: Tensor) -> Tensor:
        """γ λ_j of every row, (B·K, 1, …)."""
        strengths = self.guidance * self.history[-1].strength.repeat_interleave(self.population.size, dim=0)
        return strengths.to(like).view(-1, *[1] * (like.dim() - 1))

    def _default_steps(self, total: int) -> Iterable[int]:
        return range(self.first, total)

    def _needs_steps(self) -> bool:
        return self.algorithm.lam != 0


def check_guidable(scheduler: Any, reward: Reward, guidance: float, eta: float, asynchronous: bool) -> None:
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
    if not can_redraw(scheduler):
        raise CannotSteer(
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

    @coerced
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
        plan = ResamplingSchedule(resample_steps, particle_schedule or {}, particle_schedule_rule, target_reward)
        live, pipe, noise = LiveRows(), self.pipe, 1.0 if eta is None else eta
        kernel_eta: float | None = None
        check_draw(draw, plan)
        if reward_guidance != 0:
            check_guidable(pipe.scheduler, self.reward, reward_guidance, noise, asynchronous_rewards)
            pipe = differentiable(pipe, one_call=True)
        else:
            if num_particles > 1 and lam != 0:
                check_copies_part(pipe.scheduler)
            call, kernel_eta = route_eta(pipe, call, eta)
        pipe = live.view(pipe) if plan.narrows else pipe
        population = ParticleBatch(
            pipe, self.reward, prompt, num_particles, call, reward_prompt, chunk_size, preview, live
        )
        if target_reward is not None and population.groups > 1:
            raise InputError("target_reward: several prompts would reach it at different steps: one prompt a call")
        if reward_guidance != 0:
            run: Run = GuidedRun(algorithm, population, reward_guidance, noise, plan, on_step)
        else:
            kind = AsynchronousRun if asynchronous_rewards else Run
            # A step without noise would not part copies: where particles may be resampled η = 0 becomes 1.
            run = kind(algorithm, population, kernel_eta, eta or 1.0, plan, on_step)
        images = run.sample()
        rewards, components = population.score(images)
        # What was chosen for being the best is a draw from no known distribution.
        searched = Particles.start(*rewards.shape)
        particles = searched if run.searched else algorithm.finish(run.particles, rewards)
        return population.output(images, rewards, components, particles, run.history, output_type, draw)


def check_draw(draw: str, plan: ResamplingSchedule) -> None:
    """Raise InputError for an unknown draw, or one by weights in a search, which has none."""
    choose("draw", draw, DRAWS)
    if draw != "best" and plan.searches:
        raise InputError(
            f"draw={draw!r}: target_reward and particle_schedule_rule='top_k' leave no weights: use draw='best'"
        )


def check_copies_part(scheduler: Any) -> None:
    """Raises CannotSteer for a deterministic solver without a Gaussian kernel: resampled copies would stay one."""
    if not copies_part(scheduler):
        raise CannotSteer(
            f"{type(scheduler).__name__} is deterministic and has no Gaussian kernel: resampled particles would never "
            "part. Use another one, for example pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)"
        )
