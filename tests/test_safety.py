"""A safety checker that blackens: images are scored as they were made, and the output says which are black."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROMPT, Steer, stable_diffusion_parts
from diffusers import StableDiffusionPipeline
from torch import Generator, Tensor
from transformers import CLIPImageProcessor

from steer import BestOfNPipeline, FKSteeringPipeline
from steer.apps import sampling as sample_module

CALL: dict[str, Any] = {"num_inference_steps": 4, "num_particles": 4, "output_type": "pt"}


class FakeChecker(torch.nn.Module):
    """Blackens the images of these places, as diffusers' own does: in place, as tensors or as arrays."""

    def __init__(self, flagged: tuple[int, ...]) -> None:
        super().__init__()
        self.flagged = flagged
        self.dtype, self.device = torch.float32, torch.device("cpu")

    def forward(self, images: Any, clip_input: Tensor) -> tuple[Any, list[bool]]:
        assert len(clip_input) == len(images)
        for place in self.flagged:
            images[place] = 0 * images[place]
        return images, [place in self.flagged for place in range(len(images))]


def checked(flagged: tuple[int, ...]) -> StableDiffusionPipeline:
    torch.manual_seed(0)
    components = stable_diffusion_parts() | {"feature_extractor": CLIPImageProcessor(size=8, crop_size=8)}
    pipe = StableDiffusionPipeline(**components | {"safety_checker": FakeChecker(flagged)})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def made(flagged: tuple[int, ...], method: type = BestOfNPipeline, **given: Any) -> Any:
    return method(checked(flagged), "brightness")(PROMPT, generator=Generator().manual_seed(3), **CALL, **given)


@pytest.mark.parametrize("method", [BestOfNPipeline, FKSteeringPipeline])
def test_flagged_images_are_scored_as_they_were_made(method: type) -> None:
    plain, out = made((), method), made((1, 2), method)
    assert torch.equal(out.rewards, plain.rewards) and torch.equal(out.order, plain.order)
    expected = (out.order == 1) | (out.order == 2)
    assert torch.equal(out.nsfw_content_detected, expected)
    assert not plain.nsfw_content_detected.any()
    for row, flag in enumerate(expected[0]):
        assert torch.equal(out.images[row], torch.zeros_like(out.images[row]) if flag else plain.images[row])
    again = out.in_slot_order()
    assert again.nsfw_content_detected.tolist() == [[False, True, True, False]]


def test_survivors_of_a_particle_schedule_keep_their_flags() -> None:
    out = made((0,), FKSteeringPipeline, particle_schedule={2: 2})
    assert torch.equal(out.nsfw_content_detected, out.order == 0)


def test_a_pipeline_without_a_checker_has_no_flags() -> None:
    pipe = checked(())
    pipe.register_modules(safety_checker=None)
    out = BestOfNPipeline(pipe, "brightness")(PROMPT, **CALL)
    assert out.nsfw_content_detected is None


def test_the_command_says_so(steer: Steer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_module, "load_pipeline", lambda *_, **__: checked((0,)))
    words = [PROMPT, "--method", "fk", "--reward", "brightness", "--particles", "2", "--steps", "3"]
    code, _, err = steer("sample", *words, "--out", tmp_path)
    assert code == 0 and "the model's safety checker blackened 2 of 4 images" in err
    entry = json.loads((tmp_path / "report.json").read_text())["prompts"][0]
    assert sorted(entry["nsfw_content_detected"]) == [False, True] and sum(entry["base"]["nsfw_content_detected"]) == 1
