"""What decodes x̂0, by a word: full, linear, tiny, a folder, or a name on the hub."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny
from safetensors import SafetensorError

from steer.assets import TINY_VAES
from steer.errors import InputError
from steer.preview import check_decoder, check_image_vae
from steer.previews import PREVIEWS

TINY = "tiny"
SAID = 160  # characters of another library's message


def preview_named(word: str, pipe: Any) -> Any:
    """What `FKSteeringPipeline` takes as `preview`, for the latents of `pipe`, in its precision and on its device.

    word  full, linear, tiny (the embedded models' own small autoencoder), a folder of an AutoencoderTiny, or
          ORGANISATION/NAME of one on the hub, like madebyollin/taesdxl; only safetensors are read

    Raises InputError where there is none of that name, or its latents are not this model's.
    """
    if word in PREVIEWS:
        return word
    folder = TINY_VAES["scenes"] if word == TINY else Path(word)
    if not word or (not folder.is_dir() and (word.count("/") != 1 or word.startswith((".", "/", "~")))):
        known = ", ".join((*PREVIEWS, TINY))
        raise InputError(f"unknown preview {word!r}: use {known}, a folder, or ORGANISATION/NAME")
    check_image_vae(pipe)
    autoencoder = _loaded(word, folder if folder.is_dir() else word, pipe.vae.dtype)
    check_decoder(pipe, autoencoder)
    return autoencoder.to(pipe.vae.device, memory_format=torch.channels_last)  # in which convolutions are faster


def _loaded(word: str, source: str | Path, dtype: torch.dtype) -> AutoencoderTiny:
    try:
        loaded, about = AutoencoderTiny.from_pretrained(
            source, torch_dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:SAID] or type(error).__name__
        raise InputError(f"preview {word!r} cannot be loaded as an AutoencoderTiny: {reason}") from error
    if missing := about["missing_keys"]:  # diffusers fills them with random numbers
        raise InputError(f"preview {word!r} is not an AutoencoderTiny: its weights have no {sorted(missing)[0]}")
    return loaded.eval()
