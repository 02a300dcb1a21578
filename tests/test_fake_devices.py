"""The fake accelerator raises where a real one does, and nowhere else; its numbers are those of the CPU."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from fake_devices import CPU, DEVICE, fake_devices
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


@pytest.fixture(autouse=True)
def accelerator() -> Iterator[None]:
    with fake_devices():
        yield


def there(*shape: int) -> Tensor:
    return torch.ones(*shape, device=DEVICE)


MIXES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "add": lambda a, b: a + b,
    "add in place": lambda a, b: a.add_(b),
    "matmul": lambda a, b: a @ b,
    "linear": F.linear,
    "cat": lambda a, b: torch.cat([a, b]),
    "stack of scalars": lambda a, b: torch.stack([a.sum(), b.sum()]),
    "where": lambda a, b: torch.where(a > 0, a, b),
    "masked fill": lambda a, b: a.masked_fill(b > 0, 0.0),
    "gather": lambda a, b: a.gather(0, b.long()),
    "index_select": lambda a, b: a.index_select(0, b[0].long()),
    "index_copy": lambda a, b: a.index_copy(0, torch.arange(3), b),
    "conv": lambda a, b: F.conv1d(a[None], b[None]),
    "layer norm": lambda a, b: F.layer_norm(a, (3,), b[0]),
    "mse": F.mse_loss,
    "assign values": lambda a, b: a.__setitem__([0, 1], b[:2]),
    "scalar of the device beside the CPU": lambda a, b: a.sum() + b,
    "scalar of the CPU written to": lambda a, b: b.sum().add_(a.sum()),
}


@pytest.mark.parametrize("name", MIXES)
@pytest.mark.parametrize("inference", [False, True])
def test_a_mix_of_devices_raises(name: str, inference: bool) -> None:
    with torch.inference_mode(inference):
        here = torch.ones(3, 3)
        for a, b in ((there(3, 3), here), (there(3, 3), there(3, 3).cpu()), (here.to(DEVICE), here)):
            with pytest.raises(RuntimeError, match="to be on the same device"):
                MIXES[name](a, b)


def test_numpy_generators_and_indices_of_the_device_raise() -> None:
    with pytest.raises(TypeError, match="numpy"):
        there(2).numpy()
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(3, generator=Generator(), device=DEVICE)
    with pytest.raises(RuntimeError, match="generator"):
        there(3).normal_(generator=Generator())
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(3)[there(1).long()]


def test_what_a_real_accelerator_allows_is_allowed() -> None:
    x = there(3, 3)
    for result in (
        x + torch.tensor(2.0),
        x * 2,
        torch.tensor(2.0) * x,
        x[torch.tensor([0, 1])],
        x[:, [0, 2]],
        x[0],
        x.view(9),
        x.half(),
        torch.zeros_like(x),
        x.new_zeros(2),
        x.new_tensor([1.0]),
        torch.full((2,), 1.0, device="xpu"),
        torch.randn(3, generator=Generator().manual_seed(0)).to(x),
        torch.as_tensor([1.0], device=x.device),
        copy.deepcopy(x),
        F.interpolate(x[None, None], scale_factor=2.0),
        F.layer_norm(x, (3,)),
        torch.where(x > 0, x, 0.0),
        x.softmax(-1).double().sum(),
    ):
        assert result.device == DEVICE and not result.is_cpu
    for result in (x.cpu(), x.to("cpu"), torch.tensor(x.tolist()), torch.zeros(2), torch.tensor([x.sum(), x.sum()])):
        assert result.device == CPU and result.is_cpu
    target = torch.zeros(3, 3)
    target.copy_(x)
    target[0] = x[0]
    assert target.device == CPU and torch.equal(target, x.cpu())
    assert torch.equal(x.cpu().to(DEVICE), x) and x.to(DEVICE) is x


def test_modules_move_learn_and_come_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 1))
    twin = copy.deepcopy(model)
    x = torch.randn(5, 4)
    for one, device in ((model.to(DEVICE), DEVICE), (twin, CPU)):
        optimiser = torch.optim.AdamW(one.parameters(), 0.1)
        for _ in range(3):
            inner = x.clone().requires_grad_()
            hidden = checkpoint(one[:2], inner.to(device), use_reentrant=False)
            one[2:](hidden).mean().cpu().backward()
            assert inner.grad is not None and inner.grad.device == CPU
            nn.utils.clip_grad_norm_(one.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
        assert {p.device for p in one.parameters()} == {device}
    with pytest.raises(RuntimeError, match="same device"):
        model(x)
    for there_, here in zip(model.cpu().parameters(), twin.parameters(), strict=True):
        assert there_.device == CPU and torch.allclose(there_, here)
