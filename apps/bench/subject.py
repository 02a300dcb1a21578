"""What `steer bench` measures on: a pipeline with a prompt, a reward and numbers, and the runs that are timed."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from diffusers.models.autoencoders.vae import Decoder, DecoderTiny
from torch import Generator, Tensor, nn

from steer.apps.bench.clock import Kinds
from steer.batch import Batch, Reference, reference_of
from steer.feynman_kac import FeynmanKac
from steer.pipelines.fk_run import DEFAULT_STEPS, Run
from steer.pipelines.noise_to_image import NoiseToImage
from steer.pipelines.plan import Plan
from steer.pipelines.population import Population
from steer.pipelines.samples import rows_of
from steer.preview import accepted_only
from steer.reward import Reward, load_reward
from steer.seeds import derived_seed
from steer.stand_in import Output, denoisers_in
from steer.trainable import LoRA
from steer.trajectory import Sampler, Trajectories

STRENGTH = 10.0  # λ
BOLD = 0.02  # standard deviation of a LoRA's B, which begins at 0: a policy that has learnt something


class BenchReward(nn.Module):
    """A reward that can be counted like a model. `eight_bits`: it reads images as PIL would hold them, so that a way
    through PIL finds the same rewards."""

    def __init__(self, reward: Reward, eight_bits: bool) -> None:
        super().__init__()
        self.reward, self.eight_bits = reward, eight_bits
        self.name, self.differentiable = reward.name, reward.differentiable and not eight_bits

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.reward((images * 255).round() / 255 if self.eight_bits else images, prompts)


@dataclass(frozen=True)
class Subject:
    """A model to measure, and how.

    pipe      called with `call` (num_inference_steps and guidance_scale among it) for `size` particles of each prompt
    one_step  a pipeline for ReNO, called for one step without guidance; None: no ReNO
    learner   makes a pipeline for D3PO, which puts a LoRA into it; None: no D3PO
    iterations  of ReNO
    pairs, lesson_steps  of D3PO: its cost goes with pairs · steps
    preview   what decodes x̂0 where a cheap decoder will do, by a word of `steer sample`
    """

    name: str
    pipe: Any
    call: dict[str, Any]
    size: int = 8
    prompts: tuple[str, ...] = ("a red circle left of a blue star",)
    reward: Any = "scene-soft"
    seed: int = 0
    one_step: Any = None
    learner: Callable[[], Any] | None = None
    iterations: int = 3
    pairs: int = 2
    lesson_steps: int = 4
    preview: str = "linear"
    one_step_call: dict[str, Any] = field(default_factory=lambda: {"num_inference_steps": 1, "guidance_scale": 0.0})

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return torch.device(self.pipe.device)

    def generator(self, name: str = "start") -> Generator:
        """Random numbers, new for each run."""
        return Generator().manual_seed(derived_seed(self.seed, name))

    @property
    def kinds(self) -> Kinds:
        """Classes of the modules whose calls are counted. A VAE's decode calls its decoder."""
        found: dict[type, str] = {Decoder: "decoder", DecoderTiny: "tiny decoder", BenchReward: "reward"}
        for pipe in (self.pipe, self.one_step):
            if pipe is not None:
                found |= {type(getattr(pipe, name)): "denoiser" for name in denoisers_in(pipe)}
                texts = [part for name, part in pipe.components.items() if name.startswith("text_encoder")]
                found |= {type(part): "text encoder" for part in texts if part is not None}
        return found

    def judge(self, eight_bits: bool = False) -> BenchReward:
        """The reward, where the model is."""
        return BenchReward(load_reward(self.reward), eight_bits)

    def about(self) -> dict[str, Any]:
        """As plain values."""
        told = {"call": {name: str(value) for name, value in self.call.items()}, "particles": self.size}
        told |= {
            "prompts": list(self.prompts),
            "reward": load_reward(self.reward).name,
            "dtype": str(self.pipe.dtype).split(".")[-1],
        }
        return told | {
            "reno_iterations": self.iterations,
            "d3po_pairs": self.pairs,
            "d3po_steps": self.lesson_steps,
            "read_at": list(self.read_at),
        }

    @property
    def steps(self) -> int:
        """T."""
        return int(self.call["num_inference_steps"])

    @property
    def read_at(self) -> tuple[int, ...]:
        """The solver steps at which Feynman–Kac steering reads rewards by default."""
        return tuple(sorted({min(round(share * self.steps), self.steps - 2) for share in DEFAULT_STEPS} - {-1}))


class _FreeRewards(Population):
    """Rewards that cost nothing: random numbers; nothing is decoded for them."""

    @cached_property
    def _numbers(self) -> Generator:
        return Generator().manual_seed(0)

    def preview(self, x0: Tensor) -> Tensor:
        return x0

    def score(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return torch.rand(self.groups, self.size, generator=self._numbers), {}


def undecoded(pipe: Any) -> Any:
    """A view of a pipeline whose decoder hands the latents on: what is left is denoising."""
    view = copy.copy(pipe)
    if getattr(pipe, "vae", None) is not None:
        silent = copy.copy(pipe.vae)
        vars(silent)["decode"] = lambda z, *args, **kwargs: Output([z[:, :3]])
        vars(view)["vae"] = silent
    return view


def plain_call(subject: Subject, pipe: Any) -> Tensor:
    """The plain pipeline's batch of B·K: what it returns as tensors."""
    given = {"num_images_per_prompt": subject.size, "generator": subject.generator(), "output_type": "pt"}
    return pipe(list(subject.prompts), **accepted_only(pipe, subject.call | given)).images


@dataclass(frozen=True)
class Denoised:
    """Final latents (B·K, …) of a steered run, and the ancestors at its evaluated steps."""

    latents: Tensor
    ancestors: tuple[Tensor, ...] = ()


def denoise_steered(subject: Subject, pipe: Any, lam: float = STRENGTH) -> Denoised:
    """Feynman–Kac steering without decoder and reward: x̂0, weights, resampling and a noisy step of all particles at
    every evaluated step."""
    population = _FreeRewards(
        undecoded(pipe),
        subject.judge(),
        list(subject.prompts),
        subject.size,
        subject.call | {"generator": subject.generator()},
    )
    run = Run(FeynmanKac(lam, ess_threshold=1.0), population, None, 1.0, Plan(subject.read_at), None)
    run.sample()
    return Denoised(population.latents, tuple(told.ancestors for told in run.history))


def search_of(subject: Subject) -> NoiseToImage:
    """What ReNO runs on, two searches for each prompt: text is encoded and the starting noise drawn before the first
    iteration."""
    for part in subject.one_step.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False)
    call = subject.one_step_call | {"generator": subject.generator("noise")}
    return NoiseToImage(Population(subject.one_step, subject.judge(), list(subject.prompts), 2, call))


@dataclass(frozen=True)
class Lesson:
    """What an update of D3PO learns from: pairs of samples, drawn by a LoRA that has learnt something; in two chunks,
    so that as many rows go through the denoiser at once as the naive way has winners."""

    pipe: Any
    trained: LoRA
    sampler: Sampler
    batch: Batch
    winners: tuple[int, ...]

    @property
    def stored(self) -> Trajectories:
        """The samples, two of each prompt."""
        return Trajectories.joined(list(self.batch.chunks))

    def references(self) -> list[Reference]:
        """What the reference says of them, asked anew."""
        with self.trained.reference():
            return [reference_of(self.sampler, chunk, self.batch.steps) for chunk in self.batch.chunks]


def lesson_of(subject: Subject, pipe: Any) -> Lesson:
    """Draws the samples, and asks the reference about them, as a round of finetuning does before its updates."""
    trained = LoRA(pipe, rank=4, seed=subject.seed)
    generator = subject.generator("LoRA")
    with torch.no_grad():
        for parameter in trained.parameters.values():
            parameter.copy_(BOLD * torch.randn(parameter.shape, generator=generator))
    sampler = Sampler(pipe, subject.call | {"num_inference_steps": subject.lesson_steps}, eta=1.0)
    prompts = [subject.prompts[n % len(subject.prompts)] for n in range(subject.pairs)]
    rows = rows_of(prompts, 2, subject.seed, "bench", shared_start=True)
    chunks = [sampler.rollout(some)[0] for some in rows.split(subject.pairs)]
    winners = tuple(n % 2 for n in range(subject.pairs))
    rewards = torch.tensor([[1.0 - winner, float(winner)] for winner in winners])
    lesson = Lesson(pipe, trained, sampler, Batch(chunks, [], range(len(chunks[0].stochastic)), rewards), winners)
    return replace(lesson, batch=replace(lesson.batch, references=lesson.references()))
