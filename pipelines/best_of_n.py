"""Best of N: sample, score, sort. The control that every steering method is compared with."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from steer.arguments import coerced
from steer.pipelines.fk_run import Run, StepReport
from steer.pipelines.method import SteeringMethod, route_eta
from steer.pipelines.output import SteeringOutput
from steer.pipelines.plan import Plan
from steer.pipelines.population import Population, check_output_type
from steer.pipelines.selection import Selection


class BestOfNPipeline(SteeringMethod):
    """The pipeline's own batch of N images for each prompt, best first."""

    @coerced
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        num_particles: int = 4,
        preview_steps: Iterable[int] | None = (),
        eta: float | None = None,
        chunk_size: int = 8,
        reward_prompt: str | Sequence[str] | None = None,
        on_step: Callable[[StepReport], None] | None = None,
        output_type: str = "pil",
        **call: Any,
    ) -> SteeringOutput:
        """Arguments, errors and output as in `FKSteeringPipeline`; N is `num_particles`, and all weights are equal.

        preview_steps  solver steps, from 0, at which x̂0 is decoded and scored for `on_step` and `out.history`; the
                       images stay what they are without. None: where `FKSteeringPipeline` reads by default
        """
        check_output_type(output_type)
        call, kernel_eta = route_eta(self.pipe, call, eta)
        population = Population(self.pipe, self.reward, prompt, num_particles, call, reward_prompt, chunk_size)
        run = Watched(Selection(num_particles), population, kernel_eta, 1.0, Plan(preview_steps), on_step)
        images = run.sample()
        rewards, parts = population.score(images)
        return population.output(images, rewards, parts, run.particles, run.history, output_type)


class Watched(Run):
    """A run in which all particles stay."""

    steps_asked = "preview_steps"

    def _needs_steps(self) -> bool:
        return False
