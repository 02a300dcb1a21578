"""The denoiser of scenes and its text encoder, trained together on the autoencoder's latents."""

import json
import logging
import math
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel, compute_snr
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from steer.apps.scenes.autoencoder import CHANNELS, encode
from steer.apps.scenes.tokenizer import LENGTH, build_tokenizer
from steer.apps.scenes.world import captions, draw, random_scene
from steer.staged import staged
from steer.training import Run, read_state

logger = logging.getLogger(__name__)

PART = 4_000  # scenes drawn and encoded at a time
WORDINGS = 4  # captions kept of each scene
UNCONDITIONAL = 0.1  # share of prompts dropped, for classifier-free guidance


@dataclass(frozen=True)
class Recipe:
    """One way to train a denoiser; the pilot compares such."""

    channels: tuple[int, ...] = (64, 128)  # of the UNet's resolutions
    layers_per_block: int = 1
    width: int = 128  # of the text encoder
    layers: int = 2
    heads: int = 4
    scenes: int = 400_000  # different scenes, then they repeat with other captions
    whole_words: bool = True  # one token a word
    all_captions: bool = True  # any true wording of a scene, not the one it was drawn for
    batch: int = 64
    learning_rate: float = 1e-3
    min_snr: float | None = None  # γ of min-SNR weighting (arXiv 2303.09556)
    logit_normal: bool = False  # timesteps around the middle of the noise range more often (arXiv 2403.03206)
    average: float = 0.999  # decay of the averaged weights


RECIPES = {
    "scenes": Recipe(),
    "scenes-large": Recipe(channels=(128, 224), width=192, layers=3, heads=6),
}
_BASE = RECIPES["scenes"]
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


def new_denoiser(recipe: Recipe = RECIPES["scenes"]) -> UNet2DConditionModel:
    """8×8 and 4×4 latents, cross-attention at both."""
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


def new_text_encoder(tokenizer: CLIPTokenizer, recipe: Recipe = RECIPES["scenes"]) -> CLIPTextModel:
    """A few layers of CLIP's text transformer."""
    return CLIPTextModel(
        CLIPTextConfig(
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
    )


def token_ids(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    """Padded as diffusers pads: (N, LENGTH)."""
    return tokenizer(prompts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids


class Scenes:
    """Training scenes by number, drawn and encoded a part at a time and kept as files in `folder`.

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
            with staged(path) as new:
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


def timesteps(recipe: Recipe, count: int, generator: torch.Generator) -> Tensor:
    """Training timesteps (count,): uniform, or the sigmoid of a normal of mean 0.5."""
    if recipe.logit_normal:
        return (torch.sigmoid(0.5 + torch.randn(count, generator=generator)) * 1000).long().clamp(max=999)
    return torch.randint(1000, (count,), generator=generator)


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
    modules = torch.nn.ModuleList([new_denoiser(recipe), new_text_encoder(tokenizer, recipe)])
    average = EMAModel(modules.parameters())
    average.load_state_dict(saved["states"][-1])
    average.copy_to(modules.parameters())
    unet, text_encoder = modules
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
    empty = token_ids(tokenizer, [""])
    unet = new_denoiser(recipe).to(memory_format=torch.channels_last)
    text_encoder = new_text_encoder(tokenizer, recipe)
    modules, first = torch.nn.ModuleList([unet, text_encoder]), 0
    if start is not None:
        pipe = StableDiffusionPipeline.from_pretrained(start, dtype=torch.float32)
        unet.load_state_dict(pipe.unet.state_dict())
        text_encoder.load_state_dict(pipe.text_encoder.state_dict())
        first = json.loads((start / "training.json").read_text())["step"]
    average = EMAModel(modules.parameters(), decay=recipe.average, use_ema_warmup=True, power=0.75)
    average.optimization_step = first

    def loss_at(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        x0, ids = scenes.batch(step, generator)
        ids = torch.where(torch.rand(len(ids), 1, generator=generator) < UNCONDITIONAL, empty, ids)
        t, noise = timesteps(recipe, len(ids), generator), torch.randn(x0.shape, generator=generator)
        return velocity_loss(unet, text_encoder(ids)[0], x0, t, noise, recipe)

    run = Run(folder, steps, recipe.learning_rate, save_every=500, decay=decay, start=first, stop_after=seconds)
    run.train([modules], loss_at, after=average)
    average.copy_to(modules.parameters())
    pipe = assemble(vae, unet, text_encoder, tokenizer)
    pipe.save_pretrained(folder / "pipeline")
    return pipe


def assemble(
    vae: AutoencoderKL, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer
) -> StableDiffusionPipeline:
    """The parts as a plain Stable Diffusion pipeline."""
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
