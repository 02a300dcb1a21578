"""Best of N: sample, score, sort. The control that every steering method is compared with."""

from collections.abc import Sequence
from typing import Any

from steer.particles import Particles
from steer.pipelines.method import SteeringMethod, route_eta
from steer.pipelines.output import SteeringOutput
from steer.pipelines.population import Population, check_output_type
from steer.seam import Answer, Event


class BestOfNPipeline(SteeringMethod):
    """The pipeline's own batch of N images for each prompt, best first."""

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        num_particles: int = 4,
        eta: float | None = None,
        chunk_size: int = 8,
        reward_prompt: str | Sequence[str] | None = None,
        output_type: str = "pil",
        **call: Any,
    ) -> SteeringOutput:
        """Arguments, errors and output as in `FKSteeringPipeline`; N is `num_particles`, and all weights are equal."""
        check_output_type(output_type)
        call, kernel_eta = route_eta(self.pipe, call, eta)
        population = Population(self.pipe, self.reward, prompt, num_particles, call, reward_prompt, chunk_size)

        def on_event(event: Event) -> Answer | None:
            return None if kernel_eta is None else (None, event.kernel(kernel_eta).sample(population.rng))

        images = population.sample(on_event)
        rewards, parts = population.score(images)
        return population.output(images, rewards, parts, Particles.start(*rewards.shape), output_type=output_type)
