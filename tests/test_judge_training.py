"""SPO and DNO: what they do to a tabular policy in games without an order, and trainings by a judge."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rollouts import fresh_pipe
from soft_rewards import Soft, seeded
from torch import Tensor

from steer import (
    DNOConfig,
    DNOTrainer,
    GRPOConfig,
    GRPOTrainer,
    SPOConfig,
    SPOTrainer,
    Tournament,
    as_judge,
    load_reward,
)
from steer.apps.finetuning import FinetuneJob, load_data, read_config
from steer.errors import InputError
from steer.pipelines.training.judged import JudgedTrainer
from steer.rewards.judges import Factor, HierarchyJudge
from steer.training.losses import D3PO, DNO, GRPO, PRDP, LogProbs, Loss

CYCLE = torch.tensor(
    [[0.5, 0.0, 1.0], [1.0, 0.5, 0.0], [0.0, 1.0, 0.5]]
)  # paper beats rock, scissors paper, rock scissors
CONDORCET = torch.tensor([[0.5, 0.3, 0.5], [0.7, 0.5, 0.7], [0.5, 0.3, 0.5]])  # 1 beats both others, by a little
START = torch.tensor([0.6, 0.2, 0.2])


class Game:
    """A judge of images of one pixel, whose channel is the arm."""

    name = "game"

    def __init__(self, table: Tensor) -> None:
        self.table = table

    def compare(self, images_a: Tensor, images_b: Tensor, prompts: Any) -> Tensor:
        a, b = (images.flatten(1).argmax(1) for images in (images_a, images_b))
        return self.table[a, b]


def play(loss: Loss, table: Tensor, updates: int, lr: float, repeats: int = 1) -> tuple[Tensor, Tensor]:
    """Learn a softmax over three arms from the win rates of its own samples; return the last and the average policy."""
    logits, generator = START.log().requires_grad_(), seeded(0)
    tournament, total = Tournament(Game(table)), torch.zeros(3)
    prompts = [f"{number}" for number in range(16) for _ in range(8)]
    for _ in range(updates):
        policy = logits.detach().softmax(0)
        total += policy
        arms = torch.multinomial(policy, 128, replacement=True, generator=generator)
        rates = tournament(torch.eye(3)[arms].view(-1, 3, 1, 1), prompts).view(16, 8)
        old = policy.log()[arms].view(16, 8, 1)
        for _ in range(repeats):
            new = logits.log_softmax(0)[arms].view(16, 8, 1)
            (gradient,) = torch.autograd.grad(loss(LogProbs(new, old, old, 1), rates)[0], logits)
            logits = (logits - lr * gradient).detach().requires_grad_()
    return logits.detach().softmax(0), total / updates


@pytest.mark.hard
def test_the_average_policy_of_spo_is_the_equilibrium_of_a_cycle() -> None:
    _, average = play(GRPO(clip=math.inf, scale=False), CYCLE, updates=1500, lr=0.4)
    assert (average - 1 / 3).abs().max() < 0.03


@pytest.mark.hard
def test_a_reward_of_the_same_choices_collapses() -> None:
    """Bradley–Terry scores of choices in a cycle order the arms all the same; PRDP then prefers one of them alone."""
    arms = torch.multinomial(START, 4000, replacement=True, generator=seeded(1)).view(-1, 2)
    arms = arms[arms[:, 0] != arms[:, 1]]
    scores = torch.zeros(3, requires_grad=True)
    for _ in range(300):
        z = scores[arms[:, 0]] - scores[arms[:, 1]]
        choices = CYCLE[arms[:, 0], arms[:, 1]]
        (gradient,) = torch.autograd.grad(torch.nn.functional.binary_cross_entropy_with_logits(z, choices), scores)
        scores = (scores - 2 * gradient).detach().requires_grad_()
    logits, reference = START.log().requires_grad_(), START.log().view(1, 3, 1)
    for _ in range(3000):
        new = logits.log_softmax(0).view(1, 3, 1)
        value = PRDP(beta=0.1, clip=math.inf)(LogProbs(new, reference, reference, 1), scores.detach()[None])[0]
        logits = (logits - 0.05 * torch.autograd.grad(value, logits)[0]).detach().requires_grad_()
    policy = logits.detach().softmax(0)
    assert policy.max() > 0.9
    torch.testing.assert_close(policy, (START.log() + scores.detach() / 0.1).softmax(0), atol=0.01, rtol=0)


def values(*numbers: float) -> Any:
    """The reward of an arm, read from its image."""
    return load_reward(lambda images, prompts: torch.tensor(numbers)[images.flatten(1).argmax(1)])


@pytest.mark.hard
@pytest.mark.parametrize(("middle", "winner"), [(0.9, 0), (0.99, 1)])
def test_d3po_by_a_hierarchy_does_not_buy_back_its_first_factor(middle: float, winner: int) -> None:
    """The best arm by the first factor wins, whatever the second one pays; that decides among arms within the margin
    of the first. By the sum, the arm that is worst in the first factor buys it back."""
    first, second = values(1.0, middle, 0.0), values(0.0, 10.0, 100.0)
    images, rows = torch.eye(3).view(-1, 3, 1, 1), torch.arange(9)
    judges = HierarchyJudge([Factor(first, 0.05), Factor(second)]), as_judge(load_reward({first: 1.0, second: 1.0}))
    policies = []
    for judge in judges:
        table = judge.compare(images[rows // 3], images[rows % 3], [""] * 9).view(3, 3)
        policies.append(play(D3PO(beta=1.0, unit="nat"), table, updates=300, lr=2.0)[0])
    assert policies[0][winner] > 0.95 and policies[1][2] > 0.95, policies


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("loss", "options"),
    [(GRPO(clip=math.inf, scale=False), {"lr": 2.0}), (DNO(0.5, unit="nat"), {"lr": 2.0, "repeats": 4})],
)
def test_an_arm_that_beats_all_others_wins(loss: Loss, options: Any) -> None:
    policy, _ = play(loss, CONDORCET, updates=300, **options)
    assert policy[1] > 0.95


def test_iterations_of_dno_are_soft_policy_iteration() -> None:
    """π_{t+1} ∝ π_t exp(r_t/β) for exact win rates; the average over iterations is the equilibrium of the cycle."""
    beta, policy, total = 2.0, START, torch.zeros(3)
    loss = DNO(beta, unit="nat")
    for iteration in range(300):
        rates, logits = CYCLE @ policy, policy.log().requires_grad_()
        after = (policy.log() + rates / beta).softmax(0)
        if iteration % 50 == 0:
            old = policy.log().view(1, 3, 1)
            for _ in range(60):
                value = loss(LogProbs(logits.log_softmax(0).view(1, 3, 1), old, old, 1), rates[None])[0]
                logits = (logits - torch.autograd.grad(value, logits)[0]).detach().requires_grad_()
            torch.testing.assert_close(logits.detach().softmax(0), after, atol=1e-3, rtol=0)
        policy, total = after, total + after
    assert (total / 300 - 1 / 3).abs().max() < 0.03


def test_win_rates_of_a_sharp_reward_are_its_ranks() -> None:
    red = Soft(lambda images, prompts: images[:, 0].mean((1, 2)), "red")
    images = torch.rand(6, 3, 2, 2, generator=seeded(0))
    rates = Tournament(as_judge(red, temperature=1e-6))(images, ["a"] * 6)
    torch.testing.assert_close(rates, red(images, ["a"] * 6).argsort().argsort() / 5)


def test_judges_are_read_in_every_form() -> None:
    names = ("tournament(as-judge(brightness))", "tournament(hierarchy(brightness, jpeg))")
    assert JudgedTrainer.read_reward("brightness").name == names[0]
    assert JudgedTrainer.read_reward("hierarchy(brightness, jpeg)").name == names[1]
    assert JudgedTrainer.read_reward("tournament(hierarchy(brightness, jpeg))").name == names[1]
    assert JudgedTrainer.read_reward(Tournament(Game(CYCLE))).name == "tournament(game)"
    assert JudgedTrainer.read_reward(Game(CYCLE)).name == "tournament(game)"


SMALL: dict[str, Any] = {
    "train_batch_size": 2, "num_generations": 4, "num_inference_steps": 3, "lora_rank": 2, "micro_batch": 8,
    "lora_target_modules": ("to_q",), "max_steps": 2, "learning_rate": 1e-2,
}  # fmt: skip
PROMPTS = ["a star", "a circle"]


class Redder:
    """The image with more red is preferred."""

    name = "redder"

    def compare(self, images_a: Tensor, images_b: Tensor, prompts: Any) -> Tensor:
        return torch.sigmoid(1000 * (images_a[:, 0] - images_b[:, 0]).mean((1, 2)))


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("trainer", "config"), [(SPOTrainer, SPOConfig()), (DNOTrainer, DNOConfig(num_iterations=2))], ids=["spo", "dno"]
)
def test_a_judge_trains_and_held_out_rewards_evaluate(trainer: Any, config: Any, tmp_path: Path) -> None:
    config = type(config)(num_iterations=config.num_iterations, output_dir=str(tmp_path), **SMALL)
    held_out: dict[str, Any] = {"eval_prompts": ["a cross"], "eval_rewards": ["colour:red"]}
    result = trainer(fresh_pipe("sd"), Redder(), config, train_prompts=PROMPTS, **held_out).train()
    assert [one["reward"] for one in result.records] == pytest.approx([0.5, 0.5]), "every win is another's loss"
    assert result.records[0]["grad_norm"] > 0 and result.records[0]["reward_spread"] > 0
    first, last = result.evaluations
    both = ["eval/tournament(redder)", "eval/colour:red"]
    assert [name for name, value in last.items() if isinstance(value, list)] == both
    assert first[both[0]][0] == 0.5 != last[both[0]][0], "the win rate against the model before the training"


def test_evaluations_compare_with_the_reference_from_the_same_noise(tmp_path: Path) -> None:
    """P(image ≻ image of the untrained model) by hand; a resumed run, which draws these again, has the same values."""
    drawn: dict[int, Tensor] = {}

    class Keep:
        def on_evaluate(self, args: Any, state: Any, control: Any, **details: Any) -> None:
            drawn[details["evaluation"].step] = details["evaluation"].images

    def run(folder: str, steps: int, resume: bool = False) -> Any:
        config = SPOConfig(
            output_dir=str(tmp_path / folder), eval_steps=1, save_steps=1, **SMALL | {"max_steps": steps}
        )
        made = SPOTrainer(
            fresh_pipe("sd"), Redder(), config, train_prompts=PROMPTS, eval_prompts=["a cross", "a star"],
            eval_rewards=["jpeg"], callbacks=[Keep()],
        )  # fmt: skip
        return made.train(resume_from_checkpoint=resume)

    result = run("whole", 2)
    for step, record in enumerate(result.evaluations):
        truth = Redder().compare(drawn[step], drawn[0], [""] * 2).mean().item()
        assert record["eval/tournament(redder)"][0] == pytest.approx(truth, abs=1e-6)
    run("parts", 1)
    assert run("parts", 2, resume=True).evaluations == result.evaluations


def test_spo_is_grpo_of_a_tournament(tmp_path: Path) -> None:
    judge, losses = Redder(), []
    for trainer, config, reward in (
        (SPOTrainer, SPOConfig, judge),
        (GRPOTrainer, GRPOConfig, Tournament(judge)),
    ):
        made = config(output_dir=str(tmp_path / trainer.__name__), **SMALL)
        losses.append(
            [one["grad_norm"] for one in trainer(fresh_pipe("sd"), reward, made, train_prompts=PROMPTS).train().records]
        )
    assert losses[0] == losses[1]


def test_what_a_judge_cannot_do_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="micro_batch must be a multiple of num_generations, 4, got 6: SPO compares"):
        SPOConfig(micro_batch=6)
    with pytest.raises(InputError, match="reward and judge: give one of the two"):
        FinetuneJob("spo", "brightness", "brightness", prompts="p")
    with pytest.raises(InputError, match="pareto compares the components of a weighted sum"):
        SPOTrainer(None, Redder(), SPOConfig(pareto=True), train_prompts=PROMPTS)


def test_the_key_judge_is_a_tournament_for_every_method(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a star\n")
    for method, trainer in (("spo", SPOTrainer), ("dno", DNOTrainer), ("grpo", GRPOTrainer)):
        path = tmp_path / f"{method}.yaml"
        path.write_text(
            f"method: {method}\njudge: hierarchy(brightness > 0.1, jpeg)\nprompts: {tmp_path}/p.txt\n"
            f"output_dir: {tmp_path}/{method}\nlog_with: []\n"
        )
        config = read_config(str(path))
        made = config.trainer(None, **load_data(config, resume=False))
        assert isinstance(made, trainer) and made.reward.name == "tournament(hierarchy(brightness > 0.1, jpeg))"
