"""The reward of a set: by hand, submodular, an unbiased gradient by enumeration, GRPO that keeps its modes, a run."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from conftest import cached_pipe
from rollouts import fresh_pipe
from torch import Tensor

from steer import GRPOConfig, GRPOTrainer, TrainingConfig, load_reward, score
from steer.apps.scoring import score_in_batches
from steer.errors import InputError
from steer.pipelines.training.evaluation import Evaluator
from steer.reward import RewardError, compares_images
from steer.training.distributed import SINGLE_PROCESS
from steer.training.losses import GRPO, LogProbs


def grey(*values: float) -> Tensor:
    return torch.tensor(values)[:, None, None, None].expand(-1, 3, 8, 8).contiguous()


def log_det(images: Tensor, rows: tuple[int, ...], width: float = 0.1) -> float:
    """f(S) by its definition, with a loop over pairs."""
    kernel = torch.eye(len(rows), dtype=torch.float64)
    for i, j in itertools.product(range(len(rows)), repeat=2):
        square = (images[rows[i]] - images[rows[j]]).double().square().mean()
        kernel[i, j] += math.exp(-square / (2 * width**2))
    return torch.logdet(kernel).item() if rows else 0.0


def test_by_hand() -> None:
    """Alone log 2; of K equal images 1 − 1/(K + 1) of the inverse; two at distance h have k = exp(−½)."""
    assert score(grey(0.5), "a", "diversity").item() == pytest.approx(math.log(2))
    assert score(grey(0.5, 0.5, 0.5, 0.5), "a", "diversity").tolist() == pytest.approx([math.log(5 / 4)] * 4, rel=1e-4)
    near = math.log((4 - math.exp(-1)) / 2)
    assert score(grey(0.5, 0.6), "a", "diversity").tolist() == pytest.approx([near] * 2, rel=1e-4)
    assert score(grey(0.5, 0.7), "a", "diversity:width=0.2").tolist() == pytest.approx([near] * 2, rel=1e-4)
    apart = score(grey(0.5, 0.6), ["a", "b"], "diversity")  # other prompts do not count
    assert apart.tolist() == pytest.approx([math.log(2)] * 2)


def test_it_is_the_marginal_gain_of_a_submodular_function() -> None:
    images = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.4
    got = score(images, "a", "diversity")
    for i in range(6):
        rest = tuple(k for k in range(6) if k != i)
        assert got[i].item() == pytest.approx(log_det(images, tuple(range(6))) - log_det(images, rest), abs=1e-4)
        gains = [log_det(images, (*rest[:size], i)) - log_det(images, rest[:size]) for size in range(6)]
        assert all(a >= b - 1e-9 > 0 for a, b in itertools.pairwise(gains)), "gains diminish, and stay above 0"


ARMS = grey(0.1, 0.15, 0.5, 0.9)


def test_its_policy_gradient_is_that_of_the_set_by_enumeration() -> None:
    """∇ E f(S) over all sets of three independent draws, against E Σ_i ∇ log π(x_i) r_i."""
    logits = torch.tensor([0.5, 0.0, -0.3, 0.2], dtype=torch.float64, requires_grad=True)
    exact, estimate = torch.zeros(()), torch.zeros(4, dtype=torch.float64)
    for draw in itertools.product(range(4), repeat=3):
        log_p = logits.log_softmax(0)[list(draw)]
        exact = exact + log_p.sum().exp() * log_det(ARMS, draw)
        gains = score(ARMS[list(draw)], "a", "diversity").double()
        (gradient,) = torch.autograd.grad((log_p * gains).sum(), logits, retain_graph=True)
        estimate += log_p.sum().exp().detach() * gradient
    (wanted,) = torch.autograd.grad(exact, logits)
    torch.testing.assert_close(estimate, wanted, atol=1e-4, rtol=1e-3)


def entropy_after_training(weight: float) -> float:
    """GRPO of a softmax over four arms, of which all but the last are nearly equally good."""
    rewards, logits, generator = torch.tensor([1.0, 0.9, 0.9, 0.0]), torch.zeros(4), torch.Generator().manual_seed(0)
    prompts = [str(k // 8) for k in range(128)]
    for _ in range(120):
        logits.requires_grad_()
        arms = torch.multinomial(logits.detach().softmax(0), 128, replacement=True, generator=generator)
        total = (rewards[arms] + weight * score(ARMS[arms], prompts, "diversity")).view(16, 8)
        new = logits.log_softmax(0)[arms].view(16, 8, 1)
        value = GRPO(clip=math.inf, scale=True)(LogProbs(new, new.detach(), new.detach(), 1), total)[0]
        logits = (logits - 1.0 * torch.autograd.grad(value, logits)[0]).detach()
    policy = logits.softmax(0)
    assert policy[3] < 0.2, "the bad arm is left"
    return float(-(policy * policy.log()).sum())


def test_grpo_collapses_without_it_and_keeps_good_modes_with_it() -> None:
    assert entropy_after_training(0.0) < 0.2
    assert entropy_after_training(1.0) > 0.5


def test_a_run_learns_from_it_and_logs_it(tmp_path: Path) -> None:
    config = GRPOConfig(
        output_dir=str(tmp_path), max_steps=1, train_batch_size=2, num_generations=4, micro_batch=8,
        num_inference_steps=3, lora_rank=2, lora_target_modules=("to_q",),
    )  # fmt: skip
    reward = load_reward("brightness + diversity:0.5")
    assert compares_images(reward)
    result = GRPOTrainer(fresh_pipe("sd"), reward, config, train_prompts=["a star", "a circle"]).train()
    record = result.records[0]
    assert record["grad_norm"] > 0 and any("diversity" in name for name in record)


def test_evaluations_score_all_images_of_a_prompt_together() -> None:
    """By hand for three equal images per prompt; chunks of 4 and 8 rows would split the images of a prompt."""
    truth, prompts = pytest.approx([math.log(4 / 3)] * 12, rel=1e-4), ("a", "b", "c", "d")
    reward = load_reward("diversity")
    evaluator = Evaluator(prompts, reward, [], lambda sampler, rows: (None, grey(*[0.5] * len(rows))))
    for micro_batch in (3, 4, 8):
        config = TrainingConfig(num_generations_eval=3, micro_batch=micro_batch)
        result = evaluator.evaluate(cached_pipe("sd"), config, 0, None, lambda: None, SINGLE_PROCESS)
        assert result.rewards["diversity"].flatten().tolist() == truth
    with pytest.raises(InputError, match="micro_batch must be at least num_generations_eval, 3, got 2"):
        config = TrainingConfig(num_generations_eval=3, micro_batch=2)
        evaluator.evaluate(cached_pipe("sd"), config, 0, None, lambda: None, SINGLE_PROCESS)
    scores, _ = score_in_batches(reward, grey(*[0.5] * 12), [prompt for prompt in prompts for _ in range(3)])
    assert scores.tolist() == truth


@pytest.mark.parametrize("option", ["width=0", "width=-1", "width=x"])
def test_other_widths_are_refused(option: str) -> None:
    with pytest.raises(RewardError, match="use a number"):
        load_reward(f"diversity:{option}")
