"""Pairs of images of one prompt, of any origin, as training samples: latents are encoded once and cached."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import interpolate

from steer.diffusion.seeds import derived_seed
from steer.errors import InputError
from steer.files import atomic_write_with_checksums, read_image, verify_checksums
from steer.pipelines.training.config import TrainingConfig
from steer.pipelines.training.method import OnChunk, chosen_steps, process_shard, sampler_of, shuffled_at
from steer.pipelines.training.rollouts import RolloutBuffer, batch_order
from steer.rewards.preference_pairs import Pairs, read_pairs
from steer.training.distributed import DistributedContext
from steer.training.gradient import Batch
from steer.training.rollout import Rows, Sampler, Trajectories, blocks
from steer.training.trainable import Trainable

LATENTS, FOLDER = "latents.safetensors", "image-pairs"
CHECKED = 4  # number of images that are compared with their reconstruction


def read_image_pairs(table: Path, images: str | None = None) -> Pairs:
    """Read a table of pairs as `steer rewards train` does, without ties. Raises InputError where no pair is left."""
    pairs = read_pairs(table, None if images is None else Path(images))
    decided = [row for row, choice in enumerate(pairs.labels.choice.tolist()) if choice != 0.5]
    if not decided:
        raise InputError(f"{table}: no preferences to train on: all {len(pairs)} pairs are ties")
    return pairs.select(decided)


@dataclass(frozen=True)
class ImagePairs:
    """Pairs of images with the probability that the first is preferred.

    latents  (P, 2, …) clean latents of both images of each pair
    usable   the solver steps whose noise levels can be used
    digest   hash of images, prompts, labels and the autoencoder
    """

    pairs: Pairs
    latents: Tensor
    usable: tuple[int, ...]
    digest: str
    config: TrainingConfig

    @classmethod
    def of(cls, table: Path, pipe: Any, config: TrainingConfig, images: str | None = None) -> "ImagePairs":
        """Read a table, and encode its images in the size of the pipeline's images under the configuration.

        images  the folder that image paths are relative to; by default the table's folder

        Latents are kept in the run's folder, with a checksum. Raises InputError for images or labels that cannot be
        read, for a pipeline whose latents cannot be encoded, and for corrupt latents.
        """
        pairs = read_image_pairs(table, images)
        sampler = sampler_of(pipe, config)
        shape, example = sampler.sample(Rows(pairs.prompts[:1], (0,), (0,)), denoise=False)
        digest = _digest(pairs, example.shape, getattr(pipe, "vae", None))
        folder = Path(config.output_dir) / FOLDER / digest[:16]
        if (folder / LATENTS).exists():
            verify_checksums(folder / LATENTS)
            latents = load_file(folder / LATENTS)["latents"]
        else:
            latents = _encode_pairs(pipe, sampler, pairs, shape, example, config.micro_batch)
            with atomic_write_with_checksums(folder, [LATENTS]) as files:
                save_file({"latents": latents}, files[LATENTS])
        return cls(pairs, latents, shape.stochastic, digest, config)

    def config_dict(self) -> dict[str, Any]:
        """Return the plain values that determine the samples."""
        return {"preferences": f"{len(self.pairs)} pairs with the hash {self.digest[:16]}"}

    def collect(
        self, number: int, sampler: Sampler, trainable: Trainable, on_chunk: OnChunk, context: DistributedContext
    ) -> RolloutBuffer:
        """Collect the pairs of every update of a rollout, from a stream of shuffled passes over all of them.

        Both images of a pair get the same noise. Pairs have the table's order: the first image has the signal c.
        """
        config, size, updates = self.config, self.config.train_batch_size, self.config.steps_per_generation
        batches, metrics = [], []
        for update in range(number * updates, (number + 1) * updates):
            chosen = shuffled_at(update * size, size, len(self.pairs), config.seed)
            own = process_shard(range(size), context)
            chunks = self._chunks(chosen[own.start : own.stop], update, own.start)
            total = max(1, len(self.usable) - (config.skip_low_noise_steps or 0))
            steps = chosen_steps(total, config.timestep_fraction, config.seed, f"update {update}")
            choice = self.pairs.labels.choice[chosen].double()
            batches.append(Batch(chunks, [], steps, torch.stack([choice, 1 - choice], 1), total))
            metrics.append({"turn": update * size / len(self.pairs)})
        order = batch_order(len(batches), config.num_iterations, config.seed, number)
        rewards = tuple(batch.rewards for batch in batches)
        return RolloutBuffer(number, tuple(batches), rewards, tuple(metrics), order)

    def _chunks(self, chosen: Sequence[int], update: int, first: int) -> list[Trajectories]:
        """Return both images of each pair, pair after pair, in chunks for the denoiser."""
        seeds = [
            derived_seed(self.config.seed, f"update {update} pair {first + place}") for place in range(len(chosen))
        ]
        prompts = tuple(self.pairs.prompts[number] for number in chosen for _ in range(2))
        noises = tuple(seed for seed in seeds for _ in range(2))
        latents = self.latents[list(chosen)].flatten(0, 1)[:, None]
        none = torch.zeros(len(latents), len(self.usable))
        whole = Trajectories(Rows(prompts, noises, noises), latents, self.usable, none)
        return [whole.at(block) for block in blocks(range(len(latents)), self.config.micro_batch)]


def _digest(pairs: Pairs, shape: Sequence[int], vae: Any) -> str:
    digest = hashlib.sha256(repr((tuple(shape), pairs.prompts, pairs.labels.choice.tolist())).encode())
    if vae is not None:  # the same images have other latents by another autoencoder
        public = {name: value for name, value in vae.config.items() if not name.startswith("_")}  # no paths
        digest.update(repr(sorted(public.items())).encode())
        for name, value in vae.state_dict().items():
            digest.update(f"{name} {value.dtype}".encode())
            digest.update(value.cpu().flatten().view(torch.uint8).numpy())
    for source in (*pairs.a, *pairs.b):
        digest.update(hashlib.sha256(source if isinstance(source, bytes) else source.read_bytes()).digest())
    return digest.hexdigest()


def _encode_pairs(
    pipe: Any, sampler: Sampler, pairs: Pairs, shape: Trajectories, example: Tensor, chunk: int
) -> Tensor:
    """Return latents (P, 2, …) on the CPU. Raises InputError where the decoder does not reconstruct the images."""
    if example.dim() != 4:
        raise InputError(f"{type(pipe).__name__} makes no single images: Diffusion-DPO learns from images")
    sources = [source for pair in zip(pairs.a, pairs.b, strict=True) for source in pair]
    encoded = []
    for block in blocks(range(len(sources)), chunk):
        images = torch.cat([fit(read_image(sources[number])[None], example.shape[-2:]) for number in block])
        latents = encode(pipe, images, shape.latents.shape[2:])
        finite = latents.flatten(1).isfinite().all(1).tolist()
        if not all(finite):
            number = block[finite.index(False)] // 2
            raise InputError(
                f"{type(pipe).__name__} encodes an image of pair {number + 1} ({pairs.prompts[number]!r:.60}) to "
                "latents that are not finite: load its VAE in float32 or bfloat16"
            )
        if block.start == 0:
            _check_reconstruction(pipe, sampler, latents[:CHECKED], images[:CHECKED], pairs.prompts[0])
        encoded.append(latents.float().cpu())
    return torch.cat(encoded).unflatten(0, (len(pairs), 2)).contiguous()


def fit(image: Tensor, size: Sequence[int]) -> Tensor:
    """Resize an image (1, 3, H, W) so that it covers the size, and crop its centre."""
    height, width = size
    scale = max(height / image.shape[2], width / image.shape[3])
    if scale != 1:
        covering = [max(round(length * scale), wanted) for length, wanted in zip(image.shape[2:], size, strict=True)]
        image = interpolate(image, covering, mode="bilinear", antialias=True, align_corners=False)
    top, left = (image.shape[2] - height) // 2, (image.shape[3] - width) // 2
    return image[..., top : top + height, left : left + width]


@contextmanager
def _upcast(vae: Any) -> Iterator[None]:
    """Compute in fp32 within the block if a VAE overflows in half precision, as diffusers' pipelines encode images."""
    dtype = vae.dtype
    if getattr(vae.config, "force_upcast", False):
        vae.to(torch.float32)
    try:
        yield
    finally:
        vae.to(dtype)


@torch.no_grad()
def encode(pipe: Any, images: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the clean latents (N, …) of images (N, 3, H, W) in [0, 1], as the solver's last step returns them.

    shape  of one image's latents, or tokens where the pipeline packs them. Raises InputError if they cannot be encoded.
    """
    latents, vae = 2 * images - 1, getattr(pipe, "vae", None)
    if vae is not None:
        with _upcast(vae):
            posterior = vae.encode(latents.to(vae.device, vae.dtype))
        latents = posterior.latent_dist.mode() if hasattr(posterior, "latent_dist") else posterior.latents
        latents = (latents - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor
    if tuple(latents.shape[1:]) != tuple(shape) and hasattr(pipe, "_pack_latents"):
        latents = pipe._pack_latents(latents, *latents.shape)
    if tuple(latents.shape[1:]) != tuple(shape):
        raise InputError(
            f"{type(pipe).__name__}: images are encoded as latents of shape {tuple(latents.shape[1:])}, and its solver "
            f"has {tuple(shape)}: Diffusion-DPO does not support this pipeline"
        )
    return latents


def _check_reconstruction(pipe: Any, sampler: Sampler, latents: Tensor, images: Tensor, prompt: str) -> None:
    """Raise InputError where decoded latents are no closer to the images than the images' own mean colour."""
    count = len(latents)
    stored = Trajectories(
        Rows((prompt,) * count, (0,) * count, (0,) * count), latents[:, None], (), torch.zeros(count, 0)
    )
    decoded = sampler.decode(stored).cpu()
    error, spread = (decoded - images).square().mean(), (images - images.mean((2, 3), keepdim=True)).square().mean()
    if spread > 0 and not error < spread:
        raise InputError(
            f"{type(pipe).__name__} does not decode its encoded images to themselves (mean squared error {error:.3g}, "
            f"their variance is {spread:.3g}): use a pipeline with a trained VAE of its own scaling"
        )
