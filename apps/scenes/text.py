"""scenes-text: masked diffusion over the words of the scene prompts, whose law is known exactly."""

import copy
import itertools
import json
import logging
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Generator, Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from steer.apps.scenes.world import TASKS
from steer.assets import TEXT_LISTS
from steer.diffusion.masked import subs
from steer.diffusion.masked_denoiser import MaskedDenoiser
from steer.diffusion.subs_scheduler import SubsScheduler
from steer.files import write_text
from steer.pipelines.text.masked_diffusion import MASK_TOKEN, MaskedDiffusionPipeline
from steer.rewards.parser import load_reward
from steer.rewards.scene import COLOURS, RELATIONS, SHAPES, Phrase, SceneRequest
from steer.training.supervised import TrainingRun

logger = logging.getLogger(__name__)
LENGTH = 9  # tokens: the begin token and the 8 words of the longest prompt
COLOURED = 0.6  # share of coloured requests where a task has both (`steer.apps.scenes.world.random_request`)
HIDDEN, BLOCKS, HEADS, CONDITION = 128, 3, 4, 16
BATCH, RATE, AVERAGE = 96, 1e-3, 0.998


@cache
def caption_law() -> dict[str, float]:
    """Return the probability of every prompt under `random_request` of a random task: exact, they sum to 1."""
    law: dict[str, float] = defaultdict(float)
    for task, share in TASKS.items():
        for probability, request in _requests(task):
            law[str(request)] += share * probability
    return dict(law)


def _requests(task: str) -> Iterator[tuple[float, SceneRequest]]:
    """Yield every request of a task with its probability."""
    coloured = {"colors": 1.0, "color_attr": 1.0, "counting": COLOURED, "position": COLOURED}.get(task, 0.0)
    if task in ("single_object", "colors", "counting"):
        counts = (2, 3, 4) if task == "counting" else (1,)
        for count, shape in itertools.product(counts, SHAPES):
            one = 1 / (len(counts) * len(SHAPES))
            yield one * (1 - coloured), SceneRequest((Phrase(count, None, shape),))
            for colour in COLOURS:
                yield one * coloured / len(COLOURS), SceneRequest((Phrase(count, colour, shape),))
        return
    relations = tuple(RELATIONS) if task == "position" else (None,)
    pairs, colours = list(itertools.permutations(SHAPES, 2)), list(itertools.permutations(COLOURS, 2))
    for relation, (first, second) in itertools.product(relations, pairs):
        one = 1 / (len(relations) * len(pairs))
        yield one * (1 - coloured), SceneRequest((Phrase(1, None, first), Phrase(1, None, second)), relation)
        for c1, c2 in colours:
            yield one * coloured / len(colours), SceneRequest((Phrase(1, c1, first), Phrase(1, c2, second)), relation)


def write_prefix_lists(folder: Path) -> None:
    """Write the lists of the first two and three words of all prompts without "blue", alternately, as NAME.jsonl."""
    texts = [text.split() for text, p in caption_law().items() if p]
    beginnings = [words[:n] for words in texts for n in (2, 3) if len(words) > n]
    first = sorted({" ".join(words) for words in beginnings if "blue" not in words})
    for name, prompts in zip(TEXT_LISTS, (first[::2], first[1::2]), strict=True):
        write_text(folder / f"{name}.jsonl", "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))


def text_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer: one token a word, then [MASK]; [UNK] lies outside the denoiser's vocabulary.

    The begin token is always open: rotary positions are relative, and masks alone look the same from every place.
    """
    words = sorted({word for text, p in caption_law().items() if p for word in text.split()})
    vocabulary = {token: place for place, token in enumerate(("[PAD]", "[BOS]", *words, MASK_TOKEN, "[UNK]"))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "[PAD]", "bos_token": "[BOS]", "mask_token": MASK_TOKEN, "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=LENGTH, **special)


def captions_as_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """Return the ids (M, L) of all prompts, padded, and their probabilities (M,) fp64."""
    law = {text: p for text, p in caption_law().items() if p}
    words = tokenizer(list(law), padding="max_length", max_length=LENGTH - 1, return_tensors="pt").input_ids
    ids = F.pad(words, (1, 0), value=int(tokenizer.bos_token_id))
    return ids, torch.tensor(list(law.values()), dtype=torch.float64)


def random_order_loss(denoiser: MaskedDenoiser, ids: Tensor, mask_id: int, rng: Generator | None = None) -> Tensor:
    """Return the NELBO (N,) in nats of ids (N, L), estimated with one random state each.

    E_t (1/t) Σ_masked −log x_θ(x | z_t) with α_t = 1 − t is (L/m) Σ_masked −log x_θ for m uniform in 1..L and a
    uniform subset of m places: the masks of the continuous-time bound, with less variance.
    """
    rows, length = len(ids), ids.shape[1] - 1  # the begin token is never masked
    count = torch.randint(1, length + 1, (rows, 1), generator=rng)
    masked = F.pad(torch.rand(rows, length, generator=rng).argsort(1).argsort(1) < count, (1, 0))
    z_t = ids.masked_fill(masked, mask_id)
    log_x0 = subs(denoiser(z_t).sample, z_t, mask_id)
    nll = -log_x0.gather(2, ids[..., None])[..., 0]
    return length / count[:, 0] * torch.where(masked, nll, 0.0).sum(1)


def train_text(folder: Path, steps: int, start: Path | None = None) -> MaskedDiffusionPipeline:
    """Train the model for `steps` of BATCH prompts; folder/pipeline holds the averaged weights, in half precision.

    start  folder of a saved model whose weights a run without a state begins with
    """
    torch.manual_seed(0)
    tokenizer = text_tokenizer()
    mask_id = int(tokenizer.mask_token_id)
    sizes = {"hidden_dim": HIDDEN, "n_blocks": BLOCKS, "n_heads": HEADS, "cond_dim": CONDITION, "dropout": 0.0}
    denoiser = MaskedDenoiser(vocab_size=mask_id + 1, model_length=LENGTH, **sizes)
    if start is not None:
        denoiser.load_state_dict(MaskedDiffusionPipeline.from_pretrained(start).denoiser.state_dict())
    ids, law = captions_as_ids(tokenizer)
    logger.info("entropy of the prompts, the least loss: %.3f nats", -(law * law.log()).sum())

    def loss_at(step: int) -> Tensor:
        rng = Generator().manual_seed(step)
        rows = torch.multinomial(law, BATCH, replacement=True, generator=rng)
        return random_order_loss(denoiser, ids[rows], mask_id, rng).mean()

    TrainingRun(folder, steps, RATE, save_every=1000, average=AVERAGE).train([denoiser], loss_at)
    scheduler = SubsScheduler(mask_id)
    half = copy.deepcopy(denoiser).half().eval()
    MaskedDiffusionPipeline(half, tokenizer, scheduler).save_pretrained(folder / "pipeline")
    return MaskedDiffusionPipeline(denoiser.eval(), tokenizer, scheduler)


def parse_rate(pipe: MaskedDiffusionPipeline, count: int = 1000, steps: int = 20) -> float:
    """Return the share of `count` unconditional samples that the scene grammar parses."""
    texts: Any = pipe([""] * count, steps, Generator().manual_seed(1), return_dict=False)[0]
    return load_reward("parses")(texts, "").mean().item()
