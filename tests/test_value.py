"""Learned values: against the closed form of a Gaussian chain, their cost, and the models that they fit."""

import copy
import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Steer, cached_pipe, call_kwargs, with_scheduler
from diffusers import DDIMScheduler
from gaussian import TOTAL, GaussianPipeline, check_tilted, steered_gaussians
from schedulers import DIFFUSION
from soft_rewards import redness, seeded
from torch import Tensor

from steer import FKSteeringPipeline, InputError, RacingPipeline, SelectionPipeline, train_value
from steer.arguments import IMAGES_PER_PROMPT
from steer.diffusion.step_hooks import SolverStep, hook_steps
from steer.diffusion.value import hashed_words, load_value, model_fingerprint, warn_once
from steer.pipelines.training.value import Runs, ValueConfig, fit, rollout_prompts
from steer.training.supervised import read_state

STEPS, K = 5, 4
CALL = {name: value for name, value in call_kwargs("sd", K, STEPS).items() if name not in IMAGES_PER_PROMPT}
SMALL = ValueConfig(rollouts=16, updates=3, batch_size=8, width=8)


def chain() -> GaussianPipeline:
    return GaussianPipeline(DDIMScheduler(clip_sample=False, timestep_spacing="trailing"))


def first_pixel(solver_step: SolverStep, prompts: Sequence[str]) -> Tensor:
    assert len(prompts) == len(solver_step.x)
    return solver_step.x.flatten(1)[:, 0]


def test_a_learned_value_is_the_closed_form_of_a_chain(tmp_path: Path) -> None:
    """E[Σ x0 | x_t] of a linear chain is linear in Σ x_t, with coefficients from its transitions."""
    pipe, call = chain(), {"num_inference_steps": 6, "eta": 0.3}
    config = ValueConfig(rollouts=1024, num_particles=128, updates=200, batch_size=64, width=8, learning_rate=5e-3)
    value = train_value(pipe, TOTAL, ["", "a"], tmp_path, config, call)
    transitions, visited = pipe.transitions(6, 0.3), {}

    def record(solver_step: SolverStep) -> None:
        visited[solver_step.k] = (solver_step.x.double(), value(solver_step, [""] * len(solver_step.x)).double())

    with hook_steps(pipe, record) as view:
        view(batch_size=500, generator=seeded(9), **call)
    for step in range(5):
        x, guess = visited[step]
        for gain, shift, _ in transitions[step:]:
            x = gain * x + shift
        truth = x.sum((1, 2, 3))
        assert 1 - (guess - truth).square().sum() / (truth - truth.mean()).square().sum() > 0.98, step


@pytest.mark.parametrize("potential", ["difference", "max"])
def test_the_law_is_exact_whatever_the_value(potential: str) -> None:
    pipe = chain()
    outs = list(steered_gaussians(pipe, 4, value=first_pixel, potential=potential, resample_steps=[3, 6]))
    check_tilted(outs, *pipe.distribution(10, 1.0))


def test_a_value_takes_the_place_of_intermediate_rewards_and_costs_no_decoding() -> None:
    pipe, call = cached_pipe("sd"), CALL | {"num_particles": K, "output_type": "pt", "value": first_pixel}
    runs: dict[Any, dict[str, Any]] = {
        FKSteeringPipeline: {"resample_steps": [1, 2], "lam": 20.0},
        SelectionPipeline: {"select_steps": [1, 2], "beams": 2},
        RacingPipeline: {"rungs": {1: 2, 2: 1}},
    }
    for method, options in runs.items():
        rewards_at: dict[int, Tensor] = {}

        def record(report: Any, rewards_at: dict[int, Tensor] = rewards_at) -> None:
            if report.evaluation is not None:
                rewards_at[report.step] = report.evaluation.rewards
                assert report.previews is None

        out = method(pipe, redness)(generator=seeded(), on_step=record, **call | options)
        left = out.rewards.shape[1]
        nfe = K * 2 + 2 * 1 + 1 * (STEPS - 3) if method is RacingPipeline else K * STEPS
        assert (out.cost.nfe, out.cost.decodes, out.cost.reward_calls) == (nfe, left, left)
        assert set(rewards_at) == {1, 2} and out.rewards[0, 0] == out.rewards.max()
        if method is RacingPipeline:  # the highest values of step 1 continue
            assert out.ancestors[0][0].tolist() == sorted(rewards_at[1][0].topk(2).indices.tolist())


def test_without_a_value_of_its_rows_nothing_is_computed() -> None:
    pipe = cached_pipe("sd")
    with pytest.raises(InputError, match="value: expected 4 finite numbers"):
        FKSteeringPipeline(pipe, redness)(value=lambda step, prompts: torch.zeros(3), num_particles=K, **CALL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lookahead": 2}, "value and lookahead exclude each other"),
        ({"asynchronous_rewards": True}, "asynchronous_rewards and value exclude each other"),
        ({"target_reward": 1.0}, "target_reward and value exclude each other"),
        ({"value": 3}, "value must be a folder of `steer value train`, or a function, got int"),
        ({"value": "no-such-folder"}, "value no-such-folder: no learned value"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        FKSteeringPipeline(cached_pipe("sd"), redness)(num_particles=K, **CALL | {"value": first_pixel} | options)


def test_a_look_ahead_given_to_a_race_beside_a_value_is_refused() -> None:
    """Also the number that a race without a value would take."""
    with pytest.raises(InputError, match="value and lookahead exclude each other"):
        RacingPipeline(cached_pipe("sd"), redness)(num_particles=K, **CALL | {"value": first_pixel, "lookahead": 6})


def test_a_training_resumes_and_its_value_fits_its_model_alone(tmp_path: Path) -> None:
    pipe, call = cached_pipe("sd"), {name: value for name, value in CALL.items() if name != "prompt"}
    value = train_value(pipe, redness, ["a", "b c"], tmp_path, SMALL, call)
    rollouts = {path: path.stat().st_mtime_ns for path in (tmp_path / "rollouts").iterdir()}
    assert len(value.config["r2"]["redness"]) == STEPS and rollouts
    again = train_value(pipe, redness, ["a", "b c"], tmp_path, SMALL, call)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "rollouts").iterdir()} == rollouts
    for one, other in zip(value.net.parameters(), again.net.parameters(), strict=True):
        assert torch.equal(one, other)
    for reward, prompt in ((redness, "other"), (blueness, "a")):
        with pytest.raises(InputError, match="holds a value of other rewards, prompts or settings"):
            train_value(pipe, reward, [prompt, "b c"], tmp_path, SMALL, call)
    loaded = load_value(str(tmp_path), pipe)
    steps: list[SolverStep] = []
    with hook_steps(pipe, steps.append) as view:  # type: ignore[arg-type]
        view(**call_kwargs("sd", 2, STEPS), generator=seeded())
    torch.testing.assert_close(loaded(steps[1], ["a", "a"]), value(steps[1], ["a", "a"]))
    assert (value(steps[1], ["a", "a"]) - value(steps[1], ["b c", "a"]))[0] != 0
    with pytest.raises(InputError, match="trained on another model"):
        load_value(tmp_path, cached_pipe("sd3"))
    config = json.loads((tmp_path / "value.json").read_text()) | {"reward": "another"}
    (tmp_path / "value.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="checksum mismatch"):
        load_value(tmp_path, pipe)


def blueness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images[:, 2].mean((1, 2))


def test_a_value_of_another_reward_is_refused_and_one_of_another_call_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe, call = cached_pipe("sd"), {name: value for name, value in CALL.items() if name != "prompt"}
    trained = train_value(pipe, redness, ["a"], tmp_path, SMALL, call)
    runs: dict[Any, dict[str, Any]] = {
        FKSteeringPipeline: {"resample_steps": [1]},
        SelectionPipeline: {"select_steps": [1]},
        RacingPipeline: {"rungs": {1: 1}},
    }

    def warnings_of(reward: Any = redness, method: Any = FKSteeringPipeline, value: Any = tmp_path, **own: Any) -> str:
        caplog.clear()
        warn_once.cache_clear()
        method(pipe, reward)("a", num_particles=2, value=value, **runs[method] | call | own)
        return caplog.text

    for method, value in itertools.product(runs, (tmp_path, trained)):
        with pytest.raises(InputError, match="trained for reward 'redness', got reward 'blueness': train one for it"):
            warnings_of(blueness, method, value)
        assert warnings_of(method=method, value=value) == ""
    assert "trained for reward 'redness', which cannot be compared with reward '<lambda>'" in warnings_of(
        lambda images, prompts: images[:, 0].mean((1, 2))
    )
    assert "num_inference_steps 5, got 7: it may rank badly" in warnings_of(num_inference_steps=7)
    assert "guidance_scale" in (logged := warnings_of(guidance_scale=1.0)) and "num_inference_steps" not in logged
    other = with_scheduler(pipe, DIFFUSION["EulerDiscrete"]())
    FKSteeringPipeline(other, redness)("a", num_particles=2, value=tmp_path, resample_steps=[1], **call)
    assert "scheduler" in caplog.text and "got EulerDiscreteScheduler" in caplog.text
    config = json.loads((tmp_path / "value.json").read_text())
    assert config["use"] == {
        "num_inference_steps": STEPS,
        "guidance_scale": CALL["guidance_scale"],
        "scheduler": type(pipe.scheduler).__name__,
    }


def test_the_fingerprint_survives_half_precision() -> None:
    pipe = cached_pipe("sd")
    own = model_fingerprint(pipe)
    rounded = own.bfloat16().float()
    assert (rounded - own).norm() < 0.003 * own.norm()
    assert len(model_fingerprint(cached_pipe("controlnet"))) > len(own)  # ControlNets count too


def test_words_and_pairs_of_words_are_read() -> None:
    assert len(hashed_words("a red circle")) == 3 + 2 and len(hashed_words("")) == 1
    assert set(hashed_words("red star").tolist()) != set(hashed_words("star red").tolist())


def test_prompts_take_turns() -> None:
    config = ValueConfig(rollouts=40, num_particles=4)
    assert rollout_prompts(3, config) == [[0, 1, 2, 0, 1, 2, 0, 1], [2, 0]]


def test_r2_is_one_minus_the_share_of_the_variance() -> None:
    def net(features: Tensor, ratio: Tensor, words: Any) -> Tensor:
        return features[:, :2, 0, 0]

    features = torch.tensor([[0.0, 1.0, 2.0, 3.0], [5.0, 5.0, 5.0, 9.0]]).T.view(1, 4, 2, 1, 1)
    rewards = torch.tensor([[0.0, 1.0, 2.0, 4.0], [5.0, 5.0, 5.0, 9.0]]).T
    spread = (rewards[:, 0] - 1.75).square().sum()
    runs = Runs(features, torch.zeros(1), rewards, [hashed_words("a")] * 4)
    assert runs.unexplained(net).tolist() == [[pytest.approx(float(1 / spread))], [0.0]]  # type: ignore[arg-type]


def planted_runs(count: int, noise: float) -> Runs:
    """Runs of two steps; the reward is the mean of x̂0 in one channel, and noise that the prompts tell apart."""
    features = torch.randn(2, count, 2, 4, 4, generator=seeded(3))
    rewards = features[1, :, 1].mean((1, 2))[:, None] + noise * torch.randn(count, 1, generator=seeded(4))
    return Runs(features, torch.tensor([1.0, -1.0]), rewards, [hashed_words(f"{n} {n}") for n in range(count)])


@pytest.mark.hard
def test_the_weights_are_those_of_the_least_held_out_error(tmp_path: Path) -> None:
    train, choose, measure = planted_runs(128, noise=1.0).split(64, 96)
    config = ValueConfig(rollouts=64, updates=400, batch_size=32, width=8, learning_rate=3e-3)
    net, updates = fit(train, choose, config, tmp_path)
    assert updates < 400 and updates % 10 == 0
    last = load_last(tmp_path, net)
    assert float(train.unexplained(last).mean()) < 0.5 * float(train.unexplained(net).mean())  # known by heart
    for held_out in (choose, measure):
        assert float(held_out.unexplained(net).mean()) < float(held_out.unexplained(last).mean())


def load_last(folder: Path, net: Any) -> Any:
    """The network after all updates."""
    last = copy.deepcopy(net)
    last.load_state_dict(read_state(folder / "state.pt", torch.device("cpu"))["states"][0])
    return last


def test_a_diverged_training_is_one_line(tmp_path: Path) -> None:
    train, choose = planted_runs(32, noise=float("nan")).split(16)
    with pytest.raises(InputError, match="the value has no finite error: lower --learning-rate"):
        fit(train, choose, ValueConfig(rollouts=16, updates=2, batch_size=8, width=8), tmp_path)


@pytest.mark.hard
def test_the_command_trains_a_value_that_steering_and_foresight_read(steer: Steer, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red star\ntwo blue circles\n")
    folder, small = tmp_path / "value", ["--rollouts", 32, "--updates", 5, "--width", 8]
    prompts, steps = ["--prompts", tmp_path / "prompts.txt"], ["--steps", 6]
    code, out, _ = steer(
        "value", "train", "scenes", "--reward", "scene-soft + jpeg:0.1", *prompts, *steps, *small, "--out", folder
    )
    assert code == 0 and "32 rollouts, R² of held-out ones by step:" in out
    assert [line.split(":")[0] for line in out.splitlines() if line.startswith("  ")] == ["  scene-soft", "  jpeg"]
    code, out, _ = steer(
        *("sample", "a red star", "--method", "fk", "--lam", 5, "--value", folder, *steps, "--out", tmp_path / "out")
    )
    assert code == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["cost"]["decodes"] == 4 and report["settings"]["value"] == str(folder)
    image = next((tmp_path / "out").glob("*/00.png"))
    code, _, error = steer("sample", "--replay", image, "--out", tmp_path / "again")
    assert code == 2 and "add --value with a file that you trust" in error
    code, out, error = steer("sample", "--replay", image, "--value", folder, "--out", tmp_path / "again")
    assert code == 0, error
    code, out, _ = steer(
        *("foresight", "scenes", "--reward", "scene-soft", *prompts, *steps, "--at", "1,2", "--lookahead", 1),
        *("--value", folder, "--out", tmp_path / "foresight"),
    )
    assert code == 0 and f"| value {folder} |" in out
    shutil.rmtree(folder / "rollouts")
    code, _, error = steer("sample", "a red star", "--model", "scenes-turbo", "--method", "beam", "--value", folder)
    assert code == 2 and "trained on another model" in error
