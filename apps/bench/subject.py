"""Subjects of `steer bench`: a pipeline with a prompt, a reward and sizes, and the runs that are timed."""

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Generator, Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from steer.apps.scenes.training import build_tokenizer
from steer.diffusion.preview import filter_call_kwargs
from steer.diffusion.seeds import derived_seed
from steer.diffusion.views import Output
from steer.errors import InputError
from steer.pipelines.fk_steering import DEFAULT_STEPS, ResamplingSchedule, Run
from steer.pipelines.particle_batch import ParticleBatch
from steer.pipelines.reno import NoiseToImage
from steer.pipelines.settings import StepSettings
from steer.pipelines.training.method import rows_of
from steer.reward import Reward
from steer.rewards.parser import load_reward
from steer.smc.particles import FeynmanKac
from steer.training.gradient import Batch, Reference, reference_of
from steer.training.rollout import Sampler, Trajectories
from steer.training.trainable import LoRA

STRENGTH = 10.0  # λ
LORA_STD = 0.02  # of a LoRA's B, initially 0, so that the policy differs from its reference


class EightBits:
    """A reward that rounds images as PIL does, so that a round trip through PIL gives the same rewards."""

    differentiable = False

    def __init__(self, reward: Reward) -> None:
        self.reward, self.name = reward, reward.name

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.reward((images * 255).round() / 255, prompts)


@dataclass(frozen=True)
class Subject:
    """A model with the sizes of all its measurements.

    pipe      called with `call` (including num_inference_steps and guidance_scale) for `size` particles
    one_step  a pipeline for ReNO, called for one step without guidance; None: no ReNO
    make_trainable   makes a pipeline for D3PO, which adds a LoRA to it; None: no D3PO
    iterations  iterations of ReNO
    pairs, update_steps  pairs and steps of D3PO: its cost is proportional to pairs · steps
    preview   the cheap decoder of x̂0, a value of --preview of `steer sample`
    """

    name: str
    pipe: Any
    call: dict[str, Any]
    size: int = 8
    prompt: str = "a red circle left of a blue star"
    reward: Any = "scene-soft"
    seed: int = 0
    one_step: Any = None
    make_trainable: Callable[[], Any] | None = None
    iterations: int = 3
    pairs: int = 2
    update_steps: int = 4
    preview: str = "linear"
    one_step_call: dict[str, Any] = field(default_factory=lambda: {"num_inference_steps": 1, "guidance_scale": 0.0})

    @property
    def device(self) -> torch.device:
        """The pipeline's device."""
        return torch.device(self.pipe.device)

    def generator(self, name: str = "start") -> Generator:
        """Return a generator with the same random numbers for each run."""
        return Generator().manual_seed(derived_seed(self.seed, name))

    def judge(self) -> Reward:
        """Load the reward."""
        return load_reward(self.reward)

    def about(self) -> dict[str, Any]:
        """Describe the subject by plain values."""
        return {
            "call": {name: str(value) for name, value in self.call.items()},
            "particles": self.size,
            "prompts": [self.prompt],
            "reward": self.judge().name,
            "dtype": str(self.pipe.dtype).split(".")[-1],
            "reno_iterations": self.iterations,
            "d3po_pairs": self.pairs,
            "d3po_steps": self.update_steps,
            "read_at": list(self.read_at),
        }

    @property
    def steps(self) -> int:
        """T, the number of solver steps."""
        return int(self.call["num_inference_steps"])

    @property
    def read_at(self) -> tuple[int, ...]:
        """The solver steps at which Feynman–Kac steering evaluates rewards by default."""
        return tuple(sorted({min(round(share * self.steps), self.steps - 2) for share in DEFAULT_STEPS} - {-1}))


class _FreeRewards(ParticleBatch):
    """A particle batch with random rewards that cost nothing; nothing is decoded for them."""

    @cached_property
    def _numbers(self) -> Generator:
        return Generator().manual_seed(0)

    def preview(self, x0: Tensor) -> Tensor:
        return x0

    def score(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return torch.rand(self.groups, self.size, generator=self._numbers), {}


def without_decoder(pipe: Any) -> Any:
    """Return a copy of a pipeline whose decoder returns the latents, so that only denoising is left."""
    view = copy.copy(pipe)
    if getattr(pipe, "vae", None) is not None:
        proxy_vae = copy.copy(pipe.vae)
        vars(proxy_vae)["decode"] = lambda z, *args, **kwargs: Output([z[:, :3]])
        vars(view)["vae"] = proxy_vae
    return view


def plain_call(subject: Subject, pipe: Any) -> Tensor:
    """Call the plain pipeline for a batch of B·K images, and return them as tensors."""
    given = {"num_images_per_prompt": subject.size, "generator": subject.generator(), "output_type": "pt"}
    return pipe([subject.prompt], **filter_call_kwargs(pipe, subject.call | given)).images


class Denoised(NamedTuple):
    """Final latents (B·K, …) of a steered run, and the ancestors at its evaluated steps."""

    latents: Tensor
    ancestors: tuple[Tensor, ...] = ()


def denoise_steered(subject: Subject, pipe: Any, lam: float = STRENGTH) -> Denoised:
    """Steer without decoder and reward.

    Every evaluated step has x̂0, weights, resampling and a noisy step of all particles.
    """
    particle_batch = _FreeRewards(
        without_decoder(pipe),
        subject.judge(),
        [subject.prompt],
        subject.size,
        subject.call | {"generator": subject.generator()},
    )
    algorithm, schedule = FeynmanKac(lam, ess_threshold=1.0), ResamplingSchedule(subject.read_at)
    run = Run(algorithm, particle_batch, None, schedule, StepSettings())
    run.sample()
    return Denoised(particle_batch.latents, tuple(summary.ancestors for summary in run.history))


def search_of(subject: Subject) -> NoiseToImage:
    """Prepare ReNO with two searches for each prompt. Raises InputError if there is no one-step model.

    Text is encoded and the starting noise drawn before the first iteration.
    """
    if subject.one_step is None:
        raise InputError("there is no one-step model")
    for part in subject.one_step.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False)
    call = subject.one_step_call | {"generator": subject.generator("noise")}
    return NoiseToImage(ParticleBatch(subject.one_step, subject.judge(), [subject.prompt], 2, call))


@dataclass(frozen=True)
class PreferenceBatch:
    """The pairs of samples of a D3PO update, drawn by a LoRA that differs from its reference.

    They are in two chunks, so that the denoiser's batch is as large as the naive batch of winners.
    """

    pipe: Any
    trained: LoRA
    sampler: Sampler
    batch: Batch
    winners: tuple[int, ...]

    @property
    def stored(self) -> Trajectories:
        """Samples, two of each prompt."""
        return Trajectories.concatenate(list(self.batch.chunks))

    def references(self) -> list[Reference]:
        """Compute the reference's log-probabilities of the samples."""
        with self.trained.reference():
            return [reference_of(self.sampler, chunk, self.batch.steps) for chunk in self.batch.chunks]


def make_preference_batch(subject: Subject, pipe: Any) -> PreferenceBatch:
    """Draw the samples and the reference's log-probabilities, as finetuning does before its updates."""
    trained = LoRA(pipe, rank=4, seed=subject.seed)
    generator = subject.generator("LoRA")
    with torch.no_grad():
        for parameter in trained.parameters.values():
            parameter.copy_(LORA_STD * torch.randn(parameter.shape, generator=generator))
    sampler = Sampler(pipe, subject.call | {"num_inference_steps": subject.update_steps}, eta=1.0)
    rows = rows_of([subject.prompt] * subject.pairs, 2, subject.seed, "bench", shared_start=True)
    chunks = [sampler.rollout(some)[0] for some in rows.split(subject.pairs)]
    winners = tuple(n % 2 for n in range(subject.pairs))
    rewards = torch.tensor([[1.0 - winner, float(winner)] for winner in winners])
    preference_batch = PreferenceBatch(
        pipe, trained, sampler, Batch(chunks, [], range(len(chunks[0].stochastic)), rewards), winners
    )
    return replace(preference_batch, batch=replace(preference_batch.batch, references=preference_batch.references()))


Config = Mapping[str, Any]
NOISE_LEVELS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
DDIM = partial(DDIMScheduler, **NOISE_LEVELS, set_alpha_to_one=False, steps_offset=1)


@dataclass(frozen=True)
class RealSize:
    """The classes and configurations of a model.

    text       class and width of each text encoder; T5 has a tokenizer of words
    guidance   guidance scale of the pipeline's call
    """

    pipeline: Callable[..., Any]
    scheduler: Callable[[], Any]
    denoiser_class: type
    denoiser: Config
    vae: Config
    text: tuple[tuple[type, int], ...]
    guidance: float = 5.0

    def components(self) -> dict[str, Any]:
        """Make the arguments of the pipeline: random weights, and tokenizers that know every byte or no word at all."""
        clip = clip_tokenizer()
        made: dict[str, Any] = {"vae": AutoencoderKL(**self.vae), "scheduler": self.scheduler()}
        made["unet" if self.denoiser_class is UNet2DConditionModel else "transformer"] = self.denoiser_class(
            **self.denoiser
        )
        for place, (cls, width) in enumerate(self.text):
            end = f"_{place + 1}" if place else ""
            made[f"text_encoder{end}"] = _t5(width) if cls is T5EncoderModel else _clip(cls, width, clip)
            made[f"tokenizer{end}"] = word_tokenizer() if cls is T5EncoderModel else clip
        return made


def build(model: RealSize, device: str, dtype: torch.dtype, seed: int = 0) -> Any:
    """Make the pipeline on the device in its precision; on "meta" it takes no memory."""
    with torch.random.fork_rng(), _default_device_and_dtype(device, dtype):
        torch.manual_seed(seed)
        pipe = model.pipeline(**model.components())
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)  # a scheduler keeps its tensors on the CPU
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def _default_device_and_dtype(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Create parameters on the device in the given precision: twelve billion fit in bfloat16, not in fp32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def clip_tokenizer(length: int = 77) -> CLIPTokenizer:
    """Make a tokenizer that knows every byte."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = build_tokenizer(Path(folder))
    tokenizer.model_max_length = length
    return tokenizer


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer that knows no word, with an end token after the words as in T5."""
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def _clip(cls: type, width: int, tokenizer: CLIPTokenizer) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=2,  # SDXL and SD3 read the penultimate layer
        num_attention_heads=max(width // 64, 1),
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return cls(config)


def _t5(width: int) -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=3, d_model=width, d_kv=64, d_ff=width, num_heads=2, num_layers=1))
