"""Our way against the naive one: the same images, noise, losses and gradients, of the same random numbers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from steer.apps.bench.clock import Check, Opened, Variant, difference
from steer.apps.bench.naive import naive_d3po, naive_fk, naive_reno
from steer.apps.bench.subject import STRENGTH, Lesson, Subject, lesson_of, search_of
from steer.apps.preview_words import preview_named
from steer.engine import two_pass_gradient
from steer.errors import InputError
from steer.feynman_kac import FeynmanKac
from steer.losses import D3PO
from steer.noise import Nesterov, Search
from steer.pipelines import FKSteeringPipeline
from steer.pipelines.noise_gradient import Backprop
from steer.pipelines.population import Population, as_type
from steer.pipelines.reno import Ascent

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
    return {"num_particles": 3 * subject.size // 2, "narrow": narrow, "narrow_choice": "best", "preview": preview}


@contextmanager
def fk(subject: Subject, on: On = nullcontext, lasting: On = nullcontext, cheaper: bool = False) -> Iterator[Opened]:
    """One prompt, rewards of images as PIL holds them.

    on       what is switched on for each run of ours, `lasting` for all of them
    cheaper  ours makes other images, of fewer evaluations
    """
    one = replace(subject, prompts=subject.prompts[:1])
    options = fewer(one) if cheaper else NO_OPTIONS
    reward, prompt = one.judge(eight_bits=True), one.prompts[0]
    numbers = Population(one.pipe, reward, prompt, one.size, one.call | {"generator": one.generator()}).rng.get_state()

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
