"""Build a pipeline of the zoo from its entry in `cases.json`: classes, configurations and a call, with random weights.

The configurations are those of the tiny pipelines that diffusers tests itself with (Apache-2.0).
"""

import copy
import functools
import importlib
import inspect
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import torch
import transformers
from torch import nn

from zoo.texts import processor, tokenizer

CASES: dict[str, dict[str, Any]] = json.loads((Path(__file__).with_name("cases.json")).read_text())
STEPS = 4
WORDS = 700  # more than the tokens of the zoo's tokenizers


def build(name: str) -> Any:
    """Build the pipeline of a case, in evaluation mode and without a progress bar."""
    case = CASES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = {part: component(spec) for part, spec in case["components"].items()}
        for part in parts.values():
            if isinstance(part, nn.Module):
                part.eval().requires_grad_(True)
                _fill_zeros(part)
                _reduce_posterior_noise(part)
    _share_tokens(parts)
    pipe = imported(case["module"], case["pipeline"])(**parts)
    pipe.set_progress_bar_config(disable=True)
    for name, given in case.get("attributes", {}).items():  # sizes that the pipeline's code has for released weights
        setattr(pipe, name, [tuple(one) for one in given] if isinstance(given, list) else given)
    if case.get("tiling"):
        pipe.vae.enable_tiling()
    _shrink_references(case["module"])
    return pipe


def _shrink_references(module: str) -> None:
    """Let editing pipelines scale their reference images to 64² pixels, not to 1024²."""
    own = importlib.import_module(module)
    scale = getattr(own, "calculate_dimensions", None)
    if scale is not None and not hasattr(scale, "__wrapped__"):

        @functools.wraps(scale)
        def small(area: int, ratio: float) -> Any:
            return scale(min(area, 64**2), ratio)

        own.__dict__["calculate_dimensions"] = small


def imported(module: str, name: str) -> Any:
    """Return a class of diffusers by its module, or by its public name where it moved."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return getattr(diffusers, name)


def component(spec: Any) -> Any:
    """Build one component from its specification."""
    if spec is None:
        return None
    if isinstance(spec, list):
        return [component(one) for one in spec]
    for kind, make in MAKERS.items():
        if kind in spec:
            return make(spec)
    raise KeyError(f"no maker for {spec}")


def _diffusers(spec: Mapping[str, Any]) -> Any:
    cls = imported(spec["module"], spec["diffusers"])
    return cls.from_config(_with_tuples(cls, spec["config"]))


def _with_tuples(cls: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has lists only: a tuple where the class has a tuple by default."""
    parameters = inspect.signature(cls.__init__).parameters
    return {
        name: tuple(value)
        if isinstance(value, list) and name in parameters and isinstance(parameters[name].default, tuple)
        else value
        for name, value in config.items()
    }


def _transformers(spec: Mapping[str, Any]) -> Any:
    config = getattr(transformers, spec["cfg"])(**_with_words(spec["config"]))
    return imported(spec["module"], spec["transformers"])(config)


def _with_words(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fit the vocabulary of a text encoder to the zoo's tokenizers."""
    fitted: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            fitted[name] = _with_words(value)
        elif name == "vocab_size":
            fitted[name] = WORDS
        elif name.endswith("token_id") and isinstance(value, int):
            fitted[name] = min(value, WORDS - 1)
        else:
            fitted[name] = value
    return fitted


def _frontend(spec: Mapping[str, Any]) -> Any:
    return getattr(transformers, spec["frontend"])(**spec["config"])


def _nets(spec: Mapping[str, Any]) -> Any:
    return getattr(diffusers, spec["nets"])([component(one) for one in spec["of"]])


class SafetyChecker(nn.Module):
    """A safety checker like Cosmos': every text and every video is safe."""

    def __init__(self) -> None:
        super().__init__()
        self._device_tracker = nn.Parameter(torch.empty(0))

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")


MAKERS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "diffusers": _diffusers,
    "transformers": _transformers,
    "frontend": _frontend,
    "nets": _nets,
    "tokenizer": lambda spec: tokenizer(spec["tokenizer"], spec.get("length")),
    "processor": lambda spec: processor(spec["processor"]),
    "value": lambda spec: spec["value"],
    "checker": lambda spec: SafetyChecker(),
}


def _fill_zeros(module: nn.Module) -> None:
    """Give weights to layers that start at zero: a fresh ControlNet would say nothing."""
    for parameter in module.parameters():
        if parameter.dim() > 1 and parameter.is_floating_point() and not parameter.any():
            nn.init.normal_(parameter, std=0.1)


def _share_tokens(parts: Mapping[str, Any]) -> None:
    """Tell text encoders that read images which tokens of the zoo's tokenizers stand for them."""
    tokens = next((one for one in map(tokens_of, parts.values()) if one is not None), None)
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    names |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    for part in parts.values():
        config = getattr(part, "config", None)
        for name, token in names.items():
            if isinstance(part, transformers.PreTrainedModel) and tokens is not None and hasattr(config, name):
                setattr(config, name, tokens.convert_tokens_to_ids(token))


def tokens_of(part: Any) -> Any:
    """Return the tokenizer that a component is or has, else None."""
    own = getattr(part, "tokenizer", part)
    return own if isinstance(own, transformers.PreTrainedTokenizerFast) else None


@torch.no_grad()
def _reduce_posterior_noise(module: nn.Module) -> None:
    """Encode images almost without noise, as trained autoencoders do: σ = e^−15."""
    if not (hasattr(module, "encode") and hasattr(module, "decode") and hasattr(module, "encoder")):
        return
    convolutions = [one for one in module.encoder.modules() if isinstance(one, nn.Conv2d | nn.Conv3d)]
    last = getattr(module, "quant_conv", None) or (convolutions[-1] if convolutions else None)
    channels = getattr(module.config, "latent_channels", None) or getattr(module.config, "z_dim", None)
    if channels is None or not isinstance(last, nn.Conv2d | nn.Conv3d) or last.bias is None:
        return
    if last.out_channels in (2 * channels, channels + 1):  # LTX has one variance for all
        last.weight[channels:], last.bias[channels:] = 0.0, -30.0


@functools.cache
def cached(name: str) -> Any:
    """Return the pipeline of a case, built once."""
    return build(name)


def call_of(name: str) -> dict[str, Any]:
    """Return the arguments of a case's call for one prompt, new objects each time."""
    pipe_call = inspect.signature(imported(CASES[name]["module"], CASES[name]["pipeline"]).__call__).parameters
    draws = torch.Generator().manual_seed(7)
    call = {key: value(one, draws) for key, one in CASES[name]["call"].items() if key in pipe_call}
    if "num_inference_steps" in pipe_call:
        default = pipe_call["strength"].default if "strength" in pipe_call else 1
        strength = call.get("strength") or (default if isinstance(default, float) else 1)
        call["num_inference_steps"] = math.ceil(STEPS / strength)
    return copy.copy(call)


def value(spec: Any, draws: torch.Generator) -> Any:
    """Return one argument of a call."""
    if isinstance(spec, list):
        return [value(one, draws) for one in spec]
    if not isinstance(spec, dict):
        return spec
    if "dict" in spec:
        return {key: value(one, draws) for key, one in spec["dict"].items()}
    if "pil" in spec:
        width, height = spec["pil"]
        pixels = torch.rand((height, width, 3), generator=draws).numpy()
        return PIL.Image.fromarray((255 * pixels).astype(np.uint8)).convert(spec["mode"])
    if "ints" in spec:
        return torch.randint(spec["max"] + 1, spec["ints"], generator=draws).to(getattr(torch, spec["dtype"][6:]))
    if "uniform" in spec:
        return torch.rand(spec["uniform"], generator=draws)
    if "normal" in spec:
        return torch.randn(spec["normal"], generator=draws)
    if "array" in spec:
        return torch.rand(spec["array"], generator=draws).numpy().astype(spec["dtype"])
    raise KeyError(f"no value for {spec}")
