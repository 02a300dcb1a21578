"""Reading checkpoints from outside: what is whole and plain is read, anything else refused and never run."""

import hashlib
import io
import pickle
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_imagereward import Writes, refused
from torch import Tensor, nn

from steer.reward import RewardError
from steer.rewards.images import in_micro_batches
from steer.rewards.weights import HubFile, WebFile, cast, load_weights, read_checkpoint, to_module_device

STATE = {"layer.weight": torch.arange(6.0).view(2, 3), "layer.bias": torch.ones(2, dtype=torch.float16)}
HUB = HubFile("somebody/something", "weights.pt", "0123abcd")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def legacy(state: object, path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("weights.safetensors", save_file),
        ("weights.pt", torch.save),
        ("weights.pth", lambda state, path: torch.save({"state_dict": state, "epoch": 3, "optimizer": {}}, path)),
        ("legacy.bin", legacy),
    ],
)
def test_tensors_come_back_as_they_were_saved(tmp_path: Path, name: str, save: Callable[[object, Path], None]) -> None:
    save(STATE, tmp_path / name)
    for given in (tmp_path / name, str(tmp_path / name)):
        state = read_checkpoint(given, sha256(tmp_path / name))
        assert state.keys() == STATE.keys()
        assert all(torch.equal(state[key], STATE[key]) and state[key].dtype == STATE[key].dtype for key in STATE)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (STATE["layer.bias"], "expected a table of named tensors, got Tensor"),
        ([1, 2], "expected a table of named tensors, got list"),
        ({"a": 1}, "got int under 'a'"),
        ({"a": {"b": torch.ones(1)}}, "got dict under 'a'"),
        ({3: torch.ones(1)}, "got Tensor under 3"),
        ({"state_dict": None}, "got NoneType"),
        ({"a": nn.Linear(1, 1)}, "refused"),
    ],
)
def test_what_is_no_table_of_tensors_is_refused(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "weights.pt")
    refused(lambda: read_checkpoint(tmp_path / "weights.pt"), f"weights.pt: .*{message}")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.pt", None, "no such checkpoint"),
        ("empty.pt", b"", "cannot be read, is it complete"),
        ("empty.safetensors", b"", "cannot be read, is it complete"),
        ("page.pt", b"<html>404: Not Found</html>", "refused, .* corrupt, or contains code"),
        ("page.safetensors", b"<html>404: Not Found</html>", "cannot be read, is it complete"),
        ("pointer.pt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "refused, .* corrupt"),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    refused(lambda: read_checkpoint(tmp_path / name), f"{name}: {message}")
    refused(lambda: read_checkpoint(tmp_path), "no such checkpoint")


def test_another_sha256_is_refused_before_the_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(b"no checkpoint at all")
    refused(lambda: read_checkpoint(path, "0" * 64), f"sha256 is {sha256(path)[:12]}…, expected 000000000000…: remove")


@pytest.mark.parametrize("save", [torch.save, legacy, lambda state, path: path.write_bytes(pickle.dumps(state, 2))])
@pytest.mark.parametrize("wrap", [lambda evil: {"a": evil}, lambda evil: evil, lambda evil: {"state_dict": evil}])
def test_code_is_refused_and_not_run(
    tmp_path: Path, save: Callable[[object, Path], None], wrap: Callable[[object], object]
) -> None:
    canary = tmp_path / "canary"
    save(wrap(Writes(canary)), tmp_path / "weights.pt")
    refused(lambda: read_checkpoint(tmp_path / "weights.pt"), "weights.pt: refused, .* code that would run")
    assert not canary.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:Defining your `__torch_function__`")
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_truncated_or_corrupt_file_is_read_or_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("corrupt.safetensors" if kind == "safetensors" else "corrupt.pt")
    {"zip": torch.save, "legacy": legacy, "safetensors": save_file}[kind](STATE, path)
    whole, sampled = path.read_bytes(), random.Random(0)
    for count in range(0, len(whole) - 1, 29):
        path.write_bytes(whole[:count])
        refused(lambda: read_checkpoint(path), path.name)
    for _ in range(200):
        corrupt = bytearray(whole)
        for place in sampled.sample(range(len(whole)), sampled.choice([1, 2, 8])):
            corrupt[place] = sampled.randrange(256)
        path.write_bytes(corrupt)
        try:
            read_checkpoint(path)
        except RewardError as error:
            assert "\n" not in str(error)


def test_weights_go_where_they_belong_or_are_named() -> None:
    module = nn.ModuleDict({"layer": nn.Linear(3, 2)})
    load_weights(module, STATE | {"old.table": torch.ones(1)}, "weights.pt", unused=("old.",))
    assert torch.equal(module.state_dict()["layer.weight"], STATE["layer.weight"])
    assert module.state_dict()["layer.bias"].dtype == torch.float32
    before = module.state_dict()["layer.weight"].clone()
    wrong = {"layer.weight": torch.ones(3, 2), **{f"odd.{k}": torch.ones(1) for k in range(6)}}
    error_text = (
        "missing: layer.bias; unexpected: odd.0, odd.1, odd.2, odd.3 and 2 more; of another shape: layer.weight"
    )
    refused(lambda: load_weights(module, wrong, "weights.pt"), f"weights.pt: .*does not fit this model .{error_text}")
    assert torch.equal(module.state_dict()["layer.weight"], before)


def test_cast_freezes_and_knows_its_dtypes() -> None:
    module = cast(nn.Sequential(nn.Linear(2, 2), nn.Dropout()), "bfloat16")
    assert not module.training and not any(parameter.requires_grad for parameter in module.parameters())
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in cast(nn.Linear(2, 2).half(), None).parameters()} == {torch.float16}
    refused(lambda: cast(module, "float61"), "dtype=float61: use float16 or .*float32")


def test_a_module_that_moves_in_inference_mode_keeps_weights_for_gradients() -> None:
    module = nn.Linear(2, 2)
    with torch.inference_mode():
        to_module_device(torch.ones(1, device="meta"), module)
    assert all(p.device.type == "meta" and not p.is_inference() for p in module.parameters())


@pytest.mark.parametrize("size", [1, 2, 3, 7, "4"])
def test_micro_batches_are_bounded_and_pair_images_with_prompts(size: int | str) -> None:
    calls: list[int] = []

    def lengths(images: Tensor, prompts: list[str]) -> Tensor:
        calls.append(len(images))
        return images * torch.tensor([len(prompt) for prompt in prompts])

    batched = in_micro_batches(lengths, size)
    images = torch.arange(1.0, 6.0).requires_grad_()
    scores = batched(images, ["a", "bb", "ccc", "", "eeeee"])
    assert scores.tolist() == [1, 4, 9, 0, 25] and max(calls) <= int(size) and sum(calls) == 5
    scores.sum().backward()
    assert images.grad is not None and images.grad.tolist() == [1, 2, 3, 0, 5]
    assert sum(calls) == (5 if int(size) >= 5 else 10)  # computed again in the backward pass, not kept
    with torch.no_grad():
        batched(images, ["a"] * 5)
    assert sum(calls[-5:]) >= 5


@pytest.mark.parametrize("size", [0, -1, "many", "1.5", "", 2.0])
def test_a_micro_batch_is_a_whole_number(size: object) -> None:
    message = f"micro_batch={size}: use a positive integer"
    refused(lambda: in_micro_batches(lambda images, prompts: images, size), message)  # type: ignore[arg-type]


class Download:
    """In the place of either downloader: notes what it is asked for, and writes or raises."""

    def __init__(self, path: Path, content: bytes | Exception) -> None:
        self.path, self.content = path, content
        self.asked: list[tuple[object, ...]] = []

    def from_hub(self, repo: str, filename: str, *, revision: str) -> str:
        self.asked.append((repo, filename, revision))
        return self._written(self.path)

    def from_web(self, url: str, path: str, *, hash_prefix: str) -> str:
        self.asked.append((url, hash_prefix))
        return self._written(Path(path))

    def _written(self, path: Path) -> str:
        if isinstance(self.content, Exception):
            raise self.content
        path.write_bytes(self.content)
        return str(path)


Downloading = Callable[[bytes | Exception], Download]


@pytest.fixture
def downloading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Downloading:
    def instead(content: bytes | Exception) -> Download:
        download = Download(tmp_path / "hub.pt", content)
        monkeypatch.setattr("steer.rewards.weights.hf_hub_download", download.from_hub)
        monkeypatch.setattr("steer.rewards.weights.download_url_to_file", download.from_web)
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        return download

    return instead


CONTENT = b"weights"
HASH = hashlib.sha256(CONTENT).hexdigest()
WEB = WebFile("https://raw.githubusercontent.com/somebody/something/0123abcd/head%2B1.pth", HASH)
PINNED = HubFile("somebody/something", "weights.pt", "0123abcd", HASH)


@pytest.mark.parametrize("file", [HUB, PINNED])
def test_a_file_of_the_hub_is_asked_for_at_its_revision(downloading: Downloading, file: HubFile) -> None:
    download = downloading(CONTENT)
    assert file.fetch().read_bytes() == CONTENT
    assert download.asked == [("somebody/something", "weights.pt", "0123abcd")]


def test_a_file_of_the_web_is_downloaded_once(downloading: Downloading) -> None:
    download = downloading(CONTENT)
    assert WEB.fetch() == WEB.fetch()
    assert WEB.fetch().read_bytes() == CONTENT and WEB.fetch().name.endswith("head%2B1.pth")
    assert download.asked == [(WEB.url, HASH)]


@pytest.mark.parametrize("file", [WEB, PINNED])
def test_another_file_is_refused_fresh_or_from_the_cache(downloading: Downloading, file: HubFile | WebFile) -> None:
    downloading(b"other weights")
    refused(file.fetch, f"sha256 is .*, expected {HASH[:12]}…: remove it, download it again")
    downloading(CONTENT)
    if isinstance(file, WebFile):
        refused(file.fetch, "sha256 is ")  # still the one in the cache
    else:
        assert file.fetch().read_bytes() == CONTENT


@pytest.mark.parametrize("error", [OSError("no route\nto host"), RuntimeError("odd hash"), EOFError(), ValueError("?")])
@pytest.mark.parametrize("file", [WEB, HUB])
def test_a_failed_download_is_reported_in_one_line(
    downloading: Downloading, file: HubFile | WebFile, error: Exception
) -> None:
    downloading(error)
    error_text = str(error).split("\n")[0] or type(error).__name__
    refused(file.fetch, f"cannot fetch .*: .*{error_text.replace('?', '.')}.*; .*path=")


def test_offline_nothing_is_downloaded_and_the_cache_is_used(
    downloading: Downloading, monkeypatch: pytest.MonkeyPatch
) -> None:
    download = downloading(CONTENT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(WEB.fetch, "offline, and https://.*head%2B1.pth is not in the cache: download it, name the file: path=")
    assert not download.asked
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    WEB.fetch()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert WEB.fetch().read_bytes() == CONTENT


def test_a_saved_file_is_read_by_way_of_the_hub(downloading: Downloading) -> None:
    buffer = io.BytesIO()
    torch.save(STATE, buffer)
    downloading(buffer.getvalue())
    assert read_checkpoint(HUB.fetch()).keys() == STATE.keys()
    refused(partial(read_checkpoint, HUB.fetch(), "0" * 64), "hub.pt: sha256 is ")
