"""Everything on a fake accelerator: no mixed devices, no fallback to the CPU, the numbers of the CPU."""

import copy
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PIPELINES, PROMPT, cached_pipe, with_scheduler
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from fake_devices import CPU, DEVICE, fake_devices
from finetune_runs import METHODS, config_of, train
from pairwise import covering, hard_but
from rollouts import TWO_PROMPTS, call_of, fresh_pipe
from soft_rewards import Soft, likeness, own_kwargs, seeded
from test_preview import tiny
from tiny_rewards import tiny_specifications
from torch import Tensor

from steer import (
    BestOfNPipeline,
    FKSteeringPipeline,
    NoiseSearchPipeline,
    ReNOPipeline,
    SelectionPipeline,
    SteeringOutput,
)
from steer.apps.evaluation.run import Contender, evaluate
from steer.diffusion.value import LearnedValue, ValueNet
from steer.pipelines.initial_noise import screen_initial_noise
from steer.pipelines.reno import ZeroOrder
from steer.reward import score
from steer.rewards import REWARDS
from steer.rewards.parser import load_reward
from steer.smc.potentials import POTENTIALS, TEMPERINGS
from steer.smc.resampling import RESAMPLERS
from steer.training.rollout import Sampler, log_probs

CLOSE = {"rtol": 1e-3, "atol": 1e-4}


@pytest.fixture(autouse=True)
def accelerator() -> Iterator[None]:
    with fake_devices():
        yield


def there(name: str = "sd", scheduler: Any = None) -> Any:
    pipe = copy.deepcopy(cached_pipe(name))
    if scheduler is not None:
        pipe = with_scheduler(pipe, scheduler.from_config(pipe.scheduler.config))
    pipe.to(DEVICE)
    return pipe


class Placed(Soft):
    """A differentiable reward that keeps the devices of the images that it was given."""

    def __init__(self) -> None:
        super().__init__(likeness)
        self.devices: set[torch.device] = set()

    def __call__(self, images: Tensor, prompts: Any) -> Tensor:
        self.devices.add(images.device)
        return super().__call__(images, prompts)


def same(method: Callable[..., Any], name: str = "sd", scheduler: Any = None, **options: Any) -> None:
    """A method gives on the accelerator what it gives on the CPU, and scores there."""
    call: dict[str, Any] = own_kwargs(name, 5) | {"num_particles": 4, "output_type": "pt"} | options
    here = cached_pipe(name)
    if scheduler is not None:
        here = with_scheduler(here, scheduler.from_config(here.scheduler.config))
    made: list[SteeringOutput] = []
    for pipe, device in ((here, CPU), (there(name, scheduler), DEVICE)):
        if isinstance(call.get("preview"), torch.nn.Module):
            call["preview"] = copy.deepcopy(call["preview"]).to(device)
        reward = Placed()
        made.append(method(pipe, reward)(**call, generator=seeded()))
        assert reward.devices == {device}
        assert made[-1].latents.device == device and made[-1].images.device == device
        assert made[-1].rewards.device == CPU and made[-1].log_weights.device == CPU
    torch.testing.assert_close(made[1].rewards, made[0].rewards, **CLOSE)
    torch.testing.assert_close(made[1].images.cpu(), made[0].images, **CLOSE)


def two_heads() -> LearnedValue:
    """An untrained value of latents of four channels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LearnedValue(ValueNet(8, 8, heads=2), {}, [1.0, -2.0])


FK: dict[str, dict[str, Any]] = {
    f"{potential}, {resampler}, {tempering}": {"potential": potential, "resampler": resampler, "tempering": tempering}
    for (potential, resampler), tempering in zip(
        itertools.product(POTENTIALS, RESAMPLERS), itertools.cycle(TEMPERINGS), strict=False
    )
}
# Where a tensor lies is decided in each of them alone: every value once, other combinations are hard.
OTHERS = [*FK]
for number in reversed(covering([tuple(one.values()) for one in FK.values()], strength=1)):
    del OTHERS[number]
OTHERS += ["guided", "guided, every step", "guided, tiny preview", "asynchronous_rewards"]  # below with another option
FK |= {
    "every step": {"resample_steps": range(4), "ess_threshold": 1.0},
    "guided": {"reward_guidance": 1.0},
    "guided, every step": {"reward_guidance": 0.5, "eta": 1.0, "ess_threshold": 1.0},
    "linear preview": {"preview": "linear"},
    "tiny preview": {"preview": tiny()},
    "guided, tiny preview": {"reward_guidance": 1.0, "preview": tiny()},
    "particle schedule": {"particle_schedule": {1: 3, 3: 2}},
    "particle schedule of the best": {"particle_schedule": {2: 1}, "particle_schedule_rule": "top_k"},
    "guided particle schedule": {"reward_guidance": 1.0, "particle_schedule": {2: 2}},
    "target": {"target_reward": -100.0, "resample_steps": [1]},
    "asynchronous_rewards": {"asynchronous_rewards": True, "ess_threshold": 1.0},
    "overlap, particle schedule": {"asynchronous_rewards": True, "particle_schedule": {2: 2}},
    "stochastic": {"eta": 0.7},
    "two prompts": {"prompt": [PROMPT, "a star"]},
    "small chunks": {"chunk_size": 3},
    "guided by a value": {
        "value": two_heads(),
        "reward_guidance": 1.0,
        "particle_schedule": {2: 2},
    },
}


@pytest.mark.few(2)
@pytest.mark.parametrize("name", hard_but(FK, *(FK.keys() - OTHERS)))
def test_feynman_kac(name: str) -> None:
    same(FKSteeringPipeline, lam=30.0, **FK[name])


@pytest.mark.few(1)
@pytest.mark.parametrize("family", PIPELINES)
def test_feynman_kac_of_every_family(family: str) -> None:
    same(FKSteeringPipeline, family, lam=30.0, ess_threshold=1.0)


@pytest.mark.hard
@pytest.mark.parametrize("family", hard_but(PIPELINES, "flux"))
def test_guided_feynman_kac_of_every_family(family: str) -> None:
    same(FKSteeringPipeline, family, lam=30.0, reward_guidance=1.0)


@pytest.mark.few(1)
@pytest.mark.parametrize("scheduler", [DDPMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_feynman_kac_of_other_solvers(scheduler: Any) -> None:
    same(FKSteeringPipeline, "sd", scheduler, lam=30.0, ess_threshold=1.0)


@pytest.mark.few(1)
@pytest.mark.parametrize("options", [{}, {"beams": 2}, {"lam": 5.0, "beams": 2}, {"preview": "linear"}], ids=str)
def test_selection_and_beam_search(options: dict[str, Any]) -> None:
    same(SelectionPipeline, **options)


def test_best_of_n_and_its_previews() -> None:
    same(BestOfNPipeline)
    same(BestOfNPipeline, preview_steps=[1, 3])


RENO: dict[str, dict[str, Any]] = {
    "sgd": {},
    "adam": {"optimiser": "adam"},
    "zero-order": {"gradient": ZeroOrder(directions=2)},
    "restarts": {"patience": 1, "restarts": 1, "lr": 100.0},
    "small chunks": {"chunk_size": 1},
    "adam, small chunks": {"optimiser": "adam", "chunk_size": 1},
}


@pytest.mark.few(1)
@pytest.mark.parametrize("name", hard_but(RENO, "zero-order", "restarts", "adam, small chunks"))
@pytest.mark.parametrize("family", hard_but(["sd", "flux"], "sd"))
def test_noise_optimisation(name: str, family: str) -> None:
    one_step = {"num_inference_steps": 1, "guidance_scale": 0.0}
    same(ReNOPipeline, family, **one_step, num_particles=2, iterations=2, **RENO[name])


@pytest.mark.hard
def test_noise_search() -> None:
    same(NoiseSearchPipeline, num_particles=2, iterations=2, neighbours=2)


@pytest.mark.hard
def test_an_optimisation_resumes_there(tmp_path: Path) -> None:
    call = own_kwargs("sd", 1) | {"guidance_scale": 0.0, "num_particles": 2, "output_type": "pt"}
    call |= {"state_file": tmp_path / "state.safetensors"}
    ReNOPipeline(there(), Placed())(**call, iterations=2, generator=seeded())
    more = ReNOPipeline(there(), Placed())(**call, iterations=2, generator=seeded())
    assert more.latents.device == DEVICE


def test_screened_starts() -> None:
    call = own_kwargs("sd", 4) | {"keep": 3, "candidates": 7, "steps": 2}
    screened = [
        screen_initial_noise(pipe, Placed(), **call, generator=seeded(4)) for pipe in (cached_pipe("sd"), there())
    ]
    assert screened[1].noise.device == DEVICE and torch.equal(screened[0].chosen, screened[1].chosen)


@pytest.mark.few(1)
@pytest.mark.parametrize("family", hard_but(PIPELINES, "sd", "sd3", "wan"))
def test_rollouts_replay_to_the_same_densities(family: str) -> None:
    stored, images = Sampler(there(family), call_of(family), eta=1.0).rollout(TWO_PROMPTS)
    plain, expected = Sampler(cached_pipe(family), call_of(family), eta=1.0).rollout(TWO_PROMPTS)
    assert images.device == DEVICE and stored.latents.device == CPU
    torch.testing.assert_close(images.cpu(), expected, **CLOSE)
    again = log_probs(Sampler(there(family), call_of(family), eta=1.0), stored)
    torch.testing.assert_close(again, stored.log_probs, **CLOSE)
    torch.testing.assert_close(stored.log_probs, plain.log_probs, rtol=1e-2, atol=1e-2)


@pytest.mark.hard
@pytest.mark.parametrize("method", hard_but(METHODS, "grpo"))
def test_updates_and_evaluations(method: str, tmp_path: Path) -> None:
    """Held-out rewards see images of the accelerator; metrics are those of the CPU."""
    settings, results = config_of(method, max_steps=1, warmup_steps=0, eval_steps=1, micro_batch=4), []
    for device in (DEVICE, CPU):
        pipe, placed = fresh_pipe("sd"), Placed()
        pipe.to(device)
        results.append(train(method, pipe, tmp_path / device.type, settings, eval_rewards=[placed]))
        assert placed.devices == {p.device for p in pipe.unet.parameters()} == {device}
    for one, other in zip(*(result.evaluations for result in results), strict=True):
        assert one["step"] == other["step"]
        assert one["eval/brightness"] == pytest.approx(other["eval/brightness"], rel=0.02)


@pytest.mark.hard
def test_a_training_resumes_there(tmp_path: Path) -> None:
    for steps in (2, 3):
        pipe = fresh_pipe("sd")
        pipe.to(DEVICE)
        settings = config_of("grpo", max_steps=steps, warmup_steps=0, save_steps=1)
        assert train("grpo", pipe, tmp_path, settings).step == steps


@pytest.mark.hard
def test_all_weights_and_gradient_checkpointing(tmp_path: Path) -> None:
    pipe = fresh_pipe("sd")
    pipe.to(DEVICE)
    settings = config_of("grpo", max_steps=2, lora_rank=0, gradient_checkpointing=True, learning_rate=1e-5)
    assert train("grpo", pipe, tmp_path, settings).step == 2


@pytest.fixture(scope="session")
def specifications(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return tiny_specifications(tmp_path_factory.mktemp("tiny"))


OF_IMAGES = [name for name, (_, about) in REWARDS.items() if not about.startswith("of texts")]
# They need a file, a folder or an optional package, and have tests of their own.
ELSEWHERE = ("social", "sandbox", "geneval", "nsfw", "faces", "brisque", "lpips")


PLACED = [name for name in OF_IMAGES if name not in (*ELSEWHERE, "ocr")] + [pytest.param("ocr", marks=pytest.mark.hard)]


@pytest.mark.few(3)
@pytest.mark.parametrize("name", PLACED)
def test_every_built_in_reward_scores_where_the_images_are(name: str, specifications: dict[str, str]) -> None:
    """And the same there, with gradients, and after images of the CPU, which leave its weights in place."""
    reward, images = load_reward(specifications.get(name, name)), torch.rand(2, 3, 16, 16, generator=seeded())
    prompts = ['a sign that says "A"', 'the words "two stars"'] if name == "ocr" else ["a red circle", "two stars"]
    expected = score(reward, images, prompts).detach()
    pixels = images.to(DEVICE).requires_grad_(reward.differentiable)
    actual = score(reward, pixels, prompts)
    torch.testing.assert_close(actual.detach(), expected, **CLOSE)
    if reward.differentiable:
        actual.sum().backward()
        assert pixels.grad is not None and pixels.grad.device == DEVICE and pixels.grad.isfinite().all()
    torch.testing.assert_close(score(reward, images, prompts).detach(), expected, **CLOSE)
    for part in vars(reward).values():
        for module in part if isinstance(part, list) else [part]:
            if isinstance(module, torch.nn.Module):
                assert {p.device for p in module.parameters()} == {DEVICE}


@pytest.mark.parametrize(
    "text", ["min(brightness, colour:red)", "brightness:0.5 + jpeg:0.1", "clip:scenes + scene-soft:2"]
)
def test_composed_rewards(text: str) -> None:
    images, prompts = torch.rand(2, 3, 32, 32, generator=seeded()), ["a red circle", "two blue stars"]
    expected = score(load_reward(text), images, prompts)
    torch.testing.assert_close(score(load_reward(text), images.to(DEVICE), prompts), expected, **CLOSE)


@pytest.mark.hard
def test_an_evaluation_runs_and_judges_there(tmp_path: Path) -> None:
    cached_pipe("sd").save_pretrained(tmp_path / "tiny")
    placed = Placed()
    contenders = [
        Contender(str(tmp_path / "tiny"), None, method, {"particles": 2}, method) for method in ("base", "fk", "svdd")
    ]
    options = {"steps": 3, "guidance": 3.0, "dtype": "float32", "lam": 10.0}
    report = evaluate(
        contenders, ["a star"], ["brightness", placed], 1, tmp_path / "out", options, device=str(DEVICE), kl_prompts=0
    )
    assert len(report["contenders"]) == 3 and placed.devices == {DEVICE}
