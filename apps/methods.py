"""The methods of `steer sample` by name, and the job that runs one of them on a prompt."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny

from steer.apps.components import LOAD_ERRORS
from steer.apps.prompts import call_arguments
from steer.apps.settings import SamplingConfig
from steer.assets import TINY_VAES
from steer.diffusion.attention import BACKENDS, attention_backend
from steer.diffusion.batching import compiled, micro_batched
from steer.diffusion.preview import PREVIEWS, check_decoder, check_image_vae, filter_call_kwargs
from steer.diffusion.token_hooks import is_token_scheduler
from steer.errors import InputError
from steer.pipelines.base import Iteration, SteeringOutput
from steer.pipelines.drafts import DraftsPipeline, RenoisePipeline
from steer.pipelines.fk_steering import FKSteeringPipeline, StepReport
from steer.pipelines.initial_noise import screen_initial_noise
from steer.pipelines.map_elites import MapElitesPipeline
from steer.pipelines.racing import RacingPipeline
from steer.pipelines.reno import ONE_STEP, NoiseSearchPipeline, ReNOPipeline, check_differentiable
from steer.pipelines.selection import BestOfNPipeline, SelectionPipeline
from steer.registry import choose
from steer.reward import Reward
from steer.tables import one_line

TINY = "tiny"


def load_preview(word: str, pipe: Any) -> Any:
    """Load the `preview` of `FKSteeringPipeline` for the latents of `pipe`, in its precision and on its device.

    word  full, linear, tiny (the embedded models' own small autoencoder), a folder of an AutoencoderTiny, or
                ORGANISATION/NAME of one on the hub, like madebyollin/taesdxl; only safetensors are read

          Raises InputError if there is no decoder of that name, or if its latents are not this model's.
    """
    if word in PREVIEWS or is_token_scheduler(pipe.scheduler):
        return word
    folder = TINY_VAES["scenes"] if word == TINY else Path(word)
    if not word or (not folder.is_dir() and (word.count("/") != 1 or word.startswith((".", "/", "~")))):
        known = ", ".join((*PREVIEWS, TINY))
        raise InputError(f"unknown preview {word!r}: use {known}, a folder, or ORGANISATION/NAME")
    check_image_vae(pipe)
    autoencoder = _load_tiny_vae(word, folder if folder.is_dir() else word, pipe.vae.dtype)
    check_decoder(pipe, autoencoder)
    return autoencoder.to(pipe.vae.device, memory_format=torch.channels_last)  # convolutions are faster in this format


def _load_tiny_vae(word: str, source: str | Path, dtype: torch.dtype) -> AutoencoderTiny:
    try:
        loaded, about = AutoencoderTiny.from_pretrained(
            source, torch_dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except LOAD_ERRORS as error:
        raise InputError(f"preview {word!r} cannot be loaded as an AutoencoderTiny: {one_line(error)}") from error
    if missing := about["missing_keys"]:  # diffusers fills them with random numbers
        raise InputError(f"preview {word!r} is not an AutoencoderTiny: its weights have no {sorted(missing)[0]}")
    return loaded.eval()


DisableAdapter = Callable[[], AbstractContextManager[None]]
PipelineContext = Callable[[Any], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Job:
    """One prompt to steer.

    state_file        file that an iterative method saves after each iteration, if any
    on_iteration      observer of the iterations of an iterative method
    on_step           observer of the solver steps of the other methods; an exception from it ends the run
    preview_steps     steps at which best-of-n and base score x̂0, only to show it in on_step; None: fk's default steps
    early_previews    steps at which the other methods make previews by a look-ahead for on_step, without rewards
    adapter_disabled  context in which the pipeline is without its LoRA adapter
    compute_options   context, entered with the pipeline, that yields the pipeline to call
    noise_arguments   screened starting noise: arguments that override others of the call
    arguments         arguments of the pipeline's call from the prompt's row of a prompt file
    """

    pipe: Any
    reward: Reward
    prompt: str
    settings: SamplingConfig
    state_file: Path | None
    on_iteration: Callable[[Iteration], None] | None = None
    on_step: Callable[[StepReport], None] | None = None
    preview_steps: tuple[int, ...] | None = ()
    early_previews: tuple[int, ...] = ()
    adapter_disabled: DisableAdapter = nullcontext
    compute_options: PipelineContext = nullcontext
    noise_arguments: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def run(self, method: str | None = None) -> SteeringOutput:
        """Make the images of the prompt, by its own method or another one."""
        with self.compute_options(self.pipe) as pipe:
            return METHODS[method or self.settings.method].run(replace(self, pipe=pipe))

    @property
    def options(self) -> dict[str, Any]:
        """The method's settings as arguments of its pipeline's call."""
        options = {name: getattr(self.settings.options, name) for name in self.settings.option_names}
        return options | ({"preview": load_preview(options["preview"], self.pipe)} if "preview" in options else {})

    @cached_property
    def call_arguments(self) -> dict[str, Any]:
        """The arguments of the call from the settings and from the prompt's row; the row takes precedence."""
        return call_arguments(type(self.pipe), self.settings) | dict(self.arguments)

    @property
    def call(self) -> dict[str, Any]:
        """The arguments that all methods share; for None, the default of the method or the pipeline applies."""
        given: dict[str, Any] = {
            "num_particles": self.settings.particles,
            "eta": self.settings.eta,
            "num_inference_steps": self.settings.steps,
            "guidance_scale": self.settings.guidance,
        }
        given = {name: value for name, value in given.items() if value is not None}
        given |= {"generator": torch.Generator().manual_seed(self.settings.seed)}
        return (
            filter_call_kwargs(self.pipe, METHODS[self.settings.method].defaults)
            | given
            | self.call_arguments
            | dict(self.noise_arguments)
        )


def _screen_noise(job: Job) -> SteeringOutput:
    """Run a job from the starting noises that short runs score highest, with their cost added."""
    settings = job.settings
    assert settings.noise_candidates is not None, "screened"
    own = {name: value for name, value in job.call.items() if name not in ("num_particles", "eta")}
    starts = screen_initial_noise(
        job.pipe,
        job.reward,
        job.prompt,
        keep=settings.particles,
        candidates=settings.noise_candidates,
        steps=settings.screening_steps,
        **own,
    )
    output = METHODS[settings.method].steer(replace(job, noise_arguments=starts.arguments()))
    return replace(output, cost=output.cost.plus(starts.cost))


def _accept_any_reward(settings: SamplingConfig, reward: Reward) -> None:
    """Accept all rewards, also without gradients."""


def _check_guidance(settings: SamplingConfig, reward: Reward) -> None:
    if settings.options.reward_guidance and settings.options.value is None and not reward.differentiable:
        raise InputError(f"reward {reward.name!r} is not differentiable: use --reward-guidance 0, or another reward")


def _check_noise_gradient(settings: SamplingConfig, reward: Reward) -> None:
    check_differentiable(reward, settings.options.implementation("gradient"))


@dataclass(frozen=True)
class Method:
    """Description of a method; its settings are in `steer.apps.settings.METHOD_OPTIONS`.

    pipeline        class of the steering pipeline
    label           name in the app;  phase: activity of a run, for the status;  hint: description in a sentence
    check           raises InputError for a reward that the method cannot use, before any model is loaded
    defaults        arguments of the calls of the pipeline and of the base images, if the user gives none
    is_iterative    whether the method optimises the noise iteration by iteration, with a trace
    in_slot_order   whether images stay in the pipeline's order, not sorted by reward
    has_starts      whether particles are starts, of which only a few become images
    """

    pipeline: Callable[[Any, Reward], Any]
    label: str
    phase: str
    hint: str
    check: Callable[[SamplingConfig, Reward], None] = _accept_any_reward
    defaults: Mapping[str, Any] = field(default_factory=dict)
    is_iterative: bool = False
    in_slot_order: bool = False
    has_starts: bool = False

    @property
    def is_independent(self) -> bool:
        """Whether images share no random numbers and need no previews, so that one call may make several runs."""
        return self.pipeline is BestOfNPipeline

    def run(self, job: Job) -> SteeringOutput:
        """Make the images of a job's prompt."""
        screened = not (self.is_iterative or self.in_slot_order) and job.settings.noise_candidates is not None
        return _screen_noise(job) if screened else self.steer(job)

    def steer(self, job: Job) -> SteeringOutput:
        """Call the steering pipeline, with the options of the job if they belong to this method."""
        options = job.options if METHODS[job.settings.method] is self else {}
        if self.is_iterative:
            hooks: dict[str, Any] = {"state_file": job.state_file, "on_iteration": job.on_iteration}
        else:
            hooks = {"on_step": job.on_step}
            hooks["preview_steps"] = job.preview_steps if self.is_independent else job.early_previews
        output: SteeringOutput = self.pipeline(job.pipe, job.reward)(job.prompt, **options, **hooks, **job.call)
        return output.in_slot_order() if self.in_slot_order else output


METHODS = {  # in the order of the app
    "race": Method(
        RacingPipeline,
        "Best picture (search)",
        "Searching",
        "Drafts many images in a few steps each, and finishes the best sixth of them.",
        has_starts=True,
    ),
    "fk": Method(
        FKSteeringPipeline,
        "Samples (Feynman–Kac)",
        "Steering",
        "Copies promising images during the run and drops others: draws from the model, tilted to the reward.",
        check=_check_guidance,
    ),
    "best-of-n": Method(BestOfNPipeline, "Best of N", "Sampling", "Samples as usual and sorts by the reward."),
    "reno": Method(
        ReNOPipeline,
        "Optimised noise (ReNO)",
        "Optimising the noise",
        "Follows the gradient of the reward to a better starting noise. For one-step models.",
        check=_check_noise_gradient,
        defaults=ONE_STEP,
        is_iterative=True,
    ),
    "base": Method(
        BestOfNPipeline, "Plain sampling", "Sampling", "The model alone, scored but not steered.", in_slot_order=True
    ),
    "svdd": Method(
        SelectionPipeline,
        "Best of each step (SVDD)",
        "Selecting",
        "Continues every step from the single best candidate: high reward, little variety.",
    ),
    "beam": Method(SelectionPipeline, "Beam search", "Searching", "Continues every step from the two best candidates."),
    "drafts": Method(
        DraftsPipeline,
        "Best drafts, finished",
        "Finishing the best drafts",
        "Makes 16 images of 5 steps and finishes the best in full.",
    ),
    "renoise": Method(
        RenoisePipeline,
        "Best draft, varied",
        "Finishing the best drafts",
        "Makes 16 images of 5 steps, adds noise to the best and finishes it in several ways.",
    ),
    "noise-search": Method(
        NoiseSearchPipeline,
        "Best noise (search)",
        "Searching the noise",
        "Tries neighbours of the best starting noise; needs no gradient.",
        is_iterative=True,
    ),
    "map-elites": Method(
        MapElitesPipeline,
        "A diverse set (MAP-Elites)",
        "Collecting elites",
        "Keeps the best image of each brightness and complexity, for a set that differs.",
        is_iterative=True,
    ),
}


@dataclass(frozen=True)
class ComputeOptions:
    """Compute options of a sampling run.

    attention    a backend of `steer.diffusion.attention`
    compiled     run the denoiser through torch.compile (`steer.diffusion.batching`)
    micro_batch  rows of the denoiser's batch at a time (`steer.diffusion.batching`); 0: as many as fit into memory;
                 None: the whole batch
    offload      place of idle parts of the model: model (whole components) or sequential (single layers, slower) keeps
                 them on the CPU; None: on the device
    """

    attention: str = "auto"
    compiled: bool = False
    micro_batch: int | None = None
    offload: str | None = None

    @property
    def loading(self) -> dict[str, str]:
        """The options that are arguments of `load_pipeline`."""
        return {} if self.offload is None else {"offload": self.offload}

    def check(self) -> None:
        """Raise InputError for invalid options, before any model is loaded."""
        choose("attention backend", self.attention, BACKENDS)
        if self.micro_batch is not None and self.micro_batch < 0:
            raise InputError(f"--micro-batch must be at least 0, got {self.micro_batch}")

    @contextmanager
    def __call__(self, pipe: Any) -> Iterator[Any]:
        """Yield the pipeline to call; the given pipeline is restored after the block.

        Raises InputError for an option that this pipeline cannot take.
        """
        with ExitStack() as stack:
            stack.enter_context(attention_backend(pipe, self.attention))
            view = stack.enter_context(compiled(pipe)) if self.compiled else pipe
            if self.micro_batch is not None:
                view = stack.enter_context(micro_batched(view, self.micro_batch or None))
            yield view
