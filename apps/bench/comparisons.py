"""What `steer bench` compares: ratios by name, of variants that do the same work or give the same result."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from statistics import median
from typing import Any

from diffusers import DDIMScheduler, StableDiffusionPipeline

from steer.apps.bench import against_naive, steering
from steer.apps.bench.against_naive import Turn, limit_of, same_ancestors, same_tensors, searched
from steer.apps.bench.clock import Check, Measured, Opened, Variant, difference
from steer.apps.bench.flops import flops_of
from steer.apps.bench.predict import Predict, Predicted, amdahl, bounded, by_counts
from steer.apps.bench.subject import Denoised, Subject, denoise_steered, plain_call
from steer.apps.bench.switches import SWITCHES, Switch, denoiser_compiled, everything


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
        steering.overhead,
    ),
    "naive_fk_over_ours": Comparison(
        "one prompt, rewards, images: decode in one batch, PIL round trips, a second final decode / ours",
        against_naive.fk,
        takes_naive,
        samples=of_one_prompt,
    ),
    "naive_reno_over_ours": Comparison(
        "iterations of ReNO: text encoded in each / once", against_naive.reno, takes_reno
    ),
    "naive_d3po_over_ours": Comparison(
        "one update: four denoiser passes for each pair and step / ours, the reference's answers at hand",
        against_naive.d3po(Turn()),
        takes_d3po,
        samples=of_pairs,
    ),
    "naive_fk_over_ours_fewer": Comparison(
        "FK to about the same reward in other images: ours with 3/2 K particles that get fewer, and cheap previews",
        partial(against_naive.fk, on=everything, cheaper=True),
        takes_fewer,
        samples=of_one_prompt,
    ),
    "naive_d3po_over_ours_first_pass": Comparison(
        "D3PO, ours asking the reference within the update, as the first pass over a round has to",
        against_naive.d3po(Turn(asks_reference=True)),
        takes_d3po,
        quick=False,
        samples=of_pairs,
    ),
    "naive_d3po_over_ours_later_pass": Comparison(
        "D3PO, ours of a later update of a round, when the weights are no longer those that drew the samples",
        against_naive.d3po(Turn(unchanged=False)),
        takes_d3po,
        quick=False,
        samples=of_pairs,
    ),
    "naive_fk_over_ours_everything_on": Comparison(
        "FK, ours with the exact gains on: attention backend auto, prompts' keys and values shared",
        partial(against_naive.fk, on=everything),
        takes_naive,
        samples=of_one_prompt,
    ),
    "naive_fk_over_ours_fewer_compiled": Comparison(
        "FK to about the same reward, and the denoiser through torch.compile too",
        partial(against_naive.fk, lasting=denoiser_compiled, cheaper=True),
        takes_fewer,
        quick=False,
        samples=of_one_prompt,
    ),
    "whole_fk_over_plain_batch": Comparison(
        "the whole: FK with previews and rewards / the plain pipeline's batch without any", steering.whole
    ),
    "fk_in_turn_over_overlapped": Comparison(
        "the whole: previews and rewards before the next denoiser call / beside it, resampled one step later",
        steering.overlapped,
        predict=steering.of_readings,
    ),
    **{
        f"{name}_off_over_on": Comparison(switch.about, switched(switch), predict=of_flops(switch), quick=switch.quick)
        for name, switch in SWITCHES.items()
    },
    "reno_recomputed_over_kept": Comparison(
        "ReNO with activations recomputed (the default, for memory) / kept", checkpointing, takes_reno, quick=False
    ),
}
