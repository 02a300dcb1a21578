"""Micro-batches and compiled denoisers against the same pipelines on whole batches, as they are."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import PIPELINES, cached_pipe, call_kwargs
from diffusers import FirstBlockCacheConfig
from pairwise import hard_but
from rollouts import TWO_PROMPTS, call_of
from soft_rewards import in_precision
from torch import Generator, Tensor, nn
from torch._dynamo.utils import counters
from zoo.build import cached
from zoo.build import call_of as zoo_call

from steer.diffusion.batching import ActiveRows, MicroBatches, compiled, compiled_call, micro_batched, select_rows
from steer.diffusion.preview import first_output
from steer.diffusion.step_hooks import SolverStep, hook_steps
from steer.errors import InputError
from steer.training.rollout import Rows, Sampler, log_probs

# Micro-batches


FAMILIES = list(PIPELINES)
SMALL = {"rtol": 0, "atol": 1e-5}


def run(pipe: Any, family: str, images: int = 3, **call: Any) -> Tensor:
    call = call_kwargs(family, images, 2) | {"generator": Generator().manual_seed(0), "output_type": "pt"} | call
    return first_output(pipe(**call))


def denoiser(pipe: Any) -> nn.Module:
    return getattr(pipe, "unet", None) or pipe.transformer


def rows_in(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    return len(args[0] if args else next(kwargs[name] for name in ("sample", "hidden_states", "x") if name in kwargs))


@contextmanager
def before_calls(module: nn.Module, do: Callable[[int], None]) -> Iterator[None]:
    """Tells how many rows each call of a module has."""
    hook = module.register_forward_pre_hook(lambda *call: do(rows_in(*call)), with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def room_for(
    module: nn.Module, rows: int, error: Callable[[], Exception] = torch.OutOfMemoryError
) -> Iterator[list[int]]:
    """A module that more rows than these do not fit into; the rows of the calls that did."""
    sizes: list[int] = []

    def refuse(count: int) -> None:
        if count > rows:
            raise error()
        sizes.append(count)

    with before_calls(module, refuse):
        yield sizes


@pytest.mark.few(8)
@pytest.mark.parametrize("rows", [1, 2, 3, None])
@pytest.mark.parametrize("family", FAMILIES)
def test_images_of_every_family_are_those_of_the_whole_batch(family: str, rows: int | None) -> None:
    pipe, sizes = cached_pipe(family), []
    whole = run(pipe, family)
    own = dict(vars(pipe))
    with micro_batched(pipe, rows) as view, before_calls(denoiser(pipe), sizes.append):
        torch.testing.assert_close(run(view, family), whole, **SMALL)
    assert vars(pipe) == own
    per_step = 3 if family in ("flux", "wan") else 6  # Wan calls twice, Flux has its guidance inside
    assert max(sizes) == (per_step if rows is None else rows)
    assert sum(sizes) == per_step * 2 * (2 if family == "wan" else 1) // (2 if family == "img2img" else 1)


@pytest.mark.parametrize("images", [4, 10])
def test_positions_that_are_as_many_as_rows_stay_whole(images: int) -> None:
    """Flux, 8 px: 4 places of the image, 10 of the text."""
    pipe = cached_pipe("flux")
    with micro_batched(pipe, 3) as view:
        torch.testing.assert_close(run(view, "flux", images), run(pipe, "flux", images), **SMALL)
    ids = torch.zeros(images, 3)
    cut = select_rows(
        {"img_ids": ids, "txt_ids": ids, "guidance": ids[:, 0], "timestep": ids[0, 0]}, images, slice(1, 3)
    )
    assert [tuple(value.shape) for value in cut.values()] == [(images, 3), (images, 3), (2,), ()]


def test_a_batch_as_long_as_its_position_lists_and_with_two_images_each_is_split() -> None:
    """Kandinsky 5 has positions for each axis; Wan's first and last image are two entries of each row."""
    ids, images = torch.arange(2), torch.arange(8.0).view(4, 2)
    given = {"visual_rope_pos": [ids, ids, ids], "text_rope_pos": ids, "encoder_hidden_states_image": images}
    cut = select_rows(given, 2, slice(1, 2))
    assert all(torch.equal(one, ids) for one in (*cut["visual_rope_pos"], cut["text_rope_pos"]))
    assert torch.equal(cut["encoder_hidden_states_image"], images[2:])


@pytest.mark.few(1)
@pytest.mark.parametrize("name", hard_but(["ZImage", "HiDreamImage"], "ZImage"))  # HiDream takes a minute each
@pytest.mark.parametrize("rows", [1, 2, None])
def test_latents_in_a_list_and_texts_of_every_layer_are_split(name: str, rows: int | None) -> None:
    """Z-Image's latents are a list of rows; HiDream's texts have the layers of their encoder before the rows."""
    pipe, counts = cached(name), []
    call = zoo_call(name) | {"num_images_per_prompt": 3, "output_type": "pt"}
    whole = first_output(pipe(**call, generator=Generator().manual_seed(0)))
    with micro_batched(pipe, rows) as view, before_calls(pipe.transformer, counts.append):
        images = first_output(view(**call, generator=Generator().manual_seed(0)))
    torch.testing.assert_close(images, whole, **SMALL)
    assert set(counts) == {rows or 6} and sum(counts) == 6 * 4  # guidance doubles three rows, in four steps


class ListDenoiser(nn.Module):
    """A denoiser of rows in lists; each row's output is its latents times its own timestep, plus its text's sum."""

    def forward(self, x: list[Tensor], t: Tensor, texts: list[Tensor]) -> tuple[list[Tensor]]:
        return ([one * time + text.sum() for one, time, text in zip(x, t, texts, strict=True)],)


def test_lists_of_rows_are_selected_whole_whatever_their_tensors_lengths() -> None:
    """Latents of 4 channels and texts of 4 tokens, in a batch of 4 rows: nothing inside a row is cut."""
    latents, texts = (list(torch.randn(4, 4, size, generator=Generator().manual_seed(size))) for size in (3, 5))
    t, live = torch.arange(1.0, 5.0), ActiveRows()
    live.keep(torch.tensor([1, 3]), 4)
    pipe = SimpleNamespace(transformer=ListDenoiser(), maybe_free_model_hooks=lambda: None)
    (output,) = live.view(pipe).transformer(latents, t, texts=texts)
    (whole,) = ListDenoiser()(latents, t, texts)
    assert len(output) == 4 and all(torch.equal(output[row], whole[row]) for row in (1, 3))
    assert all(torch.equal(output[row], torch.zeros(4, 3)) for row in (0, 2))


def test_a_controlnet_is_split_with_the_denoiser() -> None:
    pipe, sizes = cached_pipe("controlnet"), []
    with micro_batched(pipe, 4) as view, before_calls(pipe.controlnet, sizes.append):
        run(view, "controlnet")
    assert sizes == [4, 2] * 2


def test_full_memory_halves_the_rows_and_changes_no_image() -> None:
    pipe = cached_pipe("sd")
    whole = run(pipe, "sd", 4)
    with micro_batched(pipe) as view, room_for(pipe.unet, 3) as sizes:
        torch.testing.assert_close(run(view, "sd", 4), whole, **SMALL)
        assert sizes == [2] * 8  # of 8 rows; 4 were tried, and neither 8 nor 4 again
        run(view, "sd", 1)
        assert sizes[8:] == [2] * 2
    with micro_batched(pipe, 5) as view, room_for(pipe.unet, 3) as sizes:
        torch.testing.assert_close(run(view, "sd", 4), whole, **SMALL)
    assert sizes == [3, 3, 2] * 2


def test_rows_that_are_done_are_not_done_again() -> None:
    pipe, done = cached_pipe("sd"), []
    full = iter([False, True])

    def sometimes(count: int) -> None:
        if next(full, False):
            raise torch.OutOfMemoryError
        done.append(count)

    whole = run(pipe, "sd", 4, num_inference_steps=1)
    with micro_batched(pipe, 4) as view, before_calls(pipe.unet, sometimes):
        torch.testing.assert_close(run(view, "sd", 4, num_inference_steps=1), whole, **SMALL)
    assert done == [4, 2, 2]


def test_a_row_that_does_not_fit_is_refused_with_a_remedy() -> None:
    pipe = cached_pipe("sd")
    with (
        micro_batched(pipe) as view,
        room_for(pipe.unet, 0),
        pytest.raises(
            InputError, match=r"unet: .* full with a single row: use smaller images.*enable_model_cpu_offload"
        ),
    ):
        run(view, "sd")


def test_another_error_is_nobodys_to_swallow() -> None:
    pipe = cached_pipe("sd")

    def full() -> Exception:
        return RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes")

    with micro_batched(pipe) as view, room_for(pipe.unet, 3, full), pytest.raises(RuntimeError, match="DefaultCPU"):
        run(view, "sd")


@pytest.mark.few(1)
@pytest.mark.parametrize("family", ["sd", "controlnet", "sd3"])
def test_offloading_hooks_still_work(family: str) -> None:
    """accelerate's own, with the CPU for a device."""
    pipe = in_precision(cached_pipe(family), torch.float32)
    whole = run(pipe, family)
    pipe.enable_model_cpu_offload(device="cpu")
    hooks = pipe._all_hooks
    with micro_batched(pipe, 2) as view:
        torch.testing.assert_close(run(view, family), whole, **SMALL)
        torch.testing.assert_close(run(view, family), whole, **SMALL)
    assert pipe._all_hooks is not hooks and len(pipe._all_hooks) == len(hooks)  # attached again after each call
    assert type(denoiser(pipe)._hf_hook).__name__ == "CpuOffload"
    pipe.remove_all_hooks()
    torch.testing.assert_close(run(pipe, family), whole, **SMALL)


def test_resampling_and_rollouts_go_through_a_view() -> None:
    pipe = cached_pipe("sd")

    def resample(event: SolverStep) -> tuple[Tensor, None] | None:
        return (torch.tensor([2, 2, 0]), None) if event.k == 1 else None

    def sampled(one: Any) -> Tensor:
        with hook_steps(one, resample, rows=3) as view:
            return run(view, "sd", num_inference_steps=3)

    plain, _ = Sampler(pipe, call_of("sd")).rollout(TWO_PROMPTS)
    with micro_batched(pipe, 2) as view:
        torch.testing.assert_close(sampled(view), sampled(pipe), **SMALL)
        sampler = Sampler(view, call_of("sd"))
        stored, _ = sampler.rollout(TWO_PROMPTS)
        torch.testing.assert_close(stored.latents, plain.latents, rtol=1e-5, atol=1e-5)
        assert torch.equal(log_probs(sampler, stored), stored.log_probs)


@pytest.mark.hard
def test_a_compiled_view_is_split() -> None:
    pipe, sizes = cached_pipe("pixart"), []
    with compiled(pipe, backend="aot_eager") as fast, micro_batched(fast, 4) as view:
        with before_calls(pipe.transformer, sizes.append):
            images = run(view, "pixart")
        torch.testing.assert_close(images, run(pipe, "pixart"), **SMALL)


def test_half_precision_stays() -> None:
    pipe = in_precision(cached_pipe("sd"), torch.bfloat16)
    with micro_batched(pipe, 2) as view:
        latents = run(view, "sd", output_type="latent")
    assert latents.dtype == torch.bfloat16
    torch.testing.assert_close(latents, run(pipe, "sd", output_type="latent"), rtol=0, atol=0.1)


def test_outputs_as_objects_and_gradients() -> None:
    unet = cached_pipe("sd").unet
    text = torch.randn(5, 7, 16, generator=Generator().manual_seed(1))
    inputs = [torch.randn(5, 4, 4, 4, generator=Generator().manual_seed(0)).requires_grad_() for _ in range(2)]
    whole = unet(inputs[0], 3, text)
    components = MicroBatches("unet", unet, 2)(inputs[1], 3, encoder_hidden_states=text)
    assert type(components) is type(whole)
    torch.testing.assert_close(components.sample, whole.sample, **SMALL)
    for output, x in zip((whole, components), inputs, strict=True):
        (x.grad,) = torch.autograd.grad(output.sample.square().sum(), x)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-4, atol=1e-5)


def test_after_the_block_the_view_is_plain() -> None:
    pipe, sizes = cached_pipe("sd"), []
    with micro_batched(pipe, 1) as view:
        assert view.unet is not pipe.unet and view.unet.config is pipe.unet.config
    assert view.unet is pipe.unet
    with before_calls(pipe.unet, sizes.append):
        run(view, "sd")
    assert sizes == [6, 6]


def test_what_cannot_be_split_is_refused() -> None:
    with pytest.raises(InputError, match="rows must be at least 1, got 0"), micro_batched(cached_pipe("sd"), 0):
        pass
    nothing = in_precision(cached_pipe("sd"))
    nothing.unet = None
    with pytest.raises(InputError, match="has none of unet, transformer"), micro_batched(nothing):
        pass
    with pytest.raises(InputError, match="takes no single tensor of latents: its batch cannot be split"):
        MicroBatches("unet", cached_pipe("sd").unet, 1)([torch.zeros(4, 4, 4)], 3)


# Compiled denoisers


OTHER = "a blue star"


def run_steps(pipe: Any, family: str, **call: Any) -> Tensor:
    call = call_kwargs(family, 3, 3) | {"generator": Generator().manual_seed(0), "output_type": "pt"} | call
    return first_output(pipe(**call))


@pytest.fixture(autouse=True, scope="module")
def forgotten() -> Iterator[None]:
    """Reset the compiler, for the modules that run after this one."""
    yield
    torch.compiler.reset()


@contextmanager
def no_new_graph() -> Iterator[None]:
    """Fail if PyTorch recompiles, for another shape or any other reason, or does not compile at all."""
    before = counters["stats"]["calls_captured"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    assert counters["stats"]["calls_captured"] == before


@pytest.mark.hard
@pytest.mark.parametrize("family", ["sd", "pixart", "sd3", "wan"])
def test_compiled_images_are_the_plain_ones(family: str) -> None:
    pipe = cached_pipe(family)
    plain, others = run_steps(pipe, family), run_steps(pipe, family, prompt=OTHER)
    own = dict(vars(pipe))
    before = counters["stats"]["calls_captured"]
    with compiled(pipe, backend="aot_eager") as view:
        torch.testing.assert_close(run_steps(view, family), plain, **SMALL)
        assert counters["stats"]["calls_captured"] > before
        with no_new_graph():
            torch.testing.assert_close(run_steps(view, family, prompt=OTHER), others, **SMALL)
            torch.testing.assert_close(run_steps(view, family), plain, **SMALL)
    assert (others - plain).abs().max() > 1e-4
    assert vars(pipe) == own
    with no_new_graph():  # the view is plain again
        torch.testing.assert_close(
            run_steps(view, family, height=16, width=16), run_steps(pipe, family, height=16, width=16)
        )


def resampled(event: SolverStep) -> tuple[Tensor, None] | None:
    return (torch.tensor([2, 2, 0]), None) if event.k == 0 else None


@pytest.mark.hard
def test_resampling_and_rollouts_need_no_new_graph() -> None:
    pipe = cached_pipe("sd")

    def steer(one: Any) -> Tensor:
        with hook_steps(one, resampled, rows=3) as view:
            return run_steps(view, "sd")

    rows = Rows((OTHER, "a star", OTHER), (1, 2, 3), (4, 5, 6))  # as many as there are images
    stored, _ = Sampler(pipe, call_of("sd")).rollout(rows)
    plain = steer(pipe)
    with compiled(pipe, backend="aot_eager") as fast:
        run_steps(fast, "sd")
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

    def run_steps(*args: Any) -> list[Tensor]:
        outputs = graph(*args)
        buffers.extend(torch.empty_like(output) for output in outputs[len(buffers) :])
        return [buffer.copy_(output) for buffer, output in zip(buffers, outputs, strict=True)]

    return run_steps


@pytest.mark.hard
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
