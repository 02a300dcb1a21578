"""Finetuned weights, put on a pipeline and taken off again: tensors and JSON are read, code never is."""

import copy
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from steer.apps.methods import Off
from steer.errors import InputError
from steer.stand_in import DENOISERS
from steer.sums import check_sums
from steer.trainable import denoiser_of

logger = logging.getLogger(__name__)

# What `steer finetune` writes: a LoRA of diffusers, one of peft, or a folder with the whole denoiser.
LORA, PEFT, WHOLE = (
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
    "diffusion_pytorch_model*.safetensors",
)
CONFIGS = ("adapter_config.json", "config.json")
NAME = "worn"  # the adapter's own, on the pipeline
READ = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora")  # of peft's configuration
IMPORTING = "megatron_config"  # where it is set, some versions of peft import the module that megatron_core names
FACTORS = tuple(f"{one}.weight" for one in (".lora_A", ".lora_B", "lora_down", "lora_up", "lora.down", "lora.up"))
# What diffusers, peft and safetensors raise for a file of another model, or of none.
UNFIT = (OSError, ValueError, RuntimeError, KeyError, IndexError, TypeError, AttributeError, SafetensorError)


@dataclass(frozen=True)
class Finetuned:
    """Weights that were found: `path` as the user named it, its files of tensors, and how a pipeline wears them."""

    path: str
    files: tuple[Path, ...]
    put_on: Callable[[Any, Path], AbstractContextManager[Off]]

    def digest(self) -> str:
        """A hash of all that decides what they do: the tensors, and the configuration beside them."""
        found = hashlib.sha256()
        try:
            for path in self._read():
                with path.open("rb") as file:
                    found.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise InputError(f"{self.path}: cannot read {path.name} ({error.strerror})") from error
        return found.hexdigest()

    def _read(self) -> list[Path]:
        beside = [path for name in CONFIGS if (path := self.files[0].parent / name).is_file()]
        return [*self.files, *beside]

    @contextmanager
    def worn_by(self, pipe: Any) -> Iterator[Off]:
        """Inside, the pipeline has these weights; it gives what takes them off for a while.

        Raises InputError, before the block, where they do not fit it, or are not what the sums beside them tell.
        """
        with ExitStack() as stack:
            try:
                if unknown := check_sums(*self._read()):
                    logger.info("%s: nobody noted a sum of %s, it is read as it is", self.path, unknown[0].name)
                off = stack.enter_context(self.put_on(pipe, self.files[0]))
            except InputError as error:
                raise InputError(f"{self.path}: {error}") from error
            except UNFIT as error:
                reason = " ".join(str(error).split())[:160] or type(error).__name__
                raise InputError(f"{self.path} does not fit {type(pipe).__name__}: {reason}") from error
            yield off


@contextmanager
def wearing(pipe: Any, path: str | None) -> Iterator[Off]:
    """Inside, the pipeline has the weights that a path leads to, or none; it gives what takes them off for a while.

    Raises InputError, before the block, where there are none, or they do not fit.
    """
    if path is None:
        yield nullcontext
        return
    with find_finetuned(path).worn_by(pipe) as off:
        yield off


def find_finetuned(path: str) -> Finetuned:
    """The weights of a folder as `steer finetune` leaves it (best/, final/), of a peft adapter, or in a LoRA file.

    Raises InputError where there are none.
    """
    place = Path(path)
    if place.is_file() and place.suffix == ".safetensors":
        return _needing_peft(path, place, _lora)
    for name, put_on in ((LORA, _lora), (PEFT, _peft)):
        if (place / name).is_file():
            return _needing_peft(path, place / name, put_on)
    for folder in (place, *(place / name for name in DENOISERS)):
        if (folder / "config.json").is_file() and (files := sorted(folder.glob(WHOLE))):
            return Finetuned(path, tuple(files), _whole)
    if not place.exists():
        raise InputError(f"{path}: no such folder; give one with weights, such as RUN/final of `steer finetune`")
    inside = [str(place / name) for name in ("best", "final") if (place / name).is_dir()]
    hint = f"did you mean {' or '.join(inside)}?" if inside else f"expected {LORA}, {PEFT} or a denoiser's folder"
    raise InputError(f"{path}: no finetuned weights here; {hint}")


def _needing_peft(path: str, file: Path, put_on: Callable[[Any, Path], AbstractContextManager[Off]]) -> Finetuned:
    if find_spec("peft") is None:
        raise InputError(f"{path}: a LoRA needs peft: pip install 'steer-diffusion[train]'")
    return Finetuned(path, (file,), put_on)


@contextmanager
def _lora(pipe: Any, file: Path) -> Iterator[Off]:
    """A LoRA that diffusers reads, of the denoiser and perhaps of text encoders."""
    if not hasattr(pipe, "load_lora_weights"):
        raise InputError(f"{type(pipe).__name__} reads no LoRA files")
    with safe_open(file, "pt") as opened:
        names, told = list(opened.keys()), opened.metadata() or {}
    configured = json.loads(told.get(LORA_ADAPTER_METADATA_KEY, "{}"))  # keys such as unet.r
    if any(value for name, value in configured.items() if name.endswith(IMPORTING)):
        raise InputError("its configuration names a module to be imported, which is never done")
    try:
        given = {"weight_name": file.name, "use_safetensors": True, "local_files_only": True}
        with _silent():
            pipe.load_lora_weights(str(file.parent), adapter_name=NAME, **given)
        modules = [module for module in pipe.components.values() if isinstance(module, nn.Module)]
        _check_all_arrived(modules, names, pipe)
        yield _switch(modules)
    finally:
        pipe.unload_lora_weights()


@contextmanager
def _peft(pipe: Any, file: Path) -> Iterator[Off]:
    """An adapter of peft in the denoiser, for pipelines that know no LoRAs."""
    from diffusers.utils.peft_utils import recurse_remove_peft_layers
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    _, denoiser = denoiser_of(pipe)
    told = json.loads((file.parent / "adapter_config.json").read_text(encoding="utf-8"))
    if told.get("peft_type") != "LORA":
        raise InputError(f"a peft adapter of type {told.get('peft_type')!r}; only LORA is read")
    state = {key.removeprefix("base_model.model."): value for key, value in load_file(file).items()}
    try:
        config = LoraConfig(**{key: told[key] for key in READ if told.get(key) is not None})
        inject_adapter_in_model(config, denoiser, NAME)
        loaded = set_peft_model_state_dict(denoiser, state, adapter_name=NAME)
        if missing := [name for name in loaded.missing_keys if f".{NAME}." in name]:
            raise InputError(f"it lacks a tensor for {missing[0]}")
        _check_all_arrived([denoiser], list(state), pipe)
        denoiser.requires_grad_(False)
        yield _switch([denoiser])
    finally:
        recurse_remove_peft_layers(denoiser)
        vars(denoiser).pop("peft_config", None)


def _switch(modules: Sequence[nn.Module]) -> Off:
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
def _whole(pipe: Any, file: Path) -> Iterator[Off]:
    """A twin of the pipeline's denoiser with other weights, in its place."""
    name, own = denoiser_of(pipe)
    files, shapes = sorted(file.parent.glob(WHOLE)), dict[str, tuple[int, ...]]()
    for path in files:
        with safe_open(path, "pt") as opened:
            shapes |= {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    if shapes != {key: tuple(value.shape) for key, value in own.state_dict().items()}:
        raise InputError(f"its tensors are not those of the model's {type(own).__name__}: another model's")
    twin = copy.deepcopy(own)
    for path in files:
        twin.load_state_dict(load_file(path), strict=False)

    @contextmanager
    def off() -> Iterator[None]:
        setattr(pipe, name, own)
        try:
            yield
        finally:
            setattr(pipe, name, twin)

    setattr(pipe, name, twin)
    try:
        yield off
    finally:
        setattr(pipe, name, own)


@contextmanager
def _silent() -> Iterator[None]:
    """Without diffusers' warnings of LoRA keys that are not there, or not needed: what matters of them is checked."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _check_all_arrived(modules: Sequence[nn.Module], names: Sequence[str], pipe: Any) -> None:
    """Raises InputError where fewer factors are in the modules than the file holds."""
    expected = sum(name.endswith(FACTORS) for name in names)
    worn = [pair for module in modules for pair in module.named_parameters() if f".{NAME}." in pair[0]]
    arrived = len(worn)
    if missing := [name for name, parameter in worn if parameter.is_meta]:  # diffusers leaves it without numbers
        raise InputError(f"it lacks a tensor for {missing[0]}")
    if not arrived or arrived < expected:
        raise InputError(f"{arrived} of its {expected} tensors have a place in {type(pipe).__name__}: another model's")
