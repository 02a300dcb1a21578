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
    Lesson,
    RealSize,
    Subject,
    build,
    denoise_steered,
    lesson_of,
    plain_call,
    search_of,
    undecoded,
)
from steer.apps.bench.timing import (
    Check,
    Measured,
    Opened,
    Predict,
    Predicted,
    Variant,
    amdahl,
    bounded,
    by_counts,
    difference,
)
from steer.apps.methods import preview_named
from steer.apps.models import load_pipeline, precision
from steer.diffusion.attention import attention_backend
from steer.diffusion.batching import compiled, micro_batched
from steer.diffusion.preview import Preview
from steer.errors import InputError
from steer.noise import Nesterov, Search
from steer.pipelines.fk_steering import FKSteeringPipeline
from steer.pipelines.particle_batch import ParticleBatch, as_type
from steer.pipelines.reno import Ascent, Backprop
from steer.registry import choose
from steer.shared_prompt import shared_prompt
from steer.smc.particles import FeynmanKac
from steer.training.gradient import two_pass_gradient
from steer.training.losses import D3PO

SAME, HALF = 1e-4, 0.1  # how far equal results may be apart in fp32; in half precision rounding is not what is checked
BETA = 0.1  # of D3PO, as published
NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})
Steered = tuple[Tensor, Tensor, tuple[Tensor, ...]]  # images best first, rewards (B, K), ancestors


@dataclass(frozen=True)
class Turn:
    """Which update of a round it is.

    unchanged       the weights are those that drew the samples: their log-probabilities are known
    asks_reference  its answers are not at hand yet
    """

    unchanged: bool = True
    asks_reference: bool = False


def limit_of(subject: Subject) -> float:
    """How far results that are to be the same may be apart."""
    return SAME if subject.pipe.dtype == torch.float32 else HALF


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
    narrow = {first: subject.size // 2, third: subject.size // 4}
    preview = preview_named(subject.preview, subject.pipe)
    return {
        "num_particles": 3 * subject.size // 2,
        "particle_schedule": narrow,
        "particle_schedule_rule": "top_k",
        "preview": preview,
    }


@contextmanager
def fk(subject: Subject, on: On = nullcontext, lasting: On = nullcontext, cheaper: bool = False) -> Iterator[Opened]:
    """One prompt, rewards of images as PIL holds them.

    on       what is switched on for each run of ours, `lasting` for all of them
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

    with lasting(one.pipe) as own:

        def ours() -> Steered:
            with on(own) as pipe:
                return steer_whole(one, pipe, reward, options)

        check = None if cheaper else partial(same_steered, limit=limit_of(one))
        yield Opened(Variant("naive", naive), Variant("ours", ours, counted=lasting is nullcontext), check)


def searched(subject: Subject, checkpointing: bool) -> Variant:
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
def reno(subject: Subject) -> Iterator[Opened]:
    """Iterations alone, activations kept by both."""
    ours, chain = searched(subject, checkpointing=False), search_of(subject)
    reward, prompts = chain.population.reward, chain.population.prompts

    def naive() -> tuple[Tensor, Tensor]:
        ascent = Ascent(Backprop(), Nesterov())
        settings = ascent.regularisation, ascent.max_grad_norm
        return naive_reno(subject.one_step, reward, prompts, chain.start, subject.iterations, Nesterov(), *settings)

    yield Opened(Variant("naive", naive), ours, same_tensors(subject))


def taught(lesson: Lesson, turn: Turn) -> Variant:
    """One update of our D3PO: the loss, and the gradient it leaves."""

    def run() -> tuple[Tensor, ...]:
        forget(lesson)
        batch = replace(lesson.batch, references=lesson.references()) if turn.asks_reference else lesson.batch
        loss, _ = two_pass_gradient(lesson.sampler, batch, D3PO(BETA), unchanged=turn.unchanged)
        return torch.tensor(loss), gradient_of(lesson)

    return Variant("ours", run)


def untaught(subject: Subject, lesson: Lesson) -> Variant:
    """The same by four passes for each step."""

    def run() -> tuple[Tensor, ...]:
        forget(lesson)
        numbers = BETA, subject.call["guidance_scale"], lesson.sampler.eta
        loss = naive_d3po(lesson.pipe, lesson.trained, lesson.stored, lesson.winners, *numbers)
        return torch.tensor(loss), gradient_of(lesson)

    return Variant("naive", run)


def forget(lesson: Lesson) -> None:
    """Gradients of before."""
    for parameter in lesson.trained.parameters.values():
        parameter.grad = None


def gradient_of(lesson: Lesson) -> Tensor:
    """Of all trained weights in one row, in units of its length."""
    whole = torch.cat([p.grad.flatten().cpu() for p in lesson.trained.parameters.values() if p.grad is not None])
    return whole / whole.norm()


def d3po(turn: Turn) -> Callable[[Subject], AbstractContextManager[Opened]]:
    """One update against the naive one."""

    @contextmanager
    def opened(subject: Subject) -> Iterator[Opened]:
        if (made := subject.learner) is None:
            raise InputError("no model to train beside this one")
        lesson = lesson_of(subject, made())
        yield Opened(untaught(subject, lesson), taught(lesson, turn), same_tensors(subject))

    return opened


@contextmanager
def overhead(subject: Subject) -> Iterator[Opened]:
    """Steering with rewards that cost nothing against the plain batch, neither of them decoded."""
    view = undecoded(subject.pipe)

    def check(steered: Denoised, plain: Tensor) -> Check:
        # Without strength nobody is resampled: then the steered batch is the plain one.
        latents = denoise_steered(subject, subject.pipe, lam=0.0).latents
        given = subject.call | {"prompt": list(subject.prompts), "num_images_per_prompt": subject.size}
        images = Preview(subject.pipe, given, len(latents))(latents)
        return Check(difference(images, plain_call(subject, subject.pipe)), limit_of(subject))

    steered = Variant("steered", lambda: denoise_steered(subject, subject.pipe))
    yield Opened(steered, Variant("plain", lambda: plain_call(subject, view)), check)


@contextmanager
def whole(subject: Subject) -> Iterator[Opened]:
    """Steering with previews and rewards against the plain batch, final images decoded and made PIL in both."""
    reward = subject.judge()
    steered = Variant("steered", lambda: steer_whole(subject, subject.pipe, reward))
    yield Opened(steered, Variant("plain", lambda: as_type(plain_call(subject, subject.pipe), "pil")))


@contextmanager
def overlapped(subject: Subject) -> Iterator[Opened]:
    """Steering that waits for its rewards against steering that reads them beside the denoiser's next call."""
    reward, steps = subject.judge(), _read_early(subject)

    def steered(overlap: bool) -> Callable[[], Any]:
        return lambda: steer_whole(
            subject, subject.pipe, reward, {"asynchronous_rewards": overlap, "resample_steps": steps}
        )

    yield Opened(Variant("in turn", steered(False)), Variant("overlapped", steered(True), counted=False))


def _read_early(subject: Subject) -> list[int]:
    """Where rewards are read, without those steps that leave none to resample at one step later."""
    return [step for step in subject.read_at if step <= subject.steps - 3]


def of_readings(subject: Subject) -> Predict:
    """At most the decoder's and the reward's seconds are hidden behind the denoiser's, the last images' not."""
    readings = len(_read_early(subject))
    share = readings / (readings + 1)

    def of(over: Measured, under: Measured) -> Predicted:
        hidden = share * (over.parts.get("decoder", 0.0) + over.parts.get("reward", 0.0)) / median(over.seconds)
        return bounded(hidden)

    return of


@dataclass(frozen=True)
class Switch:
    """A gain.

    about    what is switched
    on       (pipeline) → a context that gives the pipeline to call
    off      what it is compared with; by default the pipeline as it is
    lasting  one context for all repeats, not one for each call: what has to be compiled first
    quick    whether `--quick` has the time for it
    touched  (FLOPs of a denoiser call by operator and module) → the share of them that it touches
    removes  whether that share is saved; else it gets faster by an unknown factor
    memory   it saves memory, and may cost time
    """

    about: str
    on: On
    off: On
    lasting: bool = False
    quick: bool = True
    touched: Callable[[Flops], float] = lambda flops: 0.0
    removes: bool = True
    memory: bool = False


@contextmanager
def as_it_is(pipe: Any) -> Iterator[Any]:
    """Nothing is switched."""
    yield pipe


def backend(name: str) -> On:
    """Attention computed by a backend of `steer.diffusion.attention`."""

    @contextmanager
    def on(pipe: Any) -> Iterator[Any]:
        with attention_backend(pipe, name):
            yield pipe

    return on


@contextmanager
def shared(pipe: Any) -> Iterator[Any]:
    """Prompts' keys and values once, queries of a prompt's particles in one sequence."""
    with shared_prompt(pipe) as sharing:
        if not sharing.layers:
            raise InputError(f"nothing to share: {'; '.join(sharing.reasons)}")
        yield pipe


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


@contextmanager
def everything(pipe: Any) -> Iterator[Any]:
    """All exact gains that cost nothing where they do nothing, together."""
    with attention_backend(pipe, "auto"), shared_prompt(pipe):
        yield pipe


SWITCHES = {
    "shared_prompt": Switch(
        "cross-attention: keys and values of prompts once, queries of a prompt in one sequence",
        shared,
        as_it_is,
        touched=lambda flops: flops.prompts / flops.all,
    ),
    "sdpa": Switch(
        "attention by PyTorch's kernel against softmax(QKᵀ/√d) V as written",
        backend("sdpa"),
        backend("eager"),
        touched=lambda flops: flops.attention / flops.all,
        removes=False,
    ),
    "xformers": Switch(
        "attention by xformers against PyTorch's kernel",
        backend("xformers"),
        backend("sdpa"),
        touched=lambda flops: flops.attention / flops.all,
        removes=False,
    ),
    "micro_batches": Switch("the denoiser 4 rows at a time against all rows", by_rows(4), as_it_is, memory=True),
    "compiled": Switch(
        "the denoiser through torch.compile (on CUDA: captured graphs)",
        denoiser_compiled,
        as_it_is,
        lasting=True,
        quick=False,
        touched=lambda flops: 1.0,
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
    open: Callable[[Subject], AbstractContextManager[Opened]]
    fits: Callable[[Subject], str | None] = lambda subject: None
    predict: Callable[[Subject], Predict] = lambda subject: by_counts
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
def checkpointing(subject: Subject) -> Iterator[Opened]:
    """ReNO with activations recomputed, as it is by default, against activations kept."""
    recomputed, kept = searched(subject, checkpointing=True), searched(subject, checkpointing=False)
    yield Opened(recomputed, kept, same_tensors(subject))


def switched(switch: Switch) -> Callable[[Subject], AbstractContextManager[Opened]]:
    """Steered denoising with a gain off, over the same with it on."""

    @contextmanager
    def opened(subject: Subject) -> Iterator[Opened]:
        with ExitStack() as stack:
            if switch.lasting:
                view = stack.enter_context(switch.on(subject.pipe))
                on = Variant("on", lambda: denoise_steered(subject, view), counted=False)
            else:
                on = Variant("on", lambda: _inside(switch.on, subject))
            off = Variant("off", lambda: _inside(switch.off, subject))

            def check(a: Denoised, b: Denoised) -> Check:
                same = same_ancestors(a.ancestors, b.ancestors)
                return Check(difference(a.latents, b.latents), limit_of(subject), same)

            yield Opened(off, on, check)

    return opened


def _inside(on: Callable[[Any], AbstractContextManager[Any]], subject: Subject) -> Denoised:
    with on(subject.pipe) as pipe:
        return denoise_steered(subject, pipe)


def of_flops(switch: Switch) -> Callable[[Subject], Predict]:
    """The share of FLOPs that a gain touches, times the denoiser's share of the seconds."""

    def predict(subject: Subject) -> Predict:
        share = switch.touched(flops_of(subject.pipe, lambda: plain_call(subject, subject.pipe)))

        def of(over: Measured, under: Measured) -> Predicted:
            touched = share * over.parts.get("denoiser", 0.0) / median(over.seconds)
            return Predicted(touched, amdahl(touched)) if switch.removes else bounded(touched)

        return of

    return predict


def takes_naive(subject: Subject) -> str | None:
    """The naive loops are written out for one family and solver."""
    plain = type(subject.pipe) is StableDiffusionPipeline and type(subject.pipe.scheduler) is DDIMScheduler
    return None if plain else "the naive loop is written for Stable Diffusion under DDIM"


def takes_fewer(subject: Subject) -> str | None:
    """A particle schedule needs particles, and steps to read rewards at."""
    enough = subject.size >= 4 and len(subject.read_at) >= 3
    return takes_naive(subject) or (None if enough else "too few particles, or steps, to go on with fewer and fewer")


def takes_reno(subject: Subject) -> str | None:
    """ReNO needs a one-step pipeline, too."""
    return takes_naive(subject) or (None if subject.one_step is not None else "no one-step model beside this one")


def takes_d3po(subject: Subject) -> str | None:
    """D3PO needs weights to train, too, and something to train them with."""
    if find_spec("peft") is None:
        return "D3PO trains a LoRA, and needs peft: pip install 'steer-diffusion[train]'"
    return takes_naive(subject) or (None if subject.learner is not None else "no model to train beside this one")


COMPARISONS: Mapping[str, Comparison] = {
    "fk_over_plain_batch": Comparison(
        "denoising: FK with free rewards, x̂0 and resampling where rewards are read / the plain pipeline's batch",
        overhead,
    ),
    "naive_fk_over_ours": Comparison(
        "one prompt, rewards, images: decode in one batch, PIL round trips, a second final decode / ours",
        fk,
        takes_naive,
        samples=of_one_prompt,
    ),
    "naive_reno_over_ours": Comparison("iterations of ReNO: text encoded in each / once", reno, takes_reno),
    "naive_d3po_over_ours": Comparison(
        "one update: four denoiser passes for each pair and step / ours, the reference's answers at hand",
        d3po(Turn()),
        takes_d3po,
        samples=of_pairs,
    ),
    "naive_fk_over_ours_fewer": Comparison(
        "FK to about the same reward in other images: ours with 3/2 K particles that get fewer, and cheap previews",
        partial(fk, on=everything, cheaper=True),
        takes_fewer,
        samples=of_one_prompt,
    ),
    "naive_d3po_over_ours_first_pass": Comparison(
        "D3PO, ours asking the reference within the update, as the first pass over a round has to",
        d3po(Turn(asks_reference=True)),
        takes_d3po,
        quick=False,
        samples=of_pairs,
    ),
    "naive_d3po_over_ours_later_pass": Comparison(
        "D3PO, ours of a later update of a round, when the weights are no longer those that drew the samples",
        d3po(Turn(unchanged=False)),
        takes_d3po,
        quick=False,
        samples=of_pairs,
    ),
    "naive_fk_over_ours_everything_on": Comparison(
        "FK, ours with the exact gains on: attention backend auto, prompts' keys and values shared",
        partial(fk, on=everything),
        takes_naive,
        samples=of_one_prompt,
    ),
    "naive_fk_over_ours_fewer_compiled": Comparison(
        "FK to about the same reward, and the denoiser through torch.compile too",
        partial(fk, lasting=denoiser_compiled, cheaper=True),
        takes_fewer,
        quick=False,
        samples=of_one_prompt,
    ),
    "whole_fk_over_plain_batch": Comparison(
        "the whole: FK with previews and rewards / the plain pipeline's batch without any", whole
    ),
    "fk_in_turn_over_overlapped": Comparison(
        "the whole: previews and rewards before the next denoiser call / beside it, resampled one step later",
        overlapped,
        predict=of_readings,
    ),
    **{
        f"{name}_off_over_on": Comparison(switch.about, switched(switch), predict=of_flops(switch), quick=switch.quick)
        for name, switch in SWITCHES.items()
    },
    "reno_recomputed_over_kept": Comparison(
        "ReNO with activations recomputed (the default, for memory) / kept", checkpointing, takes_reno, quick=False
    ),
}


EMBEDDED = "scenes"
STEPS = {True: 6, False: 20}  # of a quick run, and of another
ITERATIONS = {True: 2, False: 5}
PAIRS = {True: 1, False: 2}  # of samples in an update of D3PO
GUIDANCE = 4.0


@dataclass(frozen=True)
class Asked:
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


def subjects_of(models: Sequence[str], asked: Asked) -> list[tuple[str, Callable[[], Subject]]]:
    """A name for each model, and how it is made when its turn comes.

    Raises InputError for a model that is not known, and a resolution that does not fit.
    """
    if asked.resolution is not None and (asked.resolution < 64 or asked.resolution % 64):
        raise InputError(f"--resolution must be a multiple of 64, got {asked.resolution}")
    made: list[tuple[str, Callable[[], Subject]]] = []
    for name in dict.fromkeys(models):
        maker = choose("--model", name, {EMBEDDED: embedded} | {size: partial(real, size) for size in REAL_SIZES})
        made.append((name, partial(maker, asked)))
    return made


def embedded(asked: Asked) -> Subject:
    """The embedded model, with its one-step sister."""

    def load(name: str) -> Any:
        pipe = load_pipeline(name, asked.device, asked.dtype)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return Subject(
        EMBEDDED,
        load(EMBEDDED),
        asked.call(GUIDANCE),
        asked.particles,
        one_step=load("scenes-turbo"),
        learner=partial(load, EMBEDDED),
        iterations=ITERATIONS[asked.quick],
        pairs=PAIRS[asked.quick],
        preview="tiny",
    )


def real(name: str, asked: Asked) -> Subject:
    """A model of real size and random weights."""
    return of_size(name, REAL_SIZES[name], asked)


def of_size(name: str, size: RealSize, asked: Asked) -> Subject:
    """Whatever its size; it is its own one-step model, and as new for training."""
    make = partial(build, size, asked.device, precision(asked.device, asked.dtype))
    pipe = make()
    return Subject(
        name,
        pipe,
        asked.call(size.guidance),
        asked.particles,
        one_step=pipe,
        learner=make,
        iterations=ITERATIONS[asked.quick],
        pairs=PAIRS[asked.quick],
    )
