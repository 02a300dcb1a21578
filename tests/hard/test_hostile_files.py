"""Untrusted files with code, or that request huge memory: no code runs, and they are refused in one line."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from conftest import cached_pipe
from pyarrow import parquet
from reliability import Tally
from test_imagereward import Writes
from writers import WRITERS, export, reward, search_file

from steer.apps.finetuning import read_config
from steer.apps.models import adapter_applied, load_pipeline
from steer.apps.prompts import load_prompts
from steer.errors import InputError
from steer.pipelines.training.preference_files import read_preferences
from steer.rewards.parser import load_reward
from steer.rewards.preference_pairs import read_pairs
from steer.training.supervised import read_state

FULL = pytest.mark.hard
Corrupt = Callable[[Path, Path], Any]  # of a valid folder, and of the canary: a file that only executed code makes


def evil(folder: Path, canary: Path) -> None:
    """Write a module that creates the canary when it is imported."""
    names = "from diffusers import StableDiffusionPipeline as P, UNet2DConditionModel as U"
    code = (
        f"from pathlib import Path\nPath({str(canary)!r}).touch()\n{names}\nfrom transformers import CLIPTextModel as T"
    )
    (folder / "evil.py").write_text(code)


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def pickled(path: Path, canary: Path, by_torch: bool = True) -> None:
    """Replace the safetensors files of a folder by a pickle with code."""
    for old in path.parent.glob("*.safetensors"):
        old.unlink()
    with path.open("wb") as file:
        (torch.save if by_torch else pickle.dump)({"a": Writes(canary)}, file)


def index(m: Path, **changes: Any) -> None:
    change_json(m / "model_index.json", **changes)


MODELS: dict[str, Corrupt] = {
    "pipeline class in the folder": lambda m, c: (index(m, _class_name=["evil", "P"]), evil(m, c)),
    "component class in the folder": lambda m, c: (index(m, unet=["evil", "U"]), evil(m / "unet", c), evil(m, c)),
    "os.system": lambda m, c: index(m, unet=["os", "system"]),
    "subprocess.Popen": lambda m, c: index(m, unet=["subprocess", "Popen"]),
    "builtins.exec": lambda m, c: index(m, unet=["builtins", "exec"]),
    "builtin function as class": lambda m, c: index(m, _class_name="__import__"),
    "number for a class": lambda m, c: index(m, _class_name=3),
    "numbers for a component": lambda m, c: index(m, unet=[1, 2]),
    "list": lambda m, c: (m / "model_index.json").write_text("[]"),
    "deeply nested": lambda m, c: (m / "model_index.json").write_text("[" * 100_000),
    "unet .bin": lambda m, c: pickled(m / "unet/diffusion_pytorch_model.bin", c),
    "unet .bin, plain pickle": lambda m, c: pickled(m / "unet/diffusion_pytorch_model.bin", c, by_torch=False),
    "text encoder .bin": lambda m, c: pickled(m / "text_encoder/pytorch_model.bin", c),
    "text encoder .bin, plain pickle": lambda m, c: pickled(m / "text_encoder/pytorch_model.bin", c, by_torch=False),
    "pickle named .safetensors": lambda m, c: pickled(m / "unet/diffusion_pytorch_model.safetensors", c),
    "unet .ckpt alone": lambda m, c: pickled(m / "unet/diffusion_pytorch_model.ckpt", c),
    "vae .pt alone": lambda m, c: pickled(m / "vae/diffusion_pytorch_model.pt", c),
    "automatic model": lambda m, c: (
        index(m, text_encoder=["transformers", "AutoModel"]),
        change_json(
            m / "text_encoder/config.json", model_type="evil", auto_map={"AutoModel": "evil.T", "AutoConfig": "evil.T"}
        ),
        evil(m / "text_encoder", c),
    ),
    "automatic tokenizer": lambda m, c: (
        index(m, tokenizer=["transformers", "AutoTokenizer"]),
        change_json(
            m / "tokenizer/tokenizer_config.json", tokenizer_class="X", auto_map={"AutoTokenizer": ["evil.T", None]}
        ),
        evil(m / "tokenizer", c),
    ),
    "huge memory": lambda m, c: change_json(m / "unet/config.json", block_out_channels=[10**6, 10**6]),
    "text for a number": lambda m, c: change_json(m / "scheduler/scheduler_config.json", num_train_timesteps="many"),
    "truncated weights": lambda m, c: os.truncate(m / "unet/diffusion_pytorch_model.safetensors", 1000),
}
# The class is given by model_index.json; classes named in other configurations are ignored, and the model loads.
IGNORED: dict[str, Corrupt] = {
    "auto_map": lambda m, c: (
        change_json(m / "text_encoder/config.json", auto_map={"AutoModel": "evil.T", "AutoConfig": "evil.T"}),
        evil(m / "text_encoder", c),
    ),
    "class in a configuration": lambda m, c: (
        change_json(m / "unet/config.json", _class_name=["evil", "U"]),
        evil(m / "unet", c),
    ),
}


@pytest.mark.parametrize(
    "names", [[*MODELS][3:14:5], pytest.param([*MODELS, *IGNORED], marks=FULL)], ids=["some", "all"]
)
def test_no_code_of_a_model_folder_runs(tmp_path: Path, names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    cached_pipe("sd").save_pretrained(tmp_path / "valid")
    monkeypatch.chdir(tmp_path)
    tally, canary = Tally(), tmp_path / "canary"
    for name in names:
        model = Path(shutil.copytree(tmp_path / "valid", tmp_path / name.replace(" ", "-")))
        (MODELS | IGNORED)[name](model, canary)
        try:
            load_pipeline(str(model))
            outcome = "loaded without it"
        except InputError as error:
            assert "\n" not in str(error), name
            outcome = "refused"
        tally.count(outcome, not canary.exists() and (outcome == "refused") == (name in MODELS))
        assert tally.lost == 0, (name, outcome)
    if len(names) > len(MODELS):
        tally.note("model folders that hold code")


def put(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def code(canary: Path) -> bytes:
    return pickle.dumps({"a": Writes(canary)}, 2)


def adapter_with(home: Path, canary: Path, **changes: Any) -> str:
    export(home, 1)
    place = home / "final"
    (place / "pytorch_lora_weights.safetensors").rename(place / "adapter_model.safetensors")
    put(place / "adapter_config.json", json.dumps({"peft_type": "LORA", "r": 2, "target_modules": ["to_q"]} | changes))
    evil(place, canary)
    return str(place)


def load_adapter(path: Path | str) -> None:
    with adapter_applied(cached_pipe("sd"), str(path)):
        raise AssertionError("it was applied")


def card(home: Path, canary: Path, **changes: Any) -> str:
    reward(home, 1)
    (home / "SHA256SUMS").unlink()
    change_json(home / "reward.json", **changes)
    return str(home)


def preferences(home: Path, file: str, content: bytes) -> Path:
    WRITERS["preferences"].before(home)
    put(next(home.glob(file)), content)
    return home


class Extended(pa.ExtensionType):
    """An extension type that older versions of pyarrow unpickled."""

    def __init__(self) -> None:
        super().__init__(pa.string(), "arrow.py_extension_type")

    def __arrow_ext_serialize__(self) -> bytes:
        return CODE[0]

    @classmethod
    def __arrow_ext_deserialize__(cls, storage: Any, serialized: bytes) -> "Extended":
        return cls()


CODE: list[bytes] = []


def extended(path: Path, canary: Path) -> Path:
    CODE[:] = [code(canary)]
    column = pa.ExtensionArray.from_storage(Extended(), pa.array(["a star"]))
    parquet.write_table(pa.table({"prompt": column}), path)
    return path


TAG = "!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [{canary}]]"
ALIASES = "\n".join(["a0: &a0 [x]", *(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, 12))])
FILES: dict[str, Callable[[Path, Path], Any]] = {
    "LoRA, pickle": lambda h, c: load_adapter(put(h / "lora.safetensors", code(c))),
    "LoRA .bin": lambda h, c: load_adapter(put(h / "lora.bin", code(c))),
    "LoRA .ckpt": lambda h, c: load_adapter(put(h / "lora.ckpt", code(c))),
    "LoRA folder of .bin": lambda h, c: load_adapter(put(h / "pytorch_lora_weights.bin", code(c)).parent),
    "peft folder of .bin": lambda h, c: load_adapter(put(h / "adapter_model.bin", code(c)).parent),
    "peft of another type": lambda h, c: load_adapter(adapter_with(h, c, peft_type="PROMPT_TUNING")),
    "peft that imports a module": lambda h, c: load_adapter(
        adapter_with(h, c, auto_mapping={"parent_library": "evil"})
    ),
    "peft, megatron": lambda h, c: load_adapter(adapter_with(h, c, megatron_config={}, megatron_core="evil")),
    "peft with a text for a number": lambda h, c: load_adapter(adapter_with(h, c, r="two")),
    "peft, a list": lambda h, c: load_adapter(
        put(h / "adapter_config.json", "[]") and put(h / "adapter_model.safetensors", b"").parent
    ),
    "checksums, too large": lambda h, c: load_adapter(
        (export(h, 1), put(h / "final/SHA256SUMS", b"x" * (1 << 21)).parent)[1]
    ),
    "checksums, no text": lambda h, c: load_adapter((export(h, 1), put(h / "final/SHA256SUMS", b"\0\xff\n").parent)[1]),
    "reward head, pickle": lambda h, c: load_reward(
        str(put(Path(card(h, c)) / "member-0.safetensors", code(c)).parent)
    ),
    "reward head named as a function": lambda h, c: load_reward(card(h, c, head="os.system")),
    "reward with a backbone in a module": lambda h, c: load_reward(card(h, c, backbone="evil:P")),
    "reward with a huge width": lambda h, c: load_reward(card(h, c, width=10**9)),
    "training state, pickle": lambda h, c: read_state(put(h / "state.pt", code(c)), torch.device("cpu")),
    "noise search, pickle": lambda h, c: search_file(put(h / "state", code(c)).parent).load(torch.device("cpu"), 3),
    "trajectories, pickle": lambda h, c: read_preferences(preferences(h, "trajectories/*", code(c))),
    "preferences, nested": lambda h, c: read_preferences(preferences(h, "choices.jsonl", b"[" * 10**5 + b"\n[")),
    "preferences, image": lambda h, c: read_preferences(preferences(h, "images/*", code(c))),
    "prompts, pickle": lambda h, c: load_prompts(str(put(h / "p.parquet", code(c)))),
    "prompts, nested": lambda h, c: load_prompts(str(put(h / "p.jsonl", "[" * 10**5))),
    "prompts, no text": lambda h, c: load_prompts(str(put(h / "p.jsonl", '{"prompt": {"py/reduce": ["os.system"]}}'))),
    "prompts, binary": lambda h, c: load_prompts(str(put(h / "p.txt", b"\xff\xfe\x00"))),
    "pairs, pickle": lambda h, c: read_pairs(put(h / "p.parquet", code(c))),
    "configuration, tag": lambda h, c: read_config(
        str(put(h / "c.yaml", f"method: prdp\nx: {TAG.format(canary=c)}\n"))
    ),
    "configuration, aliases": lambda h, c: read_config(str(put(h / "c.yaml", f"method: prdp\n{ALIASES}\n"))),
    "reward file, tag": lambda h, c: load_reward(str(put(h / "r.yaml", f"rewards: [{TAG.format(canary=c)}]\n"))),
    "reward file, aliases": lambda h, c: load_reward(str(put(h / "r.yaml", f"{ALIASES}\nrewards: *a11\n"))),
}


@pytest.mark.parametrize("noted", [False, pytest.param(True, marks=FULL)])
def test_no_code_of_a_file_runs(tmp_path: Path, noted: bool) -> None:
    tally, canary = Tally(), tmp_path / "canary"
    for number, (name, read) in enumerate(FILES.items()):
        home = tmp_path / f"{number}"
        home.mkdir()
        with pytest.raises(InputError) as error:
            read(home, canary)
        assert not canary.exists() and "\n" not in str(error.value), (name, str(error.value))

        tally.count("refused")
    assert load_prompts(str(extended(tmp_path / "e.parquet", canary))) == ["a star"] and not canary.exists()
    tally.count("read without its code")
    if noted:
        tally.note("files that hold code")
