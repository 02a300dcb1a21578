"""Adapters: what is applied equals the weights merged by hand, what is not is named, and the base stays what it was."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from rollouts import fresh_pipe
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from steer.apps.models import adapter_applied
from steer.errors import InputError
from steer.training.trainable import LoRA, get_denoiser

QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
FF = "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2"
CONV = "down_blocks.0.resnets.0.conv1"
TEXT = [f"encoder.layers.0.self_attn.{one}_proj" for one in ("q", "out")]


def hashes(pipe: Any) -> dict[str, str]:
    """A hash of every tensor of every module of a pipeline."""
    return {
        f"{part}.{name}": hashlib.sha256(value.cpu().numpy().tobytes()).hexdigest()
        for part, module in pipe.components.items()
        if isinstance(module, nn.Module)
        for name, value in module.state_dict().items()
    }


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def factors(layer: Any, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Down and up of a linear layer or of a convolution."""
    weight = layer.weight
    return drawn(rank, *weight.shape[1:], seed=seed), drawn(
        weight.shape[0], rank, *([1] * (weight.dim() - 2)), seed=seed + 1
    )


def merged(layer: Any, down: Tensor, up: Tensor, scale: float) -> None:
    """W + s · up · down, by hand."""
    layer.weight.data += scale * (up.flatten(1) @ down.flatten(1)).view_as(layer.weight)


def unet_output(pipe: Any) -> Tensor:
    x, text = drawn(1, 4, 4, 4, seed=1), drawn(1, 7, 16, seed=2)
    with torch.no_grad():
        return pipe.unet(x, 500, text).sample


def text_output(pipe: Any) -> Tensor:
    with torch.no_grad():
        return pipe.text_encoder(torch.arange(1, 8)[None])[0]


def kohya(module: str) -> str:
    return "lora_unet_" + module.replace(".", "_")


def plain(folder: Path, extra: dict[str, Tensor] | None = None, metadata: dict[str, str] | None = None) -> Path:
    """A LoRA in the form of diffusers, with more tensors or a configuration."""
    down, up = factors(fresh_pipe("sd").unet.get_submodule(QUERY), 2, 3)
    file = folder / "pytorch_lora_weights.safetensors"
    save_file({f"unet.{QUERY}.lora_A.weight": down, f"unet.{QUERY}.lora_B.weight": up} | (extra or {}), file, metadata)
    return file


def test_a_kohya_lora_with_alphas_of_its_own_equals_the_merged_weights(tmp_path: Path) -> None:
    """Linear layers, a convolution (LoCon) and a text encoder, each with another rank and α."""
    by_hand, state = fresh_pipe("sd"), dict[str, Tensor]()
    asked = [(QUERY, 2, 1.0), (FF, 3, 6.0), (CONV, 2, 4.0)]
    for seed, (name, rank, alpha) in enumerate(asked):
        layer = by_hand.unet.get_submodule(name)
        down, up = factors(layer, rank, 10 * seed)
        merged(layer, down, up, alpha / rank)
        state |= {f"{kohya(name)}.lora_down.weight": down, f"{kohya(name)}.lora_up.weight": up}
        state |= {f"{kohya(name)}.alpha": torch.tensor(alpha)}
    text = dict(by_hand.text_encoder.named_modules())
    for alpha, ending in enumerate(TEXT, start=1):
        name = next(one for one in text if one.endswith(ending))
        down, up = factors(text[name], 2, 77 + 2 * alpha)
        merged(text[name], down, up, alpha / 2)
        module = "lora_te_text_model_" + ending.replace(".", "_")
        state |= {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
        state |= {f"{module}.alpha": torch.tensor(float(alpha))}
    save_file(state, tmp_path / "kohya.safetensors")
    pipe = fresh_pipe("sd")
    before, bare = hashes(pipe), unet_output(pipe)
    with adapter_applied(pipe, str(tmp_path / "kohya.safetensors")) as off:
        torch.testing.assert_close(unet_output(pipe), unet_output(by_hand), rtol=0, atol=1e-5)
        torch.testing.assert_close(text_output(pipe), text_output(by_hand), rtol=0, atol=1e-5)
        assert (unet_output(pipe) - bare).abs().max() > 1e-2
        with off():
            assert torch.equal(unet_output(pipe), bare)
    assert hashes(pipe) == before
    assert all(weight.requires_grad for weight in (*pipe.unet.parameters(), *pipe.text_encoder.parameters()))


EXTRA = {
    "modules_to_save": ({"unet.conv_out.weight": torch.zeros(4, 8, 3, 3)}, "unet.conv_out.weight .whole tensors"),
    "bias all": ({f"unet.{FF}.bias": torch.ones(8)}, f"unet.{FF}.bias .whole tensors"),
    "lora_bias": ({f"unet.{QUERY}.lora_B.bias": torch.ones(8)}, "lora_B.bias .lora_bias"),
    "DoRA": ({f"unet.{QUERY}.lora_magnitude_vector": torch.ones(8)}, "lora_magnitude_vector .DoRA"),
    "kohya's DoRA": ({f"{kohya(QUERY)}.dora_scale": torch.ones(8, 1)}, "dora_scale .DoRA"),
    "LoHa": ({f"{kohya(QUERY)}.hada_w1_a": torch.ones(8, 2)}, "hada_w1_a .LoHa"),
    "LoKr": ({f"{kohya(QUERY)}.lokr_w1": torch.ones(2, 2)}, "lokr_w1 .LoKr"),
    "a full difference": ({f"{kohya(CONV)}.diff": torch.ones(8, 8, 3, 3)}, "diff .whole tensors"),
    "textual inversion": (
        {"bundle_emb.a.string_to_param": torch.ones(1)},
        "string_to_param .full tensors or unknown keys",
    ),
    "a layer that is not there": (
        {"unet.nowhere.to_q.lora_A.weight": torch.ones(2, 8), "unet.nowhere.to_q.lora_B.weight": torch.ones(8, 2)},
        "2 of its 4 tensors have a place .*not unet.nowhere",
    ),
    "another component": (
        {"prior.to_q.lora_A.weight": torch.ones(2, 8), "prior.to_q.lora_B.weight": torch.ones(8, 2)},
        "2 of its 4 tensors have a place .*not prior.to_q",
    ),
}


@pytest.mark.parametrize("kind", EXTRA)
def test_what_is_not_applied_is_named_and_the_base_stays(kind: str, tmp_path: Path) -> None:
    extra, message = EXTRA[kind]
    file, pipe = plain(tmp_path, extra), fresh_pipe("sd")
    before = hashes(pipe)
    with pytest.raises(InputError, match=message) as raised, adapter_applied(pipe, str(file)):
        pass
    assert "\n" not in str(raised.value)
    assert hashes(pipe) == before


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("lora_bias", True),
        ("bias", "all"),
        ("modules_to_save", ["conv_out"]),
        ("init_lora_weights", "pissa"),
        ("layer_replication", [[0, 1]]),
        ("target_parameters", ["x"]),
    ],
)
@pytest.mark.parametrize("form", ["diffusers", "peft"])
def test_a_configuration_that_asks_for_more_is_named(form: str, key: str, value: Any, tmp_path: Path) -> None:
    told = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [QUERY], key: value}
    file = plain(tmp_path, metadata={"lora_adapter_metadata": json.dumps({f"unet.{k}": v for k, v in told.items()})})
    if form == "peft":
        state = {f"base_model.model.{name.removeprefix('unet.')}": value for name, value in load_file(file).items()}
        file.unlink()
        save_file(state, tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text(json.dumps(told))
    pipe = fresh_pipe("sd")
    before = hashes(pipe)
    with pytest.raises(InputError, match=f"its configuration has {key}="), adapter_applied(pipe, str(tmp_path)):
        pass
    assert hashes(pipe) == before


def test_a_peft_adapter_equals_the_merged_weights(tmp_path: Path) -> None:
    """With a rank and an α of one layer's own, and rsLoRA: α/√r."""
    by_hand = fresh_pipe("sd")
    config = LoraConfig(
        r=2, lora_alpha=3, target_modules=[QUERY, FF], rank_pattern={FF: 4}, use_rslora=True, lora_dropout=0.5
    )
    other = fresh_pipe("sd")
    inject_adapter_in_model(config, other.unet, "default")
    for seed, (name, rank) in enumerate([(QUERY, 2), (FF, 4)]):
        layer = by_hand.unet.get_submodule(name)
        down, up = factors(layer, rank, 10 * seed)
        merged(layer, down, up, 3 / rank**0.5)
        tuned = other.unet.get_submodule(name)
        tuned.lora_A["default"].weight.data, tuned.lora_B["default"].weight.data = down, up
    state = get_peft_model_state_dict(other.unet, adapter_name="default")
    config.save_pretrained(tmp_path)
    save_file(
        {f"base_model.model.{name}": value for name, value in state.items()}, tmp_path / "adapter_model.safetensors"
    )
    pipe = fresh_pipe("sd")
    before = hashes(pipe)
    with adapter_applied(pipe, str(tmp_path)):
        torch.testing.assert_close(unet_output(pipe), unet_output(by_hand), rtol=0, atol=1e-5)
    assert hashes(pipe) == before
    assert all(weight.requires_grad for weight in pipe.unet.parameters())


def test_an_ordinary_lora_loads_without_a_warning_and_nothing_is_muted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers.utils import logging as diffusers_logging

    library, pipe = diffusers_logging.get_logger("diffusers"), fresh_pipe("sd")
    monkeypatch.setattr(library, "propagate", True)
    caplog.set_level(logging.INFO, "diffusers")
    with adapter_applied(pipe, str(plain(tmp_path))):
        pass
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    load = pipe.load_lora_into_unet

    def warning(*args: Any, **kwargs: Any) -> None:
        load(*args, **kwargs)
        diffusers_logging.get_logger("diffusers.loaders.lora_base").warning("something to know")

    monkeypatch.setattr(pipe, "load_lora_into_unet", warning)
    with adapter_applied(pipe, str(tmp_path)):
        pass
    assert "something to know" in caplog.text


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux", "wan", "pixart"])
def test_an_adapter_of_every_family_equals_the_merged_weights(family: str, tmp_path: Path) -> None:
    """As `steer finetune` exports it; merged by hand into the layers of a fresh pipeline."""
    trained = LoRA(fresh_pipe(family), 2, 3.0)
    for place, parameter in enumerate(trained.parameters.values()):
        parameter.data = drawn(*parameter.shape, seed=place)
    trained.write(trained.state(), tmp_path)
    by_hand, pipe = fresh_pipe(family), fresh_pipe(family)
    for name, down in trained.parameters.items():
        if ".lora_A." in name:
            layer = get_denoiser(by_hand)[1].get_submodule(name.partition(".lora_A.")[0])
            merged(layer, down.data, trained.parameters[name.replace(".lora_A.", ".lora_B.")].data, 1.5)
    before = hashes(pipe)
    with adapter_applied(pipe, str(tmp_path)):
        for name, layer in get_denoiser(by_hand)[1].named_modules():
            if hasattr(tuned := get_denoiser(pipe)[1].get_submodule(name), "lora_A"):
                x = drawn(3, layer.weight.shape[1], seed=5)
                torch.testing.assert_close(tuned(x), layer(x), rtol=0, atol=1e-5)
    assert hashes(pipe) == before
