"""ReNO against the published loop, a batch against single runs, and returned noise against returned images."""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PIPELINES, PROMPT, cached_pipe, call_kwargs, with_scheduler
from diffusers import LCMScheduler
from safetensors.torch import load_file
from soft_rewards import Soft, Sum, images_of, in_precision, likeness, models_of, own_kwargs, redness, seeded
from tiny_rewards import tiny_open_clip
from torch import Tensor, nn

from steer import ReNOPipeline
from steer.diffusion.preview import first_output
from steer.noise import Nesterov
from steer.pipelines.reno import Backprop
from steer.rewards.parser import load_reward

FAMILIES = [name for name in PIPELINES if name != "img2img"]
REWARD = Soft(likeness)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
PROMPTS = ["a red circle", "a blue star", "two stars", "red", "a star left of a circle", "", "circle", "blue"]
OPTIMISERS: dict[str, Callable[[float, list[Tensor]], torch.optim.Optimizer]] = {
    "sgd": lambda lr, leaves: torch.optim.SGD(leaves, lr=lr, momentum=0.9, nesterov=True),
    "adam": lambda lr, leaves: torch.optim.Adam(leaves, lr=lr),
}


def wavy(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """A reward that large steps often miss."""
    return torch.sin(10 * likeness(images, prompts))


def lcm(name: str = "sd") -> Any:
    pipe = cached_pipe(name)
    return with_scheduler(pipe, LCMScheduler.from_config(pipe.scheduler.config))


def published(
    pipe: Any, latents: Tensor, optimiser: torch.optim.Optimizer, iterations: int, weight: float, call: dict[str, Any]
) -> dict[str, list[Any]]:
    """The loop of the paper for one image, on the pipeline's own call with its no_grad taken off."""
    run, reference, size = inspect.unwrap(type(pipe).__call__), {"reward": [], "norm": [], "noise": []}, latents.numel()
    for _ in range(iterations):
        output = run(pipe, **call, latents=latents, generator=[seeded()], output_type="pt")
        reward = likeness(first_output(output), [PROMPT])[0]
        length = latents.norm()
        loss = -reward + weight * (length**2 / 2 - (size - 1) * length.log())
        for name, value in {"reward": reward, "norm": length / size**0.5, "noise": latents}.items():
            reference[name].append(value.detach().clone())
        optimiser.zero_grad()
        loss.backward(inputs=[latents])
        nn.utils.clip_grad_norm_([latents], 0.1)
        optimiser.step()
    reference["noise"].append(latents.detach().clone())
    return reference


@pytest.mark.few(2)
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize(
    ("name", "steps", "rule", "lr", "weight"),
    [
        ("sd", 1, "sgd", 5.0, 0.01),
        ("sd", 1, "sgd", 0.3, 0.5),
        ("sd", 2, "adam", 0.05, 0.01),
        ("sd3", 2, "sgd", 1.0, 0.1),
        ("flux", 1, "adam", 0.05, 0.2),
    ],
)
def test_every_iteration_is_that_of_the_published_loop(
    tmp_path: Path, name: str, steps: int, rule: str, lr: float, weight: float, checkpointing: bool
) -> None:
    pipe, iterations = in_precision(cached_pipe(name)), 6
    for model in models_of(pipe).values():
        model.requires_grad_(False)
    call = own_kwargs(name, steps) | {"guidance_scale": 0.0}
    out = ReNOPipeline(pipe, REWARD)(
        **{"num_particles": 2, "iterations": iterations, "optimiser": rule, "lr": lr, "regularisation": weight},
        gradient=Backprop(checkpointing),
        generator=seeded(5),
        state_file=tmp_path / "state",
        **call,
    ).in_slot_order()
    last = load_file(tmp_path / "state")["search/noise"]
    shape = last.shape[1:]
    starts = images_of(pipe, **call_kwargs(name, 2, steps) | {"guidance_scale": 0.0}, generator=seeded(5))
    assert torch.allclose(likeness(starts, [PROMPT] * 2), out.trace[0].rewards[0], atol=1e-5)
    for row, first in enumerate(torch.randn((2, 4, 4, 4), generator=seeded(5))):
        packed = first if name != "flux" else first.view(4, 2, 2, 2, 2).permute(1, 3, 0, 2, 4).reshape(shape)
        leaf = nn.Parameter(packed[None].clone())
        reference = published(pipe, leaf, OPTIMISERS[rule](lr, [leaf]), iterations, weight, call)
        rewards, norms = torch.stack(reference["reward"]), torch.stack(reference["norm"])
        torch.testing.assert_close(torch.stack([one.rewards[0, row] for one in out.trace]), rewards, **CLOSE)
        torch.testing.assert_close(torch.stack([one.norms[0, row] for one in out.trace]), norms, **CLOSE)
        torch.testing.assert_close(torch.stack([one.best[0, row] for one in out.trace]), rewards.cummax(0).values)
        torch.testing.assert_close(last[row], reference["noise"][-1][0], **CLOSE)
        assert out.start is not None
        torch.testing.assert_close(out.start.noise[row], reference["noise"][int(rewards.argmax())][0], **CLOSE)
    assert (out.trace[-1].best > out.trace[0].best).all()


def test_the_defaults_are_the_published_numbers() -> None:
    run = ReNOPipeline(cached_pipe("sd"), REWARD)
    published_ones = {"optimiser": Nesterov(5.0, 0.9), "regularisation": 0.01, "max_grad_norm": 0.1}
    default = run(generator=seeded(), iterations=3, prompt=PROMPT, height=8, width=8)
    reference = run(
        generator=seeded(),
        iterations=3,
        gradient=Backprop(),
        **published_ones,
        **own_kwargs("sd") | {"guidance_scale": 0},
    )
    assert torch.equal(default.start.noise, reference.start.noise)
    assert inspect.signature(ReNOPipeline.__call__).parameters["iterations"].default == 50


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("name", "steps", "options"),
    [
        ("sd3", 1, {"iterations": 5}),
        ("lcm", 2, {"iterations": 5, "guidance_scale": 3.0}),
        ("lcm", 2, {"iterations": 12, "patience": 1, "restarts": 1, "lr": 1.0}),
        ("sd3", 1, {"iterations": 12, "patience": 1, "restarts": 2, "lr": 1.0}),
        ("sd3", 1, {"iterations": 12, "patience": 1, "lr": 1.0}),
    ],
    ids=["one step", "stochastic solver", "its restarts", "restarts", "patience"],
)
def test_a_batch_of_prompts_gives_each_what_it_gets_alone(name: str, steps: int, options: dict[str, Any]) -> None:
    reward = Soft(wavy) if "patience" in options else REWARD
    run = ReNOPipeline(lcm() if name == "lcm" else cached_pipe(name), reward)
    call = own_kwargs("sd" if name == "lcm" else name, steps) | {"output_type": "pt", "guidance_scale": 0.0}
    call |= {"gradient": Backprop(checkpointing=False)} | options
    batched = run(**call | {"prompt": PROMPTS}, generator=[seeded(i) for i in range(8)])
    ends = set()
    for row in range(0, 8, 2 if name == "lcm" else 1):
        single = run(**call | {"prompt": PROMPTS[row]}, generator=seeded(row))
        for ours, theirs in zip(single.trace, batched.trace, strict=False):
            torch.testing.assert_close(ours.rewards[0], theirs.rewards[row], **CLOSE)
            torch.testing.assert_close(ours.norms[0], theirs.norms[row], **CLOSE)
        torch.testing.assert_close(single.rewards[0], batched.rewards[row], **CLOSE)
        torch.testing.assert_close(single.trace[-1].best[0], batched.trace[-1].best[row], **CLOSE)
        torch.testing.assert_close(single.start.noise[0], batched.start.noise[row], **CLOSE)
        torch.testing.assert_close(single.images[0], batched.images[row], **CLOSE)
        ends.add(len(single.trace))
    assert len(ends) > 1 if "patience" in options else ends == {5}


# Flow models have no LCMScheduler of this kind.
SOLVED = [(name, "own") for name in FAMILIES] + [(name, "lcm") for name in ("sd", "sdxl", "controlnet")]


@pytest.mark.few(4)
@pytest.mark.parametrize("steps", [1, pytest.param(3, marks=pytest.mark.hard)])
@pytest.mark.parametrize(("name", "solver"), SOLVED)
def test_the_noise_makes_the_images_again_bit_for_bit(name: str, solver: str, steps: int) -> None:
    pipe = lcm(name) if solver == "lcm" else cached_pipe(name)
    out = ReNOPipeline(pipe, REWARD)(
        num_particles=2, iterations=2, generator=seeded(1), output_type="pt", **own_kwargs(name, steps)
    )
    for one in (out, out.in_slot_order()):
        assert torch.equal(images_of(pipe, **call_kwargs(name, 2, steps), **one.start.arguments()), one.images)
    latents = pipe(**call_kwargs(name, 2, steps), **out.start.arguments(), output_type="latent")
    assert torch.equal(first_output(latents), out.latents)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_everything_is_sorted_by_the_reward_together(output_type: str) -> None:
    reward = Sum(like=likeness, red=redness)
    run, call = ReNOPipeline(cached_pipe("flux"), reward), own_kwargs("flux") | {"prompt": PROMPTS[:2]}
    outs = {
        kind: run(num_particles=3, iterations=2, generator=seeded(2), output_type=kind, **call)
        for kind in ("pt", output_type)
    }
    out, other = outs["pt"], outs[output_type]
    asked = [prompt for prompt in PROMPTS[:2] for _ in range(3)]
    torch.testing.assert_close(out.components["like"].flatten(), likeness(out.images, asked))
    torch.testing.assert_close(out.components["red"].flatten(), redness(out.images, asked))
    torch.testing.assert_close(out.rewards, out.components["like"] + out.components["red"])
    assert (out.rewards.diff(dim=1) <= 0).all() and out.order[0].tolist() != [0, 1, 2] != out.order[1].tolist()
    torch.testing.assert_close(out.in_slot_order().rewards, out.trace[-1].best)
    for iteration in out.trace:
        torch.testing.assert_close(iteration.rewards, iteration.components["like"] + iteration.components["red"])
    again = images_of(cached_pipe("flux"), **call, num_images_per_prompt=3, **out.start.arguments())
    assert torch.equal(again, out.images)
    assert len(other.images) == 6 and torch.equal(other.rewards, out.rewards)
    assert torch.equal(other.start.noise, out.start.noise) and other.start.seeds == out.start.seeds


def test_latents_of_the_users_are_where_it_starts() -> None:
    latents = torch.randn(2, 4, 4, 4, generator=seeded(9))
    recorded: list[Tensor] = []
    ReNOPipeline(cached_pipe("sd"), REWARD)(
        num_particles=2,
        iterations=1,
        latents=latents,
        on_iteration=lambda iteration: recorded.append(iteration.images),
        **own_kwargs("sd"),
    )
    torch.testing.assert_close(recorded[0], images_of(cached_pipe("sd"), latents=latents, **call_kwargs("sd", 2, 1)))


@pytest.mark.parametrize(("name", "encoders"), [("sd", 1), ("sd3", 3), ("pixart", 1)])
def test_text_is_encoded_once_for_all_iterations(tmp_path: Path, name: str, encoders: int) -> None:
    pipe, counts = in_precision(cached_pipe(name)), {"text": 0, "reward": 0}

    def counter(key: str) -> Callable[..., None]:
        def count(*_: Any) -> None:
            counts[key] += 1

        return count

    texts = [model for key, model in models_of(pipe).items() if key.startswith("text_encoder")]
    for model in texts:
        model.register_forward_pre_hook(counter("text"))
    once = dict(counts)
    images_of(pipe, **call_kwargs(name, 2, 1))
    once, counts["text"] = dict(counts), 0
    reward = load_reward(f"clip:{tiny_open_clip(tmp_path / 'clip')}")
    reward.backbone.model.token_embedding.register_forward_pre_hook(counter("reward"))  # type: ignore[attr-defined]
    out = ReNOPipeline(pipe, reward)(num_particles=2, iterations=4, generator=seeded(), **own_kwargs(name))
    assert len(texts) == encoders and len(out.trace) == 4
    assert counts["text"] == once["text"]
    assert counts["reward"] == 1
    assert all(p.grad is None for model in models_of(pipe).values() for p in model.parameters())


def test_the_cost_is_what_was_done() -> None:
    cost = ReNOPipeline(cached_pipe("sd"), REWARD)(num_particles=3, iterations=4, **own_kwargs("sd", steps=2)).cost
    first, last = 3, 3 * 2  # one step to find the noise, and a run for the images
    assert cost.nfe == first + 4 * 3 * 2 + last
    assert (cost.decodes, cost.reward_calls, cost.gradients) == (4 * 3 + 3, 4 * 3 + 3, 3 * 3)  # the last takes no step
