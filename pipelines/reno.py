"""ReNO: the starting noise of a pipeline, optimised by the gradient of a reward (arXiv 2406.04312)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from steer.arguments import coerced
from steer.choices import choose
from steer.errors import InputError
from steer.noise import OPTIMISERS, Optimiser, Search, clipped, prior_gradient
from steer.pipelines.method import SteeringMethod
from steer.pipelines.noise_gradient import GRADIENTS, NoiseGradient, check_differentiable
from steer.pipelines.noise_run import Moved, NoiseRun, check_target
from steer.pipelines.noise_to_image import NoiseToImage
from steer.pipelines.output import Iteration, SteeringOutput
from steer.pipelines.population import Population, check_output_type
from steer.preview import accepted_only
from steer.seeds import drawn

ONE_STEP = {"num_inference_steps": 1, "guidance_scale": 0.0}  # how one-step models are called


class ReNOPipeline(SteeringMethod):
    """Noise that is moved uphill, from images to better images of the same one-step (or few-step) model.

    pipe = StableDiffusionPipeline.from_pretrained(MODELS["scenes-turbo"])  # or SD-Turbo, SDXL-Turbo, FLUX.1-schnell
    out = ReNOPipeline(pipe, reward="scene-soft")("a red circle left of a blue star", iterations=20)
    out.images[0], out.trace[-1].best, out.start.noise
    """

    @coerced
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        num_particles: int = 1,
        iterations: int = 50,
        optimiser: str | Optimiser = "sgd",
        lr: float | None = None,
        regularisation: float = 0.01,
        max_grad_norm: float = 0.1,
        gradient: str | NoiseGradient = "backprop",
        patience: int | None = None,
        restarts: int = 0,
        target: float | None = None,
        state_file: str | Path | None = None,
        chunk_size: int = 8,
        reward_prompt: str | Sequence[str] | None = None,
        on_iteration: Callable[[Iteration], bool | None] | None = None,
        output_type: str = "pil",
        **call: Any,
    ) -> SteeringOutput:
        """Optimises the noise of one call; every other argument goes to the pipeline's own `__call__`.

        By default that is called as one-step models want it, `num_inference_steps=1, guidance_scale=0`; for others
        say yours: the gradient goes through all steps.

        prompt          one, or several
        num_particles   K, seeds for each prompt; every image is a search of its own
        iterations      evaluations of the reward for each
        optimiser       sgd (Nesterov), adam, or an object of `steer.noise`
        lr              learning rate; by default 5 (sgd, published for noise of 16,384 numbers), 0.05 (adam)
        regularisation  weight of log p(‖ε‖), which keeps the noise as long as noise is
        max_grad_norm   the gradient of each image is clipped to it
        gradient        backprop, zero-order (for any reward), or an object of `steer.pipelines.noise_gradient`
        patience        iterations without a better reward after which a search ends, or starts again from new noise
        restarts        how often it may do that
        target          a search whose best reward is as high as that is finished; the run ends once all are
        state_file      saved after every iteration; a call with the same settings, and a generator of the same seed,
                        goes on from there
        on_iteration    an observer; true from it ends the run
        chunk_size      images scored at a time
        reward_prompt, output_type   as in `FKSteeringPipeline`

        The best iterate of each search is returned, drawn again by the plain pipeline: `out.start` makes it anew. A
        gradient that is not finite, or a reward that fails after the first iteration, ends all searches with the best
        so far, and `out.stopped` says why. Raises InputError and its kinds as `FKSteeringPipeline` does.
        """
        check_output_type(output_type)
        rule = choose("optimiser", optimiser, OPTIMISERS)
        ascent = Ascent(
            choose("gradient", gradient, GRADIENTS),
            rule if lr is None else replace(rule, lr=lr),
            regularisation,
            max_grad_norm,
            patience,
            restarts,
            target,
        )
        check_differentiable(self.reward, ascent.gradient)
        call = accepted_only(self.pipe, ONE_STEP) | call
        population = Population(self.pipe, self.reward, prompt, num_particles, call, reward_prompt, chunk_size)
        chain = NoiseToImage(population)
        search = Search.start(chain.start, ascent.optimiser)
        run = NoiseRun(chain, ascent, search, iterations, state_file, on_iteration)
        return run.output(output_type)


@dataclass(frozen=True)
class Ascent:
    """One iteration of ReNO: where each search goes on. Raises InputError for numbers that cannot be."""

    gradient: NoiseGradient
    optimiser: Optimiser
    regularisation: float = 0.01
    max_grad_norm: float = 0.1
    patience: int | None = None
    restarts: int = 0
    target: float | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_target(self.target)
        for name, number in (("lr", self.optimiser.lr), ("max_grad_norm", self.max_grad_norm)):
            if not 0 < number < float("inf"):
                raise InputError(f"{name} must be above 0 and finite, got {number}")
        if not 0 <= self.regularisation < float("inf"):
            raise InputError(f"regularisation must be at least 0 and finite, got {self.regularisation}")
        if self.patience is not None and self.patience < 1:
            raise InputError(f"patience must be at least 1, got {self.patience}")
        if self.restarts < 0 or (self.restarts and self.patience is None):
            raise InputError(f"restarts must be at least 0, and need a patience, got {self.restarts}")

    def __call__(self, chain: NoiseToImage, search: Search, number: int) -> Moved:
        """Rewards and gradient at the present noise, the best kept, a step."""
        seen = self.gradient(chain, search.noise, number)
        recorded = search.record(seen.rewards.flatten()).reach(self.target)
        uphill = seen.gradient + self.regularisation * prior_gradient(search.noise)
        stopped, moved = self._broken(chain, uphill, number), recorded
        if stopped is None:
            moved = self._ascended(recorded, uphill, chain.seeds)
        return Moved(seen.images, seen.rewards, seen.parts, search.noise, moved, stopped)

    def _broken(self, chain: NoiseToImage, uphill: Tensor, number: int) -> str | None:
        """Which gradient is not finite, if any."""
        rows = (~uphill.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
        if not rows:
            return None
        name, prompt = chain.population.reward.name, chain.population.prompts[rows[0]]
        return f"the gradient of reward {name!r} is not finite at iteration {number}, prompt {prompt!r}"

    def _ascended(self, search: Search, uphill: Tensor, seeds: Sequence[int]) -> Search:
        """ε ← ε + a step along ∇ [Σ_m w_m r_m(G(ε)) + w_reg log p(‖ε‖)]; searches out of patience begin anew."""
        step = clipped(uphill, self.max_grad_norm)
        if self.patience is None:
            return search.ascend(step, self.optimiser)
        tired = (search.stale >= self.patience) & ~search.finished
        again = tired & (search.starts <= self.restarts)
        streams = [f"start {number}" for number in search.starts.tolist()]
        # Retired before the step: where the rest of a batch goes on, a finished row is seen again as it was.
        moved = search.retire(tired & ~again).ascend(step, self.optimiser)
        return moved.restart(again, drawn(seeds, search.noise, streams))
