"""DRAKES on a tabular masked diffusion: its optimum and KL by enumeration, its gradient by finite differences."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tabular
import torch
from conftest import Steer
from safetensors.torch import load_file
from tabular import MASK, SEQUENCES, STATES, V, kernel_matrix, law_of_sampler
from test_trainable import fresh_pipe
from torch import Generator, Tensor
from torch.nn import functional as F

from steer import DRAKESConfig, DRAKESTrainer, InputError, RewardBackpropTrainer
from steer.apps.finetuning import read_config, summary
from steer.diffusion.masked import subs
from steer.diffusion.seeds import derived_seed
from steer.pipelines.training.method import TrainingResult, rows_of
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


def trainer_of(pipe: Any, folder: Path, **settings: Any) -> DRAKESTrainer:
    """A trainer of the tabular model on the number of letters a."""
    config = DRAKESConfig(output_dir=str(folder), micro_batch=256, learning_rate=0.1, **settings)
    return DRAKESTrainer(pipe, CountA(), config, train_prompts=[""])


@pytest.mark.hard
def test_training_ends_at_the_tilted_law(tmp_path: Path) -> None:
    """TV to p_pre exp(r/α) ≤ .05 where the base has ≥ .2."""
    alpha, steps = 1.0, 16
    pipe = tabular.pipeline()
    settings: dict[str, Any] = {"train_batch_size": 256, "max_steps": 150, "lr_scheduler_type": "linear"}
    trainer = trainer_of(pipe, tmp_path, kl_weight=alpha, num_inference_steps=steps, temperature=0.3, **settings)
    base = law_of_sampler(LOG_X0, steps, "independent")
    target = base * ((SEQUENCES == 0).sum(1).double() / alpha).exp()
    target /= target.sum()
    records = trainer.train().records
    trained = law_of_sampler(subs(pipe.denoiser.logits.detach(), STATES, MASK), steps, "independent")
    assert (base - target).abs().sum() / 2 >= 0.2
    assert (trained - target).abs().sum() / 2 <= 0.05
    assert records[-1]["kl"] > 0.1


def test_training_raises_the_reward_and_leaves_the_reference_alone(tmp_path: Path) -> None:
    pipe = tabular.pipeline()
    before = copy.deepcopy(pipe.denoiser.logits.detach())
    settings: dict[str, Any] = {"num_inference_steps": 4, "last_steps": 4, "train_batch_size": 64, "max_steps": 15}
    trainer = trainer_of(pipe, tmp_path, kl_weight=0.1, **settings)
    history = trainer.train().records
    assert history[-1]["reward"] > history[0]["reward"] + 0.5 and history[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert not torch.equal(pipe.denoiser.logits, before)
    assert torch.equal(trainer.reference.logits, before)


def test_a_reward_without_gradients_on_tokens_is_refused() -> None:
    with pytest.raises(InputError, match="no gradients on tokens"):
        DRAKESTrainer(tabular.pipeline(), "parses")
    with pytest.raises(InputError, match="last_steps must be from 1 to 4"):
        DRAKESConfig(num_inference_steps=4, last_steps=5)
    with pytest.raises(InputError, match="num_iterations does not apply to DRAKES"):
        DRAKESConfig(num_iterations=2)


def test_the_gradient_is_that_of_reward_and_kl_of_the_relaxed_run(tmp_path: Path) -> None:
    """One update by gradient descent with rate 1, against the objective differentiated here, in two micro-batches."""
    pipe, alpha = tabular.pipeline(), 0.7
    with torch.no_grad():
        pipe.denoiser.logits += torch.randn(pipe.denoiser.logits.shape, generator=Generator().manual_seed(1))
    before = copy.deepcopy(pipe.denoiser)
    settings: dict[str, Any] = {"num_inference_steps": 3, "train_batch_size": 6, "micro_batch": 3, "max_steps": 1}
    settings |= {"optim": "sgd", "weight_decay": 0.0, "learning_rate": 1.0, "max_grad_norm": 1e9, "temperature": 1.0}
    config = DRAKESConfig(output_dir=str(tmp_path), kl_weight=alpha, **settings)
    trainer = DRAKESTrainer(pipe, CountA(), config, train_prompts=[""])
    trainer.reference.logits.zero_()  # so that the KL is not 0
    trainer.train()
    rows = rows_of(("",) * 6, 1, config.seed, "update 0", False)
    total = torch.zeros(())
    for chunk in rows.split(3):
        generator = Generator().manual_seed(derived_seed(chunk.noises[0], "relaxed"))
        run = relaxed_run(
            lambda p: before(p).sample,
            lambda p: trainer.reference(p).sample,
            ALL_MASKED.expand(3, -1),
            MASK,
            3,
            3,
            1.0,
            generator,
        )
        total = total + (alpha * run.kl - run.tokens[..., 0].sum(1)).sum() / 6
    (gradient,) = torch.autograd.grad(total, before.logits)
    assert gradient.abs().max() > 1e-3
    torch.testing.assert_close(pipe.denoiser.logits, before.logits - gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("sort", ["image", "masked"])
def test_other_pipelines_are_refused(sort: str) -> None:
    pipe = tabular.pipeline() if sort == "masked" else fresh_pipe("sd")
    trainer = DRAKESTrainer if sort == "image" else RewardBackpropTrainer
    with pytest.raises(InputError, match=r"is for texts, and StableDiffusion|train MaskedDiffusionPipeline by"):
        trainer(pipe, CountA(), train_prompts=[""])


@pytest.mark.hard
def test_a_resumed_run_of_the_command_ends_at_the_same_weights(steer: Steer, tmp_path: Path) -> None:
    short = {"train-batch-size": 4, "num-inference-steps": 3, "eval-prompts-count": 2, "num-generations-eval": 1}
    words = [word for name, value in short.items() for word in (f"--{name}", value)]
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    def finetune(folder: Path, updates: int, *more: str) -> str:
        given = [*words, "--output-dir", folder, "--max-steps", updates, "--reward", "says:red", *more]
        code, out, err = steer("finetune", "drakes-scenes-text", *given)
        assert code == 0, err
        return out

    assert " texts/s: rollouts " in finetune(whole, 2)
    finetune(parts, 1)
    finetune(parts, 2, "--resume")
    states = [load_file(next((folder / "final").rglob("*.safetensors"))) for folder in (whole, parts)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["kl"] == pytest.approx(0, abs=1e-5) and records[1]["kl"] > 0


def test_the_configuration_of_the_command_is_this_method_and_names_texts() -> None:
    config = read_config("drakes-scenes-text", {"max_steps": "1"})
    assert isinstance(config.training, DRAKESConfig) and config.job.model == "scenes-text"
    shares = {"rollout_share": 0.25, "reward_share": 0.0, "update_share": 0.75}
    result = TrainingResult(1, None, None, None, ({"seconds": 4.0, "reward": 0.5, **shares},), ())
    assert summary(config, result).startswith("drakes: 1 updates in 4 s (12 texts/s: rollouts 25%, rewards 0%")
