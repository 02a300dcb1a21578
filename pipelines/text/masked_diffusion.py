"""Text from a masked diffusion model: a diffusers pipeline over tokens."""

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import Generator, Tensor
from transformers import AutoTokenizer

from steer.diffusion.masked import MaskedKernel
from steer.diffusion.masked_denoiser import MaskedDenoiser
from steer.diffusion.subs_scheduler import SubsScheduler
from steer.errors import InputError
from steer.files import read_json

INDEX = "model_index.json"
MASK_TOKEN = "[MASK]"
SEQUENCE_TYPES = ("text", "ids")


def read_index(folder: str | PathLike[str]) -> dict[str, Any]:
    """Read the model_index.json of a folder; {} where there is none. Raises InputError for a damaged one."""
    path = os.path.join(folder, INDEX)
    return read_json(Path(path)) if os.path.isfile(path) else {}  # Path.is_file raises for a name that is too long


def pipeline_class(model: str | PathLike[str]) -> Any:
    """Return the class that loads a model: MaskedDiffusionPipeline for its folders, else diffusers' own choice."""
    name = read_index(model).get("_class_name")
    return MaskedDiffusionPipeline if name == MaskedDiffusionPipeline.__name__ else DiffusionPipeline


def left_out(model: str | PathLike[str]) -> dict[str, None]:
    """Return the components that a saved pipeline was built without, such as Stable Diffusion 3's T5.

    diffusers writes them as [null, null] and, unless they are optional, expects None for them when it loads.
    """
    return {name: None for name, value in read_index(model).items() if value == [None, None]}


@dataclass
class MaskedDiffusionOutput(BaseOutput):  # type: ignore[misc]  # diffusers has no types
    """Texts, or ids (N, L) int64."""

    texts: list[str] | Tensor


class MaskedDiffusionPipeline(DiffusionPipeline):  # type: ignore[misc]  # diffusers has no types
    """Continue or fill in texts by masked diffusion (MDLM, arXiv 2406.07524).

    pipe = MaskedDiffusionPipeline.from_pretrained(MODELS["scenes-text"])
    pipe("a red", generator=torch.Generator().manual_seed(0)).texts
    """

    model_cpu_offload_seq = "denoiser"
    denoiser: MaskedDenoiser
    tokenizer: Any
    scheduler: SubsScheduler

    def __init__(self, denoiser: MaskedDenoiser, tokenizer: Any, scheduler: SubsScheduler) -> None:
        super().__init__()
        self.register_modules(denoiser=denoiser, tokenizer=tokenizer, scheduler=scheduler)

    @property
    def mask_id(self) -> int:
        """The id of the masked token."""
        return int(self.scheduler.config.mask_token_id)

    def encode(self, prompt: str | Sequence[str], length: int | None = None) -> Tensor:
        """Tokenise prompts as the beginning of sequences (N, L), after the begin token; all else is masked.

        length  L in tokens; by default the model's own
        Raises InputError for a prompt that is too long, or contains words that are unknown to the model.
        """
        length = length or int(self.denoiser.config.model_length)
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        ids = torch.full((len(texts), length), self.mask_id, dtype=torch.long)
        for row, text in zip(ids, texts, strict=True):
            tokens = [*self._begin, *self._ids(text)]
            if len(tokens) > length:
                raise InputError(f"prompt {text!r:.80} has {len(tokens)} tokens, the model {length}: shorten it")
            if unknown := [token for token in tokens if token >= self.denoiser.config.vocab_size]:
                word = next((w for w in text.split() if unknown[0] in self._ids(w)), text)
                raise InputError(f"prompt {text!r:.80}: {word!r} is not in the vocabulary of this model: leave it out")
            row[: len(tokens)] = torch.tensor(tokens, dtype=torch.long)
        return ids.to(self._execution_device)

    @property
    def _begin(self) -> list[int]:
        """The begin token, if the tokenizer has one: models are trained with it, and it marks the first place."""
        begin = getattr(self.tokenizer, "bos_token_id", None)
        return [] if begin is None else [int(begin)]

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def decode(self, ids: Tensor) -> list[str]:
        """Return the texts of ids (N, L), without padding and masks."""
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def kernel(self, ids: Tensor, t: Tensor | float, denoiser: Callable[..., Any] | None = None) -> MaskedKernel:
        """Return p(z_s | z_t) at t for z_t = `ids` (N, L), with a graph where gradients are enabled.

        denoiser  called in place of the pipeline's own, as when accelerate has prepared it
        """
        return self.scheduler.kernel(self._logits(ids, t, denoiser or self.denoiser), t, ids)

    def _logits(self, ids: Tensor, t: Tensor | float, denoiser: Callable[..., Any]) -> Tensor:
        sigma = torch.full((len(ids),), -math.log(max(1 - float(t), 1e-5)), device=ids.device)
        logits: Tensor = denoiser(ids, sigma).sample
        return logits

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] = "",
        num_inference_steps: int = 20,
        generator: Generator | None = None,
        length: int | None = None,
        latents: Tensor | None = None,
        output_type: str = "text",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]] | None = None,
    ) -> MaskedDiffusionOutput | tuple[list[str] | Tensor]:
        """Draw one text for each prompt.

        prompt   beginning of the text, or a text that contains [MASK]; or a list of prompts
        length   tokens of a sequence; by default the model's own
        latents  ids (N, L) to start from, in place of the prompt
        output_type  text or ids
        callback_on_step_end  called with (pipe, step, t, {"latents": ids}); "latents" in its result replace the ids
        Raises InputError for prompts that do not fit.
        """
        if output_type not in SEQUENCE_TYPES:
            raise InputError(f"output_type must be one of {', '.join(SEQUENCE_TYPES)}, got {output_type!r}")
        ids = self.encode(prompt, length) if latents is None else latents.to(self._execution_device)
        self.scheduler.set_timesteps(num_inference_steps, device=ids.device)
        with self.progress_bar(total=num_inference_steps) as progress:
            for step, t in enumerate(self.scheduler.timesteps):
                logits = self._logits(ids, t, self.denoiser)
                (ids,) = self.scheduler.step(logits, t, ids, generator=generator, return_dict=False)
                if callback_on_step_end is not None:
                    ids = callback_on_step_end(self, step, t, {"latents": ids}).get("latents", ids)
                progress.update()
        self.maybe_free_model_hooks()
        texts = self.decode(ids) if output_type == "text" else ids
        return MaskedDiffusionOutput(texts) if return_dict else (texts,)

    @classmethod
    def from_mdlm(cls, model: str | Path, tokenizer: Any = "gpt2", opening: str = "independent") -> Self:
        """Load a checkpoint in the layout of kuleshov-group/mdlm-owt; its own Python code is never run.

        model      folder or hub name: config.json and model.safetensors
        tokenizer  folder or hub name of the tokenizer, to which [MASK] is added as the last token; or an object
        Raises InputError for a folder in another layout.
        """
        files = ["config.json", "model.safetensors"]
        folder = Path(model) if Path(model).is_dir() else Path(snapshot_download(str(model), allow_patterns=files))
        missing = [name for name in files if not (folder / name).is_file()]
        config = {} if missing else json.loads((folder / files[0]).read_text(encoding="utf-8"))
        if missing or config.get("model_type") != "mdlm":
            lacks = f"no {missing[0]}" if missing else f"model_type {config.get('model_type')!r}, not 'mdlm'"
            raise InputError(f"{model} is no MDLM checkpoint ({lacks}): use MaskedDiffusionPipeline.from_pretrained")
        known = MaskedDenoiser.__init__.__wrapped__.__annotations__
        with torch.device("meta"):
            denoiser = MaskedDenoiser(**{name: config[name] for name in known if name in config})
        weights = {name.removeprefix("backbone."): value for name, value in load_file(folder / files[1]).items()}
        try:
            denoiser.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:160]
            raise InputError(f"{model}: its weights are not those of its config.json ({reason})") from error
        if isinstance(tokenizer, str | Path):
            tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        if tokenizer.mask_token is None:
            tokenizer.add_special_tokens({"mask_token": MASK_TOKEN})
        mask_id = int(tokenizer.mask_token_id)
        if mask_id >= int(denoiser.config.vocab_size):
            raise InputError(f"{model} has {denoiser.config.vocab_size} tokens, its tokenizer's [MASK] is {mask_id}")
        return cls(denoiser.eval(), tokenizer, SubsScheduler(mask_id, opening))
