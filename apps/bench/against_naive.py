"""Our way against the naive one: the same images, noise, losses and gradients, of the same random numbers."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from steer.apps.bench.clock import Check, Opened, Variant, difference
from steer.apps.bench.naive import naive_d3po, naive_fk, naive_reno
from steer.apps.bench.subject import STRENGTH, Lesson, Subject, lesson_of, search_of
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
Steered = tuple[Tensor, Tensor, tuple[Tensor, ...]]  # images best first, rewards (B, K), ancestors


def limit_of(subject: Subject) -> float:
    """How far results that are to be the same may be apart."""
    return SAME if subject.pipe.dtype == torch.float32 else HALF


def steer_whole(subject: Subject, pipe: Any, reward: Any) -> Steered:
    """Feynman–Kac steering as a user calls it, PIL images included."""
    out = FKSteeringPipeline(pipe, reward)(
        list(subject.prompts),
        num_particles=subject.size,
        lam=STRENGTH,
        resample_steps=subject.read_at,
        generator=subject.generator(),
        output_type="pt",
        **subject.call,
    )
    as_type(out.images, "pil")
    return out.images, out.rewards, tuple(out.ancestors)


def same_steered(first: Steered, second: Steered, limit: float) -> Check:
    """Images and rewards, and the ancestors."""
    same = len(first[2]) == len(second[2]) and all(map(torch.equal, first[2], second[2]))
    return Check(max(difference(first[0], second[0]), difference(first[1], second[1])), limit, same)


@contextmanager
def fk(subject: Subject) -> Iterator[Opened]:
    """One prompt, rewards of images as PIL holds them."""
    one = replace(subject, prompts=subject.prompts[:1])
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

    ours = Variant("ours", lambda: steer_whole(one, one.pipe, reward))
    yield Opened(Variant("naive", naive), ours, lambda a, b: same_steered(a, b, limit_of(one)))


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

    def check(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Check:
        return Check(max(map(difference, a, b)), limit_of(subject))

    yield Opened(Variant("naive", naive), ours, check)


def taught(lesson: Lesson, fresh_reference: bool = False) -> Variant:
    """One update of our D3PO on samples that the policy has just drawn: the loss, and the gradient it leaves."""

    def run() -> tuple[Tensor, ...]:
        forget(lesson)
        batch = replace(lesson.batch, references=lesson.references()) if fresh_reference else lesson.batch
        loss, _ = two_pass_gradient(lesson.sampler, batch, D3PO(BETA), unchanged=True)
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


def d3po(fresh_reference: bool) -> Any:
    """One update; the reference's answers at hand from the round's beginning, or asked for in it."""

    @contextmanager
    def opened(subject: Subject) -> Iterator[Opened]:
        if (made := subject.learner) is None:
            raise InputError("no model to train beside this one")
        lesson = lesson_of(subject, made())

        def check(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> Check:
            return Check(max(map(difference, a, b)), limit_of(subject))

        yield Opened(untaught(subject, lesson), taught(lesson, fresh_reference), check)

    return opened
