"""Which decoder makes the images of x̂0 that rewards are read from."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

from steer.choices import choose
from steer.linear_decoder import LinearPreview
from steer.preview import Preview


class Previews(Protocol):
    """x̂0 (N, …) of a call → images (N, 3, H, W) in [0, 1]; `decodes`: how many of them its own VAE has decoded."""

    decodes: int

    def __call__(self, x0: Tensor) -> Tensor: ...


PREVIEWS: dict[str, Callable[[Any, Mapping[str, Any], int], Previews]] = {
    "full": Preview,  # the pipeline's own VAE
    "linear": LinearPreview,  # a linear map, fitted to what that VAE makes of the first x̂0
}


def new_preview(preview: Any, pipe: Any, call: Mapping[str, Any], chunk: int) -> Previews:
    """Previews of one call of `pipe`, decoded `chunk` at a time.

    preview  a name of PREVIEWS, or an autoencoder of diffusers for this model's latents, like AutoencoderTiny

    Raises InputError for an unknown name, a decoder that does not fit, or a pipeline that has no VAE of images.
    """
    if isinstance(preview, str):
        return choose("preview", preview, PREVIEWS)(pipe, call, chunk)
    return Preview(pipe, call, chunk, preview)
