"""A masked diffusion over three words and four places whose denoiser is the exact posterior of a Markov chain."""

import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from safetensors.torch import save_file
from torch import Tensor, nn

from steer.diffusion.subs_scheduler import SubsScheduler
from steer.pipelines.text.masked_diffusion import MaskedDiffusionPipeline

V, L, MASK = 3, 4, 3
WORDS = "abc_"
FIRST = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
NEXT = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.3, 0.1, 0.6]], dtype=torch.float64)
SEQUENCES = torch.tensor(list(itertools.product(range(V), repeat=L)))  # (81, 4)
STATES = torch.tensor(list(itertools.product(range(V + 1), repeat=L)))  # (256, 4), masks included
DATA = FIRST[SEQUENCES[:, 0]] * torch.stack(
    [NEXT[SEQUENCES[:, place], SEQUENCES[:, place + 1]] for place in range(L - 1)]
).prod(0)
PLACE_VALUES = (V + 1) ** torch.arange(L - 1, -1, -1)


def index_of(ids: Tensor) -> Tensor:
    """The row of each state (N, L) in STATES."""
    return (ids * PLACE_VALUES).sum(1)


def posterior() -> Tensor:
    """log p(x_l | open places of z) of every state z: (256, L, V), fp64, by summing over all sequences."""
    fits = ((STATES[:, None] == SEQUENCES) | (STATES[:, None] == MASK)).all(2).double() * DATA  # (256, 81)
    one_hot = nn.functional.one_hot(SEQUENCES, V).double()
    table = torch.einsum("zs,slv->zlv", fits, one_hot)
    return (table / table.sum(-1, keepdim=True)).log()


class Table(nn.Module):
    """A denoiser whose logits (256, L, V + 1) are parameters."""

    def __init__(self) -> None:
        super().__init__()
        logits = torch.full((len(STATES), L, V + 1), -1e4)
        logits[..., :V] = posterior().float().clamp(min=-1e4)
        self.logits = nn.Parameter(logits)
        self.config = SimpleNamespace(model_length=L, vocab_size=V + 1)
        self.dtype, self.device = torch.float32, torch.device("cpu")

    def forward(self, ids: Tensor, sigma: Tensor | None = None) -> Any:
        if not ids.is_floating_point():
            return Transformer2DModelOutput(self.logits[index_of(ids)])
        ids = ids.to(self.logits)
        states = nn.functional.one_hot(STATES, V + 1).to(ids)
        weights = torch.einsum("nlv,zlv->nzl", ids, states).prod(2)  # multilinear between one-hot states
        return Transformer2DModelOutput(torch.einsum("nz,zlv->nlv", weights, self.logits))

    def save_pretrained(self, folder: Path) -> None:
        """Write the table, as models of diffusers do."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), folder / "diffusion_pytorch_model.safetensors")


class Letters:
    """A tokenizer of one letter a token."""

    mask_token_id, model_max_length = MASK, L

    def __call__(self, text: str, **_: Any) -> Any:
        return SimpleNamespace(input_ids=[WORDS.index(letter) for letter in text])

    def batch_decode(self, ids: Tensor, skip_special_tokens: bool = True) -> list[str]:
        return ["".join(WORDS[i] for i in row if i != MASK or not skip_special_tokens) for row in ids.tolist()]


def pipeline(opening: str = "independent") -> MaskedDiffusionPipeline:
    pipe = MaskedDiffusionPipeline(Table(), Letters(), SubsScheduler(MASK, opening))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def kernel_matrix(log_x0: Tensor, rate: float, opening: str) -> Tensor:
    """p(z_s | z_t) of all states (256, 256), written from the definition, for log x_θ (256, L, V + 1)."""
    p = torch.zeros(len(STATES), len(STATES), dtype=torch.float64)
    x0 = log_x0.double().exp()
    for row, state in enumerate(STATES.tolist()):
        masked = [place for place in range(L) if state[place] == MASK]
        expected = rate * len(masked)
        low = math.floor(expected + 1e-9)
        for size in range(len(masked) + 1):
            if opening == "independent":
                subset = rate**size * (1 - rate) ** (len(masked) - size)
            else:
                share = {low: 1 - (expected - low), low + 1: expected - low}.get(size, 0.0)
                subset = share / math.comb(len(masked), size)
            if subset <= 1e-12:
                continue
            for opened in itertools.combinations(masked, size):
                for tokens in itertools.product(range(V), repeat=size):
                    after = list(state)
                    probability = subset
                    for place, token in zip(opened, tokens, strict=True):
                        after[place] = token
                        probability *= float(x0[row, place, token])
                    p[row, int(index_of(torch.tensor([after])))] += probability
    return p


def law_of_sampler(log_x0: Tensor, steps: int, opening: str) -> Tensor:
    """The law (81,) of the finished sequences of the sampler in `steps` steps, by multiplying kernels."""
    law = torch.zeros(len(STATES), dtype=torch.float64)
    law[-1] = 1  # all masked
    for left in range(steps, 0, -1):
        law = law @ kernel_matrix(log_x0, 1 / left, opening)
    return law[index_of(SEQUENCES)]
