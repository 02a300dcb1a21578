"""Gradients through whole pipelines against finite differences, and the memory of the backward pass."""

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import PIPELINES, cached_pipe, call_kwargs
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig
from soft_rewards import Soft, images_of, in_precision, likeness, models_of, own_kwargs, pattern, seeded
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import steer.pipelines.reno
from steer import Iteration, ReNOPipeline
from steer.diffusion.differentiable import differentiable
from steer.diffusion.step_hooks import hook_steps
from steer.errors import InputError
from steer.pipelines.reno import NoiseToImage

FAMILIES = [name for name in PIPELINES if name != "img2img"]
FLOW = ("sd3", "flux", "wan")  # their solver computes in fp32
ATTENTION = "up_blocks.1.attentions.0.transformer_blocks.0"
BLOCKS = {
    "sd": [("unet", "down_blocks.0.resnets.0"), ("unet", ATTENTION), ("vae", "decoder.up_blocks.1")],
    "controlnet": [("controlnet", "down_blocks.0.resnets.0"), ("unet", "up_blocks.0.resnets.0")],
    "sd3": [("transformer", "transformer_blocks.0"), ("vae", "decoder.up_blocks.0")],
    "flux": [("transformer", "transformer_blocks.0"), ("transformer", "single_transformer_blocks.0")],
    "pixart": [("transformer", "transformer_blocks.0")],
}


def first_latents(pipe: Any, call: dict[str, Any]) -> Tensor:
    """Initial latents of a run, standard normal."""
    starts: list[Tensor] = []
    with hook_steps(pipe, lambda event: starts.append(event.x)) as view:
        images_of(view, **call, generator=seeded())
    return starts[0] / float(getattr(pipe.scheduler, "init_noise_sigma", 1.0))


def images_from(pipe: Any, call: dict[str, Any], latents: Tensor) -> Tensor:
    with hook_steps(pipe, lambda event: None) as view:
        return images_of(view, **call, latents=latents, generator=seeded())


# Each family with one step or with four; `make test-hard` has the others.
ONE_OR_FOUR = [(name, (1, 4)[number % 2]) for number, name in enumerate(FAMILIES)]
OTHERS = [pytest.param(name, 5 - steps, marks=pytest.mark.hard) for name, steps in ONE_OR_FOUR]


@pytest.mark.few(3)
@pytest.mark.parametrize(("name", "steps"), [*ONE_OR_FOUR, *OTHERS])
def test_gradients_are_finite_differences(name: str, steps: int) -> None:
    pipe, call = in_precision(cached_pipe(name), torch.float64), call_kwargs(name, 2, steps)
    if name == "wan":  # away from the bounds at which its decoder clamps
        pipe.vae.decoder.conv_out.weight.data *= 0.2
    latents = first_latents(pipe, call).double()
    gradients = []
    for checkpointing in (False, True):
        images = images_from(differentiable(pipe, checkpointing), call, leaf := latents.clone().requires_grad_())
        gradients += torch.autograd.grad((images * pattern(images)).sum(), leaf)
    assert torch.equal(*gradients)
    direction = torch.randn(latents.shape, generator=seeded(4), dtype=torch.float64)
    step = 1e-3 if name in FLOW else 1e-4
    ahead, behind = (images_from(pipe, call, latents + side * step * direction) for side in (1, -1))
    slopes = ((ahead - behind) * pattern(ahead)).flatten(1).sum(1) / (2 * step)
    by_hand = (gradients[0] * direction).flatten(1).sum(1)
    assert by_hand.abs().min() > 1e-2 and not ahead.requires_grad
    torch.testing.assert_close(by_hand, slopes.double(), rtol=2e-3 if name in FLOW else 1e-5, atol=1e-5)


def everything_about(module: nn.Module) -> dict[str, Any]:
    states: dict[str, Any] = {}
    for name, part in module.named_modules():
        plain = {key: value for key, value in vars(part).items() if not key.startswith("_") and key != "training"}
        states[name] = (part.training, set(vars(part)), plain, type(part).forward, type(part))
    return states


@pytest.mark.few(2)
@pytest.mark.parametrize("name", ["sd", "sdxl", "controlnet", "flux", "wan"])
def test_the_users_models_are_left_as_they_are(name: str) -> None:
    pipe, call = in_precision(cached_pipe(name)), call_kwargs(name, 2, 2)
    latents = first_latents(pipe, call)
    models, attributes = models_of(pipe), dict(vars(pipe))
    next(iter(models["vae"].parameters())).requires_grad_(False)
    before = {key: everything_about(model) for key, model in models.items()}
    asked = {key: [p.requires_grad for p in model.parameters()] for key, model in models.items()}
    weights = {key: [p.clone() for p in model.parameters()] for key, model in models.items()}
    images = images_from(differentiable(pipe), call, leaf := latents.clone().requires_grad_())
    images.sum().backward()
    assert leaf.grad is not None and leaf.grad.abs().sum() > 0
    assert vars(pipe).keys() == attributes.keys() and all(vars(pipe)[key] is attributes[key] for key in attributes)
    for key, model in models.items():
        assert everything_about(model) == before[key]
        assert [p.requires_grad for p in model.parameters()] == asked[key]
        assert all(p.grad is None and p.grad_fn is None for p in model.parameters())
        assert all(map(torch.equal, model.parameters(), weights[key]))
    assert not any(getattr(part, "gradient_checkpointing", False) for m in models.values() for part in m.modules())


def test_a_twin_shares_the_weights_and_asks_nothing_of_them() -> None:
    pipe = cached_pipe("sdxl")
    twin = differentiable(pipe)
    for name, model in models_of(pipe).items():
        theirs = list(getattr(twin, name).parameters())
        assert [p.data_ptr() for p in model.parameters()] == [p.data_ptr() for p in theirs]
        assert not any(p.requires_grad for p in theirs) and all(p.requires_grad for p in model.parameters())
        assert not getattr(twin, name).training


@pytest.mark.few(2)
@pytest.mark.parametrize("name", BLOCKS)
def test_every_block_runs_again_in_the_backward_pass(name: str) -> None:
    """Once to give its model's inner activations back, once for its own; of one call, the latter alone."""
    pipe, call = in_precision(cached_pipe(name)), call_kwargs(name, 2, 2) | {"guidance_scale": 1.0}
    counts: dict[str, int] = {}

    def counter(place: str) -> Callable[..., None]:
        def count(*_: Any) -> None:
            counts[place] = counts.get(place, 0) + 1

        return count

    for part, path in BLOCKS[name]:
        getattr(pipe, part).get_submodule(path).register_forward_pre_hook(counter(f"{part}.{path}"))
    latents, back = first_latents(pipe, call), []
    for flags in ((True, False), (True, True), (False, False)):
        images = images_from(differentiable(pipe, *flags), call, latents.clone().requires_grad_())
        counts.clear()
        images.sum().backward()
        back.append(dict(counts))
    blocks = {f"{part}.{path}": part for part, path in BLOCKS[name]}  # a denoiser's run at both steps
    assert back[0] == {block: 2 if part == "vae" else 4 for block, part in blocks.items()}
    assert back[1] == {block: 1 if part == "vae" else 2 for block, part in blocks.items()}
    assert back[2] == {}


def kept(name: str, steps: int, checkpointing: bool) -> tuple[int, int]:
    """Bytes that a graph keeps for the way back beside weights; bytes of the latents."""
    pipe, call = cached_pipe(name), call_kwargs(name, 2, steps) | {"guidance_scale": 1.0}
    weights = {p.untyped_storage().data_ptr() for model in models_of(pipe).values() for p in model.parameters()}
    storages: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # so that no address is used twice
        return tensor

    latents = first_latents(pipe, call).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        images_from(differentiable(pipe, checkpointing), call, latents)
    return sum(storages.values()), latents.nbytes


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "pixart"])
def test_checkpoints_keep_little_and_grow_by_latents(name: str) -> None:
    (one, latents), (five, _) = kept(name, 1, True), kept(name, 5, True)
    all_of_one, all_of_five = kept(name, 1, False)[0], kept(name, 5, False)[0]
    assert one < all_of_one / 10 and five < all_of_five / 20
    assert (five - one) / 4 <= 1.5 * latents < (all_of_five - all_of_one) / 4 / 10


def live_bytes() -> int:
    gc.collect()
    tensors = [one for one in gc.get_objects() if issubclass(type(one), Tensor)]
    tensors = [one for one in tensors if type(one) is not FakeTensor]  # the compiler's, which hold nothing
    storages = [one.untyped_storage() for one in tensors if one.layout is torch.strided]  # others have none
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.hard
def test_memory_does_not_grow_with_iterations() -> None:
    live: list[int] = []

    def watch(iteration: Iteration) -> None:
        assert iteration.images is not None and not iteration.images.requires_grad
        assert not iteration.rewards.requires_grad and not iteration.best.requires_grad
        if iteration.number in (2, 9):
            live.append(live_bytes())

    ReNOPipeline(cached_pipe("sd3"), Soft(likeness))(
        num_particles=2, iterations=10, on_iteration=watch, **own_kwargs("sd3")
    )
    assert live[1] - live[0] <= 7 * 2 * 4 * 4  # the trace: four numbers an image; its latents alone are 256 bytes


def test_nothing_of_a_run_outlives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Any]] = []
    plain = NoiseToImage.__init__

    def remember(self: Any, *args: Any) -> None:
        made.append(weakref.ref(self))
        plain(self, *args)

    monkeypatch.setattr(NoiseToImage, "__init__", remember)
    ReNOPipeline(cached_pipe("sd3"), Soft(likeness))(iterations=1, **own_kwargs("sd3"))
    gc.collect()
    assert [one() for one in made] == [None]


def test_a_twin_is_built_once_and_again_after_every_change() -> None:
    pipe = in_precision(cached_pipe("sd"))
    vae, rank = pipe.vae, {"r": 4, "target_modules": ["to_q"]}

    def model(name: str = "unet", checkpointing: bool = True) -> nn.Module:
        return getattr(differentiable(copy.copy(pipe), checkpointing), name)  # type: ignore[no-any-return]

    first = model()
    assert model() is first
    assert model(checkpointing=False) is not first
    user, second = differentiable(pipe), model()
    assert user.unet is not second  # two calls at once
    changes: dict[str, Callable[[], object]] = {
        "adapter": lambda: pipe.unet.add_adapter(LoraConfig(**rank)),
        "scale": lambda: pipe.unet.set_adapters(["default"], [0.5]),
        "processor": lambda: pipe.unet.set_attn_processor(AttnProcessor()),
        "mode": pipe.unet.train,
        "tiling": vae.enable_tiling,
        "hook": lambda: vae.register_forward_pre_hook(lambda *_: None),
        "precision": lambda: vae.to(torch.float64),
        "weight": lambda: setattr(vae.decoder.conv_in, "bias", nn.Parameter(torch.zeros(4))),
    }
    for name, change in changes.items():
        before = model()
        assert model() is before, name
        change()
        assert model() is not before, name


def test_weights_that_change_in_place_change_in_the_twin() -> None:
    pipe, call = in_precision(cached_pipe("sd")), call_kwargs("sd", 1, 1)
    latents = first_latents(pipe, call)
    before = images_from(differentiable(pipe), call, latents.clone().requires_grad_())
    with torch.no_grad():
        pipe.unet.conv_out.weight.add_(1.0)
    after = images_from(differentiable(pipe), call, latents.clone().requires_grad_())
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after.detach(), images_from(pipe, call, latents))


@pytest.mark.parametrize("where", ["blocks", "model"])
def test_blocks_that_reject_checkpointing_keep_their_activations(where: str, caplog: pytest.LogCaptureFixture) -> None:
    def reject(*_: Any, **__: Any) -> None:
        raise TypeError("block takes 3 positional arguments")

    pipe = in_precision(cached_pipe("sd"))
    if where == "blocks":
        pipe.unet._set_gradient_checkpointing = reject
    else:
        pipe.unet.enable_gradient_checkpointing = reject
    call = own_kwargs("sd") | {"iterations": 3, "generator": seeded()}
    out = ReNOPipeline(pipe, Soft(likeness))(**call, gradient_checkpointing=True)
    kept = ReNOPipeline(cached_pipe("sd"), Soft(likeness))(
        **call | {"generator": seeded()}, gradient_checkpointing=False
    )
    assert torch.equal(out.rewards, kept.rewards) and caplog.text.count("rejects gradient checkpointing") == 1


@pytest.mark.few(1)
@pytest.mark.parametrize(("setting", "expected"), [("auto", False), (False, False), (True, True)])
def test_checkpoints_are_for_large_runs_or_on_request(setting: Any, expected: bool, monkeypatch: Any) -> None:
    asked: list[bool] = []
    plain = NoiseToImage._differentiable_pipe

    def note(self: NoiseToImage, checkpointing: bool) -> Any:
        asked.append(checkpointing)
        return plain(self, checkpointing)

    monkeypatch.setattr(NoiseToImage, "_differentiable_pipe", note)
    run = ReNOPipeline(cached_pipe("sd"), Soft(likeness))
    run(**own_kwargs("sd"), iterations=2, gradient_checkpointing=setting)
    assert asked == [expected] * 2
    monkeypatch.setattr(steer.pipelines.reno, "KEPT_ELEMENTS", 4 * 4 * 4 * 2 - 1)
    run(**own_kwargs("sd", steps=2), iterations=1, gradient_checkpointing=setting)
    assert asked[2:] == [setting is not False]
    with pytest.raises(InputError, match="gradient_checkpointing must be true, false or auto, got 'yes'"):
        run(**own_kwargs("sd"), gradient_checkpointing="yes")
