"""What the particles of one prompt have in common in cross-attention, computed once: exact, and no family's own code.

Attention of particle k with queries Q_k to the keys and values K, V of its prompt (arXiv 1706.03762, eq. 1):

    softmax(Q_k Kᵀ/√d) V,  k = 1..K   is   softmax([Q_1; …; Q_K] Kᵀ/√d) V,

one long sequence to one set of keys and values, since a query takes no notice of the others. And K = P W_K, V = P W_V
depend on the prompt P alone: they serve all solver steps. The layers themselves compute, on folded input.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from diffusers.models import attention_processor as known
from diffusers.models.embeddings import PixArtAlphaTextProjection
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from torch import Tensor, nn

from steer.diffusion.step_hooks import denoising_modules, replaced
from steer.prompt_memory import PromptMemory
from steer.prompt_projections import Counts, Once, WeightsWatch, is_plain

# Processors in which a query takes no notice of the other queries, nor of its own place among them.
EACH_QUERY_ALONE = (
    known.AttnProcessor,
    known.AttnProcessor2_0,
    known.FusedAttnProcessor2_0,
    known.XFormersAttnProcessor,
    WanAttnProcessor,
)
KEYS_AND_VALUES = ("to_k", "to_v", "to_kv")


@dataclass
class Sharing:
    """What is shared in a block.

    layers   cross-attention layers that share; none in models of joint attention
    reasons  of modules and layers that have nothing to share, or are left as they are: why
    counts   how often the projections of a batch of prompts were computed, and reused
    """

    layers: int = 0
    reasons: tuple[str, ...] = ()
    counts: Counts = field(default_factory=Counts)


@contextmanager
def shared_prompt(target: Any) -> Iterator[Sharing]:
    """In the block, the cross-attention of a pipeline's denoisers and ControlNets (or of a module) computes what the
    particles of a prompt share once: keys and values for all solver steps, one long sequence of queries for a prompt.

    Rows of the same prompt are told by what they hold, so that any layout of guidance, prompts per row and resampling
    are followed. Only without gradients; with them, and in layers that it does not know (IP-adapters, a user's own
    processors), in compiled models and in joint attention everything is as ever, and `reasons` says so. Keys and values
    are computed anew when the weights change, and at every step where an adapter or quantisation stands on them.

    After the block, whatever ends it, the models are as they were. It holds the keys and values of up to 4 batches of
    prompts.
    """
    sharing = Sharing()
    with ExitStack() as stack:
        modules = denoising_modules(target)
        if not modules:
            sharing.reasons = (f"{type(target).__name__} has no denoiser that is known here",)
        for module in modules:
            _share(module, sharing, stack)
        yield sharing


def _share(module: nn.Module, sharing: Sharing, stack: ExitStack) -> None:
    name, components = type(module).__name__, list(module.modules())
    if hasattr(module, "_orig_mod") or any(part._compiled_call_impl is not None for part in components):
        sharing.reasons += (f"{name} is compiled: left as it is",)
        return
    layers = [part for part in components if getattr(part, "is_cross_attention", False)]
    if not layers:
        sharing.reasons += (f"{name} has no cross-attention, text and image attend jointly: nothing to share",)
        return
    left = sorted({type(layer.processor).__name__ for layer in layers if not _each_query_alone(layer)})
    sharing.reasons += tuple(f"{name}: layers of {processor} are left as they are" for processor in left)
    layers = [layer for layer in layers if _each_query_alone(layer)]
    sharing.layers += len(layers)
    prompts, captions = PromptMemory(), PromptMemory()
    watch = WeightsWatch((prompts, captions))
    for layer in layers:
        for linear in (layer._modules.get(part) for part in KEYS_AND_VALUES):
            if linear is not None and is_plain(linear):
                watch.modules.append(linear)
                once = Once(linear, linear.forward, prompts.folded, attrgetter("chunks"), sharing.counts)
                stack.enter_context(replaced(vars(linear), "forward", once))
        stack.enter_context(replaced(vars(layer), "forward", _Folded(layer, layer.forward, prompts)))
    for part in components:
        if layers and type(part) is PixArtAlphaTextProjection:
            watch.modules.append(part)
            once = Once(part, part.forward, captions.find, attrgetter("number"), sharing.counts)
            stack.enter_context(replaced(vars(part), "forward", once))
    stack.callback(module.register_forward_pre_hook(watch).remove)


def _each_query_alone(layer: Any) -> bool:
    """Whether a layer's output for a query depends on no other query: then queries can be put into one sequence."""
    norms_over_queries = getattr(layer, "group_norm", None), getattr(layer, "spatial_norm", None)
    of_images = getattr(layer, "add_k_proj", None)  # Wan's image-to-video has a second set of keys in the same tensor
    plain = all(part is None for part in (*norms_over_queries, of_images))
    return type(layer) in (known.Attention, WanAttention) and type(layer.processor) in EACH_QUERY_ALONE and plain


@dataclass(eq=False)
class _Folded:
    """The forward of a cross-attention layer, on folded queries. An object and no closure, as `Once` is."""

    layer: Any
    plain: Callable[..., Any]
    prompts: PromptMemory

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        more = any(argument is not None for argument in (*args, *kwargs.values()))
        if more or not self._folds(hidden_states, encoder_hidden_states, attention_mask):
            return self.plain(hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs)
        batch = self.prompts.find(encoder_hidden_states, attention_mask)
        return batch.unfold(self.plain(batch.fold(hidden_states), batch.folded, batch.folded_mask))

    def _folds(self, queries: Tensor, prompts: Any, mask: Tensor | None) -> bool:
        if torch.is_grad_enabled() or not isinstance(prompts, Tensor) or not _each_query_alone(self.layer):
            return False
        # Dropout would draw other random numbers than without folding.
        drops = self.layer.training and self.layer.to_out[1].p > 0
        rows = len(queries)
        masked = mask is None or (type(self.layer) is known.Attention and mask.shape[:-1] == (rows, 1))
        return queries.dim() == prompts.dim() == 3 and len(prompts) == rows and masked and not drops
