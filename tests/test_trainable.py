"""LoRAs and full finetuning: initial state, reference and saved files."""

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PIPELINES, PROMPT
from diffusers import DiffusionPipeline, UNet2DConditionModel
from pairwise import hard_but
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from rollouts import TWO_PROMPTS, call_of, fresh_pipe, move
from safetensors.torch import load_file
from soft_rewards import images_of, models_of, seeded
from torch import Tensor

from steer.errors import InputError
from steer.training.gradient import Batch, reference_of, two_pass_gradient
from steer.training.guards import kl
from steer.training.losses import PRDP
from steer.training.rollout import Sampler, log_probs
from steer.training.trainable import FullFinetuning, LoRA, Trainable, get_denoiser

FAMILIES = list(PIPELINES)
FAR = 0.3  # deviation of weights that show in an image


def image(pipe: Any, name: str = "sd") -> Tensor:
    return images_of(pipe, prompt=PROMPT, **call_of(name, steps=2), generator=seeded())


@functools.cache
def base_image(name: str) -> Tensor:
    return image(fresh_pipe(name), name)


def differs(first: Tensor, second: Tensor) -> bool:
    return bool((first - second).abs().max() > 1e-4)


@pytest.mark.few(3)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_lora_begins_at_the_reference_and_can_go_back_to_it(name: str) -> None:
    pipe = fresh_pipe(name)
    trained = LoRA(pipe, 2)
    assert torch.equal(image(pipe, name), base_image(name))
    move(trained, FAR)
    there = image(pipe, name)
    assert differs(there, base_image(name))
    with trained.reference():
        assert torch.equal(image(pipe, name), base_image(name))
    assert torch.equal(image(pipe, name), there)
    with pytest.raises(RuntimeError, match="mine"), trained.reference():
        raise RuntimeError("mine")
    assert torch.equal(image(pipe, name), there)


@pytest.mark.few(3)
@pytest.mark.parametrize("name", FAMILIES)
def test_all_but_the_lora_is_frozen(name: str) -> None:
    pipe = fresh_pipe(name)
    pipe.vae.train()
    before = {key: copy.deepcopy(model.state_dict()) for key, model in models_of(pipe).items()}
    trained = LoRA(pipe, 2)
    ours = {id(parameter) for parameter in trained.parameters.values()}
    assert ours and trained.denoiser is get_denoiser(pipe)[1]
    for key, model in models_of(pipe).items():
        assert not model.training
        assert {id(p) for p in model.parameters() if p.requires_grad} == (ours if model is trained.denoiser else set())
        state = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
        assert all(torch.equal(state[name], value) for name, value in before[key].items())
    sides = {side: {n for n in trained.parameters if f".lora_{side}." in n} for side in "AB"}
    assert {n.replace("lora_A", "lora_B") for n in sides["A"]} == sides["B"]
    assert all(trained.parameters[n].any() for n in sides["A"])
    assert not any(trained.parameters[n].any() for n in sides["B"])
    assert all(trained.parameters[n].shape[0] == 2 for n in sides["A"])
    ends = {n.split(".lora_A")[0].split(".", 1)[-1].rsplit("attn", 1)[-1].split(".", 1)[-1] for n in sides["A"]}
    assert {"to_q", "to_k", "to_v"} <= ends <= {"to_q", "to_k", "to_v", "to_out.0"}


def test_the_seed_of_a_lora() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, same, other = (LoRA(fresh_pipe("sd"), 2, seed=seed).parameters for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)  # the caller's random state is unchanged
    assert first.keys() == same.keys() == other.keys()
    assert list(first) == list(same)
    for name in first:
        assert torch.equal(first[name], same[name])
        assert torch.equal(first[name], other[name]) == ("lora_B" in name)


def test_other_targets() -> None:
    names = set(LoRA(fresh_pipe("sd"), 3, targets=["ff.net.2"]).parameters)
    assert names and all(".ff.net.2.lora_" in name for name in names)


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "the rank of a LoRA must be at least 1, got 0"),
        ({"rank": -4}, "the rank of a LoRA must be at least 1, got -4"),
        ({"alpha": 0}, "the alpha of a LoRA must be above 0, got 0"),
        ({"alpha": -1.0}, "the alpha of a LoRA must be above 0"),
        ({"alpha": float("nan")}, "the alpha of a LoRA must be above 0"),
        ({"targets": ["to_nowhere", "nor_here"]}, "UNet2DConditionModel: no layer named to_nowhere, nor_here"),
        ({"targets": ["norm1"]}, "UNet2DConditionModel: no layer named norm1"),
    ],
)
def test_what_is_no_lora(options: dict[str, Any], message: str) -> None:
    pipe = fresh_pipe("sd")
    with pytest.raises(InputError, match=message):
        LoRA(pipe, **options)
    move(LoRA(pipe, 2), FAR)  # what was refused left nothing behind
    assert differs(image(pipe), base_image("sd"))


def test_a_pipeline_is_trained_once() -> None:
    pipe = fresh_pipe("sd")
    LoRA(pipe, 2)
    with pytest.raises(InputError, match="already has a LoRA named 'steer': reload the pipeline"):
        LoRA(pipe, 2)


def test_a_pipeline_without_a_denoiser() -> None:
    pipe = fresh_pipe("sd")
    pipe.unet = None
    with pytest.raises(InputError, match="StableDiffusionPipeline has no unet and no transformer"):
        LoRA(pipe, 2)


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["sd", "flux"])
def test_a_lora_in_half_precision_learns_in_fp32(name: str) -> None:
    pipe = fresh_pipe(name).to(torch.bfloat16)
    base = image(pipe, name)
    trained = LoRA(pipe, 2)
    assert all(p.dtype == torch.float32 for p in trained.parameters.values())
    frozen = [p for n, p in trained.denoiser.named_parameters() if n not in trained.parameters]
    assert all(p.dtype == torch.bfloat16 for p in frozen)
    assert torch.equal(image(pipe, name), base)
    move(trained, FAR)
    assert differs(image(pipe, name), base)
    with trained.reference():
        assert torch.equal(image(pipe, name), base)
    sampler = Sampler(pipe, call_of(name))
    stored, _ = sampler.rollout(TWO_PROMPTS)
    sampler.replay(stored, lambda t, kernel, x_s: kernel.log_prob(x_s).sum().backward(), grad=True)
    gradients = [p.grad for p in trained.parameters.values()]
    assert all(g is not None and g.dtype == torch.float32 and g.isfinite().all() and g.any() for g in gradients)


@pytest.fixture(scope="module")
def users_lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as `load_lora_weights` takes it, of targets that overlap with ours and of others."""
    other = LoRA(fresh_pipe("sd"), 3, targets=["to_q", "to_out.0", "ff.net.2"], seed=8)
    move(other, FAR, seed=8)
    folder = tmp_path_factory.mktemp("users")
    other.write(other.state(), folder)
    return folder


def with_own(folder: Path, change: Callable[[Any], None] = lambda pipe: None) -> DiffusionPipeline:
    pipe = fresh_pipe("sd")
    pipe.load_lora_weights(folder, adapter_name="own")
    change(pipe)
    return pipe


def load_second(pipe: Any) -> None:
    """Another one that is there, but not on."""
    weights = {f"unet.{k}": v for k, v in pipe.unet.state_dict().items() if ".lora_" in k}
    weights = {k.replace(".own.", "."): v + 1 for k, v in weights.items()}
    pipe.load_lora_weights(weights, adapter_name="second")
    pipe.set_adapters(["own"])


OWN_ADAPTERS: dict[str, Callable[[Any], None]] = {
    "as it is loaded": lambda pipe: None,
    "at half its weight": lambda pipe: pipe.set_adapters(["own"], [0.5]),
    "one of two": load_second,
    "fused": lambda pipe: (pipe.fuse_lora(), pipe.unload_lora_weights())[1],
    "switched off": lambda pipe: pipe.disable_lora(),
}


@pytest.mark.few(2)
@pytest.mark.parametrize("how", OWN_ADAPTERS)
def test_a_users_own_lora_belongs_to_the_reference(how: str, users_lora: Path, tmp_path: Path) -> None:
    pipe = with_own(users_lora, OWN_ADAPTERS[how])
    base = image(pipe)
    assert differs(base, base_image("sd")) == (how != "switched off")
    own = {name: p.clone() for name, p in pipe.unet.named_parameters() if ".own." in name}
    trained = LoRA(pipe, 2)
    assert torch.equal(image(pipe), base)
    move(trained, FAR)
    assert differs(image(pipe), base)
    with trained.reference():
        assert torch.equal(image(pipe), base)
    x, text = torch.randn(1, 4, 4, 4, generator=seeded()), torch.randn(1, 7, 16, generator=seeded(1))
    pipe.unet(x, 500, text).sample.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in trained.parameters.values())
    assert bool(own) == (how != "fused")
    after = dict(pipe.unet.named_parameters())
    assert not own.keys() & trained.parameters.keys()
    assert all(torch.equal(after[name], value) and not after[name].requires_grad for name, value in own.items())
    there = image(pipe)
    assert all("ff.net" not in key for key in load_file(trained.write(trained.state(), tmp_path)))
    again = with_own(users_lora, OWN_ADAPTERS[how])
    again.load_lora_weights(tmp_path, adapter_name="ours")
    if how in ("as it is loaded", "one of two"):
        again.set_adapters(["own", "ours"])
        torch.testing.assert_close(image(again), there, rtol=0, atol=1e-6)


@pytest.mark.few(3)
@pytest.mark.parametrize(("rank", "alpha"), [(2, None), (4, 1.0), (2, 8.0)])
@pytest.mark.parametrize("name", hard_but(["sd", "sdxl", "sd3", "flux", "wan"], "sd", "flux"))
def test_what_is_exported_loads_in_a_fresh_pipeline(name: str, rank: int, alpha: float | None, tmp_path: Path) -> None:
    pipe = fresh_pipe(name)
    trained = LoRA(pipe, rank, alpha)
    move(trained, FAR)
    there = image(pipe, name)
    folder = tmp_path / "not" / "there"
    assert trained.write(trained.state(), folder) == folder / "pytorch_lora_weights.safetensors"
    fresh = fresh_pipe(name)
    fresh.load_lora_weights(folder)
    assert differs(there, base_image(name))
    torch.testing.assert_close(image(fresh, name), there, rtol=0, atol=1e-6)
    assert torch.equal(image(pipe, name), there)  # and training can continue


def test_alpha_scales_a_lora() -> None:
    """W + (α/r) B A."""
    pipe = fresh_pipe("sd")
    trained = LoRA(pipe, 2, alpha=5.0)
    move(trained, FAR)
    (name, layer) = next((n, m) for n, m in pipe.unet.named_modules() if n.endswith("to_q"))
    a, b = (trained.parameters[f"{name}.lora_{side}.steer.weight"] for side in "AB")
    x = torch.randn(3, a.shape[1], generator=seeded())
    torch.testing.assert_close(layer(x), x @ (layer.base_layer.weight + 2.5 * b @ a).T, rtol=1e-5, atol=1e-5)


def test_where_a_pipeline_knows_no_loras_peft_does(tmp_path: Path) -> None:
    pipe = fresh_pipe("pixart")
    trained = LoRA(pipe, 2, alpha=3.0)
    move(trained, FAR)
    there = image(pipe, "pixart")
    assert trained.write(trained.state(), tmp_path) == tmp_path / "adapter_model.safetensors"
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_alpha"] == 3.0
    fresh = fresh_pipe("pixart")
    inject_adapter_in_model(LoraConfig.from_pretrained(tmp_path), fresh.transformer, "default")
    loaded = set_peft_model_state_dict(fresh.transformer, load_file(tmp_path / "adapter_model.safetensors"), "default")
    assert not loaded.unexpected_keys
    torch.testing.assert_close(image(fresh, "pixart"), there, rtol=0, atol=1e-6)


@pytest.mark.few(3)
@pytest.mark.parametrize("name", FAMILIES)
def test_all_of_a_denoiser(name: str) -> None:
    pipe = fresh_pipe(name)
    trained = FullFinetuning(pipe)
    assert torch.equal(image(pipe, name), base_image(name))
    assert list(trained.parameters) == [n for n, _ in get_denoiser(fresh_pipe(name))[1].named_parameters()]
    for model in models_of(pipe).values():
        assert not model.training
        assert all(p.requires_grad == (model is trained.denoiser) for p in model.parameters())
    move(trained, 0.1)
    there, weights = image(pipe, name), {n: p.clone() for n, p in trained.parameters.items()}
    assert differs(there, base_image(name))
    kept = {n: p.data_ptr() for n, p in trained.parameters.items()}
    for _ in range(2):
        with trained.reference():
            assert torch.equal(image(pipe, name), base_image(name))
        assert torch.equal(image(pipe, name), there)
    with pytest.raises(RuntimeError, match="mine"), trained.reference():
        raise RuntimeError("mine")
    assert all(torch.equal(p, weights[n]) for n, p in trained.parameters.items())
    assert kept == {n: p.data_ptr() for n, p in trained.denoiser.named_parameters()}  # what an optimiser holds


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_all_of_a_denoiser_in_half_precision_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(InputError, match=r"full finetuning needs weights in float32, .* is torch\..*float16.*LoRA"):
        FullFinetuning(fresh_pipe("sd").to(dtype))


def test_all_of_a_denoiser_exports_for_from_pretrained(tmp_path: Path) -> None:
    pipe = fresh_pipe("sd")
    trained = FullFinetuning(pipe)
    move(trained, 0.1)
    assert trained.write(trained.state(), tmp_path) == tmp_path / "unet"
    fresh = fresh_pipe("sd")
    fresh.unet = UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet").eval()
    assert torch.equal(image(fresh), image(pipe))


def gradient(name: str, make: Callable[[Any], Trainable], checkpointing: bool) -> tuple[dict[str, Tensor], int]:
    """Gradient of a whole-trajectory loss after some training, and how often a block of the denoiser ran."""
    pipe = fresh_pipe(name)
    trained = make(pipe)
    sampler = Sampler(pipe, call_of(name))
    stored, _ = sampler.rollout(TWO_PROMPTS)
    with trained.reference():
        reference = reference_of(sampler, stored, (0, 1, 2))
    move(trained, 0.02)
    if checkpointing:
        trained.denoiser.enable_gradient_checkpointing()
    model = trained.denoiser.down_blocks[0].attentions[0] if name == "sd" else trained.denoiser
    calls: list[int] = []
    model.transformer_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))  # a second run may stop early
    batch = Batch([stored], [reference], (0, 1, 2), torch.tensor([[0.2, 0.9], [0.5, -0.4]]))
    two_pass_gradient(sampler, batch, PRDP(), penalties={kl: 0.3})
    return {n: p.grad for n, p in trained.parameters.items() if p.grad is not None}, len(calls)


@pytest.mark.few(2)
@pytest.mark.parametrize("make", [lambda pipe: LoRA(pipe, 2), FullFinetuning], ids=["lora", "full"])
@pytest.mark.parametrize("name", ["sd", "flux"])
def test_gradient_checkpointing_changes_no_gradient(name: str, make: Callable[[Any], Trainable]) -> None:
    plain, calls = gradient(name, make, False)
    saved, more = gradient(name, make, True)
    assert (calls, more) == (6, 9)  # it is really on: three more steps in the backward pass
    assert plain.keys() == saved.keys() and len(plain) > 10
    for key, value in plain.items():
        torch.testing.assert_close(saved[key], value, rtol=1e-5, atol=1e-6 * float(value.abs().max()) + 1e-12)


@pytest.mark.parametrize("make", [lambda pipe: LoRA(pipe, 2), FullFinetuning], ids=["lora", "full"])
def test_the_reference_has_the_densities_of_the_pipeline_that_training_began_with(
    make: Callable[[Any], Trainable],
) -> None:
    pipe = fresh_pipe("sd")
    trained = make(pipe)
    sampler = Sampler(pipe, call_of("sd"))
    stored, _ = sampler.rollout(TWO_PROMPTS)
    move(trained, 0.1)
    assert (log_probs(sampler, stored) - stored.log_probs).abs().min() > 1e-3
    with trained.reference():
        assert torch.equal(log_probs(sampler, stored), stored.log_probs)
