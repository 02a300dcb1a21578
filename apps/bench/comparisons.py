"""The comparisons of `steer bench`: ratios, by name, of variants that do the same work or give the same result."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor

from steer.apps.bench.naive import naive_d3po, naive_fk, naive_policy_gradient, naive_reno
from steer.apps.bench.sizes import REAL_SIZES
from steer.apps.bench.subject import (
    STRENGTH,
    Denoised,
    EightBits,
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
from steer.apps.bench.timing import Check, PreparedComparison, Variant, compare, difference
from steer.apps.methods import ComputeOptions, load_preview
from steer.apps.models import load_pipeline, resolve_dtype
from steer.diffusion.preview import Preview
from steer.diffusion.step_hooks import SolverStep
from steer.diffusion.value import LearnedValue, ValueNet, value_features
from steer.errors import InputError
from steer.noise import Nesterov, Search
from steer.pipelines.fk_steering import FKSteeringPipeline
from steer.pipelines.particle_batch import ParticleBatch, as_type
from steer.pipelines.racing import RacingPipeline
from steer.pipelines.reno import Ascent, Backprop
from steer.pipelines.selection import BestOfNPipeline
from steer.registry import choose
from steer.smc.particles import FeynmanKac
from steer.training.gradient import Batch, two_pass_gradient
from steer.training.losses import D3PO, DDPO, GRPO, group_advantages

TOLERANCE, HALF_PRECISION_TOLERANCE = 1e-4, 0.1  # for equal results, which differ by rounding in half precision
DEFAULT = ComputeOptions()
BETA = 0.1  # β of D3PO, as published
Steered = tuple[Tensor, Tensor, tuple[Tensor, ...]]  # images (best first), rewards (B, K), ancestors


def limit_of(subject: Subject) -> float:
    """Return the largest difference between results that must be the same."""
    return TOLERANCE if subject.pipe.dtype == torch.float32 else HALF_PRECISION_TOLERANCE


def same(subject: Subject) -> Callable[[Any, Any], Check]:
    """Compare two results that must be the same."""
    return partial(compare, limit=limit_of(subject))


def steer_whole(subject: Subject, pipe: Any, reward: Any, **options: Any) -> Steered:
    """Steer as a user does, PIL images included."""
    usual: dict[str, Any] = {
        "num_particles": subject.size,
        "lam": STRENGTH,
        "resample_steps": subject.read_at,
        "output_type": "pt",
    }
    call = usual | subject.call | options
    out = FKSteeringPipeline(pipe, reward)([subject.prompt], generator=subject.generator(), **call)
    as_type(out.images, "pil")
    return out.images, out.rewards, tuple(out.ancestors)


On = Callable[[Any], AbstractContextManager[Any]]  # a pipeline → a context that yields the pipeline to call


def check_family(subject: Subject) -> None:
    """Raise InputError for a pipeline or solver that the naive loops do not support."""
    if type(subject.pipe) is not StableDiffusionPipeline or type(subject.pipe.scheduler) is not DDIMScheduler:
        raise InputError("the naive loop is written for Stable Diffusion under DDIM")


def fewer(subject: Subject) -> dict[str, Any]:
    """Return arguments for different images of about the same reward at lower cost.

    3/2 K particles at the start, K/2 from the first evaluated step on and K/4 from the third, with cheap previews
    (measured by docs/studies/economies.yaml).
    """
    if subject.size < 4 or len(subject.read_at) < 3:
        raise InputError("too few particles or evaluated steps for a particle schedule")
    return {
        "num_particles": 3 * subject.size // 2,
        "particle_schedule": {subject.read_at[0]: subject.size // 2, subject.read_at[2]: subject.size // 4},
        "particle_schedule_rule": "top_k",
        "preview": load_preview(subject.preview, subject.pipe),
    }


@contextmanager
def entered(subject: Subject, on: On, persistent: bool) -> Iterator[On]:
    """Yield a context for each run: `on` itself, or with `persistent` a context that is entered once, for all runs.

    Variants that must be compiled first are persistent.
    """
    if not persistent:
        yield on
        return
    with on(subject.pipe) as view:
        yield lambda pipe: nullcontext(view)


@contextmanager
def fk(
    subject: Subject, on: On = nullcontext, persistent: bool = False, cheaper: bool = False
) -> Iterator[PreparedComparison]:
    """Compare the steering of one prompt by rewards of 8-bit images: naive against ours with the compute options `on`.

    cheaper  our variant makes different images with fewer evaluations
    """
    check_family(subject)
    options = fewer(subject) if cheaper else {}
    reward, prompt = EightBits(subject.judge()), subject.prompt
    call = subject.call | {"generator": subject.generator()}
    numbers = ParticleBatch(subject.pipe, reward, prompt, subject.size, call).rng.get_state()

    def naive() -> Steered:
        rng = torch.Generator()
        rng.set_state(numbers)
        algorithm, start, guidance = FeynmanKac(STRENGTH), subject.generator(), subject.call["guidance_scale"]
        settings = algorithm, subject.read_at, start, rng, subject.steps, guidance
        return naive_fk(subject.pipe, reward, prompt, subject.size, *settings)

    with entered(subject, on, persistent) as context:

        def ours() -> Steered:
            with context(subject.pipe) as pipe:
                return steer_whole(subject, pipe, reward, **options)

        under = Variant("ours", ours, counted=not persistent)
        yield PreparedComparison(Variant("naive", naive), under, subject.size, None if cheaper else same(subject))


def reno_variant(subject: Subject, checkpointing: bool) -> Variant:
    """Return iterations of our ReNO from its start, without drawing the start and the result."""
    check_family(subject)
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
    """Compare iterations of ReNO, naive against ours; both keep activations."""
    ours, chain = reno_variant(subject, checkpointing=False), search_of(subject)
    reward, prompts = chain.particle_batch.reward, chain.particle_batch.prompts

    def naive() -> tuple[Tensor, Tensor]:
        ascent = Ascent(Backprop(), Nesterov())
        settings = ascent.regularisation, ascent.max_grad_norm
        return naive_reno(subject.one_step, reward, prompts, chain.start, subject.iterations, Nesterov(), *settings)

    yield PreparedComparison(Variant("naive", naive), ours, subject.size, same(subject))


def zero_grad(preference_batch: PreferenceBatch) -> None:
    """Delete the gradients of earlier runs."""
    for parameter in preference_batch.trained.parameters.values():
        parameter.grad = None


def gradient_of(preference_batch: PreferenceBatch) -> Tensor:
    """Return the gradient of all trained weights as one normalised vector."""
    gradients = [p.grad.flatten().cpu() for p in preference_batch.trained.parameters.values() if p.grad is not None]
    return torch.cat(gradients) / torch.cat(gradients).norm()


@contextmanager
def d3po(subject: Subject, on_policy: bool = True, computes_reference: bool = False) -> Iterator[PreparedComparison]:
    """Compare one D3PO update, loss and gradient: four passes for each step against our two.

    on_policy           the weights are those that drew the samples, so their log-probabilities are known
    computes_reference  the reference's log-probabilities are computed within the update
    """
    check_family(subject)
    if subject.make_trainable is None:
        raise InputError("there is no model to train")
    if find_spec("peft") is None:
        raise InputError("D3PO trains a LoRA, and needs peft: pip install 'steer-diffusion[train]'")
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

    yield PreparedComparison(Variant("naive", naive), Variant("ours", ours), 2 * subject.pairs, same(subject))


@contextmanager
def policy_gradient(subject: Subject, loss: DDPO | GRPO) -> Iterator[PreparedComparison]:
    """Compare one update of DDPO or GRPO up to the optimiser's step: samples, loss and gradient, without a reference.

    DDPO takes advantages; here, GRPO computes them from the rewards.
    """
    check_family(subject)
    if subject.make_trainable is None:
        raise InputError("there is no model to train")
    preferences = make_preference_batch(subject, subject.make_trainable())
    rewards = group_advantages(preferences.batch.rewards, scale=True)
    advantages = rewards.clamp(-loss.advantage_clip, loss.advantage_clip) if isinstance(loss, DDPO) else rewards
    rows, sampler = preferences.stored.rows, preferences.sampler

    def ours() -> tuple[Tensor, ...]:
        zero_grad(preferences)
        drawn = sampler.rollout(rows)[0]
        batch = Batch([drawn], [], range(len(drawn.stochastic)), rewards)
        value, _ = two_pass_gradient(sampler, batch, loss, on_policy=True)
        return torch.tensor(value), gradient_of(preferences)

    def naive() -> tuple[Tensor, ...]:
        zero_grad(preferences)
        numbers = loss.clip, subject.update_steps, subject.call["guidance_scale"], sampler.eta
        value = naive_policy_gradient(preferences.pipe, rows, advantages.flatten(), *numbers)
        return torch.tensor(value), gradient_of(preferences)

    yield PreparedComparison(Variant("naive", naive), Variant("ours", ours), 2 * subject.pairs, same(subject))


@contextmanager
def overhead(subject: Subject) -> Iterator[PreparedComparison]:
    """Compare steering with free rewards against the plain batch, both without decoding."""
    view = without_decoder(subject.pipe)

    def check(steered: Denoised, plain: Tensor) -> Check:
        # With λ = 0 nothing is resampled: the steered batch equals the plain batch.
        latents = denoise_steered(subject, subject.pipe, lam=0.0).latents
        given = subject.call | {"prompt": [subject.prompt], "num_images_per_prompt": subject.size}
        images = Preview(subject.pipe, given, len(latents))(latents)
        return Check(difference(images, plain_call(subject, subject.pipe)), limit_of(subject))

    steered = Variant("steered", lambda: denoise_steered(subject, subject.pipe))
    yield PreparedComparison(steered, Variant("plain", lambda: plain_call(subject, view)), subject.size, check)


@contextmanager
def whole(subject: Subject) -> Iterator[PreparedComparison]:
    """Compare steering with previews and rewards against the plain batch; both decode final images to PIL."""
    yield _over_plain(subject)


def _over_plain(subject: Subject, **options: Any) -> PreparedComparison:
    reward = subject.judge()
    steered = Variant("steered", lambda: steer_whole(subject, subject.pipe, reward, **options))
    plain = Variant("plain", lambda: as_type(plain_call(subject, subject.pipe), "pil"))
    return PreparedComparison(steered, plain, subject.size)


@contextmanager
def learned_value(subject: Subject) -> Iterator[PreparedComparison]:
    """Compare steering by an untrained learned value, with rewards of finished images only, against the plain batch."""
    values: list[LearnedValue] = []

    def value(solver_step: SolverStep, prompts: Sequence[str]) -> Tensor:
        if not values:
            values.append(LearnedValue(ValueNet(value_features(solver_step)[0].shape[1]), {}))
        return values[0](solver_step, prompts)

    yield _over_plain(subject, value=value)


@contextmanager
def look_ahead(subject: Subject) -> Iterator[PreparedComparison]:
    """Compare steering by a look-ahead of three solver steps against the plain batch."""
    yield _over_plain(subject, lookahead=3)


@contextmanager
def race(subject: Subject) -> Iterator[PreparedComparison]:
    """Compare a race against best-of-n, at most as many denoiser evaluations in both; both decode to PIL."""
    reward, call = subject.judge(), subject.call | {"output_type": "pt"}

    def search(pipeline: type[RacingPipeline] | type[BestOfNPipeline], **options: Any) -> Any:
        given = call | options | {"generator": subject.generator()}
        return as_type(pipeline(subject.pipe, reward)([subject.prompt], **given).images, "pil")

    yield PreparedComparison(
        Variant("race", partial(search, RacingPipeline, budget=subject.size * subject.steps)),
        Variant("best-of-n", partial(search, BestOfNPipeline, num_particles=subject.size)),
        subject.size,
    )


@contextmanager
def async_rewards(subject: Subject) -> Iterator[PreparedComparison]:
    """Compare steering that waits for its rewards against asynchronous rewards."""
    reward = subject.judge()
    steps = [step for step in subject.read_at if step <= subject.steps - 3]  # a later step can resample

    def steered(overlap: bool) -> Steered:
        return steer_whole(subject, subject.pipe, reward, asynchronous_rewards=overlap, resample_steps=steps)

    yield PreparedComparison(
        Variant("synchronous", partial(steered, False)),
        Variant("asynchronous", partial(steered, True), counted=False),
        subject.size,
    )


@contextmanager
def switched(subject: Subject, on: On, off: On = DEFAULT, persistent: bool = False) -> Iterator[PreparedComparison]:
    """Compare steered denoising without a compute option, which changes no result, against the same with it."""

    def run(option: On) -> Denoised:
        with option(subject.pipe) as pipe:
            return denoise_steered(subject, pipe)

    with entered(subject, on, persistent) as context:
        under = Variant("on", partial(run, context), counted=not persistent)
        yield PreparedComparison(Variant("off", partial(run, off)), under, subject.size, same(subject))


@dataclass(frozen=True)
class Comparison:
    """A ratio: seconds of one variant over seconds of another.

    about    description for the report
    open     prepares both variants, or raises InputError for a subject that cannot be measured; on leaving, the
             pipeline is as it was
    quick    whether `--quick` includes it
    """

    about: str
    open: Callable[[Subject], AbstractContextManager[PreparedComparison]]
    quick: bool = True


@contextmanager
def checkpointing(subject: Subject) -> Iterator[PreparedComparison]:
    """Compare ReNO with recomputed activations against ReNO with kept activations."""
    recomputed, kept = reno_variant(subject, checkpointing=True), reno_variant(subject, checkpointing=False)
    yield PreparedComparison(recomputed, kept, subject.size, same(subject))


COMPARISONS: Mapping[str, Comparison] = {
    "fk_over_plain_batch": Comparison(
        "denoising: FK with free rewards, x̂0 and resampling / the plain pipeline's batch",
        overhead,
    ),
    "naive_fk_over_ours": Comparison(
        "one prompt, rewards, images: decode in one batch, PIL round trips, a second final decode / ours",
        fk,
    ),
    "naive_reno_over_ours": Comparison("iterations of ReNO: text encoded in each / once", reno),
    "naive_d3po_over_ours": Comparison(
        "one update: four denoiser passes for each pair and step / ours, the reference's log-probabilities known",
        d3po,
    ),
    "naive_grpo_over_ours": Comparison(
        "one update of GRPO: samples, and a denoiser call and a backward for each step, in both",
        partial(policy_gradient, loss=GRPO()),
    ),
    "naive_ddpo_over_ours": Comparison(
        "one update of DDPO: samples, and a denoiser call and a backward for each step, in both",
        partial(policy_gradient, loss=DDPO()),
        quick=False,
    ),
    "naive_fk_over_ours_fewer": Comparison(
        "FK to about the same reward in other images: ours with a particle schedule and cheap previews",
        partial(fk, on=DEFAULT, cheaper=True),
    ),
    "naive_d3po_over_ours_first_pass": Comparison(
        "D3PO, ours with the reference computed in the update, as the first pass over a rollout buffer does",
        partial(d3po, computes_reference=True),
        quick=False,
    ),
    "naive_d3po_over_ours_later_pass": Comparison(
        "D3PO, ours of an off-policy update: the weights are no longer those that drew the samples",
        partial(d3po, on_policy=False),
        quick=False,
    ),
    "naive_fk_over_ours_everything_on": Comparison(
        "FK, ours with the attention backend auto",
        partial(fk, on=DEFAULT),
    ),
    "naive_fk_over_ours_fewer_compiled": Comparison(
        "FK to about the same reward, and the denoiser through torch.compile too",
        partial(fk, on=ComputeOptions(compiled=True), persistent=True, cheaper=True),
        quick=False,
    ),
    "whole_fk_over_plain_batch": Comparison(
        "the whole: FK with previews and rewards / the plain pipeline's batch without any", whole
    ),
    "fk_by_value_over_plain_batch": Comparison(
        "the whole: FK by a learned value, rewards of the finished images alone / the plain pipeline's batch",
        learned_value,
    ),
    "fk_by_lookahead_over_plain_batch": Comparison(
        "the whole: FK by a look-ahead of three steps / the plain pipeline's batch", look_ahead
    ),
    "race_over_best_of_n": Comparison("the whole: a race / best-of-n with as many denoiser evaluations", race),
    "fk_in_turn_over_overlapped": Comparison(
        "the whole: previews and rewards before the next denoiser call / asynchronous rewards",
        async_rewards,
    ),
    "sdpa_off_over_on": Comparison(
        "attention by PyTorch's kernel against softmax(QKᵀ/√d) V as written",
        partial(switched, on=ComputeOptions("sdpa"), off=ComputeOptions("eager")),
    ),
    "xformers_off_over_on": Comparison(
        "attention by xformers against PyTorch's kernel",
        partial(switched, on=ComputeOptions("xformers"), off=ComputeOptions("sdpa")),
    ),
    "micro_batches_off_over_on": Comparison(
        "the denoiser 4 rows at a time against all rows", partial(switched, on=ComputeOptions(micro_batch=4))
    ),
    "compiled_off_over_on": Comparison(
        "the denoiser through torch.compile (on CUDA: captured graphs)",
        partial(switched, on=ComputeOptions(compiled=True), persistent=True),
        quick=False,
    ),
    "reno_recomputed_over_kept": Comparison(
        "ReNO with activations recomputed (for memory) / kept",
        checkpointing,
        quick=False,
    ),
}


EMBEDDED = "scenes"
STEPS = {True: 6, False: 20}  # solver steps with --quick, and without
ITERATIONS = {True: 2, False: 5}
PAIRS = {True: 1, False: 2}  # pairs of samples in an update of D3PO
GUIDANCE = 4.0


@dataclass(frozen=True)
class BenchOptions:
    """Options of the command for all models.

    dtype       precision; by default float32 on the CPU and bfloat16 elsewhere
    resolution  pixels per side; by default the model's own
    """

    device: str
    dtype: str | None = None
    particles: int = 8
    steps: int | None = None
    resolution: int | None = None
    quick: bool = False

    def subject(
        self, name: str, pipe: Any, guidance: float, one_step: Any, make_trainable: Callable[[], Any], **options: Any
    ) -> Subject:
        """Return a model with the sizes of its measurements."""
        call: dict[str, Any] = {"num_inference_steps": self.steps or STEPS[self.quick], "guidance_scale": guidance}
        if self.resolution is not None:
            call |= {"height": self.resolution, "width": self.resolution}
        options |= {"iterations": ITERATIONS[self.quick], "pairs": PAIRS[self.quick]}
        return Subject(name, pipe, call, self.particles, one_step=one_step, make_trainable=make_trainable, **options)


def subjects_of(models: Sequence[str], bench_options: BenchOptions) -> list[tuple[str, Callable[[], Subject]]]:
    """Return the name of each model and a function that makes it.

    Raises InputError for an unknown model, or an invalid resolution.
    """
    if bench_options.resolution is not None and (bench_options.resolution < 64 or bench_options.resolution % 64):
        raise InputError(f"--resolution must be a multiple of 64, got {bench_options.resolution}")
    makers: dict[str, Callable[[BenchOptions], Subject]] = {EMBEDDED: embedded}
    makers |= {name: partial(of_size, name, size) for name, size in REAL_SIZES.items()}
    return [(name, partial(choose("--model", name, makers), bench_options)) for name in dict.fromkeys(models)]


def embedded(bench_options: BenchOptions) -> Subject:
    """Make the embedded model, with its one-step version."""

    def load(name: str) -> Any:
        pipe = load_pipeline(name, bench_options.device, bench_options.dtype)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return bench_options.subject(
        EMBEDDED, load(EMBEDDED), GUIDANCE, load("scenes-turbo"), partial(load, EMBEDDED), preview="tiny"
    )


def of_size(name: str, size: RealSize, bench_options: BenchOptions) -> Subject:
    """Make a model of a real size; it is also its own one-step model, and made again for training."""
    make = partial(build, size, bench_options.device, resolve_dtype(bench_options.device, bench_options.dtype))
    pipe = make()
    return bench_options.subject(name, pipe, size.guidance, pipe, make)
