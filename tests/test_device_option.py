"""`--device` of every command that runs a model or a reward; evaluations and rewards stay where they belong."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from conftest import Steer, cached_pipe, call_kwargs
from PIL import Image
from torch import Tensor, nn

from steer.apps import models
from steer.apps.cli import main as cli
from steer.pipelines.training.config import TrainingConfig
from steer.pipelines.training.evaluation import Evaluator
from steer.reward import RewardError
from steer.rewards.remote import RequestError, RewardServer
from steer.rewards.weights import to_module_device
from steer.training.distributed import SingleProcess


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


def test_the_first_cpu_is_a_cpu() -> None:
    assert models.resolve_dtype("cpu:0", None) == torch.float32
    assert models.resolve_dtype("cuda:1", None) == torch.bfloat16
    assert models.is_cpu("cpu:0") and not models.is_cpu("cuda") and not models.is_cpu(None)


WITHOUT = {("completion",), ("convert-lora",), ("rewards", "counts"), ("rewards", "write")}  # which run no model
COMMANDS = {path: command for path, command in commands(cli.steer) if path not in WITHOUT}
NEEDED: dict[tuple[str, ...], Sequence[str]] = {
    ("evaluate",): ["--prompts", "x.txt", "--reward", "jpeg"],
    ("finetune",): ["prdp-scenes"],
    ("grid",): ["a star", "--x", "lam=1,2"],
    ("sample",): ["a star"],
    ("score",): ["a.png", "--prompt", "x", "--reward", "jpeg"],
    ("rewards", "calibrate"): ["jpeg", "--images", "x", "--out", "y"],
    ("rewards", "check"): ["jpeg", "--images", "x"],
    ("rewards", "compare"): ["jpeg", "scene", "--images", "x"],
    ("rewards", "contrast"): ["jpeg", "--images", "x"],
    ("rewards", "serve"): ["jpeg"],
    ("rewards", "train"): ["x.jsonl", "--out", "y"],
}


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_refuses_a_missing_device_in_one_line(steer: Steer, path: tuple[str, ...]) -> None:
    for device in ("warp", "meta", "cuda:99"):
        code, out, err = steer(*path, *NEEDED.get(path, ()), "--device", device)
        assert (code, out) == (2, "") and err.count("\n") == 1
        assert err.startswith(f"steer: --device '{device}' cannot be used: ")


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_has_the_same_option(path: tuple[str, ...]) -> None:
    (option,) = [one for one in COMMANDS[path].params if one.name == "device"]
    assert option.default is None or isinstance(option.default, type(click.core.UNSET))
    assert isinstance(option, click.Option) and option.help is not None and "by default the GPU" in option.help


def test_the_default_is_the_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert models.default_device() == expected
        assert models.default_device("cpu") == "cpu"


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Where `default_device` and `Tensor.to` sent things; nothing really moves."""
    monkeypatch.setattr(models, "default_device", lambda given=None: given or "gpu")
    shapes: list[Any] = []
    plain = Tensor.to

    def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args and args[0] == "gpu":
            shapes.append(tuple(tensor.shape))
            return tensor
        return plain(tensor, *args, **kwargs)

    monkeypatch.setattr(Tensor, "to", to)
    return shapes


@pytest.mark.parametrize("words", [("score",), ("check",), ("compare",), ("contrast",), ("calibrate",)], ids=" ".join)
def test_images_go_to_the_device_before_they_are_scored(
    steer: Steer, moved: list[Any], tmp_path: Path, words: tuple[str]
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(2):
        Image.new("RGB", (32, 32), (255 * number, 0, 0)).save(folder / f"{number}.png")
    rows = [{"image": f"{n}.png", "prompt": "a red circle"} for n in range(2)]
    given = {
        "check": ["brightness"],
        "compare": ["brightness", "jpeg", "--out", tmp_path / "scatter.png"],
        "contrast": ["scene"],
        "calibrate": ["brightness", "--out", tmp_path / "scales.json"],
    }
    if words == ("score",):
        code, _, err = steer("score", folder / "0.png", "--prompt", "a", "--reward", "brightness")
    else:
        (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
        code, _, err = steer("rewards", *words, *given[words[0]], "--images", folder)
    assert code == 0, err
    assert moved and all(shape[1:] == (3, 32, 32) for shape in moved)


def test_a_server_scores_on_its_device(moved: list[Any]) -> None:
    from steer.rewards.remote import encode

    class Reward:
        name, differentiable = "mean", False

        def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            return images.mean((1, 2, 3))

    server = RewardServer(Reward(), device="gpu")
    try:
        server.scores(encode(torch.zeros(2, 3, 8, 8), ["a", "b"]))
    except (RequestError, RewardError) as error:
        raise AssertionError(error) from error
    finally:
        server.server_close()
    assert moved == [(2, 3, 8, 8)]


def test_held_out_images_are_scored_before_they_leave_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    scored, order, plain = [], [], Tensor.cpu

    def cpu(tensor: Tensor) -> Tensor:
        tensor_on_cpu = plain(tensor)
        if tensor.dim() == 4:
            order.append("moved")
            tensor_on_cpu = tensor_on_cpu.clone()
            tensor_on_cpu.left_the_device = True  # type: ignore[attr-defined]
        return tensor_on_cpu

    class Reward:
        name, differentiable = "mean", False

        def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            scored.append(getattr(images, "left_the_device", False))
            return images.mean((1, 2, 3))

    monkeypatch.setattr(Tensor, "cpu", cpu)
    call = {
        key: value for key, value in call_kwargs("sd", 1, 2).items() if key.startswith(("num_inf", "guid", "hei", "wi"))
    }
    config = TrainingConfig(max_steps=1, num_generations_eval=2, call=call)
    result = Evaluator(("a star",), Reward(), []).evaluate(
        cached_pipe("sd"), config, 0, None, lambda: None, SingleProcess()
    )
    assert order and scored and not any(scored)
    assert result.images.shape == (2, 3, 8, 8)


def test_a_model_on_an_accelerator_stays_and_images_are_brought_to_it() -> None:
    """`meta` stands for the accelerator."""
    model = nn.Linear(3, 1)
    assert to_module_device(torch.zeros(2, 3), model).device.type == "cpu" == model.weight.device.type
    assert to_module_device(torch.zeros(2, 3, device="meta"), model).is_meta and model.weight.is_meta
    assert to_module_device(torch.zeros(2, 3), model).is_meta and model.weight.is_meta
