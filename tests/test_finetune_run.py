"""Finetuning runs: guards that end them, refusals, resuming and output files."""

import json
import logging
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PIPELINES
from finetune_runs import Recorder, config_of, train, trainer_of
from safetensors.torch import load_file

from steer import D3POTrainer, TrainingConfig
from steer.errors import InputError
from steer.pipelines.training.evaluation import diversity
from steer.pipelines.training.method import chosen_steps, prompts_at, rows_of, shuffled_at
from steer.pipelines.training.rollouts import batch_order
from steer.training.gradient import Batch, reference_of, reward_gradient
from steer.training.guards import kl
from steer.training.overoptimization import interval
from steer.training.rollout import Sampler
from steer.training.trainable import LoRA, get_denoisers

SHORT: dict[str, Any] = {
    "max_steps": 3,
    "steps_per_generation": 1,
    "num_iterations": 1,
    "eval_steps": 1,
    "ema_decay": 0.0,
    "kl_weight": 0.0,
    "kl_target_nats": None,
    "micro_batch": 4,  # all rows at once: test_finetune.py has several batches in an update
}


def fresh(name: str = "sd") -> Any:
    """The same tiny pipeline every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = PIPELINES[name]()
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def pipe() -> Any:
    return fresh()


def test_a_spent_kl_budget_ends_the_run_and_keeps_its_weights(pipe: Any, tmp_path: Path) -> None:
    config = config_of("prdp", kl_budget_nats=1e-9, kl_weight=0.0, kl_target_nats=None, warmup_steps=0)
    result = train("prdp", pipe, tmp_path, config)
    assert result.stopped and result.stopped.startswith("the KL budget is spent")
    assert result.step == 1, "the KL of the first update is 0, and there is no second one"
    assert result.weights and result.weights.is_file()
    assert result.evaluations[-1]["step"] == 1, "evaluated again at the end"
    again = train("prdp", fresh(), tmp_path, config)
    assert again.step == 1 and again.stopped == result.stopped, "when resumed, it does not continue"


class Fooled:
    """A held-out reward with a given value at each evaluation, whatever the images."""

    name, differentiable = "honest", False

    def __init__(self, worth: list[float]) -> None:
        self.worth = iter(worth)

    def __call__(self, images: torch.Tensor, prompts: Any) -> torch.Tensor:
        return torch.full((len(images),), next(self.worth))


class Rising(Fooled):
    """A reward that rises with every call; images of one call differ in it."""

    name = "proxy"

    def __call__(self, images: torch.Tensor, prompts: Any) -> torch.Tensor:
        return torch.linspace(0, 0.1, len(images)) + next(self.worth)


def test_early_stopping_ends_the_run_with_the_best_weights(pipe: Any, tmp_path: Path) -> None:
    """Evaluations after 0, 1, 2, 3 updates: the training reward rises, the held-out one falls after the second."""
    reward, honest = Rising([float(n) for n in range(100)]), Fooled([0.5, 0.9, 0.8, 0.7, 0.6])
    config = config_of("grpo", **SHORT | {"max_steps": 9, "early_stopping_patience": 2})
    result = train("grpo", pipe, tmp_path, config, reward=reward, eval_rewards=[honest])
    assert result.best_step == result.weights_step == 1 and result.step == 3
    assert result.stopped and "held-out one fell, 2 evaluations in a row" in result.stopped
    final, best = (load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("final", "best"))
    assert all(torch.equal(final[name], value) for name, value in best.items())
    kept = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert "step-00000001" in kept, "save_total_limit keeps the best one"
    trained = load_file(tmp_path / "checkpoints" / "step-00000003" / "weights.safetensors")
    assert any(not torch.equal(trained[name], value) for name, value in load_file(
        tmp_path / "checkpoints" / "step-00000001" / "weights.safetensors").items())  # fmt: skip


def test_a_replay_with_other_log_probs_ends_the_run_before_the_first_update(pipe: Any, tmp_path: Path) -> None:
    pipe.unet.register_forward_hook(lambda module, inputs, output: (output[0] + 0.01 * torch.randn_like(output[0]),))
    with pytest.raises(InputError, match="a replay of the first samples has other log-probabilities"):
        train("grpo", pipe, tmp_path, config_of("grpo", **SHORT), eval_prompts=(), eval_rewards=())
    assert not list((tmp_path / "checkpoints").glob("step-*"))


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("method", "options", "measured"),
    [
        ("grpo", {"kl_every": 3, "eval_steps": 100}, [1, 3, 5]),
        ("grpo", {"kl_every": 100, "eval_steps": 2}, [1, 2, 4, 5]),
        ("grpo", {"kl_every": 0, "eval_steps": 2}, []),
        ("ddpo", {"kl_every": 0}, []),
        ("grpo", {"kl_every": 0, "kl_weight": 0.1}, [1, 2, 3, 4, 5]),
        ("grpo", {"kl_every": 0, "kl_budget_nats": 1e9}, [1, 2, 3, 4, 5]),
        ("prdp", {"kl_every": 0}, [1, 2, 3, 4, 5]),
        ("reward-backprop", {"kl_every": 2, "eval_steps": 100}, [1, 2, 4, 5]),
    ],
)
def test_the_reference_is_evaluated_only_where_it_is_needed(
    method: str, options: dict[str, Any], measured: list[int], pipe: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """Counted by its context: once for each update that logs the KL, or whose loss or guard needs it."""
    entered: list[None] = []
    inside = LoRA.reference
    monkeypatch.setattr(LoRA, "reference", lambda self: (entered.append(None), inside(self))[1])
    config = config_of(method, **SHORT | {"max_steps": 5, "save_steps": 2} | options)
    result = train(method, pipe, tmp_path, config, eval_prompts=(), eval_rewards=())
    assert [record["step"] for record in result.records if "kl" in record] == measured
    assert len(entered) == len(measured)


def test_the_last_update_before_an_evaluation_logs_the_kl_in_later_iterations_too(pipe: Any, tmp_path: Path) -> None:
    """Rollouts of two batches, in two iterations: updates 4 and 8 learn from the last batch of their rollout."""
    options = {"num_iterations": 2, "steps_per_generation": 2, "max_steps": 9, "kl_every": 100, "eval_steps": 4}
    config = config_of("grpo", **SHORT | options | {"save_steps": 100})
    result = train("grpo", pipe, tmp_path, config, eval_prompts=(), eval_rewards=())
    assert {1, 4, 8, 9} <= {record["step"] for record in result.records if "kl" in record} < set(range(1, 10))


@pytest.mark.hard
def test_a_rollout_without_references_resumes_bit_for_bit(tmp_path: Path) -> None:
    """Four updates of one rollout, interrupted after some of them, against an uninterrupted run."""
    options = SHORT | {"max_steps": 4, "steps_per_generation": 4, "save_steps": 1, "kl_every": 0}
    plain = {"eval_prompts": (), "eval_rewards": ()}
    whole = train("grpo", fresh(), tmp_path / "whole", config_of("grpo", **options), **plain)
    train("grpo", fresh(), tmp_path / "parted", config_of("grpo", **options | {"max_steps": 2}), **plain)
    parted = train("grpo", fresh(), tmp_path / "parted", config_of("grpo", **options), **plain)
    one, other = (load_file(result.weights) for result in (whole, parted))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def constant(images: torch.Tensor, prompts: Any) -> torch.Tensor:
    return torch.full((len(images),), 0.25)


def broken(images: torch.Tensor, prompts: Any) -> torch.Tensor:
    return torch.full((len(images),), float("nan"))


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (constant, "reward 'constant' gave all 2 samples of every prompt the same score"),
        (broken, "reward 'broken' returned nan for image 0"),
    ],
)
def test_a_constant_or_broken_reward_is_refused(reward: Any, message: str, pipe: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        train("prdp", pipe, tmp_path, config_of("prdp", **SHORT), reward=reward)


@pytest.mark.parametrize(
    ("method", "changed", "message"),
    [
        ("prdp", {"num_generations": 1}, "num_generations must be at least 2, got 1"),
        ("prdp", {"timestep_fraction": 0.5}, "timestep_fraction must be 1, got 0.5"),
        ("grpo", {"mixed_precision": "fp16"}, "mixed_precision fp16 needs a GPU"),
        ("grpo", {"log_with": ("nonesuch",)}, "log_with nonesuch"),
        ("grpo", {"lora_target_modules": ("nonesuch",)}, "no layer named nonesuch"),
    ],
)
def test_impossible_settings_are_refused_before_sampling(
    method: str, changed: dict[str, Any], message: str, pipe: Any, tmp_path: Path
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("the denoiser was called")

    pipe.unet.register_forward_pre_hook(never)
    with pytest.raises(InputError, match=message):
        train(method, pipe, tmp_path, config_of(method, **SHORT | changed))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_steps", 0), ("train_batch_size", 0), ("num_iterations", 0),
        ("micro_batch", 0), ("eta", 0.0), ("eta", 1.1),
        ("timestep_fraction", 0.0), ("learning_rate", 0.0), ("learning_rate", float("inf")), ("ema_decay", 1.0),
        ("lora_rank", -1), ("guidance_scale", float("nan")), ("max_grad_norm", 0.0), ("early_stopping_patience", -1),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"{name} must be"):
        TrainingConfig(**{name: value})


def test_an_existing_run_is_resumed_only_on_request_and_with_the_same_settings(pipe: Any, tmp_path: Path) -> None:
    config = config_of("grpo", **SHORT)
    first = train("grpo", pipe, tmp_path, config, resume=False)
    assert first.step == 3
    with pytest.raises(InputError, match=r"holds a run already: resume it .* or choose another output_dir"):
        train("grpo", fresh(), tmp_path, config, resume=False)
    with pytest.raises(InputError, match=r"belongs to a run with another seed \(5 there, 1 here\)"):
        train("grpo", fresh(), tmp_path, config_of("grpo", **SHORT | {"seed": 1}))
    with pytest.raises(InputError, match="belongs to a run with another method"):
        train("filtered", fresh(), tmp_path, config_of("filtered", **SHORT))
    longer = train("grpo", fresh(), tmp_path, config_of("grpo", **SHORT | {"max_steps": 4}))
    assert longer.step == 4 and longer.records[:3] == first.records


def test_a_corrupt_checkpoint_is_skipped_with_a_warning(
    pipe: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of("grpo", **SHORT | {"max_steps": 2, "save_steps": 1})
    train("grpo", pipe, tmp_path, config)
    weights = tmp_path / "checkpoints" / "step-00000002" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0\1"[-1:])
    with caplog.at_level(logging.WARNING):
        result = train("grpo", fresh(), tmp_path, config_of("grpo", **SHORT | {"max_steps": 3}))
    assert "skipped a checkpoint" in caplog.text and "weights.safetensors" in caplog.text
    assert [record["step"] for record in result.records] == [1, 2, 3]


def test_files_and_records_of_a_run(pipe: Any, tmp_path: Path) -> None:
    config = config_of("d3po", **SHORT | {"eval_steps": 2, "num_generations_eval": 2})
    recorder = Recorder()
    result = train("d3po", pipe, tmp_path, config, run_config={"mine": [1, "two"]}, callbacks=[recorder])
    evaluations = recorder.evaluations
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == list(result.records) == recorder.logs
    assert [json.loads(line)["step"] for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()] == [0, 2, 3]
    assert [one.step for one in evaluations] == [0, 2, 3]
    assert evaluations[0].images.shape == (4, 3, 8, 8) and evaluations[0].rewards.keys() == {"brightness", "colour:red"}
    assert json.loads((tmp_path / "checkpoints" / "step-00000003" / "config.json").read_text()) == {"mine": [1, "two"]}
    assert {"loss", "reward", "reward_spread", "accuracy", "kl", "grad_norm", "seconds"} <= result.records[0].keys()


def test_pairs_of_d3po_share_the_initial_noise_but_not_the_noise_of_the_steps() -> None:
    rows = rows_of(("a", "b"), 2, 0, "update 0", shared_start=True)
    assert rows.prompts == ("a", "a", "b", "b")
    assert rows.starts[0] == rows.starts[1] != rows.starts[2] == rows.starts[3]
    assert len(set(rows.noises)) == 4
    assert len(set(rows_of(("a", "b"), 2, 0, "update 0", shared_start=False).starts)) == 4


def test_every_epoch_has_all_prompts_in_a_new_order() -> None:
    prompts = [str(number) for number in range(7)]
    turns = [prompts_at(7 * turn, 7, prompts, seed=3) for turn in range(20)]
    assert all(sorted(turn) == prompts for turn in turns)
    assert len(set(turns)) == 20
    assert prompts_at(5, 6, prompts, 3) == turns[0][5:] + turns[1][:4], "a batch may span two epochs"
    assert shuffled_at(5, 20, 7, 3) == [int(one) for turn in turns[:4] for one in turn][5:25]
    assert [shuffled_at(place, 1, 7, 3) for place in (13, 14)] == [[int(turns[1][6])], [int(turns[2][0])]]


def test_all_steps_are_chosen_equally_often_over_the_updates() -> None:
    assert chosen_steps(10, 1.0, 0, "update 0") == tuple(range(10))
    assert len(chosen_steps(10, 0.3, 0, "update 0")) == 3 and len(chosen_steps(10, 0.01, 0, "x")) == 1
    counts = torch.zeros(10)
    for update in range(1000):
        counts[list(chosen_steps(10, 0.5, 0, f"update {update}"))] += 1
    assert counts.min() > 430 and counts.max() < 570


def test_the_first_iteration_is_in_sampling_order() -> None:
    assert batch_order(3, 1, 0, 0) == (0, 1, 2)
    order = batch_order(3, 4, 0, 1)
    assert order[:3] == (0, 1, 2) and all(sorted(order[n : n + 3]) == [0, 1, 2] for n in (3, 6, 9))


def test_diversity_and_intervals_by_hand() -> None:
    images = torch.zeros(4, 3, 2, 2)
    images[1] = 0.5  # 0.5 from its neighbour; the other pair is one image twice
    assert diversity(images, 2) == pytest.approx(0.25)
    assert diversity(images, 1) == 0
    mean, low, high = interval(torch.tensor([0.0, 1.0]).repeat(200))
    assert mean == 0.5 and low == pytest.approx(0.451, abs=0.01) and high == pytest.approx(0.549, abs=0.01)


def test_without_held_out_prompts_nothing_is_evaluated(pipe: Any, tmp_path: Path) -> None:
    config = config_of("ddpo", **SHORT | {"num_generations": 1})
    result = train("ddpo", pipe, tmp_path, config, eval_prompts=(), eval_rewards=())
    assert result.evaluations == () and result.best_step is None and not (tmp_path / "best").exists()
    evaluator = D3POTrainer(pipe, "brightness").evaluator()
    assert (evaluator.prompts, evaluator.held_out) == ((), [])


def test_a_trained_pipeline_is_called_like_any_other(pipe: Any, tmp_path: Path) -> None:
    trainer = trainer_of("grpo", pipe, tmp_path, config_of("grpo", **SHORT))
    trainer.train()
    images = trainer("a star", num_inference_steps=2, height=8, width=8, output_type="pt").images
    assert images.shape == (1, 3, 8, 8)
    with pytest.raises(InputError, match="already has a LoRA named 'steer'"):
        train("grpo", pipe, tmp_path / "again", config_of("grpo", **SHORT))


def test_a_run_ended_by_early_stopping_stays_stopped_when_resumed(pipe: Any, tmp_path: Path) -> None:
    reward, honest = Rising([float(n) for n in range(100)]), Fooled([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    config = config_of("grpo", **SHORT | {"max_steps": 9, "early_stopping_patience": 2})
    first, again = (
        train("grpo", one, tmp_path, config, reward=reward, eval_rewards=[honest]) for one in (pipe, fresh())
    )
    assert again.step == first.step == 2 and again.stopped == first.stopped
    assert again.weights_step == first.weights_step == 0 and len(again.evaluations) == 3


def test_the_pipeline_has_the_exported_average_weights(pipe: Any, tmp_path: Path) -> None:
    train("grpo", pipe, tmp_path, config_of("grpo", **SHORT | {"ema_decay": 0.9, "warmup_steps": 0, "max_steps": 4}))
    there = load_file(tmp_path / "final" / "pytorch_lora_weights.safetensors")
    other = fresh()
    other.load_lora_weights(tmp_path / "final")
    call = {"num_inference_steps": 2, "height": 8, "width": 8, "output_type": "pt"}
    images = [one("a star", generator=torch.Generator().manual_seed(0), **call).images for one in (pipe, other)]
    assert torch.allclose(images[0], images[1], atol=1e-6)
    last = load_file(tmp_path / "checkpoints" / "step-00000004" / "weights.safetensors")
    assert max((a - b).abs().max() for a, b in zip(sorted_by_size(there), sorted_by_size(last), strict=True)) > 1e-4


def sorted_by_size(tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Tensors in one order for both files: diffusers renames them."""
    return [tensors[name] for name in sorted(tensors)]


class Endless:
    """A reward whose gradient is not a number."""

    name, differentiable = "endless", True

    def __call__(self, images: torch.Tensor, prompts: Any) -> torch.Tensor:
        zero = images.mean((1, 2, 3)) * 0
        return images.mean((1, 2, 3)) + zero.abs().sqrt()


@pytest.mark.few(1)
def test_a_nan_gradient_changes_no_weight(pipe: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the loss of update 1 is .*, its gradient as long as nan: lower"):
        train("reward-backprop", pipe, tmp_path, config_of("reward-backprop", **SHORT), reward=Endless())
    trained = [value for name, value in pipe.unet.named_parameters() if ".steer." in name]
    assert trained and all(value.isfinite().all() for value in trained)


def test_the_checkpoint_is_kept_when_a_callback_fails(pipe: Any, tmp_path: Path) -> None:
    class Fails:
        def on_log(self, args: Any, state: Any, control: Any, **details: Any) -> None:
            if state.global_step == 2:
                raise RuntimeError("the disk of the observer is full")

    with pytest.raises(RuntimeError, match="of the observer"):
        train("grpo", pipe, tmp_path, config_of("grpo", **SHORT), callbacks=[Fails()])
    assert (tmp_path / "checkpoints" / "step-00000002").is_dir()


def test_two_held_out_rewards_with_the_same_name_are_refused(pipe: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="eval_rewards: 'jpeg' is given twice"):
        train("grpo", pipe, tmp_path, config_of("grpo", **SHORT), eval_rewards=["jpeg", "jpeg"])
    with pytest.raises(InputError, match="early_stopping_patience compares a held-out reward"):
        train("grpo", pipe, tmp_path, config_of("grpo", **SHORT | {"early_stopping_patience": 2}), eval_rewards=[])


def test_an_unknown_argument_of_the_pipeline_is_refused_by_name(pipe: Any, tmp_path: Path) -> None:
    config = config_of("grpo", **SHORT | {"call": {"negative_promt": "dull"}})
    with pytest.raises(InputError, match="StableDiffusionPipeline takes no argument 'negative_promt'"):
        train("grpo", pipe, tmp_path, config)


def test_a_pipeline_of_several_stages_is_refused(tmp_path: Path) -> None:
    class Stages(type(fresh("wan"))):  # type: ignore[misc]
        """A pipeline whose denoisers have unusual names."""

    pipe = fresh("wan")
    pipe.__class__ = Stages
    pipe.first, pipe.second, pipe.transformer = pipe.transformer, pipe.transformer, None
    pipe.__dict__["components"] = {"first": pipe.first, "second": pipe.second}
    Stages.components = property(lambda self: self.__dict__["components"])
    with pytest.raises(InputError, match="Stages has denoisers of several stages, first and second: use one"):
        get_denoisers(pipe)


def test_variants_of_d3po_are_different_runs_and_pareto_needs_components(pipe: Any, tmp_path: Path) -> None:
    config = config_of("d3po", **SHORT | {"max_steps": 1})
    train("d3po", pipe, tmp_path, config)
    with pytest.raises(InputError, match=r"another trajectory \(False there, True here\)"):
        train("d3po", fresh(), tmp_path, replace(config, trajectory=True))
    with pytest.raises(InputError, match="pareto compares the components of a weighted sum of rewards, and 'bright"):
        train("d3po", pipe, tmp_path / "other", replace(config, pareto=True))


def test_resuming_from_weights_that_were_trained_already_is_refused(pipe: Any, tmp_path: Path) -> None:
    config = config_of("grpo", **SHORT | {"lora_rank": 0})
    train("grpo", pipe, tmp_path, config)
    with pytest.raises(InputError, match="belongs to a run with another weights"):
        train("grpo", pipe, tmp_path, config_of("grpo", **SHORT | {"lora_rank": 0, "max_steps": 5}))


@pytest.mark.hard
def test_an_interrupted_rollout_does_not_change_the_state_of_the_method(pipe: Any, tmp_path: Path) -> None:
    """DDPO records the rewards of the first update of a rollout before the second is sampled."""
    config = config_of("ddpo", max_steps=4, eval_steps=100, ema_decay=0.0)
    whole = train("ddpo", fresh(), tmp_path / "whole", config, eval_prompts=(), eval_rewards=())
    calls = 0

    def hook(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3 + 9:  # 2 chunks of 3 steps and the reference's 2 × 2 are the first update; this is in the second
            os.kill(os.getpid(), signal.SIGTERM)

    pipe.unet.register_forward_pre_hook(hook)
    stopped = train("ddpo", pipe, tmp_path / "stopped", config, eval_prompts=(), eval_rewards=())
    assert stopped.stopped == "interrupted" and stopped.step == 0
    resumed = train("ddpo", fresh(), tmp_path / "stopped", config, eval_prompts=(), eval_rewards=())
    assert [record["loss"] for record in resumed.records] == [record["loss"] for record in whole.records]


@pytest.mark.few(1)
@pytest.mark.parametrize("last_steps", [1, 2, 3])
def test_penalties_of_reward_backpropagation_are_evaluated_at_the_samples(last_steps: int, tmp_path: Path) -> None:
    """Against one graph over the replayed steps; the reward is constant, so only penalties have a gradient."""
    pipe = fresh()
    trained = LoRA(pipe, 2)
    for parameter in trained.parameters.values():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    sampler = Sampler(pipe, {"num_inference_steps": 5, "height": 8, "width": 8})
    stored, _ = sampler.rollout(rows_of(("a star",), 2, 0, "x", shared_start=False))
    steps = list(range(4))[-last_steps:]
    with trained.reference():
        reference = reference_of(sampler, stored, steps)
    batch = Batch([stored], [reference], steps, torch.zeros(1, 2))

    def backward(loss: torch.Tensor) -> None:
        if loss.requires_grad:
            loss.backward()

    class FlatConfig:
        name, differentiable = "flat", True

        def __call__(self, images: torch.Tensor, prompts: Any) -> torch.Tensor:
            return 0 * images.mean((1, 2, 3))

    _, metrics = reward_gradient(
        sampler,
        batch,
        FlatConfig(),
        last_steps,
        penalties={kl: 0.5},
        on_policy=True,
        backward=backward,
        on_chunk=lambda: None,
    )
    grads = {name: p.grad.clone() for name, p in trained.parameters.items()}
    for parameter in trained.parameters.values():
        parameter.grad = None
    terms = []
    sampler.replay(
        stored, lambda t, p, x_s: terms.append(p.kl(reference.kernel(steps.index(t), p, x_s))), steps, grad=True
    )
    (0.5 * torch.stack(terms).sum(0).mean()).backward()
    for name, parameter in trained.parameters.items():
        assert torch.allclose(grads[name], parameter.grad, rtol=1e-4, atol=1e-6 * grads[name].abs().max().item()), name
    assert metrics["kl"] == pytest.approx(torch.stack(terms).sum(0).mean().item(), rel=1e-5)
    assert metrics["kl_per_step"] == pytest.approx(metrics["kl"] / last_steps)
