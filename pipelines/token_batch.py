"""Particles of token pipelines: texts scored by text rewards, or VQ images by the rewards of images."""

import copy
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import AmusedPipeline
from torch import Tensor

from steer.diffusion.lookahead import Adapter
from steer.diffusion.masked import draw_tokens
from steer.diffusion.step_hooks import SolverStep, StepOverride
from steer.diffusion.token_hooks import TokenStep, is_token_scheduler
from steer.errors import InputError
from steer.pipelines.base import SteeringOutput
from steer.pipelines.particle_batch import ParticleBatch
from steer.reward import Texts, score_components

MAX_DRAWS = 64  # largest number of draws of x̂0 at one step
PREDICTIONS = (
    "argmax, samples:N (N draws of x̂0, combined by log-mean-exp) or finish:M (M steps of the pipeline to the end)"
)


@dataclass
class TextOutput(SteeringOutput):
    """The output of a call on texts: `images` are texts, or ids where output_type is "latent"; `latents` are ids."""

    @property
    def texts(self) -> Any:
        """The texts, best first within each prompt."""
        return self.images


def batch_class(pipe: Any) -> type[ParticleBatch]:
    """Return the class of particle batch for a pipeline: for texts, VQ images or latents."""
    if not is_token_scheduler(pipe.scheduler):
        return ParticleBatch
    return VQBatch if isinstance(pipe, AmusedPipeline) else TextBatch


class TokenBatch(ParticleBatch):
    """K particles of ids for each prompt."""

    def __init__(
        self, *args: Any, preview: Any = "full", lookahead: int = 1, adapter: Adapter | None = None, **options: Any
    ) -> None:
        """Prepare the call as `ParticleBatch` does, with `preview` one of PREDICTIONS."""
        if lookahead > 1 or adapter is not None:
            raise InputError(f"lookahead={lookahead}: tokens have no noise level to step along: use preview='finish:2'")
        super().__init__(*args, **options)
        self._predict = _prediction(preview, self)
        if self.size > 1 and _is_greedy(self.pipe, self.call):
            name = type(self.pipe).__name__
            raise InputError(f"{name} is greedy at temperature 0, copies stay equal: use temperature=1")

    def sample(
        self, on_solver_step: Callable[[SolverStep], StepOverride | None], pipe: Any = None, **given: Any
    ) -> Tensor:
        """Run the pipeline with step hooks; return the finished samples in the order of the slots."""

        def on_token_step(step: TokenStep) -> StepOverride | None:
            return on_solver_step(replace(step, predict=self._predict))  # type: ignore[arg-type]

        return super().sample(on_token_step, pipe, **given)  # type: ignore[arg-type]

    def predict(self, solver_step: Any, steps: int = 1) -> Tensor:
        """Predict the clean ids (N, …); the only look-ahead of tokens is `preview="finish:M"`."""
        return solver_step.x0()

    def _score_draws(
        self, score: Callable[[Any], tuple[Tensor, dict[str, Tensor]]], draws: Sequence[Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Score several draws of each sample: log-mean-exp of the rewards, means of the components."""
        rewards, components = zip(*(score(one) for one in draws), strict=True)
        mean = torch.stack(rewards).logsumexp(0) - torch.tensor(float(len(draws))).log()
        return mean, {name: torch.stack([one[name] for one in components]).mean(0) for name in components[0]}


def _prediction(preview: Any, batch: TokenBatch) -> Callable[[TokenStep], Tensor] | None:
    """Return the function that predicts x̂0; None: the most likely tokens. Raises InputError for an unknown name."""
    if preview in ("full", "argmax"):
        return None
    parsed = re.fullmatch(r"(samples|finish):(\d{1,3})", preview) if isinstance(preview, str) else None
    if parsed is None or not 1 <= int(parsed[2]) <= MAX_DRAWS:
        raise InputError(f"preview must be {PREDICTIONS}, got {preview!r:.60}")
    count = int(parsed[2])

    def samples(step: TokenStep) -> Tensor:
        log_probs = step.log_probs()
        return torch.cat([step.filled(draw_tokens(log_probs, batch.rng)) for _ in range(count)])

    def finish(step: TokenStep) -> Tensor:
        view = quiet(batch.pipe)
        ids: Tensor = view(latents=step.x, num_inference_steps=count, generator=batch.rng, output_type="ids").texts
        batch._nfe += count * len(ids)
        return ids

    if parsed[1] == "samples":
        return samples
    if type(batch.pipe).__name__ != "MaskedDiffusionPipeline":
        raise InputError(f"preview={preview!r}: {type(batch.pipe).__name__} cannot start from ids: use samples:4")
    return finish


class TextBatch(TokenBatch):
    """Particles that are texts."""

    def preview(self, x0: Tensor) -> Tensor:
        """Return x̂0 of the whole batch unchanged: ids need no decoding."""
        return x0

    def score(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Score ids (B·K, L), or several draws of each (n·B·K, L); return rewards (B, K) and component scores."""
        rows = self.groups * self.alive
        return self._score_draws(self._score_ids, images.split(rows)) if len(images) > rows else self._score_ids(images)

    def _score_ids(self, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        prompts = [text for text in self.prompts[:: self.size] for _ in range(self.alive)]
        rows = None if self.metadata is None else [row for row in self.metadata for _ in range(self.alive)]
        self._reward_calls += len(ids)
        texts = Texts(self.decode(ids), ids)
        rewards, components = score_components(self.reward, texts, prompts, rows)  # type: ignore[arg-type]
        shape = self.groups, self.alive
        return rewards.view(shape), {name: scores.view(shape) for name, scores in components.items()}

    def decode(self, ids: Tensor) -> list[str]:
        """Return texts, each up to its first end token."""
        return decode_ids(self.pipe, ids)

    def output(self, *args: Any, output_type: str = "pil", **kwargs: Any) -> TextOutput:
        """Assemble the output: ids for the output type "latent", texts for any other."""
        images, rewards, components, particles, history, *rest = args
        output = super().output(images, rewards, components, particles, history, "pt", *rest[1:], **kwargs)
        ids = output.images
        decoded = ids if (rest[0] if rest else output_type) == "latent" else self.decode(ids)
        return TextOutput(**{**vars(output), "images": decoded, "latents": ids})


def quiet(pipe: Any) -> Any:
    """Copy a pipeline for calls inside its own call: with a separate scheduler and no progress bar."""
    view = copy.copy(pipe)
    vars(view).update(_progress_bar_config={"disable": True}, scheduler=copy.copy(view.scheduler))
    return view


def decode_ids(pipe: Any, ids: Tensor) -> list[str]:
    """Return the texts of ids (N, L) of a token pipeline, each up to its first end token."""
    if hasattr(pipe, "decode"):
        texts: list[str] = pipe.decode(ids)
        return texts
    reader = getattr(pipe, "processor", None) or pipe.tokenizer
    end = pipe.eos_token_id
    rows = [row[: row.index(end) + 1] if end in row else row for row in ids.tolist()]
    return list(reader.batch_decode(rows, skip_special_tokens=True))


def _is_greedy(pipe: Any, call: Mapping[str, Any]) -> bool:
    """Return whether a pipeline takes the most likely tokens, at temperature 0."""
    parameter = inspect.signature(type(pipe).__call__).parameters.get("temperature")
    own = type(pipe.scheduler).__name__ in ("EntropyBoundScheduler", "AmusedScheduler")
    return parameter is not None and not own and call.get("temperature", parameter.default) == 0


class VQBatch(TokenBatch):
    """Particles that are images of a VQ autoencoder (aMUSEd), whose ids are the latents."""

    def preview(self, x0: Tensor) -> Tensor:
        """Decode ids (n·B·K, h, w): images (n·B·K, 3, H, W) in [0, 1]."""
        self._decodes += len(x0)
        return torch.cat([self._decode(part) for part in x0.split(self.chunk_size)])

    @torch.no_grad()
    def _decode(self, ids: Tensor) -> Tensor:
        vqvae = self.pipe.vqvae
        shape = (*ids.shape, vqvae.config.latent_channels)
        decoded: Tensor = vqvae.decode(ids, force_not_quantize=True, shape=shape).sample
        return decoded.clip(0, 1)

    def score(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Score images, or several draws of each; return rewards (B, K) and component scores."""
        rows, plain = self.groups * self.alive, super().score
        return self._score_draws(plain, images.split(rows)) if len(images) > rows else plain(images)
