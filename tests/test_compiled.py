"""Compiled denoisers against the same pipelines as they are; the backend is one that compiles in seconds."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import cached_pipe, call_kwargs
from diffusers import FirstBlockCacheConfig
from rollouts import TWO_PROMPTS, call_of
from soft_rewards import in_precision
from torch import Generator, Tensor
from torch._dynamo.utils import counters

from steer.diffusion.batching import compiled, compiled_call, micro_batched
from steer.diffusion.preview import first_output
from steer.diffusion.step_hooks import SolverStep, hook_steps
from steer.errors import InputError
from steer.training.rollout import Rows, Sampler, log_probs

SMALL = {"rtol": 0, "atol": 1e-5}
OTHER = "a blue star"


def run(pipe: Any, family: str, **call: Any) -> Tensor:
    call = call_kwargs(family, 3, 3) | {"generator": Generator().manual_seed(0), "output_type": "pt"} | call
    return first_output(pipe(**call))


@pytest.fixture(autouse=True, scope="module")
def forgotten() -> Iterator[None]:
    """What was compiled here stays out of other tests."""
    yield
    torch.compiler.reset()


@contextmanager
def no_new_graph() -> Iterator[None]:
    """Another shape, or whatever else PyTorch compiles anew for, is an error; and so is not compiling at all."""
    before = counters["stats"]["calls_captured"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    assert counters["stats"]["calls_captured"] == before


@pytest.mark.parametrize("family", ["sd", "pixart", "sd3", "wan"])
def test_compiled_images_are_the_plain_ones(family: str) -> None:
    pipe = cached_pipe(family)
    plain, others = run(pipe, family), run(pipe, family, prompt=OTHER)
    own = dict(vars(pipe))
    before = counters["stats"]["calls_captured"]
    with compiled(pipe, backend="aot_eager") as view:
        torch.testing.assert_close(run(view, family), plain, **SMALL)
        assert counters["stats"]["calls_captured"] > before
        with no_new_graph():
            torch.testing.assert_close(run(view, family, prompt=OTHER), others, **SMALL)
            torch.testing.assert_close(run(view, family), plain, **SMALL)
    assert (others - plain).abs().max() > 1e-4
    assert vars(pipe) == own
    with no_new_graph():  # the view is plain again
        torch.testing.assert_close(run(view, family, height=16, width=16), run(pipe, family, height=16, width=16))


def resampled(event: SolverStep) -> tuple[Tensor, None] | None:
    return (torch.tensor([2, 2, 0]), None) if event.k == 0 else None


def test_resampling_and_rollouts_need_no_new_graph() -> None:
    pipe = cached_pipe("sd")

    def steer(one: Any) -> Tensor:
        with hook_steps(one, resampled, rows=3) as view:
            return run(view, "sd")

    rows = Rows((OTHER, "a star", OTHER), (1, 2, 3), (4, 5, 6))  # as many as there are images
    stored, _ = Sampler(pipe, call_of("sd")).rollout(rows)
    plain = steer(pipe)
    with compiled(pipe, backend="aot_eager") as fast:
        run(fast, "sd")
        with no_new_graph():
            torch.testing.assert_close(steer(fast), plain, **SMALL)
            sampler = Sampler(fast, call_of("sd"))
            again, _ = sampler.rollout(rows)
            torch.testing.assert_close(again.latents, stored.latents, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(log_probs(sampler, stored), stored.log_probs)


def overwriting(graph: torch.fx.GraphModule, inputs: list[Any], mode: str) -> Callable[..., list[Tensor]]:
    """A backend that does to its outputs what a replayed CUDA graph does: the next call writes over them."""
    assert mode == "reduce-overhead"
    buffers: list[Tensor] = []

    def run(*args: Any) -> list[Tensor]:
        outputs = graph(*args)
        buffers.extend(torch.empty_like(output) for output in outputs[len(buffers) :])
        return [buffer.copy_(output) for buffer, output in zip(buffers, outputs, strict=True)]

    return run


def test_what_a_graph_said_before_is_not_overwritten() -> None:
    transformer = cached_pipe("sd3").transformer
    call = compiled_call("transformer", transformer, graphs=True, backend=overwriting)
    x = [torch.randn(2, 4, 4, 4, generator=Generator().manual_seed(seed)) for seed in range(2)]
    rest = {"encoder_hidden_states": torch.ones(2, 7, 32), "pooled_projections": torch.ones(2, 32)}
    rest |= {"timestep": torch.tensor([3.0, 3.0]), "return_dict": False}
    with torch.no_grad():
        outputs = [call(one, **rest)[0] for one in x]
        for output, one in zip(outputs, x, strict=True):
            torch.testing.assert_close(output, transformer(one, **rest)[0], **SMALL)


def test_gradients_are_refused() -> None:
    pipe = cached_pipe("sd")
    stored, _ = Sampler(pipe, call_of("sd")).rollout(TWO_PROMPTS)
    with compiled(pipe, backend="aot_eager") as view:
        sampler = Sampler(view, call_of("sd"))
        with pytest.raises(InputError, match="unet is compiled for calls without gradients: use the plain pipeline"):
            sampler.replay(stored, lambda t, kernel, x_s: None, grad=True)


def test_offloading_is_refused() -> None:
    pipe = in_precision(cached_pipe("sd"))
    pipe.enable_model_cpu_offload(device="cpu")
    with pytest.raises(InputError, match=r"unet is offloaded: .*remove_all_hooks"), compiled(pipe):
        pass
    pipe.remove_all_hooks()
    with compiled(pipe, backend="aot_eager"):
        pass
    pipe.unet.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(InputError, match="unet is offloaded"), compiled(pipe):
        pass


def test_what_cannot_be_compiled_is_refused() -> None:
    pipe = cached_pipe("sd")
    with micro_batched(pipe, 1) as small, pytest.raises(InputError, match="compile first"), compiled(small):
        pass
    with pytest.raises(InputError, match="cuda_graphs need the denoiser on CUDA"), compiled(pipe, cuda_graphs=True):
        pass
    nothing = copy.copy(pipe)
    nothing.unet = None
    with pytest.raises(InputError, match="has no unet or transformer"), compiled(nothing):
        pass


def test_a_feature_cache_is_refused() -> None:
    pipe = in_precision(cached_pipe("flux"))
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(InputError, match=r"transformer has a feature cache: use .*disable_cache"), compiled(pipe):
        pass
