"""Arguments of the pipeline on the command line: checked before a model loads, the plain pipeline's images, recipes."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from conftest import Steer
from diffusers import DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler, StableDiffusionPipeline
from PIL import Image
from rollouts import random_lora
from safetensors.torch import load_file, save_file

from steer.apps.components import SCHEDULERS, set_scheduler, set_vae
from steer.apps.models import adapter_applied, find_adapter, load_pipeline, read_loras
from steer.apps.recipes import read_metadata, read_png, write_png
from steer.apps.settings import SamplingConfig
from steer.assets import MODELS
from steer.errors import InputError

BASE = ["--method", "base", "--particles", "2", "--steps", "3", "--guidance", "4", "--seed", "3", "--reward", "jpeg"]


def images(folder: Path) -> list[bytes]:
    return [Image.open(path).convert("RGB").tobytes() for path in sorted(folder.glob("000-*/0*.png"))]


def plain(pipe: Any, **call: Any) -> list[bytes]:
    return [image.tobytes() for image in sampled(pipe, **call)]


def sampled(pipe: Any, **call: Any) -> Any:
    """The images of the plain pipeline."""
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 3, "guidance_scale": 4.0, "num_images_per_prompt": 2} | call
    return pipe("a red star", generator=torch.Generator().manual_seed(3), **call).images


def test_arguments_of_the_call_give_the_images_of_the_plain_call(steer: Steer, tmp_path: Path) -> None:
    words = ["--negative-prompt", "a blue cross", "--height", "72", "--width", "64", "--call", "guidance_rescale=0.5"]
    code, _, err = steer("sample", "a red star", *BASE, *words, "--out", tmp_path / "o")
    assert code == 0, err
    call = {"negative_prompt": "a blue cross", "height": 72, "width": 64, "guidance_rescale": 0.5}
    assert images(tmp_path / "o") == plain(load_pipeline("scenes", "cpu"), **call)
    recipe = read_metadata(tmp_path / "o" / "000-a-red-star" / "00.png")
    assert recipe.arguments == call
    code, out, err = steer("sample", "--replay", tmp_path / "o/000-a-red-star/01.png", "--out", tmp_path / "again")
    assert code == 0 and "the same pixels" in out, (out, err)
    code, _, err = steer("sample", "a red star", *BASE, "--out", tmp_path / "o")
    assert code == 2 and "holds a run with negative_prompt 'a blue cross', not None" in err


def test_a_column_of_the_prompt_file_comes_before_the_option(steer: Steer, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text(
        "words,negative_prompt,height,width\na red star,a green star,,\na red star,,72,64\n"
    )
    words = ["--prompts", tmp_path / "p.csv", "--prompt-column", "words", "--negative-prompt", "a cross"]
    assert steer("sample", *words, *BASE, "--out", tmp_path / "o")[0] == 0
    recipes = [read_metadata(path) for path in sorted((tmp_path / "o").glob("*/00.png"))]
    assert [one.arguments for one in recipes] == [
        {"negative_prompt": "a green star"},
        {"negative_prompt": "a cross", "height": 72, "width": 64},
    ]


def test_a_size_of_one_side_in_a_column_is_refused(steer: Steer, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("prompt,height\na red star,72\n")
    code, _, err = steer("sample", "--prompts", tmp_path / "p.csv", *BASE, "--out", tmp_path / "o")
    assert code == 2 and "height alone is ignored" in err


def test_a_scheduler_is_that_of_diffusers_with_the_model_s_configuration(steer: Steer, tmp_path: Path) -> None:
    given = ["--scheduler", "dpm++:use_karras_sigmas=true,solver_order=3"]
    code, _, err = steer("sample", "a red star", *BASE, *given, "--out", tmp_path / "o")
    assert code == 0, err
    pipe = load_pipeline("scenes", "cpu")
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(
        pipe.scheduler.config, use_karras_sigmas=True, solver_order=3
    )
    assert images(tmp_path / "o") == plain(pipe)
    text = Image.open(tmp_path / "o/000-a-red-star/00.png").info["parameters"]
    assert "Sampler: DPM++ 2M Karras" in text
    set_scheduler(pipe, "euler-a")
    assert type(pipe.scheduler) is EulerAncestralDiscreteScheduler


@pytest.mark.hard
def test_another_autoencoder_decodes(steer: Steer, tmp_path: Path) -> None:
    pipe = load_pipeline("scenes", "cpu")
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias += 0.5
    pipe.vae.save_pretrained(tmp_path / "vae")
    save_file(pipe.vae.state_dict(), tmp_path / "one.safetensors")
    for source in ("vae", "one.safetensors"):
        code, _, err = steer(
            "sample", "a red star", *BASE, "--vae", tmp_path / source, "--out", tmp_path / f"o-{source}"
        )
        assert code == 0, err
        assert images(tmp_path / f"o-{source}") == plain(pipe) != plain(load_pipeline("scenes", "cpu"))
    pipe.vae.register_to_config(latent_channels=16)
    with pytest.raises(InputError, match="latent_channels 8 does not fit the 16"):
        set_vae(pipe, str(MODELS["scenes"]))


def test_a_sum_of_adapters_is_the_sum_of_their_changes(tmp_path: Path) -> None:
    """Two LoRAs with weights equal the weights W + 0.7 ΔW₁ − 0.4 ΔW₂, merged by diffusers one after the other."""
    pipe = load_pipeline("scenes", "cpu")
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    paths = [random_lora(load_pipeline("scenes", "cpu"), tmp_path / name, 0.3) for name in ("one", "two")]
    file = next(paths[1].rglob("*.safetensors"))
    save_file({name: -2 * value for name, value in load_file(file).items()}, file)  # other weights than the first
    for sums in file.parent.glob("*.sha256*"):
        sums.unlink()
    merged = load_pipeline("scenes", "cpu")
    for path, weight in zip(paths, (0.7, -0.4), strict=True):
        merged.load_lora_weights(str(path))
        merged.fuse_lora(lora_scale=weight)
        merged.unload_lora_weights()
    text = f"{paths[0]}:0.7 + {paths[1]}:-0.4"
    call = {"output_type": "pt"}
    with adapter_applied(pipe, text) as off:
        steered, expected = sampled(pipe, **call), sampled(merged, **call)
        with off():
            without = sampled(pipe, **call)
    torch.testing.assert_close(steered, expected, rtol=1e-3, atol=1e-4)
    assert (steered - without).abs().max() > 1e-2
    torch.testing.assert_close(without, sampled(pipe, **call), rtol=0, atol=0)
    assert all(torch.equal(value, before[name]) for name, value in pipe.unet.state_dict().items())
    assert find_adapter(text).digest() != find_adapter(f"{paths[0]}:0.7 + {paths[1]}:0.4").digest()


def test_adapters_are_read_with_their_weights() -> None:
    assert read_loras("a/b.safetensors:0.7 + run/final + C:\\x") == [
        ("a/b.safetensors", 0.7),
        ("run/final", 1),
        ("C:\\x", 1),
    ]
    for bad in (":0.5", "a:inf", ""):
        with pytest.raises(InputError, match="write FILE or FILE:WEIGHT"):
            read_loras(bad)


def test_repeated_options_are_one_setting(steer: Steer, tmp_path: Path) -> None:
    one = random_lora(load_pipeline("scenes", "cpu"), tmp_path / "one", 0.3)
    (tmp_path / "s.yaml").write_text("call: {guidance_rescale: 0.5, eta: 0}\n")
    words = ["sample", "a red star", *BASE, "--lora", f"{one}:0.5", "--lora", one, "--out", tmp_path / "o"]
    code, _, err = steer(*words, "--no-compare", "--call", "guidance_rescale=0.5", "--call", "height=64", "--width", 64)
    assert code == 0, err
    settings = json.loads((tmp_path / "o/report.json").read_text())["settings"]
    assert settings["lora"] == f"{one}:0.5 + {one}"
    assert json.loads(settings["call"]) == {"guidance_rescale": "0.5", "height": "64"}
    code, _, err = steer("sample", "a", "--settings", tmp_path / "s.yaml", "--out", tmp_path / "p")
    assert code == 2 and "--call eta: this is a setting of its own: use --eta" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--call", "hight=3"], "--call hight: StableDiffusionPipeline has no such argument: did you mean height"),
        (["--call", "height"], "--call 'height': write NAME=VALUE"),
        (["--call", "height=tall"], "argument 'height': 'tall' is not a value of it"),
        (["--call", "clip_skip=1", "--call", "clip_skip=2"], "--call clip_skip is given 2 times"),
        (["--call", "num_images_per_prompt=3"], "use --particles"),
        (["--call", "guidance_scale=3"], "use --guidance"),
        (["--call", "latents=3"], "steering sets this argument itself"),
        (["--call", "prompt_embeds=3"], "takes an object here"),
        (["--scheduler", "eulr"], "unknown scheduler 'eulr': did you mean euler"),
        (["--scheduler", "euler:use_karas=true"], "'use_karas=true' is no option of it; write OPTION=VALUE with use_k"),
        (["--scheduler", "ddim:num_train_timesteps=999999999"], "is at most 100000"),
        (["--vae", "./nowhere"], "--vae ./nowhere: no such file"),
        (["--lora", "x:nan"], "write FILE or FILE:WEIGHT"),
        (["--height", "0"], "--height must be at least 1"),
        (["--width", "72"], "width alone is ignored by several pipelines of diffusers: give height and width"),
        (["--width", "72", "--call", "height="], "argument 'height'"),
    ],
)
def test_wrong_arguments_are_refused_before_the_model_is_loaded(
    steer: Steer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.setattr("steer.apps.sampling.load_pipeline", None)
    code, _, err = steer("sample", "a circle", *words, "--out", tmp_path / "o")
    assert code == 2 and message in err and len(err.splitlines()) == 1, err
    assert not (tmp_path / "o").exists()


def test_a_few_step_adapter_runs_by_its_own_scheduler(steer: Steer, tmp_path: Path) -> None:
    words = ["sample", "two green triangles", "--method", "base", "--lora", "scenes-lcm", "--particles", "2"]
    code, _, err = steer(*words, "--scheduler", "lcm", "--steps", "4", "--guidance", "0", "--out", tmp_path / "o")
    assert code == 0, err
    (run,) = json.loads((tmp_path / "o/report.json").read_text())["prompts"]
    assert run["cost"]["nfe"] == 8 and min(run["rewards"]) > 0.5


@pytest.mark.parametrize(("own", "other"), [("DDIM", "tcd"), ("LCM", "euler"), ("LCM", "tcd")])
def test_schedulers_of_few_steps_are_of_the_kind_of_noise_models(own: str, other: str) -> None:
    pipe = SimpleNamespace(scheduler=getattr(diffusers, f"{own}Scheduler")())
    set_scheduler(pipe, other)
    assert type(pipe.scheduler).__name__ == SCHEDULERS[other]


def test_a_scheduler_of_another_kind_and_offload_without_a_gpu_are_refused(steer: Steer, tmp_path: Path) -> None:
    words = ["sample", "a circle", *BASE, "--out", tmp_path / "o"]
    code, _, err = steer(*words, "--scheduler", "flow-euler")
    assert code == 2 and "is of another kind: use ddim" in err
    code, _, err = steer(*words, "--offload", "model", "--device", "cpu")
    assert code == 2 and "--offload model: it moves the model between GPU and CPU" in err


@pytest.mark.parametrize(
    ("offload", "calls"),
    [
        (None, [("to", "cuda")]),
        ("model", [("enable_model_cpu_offload", "cuda")]),
        ("sequential", [("enable_sequential_cpu_offload", "cuda")]),
    ],
)
def test_an_offloaded_model_is_never_moved_as_a_whole(
    steer: Steer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offload: str | None, calls: list[tuple[str, str]]
) -> None:
    """On a GPU: diffusers' hooks move its components, so a move of the whole model would only fill the memory."""
    recorded: list[tuple[str, str]] = []

    def recorder(name: str) -> Any:
        def record(pipe: Any, device: str | None = None) -> Any:
            recorded.append((name, str(device)))
            return pipe

        return record

    for name in ("to", "enable_model_cpu_offload", "enable_sequential_cpu_offload"):
        monkeypatch.setattr(StableDiffusionPipeline, name, recorder(name))
    monkeypatch.setattr("steer.apps.models.check_device", lambda device: None)  # this machine need not have a GPU
    words = ["--dtype", "float32", "--device", "cuda"] + ([] if offload is None else ["--offload", offload])
    code, _, err = steer("sample", "a red star", *BASE, *words, "--out", tmp_path / "o")
    assert code == 0, err
    assert recorded == calls and len(images(tmp_path / "o")) == 2


def test_a_forged_recipe_has_no_other_arguments_and_no_endless_size(steer: Steer, tmp_path: Path) -> None:
    assert steer("sample", "a red star", *BASE, "--out", tmp_path / "o")[0] == 0
    recipe, pixels = read_png(tmp_path / "o/000-a-red-star/00.png")
    for call, message in (({"height": "90000"}, "in range"), ({"latents": 1}, "steering sets"), ({"x": 1}, "no such")):
        values = vars(recipe) | {"settings": SamplingConfig.of(**recipe.settings.plain() | {"call": call})}
        write_png(pixels, tmp_path / "forged.png", type(recipe)(**values))
        code, _, err = steer("sample", "--replay", tmp_path / "forged.png", "--out", tmp_path / "again")
        assert code == 2 and message in err, err
