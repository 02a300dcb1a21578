"""Trainings with constraints, filters, the Pareto front and normalised components, on a tiny pipeline."""

from pathlib import Path
from typing import Any

import pytest
import torch
from rollouts import counted, fresh_pipe
from soft_rewards import Soft

from steer.errors import InputError
from steer.pipelines.training.d3po_prdp import D3POConfig, D3POTrainer, PRDPConfig, PRDPTrainer
from steer.pipelines.training.ddpo_grpo import (
    DDPOConfig,
    DDPOTrainer,
    FilteredConfig,
    FilteredTrainer,
    GRPOConfig,
    GRPOTrainer,
)
from steer.pipelines.training.judged import SPOConfig
from steer.pipelines.training.method import Scored
from steer.pipelines.training.signals import RewardSignal
from steer.reward import score_components
from steer.rewards.compose import Constraint, ProductReward, worst
from steer.rewards.parser import combine
from steer.training.losses import DDPO, GRPO
from steer.training.signals import pareto_front
from steer.training.trainable import get_denoiser

RED = Soft(lambda images, prompts: images[:, 0].mean((1, 2)), "red")
BLUE = Soft(lambda images, prompts: images[:, 2].mean((1, 2)) * 1000, "blue")
SMALL: dict[str, Any] = {
    "train_batch_size": 2, "num_generations": 4, "num_inference_steps": 3, "lora_rank": 2, "micro_batch": 8,
    "lora_target_modules": ("to_q",),
}  # fmt: skip
PROMPTS = ["a star", "a circle"]


def test_multipliers_are_learned_logged_and_resumed(tmp_path: Path) -> None:
    """Another reward than the trained one, which it violates: its multiplier rises in every update."""

    def trainer(folder: str, steps: int) -> PRDPTrainer:
        config = PRDPConfig(
            output_dir=str(tmp_path / folder), max_steps=steps, save_steps=1, dual_rate=1e-3,
            constraints={"brightness": ">= 0.99", "red": "<= 9"}, **SMALL,
        )  # fmt: skip
        return PRDPTrainer(fresh_pipe("sd"), RED, config, train_prompts=PROMPTS)

    whole = trainer("whole", 2).train()
    first, second = (one["multiplier/brightness"] for one in whole.records)
    assert 0 < first < second and whole.records[1]["multiplier/red"] == 0.0
    trainer("parts", 1).train()
    again = trainer("parts", 2).train(resume_from_checkpoint=True)
    assert again.records[1]["multiplier/brightness"] == second
    assert again.records[1]["loss"] == whole.records[1]["loss"]


@pytest.mark.parametrize("kind", ["best-worst", "best-random"])
def test_samples_that_a_filter_drops_cost_no_replay(kind: Any, tmp_path: Path) -> None:
    rows = {}
    for name in ("none", kind):
        pipe = fresh_pipe("sd")
        config = GRPOConfig(
            output_dir=str(tmp_path / name), max_steps=1, sample_filter=name, skip_low_noise_steps=0, **SMALL
        )
        with counted(get_denoiser(pipe)[1]) as calls:
            result = GRPOTrainer(pipe, RED, config, train_prompts=PROMPTS).train()
        rows[name] = sum(calls)
        assert result.records[0]["grad_norm"] > 0
    # Rows of 2 prompts × 4 samples, 2 for guidance each: 3 steps of the rollout, then 2 noisy steps of check, reference
    # and update; with a filter half as many rows of these.
    assert rows["none"] == 16 * (3 + 3 * 2) and rows[kind] == 16 * 3 + 8 * 3 * 2


def test_the_loss_takes_advantages_where_samples_are_left_out() -> None:
    assert isinstance(GRPOConfig().loss(), GRPO)
    assert isinstance(GRPOConfig(pareto=True).loss(), DDPO)
    assert isinstance(GRPOConfig(sample_filter="best-worst").loss(), DDPO)


@pytest.mark.parametrize(("trainer", "config"), [(GRPOTrainer, GRPOConfig), (DDPOTrainer, DDPOConfig)])
def test_pareto_trains_policy_gradients(trainer: Any, config: Any, tmp_path: Path) -> None:
    options = config(output_dir=str(tmp_path), max_steps=1, pareto=True, **SMALL)
    result = trainer(fresh_pipe("sd"), combine({RED: 1.0, BLUE: 1.0}), options, train_prompts=PROMPTS).train()
    assert result.records[0]["grad_norm"] > 0 and {"reward/red", "reward/blue"} <= set(result.records[0])


def test_pareto_compares_weighted_components_of_the_sum_alone() -> None:
    """red − 2 blue: more blue is worse; of red and min(red, blue) the components of the minimum count once."""
    red, blue = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[1.0, 1.0, 3.0]])
    scored = Scored(("a",), (), red - 2 * blue, {"red": red, "blue": blue})
    objectives = RewardSignal(combine({RED: 1.0, BLUE: -2.0}), D3POConfig(pareto=True)).objectives(scored)
    assert objectives.tolist() == [[[0.0, -2.0], [1.0, -2.0], [2.0, -6.0]]]
    worse = combine([RED, BLUE], worst)
    nested = combine({RED: 1.0, worse: 3.0})
    scores, components = score_components(nested, torch.rand(3, 3, 4, 4), ["a"] * 3)
    scored = Scored(("a",), (), scores[None], {name: values[None] for name, values in components.items()})
    objectives = RewardSignal(nested, D3POConfig(pareto=True)).objectives(scored)
    torch.testing.assert_close(objectives[0], torch.stack([components["red"], 3 * components[worse.name]], 1))
    for other in (worse, ProductReward([Constraint(RED, "<", 0.5)])):
        with pytest.raises(InputError, match="pareto compares the components of a weighted sum"):
            D3POTrainer(None, other, D3POConfig(pareto=True), train_prompts=PROMPTS)


PARETO: dict[str, Any] = {"grpo": (GRPOTrainer, GRPOConfig), "ddpo": (DDPOTrainer, DDPOConfig),
                          "d3po": (D3POTrainer, D3POConfig), "filtered": (FilteredTrainer, FilteredConfig)}  # fmt: skip


@pytest.mark.few(1)
@pytest.mark.parametrize("method", PARETO)
def test_pareto_learns_multipliers(method: str, tmp_path: Path) -> None:
    """A bound that the samples violate raises its multiplier, and one that holds leaves it at 0."""
    trainer, config = PARETO[method]
    options = config(
        output_dir=str(tmp_path), max_steps=2, pareto=True, dual_rate=1e-3,
        constraints={"brightness": ">= 0.99", "blue": "<= 9999"}, **SMALL,
    )  # fmt: skip
    result = trainer(fresh_pipe("sd"), combine({RED: 1.0, BLUE: 1.0}), options, train_prompts=PROMPTS).train()
    first, second = (one["multiplier/brightness"] for one in result.records)
    assert 0 < first < second and result.records[1]["multiplier/blue"] == 0.0
    assert result.records[0]["grad_norm"] > 0


def test_objectives_are_mixed_with_bounded_rewards() -> None:
    """By hand, r_1 = (0, 2), r_2 = (3, 1), c = (0, 4) ≥ 6, θ − mean(c) = 4, s_c = 2, rate ¼: μ = ¼·4/2 = ½.

    Standardised objectives (−1, 1) and (1, −1) of deviation s_0 = 1 get ½·(1/2)·c = (0, 1), over 1 + μ: (−1, 2) and
    (1, 0), over 1.5. At μ = 0 neither sample dominates; at the largest, 10, (−1, 21) and (1, 19): the second does.
    """
    components = {"red": torch.tensor([[0.0, 2.0]]), "blue": torch.tensor([[3.0, 1.0]])}
    other = {"brightness": torch.tensor([[0.0, 4.0]])}
    scored = Scored(("a",), (), components["red"] + components["blue"], components | other)
    config = GRPOConfig(pareto=True, constraints={"brightness": ">= 6"}, dual_rate=0.25)
    signal = RewardSignal(combine({RED: 1.0, BLUE: 1.0}), config)
    objectives = signal.objectives(scored)
    expected = torch.tensor([[[-1.0, 1.0], [2.0, 0.0]]]) / 1.5
    torch.testing.assert_close(objectives, expected, rtol=1e-5, atol=1e-5)
    assert signal.constraints.multipliers == pytest.approx((0.5,))
    assert pareto_front(objectives).tolist() == [[True, True]]
    for _ in range(30):
        objectives = signal.objectives(scored)
    assert signal.constraints.multipliers == (10.0,) and pareto_front(objectives).tolist() == [[False, True]]


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (GRPOConfig, {"scale_rewards": False}),
        (GRPOConfig, {"normalize_components": True}),
        (SPOConfig, {"scale_rewards": False}),
        (DDPOConfig, {"history": 32}),
        (D3POConfig, {"normalize_components": True}),
        (FilteredConfig, {"keep_fraction": 0.5}),
    ],
)
def test_options_that_pareto_replaces_are_refused(config: Any, options: Any) -> None:
    config(pareto=True), config(**options)
    with pytest.raises(InputError, match=f"{next(iter(options))} has no effect with pareto: leave one of them out"):
        config(pareto=True, **options)


def test_a_sum_is_normalised_by_component() -> None:
    red, blue = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[2000.0, 1000.0, 0.0]])
    scored = Scored(("a",), (), red - 2 * blue, {"red": red, "blue": blue})
    signal = RewardSignal(combine({RED: 1.0, BLUE: -2.0}), GRPOConfig(normalize_components=True))(scored)
    torch.testing.assert_close(signal, torch.tensor([[-1.0, 0.0, 1.0]]) * 3 * 1.5**0.5, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalize_components": True}, "normalize_components is for a weighted sum of rewards, and 'red' is none"),
        ({"constraints": {"nonsense": "<= 1"}}, "nonsense"),
        ({"pareto": True}, "pareto compares the components of a weighted sum of rewards, and 'red' is none"),
    ],
)
def test_options_that_do_not_fit_the_reward_are_refused(options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        D3POTrainer(None, RED, D3POConfig(**options), train_prompts=PROMPTS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"constraints": {"red": "low"}}, "constraints: red must be like"),
        ({"sample_filter": "best", "filter_keep": 9}, "filter_keep must be from 2 to num_generations = 4, got 9"),
        ({"sample_filter": "worst"}, "sample_filter"),
        ({"window": "middle"}, "window"),
        ({"dynamics": "vp"}, "dynamics"),
    ],
)
def test_bad_configurations_are_one_line(options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        D3POConfig(**options)
    assert "\n" not in str(error.value)


def test_preferences_have_no_window() -> None:
    with pytest.raises(InputError, match="window and dynamics are for samples of the present policy"):
        D3POTrainer(None, config=D3POConfig(window="first"), preferences="nowhere")
