"""Best of N: sample, score, sort. The control that every steering method is compared with."""

from collections.abc import Sequence
from typing import Any

from steer.particles import Particles
from steer.pipelines.method import SteeringMethod
from steer.pipelines.output import SteeringOutput
from steer.pipelines.population import Population, check_output_type


class BestOfNPipeline(SteeringMethod):
    """The pipeline's own batch of N images for each prompt, best first."""

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        num_particles: int = 4,
        chunk_size: int = 8,
        reward_prompt: str | Sequence[str] | None = None,
        output_type: str = "pil",
        **call: Any,
    ) -> SteeringOutput:
        """Arguments, errors and output as in `FKSteeringPipeline`; N is `num_particles`, and all weights are equal."""
        check_output_type(output_type)
        population = Population(self.pipe, self.reward, prompt, num_particles, call, reward_prompt, chunk_size)
        images = population.sample(lambda event: None)
        rewards = population.score(images)
        return population.output(images, rewards, Particles.start(*rewards.shape), output_type=output_type)
