"""What `steer bench` compares: ratios by name, of variants that do the same work or give the same result."""

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from statistics import median
from types import MappingProxyType
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor

from steer.apps.bench.naive import naive_d3po, naive_fk, naive_reno
from steer.apps.bench.sizes import REAL_SIZES, Flops, flops_of
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
from steer.apps.bench.timing import (
    Check,
    Measurement,
    Predict,
    Prediction,
    PreparedComparison,
    Variant,
    amdahl,
    bounded,
    difference,
    predict_by_counts,
)
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
)  # how far equal results may be apart in fp32; in half precision rounding is not what is checked
BETA = 0.1  # of D3PO, as published
NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})
Steered = tuple[Tensor, Tensor, tuple[Tensor, ...]]  # images best first, rewards (B, K), ancestors


@dataclass(frozen=True)
class UpdateKind:
    """Which update of a round it is.

    on_policy       the weights are those that drew the samples: their log-probabilities are known
    computes_reference  its answers are not at hand yet
    """

    on_policy: bool = True
    computes_reference: bool = False


def limit_of(subject: Subject) -> float:
    """How far results that are to be the same may be apart."""
    return TOLERANCE if subject.pipe.dtype == torch.float32 else HALF_PRECISION_TOLERANCE


def steer_whole(subject: Subject, pipe: Any, reward: Any, options: Mapping[str, Any] = NO_OPTIONS) -> Steered:
    """Feynman–Kac steering as a user calls it, PIL images included."""
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
    """Whether particles went on from the same ones at every evaluated step."""
    return len(first) == len(second) and all(map(torch.equal, first, second))


def same_tensors(subject: Subject) -> Callable[[Sequence[Tensor], Sequence[Tensor]], Check]:
    """Holds the tensors of two results against each other, one by one."""
    return lambda a, b: Check(max(map(difference, a, b)), limit_of(subject))


def same_steered(first: Steered, second: Steered, limit: float) -> Check:
    """Images and rewards, and the ancestors."""
    apart = max(difference(first[0], second[0]), difference(first[1], second[1]))
    return Check(apart, limit, same_ancestors(first[2], second[2]))


On = Callable[[Any], AbstractContextManager[Any]]  # a pipeline → a context that gives the pipeline to call


def fewer(subject: Subject) -> dict[str, Any]:
    """Half as many particles more at the start, half of K from the first reading on and a quarter from the third, cheap
    previews: what our steering is called with where other images of about the same reward will do, as
    `python -m steer.apps.scenes economies` found."""
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
    """One prompt, rewards of images as PIL holds them.

    on       what is switched on for each run of ours, `persistent` for all of them
    cheaper  ours makes other images, of fewer evaluations
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
    """Iterations of our ReNO, from the start; neither the drawing of the start nor that of the result."""
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
    """Iterations alone, activations kept by both."""
    ours, chain = reno_variant(subject, checkpointing=False), search_of(subject)
    reward, prompts = chain.particle_batch.reward, chain.particle_batch.prompts

    def naive() -> tuple[Tensor, Tensor]:
        ascent = Ascent(Backprop(), Nesterov())
        settings = ascent.regularisation, ascent.max_grad_norm
        return naive_reno(subject.one_step, reward, prompts, chain.start, subject.iterations, Nesterov(), *settings)

    yield PreparedComparison(Variant("naive", naive), ours, same_tensors(subject))


def d3po_variant(preference_batch: PreferenceBatch, turn: UpdateKind) -> Variant:
    """One update of our D3PO: the loss, and the gradient it leaves."""

    def run() -> tuple[Tensor, ...]:
        zero_grad(preference_batch)
        batch = (
            replace(preference_batch.batch, references=preference_batch.references())
            if turn.computes_reference
            else preference_batch.batch
        )
        loss, _ = two_pass_gradient(preference_batch.sampler, batch, D3PO(BETA), on_policy=turn.on_policy)
        return torch.tensor(loss), gradient_of(preference_batch)

    return Variant("ours", run)


def naive_d3po_variant(subject: Subject, preference_batch: PreferenceBatch) -> Variant:
    """The same by four passes for each step."""

    def run() -> tuple[Tensor, ...]:
        zero_grad(preference_batch)
        numbers = BETA, subject.call["guidance_scale"], preference_batch.sampler.eta
        loss = naive_d3po(
            preference_batch.pipe, preference_batch.trained, preference_batch.stored, preference_batch.winners, *numbers
        )
        return torch.tensor(loss), gradient_of(preference_batch)

    return Variant("naive", run)


def zero_grad(preference_batch: PreferenceBatch) -> None:
    """Gradients of before."""
    for parameter in preference_batch.trained.parameters.values():
        parameter.grad = None


def gradient_of(preference_batch: PreferenceBatch) -> Tensor:
    """Of all trained weights in one row, in units of its length."""
    whole = torch.cat(
        [p.grad.flatten().cpu() for p in preference_batch.trained.parameters.values() if p.grad is not None]
    )
    return whole / whole.norm()


def d3po(turn: UpdateKind) -> Callable[[Subject], AbstractContextManager[PreparedComparison]]:
    """One update against the naive one."""

    @contextmanager
    def opened(subject: Subject) -> Iterator[PreparedComparison]:
        if (made := subject.make_trainable) is None:
            raise InputError("no model to train beside this one")
        preference_batch = make_preference_batch(subject, made())
        yield PreparedComparison(
            naive_d3po_variant(subject, preference_batch), d3po_variant(preference_batch, turn), same_tensors(subject)
        )

    return opened


@contextmanager
def overhead(subject: Subject) -> Iterator[PreparedComparison]:
    """Steering with rewards that cost nothing against the plain batch, neither of them decoded."""
    view = without_decoder(subject.pipe)

    def check(steered: Denoised, plain: Tensor) -> Check:
        # Without strength nobody is resampled: then the steered batch is the plain one.
        latents = denoise_steered(subject, subject.pipe, lam=0.0).latents
        given = subject.call | {"prompt": list(subject.prompts), "num_images_per_prompt": subject.size}
        images = Preview(subject.pipe, given, len(latents))(latents)
        return Check(difference(images, plain_call(subject, subject.pipe)), limit_of(subject))

    steered = Variant("steered", lambda: denoise_steered(subject, subject.pipe))
    yield PreparedComparison(steered, Variant("plain", lambda: plain_call(subject, view)), check)


@contextmanager
def whole(subject: Subject) -> Iterator[PreparedComparison]:
    """Steering with previews and rewards against the plain batch, final images decoded and made PIL in both."""
    reward = subject.judge()
    steered = Variant("steered", lambda: steer_whole(subject, subject.pipe, reward))
    yield PreparedComparison(steered, Variant("plain", lambda: as_type(plain_call(subject, subject.pipe), "pil")))


@contextmanager
def async_rewards(subject: Subject) -> Iterator[PreparedComparison]:
    """Steering that waits for its rewards against steering that reads them beside the denoiser's next call."""
    reward, steps = subject.judge(), _async_resample_steps(subject)

    def steered(overlap: bool) -> Callable[[], Any]:
        return lambda: steer_whole(
            subject, subject.pipe, reward, {"asynchronous_rewards": overlap, "resample_steps": steps}
        )

    yield PreparedComparison(Variant("in turn", steered(False)), Variant("overlapped", steered(True), counted=False))


def _async_resample_steps(subject: Subject) -> list[int]:
    """Where rewards are read, without those steps that leave none to resample at one step later."""
    return [step for step in subject.read_at if step <= subject.steps - 3]


def async_rewards_prediction(subject: Subject) -> Predict:
    """At most the decoder's and the reward's seconds are hidden behind the denoiser's, the last images' not."""
    readings = len(_async_resample_steps(subject))
    share = readings / (readings + 1)

    def of(over: Measurement, under: Measurement) -> Prediction:
        hidden = share * (over.parts.get("decoder", 0.0) + over.parts.get("reward", 0.0)) / median(over.seconds)
        return bounded(hidden)

    return of


@dataclass(frozen=True)
class ComputeOption:
    """A gain.

    about    what is switched
    on       (pipeline) → a context that gives the pipeline to call
    off      what it is compared with; by default the pipeline as it is
    persistent  one context for all repeats, not one for each call: what has to be compiled first
    quick    whether `--quick` has the time for it
    affected_share  (FLOPs of a denoiser call by operator and module) → the share of them that it touches
    removes  whether that share is saved; else it gets faster by an unknown factor
    memory   it saves memory, and may cost time
    """

    about: str
    on: On
    off: On
    persistent: bool = False
    quick: bool = True
    affected_share: Callable[[Flops], float] = lambda flops: 0.0
    removes: bool = True
    memory: bool = False


@contextmanager
def unmodified(pipe: Any) -> Iterator[Any]:
    """Nothing is switched."""
    yield pipe


def backend(name: str) -> On:
    """Attention computed by a backend of `steer.diffusion.attention`."""

    @contextmanager
    def on(pipe: Any) -> Iterator[Any]:
        with attention_backend(pipe, name):
            yield pipe

    return on


def by_rows(rows: int) -> On:
    """The denoiser a few rows at a time."""
    return lambda pipe: micro_batched(pipe, rows)


@contextmanager
def denoiser_compiled(pipe: Any) -> Iterator[Any]:
    """The denoiser through torch.compile, on CUDA as captured graphs."""
    if platform.system() == "Windows" and not torch.cuda.is_available():
        raise InputError("torch.compile needs a C++ compiler here")
    with compiled(pipe) as view:
        yield view


COMPUTE_OPTIONS = {
    "sdpa": ComputeOption(
        "attention by PyTorch's kernel against softmax(QKᵀ/√d) V as written",
        backend("sdpa"),
        backend("eager"),
        affected_share=lambda flops: flops.attention / flops.all,
        removes=False,
    ),
    "xformers": ComputeOption(
        "attention by xformers against PyTorch's kernel",
        backend("xformers"),
        backend("sdpa"),
        affected_share=lambda flops: flops.attention / flops.all,
        removes=False,
    ),
    "micro_batches": ComputeOption(
        "the denoiser 4 rows at a time against all rows", by_rows(4), unmodified, memory=True
    ),
    "compiled": ComputeOption(
        "the denoiser through torch.compile (on CUDA: captured graphs)",
        denoiser_compiled,
        unmodified,
        persistent=True,
        quick=False,
        affected_share=lambda flops: 1.0,
        removes=False,
    ),
}


@dataclass(frozen=True)
class Comparison:
    """A ratio: seconds of one variant over seconds of another.

    about    what is measured
    open     makes ready what both need; on leaving, all is as it was
    fits     None, or why it cannot be measured of a subject
    predict  what the parts' calls foretell
    quick    whether `--quick` has the time for it
    samples  how many images, or samples learnt from, one run of a variant makes
    """

    about: str
    open: Callable[[Subject], AbstractContextManager[PreparedComparison]]
    fits: Callable[[Subject], str | None] = lambda subject: None
    predict: Callable[[Subject], Predict] = lambda subject: predict_by_counts
    quick: bool = True
    samples: Callable[[Subject], int] = lambda subject: subject.size * len(subject.prompts)


def of_one_prompt(subject: Subject) -> int:
    """Images."""
    return subject.size


def of_searches(subject: Subject) -> int:
    """Images of two searches for each prompt, differentiated."""
    return 2 * len(subject.prompts) * subject.iterations


def of_pairs(subject: Subject) -> int:
    """Samples learnt from."""
    return 2 * subject.pairs


@contextmanager
def checkpointing(subject: Subject) -> Iterator[PreparedComparison]:
    """ReNO with activations recomputed, as it is by default, against activations kept."""
    recomputed, kept = reno_variant(subject, checkpointing=True), reno_variant(subject, checkpointing=False)
    yield PreparedComparison(recomputed, kept, same_tensors(subject))


def option_comparison(switch: ComputeOption) -> Callable[[Subject], AbstractContextManager[PreparedComparison]]:
    """Steered denoising with a gain off, over the same with it on."""

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


def flops_prediction(switch: ComputeOption) -> Callable[[Subject], Predict]:
    """The share of FLOPs that a gain touches, times the denoiser's share of the seconds."""

    def predict(subject: Subject) -> Predict:
        share = switch.affected_share(flops_of(subject.pipe, lambda: plain_call(subject, subject.pipe)))

        def of(over: Measurement, under: Measurement) -> Prediction:
            affected_share = share * over.parts.get("denoiser", 0.0) / median(over.seconds)
            return Prediction(affected_share, amdahl(affected_share)) if switch.removes else bounded(affected_share)

        return of

    return predict


def requires_ddim(subject: Subject) -> str | None:
    """The naive loops are written out for one family and solver."""
    plain = type(subject.pipe) is StableDiffusionPipeline and type(subject.pipe.scheduler) is DDIMScheduler
    return None if plain else "the naive loop is written for Stable Diffusion under DDIM"


def requires_particle_schedule(subject: Subject) -> str | None:
    """A particle schedule needs particles, and steps to read rewards at."""
    enough = subject.size >= 4 and len(subject.read_at) >= 3
    return requires_ddim(subject) or (None if enough else "too few particles, or steps, to go on with fewer and fewer")


def requires_one_step(subject: Subject) -> str | None:
    """ReNO needs a one-step pipeline, too."""
    return requires_ddim(subject) or (None if subject.one_step is not None else "no one-step model beside this one")


def requires_peft(subject: Subject) -> str | None:
    """D3PO needs weights to train, too, and something to train them with."""
    if find_spec("peft") is None:
        return "D3PO trains a LoRA, and needs peft: pip install 'steer-diffusion[train]'"
    return requires_ddim(subject) or (
        None if subject.make_trainable is not None else "no model to train beside this one"
    )


COMPARISONS: Mapping[str, Comparison] = {
    "fk_over_plain_batch": Comparison(
        "denoising: FK with free rewards, x̂0 and resampling where rewards are read / the plain pipeline's batch",
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
        "one update: four denoiser passes for each pair and step / ours, the reference's answers at hand",
        d3po(UpdateKind()),
        requires_peft,
        samples=of_pairs,
    ),
    "naive_fk_over_ours_fewer": Comparison(
        "FK to about the same reward in other images: ours with 3/2 K particles that get fewer, and cheap previews",
        partial(fk, on=backend("auto"), cheaper=True),
        requires_particle_schedule,
        samples=of_one_prompt,
    ),
    "naive_d3po_over_ours_first_pass": Comparison(
        "D3PO, ours asking the reference within the update, as the first pass over a round has to",
        d3po(UpdateKind(computes_reference=True)),
        requires_peft,
        quick=False,
        samples=of_pairs,
    ),
    "naive_d3po_over_ours_later_pass": Comparison(
        "D3PO, ours of a later update of a round, when the weights are no longer those that drew the samples",
        d3po(UpdateKind(on_policy=False)),
        requires_peft,
        quick=False,
        samples=of_pairs,
    ),
    "naive_fk_over_ours_everything_on": Comparison(
        "FK, ours with attention backend auto",
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
        "the whole: previews and rewards before the next denoiser call / beside it, resampled one step later",
        async_rewards,
        predict=async_rewards_prediction,
    ),
    **{
        f"{name}_off_over_on": Comparison(
            switch.about, option_comparison(switch), predict=flops_prediction(switch), quick=switch.quick
        )
        for name, switch in COMPUTE_OPTIONS.items()
    },
    "reno_recomputed_over_kept": Comparison(
        "ReNO with activations recomputed (the default, for memory) / kept",
        checkpointing,
        requires_one_step,
        quick=False,
    ),
}


EMBEDDED = "scenes"
STEPS = {True: 6, False: 20}  # of a quick run, and of another
ITERATIONS = {True: 2, False: 5}
PAIRS = {True: 1, False: 2}  # of samples in an update of D3PO
GUIDANCE = 4.0


@dataclass(frozen=True)
class BenchOptions:
    """What the user said of all models.

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
    """A name for each model, and how it is made when its turn comes.

    Raises InputError for a model that is not known, and a resolution that does not fit.
    """
    if bench_options.resolution is not None and (bench_options.resolution < 64 or bench_options.resolution % 64):
        raise InputError(f"--resolution must be a multiple of 64, got {bench_options.resolution}")
    made: list[tuple[str, Callable[[], Subject]]] = []
    for name in dict.fromkeys(models):
        maker = choose("--model", name, {EMBEDDED: embedded} | {size: partial(real, size) for size in REAL_SIZES})
        made.append((name, partial(maker, bench_options)))
    return made


def embedded(bench_options: BenchOptions) -> Subject:
    """The embedded model, with its one-step sister."""

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


def real(name: str, bench_options: BenchOptions) -> Subject:
    """A model of real size and random weights."""
    return of_size(name, REAL_SIZES[name], bench_options)


def of_size(name: str, size: RealSize, bench_options: BenchOptions) -> Subject:
    """Whatever its size; it is its own one-step model, and as new for training."""
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
