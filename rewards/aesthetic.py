"""LAION's aesthetic predictors: predicted human rating of an image, independent of the prompt.

v2  L2-normalised CLIP ViT-L/14 image embedding (768) → MLP 768-1024-128-64-16-1, trained on ratings 1..10
v1  the same embedding of ViT-L/14, B/32 or B/16 → one linear layer
Source: LAION-AI/aesthetic-predictor and christophschuhmann/improved-aesthetic-predictor.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from steer.registry import nearest
from steer.reward import RewardError
from steer.rewards import weights
from steer.rewards.clip import DEFAULT_CLIP, MICRO_BATCH, Backbone, load_backbone
from steer.rewards.images import in_micro_batches
from steer.rewards.inputs import takes_any_images
from steer.rewards.learned import LearnedAestheticReward
from steer.rewards.weights import WebFile

RAW = "https://raw.githubusercontent.com"
V2 = f"{RAW}/christophschuhmann/improved-aesthetic-predictor/6934dd81792f086e613a121dbce43082cb8be85e"
V1 = f"{RAW}/LAION-AI/aesthetic-predictor/6d122adad522ab246644d9dc1c6d7a3810ee255f"


# The published heads with their CLIPs, all of them OpenAI's.
PREDICTORS = {
    "v2": (
        WebFile(
            f"{V2}/sac%2Blogos%2Bava1-l14-linearMSE.pth",
            "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
        ),
        DEFAULT_CLIP,
    ),
    "v2-relu": (
        WebFile(
            f"{V2}/ava%2Blogos-l14-reluMSE.pth", "0af3254c651d55b7ea851429c20f26ec880bb0169805a4df85b814bd7966f3e4"
        ),
        DEFAULT_CLIP,
    ),
    "v1": (
        WebFile(f"{V1}/sa_0_4_vit_l_14_linear.pth", "2cd4e60f4f24ae3bcd57b847b13c1f3ba27edc28cc1a7f9ce74ee9f421243cba"),
        DEFAULT_CLIP,
    ),
    "v1-b32": (
        WebFile(f"{V1}/sa_0_4_vit_b_32_linear.pth", "c7b14cead230694acc7b9447974d3cad78003c72da032e402a303b6c2429e85f"),
        "openai/clip-vit-base-patch32",
    ),
    "v1-b16": (
        WebFile(f"{V1}/sa_0_4_vit_b_16_linear.pth", "8ad3923d7ecf019df20ecd2ab5542a3075fbba0278d239c0371345f3d7fcbde0"),
        "openai/clip-vit-base-patch16",
    ),
}
RELU_LAYOUT = (0, 3, 6, 9, 11)  # indices of the linear layers in the layout with ReLU and dropout between them


def build_head(state: weights.State, what: str) -> nn.Module:
    """Build the head of a checkpoint: v2's MLP in either layout, or v1's linear layer. Raises RewardError."""
    matrices = all(tensor.dim() == 2 for key, tensor in state.items() if key.endswith("weight"))
    head: nn.Module | None = None
    with torch.random.fork_rng(devices=[]):  # the initial weights are overwritten
        if matrices and state.keys() == {"weight", "bias"}:
            head = nn.Linear(state["weight"].shape[1], 1)
        for layout in (weights.LINEAR_LAYOUT, RELU_LAYOUT):
            if matrices and state.keys() == {f"layers.{n}.{part}" for n in layout for part in ("weight", "bias")}:
                widths = [state[f"layers.{n}.weight"].shape[1] for n in layout]
                layers = weights.linear_layers([*widths, 1], layout, nn.ReLU if layout == RELU_LAYOUT else nn.Identity)
                head = nn.Sequential(OrderedDict(layers=layers))
    if head is None:
        shown = ", ".join(sorted(state)[:4])
        raise RewardError(f"{what}: not an aesthetic head in a published layout (keys: {shown} …)")
    weights.load_weights(head, state, what)
    return head


class Aesthetic:
    """Aesthetic predictor: the head's output, about 1..10, independent of the prompt.

    `load` is called after the options are validated; dtype applies to the CLIP, not to the head.
    """

    differentiable = True

    def __init__(
        self, name: str, load: Callable[[], tuple[Backbone, nn.Module]], micro_batch: str | int, dtype: str | None
    ) -> None:
        self.name = name
        self._batched = in_micro_batches(self._score, micro_batch)
        weights.check_dtype(dtype)
        self.backbone, self.head = load()
        weights.cast(self.backbone, dtype)
        weights.cast(self.head, None)

    @takes_any_images
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._batched(weights.to_module_device(images, self.backbone, self.head), prompts)

    def _score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.head(self.backbone.images(images))[:, 0]


def aesthetic(
    version: str = "v2",
    *,
    path: str | None = None,
    backbone: str | None = None,
    micro_batch: str | int = MICRO_BATCH,
    dtype: str | None = None,
) -> Aesthetic | LearnedAestheticReward:
    """Load an aesthetic predictor: v2 (default), v2-relu, v1, v1-b32, v1-b16, or the embedded scenes.

    path      a local head in one of the published layouts
    backbone  CLIP of the head, if it is not the published one
    """
    if version in LearnedAestheticReward.embedded:
        if path or backbone:
            raise RewardError(f"aesthetic:{version} is complete: it takes neither path nor backbone")
        return LearnedAestheticReward(version, micro_batch=micro_batch, dtype=dtype)
    if version not in PREDICTORS:
        known = nearest(version, [*PREDICTORS, *LearnedAestheticReward.embedded])
        raise RewardError(f"aesthetic:{version}: unknown version, did you mean {known}?")
    published_head, published_clip = PREDICTORS[version]

    def load() -> tuple[Backbone, nn.Module]:
        file = path or published_head.fetch()
        head = build_head(weights.read_checkpoint(file), f"aesthetic: {file}")
        clip = load_backbone(backbone or published_clip)
        width = next(head.parameters()).shape[1]
        if clip.width != width:
            raise RewardError(
                f"aesthetic: the head takes {width} features, this CLIP has {clip.width}: name another with backbone=…"
            )
        return clip, head

    return Aesthetic("aesthetic" if version == "v2" else f"aesthetic:{version}", load, micro_batch, dtype)
