"""Drafts: images of few solver steps rank many starts; the best are made in full, or noised again and finished.

Both are searches by the reward of the drafts (Flash-BoN, arXiv 2607.04461; ABCD, arXiv 2505.14036), and controls of
steering: a steering method must beat many cheap drafts.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from steer.diffusion.schedules import step_levels
from steer.diffusion.seeds import derived_seed, seeded_normal, spread_generators
from steer.diffusion.short_schedule import starting_at
from steer.diffusion.step_hooks import SolverStep, StepOverride, scheduler_of
from steer.diffusion.views import replace_parts
from steer.errors import InputError, UnsupportedPipelineError
from steer.pipelines.base import SteeringOutput, SteeringPipeline, route_eta, steering_call
from steer.pipelines.fk_steering import ResamplingSchedule, Run, run_particles
from steer.pipelines.initial_noise import RESERVED_ARGUMENTS, screen_initial_noise
from steer.pipelines.particle_batch import ParticleBatch, reward_texts
from steer.pipelines.racing import first_solver_step
from steer.pipelines.selection import BestOfNPipeline, PreviewRun, Selection
from steer.pipelines.settings import DraftsSettings, Prompts, RenoiseSettings

DEFAULT_RESTART = 0.4  # share of the run that copies of a draft skip


class DraftsPipeline(SteeringPipeline):
    """Drafts: M images of few solver steps for each prompt, of which the best K are made again in full.

    pipe = StableDiffusionPipeline.from_pretrained(...)
    out = DraftsPipeline(pipe, reward="scene-soft")("a red star", num_particles=2, drafts=16, draft_steps=5)
    """

    @steering_call(DraftsSettings)
    def __call__(self, prompt: Prompts, settings: DraftsSettings, call: dict[str, Any]) -> SteeringOutput:
        """Draft, then sample; all other arguments go to the pipeline's own `__call__`.

        The first K drafts start from the pipeline's own noise: drafts = K is best-of-N. Errors and output are as in
        `FKSteeringPipeline`; this is a search, with log-weights 0.
        """
        s = settings
        _check_free(call, "drafts")
        rest: dict[str, Any] = {"chunk_size": s.chunk_size, "reward_prompt": s.reward_prompt}
        best_of_n = BestOfNPipeline(self.pipe, self.reward)
        shown: dict[str, Any] = {
            "output_type": s.output_type,
            "on_step": s.on_step,
            "preview_steps": s.preview_steps,
        }
        if not s.finish:
            return draft(best_of_n, prompt, s, call | shown | rest).best(s.num_particles)
        starts = screen_initial_noise(
            self.pipe,
            self.reward,
            prompt,
            keep=s.num_particles,
            candidates=s.drafts,
            steps=s.draft_steps,
            candidate_batch_size=s.drafts,  # as racing: small batches take longer, `micro_batched` bounds the memory
            **rest,
            **call,
        )
        own = {"num_particles": s.num_particles, "eta": s.eta}
        output = best_of_n(prompt, **call | own | shown | rest | starts.arguments())
        output.cost = output.cost.plus(starts.cost)
        return output


class RenoisePipeline(SteeringPipeline):
    """Draft-and-renoise: the best drafts, noised to the level of a solver step, and finished from there.

    pipe = StableDiffusionPipeline.from_pretrained(...)
    out = RenoisePipeline(pipe, reward="scene-soft")("a red star", num_particles=4, drafts=16, restart_step=8)
    """

    @steering_call(RenoiseSettings)
    def __call__(self, prompt: Prompts, settings: RenoiseSettings, call: dict[str, Any]) -> SteeringOutput:
        """Draft, renoise and finish; all other arguments go to the pipeline's own `__call__`.

        x_τ = α_τ x0* + σ_τ ε, for K/parents draws of ε for each draft x0*. Errors and output are as in
        `FKSteeringPipeline`; this is a search, with log-weights 0.
        """
        s = settings
        _check_free(call, "renoise")
        rest: dict[str, Any] = {"chunk_size": s.chunk_size, "reward_prompt": s.reward_prompt}
        drafts = draft(
            BestOfNPipeline(self.pipe, self.reward),
            prompt,
            s,
            call | {"output_type": "latent"} | rest,
        ).best(s.parents)
        steps = first_solver_step(self.pipe, self.reward, prompt, call, s.reward_prompt)[0].total
        first = round(DEFAULT_RESTART * steps) if s.restart_step is None else s.restart_step
        if first >= steps:
            raise InputError(f"restart_step: {first} is not from 0 to {steps - 1}, in a run of {steps} steps")
        output = self._finish(drafts.latents, first, prompt, s, call)
        output.cost = output.cost.plus(drafts.cost)
        return output

    def _finish(
        self, x0: Tensor, first: int, prompt: Prompts, s: RenoiseSettings, call: dict[str, Any]
    ) -> SteeringOutput:
        """Run K/parents copies of each draft x0 (B·parents, …) from solver step `first` to the end."""
        call, kernel_eta = route_eta(self.pipe, call, s.eta)
        scheduler = scheduler_of(self.pipe)
        pipe = replace_parts(self.pipe, {id(scheduler): starting_at(scheduler, first)})

        def make_run(batch: ParticleBatch) -> Run:
            at, _ = first_solver_step(pipe, self.reward, prompt, call, s.reward_prompt)
            before, _ = step_levels(at.scheduler, at.t, at.index)
            copies = x0.repeat_interleave(s.num_particles // s.parents, 0)
            noise = seeded_normal(batch.seeds, copies, ["renoise"] * len(copies))
            x = before.alpha.to(copies) * copies + before.sigma.to(copies) * noise
            return RestartedRun(x, getattr(at.scheduler, "init_noise_sigma", 1.0), batch, kernel_eta, s)

        return run_particles(self, prompt, s, call, make_run, pipe=pipe)


class RestartedRun(PreviewRun):
    """A run without selection from latents x (N, …), which are divided by `scale` for the pipeline."""

    def __init__(
        self, x: Tensor, scale: Any, particle_batch: ParticleBatch, eta: float | None, settings: RenoiseSettings
    ) -> None:
        super().__init__(Selection(settings.num_particles), particle_batch, eta, ResamplingSchedule(()), settings)
        self.x, self.scale = x, scale

    def sample(self) -> Tensor:
        """Run the pipeline from the latents; return the finished images (B·K, 3, H, W)."""
        seeds = [derived_seed(seed, "solver after renoising") for seed in self.particle_batch.seeds]
        generators = [Generator().manual_seed(seed) for seed in seeds]
        given = {"latents": self.x / self.scale, "generator": generators}
        return self.particle_batch.sample(self.on_solver_step, **given)

    def on_solver_step(self, solver_step: SolverStep) -> StepOverride:
        """Check that the run starts from the latents it was given."""
        close = torch.finfo(self.x.dtype).eps ** 0.5
        if solver_step.k == 0 and not torch.allclose(solver_step.x, self.x, rtol=close, atol=close):
            raise UnsupportedPipelineError(
                f"{type(self.particle_batch.pipe).__name__} does not start from the latents that it is given: drafts "
                "cannot be renoised, use --method drafts or best-of-N"
            )
        return super().on_solver_step(solver_step)


def draft(
    best_of_n: BestOfNPipeline, prompt: Prompts, s: DraftsSettings | RenoiseSettings, call: dict[str, Any]
) -> SteeringOutput:
    """Sample M images of each prompt with S solver steps, best first."""
    given: Generator | Sequence[Generator] | None = call.get("generator")
    if given is not None and not isinstance(given, Generator):
        groups = len(reward_texts(prompt, s.reward_prompt, call))
        call = call | {"generator": spread_generators(given, groups, s.drafts)}
    return best_of_n(prompt, **call | {"num_particles": s.drafts, "num_inference_steps": s.draft_steps, "eta": s.eta})


def _check_free(call: dict[str, Any], method: str) -> None:
    """Raise InputError for arguments that conflict with drafts."""
    if conflicting := [one for one in RESERVED_ARGUMENTS if call.get(one) is not None]:
        raise InputError(f"{conflicting[0]} and {method} exclude each other: leave {conflicting[0]} out")
