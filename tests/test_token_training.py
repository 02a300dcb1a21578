"""GRPO, PRDP and D3PO on masked diffusion: gradient, KL and optimum by enumeration, and `steer finetune` on texts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tabular
import torch
from conftest import Steer
from tabular import MASK, SEQUENCES, STATES, V, kernel_matrix, law_of_sampler
from torch import Tensor

from steer import TEXT_MODELS, GRPOConfig, GRPOTrainer, InputError, MaskedDiffusionPipeline, NFTTrainer
from steer.apps.scenes.text import write_prefix_lists
from steer.assets import PROMPTS, TEXT_LISTS
from steer.diffusion.masked import subs
from steer.training.gradient import Batch, reference_of, two_pass_gradient
from steer.training.guards import kl
from steer.training.losses import D3PO, GRPO, PRDP
from steer.training.rollout import Rows, Trajectories
from steer.training.token_rollout import TokenSampler
from steer.training.trainable import FullFinetuning

STEPS, PROMPT = 3, "_"  # a masked token: the whole sequence is masked
INDEX = V ** torch.arange(tabular.L - 1, -1, -1)
REWARD = (SEQUENCES == 0).sum(1).double() + 0.5 * (SEQUENCES[:, 0] == 2)  # of each of the 81 sequences


def sampler_of(pipe: Any, steps: int = STEPS) -> TokenSampler:
    return TokenSampler(pipe, {"num_inference_steps": steps})


def rows_of(count: int, first: int) -> Rows:
    return Rows((PROMPT,) * count, (0,) * count, tuple(range(first, first + count)))


def reward_of(stored: Trajectories) -> Tensor:
    return REWARD[(stored.latents[:, -1] * INDEX).sum(1)].float()


def law(logits: Tensor, steps: int = STEPS) -> Tensor:
    return law_of_sampler(subs(logits.detach(), STATES, MASK), steps, "independent")


def batch_of(pipe: Any, groups: int, size: int, first: int = 0, steps: int = STEPS, references: Any = ()) -> Batch:
    stored, _ = sampler_of(pipe, steps).rollout(rows_of(groups * size, first))
    return Batch([stored], references, range(steps), reward_of(stored).view(groups, size))


def mean_and_error(values: list[float]) -> tuple[float, float]:
    numbers = torch.tensor(values, dtype=torch.float64)
    return numbers.mean().item(), (numbers.std() / len(numbers) ** 0.5).item()


@pytest.mark.hard
def test_the_gradient_of_grpo_is_that_of_the_enumerated_expectation() -> None:
    """E ∇L = −(K − 1)/(K T) ∇E[r]: along random directions, by central differences of the law of the 81 sequences."""
    pipe, size, loss = tabular.pipeline(), 4, GRPO(clip=float("inf"), unit="nat", scale=False)
    logits, open_places = pipe.denoiser.logits, (pipe.denoiser.logits > -1e3).float()
    gradients = []
    for part in range(20):
        logits.grad = None
        batch = batch_of(pipe, 250, size, 1000 * part)
        two_pass_gradient(sampler_of(pipe), batch, loss, on_policy=bool(part % 2))  # both ways to c
        gradients.append(logits.grad.clone())
    for seed in range(3):
        direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed)) * open_places
        values = [(law(logits + 0.01 * sign * direction) * REWARD).sum().item() for sign in (1, -1)]
        exact = -(size - 1) / size / STEPS * (values[0] - values[1]) / 0.02
        mean, error = mean_and_error([(gradient * direction).sum().item() for gradient in gradients])
        assert abs(mean - exact) < 4 * error and error < 0.3 * abs(exact) + 0.01


def perturbed() -> tuple[Any, Callable[[], Any]]:
    """A pipeline whose denoiser differs from its reference."""
    torch.manual_seed(0)
    pipe = tabular.pipeline()
    trainable = FullFinetuning(pipe)
    with torch.no_grad():
        pipe.denoiser.logits += torch.randn(pipe.denoiser.logits.shape) * (pipe.denoiser.logits > -1e3)
    return pipe, trainable.reference


@pytest.mark.hard
def test_the_kl_to_the_reference_is_that_of_enumeration_computed_or_estimated() -> None:
    pipe, base = perturbed()
    own, before = (subs(one, STATES, MASK) for one in (pipe.denoiser.logits.detach(), tabular.Table().logits.detach()))
    states, exact = torch.zeros(len(STATES), dtype=torch.float64), 0.0
    states[-1] = 1
    for left in range(STEPS, 0, -1):
        p, q = (kernel_matrix(one, 1 / left, "independent") for one in (own, before))
        exact += float(states @ torch.where(p > 0, p * (p / q).log(), 0.0).sum(1))
        states = states @ p
    results: dict[Any, list[float]] = {torch.float32: [], None: []}
    for part in range(16):
        batch = batch_of(pipe, 100, 4, 400 * part)
        for dtype, values in results.items():
            with base():
                reference = reference_of(sampler_of(pipe), batch.chunks[0], batch.steps, dtype)
            one = Batch(batch.chunks, [reference], batch.steps, batch.rewards)
            values.append(two_pass_gradient(sampler_of(pipe), one, GRPO(), on_policy=True)[1]["kl"])
    for values in results.values():
        mean, error = mean_and_error(values)
        assert exact > 0.5 and abs(mean - exact) < 4 * error < 0.2 * exact


def test_the_gradient_of_the_kl_is_that_of_finite_differences() -> None:
    pipe, base = perturbed()
    logits = pipe.denoiser.logits
    batch = batch_of(pipe, 8, 4)
    with base():
        reference = reference_of(sampler_of(pipe), batch.chunks[0], batch.steps)
    batch = Batch(batch.chunks, [reference], batch.steps, torch.ones(8, 4))  # equal rewards: the KL alone

    def measured() -> float:
        return two_pass_gradient(sampler_of(pipe), batch, GRPO(), penalties={kl: 1.0}, on_policy=True)[1]["kl"]

    logits.grad = None
    measured()
    gradient = logits.grad.clone()
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)) * (logits > -1e3)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            logits += 0.01 * sign * direction
            values.append(measured_without_graph(measured))
            logits -= 0.01 * sign * direction
    slope = (values[0] - values[1]) / 0.02
    assert slope == pytest.approx((gradient * direction).sum().item(), rel=1e-2) and abs(slope) > 0.01


def measured_without_graph(measured: Callable[[], float]) -> float:
    with torch.enable_grad():
        return measured()


def trained(loss: Any, updates: int, passes: int, rate: float, steps: int = STEPS) -> tuple[Tensor, Tensor]:
    """The laws (81,) before and after updates on 16 groups of 8."""
    pipe = tabular.pipeline()
    trainable = FullFinetuning(pipe)
    logits, sampler = pipe.denoiser.logits, sampler_of(pipe, steps)
    optimiser, base = torch.optim.Adam([logits], lr=rate, betas=(0.9, 0.95)), law(logits, steps)
    for update in range(updates):
        for group in optimiser.param_groups:
            group["lr"] = rate * (1 - update / updates)
        batch = batch_of(pipe, 16, 8, 128 * update, steps)
        with trainable.reference():
            reference = reference_of(sampler, batch.chunks[0], batch.steps, None)
        batch = Batch(batch.chunks, [reference], batch.steps, batch.rewards)
        for turn in range(passes):
            optimiser.zero_grad()
            two_pass_gradient(sampler, batch, loss, on_policy=turn == 0)
            optimiser.step()
    return base, law(logits, steps)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("loss", "passes"),
    [(GRPO(clip=0.2, unit="nat"), 1), (PRDP(beta=0.5, clip=1.0), 3), (D3PO(beta=0.5, unit="nat"), 2)],
    ids=["grpo", "prdp", "d3po"],
)
def test_training_raises_a_planted_reward(loss: Any, passes: int) -> None:
    base, after = trained(loss, 25, passes, 0.1)
    assert (after * REWARD).sum() > (base * REWARD).sum() + 0.5


@pytest.mark.hard
def test_prdp_ends_at_the_tilted_law() -> None:
    """TV to p_ref exp(r/β) ≤ .05 where the base has ≥ .2."""
    base, after = trained(PRDP(beta=1.0, clip=0.5), 250, 3, 0.1)
    target = base * REWARD.exp()
    target /= target.sum()
    assert (base - target).abs().sum() / 2 >= 0.2
    assert (after - target).abs().sum() / 2 <= 0.05


def test_samples_depend_on_their_seeds_alone_and_only_open_masks() -> None:
    pipe = tabular.pipeline("balanced")
    whole, texts = sampler_of(pipe).rollout(rows_of(6, 0))
    parts = [sampler_of(pipe).rollout(rows)[0].latents for rows in rows_of(6, 0).split(2)]
    assert torch.equal(torch.cat(parts), whole.latents) and texts == pipe.decode(whole.latents[:, -1])
    for before, after in zip(whole.latents.unbind(1), whole.latents.unbind(1)[1:], strict=False):
        assert ((before == MASK) | (before == after)).all()
    other = sampler_of(pipe).rollout(rows_of(6, 50))[0]
    assert not torch.equal(other.latents, whole.latents)


@pytest.fixture(scope="module")
def scenes_text() -> Any:
    return MaskedDiffusionPipeline.from_pretrained(TEXT_MODELS["scenes-text"])


def test_methods_and_arguments_of_images_are_refused(scenes_text: Any) -> None:
    with pytest.raises(
        InputError, match="is for images: train MaskedDiffusionPipeline by a method of log-probabilities"
    ):
        NFTTrainer(scenes_text, "parses", train_prompts=["a"])
    with pytest.raises(InputError, match="eta is for images"):
        GRPOTrainer(scenes_text, "parses", GRPOConfig(eta=0.5), train_prompts=["a"])


@pytest.mark.hard
def test_steer_finetune_trains_evaluates_and_resumes(steer: Steer, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ["finetune", "grpo-scenes-text", "--output-dir", str(out), "--train-batch-size", "2", "--save-steps", "1"]
    words += ["--num-inference-steps", "6", "--num-generations", "4", "--eval-prompts-count", "3", "--log-with", "[]"]
    words += ["--num-generations-eval", "2", "--reward", "says:blue + says:red + says:star"]
    code, printed, err = steer(*words, "--max-steps", "1", "--eval-steps", "1")
    assert code == 0 and "on held-out prompts" in printed, err
    code, printed, err = steer(*words, "--max-steps", "2", "--eval-steps", "1", "--resume")
    assert code == 0, err
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    lines = [json.loads(line) for line in (out / "samples" / "step-000002.jsonl").read_text().splitlines()]
    evaluations = [json.loads(line) for line in (out / "evaluations.jsonl").read_text().splitlines()]
    assert [one["step"] for one in metrics] == [1, 2] and metrics[1]["kl"] >= 0
    assert len(lines) == 6 and all(line["text"].startswith(line["prompt"]) for line in lines)
    assert 0 < evaluations[-1]["eval/diversity"] < 1
    card = (out / "README.md").read_text()
    assert "text-generation" in card and "share of tokens that differ" in card
    code_lines = card.split("```python\n")[1].split("```")[0].replace('run = "."', f"run = {str(out)!r}")
    names: dict[str, Any] = {}
    exec(code_lines, names)
    assert names["output"].texts[0].startswith("a")
    words = ["sample", "a", "--model", "scenes-text", "--lora", str(out / "final"), "--steps", "6", "--method", "base"]
    code, _, err = steer(*words, "--reward", "parses", "--out", tmp_path / "texts")
    entry = json.loads((tmp_path / "texts" / "report.json").read_text())["prompts"][0]
    assert code == 0 and len(entry["texts"]) == len(entry["base"]["texts"]) == 4, err
    tuned = names["pipe"].denoiser.state_dict()
    base = MaskedDiffusionPipeline.from_pretrained(TEXT_MODELS["scenes-text"]).denoiser.state_dict()
    assert any(not torch.equal(tuned[name], base[name]) for name in base)


def test_prefix_lists_are_those_of_their_generator(tmp_path: Path) -> None:
    write_prefix_lists(tmp_path)
    for name in TEXT_LISTS:
        assert (tmp_path / f"{name}.jsonl").read_bytes() == PROMPTS[name].read_bytes()
