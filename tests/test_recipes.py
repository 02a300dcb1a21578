"""`steer.apps.recipes`: metadata readable by other programs, and untrusted PNGs refused."""

import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from steer.apps.recipes import KEY, Recipe, image_hash, read_metadata, read_png, write_png
from steer.apps.reward_specs import only_named_rewards
from steer.apps.settings import SamplingConfig
from steer.errors import InputError
from steer.reward import RewardError
from steer.rewards import REWARDS
from steer.rewards import names as rewards
from steer.rewards import parser as expression
from steer.rewards.parser import load_reward

SETTINGS = SamplingConfig.of(
    model="scenes",
    method="fk",
    reward="scene-soft",
    particles=3,
    steps=4,
    guidance=None,
    lam=10.0,
    potential="difference",
    resampler="systematic",
    tempering="constant",
    ess_threshold=0.5,
    eta=None,
    seed=2**63 - 1,
    compare=True,
    dtype=None,
)
PROMPT = "drei Kreise – 三つの “星”\n\x1b[31m 🎨"


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8))


RECIPE = Recipe(
    prompt=PROMPT,
    settings=SETTINGS,
    base=False,
    rank=2,
    reward=-0.125,
    components={"scene": 1 / 3},
    pixels=image_hash(picture()),
    steer="0.1.0",
    torch="2.11.0",
    diffusers="0.42.0",
    device="cuda (A Card)",
    dtype="float32",
)


@pytest.fixture
def png(tmp_path: Path) -> Path:
    write_png(picture(), tmp_path / "a.png", RECIPE)
    return tmp_path / "a.png"


def chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """By the PNG specification (5.3): length, type, data, CRC."""
    place = 8
    while place < len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        yield data[place + 4 : place + 8], data[place + 8 : place + 8 + length]
        place += 12 + length


def joined(*components: tuple[bytes, bytes]) -> bytes:
    data = [
        len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
        for kind, data in components
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(data)


def saying(text: str) -> bytes:
    """A PNG with another text in place of the recipe."""
    return joined(HEADER, (b"iTXt", KEY.encode() + b"\0\0\0\0\0" + text.encode("utf-8", "surrogatepass")), DATA, END)


HEADER = (b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0))
DATA, END = (b"IDAT", zlib.compress(b"\0\1\2\3")), (b"IEND", b"")


def changed(**changes: Any) -> dict[str, Any]:
    return RECIPE.plain() | changes


def test_the_recipe_is_one_text_of_utf_8_that_any_reader_of_pngs_finds(png: Path) -> None:
    texts = [data for kind, data in chunks(png.read_bytes()) if kind == b"iTXt" and data.startswith(b"steer\0")]
    assert len(texts) == 1 and texts[0].startswith(b"steer\0\0\0\0\0")  # not compressed, no language
    data = json.loads(texts[0][len(b"steer\0\0\0\0\0") :].decode("utf-8"))
    assert data == RECIPE.plain() and "三つの".encode() in texts[0]


def test_a_recipe_survives_writing_and_reading(png: Path) -> None:
    assert read_metadata(png) == read_metadata(png.read_bytes()) == RECIPE
    recipe, image = read_png(png)
    assert recipe == RECIPE and image.tobytes() == picture().tobytes() and image_hash(image) == recipe.pixels
    assert isinstance(recipe.settings, SamplingConfig)


def test_the_same_image_gives_the_same_bytes(png: Path, tmp_path: Path) -> None:
    write_png(picture(), tmp_path / "b.png", replace(RECIPE, components=dict(RECIPE.components)))
    assert png.read_bytes() == (tmp_path / "b.png").read_bytes()


def test_the_hash_records_pixels_shapes_and_modes_apart() -> None:
    one = picture()
    other = one.copy()
    other.putpixel((6, 4), (*other.getpixel((6, 4))[:2], 255 - other.getpixel((6, 4))[2]))  # type: ignore[index]
    flat = Image.frombytes("RGB", (5, 7), one.tobytes())
    assert len({image_hash(image) for image in (one, other, flat, one.convert("L"))}) == 4
    assert image_hash(one) == image_hash(one.copy())


def test_a_recipe_of_an_older_version_has_the_defaults_of_younger_settings() -> None:
    older = {
        name: value for name, value in SETTINGS.plain().items() if name not in ("reward_guidance", "draw", "preview")
    }
    assert read_metadata(saying(json.dumps(changed(settings=older)))) == RECIPE


def test_a_whole_number_is_a_number() -> None:
    data = changed(reward=1, settings=SETTINGS.plain() | {"lam": 25, "guidance": 4})
    recipe = read_metadata(saying(json.dumps(data)))
    assert (recipe.reward, recipe.settings.options.lam, recipe.settings.guidance) == (1.0, 25.0, 4.0)
    assert isinstance(recipe.settings.options.lam, float)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evil": 1}, "unknown key 'evil'"),
        ({"prompt": None}, "prompt: expected str, got None"),
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": "\ud800"}, "prompt: not text"),
        ({"base": 0}, "base: expected bool, got 0"),
        ({"rank": True}, "rank: expected int, got True"),
        ({"rank": 3}, "rank 3 is out of range for 3 particles"),
        ({"rank": -1}, "rank: expected 0 to"),
        ({"reward": "high"}, "reward: expected float"),
        ({"reward": 10**400}, "reward: expected float"),
        ({"components": []}, "components: expected an object"),
        ({"components": {"a": None}}, "part 'a': expected float"),
        ({"pixels": "0" * 63}, "pixels: expected a hash"),
        ({"device": "\x1b]0;evil\x07"}, "device: expected a short text"),
        ({"torch": "2" * 101}, "torch: expected a short text"),
        ({"settings": None}, "expected an object, got NoneType"),
        ({"settings": {}}, "'model' is missing"),
    ],
)
def test_a_value_that_cannot_be_is_named(changes: Mapping[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=r"^an image of .* bytes: metadata: ") as error:
        read_metadata(saying(json.dumps(changed(**changes))))
    assert message in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("evil", 1, "unknown key 'evil'"),
        ("model", ["scenes"], "model: expected str"),
        ("method", "evil", "unknown method 'evil'"),
        ("potential", "__import__", "unknown potential"),
        ("particles", 0, "particles must be at least 1"),
        ("particles", 10**9, "particles: expected 0 to 1024"),
        ("particles", 3.0, "particles: expected int"),
        ("particles", None, "particles: expected int"),
        ("steps", 10**6, "steps: expected 0 to 10000"),
        ("steps", "4", "steps: expected int or null"),
        ("iterations", 10**7, "unknown key 'iterations'"),
        ("seed", 2**63, "seed: expected 0 to 9223372036854775807"),
        ("seed", -1, "seed: expected 0 to"),
        ("ess_threshold", 2, "ess_threshold must be"),
        ("reward_guidance", -1.0, "reward_guidance must be"),
        ("compare", "yes", "compare: expected bool"),
        ("dtype", "int8", "unknown dtype 'int8'"),
        ("guidance", True, "guidance: expected float or null, got True"),
    ],
)
def test_a_setting_that_cannot_be_is_named(name: str, value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_metadata(saying(json.dumps(changed(settings=SETTINGS.plain() | {name: value}))))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "expected an object, got list"),
        (json.dumps(changed()).replace("-0.125", "NaN"), "NaN is not a number"),
        (json.dumps(changed()).replace("-0.125", "-Infinity"), "-Infinity is not a number"),
        (json.dumps(changed()).replace("-0.125", "1e999"), "reward: expected a finite number"),
        (json.dumps(changed()).replace('"rank": 2', '"rank": ' + "2" * 5000), "not JSON"),
        (json.dumps(changed()) + " " * 1_000_000, "longer than 1000000 characters"),
    ],
)
def test_a_text_that_is_no_recipe_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        read_metadata(saying(text))
    assert len(str(error.value)) < 250


def test_other_files_are_refused(png: Path, tmp_path: Path) -> None:
    picture().save(tmp_path / "plain.png")
    picture().save(tmp_path / "really.jpg")
    (tmp_path / "really.jpg").rename(tmp_path / "jpg.png")
    (tmp_path / "text.png").write_text("not an image")
    for name, message in (
        ("plain.png", "no metadata of `steer sample` in this image"),
        ("jpg.png", "not a PNG that can be read"),
        ("text.png", "not a PNG that can be read"),
        ("nowhere.png", "cannot read the PNG (No such file or directory)"),
        (".", "cannot read the PNG"),
    ):
        with pytest.raises(InputError) as error:
            read_metadata(tmp_path / name)
        assert message in str(error.value) and str(error.value).startswith(str(tmp_path / name))


def test_a_truncated_png_is_refused_wherever_it_ends(png: Path) -> None:
    data = png.read_bytes()
    last = data.index(b"IDAT") + 4  # after it Pillow misses nothing but the end of the file
    for end in range(0, last, 7):
        with pytest.raises(InputError):
            read_png(data[:end])
    with pytest.raises(InputError, match="cannot read the PNG"):
        read_png(data[: last + 10])


def test_texts_and_pictures_that_would_fill_the_memory_are_refused() -> None:
    info = PngInfo()
    info.add_itxt(KEY, json.dumps(changed(prompt=" " * 2_000_000)), zip=True)
    packed = (b"iTXt", info.chunks[0][1])
    plain = (b"tEXt", b"other\0" + b"a" * (64 * 2**20 + 1))
    huge = (b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    for data in (joined(HEADER, packed, DATA, END), joined(HEADER, plain, DATA, END), joined(huge, DATA, END)):
        assert len(data) < 70e6
        with pytest.raises(InputError, match="cannot read the PNG"):
            read_metadata(data)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from([*RECIPE.plain()]), st.sampled_from([*SETTINGS.plain()]), VALUES, VALUES)
@settings(max_examples=100, deadline=None)
def test_any_json_becomes_a_recipe_or_an_input_error(key: str, setting: str, one: Any, other: Any) -> None:
    data = changed(settings=SETTINGS.plain() | {setting: other}) | ({key: one} if key != "settings" else {})
    try:
        recipe = read_metadata(saying(json.dumps(data)))
    except InputError as error:
        assert len(str(error).splitlines()) == 1
        return
    assert recipe.plain() == data | {"settings": SamplingConfig.of(**data["settings"]).plain()}


@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4), st.booleans())
@settings(max_examples=100, deadline=None)
def test_any_changed_byte_gives_a_recipe_or_an_input_error(where: Any, sums: bool) -> None:
    data = bytearray(saying(json.dumps(changed())))
    for place, value in where:
        data[place * len(data) // 401] = value
    data = joined(*chunks(bytes(data))) if sums else bytes(data)  # with sums that are right again
    with suppress(InputError):
        assert isinstance(read_png(data)[0], Recipe)


@pytest.mark.parametrize(
    "text",
    [
        "scene",
        "scene-soft + brightness:0.1",
        "clip:scenes + aesthetic:scenes:0.5",
        "classifier:tiger cat",
        "Colour:red + JPEG:0.5",
        "colour:#ff0000:-2",
        "clip:ViT-L-14/openai",
        "min(scene, mean-std(jpeg, scene:2, lam=1)):3",
        "product(scene > 0.3, jpeg + scene < 2, temperature=0.05)",
        "logsigmoid(scene, reference=0.2)",
        "colour:" + "x" * 300,  # longer than a file's name can be; found by fuzzing
    ],
)
def test_rewards_that_have_a_name_may_stand_in_an_image(text: str) -> None:
    assert only_named_rewards(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "evil:reward",
        "package.module:attribute",
        "evil.py:reward",
        "scene + evil:reward",
        "min(scene, evil:reward)",
        "product(evil:reward > 0.3)",
        "product(scene < a.evil:x > 0.3)",
        "min(product(scene > 0.3, a.b:c < 2), jpeg)",
        "scene\n+ evil:x",
        "mine.yaml",
        "./mine.yaml",
        "/tmp/folder",
        "scene + clip:x.yaml",
        "clip:/etc",
        "clip:../x",
        "clip:x/../../y",
        "imagereward:path=/dev/zero",
        "z(scene, from=/dev/zero)",
        "odd(scene)",
        "min(",
        "scene + ",
        "min(" * 11 + "scene" + ")" * 11,
        "scene + " * 300 + "scene",
    ],
)
def test_any_other_reward_needs_the_word_of_the_user(text: str) -> None:
    assert not only_named_rewards(text)


ATOMS = ["scene", "jpeg:2", "brightness:0.5", "evil:x", "a.evil:x", "scene < a.evil:x", "x.yaml", "folder"]
MADE = ["{} + {}", "min({}, {})", "product({} > 0.5, {} < 1)", "z({}, from=x.json)", "{}:2", "{} + colour:{}"]
SLIPS = ["", "", " ", ":", ",", ", ", "(", ")", "<", ".", "/", "\n"]
SPECIFICATIONS = st.recursive(
    st.sampled_from(ATOMS),
    lambda inner: st.tuples(st.sampled_from(MADE), inner, inner).map(lambda made: made[0].format(*made[1:])),
    max_leaves=3,
)


@given(SPECIFICATIONS, st.integers(0, 40), st.sampled_from(SLIPS))
@settings(max_examples=100, deadline=None)
def test_builtin_reward_names_import_no_code_and_open_no_files(text: str, place: int, slip: str) -> None:
    """Imports and opened files of the reader are recorded."""
    text = text[:place] + slip + text[place:]
    if not only_named_rewards(text):
        return
    reached: list[str] = []
    known, attribute = {place for place, _ in REWARDS.values()}, rewards._attribute
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewards, "_attribute", lambda path: reached.append(path) or attribute(path))
        patch.setattr(rewards, "_is_module", lambda name: True)
        patch.setattr(expression, "_is_path", lambda text: text.endswith(".yaml") and expression._has_no_name(text))
        patch.setattr(expression, "_read_file", lambda path, place: reached.append(str(path)))
        patch.setattr(expression.compose, "read_calibration", lambda path: reached.append(str(path)))
        with suppress(RewardError):
            load_reward(text)
    assert set(reached) <= known
