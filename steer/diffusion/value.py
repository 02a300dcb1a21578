"""Learned values V(x_t) = E[r(x0) | x_t]: a small network on latents in place of the reward of x̂0 (arXiv 2404.09656).

Its inputs are x_t, x̂0 (computed by the run anyway), the noise level and the prompt. Intermediate rewards then cost no
decoding and no reward. With the terminal factor Feynman–Kac steering is exact for any V; a better V lowers variance.

A network has one head for each of several rewards. Conditional expectations are linear, so that the value of a weighted
sum of rewards is that of its heads:

    r = Σ_m w_m r_m    ⇒    V(x_t) = E[r(x0) | x_t] = Σ_m w_m V_m(x_t)
"""

import functools
import inspect
import itertools
import json
import logging
import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from steer.diffusion.schedules import step_levels
from steer.diffusion.step_hooks import SolverStep, scheduler_of
from steer.diffusion.views import denoising_modules
from steer.errors import InputError
from steer.files import atomic_write_with_checksums, verify_checksums

Value = Callable[[SolverStep, Sequence[str]], Tensor]  # a step and the prompt of each row → values (N,)

CONFIG, WEIGHTS = "value.json", "value.safetensors"
VERSION = 2  # of value.json
FINGERPRINT = "model_fingerprint"  # tensor stored beside the weights
MAX_FINGERPRINT_DISTANCE = 0.01  # relative; casts to half precision change the fingerprint by .002
SIDE = 32  # elements per side to which larger latents are averaged
BUCKETS, WORD, HIDDEN, FREQUENCIES = 4096, 64, 128, 8
MAX_LOG_RATIO = 8.0  # bound on log(σ/α)
MAX_WIDTH = 1024  # bounds the memory that a configuration can ask for
CALL = ("num_inference_steps", "guidance_scale")  # arguments of the pipeline's call that a value depends on
UNNAMED = "<lambda>"  # name that Python gives every anonymous function

logger = logging.getLogger(__name__)


class ValueNet(nn.Module):
    """Three convolutions, modulated (FiLM) by noise level and prompt. Buffers hold the scales of inputs and rewards.

    channels  channels of the features: twice the channels of the latents
    heads     number H of rewards
    """

    mean: Tensor
    std: Tensor
    reward: Tensor

    def __init__(self, channels: int, width: int = 64, heads: int = 1) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("std", torch.ones(channels, 1, 1))
        self.register_buffer("reward", torch.tensor([[0.0], [1.0]]).repeat(1, heads))  # means, standard deviations
        self.words = nn.EmbeddingBag(BUCKETS, WORD, mode="mean")
        self.condition = nn.Sequential(nn.Linear(2 * FREQUENCIES + WORD, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, HIDDEN))
        widths = (width, 2 * width, 2 * width)
        inputs = (channels + 2, *widths[:-1])  # and the coordinates of each element
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=1 if number == 0 else 2, padding=1)
            for number, (before, after) in enumerate(zip(inputs, widths, strict=True))
        )
        self.films = nn.ModuleList(nn.Linear(HIDDEN, 2 * one) for one in widths)
        self.head = nn.Sequential(nn.Linear(widths[-1] + HIDDEN, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, heads))

    def forward(self, features: Tensor, log_ratio: Tensor, words: Sequence[Tensor]) -> Tensor:
        """Return values (N, H) in units of the rewards.

        features   (N, C, H, W) of `value_features`
        log_ratio  log(σ/α) of each row (N,)
        words      bucket numbers of each row's prompt (`hashed_words`)
        """
        rate = 2.0 ** torch.arange(FREQUENCIES, device=log_ratio.device) / 4
        angles = log_ratio[:, None].clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO) * rate
        lengths = torch.tensor([0, *(len(one) for one in words[:-1])]).cumsum(0)
        text = self.words(torch.cat([*words]).to(features.device), lengths.to(features.device))
        condition = self.condition(torch.cat([angles.sin(), angles.cos(), text], 1))
        x = torch.cat([(features - self.mean) / self.std, _coordinates(features)], 1)
        for convolution, film in zip(self.convolutions, self.films, strict=True):
            scale, shift = film(F.silu(condition))[:, :, None, None].chunk(2, 1)
            x = F.silu(convolution(x) * (1 + scale) + shift)
        out: Tensor = self.head(torch.cat([x.mean((2, 3)), condition], 1))
        return self.reward[0] + self.reward[1] * out


def _coordinates(features: Tensor) -> Tensor:
    """Return the row and the column of each element, from −1 to 1: (N, 2, H, W)."""
    axes = [torch.linspace(-1, 1, size, device=features.device) for size in features.shape[2:]]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).expand(len(features), -1, -1, -1)


@functools.lru_cache(maxsize=4096)
def hashed_words(prompt: str) -> Tensor:
    """Return the bucket numbers (W,) of a prompt's words and pairs of neighbouring words; at least one."""
    words = re.findall(r"\w+", prompt.lower()) or [""]
    pairs = map(" ".join, itertools.pairwise(words))
    return torch.tensor([zlib.crc32(one.encode()) % BUCKETS for one in [*words, *pairs]])


def value_features(solver_step: SolverStep) -> tuple[Tensor, float]:
    """Return the features (N, 2C, H, W) of a step's particles, fp32, and log(σ/α).

    The features are x_t scaled to unit variance, x_t/√(α² + σ²), and x̂0. Tokens (N, L, C) and videos (N, C, F, H, W)
    become planes. Raises InputError for latents of another form.
    """
    (alpha, sigma), _ = step_levels(solver_step.scheduler, solver_step.t, solver_step.index)
    x = solver_step.x.float() / float((alpha**2 + sigma**2).sqrt())
    if x.dim() not in (3, 4, 5):
        raise InputError(f"value: latents of shape {tuple(x.shape)} are no images, tokens or videos: leave it out")
    planes = [_as_planes(one) for one in (x, solver_step.x0())]
    features = torch.cat(planes, 1)
    height, width = (min(size, SIDE) for size in features.shape[2:])
    log_ratio = math.log(max(float(sigma), 1e-12) / max(float(alpha), 1e-12))
    return F.adaptive_avg_pool2d(features, (height, width)), log_ratio


def _as_planes(latents: Tensor) -> Tensor:
    if latents.dim() == 3:
        return latents.transpose(1, 2).unsqueeze(3)
    return latents.flatten(2, 3) if latents.dim() == 5 else latents


class LearnedValue:
    """A trained `ValueNet` as a function Σ_m w_m V_m of solver steps and prompts, and its configuration.

    weights  w_m of each head; by default those of the reward that it was trained for
    """

    def __init__(self, net: ValueNet, config: Mapping[str, Any], weights: Sequence[float] | None = None) -> None:
        self.net, self.config = net.eval().requires_grad_(False), config
        self.weights = torch.tensor(weights or config.get("weights", [1.0]))

    def __call__(self, solver_step: SolverStep, prompts: Sequence[str]) -> Tensor:
        features, log_ratio = value_features(solver_step)
        if features.shape[1] != len(self.net.mean):
            raise InputError(
                f"value: trained on latents of {len(self.net.mean) // 2} channels, got {features.shape[1] // 2}: it is "
                "that of another model"
            )
        self.net.to(features.device)
        ratios = torch.full((len(features),), log_ratio, device=features.device)
        values: Tensor = self.net(features, ratios, [hashed_words(prompt) for prompt in prompts])
        return values @ self.weights.to(values)


def model_fingerprint(pipe: Any) -> Tensor:
    """Return one number of each weight of the denoisers, without LoRA adapters: equal in any precision up to rounding.

    Raises InputError for a model whose weights are not in memory.
    """
    numbers = []
    for module in denoising_modules(pipe).values():
        for name, weight in sorted(module.named_parameters()):
            if "lora_" not in name and weight.is_floating_point():
                if weight.is_meta:
                    raise InputError("value: the weights of the denoiser are offloaded: use enable_model_cpu_offload()")
                numbers.append(weight.detach().flatten()[weight.numel() // 2].float().cpu())
    return torch.stack(numbers) if numbers else torch.zeros(0)


def check_model(fingerprint: Tensor, pipe: Any, path: object) -> None:
    """Raise InputError where a value was trained on another model than the model of `pipe`."""
    own = model_fingerprint(pipe)
    same = own.shape == fingerprint.shape
    if not same or (own - fingerprint).norm() > MAX_FINGERPRINT_DISTANCE * fingerprint.norm():
        raise InputError(f"value {path}: trained on another model than this {type(pipe).__name__}: train one for it")


def use_of(pipe: Any, call: Mapping[str, Any]) -> dict[str, Any]:
    """Return the steps, the guidance and the scheduler of a call of `pipe`, with the pipeline's own defaults."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    defaults = {name: parameters[name].default for name in CALL if name in parameters}
    own = {name: call.get(name, default) for name, default in defaults.items()}
    return own | {"scheduler": type(scheduler_of(pipe)).__name__}


def value_of_reward(value: Value, path: object, reward: str, terms: Mapping[str, float]) -> Value:
    """Return V = Σ_m w_m V_m of a reward, from the heads of a learned value; any other value is returned unchanged.

    reward  the reward's name: a head of this name is used alone
    terms   weights w_m by name of the reward's terms (`linear_terms`)

    Raises InputError for a term without a head. Where a name is missing on either side, that is logged as a warning.
    """
    if not isinstance(value, LearnedValue) or "heads" not in value.config:
        return value
    heads, label = value.config["heads"], "value" if path is value else f"value {path}"
    terms = {reward: 1.0} if reward in heads else terms
    trained, unnamed = ", ".join(map(repr, heads)), UNNAMED in terms
    if len(heads) == len(terms) == 1 and UNNAMED in (heads[0], reward):
        terms, unnamed = {heads[0]: next(iter(terms.values()))}, True
    elif missing := [name for name in terms if name not in heads]:
        kind = "trained for reward" if len(heads) == 1 else "has heads for the rewards"
        raise InputError(
            f"{label}: {kind} {trained}, got reward {missing[0]!r}: train one for it by `steer value train`"
        )
    if unnamed:
        warn_once(f"{label}: trained for reward {trained}, which cannot be compared with reward {reward!r}")
    return LearnedValue(value.net, value.config, [terms.get(name, 0.0) for name in heads])


def check_use(value: Value, path: object, pipe: Any, call: Mapping[str, Any]) -> None:
    """Log a warning where steps, guidance or the scheduler of a call are unlike those of a learned value's training."""
    if not isinstance(value, LearnedValue):
        return
    label = "value" if path is value else f"value {path}"
    before, now = value.config.get("use") or value.config.get("call") or {}, use_of(pipe, call)
    if other := [name for name, one in now.items() if before.get(name) not in (None, one)]:
        shown = ", ".join(f"{name} {before[name]}, got {now[name]}" for name in other)
        warn_once(f"{label}: trained with {shown}: it may rank badly there, train one for this call")


@functools.lru_cache(maxsize=1024)
def warn_once(message: str) -> None:
    """Log a warning, once in a process."""
    logger.warning("steer: %s", message)


def save_value(folder: Path, value: LearnedValue, fingerprint: Tensor) -> None:
    """Write value.safetensors, value.json and their checksums. Raises InputError where writing fails."""
    with atomic_write_with_checksums(folder, (WEIGHTS, CONFIG)) as new:
        state = {name: tensor.cpu().contiguous() for name, tensor in value.net.state_dict().items()}
        save_file(state | {FINGERPRINT: fingerprint}, new[WEIGHTS])
        new[CONFIG].write_text(json.dumps(value.config, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def load_value(value: Any, pipe: Any) -> Value:
    """Load the `value` of a call from a folder of `steer value train`; a function is returned unchanged.

    Raises InputError for a folder without a value, or with a value of another model than `pipe`.
    """
    if callable(value):
        function: Value = value
        return function
    if not isinstance(value, str | PathLike):
        raise InputError(f"value must be a folder of `steer value train`, or a function, got {type(value).__name__}")
    folder = Path(value)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        verify_checksums(folder / CONFIG, folder / WEIGHTS)
        state = load_file(folder / WEIGHTS)
        channels, width, heads = int(config["channels"]), int(config["width"]), len(config["heads"])
        version = config["version"]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"value {folder}: no learned value ({' '.join(str(error).split())[:120]})") from error
    if version != VERSION:
        raise InputError(f"value {folder}: {CONFIG} has version {version!r:.20}, not {VERSION}: train it again")
    if not (1 <= channels <= MAX_WIDTH and 1 <= width <= MAX_WIDTH):
        raise InputError(f"value {folder}: channels {channels} and width {width} are out of range")
    check_model(state.pop(FINGERPRINT, torch.zeros(0)), pipe, folder)
    net = ValueNet(channels, width, heads)
    try:
        net.load_state_dict(state)
        learned = LearnedValue(net, config)
        if len(learned.weights) != heads:
            raise ValueError("a head has no weight")
    except (RuntimeError, KeyError, ValueError, TypeError) as error:
        raise InputError(f"value {folder}: weights do not fit {CONFIG}; restore it from a copy") from error
    return learned
