"""Modular pipelines of diffusers against their own calls, and steered like all others."""

import inspect
from typing import Any

import diffusers
import pytest
import torch
from soft_rewards import redness, seeded
from zoo.build import build, call_of

from steer import BestOfNPipeline, FKSteeringPipeline
from steer.diffusion.modular import as_callable
from steer.errors import InputError
from steer.pipelines.compatibility import CHECKS, PipelineCheck

BLOCKS = {
    "StableDiffusionXL": "StableDiffusionXLAutoBlocks",
    "Flux": "FluxAutoBlocks",
    "QwenImage": "QwenImageAutoBlocks",
    "ZImage": "ZImageAutoBlocks",
}
OTHERS = {
    "StableDiffusion3": "StableDiffusion3AutoBlocks",
    "Flux2": "Flux2AutoBlocks",
    "Wan": "WanBlocks",
    "LTX": "LTXAutoBlocks",
}


def modular(name: str) -> Any:
    """Make the modular pipeline of a case of the zoo, on the components of its plain one."""
    blocks = getattr(diffusers, (BLOCKS | OTHERS)[name])()
    pipe = blocks.init_pipeline()
    known = [spec.name for spec in blocks.expected_components]
    pipe.update_components(
        **{part: one for part, one in build(name).components.items() if part in known and one is not None}
    )
    return pipe


def arguments(pipe: Any, name: str) -> dict[str, Any]:
    known = [one.name for one in pipe.blocks.inputs]
    return {key: value for key, value in call_of(name).items() if key in known}


@pytest.mark.few(1)
@pytest.mark.parametrize("name", BLOCKS)
def test_a_modular_pipeline_is_steered_exactly(name: str) -> None:
    """λ = 0 gives the images of the modular call itself; particles that trade places end swapped."""
    pipe = modular(name)
    call = arguments(pipe, name) | {"num_images_per_prompt": 2, "output_type": "pt"}
    plain = pipe(**call, generator=[seeded(3), seeded(4)], output="images")
    check = PipelineCheck(pipe, arguments(pipe, name))
    assert torch.equal(check.plain_batch[1], plain)
    row = check.row(["steps", "swap", "lam0", "preview"])
    assert {one: outcome.state for one, outcome in row.items()} == dict.fromkeys(row, "ok"), row


@pytest.mark.hard
@pytest.mark.parametrize("name", [*BLOCKS, *OTHERS])
def test_a_modular_pipeline_passes_every_check(name: str) -> None:
    pipe = modular(name)
    row = PipelineCheck(pipe, arguments(pipe, name)).row()
    assert {one: outcome.state for one, outcome in row.items()} == dict.fromkeys(CHECKS, "ok"), row


def test_best_of_n_and_fk_return_the_best_images_of_a_modular_pipeline() -> None:
    pipe = modular("ZImage")
    call = arguments(pipe, "ZImage")
    generators = [seeded(row) for row in range(3)]
    plain = torch.cat([pipe(**call, output_type="pt", generator=one, output="images") for one in generators])
    given = {"num_particles": 3, "generator": [seeded(row) for row in range(3)], "output_type": "pt"}
    out = BestOfNPipeline(pipe, redness)(**call, **given)
    torch.testing.assert_close(out.images[0], plain[redness(plain, [""] * 3).argmax()], atol=1e-5, rtol=0)
    given["generator"] = [seeded(row) for row in range(3)]
    steered = FKSteeringPipeline(pipe, redness)(**call, **given, lam=1e6, ess_threshold=1.0)
    assert any((ancestors != torch.arange(3)).any() for ancestors in steered.ancestors)


def test_the_view_shares_the_attributes_of_the_pipeline_and_leaves_its_state_alone() -> None:
    pipe = modular("StableDiffusionXL")
    before = dict(vars(pipe.guider))
    steer = BestOfNPipeline(pipe, redness)
    steer(**arguments(pipe, "StableDiffusionXL"), num_particles=2)
    assert vars(pipe.guider) == before and type(pipe) is diffusers.StableDiffusionXLModularPipeline
    scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.scheduler = scheduler
    assert steer.pipe.scheduler is scheduler


def test_the_arguments_are_the_inputs_of_the_blocks() -> None:
    view = as_callable(modular("ZImage"))
    names = {*inspect.signature(type(view).__call__).parameters}
    assert {"prompt", "num_inference_steps", "generator", "output_type"} <= names
    assert as_callable(view) is view
    with pytest.raises(InputError, match="ZImageModularPipeline takes no argument 'guidance': did you mean"):
        FKSteeringPipeline(view, redness)("a fox", guidance=2.0)


def test_text_is_encoded_once() -> None:
    pipe = modular("ZImage")
    calls: list[int] = []
    pipe.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    pipe(**arguments(pipe, "ZImage"), generator=seeded(3))
    plain = len(calls)
    FKSteeringPipeline(pipe, redness)(**arguments(pipe, "ZImage"), num_particles=2)
    assert len(calls) == 2 * plain


def test_blocks_that_do_not_decode_are_refused() -> None:
    blocks = diffusers.ZImageAutoBlocks().sub_blocks
    kept = {name: block for name, block in blocks.items() if name != "decode"}
    pipe = diffusers.SequentialPipelineBlocks.from_blocks_dict(kept).init_pipeline()
    with pytest.raises(InputError, match=r"ModularPipeline returns .*latents.*: add the blocks that decode"):
        FKSteeringPipeline(pipe, redness)
