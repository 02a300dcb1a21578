"""Rewards over HTTP, seen from the client: what an address is, what a server that lies, stalls or dies comes to."""

import json
import math
import signal
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Steer
from served import process, serving

from steer.apps.recipes import read_png, write_png
from steer.apps.reward_specs import only_named_rewards
from steer.errors import InputError
from steer.reward import RewardError, score
from steer.rewards.parser import load_reward
from steer.rewards.remote import RemoteReward, read_weight

IMAGES = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a", "b", "c"]


@pytest.fixture(scope="module")
def liar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with process(Path(__file__).with_name("lying_server.py"), folder=tmp_path_factory.mktemp("liar")) as served:
        yield served.url


def test_what_is_true_comes_through(liar: str) -> None:
    reward = load_reward(f"{liar}good")
    assert isinstance(reward, RemoteReward) and reward.serves == "liar" and not reward.differentiable
    assert score(reward, IMAGES, PROMPTS).tolist() == [1, 2, 3]
    total = load_reward(f"{liar}good:2 + {liar}good,timeout=9,tries=1:-0.5 + brightness:0.3:0")
    assert torch.allclose(score(total, IMAGES, PROMPTS), torch.tensor([1.5, 3, 4.5]))
    assert score(load_reward(f"product({liar}good > 2)"), IMAGES, PROMPTS).diff().min() > 0
    assert score(reward, IMAGES[:0], []).shape == (0,)


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
        ("http://name:secret@h/", "holds no name, password"),
        ("http://h/?key=secret", "holds no name, password"),
        ("http://h/#part", "holds no name, password"),
        ("http://h/,timeout=0", "timeout= must be above 0"),
        ("http://h/,timeout=soon", "takes timeout=SECONDS and tries="),
        ("http://h/,tries=0", "takes timeout=SECONDS and tries="),
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


@pytest.mark.parametrize(
    ("kind", "code", "line"),
    [
        ("exits", 3, "cannot be reached"),
        ("crashes", -signal.SIGSEGV, "cannot be reached"),
        ("stalls", None, "timed out after 8 s"),  # it is there for as long as it likes
    ],
)
def test_a_run_goes_on_when_the_process_is_back(
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
        assert (served.process.poll() if code is None else served.process.wait(60)) == code
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
