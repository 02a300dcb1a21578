"""What decodes x̂0, by a word: full, linear, tiny, a folder, or a name on the hub."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny
from safetensors import SafetensorError

from steer.assets import TINY_VAES
from steer.errors import InputError
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
    autoencoder = _loaded(word, TINY_VAES["scenes"] if word == TINY else Path(word))
    own = getattr(pipe, "vae", None)
    takes, given = (getattr(getattr(vae, "config", None), "latent_channels", None) for vae in (autoencoder, own))
    if takes != given:
        raise InputError(
            f"--preview {word}: made for latents of {takes} channels, those of this model have {given or 'none'}: use "
            "linear, full, or an AutoencoderTiny that was made for this model, like madebyollin/taesdxl for SDXL"
        )
    return autoencoder.to(own.device, own.dtype, memory_format=torch.channels_last)  # in which convolutions are faster


def _loaded(word: str, folder: Path) -> Any:
    if not folder.is_dir() and (word.count("/") != 1 or word.startswith((".", "/", "~"))):
        raise InputError(
            f"unknown preview {word!r}: use {', '.join((*PREVIEWS, TINY))}, a folder, or ORGANISATION/NAME"
        )
    try:
        loaded, about = AutoencoderTiny.from_pretrained(
            folder if folder.is_dir() else word, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:SAID] or type(error).__name__
        raise InputError(f"preview {word!r} cannot be loaded as an AutoencoderTiny: {reason}") from error
    if missing := about["missing_keys"]:  # diffusers fills them with random numbers
        raise InputError(f"preview {word!r} is not an AutoencoderTiny: its weights have no {sorted(missing)[0]}")
    return loaded.eval()
