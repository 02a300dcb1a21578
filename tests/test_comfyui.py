"""`steer.apps.comfyui` through an imitation of the interface of ComfyUI: schemas, validation, scores, picks, LoRAs."""

import asyncio
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from test_lora_layouts import adapter
from test_trainable import fresh_pipe

from steer.apps.comfyui import comfy_entrypoint
from steer.apps.comfyui.batches import BatchScores, pick, score_batch
from steer.errors import InputError
from steer.training.lora_layouts import convert_lora


class Slot:
    """An input or output with its kind, as `io.Image.Input("images", …)` makes it."""

    def __init__(self, kind: str, name: str, **options: Any) -> None:
        self.kind, self.id, self.options = kind, name, options


class Kind:
    def __init__(self, name: str) -> None:
        self.name = name

    def Input(self, name: str, **options: Any) -> Slot:
        return Slot(self.name, name, **options)

    Output = Input


class NodeOutput:
    def __init__(self, *values: Any) -> None:
        self.args = values


def lora_names(unet: Any, known: dict[str, str]) -> dict[str, str]:
    """The weights of a UNet by the names that LoRA files give them, as ComfyUI's function of that name."""
    own = {f"lora_unet_{name.replace('.', '_')}": f"{name}.weight" for name, _ in unet.named_modules()}
    return known | own


def patched(model: Any, clip: None, tensors: dict[str, torch.Tensor], strength: float, _: float) -> tuple[Any, None]:
    """W + strength · α/r · B A, as ComfyUI's loader: α is the tensor in the file, r the rows of A."""
    state, places = dict(model.model.state_dict()), lora_names(model.model, {})
    for layer in {name.partition(".")[0] for name in tensors}:
        down, up = (tensors[f"{layer}.lora_{side}.weight"] for side in ("down", "up"))
        state[places[layer]] = state[places[layer]] + strength * tensors[f"{layer}.alpha"] / len(down) * up @ down
    return SimpleNamespace(model=model.model, weights=state), clip


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """The nodes by id, loaded as ComfyUI loads them: the entry point is awaited, and so is the list."""
    latest: Any = ModuleType("comfy_api.latest")
    kinds = {name: Kind(name.upper()) for name in ("Image", "String", "Float", "Int", "Model", "Combo")}
    latest.io = SimpleNamespace(
        ComfyNode=type("ComfyNode", (), {}),
        Schema=lambda **given: SimpleNamespace(**given),
        NodeOutput=NodeOutput,
        **kinds,
    )
    latest.ComfyExtension = type("ComfyExtension", (), {})
    files: Any = ModuleType("folder_paths")
    files.get_filename_list = lambda kind: sorted(str(one.relative_to(tmp_path)) for one in tmp_path.rglob("*.saf*"))
    files.get_full_path_or_raise = lambda kind, name: str(tmp_path / name)
    comfy: Any = ModuleType("comfy")
    comfy.lora, comfy.sd = ModuleType("comfy.lora"), ModuleType("comfy.sd")
    comfy.lora.model_lora_keys_unet, comfy.sd.load_lora_for_models = lora_names, patched
    modules = {"comfy": comfy, "comfy.lora": comfy.lora, "comfy.sd": comfy.sd, "folder_paths": files}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "comfy_api", ModuleType("comfy_api"))
    monkeypatch.setitem(sys.modules, "comfy_api.latest", latest)
    sys.modules.pop("steer.apps.comfyui.nodes", None)
    listed = asyncio.run(asyncio.run(comfy_entrypoint()).get_node_list())
    yield {node.define_schema().node_id: node for node in listed}
    sys.modules.pop("steer.apps.comfyui.nodes", None)
    importlib.invalidate_caches()


def greys(*levels: float) -> torch.Tensor:
    """A batch (N, 6, 5, 3) of grey images, whose brightness is their level."""
    return torch.tensor(levels)[:, None, None, None].expand(-1, 6, 5, 3)


def run(node: Any, **given: Any) -> tuple[Any, ...]:
    """Call a node as ComfyUI does: every input by the name in its schema, with defaults of its widgets."""
    schema = node.define_schema()
    values = {one.id: one.options["default"] for one in schema.inputs if "default" in one.options} | given
    assert values.keys() == {one.id for one in schema.inputs}
    assert node.validate_inputs(reward=values["reward"]) is True
    result = node.execute(**values).args
    assert len(result) == len(schema.outputs)
    for slot, value in zip(schema.outputs, result, strict=True):
        one = value[0] if slot.options.get("is_output_list") else value
        assert isinstance(one, {"IMAGE": torch.Tensor, "FLOAT": float, "INT": int, "STRING": str}[slot.kind])
    return result


def test_every_image_is_scored_in_the_order_of_the_batch(nodes: dict[str, Any]) -> None:
    levels = [0.1 * k for k in (3, 9, 1, 5, 2, 8, 4, 7, 6, 0)]  # more than one batch of the reward
    scores, mean, table = run(nodes["SteerScoreImages"], images=greys(*levels), reward="brightness")
    assert scores == pytest.approx(levels, abs=1e-5) and mean == pytest.approx(0.45, abs=1e-5)
    assert table.splitlines()[1] == "1. image 1: 0.9" and table.splitlines()[-1].startswith("10. image 9:")


def test_the_best_are_picked_and_all_are_ranked(nodes: dict[str, Any]) -> None:
    batch, given = greys(0.25, 0.75, 0.5), {"reward": "brightness + brightness:1"}
    best, scores, numbers, _ = run(nodes["SteerRankImages"], images=batch, **given)
    assert torch.equal(best, batch[1:2]) and numbers == [1] and scores == pytest.approx([1.5])
    best, scores, numbers, table = run(nodes["SteerRankImages"], images=batch, keep=0, **given)
    assert torch.equal(best, batch[[1, 2, 0]]) and numbers == [1, 2, 0]
    assert scores == pytest.approx([1.5, 1.0, 0.5]) and table.startswith("brightness + brightness:1\n1. image 1: 1.5")


def test_images_are_those_that_the_reward_reads() -> None:
    """A red star drawn on the left half: rows, columns and channels come in the reward's order."""
    image = torch.zeros(1, 8, 8, 4)
    image[0, :, :, 0], image[..., 3] = 1.0, 0.5  # red; a channel of opacity is left out
    red, blue = (score_batch(image, "", f"colour:{name}").totals.item() for name in ("red", "blue"))
    assert red > blue


def test_equals_keep_their_order() -> None:
    scores = BatchScores("x", torch.tensor([1.0, 2.0, 2.0]), {})
    assert pick(greys(0, 1, 2), scores, keep=2)[1] == [1, 2]


def test_a_shared_workflow_cannot_run_code(nodes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    node = nodes["SteerScoreImages"]
    for bad in ("os:getcwd", "my.yaml", "http://127.0.0.1:1/"):
        assert "a workflow may load rewards with names" in node.validate_inputs(reward=bad)
        with pytest.raises(InputError, match="a workflow may load"):
            node.execute(images=greys(0.5), prompt="", reward=bad)
    assert node.validate_inputs() is True and node.validate_inputs(reward=None) is True
    monkeypatch.setenv("STEER_COMFYUI_REWARDS", "os:getcwd; my.yaml")
    assert node.validate_inputs(reward="my.yaml") is True


def test_wrong_images_are_named() -> None:
    for shape in ((2, 3, 8), (2, 3, 8, 8), (0, 8, 8, 3)):
        with pytest.raises(InputError, match=r"images must be \(N, H, W, 3\), got"):
            score_batch(torch.zeros(shape), "", "brightness")


def test_images_that_are_compared_are_scored_in_one_call() -> None:
    grey = torch.linspace(0, 1, 9).view(9, 1, 1, 1).expand(9, 4, 4, 3)
    totals = score_batch(grey, "", "tournament(brightness)").totals
    assert len(totals.unique()) == 9 and totals.argsort().tolist() == list(range(9))


@pytest.mark.parametrize("kohya", [False, True])
def test_an_adapter_changes_the_weights_as_diffusers_does(nodes: dict[str, Any], tmp_path: Path, kohya: bool) -> None:
    """At half strength, against diffusers' own fusion of the same file."""
    adapter("sd", tmp_path / "final", 5.0)
    plain, fused = fresh_pipe("sd"), fresh_pipe("sd")
    fused.load_lora_weights(str(tmp_path / "final"))
    fused.fuse_lora(lora_scale=0.5)
    fused.unload_lora_weights()
    if kohya:
        convert_lora(tmp_path / "final", tmp_path / "kohya.safetensors")
    node = nodes["SteerLoadAdapter"]
    name = "kohya.safetensors" if kohya else "final/pytorch_lora_weights.safetensors"
    schema = node.define_schema()
    assert [one.id for one in schema.inputs] == ["model", "adapter", "strength"] and len(schema.outputs) == 1
    assert name in schema.inputs[1].options["options"]
    (adapted,) = node.execute(SimpleNamespace(model=plain.unet), name, strength=0.5).args
    assert adapted.weights.keys() == fused.unet.state_dict().keys()
    for key, value in fused.unet.state_dict().items():
        torch.testing.assert_close(adapted.weights[key], value, atol=1e-6, rtol=1e-5)
    changed = [key for key, value in plain.unet.state_dict().items() if not torch.equal(adapted.weights[key], value)]
    assert len(changed) > 10


def test_an_adapter_of_another_model_is_refused(nodes: dict[str, Any], tmp_path: Path) -> None:
    adapter("sd", tmp_path / "final")
    other = SimpleNamespace(model=torch.nn.Sequential(torch.nn.Linear(2, 2)))
    with pytest.raises(InputError, match=r"of its \d+ layers have no place in this model, such as lora_unet_"):
        nodes["SteerLoadAdapter"].execute(other, "final/pytorch_lora_weights.safetensors")
