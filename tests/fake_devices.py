"""An accelerator without hardware: CPU tensors that report another device, and errors where devices mix.

    with fake_devices():
        pipe.to(DEVICE)
        pipe(...)  # RuntimeError where a real accelerator would raise it

The device of a tensor is an attribute of its storage, which views share and which ends with it. A `TorchFunctionMode`
answers what Python asks (`.device`, `.to`, `.cpu`, `device=` of factories, `.numpy()`); a `TorchDispatchMode` checks
every operation, those of autograd included, by the rules of CUDA: one device, beside which CPU tensors of no dimension
are allowed, and CPU indices. Random numbers of a CPU generator are drawn on the CPU.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from steer import reward as background

DEVICE, CPU = torch.device("xpu", 0), torch.device("cpu")
UNKNOWN = torch.device("xpu", 1)  # of what C++ makes in a backward pass without saying for which tensor
aten = torch.ops.aten
INDEXED = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index)
COPIES = (aten.copy_, aten.copy)
JOINED = (aten.cat, aten.stack)


class _Local(threading.local):
    """By thread, the devices that factories of the running calls make tensors on."""

    def __init__(self) -> None:
        self.factories: list[torch.device] = []


_local = _Local()


@contextmanager
def _default_device(device: torch.device) -> Iterator[None]:
    _local.factories.append(device)
    try:
        yield
    finally:
        _local.factories.pop()


def _device(given: Any) -> torch.device:
    if isinstance(given, int):
        return DEVICE
    device = torch.device(given)
    return DEVICE if device.type == DEVICE.type else device


def _place(tensor: Tensor) -> torch.device:
    """Where a tensor is, or pretends to be."""
    with torch._C.DisableTorchFunction():  # `.device` is the real one
        if tensor.device.type != "cpu" or tensor.layout != torch.strided:
            return tensor.device
        return getattr(tensor.untyped_storage(), "fake_device", CPU)


def _put(tensor: Tensor, device: torch.device) -> Tensor:
    with torch._C.DisableTorchFunction():
        if tensor.device.type == "cpu" and tensor.layout == torch.strided:
            tensor.untyped_storage().fake_device = device  # type: ignore[attr-defined]
    return tensor


class _Transfer(torch.autograd.Function):
    """A copy on another device, whose gradient comes back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, device: torch.device) -> Tensor:
        ctx.home = _place(tensor)
        return _copied(tensor, device)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _copied(gradients[0], ctx.home), None


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    with torch._C.DisableTorchFunction():
        return _put(tensor.detach().clone(), device)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    if _place(tensor) == device:
        return tensor
    if tensor.is_meta or device.type == "meta":
        return tensor.to(device)
    moved: Tensor = _Transfer.apply(tensor, device)
    return moved


def _to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    names = ["dtype", "non_blocking", "copy"]
    if args and isinstance(args[0], Tensor):
        kwargs |= {"device": _place(args[0]), "dtype": args[0].dtype}
        args, names = args[1:], names[1:]
    elif args and not isinstance(args[0], torch.dtype):
        names = ["device", *names]
    kwargs |= dict(zip(names, args, strict=False))
    device, kwargs = kwargs.pop("device", None), {name: value for name, value in kwargs.items() if value is not None}
    kept = tensor.to(**kwargs) if kwargs else tensor
    return kept if device is None else _moved(kept, _device(device))


class _Functions(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given, getter = dict(kwargs or {}), getattr(func, "__self__", None)
        if getter is Tensor.device:
            place = _place(args[0])
            return DEVICE if place == UNKNOWN else place
        if getter is Tensor.is_cpu:
            return _place(args[0]) == CPU
        if getter is Tensor.is_xpu:
            return _place(args[0]).type == DEVICE.type
        if func in (Tensor.numpy, Tensor.__array__) and _place(args[0]).type == DEVICE.type:
            raise TypeError("can't convert xpu:0 device type tensor to numpy: use Tensor.cpu() first")
        if func is Tensor.cpu:
            return _moved(args[0], CPU)
        if func is Tensor.to:
            return _to(*args, **given)
        if func is Tensor.__deepcopy__ or (func is Tensor.new_tensor and given.get("device") is None):
            return _put(func(*args, **given), _place(args[0]))
        if given.get("device") is not None:
            return self._made(func, args, given)
        tensors = [leaf for leaf in tree_leaves((args, given)) if isinstance(leaf, Tensor)]
        if func is torch.tensor and not isinstance(args[0], Tensor):
            tensors = []
        with _default_device(next((DEVICE for one in tensors if _place(one).type == DEVICE.type), CPU)):
            return func(*args, **given)

    @staticmethod
    def _made(func: Callable[..., Any], args: Sequence[Any], given: dict[str, Any]) -> Any:
        device = _device(given["device"])
        given["device"] = CPU if device == DEVICE else device
        if func in (torch.as_tensor, torch.asarray):
            return _moved(func(*args, **given), device)
        with _default_device(device):
            output = func(*args, **given)
        return _put(output, device) if isinstance(output, Tensor) else output


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        inputs = [leaf for leaf in tree_leaves((args, given)) if isinstance(leaf, Tensor)]
        device = _common(func, args, inputs)
        if device == DEVICE and (generator := given.get("generator")) is not None and generator.device.type == "cpu":
            raise RuntimeError(f"Expected a 'xpu' device type for generator but found 'cpu' ({func})")
        output = func(*args, **given)
        before = {one.untyped_storage()._cdata for one in inputs if one.layout == torch.strided}
        for leaf in tree_leaves(output):
            strided = isinstance(leaf, Tensor) and leaf.layout == torch.strided
            if strided and leaf.untyped_storage()._cdata not in before:
                _put(leaf, device)
        return output


def _common(func: Any, args: Sequence[Any], inputs: Sequence[Tensor]) -> torch.device:
    """The device of an operation's results. Raises RuntimeError where it mixes devices."""
    packet = func.overloadpacket
    if not inputs:
        return _local.factories[-1] if _local.factories else CPU
    if packet in COPIES:
        return _place(args[0])
    if packet in INDEXED:  # by indices of the same device or of the CPU
        inputs = [one for one in inputs if _place(one) != CPU or not any(one is index for index in args[1])]
    places = [_place(one) for one in inputs]
    known = {place for place in places if place != UNKNOWN}
    if not known:
        return UNKNOWN
    sized = {
        place for place, one in zip(places, inputs, strict=True) if place != UNKNOWN and (one.dim() or packet in JOINED)
    }
    written = func._schema.is_mutable and isinstance(args[0], Tensor) and _place(args[0]) == CPU
    if len(sized) > 1 or (DEVICE in known and (sized == {CPU} or written)):
        raise RuntimeError(f"Expected all tensors to be on the same device, but found xpu:0 and cpu ({func})")
    return DEVICE if DEVICE in known else next(iter(known))


@contextmanager
def _both_modes() -> Iterator[None]:
    """In this thread, where they are not active already."""
    with ExitStack() as stack:
        if not any(isinstance(mode, _Functions) for mode in _get_current_function_mode_stack()):
            stack.enter_context(_Functions())
        if not any(
            isinstance(mode, _Operations) for mode in torch.utils._python_dispatch._get_current_dispatch_mode_stack()
        ):
            stack.enter_context(_Operations())
        yield


@contextmanager
def fake_devices() -> Iterator[None]:
    """Tensors may be on DEVICE, also in threads under `steer.reward.ThreadContext` and in backward passes."""
    run_backward, load, modes = torch.autograd._engine_run_backward, torch.load, background.ThreadContext.__call__

    def backward(*args: Any, **kwargs: Any) -> Any:
        with _both_modes(), _default_device(UNKNOWN):
            return run_backward(*args, **kwargs)

    def loaded(*args: Any, map_location: Any = None, **kwargs: Any) -> Any:
        tensors = load(*args, map_location="cpu", **kwargs)
        return tensors if map_location is None else tree_map_only(Tensor, lambda one: one.to(map_location), tensors)

    @contextmanager
    def in_thread(self: background.ThreadContext) -> Iterator[None]:
        with modes(self), _both_modes():
            yield

    checks = torch.utils.checkpoint._allowed_determinism_checks_to_fns
    unplaced = {name: lambda saved: {"shape": saved.shape, "dtype": saved.dtype} for name in ("default",)}
    with (
        mock.patch("torch.autograd._engine_run_backward", backward),
        mock.patch.dict(checks, unplaced),  # it asks inside of operations, where no function mode answers
        mock.patch("torch.load", loaded),
        mock.patch.object(background.ThreadContext, "__call__", in_thread),
        _both_modes(),
    ):
        yield
