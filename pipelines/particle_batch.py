"""B prompts × K particles as one call of a diffusers pipeline, on which every steering method runs."""

import hashlib
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from torch import Generator, Tensor

from steer.arguments import IMAGES_PER_PROMPT, annotations_of, coerce_value
from steer.audio import as_scored, check_media, is_audio
from steer.diffusion.batching import ActiveRows
from steer.diffusion.glass import correlation, glass_transition
from steer.diffusion.lookahead import Adapter, LookAhead
from steer.diffusion.preview import build_preview
from steer.diffusion.rows import RowsCall
from steer.diffusion.safety import with_deferred_checker
from steer.diffusion.schedules import Gaussian, step_levels
from steer.diffusion.seeds import list_generators
from steer.diffusion.step_hooks import SolverStep, StepOverride
from steer.diffusion.value import Value
from steer.diffusion.views import OutputShapes, cache_text_encoding
from steer.errors import InputError, UnsupportedPipelineError
from steer.pipelines.base import Cost, ResamplingInfo, SteeringOutput
from steer.reward import Reward, compares_images, mean_over_frames, score_components, warn_if_pipeline_truncates
from steer.rewards.compose import plain_rewards, with_media_rates
from steer.smc.particles import Particles


def _best(order: Tensor, log_weights: Tensor, generator: Generator) -> Tensor:
    return order


def _weighted(order: Tensor, log_weights: Tensor, generator: Generator) -> Tensor:
    """Move one slot, drawn by the weights (B, K), to the front of `order` (B, K)."""
    first_slot = torch.multinomial(log_weights.double().softmax(1), 1, generator=generator)
    return torch.cat([first_slot, order[order != first_slot].view(len(order), -1)], 1)


# Choices of the first image of each prompt.
DRAWS = {"best": _best, "weighted": _weighted}


class ParticleBatch:
    """One call of `pipe` with K particles for each prompt; samples, scores and counts the cost."""

    def __init__(
        self,
        pipe: Any,
        reward: Reward,
        prompt: str | Sequence[str] | None,
        size: int,
        call: Mapping[str, Any],
        reward_prompt: str | Sequence[str] | None = None,
        chunk_size: int = 8,
        preview: Any = "full",
        live: ActiveRows | None = None,
        lookahead: int = 1,
        adapter: Adapter | None = None,
    ) -> None:
        """Prepare the call.

        call                arguments for `pipe.__call__`, and `metadata` for the reward, a Mapping for each prompt
        preview             see `steer.diffusion.preview`
        live                the rows in use, where the number of particles may fall
        lookahead, adapter  for the predicted clean latents, see `steer.diffusion.lookahead`
        Raises InputError where arguments do not fit the pipeline or each other.
        """
        if size < 1:
            raise InputError(f"num_particles must be at least 1, got {size}")
        if chunk_size < 1:
            raise InputError(f"chunk_size must be at least 1, got {chunk_size}")
        reward = with_media_rates(reward, pipe, call)
        self.pipe, self.reward, self.size, self.chunk_size = cache_text_encoding(pipe), reward, size, chunk_size
        self.live, self.alive = live or ActiveRows(), size  # particles left per prompt, in its first slots
        call = dict(call)
        metadata = call.pop("metadata", None)
        read_by_prompt = reward_texts(prompt, reward_prompt, call)
        self.groups = len(read_by_prompt)
        self.prompts = [text for text in read_by_prompt for _ in range(size)]
        self.metadata = rows_of_metadata(metadata, self.groups)
        bound = _bound_call(pipe, prompt, self.groups, call)
        self._rows_call = RowsCall(pipe, bound, self.groups, size)
        encoded_texts = [self.call.get(name) or () for name in ("prompt", "negative_prompt")]
        warn_if_pipeline_truncates(
            pipe, [t for one in encoded_texts for t in ([one] if isinstance(one, str) else one)], self.call
        )
        self.rng = Generator().manual_seed(_derived_seed(call.get("generator")))
        self.seeds = _row_seeds(call.get("generator"), len(self.prompts))
        self.latents = torch.empty(0)
        self._flags: Tensor | None = None  # (B·K,) safety checker's flags of the finished images, and its images
        self._replaced = torch.empty(0)
        self._shapes = OutputShapes()
        self._preview = build_preview(self.live.decoder(preview), self.pipe, self._rows_call, chunk_size, self._shapes)
        self._look_ahead = LookAhead(self.pipe, self._rows_call, lookahead, self._shapes, adapter)
        self._nfe = self._decodes = self._other_decodes = self._reward_calls = self._gradients = 0
        self._start_time = time.monotonic()

    @property
    def call(self) -> dict[str, Any]:
        """The arguments of the pipeline's call; if it has one call for each row, of the first call."""
        return self._rows_call.call

    @property
    def form(self) -> int:
        """The number of the form in which the pipeline is called for several rows (`RowsCall`)."""
        return self._rows_call.place

    @form.setter
    def form(self, number: int) -> None:
        self._rows_call.start_at(number)

    def sample(
        self, on_solver_step: Callable[[SolverStep], StepOverride | None], pipe: Any = None, **given: Any
    ) -> Tensor:
        """Run the pipeline, or a copy, with step hooks; return images (B·K, 3, H, W) in [0, 1] of the K particles left.

        given  arguments of the pipeline's call in place of the user's own
        """
        pipe, checker = with_deferred_checker(self._shapes.recorded(self.pipe if pipe is None else pipe))

        def tracked_step(solver_step: SolverStep) -> StepOverride:
            self._nfe += solver_step.calls * self.groups * self.alive
            ancestors, latents = on_solver_step(solver_step) or (None, None)
            moved = solver_step.prev if ancestors is None else solver_step.prev[ancestors]
            self.latents = (moved if latents is None else latents.to(moved.dtype)).detach()
            return ancestors, latents

        images = self.live.of(self._rows_call.run(pipe, tracked_step, given | {"output_type": "pt"}))
        self._decodes += len(images)
        if checker is not None and checker.flags is not None and checker.replaced is not None:
            self._flags, self._replaced = self.live.of(checker.flags), self.live.of(checker.replaced)
        return images

    def predict(self, solver_step: SolverStep, steps: int = 1) -> Tensor:
        """Predict the clean latents (N, …) of the whole batch: x̂0, or by a look-ahead of at least `steps` steps."""
        look_ahead = self._look_ahead.at_least(steps)
        latents = look_ahead(solver_step)
        self._nfe += look_ahead.evaluations * self.groups * self.alive
        return latents

    def values(self, value: Value, solver_step: SolverStep) -> Tensor:
        """Evaluate a learned value (B, K) at a step, for the K particles left; with a graph where x_t has one.

        Raises InputError.
        """
        with_graph = torch.is_grad_enabled() and solver_step.x.requires_grad
        with torch.set_grad_enabled(with_graph):
            values = self.live.of(value(solver_step, self.prompts)).float().cpu()
        if values.shape != (self.groups * self.alive,) or not values.isfinite().all():
            raise InputError(f"value: expected {self.groups * self.alive} finite numbers, got {tuple(values.shape)}")
        return (values if with_graph else values.detach()).view(self.groups, self.alive)

    def next_step(self, solver_step: SolverStep, x: Tensor) -> SolverStep:
        """Return the step after `solver_step` from latents x (N, …), by one evaluation with its graph."""
        self._nfe += self.groups * self.alive
        return self._look_ahead.next_step(solver_step, x)

    def glass(self, solver_step: SolverStep, eta: float, rows: Tensor | None, steps: int) -> Tensor:
        """Draw x_s (N, …) by a GLASS transition of `steps` inner steps, with the noise correlation of η.

        rows  the particle that each row continues, of the same prompt
        """
        before, after = step_levels(solver_step.scheduler, solver_step.t, solver_step.index)
        x, x0 = (one if rows is None else one[rows] for one in (solver_step.x.float(), solver_step.x0()))
        evaluations = 0

        def denoise(s: Tensor, sigma: Tensor) -> Tensor:
            nonlocal evaluations
            evaluations += 1
            return x0 if evaluations == 1 else self._look_ahead.denoise(solver_step, s, sigma)

        noise = Gaussian(x, torch.ones_like(x[:1])).noise(self.rng)
        drawn = glass_transition(x, denoise, before, after, correlation(before, after, eta), noise, steps)
        self._nfe += (evaluations - 1) * self.groups * self.alive
        return drawn

    def preview(self, x0: Tensor) -> Tensor:
        """Decode x̂0 of the whole batch; return images (B·K, 3, H, W) of the K particles left."""
        before, images = self._preview.decodes, self.live.of(self._preview(x0))
        if self._preview.decodes > before:
            self._decodes += len(images)
        else:
            self._other_decodes += len(images)
        return images

    def score(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Score images (B·K, 3, H, W); return rewards (B, K), and the scores of the reward's components, if any.

        Videos (B·K, F, 3, H, W) get the mean over evenly spaced frames, or the reward of whole videos.
        Images with a graph give rewards with a graph.
        Raises InputError for audio with a reward of images, and the reverse.
        """
        for one in plain_rewards(self.reward).values():
            check_media(self.pipe, one, images)
        with torch.set_grad_enabled(torch.is_grad_enabled() and images.requires_grad):
            return mean_over_frames(images, self._score, self.reward)

    def _score(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        prompts = [text for text in self.prompts[:: self.size] for _ in range(self.alive)]
        rows = None if self.metadata is None else [row for row in self.metadata for _ in range(self.alive)]
        size = len(images) if compares_images(self.reward) else self.chunk_size
        chunks = [slice(start, start + size) for start in range(0, len(images), size)]
        self._reward_calls += len(images)
        scored = [
            score_components(self.reward, as_scored(images[c]), prompts[c], None if rows is None else rows[c])
            for c in chunks
        ]
        rewards, components = zip(*scored, strict=True)
        shape = self.groups, self.alive
        return torch.cat(rewards).view(shape), {
            n: torch.cat([p[n] for p in components]).view(shape) for n in components[0]
        }

    def set_ancestors(self, ancestors: Tensor) -> Tensor:
        """Continue with the particles of ancestors (B, K), slots of each group; return the ancestors as rows (N,).

        The rows are numbers in the whole batch. Where K is smaller than before, the later slots are dropped. Raises
        UnsupportedPipelineError for that if the pipeline has one call for each row: none can be left out.
        """
        rows = torch.arange(self.groups * self.size).view(self.groups, self.size)
        rows[:, : ancestors.shape[1]] = ancestors + rows[:, :1]
        if ancestors.shape[1] < self.alive:
            if self._rows_call.in_lock_step:
                raise UnsupportedPipelineError(
                    f"{type(self.pipe).__name__} makes one image a call, which cannot end early: use best-of-N, or FK "
                    "without a particle schedule"
                )
            self.alive = ancestors.shape[1]
            self.live.keep(torch.arange(self.groups * self.size).view_as(rows)[:, : self.alive].flatten(), rows.numel())
        return rows.flatten()

    def rows(self, slots: Tensor) -> Tensor:
        """Convert slots (B, K) inside each group to rows (B·K,) of the images."""
        return (slots + torch.arange(self.groups)[:, None] * self.alive).flatten()

    def output(
        self,
        images: Tensor,
        rewards: Tensor,
        components: Mapping[str, Tensor],
        particles: Particles,
        history: Sequence[ResamplingInfo] = (),
        output_type: str = "pil",
        draw: str = "best",
    ) -> SteeringOutput:
        """Assemble the output: the images of each prompt by reward, after the first one, which `draw` selects."""
        order = rewards.sort(dim=1, descending=True, stable=True).indices
        order = DRAWS[draw](order, particles.log_weights, self.rng)
        rows = self.rows(order)
        latents = self.live.of(self.latents)[rows.to(self.latents.device)]
        seconds = time.monotonic() - self._start_time
        if self._flags is not None:
            chosen = self._flags.to(images.device).view(-1, 1, 1, 1)
            images = torch.where(chosen, self._replaced.to(images).clamp(0, 1), images)
        return SteeringOutput(
            images=latents if output_type == "latent" else as_type(images[rows.to(images.device)], output_type),
            rewards=rewards.gather(1, order),
            components={name: scores.gather(1, order) for name, scores in components.items()},
            log_weights=particles.log_weights.gather(1, order),
            log_normaliser=particles.log_evidence,
            latents=latents,
            order=order,
            nsfw_content_detected=None if self._flags is None else self._flags[rows.cpu()].view(rewards.shape),
            history=tuple(history),
            cost=Cost(self._nfe, self._decodes, self._reward_calls, seconds, self._gradients, self._other_decodes),
        )

    def count_gradients(self, images: int) -> None:
        """Add n images to the gradient count."""
        self._gradients += images


def as_type(images: Tensor, output_type: str) -> Any:
    """Convert images (N, 3, H, W), or videos (N, F, 3, H, W), in [0, 1] to diffusers' "pil", "np" or "pt".

    Waveforms become arrays, except for "pt".
    """
    if output_type == "pt":
        return images
    if is_audio(images):
        return images.float().cpu().numpy()
    if images.dim() == 5:
        return [as_type(video, output_type) for video in images]
    arrays = VaeImageProcessor.pt_to_numpy(images)
    return arrays if output_type == "np" else VaeImageProcessor.numpy_to_pil(arrays)


RESERVED = dict.fromkeys((*IMAGES_PER_PROMPT, "batch_size"), "say num_particles") | {"return_dict": "leave it out"}


def _bound_call(pipe: Any, prompt: str | Sequence[str] | None, groups: int, call: Mapping[str, Any]) -> dict[str, Any]:
    accepted = inspect.signature(type(pipe).__call__).parameters
    unknown = [name for name in call if name not in accepted]
    if unknown:
        raise InputError(f"{type(pipe).__name__} takes no argument {unknown[0]!r}")
    if reserved := [name for name in RESERVED if name in call]:
        raise InputError(f"{reserved[0]} is the steering pipeline's own: {RESERVED[reserved[0]]}")
    several_images = isinstance(call.get("image"), list | tuple) or getattr(call.get("image"), "ndim", 0) == 4
    if groups > 1 and several_images and "strength" in accepted:
        raise InputError(
            "several images and several prompts in one call: diffusers pairs them wrongly; one prompt a call"
        )
    hints = annotations_of(type(pipe).__call__)
    bound = {  # None is left to the pipeline: Sana Sprint takes it for a float
        name: None if one is None else coerce_value(name, hints.get(name, Any), one) for name, one in call.items()
    }
    if prompt is not None and "prompt" in accepted:
        bound["prompt"] = prompt if isinstance(prompt, str) else list(prompt)
    return bound


def rows_of_metadata(metadata: Any, groups: int, name: str = "metadata") -> list[Mapping[str, Any]] | None:
    """Return one row of metadata per prompt. Raises InputError for another number of rows, and for malformed rows."""
    if metadata is None:
        return None
    rows = [metadata] if isinstance(metadata, Mapping) else list(metadata)
    if wrong := [row for row in rows if not isinstance(row, Mapping)]:
        raise InputError(f"{name} must be one mapping for each prompt, got {type(wrong[0]).__name__}")
    if len(rows) != groups:
        raise InputError(f"{name} must be one mapping for each prompt, got {len(rows)} of them and {groups} prompts")
    return rows


def reward_texts(
    prompt: str | Sequence[str] | None, reward_prompt: str | Sequence[str] | None, call: Mapping[str, Any]
) -> list[str]:
    """Return the text that the reward reads for each prompt, which may be embedded."""
    texts, embeds = prompt if reward_prompt is None else reward_prompt, call.get("prompt_embeds")
    return [texts] if isinstance(texts, str) else list(texts or [""] * (1 if embeds is None else len(embeds)))


def _row_seeds(generator: Generator | Sequence[Generator] | None, rows: int) -> list[int]:
    """Derive a seed for every row of the batch, from the row's own generator where each has one."""
    if isinstance(generator, Sequence) and len(generator) == rows:
        return [_derived_seed(one, b"rows") for one in generator]
    return [_derived_seed(generator, b"rows") + row for row in range(rows)]


def _derived_seed(generator: Generator | Sequence[Generator] | None, salt: bytes = b"steer") -> int:
    """Derive a seed from the state of the call's generators, without advancing them."""
    states = [one.get_state() for one in list_generators(generator)] or [torch.get_rng_state(), *_gpu_states()]
    digest = hashlib.sha256(salt)
    for state in states:
        digest.update(state.cpu().numpy().tobytes())
    return int.from_bytes(digest.digest()[:7], "big")


def _gpu_states() -> list[Tensor]:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
