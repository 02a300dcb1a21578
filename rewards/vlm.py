"""Vision-language models as rewards: questions about the image, answered by a local model or behind an endpoint.

vqa:MODEL                          a transformers image-text-to-text model: P(answer) by teacher forcing
vqa:http://HOST/v1,model=NAME      an OpenAI-compatible endpoint: log-probabilities of the first token, or its text

A preset defines the question, the conversion of its answer to a number, and the source; several questions about one
prompt are aggregated to the geometric mean of their probabilities.
"""

import inspect
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from steer.registry import choose
from steer.reward import Metadata, RewardError
from steer.rewards.chat import CONCURRENCY, MAX_ATTEMPTS, TIMEOUT, ChatClient, ChatMessage, ChatReply, default_cache
from steer.rewards.clip import loading, reward_name
from steer.rewards.followups import FollowupReward, read_followups, read_option_file
from steer.rewards.grammar import NUMBER
from steer.rewards.images import in_micro_batches
from steer.rewards.inputs import as_png, as_uint8, rows_by_prompt, takes_any_images
from steer.rewards.names import option_count, option_number
from steer.rewards.preference_pairs import read_rows
from steer.rewards.weights import NO_NETWORK, cast, check_dtype, to_module_device

YES_NO = ("Yes", "No")
COUNTS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
TOP_TOKENS, REPLY_TOKENS = 20, 512  # log-probabilities of one token; tokens of an answer in words
UNITS = ("probability", "log-odds")
QUESTION_KEYS = ("vqa_list", "questions")  # keys in a prompt's metadata, or in a row of a file


@dataclass(frozen=True)
class Preset:
    """Preset of a question: its text with {prompt} or {question}, the rule for its answer, its source.

    read  converts the text of a reply to a number; None: the probability of an answer
    """

    question: str
    source: str
    read: Callable[[str], float] | None = None


@dataclass(frozen=True)
class Query:
    """One question about one image: the probability of any of `answers` counts; `other` is the opposite answer."""

    row: int
    question: str
    answers: tuple[str, ...] = YES_NO[:1]
    other: str | None = YES_NO[1]


def mean_of_axes(text: str) -> float:
    """Return the mean of Alignment, Coherence and Style Score, 1..5 each. Raises ValueError if one is missing."""
    scores = dict(re.findall(rf"(Alignment|Coherence|Style) Score[^:\n]*:\s*({NUMBER})", text))
    values = [float(number) for number in scores.values()]
    if len(values) < 3 or not all(1 <= value <= 5 for value in values):
        raise ValueError("no three scores from 1 to 5")
    return sum(values) / 3


def score_in_json(text: str) -> float:
    """Return "score", 0..10, of the first JSON object in a text. Raises ValueError if there is none."""
    for start in re.finditer(r"\{", text):
        try:
            payload, _ = json.JSONDecoder().raw_decode(text[start.start() :])
        except (ValueError, RecursionError):
            continue
        score = payload.get("score")
        if isinstance(score, int | float) and not isinstance(score, bool) and 0 <= score <= 10:
            return float(score)
    raise ValueError('no JSON object with a "score" from 0 to 10')


PRESETS = {
    "vqascore": Preset('Does this figure show "{prompt}"? Please answer yes or no.', "VQAScore, arXiv 2404.01291"),
    "soft-tifa": Preset("{question} Answer in one word.", "Soft-TIFA of GenEval 2, arXiv 2512.16853"),
    "unified-reward": Preset(
        "Rate a generated image against its caption on three axes, each from 1 to 5: alignment (the content agrees "
        "with the caption), coherence (no glitches or distorted objects), style (the image is beautiful, whatever the "
        "caption).\nAnswer in this format alone:\nAlignment Score (1-5): X\nCoherence Score (1-5): Y\n"
        "Style Score (1-5): Z\n\nText Caption: [{prompt}]",
        "axes and answer format of UnifiedReward 2.0, arXiv 2503.05236",
        mean_of_axes,
    ),
    "rubric": Preset(
        'The image was made from the text "{prompt}". Grade it from 0 to 10 by these rules: every object, count, '
        "attribute and relation of the text is in the image (0 to 7 points); nothing is distorted or out of place (0 "
        'to 3 points).\nAnswer with one JSON object alone: {"score": NUMBER}',
        "this project",
        score_in_json,
    ),
}


class Answering(Protocol):
    """A model that answers questions about images (N, 3, H, W)."""

    differentiable: bool

    def log_probabilities(self, images: Tensor, queries: Sequence[Query]) -> Tensor:
        """Return (Q, 2): log P of each query's answers, and of its opposite answer (NaN if it has none)."""

    def texts(self, images: Tensor, queries: Sequence[Query]) -> list[str]:
        """Return the answers in words, one per query."""


class LocalModel:
    """A transformers image-text-to-text model.

    P(answer | image, question) = Π_l P(token_l | image, question, tokens before l), by teacher forcing, with the
    question in the model's own chat template. Rows of one question are one batch, so nothing is padded.

    If the image processor takes tensors (its torchvision backend: LLaVA, Qwen-VL, SmolVLM and most others), gradients
    flow to the images and images keep their precision; other processors receive 8-bit images, and the reward is not
    differentiable. `differentiable` is measured when the model is loaded.

    model  ORGANISATION/NAME of the hub, or a folder;  dtype: None is the checkpoint's precision
    Raises RewardError if the model cannot be loaded or has no chat template. Code of a repository is never run.
    """

    def __init__(self, model: str, *, dtype: str | None = None, micro_batch: str | int = 8) -> None:
        check_dtype(dtype)
        self._name, self._micro_batch = model, micro_batch
        in_micro_batches(lambda images, prompts: images, micro_batch)  # raises for an invalid size
        folder = Path(model).is_dir()
        with loading(f"vision-language model {model!r}", "" if folder else NO_NETWORK):
            self._processor, self._model = _load(model, folder)
        cast(self._model, dtype)
        if not getattr(self._processor, "chat_template", None):
            raise RewardError(
                f"vqa:{model}: its processor has no chat template: choose a model that follows instructions"
            )
        self._keeps_logits = "logits_to_keep" in inspect.signature(self._model.forward).parameters
        self.differentiable = self._takes_tensors()

    def log_probabilities(self, images: Tensor, queries: Sequence[Query]) -> Tensor:
        columns: list[Tensor] = [torch.empty(0)] * len(queries)
        asked = [(one.question, one.answers, one.other) for one in queries]
        for (question, answers, other), places in rows_by_prompt(asked).items():
            rows = images[[queries[k].row for k in places]]
            scores = self.answers(rows, question, [*answers, *([other] if other else [])])
            chosen = scores[:, : len(answers)].logsumexp(1)
            opposite = scores[:, -1] if other else torch.full_like(chosen, math.nan)
            for k, row in zip(places, torch.stack([chosen, opposite], 1), strict=True):
                columns[k] = row
        return torch.stack(columns)

    def answers(self, images: Tensor, question: str, texts: Sequence[str], per_token: bool = False) -> Tensor:
        """Return log P (N, A) of answers to one question about images (N, 3, H, W), each in a separate batch.

        per_token  the mean over the tokens of an answer in place of the sum
        """
        tokens = [self._processor.tokenizer(text, add_special_tokens=False).input_ids for text in texts]
        score = in_micro_batches(partial(self._answer, answers=tokens), self._micro_batch)
        scores = score(to_module_device(images, self._model), [question] * len(images))
        return scores / scores.new_tensor([len(answer) for answer in tokens]) if per_token else scores

    def texts(self, images: Tensor, queries: Sequence[Query]) -> list[str]:
        replies = []
        for query in queries:
            inputs = self._inputs(to_module_device(images[query.row][None], self._model), query.question)
            with torch.no_grad():
                ids = self._model.generate(**inputs, max_new_tokens=REPLY_TOKENS, do_sample=False)
            new = ids[0, inputs["input_ids"].shape[1] :]
            replies.append(self._processor.tokenizer.decode(new, skip_special_tokens=True))
        return replies

    def _answer(self, images: Tensor, questions: Sequence[str], answers: Sequence[Sequence[int]]) -> Tensor:
        """Return log P (N, A) of the tokens of answers to one question about images (N, 3, H, W)."""
        inputs = self._inputs(images, questions[0])
        if all(len(answer) == 1 for answer in answers):
            return self._next_tokens(inputs, 1)[:, -1, [answer[0] for answer in answers]]
        return torch.stack([self._teacher_forced(inputs, answer) for answer in answers], 1)

    def _teacher_forced(self, inputs: Mapping[str, Tensor], answer: Sequence[int]) -> Tensor:
        """Return Σ_l log P(token_l | everything before it): (N,)."""
        count = len(inputs["input_ids"])
        appended = inputs["input_ids"].new_tensor(answer).expand(count, -1)
        extended = dict(inputs)
        for name, value in inputs.items():
            if value.shape[:2] == inputs["input_ids"].shape:  # ids, masks, types of tokens
                fill = {"input_ids": appended, "attention_mask": torch.ones_like(appended)}
                extended[name] = torch.cat([value, fill.get(name, torch.zeros_like(appended)).to(value.dtype)], 1)
        scores = self._next_tokens(extended, len(answer) + 1)[:, -len(answer) - 1 : -1]
        return scores.gather(-1, appended[..., None])[..., 0].sum(1)

    def _next_tokens(self, inputs: Mapping[str, Tensor], last: int) -> Tensor:
        """Return log-probabilities (N, ≥ last, V) in fp32 of the tokens after the last positions."""
        keep = {"logits_to_keep": last} if self._keeps_logits else {}
        return self._model(**inputs, use_cache=False, **keep).logits.float().log_softmax(-1)

    def _inputs(self, images: Tensor, question: str) -> dict[str, Tensor]:
        user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        text = self._processor.apply_chat_template([user], add_generation_prompt=True, tokenize=False)
        if self.differentiable:
            shown: list[Any] = [[image] for image in images.float().clamp(0, 1)]
        else:
            shown = [[Image.fromarray(pixels)] for pixels in as_uint8(images)]
        inputs = self._processor(
            text=[text] * len(images), images=shown, return_tensors="pt", do_rescale=not self.differentiable
        )
        dtype = next(self._model.parameters()).dtype
        moved = {name: value.to(images.device) for name, value in inputs.items() if torch.is_tensor(value)}
        return {name: value.to(dtype) if value.is_floating_point() else value for name, value in moved.items()}

    def _takes_tensors(self) -> bool:
        """Return whether gradients pass the image processor; processors on PIL and NumPy raise, or cut the graph."""
        self.differentiable = True
        try:
            with torch.enable_grad():
                image = torch.full((1, 3, 64, 64), 0.5, requires_grad=True)
                inputs = self._inputs(image, "?")
        except (RuntimeError, TypeError, ValueError):
            return False
        return any(value.requires_grad for value in inputs.values())


def _load(model: str, folder: bool) -> tuple[Any, Any]:
    """Load processor and model by transformers, safetensors only; repositories with code are refused."""
    from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedConfig, ProcessorMixin

    for read in (PreTrainedConfig.get_config_dict, ProcessorMixin.get_processor_dict):
        if "auto_map" in read(model, local_files_only=folder)[0]:
            raise RewardError("it brings code of its own (auto_map), which is not run: choose a model of transformers")
    processor = AutoProcessor.from_pretrained(model, local_files_only=folder)
    loaded = AutoModelForImageTextToText.from_pretrained(
        model, local_files_only=folder, use_safetensors=True, dtype="auto"
    )
    return processor, loaded


class EndpointModel:
    """A model behind an OpenAI-compatible endpoint; images are sent as 8-bit PNGs, never differentiable.

    The probability of an answer is the sum over the listed first tokens that equal it, ignoring case and spaces; for
    answers that are not listed, it is the lowest listed probability, an upper bound. A yes/no question without either
    answer among the listed tokens is an error, never 0.
    """

    differentiable = False

    def __init__(self, client: ChatClient, top_logprobs: int = TOP_TOKENS) -> None:
        self.client, self._top = client, top_logprobs

    def log_probabilities(self, images: Tensor, queries: Sequence[Query]) -> Tensor:
        options = {"max_tokens": 1, "logprobs": True, "top_logprobs": self._top}
        replies = self.client.ask(_messages(images, queries), **options)
        return torch.tensor([self._read(reply, query) for reply, query in zip(replies, queries, strict=True)])

    def texts(self, images: Tensor, queries: Sequence[Query]) -> list[str]:
        return [reply.text for reply in self.client.ask(_messages(images, queries), max_tokens=REPLY_TOKENS)]

    def _read(self, reply: ChatReply, query: Query) -> tuple[float, float]:
        if not reply.first:
            raise self.client.error("returns no log-probabilities: take a server that does, or preset=rubric")
        least = min(p for _, p in reply.first)

        def log_p(*answers: str) -> float:
            p = reply.probability(*answers)
            return math.log(p) if p > 0 else -math.inf

        chosen, other = log_p(*query.answers), log_p(query.other) if query.other else math.nan
        if max(chosen, other) == -math.inf:
            tokens = ", ".join(repr(token) for token, _ in reply.first[:4])
            expected = f"{' or '.join(query.answers)} nor {query.other}"
            raise self.client.error(f"answers with neither {expected} ({tokens} …) to {query.question[:80]!r}")
        return min(max(chosen, least), 0.0), min(max(other, least), 0.0) if query.other else math.nan


def _messages(images: Tensor, queries: Sequence[Query]) -> list[ChatMessage]:
    files = as_png(images)
    return [ChatMessage(query.question, (files[query.row],)) for query in queries]


class VqaReward:
    """A score from the answers of a vision-language model.

    model      local or behind an endpoint;  preset: one of PRESETS
    unit       probability (0..1), or log-odds log P(answer) − log P(opposite), in nats, of yes/no questions
    questions  questions by prompt: a mapping or a function; a prompt's metadata `vqa_list` or `questions` come first
    """

    def __init__(
        self,
        name: str,
        model: Answering,
        preset: Preset,
        unit: str = "probability",
        questions: Callable[[str], Sequence[Any]] | None = None,
    ) -> None:
        self.name, self._model, self._preset, self._unit, self._questions = name, model, preset, unit, questions
        self.differentiable = model.differentiable and preset.read is None

    @property
    def cost(self) -> Any:
        """Return the ChatCost of an endpoint; None for a local model."""
        return self._model.client.cost if isinstance(self._model, EndpointModel) else None

    @takes_any_images
    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None = None) -> Tensor:
        rows = metadata or [{}] * len(prompts)
        queries = [one for k, row in enumerate(rows) for one in self._queries(k, prompts[k], row)]
        if self._preset.read is not None:
            replies = self._model.texts(images, queries)
            return torch.tensor([self._number(reply) for reply in replies], device=images.device)
        scores = self._model.log_probabilities(images, queries)
        values = scores[:, 0] if self._unit == "probability" else scores[:, 0] - scores[:, 1]
        owner = torch.tensor([one.row for one in queries], device=values.device)
        count = torch.bincount(owner, minlength=len(prompts))
        mean = torch.zeros(len(prompts), device=values.device).index_add(0, owner, values) / count
        return mean.exp() if self._unit == "probability" else mean

    def _queries(self, row: int, prompt: str, metadata: Mapping[str, Any]) -> list[Query]:
        """Return the queries about one image. Raises RewardError if its prompt has no questions."""
        text = self._preset.question.replace("{prompt}", prompt)
        if "{question}" not in text:
            return [Query(row, text)]
        given = next((metadata[key] for key in QUESTION_KEYS if metadata.get(key)), None)
        given = given if given is not None else self._questions(prompt) if self._questions else None
        if not given:
            raise RewardError(
                f"{self.name}: no questions for the prompt {prompt!r:.80}: name a file, questions=FILE, or give "
                "them as metadata, vqa_list: [[question, answer], …]"
            )
        asked = [read_question(one, prompt) for one in given]
        if self._unit == "log-odds" and any(other is None for *_, other in asked):
            raise RewardError(f"{self.name}: unit=log-odds needs yes/no questions, of {prompt!r:.80} not all are")
        return [Query(row, text.replace("{question}", question), answers, other) for question, answers, other in asked]

    def _number(self, reply: str) -> float:
        try:
            return self._preset.read(reply)  # type: ignore[misc]
        except ValueError as error:
            raise RewardError(f"{self.name}: an answer has {error}: {reply[:120]!r}") from error


def read_question(given: Any, prompt: str) -> tuple[str, tuple[str, ...], str | None]:
    """Read a question, or [question, answer]: question, spellings of its answer, opposite answer of yes and no."""
    is_pair = isinstance(given, list | tuple) and len(given) == 2
    question, answer = (given, "Yes") if isinstance(given, str) else given if is_pair else (None, None)
    if not isinstance(question, str) or not isinstance(answer, str) or not answer.strip():
        raise RewardError(f"a question is a text or [question, answer], got {given!r:.80}")
    question, answer = question.replace("{prompt}", prompt).strip(), answer.strip()
    question = question if question.endswith((".", "?")) else f"{question}."
    if answer.lower() in ("yes", "no"):
        yes = answer.lower() == "yes"
        return question, YES_NO[:1] if yes else YES_NO[1:], YES_NO[1] if yes else YES_NO[0]
    digit = (str(COUNTS.index(answer.lower())),) if answer.lower() in COUNTS else ()
    return question, (answer, *digit), None


def read_questions(path: Path) -> Callable[[str], Sequence[Any]]:
    """Read questions by prompt. Raises RewardError.

    .jsonl  rows with prompt and vqa_list (or questions), as in GenEval 2
    .yaml   a mapping from prompts to lists, or one list for all prompts, in which {prompt} is replaced
    """
    if path.suffix == ".jsonl":
        rows = read_rows(path)
        keyed = {row.get("prompt"): next((row[key] for key in QUESTION_KEYS if key in row), None) for row in rows}
        return lambda prompt: keyed.get(prompt) or ()
    data = read_option_file("questions", path)
    if isinstance(data, list):
        return lambda prompt: data
    if isinstance(data, dict) and all(isinstance(value, list) for value in data.values()):
        return lambda prompt: data.get(prompt) or ()
    raise RewardError(f"questions={path}: expected a list of questions, or a mapping from prompts to lists")


def vqa(
    target: str,
    *,
    model: str | None = None,
    preset: str | None = None,
    unit: str = "probability",
    questions: str | None = None,
    template: str | None = None,
    followups: str | None = None,
    dtype: str | None = None,
    micro_batch: str | int = 8,
    timeout: str | float = TIMEOUT,
    tries: str | int = MAX_ATTEMPTS,
    concurrency: str | int = CONCURRENCY,
    top_logprobs: str | int = TOP_TOKENS,
    cache: str | None = None,
) -> VqaReward | FollowupReward:
    """Load a vision-language model as a reward: a transformers model, or the address of an endpoint.

    preset     vqascore, soft-tifa (the default with `questions`), unified-reward or rubric
    unit       probability or log-odds;  questions: a file for soft-tifa (`read_questions`)
    template   a text file that replaces the preset's question; {prompt} in it is replaced
    followups  a file of approving and disapproving sentences, replaces the options above (`steer.rewards.followups`)
    dtype, micro_batch                                    for a local model
    model, timeout, tries, concurrency, top_logprobs, cache    for an endpoint; cache=off keeps no replies
    """
    if followups:
        if preset or questions or template or unit != "probability" or target.startswith(("http://", "https://")):
            raise RewardError(
                f"vqa:{target}: followups= scores whole sentences by a local model: name one, without preset, unit, "
                "questions and template"
            )
        sentences, name = read_followups(Path(followups)), reward_name(f"vqa:{target}", followups=(followups, ""))
        return FollowupReward(name, LocalModel(target, dtype=dtype, micro_batch=micro_batch), sentences)
    label = preset or ("soft-tifa" if questions else "vqascore")
    asked = choose("preset", label, PRESETS)
    if unit not in UNITS or (unit != "probability" and asked.read is not None):
        raise RewardError(
            f"vqa:{target}: unit={unit}: use {' or '.join(UNITS)}; presets with scores have their own unit"
        )
    if questions and "{question}" not in asked.question:
        raise RewardError(f"vqa:{target}: questions= belongs to preset=soft-tifa, not to {label}")
    if template:
        asked = replace(asked, question=_template(Path(template)))
    answering: Answering
    if target.startswith(("http://", "https://")):
        client = endpoint(target, model=model, timeout=timeout, tries=tries, concurrency=concurrency, cache=cache)
        answering = EndpointModel(client, option_count("top_logprobs", top_logprobs))
    elif model:
        raise RewardError(f"vqa:{target}: model= names the model of an endpoint; a local one is written vqa:{model}")
    else:
        answering = LocalModel(target, dtype=dtype, micro_batch=micro_batch)
    name = reward_name(f"vqa:{target}", model=(model or "", ""), preset=(label, "vqascore"))
    name = reward_name(name, unit=(unit, "probability"), questions=(questions or "", ""), template=(template or "", ""))
    return VqaReward(name, answering, asked, unit, read_questions(Path(questions)) if questions else None)


def endpoint(
    url: str,
    *,
    model: str | None = None,
    timeout: str | float = TIMEOUT,
    tries: str | int = MAX_ATTEMPTS,
    concurrency: str | int = CONCURRENCY,
    cache: str | None = None,
) -> ChatClient:
    """Make the client of an endpoint from options in text. Raises RewardError."""
    if not model:
        raise RewardError(f"{url}: name the server's model: {url},model=NAME")
    folder = None if cache == "off" else Path(cache) if cache else default_cache()
    seconds = option_number("timeout", timeout, above=0)
    attempts, threads = option_count("tries", tries), option_count("concurrency", concurrency)
    return ChatClient(url, model, timeout=seconds, tries=attempts, concurrency=threads, cache=folder)


def _template(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise RewardError(f"template={path}: cannot be read as text ({error})") from error
    if "{prompt}" not in text and "{question}" not in text:
        raise RewardError(f"template={path}: the text must contain {{prompt}}, or {{question}} of soft-tifa")
    return text
