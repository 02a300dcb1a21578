"""Rollouts and replays against diffusers' own sampling, closed forms, and each other."""

import functools
import weakref
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from conftest import PIPELINES, PROMPT, cached_pipe, with_scheduler
from gaussian import GaussianPipeline
from rollouts import TWO_PROMPTS, call_of, counted
from schedulers import BETAS, DETERMINISTIC, FLOW, STOCHASTIC
from soft_rewards import images_of, in_precision, models_of
from torch import Generator, Tensor, nn
from torch.distributions import Normal

from steer.diffusion.schedules import Gaussian
from steer.diffusion.seeds import seeded_normal
from steer.errors import InputError
from steer.training.rollout import Rows, Sampler, Trajectories, log_probs
from steer.training.trainable import get_denoiser

FAMILIES = list(PIPELINES)
SMALL = {"rtol": 1e-5, "atol": 1e-5}
SCHEDULERS: dict[str, tuple[str, Callable[[], Any]]] = {
    "DDIM": ("sd", DETERMINISTIC["DDIM"]),
    "DDIM-clipped": ("sd", DETERMINISTIC["DDIM-clipped"]),
    "DDPM": ("sd", STOCHASTIC["DDPM"]),
    "Euler": ("sd", DETERMINISTIC["EulerDiscrete"]),
    "Euler-karras": ("sdxl", DETERMINISTIC["EulerDiscrete-karras"]),
    "EulerAncestral": ("sd", STOCHASTIC["EulerAncestralDiscrete"]),
    "DPMSolverMultistep": ("sd", DETERMINISTIC["DPMSolverMultistep"]),
    "PNDM": ("sd", lambda: DETERMINISTIC["PNDM"](set_alpha_to_one=True)),
    "Heun": ("sd", DETERMINISTIC["HeunDiscrete"]),
    "LCM": ("sd", STOCHASTIC["LCM"]),
    "UniPC": ("pixart", DETERMINISTIC["UniPCMultistep"]),
    "FlowMatchEuler": ("sd3", FLOW["FlowMatchEulerDiscrete"]),
    "FlowMatchEuler-Wan": ("wan", FLOW["FlowMatchEulerDiscrete"]),
    "UniPC-flow": ("wan", FLOW["UniPCMultistep"]),
}


@functools.cache
def case(name: str) -> tuple[Sampler, Trajectories, Tensor]:
    sampler = Sampler(cached_pipe(name), call_of(name))
    return sampler, *sampler.rollout(TWO_PROMPTS)


def denoiser(pipe: Any) -> nn.Module:
    return get_denoiser(pipe)[1]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_replay_finds_the_same_densities(name: str) -> None:
    sampler, stored, images = case(name)
    transitions = 3 if name == "img2img" else 4
    assert stored.latents.shape[:2] == (4, transitions) and stored.log_probs.shape == (4, transitions - 1)
    assert stored.stochastic == tuple(range(transitions - 1))
    assert stored.elements == stored.latents[0, 0].numel()
    assert images.shape[0] == 4 and images.shape[-3] == 3 and 0 <= images.min() < images.max() <= 1
    assert stored.latents.isfinite().all() and stored.log_probs.isfinite().all()
    assert torch.equal(log_probs(sampler, stored), stored.log_probs)


@pytest.mark.few(3)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_depends_on_nothing_but_itself(name: str) -> None:
    sampler, stored, images = case(name)
    again, same = sampler.rollout(TWO_PROMPTS)
    assert torch.equal(again.latents, stored.latents) and torch.equal(same, images)
    order = [2, 0, 3]
    others = Rows(*(tuple(values[i] for i in order) for values in vars(TWO_PROMPTS).values()))
    for rows, batches in ((order, [others]), ([0, 1, 2, 3], TWO_PROMPTS.split(1))):
        components = [sampler.rollout(batch) for batch in batches]
        size = stored.latents[rows].abs().max()  # of Wan some hundreds
        ours = torch.cat([part.latents for part, _ in components])
        assert (ours - stored.latents[rows]).abs().max() / size <= 1e-5
        torch.testing.assert_close(torch.cat([pictures for _, pictures in components]), images[rows], **SMALL)


def test_seeds_and_prompts_matter_each_by_itself() -> None:
    sampler, _, _ = case("sd")
    rows = Rows((PROMPT, PROMPT, PROMPT, "a star"), (1, 1, 2, 1), (3, 4, 3, 3))
    stored, _ = sampler.rollout(rows)
    first = stored.latents[:, 0]
    assert all((first[0] - first[i]).abs().max() > 1e-3 for i in (1, 2, 3))
    kernels: list[Gaussian] = []
    sampler.replay(stored, lambda t, kernel, x_s: kernels.append(kernel), only=(0,))
    torch.testing.assert_close(kernels[0].mean[0], kernels[0].mean[1], rtol=0, atol=1e-6)  # x_T and prompt are the same


def test_rows_are_split_in_order() -> None:
    rows = Rows(("a", "b", "c"), (1, 2, 3), (4, 5, 6))
    assert rows.split(2) == [Rows(("a", "b"), (1, 2), (4, 5)), Rows(("c",), (3,), (6,))]
    assert rows.split(5) == [rows] and len(rows) == 3


@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_a_pipeline_of_known_densities(eta: float) -> None:
    """Every step of it is a Gaussian in closed form, and so are its samples."""
    pipe, count = GaussianPipeline(std=0.1), 2000
    sampler = Sampler(pipe, {"batch_size": count, "num_inference_steps": 6}, eta)
    rows = Rows(("",) * count, tuple(range(count)), tuple(range(count)))
    stored, images = sampler.rollout(rows)
    x = torch.cat([torch.randn(1, 3, 1, 1, generator=Generator().manual_seed(seed)) for seed in rows.starts])
    for k, (gain, shift, deviation) in enumerate(pipe.transitions(6, eta)[:-1]):
        kernel, x = Normal(gain * x.double() + shift, deviation), stored.latents[:, k]
        by_hand = kernel.log_prob(x).flatten(1).sum(1)
        torch.testing.assert_close(stored.log_probs[:, k], by_hand, rtol=1e-4, atol=1e-4)
    assert torch.equal(log_probs(sampler, stored), stored.log_probs)
    mean, deviation = pipe.distribution(6, eta)
    samples = images.double().flatten()
    assert abs(samples.mean().item() - mean) < 4 * deviation / len(samples) ** 0.5
    assert abs(samples.std().item() / deviation - 1) < 4 / (2 * len(samples)) ** 0.5


def plain_images(pipe: Any, call: dict[str, Any], rows: Rows, eta: float) -> Tensor:
    """Images of the pipeline's own call."""
    generators = [Generator().manual_seed(seed) for seed in rows.starts]
    return images_of(pipe, prompt=list(rows.prompts), generator=generators, eta=eta, **call).clamp(0, 1)


@pytest.mark.few(4)
@pytest.mark.parametrize("negative", [None, "a blue star"])
@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("name", ["sd", "img2img", "controlnet", "sdxl", "pixart"])
def test_diffusers_own_ddim_with_the_same_noise(
    name: str, eta: float, negative: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pipeline itself, its scheduler adding the noise that the rows' seeds stand for."""
    pipe, call = cached_pipe(name), call_of(name)
    path: list[Tensor] = []
    plain_step = diffusers.DDIMScheduler.step

    def step(self: Any, output: Tensor, t: Any, x: Tensor, eta: float, generator: Any, return_dict: bool) -> Any:
        z = seeded_normal(TWO_PROMPTS.noises, x, [f"step {len(path)}"] * 4)
        out = plain_step(self, output, t, x, eta, variance_noise=z, return_dict=return_dict)
        path.append(out[0])
        return out

    without, _ = Sampler(pipe, call, eta).rollout(TWO_PROMPTS)
    stored, images = Sampler(pipe, call | ({"negative_prompt": negative} if negative else {}), eta).rollout(TWO_PROMPTS)
    assert torch.equal(stored.latents, without.latents) == (negative is None)
    monkeypatch.setattr(diffusers.DDIMScheduler, "step", step)
    negatives = {"negative_prompt": [negative] * 4} if negative else {}
    truth = plain_images(pipe, call | negatives, TWO_PROMPTS, eta)
    torch.testing.assert_close(stored.latents, torch.stack(path, 1), **SMALL)
    torch.testing.assert_close(images, truth, **SMALL)


@pytest.mark.parametrize("kind", ["DDPM", "EulerAncestral"])
def test_diffusers_own_stochastic_solvers_with_the_same_noise(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = SCHEDULERS[kind][1]()
    pipe, call = with_scheduler(cached_pipe("sd"), scheduler), call_of("sd")
    _, images = Sampler(pipe, call).rollout(TWO_PROMPTS)
    steps = iter(range(4))

    def noise(shape: Any, **options: Any) -> Tensor:
        like = torch.empty(tuple(shape))
        return seeded_normal(TWO_PROMPTS.noises, like, [f"step {next(steps)}"] * 4)

    monkeypatch.setattr(__import__(type(scheduler).__module__, fromlist=["_"]), "randn_tensor", noise)
    truth = plain_images(pipe, call, TWO_PROMPTS, 0.0)
    torch.testing.assert_close(images, truth, **SMALL)


@pytest.mark.few(5)
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_every_solver(kind: str) -> None:
    name, scheduler = SCHEDULERS[kind]
    pipe = with_scheduler(cached_pipe(name), scheduler())
    sampler = Sampler(pipe, call_of(name, steps=5))
    stored, images = sampler.rollout(TWO_PROMPTS)
    assert stored.stochastic == (0, 1, 2, 3) and stored.latents.shape[1] == 5
    assert images.isfinite().all() and images.std() > 0.01
    again = log_probs(sampler, stored)
    assert torch.equal(again, stored.log_probs)
    for only in ((2,), (0, 3)):  # a multistep solver has seen nothing of the steps before
        columns = list(only)
        assert torch.equal(log_probs(sampler, stored, only)[:, columns], again[:, columns])
    standardised: list[Tensor] = []
    sampler.replay(stored, lambda t, kernel, x_s: standardised.append((x_s - kernel.mean) / kernel.std))
    for t, z in enumerate(standardised):
        expected = seeded_normal(TWO_PROMPTS.noises, z, [f"step {t}"] * 4)
        torch.testing.assert_close(z, expected, rtol=0, atol=1e-3)  # x_s of Euler's frame is rounded in its own size


@pytest.mark.parametrize(
    ("pipe", "eta", "message"),
    [
        (diffusers.DDIMInverseScheduler(**BETAS), 1.0, "DDIMInverseScheduler runs from data to noise"),
        (None, 0.0, "eta must be above 0 and at most 1, got 0.0: steps without noise have no density"),
        (None, -0.5, "eta must be above 0"),
        (None, 2.0, "eta must be above 0 and at most 1, got 2.0"),
        (None, float("nan"), "eta must be above 0"),
    ],
)
def test_what_has_no_density_is_refused(pipe: Any, eta: float, message: str) -> None:
    pipe = with_scheduler(cached_pipe("sd"), pipe) if pipe is not None else cached_pipe("sd")
    with pytest.raises(InputError, match=message):
        Sampler(pipe, call_of("sd"), eta)


def test_a_run_without_noise_is_refused() -> None:
    with pytest.raises(InputError, match="no step of this run has noise: there is nothing to learn"):
        Sampler(cached_pipe("sd"), call_of("sd", steps=1)).rollout(TWO_PROMPTS)


def test_a_last_step_with_noise_counts() -> None:
    """Stable Diffusion's own configuration ends at the first noise level, not at none."""
    scheduler = diffusers.DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    sampler = Sampler(with_scheduler(cached_pipe("sd"), scheduler), call_of("sd"))
    stored, _ = sampler.rollout(TWO_PROMPTS)
    assert stored.stochastic == (0, 1, 2, 3) and stored.log_probs.shape == (4, 4)
    assert torch.equal(log_probs(sampler, stored), stored.log_probs)


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["sd", "flux"])
def test_latents_in_half_precision_are_those_that_were_drawn(name: str, storage: torch.dtype) -> None:
    exact = case(name)[1]
    sampler = Sampler(cached_pipe(name), call_of(name), storage=storage)
    stored, _ = sampler.rollout(TWO_PROMPTS)
    assert stored.latents.dtype == storage and stored.log_probs.dtype == torch.float64
    replayed: list[Tensor] = []
    sampler.replay(stored, lambda t, kernel, x_s: replayed.append(x_s))
    assert all(
        x.dtype == torch.float32 and torch.equal(x, stored.latents[:, t].float()) for t, x in enumerate(replayed)
    )
    assert torch.equal(log_probs(sampler, stored), stored.log_probs)
    assert 0 < (stored.latents[:, 0].float() - exact.latents[:, 0]).abs().max() < 0.03
    assert not torch.equal(stored.log_probs, exact.log_probs)


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
def test_a_pipeline_in_half_precision(name: str) -> None:
    pipe = in_precision(cached_pipe(name), torch.bfloat16)
    sampler = Sampler(pipe, call_of(name))
    stored, images = sampler.rollout(TWO_PROMPTS)
    replayed: list[Tensor] = []
    sampler.replay(stored, lambda t, kernel, x_s: replayed.append(x_s))
    assert stored.latents.dtype == torch.float32 and images.dtype == torch.float32
    assert all(torch.equal(x.float(), stored.latents[:, t]) for t, x in enumerate(replayed))
    assert torch.equal(log_probs(sampler, stored), stored.log_probs)


@pytest.mark.parametrize("name", ["sd", "controlnet", "flux", "wan"])
def test_the_users_pipeline_is_left_as_it_is(name: str) -> None:
    pipe, call = cached_pipe(name), call_of(name)
    plain = dict(prompt=PROMPT, **call)
    before = images_of(pipe, **plain, generator=Generator().manual_seed(0))
    attributes, scheduler = dict(vars(pipe)), dict(vars(pipe.scheduler))
    flags = {key: [p.requires_grad for p in model.parameters()] for key, model in models_of(pipe).items()}
    components = dict(pipe.components)
    sampler = Sampler(pipe, call)
    stored, _ = sampler.rollout(TWO_PROMPTS)
    with pytest.raises(ZeroDivisionError):
        sampler.replay(stored, lambda t, kernel, x_s: 1 / 0, grad=True)  # type: ignore[arg-type, return-value]
    assert vars(pipe).keys() == attributes.keys() and all(vars(pipe)[key] is attributes[key] for key in attributes)
    assert vars(pipe.scheduler).keys() == scheduler.keys()
    assert all(vars(pipe.scheduler)[key] is scheduler[key] for key in scheduler)
    assert pipe.components.keys() == components.keys()
    assert all(pipe.components[key] is components[key] for key in components)
    for key, model in models_of(pipe).items():
        assert [p.requires_grad for p in model.parameters()] == flags[key]
        assert not model._forward_hooks and all(p.grad is None for p in model.parameters())
    assert torch.equal(images_of(pipe, **plain, generator=Generator().manual_seed(0)), before)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", FAMILIES)
def test_steps_that_are_not_asked_for_cost_no_call(name: str) -> None:
    sampler, stored, _ = case(name)
    with counted(denoiser(cached_pipe(name))) as calls:
        whole = log_probs(sampler, stored)
        each = len(calls) // stored.log_probs.shape[1]  # two a step where guidance takes its own call
        assert len(calls) == each * stored.log_probs.shape[1] and each in (1, 2)
        calls.clear()
        some = log_probs(sampler, stored, only=(1,))
        assert len(calls) == each
        calls.clear()
        assert not log_probs(sampler, stored, only=()).any() and not calls
        sampler.rollout(TWO_PROMPTS)
        assert len(calls) == each * stored.latents.shape[1]  # the gate is open again
    assert torch.equal(some[:, 1], whole[:, 1]) and not some[:, [0, *range(2, some.shape[1])]].any()


def test_after_an_error_the_denoiser_answers_again() -> None:
    sampler, stored, _ = case("sd")

    def fail(t: int, kernel: Gaussian, x_s: Tensor) -> None:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        sampler.replay(stored, fail, only=(1,))
    assert torch.equal(sampler.rollout(TWO_PROMPTS)[0].latents, stored.latents)


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_a_prepared_denoiser_is_called_instead(name: str) -> None:
    pipe, rows = cached_pipe(name), []

    def prepared(*args: Any, **kwargs: Any) -> Any:
        rows.append(1)
        return denoiser(pipe)(*args, **kwargs)

    sampler = Sampler(pipe, call_of(name), prepared={get_denoiser(pipe)[0]: prepared})
    stored, images = sampler.rollout(TWO_PROMPTS)
    assert len(rows) == 4
    assert torch.equal(stored.latents, case(name)[1].latents) and torch.equal(images, case(name)[2])
    log_probs(sampler, stored, only=(1,))
    assert len(rows) == 5


def test_text_is_encoded_once() -> None:
    pipe = cached_pipe("sd")
    sampler = Sampler(pipe, call_of("sd"))
    with counted(pipe.text_encoder) as calls:
        stored, _ = sampler.rollout(TWO_PROMPTS)
        first = len(calls)
        log_probs(sampler, stored)
        sampler.replay(stored, lambda t, kernel, x_s: None, grad=True)
    assert first == len(calls) == 2  # the prompts, and the empty one


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", ["sd", "flux", "pixart"])
def test_a_graph_where_it_is_asked_for_and_only_until_the_next_step(name: str, grad: bool) -> None:
    sampler, stored, _ = case(name)
    means: list[weakref.ref[Tensor]] = []
    outputs: list[weakref.ref[Tensor]] = []

    def look(t: int, kernel: Gaussian, x_s: Tensor) -> None:
        assert kernel.mean.requires_grad == grad and not kernel.std.requires_grad and not x_s.requires_grad
        assert len(means) == t and len(outputs) == t + 1
        assert not any(one() is not None for one in (*means, *outputs[:t]))
        means.append(weakref.ref(kernel.mean))
        if grad:
            kernel.log_prob(x_s).sum().backward()

    model = denoiser(cached_pipe(name))
    handle = model.register_forward_hook(lambda _, given, out: outputs.append(weakref.ref(out[0])))
    try:
        sampler.replay(stored, look, grad=grad)
        assert len(means) == 3 and any(p.grad is not None for p in model.parameters()) == grad
    finally:
        handle.remove()
        for parameter in model.parameters():
            parameter.grad = None


def test_images_are_within_bounds() -> None:
    pipe = GaussianPipeline(mean=1.0, std=0.1)
    seeds = tuple(range(10))
    stored, images = Sampler(pipe, {"batch_size": 10, "num_inference_steps": 6}).rollout(Rows(("",) * 10, seeds, seeds))
    assert stored.latents[:, -1].max() > 1
    assert torch.equal(images, stored.latents[:, -1].clamp(0, 1))


def test_arguments_that_the_pipeline_does_not_know() -> None:
    with pytest.raises(InputError, match="StableDiffusionPipeline takes no argument 'guidance'"):
        Sampler(cached_pipe("sd"), call_of("sd") | {"guidance": 3.0})
