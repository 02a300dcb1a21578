"""Endpoints: scores by hand from scripted replies, retries, concurrency, the cache, the key in no text."""

import logging
import math
from pathlib import Path

import pytest
import torch
from chat_server import Request, completion, serve
from conftest import cached_pipe
from torch import Tensor

from steer import BestOfNPipeline, FKSteeringPipeline
from steer.reward import RewardError
from steer.rewards import chat
from steer.rewards.parser import load_reward

KEY = "sk-a-very-secret-key"


@pytest.fixture(autouse=True)
def _short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "RETRY_DELAY", 0.01)
    monkeypatch.setenv("STEER_CHAT_TOKEN", KEY)


def flat(*values: float) -> Tensor:
    return torch.stack([torch.full((3, 8, 8), value) for value in values])


def by_brightness(request: Request) -> object:
    """P(yes) is the mean of the image, over two spellings."""
    p = float(request.images[0].mean())
    return completion("Yes", {" Yes": math.log(0.6 * p), "yes": math.log(0.4 * p), "No": math.log(1 - p)})


def test_the_probability_is_that_of_all_spellings(tmp_path: Path) -> None:
    images = flat(0.2, 0.4, 0.8)
    with serve(by_brightness) as served:
        spec = f"vqa:{served.url},model=m,cache={tmp_path}"
        p, odds = (load_reward(spec + rest)(images, ["a", "b", "c"]) for rest in ("", ",unit=log-odds"))
    torch.testing.assert_close(p, torch.tensor([0.2, 0.4, 0.8]))
    torch.testing.assert_close(odds, torch.logit(torch.tensor([0.2, 0.4, 0.8])))
    request = served.requests[0]
    assert len(served.requests) == 3  # the second reward asks the same
    assert request.headers["Authorization"] == f"Bearer {KEY}"
    assert {
        name: request.body[name] for name in ("model", "temperature", "max_tokens", "logprobs", "top_logprobs")
    } == {
        "model": "m",
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": True,
        "top_logprobs": 20,
    }
    asked = {one.text for one in served.requests}
    assert asked == {f'Does this figure show "{prompt}"? Please answer yes or no.' for prompt in "abc"}


def test_steering_raises_the_score_of_an_endpoint(tmp_path: Path) -> None:
    """P(yes) is the brightness: FK images are brighter than the plain batch, over six starts."""
    pipe, prompts = cached_pipe("sd"), ["a star"] * 6
    call = {"num_particles": 4, "num_inference_steps": 4, "height": 8, "width": 8, "output_type": "pt"}
    with serve(by_brightness) as served:
        reward = load_reward(f"vqa:{served.url},model=m,cache={tmp_path}")
        steered, plain = (
            method(prompts, generator=torch.Generator().manual_seed(0), **call, **options)
            for method, options in (
                (FKSteeringPipeline(pipe, reward), {"lam": 1000.0}),
                (BestOfNPipeline(pipe, reward), {}),
            )
        )
    torch.testing.assert_close(steered.rewards.flatten(), steered.images.mean((1, 2, 3)).float(), atol=5e-3, rtol=0)
    gain = steered.rewards.mean(1) - plain.rewards.mean(1)
    assert gain.mean() > 1.96 * gain.std() / len(gain) ** 0.5, gain


def test_an_answer_that_is_not_listed_has_the_least_listed_probability(tmp_path: Path) -> None:
    with serve(lambda _: completion("No", {"No": math.log(0.9), "the": math.log(0.01)})) as served:
        spec = f"vqa:{served.url},model=m,cache=off"
        assert load_reward(spec)(flat(0.5), ["a"]).item() == pytest.approx(0.01)
        odds = load_reward(f"{spec},unit=log-odds")(flat(0.5), ["a"]).item()
        assert odds == pytest.approx(math.log(0.01 / 0.9))


def test_presets_ask_their_question_and_read_their_answer(tmp_path: Path) -> None:
    questions = tmp_path / "questions.yaml"
    questions.write_text("- Is there a {prompt}?\n- [How many, four]\n")
    template = tmp_path / "template.txt"
    template.write_text("Grade {prompt} in JSON.")

    def answer(request: Request) -> object:
        if "Alignment" in request.text:
            return completion("Alignment Score (1-5): 4\nCoherence Score (1-5): 3\nStyle Score (1-5): 2")
        if "JSON" in request.text:
            return completion('{"score": 6}')
        if request.text.startswith("How many"):
            return completion("4", {"4": math.log(0.3), " Four": math.log(0.1), "5": math.log(0.2)})
        return completion("yes", {"yes": math.log(0.9), "no": math.log(0.1)})

    with serve(answer) as served:
        spec = f"vqa:{served.url},model=m,cache=off"
        asked = [",preset=unified-reward", f",preset=rubric,template={template}", f",questions={questions}"]
        got = [load_reward(spec + rest)(flat(0.5), ["star"]).item() for rest in asked]
        assert got == pytest.approx([3, 6, math.sqrt(0.9 * 0.4)])
    assert "[star]" in served.requests[0].text and served.requests[1].text == "Grade star in JSON."
    assert {request.text for request in served.requests[2:]} == {
        "Is there a star? Answer in one word.",
        "How many. Answer in one word.",
    }


def test_requests_are_concurrent_up_to_the_limit_and_stay_in_order() -> None:
    values = torch.linspace(0.1, 0.9, 12)
    with serve(by_brightness, delay=0.1) as served:
        reward = load_reward(f"vqa:{served.url},model=m,cache=off,concurrency=3")
        p = reward(flat(*values.tolist()), ["a"] * 12)
    torch.testing.assert_close(p, values, atol=0.003, rtol=0)
    assert 2 <= served.at_once <= 3
    assert vars(reward.cost) == {
        "calls": 12,
        "cached": 0,
        "retries": 0,
        "prompt_tokens": 84,
        "completion_tokens": 24,
    }


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(status: int) -> None:
    replies = [(status, {"error": {"message": "busy"}}, {"Retry-After": "0"})] * 2

    def answer(request: Request) -> object:
        return replies.pop() if replies else by_brightness(request)

    with serve(answer) as served:
        reward = load_reward(f"vqa:{served.url},model=m,cache=off")
        assert reward(flat(0.4), ["a"]).item() == pytest.approx(0.4)
    assert len(served.requests) == 3 and reward.cost.retries == 2 and reward.cost.calls == 1


def test_the_cache_answers_a_second_run_and_a_corrupt_entry_is_replaced(tmp_path: Path) -> None:
    with serve(by_brightness) as served:
        spec = f"vqa:{served.url},model=m,cache={tmp_path}"
        first = load_reward(spec)(flat(0.2, 0.4), ["a", "a"])
        second = load_reward(spec)
        torch.testing.assert_close(second(flat(0.2, 0.4), ["a", "a"]), first)
        assert len(served.requests) == 2 and second.cost.cached == 2 and second.cost.calls == 0
        other = load_reward(spec.replace("model=m", "model=n"))  # another model is another question
        other(flat(0.2), ["a"])
        assert len(served.requests) == 3
        for file in tmp_path.rglob("*.json"):
            file.write_text("{")
        torch.testing.assert_close(load_reward(spec)(flat(0.2, 0.4), ["a", "a"]), first)
        assert len(served.requests) == 5


BAD = {
    "unauthorised": (401, {"error": {"message": f"Incorrect API key provided: {KEY}"}}, {}),
    "missing": (404, {"error": {"message": "The model `m` does not exist"}}, {}),
    "always busy": (503, f"two\nlines \x1b[31m {KEY}", {}),
    "redirect": (302, "", {"Location": "http://127.0.0.1:1/"}),
    "page": "<html>",
    "empty": {"choices": []},
    "array": [1],
    "no log-probabilities": completion("Yes"),
    "neither": completion("Maybe", {"Maybe": -0.1, "Perhaps": -3.0}),
    "text": completion("Yes", {"Yes": "certain"}),  # type: ignore[dict-item]
    "huge": "x" * 5_000_000,
}
MESSAGES = {
    "unauthorised": r"status 401: Incorrect API key provided: \*\*\*; the key is read from .* STEER_CHAT_TOKEN",
    "missing": "status 404: The model `m` does not exist",
    "always busy": r"status 503: two lines .* \(attempt 2 of 2\)",
    "redirect": "status 302",
    "page": "something else than a chat completion",
    "empty": "something else than a chat completion",
    "array": "something else than a chat completion",
    "no log-probabilities": "returns no log-probabilities",
    "neither": "neither Yes nor No",
    "text": "something else than a chat completion",
    "huge": "more than 4000000 bytes",
}


@pytest.mark.parametrize("case", BAD)
def test_bad_replies_are_one_line_without_the_key(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with serve(lambda _: BAD[case]) as served, pytest.raises(RewardError, match=MESSAGES[case]) as caught:
        load_reward(f"vqa:{served.url},model=m,tries=2,cache={tmp_path}")(flat(0.5), ["a"])
    message = str(caught.value)
    assert "\n" not in message and "\x1b" not in message and served.url in message
    stored = [file.read_text() for file in tmp_path.rglob("*") if file.is_file()]
    assert not any(KEY in text for text in (message, caplog.text, *stored))


def test_a_silent_server_times_out_and_none_cannot_be_reached() -> None:
    timed_out = pytest.raises(RewardError, match=r"timed out after 0.2 s.*\(attempt 2 of 2\)")
    with serve(by_brightness, delay=1.0) as served, timed_out:
        load_reward(f"vqa:{served.url},model=m,timeout=0.2,tries=2,cache=off")(flat(0.5), ["a"])
    with pytest.raises(RewardError, match="cannot be reached"):
        load_reward(f"vqa:{served.url},model=m,tries=1,cache=off")(flat(0.5), ["a"])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("vqa:http://host/v1", "name the server's model"),
        ("vqa:http://me:pass@host/v1,model=m", "STEER_CHAT_TOKEN"),
        ("vqa:http://host/v1,model=m,tries=0", "tries=0"),
        ("vqa:http://host/v1,model=m,timeout=-1", "timeout=-1"),
        ("vqa:http://host/v1,model=m,concurrency=x", "concurrency=x"),
    ],
)
def test_wrong_specifications_are_refused(spec: str, message: str) -> None:
    with pytest.raises(RewardError, match=message) as caught:
        load_reward(spec)
    assert "pass@" not in str(caught.value)


def test_a_key_that_is_none_is_refused_without_being_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEER_CHAT_TOKEN", "two words")
    with serve(by_brightness) as served, pytest.raises(RewardError, match="STEER_CHAT_TOKEN must be") as caught:
        load_reward(f"vqa:{served.url},model=m,cache=off")(flat(0.5), ["a"])
    assert "two words" not in str(caught.value)
