"""Loading of pipelines (embedded, from folders, from files or from the hub) and of finetuned weights."""

import copy
import hashlib
import json
import logging
import math
import re
import sys
from _pickle import UnpicklingError  # the exception class alone
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from logging.handlers import BufferingHandler
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from steer.apps.components import LOAD_ERRORS, set_scheduler, set_vae
from steer.apps.methods import DisableAdapter
from steer.assets import ADAPTERS, MODELS, TEXT_MODELS
from steer.diffusion.lora_layers import adapter_disabler, lora_layers
from steer.diffusion.views import DENOISERS
from steer.errors import InputError
from steer.files import verify_checksums
from steer.pipelines.text.masked_diffusion import INDEX, left_out, pipeline_class, read_index
from steer.registry import nearest
from steer.tables import one_line
from steer.training.checkpoint import MANIFEST, Checkpoint
from steer.training.trainable import (
    ADAPTER,
    DORA,
    EMBEDDINGS,
    MAGNITUDE,
    SECOND_DENOISER,
    TOKEN_DENOISER,
    get_denoiser,
    get_denoisers,
    token_applied,
)

# Pipelines by prefix of the kind of checkpoint that diffusers infers from a single file.
SINGLE_FILE_PIPELINES = {
    "xl_base": "StableDiffusionXLPipeline",
    "xl_refiner": "StableDiffusionXLImg2ImgPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "flux-d": "FluxPipeline",
    "flux-s": "FluxPipeline",
    "v1": "StableDiffusionPipeline",
    "v2": "StableDiffusionPipeline",
}
WEIGHTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
# diffusion_pytorch_model.fp16.safetensors, model.fp16-00001-of-00002.safetensors
FILE = re.compile(r"[A-Za-z_0-9]+(\.(?P<variant>[A-Za-z]\w*))?(-\d+-of-\d+)?\.(safetensors|bin)")


def load_pipeline(
    model: str,
    device: str | None = None,
    dtype: str | None = None,
    *,
    variant: str | None = None,
    config: str | None = None,
    vae: str | None = None,
    scheduler: str | None = None,
    offload: str | None = None,
) -> Any:
    """Load a diffusers pipeline.

    A folder whose weights are all of one variant, such as *.fp16.safetensors, is loaded with that variant. A single
    file takes its configuration from a folder in diffusers' format beside it (its own folder, or a folder with its name
    without .safetensors), else from the published model of its kind, on the hub or in the hub's cache.

    model      name of an embedded model, folder in diffusers' format, single .safetensors file, or ORGANISATION/NAME
    device     by default the GPU if there is one
    dtype      float32, float16 or bfloat16; by default float32 on the CPU and bfloat16 elsewhere
    variant    variant of the weights, such as fp16; by default none, or the folder's only variant
    config     for a single file: a folder of such a model in diffusers' format, JSON files and tokenizer
    vae        autoencoder that replaces the model's own (`steer.apps.components.set_vae`)
    scheduler  solver that replaces the model's own (`steer.apps.components.set_scheduler`)
    offload    model or sequential: components, or layers, wait on the CPU while the GPU does not need them
    Raises InputError for a model that is missing or cannot be loaded. Code in a model folder is never run.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    check_device(device)
    source = _source(model)
    single = source if isinstance(source, Path) and source.is_file() else None
    if single and variant is not None:
        raise InputError(f"--variant {variant}: model {model!r} is a single file, which has none: leave it out")
    if config is not None and not (single and (Path(config) / INDEX).is_file()):
        problem = f"no {INDEX} in this folder" if single else f"model {model!r} is no single file: leave it out"
        raise InputError(f"--config {config}: {problem}")
    device = default_device(device)
    if offload is not None and is_cpu(device):
        raise InputError(f"--offload {offload}: it moves the model between GPU and CPU, and the device is {device}")
    with _load_errors(model):
        if single:
            pipe = _from_single_file(model, single, resolve_dtype(device, dtype), config)
        else:
            variant = _variant(source) if variant is None else variant
            pipe = pipeline_class(source).from_pretrained(
                source, dtype=resolve_dtype(device, dtype), variant=variant, **left_out(source)
            )
    if vae is not None:
        set_vae(pipe, vae)
    if scheduler is not None:
        set_scheduler(pipe, scheduler)
    if offload is None:
        return pipe.to(device)
    (pipe.enable_model_cpu_offload if offload == "model" else pipe.enable_sequential_cpu_offload)(device=device)
    return pipe


@contextmanager
def _load_errors(model: str) -> Iterator[None]:
    """Turn any error in the loading of a model into an InputError that names the model."""
    try:
        yield
    except InputError:
        raise
    except UnpicklingError as error:
        raise InputError(
            f"model {model!r} cannot be loaded: a file of its weights is corrupt or holds code, which is never run: "
            "use safetensors"
        ) from error
    except Exception as error:  # two libraries on untrusted files: their exceptions are not documented
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"model {model!r} cannot be loaded: {reason}") from error


def pipeline_type(model: str) -> type[Any] | None:
    """Return the class of a model's pipeline without loading it; None for a single file, or one on the hub.

    Raises InputError for a model that is missing or damaged.
    """
    import diffusers

    source = _source(model)
    if not isinstance(source, Path) or source.is_file():
        return None
    kind: type[Any] | None = getattr(diffusers, str(read_index(source).get("_class_name")), None)
    return kind


def _source(model: str) -> str | Path:
    """Resolve a model to a folder, a file, or a name on the hub. Raises InputError."""
    source = (MODELS | TEXT_MODELS).get(model, Path(model).expanduser())
    if source.is_dir():
        if not (source / INDEX).exists():
            raise InputError(f"model {model!r}: no {INDEX} in this folder; is it in diffusers' format?")
        return source
    if source.is_file():
        if source.suffix != ".safetensors":
            raise InputError(f"model {model!r}: a single file must be .safetensors: other formats may hold code")
        return source
    if model in (*MODELS, *TEXT_MODELS):
        raise InputError(f"model {model!r} is in the repository, not in the package: clone it and give its folder")
    if model.endswith(WEIGHTS) or model.startswith("~"):
        raise InputError(f"model {model!r}: no such file")
    if model.count("/") != 1 or model.startswith((".", "/")) or model.endswith("/"):
        raise InputError(
            f"unknown model {model!r}: use {nearest(model, MODELS | TEXT_MODELS)}, a folder, or ORGANISATION/NAME"
        )
    return model


def _variant(source: str | Path) -> str | None:
    """Return the variant of a component that has no plain weights, such as fp16; None if all have, or on the hub."""
    for component in sorted(path for path in source.iterdir() if path.is_dir()) if isinstance(source, Path) else ():
        result = [match["variant"] for path in component.iterdir() if (match := FILE.fullmatch(path.name))]
        if result and all(result):
            return str(sorted(set(result))[0])
    return None


def _from_single_file(model: str, file: Path, dtype: torch.dtype, given: str | None) -> Any:
    """Load a pipeline from a checkpoint in one file. Raises InputError."""
    import diffusers
    from diffusers.loaders.single_file_utils import (
        DIFFUSERS_DEFAULT_PIPELINE_PATHS,
        infer_diffusers_model_type,
        load_single_file_checkpoint,
    )

    places = (file.with_suffix(""), file.parent) if given is None else (Path(given),)
    beside = [folder for folder in places if (folder / INDEX).is_file()]
    if beside:
        name = str(read_index(beside[0]).get("_class_name"))
        config: dict[str, Any] = {"config": str(beside[0])}
        missing = ""
    else:
        kind = infer_diffusers_model_type(load_single_file_checkpoint(str(file), local_files_only=True))
        repository = DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"]
        name = next((cls for prefix, cls in SINGLE_FILE_PIPELINES.items() if kind.startswith(prefix)), "")
        config, missing = {}, f", and that of {repository} cannot be had from the hub"
    cls: Any = getattr(diffusers, name, None)
    remedy = f"give --config FOLDER of such a model in diffusers' format, or put it at {file.with_suffix('')}"
    if not hasattr(cls, "from_single_file"):
        raise InputError(f"model {model!r}: no configuration beside this {name or kind} checkpoint: {remedy}")
    try:
        return cls.from_single_file(str(file), dtype=dtype, local_files_only=bool(beside), **config)
    except OSError as error:
        raise InputError(f"model {model!r}: a single file needs a configuration{missing}: {remedy}") from error


def resolve_dtype(device: str, dtype: str | None) -> torch.dtype:
    """Resolve a dtype: by default float32 on the CPU and bfloat16 elsewhere."""
    number: torch.dtype = getattr(torch, dtype or ("float32" if is_cpu(device) else "bfloat16"))
    return number


def is_cpu(device: str | None) -> bool:
    """Return whether a device is the CPU, such as cpu or cpu:0; None is not."""
    return device is not None and torch.device(device).type == "cpu"


def default_device(device: str | None = None) -> str:
    """Resolve a device: by default the GPU if there is one, else the CPU."""
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def check_device(device: str | None) -> None:
    """Raise InputError for a device that is missing, or whose tensors hold no values."""
    if device is None:
        return
    try:
        if torch.empty(0, device=device).is_meta:
            raise InputError(f"--device {device!r} cannot be used: tensors have no values there; use cpu or cuda")
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {device!r} cannot be used: {str(error).splitlines()[0]}") from error


logger = logging.getLogger(__name__)

# Files that `steer finetune` writes: a LoRA of diffusers, one of peft, or all weights of the denoiser.
LORA, PEFT = "pytorch_lora_weights.safetensors", "adapter_model.safetensors"
FULL_WEIGHTS = "diffusion_pytorch_model*.safetensors"
CONFIGS = ("adapter_config.json", "config.json")
ADAPTER_NAME = "steer_finetuned"
# Keys of peft's configuration that the loader applies, and keys without effect on loaded tensors.
APPLIED_KEYS = (
    *("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora"),
    *("exclude_modules", "layers_to_transform", "layers_pattern"),
)
IGNORED_KEYS = (
    *("peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "task_type"),
    *("inference_mode", "lora_dropout", "runtime_config", "megatron_core", "qalora_group_size", "format"),
    *("eva_config", "corda_config", "lora_ga_config"),
)
PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")  # others also change the base weights
IMPORTING_KEYS = ("megatron_config",)  # some versions of peft import the module that megatron_core names
DOWN = tuple(f"{one}.weight" for one in (".lora_A", "lora_down", "lora.down", "lora_linear_layer.down"))
UP = tuple(f"{one}.weight" for one in (".lora_B", "lora_up", "lora.up", "lora_linear_layer.up"))
FACTORS = (*DOWN, *UP, MAGNITUDE)
KINDS = {  # part of a key: kind of adapter
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "lora_mid": "a LoCon with Tucker cores",
    "oft_": "OFT",
    "boft_": "BOFT",
    "lora_B.bias": "lora_bias",
    "lora_embedding": "a LoRA of an embedding",
}
MAX_SHOWN = 3  # keys listed in a message


@dataclass(frozen=True)
class FinetunedWeights:
    """Finetuned weights: `path` as the user gave it, their files (tensors first), and how to load them."""

    path: str
    files: tuple[Path, ...]
    load_adapter: Callable[[Any, Path, str], AbstractContextManager[DisableAdapter]]

    def digest(self) -> str:
        """Hash the tensors and their configuration."""
        result = hashlib.sha256()
        try:
            for path in self._read():
                with path.open("rb") as file:
                    result.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise InputError(f"{self.path}: cannot read {path.name} ({error.strerror})") from error
        return result.hexdigest()

    def _read(self) -> list[Path]:
        beside = [path for name in CONFIGS if (path := self.files[0].parent / name).is_file()]
        return [*self.files, *beside]

    @contextmanager
    def applied_to(self, pipe: Any, name: str = ADAPTER_NAME) -> Iterator[DisableAdapter]:
        """Apply the weights to a pipeline inside the block; yields a context that disables them.

        name  name of the adapter; adapters that are applied together need different names
        Raises InputError, before the block, if the weights do not match the pipeline or their checksum.
        """
        with ExitStack() as stack:
            try:
                checkpoint = (self.files[0].parent / MANIFEST).is_file()  # its loader verifies it
                if not checkpoint and (unknown := verify_checksums(*self._read())):
                    logger.info("%s: no checksum of %s, read unchecked", self.path, unknown[0].name)
                off = stack.enter_context(self.load_adapter(pipe, self.files[0], name))
            except InputError as error:
                raise InputError(f"{self.path}: {error}") from error
            except LOAD_ERRORS as error:
                raise InputError(f"{self.path} does not fit {type(pipe).__name__}: {one_line(error)}") from error
            yield off


@dataclass(frozen=True)
class AdapterSum:
    """Several adapters with a weight each: W + Σ w_i ΔW_i."""

    terms: tuple[tuple[FinetunedWeights, float], ...]

    def digest(self) -> str:
        """Hash the tensors, their configurations and the weights."""
        hashes = [f"{one.digest()}:{weight!r}" for one, weight in self.terms]
        return hashlib.sha256(" + ".join(hashes).encode()).hexdigest()

    @contextmanager
    def applied_to(self, pipe: Any) -> Iterator[DisableAdapter]:
        """Apply the sum to a pipeline inside the block; yields a context that disables all of it.

        Raises InputError, before the block, for an adapter that does not match.
        """
        modules = _modules_of(pipe)
        names = {f"{ADAPTER_NAME}_{number}": weight for number, (_, weight) in enumerate(self.terms)}
        with ExitStack() as stack:
            for name, (one, _) in zip(names, self.terms, strict=True):
                stack.enter_context(one.applied_to(pipe, name))
            for layer in lora_layers(modules):
                own = [name for name in names if name in layer.lora_A]
                layer.set_adapter(own)
                for name in own:
                    if getattr(layer, "use_dora", {}).get(name):
                        raise InputError("a DoRA in a sum, or with a weight, is no DoRA: give it alone")
                    layer.scaling[name] *= names[name]
                layer.requires_grad_(False)
            yield adapter_disabler(modules)


def read_loras(text: str) -> list[tuple[str, float]]:
    """Return paths and weights of adapters: FILE, FILE:0.7, or several joined by " + ". Raises InputError."""
    terms = []
    for term in text.split(" + "):
        path, colon, number = term.strip().rpartition(":")
        try:
            weight = float(number) if colon else 1.0
        except ValueError:
            path, weight = term.strip(), 1.0
        path = path if colon else number
        if not path or not math.isfinite(weight):
            raise InputError(f"--lora {text!r:.80}: write FILE or FILE:WEIGHT, as in a.safetensors:0.7")
        terms.append((path, weight))
    return terms


@contextmanager
def adapter_applied(pipe: Any, path: str | None) -> Iterator[DisableAdapter]:
    """Apply the finetuned weights of a path, or none, to a pipeline inside the block; yields a context without them.

    Raises InputError, before the block, if the weights are missing or do not match.
    """
    if path is None:
        yield nullcontext
        return
    before = [(weight, weight.requires_grad) for module in _modules_of(pipe) for weight in module.parameters()]
    try:
        with find_adapter(path).applied_to(pipe) as off:
            yield off
    finally:  # injecting an adapter freezes the layers
        for weight, required in before:
            weight.requires_grad_(required)


def find_adapter(text: str) -> FinetunedWeights | AdapterSum:
    """Find the weights of `read_loras`: folders of `steer finetune` (best/, final/, checkpoints/step-…), LoRA files.

    Raises InputError if there are none, and if the full weights of a denoiser are in a sum or have a weight.
    """
    terms = [(find_weights(path), weight) for path, weight in read_loras(text)]
    if len(terms) == 1 and terms[0][1] == 1.0:
        return terms[0][0]
    for one, _ in terms:
        if one.load_adapter in (_full_denoiser, _checkpoint_denoiser, token_applied):
            kind = "a token" if one.load_adapter is token_applied else "all weights of a denoiser"
            raise InputError(f"{one.path} holds {kind}: give it alone, without a weight")
    return AdapterSum(tuple(terms))


def find_weights(path: str) -> FinetunedWeights:
    """Find the weights of one path, see `find_adapter`. Raises InputError."""
    place = ADAPTERS.get(path, Path(path))
    if (place / MANIFEST).is_file():
        return _find_checkpoint(path, Checkpoint.open(place))
    file = (place, _lora) if place.suffix == ".safetensors" else None
    for lora, load_adapter in filter(None, (file, (place / LORA, _lora), (place / PEFT, _peft))):
        if lora.is_file():
            if find_spec("peft") is None:
                raise InputError(f"{path}: a LoRA needs peft: pip install 'steer-diffusion[train]'")
            files = [one for one in (lora, lora.parent / SECOND_DENOISER / LORA) if one.is_file()]
            return FinetunedWeights(path, tuple(files), load_adapter)
    if (place / EMBEDDINGS).is_file():
        return FinetunedWeights(path, (place / EMBEDDINGS,), token_applied)
    for folder in (place, *(place / name for name in (*DENOISERS, TOKEN_DENOISER))):
        if (folder / "config.json").is_file() and (files := sorted(folder.glob(FULL_WEIGHTS))):
            return FinetunedWeights(path, tuple(files), _full_denoiser)
    if not place.exists():
        raise InputError(f"{path}: no such folder; give one with weights, such as RUN/final of `steer finetune`")
    inside = [str(place / name) for name in ("best", "final") if (place / name).is_dir()]
    hint = f"did you mean {' or '.join(inside)}?" if inside else f"expected {LORA}, {PEFT} or a denoiser's folder"
    raise InputError(f"{path}: no finetuned weights here; {hint}")


def _find_checkpoint(path: str, saved: Checkpoint) -> FinetunedWeights:
    """Return the weights that a run would export at a checkpoint: their moving average where it has one."""
    name = "average" if (saved.path / "average.safetensors").is_file() else "weights"
    identity = saved.json("identity")
    load_adapter = _checkpoint_lora if identity.get("lora_rank") else _checkpoint_denoiser
    load_adapter = token_applied if identity.get("context") else load_adapter
    return FinetunedWeights(path, (saved.file(f"{name}.safetensors"), saved.file("identity.json")), load_adapter)


@contextmanager
def _lora(pipe: Any, file: Path, adapter: str) -> Iterator[DisableAdapter]:
    """Load a LoRA in diffusers' format, for the denoiser and text encoders."""
    if not hasattr(pipe, "load_lora_weights"):
        raise InputError(f"{type(pipe).__name__} does not load LoRA files")
    with TemporaryDirectory() as place:
        file, second = _converted(file, Path(place)), file.parent / SECOND_DENOISER / LORA
        try:
            for part in [one for one in (file, second) if one.is_file()]:
                _load_lora(pipe, part, adapter)
            yield adapter_disabler(_modules_of(pipe))
        finally:
            pipe.unload_lora_weights()


def _load_lora(pipe: Any, file: Path, adapter: str) -> None:
    """Load one file; the part for a second transformer comes from the folder of that name."""
    with safe_open(file, "pt") as opened:
        names, metadata_json = list(opened.keys()), opened.metadata() or {}
    configured = json.loads(metadata_json.get(LORA_ADAPTER_METADATA_KEY) or "{}")  # keys such as unet.r
    _check_plain_lora({name.rpartition(".")[2]: value for name, value in configured.items() if value}, names)
    given = {"weight_name": file.name, "use_safetensors": True, "local_files_only": True}
    modules = _modules_of(pipe)
    if file.parent.name == SECOND_DENOISER:
        given["load_into_transformer_2"], modules = True, [pipe.transformer_2]
    with _defer_diffusers_logs():
        _skip_missing_components(pipe).load_lora_weights(str(file.parent), adapter_name=adapter, **given)
    _check_all_loaded(modules, load_file(file), pipe, adapter)


def _converted(file: Path, folder: Path) -> Path:
    """Return a file, with a DoRA in kohya's layout converted to diffusers', which does not read kohya's norms."""
    from steer.training.lora_layouts import convert_lora

    with safe_open(file, "pt") as opened:
        names = list(opened.keys())
    kohya = all(name.startswith(("lora_unet_", "lora_transformer_")) for name in names)
    return convert_lora(file, folder) if kohya and any(name.endswith(DORA) for name in names) else file


def _skip_missing_components(pipe: Any) -> Any:
    """Copy a pipeline with a loader that skips components without a key in the file."""
    view = copy.copy(pipe)

    def load_known(load: Callable[..., Any], name: str, /, state_dict: Any, *args: Any, **kwargs: Any) -> None:
        if any(key.startswith(f"{kwargs.get('prefix') or name}.") for key in state_dict):
            load(state_dict, *args, **kwargs)

    for name in ("text_encoder", *DENOISERS):
        if (load := getattr(pipe, f"load_lora_into_{name}", None)) is not None:
            vars(view)[f"load_lora_into_{name}"] = partial(load_known, load, name)
    return view


@contextmanager
def _peft(pipe: Any, file: Path, adapter: str) -> Iterator[DisableAdapter]:
    """Load a peft adapter into the denoiser, for pipelines without LoRA support."""
    _, denoiser = get_denoiser(pipe)
    metadata_json = json.loads((file.parent / "adapter_config.json").read_text(encoding="utf-8"))
    if metadata_json.get("peft_type") != "LORA":
        raise InputError(f"a peft adapter of type {metadata_json.get('peft_type')!r}; only LORA is supported")
    with safe_open(file, "pt") as opened:
        _check_plain_lora(metadata_json, list(opened.keys()))
    state = {key.removeprefix("base_model.model."): value for key, value in load_file(file).items()}
    options = {key: metadata_json[key] for key in APPLIED_KEYS if metadata_json.get(key) is not None}
    options["use_dora"] = bool(metadata_json.get("use_dora"))
    with _injected(pipe, denoiser, options, state, adapter):
        yield adapter_disabler([denoiser])


@contextmanager
def _checkpoint_lora(pipe: Any, file: Path, adapter: str) -> Iterator[DisableAdapter]:
    """Load the LoRA of a training's checkpoint, whose names are those of the denoiser's parameters."""
    saved = Checkpoint.open(file.parent)
    identity = saved.json("identity")
    denoisers, rank = get_denoisers(pipe, identity.get("denoiser")), identity["lora_rank"]
    options = {"r": rank, "lora_alpha": identity.get("lora_alpha") or rank}
    options |= {name: bool(identity.get(name)) for name in ("use_dora", "use_rslora")}
    options |= {"target_modules": list(identity["lora_target_modules"])}
    named = {
        name.replace(f".{ADAPTER}", "").replace("_vector.weight", "_vector"): value
        for name, value in saved.tensors(file.stem).items()
    }
    with ExitStack() as stack:
        for name, denoiser in denoisers.items():
            prefix = f"{name}." if len(denoisers) > 1 else ""
            state = {key.removeprefix(prefix): value for key, value in named.items() if key.startswith(prefix)}
            stack.enter_context(_injected(pipe, denoiser, options, state, adapter))
        yield adapter_disabler([*denoisers.values()])


@contextmanager
def _injected(
    pipe: Any, denoiser: nn.Module, options: Mapping[str, Any], state: Mapping[str, Tensor], adapter: str
) -> Iterator[None]:
    """Inject a LoRA with peft's options and tensors into a denoiser inside the block. Raises InputError."""
    from diffusers.utils.peft_utils import recurse_remove_peft_layers
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    try:
        inject_adapter_in_model(LoraConfig(**options), denoiser, adapter)
        loaded = set_peft_model_state_dict(denoiser, dict(state), adapter_name=adapter)
        if missing := [name for name in loaded.missing_keys if f".{adapter}." in name]:
            raise InputError(f"it lacks a tensor for {missing[0]}")
        _check_all_loaded([denoiser], state, pipe, adapter)
        denoiser.requires_grad_(False)
        yield
    finally:
        recurse_remove_peft_layers(denoiser)
        vars(denoiser).pop("peft_config", None)


def _modules_of(pipe: Any) -> list[nn.Module]:
    return [module for module in pipe.components.values() if isinstance(module, nn.Module)]


@contextmanager
def _full_denoiser(pipe: Any, file: Path, adapter: str) -> Iterator[DisableAdapter]:
    """Replace the pipeline's denoiser by a copy with the given weights."""
    expected = get_denoiser(pipe)[1].state_dict()
    with _denoiser_replaced(pipe, sorted(file.parent.glob(FULL_WEIGHTS)), expected) as off:
        yield off


@contextmanager
def _checkpoint_denoiser(pipe: Any, file: Path, adapter: str) -> Iterator[DisableAdapter]:
    """Replace the pipeline's denoiser by a copy with the weights of a training's checkpoint, which has no buffers."""
    Checkpoint.open(file.parent)
    with _denoiser_replaced(pipe, [file], dict(get_denoiser(pipe)[1].named_parameters())) as off:
        yield off


@contextmanager
def _denoiser_replaced(pipe: Any, files: Sequence[Path], expected: Mapping[str, Tensor]) -> Iterator[DisableAdapter]:
    """Replace the pipeline's denoiser by a copy with the weights of files, which must have the expected tensors."""
    (name, own), shapes = get_denoiser(pipe), dict[str, tuple[int, ...]]()
    for path in files:
        with safe_open(path, "pt") as opened:
            shapes |= {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    if shapes != {key: tuple(value.shape) for key, value in expected.items()}:
        raise InputError(f"its tensors do not match the model's {type(own).__name__}: it is of another model")
    finetuned = copy.deepcopy(own)
    for path in files:
        finetuned.load_state_dict(load_file(path), strict=False)

    @contextmanager
    def with_denoiser(inside: nn.Module, after: nn.Module) -> Iterator[None]:
        setattr(pipe, name, inside)
        try:
            yield
        finally:
            setattr(pipe, name, after)

    with with_denoiser(finetuned, after=own):
        yield partial(with_denoiser, own, after=finetuned)


@contextmanager
def _defer_diffusers_logs() -> Iterator[None]:
    """Log the messages of diffusers after the block, or drop them if the block raises: the error replaces them."""
    from diffusers.utils import logging as diffusers_logging

    library, buffer = diffusers_logging.get_logger("diffusers"), BufferingHandler(sys.maxsize)
    handlers, propagate = library.handlers[:], library.propagate
    library.handlers[:], library.propagate = [buffer], False
    try:
        yield
    finally:
        library.handlers[:], library.propagate = handlers, propagate
    for record in buffer.buffer:
        library.handle(record)


def _check_plain_lora(config: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raise InputError for an adapter that is neither a plain LoRA nor a DoRA, with its kind, settings and keys."""
    if any(config.get(name) for name in IMPORTING_KEYS):
        raise InputError("its configuration names a module to import, which is never done")
    magnitudes = sum(name.endswith(MAGNITUDE) for name in names)
    dora = bool(config.get("use_dora")) and magnitudes == sum(name.endswith(DOWN) for name in names)
    known = (*(FACTORS if dora else (*DOWN, *UP)), ".alpha")
    if others := [name for name in names if not name.endswith(known)]:
        kinds = sorted({kind for part, kind in KINDS.items() if any(part in name for name in others)})
        kind = " and ".join(kinds) or "full tensors or unknown keys"
        raise InputError(
            f"{len(names) - len(others)} of its {len(names)} tensors have a place in a plain LoRA, not "
            f"{_first_names(others)} ({kind}): merge it into the model's weights"
        )
    harmless = {"bias": ("none",), "init_lora_weights": PLAIN_INITIALISATIONS, "use_dora": (dora,)}
    unsupported = [
        f"{name}={value!r:.40}"
        for name, value in config.items()
        if value and name not in (*APPLIED_KEYS, *IGNORED_KEYS) and value not in harmless.get(name, ())
    ]
    if unsupported:
        raise InputError(
            f"its configuration has {', '.join(unsupported)}, which is not applied: merge it into the model's weights"
        )


def _first_names(names: Sequence[str]) -> str:
    return ", ".join(names[:MAX_SHOWN]) + (f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else "")


def _check_all_loaded(modules: Sequence[nn.Module], state: Mapping[str, Tensor], pipe: Any, adapter: str) -> None:
    """Raise InputError, which names keys, for factors in the file that no module has; set the scale of each layer."""
    factors = {name: value for name, value in state.items() if name.endswith(FACTORS)}
    loaded = [pair for module in modules for pair in module.named_parameters() if f".{adapter}." in pair[0]]
    if missing := [name for name, parameter in loaded if parameter.is_meta]:  # diffusers leaves them on the meta device
        raise InputError(f"it lacks a tensor for {missing[0]}")
    unmatched = _missing_factors(factors, loaded, adapter)
    # Converters for transformers split tensors and multiply alphas into them; converters for U-Nets only rename.
    exact = hasattr(pipe, "unet") or (
        len(loaded) == len(factors) and not any(name.endswith(".alpha") for name in state)
    )
    if not loaded or len(loaded) < len(factors) or (exact and unmatched):
        raise InputError(
            f"{len(factors) - len(unmatched)} of its {len(factors)} tensors have a place in {type(pipe).__name__}, not "
            f"{_first_names(unmatched)}: it is of another model"
        )
    if exact:
        _set_scales(modules, state, adapter)


def _missing_factors(
    factors: Mapping[str, Tensor], loaded: Sequence[tuple[str, nn.Parameter]], adapter: str
) -> list[str]:
    """List the factors whose values no loaded parameter has; each parameter matches one factor."""
    counts, dtypes = Counter(hash_tensor(parameter) for _, parameter in loaded), {one.dtype for _, one in loaded}
    known = tuple(name.replace(f".{adapter}.", ".") for name, _ in loaded)
    unmatched = []
    for name in sorted(factors, key=lambda name: not name.endswith(known)):  # among equal values, the same name first
        same = [result for dtype in dtypes if counts[result := hash_tensor(factors[name].to(dtype))]]
        counts.subtract(same[:1])
        unmatched += [] if same else [name]
    return unmatched


def _set_scales(modules: Sequence[nn.Module], state: Mapping[str, Tensor], adapter: str) -> None:
    """Scale each layer by α/r for each α in the file: loaders that match names may miss some."""
    layers = lora_layers(modules)
    for layer in layers:
        layer.eval()  # no dropout
    alphas = {name.removesuffix(".alpha"): value for name, value in state.items() if name.endswith(".alpha")}
    downs = {name: value for name, value in state.items() if name.endswith(DOWN)} if alphas else {}
    scales: dict[bytes, float] = {}
    for name, value in downs.items():
        own = [alpha for module, alpha in alphas.items() if name.startswith(f"{module}.")]
        scales[hash_tensor(value)] = own[0].item() / len(value) if own else 1.0
    for layer in layers:
        if adapter in layer.lora_A and scales:
            factor = layer.lora_A[adapter].weight
            same = [value for value in downs.values() if hash_tensor(value.to(factor.dtype)) == hash_tensor(factor)]
            if same:
                layer.scaling[adapter] = scales[hash_tensor(same[0])]


def hash_tensor(tensor: Tensor) -> bytes:
    """Hash the shape and values of a tensor."""
    numbers = tensor.detach().cpu().contiguous()
    return hashlib.sha256(f"{tuple(numbers.shape)}".encode() + numbers.float().numpy().tobytes()).digest()
