"""Rewards of texts and token sequences, in the grammar of all rewards: "parses + says:blue:2 + regex:^a".

A text reward is `(texts, prompts) -> (N,)` with `images = "text"`, or a function whose first parameter is annotated
`list[str]`. `SequenceScore` applies it to token ids and, for gradients, to relaxed tokens if the reward has `relaxed`.
"""

import inspect
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steer.reward import Composite, Reward, RewardError, Texts, score
from steer.rewards.classifier import Classifier
from steer.rewards.names import option_count
from steer.rewards.scene import parse
from steer.tables import one_line

BATCH = 32  # texts that a language model scores at a time


class TextReward:
    """The base of text rewards."""

    images = "text"
    differentiable = False
    name: str


class Parses(TextReward):
    """1 for a text that the scene grammar (`steer.rewards.scene`) parses, else 0."""

    name = "parses"

    def __call__(self, texts: Sequence[str], prompts: Sequence[str]) -> Tensor:
        return torch.tensor([float(_is_scene(text)) for text in texts])


def _is_scene(text: str) -> bool:
    try:
        parse(text)
    except RewardError:
        return False
    return True


class Says(TextReward):
    """1 for a text that contains a word, in any case, else 0; relaxed: 1 − Π_l (1 − p_l[word]).

    p_l[word] is of the token of the word and of the one with a space before it, as GPT-2 has them.
    """

    differentiable = True

    def __init__(self, word: str) -> None:
        if not word.strip() or len(word.split()) > 1:
            raise RewardError(f"says:{word}: give one word, such as says:blue")
        self.word, self.name = word.strip(), f"says:{word.strip()}"

    def __call__(self, texts: Sequence[str], prompts: Sequence[str]) -> Tensor:
        word = re.compile(rf"(?<!\w){re.escape(self.word)}(?!\w)", re.IGNORECASE)
        return torch.tensor([float(word.search(text) is not None) for text in texts])

    def relaxed(self, p: Tensor, prompts: Sequence[str], tokenizer: Any) -> Tensor:
        """Score relaxed tokens p (N, L, V), rows of probabilities: (N,). RewardError for a word of two tokens."""
        written = [tokenizer(text, add_special_tokens=False).input_ids for text in (self.word, f" {self.word}")]
        tokens = sorted({ids[0] for ids in written if len(ids) == 1 and ids[0] < p.shape[-1]})
        if not tokens:
            raise RewardError(f"{self.name}: no single token of this model, so it has no gradients: use another word")
        return 1 - (1 - p[..., tokens].sum(-1)).prod(1)


class Matches(TextReward):
    """1 for a text in which a regular expression matches somewhere, else 0."""

    def __init__(self, pattern: str) -> None:
        try:
            self._pattern = re.compile(pattern)
        except re.error as error:
            raise RewardError(f"regex:{pattern}: no regular expression ({error})") from error
        self.name = f"regex:{pattern}"

    def __call__(self, texts: Sequence[str], prompts: Sequence[str]) -> Tensor:
        return torch.tensor([float(self._pattern.search(text) is not None) for text in texts])


END = ""  # marks the start and the end of a text in the bigram model; not a word


class Bigram(TextReward):
    """Mean log-probability of a word, in nats, under a bigram model of the lines of a file.

    log p(w | v) = log (c(v, w) + 1) − log (c(v) + V), add-one smoothing, V words and the end of a text.
    """

    def __init__(self, path: str) -> None:
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise RewardError(f"bigram:{path}: cannot read the file: give a file of one text per line") from error
        pairs = [pair for line in lines if line.split() for pair in _pairs(line)]
        if not pairs:
            raise RewardError(f"bigram:{path}: no text in this file: give a file of one text per line")
        self._pairs, self._first = Counter(pairs), Counter(first for first, _ in pairs)
        self._size = len({second for _, second in pairs})
        self.name = f"bigram:{path}"

    def __call__(self, texts: Sequence[str], prompts: Sequence[str]) -> Tensor:
        return torch.tensor([self._log_prob(_pairs(text)) for text in texts])

    def _log_prob(self, pairs: Sequence[tuple[str, str]]) -> float:
        terms = [math.log((self._pairs[pair] + 1) / (self._first[pair[0]] + self._size)) for pair in pairs]
        return sum(terms) / len(terms)


def _pairs(text: str) -> list[tuple[str, str]]:
    words = [END, *text.lower().split(), END]
    return list(itertools.pairwise(words))


class ModelReward(TextReward):
    """The base of rewards by a model of transformers, loaded from a folder or a hub name; code in it is never run."""

    def __init__(self, name: str, model: str, kind: Any, micro_batch: str | int) -> None:
        self.name, self._batch = name, option_count("micro_batch", micro_batch)
        self._tokenizer, self._model = _load(model, kind, name)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], prompts: Sequence[str]) -> Tensor:
        starts = range(0, len(texts), self._batch)
        return torch.cat([self._log_probs(list(texts[start : start + self._batch])) for start in starts]).cpu()

    def _log_probs(self, texts: list[str]) -> Tensor:
        """Score a batch (N,), in nats."""
        raise NotImplementedError


class Perplexity(ModelReward):
    """−log perplexity: mean log-probability of a token, in nats, under a causal language model of transformers.

    model        folder or hub name; code in it is never run
    micro_batch  texts at a time
    A text without a second token has no conditional probability and scores like one token of uniform probability.
    """

    def __init__(self, model: str, micro_batch: str | int = BATCH) -> None:
        from transformers import AutoModelForCausalLM

        super().__init__(f"perplexity:{model}", model, AutoModelForCausalLM, micro_batch)

    def _log_probs(self, texts: list[str]) -> Tensor:
        encoded = _encode(self._tokenizer, texts, self._model.device, begin=True)
        logits = self._model(**encoded).logits[:, :-1].float()
        tokens, real = encoded["input_ids"][:, 1:], encoded["attention_mask"][:, 1:].bool()
        log_probs = logits.log_softmax(-1).gather(2, tokens[..., None])[..., 0]
        count = real.sum(1)
        mean = torch.where(real, log_probs, 0.0).sum(1) / count.clamp(min=1)
        return torch.where(count > 0, mean, -math.log(logits.shape[-1]))


class TextClassifier(ModelReward):
    """Log-probability, in nats, of one label under a sequence classifier of transformers (toxicity, acceptability).

    model  folder or hub name; code in it is never run
    label  a label of the model's configuration, by name in any case or by number
    """

    def __init__(self, model: str, label: str, micro_batch: str | int = BATCH) -> None:
        from transformers import AutoModelForSequenceClassification

        super().__init__(f"classifier:{model},label={label}", model, AutoModelForSequenceClassification, micro_batch)
        names = {str(name).lower(): index for index, name in self._model.config.id2label.items()}
        index = int(label) if label.isdecimal() else names.get(label.lower(), -1)
        if not 0 <= index < len(names):
            raise RewardError(f"{self.name}: no such label: it has {', '.join(names)}")
        self._label = index

    def _log_probs(self, texts: list[str]) -> Tensor:
        logits = self._model(**_encode(self._tokenizer, texts, self._model.device)).logits.float()
        if logits.shape[1] == 1:  # the logit of the only label
            return torch.nn.functional.logsigmoid(logits[:, 0])
        return logits.log_softmax(-1)[:, self._label]


def classifier(
    model: str, label: str | None = None, micro_batch: str | int | None = None
) -> Classifier | TextClassifier:
    """Make classifier:MODEL,label=… for texts, or classifier:LABEL for images (`steer.rewards.classifier`)."""
    options: dict[str, Any] = {} if micro_batch is None else {"micro_batch": micro_batch}
    return Classifier(model, **options) if label is None else TextClassifier(model, label, **options)


classifier.takes_number = True  # type: ignore[attr-defined]  # number of an image class


def _load(model: str, kind: Any, name: str) -> tuple[Any, Any]:
    """Load a tokenizer and a frozen model. Raises RewardError."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        loaded = kind.from_pretrained(model).eval().requires_grad_(False)
    except (OSError, ValueError, KeyError) as error:
        reason = one_line(error)
        raise RewardError(f"{name}: cannot be loaded ({reason}): give a folder or hub name of transformers") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if loaded.config.pad_token_id is None:  # classifiers read the last token that is not padding
        loaded.config.pad_token_id = tokenizer.pad_token_id
    return tokenizer, loaded


def _encode(tokenizer: Any, texts: list[str], device: torch.device, begin: bool = False) -> dict[str, Tensor]:
    """Tokenise a batch, padded at the right; `begin`: put the begin token first if there is one."""
    first = (tokenizer.bos_token or "") if begin else ""
    options: dict[str, Any] = {"padding": True, "padding_side": "right", "truncation": not begin}
    encoded = tokenizer([first + text for text in texts], return_tensors="pt", add_special_tokens=not first, **options)
    ids, mask = encoded["input_ids"].long(), encoded["attention_mask"]
    if not ids.shape[1]:  # texts without a token
        ids, mask = torch.zeros(len(texts), 1, dtype=torch.long), torch.zeros(len(texts), 1, dtype=torch.long)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


class SequenceScore:
    """A text reward applied to the token ids of a model: a `steer.reward.SequenceReward`.

    reward     a text reward
    decode     ids (N, L) → texts
    tokenizer  tokenizer of the model, for rewards with `relaxed`
    """

    images = "ids"

    def __init__(self, reward: Reward, decode: Callable[[Tensor], list[str]], tokenizer: Any = None) -> None:
        self.name, self.differentiable = reward.name, reward.differentiable
        self.reward, self._decode, self._tokenizer = reward, decode, tokenizer

    def __call__(self, ids: Tensor, prompts: Sequence[str]) -> Tensor:
        return score(self.reward, Texts(self._decode(ids), ids), prompts)  # type: ignore[arg-type]

    def relaxed(self, p: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score relaxed tokens p (N, L, V) with a graph: equal to the score of the ids if p is one-hot."""
        return _relaxed(self.reward, p, prompts, self._tokenizer)


def _relaxed(reward: Reward, p: Tensor, prompts: Sequence[str], tokenizer: Any) -> Tensor:
    """Score relaxed tokens by a reward, or by the components of a composed one. Raises RewardError."""
    if isinstance(reward, Composite):
        named = reward.parts  # type: ignore[attr-defined]
        components = {name: _relaxed(part, p, prompts, tokenizer) for name, part in named.items()}
        return reward.total(components, prompts)
    relaxed = getattr(reward, "relaxed", None)
    if not reward.differentiable or relaxed is None:
        raise RewardError(f"reward {reward.name!r} has no gradients on tokens: use one that has, such as says:WORD")
    given = {"tokenizer": tokenizer} if "tokenizer" in inspect.signature(relaxed).parameters else {}
    scores: Tensor = relaxed(p, prompts, **given)
    return scores
