"""Remote rewards: addresses, a client of servers that lie, stall or die, the server, and who is contacted."""

import base64
import http.client
import json
import math
import signal
import socket
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from conftest import Steer
from PIL import Image
from server_processes import Served, process, serving

from steer.apps.recipes import read_png, write_png
from steer.apps.reward_specs import only_named_rewards
from steer.errors import InputError
from steer.reward import RewardError, score
from steer.rewards.parser import load_reward
from steer.rewards.remote import MAX_IMAGES, MAX_REQUEST_BYTES, TOKEN, RemoteReward, decode, encode, read_weight

IMAGES = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a", "b", "c"]


@pytest.fixture(scope="module")
def liar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with process(Path(__file__).with_name("misbehaving_server.py"), folder=tmp_path_factory.mktemp("liar")) as served:
        yield served.url


def test_what_is_true_comes_through(liar: str) -> None:
    reward = load_reward(f"{liar}good")
    assert isinstance(reward, RemoteReward) and reward.serves == "liar" and not reward.differentiable
    assert score(reward, IMAGES, PROMPTS).tolist() == [1, 2, 3]
    total = load_reward(f"{liar}good:2 + {liar}good,timeout=9,tries=1:-0.5 + brightness:0.3:0")
    assert torch.allclose(score(total, IMAGES, PROMPTS), torch.tensor([1.5, 3, 4.5]))
    assert score(load_reward(f"product({liar}good > 2)"), IMAGES, PROMPTS).diff().min() > 0
    assert score(reward, IMAGES[:0], []).shape == (0,)


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("lie", "message"),
    [
        ("few", "answers wrongly: 3 images must have a list of 3 scores, got 1"),
        ("many", "answers wrongly: 3 images must have a list of 3 scores, got 4"),
        ("none", "answers wrongly: 3 images must have a list of 3 scores, got NoneType"),
        ("texts", "answers wrongly: scores must be numbers, got '1'"),
        ("bools", "answers wrongly: scores must be numbers, got True"),
        ("nan", "returned nan for image 1, prompt 'b'"),
        ("infinite", "returned inf for image 2, prompt 'c'"),
        ("whole", "answers wrongly: scores must fit in fp32"),
        ("nested", "answers with status 200, not JSON"),
        ("array", "answers with status 200, not a JSON object but list"),
        ("page", "answers with status 502, not JSON: '<html><body>Bad gateway"),
        ("error", "answers with status 422: two lines ?[31mred"),
        ("empty", "answers with status 200, not JSON"),
        ("short", "cannot be reached (IncompleteRead"),
        ("long", "answers with status 200, not JSON"),
        ("huge", "answers with more than 1000000 bytes"),
        ("endless", "answers with more than 1000000 bytes"),
        ("garbage", "does not answer in HTTP (BadStatusLine"),
        ("closes", "cannot be reached (Remote end closed connection"),
        ("moved", "answers with status 302, not JSON"),
        ("stalls", "timed out after 0.5 s"),
        ("stalls-inside", "timed out after 0.5 s"),
        ("drips", "timed out after 0.5 s"),
    ],
)
def test_a_lie_is_one_line_that_names_the_address(liar: str, lie: str, message: str) -> None:
    reward = load_reward(f"{liar}{lie},timeout={0.5 if '0.5' in message else 20},tries=2")
    with pytest.raises(RewardError) as raised:
        score(reward, IMAGES, PROMPTS)
    assert str(raised.value).startswith(f"reward '{liar}{lie}' {message}") and str(raised.value).isprintable()


def test_another_protocol_is_refused_at_once(liar: str) -> None:
    with pytest.raises(RewardError, match="uses protocol 2, this side 1"):
        load_reward(f"{liar}newer")


def test_nobody_there() -> None:
    with socket.socket() as taken:  # bound, and never listened at
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(RewardError, match=r"cannot be reached \(Connection refused\): is `steer rewards serve`"):
            load_reward(f"http://127.0.0.1:{taken.getsockname()[1]}/")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://", "not an address"),
        ("http:///path", "not an address"),
        ("http://h:x/", "not an address"),
        ("http://h:99999/", "not an address"),
        ("http://[::1/", "not an address"),
        (f"http://{'h' * 80}/", "not an address"),
        ("http://hö/", "not an address"),
        ("http://name:secret@h/", "must not hold a name, password"),
        ("http://h/?key=secret", "must not hold a name, password"),
        ("http://h/#part", "must not hold a name, password"),
        ("http://h/,timeout=0", "timeout= must be above 0"),
        ("http://h/,timeout=soon", "takes timeout=SECONDS and tries="),
        ("http://h/,tries=0", "takes timeout=SECONDS and tries="),
        ("http://h/,timeout=1,timeout=9", "timeout= is given twice: give it once"),
        ("http://h/,retries=2", "takes timeout=SECONDS and tries="),
    ],
)
def test_what_is_no_address(address: str, message: str) -> None:
    with pytest.raises(RewardError, match=message) as raised:
        load_reward(address)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("http://h:8000", ("http://h:8000", 1)),
        ("http://h:8000/", ("http://h:8000/", 1)),
        ("http://h:8000/:2", ("http://h:8000/", 2)),
        ("http://h/a:-0.5", ("http://h/a", -0.5)),
        ("http://[::1]:80/:3", ("http://[::1]:80/", 3)),
        ("http://h:80,timeout=3:2", ("http://h:80,timeout=3", 2)),
    ],
)
def test_a_number_is_a_weight_behind_a_path_and_a_port_behind_a_host(text: str, read: tuple[str, float]) -> None:
    assert read_weight(text) == read


def test_images_that_are_not_finite_are_not_sent(liar: str) -> None:
    images = IMAGES.clone()
    images[0, 0, 0, 0] = math.nan
    with pytest.raises(RewardError, match="images that are not finite"):
        load_reward(f"{liar}good")(images, PROMPTS)


@pytest.mark.hard
@pytest.mark.parametrize(
    ("kind", "code", "line"),
    [
        ("exits", 3, "cannot be reached"),
        ("crashes", -signal.SIGSEGV, "cannot be reached"),
        pytest.param(
            "stalls", None, "timed out after 8 s", marks=pytest.mark.hard
        ),  # it is there for as long as it likes
    ],
)
def test_a_run_resumes_when_the_server_is_back(
    steer: Steer,
    tmp_path: Path,
    kind: str,
    code: int | None,
    line: str,
) -> None:
    words = ["sample", "a circle", "a star", "--steps", 3, "--particles", 2, "--method", "best-of-n"]
    (tmp_path / "armed").touch()
    with serving(f"own_served:{kind}", tmp_path) as served:
        port = served.url.split(":")[-1].strip("/")
        out = ["--reward", f"{served.url},timeout=8", "--out", tmp_path / "out"]
        ended, _, err = steer(*words, *out)
        assert ended == 2 and line in err and served.url in err and len(err.splitlines()) == 1
        assert (served.process.returncode if code is None else served.process.wait()) == code
    report = tmp_path / "out" / "report.json"
    assert [entry["prompt"] for entry in json.loads(report.read_text())["prompts"]] == ["a circle"]
    (tmp_path / "armed").unlink()
    with serving(f"own_served:{kind}", tmp_path, "--port", port):
        assert steer(*words, *out)[0] == 0
    payload = json.loads(report.read_text())
    assert [entry["prompt"] for entry in payload["prompts"]] == ["a circle", "a star"]
    assert [entry["rewards"] for entry in payload["prompts"]] == [
        sorted(entry["rewards"], reverse=True) for entry in payload["prompts"]
    ]


class Canary:
    """A port that tells whether anybody has called."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.setblocking(False)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/"

    def called(self) -> bool:
        try:
            self.listener.accept()[0].close()
        except BlockingIOError:
            return False
        return True


@pytest.fixture
def canary() -> Iterator[Canary]:
    made = Canary()
    with made.listener:
        yield made


def test_the_canary_hears_who_calls(canary: Canary) -> None:
    assert not canary.called()
    with pytest.raises(RewardError):
        load_reward(f"{canary.url},timeout=0.3")
    assert canary.called()


SPECS = ["{}", "{}:2", "brightness + {}", "min(brightness, {})", "product({} > 0.5)", "{},timeout=1", "HTTP{}"]


@pytest.mark.parametrize("spec", SPECS)
def test_an_address_is_no_name(spec: str, canary: Canary) -> None:
    assert not only_named_rewards(spec.format(canary.url)) and not canary.called()


@pytest.mark.parametrize("spec", SPECS[:3])
def test_an_image_cannot_send_anybody_to_an_address(steer: Steer, canary: Canary, spec: str, tmp_path: Path) -> None:
    words = ["a star", "--steps", 1, "--particles", 1, "--no-compare", "--reward", "brightness"]
    assert steer("sample", *words, "--out", tmp_path / "out")[0] == 0
    recipe, pixels = read_png(next((tmp_path / "out").glob("000-*/00.png")))
    source, settings = tmp_path / "changed.png", replace(recipe.settings, reward=spec.format(canary.url))
    write_png(pixels, source, replace(recipe, settings=settings))
    code, out, err = steer("sample", "--replay", source, "--out", tmp_path / "replayed")
    assert code == 2 and not out and len(err.splitlines()) == 1 and "add --reward SPEC" in err
    assert not canary.called()


def test_the_demo_calls_nobody_for_a_visitor_but_whom_its_owner_named(
    studio: Any, canary: Canary, liar: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(studio, "rewards", (*studio.rewards, f"{liar}good"))
    for spec in SPECS:
        with pytest.raises(InputError, match="here rewards have names"):
            studio.reward(spec.format(canary.url))
    assert not canary.called()
    assert studio.reward(f"{liar}good").name == f"{liar}good"
    with pytest.raises(InputError, match="here rewards have names"):
        studio.reward(f"{liar}few")


BATCH = torch.rand(3, 3, 8, 6, generator=torch.Generator().manual_seed(0))
TEXTS = ["a", "“b” ü", "c"]
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
    rounded = (BATCH * 255).round() / 255
    wanted = score(load_reward("colour:red:2 + brightness"), rounded, TEXTS)
    result = score(load_reward(served.url), BATCH, TEXTS)
    assert torch.allclose(result, wanted, atol=1e-6) and wanted.std() > 0.01


def test_many_images_go_in_several_requests_and_keep_their_order(served: Served) -> None:
    images = torch.linspace(0, 1, 2 * MAX_IMAGES + 5).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    wanted = score(load_reward("colour:red:2 + brightness"), (images * 255).round() / 255, ["x"] * len(images))
    result = score(load_reward(f"min({served.url})"), images, ["x"] * len(images))
    assert torch.allclose(result, wanted, atol=1e-6) and wanted.unique().numel() > 60


def test_what_is_encoded_is_decoded() -> None:
    images, prompts = decode(encode(BATCH * 1.2 - 0.1, TEXTS))
    assert prompts == TEXTS and torch.equal(images, ((BATCH * 1.2 - 0.1).clamp(0, 1) * 255).round() / 255)


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
def test_an_error_of_the_reward_reaches_the_client_in_one_line(tmp_path: Path, kind: str, message: str) -> None:
    with serving(f"own_served:{kind}", tmp_path) as served:
        with pytest.raises(RewardError) as raised:
            score(load_reward(served.url), BATCH, TEXTS)
        text = str(raised.value)
        assert text.startswith(f"reward '{served.url}' answers with status 422: ") and message in text
        assert "Traceback" not in text and text.isprintable()
        assert served.end(signal.SIGTERM) == (0, "", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_calls_of_the_reward_are_one_by_one_and_it_ends_in_order(tmp_path: Path, number: int) -> None:
    with serving("own_served:alone", tmp_path) as served:
        reward = load_reward(f"{served.url},tries=9")
        with ThreadPoolExecutor(6) as pool:
            result = list(pool.map(lambda _: score(reward, BATCH, TEXTS), range(12)))
        assert all(torch.equal(result[0], one) for one in result)
        assert served.end(number) == (0, "", "")


@pytest.mark.hard
def test_a_reward_that_hangs_neither_holds_the_client_nor_the_end(tmp_path: Path) -> None:
    with serving("own_served:hangs", tmp_path) as served:
        reward = load_reward(f"{served.url},timeout=0.5")
        with pytest.raises(RewardError, match=r"timed out after 0\.5 s"):
            score(reward, BATCH, ["a star"] * 3)
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
            assert ask(served.url, "POST", "/score", encode(BATCH, TEXTS))[0] == 401
        monkeypatch.setenv(TOKEN, "secret")
        assert score(load_reward(served.url), BATCH, TEXTS).shape == (3,)


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
