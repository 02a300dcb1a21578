"""ReNO: optimisation of a pipeline's starting noise by the gradient of a reward (arXiv 2406.04312)."""

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from steer.diffusion.differentiable import (
    computes_in_fp16,
    differentiable,
    per_sample_gradients,
    with_fixed_device,
)
from steer.diffusion.preview import filter_call_kwargs
from steer.diffusion.seeds import seeded_normal
from steer.diffusion.views import denoisers_in, plain_values, without_side_effects
from steer.errors import InputError, UnsupportedPipelineError
from steer.files import atomic_write, write_errors
from steer.noise import Optimiser, Search, clipped, neighbour, norms, prior_gradient, where_rows
from steer.pipelines.base import Iteration, SteeringOutput, SteeringPipeline, steering_call
from steer.pipelines.initial_noise import find_initial_noise
from steer.pipelines.particle_batch import ParticleBatch
from steer.pipelines.settings import IterationSettings, NoiseSearchSettings, Prompts, ReNOSettings
from steer.reward import Reward, RewardError
from steer.smc.particles import Particles

logger = logging.getLogger(__name__)


class NoiseToImage:
    """The images of a particle batch as a function of its noise ε (B·K, …), standard normal and fp32.

    initial  the noise that the pipeline itself draws, or the user's `latents`, and the way to replace it
    start    values of the initial noise, in fp32
    seeds    one for every row, for everything else that a call draws, which is the same in all calls
    Text is encoded once. Raises UnsupportedPipelineError for a pipeline whose noise cannot be replaced.
    """

    def __init__(self, particle_batch: ParticleBatch) -> None:
        self.particle_batch = particle_batch
        self.in_fp16 = computes_in_fp16(particle_batch.pipe)
        self._differentiable_pipes: dict[bool, Any] = {}
        self.first_slope: float | None = None  # slope of the reward at the first images, see `Ascent`
        self.initial, self.steps = find_initial_noise(particle_batch, self._quiet_pipe)
        self.start, self.dtype, self.seeds = self.initial.noise.float(), self.initial.noise.dtype, self.initial.seeds

    def fingerprint(self) -> dict[str, Any]:
        """Return everything that determines the images except the noise, as plain values."""
        particle_batch, pipe = self.particle_batch, self.particle_batch.pipe
        call = {name: value for name, value in particle_batch.call.items() if name not in ("generator", "latents")}
        if particle_batch.metadata is not None:
            call["metadata"] = particle_batch.metadata
        return {
            "pipeline": type(pipe).__name__,
            "model": str(getattr(pipe.config, "_name_or_path", "")),
            "scheduler": pipe.scheduler.to_json_string(),
            "reward": particle_batch.reward.name,
            "prompts": particle_batch.prompts,
            "call": plain_values(call),
            "start": plain_values(self.start),
            "dtype": str(self.dtype),
            "seeds": self.seeds,
        }

    def __call__(self, noise: Tensor) -> Tensor:
        """Make images (B·K, 3, H, W) as the user's own pipeline does."""
        return self._run(noise, self.particle_batch.pipe)

    def fast_images(self, noise: Tensor) -> Tensor:
        """Make the images with text encoded once, without safety checker, watermark or progress bar."""
        return self._run(noise, self._quiet_pipe)

    def differentiable_images(self, noise: Tensor, checkpointing: bool | None = None) -> Tensor:
        """Make the images differentiable in the noise. Raises UnsupportedPipelineError where there is no gradient.

        checkpointing  recompute activations in the backward pass; None: above a size (`needs_checkpointing`)
        """
        checkpointing = self.needs_checkpointing if checkpointing is None else checkpointing
        try:
            images = self._run(noise, self._differentiable_pipe(checkpointing))
        except REJECTED as error:
            if checkpointing and not isinstance(error, torch.OutOfMemoryError):
                images = self._without_checkpoints(noise, error)
            elif "requires grad" in str(error):  # Tensor.numpy() inside the pipeline
                raise self.lets_no_gradients_through() from error
            else:
                raise
        if not images.requires_grad:
            raise self.lets_no_gradients_through()
        return images

    @functools.cached_property
    def needs_checkpointing(self) -> bool:
        """Whether activations would take much memory.

        True above KEPT_ELEMENTS of noise times solver steps, or for a denoiser of more than KEPT_PARAMETERS.
        """
        pipe = self.particle_batch.pipe
        weights = sum(p.numel() for name in denoisers_in(pipe) for p in getattr(pipe, name).parameters())
        return self.start.numel() * self.steps > KEPT_ELEMENTS or weights > KEPT_PARAMETERS

    def lets_no_gradients_through(self) -> UnsupportedPipelineError:
        """Return the error for a pipeline without a gradient."""
        return UnsupportedPipelineError(
            f"{type(self.particle_batch.pipe).__name__} lets no gradients through: use the zero-order estimator "
            "(gradient='zero-order', on the command line --gradient zero-order)"
        )

    def _without_checkpoints(self, noise: Tensor, error: Exception) -> Tensor:
        """Make the images with activations kept, in this run and all later ones, where blocks reject checkpointing."""
        images = self._run(noise, self._differentiable_pipe(False))
        name = type(self.particle_batch.pipe).__name__
        logger.warning("%s rejects gradient checkpointing (%s): activations are kept", name, error)
        self._differentiable_pipes[True] = self._differentiable_pipes[False]
        return images

    @functools.cached_property
    def _quiet_pipe(self) -> Any:
        return with_fixed_device(without_side_effects(self.particle_batch.pipe))

    def _differentiable_pipe(self, checkpointing: bool) -> Any:
        if checkpointing not in self._differentiable_pipes:
            twin = differentiable(self._quiet_pipe, checkpointing, one_call=self.steps == 1)
            self._differentiable_pipes[checkpointing] = twin
        return self._differentiable_pipes[checkpointing]

    def _run(self, noise: Tensor, pipe: Any) -> Tensor:
        initial = replace(self.initial, noise=noise.to(self.dtype))
        with initial.applied():
            return self.particle_batch.sample(lambda solver_step: None, pipe, **initial.arguments())


KEPT_ELEMENTS = 2**14  # the noise of one 512×512 image of Stable Diffusion, in one solver step
KEPT_PARAMETERS = 10**9
REJECTED = (TypeError, ValueError, AttributeError, RuntimeError)  # blocks whose arguments do not fit a checkpoint

TRACE_FIELDS = ("rewards", "norms", "best")
CHECKSUM_KEY = "sha256"  # key of the tensors' checksum


class SearchCheckpoint:
    """The file of a search; no file if `path` is None. `fingerprint` identifies the run."""

    def __init__(self, path: str | Path | None, fingerprint: dict[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.fingerprint = json.dumps(fingerprint, sort_keys=True)

    def save(self, search: Search, trace: Sequence[Iteration]) -> None:
        """Save the state after an iteration, from which the next one starts."""
        if self.path is None:
            return
        series = {name: torch.stack([getattr(one, name) for one in trace]) for name in TRACE_FIELDS}
        components = {
            f"components/{name}": torch.stack([one.components[name] for one in trace]) for name in trace[-1].components
        }
        tensors = {f"search/{name}": value for name, value in search.tensors().items()} | series | components
        plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        with write_errors(self.path, "make room, or choose another folder"), atomic_write(self.path) as new:
            save_file(plain, new, self._metadata() | {CHECKSUM_KEY: _checksum(plain)})

    def load(self, device: torch.device, total: int) -> tuple[Search, list[Iteration]] | None:
        """Load the saved state for a run of `total` iterations; None where there is none.

        Raises InputError for the file of another run, and for a corrupt file.
        """
        if self.path is None or not self.path.exists():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                stored_metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{self.path} cannot be read as a saved search ({error}); delete it to start again"
            ) from error
        expected_checksum = stored_metadata.pop(CHECKSUM_KEY, None)
        if stored_metadata != self._metadata():
            raise InputError(f"{self.path} belongs to another run; delete it, or call with its settings and seed")
        if expected_checksum is not None and expected_checksum != _checksum(
            tensors
        ):  # files of older versions have no checksum
            raise InputError(f"{self.path} is corrupt: its sha256 does not match; delete it to start again")
        if missing := sorted({*TRACE_FIELDS} - tensors.keys()):
            raise InputError(f"{self.path} lacks {missing[0]}; delete it to start again")
        if (saved_count := len(tensors["rewards"])) > total:
            raise InputError(
                f"{self.path} holds {saved_count} iterations, more than the {total} asked for; ask for {saved_count}"
            )
        saved = {name.removeprefix("search/"): value for name, value in tensors.items() if name.startswith("search/")}
        components = {
            name.removeprefix("components/"): value for name, value in tensors.items() if name.startswith("components/")
        }
        trace = [
            Iteration(
                number=number,
                total=total,
                components={name: values[number] for name, values in components.items()},
                **{name: tensors[name][number] for name in TRACE_FIELDS},
            )
            for number in range(len(tensors["rewards"]))
        ]
        return Search.from_tensors(saved, device), trace

    def _metadata(self) -> dict[str, str]:
        return {"steer": "noise search", "about": self.fingerprint}


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """Compute the SHA-256 of tensors: names, dtypes, shapes and bytes."""
    result = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        result.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        result.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return result.hexdigest()


@dataclass(frozen=True)
class IterationResult:
    """The result of one iteration.

    Images (B·K, 3, H, W), rewards (B, K) and components at `noise` (B·K, …), the searches after the iteration, and the
    reason if the searches cannot continue.
    """

    images: Tensor
    rewards: Tensor
    components: Mapping[str, Tensor]
    noise: Tensor
    search: Search
    stopped: str | None = None


class UpdateRule(Protocol):
    """One iteration of a method; its repr, without the target, is part of the checkpoint's fingerprint."""

    @property
    def target(self) -> float | None: ...

    def __call__(self, generate: NoiseToImage, search: Search, number: int) -> IterationResult: ...


class NoiseRun:
    """A run until the last iteration, the end of all searches, an observer's request or a failure.

    A reward that fails in the first iteration raises its RewardError; after a later failure the best iterates are kept.
    Raises InputError for the state file of another run.
    """

    def __init__(
        self,
        generate: NoiseToImage,
        update_rule: UpdateRule,
        search: Search,
        iterations: int,
        state_file: str | Path | None = None,
        observer: Callable[[Iteration], bool | None] | None = None,
    ) -> None:
        self.generate, self.update_rule, self.iterations, self.observer = generate, update_rule, iterations, observer
        # A finished search does not continue, so another target is another run.
        target_setting = {} if update_rule.target is None else {"target": update_rule.target}
        self.file = SearchCheckpoint(state_file, {"move": str(update_rule), **generate.fingerprint(), **target_setting})
        self.search, self.trace = self.file.load(generate.start.device, iterations) or (search, [])
        self.stopped: str | None = None

    def _iterate(self, number: int) -> bool:
        """Run one iteration; return whether the run ends with it."""
        try:
            updated = self.update_rule(self.generate, self.search, number)
        except RewardError as error:
            if number == 0:
                raise
            self.stopped = f"{error} (iteration {number})"
            return True
        self.search, self.stopped, shape = updated.search, updated.stopped, updated.rewards.shape
        noise_norms, best = norms(updated.noise).cpu().view(shape), self.search.best_rewards.view(shape)
        self.trace.append(Iteration(number, self.iterations, updated.rewards, updated.components, noise_norms, best))
        if self.stopped:
            return True
        self.file.save(self.search, self.trace)
        return bool(self.observer and self.observer(replace(self.trace[-1], images=updated.images)))

    def output(self, output_type: str) -> SteeringOutput:
        """Iterate to the end; return the best iterate of each search, made once more by the plain pipeline."""
        particle_batch = self.generate.particle_batch
        # Through the configuration, not the method, which in a combined pipeline shows the bars of its stages.
        bar_config = getattr(particle_batch.pipe, "_progress_bar_config", {})
        for number in tqdm(range(len(self.trace), self.iterations), **bar_config):
            if self.search.finished.all() or self._iterate(number):
                break
        if self.stopped:
            logger.warning("%s; the best so far is returned", self.stopped)
        noise = self.search.best_noise.to(self.generate.dtype)
        images = self.generate(noise)
        rewards, components = self._best_scores() if self.stopped else particle_batch.score(images)
        out = particle_batch.output(
            images, rewards, components, Particles.start(*rewards.shape), output_type=output_type
        )
        start = replace(self.generate.initial, noise=noise).rows(particle_batch.rows(out.order).tolist())
        return replace(out, start=start, trace=tuple(self.trace), stopped=self.stopped)

    def _best_scores(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the best scores from the trace: a reward that failed is not called again.

        The best iterate is from the iteration after which the best reward did not rise: an iterate with a higher reward
        may have been rejected (`max_slope`). Components are left out where the trace lacks them: an elite of MAP-Elites
        may come from another row or batch.
        """
        best = self.trace[-1].best
        at = torch.stack([one.best < best for one in self.trace]).sum(0, keepdim=True)
        in_trace = torch.equal(torch.stack([one.rewards for one in self.trace]).gather(0, at)[0], best)
        names = self.trace[0].components if in_trace else {}
        components = {
            name: torch.stack([one.components[name] for one in self.trace]).gather(0, at)[0] for name in names
        }
        return best, components


@dataclass(frozen=True)
class Estimate:
    """Images (B·K, 3, H, W) at some noise, rewards (B, K) with components, and ∇_ε r (B·K, …) in fp32 if wanted.

    slopes  ‖∇_x r‖ at the images (B·K,), if the gradient is from automatic differentiation
    """

    images: Tensor
    rewards: Tensor
    components: Mapping[str, Tensor]
    gradient: Tensor | None
    slopes: Tensor | None = None


class NoiseGradient(Protocol):
    """A function (noise → images, noise, iteration number) → Estimate, without gradient in the last iteration."""

    def __call__(self, generate: NoiseToImage, noise: Tensor, iteration: int, wanted: bool = True) -> Estimate: ...


@dataclass(frozen=True)
class Backprop:
    """∇_ε r(G(ε)) by automatic differentiation. Raises InputError for a reward without gradients.

    checkpointing  recompute activations in the backward pass instead of storing them; None: above a size
    """

    checkpointing: bool | None = field(default=None, repr=False)  # changes no result: not in the fingerprint

    def __call__(self, generate: NoiseToImage, noise: Tensor, iteration: int, wanted: bool = True) -> Estimate:
        leaf, slopes = noise.detach().requires_grad_(True), [torch.empty(0)]
        with torch.enable_grad():
            images = generate.differentiable_images(leaf, self.checkpointing)
            images.register_hook(lambda gradient: slopes.append(gradient.float().flatten(1).norm(dim=1)))
            rewards, components = generate.particle_batch.score(images)
            try:
                gradient = per_sample_gradients(rewards, leaf, generate.in_fp16) if wanted else None
            except RuntimeError as error:
                if "inplace operation" not in str(error):
                    raise
                raise generate.lets_no_gradients_through() from error  # it overwrites tensors of the backward pass
        if wanted and gradient is None:
            raise _not_differentiable(generate.particle_batch.reward.name)
        generate.particle_batch.count_gradients(len(noise) if wanted else 0)
        detached = {name: part.detach() for name, part in components.items()}
        return Estimate(images.detach(), rewards.detach(), detached, gradient, slopes[-1] if wanted else None)


@dataclass(frozen=True)
class ZeroOrder:
    """Gradient estimate for black-box rewards: 1/n Σ_i [r(ε + δu_i) − r(ε − δu_i)]/2δ · u_i, u_i ~ N(0, I).

    (antithetic evolution strategies, arXiv 1703.03864)

    directions  n: an iteration makes 2n + 1 images for each search
    distance    δ, in standard deviations of the noise
    """

    directions: int = 8
    distance: float = 0.1

    def __post_init__(self) -> None:
        if self.directions < 1 or not self.distance > 0:
            raise InputError(f"zero-order: directions must be at least 1 and distance above 0, got {self}")

    def __call__(self, generate: NoiseToImage, noise: Tensor, iteration: int, wanted: bool = True) -> Estimate:
        images = generate.fast_images(noise)
        rewards, components = generate.particle_batch.score(images)
        if not wanted:
            return Estimate(images, rewards, components, None)
        gradient = torch.zeros_like(noise)
        for number in range(self.directions):
            u = seeded_normal(generate.seeds, noise, [f"direction {iteration} {number}"] * len(noise))
            ahead, behind = (self._reward(generate, noise + side * self.distance * u) for side in (1, -1))
            slope = ((ahead - behind) / (2 * self.distance)).flatten().to(u)
            gradient += slope.view(-1, *[1] * (u.dim() - 1)) * u / self.directions
        return Estimate(images, rewards, components, gradient)

    def _reward(self, generate: NoiseToImage, noise: Tensor) -> Tensor:
        return generate.particle_batch.score(generate.fast_images(noise))[0]


GRADIENTS: dict[str, NoiseGradient] = {"backprop": Backprop(), "zero-order": ZeroOrder()}


def check_differentiable(reward: Reward, gradient: NoiseGradient) -> None:
    """Raise InputError where gradients are requested from a reward without them."""
    if isinstance(gradient, Backprop) and not reward.differentiable:
        raise _not_differentiable(reward.name)


def _not_differentiable(name: str) -> InputError:
    return InputError(
        f"reward {name!r} is not differentiable: use the zero-order estimator "
        "(gradient='zero-order', on the command line --gradient zero-order), or another reward"
    )


ONE_STEP = {"num_inference_steps": 1, "guidance_scale": 0.0}  # how one-step models are called


class ReNOPipeline(SteeringPipeline):
    """ReNO: the starting noise of a one-step (or few-step) model, optimised by gradient ascent on the reward.

    pipe = StableDiffusionPipeline.from_pretrained(MODELS["scenes-turbo"])  # or SD-Turbo, SDXL-Turbo, FLUX.1-schnell
    out = ReNOPipeline(pipe, reward="scene-soft")("a red circle left of a blue star", iterations=20)
    out.images[0], out.trace[-1].best, out.start.noise
    """

    @steering_call(ReNOSettings)
    def __call__(self, prompt: Prompts, settings: ReNOSettings, call: dict[str, Any]) -> SteeringOutput:
        """Optimise the noise of one call; all other arguments go to the pipeline's own `__call__`.

        By default the pipeline is called like a one-step model, with `num_inference_steps=1, guidance_scale=0`. With
        more steps the gradient goes through all of them.

        The best iterate of each search is returned, made once more by the plain pipeline; `out.start` reproduces it. A
        gradient that is not finite, or a reward that fails after the first iteration, ends all searches with the best
        so far, and `out.stopped` is the reason. Raises the same errors as `FKSteeringPipeline`.
        """
        s = settings
        rule = s.implementation("optimiser")
        gradient = s.implementation("gradient")
        if isinstance(gradient, Backprop) and s.gradient_checkpointing != "auto":
            gradient = replace(gradient, checkpointing=bool(s.gradient_checkpointing))
        ascent = Ascent(
            gradient,
            rule if s.lr is None else replace(rule, lr=s.lr),
            s.regularisation,
            s.max_grad_norm,
            s.patience,
            s.restarts,
            s.max_slope,
            s.target_reward,
            last=s.iterations - 1 if s.state_file is None else None,
        )
        check_differentiable(self.reward, ascent.gradient)
        call = filter_call_kwargs(self.pipe, ONE_STEP) | call
        return _optimise(self, prompt, s, call, ascent, ascent.optimiser)


def _optimise(
    pipeline: SteeringPipeline,
    prompt: Prompts,
    s: IterationSettings,
    call: dict[str, Any],
    update_rule: "UpdateRule",
    *optimiser: Optimiser,
) -> SteeringOutput:
    """Run all iterations of a search from the noise that the pipeline itself draws."""
    particle_batch = ParticleBatch(
        pipeline.pipe, pipeline.reward, prompt, s.num_particles, call, s.reward_prompt, s.chunk_size
    )
    generate = NoiseToImage(particle_batch)
    search = Search.start(generate.start, *optimiser)
    return NoiseRun(generate, update_rule, search, s.iterations, s.state_file, s.on_iteration).output(s.output_type)


@dataclass(frozen=True)
class Ascent:
    """One iteration of ReNO: a gradient ascent step of each search.

    max_slope  κ: a search ends with its best earlier iterate at an image where ‖∇_x r‖ is above κ times the median at
               the first images: there the reward changes much faster with the pixels than among images of the model
    last       number of the last iteration, after which no step is taken; None: a later run may continue from its step
    """

    gradient: NoiseGradient
    optimiser: Optimiser
    regularisation: float = 0.01
    max_grad_norm: float = 0.1
    patience: int | None = None
    restarts: int = 0
    max_slope: float | None = None
    target: float | None = field(default=None, repr=False)
    last: int | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.optimiser.lr < float("inf"):  # an optimiser object has its own lr
            raise InputError(f"lr must be above 0 and finite, got {self.optimiser.lr}")

    def __call__(self, generate: NoiseToImage, search: Search, number: int) -> IterationResult:
        """Evaluate rewards and gradient at the current noise, keep the best, take a step."""
        wanted = number == 0 or number != self.last or self.max_slope is not None
        estimate = self.gradient(generate, search.noise, number, wanted)
        rewards, steep = estimate.rewards.flatten(), self._too_steep(generate, estimate, number)
        if steep is not None:
            rewards, search = rewards.masked_fill(steep.to(rewards.device), -torch.inf), search.retire(steep.cpu())
        recorded = search.record(rewards).finish_at_target(self.target)
        if estimate.gradient is None:
            return IterationResult(estimate.images, estimate.rewards, estimate.components, search.noise, recorded)
        uphill = estimate.gradient + self.regularisation * prior_gradient(search.noise)
        stopped, updated = self._nonfinite_gradient(generate, uphill, number), recorded
        if stopped is None:
            updated = self._ascend_rows(recorded, uphill, generate.seeds)
        return IterationResult(estimate.images, estimate.rewards, estimate.components, search.noise, updated, stopped)

    def _too_steep(self, generate: NoiseToImage, estimate: Estimate, number: int) -> Tensor | None:
        """Return (B·K,), true where the slope of the reward is above `max_slope` times its median at the first images.

        None without a bound, and in the first iteration. Raises InputError where slopes are not known.
        """
        if self.max_slope is None:
            return None
        if estimate.slopes is None or generate.in_fp16:
            raise InputError("max_slope needs gradient backprop and a model in float32 or bfloat16: leave it out")
        if generate.first_slope is None:
            first = estimate if number == 0 else self.gradient(generate, generate.start, 0)
            generate.first_slope = torch.as_tensor(first.slopes).median().item()
        return estimate.slopes > self.max_slope * generate.first_slope if number else None

    def _nonfinite_gradient(self, generate: NoiseToImage, uphill: Tensor, number: int) -> str | None:
        """Return the reason to stop if a gradient is not finite, else None."""
        rows = (~uphill.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
        if not rows:
            return None
        name, prompt = generate.particle_batch.reward.name, generate.particle_batch.prompts[rows[0]]
        return f"the gradient of reward {name!r} is not finite at iteration {number}, prompt {prompt!r}"

    def _ascend_rows(self, search: Search, uphill: Tensor, seeds: Sequence[int]) -> Search:
        """ε ← ε + a step along ∇ [Σ_m w_m r_m(G(ε)) + w_reg log p(‖ε‖)]; searches out of patience restart."""
        step = clipped(uphill, self.max_grad_norm)
        if self.patience is None:
            return search.ascend(step, self.optimiser)
        out_of_patience = (search.stale >= self.patience) & ~search.finished
        restarting = out_of_patience & (search.starts <= self.restarts)
        seed_streams = [f"start {number}" for number in search.starts.tolist()]
        # Retired before the step: while others of the batch continue, a finished row is evaluated again unchanged.
        updated = search.retire(out_of_patience & ~restarting).ascend(step, self.optimiser)
        return updated.restart(restarting, seeded_normal(seeds, search.noise, seed_streams))


class NoiseSearchPipeline(SteeringPipeline):
    """Search among random neighbours of the best noise so far, the control of gradient-based optimisation."""

    @steering_call(NoiseSearchSettings)
    def __call__(self, prompt: Prompts, settings: NoiseSearchSettings, call: dict[str, Any]) -> SteeringOutput:
        """Search the noise of one call; all other arguments go to the pipeline's own `__call__`.

        The first iteration evaluates ε itself. Output and errors are as in `ReNOPipeline`; steps and guidance default
        to the pipeline's own.
        """
        rule = Neighbours(settings.neighbours, settings.distance, settings.target_reward)
        return _optimise(self, prompt, settings, call, rule)


@dataclass(frozen=True)
class Neighbours:
    """One iteration: `count` neighbours of the best noise so far, of which the best is kept."""

    count: int = 4
    distance: float = 0.5
    target: float | None = field(default=None, repr=False)

    def __call__(self, generate: NoiseToImage, search: Search, number: int) -> IterationResult:
        pivot, candidates = search.best_noise, []
        for place in range(self.count if number else 1):
            u = seeded_normal(generate.seeds, pivot, [f"neighbour {number} {place}"] * len(pivot))
            # A finished search is evaluated again unchanged, while others of its batch continue.
            noise = where_rows(search.finished, pivot, neighbour(pivot, u, self.distance)) if number else pivot
            images = generate.fast_images(noise)
            rewards, components = generate.particle_batch.score(images)
            search = replace(search, noise=noise).record(rewards.flatten())
            candidates.append(IterationResult(images, rewards, components, noise, search))
        result = best_of(candidates)
        return replace(result, search=result.search.finish_at_target(self.target))


def best_of(candidates: Sequence[IterationResult]) -> IterationResult:
    """Return for each image the candidate with the highest reward, and the searches of the last candidate."""
    at = torch.stack([one.rewards for one in candidates]).argmax(0)
    rows = range(at.numel())

    def chosen(tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack([tensors[place][row] for row, place in zip(rows, at.flatten().tolist(), strict=True)])

    names = candidates[0].components
    return IterationResult(
        chosen([one.images for one in candidates]),
        chosen([one.rewards.flatten() for one in candidates]).view_as(at),
        {name: chosen([one.components[name].flatten() for one in candidates]).view_as(at) for name in names},
        chosen([one.noise for one in candidates]),
        candidates[-1].search,
    )
