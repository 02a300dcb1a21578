"""Models as people have them: single files, folders with half-precision weights alone, paths that lead nowhere."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import cached_pipe
from rollouts import fresh_pipe
from safetensors.torch import save_file
from torch import Tensor

from steer.apps.models import load_pipeline
from steer.errors import InputError

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
# Of the tiny U-Net of conftest: two levels with one layer each.
UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.attentions.0": "input_blocks.1.1",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.upsamplers.0": "output_blocks.1.1",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.attentions.0": "output_blocks.2.1",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
    "up_blocks.1.attentions.1": "output_blocks.3.1",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE = {
    "down_blocks.": "down.",
    "up_blocks.0": "up.1",
    "up_blocks.1": "up.0",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "resnets.": "block.",
    "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out",
    "attn_1.group_norm": "attn_1.norm",
    "attn_1.to_q": "attn_1.q",
    "attn_1.to_k": "attn_1.k",
    "attn_1.to_v": "attn_1.v",
    "attn_1.to_out.0": "attn_1.proj_out",
}


def original_layout(pipe: Any) -> dict[str, Tensor]:
    """The weights of a tiny Stable Diffusion under the names of its trainers' single file."""
    state: dict[str, Tensor] = {}
    for name, value in pipe.unet.state_dict().items():
        start = next(one for one in UNET if name.startswith(f"{one}."))
        rest = name.removeprefix(start)
        if "resnets" in start:
            inner = rest.split(".")[1]
            rest = rest.replace(inner, RESNET[inner], 1)
        state[f"model.diffusion_model.{UNET[start]}{rest}"] = value
    for name, value in pipe.vae.state_dict().items():
        for ours, theirs in VAE.items():
            name = name.replace(ours, theirs)
        convolution = "attn_1" in name and name.endswith("weight") and value.dim() == 2
        state[f"first_stage_model.{name}"] = value[:, :, None, None] if convolution else value
    for name, value in pipe.text_encoder.state_dict().items():
        state[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = value
    return {name: value.contiguous() for name, value in state.items()}


def image(pipe: Any) -> Tensor:
    call: dict[str, Any] = {"num_inference_steps": 2, "height": 8, "width": 8, "output_type": "pt"}
    return pipe("a red circle", generator=torch.Generator().manual_seed(0), **call).images


@pytest.mark.parametrize("place", ["its folder", "a folder of its name", "a folder that is named"])
def test_a_single_file_is_the_model_that_it_was_made_of(place: str, tmp_path: Path) -> None:
    pipe, file = fresh_pipe("sd"), tmp_path / "model.safetensors"
    folder = {"its folder": tmp_path, "a folder of its name": tmp_path / "model"}.get(place, tmp_path / "elsewhere")
    pipe.save_pretrained(folder)
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    save_file(original_layout(pipe), file)
    loaded = load_pipeline(str(file), "cpu", config=str(folder) if folder.name == "elsewhere" else None)
    assert type(loaded) is type(pipe)
    torch.testing.assert_close(image(loaded), image(pipe), rtol=0, atol=1e-5)


def test_a_single_file_without_a_configuration_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    save_file(original_layout(cached_pipe("sd")), tmp_path / "model.safetensors")
    with pytest.raises(
        InputError, match=r"a single file needs a configuration.*give --config FOLDER of such"
    ) as raised:
        load_pipeline(str(tmp_path / "model.safetensors"), "cpu")
    assert "\n" not in str(raised.value)


def test_a_variant_and_a_configuration_that_do_not_belong_are_refused(tmp_path: Path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    file = str(tmp_path / "model.safetensors")
    for model, given, message in (
        (file, {"variant": "fp16"}, "is a single file, which has none"),
        (file, {"config": str(tmp_path)}, "no model_index.json in this folder"),
        ("scenes", {"config": str(tmp_path)}, "is no single file"),
        ("scenes", {"variant": "fp17"}, "cannot be loaded"),
    ):
        with pytest.raises(InputError, match=message):
            load_pipeline(model, "cpu", **given)


def test_a_folder_of_half_precision_weights_alone(tmp_path: Path) -> None:
    pipe = fresh_pipe("sd").to(torch.float16)
    pipe.save_pretrained(tmp_path, variant="fp16")
    assert not list(tmp_path.rglob("diffusion_pytorch_model.safetensors"))
    loaded = load_pipeline(str(tmp_path), "cpu", "float32")
    for name, value in pipe.unet.state_dict().items():
        assert torch.equal(loaded.unet.state_dict()[name], value.float())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone.safetensors", "no such file"),
        ("models/gone.safetensors", "no such file"),
        ("~/nowhere", "no such file"),
        ("./nowhere", "unknown model"),
        ("models/", "unknown model"),
    ],
)
def test_a_path_that_leads_nowhere_is_no_name_on_the_hub(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        load_pipeline(name, "cpu")


def test_a_local_file_is_never_read_as_a_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "model.ckpt").write_bytes(b"")
    with pytest.raises(InputError, match=r"a single file must be .safetensors"):
        load_pipeline("some/model.ckpt", "cpu")
