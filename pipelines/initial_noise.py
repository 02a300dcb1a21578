"""The starting noise of a pipeline's call: find it, replace it, and screen candidates by short runs."""

import copy
import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils._pytree import tree_leaves

from steer.arguments import coerce_arguments
from steer.diffusion.draws import find_draw, recorded_draws
from steer.diffusion.preview import CALLBACK_ARGUMENTS, filter_call_kwargs
from steer.diffusion.rows import RandomState
from steer.diffusion.seeds import Generators, copy_generators, derived_seed, list_generators, seeded_normal
from steer.diffusion.step_hooks import RunEnded, SolverStep
from steer.diffusion.views import ModuleProxy, denoising_modules, with_modules, without_side_effects, zero_proxies
from steer.errors import InputError, UnsupportedPipelineError
from steer.pipelines.base import Cost, InitialNoise
from steer.pipelines.fk_steering import top_k_indices
from steer.pipelines.particle_batch import ParticleBatch
from steer.reward import Reward
from steer.rewards.parser import load_reward
from steer.smc.particles import Particles

INT_DTYPES = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of a number → the integer type of its bits
RESERVED_ARGUMENTS = ("latents", "timesteps", "sigmas")  # arguments that a screened call may not have


@dataclass
class _CallStart:
    """The start of a call.

    Tensors (R, …) of the first denoiser call and the normal draws before it. If the run continued to the first solver
    step, also latents x (N, …), the scale of their noise and the number of steps.
    """

    inputs: list[Tensor]
    draws: list[Tensor]
    x: Tensor | None = None
    scale: Any = 1.0
    total: int = 1


def find_initial_noise(particle_batch: ParticleBatch, quiet_pipe: Any) -> tuple[InitialNoise, int]:
    """Return the noise that a call starts from, with the way to replace it, and the number of solver steps.

    The noise is passed as `latents` where the pipeline accepts its own draw there, at most scaled by the scheduler and
    rearranged: the plain pipeline then accepts an optimised noise too. Otherwise the noise replaces the draw itself
    (`steer.diffusion.draws.find_draw`): in pipelines without `latents`, and in pipelines that add an image or a video
    to the noise. Each row draws everything else from its own seed: its generator's, or one derived from the state of
    the generators. Where this gives other numbers than the plain call, all rows use copies of the call's generators.

    Raises UnsupportedPipelineError where no way gives the denoiser the inputs of the plain call, bit for bit.
    """
    own, rows = particle_batch.call.get("generator"), len(particle_batch.prompts)
    copies = None if own is None else copy_generators(own)
    seeds = tuple(own_seeds(own, rows) or particle_batch.seeds)
    random = RandomState.of(list_generators(own))
    form = particle_batch.form
    plain = _start_of(particle_batch, quiet_pipe, to_step=True)
    if particle_batch.form != form:  # failed forms of the call have left their inputs and draws
        random.restore()
        plain = _start_of(particle_batch, quiet_pipe, to_step=True)
    for candidate in _candidates(particle_batch, quiet_pipe, plain, seeds, copies):
        if _reaches(candidate, particle_batch, quiet_pipe, plain):
            return candidate, plain.total
    if own is None and plain.draws:  # a state of the global generator cannot be used twice
        particle_batch.call["generator"] = Generator().manual_seed(int(torch.randint(2**62, ())))
        return find_initial_noise(particle_batch, quiet_pipe)
    raise UnsupportedPipelineError(
        f"{type(quiet_pipe).__name__} does not start from a normal draw that another can replace: its noise cannot be "
        "optimised"
    )


def _candidates(
    particle_batch: ParticleBatch,
    quiet_pipe: Any,
    plain: _CallStart,
    seeds: tuple[int, ...],
    copies: Generators | None,
) -> Iterator[InitialNoise]:
    """Yield the ways in which a call may take its noise, the simplest first."""
    assert plain.x is not None, "the run went to the first step"
    rows = len(plain.x)
    latents = particle_batch.call.get("latents")
    if latents is not None:
        yield InitialNoise(latents.to(plain.x.device), seeds)
        return
    sizes = [one[0].numel() for one in (plain.x, *(one for one in plain.inputs if one.dim() > 2))]
    if (drawn := find_draw(plain.draws, sizes, rows)) is None:
        return
    number, draw = drawn
    noise = unscaled(plain.x, plain.scale)
    if "latents" in inspect.signature(type(quiet_pipe).__call__).parameters and _same_numbers(noise, draw):
        yield InitialNoise(noise, seeds, draws=True)
    by_row = _start_of(particle_batch, quiet_pipe, generator=[Generator().manual_seed(seed) for seed in seeds])
    if (drawn := find_draw(by_row.draws, sizes, rows)) is not None:
        yield InitialNoise(draw, seeds, draw=drawn[0])
    if copies is not None:
        yield InitialNoise(draw, seeds, draw=number, generator=copies)


def _reaches(candidate: InitialNoise, particle_batch: ParticleBatch, quiet_pipe: Any, plain: _CallStart) -> bool:
    """Return whether a call with this noise begins as the plain call does, and a call with other noise does not.

    Other draws before the first denoiser call must equal the plain call's too: inputs do not show all of them yet, such
    as the noise that an inpainted region follows. The call has the same form for several rows as the plain call.
    """
    form = particle_batch.form

    def begins_alike(noise: Tensor) -> bool:
        initial = replace(candidate, noise=noise)
        try:
            with initial.applied():
                start = _start_of(particle_batch, quiet_pipe, **initial.arguments())
        finally:
            particle_batch.form = form
        same = len(start.inputs) == len(plain.inputs) and all(map(torch.equal, start.inputs, plain.inputs))
        if particle_batch.call.get("latents") is not None:
            return same
        without = start.draws if candidate.draw is None else _without(start.draws, noise)
        return same and torch.equal(_numbers(without), _numbers(_without(plain.draws, candidate.noise)))

    if candidate.draws:  # a guess: the pipeline may expect other latents than its steps have
        try:
            return begins_alike(candidate.noise)
        except (ValueError, TypeError, RuntimeError, IndexError, AttributeError):
            return False
    return begins_alike(candidate.noise) and (candidate.draw is None or not begins_alike(-candidate.noise))


def _without(draws: Sequence[Tensor], noise: Tensor) -> list[Tensor]:
    """Return the draws without the first draw of this noise, made at once or row by row."""
    number, _ = find_draw(draws, [noise[0].numel()], len(noise)) or (0, noise)
    count = 1 if draws[number].numel() == noise.numel() else len(noise)
    return [*draws[:number], *draws[number + count :]]


def _numbers(draws: Sequence[Tensor]) -> Tensor:
    return torch.cat([torch.empty(0), *(one.flatten().cpu().float() for one in draws)])


def _same_numbers(noise: Tensor, draw: Tensor) -> bool:
    """Return whether both contain the same numbers in any order, up to rounding."""
    if noise.numel() != draw.numel():
        return False
    one, other = (values.flatten().cpu().double().sort().values for values in (noise, draw))
    return torch.allclose(one, other, rtol=4 * torch.finfo(noise.dtype).eps, atol=1e-6)


def _start_of(particle_batch: ParticleBatch, quiet_pipe: Any, to_step: bool = False, **given: Any) -> _CallStart:
    """Run a call up to its first denoiser call; with `to_step` or without a denoiser, through its first solver step.

    The state of the global generator is restored: every call draws from it to encode a control image.
    """
    start = _CallStart([], [])
    modules = denoising_modules(quiet_pipe)

    def watch(module: Any) -> ModuleProxy:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not start.inputs:
                tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
                start.inputs, start.draws = [one.detach().clone() for one in tensors], list(draws)
                if not to_step:
                    raise RunEnded
            return module(*args, **kwargs)

        return ModuleProxy(module, call)

    def stop(solver_step: SolverStep) -> None:
        start.x, start.total = solver_step.x, solver_step.total
        start.scale = getattr(solver_step.scheduler, "init_noise_sigma", 1.0)
        start.inputs, start.draws = start.inputs or [solver_step.x], start.draws or list(draws)
        raise RunEnded

    watched = with_modules(quiet_pipe, {name: watch(module) for name, module in modules.items()})
    device = getattr(quiet_pipe, "_execution_device", None)
    devices = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices), suppress(RunEnded), recorded_draws() as draws, torch.no_grad():
        particle_batch.sample(stop, watched, **given)
    return start


def own_seeds(generator: Generator | Sequence[Generator] | None, rows: int) -> list[int] | None:
    """Return the seed of each row's own generator; None if rows share one, or one is not on the CPU or was used."""
    given = list_generators(generator)
    if len(given) != rows or any(one.device.type != "cpu" for one in given):
        return None
    seeds = [one.initial_seed() for one in given]
    unused = [Generator().manual_seed(seed).get_state() for seed in seeds]
    return seeds if all(torch.equal(one.get_state(), a) for one, a in zip(given, unused, strict=True)) else None


@dataclass(frozen=True)
class ScreenedNoise:
    """The result of a screening of M candidates for each of B prompts, K of which are kept.

    noise      (B·K, …) of the kept candidates, prompt after prompt, for the `latents` argument of the pipeline's call
    rewards    (B, M) of the images of the short runs
    chosen     (B, K) numbers of the kept candidates, in ascending order
    generator  the call's own generators, after the pipeline drew the starting noise
    cost       cost of the short runs
    """

    noise: Tensor
    rewards: Tensor
    chosen: Tensor
    generator: Generators
    cost: Cost

    def arguments(self) -> dict[str, Any]:
        """Return `latents` and `generator` for the pipeline's call, always in the same state.

        A stochastic solver must not draw the numbers of the starting noise again.
        """
        return {"latents": self.noise, "generator": copy_generators(self.generator)}


@coerce_arguments
@torch.no_grad()
def screen_initial_noise(
    pipe: Any,
    reward: Reward | Any,
    prompt: str | Sequence[str] | None = None,
    *,
    keep: int = 4,
    candidates: int = 8,
    steps: int = 4,
    candidate_batch_size: int | None = None,
    chunk_size: int = 8,
    reward_prompt: str | Sequence[str] | None = None,
    **call: Any,
) -> ScreenedNoise:
    """Select the `keep` (K) best of `candidates` (M) starting noises of each prompt by short runs of `steps` steps.

    The first K candidates are the pipeline's own draws for K images with this generator: M = K changes nothing. Seeds
    derived from the generator give the others. The generator does not advance; without one, a seed is drawn from
    PyTorch's global generator. The lower candidate wins ties. This is a search: the kept noises are not draws from the
    model's prior, and images sampled from them do not have the distribution of Feynman–Kac steering.

    steps                 solver steps of the short runs, in place of the call's num_inference_steps
    candidate_batch_size  candidates of each prompt at a time; by default K, with the memory of the real run
    chunk_size            images scored at a time
    call                  arguments of the pipeline's own call, as in the real run

    Raises InputError for invalid numbers and calls, UnsupportedPipelineError for pipelines without `latents`,
    RewardError for a reward that breaks its contract.
    """
    _check(pipe, keep, candidates, steps, keep if candidate_batch_size is None else candidate_batch_size, call)
    scorer = load_reward(reward)
    call = {name: value for name, value in call.items() if name not in (*RESERVED_ARGUMENTS, *CALLBACK_ARGUMENTS)}
    given = call.pop("generator", None) or Generator().manual_seed(int(torch.randint(2**62, ())))
    generator = copy_generators(given)
    real = ParticleBatch(pipe, scorer, prompt, keep, call | {"generator": given}, reward_prompt, chunk_size)
    quiet_pipe = without_side_effects(pipe)
    first = _first_latents(quiet_pipe, real.call | {"generator": generator}).unflatten(0, (real.groups, keep))
    _check_latents(real, quiet_pipe, first.flatten(0, 1), given)
    seeds = real.seeds[::keep]  # one for each prompt
    extra_candidates = [
        seeded_normal(seeds, first[:, 0], [f"candidate {c}"] * len(seeds)) for c in range(keep, candidates)
    ]
    pool = torch.cat([first, *(one[:, None] for one in extra_candidates)], 1)

    rewards, costs = [], []
    for batch in torch.arange(candidates).split(candidate_batch_size or keep):
        short = ParticleBatch(
            pipe, scorer, prompt, len(batch), call | {"num_inference_steps": steps}, reward_prompt, chunk_size
        )
        solver_seeds = [derived_seed(seed, f"solver of candidate {c}") for seed in seeds for c in batch.tolist()]
        scored, cost = _screen_batch(short, quiet_pipe, pool[:, batch].flatten(0, 1), solver_seeds)
        rewards.append(scored)
        costs.append(cost)
    candidate_rewards = torch.cat(rewards, 1)
    chosen = top_k_indices(candidate_rewards, keep)
    noise = torch.cat([pool[b, at.to(pool.device)] for b, at in enumerate(chosen)])
    return ScreenedNoise(noise, candidate_rewards, chosen, generator, functools.reduce(Cost.plus, costs))


def _check_latents(particle_batch: ParticleBatch, quiet_pipe: Any, noise: Tensor, given: Generators) -> None:
    """Raise UnsupportedPipelineError unless a call with its own noise as `latents` begins as the plain call does."""
    plain = _start_of(particle_batch, quiet_pipe, generator=copy_generators(given))
    initial = InitialNoise(noise, tuple(particle_batch.seeds), draws=True)
    if not _reaches(initial, particle_batch, quiet_pipe, plain):
        raise UnsupportedPipelineError(
            f"{type(quiet_pipe).__name__} does not take its own starting noise back as latents: it cannot be screened"
        )


def unscaled(x: Tensor, scale: Any) -> Tensor:
    """Return ε with ε · scale = x to the bit, where x is such a product; division alone may differ in the last bit."""
    noise = (x.double() / float(scale)).to(x.dtype)
    bits = noise.view(INT_DTYPES[x.element_size()])
    for ulps in (1, -1, 2, -2):
        noise = torch.where(noise * scale == x, noise, (bits + ulps).view(x.dtype))
    return noise


def _screen_batch(
    particle_batch: ParticleBatch, quiet_pipe: Any, noise: Tensor, seeds: Sequence[int]
) -> tuple[Tensor, Cost]:
    """Return the rewards (B, n) of a run from noise (B·n, …), and its cost."""
    generators = [Generator().manual_seed(seed) for seed in seeds]
    images = particle_batch.sample(lambda solver_step: None, quiet_pipe, latents=noise, generator=generators)
    rewards, components = particle_batch.score(images)
    unsteered = Particles.start(*rewards.shape)
    return rewards, particle_batch.output(images, rewards, components, unsteered, output_type="latent").cost


def _first_latents(quiet_pipe: Any, call: Mapping[str, Any]) -> Tensor:
    """Return the starting noise of a call without the scheduler's scale, drawn from the call's generators.

    The call ends at the solver's first step; the denoiser is not evaluated.
    """
    scheduler = copy.deepcopy(quiet_pipe.scheduler)
    signature = inspect.signature(scheduler.step)

    @functools.wraps(scheduler.step)
    def stop_at_first_step(*args: Any, **kwargs: Any) -> None:
        raise RunEnded(signature.bind(*args, **kwargs).arguments["sample"])

    vars(scheduler)["step"] = stop_at_first_step
    stopping_pipe = copy.copy(quiet_pipe)
    vars(stopping_pipe).update(zero_proxies(quiet_pipe), scheduler=scheduler, maybe_free_model_hooks=lambda: None)
    try:
        stopping_pipe(**filter_call_kwargs(quiet_pipe, call))
    except RunEnded as ended:
        x: Tensor = ended.value
        return unscaled(x, getattr(scheduler, "init_noise_sigma", 1.0))
    raise UnsupportedPipelineError(
        f"{type(quiet_pipe).__name__} never stepped its own scheduler: its noise cannot be screened"
    )


def _check(
    pipe: Any, keep: int, candidates: int, steps: int, candidate_batch_size: int, call: Mapping[str, Any]
) -> None:
    accepted, name = inspect.signature(type(pipe).__call__).parameters, type(pipe).__name__
    if "latents" not in accepted or "strength" in accepted:
        raise UnsupportedPipelineError(f"{name} does not take its starting noise as latents: it cannot be screened")
    if conflicting := [one for one in RESERVED_ARGUMENTS if call.get(one) is not None]:
        raise InputError(
            f"{conflicting[0]} and screened noise exclude each other: leave {conflicting[0]} out, or do not screen"
        )
    for what, number in (("keep", keep), ("steps", steps), ("candidate_batch_size", candidate_batch_size)):
        if number < 1:
            raise InputError(f"{what} must be at least 1, got {number}")
    if candidates < keep:
        raise InputError(f"candidates must be at least keep, {keep}, got {candidates}")
