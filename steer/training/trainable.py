"""Trainable parameters (a LoRA, all weights, or a token of the prompt), and the reference policy without changes."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from steer.diffusion.lora_layers import enabled_adapters, lora_layers
from steer.diffusion.views import DENOISERS, denoisers_in, encode_with_prefix
from steer.errors import InputError
from steer.files import verify_checksums


def named_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return a module's parameters by name, resharded under FSDP.

    An unsharded copy, left behind by a call, would hide values written into the shards.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    return dict(module.named_parameters())


def whole(value: Tensor) -> Tensor:
    """Return the full tensor in every process; all processes must call this function."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """Shard a full tensor, which all processes have, like another tensor."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


@torch.no_grad()
def set_parameter(parameter: Tensor, value: Tensor) -> None:
    """Write a full tensor into a parameter, or into this process's shard of it."""
    parameter.copy_(shard_like(value, parameter))


ADAPTER = "steer"  # the adapter's name
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TOKEN_DENOISER = "denoiser"  # the denoiser's name in a MaskedDiffusionPipeline
# Norms of the outputs of a DoRA's layers: (out,) in the layout of diffusers, (out, 1) in kohya's.
MAGNITUDE, DORA = ".lora_magnitude_vector", ".dora_scale"
SECOND_DENOISER = "transformer_2"  # diffusers loads its LoRA from a separate file
LORA_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # for diffusers, and for peft


def get_denoisers(pipe: Any, only: str | None = None) -> dict[str, Any]:
    """Return the denoisers to train by name: one, or two in pipelines like Wan 2.2, for high and for low noise.

    only  name of the one of two to train. Raises InputError for stages, whose latents differ.
    """
    names = denoisers_in(pipe) or [name for name in (TOKEN_DENOISER,) if getattr(pipe, name, None) is not None]
    if not names:
        raise InputError(f"{type(pipe).__name__} has no unet and no transformer: it cannot be finetuned")
    if len(names) > 1 and not set(names) <= set(DENOISERS):
        raise InputError(f"{type(pipe).__name__} has denoisers of several stages, {' and '.join(names)}: use one")
    if only is not None and only not in names:
        raise InputError(f"denoiser: {type(pipe).__name__} has {' and '.join(names)}, got {only!r}")
    return {name: getattr(pipe, name) for name in names if only in (None, name)}


def get_denoiser(pipe: Any) -> tuple[str, Any]:
    """Return the name and the denoiser to train, the first if there are two. Raises InputError where there is none."""
    return next(iter(get_denoisers(pipe).items()))


def fingerprint(pipe: Any) -> str:
    """Hash the names, shapes and first numbers of the denoiser's weights."""
    digest = hashlib.sha256()
    for name, parameter in (pair for one in get_denoisers(pipe).values() for pair in one.named_parameters()):
        some = parameter.detach().flatten()[:16].float().cpu()
        digest.update(f"{name} {tuple(parameter.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]


def _freeze(pipe: Any) -> None:
    for model in pipe.components.values():
        if isinstance(model, nn.Module):
            model.requires_grad_(False).eval()


@contextmanager
def _swap_parameters(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Replace the values of parameters in the block."""
    trained = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        set_parameter(parameter, values[name])
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(trained[name])


def read_lora(path: str, name: str = "init_adapter") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors of a LoRA file, without peft's prefix, and peft's options in the file. Raises InputError.

    name  name of the argument, for messages
    """
    place = Path(path)
    file = next((place / name for name in LORA_FILES if (place / name).is_file()), place)
    if not file.is_file():
        raise InputError(f"{name} {path}: no LoRA file; expected {' or '.join(LORA_FILES)}, as in RUN/final")
    try:
        verify_checksums(file)
        with safe_open(file, "pt") as opened:
            state = {key.removeprefix("base_model.model."): opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            config = json.loads((opened.metadata() or {}).get("lora_adapter_metadata") or "{}")
        if (beside := file.parent / "adapter_config.json").is_file():
            config |= json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{name} {path}: {' '.join(str(error).split())[:160]}") from error
    plain = {key.rpartition(".")[2]: value for key, value in config.items() if value}
    if odd := [key for key in ("rank_pattern", "alpha_pattern") if key in plain]:
        raise InputError(f"{name} {path}: its configuration has {odd[0]}, which is not supported; train without it")
    return state, plain


class LoRA:
    """A low-rank adapter of the denoiser, W + (α/r) B A; a user's own LoRAs stay active, as part of the reference.

    rank     r, at least 1
    alpha    α, by default the rank
    targets  suffixes of the names of the adapted linear layers
    seed     seed of A; B starts at 0, so that training starts at the reference
    denoiser  name of the one of two to adapt; None: both, each with an adapter of its own
    use_dora, use_rslora  peft's options: m (W + s B A)/‖W + s B A‖ with trained norms m, which start at ‖W‖; s = α/√r
    """

    def __init__(
        self,
        pipe: Any,
        rank: int = 16,
        alpha: float | None = None,
        targets: Sequence[str] = ATTENTION,
        seed: int = 0,
        *,
        use_dora: bool = False,
        use_rslora: bool = False,
        denoiser: str | None = None,
    ) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        if rank < 1:
            raise InputError(f"the rank of a LoRA must be at least 1, got {rank}")
        if alpha is not None and not alpha > 0:
            raise InputError(f"the alpha of a LoRA must be above 0, got {alpha}")
        self.pipe, self.denoisers = pipe, get_denoisers(pipe, denoiser)
        self.denoiser, *others = self.denoisers.values()
        self._module = nn.ModuleDict(self.denoisers) if others else self.denoiser  # parameters have unique names
        if any(ADAPTER in getattr(one, "peft_config", {}) for one in self.denoisers.values()):
            raise InputError(f"this pipeline already has a LoRA named {ADAPTER!r}: reload the pipeline")
        self.config = LoraConfig(
            r=rank, lora_alpha=alpha or rank, target_modules=list(targets), use_dora=use_dora, use_rslora=use_rslora
        )
        own = sorted({name for names in enabled_adapters(self.denoisers.values()).values() for name in names})
        _freeze(pipe)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                for one in self.denoisers.values():
                    inject_adapter_in_model(self.config, one, ADAPTER)
            except ValueError as error:
                raise InputError(
                    f"{type(self.denoiser).__name__}: no layer named {', '.join(targets)}: give lora_target_modules, "
                    "suffixes of its layers' names, or lora_rank 0 to train all of it"
                ) from error
        self._initial: dict[str, Tensor] = {}  # weights of the reference where the adapter cannot be scaled by 0
        self.layers = lora_layers(self.denoisers.values(), ADAPTER)
        for layer in lora_layers(self.denoisers.values()):
            layer.enable_adapters(True)  # the user may have disabled all adapters
            layer.set_adapter([*own, ADAPTER])
        _freeze(pipe)
        self._names = [name for name, _ in self._module.named_parameters() if f".{ADAPTER}." in name]
        for parameter in self.parameters.values():
            parameter.data = parameter.data.float()  # trained in fp32, also in a half-precision denoiser
            parameter.requires_grad_(True)
        if use_dora:  # scale 0 would not give the reference: the norms are trained too
            self._initial = {name: value.detach().clone() for name, value in self.parameters.items()}

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """A and B of every adapted layer, and its norms with DoRA."""
        parameters = named_parameters(self._module)
        return {name: parameters[name] for name in self._names}

    def load_initial_adapter(self, path: str) -> None:
        """Start from a trained LoRA of the same rank, alpha, targets and options, which becomes the reference too.

        path  a folder such as RUN/final, or a .safetensors file in the names of diffusers or peft
        Raises InputError where its tensors or its scale differ.
        """
        if len(self.denoisers) > 1:
            raise InputError("init_adapter is the LoRA of one denoiser: give the name of one as denoiser")
        state, stated = read_lora(path)
        for name in ("use_dora", "use_rslora"):
            if stated and bool(stated.get(name)) != getattr(self.config, name):
                raise InputError(f"init_adapter {path}: give {name}: {str(bool(stated.get(name))).lower()}, as it has")
        own = {name.replace(f".{ADAPTER}", "").replace("_vector.weight", "_vector"): name for name in self._names}
        wanted = {short: tuple(self.parameters[name].shape) for short, name in own.items()}
        (first,) = self.denoisers
        given = {name.removeprefix(f"{_component(first)}."): value for name, value in state.items()}
        if odd := sorted(set(given) ^ set(wanted)):
            raise InputError(
                f"init_adapter {path}: {odd[0]} is not in both it and this LoRA: give its lora_target_modules"
            )
        if odd := [name for name in wanted if tuple(given[name].shape) != wanted[name]]:
            rank = min(given[odd[0]].shape[:2])
            raise InputError(f"init_adapter {path}: {odd[0]} is of rank {rank}: give lora_rank: {rank}")
        alpha = float(stated.get("lora_alpha", self.config.r))
        if alpha != self.config.lora_alpha:
            raise InputError(f"init_adapter {path}: its alpha is {alpha:g}: give lora_alpha: {alpha:g}")
        self._initial = {name: given[short].detach().float().clone() for short, name in own.items()}
        for name, parameter in self.parameters.items():
            set_parameter(parameter, self._initial[name])

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Use the reference policy in the block: the adapter scaled by 0, or its initial weights."""
        if self._initial:
            with _swap_parameters(self.parameters, self._initial):
                yield
            return
        for layer in self.layers:
            layer.set_scale(ADAPTER, 0.0)
        try:
            yield
        finally:
            for layer in self.layers:
                layer.set_scale(ADAPTER, 1.0)

    def state(self) -> dict[str, Tensor]:
        """Return A and B under peft's names for files, prefixed by the denoiser's name if there are two denoisers.

        With a sharded denoiser every process must call this method.
        """
        from peft import get_peft_model_state_dict

        collected: dict[str, Tensor] = {}
        for name, denoiser in self.denoisers.items():
            prefix = f"{name}." if len(self.denoisers) > 1 else ""
            state = get_peft_model_state_dict(denoiser, adapter_name=ADAPTER)
            collected |= {prefix + key: whole(value).contiguous().cpu() for key, value in state.items()}
        return collected

    def write(self, state: Mapping[str, Tensor], folder: Path) -> Path:
        """Write the adapter for `pipe.load_lora_weights(folder)`; for peft where the pipeline supports no LoRA.

        Load transformer_2's by `pipe.load_lora_weights(folder / "transformer_2", load_into_transformer_2=True)`.
        Returns the first file.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if not hasattr(self.pipe, "save_lora_weights"):
            self.config.save_pretrained(folder)
            save_file(dict(state), folder / LORA_FILES[1])
            return folder / LORA_FILES[1]
        written = []
        for name in self.denoisers:
            own = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
            layers = own if len(self.denoisers) > 1 else dict(state)
            place = folder / name if name == SECOND_DENOISER else folder
            metadata = {f"{_component(name)}_lora_adapter_metadata": self.config.to_dict()}
            self.pipe.save_lora_weights(place, **{f"{_component(name)}_lora_layers": layers}, **metadata)
            written.append(place / LORA_FILES[0])
        return written[0]


def _component(name: str) -> str:
    """Return the name of a denoiser in LoRA files, where both transformers have the same name."""
    return name.removesuffix("_2")


class FullFinetuning:
    """All parameters of the denoiser; the initial weights are kept on the CPU for the reference."""

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.denoisers = pipe, get_denoisers(pipe)
        if len(self.denoisers) > 1:
            raise InputError(f"lora_rank 0 trains all weights of one denoiser, {' and '.join(self.denoisers)} are two")
        ((self.name, self.denoiser),) = self.denoisers.items()
        self._kind = type(self.denoiser)
        _freeze(pipe)
        self.denoiser.requires_grad_(True)
        if half := [name for name, p in self.parameters.items() if p.dtype != torch.float32]:
            raise InputError(
                f"full finetuning needs weights in float32, {half[0]} is {self.parameters[half[0]].dtype}: load the "
                "model with dtype float32 (and mixed_precision bf16 to save memory), or train a LoRA"
            )
        self._initial = {name: p.detach().cpu().clone() for name, p in self.parameters.items()}

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """All parameters of the denoiser."""
        return named_parameters(self.denoiser)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Use the initial weights in the block."""
        with _swap_parameters(self.parameters, self._initial):
            yield

    def state(self) -> dict[str, Tensor]:
        """Return all weights; with a sharded denoiser every process must call this method."""
        return {name: whole(value) for name, value in self.denoiser.state_dict().items()}

    def write(self, state: Mapping[str, Tensor], folder: Path) -> Path:
        """Write the denoiser's folder, for `from_pretrained`."""
        model = self.denoiser
        if type(model) is not self._kind:  # a sharded model cannot save itself
            model = self._kind.from_config(model.config)
            model.load_state_dict(state)
        model.save_pretrained(folder / self.name)
        return folder / self.name


TOKEN, NEUTRAL = "<context>", ","  # the token before every prompt, and the text whose embedding it starts at
EMBEDDINGS = "learned_embeds.safetensors"  # diffusers' name of the file
ENCODER_KEYS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}  # names in files of SDXL


def token_encoders(pipe: Any) -> dict[str, str]:
    """Return the names of the text encoders to add a token to, by their keys in files: one is named by its token.

    Raises InputError unless all of them are CLIP's, in a pipeline that loads textual inversions.
    """
    parts = getattr(pipe, "components", {})
    encoders = {name: part for name, part in parts.items() if name.startswith("text_encoder") and part is not None}
    odd = [name for part in encoders.values() if not (name := type(part).__name__).startswith("CLIPTextModel")]
    loads = hasattr(pipe, "load_textual_inversion") and hasattr(pipe, "encode_prompt")
    if odd or not loads or not encoders.keys() <= set(ENCODER_KEYS.values()) or not encoders:
        reason = f"has the text encoder {odd[0]}" if odd else "loads no textual inversion"
        raise InputError(
            f"context trains a token of CLIP text encoders, and {type(pipe).__name__} {reason}: leave context out to "
            "train a LoRA"
        )
    keys = {key: name for key, name in ENCODER_KEYS.items() if name in encoders}
    return {TOKEN: "text_encoder"} if list(keys) == ["clip_l"] else keys


def load_token(pipe: Any, vectors: Mapping[str, Tensor]) -> None:
    """Add the token to the tokenizers and text encoders of a pipeline, with embeddings by their keys in files."""
    encoders = token_encoders(pipe)
    if encoders.keys() != vectors.keys():
        raise InputError(f"{type(pipe).__name__} needs the embeddings {', '.join(encoders)}, got {', '.join(vectors)}")
    if present := [name for name in encoders.values() if TOKEN in _tokenizer(pipe, name).get_vocab()]:
        raise InputError(f"{present[0]} already has a token {TOKEN!r}: reload the pipeline")
    with torch.random.fork_rng(devices=[]):  # transformers draws rows at random before they are set
        for key, name in encoders.items():
            place = {"text_encoder": getattr(pipe, name), "tokenizer": _tokenizer(pipe, name)}
            # Else the loader resizes by the covariance of all rows, with a message.
            place["text_encoder"].resize_token_embeddings(len(place["tokenizer"]) + 1, mean_resizing=False)
            pipe.load_textual_inversion(vectors[key], token=TOKEN, **place)
            _pool_at_end(**place)


@contextmanager
def token_applied(pipe: Any, file: Path, adapter: str = "") -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Load the token of a file inside the block, before every prompt that is encoded; yields a context without it.

    adapter  unused, an argument of all loaders of weights
    """
    load_token(pipe, load_file(file))
    encode, with_token = pipe.encode_prompt, encode_with_prefix(pipe.encode_prompt, f"{TOKEN} ")

    @contextmanager
    def encoding(inside: Any, after: Any) -> Iterator[None]:
        vars(pipe)["encode_prompt"] = inside
        try:
            yield
        finally:
            vars(pipe)["encode_prompt"] = after

    try:
        with encoding(with_token, after=encode):
            yield partial(encoding, encode, after=with_token)
    finally:
        del vars(pipe)["encode_prompt"]
        for name in token_encoders(pipe).values():
            place = {"text_encoder": getattr(pipe, name), "tokenizer": _tokenizer(pipe, name)}
            pipe.unload_textual_inversion(TOKEN, **place)


def _pool_at_end(text_encoder: Any, tokenizer: Any) -> None:
    """Set the end token where it is 2, as in SDXL: transformers then pools at the highest number, the new token's."""
    for part in text_encoder.modules():
        if getattr(part, "eos_token_id", None) == 2:
            part.eos_token_id = text_encoder.config.eos_token_id = tokenizer.eos_token_id


def _tokenizer(pipe: Any, encoder: str) -> Any:
    return getattr(pipe, encoder.replace("text_encoder", "tokenizer"))


def _embeddings(pipe: Any, encoder: str) -> Any:
    return getattr(pipe, encoder).get_input_embeddings()


def _with_trained_row(
    number: int, row: nn.Parameter, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
) -> Tensor:
    """Replace the embedding of one token: a hook, since the table of all tokens is frozen, maybe in half precision."""
    return torch.where((inputs[0] == number)[..., None], row.to(output), output)


class ContextToken:
    """The embeddings z* of one token before every prompt, a vector per CLIP text encoder (OPPO, arXiv 2305.16217).

    OPPO learns the context z* of a policy π(a | s, z); here z conditions the denoiser through the frozen encoders. It
    comes first since the encoders are causal: every word depends on it. z starts at a comma, so that the reference is
    the base model with a comma before each prompt.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.denoisers = pipe, get_denoisers(pipe)
        self.denoiser = next(iter(self.denoisers.values()))
        initial = {
            key: _embeddings(pipe, name).weight[_tokenizer(pipe, name)(NEUTRAL).input_ids[1:2]].detach()
            for key, name in token_encoders(pipe).items()
        }
        load_token(pipe, initial)
        _freeze(pipe)
        # Trained in fp32, also in a half-precision encoder.
        self._initial = {key: value.float() for key, value in initial.items()}
        self.parameters = {key: nn.Parameter(value.clone()) for key, value in self._initial.items()}
        for key, name in token_encoders(pipe).items():
            number = _tokenizer(pipe, name).convert_tokens_to_ids(TOKEN)
            _embeddings(pipe, name).register_forward_hook(partial(_with_trained_row, number, self.parameters[key]))

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Use the initial embeddings in the block."""
        with _swap_parameters(self.parameters, self._initial):
            yield

    def state(self) -> dict[str, Tensor]:
        """Return the embeddings (1, d); also write them into the encoders' tables, for `pipe.save_pretrained`."""
        for key, name in token_encoders(self.pipe).items():
            number = _tokenizer(self.pipe, name).convert_tokens_to_ids(TOKEN)
            set_parameter(_embeddings(self.pipe, name).weight[number], self.parameters[key][0])
        return {key: value.detach().clone() for key, value in self.parameters.items()}

    def write(self, state: Mapping[str, Tensor], folder: Path) -> Path:
        """Write the file of `pipe.load_textual_inversion(folder)`; with two text encoders it has a key for each."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({key: value.cpu().contiguous() for key, value in state.items()}, folder / EMBEDDINGS)
        return folder / EMBEDDINGS


# `parameters` are the denoiser's present ones by name, which FSDP replaces, or the token's.
Trainable = LoRA | FullFinetuning | ContextToken
