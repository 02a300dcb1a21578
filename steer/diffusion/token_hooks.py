"""Step hooks of discrete diffusion: pipelines over tokens, whose latents are ids.

| pipeline                | state of a step                  | kernel                                            |
|-------------------------|----------------------------------|---------------------------------------------------|
| MaskedDiffusionPipeline | the whole sequence               | `MaskedKernel`: may be drawn again                |
| AmusedPipeline          | the whole grid of VQ ids         | the solver's own draw: unmasking by confidence has|
| LLaDA2Pipeline          | prompt and blocks, one at a time | no tractable density                              |
| DiffusionGemmaPipeline  | blocks (canvases) one at a time  |                                                   |
"""

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor

from steer.diffusion.masked import MaskedKernel
from steer.diffusion.views import ModuleProxy
from steer.errors import InputError

TOKEN_SCHEDULERS = (
    "SubsScheduler",
    "AmusedScheduler",
    "BlockRefinementScheduler",
    "EntropyBoundScheduler",
    "DiscreteDDIMScheduler",
)


def is_token_scheduler(scheduler: Any) -> bool:
    """Return whether a scheduler steps tokens."""
    return any(cls.__name__ in TOKEN_SCHEDULERS for cls in type(scheduler).__mro__)


def has_categorical_kernel(scheduler: Any) -> bool:
    """Return whether p(z_s | z_t) of a scheduler has a tractable density; AmusedScheduler and others have none."""
    return hasattr(scheduler, "kernel")


@dataclass(frozen=True)
class OwnDraw:
    """The draw that the solver made, for solvers without a tractable kernel."""

    prev: Tensor

    def sample(self, generator: Generator | None) -> Tensor:
        """Return the solver's tokens (N, …)."""
        return self.prev


@dataclass
class TokenStep:
    """A completed transition z_t → z_s of tokens: `steer.diffusion.step_hooks.SolverStep` for ids instead of latents.

    k          number of the transition, from 0, of `total`
    x, prev    ids before and after the transition, (N, L), or (N, h, w)
    output     logits (N, l, V) of the last l tokens, or (N, V, h, w)
    mask_id    the masked token: only masked places are predicted; None: all of the last l places
    predict    function z_t → x̂0 in place of the most likely tokens
    """

    k: int
    total: int
    t: Any
    x: Tensor
    prev: Tensor
    scheduler: Any
    output: Tensor = field(repr=False)
    mask_id: int | None = None
    calls: int = 1
    predict: Callable[["TokenStep"], Tensor] | None = field(repr=False, default=None)

    def log_probs(self) -> Tensor:
        """Return log x_θ (N, l, V), or (N, h, w, V), fp32; the masked token has none."""
        logits = (self.output.movedim(1, -1) if self.x.dim() == 3 else self.output).float()
        if self.mask_id is not None and self.mask_id < logits.shape[-1]:
            logits = logits.index_fill(-1, torch.tensor([self.mask_id], device=logits.device), -torch.inf)
        return logits.log_softmax(-1)

    def x0(self) -> Tensor:
        """Return x̂0 like x: the most likely token at every predicted place, or the result of `predict`."""
        return self.filled(self.log_probs().argmax(-1)) if self.predict is None else self.predict(self)

    def filled(self, tokens: Tensor) -> Tensor:
        """Return x with tokens (N, l), or (N, h, w), at the predicted places."""
        first = self.x.shape[1] - tokens.shape[1]
        kept, last = self.x[:, :first], self.x[:, first:]
        return torch.cat([kept, tokens if self.mask_id is None else torch.where(last == self.mask_id, tokens, last)], 1)

    def kernel(self, eta: float = 1.0, rows: Tensor | None = None) -> MaskedKernel | OwnDraw:
        """Return p(z_s | z_t) of all particles or of `rows`; without a tractable one, the draw of the solver.

        Raises InputError for eta other than 1: a discrete step has no deterministic part.
        """
        if eta != 1:
            raise InputError(f"eta={eta:g}: a step over tokens is always a draw: leave eta out")
        rows = torch.arange(len(self.x), device=self.x.device) if rows is None else rows
        if not has_categorical_kernel(self.scheduler):
            return OwnDraw(self.prev[rows])
        kernel: MaskedKernel = self.scheduler.kernel(self.output[rows], self.t, self.x[rows])
        return kernel


OnTokenStep = Callable[[Any], Any]  # returns a StepOverride or None, like `OnStep`, whose module imports this one


class TokenView:
    """A view of a token pipeline with step hooks; call it like the pipeline, by keyword.

    The scheduler's state is the whole sequence: an override is applied to the result of its step.
    """

    output_type: str | None = "ids"  # the pipeline's output_type for ids; None: images, as in other pipelines

    def __init__(self, pipe: Any, on_step: OnTokenStep, rows: int | None) -> None:
        self.pipe, self.on_step, self.rows, self.transitions = copy.copy(pipe), on_step, rows, 0
        self.scheduler = copy.copy(pipe.scheduler)
        plain_step = pipe.scheduler.step
        signature = inspect.signature(plain_step)

        @functools.wraps(plain_step)
        def step(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            returns_dict = given.pop("return_dict", True)
            output = type(pipe.scheduler).step(self.scheduler, **given, return_dict=True)
            output = self.after_step(given, output)
            return output if returns_dict else tuple(output.values())

        vars(self.scheduler)["step"] = step
        vars(self.pipe)["scheduler"] = self.scheduler

    def __call__(self, **call: Any) -> Any:
        """Call the pipeline; in place of images ("pt") it returns ids."""
        if self.output_type is not None:
            call["output_type"] = self.output_type
        return self.pipe(**call)

    def after_step(self, given: dict[str, Any], output: Any) -> Any:
        """Report the transition of a scheduler's step and apply the override to its output."""
        mask_id = self.scheduler.config.mask_token_id
        step = self.transition(len(self.scheduler.timesteps), given, given["sample"], output.prev_sample, mask_id)
        return self.override(step, output)

    def transition(self, total: int, given: dict[str, Any], x: Tensor, prev: Tensor, mask_id: int | None) -> TokenStep:
        """Return the next transition. Raises InputError if the number of rows is not the number of particles."""
        if self.rows and len(x) != self.rows:
            raise InputError(f"the scheduler was given {len(x)} rows for {self.rows} particles")
        k, self.transitions = self.transitions, self.transitions + 1
        return TokenStep(k, total, given["timestep"], x, prev, self.scheduler, given["model_output"], mask_id)

    def override(self, step: TokenStep, output: Any) -> Any:
        """Call the observer and return the output of the scheduler's step for the overridden particles."""
        ancestors, tokens = self.on_step(step) or (None, None)
        if not has_categorical_kernel(self.scheduler):
            ancestors, tokens = None if ancestors is None else own_draws(step, ancestors), None
        if ancestors is not None:
            self.follow(ancestors, len(step.x))
            take_rows(output, ancestors, len(step.x))
        if tokens is not None:
            output["prev_sample"] = tokens[:, tokens.shape[1] - output.prev_sample.shape[1] :]
        return output

    def follow(self, ancestors: Tensor, rows: int) -> None:
        """Take the rows `ancestors` of every state that is kept for each of the `rows` particles."""
        take_rows(vars(self.scheduler), ancestors, rows)


def own_draws(step: TokenStep, ancestors: Tensor) -> Tensor:
    """Return the ancestors (N,), but keep each slot that equals its ancestor before the step as its own ancestor.

    Such a slot's draw is from the same kernel as the ancestor's draw, and independent of it. Otherwise copies would
    stay equal where every step selects.
    """
    slots = torch.arange(len(step.x), device=step.x.device)
    ancestors = ancestors.to(step.x.device)
    same = (step.x == step.x[ancestors]).flatten(1).all(1) & (step.output == step.output[ancestors]).flatten(1).all(1)
    return torch.where(same, slots, ancestors)


def take_rows(state: Any, ancestors: Tensor, rows: int) -> None:
    """Replace every tensor of a mapping that has one row per particle by its rows `ancestors`."""
    for name, value in list(state.items()):
        if torch.is_tensor(value) and value.dim() >= 2 and len(value) == rows:
            state[name] = value[ancestors.to(value.device)]


class ImageTokenView(TokenView):
    """A view of AmusedPipeline: ids of a VQ autoencoder, which it decodes to images."""

    output_type = None


class BlockView(TokenView):
    """A view of LLaDA2Pipeline, which edits the current block outside of its scheduler.

    The transition is complete at `callback_on_step_end`; its `block_x`, the prompt and all blocks so far, is the
    state. EOS flags stay inside the pipeline: early stopping is off, and texts end at their first EOS.
    """

    output_type = "seq"
    _given: dict[str, Any]

    def __call__(self, **call: Any) -> Any:
        """Call the pipeline with its callback. Raises InputError for arguments that would not follow the ancestors."""
        if call.get("callback_on_step_end") is not None:
            raise InputError("callback_on_step_end is what steers this pipeline: leave it out, use on_step")
        if call.get("eos_early_stop"):
            raise InputError("eos_early_stop: its flags cannot follow resampled particles: leave it out")
        call |= {"eos_early_stop": False, "callback_on_step_end": self._on_step_end}
        call |= {"callback_on_step_end_tensor_inputs": ["block_x"]}
        prompt, template = call.get("prompt"), getattr(self.pipe.tokenizer, "chat_template", None)
        if isinstance(prompt, list) and template and call.get("use_chat_template", True):
            call |= self._templated(prompt, call)
        return super().__call__(**call)

    def _templated(self, prompts: list[str], call: dict[str, Any]) -> dict[str, Any]:
        """Return the ids of one prompt in the chat template for all rows: the pipeline takes a single prompt."""
        if len(set(prompts)) > 1:
            raise InputError("this pipeline takes one prompt in its chat template: give one prompt a call")
        ids, mask = self.pipe._prepare_input_ids(
            prompt=prompts[0],
            messages=None,
            input_ids=None,
            use_chat_template=True,
            add_generation_prompt=call.get("add_generation_prompt", True),
            chat_template_kwargs=None,
        )
        rows = len(prompts)
        return {"prompt": None, "input_ids": ids.expand(rows, -1), "attention_mask": mask.expand(rows, -1)}

    def after_step(self, given: dict[str, Any], output: Any) -> Any:
        """Keep the logits and the block until the pipeline has edited it."""
        self._given = given | {"sample": given["sample"].clone()}
        return output

    def _on_step_end(self, pipe: Any, step: int, t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        block_x, block = tensors["block_x"], self._given["sample"]
        before = torch.cat([block_x[:, : block_x.shape[1] - block.shape[1]], block], 1)
        mask_id = self._given["mask_token_id"]
        transition = self.transition(self.pipe.num_timesteps, self._given, before, block_x.clone(), mask_id)
        return {"block_x": self.override(transition, _Fields(prev_sample=transition.prev))["prev_sample"]}


class _Fields(dict[str, Any]):
    """Fields of a step, as diffusers' outputs have them."""

    __getattr__ = dict.__getitem__


class CanvasView(TokenView):
    """A view of DiffusionGemmaPipeline: canvases of tokens, denoised from random tokens, one after another.

    The pipeline keeps finished canvases and their cache of keys and values to itself. The cache is reordered with the
    particles; finished canvases are kept here, follow the ancestors, and replace those in the pipeline's output.
    """

    output_type = "seq"

    def __init__(self, pipe: Any, on_step: OnTokenStep, rows: int | None) -> None:
        super().__init__(pipe, on_step, rows)
        self._finished: Tensor | None = None  # canvases before the current one (N, …)
        self._canvas: Tensor | None = None
        self._cache: Any = None
        model = pipe.model

        def denoise(*args: Any, **kwargs: Any) -> Any:
            self._cache = kwargs.get("past_key_values")
            return model(*args, **kwargs)

        vars(self.pipe)["model"] = ModuleProxy(model, denoise)

    def __call__(self, **call: Any) -> Any:
        """Call the pipeline without adaptive stopping. Raises InputError if the call requests adaptive stopping."""
        for name in ("eos_early_stop", "confidence_threshold", "callback_on_step_end"):
            if call.get(name):
                raise InputError(f"{name}: what it keeps cannot follow resampled particles: leave it out")
        output = super().__call__(**call | {"eos_early_stop": False, "confidence_threshold": None})
        assert self._finished is not None and self._canvas is not None, "stepped"
        output["sequences"] = torch.cat([self._finished, self._canvas], 1)
        return output

    def after_step(self, given: dict[str, Any], output: Any) -> Any:
        """Report the transition of the current canvas after the finished ones, and apply the override to both."""
        x, prev = given["sample"], output.prev_sample
        if self._finished is None:
            self._finished = x[:, :0]
        elif int(given["timestep"]) == 0 and self._canvas is not None:
            self._finished = torch.cat([self._finished, self._canvas], 1)
        x, prev = (torch.cat([self._finished, canvas], 1) for canvas in (x, prev))
        step = self.transition(self.pipe.num_timesteps, given, x, prev, None)
        output = self.override(step, output)
        self._canvas = output.prev_sample
        return output

    def follow(self, ancestors: Tensor, rows: int) -> None:
        """Take the rows `ancestors` of the scheduler's state, the finished canvases and the cache."""
        super().follow(ancestors, rows)
        assert self._finished is not None
        self._finished = self._finished[ancestors.to(self._finished.device)]
        self._cache.reorder_cache(ancestors)


VIEWS: dict[str, type[TokenView]] = {
    "MaskedDiffusionPipeline": TokenView,
    "LLaDA2Pipeline": BlockView,
    "DiffusionGemmaPipeline": CanvasView,
    "AmusedPipeline": ImageTokenView,
}


def view_class(pipe: Any) -> type[TokenView]:
    """Return the kind of view of a token pipeline. Raises InputError for an unknown one."""
    kind = next((VIEWS[cls.__name__] for cls in type(pipe).__mro__ if cls.__name__ in VIEWS), None)
    if kind is None:
        raise InputError(f"{type(pipe).__name__} cannot be steered over tokens: use one of {', '.join(VIEWS)}")
    return kind
