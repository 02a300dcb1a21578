"""Naive implementations, as in the published repositories: the baselines of `steer bench`.

Written from the published descriptions, for Stable Diffusion pipelines under solvers with one call per step.
Mathematics and random numbers equal those of `steer`, so the results are the same; naive code repeats computations.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Generator, Tensor
from torch.nn.functional import logsigmoid

from steer.diffusion.schedules import Gaussian, gaussian_transition, predict_x0, step_levels
from steer.diffusion.seeds import seeded_normal
from steer.errors import InputError
from steer.noise import Nesterov, clipped, prior_gradient
from steer.reward import Reward
from steer.smc.particles import FeynmanKac, Particles
from steer.training.rollout import Rows, Trajectories
from steer.training.trainable import Trainable


@torch.no_grad()
def naive_fk(
    pipe: Any,
    reward: Reward,
    prompt: str,
    size: int,
    algorithm: FeynmanKac,
    at: Sequence[int],
    generator: Generator,
    rng: Generator,
    steps: int,
    guidance: float,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Steer one prompt: images (K, 3, H, W) best first, rewards (1, K), and ancestors (1, K) at each evaluated step.

    All particles are decoded at once for every evaluation, converted to PIL images and back for the reward; at the end
    they are decoded for their rewards, and once more for the user.

    at         solver steps at which rewards are evaluated
    generator  draws the starting noise;  rng: draws resampling and the steps of copies
    """
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(steps)
    texts = _texts(pipe, [prompt], size)
    x = _noise(pipe, size, generator) * scheduler.init_noise_sigma
    particles, ancestors = Particles.start(1, size), []
    for k, t in enumerate(scheduler.timesteps):
        output = _guided(pipe, scheduler, x, t, texts, guidance)
        x_s = scheduler.step(output, t, x).prev_sample
        if k in at:
            x0 = predict_x0(scheduler, output, t, x, 0)
            reweighted = algorithm.reweight(particles, _rewards_via_pil(pipe, reward, prompt, x0)[None], k / steps)
            particles, drawn = algorithm.select(reweighted, rng)
            rows = torch.arange(size) if drawn is None else drawn[0]
            ancestors.append(rows[None])
            kernel = gaussian_transition(x[rows], x0[rows], *step_levels(scheduler, t, 0), 1.0)
            x_s = kernel.sample(rng).to(x_s.dtype)
        x = x_s
    rewards = _rewards_via_pil(pipe, reward, prompt, x)
    images = _decoded(pipe, x)
    VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(images))
    order = rewards.sort(descending=True, stable=True).indices
    return images[order], rewards[order][None], tuple(ancestors)


def _texts(pipe: Any, prompts: Sequence[str], copies: int) -> Tensor:
    """Encode the empty prompt and the prompts, (2·B·copies, L, C), for guidance in one batch."""
    conditional, empty = pipe.encode_prompt(list(prompts), pipe.device, copies, True)
    return torch.cat([empty, conditional])


def _noise(pipe: Any, rows: int, generator: Generator | list[Generator]) -> Tensor:
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    latents: Tensor = pipe.prepare_latents(
        rows, pipe.unet.config.in_channels, size, size, pipe.unet.dtype, pipe.device, generator
    )
    return latents / pipe.scheduler.init_noise_sigma


def _guided(pipe: Any, scheduler: Any, x: Tensor, t: Any, texts: Tensor, guidance: float) -> Tensor:
    """Return u + g (c − u), with u and c from one batch."""
    both = scheduler.scale_model_input(torch.cat([x, x]), t)
    u, c = pipe.unet(both, t, encoder_hidden_states=texts).sample.chunk(2)
    return u + guidance * (c - u)


def _decoded(pipe: Any, latents: Tensor) -> Tensor:
    images = pipe.vae.decode(latents.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor).sample
    return (images.float() / 2 + 0.5).clamp(0, 1)


def _rewards_via_pil(pipe: Any, reward: Reward, prompt: str, latents: Tensor) -> Tensor:
    """Return the rewards (K,) of images converted to PIL and back."""
    pictures = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(_decoded(pipe, latents)))
    images = torch.stack([_from_pil(picture) for picture in pictures]).to(latents.device)
    return reward(images, [prompt] * len(images)).float().cpu()


def _from_pil(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def naive_reno(
    pipe: Any,
    reward: Reward,
    prompts: Sequence[str],
    noise: Tensor,
    iterations: int,
    rule: Nesterov,
    regularisation: float,
    longest: float,
) -> tuple[Tensor, Tensor]:
    """Optimise noise, encoding the text in every iteration. Returns noise (N, …) and the last rewards (N,)."""
    noise, velocity, rewards = noise.clone(), torch.zeros_like(noise), torch.zeros(len(noise))
    scheduler = copy.deepcopy(pipe.scheduler)
    for _ in range(iterations):
        scheduler.set_timesteps(1)
        t, leaf = scheduler.timesteps[0], noise.detach().requires_grad_(True)
        with torch.no_grad():
            text = pipe.encode_prompt(list(prompts), pipe.device, 1, False)[0]
        latents = leaf.to(pipe.unet.dtype) * scheduler.init_noise_sigma
        given = scheduler.scale_model_input(latents, t)
        output = pipe.unet(given, t, encoder_hidden_states=text).sample
        images = _decoded(pipe, scheduler.step(output, t, latents).prev_sample)
        rewards = reward(images, prompts)
        (gradient,) = torch.autograd.grad(rewards.sum(), leaf)
        uphill = clipped(gradient.float() + regularisation * prior_gradient(noise), longest)
        velocity = rule.momentum * velocity + uphill
        noise = noise + rule.lr * (uphill + rule.momentum * velocity)
    return noise, rewards.detach()


def naive_d3po(
    pipe: Any,
    trained: Trainable,
    stored: Trajectories,
    winners: Sequence[int],
    beta: float,
    guidance: float,
    eta: float,
) -> float:
    """Add the gradient of one D3PO update, a backward pass for each step, to the weights' .grad; return the loss.

    Rows 2b and 2b + 1 of `stored` are samples of prompt b, and winners[b], 0 or 1, is the better one. At every step
    the policy and the reference each evaluate the winners, and then the losers.
    """
    if len(stored.rows) != 2 * len(winners):
        raise InputError(f"{len(winners)} pairs have two samples each, got {len(stored.rows)}")
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(stored.latents.shape[1])
    better = [2 * b + winner for b, winner in enumerate(winners)]
    worse = [2 * b + 1 - winner for b, winner in enumerate(winners)]
    with torch.no_grad():
        texts = _texts(pipe, stored.rows.prompts[::2], 1)
        starts = [Generator().manual_seed(seed) for seed in stored.rows.starts]
        first = _noise(pipe, len(stored.rows), starts) * scheduler.init_noise_sigma
    places = torch.cat([first[:, None].cpu(), stored.latents], 1).to(pipe.device)  # x_t of step k, and x_s at k + 1

    def log_prob(k: int, rows: list[int]) -> Tensor:
        """Return log p(x_s | x_t) of step k, averaged over the elements."""
        x, t = places[rows, k].to(pipe.unet.dtype), scheduler.timesteps[k]
        output = _guided(pipe, scheduler, x, t, texts, guidance)
        x0 = predict_x0(scheduler, output, t, x, k)
        kernel = gaussian_transition(x, x0, *step_levels(scheduler, t, k), eta)
        return kernel.log_prob(places[rows, k + 1]) / x[0].numel()

    return sum(_d3po_step(log_prob, k, better, worse, trained, beta, stored) for k in stored.stochastic)


def _d3po_step(
    log_prob: Callable[[int, list[int]], Tensor],
    k: int,
    better: list[int],
    worse: list[int],
    trained: Trainable,
    beta: float,
    stored: Trajectories,
) -> float:
    """Return − log sigmoid(β (r̂ʷ − r̂ˡ)) of one step: its mean over pairs, as a share of the mean over steps."""
    policy = [log_prob(k, rows) for rows in (better, worse)]
    with torch.no_grad(), trained.reference():
        reference = [log_prob(k, rows) for rows in (better, worse)]
    win, lose = (new - old for new, old in zip(policy, reference, strict=True))
    loss = -logsigmoid(beta * (win - lose)).mean() / len(stored.stochastic)
    loss.backward()
    return loss.item()


def naive_policy_gradient(
    pipe: Any, rows: Rows, advantages: Tensor, clip: float, steps: int, guidance: float, eta: float
) -> float:
    """Make one update of DDPO or GRPO up to the optimiser's step.

    Draws samples, decodes them, and adds the gradient of the clipped objective to the weights' .grad, with a backward
    pass for each step; returns the loss. No reference policy is evaluated.

    advantages  (N,) of the rows, computed from rewards beforehand
    """
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(steps)

    def kernel(k: int, x: Tensor) -> Gaussian:
        t = scheduler.timesteps[k]
        x0 = predict_x0(scheduler, _guided(pipe, scheduler, x, t, texts, guidance), t, x, k)
        return gaussian_transition(x, x0, *step_levels(scheduler, t, k), eta)

    def log_prob(p: Gaussian, x_s: Tensor) -> Tensor:
        return p.log_prob(x_s) / x_s[0].numel()

    with torch.no_grad():
        texts = _texts(pipe, rows.prompts, 1)
        starts = [Generator().manual_seed(seed) for seed in rows.starts]
        places, old = [_noise(pipe, len(rows), starts) * scheduler.init_noise_sigma], []
        for k in range(steps):
            p = kernel(k, places[-1])
            noise = seeded_normal(rows.noises, p.mean, [f"step {k}"] * len(rows))
            places.append((p.mean + p.std * noise).to(places[0].dtype))
            old.append(log_prob(p, places[-1]) if p.std > 0 else None)
        _decoded(pipe, places[-1])
    weights, total = advantages.to(pipe.device), 0.0
    learned = [(k, before) for k, before in enumerate(old) if before is not None]
    for k, before in learned:
        ratio = (log_prob(kernel(k, places[k]), places[k + 1]) - before).exp()
        loss = torch.maximum(-weights * ratio, -weights * ratio.clamp(1 - clip, 1 + clip)).mean() / len(learned)
        loss.backward()
        total += loss.item()
    return total
