"""Feynman–Kac steering of a diffusers pipeline (arXiv 2501.06848)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from steer.arguments import coerced
from steer.choices import choose
from steer.differentiable import differentiable
from steer.errors import InputError
from steer.feynman_kac import FeynmanKac
from steer.live_rows import LiveRows
from steer.particles import Particles
from steer.pipelines.fk_run import Run, StepReport
from steer.pipelines.guided import GuidedRun, check_guidable
from steer.pipelines.lagged import LaggedRun
from steer.pipelines.method import SteeringMethod, route_eta
from steer.pipelines.output import SteeringOutput
from steer.pipelines.plan import Plan
from steer.pipelines.population import DRAWS, Population, check_output_type
from steer.potentials import POTENTIALS, TEMPERINGS, Potential, Tempering
from steer.resampling import RESAMPLERS, Resampler
from steer.seam import CannotSteer
from steer.transition import copies_part

__all__ = ["FKSteeringPipeline", "StepReport"]


class FKSteeringPipeline(SteeringMethod):
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
        narrow: Mapping[int, int] | None = None,
        narrow_choice: str = "drawn",
        target_reward: float | None = None,
        overlap: bool = False,
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
        narrow          particle schedule: {solver step: particles of each prompt that go on from it}, fewer and fewer;
                        rewards are read there too. The others cost nothing any more, and have no images
        narrow_choice   which go on: "drawn" by their weights, or the "best", which is a search (see target_reward)
        target_reward   once r(x̂0) of a particle is as high where rewards are read, it alone goes on and no more are
                        read: for one prompt a call. It is a search: log-weights and log-normaliser are then 0
        overlap         decode and score x̂0 in the background (on CUDA in a stream of its own) while the denoiser makes
                        the next step, and resample by it then: one step later
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
        plan = Plan(resample_steps, narrow or {}, narrow_choice, target_reward)
        live, pipe, noise = LiveRows(), self.pipe, 1.0 if eta is None else eta
        kernel_eta: float | None = None
        check_draw(draw, plan)
        if reward_guidance != 0:
            if overlap:
                raise InputError("overlap: with reward_guidance the step needs the gradient: leave one of them out")
            check_guidable(pipe.scheduler, self.reward, reward_guidance, noise)
            pipe = differentiable(pipe, one_call=True)
        else:
            if num_particles > 1 and lam != 0:
                check_copies_part(pipe.scheduler)
            call, kernel_eta = route_eta(pipe, call, eta)
        pipe = live.view(pipe) if plan.narrows else pipe
        population = Population(
            pipe, self.reward, prompt, num_particles, call, reward_prompt, chunk_size, preview, live
        )
        if target_reward is not None and population.groups > 1:
            raise InputError("target_reward: several prompts would reach it at different steps: one prompt a call")
        if reward_guidance != 0:
            run: Run = GuidedRun(algorithm, population, reward_guidance, noise, plan, on_step)
        else:
            kind = LaggedRun if overlap else Run
            # A step without noise would not part copies: where particles may be resampled η = 0 becomes 1.
            run = kind(algorithm, population, kernel_eta, eta or 1.0, plan, on_step)
        images = run.sample()
        rewards, parts = population.score(images)
        # What was chosen for being the best is a draw from no known distribution.
        searched = Particles.start(*rewards.shape)
        particles = searched if run.searched else algorithm.finish(run.particles, rewards)
        return population.output(images, rewards, parts, particles, run.history, output_type, draw)


def check_draw(draw: str, plan: Plan) -> None:
    """Raise InputError for an unknown draw, or one by weights in a search, which has none."""
    choose("draw", draw, DRAWS)
    if draw != "best" and plan.searches:
        raise InputError(f"draw={draw!r}: target_reward and narrow_choice='best' leave no weights: use draw='best'")


def check_copies_part(scheduler: Any) -> None:
    """Raises CannotSteer for a deterministic solver without a Gaussian kernel: resampled copies would stay one."""
    if not copies_part(scheduler):
        raise CannotSteer(
            f"{type(scheduler).__name__} is deterministic and has no Gaussian kernel: resampled particles would never "
            "part. Use another one, for example pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)"
        )
