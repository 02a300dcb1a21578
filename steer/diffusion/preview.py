"""Previews: x̂0 → image, decoded by the pipeline itself, without code for any model family.

The pipeline is called again for one step, with proxies in place of its denoisers and a step hook that replaces the
latents by x̂0; its output is then the decoded x̂0.
"""

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import PIL.Image
import torch
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor, nn
from torch.nn import functional as F

from steer.diffusion.short_schedule import last_step_only
from steer.diffusion.step_hooks import SolverStep, hook_steps
from steer.diffusion.views import Output, with_components, with_decode, without_side_effects, zero_proxies
from steer.errors import InputError
from steer.registry import choose

SCHEDULED_STEPS = 4  # only one of them is run; the minimum of PNDM with its Runge-Kutta warm-up
# Arguments of the user's call that do not apply to decoding.
CALLBACK_ARGUMENTS = ("callback", "callback_steps", "callback_on_step_end", "callback_on_step_end_tensor_inputs")
EXCLUDED_ARGUMENTS = (
    *CALLBACK_ARGUMENTS,
    *("timesteps", "sigmas", "generator", "latents", "output_type", "return_dict", "num_inference_steps"),
    *("denoising_end", "guess_mode"),
)


def _in_chunks(decode: Callable[..., Any], chunk: int) -> Callable[..., Any]:
    """Wrap a VAE's decode to decode a few images at a time."""

    def chunked(z: Tensor, *args: Any, **kwargs: Any) -> Output:
        kwargs["return_dict"] = False
        return Output([torch.cat([decode(part, *args, **kwargs)[0] for part in z.split(chunk)])])

    return chunked


def _in_own_precision(decoder: Any) -> Callable[..., Any]:
    """Wrap a decoder to decode in its own precision, from a copy on the device of the latents."""
    copies = {decoder.device: decoder}

    def decode(z: Tensor, *args: Any, **kwargs: Any) -> Output:
        if z.device not in copies:
            copies[z.device] = copy.deepcopy(decoder).to(z.device)
        own = copies[z.device]
        return Output([own.decode(z.to(own.dtype), *args, **kwargs)[0].to(z.dtype)])

    return decode


class Preview:
    """Decoder for one call of `pipe`: from x̂0 (N, …), shaped like the latents, to images (N, 3, H, W) in [0, 1].

    `call` holds the arguments of the user's call; `chunk` images are decoded at a time. Decoding has its own random
    numbers, no safety checker (which would blacken images), no watermark, no callbacks and no progress bar; text is
    encoded once. With a `differentiable` pipeline, gradients flow from the images to x̂0.

    decoder  an autoencoder of diffusers, like AutoencoderTiny, in place of the pipeline's own. Latents are scaled as
             with `pipe.vae = decoder`: by the scaling_factor and shift_factor of its configuration
    decodes  images decoded by the pipeline's own VAE so far

    Raises InputError for a decoder that does not fit the pipeline.
    """

    def __init__(
        self, pipe: Any, call: "Mapping[str, Any] | Runner", chunk: int = 8, decoder: Any = None, shapes: Any = None
    ) -> None:
        self._call = call
        changed: dict[str, Any] = {"maybe_free_model_hooks": lambda: None} | zero_proxies(pipe, shapes)
        if decoder is not None:
            check_decoder(pipe, decoder)
            changed["vae"] = with_decode(decoder, _in_chunks(_in_own_precision(decoder), chunk))
        elif getattr(pipe, "vae", None) is not None:
            changed["vae"] = with_decode(pipe.vae, _in_chunks(pipe.vae.decode, chunk))
        if hasattr(getattr(pipe, "scheduler", None), "step"):
            changed["scheduler"] = last_step_only(pipe.scheduler)
        self._decoding_pipe = with_components(without_side_effects(pipe), changed)
        self._uses_own_vae = decoder is None
        self.decodes = 0

    def __call__(self, x0: Tensor) -> Tensor:
        self.decodes += len(x0) if self._uses_own_vae else 0

        def insert_x0(solver_step: SolverStep) -> tuple[None, Tensor]:
            return None, x0.to(solver_step.prev)

        needs_graph = torch.is_grad_enabled() and x0.requires_grad
        with torch.set_grad_enabled(needs_graph):
            if not isinstance(self._call, Mapping):
                return self._call.run(self._decoding_pipe, insert_x0, {}, change=short_call)
            with hook_steps(self._decoding_pipe, insert_x0, rows=len(x0)) as view:
                return first_output(view(**filter_call_kwargs(self._decoding_pipe, short_call(self._call))))


class Runner(Protocol):
    """The call of a pipeline for several rows (`steer.diffusion.rows.RowsCall`)."""

    def run(
        self,
        pipe: Any,
        on_step: Any,
        given: Mapping[str, Any],
        *,
        change: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None,
    ) -> Tensor: ...


def short_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a short run inside the user's call (`steer.diffusion.short_schedule`)."""
    kept = {name: value for name, value in call.items() if name not in EXCLUDED_ARGUMENTS}
    generator = torch.Generator().manual_seed(0)
    # Image-to-image runs all of them; an earlier stage does not change how given latents are decoded.
    own = {"num_inference_steps": SCHEDULED_STEPS, "prior_num_inference_steps": SCHEDULED_STEPS, "strength": 1.0}
    return kept | own | {"generator": generator, "output_type": "pt"}


def check_image_vae(pipe: Any) -> None:
    """Raise InputError for a pipeline without an image VAE, which another decoder could replace."""
    vae = getattr(pipe, "vae", None)
    if vae is None:
        raise InputError(f"{type(pipe).__name__} has no VAE to replace in previews: use preview='full'")
    if any(isinstance(layer, nn.Conv3d) for layer in vae.modules()):
        raise InputError(f"{type(pipe).__name__} decodes video, whose previews need its own VAE: use preview='full'")


def check_decoder(pipe: Any, decoder: Any) -> None:
    """Raise InputError for a decoder that cannot replace the pipeline's VAE."""
    if not (isinstance(decoder, nn.Module) and hasattr(decoder, "config") and hasattr(decoder, "decode")):
        raise InputError(
            "preview must be 'full', 'linear' or an autoencoder of diffusers, like AutoencoderTiny, got one of type "
            f"{type(decoder).__name__}"
        )
    check_image_vae(pipe)
    takes, given = (getattr(vae.config, "latent_channels", None) for vae in (decoder, pipe.vae))
    if takes != given:
        raise InputError(
            f"preview: {type(decoder).__name__} takes latents with {takes} channels, {type(pipe).__name__}'s have "
            f"{given}: use a decoder for this model (for SDXL madebyollin/taesdxl), or preview='linear'"
        )


def filter_call_kwargs(pipe: Any, call: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that the pipeline's `__call__` accepts."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    return {name: value for name, value in call.items() if name in parameters}


def first_output(output: Any) -> Tensor:
    """Return the images of a pipeline's output, whatever their field: (N, 3, H, W), or videos (N, F, 3, H, W).

    Pipelines without "pt" output give arrays (N, H, W, 3) or PIL images.
    """
    if isinstance(output, tuple):
        images = output[0]
    else:
        images = next(iter(output.values())) if isinstance(output, Mapping) else output.images
    return first_output(images) if isinstance(images, Mapping) else _as_tensor(images)  # of an inner pipeline


def _as_tensor(images: Any) -> Tensor:
    """Convert tensors, arrays with channels last, PIL images, or lists of any of these, to one tensor."""
    if torch.is_tensor(images):
        return images
    if isinstance(images, np.ndarray):
        tensor = torch.from_numpy(images)
        return tensor.movedim(-1, -3) if tensor.dim() > 3 else tensor  # waveforms have no channels last
    if isinstance(images, list | tuple) and not isinstance(images[0], PIL.Image.Image):
        return torch.stack([_as_tensor(one) for one in images])
    return VaeImageProcessor.numpy_to_pt(VaeImageProcessor.pil_to_numpy(images))


RADIUS = 2
RIDGE = 1e-2


@dataclass(frozen=True)
class LinearDecoder:
    """A linear map z (N, C, h, w) → images (N, 3, s h, s w): a convolution and a pixel shuffle.

    weight (3 s², C, 2r+1, 2r+1), bias (3 s²), fp32; computed in fp32, returned in the dtype of z. Borders are padded
    by replication.
    """

    weight: Tensor
    bias: Tensor

    def __call__(self, z: Tensor) -> Tensor:
        radius = self.weight.shape[-1] // 2
        scale = int((len(self.bias) // 3) ** 0.5)
        blocks = F.conv2d(padded(z.float(), radius), self.weight, self.bias)
        return F.pixel_shuffle(blocks, scale).to(z.dtype)


def padded(z: Tensor, radius: int) -> Tensor:
    """Pad `radius` latents on every side by replication."""
    return F.pad(z, [radius] * 4, mode="replicate")


class NormalEquations:
    """Sums ΦᵀΦ and ΦᵀY over latent sites in float64; the last feature is 1."""

    def __init__(self, radius: int = RADIUS, ridge: float = RIDGE) -> None:
        self.radius, self.ridge = radius, ridge
        self._gram: Tensor | None = None
        self._moment: Tensor | None = None
        self._channels, self._device = 0, torch.device("cpu")

    @torch.no_grad()
    def add(self, z: Tensor, images: Tensor) -> None:
        """Add latents (N, C, h, w) and their full decodings (N, 3, s h, s w). Raises InputError."""
        scale, rest = divmod(images.shape[-1], z.shape[-1])
        if rest or images.shape[-2] != scale * z.shape[-2] or images.shape[1] != 3:
            raise InputError(
                f"preview='linear' needs a VAE that decodes each latent to s × s pixels, this one decoded "
                f"{tuple(z.shape)} to {tuple(images.shape)}: use preview='full'"
            )
        self._channels, self._device = z.shape[1], z.device
        home = "cpu" if z.device.type == "mps" else z.device  # MPS has no float64
        z, images = z.to(home, torch.float64), images.to(home, torch.float64)
        features = F.unfold(padded(z, self.radius), 2 * self.radius + 1)  # (N, P, h w)
        rows = F.pad(features.movedim(1, 2).flatten(0, 1), (0, 1), value=1.0)
        blocks = F.pixel_unshuffle(images, scale).flatten(2).movedim(1, 2).flatten(0, 1)
        gram, moment = rows.T @ rows, rows.T @ blocks
        self._gram = gram if self._gram is None else self._gram + gram
        self._moment = moment if self._moment is None else self._moment + moment

    def solve(self) -> LinearDecoder:
        """Solve for the ridge regression of all added pairs."""
        assert self._gram is not None and self._moment is not None
        size = len(self._gram) - 1
        penalty = self.ridge * self._gram.diagonal()[:size].mean()
        penalties = F.pad(penalty.expand(size), (0, 1))  # none for the bias
        solution = torch.linalg.solve(self._gram + penalties.diag(), self._moment).float().to(self._device)
        side = 2 * self.radius + 1
        return LinearDecoder(solution[:size].T.reshape(-1, self._channels, side, side).contiguous(), solution[size])


class LinearPreview:
    """A `Preview` that decodes only the first x̂0 by the pipeline's VAE and fits a linear map for all later ones.

    decodes  images decoded by the pipeline's own VAE so far

    Raises InputError for a pipeline without an image VAE.
    """

    def __init__(self, pipe: Any, call: "Mapping[str, Any] | Runner", chunk: int = 8, shapes: Any = None) -> None:
        check_image_vae(pipe)
        pipe_view = copy.copy(pipe)
        vars(pipe_view)["vae"] = with_decode(pipe.vae, self._decode)
        self._preview = Preview(pipe_view, call, chunk, shapes=shapes)
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
    """A decoder x̂0 (N, …) → images (N, 3, H, W) in [0, 1]; `decodes` counts the images decoded by its own VAE."""

    decodes: int

    def __call__(self, x0: Tensor) -> Tensor: ...


PREVIEWS: dict[str, Callable[..., PreviewDecoder]] = {
    "full": Preview,  # the pipeline's own VAE
    "linear": LinearPreview,  # a linear map, fitted to that VAE's decoding of the first x̂0
}


def build_preview(
    preview: Any, pipe: Any, call: "Mapping[str, Any] | Runner", chunk: int, shapes: Any = None
) -> PreviewDecoder:
    """Build the previews of one call of `pipe`, decoded `chunk` at a time.

    preview  a name of PREVIEWS, or an autoencoder of diffusers for this model's latents, like AutoencoderTiny
    shapes   shapes of the denoisers' outputs, recorded in the run (`OutputShapes`)

    Raises InputError for an unknown name, a decoder that does not fit, or a pipeline without an image VAE.
    """
    if isinstance(preview, str):
        return choose("preview", preview, PREVIEWS)(pipe, call, chunk, shapes=shapes)
    return Preview(pipe, call, chunk, preview, shapes)
