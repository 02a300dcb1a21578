"""Models as large as the published ones.

Denoisers and VAEs have the published sizes. Text encoders have the published widths and two layers, or one: text is
encoded once a call, and is not what is measured.
"""

from typing import Any

from steer.apps.bench import models

SD_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
SIXTEEN_CHANNELS = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}

REAL_SIZES = {
    "sd15": models.RealSize(
        models.sd,
        {
            "sample_size": 64,
            "block_out_channels": (320, 640, 1280, 1280),
            "layers_per_block": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 768,
        },
        SD_VAE | {"latent_channels": 4, "sample_size": 512, "scaling_factor": 0.18215},
        guidance=7.5,
    ),
    "sdxl": models.RealSize(
        models.sdxl,
        {
            "sample_size": 128,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (320, 640, 1280),
            "layers_per_block": 2,
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        SD_VAE | {"latent_channels": 4, "sample_size": 1024, "scaling_factor": 0.13025},
        clips=(768, 1280),
        guidance=5.0,
    ),
    "sd3": models.RealSize(
        models.sd3,
        {
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 24,
            "attention_head_dim": 64,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 192,
        },
        SD_VAE | SIXTEEN_CHANNELS | {"sample_size": 1024, "scaling_factor": 1.5305, "shift_factor": 0.0609},
        clips=(768, 1280),
        words=4096,
        guidance=7.0,
    ),
    "flux": models.RealSize(
        models.flux,
        {
            "patch_size": 1,
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": True,
        },
        SD_VAE | SIXTEEN_CHANNELS | {"sample_size": 1024, "scaling_factor": 0.3611, "shift_factor": 0.1159},
        words=4096,
        guidance=3.5,
    ),
}
