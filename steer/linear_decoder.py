"""A linear map from latents to pixels, fitted while a run goes on: previews that cost next to nothing.

    D̂(z)_p = W Φ(z)_p + b        W, b = argmin Σ_p ‖W Φ(z)_p + b − Y_p‖² + ρ tr(ΦᵀΦ)/P ‖W‖²

Φ(z)_p  the (2r+1)² neighbourhood of latent site p, P numbers; Y_p the s × s × 3 pixels of that site by the full decoder
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from steer.errors import InputError
from steer.preview import Preview, check_image_vae, with_decode
from steer.stand_in import Output

RADIUS = 2
RIDGE = 1e-2


@dataclass(frozen=True)
class LinearDecoder:
    """z (N, C, h, w) → images (N, 3, s h, s w): a convolution, then pixels are put in their places.

    weight (3 s², C, 2r+1, 2r+1), bias (3 s²), fp32; computed in fp32, given in the precision of z. Beyond the edge the
    outermost latents are repeated.
    """

    weight: Tensor
    bias: Tensor

    def __call__(self, z: Tensor) -> Tensor:
        radius = self.weight.shape[-1] // 2
        scale = int((len(self.bias) // 3) ** 0.5)
        blocks = F.conv2d(padded(z.float(), radius), self.weight, self.bias)
        return F.pixel_shuffle(blocks, scale).to(z.dtype)


def padded(z: Tensor, radius: int) -> Tensor:
    """`radius` further latents on every side, like the outermost."""
    return F.pad(z, [radius] * 4, mode="replicate")


class NormalEquations:
    """Sums over latent sites in float64: of ΦᵀΦ and ΦᵀY, with a last feature that is 1."""

    def __init__(self, radius: int = RADIUS, ridge: float = RIDGE) -> None:
        self.radius, self.ridge = radius, ridge
        self._gram: Tensor | None = None
        self._moment: Tensor | None = None
        self._channels, self._device = 0, torch.device("cpu")

    @torch.no_grad()
    def add(self, z: Tensor, images: Tensor) -> None:
        """Latents (N, C, h, w) and what the full decoder makes of them, (N, 3, s h, s w). Raises InputError."""
        scale, rest = divmod(images.shape[-1], z.shape[-1])
        if rest or images.shape[-2] != scale * z.shape[-2] or images.shape[1] != 3:
            raise InputError(
                f"preview='linear' needs a VAE that makes s × s pixels of each latent, this one made "
                f"{tuple(images.shape)} of {tuple(z.shape)}: use preview='full'"
            )
        self._channels, self._device = z.shape[1], z.device
        home = "cpu" if z.device.type == "mps" else z.device  # which has no float64
        z, images = z.to(home, torch.float64), images.to(home, torch.float64)
        features = F.unfold(padded(z, self.radius), 2 * self.radius + 1)  # (N, P, h w)
        rows = F.pad(features.movedim(1, 2).flatten(0, 1), (0, 1), value=1.0)
        blocks = F.pixel_unshuffle(images, scale).flatten(2).movedim(1, 2).flatten(0, 1)
        gram, moment = rows.T @ rows, rows.T @ blocks
        self._gram = gram if self._gram is None else self._gram + gram
        self._moment = moment if self._moment is None else self._moment + moment

    def solve(self) -> LinearDecoder:
        """The map that fits best of all that was added."""
        assert self._gram is not None and self._moment is not None
        size = len(self._gram) - 1
        penalty = self.ridge * self._gram.diagonal()[:size].mean()
        penalties = F.pad(penalty.expand(size), (0, 1))  # none for the bias
        solution = torch.linalg.solve(self._gram + penalties.diag(), self._moment).float().to(self._device)
        side = 2 * self.radius + 1
        return LinearDecoder(solution[:size].T.reshape(-1, self._channels, side, side).contiguous(), solution[size])


class LinearPreview:
    """As `steer.preview.Preview`, but only the first x̂0 are decoded by the pipeline's VAE; a linear map is fitted to
    them, which makes all later previews.

    decodes  images decoded by the pipeline's own VAE so far

    Raises InputError where the pipeline has no VAE of images.
    """

    def __init__(self, pipe: Any, call: Mapping[str, Any], chunk: int = 8) -> None:
        check_image_vae(pipe)
        watched = copy.copy(pipe)
        vars(watched)["vae"] = with_decode(pipe.vae, self._decode)
        self._preview = Preview(watched, call, chunk)
        self._vae, self._equations = pipe.vae, NormalEquations()
        self.decoder: LinearDecoder | None = None
        self.decodes = 0

    def __call__(self, x0: Tensor) -> Tensor:
        images = self._preview(x0)
        if self.decoder is None:
            self.decoder = self._equations.solve()
        return images

    def _decode(self, z: Tensor, *args: Any, **kwargs: Any) -> Output:
        if self.decoder is not None:
            return Output([self.decoder(z)])
        images: Tensor = self._vae.decode(z, *args, **kwargs)[0]
        self._equations.add(z, images)
        self.decodes += len(z)
        return Output([images])
