"""Rewards written by a language model: rules, limits of the child, the critic's reasons, and rankings that lead."""

import json
import math
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic_preferences
import torch
from chat_server import Request, completion, serve
from conftest import Steer
from PIL import Image
from torch import Tensor

from steer.apps.scenes.world import draw, random_scene
from steer.apps.writing import rank_in_terminal
from steer.reward import Reward, RewardError, score
from steer.rewards import code_rules, sandbox_helpers
from steer.rewards.analysis import spearman
from steer.rewards.chat import ChatClient
from steer.rewards.code_rules import HELPERS, compile_reward, refusals
from steer.rewards.judges import as_judge
from steer.rewards.parser import load_reward
from steer.rewards.sandbox import SandboxReward
from steer.rewards.writing import Candidate, Rank, WritingSettings, rank_by_judge, write_rewards


def drawn_scenes(folder: Path, count: int) -> Path:
    """A folder of drawn scenes and their prompts."""
    folder.mkdir()
    lines = []
    for number in range(count):
        rng = np.random.default_rng(number)
        scene = random_scene(rng)
        Image.fromarray(draw(scene, rng)).save(folder / f"{number:03}.png")
        lines.append(json.dumps({"image": f"{number:03}.png", "prompt": scene.prompt}))
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    return folder


IMAGES = torch.rand(10, 3, 16, 16, generator=torch.Generator().manual_seed(0)).lerp(
    torch.rand(10, 3, 1, 1, generator=torch.Generator().manual_seed(1)), 0.7
)
PROMPTS = [f"prompt {k}" for k in range(10)]
START = "import torch\n\n\ndef reward(images, prompts):\n"
RED = START + '    return colour_mask(images, "red").mean((1, 2))\n'


def red_by_hand(images: Tensor) -> Tensor:
    distance = ((images - torch.tensor([1.0, 0.0, 0.0])[:, None, None]) ** 2).sum(1)
    return torch.exp(-distance / (2 * 0.25**2)).mean((1, 2))


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os\n" + RED, "import of os is not allowed"),
        ("from os import path\n" + RED, "import of os.path is not allowed"),
        ("from . import x\n" + RED, "import of x is not allowed"),
        (START + "    return open('/etc/passwd')\n", "the name 'open' is not allowed"),
        (START + "    return getattr(images, 'numpy')()\n", "the name 'getattr' is not allowed"),
        (START + "    return __import__('os')\n", "the name '__import__' is not allowed"),
        (START + "    return images.__class__\n", "the attribute '__class__' is not allowed"),
        (START + "    return '{0.__class__}'.format(images)\n", "the attribute 'format' is not allowed"),
        (START + "    return f'{images.__class__}'\n", "the attribute '__class__' is not allowed"),
        (START + "    images.numpy().tofile('x')\n", "the attribute 'tofile' is not allowed"),
        (START + "    return (x for x in prompts).gi_frame.f_globals\n", "the attribute 'gi_frame' is not allowed"),
        (START + "    return torch.load('x')\n", "torch.load is not allowed"),
        (START + "    return torch.os.system('ls')\n", "torch.os is not allowed"),
        (START + "    return torch.ops.aten\n", "torch.ops is not allowed"),
        (START + "    return torch.fft.torch.load('x')\n", "torch.fft.torch is not allowed"),
        (START + "    return torch.nn.functional.torch.load('x')\n", "torch.nn.functional.torch is not allowed"),
        (START + "    return torch.nn.functional.importlib\n", "torch.nn.functional.importlib is not allowed"),
        (START + "    return torch.nn.Module()\n", "torch.nn.Module is not allowed"),
        (START + "    return torch.from_file('/etc/passwd')\n", "torch.from_file is not allowed"),
        ("import torch\nt = torch\n" + RED, "'torch' is a module: use torch.NAME"),
        ("import torch\ntorch = 3\n" + RED, "'torch' may not be bound again"),
        ("import torch\ndef f(torch):\n    return torch.load\n" + RED, "'torch' may not be bound again"),
        ("def luma(images):\n    return images\n" + RED, "'luma' may not be bound again"),
        ("class A:\n    pass\n" + RED, "ClassDef is not allowed"),
        (START + "    match images:\n        case x(__class__=c):\n            return c\n", "Match is not allowed"),
        ("@print\n" + RED[14:], "decorators are not allowed"),
        (START[:-1], "syntax error: line 4: expected an indented block"),
        ("\0", "syntax error"),
        ("x = " + "(" * 1000 + ")" * 1000, "syntax error"),
        ("x = 1\n", "must define one function reward(images, prompts)"),
        ("def reward(prompts, images):\n    return images\n", "must define one function reward(images, prompts)"),
        (RED + "\n" * 200, "the file has 206 lines: at most 200"),
    ],
)
def test_code_outside_of_the_rules_is_refused_by_name(code: str, reason: str) -> None:
    assert reason in "; ".join(refusals(code))
    with pytest.raises(ValueError):
        compile_reward(code, {})


def test_code_of_the_language_that_rewards_need_is_allowed() -> None:
    code = """import math
import torch
import torch.nn.functional as F
from torch.nn import functional

WEIGHTS = {"red": 1.0, "blue": -0.5}


def part(images, sigma=1.0):
    small = F.avg_pool2d(blur(images, sigma), 2)
    return functional.conv2d(small, torch.ones(1, 3, 3, 3) / 27)[:, 0].mean((1, 2))


def reward(images, prompts):
    total = images.new_zeros(len(images))
    for name, weight in WEIGHTS.items():
        total = total + weight * colour_mask(images, name).mean(dim=(1, 2))
    words = torch.tensor([float("star" in prompt.lower().split()) for prompt in prompts])
    with torch.no_grad():
        size = torch.linalg.vector_norm(images.flatten(1), dim=1) / math.sqrt(images[0].numel())
    spectrum = torch.fft.rfft2(luma(images)).abs().mean((1, 2)) + torch.finfo(torch.float32).eps
    parts = [total, words, size, part(images), torch.log(spectrum), edges(images).amax((1, 2))]
    return sum((one - 0.1 * k) if k % 2 else one for k, one in enumerate(parts)) + saturation(images).std((1, 2))
"""
    assert refusals(code) == []
    helpers = {name: getattr(sandbox_helpers, name) for name in HELPERS if name != "clip_cosine"}
    assert compile_reward(code, helpers)(IMAGES, PROMPTS).isfinite().all()


def test_helpers_by_hand() -> None:
    image = torch.zeros(1, 3, 4, 4)
    image[0, 0, :, 2:] = 1  # red on the right
    assert torch.allclose(sandbox_helpers.luma(image)[0, 0], torch.tensor([0, 0, 0.299, 0.299]))
    assert torch.allclose(sandbox_helpers.edges(image)[0, 0], torch.tensor([0, 0.299 / 2, 0.299 / 2, 0]))
    assert sandbox_helpers.saturation(image)[0, 0].tolist() == [0, 0, 1, 1]
    mask = sandbox_helpers.colour_mask(image, "red", 0.5)[0, 0]
    assert torch.allclose(mask, torch.tensor([math.exp(-2), math.exp(-2), 1, 1]))
    flat = torch.full((1, 3, 9, 9), 0.3)
    assert torch.allclose(sandbox_helpers.blur(flat, 1.5), flat, atol=1e-6)
    point = torch.zeros(1, 3, 21, 21)
    point[..., 10, 10] = 1
    blurred = sandbox_helpers.blur(point, 2.0)[0, 0]
    assert blurred.sum().item() == pytest.approx(1, abs=1e-5)
    assert (blurred[10, 12] / blurred[10, 10]).item() == pytest.approx(math.exp(-0.5), abs=1e-5)


def test_a_sandboxed_reward_scores_as_by_hand_and_the_child_has_no_secrets_and_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEER_CHAT_TOKEN", "secret")
    (tmp_path / "red.py").write_text(RED)
    reward = load_reward(f"sandbox:{tmp_path / 'red.py'}")
    assert not reward.differentiable
    assert torch.allclose(score(reward, IMAGES, PROMPTS), red_by_hand(IMAGES), atol=1e-6)
    child = reward._process  # type: ignore[attr-defined]
    environment = Path(f"/proc/{child.pid}/environ").read_bytes()
    assert b"STEER" not in environment and b"secret" not in environment
    limits = Path(f"/proc/{child.pid}/limits").read_text()
    assert re.search(r"Max open files\s+3\s+3\s", limits) and re.search(r"Max file size\s+0\s+0\s", limits)
    reward.close()  # type: ignore[attr-defined]
    assert child.poll() is not None
    assert torch.allclose(reward(IMAGES, PROMPTS), red_by_hand(IMAGES), atol=1e-6)  # in another child


@pytest.mark.hard
def test_the_limits_of_the_child_hold_without_the_rules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The code here passes no rule; the child runs it all the same, as if the rules had a hole."""
    (tmp_path / "sitecustomize.py").write_text(
        "import steer.rewards.code_rules as rules\n"
        "rules.refusals = lambda code: []\n"
        "rules.BUILTINS = frozenset(dir(__import__('builtins')))\n"
        "rules._Unimported.visit_Import = lambda self, node: node\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(code_rules, "refusals", lambda code: [])

    target = tmp_path / "written"
    reward = SandboxReward.from_code(
        "import os, socket, torch\n"
        "def reward(images, prompts):\n"
        f"    if prompts[0] == 'write': open({str(target)!r}, 'w').write('x')\n"
        "    if prompts[0] == 'connect': socket.create_connection(('127.0.0.1', 80))\n"
        "    return torch.zeros(10**6, 10**6)\n"
    )

    def refused(harm: str) -> str:
        with pytest.raises(RewardError) as raised:
            reward(IMAGES, [harm] * len(IMAGES))
        return str(raised.value)

    assert "Too many open files" in refused("write")
    assert "Too many open files" in refused("connect")
    assert "allocate" in refused("fill the memory")
    assert not target.exists()


def test_a_file_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    for text, message in (
        ("sandbox:gone.py", "sandbox:gone.py: cannot be read"),
        (f"sandbox:{tmp_path / 'bad.py'}", "import of os is not allowed"),
        (f"sandbox:{tmp_path / 'bad.py'},seconds=soon", "seconds=soon: use a number"),
    ):
        (tmp_path / "bad.py").write_text("import os\n" + RED)
        with pytest.raises(RewardError) as raised:
            load_reward(text)
        assert message in str(raised.value) and "\n" not in str(raised.value)


LOOP = START + "    while True:\n        pass\n"
SCRIPT = [
    (START + "    return images.mean((1, 2, 3)\n", "syntax error: line 5: '(' was never closed"),
    (LOOP, "did not return within 3 s and was ended"),
    ("import os\n" + RED, "import of os is not allowed"),
    (START + "    return images.mean((2, 3))\n", "must return a tensor of shape (8,), got (8, 3)"),
    (START + "    return images.mean((1, 2, 3)) / 0 * 0\n", "returned nan"),
    (RED, ""),
]


@pytest.mark.hard
def test_each_mistake_is_named_in_the_next_request_and_the_correct_file_scores(tmp_path: Path) -> None:
    """Two files with two corrections each: three mistakes, two mistakes, then the right one."""
    before = set(tmp_path.iterdir())

    def answer(request: Request) -> object:
        return completion(f"Here it is:\n```python\n{SCRIPT[len(served.requests) - 1][0]}```\n")

    with serve(answer) as served:
        client = ChatClient(served.url, "m", cache=None)
        settings = WritingSettings(candidates=2, iterations=1, seconds=3)
        started = time.monotonic()
        (only,) = write_rewards("red images", client, IMAGES, PROMPTS, lambda _: [0], settings)
        assert time.monotonic() - started < 100
    assert len(served.requests) == 6 and len(only.candidates) == 1 and len(only.refused) == 5
    for k, (_, reason) in enumerate(SCRIPT[:-1]):
        assert reason in only.refused[k], only.refused[k]
        assert only.refused[k] in served.requests[k + 1].text
    assert (
        "Goal: red images" in served.requests[0].text and "file 2 of 2 in iteration 1 of 1" in served.requests[3].text
    )
    assert torch.allclose(only.candidates[0].scores, red_by_hand(IMAGES), atol=1e-6)
    assert set(tmp_path.iterdir()) == before


def in_process(code: str, name: str, seconds: float) -> Reward:
    """A reward of trusted code, without a child."""
    helpers = {one: getattr(sandbox_helpers, one) for one in HELPERS if one != "clip_cosine"}
    try:
        function = compile_reward(code, helpers)
    except ValueError as error:
        raise RewardError(f"{name}: {error}") from error
    return load_reward(function)


HIDDEN = torch.tensor([0.9, -0.35, 0.25])  # of the mean of each channel, and nobody's business but the judge's


def scripted_designer(request: Request) -> object:
    """Changes the weights of the file of rank 1, by less in each iteration; it knows nothing of the goal."""
    number, iteration = map(int, re.findall(r"file (\d+) of \d+ in iteration (\d+)", request.text)[0])
    rng = np.random.default_rng([number, iteration])
    ranked = re.findall(r"WEIGHTS = \[(.*?)\]", request.text)
    best = np.array([float(one) for one in ranked[0].split(",")]) if ranked else np.zeros(3)
    weights = best + rng.standard_normal(3) * (1.0 if not ranked else 0.8 / iteration)
    weights /= np.linalg.norm(weights)
    code = f"import torch\n\nWEIGHTS = [{', '.join(f'{w:.6f}' for w in weights)}]\n\n\ndef reward(images, prompts):\n"
    code += "    return (images.mean((2, 3)) * torch.tensor(WEIGHTS)).sum(1)\n"
    return completion(f"```python\n{code}```")


class Hidden:
    """The hidden goal, as a reward."""

    name, differentiable = "hidden", False

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        assert set(prompts) <= {"the goal", "any"}
        return (images.mean((2, 3)) * HIDDEN).sum(1)


def spearman_after_five_iterations(rank_of: Callable[[Tensor], Rank], make: Any) -> float:
    images = torch.rand(48, 3, 1, 1, generator=torch.Generator().manual_seed(2)).expand(-1, -1, 8, 8).contiguous()
    with serve(scripted_designer) as served:
        client = ChatClient(served.url, "m", cache=None)
        written = write_rewards("the goal", client, images, ["any"] * 48, rank_of(images), make=make)
        *_, last = written
    assert last.number == 5 and len(last.candidates) == 7
    fresh = torch.rand(500, 3, 1, 1, generator=torch.Generator().manual_seed(3)).expand(-1, -1, 8, 8).contiguous()
    return spearman(last.candidates[0].reward(fresh, ["any"] * 500), Hidden()(fresh, ["any"] * 500))


def by_judge(images: Tensor) -> Rank:
    return rank_by_judge(as_judge(Hidden(), 0.05), "the goal", images)


@pytest.mark.hard
def test_rankings_lead_to_the_hidden_goal_and_shuffled_ones_do_not() -> None:
    def shuffled(seed: int) -> Callable[[Tensor], Rank]:
        rng = np.random.default_rng(seed)
        return lambda images: lambda candidates: rng.permutation(len(candidates)).tolist()

    assert spearman_after_five_iterations(by_judge, in_process) >= 0.9
    assert np.mean([spearman_after_five_iterations(shuffled(seed), in_process) for seed in range(5)]) < 0.6


@pytest.mark.hard
def test_rankings_lead_to_the_hidden_goal_from_child_processes() -> None:
    assert spearman_after_five_iterations(by_judge, SandboxReward.from_code) >= 0.9


@pytest.mark.hard
def test_the_command_writes_a_reward_that_steers(steer: Steer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder, out, work = drawn_scenes(tmp_path / "scenes", 12), tmp_path / "my_reward.py", tmp_path / "work"
    codes = [RED, RED.replace("red", "blue")]
    with serve(lambda request: completion(codes["file 2 of 2" in request.text])) as served:
        words = ["rewards", "write", "red images", "--chat", served.url, "--chat-model", "m", "--images", folder]
        words += ["--candidates", 2, "--iterations", 1, "--judge", "colour:red", "--out", out, "--work", work]
        code, printed, err = steer(*words)
        assert code == 0, err
        asked = len(served.requests)
        assert steer(*words)[0] == 0 and len(served.requests) == asked  # resumed from the cache
    assert out.read_text() == RED and "use it as --reward sandbox:" in printed and "2 requests answered" in printed
    record = json.loads((work / "iteration-1.json").read_text())
    assert [one["rank"] for one in record["candidates"]] == [1, 2] and record["refused"] == []
    code, printed, err = steer("score", folder / "000.png", "--prompt", "a star", "--reward", f"sandbox:{out}")
    assert code == 0 and 0 <= json.loads(printed)["scores"][0]["score"] <= 1, err
    code, _, err = steer(*words[:-4], "--out", tmp_path / "x.txt")
    assert code == 2 and "the reward is a Python file" in err


@pytest.mark.hard
def test_a_written_reward_is_distilled_into_a_differentiable_one(
    steer: Steer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head predicts the file's scores on images that it has not seen, and needs no child process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (folder := tmp_path / "images").mkdir()
    for number, image in enumerate(synthetic_preferences.images(400)):
        (folder / f"{number:03d}.png").write_bytes(image)
    fresh = synthetic_preferences.tensors(synthetic_preferences.images(500)[400:])
    code = "def reward(images, prompts):\n    return 100 * images[:, 0].mean((1, 2))\n"
    with serve(lambda request: completion(f"```python\n{code}```")) as served:
        words = ["rewards", "write", "red images", "--chat", served.url, "--chat-model", "m", "--images", folder]
        words += ["--prompt", "a star", "--candidates", 1, "--iterations", 1, "--out", tmp_path / "red.py"]
        words += ["--judge", "colour:red", "--work", tmp_path / "work", "--distil", tmp_path / "red"]
        status, printed, err = steer(*words, "--backbone", synthetic_preferences.tiny_clip())
    assert status == 0 and f"use it as --reward {tmp_path}/red" in printed, err
    reward = load_reward(str(tmp_path / "red"))
    scores, truth = reward(fresh, ["a star"] * 100), 100 * fresh[:, 0].mean((1, 2))
    assert reward.differentiable and spearman(scores.detach(), truth) > 0.8
    assert abs(scores.mean() - truth.mean()) < 10, "in the unit of the file"


def test_a_person_ranks_in_the_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = [Candidate(RED, load_reward("brightness"), torch.rand(10), 1) for _ in range(3)]
    answers = iter(["1 1", "4", "3 1"])
    monkeypatch.setattr("click.prompt", lambda *_, **__: next(answers))
    assert rank_in_terminal(IMAGES, tmp_path)(candidates) == [2, 0, 1]
    assert Image.open(tmp_path / "iteration-1.png").width > 300
