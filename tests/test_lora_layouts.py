"""`steer convert-lora`: diffusers' layout to kohya's and back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_trainable import fresh_pipe, image, move

from steer.apps.models import adapter_applied
from steer.errors import InputError
from steer.training.lora_layouts import convert_lora, to_diffusers, to_kohya
from steer.training.trainable import LoRA

Steer = Callable[..., tuple[int, str, str]]


def adapter(name: str, folder: Path, alpha: float | None = None, **options: Any) -> Any:
    """A pipeline with a moved LoRA, which is in a folder too."""
    pipe = fresh_pipe(name)
    lora = LoRA(pipe, 2, alpha, **options)
    move(lora, 0.3)
    lora.write(lora.state(), folder)
    return pipe


@pytest.mark.few(2)
@pytest.mark.parametrize(("name", "alpha"), [("sd", None), ("sd", 5.0), ("sdxl", 3.0), ("flux", None), ("flux", 3.0)])
def test_a_round_trip_leaves_every_tensor_and_diffusers_loads_both(
    name: str, alpha: float | None, tmp_path: Path
) -> None:
    there = image(adapter(name, tmp_path / "first", alpha), name)
    kohya = convert_lora(tmp_path / "first", tmp_path / "kohya.safetensors")
    back = convert_lora(kohya, tmp_path / "back")
    first, again = load_file(tmp_path / "first/pytorch_lora_weights.safetensors"), load_file(back)
    assert first.keys() == again.keys() and len(first) > 10
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    for place in (kohya, back.parent):
        loaded = fresh_pipe(name)
        loaded.load_lora_weights(str(place))
        torch.testing.assert_close(image(loaded, name), there, atol=1e-6, rtol=0)
    trained = fresh_pipe(name)  # and a training starts from it
    LoRA(trained, 2, alpha).load_initial_adapter(str(back.parent))
    assert torch.equal(image(trained, name), there)


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["sd", "sdxl", "flux"])
def test_a_dora_round_trips_and_is_applied_by_its_formula(name: str, tmp_path: Path) -> None:
    """W' = m (W + α/r B A)/‖W + α/r B A‖, norms of outputs, as ComfyUI reads `dora_scale` (out, 1)."""
    there = image(adapter(name, tmp_path / "first", 3.0, use_dora=True), name)
    kohya = convert_lora(tmp_path / "first", tmp_path / "kohya.safetensors")
    state, merged = load_file(kohya), fresh_pipe(name)
    denoiser = merged.transformer if name == "flux" else merged.unet
    kind = "transformer" if name == "flux" else "unet"
    layers = {f"lora_{kind}_{path.replace('.', '_')}": layer for path, layer in denoiser.named_modules()}
    for key in [key.removesuffix(".dora_scale") for key in state if key.endswith(".dora_scale")]:
        weight = layers[key].weight.data
        weight += state[f"{key}.alpha"] / 2 * state[f"{key}.lora_up.weight"] @ state[f"{key}.lora_down.weight"]
        weight *= state[f"{key}.dora_scale"] / weight.norm(dim=1, keepdim=True)
    torch.testing.assert_close(image(merged, name), there, atol=1e-5, rtol=0)
    back = convert_lora(kohya, tmp_path / "back")
    first, again = load_file(tmp_path / "first/pytorch_lora_weights.safetensors"), load_file(back)
    assert first.keys() == again.keys() and all(torch.equal(value, again[key]) for key, value in first.items())
    assert sum("magnitude" in key for key in again) == len(again) // 3 > 3
    for place in (kohya, back.parent):
        loaded = fresh_pipe(name)
        with adapter_applied(loaded, str(place)):
            torch.testing.assert_close(image(loaded, name), there, atol=1e-5, rtol=0)
    weighted = adapter_applied(fresh_pipe(name), f"{kohya}:0.5")
    with pytest.raises(InputError, match="a DoRA in a sum, or with a weight"), weighted:
        pass


def test_norms_of_inputs_and_missing_norms_are_refused() -> None:
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    state = {f"{layer}.lora_down.weight": torch.ones(2, 3), f"{layer}.lora_up.weight": torch.ones(4, 2)}
    with pytest.raises(InputError, match=r"dora_scale must be a norm for each output, \(4, 1\), got \(1, 3\)"):
        to_diffusers(state | {f"{layer}.dora_scale": torch.ones(1, 3)})
    other = layer.replace("to_q", "to_k")
    more = {key.replace(layer, other): value for key, value in state.items()}
    with pytest.raises(InputError, match=r"\(4, 1\), got none"):
        to_diffusers(state | more | {f"{layer}.dora_scale": torch.ones(4, 1)})


def test_names_and_scales_are_kohyas(tmp_path: Path) -> None:
    adapter("sd", tmp_path, 5.0)
    kohya = load_file(convert_lora(tmp_path, tmp_path / "k.safetensors"))
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
    assert {f"{layer}.lora_down.weight", f"{layer}.lora_up.weight", f"{layer}.alpha"} <= kohya.keys()
    assert all(key.startswith("lora_unet_") and key.count(".") <= 2 for key in kohya)
    assert {float(value) for key, value in kohya.items() if key.endswith(".alpha")} == {5.0}
    ranked = to_kohya({"unet.x.lora_A.weight": torch.ones(4, 3)}, {"lora_alpha": 3.0, "use_rslora": True})
    assert float(ranked["lora_unet_x.alpha"]) == 6.0  # α/√r = 6/4 by kohya's rule


def test_blocks_that_kohya_numbers_are_sdxls() -> None:
    """The names of kohya's own training of SDXL."""
    layer = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    state = {f"{layer}.lora_down.weight": torch.ones(2, 3), f"{layer}.lora_up.weight": torch.ones(4, 2)}
    tensors, denoiser, alpha = to_diffusers(state | {f"{layer}.alpha": torch.tensor(1.0)})
    assert (denoiser, alpha) == ("unet", 1.0)
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    assert set(tensors) == {f"{name}.lora_A.weight", f"{name}.lora_B.weight"}


def test_what_cannot_be_converted_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no LoRA file"):
        convert_lora(tmp_path / "nowhere", tmp_path / "k.safetensors")
    down = {"text_encoder.a.lora_A.weight": torch.ones(2, 3)}
    with pytest.raises(InputError, match="has no name in kohya's layout"):
        to_kohya(down, {})
    ranks = {"unet.a.lora_A.weight": torch.ones(2, 3), "unet.b.lora_A.weight": torch.ones(4, 3)}
    with pytest.raises(InputError, match=r"ranks of the layers must be equal, got \[2, 4\]"):
        to_kohya(ranks, {})
    text = {"lora_te_a.lora_down.weight": torch.ones(2, 3)}
    with pytest.raises(InputError, match="is not of a UNet or a Flux transformer"):
        to_diffusers(text)
    save_file({"lora_unet_a.lora_down.weight": torch.ones(2, 3)}, tmp_path / "half.safetensors")
    with pytest.raises(InputError, match="diffusers does not know these names"):
        convert_lora(tmp_path / "half.safetensors", tmp_path / "out")


def test_the_command_writes_the_other_layout(steer: Steer, tmp_path: Path) -> None:
    adapter("sd", tmp_path / "final", 5.0)
    code, out, err = steer("convert-lora", tmp_path / "final", tmp_path / "k.safetensors")
    assert (code, err) == (0, "") and out.strip() == str(tmp_path / "k.safetensors")
    code, out, _ = steer("convert-lora", tmp_path / "k.safetensors", tmp_path / "back")
    assert code == 0 and (tmp_path / "back/pytorch_lora_weights.safetensors").is_file()
    code, _, err = steer("convert-lora", tmp_path / "final", tmp_path / "folder")
    assert code == 2 and "give it a name that ends in .safetensors" in err
