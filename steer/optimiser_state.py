"""A torch optimiser as tensors and plain values, so that no pickle is needed to save it."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from steer.errors import InputError
from steer.sharded import divided_as, whole


def optimiser_tensors(optimiser: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Its state: tensors by NUMBER.NAME (of a parameter) or groups.NUMBER.NAME, and all else for a JSON file.

    The tensors are the optimiser's own: copy or write them before its next step. What FSDP has divided comes whole; all
    processes have to ask.
    """
    saved = optimiser.state_dict()
    tensors: dict[str, Tensor] = {}
    state: dict[str, dict[str, Any]] = {}
    for number, slots in saved["state"].items():
        state[str(number)] = {name: value for name, value in slots.items() if not isinstance(value, Tensor)}
        tensors |= {f"{number}.{name}": whole(value) for name, value in slots.items() if isinstance(value, Tensor)}
    groups: list[dict[str, Any]] = []
    for number, group in enumerate(saved["param_groups"]):  # a learning rate may be a tensor
        groups.append({name: value for name, value in group.items() if not isinstance(value, Tensor)})
        tensors |= {f"groups.{number}.{name}": value for name, value in group.items() if isinstance(value, Tensor)}
    return tensors, {"kind": type(optimiser).__name__, "shapes": _shapes(optimiser), "state": state, "groups": groups}


def load_optimiser(optimiser: Optimizer, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Brings an optimiser of the same parameters to the state that `optimiser_tensors` gave, on their devices.

    Bit for bit where the state has the type of its parameter (torch casts it to that), as in AdamW. Raises InputError
    for the state of another kind of optimiser, or of other parameters; the optimiser is then as it was.
    """
    if (kind := values.get("kind")) != type(optimiser).__name__:
        raise InputError(f"the saved optimiser is {kind}, not {type(optimiser).__name__}; choose another checkpoint")
    if values.get("shapes") != _shapes(optimiser):
        raise InputError("the saved optimiser is of parameters in other shapes; choose a checkpoint of this model")
    try:
        state = {int(number): dict(slots) for number, slots in values["state"].items()}
        groups = [dict(group) for group in values["groups"]]
        parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
        for name, tensor in tensors.items():
            *kind, number, key = name.split(".")
            place = (groups if kind == ["groups"] else state)[int(number)]
            alike = kind != ["groups"] and tensor.shape == parameters[int(number)].shape
            place[key] = divided_as(tensor, parameters[int(number)]) if alike else tensor
            place[key] = place[key].clone()  # torch would keep ours
        for group, present in zip(groups, optimiser.param_groups, strict=True):
            # JSON has no tuples.
            group |= {
                k: tuple(v) for k, v in group.items() if isinstance(v, list) and isinstance(present.get(k), tuple)
            }
        optimiser.load_state_dict({"state": state, "param_groups": groups})
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"the saved optimiser does not fit ({error}); choose another checkpoint") from error


def _shapes(optimiser: Optimizer) -> list[list[list[int]]]:
    """Of the parameters in every group."""
    return [[list(parameter.shape) for parameter in group["params"]] for group in optimiser.param_groups]
