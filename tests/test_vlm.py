"""Local vision-language models: probabilities by teacher forcing against a loop over tokens, gradients, refusals."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_vlm import bit_images, tiny_llava, tiny_qwen
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from steer.reward import RewardError, score
from steer.rewards.followups import read_followups
from steer.rewards.inputs import as_uint8
from steer.rewards.parser import load_reward
from steer.rewards.vlm import mean_of_axes, score_in_json

QUESTION = 'Does this figure show "{}"? Please answer yes or no.'


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("vlm")
    return {"llava": tiny_llava(root / "llava"), "qwen": tiny_qwen(root / "qwen")}


@torch.no_grad()
def by_hand(folder: Path, image: Tensor, question: str, answer: str) -> float:
    """log P(answer), one token at a time, with the image as PIL reads it from a file."""
    processor, model = AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=[text], images=[Image.fromarray(as_uint8(image[None])[0])], return_tensors="pt")
    total = 0.0
    for token in processor.tokenizer(answer, add_special_tokens=False).input_ids:
        log_p = model.eval()(**inputs).logits[0, -1].log_softmax(-1)
        total += log_p[token].item()
        for name, filler in (("input_ids", token), ("attention_mask", 1), ("mm_token_type_ids", 0)):
            if name in inputs:
                inputs[name] = torch.cat([inputs[name], torch.tensor([[filler]])], 1)
    return total


@pytest.mark.parametrize("family", ["llava", "qwen"])
def test_probabilities_equal_a_loop_over_tokens(folders: dict[str, Path], family: str) -> None:
    images = bit_images(3, 56, 56) if family == "qwen" else bit_images(3)
    prompts = ["a red star", "a blue circle", "a red star"]
    p = load_reward(f"vqa:{folders[family]}")(images, prompts)
    odds = load_reward(f"vqa:{folders[family]},unit=log-odds")(images, prompts)
    for k, prompt in enumerate(prompts):
        yes, no = (by_hand(folders[family], images[k], QUESTION.format(prompt), answer) for answer in ("Yes", "No"))
        assert p[k].item() == pytest.approx(math.exp(yes), rel=1e-4)
        assert odds[k].item() == pytest.approx(yes - no, abs=1e-4)


def test_several_questions_and_answers_of_several_tokens(folders: dict[str, Path], tmp_path: Path) -> None:
    """Soft-TIFA: the geometric mean; a count may be spelled in two ways."""
    file, images = tmp_path / "questions.jsonl", bit_images(2)
    pairs = [["Is it red?", "Yes"], ["Is it there?", "No"], ["Is it four?", "four"], ["Is it one", "a red star"]]
    file.write_text(json.dumps({"prompt": "two", "vqa_list": pairs}) + "\n")
    reward = load_reward(f"vqa:{folders['llava']},questions={file}")
    for k, got in enumerate(reward(images, ["two", "two"]).tolist()):

        def log_p(question: str, answer: str, image: Tensor = images[k]) -> float:
            return by_hand(folders["llava"], image, f"{question} Answer in one word.", answer)

        count = math.log(sum(math.exp(log_p("Is it four?", answer)) for answer in ("four", "4")))
        others = [("Is it red?", "Yes"), ("Is it there?", "No"), ("Is it one.", "a red star")]
        assert got == pytest.approx(math.exp((count + sum(log_p(*one) for one in others)) / 4), rel=1e-4)
    rows = [{"vqa_list": pairs[:1]}, {"questions": ["Is it red?"]}]
    p = score(reward, images, ["x", "y"], rows)
    assert p[0].item() == pytest.approx(
        math.exp(by_hand(folders["llava"], images[0], "Is it red? Answer in one word.", "Yes")), rel=1e-4
    )
    with pytest.raises(RewardError, match="no questions for the prompt 'unknown'"):
        reward(images[:1], ["unknown"])


@pytest.mark.parametrize("family", ["llava", "qwen"])
def test_gradients_flow_through_the_processor(folders: dict[str, Path], family: str) -> None:
    reward = load_reward(f"vqa:{folders[family]},unit=log-odds,micro_batch=1")
    assert reward.differentiable
    images = bit_images(2, 60, 72).mul(0.8).add(0.1).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(images, ["a star", "a star"]).sum(), images)
    direction, step = gradient / gradient.norm(), 0.03
    with torch.no_grad():
        up, down = (reward(images + sign * step * direction, ["a star", "a star"]).sum() for sign in (1, -1))
    assert ((up - down) / (2 * step)).item() == pytest.approx((gradient * direction).sum().item(), rel=0.05)


def test_order_batches_and_micro_batches_do_not_matter(folders: dict[str, Path]) -> None:
    images, prompts = bit_images(4), ["a star", "a red star", "a star", "blue"]
    whole = load_reward(f"vqa:{folders['llava']}")(images, prompts)
    small = load_reward(f"vqa:{folders['llava']},micro_batch=1")
    order = [2, 0, 3, 1]
    torch.testing.assert_close(small(images[order], [prompts[k] for k in order]), whole[order], rtol=1e-4, atol=1e-7)


def test_followups_equal_a_loop_over_tokens(folders: dict[str, Path], tmp_path: Path) -> None:
    """Mean log-likelihood per token of two approving answers less that of a disapproving one, in any order."""
    file, folder = tmp_path / "f.yaml", folders["llava"]
    file.write_text(
        'question: Is it "{prompt}"?\npositive: [Yes it is a star, "Yes"]\nnegative: [No it is in figure four.]\n'
    )
    images, prompts = bit_images(3), ["a star", "blue", "a star"]
    reward = load_reward(f"vqa:{folder},followups={file},micro_batch=2")
    scores = reward(images, prompts)

    def per_token(image: Tensor, prompt: str, answer: str) -> float:
        count = len(AutoProcessor.from_pretrained(folder).tokenizer(answer, add_special_tokens=False).input_ids)
        return by_hand(folder, image, f'Is it "{prompt}"?', answer) / count

    for k, prompt in enumerate(prompts[:2]):
        yes = [per_token(images[k], prompt, answer) for answer in ("Yes it is a star", "Yes")]
        expected = sum(yes) / 2 - per_token(images[k], prompt, "No it is in figure four.")
        assert scores[k].item() == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(reward(images.flip(0), prompts[::-1]), scores.flip(0), rtol=1e-4, atol=1e-6)
    assert reward.differentiable and reward.name == f"vqa:{folder},followups={file}"
    gradient = torch.autograd.grad(reward(images.requires_grad_(), prompts).sum(), images)[0]
    assert gradient.abs().sum() > 0


def test_yes_and_no_as_followups_are_the_log_odds(folders: dict[str, Path], tmp_path: Path) -> None:
    file, images = tmp_path / "f.yaml", bit_images(2)
    question = QUESTION.format("{prompt}")
    file.write_text(json.dumps({"question": question, "positive": ["Yes"], "negative": ["No"]}).replace('"No"', "No"))
    odds, same = (
        load_reward(f"vqa:{folders['qwen']},{option}")(images, ["a star", "blue"])
        for option in ("unit=log-odds", f"followups={file}")
    )
    torch.testing.assert_close(same, odds, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "text",
    [
        "[a]",
        "positive: [a]",
        "positive: [a]\nnegative: []",
        "positive: a\nnegative: [b]",
        "a: [",
        "positive: [a]\nnegative: [b]\npositive: [c]",
    ],
)
def test_files_without_followups_are_refused_in_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text(text)
    with pytest.raises(RewardError, match=r"followups=.*(expected |repeated)") as caught:
        read_followups(tmp_path / "f.yaml")
    assert "\n" not in str(caught.value)


def test_a_local_model_that_answers_in_words_is_read_or_refused(folders: dict[str, Path]) -> None:
    reward = load_reward(f"vqa:{folders['llava']},preset=rubric")
    assert not reward.differentiable
    with pytest.raises(RewardError, match='no JSON object with a "score" from 0 to 10'):  # random weights
        reward(bit_images(1), ["a star"])


@pytest.mark.parametrize(
    ("text", "number"),
    [('{"score": 7.5}', 7.5), ('Fine.\n```json\n{"why": {"a": 1}, "score": 3}\n```', 3), ('{"a": 1} {"score": 0}', 0)],
)
def test_scores_are_read_from_json(text: str, number: float) -> None:
    assert score_in_json(text) == number


@pytest.mark.parametrize(
    "text", ["", "7", '{"score": "7"}', '{"score": 11}', '{"score": NaN}', '{"score": true}', "{{{"]
)
def test_other_texts_are_no_scores(text: str) -> None:
    with pytest.raises(ValueError, match="score"):
        score_in_json(text)


def test_three_axes_are_averaged() -> None:
    text = "Alignment Score (1-5): 2.7\nCoherence Score (1-5): 2.4\nStyle Score (1-5): 3.0\n"
    assert mean_of_axes(text) == pytest.approx(2.7)
    with pytest.raises(ValueError, match="no three scores"):
        mean_of_axes(text.replace("3.0", "9"))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("vqa:{llava},preset=vqscore", "did you mean vqascore"),
        ("vqa:{llava},unit=odds", "probability or log-odds"),
        ("vqa:{llava},model=x", "model= names the model of an endpoint"),
        ("vqa:{llava},micro_batch=0", "positive integer"),
        ("vqa:{llava},dtype=half", "float16"),
        ("vqa:{llava},preset=rubric,unit=log-odds", "unit=log-odds"),
        ("vqa:{llava},questions=q.yaml,preset=vqascore", "belongs to preset=soft-tifa"),
        ("vqa:{llava},questions=missing.yaml", "questions=missing.yaml: cannot be read"),
        ("vqa:{llava},followups=f.yaml,unit=log-odds", "followups= scores whole sentences by a local model"),
        ("vqa:http://127.0.0.1:9/v1,model=m,followups=f.yaml", "followups= scores whole sentences by a local model"),
        ("vqa:{llava},followups=missing.yaml", "followups=missing.yaml: cannot be read"),
        ("vqa:{llava},template=missing.txt", "template=missing.txt: cannot be read"),
        ("vqa:{mute}", "no chat template"),
        ("vqa:{coded}", "auto_map"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(
    folders: dict[str, Path], tmp_path: Path, spec: str, message: str
) -> None:
    mute, coded = tiny_llava(tmp_path / "mute"), tiny_llava(tmp_path / "coded")
    (mute / "chat_template.jinja").unlink()
    config: dict[str, Any] = json.loads((coded / "config.json").read_text())
    (coded / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "x.Y"}}))
    with pytest.raises(RewardError, match=message) as caught:
        load_reward(spec.format(llava=folders["llava"], mute=mute, coded=coded))
    assert "\n" not in str(caught.value)
