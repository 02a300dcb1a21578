"""Sharing the prompt's part of cross-attention against diffusers without it: the slow twin."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from conftest import CLIP_WIDTH, PIPELINES, PROMPT, T5_WIDTH, cached_pipe, call_kwargs
from diffusers.models import attention_processor as known
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from test_attention import CLOSE, ip_unet
from test_fk import steer_kwargs
from torch import Generator, Tensor, nn

from steer import BestOfNPipeline, FKSteeringPipeline
from steer.diffusion.attention import attention_backend
from steer.diffusion.differentiable import differentiable
from steer.diffusion.preview import first_output
from steer.diffusion.step_hooks import denoising_modules, replaced
from steer.prompt_memory import KEPT, PromptBatch, PromptMemory, distinct_rows
from steer.shared_prompt import shared_prompt

STEPS = 4
CROSSING = ("sd", "img2img", "controlnet", "sdxl", "pixart", "wan")
JOINT = ("sd3", "flux")


def images(pipe: Any, name: str, **call: Any) -> Tensor:
    call = call_kwargs(name, 3, STEPS) | call
    return first_output(pipe(**call, generator=Generator().manual_seed(0), output_type="pt"))


@contextmanager
def left_as_it_was(pipe: Any) -> Iterator[None]:
    """All attributes and hooks of all modules are the same objects after the block."""

    def state() -> list[Any]:
        components = [part for module in denoising_modules(pipe) for part in module.modules()]
        return [({n: id(v) for n, v in vars(part).items()}, len(part._forward_pre_hooks)) for part in components]

    before = state()
    try:
        yield
    finally:
        assert state() == before


def shaken(module: nn.Module) -> Any:
    """A copy whose attention is sharp, so that a wrong key shows."""
    module = copy.deepcopy(module).requires_grad_(False)
    generator = Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


class Called:
    """A UNet and the arguments of calls on given prompts: rows of the same number have the same one."""

    def __init__(self, model: nn.Module | None = None) -> None:
        self.model: Any = shaken(cached_pipe("sd").unet) if model is None else model
        self.features = torch.randn(8, 6, CLIP_WIDTH, generator=Generator().manual_seed(1))

    def __call__(self, prompts: Sequence[int] | Tensor, seed: int = 0, **more: Any) -> Tensor:
        """The prediction (N, 4, 4, 4) for other latents in every row."""
        features = prompts if torch.is_tensor(prompts) else self.features[list(prompts)]
        x = torch.randn(len(features), 4, 4, 4, generator=Generator().manual_seed(seed))
        with torch.no_grad():
            return self.model(x, 3, features, **more).sample


def crossing(model: nn.Module) -> list[Any]:
    return [layer for layer in model.modules() if getattr(layer, "is_cross_attention", False)]


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("name", PIPELINES)
def test_the_images_are_the_same(name: str, backend: str) -> None:
    pipe = cached_pipe(name)
    expected = images(pipe, name)
    with left_as_it_was(pipe), shared_prompt(pipe) as sharing, attention_backend(pipe, backend):
        found = images(pipe, name)
    assert (sharing.layers > 0) == (name in CROSSING)
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("name", JOINT)
def test_joint_attention_says_that_it_has_nothing_to_share(name: str) -> None:
    with shared_prompt(cached_pipe(name)) as sharing:
        images(cached_pipe(name), name)
    assert sharing.layers == sharing.counts.computed == 0
    assert "jointly: nothing to share" in sharing.reasons[0]


@pytest.mark.parametrize("name", CROSSING)
def test_keys_and_values_are_computed_once_per_prompt_and_call(name: str) -> None:
    """Rows that reach the projections: those of two prompts, once. Without sharing: of all particles, at every step."""
    pipe, rows = cached_pipe(name), []
    linears = [
        part for module in denoising_modules(pipe) for layer in crossing(module) for part in (layer.to_k, layer.to_v)
    ]

    def watched(plain: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: (rows.append(len(x)), plain(x))[1]

    def run() -> list[int]:
        rows.clear()
        images(pipe, name)
        return list(rows)

    for linear in linears:
        vars(linear)["forward"] = watched(linear.forward)
    plain = run()
    with shared_prompt(pipe):
        shared = run()
    for linear in linears:
        del vars(linear)["forward"]
    assert sum(shared) == 2 * len(linears)  # of the prompt and of none
    assert sum(plain) == 2 * 3 * len(linears) * (len(plain) // len(linears)) / (2 if name == "wan" else 1)


def test_attention_sees_one_long_sequence_per_prompt() -> None:
    called, shapes = Called(), []
    layer = crossing(called.model)[0]
    hidden = layer.to_q.in_features
    plain = layer.forward

    def watched(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        shapes.append(x.shape)
        return plain(x, *args, **kwargs)

    with replaced(vars(layer), "forward", watched):
        called([0, 0, 0, 0, 1, 1, 1, 1])
        with shared_prompt(called.model):
            called([0, 0, 0, 0, 1, 1, 1, 1])
            called([0, 1, 0, 1])
            called([0, 0, 0, 0, 1, 1, 2, 2])
    length = 16
    assert shapes == [(8, length, hidden), (2, 4 * length, hidden), (2, 2 * length, hidden), (4, 2 * length, hidden)]


LAYOUTS = (
    [0],
    [0, 0, 0],
    [0, 0, 1, 1],
    [0, 1, 0, 1],
    [0, 0, 0, 1, 1],
    [1, 2, 0],
    [0, 0, 0, 0, 1, 1, 2, 2],
    [1, 0, 1, 1],
)


@pytest.mark.parametrize("prompts", LAYOUTS, ids=str)
def test_any_layout_of_prompts(prompts: list[int]) -> None:
    called = Called()
    expected = called(prompts)
    assert (called([7] * len(prompts)) - expected).abs().max() > 0.01  # prompts are seen
    with shared_prompt(called.model):
        for _ in range(2):
            torch.testing.assert_close(called(prompts), expected, **CLOSE)


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=2 * KEPT))
@settings(max_examples=15, deadline=None)
def test_any_sequence_of_layouts(layouts: list[list[int]]) -> None:
    """More batches than are remembered, and each of them twice."""
    called = Called()
    with shared_prompt(called.model):
        found = [called(prompts, seed) for seed, prompts in enumerate(layouts * 2)]
    for seed, prompts in enumerate(layouts * 2):
        torch.testing.assert_close(found[seed], called(prompts, seed), **CLOSE)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_folding_and_back(numbers: list[int]) -> None:
    """By hand: every row is in a chunk of its prompt, and comes back to its place."""
    prompts = torch.tensor(numbers, dtype=torch.float32).view(-1, 1, 1).expand(-1, 2, 3)
    batch = PromptBatch.of(prompts, None)
    x = torch.arange(len(numbers) * 5 * 2.0).view(len(numbers), 5, 2)
    folded = batch.fold(x)
    assert torch.equal(batch.unfold(folded), x)
    size = folded.shape[1] // 5
    for chunk, value in zip(folded.view(-1, size, 5, 2), batch.folded, strict=True):
        for row in chunk:
            place = next(i for i, own in enumerate(x) if torch.equal(own, row))
            assert value.eq(numbers[place]).all()
    assert len(batch.rows) == len(set(numbers))
    assert all(numbers.count(value) % size == 0 for value in numbers)


def test_rows_are_told_apart_in_every_part() -> None:
    a = torch.tensor([[1.0], [1.0], [2.0], [1.0], [float("nan")], [float("nan")]])
    b = torch.tensor([[0.0], [0.0], [0.0], [5.0], [0.0], [0.0]])
    assert distinct_rows(a).tolist() == [0, 0, 1, 0, 2, 3]
    assert distinct_rows(a, b).tolist() == [0, 0, 1, 2, 3, 4]


def test_prompts_written_over_in_place_are_noticed() -> None:
    called = Called()
    features = called.features[[0, 0, 1, 1]]
    with shared_prompt(called.model):
        called(features)
        features.copy_(called.features[[2, 0, 2, 1]])
        found = called(features)
    torch.testing.assert_close(found, called([2, 0, 2, 1]), **CLOSE)


def test_memory_that_is_given_to_other_prompts_is_noticed() -> None:
    called = Called()
    expected = [called([i % 8, i % 8]) for i in range(20)]
    with shared_prompt(called.model):
        for i in range(20):
            torch.testing.assert_close(called([i % 8, i % 8]), expected[i], **CLOSE)


def test_equal_prompts_in_other_memory_are_the_same_batch() -> None:
    called = Called()
    with shared_prompt(called.model) as sharing:
        called([0, 0, 1])
        computed = sharing.counts.computed
        called([0, 0, 1])
    assert sharing.counts.computed == computed > 0


def test_a_memory_holds_a_few_batches() -> None:
    memory = PromptMemory()
    for value in range(3 * KEPT):
        memory.find(torch.full((2, 1, 1), float(value)))
    assert len(memory.batches) == KEPT


def in_place(linear: nn.Linear) -> None:
    with torch.no_grad():
        linear.weight.mul_(-1.5)


def behind_the_back(linear: nn.Linear) -> None:
    linear.weight.data.mul_(-1.5)


def other_memory(linear: nn.Linear) -> None:
    linear.weight.data = -1.5 * linear.weight.data


def other_parameter(linear: nn.Linear) -> None:
    linear.weight = nn.Parameter(-1.5 * linear.weight.detach(), requires_grad=False)


def loaded(linear: nn.Linear) -> None:
    linear.load_state_dict({name: -1.5 * value for name, value in linear.state_dict().items()})


@pytest.mark.parametrize("change", [in_place, behind_the_back, other_memory, other_parameter, loaded])
@pytest.mark.parametrize("part", ["to_k", "to_v"])
def test_changed_weights_are_noticed(part: str, change: Callable[[nn.Linear], None]) -> None:
    called = Called()
    with shared_prompt(called.model):
        before = called([0, 0, 1, 1])
        for layer in crossing(called.model):
            change(getattr(layer, part))
        found = called([0, 0, 1, 1])
    assert (found - before).abs().max() > 1e-3
    torch.testing.assert_close(found, called([0, 0, 1, 1]), **CLOSE)


def with_adapter(model: Any, name: str = "a") -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights="gaussian"), name)
        for weight_name, weight in model.named_parameters():
            if "lora_B" in weight_name:
                nn.init.normal_(weight, std=0.5)


ADAPTER_STEPS: dict[str, Callable[[Any], Any]] = {
    "added": with_adapter,
    "off": lambda model: model.disable_adapters(),
    "on": lambda model: model.enable_adapters(),
    "weaker": lambda model: model.set_adapters(["a"], [0.3]),
    "fused": lambda model: model.fuse_lora(),
    "gone, its weights merged": lambda model: model.unload_lora(),
}


def test_adapters_are_followed_wherever_they_go() -> None:
    """Put on, taken off, scaled, merged into the weights and unloaded, all in one block."""
    called, twin = Called(), Called()
    seen = [called([0, 0, 1])]
    with shared_prompt(called.model):
        called([0, 0, 1])
        for name, change in ADAPTER_STEPS.items():
            change(called.model)
            change(twin.model)
            found, expected = called([0, 0, 1]), twin([0, 0, 1])
            torch.testing.assert_close(found, expected, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
            seen.append(expected)
    assert [(b - a).abs().max() > 1e-3 for a, b in pairwise(seen)] == [True] * 4 + [False] * 2


def test_an_adapter_from_before_is_shared_by_rows_but_computed_at_every_step() -> None:
    called = Called()
    with_adapter(called.model)
    expected = called([0, 0, 1])
    with shared_prompt(called.model) as sharing:
        for _ in range(2):
            torch.testing.assert_close(called([0, 0, 1]), expected, **CLOSE)
    assert sharing.layers > 0 and sharing.counts.computed == 0


class Scaled(nn.Linear):
    """Somebody's own, with more to it than weights."""

    scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * super().forward(x)


def test_a_layer_with_more_than_weights_is_computed_at_every_step() -> None:
    called = Called()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for part in crossing(called.model):
            part.to_k = Scaled(part.to_k.in_features, part.to_k.out_features).requires_grad_(False)
    with shared_prompt(called.model):
        before = called([0, 0, 1])
        for part in crossing(called.model):
            part.to_k.scale = -9.0
        found = called([0, 0, 1])
    assert (found - before).abs().max() > 1e-3
    torch.testing.assert_close(found, called([0, 0, 1]), **CLOSE)


def test_weights_that_come_and_go_are_used_when_they_are_there() -> None:
    """Sequential offload: they lie on no device between the calls."""
    called = Called()
    layers = crossing(called.model)
    with shared_prompt(called.model) as sharing:
        called([0, 0, 1])
        layers[0].to_k._hf_hook = "of accelerate"
        called([0, 0, 1])
        called([0, 0, 1])
    assert sharing.counts.computed == 3 * 2 * len(layers)
    with shared_prompt(called.model) as sharing:
        called([0, 0, 1])
        called([0, 0, 1])
    assert sharing.counts.computed == sharing.counts.reused == 2 * len(layers) - 1


def test_a_prompt_in_several_chunks_is_projected_once() -> None:
    """Guidance of two prompts: the rows of none make two chunks, and one row of keys."""
    called, rows = Called(), []
    linear = crossing(called.model)[0].to_k
    plain = linear.forward
    with replaced(vars(linear), "forward", lambda x: (rows.append(len(x)), plain(x))[1]), shared_prompt(called.model):
        called([0, 0, 0, 0, 1, 1, 2, 2])
    assert rows == [3]


def test_captions_are_projected_once_and_with_gradients_as_ever() -> None:
    model = shaken(cached_pipe("pixart").transformer)
    features = torch.randn(2, 5, T5_WIDTH, generator=Generator().manual_seed(0))[[0, 0, 1, 1]]
    time, size, x = torch.full((4,), 3), {"resolution": None, "aspect_ratio": None}, torch.ones(4, 4, 4, 4)
    weight = model.caption_projection.linear_1.weight.requires_grad_()
    rows: list[int] = []

    def gradient() -> Tensor:
        loss = model(x, features, time, size, encoder_attention_mask=torch.ones(4, 5)).sample.square().sum()
        return torch.autograd.grad(loss, weight)[0]

    expected = gradient()
    hook = model.caption_projection.act_1.register_forward_hook(lambda module, inputs, out: rows.append(len(out)))
    with shared_prompt(model):
        for _ in range(2):
            pixart_call(model, features, torch.ones(4, 5))
        assert rows == [2]
        assert torch.equal(gradient(), expected)
    hook.remove()


def pixart_call(model: Any, features: Tensor, mask: Tensor) -> Tensor:
    x = torch.randn(len(features), 4, 4, 4, generator=Generator().manual_seed(0))
    time = torch.full((len(features),), 3)
    size = {"resolution": None, "aspect_ratio": None}
    with torch.no_grad():
        return model(x, features, time, size, encoder_attention_mask=mask).sample


def test_a_mask_belongs_to_its_prompt() -> None:
    """Rows of equal features and other masks are other prompts."""
    model = shaken(cached_pipe("pixart").transformer)
    features = torch.randn(1, 5, T5_WIDTH, generator=Generator().manual_seed(0)).repeat(4, 1, 1)
    short, long = torch.tensor([1.0, 1, 0, 0, 0]), torch.ones(5)
    for masks in ([short, short, long, long], [short, long, short, long], [long, long, long, long], [short] * 4):
        mask = torch.stack(masks)
        expected = pixart_call(model, features, mask)
        with shared_prompt(model):
            for _ in range(2):
                torch.testing.assert_close(pixart_call(model, features, mask.clone()), expected, **CLOSE)
    with shared_prompt(model):
        first = pixart_call(model, features, torch.stack([short] * 4))
        second = pixart_call(model, features, torch.stack([long] * 4))
    assert (first - second).abs().max() > 1e-3
    torch.testing.assert_close(second, pixart_call(model, features, torch.stack([long] * 4)), **CLOSE)


def test_a_changed_caption_projection_is_noticed() -> None:
    model = shaken(cached_pipe("pixart").transformer)
    features, mask = torch.randn(4, 5, T5_WIDTH, generator=Generator().manual_seed(0)), torch.ones(4, 5)
    with shared_prompt(model):
        before = pixart_call(model, features, mask)
        model.caption_projection.linear_1.weight.data.mul_(-1)
        found = pixart_call(model, features, mask)
    assert (found - before).abs().max() > 1e-3
    torch.testing.assert_close(found, pixart_call(model, features, mask), **CLOSE)


def test_gradients_are_untouched() -> None:
    """Of the weights and of the prompt, as in replay and learned embeddings."""
    called = Called()
    features = called.features[[0, 0, 1, 1]].requires_grad_()
    weights = [layer.to_k.weight.requires_grad_() for layer in crossing(called.model)]
    x = torch.randn(4, 4, 4, 4, generator=Generator().manual_seed(0))

    def gradients() -> tuple[Tensor, ...]:
        loss = called.model(x, 3, features).sample.square().sum()
        return torch.autograd.grad(loss, [features, *weights])

    expected = gradients()
    with shared_prompt(called.model) as sharing:
        called(features.detach())  # something is remembered
        computed = sharing.counts.computed
        found = gradients()
    assert sharing.counts.computed == computed and sharing.counts.reused == 0
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_a_differentiable_twin_made_in_a_block_is_one_outside_it() -> None:
    pipe = cached_pipe("sd")
    start = torch.randn(2, 4, 4, 4, generator=Generator().manual_seed(0))
    call = call_kwargs("sd", 2, 2)

    def gradient() -> Tensor:
        latents = start.clone().requires_grad_()
        out = differentiable(pipe)(**call, latents=latents, output_type="pt").images
        return torch.autograd.grad(out.square().sum(), latents)[0]

    expected = gradient()
    with left_as_it_was(pipe), shared_prompt(pipe):
        images(pipe, "sd")
        found = gradient()
    torch.testing.assert_close(found, expected, **CLOSE)


def test_a_copy_made_in_a_block_has_its_own_weights() -> None:
    called = Called()
    with shared_prompt(called.model):
        before = called([0, 0, 1])
        twin = Called(copy.deepcopy(called.model))
        for layer in crossing(called.model):
            layer.to_v.weight.mul_(10)
            layer.to_q.weight.mul_(3)
        torch.testing.assert_close(twin([0, 0, 1]), before, **CLOSE)
        found = called([0, 0, 1])
    assert (found - before).abs().max() > 1e-3
    torch.testing.assert_close(called([0, 0, 1]), found, **CLOSE)


def test_ip_adapters_are_left_as_they_are_and_said() -> None:
    model, call = ip_unet()
    with torch.no_grad():
        expected = model(**call).sample
        with left_as_it_was(model), shared_prompt(model) as sharing:
            assert torch.equal(model(**call).sample, expected)
    assert sharing.layers == 0 and "IPAdapterAttnProcessor2_0" in sharing.reasons[0]


def test_a_compiled_model_is_left_as_it_is_and_said() -> None:
    model = copy.deepcopy(cached_pipe("sd").unet)
    model.compile()
    with left_as_it_was(model), shared_prompt(model) as sharing:
        pass
    assert sharing.layers == 0 and "compiled" in sharing.reasons[0]


def test_guess_mode_of_a_controlnet() -> None:
    """The ControlNet sees half of the batch that the UNet sees."""
    pipe = cached_pipe("controlnet")
    expected = images(pipe, "controlnet", guess_mode=True)
    with shared_prompt(pipe) as sharing:
        found = images(pipe, "controlnet", guess_mode=True)
    assert sharing.layers > len(crossing(pipe.unet))
    torch.testing.assert_close(found, expected, **CLOSE)


def test_precision_may_change_between_steps() -> None:
    called = Called()
    with torch.autocast("cpu", torch.bfloat16):
        half = called([0, 0, 1, 1])
    with shared_prompt(called.model):
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(called([0, 0, 1, 1]), half, atol=0.1, rtol=0.05)
        found = called([0, 0, 1, 1])
    torch.testing.assert_close(found, called([0, 0, 1, 1]), **CLOSE)


def test_inference_mode_which_counts_no_writes() -> None:
    called = Called()
    with shared_prompt(called.model), torch.inference_mode():
        features = called.features[[0, 0, 1]].clone()
        first = called(features)
        features.copy_(called.features[[2, 3, 2]])
        second = called(features)
    torch.testing.assert_close(first.clone(), called([0, 0, 1]), **CLOSE)
    torch.testing.assert_close(second.clone(), called([2, 3, 2]), **CLOSE)


def test_dropout_draws_what_it_drew() -> None:
    called = Called()
    called.model.train()
    for layer in crossing(called.model):
        layer.to_out[1].p = 0.5

    def drawn() -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return called([0, 1, 0, 1])

    expected = drawn()
    with shared_prompt(called.model):
        assert torch.equal(drawn(), expected)


def test_what_a_layer_writes_over_is_not_reused() -> None:
    """Some adapters add to the output of the layer below them in place."""
    called = Called()
    for layer in crossing(called.model):
        layer.to_k.register_forward_hook(lambda module, inputs, output: output.mul_(0.5))
    expected = called([0, 0, 1])
    with shared_prompt(called.model):
        for _ in range(3):
            torch.testing.assert_close(called([0, 0, 1]), expected, **CLOSE)


def test_blocks_in_blocks_and_exceptions() -> None:
    called = Called()
    expected = called([0, 0, 1, 1])
    with (
        left_as_it_was(called.model),
        pytest.raises(KeyError),
        attention_backend(called.model, "eager"),
        shared_prompt(called.model),
        attention_backend(called.model, "sdpa"),
        shared_prompt(called.model),
    ):
        torch.testing.assert_close(called([0, 0, 1, 1]), expected, **CLOSE)
        raise KeyError


def test_without_a_denoiser_it_says_so() -> None:
    with shared_prompt(cached_pipe("sd").tokenizer) as sharing:
        assert sharing.layers == 0 and "has no denoiser" in sharing.reasons[0]


def redness(pictures: Tensor, prompts: Sequence[str]) -> Tensor:
    return pictures[:, 0].mean((1, 2)) - pictures[:, 2].mean((1, 2)) + 0.1 * torch.tensor([len(p) % 3 for p in prompts])


@pytest.mark.parametrize("name", ["sd", "sdxl", "pixart", "wan", "sd3"])
def test_steering_takes_the_same_ancestors_to_the_same_images(name: str) -> None:
    pipe = cached_pipe(name)
    call = steer_kwargs(name, 6) | {"prompt": [PROMPT, "a blue star"]}
    call |= {"num_particles": 3, "lam": 40.0, "ess_threshold": 1.0, "output_type": "pt"}

    def run() -> Any:
        return FKSteeringPipeline(pipe, redness)(**call, generator=Generator().manual_seed(0))

    plain = run()
    with left_as_it_was(pipe), shared_prompt(pipe) as sharing:
        shared = run()
    ancestors = [evaluation.ancestors for evaluation in plain.history]
    assert any((rows != torch.arange(3)).any() for rows in ancestors)  # some particles were resampled
    assert (sharing.counts.reused > 0) == (name in CROSSING)
    for ours, theirs in zip(shared.history, plain.history, strict=True):
        assert torch.equal(ours.ancestors, theirs.ancestors)
    torch.testing.assert_close(shared.images, plain.images, **CLOSE)


def test_best_of_n_is_the_same() -> None:
    pipe = cached_pipe("sd")
    call = steer_kwargs("sd") | {"num_particles": 3, "output_type": "pt"}
    plain = BestOfNPipeline(pipe, redness)(**call, generator=Generator().manual_seed(0))
    with shared_prompt(pipe):
        shared = BestOfNPipeline(pipe, redness)(**call, generator=Generator().manual_seed(0))
    assert torch.equal(plain.order, shared.order)
    torch.testing.assert_close(shared.images, plain.images, **CLOSE)


def layer(**config: Any) -> Any:
    """A cross-attention layer of diffusers alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = {"query_dim": 8, "cross_attention_dim": 6, "heads": 2, "dim_head": 4} | config
        return nn.ModuleList([known.Attention(**config)]).eval().requires_grad_(False)


def check_layer(model: Any, layers: int, **more: Any) -> None:
    x = torch.randn(4, 5, 8, generator=Generator().manual_seed(0))
    prompts = torch.randn(2, 3, 6, generator=Generator().manual_seed(1))[[0, 0, 1, 1]]
    with torch.no_grad():
        expected = model[0](x, prompts, **more)
        with shared_prompt(model) as sharing:
            for _ in range(2):
                torch.testing.assert_close(model[0](x, prompts, **more), expected, **CLOSE)
    assert sharing.layers == layers and len(sharing.reasons) == 1 - layers


def test_a_norm_over_all_queries_is_left_as_it_is() -> None:
    check_layer(layer(norm_num_groups=2), 0)


def test_normed_prompts_are_shared() -> None:
    check_layer(layer(cross_attention_norm="layer_norm"), 1)


def test_a_mask_of_every_query_is_left_as_it_is() -> None:
    mask = torch.randn(2, 5, 3, generator=Generator().manual_seed(2))
    check_layer(layer(), 1, attention_mask=mask[[0, 0, 1, 1]])


def test_fused_projections_are_shared() -> None:
    model = layer()
    model[0].fuse_projections()
    model[0].set_processor(known.FusedAttnProcessor2_0())
    check_layer(model, 1)


def test_image_to_video_is_left_as_it_is() -> None:
    """Wan's has the keys of an image before those of the text, in one tensor."""
    attention = WanAttention(
        dim=8, heads=2, dim_head=4, added_kv_proj_dim=8, cross_attention_dim_head=4, processor=WanAttnProcessor()
    )
    model = nn.ModuleList([attention]).eval()
    x, prompts = torch.randn(2, 5, 8), torch.randn(1, 515, 8).repeat(2, 1, 1)
    with torch.no_grad():
        expected = attention(x, prompts)
        with shared_prompt(model) as sharing:
            assert torch.equal(attention(x, prompts), expected)
    assert sharing.layers == 0 and "WanAttnProcessor" in sharing.reasons[0]
