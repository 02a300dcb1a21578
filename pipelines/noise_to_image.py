"""G: from starting noise to finished images, by one whole run of a pipeline; the same noise gives the same images."""

import functools
import inspect
from typing import Any

import torch
from torch import Generator, Tensor

from steer.differentiable import computes_in_fp16, differentiable
from steer.pipelines.population import Population
from steer.quiet import plain_values, quiet
from steer.seam import CannotSteer, Event


class NoiseToImage:
    """The run of a population as a function of its noise ε (B·K, …), standard normal and fp32.

    start  the noise that the pipeline itself would have drawn, or the user's `latents`
    seeds  one for every row: of the noise that a stochastic solver adds on the way, which stays as it is
    Text is encoded once. Raises CannotSteer for a pipeline that takes no `latents`.
    """

    def __init__(self, population: Population) -> None:
        if "latents" not in inspect.signature(type(population.pipe).__call__).parameters:
            raise CannotSteer(f"{type(population.pipe).__name__} takes no latents: its noise cannot be optimised")
        self.population, self.seeds = population, population.seeds
        self.in_fp16 = computes_in_fp16(population.pipe)
        self._twins: dict[bool, Any] = {}
        self.start, self.dtype = self._first_noise()

    def about(self) -> dict[str, Any]:
        """What the images depend on beside the noise, as plain values."""
        population, pipe = self.population, self.population.pipe
        call = {name: value for name, value in population.call.items() if name not in ("generator", "latents")}
        return {
            "pipeline": type(pipe).__name__,
            "model": str(getattr(pipe.config, "_name_or_path", "")),
            "scheduler": pipe.scheduler.to_json_string(),
            "reward": population.reward.name,
            "prompts": population.prompts,
            "call": plain_values(call),
            "start": plain_values(self.start),
            "dtype": str(self.dtype),
            "seeds": self.seeds,
        }

    def __call__(self, noise: Tensor) -> Tensor:
        """Images (B·K, 3, H, W) as the user's own pipeline makes them."""
        return self._run(noise, self.population.pipe)

    def quickly(self, noise: Tensor) -> Tensor:
        """The same, with text encoded once, no safety checker, watermark or progress bar."""
        return self._run(noise, self._plain)

    def with_graph(self, noise: Tensor, checkpointing: bool) -> Tensor:
        """The same, differentiable with respect to the noise. Raises CannotSteer where no gradients come through."""
        images = self._run(noise, self._twin(checkpointing))
        if not images.requires_grad:
            name = type(self.population.pipe).__name__
            raise CannotSteer(
                f"{name} lets no gradients through: use the zero-order estimator "
                "(gradient='zero-order', on the command line --gradient zero-order)"
            )
        return images

    @functools.cached_property
    def _plain(self) -> Any:
        return quiet(self.population.pipe)

    def _twin(self, checkpointing: bool) -> Any:
        if checkpointing not in self._twins:
            one_call = self.population.call.get("num_inference_steps") == 1
            self._twins[checkpointing] = differentiable(self._plain, checkpointing, one_call)
        return self._twins[checkpointing]

    def _run(self, noise: Tensor, pipe: Any) -> Tensor:
        generators = [Generator().manual_seed(seed) for seed in self.seeds]
        latents = noise.to(self.dtype)
        return self.population.sample(lambda event: None, pipe, latents=latents, generator=generators)

    def _first_noise(self) -> tuple[Tensor, torch.dtype]:
        """What the first step of a run starts from, without the scheduler's scale, in fp32, and its dtype."""

        def stop(event: Event) -> None:
            raise _Started(event)

        try:
            self.population.sample(stop, self._plain)
        except _Started as started:  # the run ends there
            event: Event = started.args[0]
        return event.x.float() / float(getattr(event.scheduler, "init_noise_sigma", 1.0)), event.x.dtype


class _Started(Exception):
    """Carries the first step of a run out of it."""
