"""Attention backends against each other, on models of every family, and against formulas written out."""

import copy
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import CLIP_WIDTH, PIPELINES, cached_pipe, call_kwargs, unet
from diffusers.models import attention_processor as known
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import Generator, Tensor, nn

from steer.diffusion import attention
from steer.diffusion.attention import BACKENDS, LAYERS, attention_backend, plain_attention, xformers_attention
from steer.diffusion.differentiable import differentiable
from steer.diffusion.preview import first_output
from steer.diffusion.views import denoising_modules
from steer.errors import InputError

CLOSE = {"atol": 1e-5, "rtol": 0}


def images(pipe: Any, name: str) -> Tensor:
    return first_output(pipe(**call_kwargs(name), generator=Generator().manual_seed(0), output_type="pt"))


def attention_layers(target: Any) -> list[Any]:
    modules = [target] if isinstance(target, nn.Module) else denoising_modules(target).values()
    return [layer for module in modules for layer in module.modules() if isinstance(layer, LAYERS)]


def state(pipe: Any) -> list[Any]:
    """All that a backend may touch: what each layer and processor holds, and which objects those are."""
    states: list[Any] = []
    for layer in attention_layers(pipe):
        processor = layer.processor
        backend = vars(processor).get("_attention_backend", "unset")
        states.append((id(processor), backend, list(layer._modules), sorted(vars(layer)), layer.forward))
    return states


@contextmanager
def left_as_it_was(pipe: Any) -> Iterator[None]:
    before = state(pipe)
    try:
        yield
    finally:
        assert state(pipe) == before


def documented(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any = None, p: float = 0.0, scale: Any = None) -> Tensor:
    """Attention as xformers documents it: inputs (B, L, H, d) with last stride 1, and a bias of full shape with rows
    that start at multiples of 8."""
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    scores = torch.einsum("blhd,bshd->bhls", q * (q.shape[-1] ** -0.5 if scale is None else scale), k)
    if isinstance(attn_bias, str):
        scores = scores.masked_fill(torch.ones_like(scores).triu(1) > 0, -math.inf)
    elif attn_bias is not None:
        assert attn_bias.shape == scores.shape and attn_bias.dtype == q.dtype and attn_bias.stride(-2) % 8 == 0
        scores = scores + attn_bias
    return torch.einsum("bhls,bshd->blhd", F.dropout(scores.softmax(-1), p), v)


FUNCTIONS = {"plain": plain_attention, "xformers": xformers_attention(documented, lambda: "causal")}


def qkv(heads_of_keys: int = 4, queries: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    generator = Generator().manual_seed(1)
    shapes = [(2, 4, queries, 6), (2, heads_of_keys, 5, 6), (2, heads_of_keys, 5, 3)]
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    return q, k, v


def test_the_formula_by_hand() -> None:
    """One query, two keys: weights e^{s1}, e^{s2} over their sum."""
    q = torch.tensor([1.0, 2.0]).view(1, 1, 1, 2)
    k = torch.tensor([[3.0, 0.0], [0.0, 1.0]]).view(1, 1, 2, 2)
    v = torch.tensor([[10.0], [20.0]]).view(1, 1, 2, 1)
    first, second = math.exp(3 / math.sqrt(2)), math.exp(2 / math.sqrt(2))
    expected = (10 * first + 20 * second) / (first + second)
    assert plain_attention(q, k, v).item() == pytest.approx(expected, rel=1e-6)


MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "scale": {"scale": 0.3},
    "rows of numbers": {"attn_mask": torch.linspace(-3, 3, 10).view(2, 1, 1, 5)},
    "a number for every score": {"attn_mask": torch.linspace(-3, 3, 2 * 4 * 7 * 5).view(2, 4, 7, 5)},
    "keys unseen": {"attn_mask": torch.tensor([[1, 1, 0, 1, 0], [1, 0, 0, 0, 1]]).bool().view(2, 1, 1, 5)},
    "past only": {"is_causal": True},
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("mask", MASKS)
def test_a_backend_computes_what_pytorch_computes(mask: str, function: str) -> None:
    q, k, v = qkv()
    expected = F.scaled_dot_product_attention(q, k, v, **MASKS[mask])
    torch.testing.assert_close(FUNCTIONS[function](q, k, v, **MASKS[mask]), expected, **CLOSE)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_heads_of_the_query_share_keys(function: str) -> None:
    q, k, v = qkv(heads_of_keys=2)
    expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(FUNCTIONS[function](q, k, v, enable_gqa=True), expected, **CLOSE)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_dropout_keeps_the_mean_and_zeroes_the_rest(function: str) -> None:
    q, k, v = qkv()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        drawn = torch.stack([FUNCTIONS[function](q, k, v, dropout_p=0.5) for _ in range(3000)])
    assert drawn.std(0).min() > 0.01
    torch.testing.assert_close(drawn.mean(0), plain_attention(q, k, v), atol=0.1, rtol=0)


@pytest.mark.few(6)
@pytest.mark.parametrize("backend", ["sdpa", "eager", "auto"])
@pytest.mark.parametrize("name", PIPELINES)
def test_backends_give_the_same_images(name: str, backend: str) -> None:
    pipe = cached_pipe(name)
    expected = images(pipe, name)
    with left_as_it_was(pipe), attention_backend(pipe, backend) as used:
        actual = images(pipe, name)
    assert used == ("sdpa" if backend == "auto" else backend)
    torch.testing.assert_close(actual, expected, **CLOSE)


@pytest.mark.few(3)
@pytest.mark.parametrize("name", PIPELINES)
def test_a_backend_reaches_every_layer_of_every_family(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, shapes, ran = cached_pipe(name), [], []

    def counted(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        shapes.append(query.shape)
        return documented_route(query, *args, **kwargs)

    documented_route = xformers_attention(documented, lambda: "causal")
    monkeypatch.setitem(BACKENDS, "counted", lambda device: ("counted", counted))
    hooks = [layer.register_forward_hook(lambda *_: ran.append(1)) for layer in attention_layers(pipe)]
    expected = images(pipe, name)
    ran.clear()
    with left_as_it_was(pipe), attention_backend(pipe, "counted"):
        actual = images(pipe, name)
    for hook in hooks:
        hook.remove()
    assert len(shapes) == len(ran) > 0
    torch.testing.assert_close(actual, expected, **CLOSE)


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["sd", "sd3", "flux", "wan"])
def test_gradients_are_the_same(name: str) -> None:
    pipe = cached_pipe(name)

    def gradient() -> Tensor:
        latents = pipe(**call_kwargs(name, 1, 1), generator=Generator().manual_seed(0), output_type="latent")
        start = torch.randn(first_output(latents).shape, generator=Generator().manual_seed(1)).requires_grad_()
        out = differentiable(pipe)(**call_kwargs(name, 1, 2), latents=start, output_type="pt")
        return torch.autograd.grad(first_output(out).square().sum(), start)[0]

    expected = gradient()
    with left_as_it_was(pipe), attention_backend(pipe, "eager"):
        actual = gradient()
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(actual, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-4)


@pytest.mark.few(2)
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "processor", [known.AttnProcessor, known.AttnProcessor2_0, lambda: known.SlicedAttnProcessor(1)]
)
def test_processors_of_a_user_are_back_after_a_block(processor: Callable[[], Any], backend: str) -> None:
    pipe = copy.deepcopy(cached_pipe("sd"))
    expected = images(pipe, "sd")
    pipe.unet.set_attn_processor(processor())
    with left_as_it_was(pipe), attention_backend(pipe, backend):
        actual = images(pipe, "sd")
    torch.testing.assert_close(actual, expected, **CLOSE)


class Doubling:
    """A user's own: SDPA, and then something else."""

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, **_: Any) -> Tensor:
        return 2 * known.AttnProcessor2_0()(attn, hidden_states, encoder_hidden_states)


class Averaging:
    """A user's own that needs no kernel."""

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, **_: Any) -> Tensor:
        return hidden_states.mean(1, keepdim=True).expand_as(hidden_states)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_a_processor_of_ones_own_is_kept_and_served(backend: str) -> None:
    pipe = copy.deepcopy(cached_pipe("sd"))
    pipe.unet.set_attn_processor(Doubling())
    expected = images(pipe, "sd")
    with left_as_it_was(pipe), attention_backend(pipe, backend):
        actual = images(pipe, "sd")
    torch.testing.assert_close(actual, expected, **CLOSE)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_a_backend_that_would_do_nothing_is_refused(backend: str) -> None:
    pipe = copy.deepcopy(cached_pipe("sd"))
    pipe.unet.set_attn_processor(Averaging())
    with (
        left_as_it_was(pipe),
        pytest.raises(InputError, match=f"{backend}.*do nothing: Averaging"),
        attention_backend(pipe, backend),
    ):
        images(pipe, "sd")
    with attention_backend(pipe, "auto"):
        images(pipe, "sd")


def test_a_layer_with_a_scale_of_its_own_keeps_its_processor() -> None:
    """SDPA divides by √d: it would change such a layer."""
    model = nn.Sequential(known.Attention(8, heads=2, dim_head=4, scale_qk=False, processor=known.AttnProcessor()))
    with pytest.raises(InputError, match="AttnProcessor does not"), attention_backend(model, "sdpa"):
        model(torch.ones(1, 3, 8))


def test_a_backend_of_diffusers_gives_way_and_comes_back() -> None:
    pipe = copy.deepcopy(cached_pipe("flux"))
    expected = images(pipe, "flux")
    for layer in attention_layers(pipe):
        layer.processor._attention_backend = AttentionBackendName.FLASH  # not installed
    with left_as_it_was(pipe), attention_backend(pipe, "eager"):
        actual = images(pipe, "flux")
    torch.testing.assert_close(actual, expected, **CLOSE)


def test_the_inner_block_counts_and_auto_leaves_the_outer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, calls = cached_pipe("sd"), dict.fromkeys(("outer", "inner"), 0)

    def counting(name: str) -> Callable[..., Tensor]:
        def attend(*args: Any, **kwargs: Any) -> Tensor:
            calls[name] += 1
            return plain_attention(*args, **kwargs)

        return attend

    for name in calls:
        monkeypatch.setitem(BACKENDS, name, lambda device, name=name: (name, counting(name)))
    with left_as_it_was(pipe), attention_backend(pipe, "outer"):
        with attention_backend(pipe, "inner"):
            images(pipe, "sd")
        assert calls["inner"] > 0 and calls["outer"] == 0
        count = calls["inner"]
        with attention_backend(pipe, "sdpa"):
            images(pipe, "sd")
        assert calls == {"inner": count, "outer": 0}
        with attention_backend(pipe, "auto"):
            images(pipe, "sd")
        assert calls == {"inner": count, "outer": count}


def test_all_is_as_it_was_after_an_exception() -> None:
    pipe = copy.deepcopy(cached_pipe("sd"))
    pipe.unet.set_attn_processor(known.AttnProcessor())
    with left_as_it_was(pipe), pytest.raises(KeyError), attention_backend(pipe, "sdpa"):
        raise KeyError


def test_a_copy_made_in_a_block_has_its_own_weights() -> None:
    model = copy.deepcopy(cached_pipe("sd").unet).requires_grad_(False)
    call = torch.ones(1, 4, 4, 4), 3, torch.ones(1, 5, CLIP_WIDTH)
    with attention_backend(model, "eager"):
        twin = copy.deepcopy(model)
        before = twin(*call).sample
        for layer in attention_layers(model):
            layer.to_v.weight.mul_(10)
        assert torch.equal(twin(*call).sample, before)
        assert (model(*call).sample - before).abs().max() > 1e-3


def ip_unet() -> tuple[Any, dict[str, Any]]:
    """A UNet with an IP-adapter, and the arguments of a call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = unet(cross_attention_dim=CLIP_WIDTH)
        crossing = [layer for layer in model.modules() if getattr(layer, "is_cross_attention", False)]
        weights: dict[str, Tensor] = {}
        for number, layer in enumerate(crossing):
            for part in ("to_k_ip", "to_v_ip"):
                weights[f"{2 * number + 1}.{part}.weight"] = torch.randn(layer.inner_dim, CLIP_WIDTH)
        projection = {"proj.weight": torch.randn(4 * CLIP_WIDTH, 5), "proj.bias": torch.randn(4 * CLIP_WIDTH)}
        projection |= {"norm.weight": torch.ones(CLIP_WIDTH), "norm.bias": torch.zeros(CLIP_WIDTH)}
        model._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": weights}], low_cpu_mem_usage=False)
        call = {
            "sample": torch.randn(4, 4, 4, 4),
            "timestep": 3,
            "encoder_hidden_states": torch.randn(1, 6, CLIP_WIDTH).repeat(4, 1, 1),
            "added_cond_kwargs": {"image_embeds": [torch.randn(4, 1, 5)]},
        }
    return model.eval().requires_grad_(False), call


def test_ip_adapters_are_converted_and_come_back() -> None:
    model, call = ip_unet()
    expected = model(**call).sample
    names = list(model.state_dict())
    for layer in model.modules():
        if isinstance(layer, known.Attention) and isinstance(layer.processor, nn.Module):
            other = known.IPAdapterAttnProcessor(layer.inner_dim, CLIP_WIDTH, (4,), 1.0)
            other.load_state_dict(layer.processor.state_dict())
            layer._modules["processor"] = other
    for backend in ("sdpa", "eager"):
        with left_as_it_was(model), attention_backend(model, backend):
            torch.testing.assert_close(model(**call).sample, expected, **CLOSE)
            assert list(model.state_dict()) == names
    assert list(model.state_dict()) == names


@pytest.mark.parametrize(
    ("target", "backend", "message"),
    [
        ("sd", "xformer", "unknown attention backend 'xformer': did you mean.*xformers"),
        ("sd", "xformers", "'xformers' is not installed: pip install xformers, or use 'sdpa'"),
        ("text", "sdpa", "CLIPTokenizer has no denoiser with attention layers"),
        ("linear", "sdpa", "Linear has no denoiser with attention layers"),
    ],
)
def test_an_impossible_backend_is_refused(target: str, backend: str, message: str) -> None:
    pipe = cached_pipe("sd")
    thing = {"sd": pipe, "text": pipe.tokenizer, "linear": nn.Linear(2, 2)}[target]
    with pytest.raises(InputError, match=message), attention_backend(thing, backend):
        pass


PACKAGE = """
import torch
calls = 0
class LowerTriangularMask: pass
def memory_efficient_attention(q, k, v, attn_bias=None, p=0.0, scale=None, *, op=None):
    global calls
    calls += 1
    if q.dtype != torch.float32:
        raise NotImplementedError("No operator found")
    scores = torch.einsum("blhd,bshd->bhls", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores if attn_bias is None else scores + attn_bias
    return torch.einsum("bhls,bshd->blhd", scores.softmax(-1), v)
"""


@pytest.fixture
def xformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The documented equivalent in the place of the package, which cannot be installed without a GPU."""
    (tmp_path / "xformers").mkdir()
    (tmp_path / "xformers" / "__init__.py").write_text("")
    (tmp_path / "xformers" / "ops.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in ("xformers", "xformers.ops"):
        sys.modules.pop(name, None)


def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_device", lambda *_: torch.device("cuda"))


def test_xformers_needs_cuda_and_auto_goes_without(xformers: Path) -> None:
    pipe = cached_pipe("sd")
    with pytest.raises(InputError, match="needs a model on CUDA, not on cpu"), attention_backend(pipe, "xformers"):
        pass
    with attention_backend(pipe, "auto") as used:
        assert used == "sdpa"


@pytest.mark.few(4)
@pytest.mark.parametrize("backend", ["auto", "xformers"])
@pytest.mark.parametrize("name", PIPELINES)
def test_the_way_through_xformers(name: str, backend: str, xformers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_cuda(monkeypatch)
    pipe = cached_pipe(name)
    expected = images(pipe, name)
    with left_as_it_was(pipe), attention_backend(pipe, backend) as used:
        actual = images(pipe, name)
    assert used == "xformers" and sys.modules["xformers.ops"].calls > 0
    torch.testing.assert_close(actual, expected, **CLOSE)


def test_auto_leaves_the_backend_of_an_outer_block(xformers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_cuda(monkeypatch)
    pipe = cached_pipe("sd")
    with left_as_it_was(pipe), attention_backend(pipe, "eager"), attention_backend(pipe, "auto"):
        images(pipe, "sd")
    assert sys.modules["xformers.ops"].calls == 0


def test_without_a_kernel_auto_uses_another_and_xformers_fails(xformers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_cuda(monkeypatch)
    model = copy.deepcopy(cached_pipe("sd").unet).to(torch.bfloat16)
    call = torch.ones(1, 4, 4, 4).bfloat16(), 3, torch.ones(1, 5, CLIP_WIDTH).bfloat16()
    with attention_backend(model, "auto"), torch.no_grad():
        torch.testing.assert_close(model(*call).sample, attention_free(model, call))
    with (
        pytest.raises(InputError, match=r"no kernel for torch\.bfloat16, heads of"),
        attention_backend(model, "xformers"),
    ):
        model(*call)


def attention_free(model: Any, call: tuple[Any, ...]) -> Tensor:
    """A copy of the model, outside every block."""
    plain = unet(cross_attention_dim=CLIP_WIDTH).to(torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        return plain(*call).sample


def test_a_broken_xformers_is_refused_and_auto_does_without_it(xformers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_cuda(monkeypatch)
    (xformers / "xformers" / "ops.py").write_text("raise ImportError('built for another torch')")
    pipe = cached_pipe("sd")
    with pytest.raises(InputError, match="built for another torch"), attention_backend(pipe, "xformers"):
        pass
    with attention_backend(pipe, "auto") as used:
        assert used == "sdpa"


def test_under_offload_the_device_that_counts_is_where_it_computes() -> None:
    model = copy.deepcopy(cached_pipe("sd").unet)
    assert attention._device(model, [model]) == torch.device("cpu")
    model._hf_hook = type("Hook", (), {"execution_device": "cuda:0"})()
    assert attention._device(model, [model]) == torch.device("cuda:0")


def test_auto_takes_any_pipeline() -> None:
    with attention_backend(cached_pipe("sd").tokenizer, "auto") as used:
        assert used == "sdpa"
