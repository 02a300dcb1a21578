"""A model by name: embedded, a folder, or on the hub."""

import json
import re
from _pickle import UnpicklingError  # the error's name only
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer.assets import MODELS
from steer.errors import InputError
from steer.registry import nearest

if TYPE_CHECKING:
    import torch  # else where it is needed: it takes seconds
import copy
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from steer.apps.methods import DisableAdapter
from steer.diffusion.step_hooks import DENOISERS
from steer.files import verify_checksums
from steer.training.trainable import get_denoiser

# Of single files, by the first letters of diffusers' name of the kind of checkpoint.
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
INDEX = "model_index.json"
# diffusion_pytorch_model.fp16.safetensors, model.fp16-00001-of-00002.safetensors
FILE = re.compile(r"[A-Za-z_0-9]+(\.(?P<variant>[A-Za-z]\w*))?(-\d+-of-\d+)?\.(safetensors|bin)")


def load_pipeline(
    model: str,
    device: str | None = None,
    dtype: str | None = None,
    *,
    variant: str | None = None,
    config: str | None = None,
) -> Any:
    """A diffusers pipeline: the name of an embedded model, a folder in diffusers' format, a checkpoint in a single
    .safetensors file, or ORGANISATION/NAME.

    A folder whose weights are all of one variant, such as *.fp16.safetensors, is loaded with that variant. A single
    file's configuration is that of a folder in diffusers' format beside it (the file's own folder, or one of its name
    without .safetensors), else that of the published model of its kind, from the hub or its cache.

    device  where to run; by default the GPU if there is one
    variant of the weights, such as fp16; by default plain ones, or the folder's only one
    config  for a single file: a folder of such a model in diffusers' format, JSON files and tokenizer
    dtype   float32, float16 or bfloat16; by default float32 on the CPU and bfloat16 elsewhere

    Raises InputError where there is no such model. Code that a model folder may hold is never run.
    """
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    check_device(device)
    source = _source(model)
    single = isinstance(source, Path) and source.is_file()
    if single and variant is not None:
        raise InputError(f"--variant {variant}: model {model!r} is a single file, which has none: leave it out")
    if config is not None and not (single and (Path(config) / INDEX).is_file()):
        wrong = f"no {INDEX} in this folder" if single else f"model {model!r} is no single file: leave it out"
        raise InputError(f"--config {config}: {wrong}")
    device = default_device(device)
    try:
        if isinstance(source, Path) and source.is_file():
            pipe = _from_single_file(model, source, resolve_dtype(device, dtype), config)
        else:
            variant = _variant(source) if variant is None and isinstance(source, Path) else variant
            pipe = DiffusionPipeline.from_pretrained(source, dtype=resolve_dtype(device, dtype), variant=variant)
    except InputError:
        raise
    except UnpicklingError as error:
        raise InputError(
            f"model {model!r} cannot be loaded: a file of its weights is broken, or holds code, which is never run; "
            "take one with safetensors"
        ) from error
    except Exception as error:  # two libraries and a stranger's files: there is no list of what they raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"model {model!r} cannot be loaded: {reason}") from error
    return pipe.to(device)


def _source(model: str) -> str | Path:
    """A folder or a file where there is one, else the name of a model on the hub. Raises InputError."""
    source = MODELS.get(model, Path(model).expanduser())
    if source.is_dir():
        if not (source / INDEX).exists():
            raise InputError(f"model {model!r}: no {INDEX} in this folder; is it in diffusers' format?")
        return source
    if source.is_file():
        if source.suffix != ".safetensors":
            raise InputError(f"model {model!r}: a single file must be .safetensors: other formats may hold code")
        return source
    if model in MODELS:
        raise InputError(f"model {model!r} lies in the repository, not in the package: clone it, give its folder")
    if model.endswith(WEIGHTS) or model.startswith("~"):
        raise InputError(f"model {model!r}: no such file")
    if model.count("/") != 1 or model.startswith((".", "/")) or model.endswith("/"):
        raise InputError(f"unknown model {model!r}: use {nearest(model, MODELS)}, a folder, or ORGANISATION/NAME")
    return model


def _variant(folder: Path) -> str | None:
    """The variant that all weights of some component are of, such as fp16; None where each has plain ones."""
    for component in sorted(path for path in folder.iterdir() if path.is_dir()):
        result = [match["variant"] for path in component.iterdir() if (match := FILE.fullmatch(path.name))]
        if result and all(result):
            return str(sorted(set(result))[0])
    return None


def _from_single_file(model: str, file: Path, dtype: "torch.dtype", given: str | None) -> Any:
    """A pipeline of a checkpoint in one file, as its trainers publish them. Raises InputError."""
    import diffusers
    from diffusers.loaders.single_file_utils import (
        DIFFUSERS_DEFAULT_PIPELINE_PATHS,
        infer_diffusers_model_type,
        load_single_file_checkpoint,
    )

    places = (file.with_suffix(""), file.parent) if given is None else (Path(given),)
    beside = [folder for folder in places if (folder / INDEX).is_file()]
    if beside:
        name = str(json.loads((beside[0] / INDEX).read_text(encoding="utf-8")).get("_class_name"))
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


def resolve_dtype(device: str, dtype: str | None) -> "torch.dtype":
    """What a model computes in: float32 on the CPU and bfloat16 elsewhere, where nothing else is asked for."""
    import torch

    number: torch.dtype = getattr(torch, dtype or ("float32" if device == "cpu" else "bfloat16"))
    return number


def default_device(device: str | None = None) -> str:
    """The device, or where none is given the GPU if there is one, else the CPU."""
    import torch

    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def check_device(device: str | None) -> None:
    """Raises InputError for a device that there is not, or that holds no numbers."""
    import torch

    if device is None:
        return
    try:
        if torch.empty(0, device=device).is_meta:
            raise InputError(f"--device {device!r} cannot be used: tensors have no values there; use cpu or cuda")
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {device!r} cannot be used: {str(error).splitlines()[0]}") from error


logger = logging.getLogger(__name__)

# What `steer finetune` writes: a LoRA of diffusers, one of peft, or a folder with the whole denoiser.
LORA, PEFT, FULL_WEIGHTS = (
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
    "diffusion_pytorch_model*.safetensors",
)
CONFIGS = ("adapter_config.json", "config.json")
ADAPTER_NAME = "worn"  # the adapter's own, on the pipeline
# Of peft's configuration: what the peft loader passes on, and what decides nothing once the tensors are there.
APPLIED_KEYS = (
    *("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora"),
    *("exclude_modules", "layers_to_transform", "layers_pattern"),
)
IGNORED_KEYS = (
    *("peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "task_type"),
    *("inference_mode", "lora_dropout", "runtime_config", "megatron_core", "qalora_group_size", "format"),
    *("eva_config", "corda_config", "lora_ga_config"),
)
PLAIN_INITIALISATIONS = (
    True,
    False,
    None,
    "gaussian",
    "eva",
    "orthogonal",
)  # other initialisations also rewrite the base weights
IMPORTING_KEYS = (
    "megatron_config",
)  # where it is set, some versions of peft import the module that megatron_core names
DOWN = tuple(f"{one}.weight" for one in (".lora_A", "lora_down", "lora.down", "lora_linear_layer.down"))
UP = tuple(f"{one}.weight" for one in (".lora_B", "lora_up", "lora.up", "lora_linear_layer.up"))
FACTORS = (*DOWN, *UP)
KINDS = {  # part of a key: the kind of adapter that has it
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
MAX_SHOWN = 3  # keys in a message
# What diffusers, peft and safetensors raise for a file of another model, or of none.
LOAD_ERRORS = (OSError, ValueError, RuntimeError, KeyError, IndexError, TypeError, AttributeError, SafetensorError)


@dataclass(frozen=True)
class FinetunedWeights:
    """Weights that were found: `path` as the user named it, its files of tensors, and how a pipeline wears them."""

    path: str
    files: tuple[Path, ...]
    load_adapter: Callable[[Any, Path], AbstractContextManager[DisableAdapter]]

    def digest(self) -> str:
        """A hash of all that decides what they do: the tensors, and the configuration beside them."""
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
    def applied_to(self, pipe: Any) -> Iterator[DisableAdapter]:
        """Inside, the pipeline has these weights; it gives what takes them off for a while.

        Raises InputError, before the block, where they do not fit it, or are not what the sums beside them tell.
        """
        with ExitStack() as stack:
            try:
                if unknown := verify_checksums(*self._read()):
                    logger.info("%s: nobody noted a sum of %s, it is read as it is", self.path, unknown[0].name)
                off = stack.enter_context(self.load_adapter(pipe, self.files[0]))
            except InputError as error:
                raise InputError(f"{self.path}: {error}") from error
            except LOAD_ERRORS as error:
                reason = " ".join(str(error).split())[:160] or type(error).__name__
                raise InputError(f"{self.path} does not fit {type(pipe).__name__}: {reason}") from error
            yield off


@contextmanager
def adapter_applied(pipe: Any, path: str | None) -> Iterator[DisableAdapter]:
    """Inside, the pipeline has the weights that a path leads to, or none; it gives what takes them off for a while.

    Raises InputError, before the block, where there are none, or they do not fit.
    """
    if path is None:
        yield nullcontext
        return
    with _gradients_restored(pipe), find_adapter(path).applied_to(pipe) as off:
        yield off


@contextmanager
def _gradients_restored(pipe: Any) -> Iterator[None]:
    """Afterwards weights take gradients that did before: injecting an adapter freezes what it is injected into."""
    modules = [module for module in pipe.components.values() if isinstance(module, nn.Module)]
    before = [(weight, weight.requires_grad) for module in modules for weight in module.parameters()]
    try:
        yield
    finally:
        for weight, takes in before:
            weight.requires_grad_(takes)


def find_adapter(path: str) -> FinetunedWeights:
    """The weights of a folder as `steer finetune` leaves it (best/, final/), of a peft adapter, or in a LoRA file.

    Raises InputError where there are none.
    """
    place = Path(path)
    if place.is_file() and place.suffix == ".safetensors":
        return _require_peft(path, place, _lora)
    for name, load_adapter in ((LORA, _lora), (PEFT, _peft)):
        if (place / name).is_file():
            return _require_peft(path, place / name, load_adapter)
    for folder in (place, *(place / name for name in DENOISERS)):
        if (folder / "config.json").is_file() and (files := sorted(folder.glob(FULL_WEIGHTS))):
            return FinetunedWeights(path, tuple(files), _full_denoiser)
    if not place.exists():
        raise InputError(f"{path}: no such folder; give one with weights, such as RUN/final of `steer finetune`")
    inside = [str(place / name) for name in ("best", "final") if (place / name).is_dir()]
    hint = f"did you mean {' or '.join(inside)}?" if inside else f"expected {LORA}, {PEFT} or a denoiser's folder"
    raise InputError(f"{path}: no finetuned weights here; {hint}")


def _require_peft(
    path: str, file: Path, load_adapter: Callable[[Any, Path], AbstractContextManager[DisableAdapter]]
) -> FinetunedWeights:
    if find_spec("peft") is None:
        raise InputError(f"{path}: a LoRA needs peft: pip install 'steer-diffusion[train]'")
    return FinetunedWeights(path, (file,), load_adapter)


@contextmanager
def _lora(pipe: Any, file: Path) -> Iterator[DisableAdapter]:
    """A LoRA that diffusers reads, of the denoiser and perhaps of text encoders."""
    if not hasattr(pipe, "load_lora_weights"):
        raise InputError(f"{type(pipe).__name__} reads no LoRA files")
    with safe_open(file, "pt") as opened:
        names, metadata_json = list(opened.keys()), opened.metadata() or {}
    configured = json.loads(metadata_json.get(LORA_ADAPTER_METADATA_KEY) or "{}")  # keys such as unet.r
    _check_plain_lora({name.rpartition(".")[2]: value for name, value in configured.items() if value}, names)
    try:
        given = {"weight_name": file.name, "use_safetensors": True, "local_files_only": True}
        with _defer_diffusers_logs():
            _skip_missing_components(pipe).load_lora_weights(str(file.parent), adapter_name=ADAPTER_NAME, **given)
        modules = [module for module in pipe.components.values() if isinstance(module, nn.Module)]
        _check_all_loaded(modules, load_file(file), pipe)
        yield _adapter_disabler(modules)
    finally:
        pipe.unload_lora_weights()


def _skip_missing_components(pipe: Any) -> Any:
    """A copy of a pipeline whose loader leaves components alone for which the file has no key."""
    view = copy.copy(pipe)

    def only_with_keys(load: Callable[..., Any], prefix: str) -> Callable[..., Any]:
        def loading(state_dict: Any, *args: Any, **kwargs: Any) -> None:
            if any(key.startswith(f"{kwargs.get('prefix') or prefix}.") for key in state_dict):
                load(state_dict, *args, **kwargs)

        return loading

    for name in ("text_encoder", *DENOISERS):
        if (load := getattr(pipe, f"load_lora_into_{name}", None)) is not None:
            vars(view)[f"load_lora_into_{name}"] = only_with_keys(load, name)
    return view


@contextmanager
def _peft(pipe: Any, file: Path) -> Iterator[DisableAdapter]:
    """An adapter of peft in the denoiser, for pipelines that know no LoRAs."""
    from diffusers.utils.peft_utils import recurse_remove_peft_layers
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    _, denoiser = get_denoiser(pipe)
    metadata_json = json.loads((file.parent / "adapter_config.json").read_text(encoding="utf-8"))
    if metadata_json.get("peft_type") != "LORA":
        raise InputError(f"a peft adapter of type {metadata_json.get('peft_type')!r}; only LORA is read")
    with safe_open(file, "pt") as opened:
        _check_plain_lora(metadata_json, list(opened.keys()))
    state = {key.removeprefix("base_model.model."): value for key, value in load_file(file).items()}
    try:
        config = LoraConfig(**{key: metadata_json[key] for key in APPLIED_KEYS if metadata_json.get(key) is not None})
        inject_adapter_in_model(config, denoiser, ADAPTER_NAME)
        loaded = set_peft_model_state_dict(denoiser, state, adapter_name=ADAPTER_NAME)
        if missing := [name for name in loaded.missing_keys if f".{ADAPTER_NAME}." in name]:
            raise InputError(f"it lacks a tensor for {missing[0]}")
        _check_all_loaded([denoiser], state, pipe)
        denoiser.requires_grad_(False)
        yield _adapter_disabler([denoiser])
    finally:
        recurse_remove_peft_layers(denoiser)
        vars(denoiser).pop("peft_config", None)


def _adapter_disabler(modules: Sequence[nn.Module]) -> DisableAdapter:
    """Switches all adapters in some modules off for a while: what is left is the layers' own, to the last bit."""
    from peft.tuners.lora import LoraLayer

    layers: list[Any] = [layer for module in modules for layer in module.modules() if isinstance(layer, LoraLayer)]

    @contextmanager
    def off() -> Iterator[None]:
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)

    return off


@contextmanager
def _full_denoiser(pipe: Any, file: Path) -> Iterator[DisableAdapter]:
    """A twin of the pipeline's denoiser with other weights, in its place."""
    name, own = get_denoiser(pipe)
    files, shapes = sorted(file.parent.glob(FULL_WEIGHTS)), dict[str, tuple[int, ...]]()
    for path in files:
        with safe_open(path, "pt") as opened:
            shapes |= {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    if shapes != {key: tuple(value.shape) for key, value in own.state_dict().items()}:
        raise InputError(f"its tensors are not those of the model's {type(own).__name__}: another model's")
    finetuned_denoiser = copy.deepcopy(own)
    for path in files:
        finetuned_denoiser.load_state_dict(load_file(path), strict=False)

    @contextmanager
    def off() -> Iterator[None]:
        setattr(pipe, name, own)
        try:
            yield
        finally:
            setattr(pipe, name, finetuned_denoiser)

    setattr(pipe, name, finetuned_denoiser)
    try:
        yield off
    finally:
        setattr(pipe, name, own)


class _LogBuffer(logging.Handler):
    """Keeps records."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.kept.append(record)


@contextmanager
def _defer_diffusers_logs() -> Iterator[None]:
    """Logs what diffusers logs inside after the block; where that raises, the error alone says it, in one line."""
    from diffusers.utils import logging as diffusers_logging

    library, buffer = diffusers_logging.get_logger("diffusers"), _LogBuffer()
    handlers, propagate = library.handlers[:], library.propagate
    library.handlers[:], library.propagate = [buffer], False
    try:
        yield
    finally:
        library.handlers[:], library.propagate = handlers, propagate
    for record in buffer.kept:
        library.handle(record)


def _check_plain_lora(config: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raises InputError for an adapter that is more than low-rank factors: it names the kind, settings and keys."""
    if any(config.get(name) for name in IMPORTING_KEYS):
        raise InputError("its configuration names a module to be imported, which is never done")
    if others := [name for name in names if not name.endswith((*FACTORS, ".alpha"))]:
        kinds = sorted({kind for part, kind in KINDS.items() if any(part in name for name in others)})
        kind = " and ".join(kinds) or "whole tensors or keys of no known kind"
        more = f" and {len(others) - MAX_SHOWN} more" if len(others) > MAX_SHOWN else ""
        raise InputError(
            f"{len(names) - len(others)} of its {len(names)} tensors have a place in a plain LoRA, not "
            f"{', '.join(others[:MAX_SHOWN])}{more} ({kind}): merge it into the model's weights"
        )
    strange = {name: value for name, value in config.items() if value and name not in (*APPLIED_KEYS, *IGNORED_KEYS)}
    if strange.get("bias") == "none":
        del strange["bias"]
    if strange.get("init_lora_weights", "pissa") in PLAIN_INITIALISATIONS:
        del strange["init_lora_weights"]
    if strange:
        named = ", ".join(f"{name}={value!r:.40}" for name, value in strange.items())
        raise InputError(f"its configuration has {named}, which is not applied: merge it into the model's weights")


def _check_all_loaded(modules: Sequence[nn.Module], state: Mapping[str, Tensor], pipe: Any) -> None:
    """Raises InputError, which names keys, where a factor of the file is in none of the modules; sets each scale."""
    factors = {name: value for name, value in state.items() if name.endswith(FACTORS)}
    loaded = [pair for module in modules for pair in module.named_parameters() if f".{ADAPTER_NAME}." in pair[0]]
    if missing := [name for name, parameter in loaded if parameter.is_meta]:  # diffusers leaves it without numbers
        raise InputError(f"it lacks a tensor for {missing[0]}")
    absent = _missing_factors(factors, loaded)
    # Converters of transformers split tensors and multiply alphas into them; those of a U-Net only rename.
    exact = hasattr(pipe, "unet") or (
        len(loaded) == len(factors) and not any(name.endswith(".alpha") for name in state)
    )
    if not loaded or len(loaded) < len(factors) or (exact and absent):
        more = f" and {len(absent) - MAX_SHOWN} more" if len(absent) > MAX_SHOWN else ""
        raise InputError(
            f"{len(factors) - len(absent)} of its {len(factors)} tensors have a place in {type(pipe).__name__}, not "
            f"{', '.join(absent[:MAX_SHOWN])}{more}: another model's"
        )
    if exact:
        _set_scales(modules, state)


def _missing_factors(factors: Mapping[str, Tensor], loaded: Sequence[tuple[str, nn.Parameter]]) -> list[str]:
    """Names of factors whose numbers no loaded parameter holds, each of which answers for one."""
    there, dtypes = Counter(_hash_tensor(parameter) for _, parameter in loaded), {one.dtype for _, one in loaded}
    known = tuple(name.replace(f".{ADAPTER_NAME}.", ".") for name, _ in loaded)
    absent = []
    for name in sorted(factors, key=lambda name: not name.endswith(known)):  # of equal numbers, its own name first
        same = [result for dtype in dtypes if there[result := _hash_tensor(factors[name].to(dtype))]]
        there.subtract(same[:1])
        absent += [] if same else [name]
    return absent


def _set_scales(modules: Sequence[nn.Module], state: Mapping[str, Tensor]) -> None:
    """Scales every layer by α/r where the file has its α: loaders that guess it from names may miss some."""
    from peft.tuners.lora import LoraLayer

    layers: list[Any] = [layer for module in modules for layer in module.modules() if isinstance(layer, LoraLayer)]
    for layer in layers:
        layer.eval()  # a dropout of the configuration is for training
    alphas = {name.removesuffix(".alpha"): value for name, value in state.items() if name.endswith(".alpha")}
    downs = {name: value for name, value in state.items() if name.endswith(DOWN)} if alphas else {}
    scales: dict[bytes, float] = {}
    for name, value in downs.items():
        own = [alpha for module, alpha in alphas.items() if name.startswith(f"{module}.")]
        scales[_hash_tensor(value)] = own[0].item() / len(value) if own else 1.0
    for layer in layers:
        if ADAPTER_NAME in layer.lora_A and scales:
            factor = layer.lora_A[ADAPTER_NAME].weight
            same = [value for value in downs.values() if _hash_tensor(value.to(factor.dtype)) == _hash_tensor(factor)]
            if same:
                layer.scaling[ADAPTER_NAME] = scales[_hash_tensor(same[0])]


def _hash_tensor(tensor: Tensor) -> bytes:
    """A hash of shape and numbers."""
    numbers = tensor.detach().cpu().contiguous()
    return hashlib.sha256(f"{tuple(numbers.shape)}".encode() + numbers.float().numpy().tobytes()).digest()
