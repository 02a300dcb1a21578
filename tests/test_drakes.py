"""DRAKES on a tabular masked diffusion: its optimum and KL by enumeration, its gradient by finite differences."""

import copy

import pytest
import tabular
import torch
from tabular import MASK, SEQUENCES, STATES, V, kernel_matrix, law_of_sampler
from torch import Generator, Tensor
from torch.nn import functional as F

from steer import DRAKESTrainer, InputError
from steer.diffusion.masked import subs
from steer.training.drakes import StepNoise, clean_log_probs, relaxed_run, relaxed_step

LOG_X0 = subs(tabular.Table().logits.detach(), STATES, MASK)
ALL_MASKED = torch.full((1, tabular.L), MASK)


class CountA:
    """The number of letters a, linear in relaxed tokens."""

    name, differentiable, images = "count-a", True, "text"

    def __call__(self, texts: list[str], prompts: list[str]) -> Tensor:
        return torch.tensor([float(text.count("a")) for text in texts])

    def relaxed(self, p: Tensor, prompts: list[str]) -> Tensor:
        return p[..., 0].sum(1)


def test_a_relaxed_step_near_zero_temperature_is_a_draw_from_the_kernel() -> None:
    n, rate = 20_000, 0.4
    state = F.one_hot(ALL_MASKED.expand(n, -1), V + 1).float()
    log_x0 = clean_log_probs(tabular.Table().logits.detach()[-1].expand(n, -1, -1), MASK)
    noise = StepNoise.draw(log_x0, Generator().manual_seed(0))
    drawn = relaxed_step(state, log_x0, rate, MASK, noise, 1e-3).argmax(-1)
    exact = kernel_matrix(LOG_X0, rate, "independent")[-1]
    counts = torch.bincount(tabular.index_of(drawn), minlength=len(STATES)).double()
    chi2 = ((counts - n * exact) ** 2 / (n * exact))[exact > 0].sum()
    degrees = int((exact > 0).sum()) - 1
    assert abs(chi2 - degrees) < 4 * (2 * degrees) ** 0.5


def test_the_gradient_is_that_of_finite_differences_with_fixed_noise() -> None:
    table = tabular.Table().double()
    start = ALL_MASKED.expand(3, -1)

    def objective() -> Tensor:
        run = relaxed_run(
            lambda p: table(p).sample, None, start, MASK, 3, 3, 1.0, Generator().manual_seed(0), hard=False
        )
        return (run.tokens[..., 0] * torch.tensor([1.0, 2.0, 0.5, 1.0])).sum()

    gradient = torch.autograd.grad(objective(), table.logits)[0]
    checked = gradient.abs().flatten().topk(5).indices
    for place in checked.tolist():
        values = []
        for step in (1e-4, -1e-4):
            with torch.no_grad():
                table.logits.view(-1)[place] += step
                values.append(objective().item())
                table.logits.view(-1)[place] -= step
        assert (values[0] - values[1]) / 2e-4 == pytest.approx(gradient.view(-1)[place].item(), rel=2e-2, abs=1e-4)


def test_the_kl_of_a_run_is_that_of_enumeration_and_not_zero() -> None:
    torch.manual_seed(0)
    policy, pre, steps = tabular.Table(), tabular.Table(), 4
    with torch.no_grad():
        policy.logits += torch.randn(policy.logits.shape) * (policy.logits > -1e3)
    other = subs(policy.logits.detach(), STATES, MASK)
    law, exact = torch.zeros(len(STATES), dtype=torch.float64), 0.0
    law[-1] = 1
    for left in range(steps, 0, -1):
        p, q = (kernel_matrix(log_x0, 1 / left, "independent") for log_x0 in (other, LOG_X0))
        exact += float(law @ torch.where(p > 0, p * (p / q).log(), 0.0).sum(1))
        law = law @ p
    start = ALL_MASKED.expand(20_000, -1)
    with torch.no_grad():
        run = relaxed_run(
            lambda p: policy(p).sample,
            lambda p: pre(p).sample,
            start,
            MASK,
            steps,
            steps,
            1e-4,
            Generator().manual_seed(0),
        )
    error = run.kl.double().std() / 20_000**0.5
    assert exact > 0.5 and abs(run.kl.double().mean() - exact) < 4 * error


@pytest.mark.hard
def test_training_ends_at_the_tilted_law() -> None:
    """TV to p_pre exp(r/α) ≤ .05 where the base has ≥ .2."""
    alpha, steps = 1.0, 16
    pipe = tabular.pipeline()
    trainer = DRAKESTrainer(
        pipe,
        CountA(),
        kl_weight=alpha,
        num_inference_steps=steps,
        temperature=0.3,
        learning_rate=0.1,
        train_batch_size=256,
    )
    base = law_of_sampler(LOG_X0, steps, "independent")
    target = base * ((SEQUENCES == 0).sum(1).double() / alpha).exp()
    target /= target.sum()
    generator = Generator().manual_seed(0)
    for share in (1.0, 0.6, 0.2):
        trainer.optimizer.param_groups[0]["lr"] = 0.1 * share
        history = trainer.train([""], updates=50, generator=generator)
    trained = law_of_sampler(subs(pipe.denoiser.logits.detach(), STATES, MASK), steps, "independent")
    assert (base - target).abs().sum() / 2 >= 0.2
    assert (trained - target).abs().sum() / 2 <= 0.05
    assert history[-1]["kl"] > 0.1


def test_training_raises_the_reward_and_leaves_the_reference_alone() -> None:
    pipe = tabular.pipeline()
    before = copy.deepcopy(pipe.denoiser.logits.detach())
    trainer = DRAKESTrainer(
        pipe, CountA(), kl_weight=0.1, num_inference_steps=4, last_steps=4, learning_rate=0.1, train_batch_size=64
    )
    history = trainer.train([""], updates=15, generator=Generator().manual_seed(0))
    assert history[-1]["reward"] > history[0]["reward"] + 0.5 and history[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert not torch.equal(pipe.denoiser.logits, before)
    assert torch.equal(trainer.reference.logits, before)


def test_a_reward_without_gradients_on_tokens_is_refused() -> None:
    with pytest.raises(InputError, match="no gradients on tokens"):
        DRAKESTrainer(tabular.pipeline(), "parses")
    with pytest.raises(InputError, match="last_steps"):
        DRAKESTrainer(tabular.pipeline(), CountA(), num_inference_steps=4, last_steps=5)
