"""How `steer sample` makes the images of a prompt: the methods by name."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny
from safetensors import SafetensorError

from steer.assets import TINY_VAES
from steer.diffusion.attention import BACKENDS, attention_backend
from steer.diffusion.batching import compiled, micro_batched
from steer.diffusion.preview import PREVIEWS, check_decoder, check_image_vae, filter_call_kwargs
from steer.errors import InputError
from steer.noise import OPTIMISERS
from steer.pipelines.base import Iteration, SteeringOutput
from steer.pipelines.fk_steering import PARTICLE_SCHEDULE_RULES, FKSteeringPipeline, ResamplingSchedule, StepReport
from steer.pipelines.initial_noise import screen_initial_noise
from steer.pipelines.particle_batch import DRAWS
from steer.pipelines.reno import (
    GRADIENTS,
    ONE_STEP,
    Ascent,
    Neighbours,
    NoiseSearchPipeline,
    ReNOPipeline,
    check_differentiable,
)
from steer.pipelines.selection import BestOfNPipeline, Selection, SelectionPipeline
from steer.registry import choose
from steer.reward import Reward
from steer.smc.potentials import POTENTIALS, TEMPERINGS
from steer.smc.resampling import RESAMPLERS

TINY = "tiny"
MAX_ERROR_LENGTH = 160  # characters of another library's message


def load_preview(word: str, pipe: Any) -> Any:
    """What `FKSteeringPipeline` takes as `preview`, for the latents of `pipe`, in its precision and on its device.

    word  full, linear, tiny (the embedded models' own small autoencoder), a folder of an AutoencoderTiny, or
          ORGANISATION/NAME of one on the hub, like madebyollin/taesdxl; only safetensors are read

    Raises InputError where there is none of that name, or its latents are not this model's.
    """
    if word in PREVIEWS:
        return word
    folder = TINY_VAES["scenes"] if word == TINY else Path(word)
    if not word or (not folder.is_dir() and (word.count("/") != 1 or word.startswith((".", "/", "~")))):
        known = ", ".join((*PREVIEWS, TINY))
        raise InputError(f"unknown preview {word!r}: use {known}, a folder, or ORGANISATION/NAME")
    check_image_vae(pipe)
    autoencoder = _load_tiny_vae(word, folder if folder.is_dir() else word, pipe.vae.dtype)
    check_decoder(pipe, autoencoder)
    return autoencoder.to(pipe.vae.device, memory_format=torch.channels_last)  # in which convolutions are faster


def _load_tiny_vae(word: str, source: str | Path, dtype: torch.dtype) -> AutoencoderTiny:
    try:
        loaded, about = AutoencoderTiny.from_pretrained(
            source, torch_dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:MAX_ERROR_LENGTH] or type(error).__name__
        raise InputError(f"preview {word!r} cannot be loaded as an AutoencoderTiny: {reason}") from error
    if missing := about["missing_keys"]:  # diffusers fills them with random numbers
        raise InputError(f"preview {word!r} is not an AutoencoderTiny: its weights have no {sorted(missing)[0]}")
    return loaded.eval()


# The λ of each method where the user says nothing; None: without limit.
DEFAULT_LAMBDAS: dict[str, float | None] = {
    "fk": 10.0,
    "svdd": None,
    "beam": 10.0,
    "best-of-n": 10.0,
    "base": 10.0,
    "reno": 10.0,
    "noise-search": 10.0,
}
REGISTRIES: dict[str, Mapping[str, Any]] = {
    "method": DEFAULT_LAMBDAS,
    "potential": POTENTIALS,
    "resampler": RESAMPLERS,
    "tempering": TEMPERINGS,
    "optimiser": OPTIMISERS,
    "gradient": GRADIENTS,
    "particle_schedule_rule": PARTICLE_SCHEDULE_RULES,
    "draw": DRAWS,
}


@dataclass(frozen=True)
class SamplingConfig:
    """What decides the images. Saved in the report, and compared when a run goes on.

    A setting with a default is younger than the first reports: where one lacks it, the default is what was done.
    variant and model_config belong to model: see `steer.apps.models`.
    lam None stands for the method's own; lora is where finetuned weights lie that the model wears.
    """

    model: str
    method: str
    reward: str
    particles: int
    steps: int | None
    guidance: float | None
    lam: float | None
    potential: str
    resampler: str
    tempering: str
    ess_threshold: float
    eta: float | None
    seed: int
    compare: bool
    dtype: str | None
    reward_guidance: float = 0.0
    iterations: int = 50
    optimiser: str = "sgd"
    lr: float | None = None
    regularisation: float = 0.01
    gradient: str = "backprop"
    patience: int | None = None
    restarts: int = 0
    neighbours: int = 4
    distance: float = 0.5
    beams: int = 2
    lora: str | None = None
    particle_schedule: str = ""
    particle_schedule_rule: str = "resample"
    target: float | None = None
    asynchronous_rewards: bool = False
    preview: str = "full"
    noise_candidates: int | None = None
    screening_steps: int = 4
    variant: str | None = None
    model_config: str | None = None
    draw: str = "best"

    def __post_init__(self) -> None:
        if self.lam is None and self.method in DEFAULT_LAMBDAS:
            object.__setattr__(self, "lam", DEFAULT_LAMBDAS[self.method])

    @property
    def loading(self) -> dict[str, str]:
        """Arguments of `load_pipeline` beside model, device and dtype, where any are given."""
        given = {"variant": self.variant, "config": self.model_config}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def strength(self) -> float:
        """λ, infinite where it has no limit."""
        return math.inf if self.lam is None else self.lam

    @property
    def schedule(self) -> dict[int, int]:
        """{solver step: particles that go on from it}, of words like "8:4,14:2". Raises InputError."""
        pairs = [part.split(":") for part in self.particle_schedule.split(",") if self.particle_schedule.strip()]
        try:
            schedule_pairs = {int(step): int(count) for step, count in pairs}
        except ValueError as error:
            raise InputError(
                f"--particle-schedule: write STEP:PARTICLES,… such as 8:4,14:2, got {self.particle_schedule!r}"
            ) from error
        if len(schedule_pairs) < len(pairs):
            raise InputError(f"--particle-schedule: a step is there twice in {self.particle_schedule!r}")
        return schedule_pairs

    def check(self) -> None:
        """Raises InputError for a name or number that cannot be, before any model is loaded."""
        for kind, table in REGISTRIES.items():
            choose(kind, getattr(self, kind), table)
        counts = {"particles": self.particles, "steps": self.steps, "iterations": self.iterations}
        for name, count in (counts | {"start-steps": self.screening_steps}).items():
            if count is not None and count < 1:
                raise InputError(f"--{name} must be at least 1, got {count}")
        if self.noise_candidates is not None and self.noise_candidates < self.particles:
            raise InputError(f"--noise-candidates must be at least the particles, {self.particles}")
        if not 0 < self.ess_threshold <= 1:
            raise InputError(f"--ess-threshold must be above 0 and at most 1, got {self.ess_threshold}")
        for name, number in (("lam", self.lam), ("guidance", self.guidance), ("target", self.target)):
            if number is not None and not math.isfinite(number):
                raise InputError(f"--{name} must be a finite number, got {number}")
        if self.eta is not None and not 0 <= self.eta <= 1:
            raise InputError(f"--eta must be from 0 to 1, got {self.eta}")
        is_search = (
            self.method != "fk"
            or ResamplingSchedule(None, self.schedule, self.particle_schedule_rule, self.target).is_search
        )
        if self.draw != "best" and is_search:
            raise InputError(
                f"--draw {self.draw} needs the weights of --method fk, which --target and "
                "--particle-schedule-rule top_k do not leave: use --draw best"
            )
        if self.asynchronous_rewards and self.reward_guidance:
            raise InputError("--asynchronous-rewards: --reward-guidance needs the gradient in the step: leave one out")
        if not 0 <= self.reward_guidance < math.inf:
            raise InputError(f"--reward-guidance must be at least 0 and finite, got {self.reward_guidance}")
        rule = OPTIMISERS[self.optimiser]
        rule = rule if self.lr is None else replace(rule, lr=self.lr)
        try:  # what moves the noise knows its own limits, and names what is beyond them as the options do
            Ascent(GRADIENTS[self.gradient], rule, self.regularisation, patience=self.patience, restarts=self.restarts)
            Neighbours(self.neighbours, self.distance)
            ResamplingSchedule(particle_schedule=self.schedule).check_size(self.particles)
        except InputError as error:
            raise InputError(f"--{str(error).removeprefix('--')}") from error


DisableAdapter = Callable[[], AbstractContextManager[None]]
PipelineContext = Callable[[Any], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Job:
    """One prompt to steer. A method with iterations saves each one to `state_file`, if any, and tells it.

    on_step        told every solver step by the other methods; what it raises ends the run
    preview_steps  where best-of-n and base, which need none, look at x̂0 for it; None: where fk does
    adapter_disabled         inside, the pipeline is without its finetuned weights
    noise_arguments        arguments of the call in place of its own: noise that was chosen before
    arguments      of the pipeline's call, which the prompt's row of a prompt file gives
    compute_options  what is switched on while it runs: (pipeline) → a context that gives the pipeline to call
    """

    pipe: Any
    reward: Reward
    prompt: str
    settings: SamplingConfig
    state_file: Path | None
    on_iteration: Callable[[Iteration], None] | None = None
    on_step: Callable[[StepReport], None] | None = None
    preview_steps: tuple[int, ...] | None = ()
    adapter_disabled: DisableAdapter = nullcontext
    compute_options: PipelineContext = nullcontext
    noise_arguments: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def run(self, method: str | None = None) -> SteeringOutput:
        """The images of the prompt, by its own method or another one."""
        with self.compute_options(self.pipe) as pipe:
            return METHODS[method or self.settings.method].run(replace(self, pipe=pipe))

    @property
    def call(self) -> dict[str, Any]:
        """What every method is called with. None stands for the method's default, else for the pipeline's own."""
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
            | dict(self.arguments)
            | dict(self.noise_arguments)
        )


Run = Callable[[Job], SteeringOutput]


def _with_screened_noise(run: Run) -> Run:
    """The same from starts that a short run likes, where they are asked for."""

    def screened(job: Job) -> SteeringOutput:
        settings, call = job.settings, job.call
        if settings.noise_candidates is None:
            return run(job)
        own = {name: value for name, value in call.items() if name not in ("num_particles", "eta")}
        starts = screen_initial_noise(
            job.pipe,
            job.reward,
            job.prompt,
            keep=settings.particles,
            candidates=settings.noise_candidates,
            steps=settings.screening_steps,
            **own,
        )
        output = run(replace(job, noise_arguments=starts.arguments()))
        return replace(output, cost=output.cost.plus(starts.cost))

    return screened


def _fk(job: Job) -> SteeringOutput:
    return FKSteeringPipeline(job.pipe, job.reward)(
        job.prompt,
        lam=job.settings.strength,
        potential=job.settings.potential,
        resampler=job.settings.resampler,
        tempering=job.settings.tempering,
        ess_threshold=job.settings.ess_threshold,
        reward_guidance=job.settings.reward_guidance,
        particle_schedule=job.settings.schedule,
        particle_schedule_rule=job.settings.particle_schedule_rule,
        target_reward=job.settings.target,
        draw=job.settings.draw,
        asynchronous_rewards=job.settings.asynchronous_rewards,
        preview=load_preview(job.settings.preview, job.pipe),
        on_step=job.on_step,
        **job.call,
    )


def _svdd(job: Job) -> SteeringOutput:
    method, preview = SelectionPipeline(job.pipe, job.reward), load_preview(job.settings.preview, job.pipe)
    return method(job.prompt, lam=job.settings.strength, preview=preview, on_step=job.on_step, **job.call)


def _beam(job: Job) -> SteeringOutput:
    method, preview = SelectionPipeline(job.pipe, job.reward), load_preview(job.settings.preview, job.pipe)
    return method(job.prompt, beams=job.settings.beams, preview=preview, on_step=job.on_step, **job.call)


def _best_of_n(job: Job) -> SteeringOutput:
    method = BestOfNPipeline(job.pipe, job.reward)
    return method(job.prompt, preview_steps=job.preview_steps, on_step=job.on_step, **job.call)


def _base(job: Job) -> SteeringOutput:
    return _best_of_n(job).in_slot_order()


def _reno(job: Job) -> SteeringOutput:
    return ReNOPipeline(job.pipe, job.reward)(
        job.prompt,
        iterations=job.settings.iterations,
        optimiser=job.settings.optimiser,
        lr=job.settings.lr,
        regularisation=job.settings.regularisation,
        gradient=job.settings.gradient,
        patience=job.settings.patience,
        restarts=job.settings.restarts,
        target=job.settings.target,
        state_file=job.state_file,
        on_iteration=job.on_iteration,
        **job.call,
    )


def _noise_search(job: Job) -> SteeringOutput:
    return NoiseSearchPipeline(job.pipe, job.reward)(
        job.prompt,
        iterations=job.settings.iterations,
        neighbours=job.settings.neighbours,
        distance=job.settings.distance,
        target=job.settings.target,
        state_file=job.state_file,
        on_iteration=job.on_iteration,
        **job.call,
    )


def _accept_any_reward(settings: SamplingConfig, reward: Reward) -> None:
    """Values are enough."""


def _check_guidance(settings: SamplingConfig, reward: Reward) -> None:
    if settings.reward_guidance and not reward.differentiable:
        raise InputError(f"reward {reward.name!r} is not differentiable: use --reward-guidance 0, or another reward")


def _check_beams(settings: SamplingConfig, reward: Reward) -> None:
    try:
        Selection(settings.beams).check_size(settings.particles)
    except InputError as error:
        raise InputError(f"--{str(error).replace('num_particles', '--particles')}") from error


def _check_noise_gradient(settings: SamplingConfig, reward: Reward) -> None:
    check_differentiable(reward, GRADIENTS[settings.gradient])


@dataclass(frozen=True)
class Method:
    """What a name of --method stands for.

    run       makes the images of one prompt
    check     raises InputError for settings or a reward that the method can do nothing with, before any model is loaded
    defaults  what it, and the base beside it, calls the pipeline with where the user says nothing
    is_iterative  whether it goes on from iteration to iteration, with a trace
    """

    run: Run
    check: Callable[[SamplingConfig, Reward], None] = _accept_any_reward
    defaults: Mapping[str, Any] = field(default_factory=dict)
    is_iterative: bool = False


METHODS = {
    "fk": Method(_with_screened_noise(_fk), check=_check_guidance),
    "svdd": Method(_with_screened_noise(_svdd)),
    "beam": Method(_with_screened_noise(_beam), check=_check_beams),
    "best-of-n": Method(_with_screened_noise(_best_of_n)),
    "base": Method(_base),
    "reno": Method(_reno, check=_check_noise_gradient, defaults=ONE_STEP, is_iterative=True),
    "noise-search": Method(_noise_search, is_iterative=True),
}


@dataclass(frozen=True)
class ComputeOptions:
    """What is switched on while images are made.

    attention    a backend of `steer.diffusion.attention`
    compiled     the denoiser through torch.compile (`steer.diffusion.batching`)
    micro_batch  rows of the denoiser's batch at a time (`steer.diffusion.batching`); 0: as many as the memory takes;
                 None: all, or not at all
    """

    attention: str = "auto"
    compiled: bool = False
    micro_batch: int | None = None

    def check(self) -> None:
        """Raises InputError for what cannot be, before any model is loaded."""
        choose("attention backend", self.attention, BACKENDS)
        if self.micro_batch is not None and self.micro_batch < 0:
            raise InputError(f"--micro-batch must be at least 0, got {self.micro_batch}")

    @contextmanager
    def __call__(self, pipe: Any) -> Iterator[Any]:
        """Yields the pipeline to call; after the block the given one is as it was.

        Raises InputError where something asked for would do nothing, or cannot be done to this pipeline.
        """
        with ExitStack() as stack:
            stack.enter_context(attention_backend(pipe, self.attention))
            view = stack.enter_context(compiled(pipe)) if self.compiled else pipe
            if self.micro_batch is not None:
                view = stack.enter_context(micro_batched(view, self.micro_batch or None))
            yield view
