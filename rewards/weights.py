"""Checkpoints from outside: fetched at a pinned revision, verified, read without running anything in them."""

import hashlib
import zipfile
from _pickle import UnpicklingError  # the error's name only: nothing is unpickled but tensors
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.hub import download_url_to_file, get_dir

from steer.choices import nearest
from steer.reward import RewardError

State = Mapping[str, Tensor]
SHOWN = 4  # keys named in a message
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
NO_NETWORK = "without a network set HF_HUB_OFFLINE=1 (or --offline) once it is in the cache, or name a file: path=…"


@dataclass(frozen=True)
class HubFile:
    """One file of a hub repository at one revision, and its sha256 where one is known."""

    repo: str
    filename: str
    revision: str
    sha256: str | None = None

    def fetch(self) -> Path:
        """Its place in the hub's cache, downloaded (with a progress bar) if it is not there. Raises RewardError."""
        try:
            return Path(hf_hub_download(self.repo, self.filename, revision=self.revision))
        except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            raise RewardError(f"cannot fetch {self.filename} of {self.repo}: {reason}; {NO_NETWORK}") from error


@dataclass(frozen=True)
class WebFile:
    """One file of a public repository at one commit, and its sha256."""

    url: str
    sha256: str

    def fetch(self) -> Path:
        """Its place in torch's hub cache, downloaded and verified if it is not there. Raises RewardError."""
        path = Path(get_dir()) / "checkpoints" / f"{self.sha256[:16]}-{self.url.rsplit('/', 1)[1]}"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                download_url_to_file(self.url, str(path), hash_prefix=self.sha256)
            except (OSError, RuntimeError) as error:
                raise RewardError(f"cannot fetch {self.url}: {error}; or name a file: path=…") from error
        return path


def sha256_of(path: Path) -> str:
    """The file's sha256, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_checkpoint(path: str | Path, sha256: str | None = None) -> dict[str, Tensor]:
    """The tensors of a .safetensors or torch file, on the CPU. A file that holds code is refused, not run.

    sha256  refused when the file has another; None: not checked
    Raises RewardError, one line that names the file and what is wrong with it.
    """
    path = Path(path)
    if not path.is_file():
        raise RewardError(f"{path}: no such checkpoint")
    if sha256 and (found := sha256_of(path)) != sha256:
        raise RewardError(f"{path}: sha256 is {found[:12]}…, expected {sha256[:12]}…: download it again")
    try:
        loaded = _tensors(path)
    except UnpicklingError as error:
        raise RewardError(f"{path}: refused, it holds more than tensors and could run code when read") from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise RewardError(f"{path}: cannot be read, is it whole? ({reason[:120]})") from error
    if not isinstance(loaded, dict):
        raise RewardError(f"{path}: expected a table of named tensors, got {type(loaded).__name__}")
    for key, value in loaded.items():
        if not (isinstance(key, str) and torch.is_tensor(value)):
            raise RewardError(f"{path}: expected a table of named tensors, found {type(value).__name__} under {key!r}")
    return loaded


def _tensors(path: Path) -> object:
    if path.suffix == ".safetensors":
        return load_file(path)
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    # Training scripts wrap the weights in a table with their epoch and optimiser.
    return loaded["state_dict"] if isinstance(loaded, dict) and "state_dict" in loaded else loaded


def load_weights(module: nn.Module, state: State, what: str, unused: Iterable[str] = ()) -> None:
    """Puts every tensor of `state` where it belongs.

    unused  beginnings of keys that the published files carry and nobody needs
    Raises RewardError that names `what` and the keys that are missing, unexpected or of another shape.
    """
    skipped = tuple(unused)
    given = {key: tensor for key, tensor in state.items() if not (skipped and key.startswith(skipped))}
    wanted = module.state_dict()
    complaints = {
        "missing": sorted(wanted.keys() - given.keys()),
        "unexpected": sorted(given.keys() - wanted.keys()),
        "of another shape": sorted(
            key for key in wanted.keys() & given.keys() if wanted[key].shape != given[key].shape
        ),
    }
    if any(complaints.values()):
        told = "; ".join(f"{kind}: {_some(keys)}" for kind, keys in complaints.items() if keys)
        raise RewardError(f"{what}: the checkpoint does not fit this model ({told})")
    module.load_state_dict(given)


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return ", ".join(keys[:SHOWN]) + more


def cast(module: nn.Module, dtype: str | None) -> nn.Module:
    """The module frozen, ready to evaluate, its weights in a dtype by name (None: as they are). Raises RewardError."""
    if dtype is not None and dtype not in DTYPES:
        raise RewardError(f"dtype={dtype}: use {nearest(dtype, DTYPES)}")
    module.eval().requires_grad_(False)
    return module if dtype is None else module.to(DTYPES[dtype])
