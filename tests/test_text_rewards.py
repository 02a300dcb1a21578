"""Text rewards against values by hand and against transformers itself."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from steer import InputError, RewardError, load_reward, score, score_components
from steer.reward import SequenceReward, Texts
from steer.rewards.text import Says, SequenceScore

WORDS = ["[PAD]", "<s>", "a", "red", "blue", "circle", "star"]
TEXTS = ["a red circle", "a blue star", "blue blue", "Blueish a"]


def test_texts_are_scored_by_the_grammar_of_all_rewards() -> None:
    assert score(TEXTS, "", "parses").tolist() == [1, 1, 0, 0]
    assert score(TEXTS, "", "says:blue").tolist() == [0, 1, 1, 0]
    assert score(TEXTS, "", "regex:^a .*r$").tolist() == [0, 1, 0, 0]
    total, parts = score_components(TEXTS, ["p"] * 4, "parses + says:blue:2")
    assert total.tolist() == [1, 3, 2, 0] and parts["parses"].tolist() == [1, 1, 0, 0]
    assert score(TEXTS, "", "min(parses, says:blue)").tolist() == [0, 1, 0, 0]
    assert load_reward("parses + says:blue")(TEXTS, "").tolist() == [1, 2, 1, 0]


def test_a_function_of_a_list_of_str_is_a_text_reward() -> None:
    def words(texts: list[str], prompts: list[str]) -> list[float]:
        return [float(len(text.split())) for text in texts]

    assert score(TEXTS, "", {words: 1, "says:red": 10}).tolist() == [13, 3, 2, 2]


def test_texts_and_images_are_not_confused() -> None:
    with pytest.raises(RewardError, match="reward of texts, such as says"):
        score(TEXTS, "", "brightness")
    with pytest.raises(RewardError, match="was given images"):
        score(torch.rand(1, 3, 8, 8), "", "parses")
    with pytest.raises(RewardError, match="one word"):
        load_reward("says:a b")
    with pytest.raises(RewardError, match="no regular expression"):
        load_reward("regex:[a")


def test_bigram_is_the_smoothed_count_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_text("a red star\na blue star\n\n")
    # Pairs: (∅ a)², (a red), (a blue), (red star), (blue star), (star ∅)²; five different second words or ends.
    expected = [(math.log(3 / 7) + math.log(2 / 7) + math.log(2 / 6) + math.log(3 / 7)) / 4, math.log(1 / 7) / 2]
    expected[1] = (math.log(1 / 7) + math.log(3 / 7)) / 2  # "star"
    assert score(["a red star", "star"], "", f"bigram:{path}").tolist() == pytest.approx(expected, abs=1e-6)
    with pytest.raises(RewardError, match="one text per line"):
        load_reward(f"bigram:{tmp_path / 'none'}")


def saved(folder: Path, model: Any) -> str:
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", bos_token="<s>").save_pretrained(folder)
    model.save_pretrained(folder)
    return str(folder)


def config(**options: Any) -> GPT2Config:
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    return GPT2Config(vocab_size=len(WORDS), bos_token_id=1, eos_token_id=0, pad_token_id=0, **sizes, **options)


def test_perplexity_is_the_loss_of_the_language_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config(initializer_range=0.5)).eval()
    rewards = score(["a red circle", "star"], "", f"perplexity:{saved(tmp_path, model)}")
    for ids, reward in (([1, 2, 3, 5], rewards[0]), ([1, 6], rewards[1])):
        with torch.no_grad():
            loss = model(torch.tensor([ids]), labels=torch.tensor([ids])).loss
        assert reward.item() == pytest.approx(-loss.item(), abs=1e-5)


def test_a_sequence_classifier_scores_one_label(tmp_path: Path) -> None:
    torch.manual_seed(0)
    names = {"id2label": {0: "fine", 1: "toxic"}, "label2id": {"fine": 0, "toxic": 1}}
    model = GPT2ForSequenceClassification(config(initializer_range=0.5, **names)).eval()
    folder = saved(tmp_path, model)
    got = score(["a red circle", "star"], "", f"classifier:{folder},label=Toxic")
    with torch.no_grad():
        exact = [model(torch.tensor([ids])).logits.log_softmax(-1)[0, 1].item() for ids in ([2, 3, 5], [6])]
    assert got.tolist() == pytest.approx(exact, abs=1e-5)
    with pytest.raises(RewardError, match="fine, toxic"):
        load_reward(f"classifier:{folder},label=rude")
    with pytest.raises(RewardError, match="cannot be loaded"):
        load_reward(f"perplexity:{tmp_path / 'none'}")


def test_the_only_label_of_a_classifier_is_the_one_that_its_output_is_for(tmp_path: Path) -> None:
    torch.manual_seed(0)
    names = {"id2label": {0: "toxic"}, "label2id": {"toxic": 0}}
    model = GPT2ForSequenceClassification(config(initializer_range=0.5, **names)).eval()
    got = score(["a red circle"], "", f"classifier:{saved(tmp_path, model)},label=toxic")
    with torch.no_grad():
        logit = model(torch.tensor([[2, 3, 5]])).logits
    assert logit.shape == (1, 1) and got.item() == pytest.approx(logit.sigmoid().log().item(), abs=1e-5)


def test_a_word_after_a_space_is_another_token_and_counts() -> None:
    """As in GPT-2, whose token of " blue" is not that of "blue"."""
    vocabulary = {"[UNK]": 0, "a": 1, "Ġblue": 2, "blue": 3, "Ġsky": 4}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]")
    ids = torch.tensor([[1, 2, 4], [3, 4, 4], [1, 4, 4]])
    p = torch.nn.functional.one_hot(ids, len(vocabulary)).float()
    assert tokenizer("a blue sky").input_ids == [1, 2, 4]
    assert Says("blue").relaxed(p, [""] * 3, tokenizer).tolist() == [1, 1, 0]


class Ids:
    """A tokenizer of WORDS."""

    def __call__(self, text: str, **_: Any) -> Any:
        from types import SimpleNamespace

        return SimpleNamespace(input_ids=[WORDS.index(word) for word in text.split()])


def decode(ids: torch.Tensor) -> list[str]:
    return [" ".join(WORDS[place] for place in row if place) for row in ids.tolist()]


def test_relaxed_scores_equal_those_of_ids_on_one_hot_tokens_and_have_gradients() -> None:
    ids = torch.randint(0, len(WORDS), (50, 4), generator=torch.Generator().manual_seed(0))
    sequence = SequenceScore(load_reward("says:blue:2 + says:red"), decode, Ids())
    assert isinstance(sequence, SequenceReward) and sequence.differentiable
    p = torch.nn.functional.one_hot(ids, len(WORDS)).double().requires_grad_()
    assert torch.allclose(sequence.relaxed(p, [""] * 50), sequence(ids, [""] * 50).double())
    half = torch.full((1, 2, len(WORDS)), 1 / len(WORDS), dtype=torch.float64)
    assert Says("red").relaxed(half, [""], Ids()).item() == pytest.approx(1 - (6 / 7) ** 2)
    assert torch.autograd.grad(sequence.relaxed(p, [""] * 50).sum(), p)[0].abs().sum() > 0
    with pytest.raises(RewardError, match="no gradients on tokens"):
        SequenceScore(load_reward("parses"), decode, Ids()).relaxed(p, [""] * 50)
    assert score(Texts(decode(ids), ids), "", sequence).tolist() == sequence(ids, [""] * 50).tolist()
    assert json.loads(json.dumps(sequence.name)) == "says:blue:2 + says:red"
    assert issubclass(RewardError, InputError)
