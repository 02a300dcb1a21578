"""Everything of steer that reads what others wrote, as functions of bytes: what the fuzzers and their corpus run.

Whatever the bytes are, a parser ends with a value or with an InputError of one line; the value, written as steer writes
it, is read again as the same. It needs less than 2 seconds of CPU, reaches for no network and no program, and writes
nothing but what it is asked to.
"""

import hashlib
import json
import re
import signal
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import yaml
from PIL import Image
from pyarrow import parquet

from steer import rewards
from steer.apps.finetune_cli import keys_of
from steer.apps.finetune_config import read_config
from steer.apps.named_rewards import names_alone
from steer.apps.png_metadata import KEY, read_metadata, read_png, write_png
from steer.apps.prompts import read_prompts
from steer.apps.sample_record import REPORT, open_record
from steer.apps.sample_settings import SampleSettings
from steer.checkpoint import Checkpoint
from steer.checkpoint_files import MANIFEST, read_manifest, write_files
from steer.errors import InputError
from steer.pipelines.choice_files import CHOICES, LOTS, SETTINGS, DrawnWith
from steer.pipelines.choice_folder import ChoiceFolder
from steer.pipelines.choice_reading import Recorded, read_choices
from steer.reward import load_reward
from steer.rewards.transform import read_calibration
from steer.trajectory import Rows, Trajectories

SECONDS = 2  # of CPU, for one input
SMALL = {"scene", "jpeg", "jpeg-incompressible", "colour", "brightness"}  # the rewards that load no weights
SAMPLE = SampleSettings(
    *("scenes", "fk", "brightness", 2, 4, None, None, "difference", "systematic", "constant", 0.5, None, 0, True, None)
)
PARTED = b"\n---\n"  # between the files of a folder, in one input


class Finding(AssertionError):
    """A parser did what none may do."""


@dataclass(frozen=True)
class Parser:
    """read: bytes → a value, in a folder of its own; again: the value, written and read once more, if it is written.

    modules  whose branches a coverage-guided fuzzer follows
    """

    read: Callable[[bytes, Path], Any]
    again: Callable[[Any, Path], Any]
    modules: tuple[str, ...]


def run(name: str, data: bytes, folder: Path) -> str:
    """Whether the bytes are read or refused; raises Finding, or whatever a parser raised, for what may not be."""
    parser = PARSERS[name]
    with _held():
        try:
            found = parser.read(data, folder)
        except InputError as error:
            _check_line(str(error))
            return "refused"
        if (again := parser.again(found, folder)) != found:
            raise Finding(f"read as {found!r}, and written and read again as {again!r}")
    return "read"


def _check_line(told: str) -> None:
    """Raises Finding for a message that is not one line, or could not be shown."""
    if len(told.splitlines()) != 1 or re.search("[\x00-\x1f\x7f-\x9f\ud800-\udfff]", told):
        raise Finding(f"no line of text: {told!r}")
    if len(told) > 2000:
        raise Finding(f"a line of {len(told)} characters: {told!r:.400}")


_reached: list[str] = []
_watching: list[bool] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Python's own audit: nothing else sees all that a process opens, imports and starts."""
    if not _watching:
        return
    if event == "import" and arguments[0].partition(".")[0] not in sys.modules:
        raise ImportError(f"{arguments[0]} is not there while parsers are tried")  # code that a text names
    if event in ("socket.connect", "socket.getaddrinfo", "os.system", "subprocess.Popen", "os.exec", "os.fork"):
        _reached.append(f"{event} {arguments}")
        raise PermissionError(event)


sys.addaudithook(_watch)


def _late(number: int, frame: Any) -> None:
    raise Finding(f"more than {SECONDS} seconds of CPU")


@contextmanager
def _held() -> Iterator[None]:
    """Ends what takes too long; raises Finding where a program or the network was reached for."""
    _reached.clear()
    before = signal.signal(signal.SIGVTALRM, _late)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    _watching.append(True)
    try:
        yield
    finally:
        _watching.clear()
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    if _reached:
        raise Finding(f"reached for {_reached}")


def _put(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return path


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _config(data: bytes, folder: Path) -> Any:
    return read_config(str(_put(folder / "c.yaml", data))).plain()


def _words(data: bytes, folder: Path) -> Any:
    """What a person writes behind the name of a configuration, a word a line."""
    return read_config("d3po-scenes", keys_of(_text(data).split("\n"))).plain()


def _config_again(told: Any, folder: Path) -> Any:
    return _config(yaml.safe_dump(told, sort_keys=False, allow_unicode=True, width=120).encode(), folder)


@contextmanager
def _small_rewards() -> Iterator[None]:
    """The table without what takes seconds to load, or the network."""
    whole = dict(rewards.REWARDS)
    for name in whole.keys() - SMALL:
        del rewards.REWARDS[name]
    try:
        yield
    finally:
        rewards.REWARDS.clear()
        rewards.REWARDS.update(whole)


def _reward(data: bytes, folder: Path) -> str:
    text = _text(data)
    if "://" in text:
        raise InputError("a remote reward: it has tests of its own")
    names_alone(text)
    with _small_rewards():
        return load_reward(text).name


def _reward_again(name: str, folder: Path) -> str:
    """The name of what is made of rewards that have one is a text that reads as it, but for what a file told."""
    whole = names_alone(name) and "logsigmoid" not in name
    return _reward(name.encode(), folder) if whole else name


def _reward_file(data: bytes, folder: Path) -> str:
    return _reward(str(_put(folder / "r.yaml", data)).encode(), folder)


def _prompts(data: bytes, folder: Path) -> list[list[str]]:
    """The same bytes as each kind of text: what is one of them is seldom another."""
    found = []
    for suffix in ("txt", "tsv", "jsonl"):
        try:
            found.append(read_prompts(_put(folder / f"p.{suffix}", data)))
        except InputError as error:
            _check_line(str(error))
    if not found:
        raise InputError("neither text nor table nor JSON lines")
    return found


def _prompts_again(found: list[list[str]], folder: Path) -> list[list[str]]:
    lines = ("\n".join(json.dumps({"prompt": prompt}) for prompt in prompts) for prompts in found)
    return [read_prompts(_put(folder / "q.jsonl", text)) for text in lines]


def _parquet(data: bytes, folder: Path) -> list[str]:
    return read_prompts(_put(folder / "p.parquet", data))


def _parquet_again(prompts: list[str], folder: Path) -> list[str]:
    parquet.write_table(pa.table({"prompt": prompts}), folder / "q.parquet")
    return read_prompts(folder / "q.parquet")


def _choices(data: bytes, folder: Path) -> Any:
    """settings.json, lots.jsonl and choices.jsonl, beside the images and trajectories of two lots."""
    if not (folder / "images").exists():
        write_choices(folder)
    texts = (data.split(PARTED, 2) + [b""] * 2)[:3]
    for name, text in zip((SETTINGS, LOTS, CHOICES), texts, strict=True):
        _put(folder / name, text)
    return _told(read_choices(folder))


def write_choices(folder: Path) -> None:
    """Two lots, of which one has trajectories, and a choice of each."""
    plain = (
        "P",
        "scenes",
        {"_class_name": "S"},
        {"num_inference_steps": 3},
        1.0,
        "float32",
        "float32",
        "cpu",
        "1",
        "1",
    )
    recorded = ChoiceFolder.create_as(folder, DrawnWith(*plain))
    for number in (1, 2):
        rows = Rows(("a star",) * 2, (number,) * 2, (3, 4))
        drew = Trajectories(rows, torch.zeros(2, 3, 1, 2, 2), (0, 2), torch.zeros(2, 2))
        lot = recorded.write_lot(drew, torch.full((2, 3, 1, 1), number / 2), keep_trajectories=number == 2)
        recorded.write_choice(lot, 0, 1)


def _told(found: Recorded) -> Any:
    lots = [lot.line() for lot in found.lots.values()]
    return json.dumps([asdict(found.drawn), lots, [asdict(one) for one in found.choices]])


def _choices_again(told: str, folder: Path) -> Any:
    drawn, *rows = json.loads(told)
    files = (json.dumps(drawn), *("\n".join(map(json.dumps, some)) + "\n" for some in rows))
    return _choices(PARTED.join(text.encode() for text in files), folder)


def _manifest(data: bytes, folder: Path) -> Any:
    """Of a checkpoint of two files; the bytes as they are or, as no fuzzer finds a sum, with a right one."""
    for path in folder.iterdir():
        if path.suffix in (".safetensors", ".json"):
            path.unlink()
    write_files(folder, 7, {"weights": {"a": torch.zeros(2)}}, {"told": "{}\n"})
    _put(folder / MANIFEST, data)
    try:
        return read_manifest(folder)
    except InputError as error:
        _check_line(str(error))
    _put(folder / MANIFEST, _sealed(data))
    Checkpoint.open(folder)
    return read_manifest(folder)


def _sealed(data: bytes) -> bytes:
    try:
        told = json.loads(data)
    except (ValueError, RecursionError):
        return data
    if not isinstance(told, dict):
        return data
    told.pop("sha256", None)
    own = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    return (json.dumps(told | {"sha256": own}, sort_keys=True, indent=1) + "\n").encode()


def _manifest_again(found: Any, folder: Path) -> Any:
    step, files = found
    _put(folder / MANIFEST, _sealed(json.dumps({"version": 1, "step": step, "files": files}).encode()))
    return read_manifest(folder)


def _png(data: bytes, folder: Path) -> Any:
    recipe, image = read_png(data)
    return recipe, image.mode, image.size, image.tobytes()


def _png_again(found: Any, folder: Path) -> Any:
    recipe, mode, size, pixels = found
    write_png(Image.frombytes(mode, size, pixels), folder / "a.png", recipe)
    read, image = read_png(folder / "a.png")
    return read, mode, image.size, pixels  # a palette's pixels are written as their numbers


def _recipe(data: bytes, folder: Path) -> Any:
    """The bytes as the text in a PNG."""
    return read_metadata(png_saying(data))


def _recipe_again(recipe: Any, folder: Path) -> Any:
    names_alone(recipe.settings.reward)
    write_png(Image.new("RGB", (1, 1)), folder / "a.png", recipe)
    return read_metadata(folder / "a.png")


def png_saying(text: bytes) -> bytes:
    """A PNG of one pixel with a text in place of the recipe: by the PNG specification, 5.3."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)),
        (b"iTXt", KEY.encode() + bytes(5) + text),
        (b"IDAT", zlib.compress(bytes(4))),
        (b"IEND", b""),
    ]
    told = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(told)


def _report(data: bytes, folder: Path) -> Any:
    _put(folder / REPORT, data)
    return _told_of(folder)


def _told_of(folder: Path) -> Any:
    record = open_record(folder, ["a star", "a circle"], SAMPLE)
    record.missing(2, animation=True)
    return json.dumps([record.told, record.entries], sort_keys=True)


def _report_again(told: str, folder: Path) -> Any:
    open_record(folder, ["a star", "a circle"], SAMPLE).save()
    return _told_of(folder)


def _calibration(data: bytes, folder: Path) -> Any:
    return read_calibration(_put(folder / "c.json", data))


def _calibration_again(found: Any, folder: Path) -> Any:
    found.save(folder / "d.json")
    return read_calibration(folder / "d.json")


_YAML = ("yaml.reader", "yaml.scanner", "yaml.parser", "yaml.composer", "yaml.constructor", "yaml.resolver")
_CONFIG = (
    "steer.apps.finetune_config",
    "steer.apps.finetune_job",
    "steer.pipelines.finetune_settings",
    "steer.choices",
)
_REWARD = tuple(f"steer.rewards.{name}" for name in ("expression", "grammar", "aggregate", "combine", "transform"))
_PNG = ("steer.apps.png_metadata", "steer.apps.sample_settings", "steer.pipelines.plan", "steer.apps.named_rewards")
PARSERS = {
    "config": Parser(_config, _config_again, (*_CONFIG, "steer.apps.yaml_text", *_YAML)),
    "config-words": Parser(
        _words, _config_again, (*_CONFIG, "steer.apps.finetune_cli", "steer.apps.yaml_text", *_YAML)
    ),
    "reward": Parser(_reward, _reward_again, (*_REWARD, "steer.reward", "steer.apps.named_rewards")),
    "reward-file": Parser(_reward_file, _reward_again, (*_REWARD, "steer.reward", *_YAML)),
    "prompts": Parser(_prompts, _prompts_again, ("steer.apps.prompts", "json.decoder")),
    "parquet": Parser(_parquet, _parquet_again, ("steer.apps.prompts",)),
    "choices": Parser(_choices, _choices_again, ("steer.pipelines.choice_files", "steer.pipelines.choice_reading")),
    "manifest": Parser(_manifest, _manifest_again, ("steer.checkpoint_files", "steer.checkpoint")),
    "png": Parser(_png, _png_again, (*_PNG, "PIL.PngImagePlugin", "PIL.ImageFile", "PIL.Image")),
    "recipe": Parser(_recipe, _recipe_again, (*_PNG, "json.decoder")),
    "report": Parser(_report, _report_again, ("steer.apps.sample_record", "steer.sums")),
    "calibration": Parser(_calibration, _calibration_again, ("steer.rewards.transform", "steer.sums")),
}
