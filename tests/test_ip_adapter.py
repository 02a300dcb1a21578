"""Steering with an IP-Adapter: its image, or the embeddings of one, condition every particle."""

from typing import Any

import PIL.Image
import pytest
import torch
from conftest import PROMPT, sd
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from steer.pipelines.compatibility import CHECKS, PipelineCheck

DIMENSION = 12


def with_adapter() -> Any:
    """Stable Diffusion with an IP-Adapter of random weights in the published layout, and its image encoder."""
    parts = sd().components
    unet = parts["unet"]
    torch.manual_seed(1)
    layers: dict[str, Any] = {}
    for number, name in enumerate(unet.attn_processors):
        if name.endswith("attn2.processor"):
            attention = unet.get_submodule(name.removesuffix(".processor"))
            width, context = attention.to_q.in_features, unet.config.cross_attention_dim
            own = IPAdapterAttnProcessor2_0(width, context, num_tokens=(4,)).state_dict()
            layers |= {
                f"{number}.to_k_ip.weight": own["to_k_ip.0.weight"],
                f"{number}.to_v_ip.weight": own["to_v_ip.0.weight"],
            }
    projection = ImageProjection(DIMENSION, unet.config.cross_attention_dim, num_image_text_embeds=4).state_dict()
    names = {"image_embeds.weight": "proj.weight", "image_embeds.bias": "proj.bias"}
    image_proj = {names.get(name, name): value for name, value in projection.items()}
    unet._load_ip_adapter_weights([{"image_proj": image_proj, "ip_adapter": layers}])
    config = CLIPVisionConfig(
        hidden_size=8, intermediate_size=16, projection_dim=DIMENSION, num_hidden_layers=1, num_attention_heads=2,
        image_size=8, patch_size=4,
    )  # fmt: skip
    parts |= {
        "image_encoder": CLIPVisionModelWithProjection(config).eval(),
        "feature_extractor": CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}),
    }
    pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["image", "embeddings"])
def test_an_ip_adapter_is_steered_exactly(name: str) -> None:
    pipe = with_adapter()
    generator = torch.Generator().manual_seed(2)
    given: dict[str, Any] = {"ip_adapter_image": PIL.Image.new("RGB", (8, 8), "red")}
    if name == "embeddings":
        given = {"ip_adapter_image_embeds": [torch.randn((2, 1, DIMENSION), generator=generator)]}
    call = {"prompt": PROMPT, "num_inference_steps": 4, "guidance_scale": 3.0, "height": 8, "width": 8}
    row = PipelineCheck(pipe, call | given).row()
    assert {check: outcome.state for check, outcome in row.items()} == dict.fromkeys(CHECKS, "ok"), row
    images = [
        pipe(**call, **one, generator=torch.Generator().manual_seed(3), output_type="pt").images
        for one in (given, other_image(given))
    ]
    assert (images[0] - images[1]).abs().max() > 1e-3  # the adapter matters


def other_image(given: dict[str, Any]) -> dict[str, Any]:
    if "ip_adapter_image" in given:
        return {"ip_adapter_image": PIL.Image.new("RGB", (8, 8), "blue")}
    return {"ip_adapter_image_embeds": [-given["ip_adapter_image_embeds"][0]]}
