"""DNA without a download: sequences with a planted motif, a masked diffusion model of them, and exact rewards.

A sequence is a Markov chain of order 1; with the probabilities in PLANTED, one of two motifs is drawn from its weight
matrix and written over the chain at a uniform place. The law of a sequence is a sum over places in closed form:

    p(x) = Σ_m P(m) / (L − w + 1) Σ_j  p(x_<j) · Π_i M_m[i, x_{j+i}] · (T^{w+1})[x_{j−1}, x_{j+w}] · p(x_>j+w | x_{j+w})
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Generator, Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from steer.apps.scenes.text import random_order_loss
from steer.diffusion.masked_denoiser import MaskedDenoiser
from steer.diffusion.subs_scheduler import SubsScheduler
from steer.pipelines.fk_steering import FKSteeringPipeline
from steer.pipelines.selection import BestOfNPipeline
from steer.pipelines.text.masked_diffusion import MASK_TOKEN, MaskedDiffusionPipeline
from steer.pipelines.training.drakes import DRAKESConfig, DRAKESTrainer

BASES, LENGTH = "ACGT", 32
START = torch.tensor([0.3, 0.2, 0.2, 0.3], dtype=torch.float64)
NEXT = torch.tensor(
    [[0.4, 0.2, 0.2, 0.2], [0.3, 0.3, 0.1, 0.3], [0.3, 0.2, 0.3, 0.2], [0.2, 0.2, 0.2, 0.4]], dtype=torch.float64
)  # from the row's base to the column's base: CG is rare, as in genomes
CONSENSUS = ("GATAAGCG", "TTGCCAAC")
SURE = 0.85  # probability of the consensus base at each place of a motif
PLANTED = (0.1, 0.5)  # share of sequences with the first and with the second motif; the rest has neither


def weight_matrix(consensus: str) -> Tensor:
    """Return the probabilities (w, 4) of a motif's bases, fp64."""
    ids = torch.tensor([BASES.index(base) for base in consensus])
    return F.one_hot(ids, 4).double() * (SURE - (1 - SURE) / 3) + (1 - SURE) / 3


MOTIFS = tuple(weight_matrix(consensus) for consensus in CONSENSUS)


def draw_sequences(count: int, generator: Generator, length: int = LENGTH) -> Tensor:
    """Draw sequences (N, length) of bases 0..3."""
    ids = torch.multinomial(START.expand(count, 4), 1, generator=generator)
    for _ in range(length - 1):
        ids = torch.cat([ids, torch.multinomial(NEXT[ids[:, -1]], 1, generator=generator)], 1)
    choice = torch.multinomial(torch.tensor([*PLANTED, 1 - sum(PLANTED)]), count, True, generator=generator)
    for row, motif in enumerate(choice.tolist()):
        if motif < len(MOTIFS):
            place = int(torch.randint(length - len(MOTIFS[motif]) + 1, (), generator=generator))
            bases = torch.multinomial(MOTIFS[motif], 1, generator=generator)[:, 0]
            ids[row, place : place + len(bases)] = bases
    return ids


def log_likelihood(ids: Tensor) -> Tensor:
    """Return log p(x) (N,) in nats, fp64, of sequences (N, L) of bases 0..3: exact."""
    terms = [math.log(1 - sum(PLANTED)) + _log_chain(ids)]
    for share, motif in zip(PLANTED, MOTIFS, strict=True):
        width, places = len(motif), ids.shape[1] - len(motif) + 1
        bridge = torch.linalg.matrix_power(NEXT, width + 1).log()
        for place in range(places):
            inside = motif.log()[torch.arange(width), ids[:, place : place + width]].sum(1)
            before, after = ids[:, :place], ids[:, place + width :]
            outside = _log_chain(before) if place else torch.zeros(len(ids), dtype=torch.float64)
            if after.shape[1]:
                first = after[:, 0]
                if place:
                    outside = outside + bridge[before[:, -1], first]
                else:
                    outside = (START @ torch.linalg.matrix_power(NEXT, width)).log()[first]
                outside = outside + NEXT.log()[after[:, :-1], after[:, 1:]].sum(1)
            terms.append(math.log(share / places) + inside + outside)
    return torch.stack(terms).logsumexp(0)


def _log_chain(ids: Tensor) -> Tensor:
    """Return the log-probability (N,) of the Markov chain alone."""
    return START.log()[ids[:, 0]] + NEXT.log()[ids[:, :-1], ids[:, 1:]].sum(1)


class Motif:
    """The soft maximum over places of the log-odds of the first motif, nats: log Σ_j exp Σ_i log(M[i, x_{j+i}] / ¼)."""

    name, differentiable, images = "motif", True, "ids"

    def __init__(self, motif: Tensor = MOTIFS[0]) -> None:
        self._odds = (motif / 0.25).log().float().mT[None]  # (1, 4, w)

    def __call__(self, ids: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.relaxed(F.one_hot(ids, len(BASES) + 2).float(), prompts)

    def relaxed(self, p: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score relaxed tokens p (N, L, V), after the begin token."""
        return F.conv1d(p[:, 1:, :4].mT, self._odds.to(p))[:, 0].logsumexp(1)


def dna_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer: one token a base, then the begin token and [MASK]."""
    vocabulary = {token: place for place, token in enumerate((*BASES, "[BOS]", MASK_TOKEN))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=MASK_TOKEN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="[BOS]", mask_token=MASK_TOKEN)


def train_dna(steps: int, seed: int = 0, batch: int = 128, rate: float = 2e-3) -> MaskedDiffusionPipeline:
    """Train a masked diffusion model of 0.1 M parameters on fresh sequences; return its pipeline."""
    torch.manual_seed(seed)
    tokenizer, generator = dna_tokenizer(), Generator().manual_seed(seed)
    begin, mask_id = int(tokenizer.bos_token_id), int(tokenizer.mask_token_id)
    sizes = {"hidden_dim": 64, "n_blocks": 2, "n_heads": 4, "cond_dim": 16, "dropout": 0.0}
    denoiser = MaskedDenoiser(vocab_size=mask_id + 1, model_length=LENGTH + 1, **sizes)
    optimiser = torch.optim.AdamW(denoiser.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        ids = F.pad(draw_sequences(batch, generator), (1, 0), value=begin)
        loss = random_order_loss(denoiser, ids, mask_id).mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    pipe = MaskedDiffusionPipeline(denoiser.eval(), tokenizer, SubsScheduler(mask_id))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def describe(texts: Sequence[str]) -> dict[str, float]:
    """Return the mean motif score and naturalness, log p(x) per base, of finished sequences, in nats."""
    ids = torch.tensor([[BASES.index(base) for base in text] for text in texts if len(text) == LENGTH])
    return {
        "motif": Motif()(F.pad(ids, (1, 0), value=len(BASES)), []).mean().item(),
        "naturalness": log_likelihood(ids).mean().item() / LENGTH,
    }


def draw_texts(pipe: MaskedDiffusionPipeline, count: int, generator: Generator) -> list[str]:
    """Draw sequences from a model, one base per step."""
    return list(map(str, pipe([""] * count, LENGTH, generator, return_dict=False)[0]))


def compare(pipe: MaskedDiffusionPipeline, updates: int, count: int = 50, lam: float = 1.0) -> dict[str, Any]:
    """Describe sequences of the data, of the model, and of three methods that raise the first motif's score."""
    generator = Generator().manual_seed(1)
    data = ["".join(BASES[base] for base in row) for row in draw_sequences(4 * count, generator).tolist()]
    rows: dict[str, Any] = {"data": describe(data)}
    call: dict[str, Any] = {"num_particles": 4, "num_inference_steps": LENGTH, "chunk_size": 4 * count}

    def add(name: str, draw: Callable[[], Sequence[str]]) -> None:
        started = time.process_time()
        rows[name] = describe(draw()) | {"seconds": round(time.process_time() - started, 1)}

    def drakes() -> list[str]:
        settings: dict[str, Any] = {"num_inference_steps": 16, "learning_rate": 5e-4, "max_steps": updates}
        with TemporaryDirectory() as folder:
            config = DRAKESConfig(output_dir=folder, kl_weight=1 / lam, **settings)
            DRAKESTrainer(pipe, Motif(), config, train_prompts=[""]).train()
        return draw_texts(pipe, 4 * count, generator)

    call["generator"] = generator
    add("model", lambda: draw_texts(pipe, 4 * count, generator))
    add("best of 4", lambda: BestOfNPipeline(pipe, Motif())([""] * count, **call).best(1).images)
    add(f"FK, λ = {lam:g}", lambda: FKSteeringPipeline(pipe, Motif())([""] * count, lam=lam, **call).images)
    add(f"DRAKES, {updates} updates", drakes)
    return rows


def main() -> None:
    """Train, compare, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m steer.apps.dna", description=main.__doc__)
    parser.add_argument("--steps", type=int, default=600, help="updates of the model")
    parser.add_argument("--updates", type=int, default=100, help="updates of DRAKES")
    parser.add_argument("--lam", type=float, default=1.0, help="λ of FK, and 1/α of DRAKES")
    options = parser.parse_args()
    for name, row in compare(train_dna(options.steps), options.updates, lam=options.lam).items():
        click.echo(f"{name:22}" + "  ".join(f"{key} {value:.2f}" for key, value in row.items()))


if __name__ == "__main__":
    main()
