"""`steer.apps.models`: pipelines from folders and single files; adapters equal to weights merged by hand."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import cached_pipe
from diffusers import PixArtSigmaPipeline, StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from rollouts import fresh_pipe, random_lora
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn

from steer.apps.expansion import is_text_model
from steer.apps.models import adapter_applied, find_adapter, load_pipeline, pipeline_type
from steer.errors import InputError
from steer.pipelines.text.masked_diffusion import left_out, pipeline_class
from steer.training.trainable import LoRA, get_denoiser

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


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, "\udcff"])
def test_a_damaged_index_is_one_line(tmp_path: Path, text: str) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "one.safetensors")
    (tmp_path / "model_index.json").write_text(text, errors="surrogateescape")
    folder = str(tmp_path)
    for read in (
        lambda: pipeline_type(folder),
        lambda: is_text_model(folder),
        lambda: load_pipeline(folder, "cpu"),
        lambda: load_pipeline(str(tmp_path / "one.safetensors"), "cpu"),
        lambda: pipeline_class(folder),
        lambda: left_out(folder),
    ):
        with pytest.raises(InputError, match=r"model_index\.json is no") as raised:
            read()
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
def test_a_missing_path_is_not_a_name_on_the_hub(
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


# Finetuned weights.


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


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def factors(layer: Any, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Down and up of a linear layer or of a convolution."""
    weight = layer.weight
    return randn(rank, *weight.shape[1:], seed=seed), randn(
        weight.shape[0], rank, *([1] * (weight.dim() - 2)), seed=seed + 1
    )


def merged(layer: Any, down: Tensor, up: Tensor, scale: float) -> None:
    """W + s · up · down, by hand."""
    layer.weight.data += scale * (up.flatten(1) @ down.flatten(1)).view_as(layer.weight)


def unet_output(pipe: Any) -> Tensor:
    x, text = randn(1, 4, 4, 4, seed=1), randn(1, 7, 16, seed=2)
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
    layers = [(QUERY, 2, 1.0), (FF, 3, 6.0), (CONV, 2, 4.0)]
    for seed, (name, rank, alpha) in enumerate(layers):
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
    "modules_to_save": ({"unet.conv_out.weight": torch.zeros(4, 8, 3, 3)}, "unet.conv_out.weight .full tensors"),
    "bias all": ({f"unet.{FF}.bias": torch.ones(8)}, f"unet.{FF}.bias .full tensors"),
    "lora_bias": ({f"unet.{QUERY}.lora_B.bias": torch.ones(8)}, "lora_B.bias .lora_bias"),
    "DoRA": ({f"unet.{QUERY}.lora_magnitude_vector": torch.ones(8)}, "lora_magnitude_vector .DoRA"),
    "kohya's DoRA": ({f"{kohya(QUERY)}.dora_scale": torch.ones(8, 1)}, "dora_scale .DoRA"),
    "LoHa": ({f"{kohya(QUERY)}.hada_w1_a": torch.ones(8, 2)}, "hada_w1_a .LoHa"),
    "LoKr": ({f"{kohya(QUERY)}.lokr_w1": torch.ones(2, 2)}, "lokr_w1 .LoKr"),
    "a full difference": ({f"{kohya(CONV)}.diff": torch.ones(8, 8, 3, 3)}, "diff .full tensors"),
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


@pytest.mark.few(4)
@pytest.mark.parametrize("kind", EXTRA)
def test_unsupported_tensors_are_named_and_the_base_is_unchanged(kind: str, tmp_path: Path) -> None:
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
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [QUERY], key: value}
    file = plain(tmp_path, metadata={"lora_adapter_metadata": json.dumps({f"unet.{k}": v for k, v in config.items()})})
    if form == "peft":
        state = {f"base_model.model.{name.removeprefix('unet.')}": value for name, value in load_file(file).items()}
        file.unlink()
        save_file(state, tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
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
        parameter.data = randn(*parameter.shape, seed=place)
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
                x = randn(3, layer.weight.shape[1], seed=5)
                torch.testing.assert_close(tuned(x), layer(x), rtol=0, atol=1e-5)
    assert hashes(pipe) == before


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    cached_pipe("sd").save_pretrained(folder / "sd")
    return folder / "sd"


def of(model: Path) -> Any:
    pipe = StableDiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def answer(pipe: Any) -> Tensor:
    """The output of the denoiser for fixed noise."""
    noise, text = torch.randn(1, 4, 4, 4, generator=Generator().manual_seed(0)), torch.ones(1, 3, 16)
    return torch.as_tensor(pipe.unet(noise, 5, text).sample)


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", ["lora", "file", "peft", "whole"])
def test_weights_are_applied_switched_off_and_removed(tiny: Path, tmp_path: Path, kind: str) -> None:
    other, pipe = of(tiny), of(tiny)
    plain = answer(pipe)
    folder = random_lora(other, tmp_path / "lora", 0.5)
    path = {"lora": folder, "file": folder / "pytorch_lora_weights.safetensors"}.get(kind, tmp_path)
    if kind == "peft":
        other.unet.peft_config["mine"].save_pretrained(tmp_path)
        save_file(get_peft_model_state_dict(other.unet, adapter_name="mine"), tmp_path / "adapter_model.safetensors")
    if kind == "whole":
        other = of(tiny)
        other.unet.conv_in.weight.data *= 2
        other.unet.save_pretrained(tmp_path / "unet")
    finetuned = find_adapter(str(path))
    with finetuned.applied_to(pipe) as off:
        assert torch.equal(answer(pipe), answer(other)) and not torch.allclose(answer(pipe), plain, atol=1e-3)
        with off():
            assert torch.equal(answer(pipe), plain)
        assert torch.equal(answer(pipe), answer(other))
    assert torch.equal(answer(pipe), plain) and not any("lora" in name for name, _ in pipe.unet.named_parameters())
    with pytest.raises(ZeroDivisionError), finetuned.applied_to(pipe):
        raise ZeroDivisionError
    assert torch.equal(answer(pipe), plain)
    before = finetuned.digest()
    weights = load_file(finetuned.files[0])
    save_file({name: value + 1 for name, value in weights.items()}, finetuned.files[0])
    assert finetuned.digest() != before


def refused(path: Path, pipe: Any) -> str:
    with pytest.raises(InputError) as raised, find_adapter(str(path)).applied_to(pipe):
        pass
    return str(raised.value)


def test_adapters_that_would_run_code_or_are_of_other_kinds_are_refused(tiny: Path, tmp_path: Path) -> None:
    pipe = of(tiny)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    assert "of type 'IA3'; only LORA is supported" in refused(tmp_path, pipe)
    file = tmp_path / "mine.safetensors"
    for name in ("megatron_config", "unet.megatron_config", "text_encoder.megatron_config"):
        config = json.dumps({"unet.r": 2, name: {"x": 1}, "unet.megatron_core": "os"})
        config = config.replace("mega", "\\u006dega")  # JSON's other spelling
        save_file({"x": torch.zeros(1)}, file, metadata={"lora_adapter_metadata": config})
        assert "names a module to import, which is never done" in refused(file, pipe)
    file.write_text("no tensors")
    assert "does not fit StableDiffusionPipeline" in refused(file, pipe)
    random_lora(of(tiny), tmp_path / "lora", 0.5)
    assert not hasattr(PixArtSigmaPipeline, "load_lora_weights")
    assert "PixArtSigmaPipeline does not load LoRA files" in refused(tmp_path / "lora", cached_pipe("pixart"))
