"""Training of scenes-flow: a flow-matching transformer in Stable Diffusion 3 format, its T5 left out."""

import math
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.models.attention_processor import Attention
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from steer.apps.scenes.training import (
    CHANNELS,
    Recipe,
    Scenes,
    build_tokenizer,
    learn_mean_images,
    new_mean_image,
    text_config,
)
from steer.training.supervised import TrainingRun

RECIPE = Recipe(width=96, layers=3)  # of both text encoders: the transformer reads the state before the last layer
WIDTH, LAYERS, HEADS = 128, 7, 4  # of the transformer
STEPS = 30_000
ZEROS = 256  # tokens of zeros that StableDiffusion3Pipeline puts in place of T5's


class OneZeroToken:
    """Joint attention in which the last context token stands for ZEROS equal ones, in training.

    Equal tokens without positions stay equal in all layers, so the result is that of all of them: a key that is there
    n times is one key with log n added to its scores.
    """

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: None = None
    ) -> tuple[Tensor, Tensor]:
        def heads(linear: torch.nn.Module, states: Tensor, norm: torch.nn.Module | None = None) -> Tensor:
            split = linear(states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            return split if norm is None else norm(split)

        latents, context = hidden_states, encoder_hidden_states
        query = [heads(attn.to_q, latents, attn.norm_q), heads(attn.add_q_proj, context, attn.norm_added_q)]
        key = [heads(attn.to_k, latents, attn.norm_k), heads(attn.add_k_proj, context, attn.norm_added_k)]
        value = [heads(attn.to_v, latents), heads(attn.add_v_proj, context)]
        count = latents.shape[1] + context.shape[1]
        scores = latents.new_zeros(count)
        scores[-1] = math.log(ZEROS)
        attended = torch.nn.functional.scaled_dot_product_attention(
            torch.cat(query, 2), torch.cat(key, 2), torch.cat(value, 2), attn_mask=scores.expand(count, count)
        )
        latents, context = attended.transpose(1, 2).flatten(2).split([latents.shape[1], context.shape[1]], 1)
        return attn.to_out[0](latents), context if attn.context_pre_only else attn.to_add_out(context)


def new_transformer() -> SD3Transformer2DModel:
    """A joint transformer of 64 latent tokens and the tokens of both text encoders."""
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=LAYERS,
        attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS,
        joint_attention_dim=2 * RECIPE.width,
        pooled_projection_dim=2 * RECIPE.width,
        caption_projection_dim=WIDTH,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """One of the two text encoders that the format has."""
    return CLIPTextModelWithProjection(text_config(tokenizer, RECIPE))


def encode_prompts(encoders: Sequence[CLIPTextModelWithProjection], ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return states (N, tokens + 1, 2·width) and pooled states (N, 2·width) as StableDiffusion3Pipeline does.

    The states before the last layer side by side, then one token of zeros in place of T5's.
    """
    outputs = [encoder(ids, output_hidden_states=True) for encoder in encoders]
    states = torch.cat([output.hidden_states[-2] for output in outputs], -1)
    pooled = torch.cat([output.text_embeds for output in outputs], -1)
    return torch.cat([states, torch.zeros_like(states[:, :1])], 1), pooled


def flow_loss(
    transformer: SD3Transformer2DModel, states: Tensor, pooled: Tensor, x0: Tensor, t: Tensor, noise: Tensor
) -> Tensor:
    """L = E ‖(ε − x0) − v̂((1 − σ) x0 + σ ε, 1000 σ, prompt)‖², σ = (t + 1)/1000 (arXiv 2403.03206, §2)."""
    sigma = ((t + 1) / 1000).view(-1, 1, 1, 1)
    x_t = (1 - sigma) * x0 + sigma * noise
    velocity = transformer(x_t, states, pooled, timestep=t + 1.0, return_dict=False)[0]
    return torch.nn.functional.mse_loss(velocity, noise - x0)


def train_flow(folder: Path, vae: AutoencoderKL, steps: int, decay: float = 0.25) -> StableDiffusion3Pipeline:
    """Train the transformer and both text encoders; folder/pipeline holds the averaged weights.

    decay  share of the steps over which the learning rate falls to 0 at the end
    """
    torch.manual_seed(0)
    tokenizer = build_tokenizer(folder / "tokenizer", whole_words=True)
    scenes = Scenes(folder.parent / "parts", vae, tokenizer, RECIPE)
    transformer, encoders = new_transformer(), [new_text_encoder(tokenizer) for _ in range(2)]
    mean_image = new_mean_image(2 * RECIPE.width)
    learn_mean_images(folder / "text", scenes, encoders, mean_image, lambda ids: encode_prompts(encoders, ids)[1])
    plain = transformer.attn_processors
    transformer.set_attn_processor(OneZeroToken())
    modules = torch.nn.ModuleList([transformer, *encoders, mean_image])

    def loss_at(step: int) -> Tensor:
        x0, ids, t, noise = scenes.noisy_batch(step)
        states, pooled = encode_prompts(encoders, ids)
        mean_loss = torch.nn.functional.mse_loss(mean_image(pooled), x0.flatten(1))
        return flow_loss(transformer, states, pooled, x0, t, noise) + mean_loss

    run = TrainingRun(folder, steps, RECIPE.learning_rate, save_every=500, decay=decay, average=RECIPE.average)
    run.train([modules], loss_at)
    transformer.set_attn_processor(plain)
    pipe = assemble(vae, transformer, encoders, tokenizer)
    pipe.save_pretrained(folder / "pipeline")
    return pipe


def assemble(
    vae: AutoencoderKL,
    transformer: SD3Transformer2DModel,
    encoders: Sequence[CLIPTextModelWithProjection],
    tokenizer: CLIPTokenizer,
) -> StableDiffusion3Pipeline:
    """Assemble a plain Stable Diffusion 3 pipeline without T5."""
    vae = deepcopy(vae)
    vae.register_to_config(shift_factor=0.0)  # which the pipeline adds to latents
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
