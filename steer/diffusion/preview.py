"""x̂0 → image, by the pipeline's own tail: no code for any model family.

The pipeline is called once more, for a few steps, with a denoiser that says nothing and a seam that puts x̂0
in place of the latents; what comes out is what the pipeline would make of x̂0.
"""

import copy
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor, nn
from torch.nn import functional as F

from steer.diffusion.step_hooks import Output, SolverStep, hook_steps, without_side_effects, zero_proxies
from steer.errors import InputError
from steer.registry import choose

MIN_STEPS = 4  # PNDM with its Runge-Kutta warm-up takes no fewer
# What the user asked of the run but not of its tail.
EXCLUDED_ARGUMENTS = (
    "callback",
    "callback_steps",
    "callback_on_step_end",
    "callback_on_step_end_tensor_inputs",
    "timesteps",
    "sigmas",
    "generator",
    "latents",
    "output_type",
    "return_dict",
    "num_inference_steps",
    "denoising_end",
    "guess_mode",
)


def _in_chunks(decode: Callable[..., Any], chunk: int) -> Callable[..., Any]:
    """A VAE's decode, a few images at a time."""

    def chunked(z: Tensor, *args: Any, **kwargs: Any) -> Output:
        kwargs["return_dict"] = False
        return Output([torch.cat([decode(part, *args, **kwargs)[0] for part in z.split(chunk)])])

    return chunked


def _in_own_precision(decoder: Any) -> Callable[..., Any]:
    """A decoder's decode, in its own precision, wherever the latents are: a copy of it follows them."""
    copies = {decoder.device: decoder}

    def decode(z: Tensor, *args: Any, **kwargs: Any) -> Output:
        if z.device not in copies:
            copies[z.device] = copy.deepcopy(decoder).to(z.device)
        own = copies[z.device]
        return Output([own.decode(z.to(own.dtype), *args, **kwargs)[0].to(z.dtype)])

    return decode


class Preview:
    """Decodes latents of a call of `pipe`: x̂0 (N, …), shaped like that call's latents, to (N, 3, H, W) in [0, 1].

    `call` are the arguments of the user's own call. `chunk`: images decoded at a time. The tail has its own
    random numbers, no safety checker (which would blacken images), no watermark, no callbacks and no progress bar;
    text is encoded once. Of a `differentiable` pipeline, x̂0 with a graph gives images with a graph.

    decoder  an autoencoder as diffusers has them, like AutoencoderTiny, in place of the pipeline's own. The tail scales
             latents as it would with `pipe.vae = decoder`: by the scaling_factor and shift_factor of its configuration
    decodes  images decoded by the pipeline's own VAE so far

    Raises InputError for a decoder that cannot take the place of the pipeline's own.
    """

    def __init__(self, pipe: Any, call: Mapping[str, Any], chunk: int = 8, decoder: Any = None) -> None:
        self._call = {name: value for name, value in call.items() if name not in EXCLUDED_ARGUMENTS}
        # Image-to-image runs only the last `strength` of its steps: enough of them that one is left.
        self._call["num_inference_steps"] = max(MIN_STEPS, math.ceil(1 / (call.get("strength") or 1.0)) + 1)
        self._decoding_pipe = without_side_effects(pipe)
        changed: dict[str, Any] = {"maybe_free_model_hooks": lambda: None} | zero_proxies(pipe)
        if decoder is not None:
            check_decoder(pipe, decoder)
            changed["vae"] = with_decode(decoder, _in_chunks(_in_own_precision(decoder), chunk))
        elif getattr(pipe, "vae", None) is not None:
            changed["vae"] = with_decode(pipe.vae, _in_chunks(pipe.vae.decode, chunk))
        vars(self._decoding_pipe).update(changed)
        self._uses_own_vae = decoder is None
        self.decodes = 0

    def __call__(self, x0: Tensor) -> Tensor:
        self.decodes += len(x0) if self._uses_own_vae else 0

        def insert_x0(event: SolverStep) -> tuple[None, Tensor]:
            return None, x0.to(event.prev)

        own = {"generator": torch.Generator().manual_seed(0), "output_type": "pt"}
        needs_graph = torch.is_grad_enabled() and x0.requires_grad
        with torch.set_grad_enabled(needs_graph), hook_steps(self._decoding_pipe, insert_x0, rows=len(x0)) as view:
            output = view(**filter_call_kwargs(self._decoding_pipe, self._call | own))
        return first_output(output)


def with_decode(vae: Any, decode: Callable[..., Any]) -> Any:
    """A copy of an autoencoder on the same weights, with another decode."""
    other = copy.copy(vae)
    vars(other)["decode"] = decode
    return other


def check_image_vae(pipe: Any) -> None:
    """Raises InputError for a pipeline that has no VAE of images, which another decoder could stand in for."""
    vae = getattr(pipe, "vae", None)
    if vae is None:
        raise InputError(f"{type(pipe).__name__} has no VAE that previews could do without: use preview='full'")
    if any(isinstance(layer, nn.Conv3d) for layer in vae.modules()):
        raise InputError(f"{type(pipe).__name__} decodes video, and previews of it only by its own VAE: preview='full'")


def check_decoder(pipe: Any, decoder: Any) -> None:
    """Raises InputError for a decoder that cannot take the place of the pipeline's VAE."""
    if not (isinstance(decoder, nn.Module) and hasattr(decoder, "config") and hasattr(decoder, "decode")):
        raise InputError(
            "preview must be 'full', 'linear' or an autoencoder of diffusers, like AutoencoderTiny, got one of type "
            f"{type(decoder).__name__}"
        )
    check_image_vae(pipe)
    takes, given = (getattr(vae.config, "latent_channels", None) for vae in (decoder, pipe.vae))
    if takes != given:
        raise InputError(
            f"preview: {type(decoder).__name__} takes latents of {takes} channels, those of {type(pipe).__name__} have "
            f"{given}: use one that was made for this model (for SDXL madebyollin/taesdxl), or preview='linear'"
        )


def filter_call_kwargs(pipe: Any, call: Mapping[str, Any]) -> dict[str, Any]:
    """Those arguments that the pipeline's `__call__` knows."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    return {name: value for name, value in call.items() if name in parameters}


def first_output(output: Any) -> Tensor:
    """The images of a pipeline's output, whatever its fields are called: (N, 3, H, W), of a video (N, F, 3, H, W).

    Pipelines that know no "pt" give arrays (N, H, W, 3) or PIL images.
    """
    if isinstance(output, tuple):
        images = output[0]
    else:
        images = next(iter(output.values())) if isinstance(output, Mapping) else output.images
    if torch.is_tensor(images):
        return images
    arrays = images if isinstance(images, np.ndarray) else VaeImageProcessor.pil_to_numpy(images)
    return VaeImageProcessor.numpy_to_pt(arrays)


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
    """As `Preview`, but only the first x̂0 are decoded by the pipeline's VAE; a linear map is fitted to
    them, which makes all later previews.

    decodes  images decoded by the pipeline's own VAE so far

    Raises InputError where the pipeline has no VAE of images.
    """

    def __init__(self, pipe: Any, call: Mapping[str, Any], chunk: int = 8) -> None:
        check_image_vae(pipe)
        pipe_view = copy.copy(pipe)
        vars(pipe_view)["vae"] = with_decode(pipe.vae, self._decode)
        self._preview = Preview(pipe_view, call, chunk)
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


class PreviewDecoder(Protocol):
    """x̂0 (N, …) of a call → images (N, 3, H, W) in [0, 1]; `decodes`: how many of them its own VAE has decoded."""

    decodes: int

    def __call__(self, x0: Tensor) -> Tensor: ...


PREVIEWS: dict[str, Callable[[Any, Mapping[str, Any], int], PreviewDecoder]] = {
    "full": Preview,  # the pipeline's own VAE
    "linear": LinearPreview,  # a linear map, fitted to what that VAE makes of the first x̂0
}


def build_preview(preview: Any, pipe: Any, call: Mapping[str, Any], chunk: int) -> PreviewDecoder:
    """Previews of one call of `pipe`, decoded `chunk` at a time.

    preview  a name of PREVIEWS, or an autoencoder of diffusers for this model's latents, like AutoencoderTiny

    Raises InputError for an unknown name, a decoder that does not fit, or a pipeline that has no VAE of images.
    """
    if isinstance(preview, str):
        return choose("preview", preview, PREVIEWS)(pipe, call, chunk)
    return Preview(pipe, call, chunk, preview)
