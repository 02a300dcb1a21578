"""What steering takes beside the denoiser: against the plain batch, and with rewards read in the background."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

from torch import Tensor

from steer.apps.bench.against_naive import limit_of, steer_whole
from steer.apps.bench.clock import Check, Measured, Opened, Variant, difference
from steer.apps.bench.predict import Predict, Predicted, bounded
from steer.apps.bench.subject import Denoised, Subject, denoise_steered, plain_call, undecoded
from steer.pipelines.population import as_type
from steer.preview import Preview


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
        return lambda: steer_whole(subject, subject.pipe, reward, {"overlap": overlap, "resample_steps": steps})

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
