"""Gradients through a whole diffusers pipeline: from its latents to its images, the pipeline itself left as it is."""

import copy
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from steer.diffusion.step_hooks import CONTROLNETS, DENOISERS

LOSS_SCALES = tuple(2.0**power for power in range(16, -9, -4))  # of the loss, where activations are fp16


def differentiable(pipe: Any, checkpointing: bool = True, one_call: bool = False) -> Any:
    """A twin of a diffusers pipeline whose call builds a graph: gradients flow from `latents=` to `output_type="pt"`.

    The twin's models share the weights of the pipeline's own, which ask for no gradients there; neither the models nor
    their flags are changed. A safety checker takes no images with a graph: set the twin's to None, and check later.

    checkpointing  keep no activations: denoiser calls are each computed once more on the way back, and so are their
                   blocks and the decoder's. Memory is then that of one block, and grows with the number of solver
                   steps by one set of latents each
    one_call       the graph holds one denoiser call: its blocks alone are computed once more
    """
    twin = differentiable_images(pipe)
    models = {name: model for name, model in pipe.components.items() if isinstance(model, nn.Module)}
    models = dict(zip(models, _frozen_twins(models.values()), strict=True))
    if models.get("vae") is not None:
        _decode_in_its_own_precision(models["vae"])
    if checkpointing:
        _checkpoint(models, one_call)
    vars(twin).update(models)
    return twin


def differentiable_images(pipe: Any) -> Any:
    """A copy of a pipeline, with the same models, whose call builds a graph where gradients are on."""
    cls = type(pipe)
    twin = copy.copy(pipe)
    differentiable_call = inspect.unwrap(cls.__call__)  # without the no_grad that diffusers puts around it
    twin.__class__ = type(cls.__name__, (cls,), {"__call__": differentiable_call, "__module__": cls.__module__})
    vars(twin)["maybe_free_model_hooks"] = lambda: None
    return twin


def _frozen_twins(models: Iterable[nn.Module]) -> list[nn.Module]:
    """Copies of the modules on the same weights and buffers, without gradients for them.

    One memo for all: hooks of one model may hold another.
    """
    memo: dict[int, Any] = {}
    for model in (models := list(models)):
        memo |= {id(buffer): buffer for buffer in model.buffers()}
        memo |= {id(p): _frozen(p) for p in model.parameters()}
    return [copy.deepcopy(model, memo) for model in models]


def _frozen(parameter: nn.Parameter) -> nn.Parameter:
    # Parameters of other classes are quantised: they have no gradients to switch off, and would lose their class.
    return nn.Parameter(parameter.detach(), requires_grad=False) if type(parameter) is nn.Parameter else parameter


def _decode_in_its_own_precision(vae: Any) -> None:
    """Some pipelines switch a half-precision VAE to fp32 for the call and back: that would break the way back."""
    if getattr(vae.config, "force_upcast", False) and vae.dtype == torch.float16:
        vae.to(torch.float32)
    decode = vae.decode

    def decoded(z: Tensor, *args: Any, **kwargs: Any) -> Any:
        return decode(z.to(vae.dtype), *args, **kwargs)

    vae.decode = decoded


def _checkpoint(models: dict[str, Any], one_call: bool) -> None:
    for name in models.keys() & {*DENOISERS, *CONTROLNETS, "vae"}:
        model, entry = models[name], "decode" if name == "vae" else "forward"
        by_block = getattr(model, "_supports_gradient_checkpointing", False)
        if by_block:
            model.enable_gradient_checkpointing()
        if not (by_block and one_call):
            setattr(model, entry, _recomputed(getattr(model, entry)))


def _recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function; where a graph is built it keeps nothing but its inputs."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        return checkpoint(function, *args, use_reentrant=False, **kwargs)

    return call


def per_sample_gradients(rewards: Tensor, x: Tensor, half: bool) -> Tensor | None:
    """∇ r_i of every particle with respect to its own x_i, (N, …) in fp32; None where no reward depends on x.

    half  where fp16 computes, rewards are multiplied by a power of two, as large as leaves the gradients finite:
          small ones would be 0
    """
    if not rewards.requires_grad:
        return None
    for scale in LOSS_SCALES if half else (1.0,):
        # Every reward depends on its own row alone: the gradient of the sum holds that of each.
        (gradient,) = torch.autograd.grad(rewards.sum() * scale, x, retain_graph=half, allow_unused=True)
        if gradient is None or gradient.isfinite().all():
            break
    return None if gradient is None else gradient.float() / scale


def computes_in_fp16(pipe: Any) -> bool:
    """Whether any of a pipeline's models does. (Its latents need not tell: some keep them in fp32.)"""
    models = [model for model in pipe.components.values() if isinstance(model, nn.Module)]
    return any(parameter.dtype == torch.float16 for model in models for parameter in model.parameters())
