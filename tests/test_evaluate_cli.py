"""`steer evaluate` on a tiny model: how it goes on, what it refuses; and the weights that contenders wear."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Steer, cached_pipe, replaced
from diffusers import PixArtSigmaPipeline, StableDiffusionPipeline
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from test_evaluate import lora
from torch import Generator, Tensor

from steer.apps.evaluation import report as evaluation_report
from steer.apps.models import find_adapter
from steer.apps.prompts import load_tagged_prompts
from steer.errors import InputError

REWARD = """
from pathlib import Path

LOG, STOP = (Path(__file__).with_name(name) for name in ("log", "stop"))

def brightness(images, prompts):
    before = LOG.read_text().splitlines() if LOG.exists() else []
    if STOP.exists() and len(before) == int(STOP.read_text()):
        raise KeyboardInterrupt
    LOG.write_text("".join(f"{line}\\n" for line in [*before, " ".join(prompts)]))
    return images.mean((1, 2, 3))
"""
PICTURES = ("draw_rewards", "draw_tasks", "draw_costs", "draw_images")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    cached_pipe("sd").save_pretrained(folder / "sd")
    return folder / "sd"


@pytest.fixture
def words(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A command, without its methods and its folder, and without pictures, which take longer than all else."""
    for name in PICTURES:
        monkeypatch.setattr(evaluation_report, name, lambda *given: None)
    (tmp_path / "counted.py").write_text(REWARD)
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"tag": "ab"[n % 2], "prompt": f"p{n}"}) + "\n" for n in range(5))
    )
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    options = ["--steps", 2, "--particles", 2, "--seeds", 2, "--batch", 4, "--kl-prompts", 2, "--iterations", 2]
    rewards = ["--reward", "counted:brightness", "--reward", "jpeg"]
    return ["evaluate", "--model", model, "--prompts", tmp_path / "prompts.jsonl", *rewards, *options]


def of(model: Path) -> Any:
    pipe = StableDiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def timeless(out: Path) -> Any:
    report = json.loads((out / "evaluation.json").read_text())
    for one in report["contenders"]:
        for cost in (one["cost"], *(run["cost"] for run in one["runs"])):
            assert cost.pop("seconds") > 0
    return report


def calls(folder: Path) -> list[str]:
    """What the counting reward was asked, call by call."""
    return (folder / "log").read_text().splitlines()


def test_what_was_interrupted_goes_on_and_makes_nothing_twice(
    steer: Steer, words: list[object], tmp_path: Path
) -> None:
    both = [*words, "--method", "base", "--method", "best-of-n"]
    assert steer(*both, "--out", tmp_path / "once")[0] == 0
    once = calls(tmp_path)
    # Two prompts × two seeds at a time, then one prompt × two seeds × two particles.
    assert once == ["p0 p0 p1 p1", "p2 p2 p3 p3", "p4 p4", *(" ".join([f"p{n}"] * 4) for n in range(5))]
    (tmp_path / "log").unlink()
    for stop in (1, 5):
        (tmp_path / "stop").write_text(str(stop))
        code, _, err = steer(*both, "--out", tmp_path / "twice")
        assert code == 130 and "interrupted; what was finished is kept, the same command goes on" in err
    (tmp_path / "stop").unlink()
    code, out, _ = steer(*both, "--out", tmp_path / "twice")
    assert code == 0 and calls(tmp_path) == once
    assert timeless(tmp_path / "twice") == timeless(tmp_path / "once")
    assert out.splitlines()[-1] == f"→ {tmp_path / 'twice' / 'evaluation.md'}" and "best-of-n" in out
    model = tmp_path / "model"
    model.rename(tmp_path / "gone")  # all is there: not even the model is needed
    assert steer(*both, "--out", tmp_path / "twice")[0] == 0
    model.symlink_to(tmp_path / "gone")
    (tmp_path / "log").unlink()
    assert steer(*words, "--method", "base", "--method", "noise-search", "--out", tmp_path / "twice")[0] == 0
    assert set(calls(tmp_path)) == {f"p{n} p{n}" for n in range(5)}  # the new contender's alone, one run a call
    report = timeless(tmp_path / "twice")
    assert [one["method"] for one in report["contenders"]] == ["base", "noise-search"]
    assert report["contenders"][0] == timeless(tmp_path / "once")["contenders"][0]
    assert not list((tmp_path / "twice").rglob("*.safetensors"))


def test_weights_are_contenders_and_may_not_change(
    steer: Steer, words: list[object], tiny: Path, tmp_path: Path
) -> None:
    worn = lora(of(tiny), tmp_path / "lora", 0.5)
    command = [*words, "--num-prompts", 2, "--lora", worn, "--out", tmp_path / "out"]
    assert steer(*command)[0] == 0
    report = timeless(tmp_path / "out")
    assert [one["prompt"] for one in report["prompts"]] == ["p0", "p2"] and report["prompts"][1]["tag"] == "a"
    bare, other = report["contenders"]
    assert other["name"] == f"{bare['name']} + {worn}" and len(other["kl"]["by_prompt"]) == 2
    assert other["kl"]["nats"][0] > 0 and other["runs"] != bare["runs"]
    assert steer(*replaced(command, "--kl-prompts", 1))[0] == 0
    assert len(timeless(tmp_path / "out")["contenders"][1]["kl"]["by_prompt"]) == 1
    shutil.rmtree(worn)
    lora(of(tiny), worn, 0.7)
    code, _, err = steer(*command)
    assert code == 2 and "its weights have changed; choose another --out" in err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--model", "scnes"], "unknown model 'scnes': use scenes"),
        (["--model", "scenes", "--lora", "x"], "--lora belongs to one model, and there are 2"),
        (["--method", "fkk"], "unknown method 'fkk': did you mean fk"),
        (["--reward", "scen"], "unknown reward 'scen': did you mean scene"),
        (["--reward", "jpeg"], "reward 'jpeg' is given twice"),
        (["--prompts", "scenes-heldou"], "unknown prompts 'scenes-heldou': use scenes-heldout"),
        (["--prompts", "no.txt"], "no.txt: cannot read the prompt file"),
        (["--tag-column", "task"], 'text under "task"'),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--batch", "0"], "--batch at least 1"),
        (["--particles", "0"], "--particles must be at least 1"),
        (["--lora", "nothing"], "nothing: no such folder"),
        (["--lora", "{tmp}"], "{tmp}: no finetuned weights here; expected pytorch_lora_weights.safetensors"),
        (["--lora", "{tmp}/run"], "did you mean {tmp}/run/best or {tmp}/run/final?"),
        (["--lora", "{tmp}/wide"], "{tmp}/wide does not fit StableDiffusionPipeline"),
        (["--lora", "{tmp}/other"], "{tmp}/other: 2 of its 4 tensors have a place"),
        (["--lora", "{tmp}/model/vae"], "its tensors are not those of the model's UNet2DConditionModel"),
        (["--out", "{tmp}/prompts.jsonl"], "--out {tmp}/prompts.jsonl: cannot write there"),
        (["--device", "warp"], "--device 'warp' cannot be used"),
        (["--steps", "2000"], "prompt 'p0': "),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_code_2(
    steer: Steer, words: list[object], tmp_path: Path, given: list[str], message: str
) -> None:
    for name in ("run/best", "run/final", "wide", "other"):
        (tmp_path / name).mkdir(parents=True)
    place = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    for name, keys, width in (("wide", [place], 99), ("other", [place, "unet.elsewhere.to_q"], 8)):
        shapes = {"lora_A": (2, width), "lora_B": (width, 2)}
        factors = {f"{key}.{factor}.weight": torch.zeros(shape) for key in keys for factor, shape in shapes.items()}
        save_file(factors, tmp_path / name / "pytorch_lora_weights.safetensors")
    said = [word.format(tmp=tmp_path) for word in given]
    code, _, err = steer(*replaced([*words, "--out", tmp_path / "out"], *said))
    last = err.strip().splitlines()[-1]
    assert code == 2 and last.startswith("steer: ") and message.format(tmp=tmp_path) in last
    assert "Traceback" not in err and not (tmp_path / "log").exists()


def test_needs_prompts_and_rewards(steer: Steer) -> None:
    assert "Missing option '--prompts'" in steer("evaluate", "--reward", "jpeg")[2]
    assert "Missing option '--reward'" in steer("evaluate", "--prompts", "scenes-tuning")[2]


def test_a_folder_of_another_evaluation_is_left_alone(steer: Steer, words: list[object], tmp_path: Path) -> None:
    command = replaced(words, "--num-prompts", 1, "--seeds", 1, "--out", tmp_path / "out")
    assert steer(*command)[0] == 0
    for given, message in (
        (["--num-prompts", 2], "holds an evaluation of other prompts"),
        (["--reward", "brightness"], "with rewards ['counted:brightness', 'jpeg'], not "),
        (["--seeds", 4], "with seeds 1, not 4"),
        (["--steps", 3], "with steps 2, not 3"),
        (["--seed", 1], "with seed 0, not 1"),
    ):
        code, _, err = steer(*replaced(command, *given))
        assert code == 2 and message in err and err.rstrip().endswith("choose another --out")
    stored = next((tmp_path / "out" / "runs").glob("*.0.json"))
    stored.write_text(stored.read_text()[:-9])
    code, _, err = steer(*command)
    assert code == 2 and f"{stored} is no evaluation of steer" in err and "Traceback" not in err


@torch.no_grad()
def answer(pipe: Any) -> Tensor:
    """What the denoiser says of some noise."""
    noise, text = torch.randn(1, 4, 4, 4, generator=Generator().manual_seed(0)), torch.ones(1, 3, 16)
    return torch.as_tensor(pipe.unet(noise, 5, text).sample)


@pytest.mark.parametrize("kind", ["lora", "file", "peft", "whole"])
def test_weights_are_put_on_switched_off_and_taken_off(tiny: Path, tmp_path: Path, kind: str) -> None:
    other, pipe = of(tiny), of(tiny)
    plain = answer(pipe)
    folder = lora(other, tmp_path / "lora", 0.5)
    path = {"lora": folder, "file": folder / "pytorch_lora_weights.safetensors"}.get(kind, tmp_path)
    if kind == "peft":
        other.unet.peft_config["mine"].save_pretrained(tmp_path)
        save_file(get_peft_model_state_dict(other.unet, adapter_name="mine"), tmp_path / "adapter_model.safetensors")
    if kind == "whole":
        other = of(tiny)
        other.unet.conv_in.weight.data *= 2
        other.unet.save_pretrained(tmp_path / "unet")
    found = find_adapter(str(path))
    with found.applied_to(pipe) as off:
        assert torch.equal(answer(pipe), answer(other)) and not torch.allclose(answer(pipe), plain, atol=1e-3)
        with off():
            assert torch.equal(answer(pipe), plain)
        assert torch.equal(answer(pipe), answer(other))
    assert torch.equal(answer(pipe), plain) and not any("lora" in name for name, _ in pipe.unet.named_parameters())
    with pytest.raises(ZeroDivisionError), found.applied_to(pipe):
        raise ZeroDivisionError
    assert torch.equal(answer(pipe), plain)
    before = found.digest()
    weights = load_file(found.files[0])
    save_file({name: value + 1 for name, value in weights.items()}, found.files[0])
    assert found.digest() != before


def refused(path: Path, pipe: Any) -> str:
    with pytest.raises(InputError) as raised, find_adapter(str(path)).applied_to(pipe):
        pass
    return str(raised.value)


def test_adapters_that_would_run_code_or_are_of_other_kinds_are_refused(tiny: Path, tmp_path: Path) -> None:
    pipe = of(tiny)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    assert "of type 'IA3'; only LORA is read" in refused(tmp_path, pipe)
    file = tmp_path / "mine.safetensors"
    for name in ("megatron_config", "unet.megatron_config", "text_encoder.megatron_config"):
        told = json.dumps({"unet.r": 2, name: {"x": 1}, "unet.megatron_core": "os"})
        told = told.replace("mega", "\\u006dega")  # JSON's other spelling
        save_file({"x": torch.zeros(1)}, file, metadata={"lora_adapter_metadata": told})
        assert "names a module to be imported, which is never done" in refused(file, pipe)
    file.write_text("no tensors")
    assert "does not fit StableDiffusionPipeline" in refused(file, pipe)
    lora(of(tiny), tmp_path / "lora", 0.5)
    assert not hasattr(PixArtSigmaPipeline, "load_lora_weights")
    assert "PixArtSigmaPipeline reads no LoRA files" in refused(tmp_path / "lora", cached_pipe("pixart"))


def test_tags_are_read_beside_the_prompts(tmp_path: Path) -> None:
    lines = [{"tag": "x", "prompt": "one"}, {"tag": "y", "prompt": " "}, {"tag": " z", "prompt": "two"}]
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    assert load_tagged_prompts(str(path)) == (["one", "two"], ["x", "z"])
    (tmp_path / "p.tsv").write_text("Prompt\tCategory\none\tx\n\ntwo\tz\n")
    assert load_tagged_prompts(str(tmp_path / "p.tsv")) == (["one", "two"], None)
    assert load_tagged_prompts(str(tmp_path / "p.tsv"), tag="category") == (["one", "two"], ["x", "z"])
    (tmp_path / "p.txt").write_text("one\n")
    assert load_tagged_prompts(str(tmp_path / "p.txt")) == (["one"], None)
    with pytest.raises(InputError, match="there are Category"):
        load_tagged_prompts(str(tmp_path / "p.tsv"), tag="tag")
    prompts, tags = load_tagged_prompts("scenes-heldout")
    assert tags is not None and (prompts[2], tags[2]) == ("four black triangles", "counting")
