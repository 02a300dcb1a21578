"""`steer rewards serve`, in a process of its own: what it answers, what it refuses, how it ends."""

import base64
import http.client
import json
import signal
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from conftest import Steer
from PIL import Image
from served import Served, serving

from steer.reward import RewardError, score
from steer.rewards.parser import load_reward
from steer.rewards.remote import MAX_IMAGES, MAX_REQUEST_BYTES, TOKEN, decode, encode

IMAGES = torch.rand(3, 3, 8, 6, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a", "“b” ü", "c"]
Reply = tuple[int, dict[str, Any]]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving("colour:red:2 + brightness", tmp_path_factory.mktemp("served")) as result:
        yield result


def ask(url: str, method: str, path: str, body: bytes = b"", **headers: str) -> Reply:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    payload = json.loads(response.read())
    connection.close()
    return response.status, payload


def picture(image: Image.Image, form: str = "PNG") -> str:
    file = BytesIO()
    image.save(file, form)
    return base64.b64encode(file.getvalue()).decode()


def request(*images: str, **changes: Any) -> bytes:
    return json.dumps({"protocol": 1, "images": images, "prompts": ["a"] * len(images)} | changes).encode()


def bomb() -> str:
    """A PNG of a few hundred bytes that says it is 60000 pixels wide and high."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(9999))) + chunk(b"IEND", b"")
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + data).decode()


def test_scores_are_those_of_the_reward_on_rounded_images(served: Served) -> None:
    rounded = (IMAGES * 255).round() / 255
    wanted = score(load_reward("colour:red:2 + brightness"), rounded, PROMPTS)
    result = score(load_reward(served.url), IMAGES, PROMPTS)
    assert torch.allclose(result, wanted, atol=1e-6) and wanted.std() > 0.01


def test_many_images_go_in_several_requests_and_keep_their_order(served: Served) -> None:
    images = torch.linspace(0, 1, 2 * MAX_IMAGES + 5).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    wanted = score(load_reward("colour:red:2 + brightness"), (images * 255).round() / 255, ["x"] * len(images))
    result = score(load_reward(f"min({served.url})"), images, ["x"] * len(images))
    assert torch.allclose(result, wanted, atol=1e-6) and wanted.unique().numel() > 60


def test_what_is_encoded_is_decoded() -> None:
    images, prompts = decode(encode(IMAGES * 1.2 - 0.1, PROMPTS))
    assert prompts == PROMPTS and torch.equal(images, ((IMAGES * 1.2 - 0.1).clamp(0, 1) * 255).round() / 255)


def test_it_says_what_it_is(served: Served) -> None:
    status, payload = ask(served.url, "GET", "/")
    assert status == 200 and payload["protocol"] == 1 and payload["differentiable"] is False
    assert load_reward(served.url).serves == payload["name"] != ""  # type: ignore[attr-defined]


RGB = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
REFUSED = [
    (b"", "not JSON"),
    (b"\xff\xfe", "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b"[]", "not a JSON object but list"),
    (request(picture(RGB), protocol=2), "this side uses protocol 1, got 2"),
    (request(picture(RGB), images="text"), "must be lists"),
    (request(picture(RGB), images=[1]), "must hold base64 texts"),
    (request(picture(RGB), prompts=[None]), "must hold base64 texts"),
    (request(picture(RGB), prompts=["a", "b"]), "as many prompts: got 1 and 2"),
    (request(), "1 to 32 images"),
    (request(*[picture(RGB)] * (MAX_IMAGES + 1)), "1 to 32 images"),
    (request("@@@"), "cannot be read as PNG"),
    (request("AAAA"), "cannot be read as PNG"),
    (request(picture(RGB)[:80] + "AAAA"), "cannot be read as PNG"),
    (request(picture(RGB, "JPEG")), "cannot be read as PNG"),
    (request(picture(RGB.convert("RGBA"))), "must be 8-bit RGB"),
    (request(picture(RGB.convert("P"))), "must be 8-bit RGB"),
    (request(picture(RGB), picture(RGB.resize((2, 2)))), "all of one size"),
    (request(*[picture(Image.new("RGB", (2048, 2048)))] * 5), "pixels in one request: at most"),
    (request(bomb()), "cannot be read as PNG"),
]


@pytest.mark.parametrize(("body", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_a_bad_request_is_400_and_one_line(served: Served, body: bytes, message: str) -> None:
    status, payload = ask(served.url, "POST", "/score", body)
    assert status == 400 and message in payload["error"] and payload["error"].isprintable()
    assert ask(served.url, "GET", "/")[0] == 200


@pytest.mark.parametrize(
    ("method", "path", "length", "status"),
    [
        ("GET", "/other", "0", 404),
        ("POST", "/", "0", 404),
        ("POST", "/score", str(MAX_REQUEST_BYTES + 1), 413),
        ("POST", "/score", "9" * 5000, 413),
        ("POST", "/score", "-1", 411),
        ("POST", "/score", "²", 411),
        ("POST", "/score", "", 411),
    ],
)
def test_other_refusals(served: Served, method: str, path: str, length: str, status: int) -> None:
    assert ask(served.url, method, path, **{"Content-Length": length.encode("latin-1")})[0] == status  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "message"),
    [("raises", "reward 'raises' failed: KeyError: 'a\\nlabel'"), ("not_a_number", "returned nan for image 0")],
)
def test_what_the_reward_does_wrong_is_told_there_in_one_line(tmp_path: Path, kind: str, message: str) -> None:
    with serving(f"own_served:{kind}", tmp_path) as served:
        with pytest.raises(RewardError) as raised:
            score(load_reward(served.url), IMAGES, PROMPTS)
        text = str(raised.value)
        assert text.startswith(f"reward '{served.url}' answers with status 422: ") and message in text
        assert "Traceback" not in text and text.isprintable()
        assert served.end(signal.SIGTERM) == (0, "", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_calls_of_the_reward_are_one_by_one_and_it_ends_in_order(tmp_path: Path, number: int) -> None:
    with serving("own_served:alone", tmp_path) as served:
        reward = load_reward(f"{served.url},tries=9")
        with ThreadPoolExecutor(6) as pool:
            result = list(pool.map(lambda _: score(reward, IMAGES, PROMPTS), range(12)))
        assert all(torch.equal(result[0], one) for one in result)
        assert served.end(number) == (0, "", "")


def test_a_reward_that_hangs_neither_holds_the_client_nor_the_end(tmp_path: Path) -> None:
    with serving("own_served:hangs", tmp_path) as served:
        reward = load_reward(f"{served.url},timeout=0.5")
        with pytest.raises(RewardError, match=r"timed out after 0\.5 s"):
            score(reward, IMAGES, ["a star"] * 3)
        assert (tmp_path / "hanging").exists()
        assert served.end(signal.SIGTERM) == (0, "", "")


def test_a_token_is_asked_for_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN, raising=False)
    with serving("own_served:red", tmp_path, **{TOKEN: "secret"}) as served:
        for wrong in (None, "Secret", "secrets"):
            if wrong is not None:
                monkeypatch.setenv(TOKEN, wrong)
            with pytest.raises(RewardError, match="status 401: this server requires its token"):
                load_reward(served.url)
            assert ask(served.url, "POST", "/score", encode(IMAGES, PROMPTS))[0] == 401
        monkeypatch.setenv(TOKEN, "secret")
        assert score(load_reward(served.url), IMAGES, PROMPTS).shape == (3,)


def test_elsewhere_than_here_is_warned_of(tmp_path: Path) -> None:
    with serving("brightness", tmp_path, "--host", "0.0.0.0") as served:
        code, _, err = served.end(signal.SIGINT)
        assert code == 0 and err.startswith(
            "steer: --host 0.0.0.0: anyone who can reach this machine can use the reward"
        )
        assert len(err.splitlines()) == 1


def test_what_cannot_be_served_is_one_line(steer: Steer, served: Served) -> None:
    port = urlsplit(served.url).port
    for words, message in [
        (("brightness", "--port", port), f"--host 127.0.0.1 --port {port}: cannot listen there"),
        (("brightness", "--host", "no such host"), "--host no such host --port 0: cannot listen there"),
        (("nosuch",), "unknown reward 'nosuch'"),
    ]:
        code, _, err = steer("rewards", "serve", *words)
        assert code == 2 and message in err and len(err.splitlines()) == 1
    assert "steer rewards serve SPEC" in steer("rewards")[1]
