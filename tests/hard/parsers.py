"""All parsers of untrusted data as functions of bytes, for the fuzzers and their corpus.

For any bytes, a parser returns a value or raises an InputError of one line; the value is equal after it is written and
read again. Parsers take less than 2 seconds of CPU, use no network and start no program.
"""

import json
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml
from folder_parsers import (
    calibration,
    calibration_again,
    choices,
    choices_again,
    manifest,
    manifest_again,
    put,
    report,
    report_again,
)
from parser_checks import Finding, check_line, checked
from PIL import Image
from pyarrow import parquet

from steer import rewards
from steer.apps.cli.finetune import parse_overrides
from steer.apps.finetuning import read_config
from steer.apps.prompts import load_prompts
from steer.apps.recipes import KEY, read_metadata, read_png, write_png
from steer.apps.reward_specs import only_named_rewards
from steer.errors import InputError
from steer.rewards import names as reward
from steer.rewards.parser import load_reward

SMALL = {"scene", "jpeg", "jpeg-incompressible", "colour", "brightness"}  # the rewards that load no weights


@dataclass(frozen=True)
class Parser:
    """A parser: `read` maps bytes to a value, in a given folder; `again` writes the value and reads it.

    modules  instrumented by the coverage-guided fuzzer
    """

    read: Callable[[bytes, Path], Any]
    again: Callable[[Any, Path], Any]
    modules: tuple[str, ...]


def run(name: str, data: bytes, folder: Path) -> str:
    """Return "read" or "refused"; raise Finding, or the exception of the parser, for a violation."""
    parser = PARSERS[name]
    with checked():
        try:
            value = parser.read(data, folder)
        except InputError as error:
            check_line(str(error))
            return "refused"
        if (again := parser.again(value, folder)) != value:
            raise Finding(f"read as {value!r}, and written and read again as {again!r}")
    return "read"


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _config(data: bytes, folder: Path) -> Any:
    return read_config(str(put(folder / "c.yaml", data))).plain()


def _words(data: bytes, folder: Path) -> Any:
    """Parse command-line overrides of a configuration, one word per line."""
    return read_config("d3po-scenes", parse_overrides(_text(data).split("\n"))).plain()


def _config_again(config: Any, folder: Path) -> Any:
    return _config(yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=120).encode(), folder)


@contextmanager
def _small_rewards() -> Iterator[None]:
    """Restrict the registry to rewards that load no weights, without plugins, which are looked up on disk each time."""
    whole, plugins = dict(rewards.REWARDS), vars(reward)["entry_points"]
    for name in whole.keys() - SMALL:
        del rewards.REWARDS[name]
    vars(reward)["entry_points"] = lambda group: ()
    try:
        yield
    finally:
        rewards.REWARDS.clear()  # restores the order, too
        rewards.REWARDS.update(whole)
        vars(reward)["entry_points"] = plugins


def _reward(data: bytes, folder: Path) -> str:
    text = _text(data)
    if "://" in text:
        raise InputError("a remote reward: it has tests of its own")
    with _small_rewards():
        only_named_rewards(text)
        return load_reward(text).name


def _reward_again(name: str, folder: Path) -> str:
    """Parse the name of a composed reward: it must give the same name, unless a file defined a component."""
    with _small_rewards():
        whole = only_named_rewards(name) and "logsigmoid" not in name
    return _reward(name.encode(), folder) if whole else name


def _reward_file(data: bytes, folder: Path) -> str:
    return _reward(str(put(folder / "r.yaml", data)).encode(), folder)


def _prompts(data: bytes, folder: Path) -> list[list[str]]:
    """Parse the bytes as each text format."""
    read = []
    for suffix in ("txt", "tsv", "jsonl"):
        try:
            read.append(load_prompts(str(put(folder / f"p.{suffix}", data))))
        except InputError as error:
            check_line(str(error))
    if not read:
        raise InputError("neither text nor table nor JSON lines")
    return read


def _prompts_again(read: list[list[str]], folder: Path) -> list[list[str]]:
    lines = ("\n".join(json.dumps({"prompt": prompt}) for prompt in prompts) for prompts in read)
    return [load_prompts(str(put(folder / "q.jsonl", text))) for text in lines]


def _parquet(data: bytes, folder: Path) -> list[str]:
    return load_prompts(str(put(folder / "p.parquet", data)))


def _parquet_again(prompts: list[str], folder: Path) -> list[str]:
    parquet.write_table(pa.table({"prompt": prompts}), folder / "q.parquet")
    return load_prompts(str(folder / "q.parquet"))


def _png(data: bytes, folder: Path) -> Any:
    recipe, image = read_png(data)
    return recipe, image.mode, image.size, image.tobytes()


def _png_again(png: Any, folder: Path) -> Any:
    recipe, mode, size, pixels = png
    write_png(Image.frombytes(mode, size, pixels), folder / "a.png", recipe)
    read, image = read_png(folder / "a.png")
    return read, mode, image.size, pixels  # a palette image is written as indices


def _recipe(data: bytes, folder: Path) -> Any:
    """Parse the bytes as the recipe in a PNG."""
    return read_metadata(png_saying(data))


def _recipe_again(recipe: Any, folder: Path) -> Any:
    with _small_rewards():
        only_named_rewards(recipe.settings.reward)
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
    encoded = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(encoded)


_YAML = ("yaml.reader", "yaml.scanner", "yaml.parser", "yaml.composer", "yaml.constructor", "yaml.resolver")
_CONFIG = (
    "steer.apps.finetuning",
    "steer.apps.finetuning",
    "steer.pipelines.training.config",
    "steer.registry",
)
_REWARD = tuple(f"steer.rewards.{name}" for name in ("expression", "grammar", "aggregate", "combine", "transform"))
_PNG = ("steer.apps.recipes", "steer.apps.methods", "steer.pipelines.fk_steering", "steer.apps.reward_specs")
PARSERS = {
    "config": Parser(_config, _config_again, (*_CONFIG, "steer.yaml_text", *_YAML)),
    "config-words": Parser(_words, _config_again, (*_CONFIG, "steer.apps.cli.finetune", "steer.yaml_text", *_YAML)),
    "reward": Parser(_reward, _reward_again, (*_REWARD, "steer.rewards.names", "steer.apps.reward_specs")),
    "reward-file": Parser(_reward_file, _reward_again, (*_REWARD, "steer.rewards.names", *_YAML)),
    "prompts": Parser(_prompts, _prompts_again, ("steer.apps.prompts", "json.decoder")),
    "parquet": Parser(_parquet, _parquet_again, ("steer.apps.prompts",)),
    "choices": Parser(
        choices,
        choices_again,
        ("steer.pipelines.training.preference_files", "steer.pipelines.training.preference_files"),
    ),
    "manifest": Parser(manifest, manifest_again, ("steer.training.checkpoint", "steer.training.checkpoint")),
    "png": Parser(_png, _png_again, (*_PNG, "PIL.PngImagePlugin", "PIL.ImageFile", "PIL.Image")),
    "recipe": Parser(_recipe, _recipe_again, (*_PNG, "json.decoder")),
    "report": Parser(report, report_again, ("steer.apps.sampling", "steer.files")),
    "calibration": Parser(calibration, calibration_again, ("steer.rewards.compose", "steer.files")),
}
