"""One-to-many accuracy of a reward: does the right candidate beat *all* wrong ones (RewardMATH, arXiv 2410.01729)?"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steer.errors import InputError
from steer.rewards.inputs import rows_by_prompt

WRONG_IMAGES = 9  # minimum number for each prompt


@dataclass(frozen=True)
class OneToMany:
    """Metrics of a reward on Q questions, each with one right and several wrong candidates; 0..1, ties lose.

    one_to_one   share of all wrong candidates that score below the right one
    one_to_many  share of the questions in which all wrong candidates score below the right one
    reciprocal_rank  mean over questions of 1 / rank of the right one
    """

    questions: int
    candidates: float  # mean number of wrong candidates of a question
    one_to_one: float
    one_to_many: float
    reciprocal_rank: float


def one_to_many(right: Tensor, wrong: Tensor, question: Sequence[int]) -> OneToMany:
    """Compute the metrics of scores `right` (N,) and `wrong` (P,); `question` has the question of each wrong one.

        rank_q = 1 + #{w of q: r_w ≥ r_q},   one-to-many = mean_q [rank_q = 1]

    Questions without wrong candidates do not count. Raises InputError if there are no wrong candidates.
    """
    if not question:
        raise InputError("a benchmark needs wrong candidates, and there are none")
    owner = torch.tensor(question)
    above = (wrong >= right[owner]).double()
    counts = torch.bincount(owner, minlength=len(right))
    rank = 1 + torch.bincount(owner, above, minlength=len(right))[counts > 0]
    return OneToMany(
        questions=len(rank),
        candidates=len(wrong) / len(rank),
        one_to_one=1 - above.mean().item(),
        one_to_many=(rank == 1).double().mean().item(),
        reciprocal_rank=(1 / rank).mean().item(),
    )


def image_questions(gold: Tensor, prompts: Sequence[str], least: int = WRONG_IMAGES) -> list[tuple[int, list[int]]]:
    """Return the questions among images (N,): each right image, and the wrong images of its prompt.

    An image is right if its gold reward is the highest of its prompt, else wrong. Prompts with fewer than `least` wrong
    images have no questions.
    """
    questions: list[tuple[int, list[int]]] = []
    for rows in rows_by_prompt(prompts).values():
        best = max(gold[row].item() for row in rows)
        wrong = [row for row in rows if gold[row] < best]
        if len(wrong) >= least:
            questions += [(row, wrong) for row in rows if gold[row] == best]
    return questions


def best_of_n_gain(scores: Tensor, gold: Tensor, prompts: Sequence[str]) -> float:
    """Return the mean over prompts of gold(image with the highest score) − mean gold of its images; ties averaged."""
    gains = []
    for rows in rows_by_prompt(prompts).values():
        some, truth = scores[rows], gold[rows]
        gains.append((truth[some == some.max()].mean() - truth.mean()).item())
    return sum(gains) / len(gains)
