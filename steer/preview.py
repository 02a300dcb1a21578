"""x̂0 → image, by the pipeline's own tail: no code for any model family.

The pipeline is called once more, for a few steps, with a denoiser that says nothing and a seam that puts x̂0
in place of the latents; what comes out is what the pipeline would make of x̂0.
"""

import copy
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from steer.quiet import quiet
from steer.seam import Event, steered
from steer.stand_in import Output, silences

FEWEST_STEPS = 4  # PNDM with its Runge-Kutta warm-up takes no fewer
# What the user asked of the run but not of its tail.
NOT_FOR_THE_TAIL = (
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


class Preview:
    """Decodes latents of a call of `pipe`: x̂0 (N, …), shaped like that call's latents, to (N, 3, H, W) in [0, 1].

    `call` are the arguments of the user's own call. `chunk`: images decoded at a time. The tail has its own
    random numbers, no safety checker (which would blacken images), no watermark, no callbacks and no progress bar;
    text is encoded once. Of a `differentiable` pipeline, x̂0 with a graph gives images with a graph.
    """

    def __init__(self, pipe: Any, call: Mapping[str, Any], chunk: int = 8) -> None:
        self._call = {name: value for name, value in call.items() if name not in NOT_FOR_THE_TAIL}
        # Image-to-image runs only the last `strength` of its steps: enough of them that one is left.
        self._call["num_inference_steps"] = max(FEWEST_STEPS, math.ceil(1 / (call.get("strength") or 1.0)) + 1)
        self._tail = quiet(pipe)
        changed: dict[str, Any] = {"maybe_free_model_hooks": lambda: None} | silences(pipe)
        if getattr(pipe, "vae", None) is not None:
            changed["vae"] = copy.copy(pipe.vae)
            vars(changed["vae"])["decode"] = _in_chunks(pipe.vae.decode, chunk)
        vars(self._tail).update(changed)

    def __call__(self, x0: Tensor) -> Tensor:
        def put_x0(event: Event) -> tuple[None, Tensor]:
            return None, x0.to(event.prev)

        own = {"generator": torch.Generator().manual_seed(0), "output_type": "pt"}
        recording = torch.is_grad_enabled() and x0.requires_grad
        with torch.set_grad_enabled(recording), steered(self._tail, put_x0, rows=len(x0)) as view:
            output = view(**accepted_only(self._tail, self._call | own))
        return first_output(output)


def accepted_only(pipe: Any, call: Mapping[str, Any]) -> dict[str, Any]:
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
