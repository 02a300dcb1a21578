"""The comparisons of `steer bench`: ratios by name, of variants that do the same work or give the same result."""

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor

from steer.apps.bench.naive import naive_d3po, naive_fk, naive_reno
from steer.apps.bench.sizes import REAL_SIZES
from steer.apps.bench.subject import (
    STRENGTH,
    Denoised,
    PreferenceBatch,
    RealSize,
    Subject,
    build,
    denoise_steered,
    make_preference_batch,
    plain_call,
    search_of,
    without_decoder,
)
from steer.apps.bench.timing import Check, PreparedComparison, Variant, difference
from steer.apps.methods import load_preview
from steer.apps.models import load_pipeline, resolve_dtype
from steer.diffusion.attention import attention_backend
from steer.diffusion.batching import compiled, micro_batched
from steer.diffusion.preview import Preview
from steer.errors import InputError
from steer.noise import Nesterov, Search
from steer.pipelines.fk_steering import FKSteeringPipeline
from steer.pipelines.particle_batch import ParticleBatch, as_type
from steer.pipelines.reno import Ascent, Backprop
from steer.registry import choose
from steer.smc.particles import FeynmanKac
from steer.training.gradient import two_pass_gradient
from steer.training.losses import D3PO

TOLERANCE, HALF_PRECISION_TOLERANCE = (
    1e-4,
    0.1,
)  # of equal results in fp32; in half precision they differ by rounding
BETA = 0.1  # of D3PO, as published
NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})
Steered = tuple[Tensor, Tensor, tuple[Tensor, ...]]  # images best first, rewards (B, K), ancestors


def limit_of(subject: Subject) -> float:
    """The largest difference of results that must be the same."""
    return TOLERANCE if subject.pipe.dtype == torch.float32 else HALF_PRECISION_TOLERANCE


def steer_whole(subject: Subject, pipe: Any, reward: Any, options: Mapping[str, Any] = NO_OPTIONS) -> Steered:
    """Steer as a user does, PIL images included."""
    usual: dict[str, Any] = {
        "num_particles": subject.size,
        "lam": STRENGTH,
        "resample_steps": subject.read_at,
        "output_type": "pt",
    }
    call = usual | subject.call | dict(options)
    out = FKSteeringPipeline(pipe, reward)(list(subject.prompts), generator=subject.generator(), **call)
    as_type(out.images, "pil")
    return out.images, out.rewards, tuple(out.ancestors)


def same_ancestors(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether the ancestors of all particles are the same at every evaluated step."""
    return len(first) == len(second) and all(map(torch.equal, first, second))


def same_tensors(subject: Subject) -> Callable[[Sequence[Tensor], Sequence[Tensor]], Check]:
    """Compare the tensors of two results one by one."""
    return lambda a, b: Check(max(map(difference, a, b)), limit_of(subject))


def same_steered(first: Steered, second: Steered, limit: float) -> Check:
    """Compare images, rewards and ancestors of two steered runs."""
    apart = max(difference(first[0], second[0]), difference(first[1], second[1]))
    return Check(apart, limit, same_ancestors(first[2], second[2]))


On = Callable[[Any], AbstractContextManager[Any]]  # a pipeline → a context that gives the pipeline to call


def fewer(subject: Subject) -> dict[str, Any]:
    """Arguments for other images of about the same reward: 3/2 K particles at the start, K/2 from the first evaluated
    step on and K/4 from the third, cheap previews (measured by `python -m steer.apps.scenes economies`)."""
    first, _, third, *_ = subject.read_at
    particle_counts = {first: subject.size // 2, third: subject.size // 4}
    preview = load_preview(subject.preview, subject.pipe)
    return {
        "num_particles": 3 * subject.size // 2,
        "particle_schedule": particle_counts,
        "particle_schedule_rule": "top_k",
        "preview": preview,
    }


@contextmanager
def fk(
    subject: Subject, on: On = nullcontext, persistent: On = nullcontext, cheaper: bool = False
) -> Iterator[PreparedComparison]:
    """Steering of one prompt by rewards of 8-bit images, naive against ours.

    on       compute options of each run of ours; `persistent`: entered once for all of them
    cheaper  ours makes other images with fewer evaluations
    """
    one = replace(subject, prompts=subject.prompts[:1])
    options = fewer(one) if cheaper else NO_OPTIONS
    reward, prompt = one.judge(eight_bits=True), one.prompts[0]
    numbers = ParticleBatch(
        one.pipe, reward, prompt, one.size, one.call | {"generator": one.generator()}
    ).rng.get_state()

    def naive() -> Steered:
        rng = torch.Generator()
        rng.set_state(numbers)
        algorithm, guidance = FeynmanKac(STRENGTH), one.call["guidance_scale"]
        out = naive_fk(
            one.pipe, reward, prompt, one.size, algorithm, one.read_at, one.generator(), rng, one.steps, guidance
        )
        return out.images, out.rewards[None], out.ancestors

    with persistent(one.pipe) as own:

        def ours() -> Steered:
            with on(own) as pipe:
                return steer_whole(one, pipe, reward, options)

        check = None if cheaper else partial(same_steered, limit=limit_of(one))
        yield PreparedComparison(
            Variant("naive", naive), Variant("ours", ours, counted=persistent is nullcontext), check
        )


def reno_variant(subject: Subject, checkpointing: bool) -> Variant:
    """Iterations of our ReNO from its start, without drawing the start and the result."""
    chain = search_of(subject)
    rule = Nesterov()

    def run() -> tuple[Tensor, Tensor]:
        ascent, search, rewards = Ascent(Backprop(checkpointing), rule), Search.start(chain.start, rule), Tensor()
        for number in range(subject.iterations):
            moved = ascent(chain, search, number)
            search, rewards = moved.search, moved.rewards.flatten()
        return search.noise, rewards

    return Variant("checkpointing" if checkpointing else "ours", run)


@contextmanager
def reno(subject: Subject) -> Iterator[PreparedComparison]:
    """Iterations of ReNO, naive against ours, activations kept by both."""
    ours, chain = reno_variant(subject, checkpointing=False), search_of(subject)
    reward, prompts = chain.particle_batch.reward, chain.particle_batch.prompts

    def naive() -> tuple[Tensor, Tensor]:
        ascent = Ascent(Backprop(), Nesterov())
        settings = ascent.regularisation, ascent.max_grad_norm
        return naive_reno(subject.one_step, reward, prompts, chain.start, subject.iterations, Nesterov(), *settings)

    yield PreparedComparison(Variant("naive", naive), ours, same_tensors(subject))


def zero_grad(preference_batch: PreferenceBatch) -> None:
    """Drop the gradients of earlier runs."""
    for parameter in preference_batch.trained.parameters.values():
        parameter.grad = None


def gradient_of(preference_batch: PreferenceBatch) -> Tensor:
    """The gradient of all trained weights in one row, normalised."""
    gradients = [p.grad.flatten().cpu() for p in preference_batch.trained.parameters.values() if p.grad is not None]
    return torch.cat(gradients) / torch.cat(gradients).norm()


@contextmanager
def d3po(subject: Subject, on_policy: bool = True, computes_reference: bool = False) -> Iterator[PreparedComparison]:
    """One D3PO update: loss and gradient, by four passes for each step against our two.

    on_policy           the weights are those that drew the samples: their log-probabilities are known
    computes_reference  the reference's log-probabilities are computed within the update
    """
    if subject.make_trainable is None:
        raise InputError("there is no model to train")
    preferences = make_preference_batch(subject, subject.make_trainable())

    def ours() -> tuple[Tensor, ...]:
        zero_grad(preferences)
        batch = preferences.batch
        if computes_reference:
            batch = replace(batch, references=preferences.references())
        loss, _ = two_pass_gradient(preferences.sampler, batch, D3PO(BETA), on_policy=on_policy)
        return torch.tensor(loss), gradient_of(preferences)

    def naive() -> tuple[Tensor, ...]:
        zero_grad(preferences)
        numbers = BETA, subject.call["guidance_scale"], preferences.sampler.eta
        loss = naive_d3po(preferences.pipe, preferences.trained, preferences.stored, preferences.winners, *numbers)
        return torch.tensor(loss), gradient_of(preferences)

    yield PreparedComparison(Variant("naive", naive), Variant("ours", ours), same_tensors(subject))


@contextmanager
def overhead(subject: Subject) -> Iterator[PreparedComparison]:
    """Steering with free rewards against the plain batch, neither of them decoded."""
    view = without_decoder(subject.pipe)

    def check(steered: Denoised, plain: Tensor) -> Check:
        # With λ = 0 nothing is resampled: then the steered batch is the plain one.
        latents = denoise_steered(subject, subject.pipe, lam=0.0).latents
        given = subject.call | {"prompt": list(subject.prompts), "num_images_per_prompt": subject.size}
        images = Preview(subject.pipe, given, len(latents))(latents)
        return Check(difference(images, plain_call(subject, subject.pipe)), limit_of(subject))

    steered = Variant("steered", lambda: denoise_steered(subject, subject.pipe))
    yield PreparedComparison(steered, Variant("plain", lambda: plain_call(subject, view)), check)


@contextmanager
def whole(subject: Subject) -> Iterator[PreparedComparison]:
    """Steering with previews and rewards against the plain batch, final images decoded to PIL in both."""
    reward = subject.judge()
    steered = Variant("steered", lambda: steer_whole(subject, subject.pipe, reward))
    yield PreparedComparison(steered, Variant("plain", lambda: as_type(plain_call(subject, subject.pipe), "pil")))


@contextmanager
def async_rewards(subject: Subject) -> Iterator[PreparedComparison]:
    """Steering that waits for its rewards against asynchronous rewards."""
    reward, steps = subject.judge(), _async_resample_steps(subject)

    def steered(overlap: bool) -> Callable[[], Any]:
        return lambda: steer_whole(
            subject, subject.pipe, reward, {"asynchronous_rewards": overlap, "resample_steps": steps}
        )

    yield PreparedComparison(
        Variant("synchronous", steered(False)), Variant("asynchronous", steered(True), counted=False)
    )


def _async_resample_steps(subject: Subject) -> list[int]:
    """The evaluated steps after which another solver step follows to resample at."""
    return [step for step in subject.read_at if step <= subject.steps - 3]


@dataclass(frozen=True)
class ComputeOption:
    """A compute option that changes no result.

    about       for the report
    on          (pipeline) → a context that gives the pipeline to call
    off         what it is compared with
    persistent  one context for all repeats, not one for each call: what has to be compiled first
    quick       whether `--quick` has the time for it
    """

    about: str
    on: On
    off: On
    persistent: bool = False
    quick: bool = True


@contextmanager
def unmodified(pipe: Any) -> Iterator[Any]:
    """The pipeline as it is."""
    yield pipe


def backend(name: str) -> On:
    """Compute attention by a backend of `steer.diffusion.attention`."""

    @contextmanager
    def on(pipe: Any) -> Iterator[Any]:
        with attention_backend(pipe, name):
            yield pipe

    return on


def by_rows(rows: int) -> On:
    """Call the denoiser a few rows at a time."""
    return lambda pipe: micro_batched(pipe, rows)


@contextmanager
def denoiser_compiled(pipe: Any) -> Iterator[Any]:
    """Compile the denoiser, on CUDA to captured graphs."""
    if platform.system() == "Windows" and not torch.cuda.is_available():
        raise InputError("torch.compile needs a C++ compiler here")
    with compiled(pipe) as view:
        yield view


COMPUTE_OPTIONS = {
    "sdpa": ComputeOption(
        "attention by PyTorch's kernel against softmax(QKᵀ/√d) V as written", backend("sdpa"), backend("eager")
    ),
    "xformers": ComputeOption("attention by xformers against PyTorch's kernel", backend("xformers"), backend("sdpa")),
    "micro_batches": ComputeOption("the denoiser 4 rows at a time against all rows", by_rows(4), unmodified),
    "compiled": ComputeOption(
        "the denoiser through torch.compile (on CUDA: captured graphs)",
        denoiser_compiled,
        unmodified,
        persistent=True,
        quick=False,
    ),
}


@dataclass(frozen=True)
class Comparison:
    """A ratio: seconds of one variant over seconds of another.

    about    for the report
    open     prepares both variants; on leaving, the pipeline is as it was
    fits     None, or why a subject cannot be measured
    quick    whether `--quick` has the time for it
    samples  how many images, or samples learnt from, one run of a variant makes
    """

    about: str
    open: Callable[[Subject], AbstractContextManager[PreparedComparison]]
    fits: Callable[[Subject], str | None] = lambda subject: None
    quick: bool = True
    samples: Callable[[Subject], int] = lambda subject: subject.size * len(subject.prompts)


def of_one_prompt(subject: Subject) -> int:
    """Images of a run for one prompt."""
    return subject.size


def of_searches(subject: Subject) -> int:
    """Differentiated images of two searches for each prompt."""
    return 2 * len(subject.prompts) * subject.iterations


def of_pairs(subject: Subject) -> int:
    """Samples of an update."""
    return 2 * subject.pairs


@contextmanager
def checkpointing(subject: Subject) -> Iterator[PreparedComparison]:
    """ReNO with activations recomputed against activations kept."""
    recomputed, kept = reno_variant(subject, checkpointing=True), reno_variant(subject, checkpointing=False)
    yield PreparedComparison(recomputed, kept, same_tensors(subject))


def option_comparison(switch: ComputeOption) -> Callable[[Subject], AbstractContextManager[PreparedComparison]]:
    """Steered denoising without a compute option, over the same with it."""

    @contextmanager
    def opened(subject: Subject) -> Iterator[PreparedComparison]:
        with ExitStack() as stack:
            if switch.persistent:
                view = stack.enter_context(switch.on(subject.pipe))
                on = Variant("on", lambda: denoise_steered(subject, view), counted=False)
            else:
                on = Variant("on", lambda: _inside(switch.on, subject))
            off = Variant("off", lambda: _inside(switch.off, subject))

            def check(a: Denoised, b: Denoised) -> Check:
                same = same_ancestors(a.ancestors, b.ancestors)
                return Check(difference(a.latents, b.latents), limit_of(subject), same)

            yield PreparedComparison(off, on, check)

    return opened


def _inside(on: Callable[[Any], AbstractContextManager[Any]], subject: Subject) -> Denoised:
    with on(subject.pipe) as pipe:
        return denoise_steered(subject, pipe)


def requires_ddim(subject: Subject) -> str | None:
    """Why the naive loops, written for one family and solver, do not fit."""
    plain = type(subject.pipe) is StableDiffusionPipeline and type(subject.pipe.scheduler) is DDIMScheduler
    return None if plain else "the naive loop is written for Stable Diffusion under DDIM"


def requires_particle_schedule(subject: Subject) -> str | None:
    """Why a particle schedule does not fit."""
    enough = subject.size >= 4 and len(subject.read_at) >= 3
    return requires_ddim(subject) or (
        None if enough else "too few particles or evaluated steps for a particle schedule"
    )


def requires_one_step(subject: Subject) -> str | None:
    """Why ReNO does not fit."""
    return requires_ddim(subject) or (None if subject.one_step is not None else "there is no one-step model")


def requires_peft(subject: Subject) -> str | None:
    """Why D3PO does not fit."""
    if find_spec("peft") is None:
        return "D3PO trains a LoRA, and needs peft: pip install 'steer-diffusion[train]'"
    return requires_ddim(subject) or (None if subject.make_trainable is not None else "there is no model to train")


COMPARISONS: Mapping[str, Comparison] = {
    "fk_over_plain_batch": Comparison(
        "denoising: FK with free rewards, x̂0 and resampling / the plain pipeline's batch",
        overhead,
    ),
    "naive_fk_over_ours": Comparison(
        "one prompt, rewards, images: decode in one batch, PIL round trips, a second final decode / ours",
        fk,
        requires_ddim,
        samples=of_one_prompt,
    ),
    "naive_reno_over_ours": Comparison("iterations of ReNO: text encoded in each / once", reno, requires_one_step),
    "naive_d3po_over_ours": Comparison(
        "one update: four denoiser passes for each pair and step / ours, the reference's log-probabilities known",
        d3po,
        requires_peft,
        samples=of_pairs,
    ),
    "naive_fk_over_ours_fewer": Comparison(
        "FK to about the same reward in other images: ours with a particle schedule and cheap previews",
        partial(fk, on=backend("auto"), cheaper=True),
        requires_particle_schedule,
        samples=of_one_prompt,
    ),
    "naive_d3po_over_ours_first_pass": Comparison(
        "D3PO, ours with the reference computed in the update, as the first pass over a rollout buffer does",
        partial(d3po, computes_reference=True),
        requires_peft,
        quick=False,
        samples=of_pairs,
    ),
    "naive_d3po_over_ours_later_pass": Comparison(
        "D3PO, ours of an off-policy update: the weights are no longer those that drew the samples",
        partial(d3po, on_policy=False),
        requires_peft,
        quick=False,
        samples=of_pairs,
    ),
    "naive_fk_over_ours_everything_on": Comparison(
        "FK, ours with the attention backend auto",
        partial(fk, on=backend("auto")),
        requires_ddim,
        samples=of_one_prompt,
    ),
    "naive_fk_over_ours_fewer_compiled": Comparison(
        "FK to about the same reward, and the denoiser through torch.compile too",
        partial(fk, persistent=denoiser_compiled, cheaper=True),
        requires_particle_schedule,
        quick=False,
        samples=of_one_prompt,
    ),
    "whole_fk_over_plain_batch": Comparison(
        "the whole: FK with previews and rewards / the plain pipeline's batch without any", whole
    ),
    "fk_in_turn_over_overlapped": Comparison(
        "the whole: previews and rewards before the next denoiser call / asynchronous rewards",
        async_rewards,
    ),
    **{
        f"{name}_off_over_on": Comparison(switch.about, option_comparison(switch), quick=switch.quick)
        for name, switch in COMPUTE_OPTIONS.items()
    },
    "reno_recomputed_over_kept": Comparison(
        "ReNO with activations recomputed (for memory) / kept",
        checkpointing,
        requires_one_step,
        quick=False,
    ),
}


EMBEDDED = "scenes"
STEPS = {True: 6, False: 20}  # with --quick, and without
ITERATIONS = {True: 2, False: 5}
PAIRS = {True: 1, False: 2}  # of samples in an update of D3PO
GUIDANCE = 4.0


@dataclass(frozen=True)
class BenchOptions:
    """Options of the command for all models.

    dtype       by default float32 on the CPU and bfloat16 elsewhere
    resolution  pixels of a side; by default the model's own
    """

    device: str
    dtype: str | None = None
    particles: int = 8
    steps: int | None = None
    resolution: int | None = None
    quick: bool = False

    def call(self, guidance: float) -> dict[str, Any]:
        """Arguments of the pipelines' calls."""
        call: dict[str, Any] = {"num_inference_steps": self.steps or STEPS[self.quick], "guidance_scale": guidance}
        if self.resolution is not None:
            call |= {"height": self.resolution, "width": self.resolution}
        return call


def subjects_of(models: Sequence[str], bench_options: BenchOptions) -> list[tuple[str, Callable[[], Subject]]]:
    """The name of each model and a function that makes it.

    Raises InputError for an unknown model, or a resolution that does not fit.
    """
    if bench_options.resolution is not None and (bench_options.resolution < 64 or bench_options.resolution % 64):
        raise InputError(f"--resolution must be a multiple of 64, got {bench_options.resolution}")
    makers: dict[str, Callable[[BenchOptions], Subject]] = {EMBEDDED: embedded}
    makers |= {name: partial(of_size, name, size) for name, size in REAL_SIZES.items()}
    made: list[tuple[str, Callable[[], Subject]]] = []
    for name in dict.fromkeys(models):
        made.append((name, partial(choose("--model", name, makers), bench_options)))
    return made


def embedded(bench_options: BenchOptions) -> Subject:
    """The embedded model, with its one-step version."""

    def load(name: str) -> Any:
        pipe = load_pipeline(name, bench_options.device, bench_options.dtype)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return Subject(
        EMBEDDED,
        load(EMBEDDED),
        bench_options.call(GUIDANCE),
        bench_options.particles,
        one_step=load("scenes-turbo"),
        make_trainable=partial(load, EMBEDDED),
        iterations=ITERATIONS[bench_options.quick],
        pairs=PAIRS[bench_options.quick],
        preview="tiny",
    )


def of_size(name: str, size: RealSize, bench_options: BenchOptions) -> Subject:
    """A model of a size that is its own one-step model; made again for training."""
    make = partial(build, size, bench_options.device, resolve_dtype(bench_options.device, bench_options.dtype))
    pipe = make()
    return Subject(
        name,
        pipe,
        bench_options.call(size.guidance),
        bench_options.particles,
        one_step=pipe,
        make_trainable=make,
        iterations=ITERATIONS[bench_options.quick],
        pairs=PAIRS[bench_options.quick],
    )
