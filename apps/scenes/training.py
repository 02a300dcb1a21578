"""Training of the embedded model: drawn scenes, tokenizer, autoencoder, denoiser, and the pilot of recipes."""

import json
import logging
import math
import re
import time
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel, compute_snr
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from steer.apps.evaluation.run import evaluate
from steer.apps.evaluation.spec import Contender
from steer.apps.scenes.world import RIGHT, captions, draw, is_held_out, random_request, random_scene, requests_of
from steer.errors import InputError
from steer.files import atomic_write
from steer.rewards.scene import COLOURS, NUMBERS, PLURALS, RELATIONS, SHAPES, SceneRequest, SceneReward
from steer.training.overoptimization import interval as bootstrap
from steer.training.supervised import TrainingRun, batch_at, read_state


def training_scenes(count: int, first: int = 0) -> tuple[Tensor, list[str]]:
    """Scenes number first … first + count − 1: images (count, 3, 64, 64) uint8 and their prompts.

    Scene n depends on n alone, so that a resumed run, or one on another machine, sees the same data.
    """
    images, prompts = [], []
    for number in range(first, first + count):
        rng = np.random.default_rng(number)
        scene = random_scene(rng)
        images.append(draw(scene, rng))
        prompts.append(scene.prompt)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), prompts


WORDS = sorted({"and", *NUMBERS, *COLOURS, *SHAPES, *PLURALS, *" ".join(RELATIONS).split()})
LENGTH = 24  # tokens, start and end included


def _merges(word: str) -> list[tuple[str, str]]:
    """The merges that build one word letter by letter from the left."""
    letters = [*word[:-1], word[-1] + "</w>"]
    prefixes = ["".join(letters[:k]) for k in range(1, len(letters))]
    return list(zip(prefixes, letters[1:], strict=True))


def _segment(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """Split a word as byte-pair encoding does: merge the adjacent pair of lowest rank until none is left."""
    symbols = [*word[:-1], word[-1] + "</w>"]
    while pairs := [(ranks[pair], k) for k, pair in enumerate(pairwise(symbols)) if pair in ranks]:
        _, k = min(pairs)
        symbols[k : k + 2] = [symbols[k] + symbols[k + 1]]
    return symbols


def whole_word_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Merges under which every word is one token.

    Merges spelled from the left alone do not suffice: an earlier merge of another word splits "three" in three. A
    merge that is appended ranks last, so that words which are one token already stay so.
    """
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        while len(symbols := _segment(word, ranks)) > 1:
            ranks[symbols[0], symbols[1]] = len(ranks)
    return list(ranks)


def build_tokenizer(folder: Path, whole_words: bool = False) -> CLIPTokenizer:
    """Write vocab.json and merges.txt to `folder` and return the tokenizer they define.

    whole_words  one token a word; without it the merges of the first models, which split some words
    """
    alphabet = bytes_to_unicode().values()  # GPT-2's 256 printable characters for bytes
    spelled = list(dict.fromkeys(merge for word in WORDS for merge in _merges(word)))
    merges = whole_word_merges(WORDS) if whole_words else spelled
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *("".join(merge) for merge in merges)]
    tokens = list(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(merge) for merge in merges)]) + "\n")
    tokenizer = CLIPTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=LENGTH
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


CHANNELS = 8
BATCH = 16
SCENES = 20_000
FRESH = 10_000_000  # scenes from this number on are never trained on


def new_autoencoder() -> AutoencoderKL:
    """An autoencoder of four blocks, so that diffusers computes latents 8 times smaller than images."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def to_model(images: Tensor) -> Tensor:
    """Convert uint8 0..255 to float −1..1."""
    return (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def reconstruction_loss(vae: AutoencoderKL, images: Tensor, generator: torch.Generator) -> Tensor:
    """The loss of the images, and a small KL term."""
    posterior = vae.encode(images).latent_dist
    decoded = vae.decode(posterior.sample(generator=generator)).sample
    return image_loss(decoded, images) + 1e-5 * posterior.kl().mean()


def image_loss(decoded: Tensor, images: Tensor) -> Tensor:
    """Absolute and squared error of images −1..1, objects weighted five times the background."""
    error = decoded - images
    background = images.flatten(2).median(2).values[..., None, None]
    weight = 1 + 4 * ((images - background).abs().amax(1, keepdim=True) > 0.2)
    return (weight * (error.abs() + error**2)).mean()


def train_autoencoder(folder: Path, steps: int, device: str) -> AutoencoderKL:
    """Train, whiten and save the autoencoder to folder/vae."""
    torch.manual_seed(0)
    vae = new_autoencoder().to(device, memory_format=torch.channels_last)
    images, _ = training_scenes(SCENES)

    def loss_at(step: int) -> Tensor:
        batch = to_model(images[batch_at(step, BATCH, SCENES)]).to(device)
        return reconstruction_loss(vae, batch, torch.Generator(device).manual_seed(step))

    TrainingRun(folder, steps, learning_rate=2e-3).train([vae], loss_at)
    whiten(vae, encode(vae, images[:4000]))
    vae.save_pretrained(folder / "vae")
    return vae


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Means of the posterior (N, 8, 8, 8) on the CPU, of uint8 images."""
    chunks = images.split(100)
    return torch.cat([vae.encode(to_model(chunk).to(vae.device)).latent_dist.mean.cpu() for chunk in chunks])


@torch.no_grad()
def whiten(vae: AutoencoderKL, latents: Tensor) -> None:
    """Fold z ↦ W(z − m) into quant_conv and its inverse into post_quant_conv: channels of unit covariance.

    One scaling factor cannot do this: variances of raw channels differ a thousandfold, and the small
    ones, which noise would hide at every step, carry colours.
    """
    z = latents.movedim(1, -1).flatten(0, -2).double()
    mean, covariance = z.mean(0), torch.cov(z.T)
    values, vectors = torch.linalg.eigh(covariance)
    forward, backward = (vectors * values**power @ vectors.T for power in (-0.5, 0.5))
    quant, post = vae.quant_conv, vae.post_quant_conv
    half = CHANNELS  # quant_conv gives means, then log-variances, which sampling does not use after this
    weight, bias = quant.weight[:half, :, 0, 0].double().cpu(), quant.bias[:half].double().cpu()
    quant.weight[:half] = (forward @ weight)[..., None, None].to(quant.weight)
    quant.bias[:half] = (forward @ (bias - mean)).to(quant.bias)
    weight, bias = post.weight[:, :, 0, 0].double().cpu(), post.bias.double().cpu()
    post.weight.copy_((weight @ backward)[..., None, None])
    post.bias.copy_(bias + weight @ mean)
    quant.bias[half:] = -30.0  # the posterior's noise, of the old scale, is dropped
    quant.weight[half:] = 0.0


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Reconstruct uint8 images by the autoencoder: float (N, 3, 64, 64) in [0, 1]."""
    decoded = [vae.decode(z.to(vae.device)).sample.cpu() for z in encode(vae, images).split(100)]
    return (torch.cat(decoded) / 2 + 0.5).clamp(0, 1)


def autoencoder_accuracy(vae: AutoencoderKL, scenes: int = 2000) -> float:
    """Measure the share of fresh scenes whose reconstruction meets every requirement of its prompt."""
    images, prompts = training_scenes(scenes, first=FRESH)
    return float((SceneReward()(reconstruct(vae, images), prompts) == 1).float().mean())


logger = logging.getLogger(__name__)

PART = 4_000  # scenes drawn and encoded at a time
WORDINGS = 4  # captions kept of each scene
TEXT_BATCH = 250  # of the text encoder's own training
UNCONDITIONAL = 0.1  # share of prompts dropped, for classifier-free guidance


@dataclass(frozen=True)
class Recipe:
    """A recipe to train a denoiser; the pilot compares them."""

    channels: tuple[int, ...] = (64, 128)  # of the UNet's resolutions
    layers_per_block: int = 1
    width: int = 128  # of the text encoder
    layers: int = 2
    heads: int = 4
    scenes: int = 400_000  # different scenes, then they repeat with other captions
    whole_words: bool = True  # one token a word
    all_captions: bool = True  # any true wording of a scene, not the one it was drawn for
    batch: int = 64
    learning_rate: float = 7e-4
    text_steps: int = 5_000  # of the text encoder's own training, before the denoiser's
    min_snr: float | None = None  # γ of min-SNR weighting (arXiv 2303.09556)
    logit_normal: bool = False  # timesteps around the middle of the noise range more often (arXiv 2403.03206)
    tilt: float = 0.6  # timesteps are 1,000·u^tilt of uniform u: below 1 more of them have much noise
    average: float = 0.9995  # decay of the averaged weights


_BASE = Recipe()
PILOT = {
    "base": _BASE,
    "fixed": replace(_BASE, scenes=40_000, all_captions=False),
    "split-words": replace(_BASE, whole_words=False),
    "text-4": replace(_BASE, layers=4),
    "rate-2e-3": replace(_BASE, learning_rate=2e-3),
    "batch-32": replace(_BASE, batch=32),
    "min-snr": replace(_BASE, min_snr=5.0),
    "logit-normal": replace(_BASE, logit_normal=True),
    "wide": replace(_BASE, channels=(96, 160)),
}


def new_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule, with v-prediction."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def new_denoiser(recipe: Recipe = _BASE) -> UNet2DConditionModel:
    """A UNet of 8×8 and 4×4 latents with cross-attention at both."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=recipe.channels,
        layers_per_block=recipe.layers_per_block,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=recipe.width,
        attention_head_dim=8,
        norm_num_groups=16,
    )


def text_config(tokenizer: CLIPTokenizer, recipe: Recipe) -> CLIPTextConfig:
    """The configuration of a recipe's text encoder."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=4 * recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        max_position_embeddings=LENGTH,
        projection_dim=recipe.width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def new_text_encoder(tokenizer: CLIPTokenizer, recipe: Recipe = _BASE) -> CLIPTextModel:
    """A few layers of CLIP's text transformer."""
    return CLIPTextModel(text_config(tokenizer, recipe))


def token_ids(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    """Tokenize prompts, padded as in diffusers: (N, LENGTH)."""
    return tokenizer(prompts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids


class Scenes:
    """Training scenes by number, drawn and encoded a part at a time and stored as files in `folder`.

    Scene n depends on n alone, so that a resumed run, or one on another machine, sees the same data.
    """

    def __init__(self, folder: Path, vae: AutoencoderKL, tokenizer: CLIPTokenizer, recipe: Recipe) -> None:
        self.folder, self.vae, self.tokenizer, self.recipe = folder, vae, tokenizer, recipe
        self.part = lru_cache(maxsize=2)(self._part)

    def _part(self, number: int) -> tuple[Tensor, Tensor]:
        """Latents (PART, 8, 8, 8) and the tokens of WORDINGS captions (PART, WORDINGS, LENGTH)."""
        path = self.folder / f"part-{number}{'' if self.recipe.whole_words else '-split'}.safetensors"
        if not path.exists():
            images, texts = [], []
            for n in range(number * PART, (number + 1) * PART):
                rng = np.random.default_rng(n)
                scene = random_scene(rng)
                images.append(draw(scene, rng))
                own, *others = captions(scene)
                texts += [own, *rng.choice([own, *others], WORDINGS - 1).tolist()]
            latents = encode(self.vae, torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))
            tokens = token_ids(self.tokenizer, texts).view(PART, WORDINGS, LENGTH)
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as new:
                save_file({"latents": latents.half().contiguous(), "tokens": tokens.short()}, new)
        data = load_file(path)
        return data["latents"].float(), data["tokens"].long()

    def batch(self, step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Latents (B, 8, 8, 8) and tokens (B, LENGTH) at one step; each pass over a part has its own order."""
        size, parts = self.recipe.batch, math.ceil(self.recipe.scenes / PART)
        turn, at = divmod(step, PART // size)
        latents, tokens = self.part(turn % parts)
        rows = torch.randperm(PART, generator=torch.Generator().manual_seed(turn))[at * size : (at + 1) * size]
        wording = torch.randint(WORDINGS, (size,), generator=generator)
        return latents[rows], tokens[rows, wording if self.recipe.all_captions else torch.zeros_like(wording)]

    def noisy_batch(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Latents and tokens of one step, some of them of the empty prompt, with timesteps (B,) and noise."""
        generator = torch.Generator().manual_seed(step)
        x0, ids = self.batch(step, generator)
        dropped = torch.rand(len(ids), 1, generator=generator) < UNCONDITIONAL
        ids = torch.where(dropped, token_ids(self.tokenizer, [""]), ids)
        t = timesteps(self.recipe, len(ids), generator)
        return x0, ids, t, torch.randn(x0.shape, generator=generator)


def timesteps(recipe: Recipe, count: int, generator: torch.Generator) -> Tensor:
    """Training timesteps (count,): powers of uniform numbers, or the sigmoid of a normal of mean 0.5."""
    if recipe.logit_normal:
        return (torch.sigmoid(0.5 + torch.randn(count, generator=generator)) * 1000).long().clamp(max=999)
    return (torch.rand(count, generator=generator) ** recipe.tilt * 1000).long()


def new_mean_image(width: int) -> torch.nn.Sequential:
    """A small network from pooled states (N, width) to mean latents (N, 512)."""
    return torch.nn.Sequential(torch.nn.Linear(width, 256), torch.nn.GELU(), torch.nn.Linear(256, CHANNELS * 64))


def learn_mean_images(
    folder: Path,
    scenes: Scenes,
    encoders: Sequence[torch.nn.Module],
    mean_image: torch.nn.Module,
    pooled: Callable[[Tensor], Tensor],
) -> None:
    """Train text encoders to predict the mean latents of a prompt: min E ‖x0 − f(pooled state of the prompt)‖².

    A denoiser alone does not learn which of two objects is the left one: after 21,000 steps of batch 64 the loss of
    a prompt equalled that of its mirror image. From text to mean latents a step takes a tenth of the seconds. The
    denoiser's training keeps this loss: without it the text encoder had forgotten relations after 2,000 steps.
    """
    recipe = replace(scenes.recipe, batch=min(TEXT_BATCH, PART))
    larger = Scenes(scenes.folder, scenes.vae, scenes.tokenizer, recipe)

    def loss_at(step: int) -> Tensor:
        x0, ids = larger.batch(step, torch.Generator().manual_seed(step))
        return torch.nn.functional.mse_loss(mean_image(pooled(ids)), x0.flatten(1))

    TrainingRun(folder, recipe.text_steps, 1e-3, save_every=1000).train([*encoders, mean_image], loss_at)


def velocity_loss(
    unet: UNet2DConditionModel, states: Tensor, x0: Tensor, t: Tensor, noise: Tensor, recipe: Recipe
) -> Tensor:
    """L = E w(t) ‖v − v̂(α_t x0 + σ_t ε, t, prompt)‖², v = α_t ε − σ_t x0 (arXiv 2202.00512).

    w = 1, or min(SNR, γ)/(SNR + 1) (arXiv 2303.09556, §3.4 for v-prediction).
    """
    scheduler = new_scheduler()
    x_t = scheduler.add_noise(x0, noise, t).contiguous(memory_format=torch.channels_last)
    error = unet(x_t, t, states, return_dict=False)[0] - scheduler.get_velocity(x0, noise, t)
    losses = (error**2).mean((1, 2, 3))
    if recipe.min_snr is not None:
        snr = compute_snr(scheduler, t)
        losses = losses * snr.clamp(max=recipe.min_snr) / (snr + 1)
    return losses.mean()


def save_checkpoint(folder: Path, vae: AutoencoderKL, recipe: Recipe, to: Path) -> None:
    """Write the averaged weights of an unfinished training as a pipeline in half precision, and its step beside it.

    `train_denoiser(start=to)` continues from it on another machine, with new moments of the optimiser.
    """
    saved = read_state(folder / "state.pt", torch.device("cpu"))
    tokenizer = build_tokenizer(to / "tokenizer", recipe.whole_words)
    modules = torch.nn.ModuleList(
        [new_denoiser(recipe), new_text_encoder(tokenizer, recipe), new_mean_image(recipe.width)]
    )
    average = EMAModel(modules.parameters())
    average.load_state_dict(saved["states"][-1])
    average.copy_to(modules.parameters())
    unet, text_encoder, _ = modules
    assemble(deepcopy(vae).half(), unet.half(), text_encoder, tokenizer).save_pretrained(to)
    (to / "training.json").write_text(json.dumps({"step": saved["step"]}) + "\n")


def train_denoiser(
    folder: Path,
    vae: AutoencoderKL,
    recipe: Recipe,
    steps: int,
    decay: float = 0.25,
    seconds: float | None = None,
    start: Path | None = None,
) -> StableDiffusionPipeline:
    """Train the UNet and the text encoder; folder/pipeline holds the averaged weights.

    decay    share of the steps over which the learning rate falls to 0 at the end
    seconds  processor time after which the run saves its state and stops (None: after `steps`)
    start    a folder of `save_checkpoint` whose weights and step a run without a state begins with
    """
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(folder / "tokenizer", recipe.whole_words)
    scenes = Scenes(folder.parent / "parts", vae, tokenizer, recipe)
    text_encoder, mean_image = new_text_encoder(tokenizer, recipe), new_mean_image(recipe.width)
    learn_mean_images(folder / "text", scenes, [text_encoder], mean_image, lambda ids: text_encoder(ids).pooler_output)
    unet = new_denoiser(recipe).to(memory_format=torch.channels_last)
    modules, first = torch.nn.ModuleList([unet, text_encoder, mean_image]), 0
    if start is not None:
        pipe = StableDiffusionPipeline.from_pretrained(start, dtype=torch.float32)
        unet.load_state_dict(pipe.unet.state_dict())
        text_encoder.load_state_dict(pipe.text_encoder.state_dict())
        first = json.loads((start / "training.json").read_text())["step"]

    def loss_at(step: int) -> Tensor:
        x0, ids, t, noise = scenes.noisy_batch(step)
        text = text_encoder(ids)
        mean_loss = torch.nn.functional.mse_loss(mean_image(text.pooler_output), x0.flatten(1))
        return velocity_loss(unet, text.last_hidden_state, x0, t, noise, recipe) + mean_loss

    run = TrainingRun(folder, steps, recipe.learning_rate, save_every=500, decay=decay, average=recipe.average)
    replace(run, start=first, stop_after=seconds).train([modules], loss_at)
    pipe = assemble(vae, unet, text_encoder, tokenizer)
    pipe.save_pretrained(folder / "pipeline")
    return pipe


LARGE = 8  # layers of scenes-large's lowest resolution, in place of 1
LARGE_RATE = 5e-4


@torch.no_grad()
def deepened(unet: UNet2DConditionModel, layers: int) -> UNet2DConditionModel:
    """Copy a UNet of one layer per block with more at its lowest resolution, the further ones without effect as yet.

    In the last down block they follow the old layer. In the first up block they precede the layers of the old skip
    connections, and their shortcuts drop the new connections. Their last convolutions and projections are 0
    (Net2DeeperNet, arXiv 1511.05641), so that the function stays the same to rounding.
    """
    others = [1] * (len(unet.down_blocks) - 1)
    larger = UNet2DConditionModel.from_config({**unet.config, "layers_per_block": [*others, layers]})

    def moved(name: str) -> str:
        return re.sub(
            r"^up_blocks\.0\.(resnets|attentions)\.(\d+)",
            lambda match: f"up_blocks.0.{match[1]}.{int(match[2]) + layers - 1}",
            name,
        )

    larger.load_state_dict({moved(name): value for name, value in unet.state_dict().items()}, strict=False)
    down, up = larger.down_blocks[-1], larger.up_blocks[0]
    resnets = [*down.resnets[1:], *up.resnets[: layers - 1]]
    attentions = [*down.attentions[1:], *up.attentions[: layers - 1]]
    for layer in (*(resnet.conv2 for resnet in resnets), *(attention.proj_out for attention in attentions)):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    for resnet in up.resnets[: layers - 1]:  # of the state and a new skip connection, the state
        torch.nn.init.dirac_(resnet.conv_shortcut.weight)
        torch.nn.init.zeros_(resnet.conv_shortcut.bias)
    return larger


def train_large(folder: Path, model: Path, steps: int, layers: int = LARGE) -> StableDiffusionPipeline:
    """Train a deeper UNet that begins as that of `model`, with its text encoder; folder/pipeline has the averages."""
    torch.manual_seed(0)
    pipe = StableDiffusionPipeline.from_pretrained(model)
    vae, text_encoder, tokenizer = pipe.vae.eval(), pipe.text_encoder.eval(), pipe.tokenizer
    scenes = Scenes(folder.parent / "parts", vae, tokenizer, _BASE)
    unet = deepened(pipe.unet, layers).to(memory_format=torch.channels_last)

    def loss_at(step: int) -> Tensor:
        x0, ids, t, noise = scenes.noisy_batch(step)
        with torch.no_grad():
            states = text_encoder(ids).last_hidden_state
        return velocity_loss(unet, states, x0, t, noise, _BASE)

    TrainingRun(folder, steps, LARGE_RATE, decay=0.5, average=0.999).train([unet], loss_at)
    large = assemble(vae, unet, text_encoder, tokenizer)
    large.save_pretrained(folder / "pipeline")
    return large


def assemble(
    vae: AutoencoderKL, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer
) -> StableDiffusionPipeline:
    """Assemble a plain Stable Diffusion pipeline."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    )


CALL: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": 4.0}  # of all studies; chosen on scenes-tuning
DEVELOPMENT = 200  # requests with a relation; the held-out list has every held-out request of the other tasks
FIRST_PILOT_SCENE = 20_000_000  # scenes from this number on are never trained on


def development_requests() -> list[SceneRequest]:
    """Requests that neither training nor the held-out list contains."""
    reserved = {request.canonical for request in requests_of("scenes-heldout")}
    rng = np.random.default_rng(FIRST_PILOT_SCENE)
    drawn = dict.fromkeys(random_request(rng, "position") for _ in range(20_000))
    return [r for r in drawn if is_held_out(r) and r.canonical not in reserved][:DEVELOPMENT]


def interval(values: Tensor) -> list[float]:
    """Mean of (N,) values and its 95 % bootstrap interval over them, to four digits."""
    return [round(number, 4) for number in bootstrap(values.float())]


@torch.no_grad()
def validation_loss(pipe: StableDiffusionPipeline, requests: list[SceneRequest]) -> list[float]:
    """Unweighted v-loss of one scene of each request at 50 … 950 of 1,000 training timesteps, ten of them."""
    images = []
    for number, request in enumerate(requests):
        rng = np.random.default_rng(FIRST_PILOT_SCENE + number)
        images.append(draw(random_scene(rng, request), rng))
    x0 = encode(pipe.vae, torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))
    noise = torch.randn(x0.shape, generator=Generator().manual_seed(FIRST_PILOT_SCENE))
    states = pipe.text_encoder(token_ids(pipe.tokenizer, list(map(str, requests))))[0]

    def at(t: int) -> float:
        times = torch.full((len(x0),), t)
        return round(velocity_loss(pipe.unet, states, x0, times, noise, Recipe()).item(), 4)

    return [at(t) for t in range(50, 1000, 100)]


def beginning_with(names: Iterable[str], only: Sequence[str], kind: str) -> list[str]:
    """Return the names that begin with one of `only`, all if it is empty. Raises InputError where none does."""
    if not (chosen := [name for name in names if not only or name.startswith(tuple(only))]):
        raise InputError(f"--only {' '.join(only)}: no {kind} begins so; there are {', '.join(names)}")
    return chosen


def pilot(folder: Path, vae: AutoencoderKL, seconds: float, only: list[str]) -> None:
    """Train each recipe for so much processor time and append its figures to folder/pilot.jsonl.

    only  beginnings of the names of recipes; empty: all
    """
    names = beginning_with(PILOT, only, "recipe")
    requests = development_requests()
    sampling = {"steps": CALL["num_inference_steps"], "guidance": CALL["guidance_scale"]}
    for name in names:
        record: dict[str, Any] = {"recipe": name, "seconds": seconds}
        # steps far beyond: no decay, so that all stop at the constant rate
        pipe = train_denoiser(folder / name, vae, PILOT[name], 10**6, seconds=time.process_time() + seconds)
        log = [json.loads(line) for line in (folder / name / "log.jsonl").read_text().splitlines()]
        losses = validation_loss(pipe, requests)
        record |= {"steps": log[-1]["step"], "loss": round(float(np.mean(losses)), 4), "losses": losses}
        model, prompts, out = str(folder / name / "pipeline"), list(map(str, requests)), folder / name / "evaluation"
        report = evaluate([Contender(model)], prompts, [RIGHT], 2, out, sampling, batch=64)
        record["right"] = report["contenders"][0]["rewards"][RIGHT]["picked"]
        logger.info("%s", record)
        with (folder / "pilot.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
