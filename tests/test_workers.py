"""Rollouts and rewards by Ray actors."""

import importlib.util
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from finetune_runs import PROMPTS, config_of, train
from test_conditions import SOURCES, img2img
from test_finetune_run import SHORT, fresh
from test_trainable import image
from test_training_options import PLAIN, TIMES
from torch import Tensor

from steer import (
    TEXT_MODELS,
    GRPOConfig,
    GRPOTrainer,
    MaskedDiffusionPipeline,
    NFTConfig,
    NFTTrainer,
    RewardBackpropConfig,
    combine,
    load_reward,
)
from steer.errors import InputError
from steer.pipelines.training import config as config_module
from steer.pipelines.training import signals as signals_module
from steer.pipelines.training import workers as workers_module
from steer.pipelines.training.workers import (
    RayReward,
    num_workers,
    store,
    worker_processes,
)
from steer.reward import score_components, takes_videos, with_metadata, with_timeout
from steer.rewards.compose import map_plain, plain_rewards

SMALL = SHORT | {"warmup_steps": 0, "max_steps": 3, "eval_steps": 9, "ema_decay": 0.0, "micro_batch": 2}
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")


class Constant:
    """A constant in place of a reward with workers."""

    name, differentiable = "jpeg", False

    def __call__(self, images: Tensor, prompts: Any) -> Tensor:
        return torch.full((len(images),), 7.0)


def test_workers_take_the_place_of_a_component() -> None:
    images, prompts = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), ["a", "b"]
    reward = combine({"brightness": 2, "jpeg": 0.5})
    wrapped = with_metadata(with_timeout(reward, 60), {"a": {}})
    assert set(plain_rewards(wrapped)) == {"brightness", "jpeg"}
    replaced = map_plain(wrapped, lambda one: Constant() if one.name == "jpeg" else one)
    total, components = score_components(replaced, images, prompts)
    own, before = score_components(wrapped, images, prompts)
    assert components["jpeg"].tolist() == [7.0, 7.0] and torch.equal(components["brightness"], before["brightness"])
    torch.testing.assert_close(total, 2 * before["brightness"] + 3.5)
    assert torch.equal(own, score_components(reward, images, prompts)[0]), "the reward itself is unchanged"
    assert replaced.name == reward.name and num_workers(wrapped) == num_workers(replaced) == 0


def test_workers_get_whole_videos_where_their_reward_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_module, "store", lambda value, name: value)
    monkeypatch.setattr(workers_module, "actor_of", lambda kind, share: SimpleNamespace(remote=kind))
    of_videos = Constant()
    of_videos.takes_videos = True  # type: ignore[attr-defined]
    assert [takes_videos(workers_module.RayReward(one, 1, "cpu", 0.0)) for one in (Constant(), of_videos)] == [
        False,
        True,
    ]


class Local:
    """A reward of this process that two threads must not compute at once."""

    name, differentiable = "local", False

    def __init__(self) -> None:
        self.active, self.most, self.calls = 0, 0, 0

    def __call__(self, images: Tensor, prompts: Any) -> Tensor:
        self.active += 1
        self.most, self.calls = max(self.most, self.active), self.calls + 1
        time.sleep(0.05)
        self.active -= 1
        return images.mean((1, 2, 3))


@pytest.fixture
def meeting(monkeypatch: pytest.MonkeyPatch) -> RayReward:
    """A reward of two fake actors, whose calls return when both are computing."""
    barrier, brightness = threading.Barrier(2, timeout=20), load_reward("brightness")

    def score(images: Tensor, prompts: list[str], metadata: Any) -> Any:
        return lambda: (barrier.wait(), brightness(images, prompts))[1]

    actor = SimpleNamespace(score=SimpleNamespace(remote=score))
    monkeypatch.setattr(workers_module, "store", lambda value, name: value)
    monkeypatch.setattr(workers_module, "actor_of", lambda kind, share: SimpleNamespace(remote=lambda *given: actor))
    monkeypatch.setattr(workers_module, "result", lambda pending: pending())
    return RayReward(brightness, 2, "cpu", 0.0)


@pytest.mark.hard
@pytest.mark.parametrize("constrained", [False, True])
def test_workers_of_one_component_compute_at_once_and_the_others_in_turn(
    constrained: bool, meeting: RayReward, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A sum with a component of this process, or a constraint on it, which is computed in this process too."""
    records = []
    for name, first in (("plain", load_reward("brightness")), ("workers", meeting)):
        local = Local()
        config = GRPOConfig(
            output_dir=str(tmp_path / name), max_steps=1, train_batch_size=2, num_generations=4, micro_batch=2,
            num_inference_steps=3, lora_rank=2, call={"height": 8, "width": 8},
            constraints={"local": ">= 9"} if constrained else {},
        )  # fmt: skip
        monkeypatch.setattr(signals_module, "load_reward", lambda text, local=local: local)
        reward = first if constrained else combine({first: 1.0, local: 2.0})
        trainer = GRPOTrainer(fresh(), reward, config, train_prompts=PROMPTS)
        assert num_workers(trainer.scored_reward()) == (2 if first is meeting else 0)
        records += [{k: v for k, v in one.items() if k not in TIMES} for one in trainer.train().records]
        assert (local.calls, local.most) == (4, 1)
    assert records[0] == records[1] and "reward/local" in records[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GRPOConfig(reward_workers={"jpeg": 0}), "counts from 1, got jpeg: 0"),
        (lambda: GRPOConfig(reward_workers={"jpeg": True}), "counts from 1, got jpeg: True"),
        (lambda: GRPOConfig(rollout_workers=-1), "rollout_workers must be at least 0, got -1"),
        (lambda: RewardBackpropConfig(reward_workers={"jpeg": 1}), "reward_workers return no gradients"),
    ],
)
@needs_ray
def test_counts_that_make_no_sense_are_one_line(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_without_ray_its_installation_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_module, "find_spec", lambda name: None)
    GRPOConfig()
    for options in ({"rollout_workers": 2}, {"reward_workers": {"jpeg": 1}}):
        with pytest.raises(InputError, match=r"need Ray: pip install 'steer-diffusion\[ray\]'"):
            GRPOConfig(**options)  # type: ignore[arg-type]


@needs_ray
def test_workers_of_an_unknown_reward_are_one_line(tmp_path: Path) -> None:
    config = config_of("grpo", **SMALL | {"reward_workers": {"brightnes": 1}})
    with pytest.raises(InputError, match="no reward is named 'brightnes': did you mean brightness"):
        train("grpo", fresh(), tmp_path, config)


class InProcess:
    """An actor in this process: what it is given and returns is pickled, as for another machine."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __getattr__(self, name: str) -> Any:
        def remote(*given: Any) -> Any:
            return pickle.loads(pickle.dumps(getattr(self._value, name)(*pickle.loads(pickle.dumps(given)))))

        return SimpleNamespace(remote=remote)


@pytest.fixture
def fake_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = SimpleNamespace(put=lambda value: value, get=lambda value: value, kill=lambda actor: None)
    monkeypatch.setitem(sys.modules, "ray", ray)  # type: ignore[arg-type]
    monkeypatch.setattr(config_module, "find_spec", lambda name: True)
    monkeypatch.setattr(workers_module, "_connection", lambda: nullcontext(ray))
    monkeypatch.setattr(workers_module, "store", lambda value, name: deepcopy(value))
    monkeypatch.setattr(workers_module, "result", lambda pending: pending)
    actors = lambda kind, share: SimpleNamespace(remote=lambda *given: InProcess(kind(*given)))  # noqa: E731
    monkeypatch.setattr(workers_module, "actor_of", actors)


WORKERS = {"rollout_workers": 1, "reward_workers": {"brightness": 1}}


def test_workers_draw_and_score_texts(fake_ray: None, tmp_path: Path) -> None:
    records = []
    for name, options in (("one", {}), ("two", WORKERS | {"reward_workers": {"says:blue": 1}})):
        config = GRPOConfig(
            output_dir=str(tmp_path / name), max_steps=2, train_batch_size=1, num_generations=8, micro_batch=4,
            num_inference_steps=4, lora_rank=0, **options,
        )  # fmt: skip
        pipe = MaskedDiffusionPipeline.from_pretrained(TEXT_MODELS["scenes-text"])
        result = GRPOTrainer(pipe, "says:blue", config, train_prompts=["a"]).train()
        records.append([{k: v for k, v in one.items() if k not in TIMES} for one in result.records])
    assert records[0] == records[1]


def test_workers_draw_with_the_conditions_of_each_prompt(fake_ray: None, tmp_path: Path) -> None:
    records = []
    for name, options in (("one", {}), ("two", WORKERS)):
        config = GRPOConfig(
            output_dir=str(tmp_path / name), max_steps=1, train_batch_size=2, num_generations=2, micro_batch=4,
            num_inference_steps=6, lora_rank=2, call={"strength": 0.5}, **options,
        )  # fmt: skip
        given: dict[str, Any] = {"train_prompts": ["a", "b"], "conditions": list(SOURCES.values())}
        result = GRPOTrainer(img2img(), "brightness", config, **given).train()
        records.append([{k: v for k, v in one.items() if k not in TIMES} for one in result.records])
    assert records[0] == records[1]


def end(actor: Any) -> None:
    """Kill the process of an actor, as a machine that fails does."""
    import ray

    os.kill(ray.get(actor.__ray_call__.remote(lambda self: os.getpid())), signal.SIGKILL)


class Killing:
    """A callback that kills a worker of rollouts after the first update, and one of rewards after the second."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.killed = 0

    def on_log(self, args: Any, state: Any, control: Any, **details: Any) -> None:
        if args.rollout_workers and self.killed < 2:
            actors = (self.trainer.workers.actors, self.trainer.reward.actors)[self.killed]
            self.killed += 1
            end(actors[0])


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    ray.init(num_cpus=4, include_dashboard=False, logging_level="warning")
    yield
    ray.shutdown()


@pytest.mark.hard
@needs_ray
def test_two_workers_that_die_give_the_run_of_one_process(cluster: None, tmp_path: Path) -> None:
    from finetune_runs import trainer_of

    weights, records, killing = [], [], Killing()
    for name, workers in (("one", {}), ("two", {"rollout_workers": 2, "reward_workers": {"brightness": 2}})):
        pipe = fresh()
        trainer = trainer_of(
            "grpo", pipe, tmp_path / name, config_of("grpo", **SMALL | workers), callbacks=[killing], **PLAIN
        )
        killing.trainer, reward = trainer, trainer.reward
        result = trainer.train()
        assert trainer.reward is reward and trainer.workers is None
        records.append([{k: v for k, v in one.items() if k not in TIMES} for one in result.records])
        weights.append({key: value.clone() for key, value in pipe.unet.state_dict().items()})
    assert killing.killed == 2
    assert records[0] == records[1]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


@pytest.mark.hard
@needs_ray
def test_a_pipeline_and_a_reward_arrive_as_they_are(cluster: None) -> None:
    import ray

    pipe, reward = fresh(), combine({"brightness": 2, "jpeg": 0.5})
    images = [image(one) for one in (pipe, ray.get(store(pipe, "pipe")))]
    assert torch.equal(*images)
    scores = [one(images[0], ["a"] * len(images[0])) for one in (reward, ray.get(store(reward, "reward")))]
    assert torch.equal(*scores)
    locked = Constant()
    locked.lock = threading.Lock()  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="jpeg cannot be sent to Ray workers"):
        store(locked, "jpeg")


@pytest.mark.hard
@needs_ray
def test_workers_draw_by_the_averaged_policy(cluster: None, tmp_path: Path) -> None:
    """DiffusionNFT draws by an average of the weights, with the pipeline's own solver."""
    shared = {"max_steps": 3, "train_batch_size": 2, "num_generations": 2, "micro_batch": 2, "num_inference_steps": 3}
    shared |= {"call": {"height": 8, "width": 8}, "lora_rank": 2, "learning_rate": 0.01, "old_decay_rate": 0.4}
    rewards = []
    for name, workers in (("one", 0), ("two", 2)):
        config = NFTConfig(output_dir=str(tmp_path / name), rollout_workers=workers, **shared)  # type: ignore[arg-type]
        result = NFTTrainer(fresh(), "brightness", config, train_prompts=PROMPTS).train()
        rewards.append([(record["reward"], record["loss"]) for record in result.records])
    assert rewards[0] == rewards[1]


@pytest.mark.hard
@needs_ray
def test_an_error_of_a_worker_is_the_error_of_the_run(cluster: None, tmp_path: Path) -> None:
    class Broken:  # a local class travels by value
        name, differentiable = "broken", False

        def __call__(self, images: Tensor, prompts: Any) -> Tensor:
            raise ZeroDivisionError("mine")

    config = config_of("grpo", **SMALL | {"reward_workers": {"broken": 1}})
    with pytest.raises(InputError, match="reward 'broken' failed: ZeroDivisionError"):
        train("grpo", fresh(), tmp_path, config, reward=Broken(), **PLAIN)


def test_a_trainer_without_workers_is_left_alone(tmp_path: Path) -> None:
    from finetune_runs import trainer_of

    trainer = trainer_of("grpo", fresh(), tmp_path, config_of("grpo", **SMALL))
    before = dict(vars(trainer))
    with worker_processes(trainer):
        assert vars(trainer) == before
