"""An optimiser restored from a checkpoint, bit for bit."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from steer.errors import InputError
from steer.training.checkpoint import Checkpoint, Checkpoints, load_optimiser, optimiser_tensors

Make = Callable[[nn.Module], Optimizer]


def model(dtype: torch.dtype = torch.float32, device: str = "cpu") -> nn.Module:
    torch.manual_seed(0)
    layers = nn.ModuleDict({"one": nn.Linear(4, 3), "unused": nn.Linear(2, 2), "two": nn.Linear(3, 1)})
    return layers.to(dtype).to(device)


def adamw(net: nn.Module, **options: Any) -> Optimizer:
    slow = {"params": [*net["two"].parameters()], "lr": 1e-5, "betas": (0.5, 0.7)}
    fast = {"params": [*net["one"].parameters(), *net["unused"].parameters()], "weight_decay": 0.3}
    return AdamW([fast, slow], lr=1e-2, **options)


def step(net: nn.Module, optimiser: Optimizer, number: int) -> None:
    """`unused` never has a gradient, and so never a state."""
    weight = net["one"].weight
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(number)).to(weight)
    optimiser.zero_grad()
    net["two"](net["one"](x).tanh()).square().mean().backward()
    optimiser.step()
    optimiser.param_groups[0]["lr"] *= 0.9  # as a schedule does


def through_disk(optimiser: Optimizer, folder: Path) -> tuple[dict[str, Tensor], Any]:
    tensors, values = optimiser_tensors(optimiser)
    opened = Checkpoint.open(Checkpoints(folder).save(1, {"optimiser": tensors}, {"optimiser": values}))
    return opened.tensors("optimiser"), opened.json("optimiser")


def state_text(optimiser: Optimizer) -> str:
    """The whole state with types and tuples, but for the order of names."""
    saved = optimiser.state_dict()
    groups = [sorted(group.items()) for group in saved["param_groups"]]
    return repr((groups, [(number, sorted(slots.items())) for number, slots in sorted(saved["state"].items())]))


RULES: dict[str, Make] = {
    "AdamW": adamw,
    "amsgrad": lambda net: adamw(net, amsgrad=True),
    "one by one": lambda net: adamw(net, foreach=False),
    "fused": lambda net: adamw(net, fused=True),
    "rate in a tensor": lambda net: AdamW(net.parameters(), lr=torch.tensor(0.01), foreach=False),
    "names": lambda net: AdamW(net.named_parameters(), lr=0.01),
    "momentum": lambda net: SGD(net.parameters(), lr=0.01, momentum=0.9),
    "no state": lambda net: SGD(net.parameters(), lr=0.01),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rule", RULES)
def test_a_run_resumes_bit_for_bit(tmp_path: Path, rule: str, dtype: torch.dtype) -> None:
    net = model(dtype)
    optimiser = RULES[rule](net)
    for number in range(3):
        step(net, optimiser, number)
    again = copy.deepcopy(net)
    taken_up = RULES[rule](again)
    load_optimiser(taken_up, *through_disk(optimiser, tmp_path))
    assert state_text(taken_up) == state_text(optimiser)
    for number in range(3, 6):
        step(net, optimiser, number)
        step(again, taken_up, number)
    pairs = zip(net.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)
    for key, tensor in optimiser_tensors(optimiser)[0].items():
        assert torch.equal(tensor, optimiser_tensors(taken_up)[0][key])


def test_a_parameter_without_a_state_stays_so(tmp_path: Path) -> None:
    net = model()
    optimiser = adamw(net)
    step(net, optimiser, 0)
    tensors, values = through_disk(optimiser, tmp_path)
    assert {name.split(".")[0] for name in tensors} == {"0", "1", "4", "5"}
    load_optimiser(fresh := adamw(net), tensors, values)
    assert not [parameter for parameter in net["unused"].parameters() if parameter in fresh.state]
    load_optimiser(fresh, *through_disk(adamw(net), tmp_path))  # of a run that has not begun
    assert not fresh.state


def test_what_was_loaded_is_not_shared(tmp_path: Path) -> None:
    net = model()
    step(net, first := adamw(net), 0)
    tensors, values = through_disk(first, tmp_path)
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    load_optimiser(fresh := adamw(net), tensors, values)
    step(net, fresh, 1)
    assert all(torch.equal(kept[name], tensors[name]) for name in kept)


@pytest.mark.parametrize(
    "device", ["meta", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
def test_the_state_goes_to_where_the_weights_are(tmp_path: Path, device: str) -> None:
    net = model()
    step(net, optimiser := adamw(net), 0)
    other = model(device=device)
    load_optimiser(fresh := adamw(other), *through_disk(optimiser, tmp_path))
    for parameter, slots in fresh.state.items():
        assert slots["exp_avg"].device == slots["exp_avg_sq"].device == parameter.device
        assert slots["exp_avg"].shape == parameter.shape and slots["step"] == 1


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: SGD(model().parameters()), "the saved optimiser is AdamW, not SGD"),
        (lambda: AdamW(model().parameters()), "parameters of other shapes"),
        (lambda: adamw(nn.ModuleDict({**model(), "two": nn.Linear(3, 2)})), "parameters of other shapes"),
    ],
)
def test_the_state_of_something_else_is_refused(tmp_path: Path, other: Callable[[], Optimizer], message: str) -> None:
    net = model()
    step(net, optimiser := adamw(net), 0)
    before = state_text(target := other())
    with pytest.raises(InputError, match=message):
        load_optimiser(target, *through_disk(optimiser, tmp_path))
    assert state_text(target) == before


@pytest.mark.parametrize(
    "corrupt",
    [
        lambda tensors, values: values.pop("state"),
        lambda tensors, values: values.update(groups=[]),
        lambda tensors, values: values.update(groups=3),
        lambda tensors, values: values["groups"][0].update(params=[0]),
        lambda tensors, values: values["groups"][0].pop("params"),
        lambda tensors, values: values["state"].update(x={}),
        lambda tensors, values: values["state"].pop("0"),
        lambda tensors, values: tensors.update({"exp_avg": torch.ones(1)}),
        lambda tensors, values: tensors.update({"groups.9.lr": torch.ones(1)}),
    ],
)
def test_a_state_that_makes_no_sense_is_refused(tmp_path: Path, corrupt: Callable[[Any, Any], Any]) -> None:
    net = model()
    step(net, optimiser := adamw(net), 0)
    tensors, values = through_disk(optimiser, tmp_path)
    corrupt(tensors, values)
    with pytest.raises(InputError, match="the saved optimiser does not fit"):
        load_optimiser(fresh := adamw(net), tensors, values)
    assert not fresh.state
