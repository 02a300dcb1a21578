"""Published checkpoints: downloaded at a revision, a commit where one is known, verified by sha256, read as tensors."""

from _pickle import UnpicklingError  # the error's name only: nothing is unpickled but tensors
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import constants, hf_hub_download
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.hub import download_url_to_file, get_dir

from steer.files import file_sha256
from steer.registry import nearest
from steer.reward import RewardError
from steer.tables import one_line

State = Mapping[str, Tensor]
MAX_KEYS_SHOWN = 4  # keys listed in a message
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
NO_NETWORK = "without a network set HF_HUB_OFFLINE=1 (or --offline) once it is in the cache, or name a file: path=…"


@dataclass(frozen=True)
class HubFile:
    """One file of a hub repository at one revision, and its sha256 if one is known."""

    repo: str
    filename: str
    revision: str
    sha256: str | None = None

    def fetch(self) -> Path:
        """Download the file to the hub's cache if missing (with a progress bar), verify it, and return its path.

        Raises RewardError.
        """
        try:
            path = Path(hf_hub_download(self.repo, self.filename, revision=self.revision))
        except Exception as error:  # errors of the hub and of every network library below it
            raise RewardError(
                f"cannot fetch {self.filename} of {self.repo}: {one_line(error)}; {NO_NETWORK}"
            ) from error
        verify(path, self.sha256)
        return path


@dataclass(frozen=True)
class WebFile:
    """One file of a public repository at one commit, and its sha256."""

    url: str
    sha256: str

    def fetch(self) -> Path:
        """Download the file to torch's hub cache if missing, verify it, and return its path. Raises RewardError."""
        path = Path(get_dir()) / "checkpoints" / f"{self.sha256[:16]}-{self.url.rsplit('/', 1)[1]}"
        if not path.exists():
            if constants.HF_HUB_OFFLINE:
                raise RewardError(f"offline, and {self.url} is not in the cache: download it, name the file: path=…")
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                download_url_to_file(self.url, str(path), hash_prefix=self.sha256)
            except Exception as error:  # network errors, and a checksum mismatch
                raise RewardError(f"cannot fetch {self.url}: {one_line(error)}; or name a file: path=…") from error
        verify(path, self.sha256)
        return path


def verify(path: Path, sha256: str | None) -> None:
    """Raise RewardError if the file's sha256 differs; None: not checked."""
    if sha256 is not None and (digest := file_sha256(path)) != sha256:
        raise RewardError(f"{path}: sha256 is {digest[:12]}…, expected {sha256[:12]}…: remove it, download it again")


def read_checkpoint(path: str | Path, sha256: str | None = None) -> dict[str, Tensor]:
    """Read the tensors of a .safetensors or torch file, on the CPU. A file that holds code is refused, not run.

    sha256  expected checksum (`fetch` has verified it already); None: not checked
    Raises RewardError, with one line that names the file and the problem.
    """
    path = Path(path)
    if not path.is_file():
        raise RewardError(f"{path}: no such checkpoint")
    verify(path, sha256)
    try:
        if path.suffix == ".safetensors":
            loaded: object = load_file(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
            # Training scripts wrap the weights in a table with their epoch and optimiser.
            loaded = loaded["state_dict"] if isinstance(loaded, dict) and "state_dict" in loaded else loaded
    except UnpicklingError as error:
        raise RewardError(
            f"{path}: refused, not a checkpoint of tensors only: it is corrupt, or contains code that would run"
        ) from error
    except Exception as error:  # a corrupt file may raise nearly anything in the readers
        raise RewardError(f"{path}: cannot be read, is it complete? ({one_line(error)})") from error
    if not isinstance(loaded, dict):
        raise RewardError(f"{path}: expected a table of named tensors, got {type(loaded).__name__}")
    for key, value in loaded.items():
        if not (isinstance(key, str) and torch.is_tensor(value)):
            raise RewardError(f"{path}: expected a table of named tensors, got {type(value).__name__} under {key!r}")
    return loaded


def load_weights(module: nn.Module, state: State, what: str, unused: Sequence[str] = ()) -> None:
    """Load every tensor of `state` into a module.

    unused  prefixes of keys in the published files that no score needs
    Raises RewardError that names `what` and the keys that are missing, unexpected or of another shape.
    """
    selected = {key: tensor for key, tensor in state.items() if not key.startswith(tuple(unused))}
    expected = module.state_dict()
    shared = expected.keys() & selected.keys()
    complaints = {
        "missing": expected.keys() - shared,
        "unexpected": selected.keys() - shared,
        "of another shape": {key for key in shared if expected[key].shape != selected[key].shape},
    }
    check_keys(what, complaints)
    module.load_state_dict(selected)


def check_keys(what: str, complaints: Mapping[str, Collection[str]]) -> None:
    """Raise RewardError that names `what` and the keys, if there are any: {"missing": keys, …}."""
    problems = []
    for kind, keys in complaints.items():
        more = f" and {len(keys) - MAX_KEYS_SHOWN} more" if len(keys) > MAX_KEYS_SHOWN else ""
        problems += [f"{kind}: {', '.join(sorted(keys)[:MAX_KEYS_SHOWN])}{more}"] if keys else []
    if problems:
        raise RewardError(f"{what}: the checkpoint does not fit this model ({'; '.join(problems)})")


LINEAR_LAYOUT = (0, 2, 4, 6, 7)  # indices of the linear layers in the layout with dropouts between them


def linear_layers(widths: Sequence[int], layout: Sequence[int], after: type[nn.Module] = nn.Identity) -> nn.Sequential:
    """Build linear layers at their indices in published checkpoints, each but the last followed by `after`.

    Identities take the place of dropouts.
    """
    layers: list[nn.Module] = [nn.Identity() for _ in range(layout[-1] + 1)]
    for index, before, width in zip(layout, widths, widths[1:], strict=False):
        layers[index] = nn.Linear(before, width)
        if index != layout[-1]:
            layers[index + 1] = after()
    return nn.Sequential(*layers)


def check_dtype(dtype: str | None) -> None:
    """Raise RewardError for an unknown dtype=…; None is valid."""
    if dtype is not None and dtype not in DTYPES:
        raise RewardError(f"dtype={dtype}: use {nearest(dtype, DTYPES)}")


def cast(module: nn.Module, dtype: str | None) -> nn.Module:
    """Freeze a module for evaluation, its weights in a dtype by name (None: unchanged). Raises RewardError."""
    check_dtype(dtype)
    module.eval().requires_grad_(False)
    return module if dtype is None else module.to(DTYPES[dtype])


def to_module_device(images: Tensor, *modules: nn.Module) -> Tensor:
    """Move images to the device of the modules; modules on the CPU move to the device of the images.

    Modules on an accelerator stay there, and images of other devices move to them. Weights are moved outside of
    torch.inference_mode, so that gradients can pass through them later.
    """
    target_device = next(p.device for module in modules for p in module.parameters())
    target_device = images.device if target_device.type == "cpu" else target_device
    with torch.inference_mode(False):
        for module in modules:
            module.to(target_device)
    return images.to(target_device)
