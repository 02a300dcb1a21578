"""Layouts of LoRA files: diffusers' own, and kohya's for ComfyUI and A1111. Diffusers' converters give the names.

diffusers  unet.down_blocks.0.….to_q.lora_A.weight, with peft's options in the file's metadata
kohya      lora_unet_down_blocks_0_…_to_q.lora_down.weight, with lora_unet_….alpha, where the scale is alpha/rank; the
           norms of a DoRA as lora_unet_….dora_scale (LyCORIS with wd_on_out)
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.loaders import FluxLoraLoaderMixin, StableDiffusionLoraLoaderMixin
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya, convert_unet_state_dict_to_peft
from safetensors.torch import save_file
from torch import Tensor

from steer.errors import InputError
from steer.files import atomic_write
from steer.training.trainable import DORA, LORA_FILES, MAGNITUDE, read_lora

DOWN, ALPHA = ".lora_down.weight", ".alpha"
SDXL_BLOCKS = SimpleNamespace(layers_per_block=2)  # the UNet configuration by which kohya numbers blocks
WRITERS = {"unet": StableDiffusionLoraLoaderMixin, "transformer": FluxLoraLoaderMixin}


def convert_lora(source: str | Path, out: str | Path) -> Path:
    """Convert a LoRA file from diffusers' layout to kohya's or the reverse; return the written file.

    source  a folder such as RUN/final, or a .safetensors file: the adapter of a UNet or of a Flux transformer
    out     a .safetensors file for kohya's layout, or a folder for diffusers' (`load_lora_weights`, `init_adapter`)

    Raises InputError for another file, for adapters of text encoders, and for ranks or scales that differ by layer.
    """
    state, stated = read_lora(str(source), "LoRA")
    out = Path(out)
    if any(name.endswith(DOWN) for name in state):
        return _write_diffusers(*to_diffusers(state), out)
    if out.suffix != ".safetensors":
        raise InputError(f"{out}: kohya's layout is one file: give it a name that ends in .safetensors")
    tensors = to_kohya(state, stated)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as new:
        save_file(tensors, new, metadata={"ss_network_module": "networks.lora"})
    return out


def read_as_kohya(source: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a LoRA of either layout under kohya's names. Raises InputError as `convert_lora` does."""
    state, stated = read_lora(str(source), "LoRA")
    return state if any(name.endswith(DOWN) for name in state) else to_kohya(state, stated)


def to_kohya(state: Mapping[str, Tensor], stated: Mapping[str, Any]) -> dict[str, Tensor]:
    """Rename the tensors of diffusers' layout as kohya does. Raises InputError where kohya has no names for them.

    stated  options of peft: lora_alpha (by default the rank), use_rslora
    """
    ranks = {len(value) for name, value in state.items() if name.endswith(".lora_A.weight")}
    flux = any(".single_transformer_blocks." in name for name in state)
    denoiser = "transformer" if flux else "unet"
    if odd := [name for name in state if not name.startswith(f"{denoiser}.")]:
        raise InputError(f"{odd[0]!r} has no name in kohya's layout: give the LoRA of a UNet or a Flux transformer")
    norms = {name.removesuffix(MAGNITUDE): value for name, value in state.items() if name.endswith(MAGNITUDE)}
    if len(ranks) != 1:
        raise InputError(f"the ranks of the layers must be equal, got {sorted(ranks)}: convert a LoRA of one rank")
    (rank,) = ranks
    alpha = float(stated.get("lora_alpha", rank)) * (math.sqrt(rank) if stated.get("use_rslora") else 1.0)
    factors = {name: value for name, value in state.items() if not name.endswith(MAGNITUDE)}
    converted = convert_state_dict_to_kohya(factors)  # assumes alpha = rank everywhere
    renamed = {f"lora_{name}" if flux else name: value for name, value in converted.items()}
    renamed |= {f"lora_{layer.replace('.', '_')}{DORA}": value[:, None] for layer, value in norms.items()}
    return {
        name: torch.tensor(alpha) if name.endswith(ALPHA) else value.contiguous() for name, value in renamed.items()
    }


def to_diffusers(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str, float]:
    """Rename the tensors of kohya's layout as diffusers does; also return the denoiser's name and alpha.

    Raises InputError for names that diffusers does not know, and for ranks or alphas that differ by layer.
    """
    ranks = {name.removesuffix(DOWN): len(value) for name, value in state.items() if name.endswith(DOWN)}
    scales = {(rank, float(state.get(f"{name}{ALPHA}", torch.tensor(rank)))) for name, rank in ranks.items()}
    if odd := [name for name in state if not name.startswith(("lora_unet_", "lora_transformer_"))]:
        raise InputError(f"{odd[0]!r} is not of a UNet or a Flux transformer, and only these are converted")
    if len(scales) != 1:
        raise InputError(f"ranks and alphas of the layers must be equal, got {sorted(scales)[:3]}: choose another LoRA")
    ((rank, alpha),) = scales
    flux = any(name.startswith("lora_transformer_") or "_double_blocks_" in name for name in state)
    # Diffusers multiplies the tensors of Flux by alpha/rank: it is set to 1 here, and alpha is written beside them.
    plain = {name: value for name, value in state.items() if not name.endswith((ALPHA, DORA))}
    plain |= {f"{name}{ALPHA}": torch.tensor(float(rank)) for name in ranks}
    converted, denoiser = _renamed(plain, flux), "transformer" if flux else "unet"
    if norms := {name.removesuffix(DORA): value for name, value in state.items() if name.endswith(DORA)}:
        converted |= _magnitudes(norms, plain, list(ranks), flux)
    return {name.removeprefix(f"{denoiser}."): value for name, value in converted.items()}, denoiser, alpha


def _renamed(plain: Mapping[str, Tensor], flux: bool) -> dict[str, Tensor]:
    """Rename factors with alphas as diffusers does. Raises InputError for names that diffusers does not know."""
    try:
        if flux:
            converted: dict[str, Tensor] = FluxLoraLoaderMixin.lora_state_dict(dict(plain))
            return converted
        converted, _ = StableDiffusionLoraLoaderMixin.lora_state_dict(dict(plain), unet_config=SDXL_BLOCKS)
        return dict(convert_unet_state_dict_to_peft(converted))
    except (ValueError, KeyError, AssertionError, IndexError) as error:
        raise InputError(f"diffusers does not know these names: {' '.join(str(error).split())[:160]}") from error


def _magnitudes(
    norms: Mapping[str, Tensor], plain: Mapping[str, Tensor], layers: Sequence[str], flux: bool
) -> dict[str, Tensor]:
    """Return the norms (out,) of a DoRA by diffusers' names; diffusers' converters of most models drop the norms.

    A layer's name is found by converting factors whose values are the number of the layer.
    Raises InputError for norms of inputs (LyCORIS without wd_on_out), for layers without norms, and for fused layers.
    """
    numbered = {name: value.float() for name, value in plain.items()}
    numbered |= {f"{name}{DOWN}": torch.full(plain[f"{name}{DOWN}"].shape, float(n)) for n, name in enumerate(layers)}
    result = {}
    for name, value in _renamed(numbered, flux).items():
        if name.endswith(".lora_A.weight"):
            layer = layers[int(value.flatten()[0])]
            outputs = len(plain[f"{layer}.lora_up.weight"])
            if layer not in norms or tuple(norms[layer].shape) != (outputs, 1):
                given = tuple(norms[layer].shape) if layer in norms else "none"
                raise InputError(f"{layer}{DORA} must be a norm for each output, ({outputs}, 1), got {given}")
            result[f"{name.removesuffix('.lora_A.weight')}{MAGNITUDE}"] = norms[layer].flatten()
    if len(result) != len(layers):
        raise InputError("a DoRA of fused layers, which diffusers splits, has no norms of their parts")
    return result


def _write_diffusers(state: dict[str, Tensor], denoiser: str, alpha: float, out: Path) -> Path:
    from peft import LoraConfig

    if out.suffix == ".safetensors":
        raise InputError(f"{out}: diffusers' layout is a folder with {LORA_FILES[0]}: give the name of a folder")
    layers, dora = sorted({name.rpartition(".lora_")[0] for name in state}), any(MAGNITUDE in name for name in state)
    rank = len(next(value for name, value in state.items() if name.endswith(".lora_A.weight")))
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers, use_dora=dora).to_dict()
    tensors = {name: value.contiguous() for name, value in state.items()}
    written = {f"{denoiser}_lora_layers": tensors, f"{denoiser}_lora_adapter_metadata": config}
    out.mkdir(parents=True, exist_ok=True)
    WRITERS[denoiser].save_lora_weights(out, **written)
    return out / LORA_FILES[0]
