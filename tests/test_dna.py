"""The DNA example: its law by summing over all sequences, its reward by hand, and a small model that is steered."""

import itertools

import pytest
import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from steer import FKSteeringPipeline
from steer.apps import dna
from steer.apps.dna import (
    BASES,
    LENGTH,
    MOTIFS,
    NEXT,
    START,
    Motif,
    describe,
    draw_sequences,
    log_likelihood,
    train_dna,
)


def test_the_law_sums_to_one_and_is_that_of_its_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    short = (dna.weight_matrix("GA"), dna.weight_matrix("TTC"))
    monkeypatch.setattr(dna, "MOTIFS", short)
    every = torch.tensor(list(itertools.product(range(4), repeat=5)))
    law = log_likelihood(every).exp()
    assert law.sum().item() == pytest.approx(1, abs=1e-9)
    n = 40_000
    drawn = draw_sequences(n, Generator().manual_seed(0), 5)
    counts = torch.bincount((drawn * 4 ** torch.arange(4, -1, -1)).sum(1), minlength=len(every)).double()
    chi2 = ((counts - n * law) ** 2 / (n * law)).sum()
    assert abs(chi2 - (len(every) - 1)) < 4 * (2 * len(every)) ** 0.5


def test_a_law_without_motifs_is_the_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dna, "PLANTED", (1e-12, 1e-12))
    ids = torch.tensor([[0, 1, 1, 3, 2, 0, 0, 3, 2]])
    exact = START[0].log() + sum(NEXT[a, b].log() for a, b in itertools.pairwise(ids[0].tolist()))
    assert log_likelihood(ids).item() == pytest.approx(exact.item(), abs=1e-6)


def test_the_reward_is_the_soft_maximum_of_log_odds_and_relaxes() -> None:
    text = "ACGTGATAAGCGTTACGATAAGCAACGTACGT"
    ids = torch.tensor([[len(BASES), *map(BASES.index, text)]])
    windows = [text[place : place + 8] for place in range(len(text) - 7)]
    table = (MOTIFS[0] / 0.25).log()
    odds = [sum(table[i, BASES.index(base)].item() for i, base in enumerate(window)) for window in windows]
    by_hand = torch.tensor(odds).logsumexp(0).item()
    assert Motif()(ids, [""]).item() == pytest.approx(by_hand, abs=1e-4)
    p = F.one_hot(ids, len(BASES) + 2).float().requires_grad_(True)
    score: Tensor = Motif().relaxed(p, [""])
    assert score.item() == pytest.approx(by_hand, abs=1e-4)
    (gradient,) = torch.autograd.grad(score.sum(), p)
    assert gradient[0, 5:13].abs().sum() > 1 and (gradient[:, 0] == 0).all()


@pytest.mark.hard
def test_a_small_model_learns_the_law_and_is_steered_to_the_motif() -> None:
    pipe = train_dna(300)
    call = {"num_particles": 4, "num_inference_steps": LENGTH, "generator": Generator().manual_seed(0)}
    steered = describe(FKSteeringPipeline(pipe, Motif())([""] * 25, lam=1.0, **call).images)
    plain = describe(pipe([""] * 200, LENGTH, Generator().manual_seed(0)).texts)
    drawn = log_likelihood(draw_sequences(500, Generator().manual_seed(2))).mean().item() / LENGTH
    random = torch.randint(4, (500, LENGTH), generator=Generator().manual_seed(3))
    uniform = log_likelihood(random).mean().item() / LENGTH
    assert plain["naturalness"] > uniform + 0.3 * (drawn - uniform)
    assert steered["motif"] > plain["motif"] + 0.5
    assert steered["naturalness"] > uniform
