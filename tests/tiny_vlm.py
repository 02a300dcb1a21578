"""Tiny vision-language models and rewards with random weights in the published layouts."""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_rewards import seeded, shaken
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessor,
    Owlv2Processor,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from steer.apps.scenes.training import LENGTH, build_tokenizer

SENTENCE = (
    "Does this figure show Please answer yes or no Yes No four a red blue star circle is it there Is 4 in one word"
)
WORDS = SENTENCE.split()
QWEN_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
TEMPLATE = (
    "{% for m in messages %}USER: {% for part in m['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT: {% endif %}"
)
QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for part in m['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def word_tokenizer(special: Sequence[str], words: Sequence[str] = WORDS) -> PreTrainedTokenizerFast:
    vocabulary = list(
        dict.fromkeys(["<pad>", "<unk>", "</s>", *special, *words, *"\":?.,'", "USER", "ASSISTANT", "user"])
    )
    made = Tokenizer(models.WordLevel({word: k for k, word in enumerate(vocabulary)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", eos_token="</s>", padding_side="right"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer


@seeded()
def tiny_llava(folder: Path) -> Path:
    """28 px, four image tokens."""
    tokenizer = word_tokenizer(["<image>"])
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
    )
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )
    model = shaken(LlavaForConditionalGeneration(config))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def qwen_config(tokenizer: PreTrainedTokenizerFast, vocabulary: int | None = None) -> Qwen2VLConfig:
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad", "vision_start")}
    text = {
        "vocab_size": vocabulary or len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
        "bos_token_id": None,
        "eos_token_id": None,
    }
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    return Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
    )


def qwen_processor(tokenizer: PreTrainedTokenizerFast) -> Qwen2VLProcessor:
    sizes = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
    return Qwen2VLProcessor(
        Qwen2VLImageProcessor(size=sizes), tokenizer, Qwen2VLVideoProcessor(size=sizes), chat_template=QWEN_TEMPLATE
    )


@seeded()
def tiny_qwen(folder: Path) -> Path:
    """Qwen2-VL of two layers."""
    tokenizer = word_tokenizer(QWEN_TOKENS)
    model = shaken(Qwen2VLForConditionalGeneration(qwen_config(tokenizer)))
    model.save_pretrained(folder)
    qwen_processor(tokenizer).save_pretrained(folder)
    return folder


def tiny_hpsv3(folder: Path) -> tuple[dict[str, Tensor], Qwen2VLForConditionalGeneration]:
    """Write the base model's folder, and the checkpoint in both published layouts, new.safetensors and old.safetensors;
    return the state dict of today's names, and the model."""
    tokenizer = word_tokenizer(QWEN_TOKENS)
    qwen_processor(tokenizer).save_pretrained(folder)
    qwen_config(tokenizer).save_pretrained(folder)
    with seeded():
        model = shaken(Qwen2VLForConditionalGeneration(qwen_config(tokenizer, len(tokenizer) + 1))).eval()
        state = {key: value.clone() for key, value in model.state_dict().items()}
        for index, before, after in ((0, 32, 24), (3, 24, 16), (5, 16, 2)):
            state[f"rm_head.{index}.weight"] = torch.randn(after, before) / before**0.5
            state[f"rm_head.{index}.bias"] = torch.randn(after)
    save_file(state, folder / "new.safetensors")
    old = {re.sub(r"^model\.(visual\.)", r"\1", re.sub(r"language_model\.", "", key)): t for key, t in state.items()}
    assert "visual.patch_embed.proj.weight" in old and "model.layers.0.self_attn.q_proj.weight" in old
    save_file(old, folder / "old.safetensors")
    return state, model


WIDTH, HEADS, HEAD, MULT, LAYERS = 24, 3, 8, 2, 2  # of the tiny MPS


def tiny_mps(folder: Path) -> tuple[CLIPModel, dict[str, Tensor]]:
    """Write CLIP's configuration and tokenizer, and MPS.pth; return CLIP, and the state dict of CLIP and the fusion."""
    tokenizer = build_tokenizer(folder)
    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "max_position_embeddings": LENGTH, "eos_token_id": tokenizer.eos_token_id}
    vision = {"hidden_size": 40, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes = {"image_size": 32, "patch_size": 16}
    config = CLIPConfig(text_config=text, vision_config=vision | sizes, projection_dim=WIDTH)
    config.save_pretrained(folder)
    with seeded():
        clip = shaken(CLIPModel(config)).eval()
        state = {f"model.{key}": value for key, value in clip.state_dict().items()}
        inner, wide = HEADS * HEAD, MULT * WIDTH
        for k in range(LAYERS):
            shapes = {"0.fn.to_q": (inner, WIDTH), "0.fn.to_kv": (2 * HEAD, WIDTH), "0.fn.to_out": (WIDTH, inner)}
            shapes |= {"0.fn.ff.0": (2 * wide, WIDTH), "0.fn.ff.2": (WIDTH, wide), "1.fn.attn_out": (WIDTH, inner)}
            shapes |= {"1.fn.fused_attn_ff_proj": (inner + 2 * HEAD + 2 * wide, WIDTH), "1.fn.ff_out.1": (WIDTH, wide)}
            for name, shape in shapes.items():
                state[f"cross_model.layers.{k}.{name}.weight"] = torch.randn(shape) / shape[1] ** 0.5
            for part in (0, 1):
                state[f"cross_model.layers.{k}.{part}.fn.norm.weight"] = 1 + 0.1 * torch.randn(WIDTH)
                state[f"cross_model.layers.{k}.{part}.fn.norm.bias"] = torch.zeros(WIDTH)  # a buffer
            frequencies = 1 / 10000 ** (torch.arange(0, HEAD, 2) / HEAD)
            state[f"cross_model.layers.{k}.1.fn.rotary_emb.inv_freq"] = frequencies
    state["model.text_model.embeddings.position_ids"] = torch.arange(LENGTH)[None]
    torch.save(state, folder / "MPS.pth")
    return clip, state


def bit_images(count: int, height: int = 28, width: int = 28, seed: int = 0) -> torch.Tensor:
    """Images whose values are multiples of 1/255."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, height, width), generator=generator) / 255


@seeded()
def tiny_owl(folder: Path) -> Path:
    tokenizer = word_tokenizer([], ["a", "photo", "of", "cat", "dog"])
    tokenizer.model_max_length = 8
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 8, "pad_token_id": 0, "eos_token_id": 2}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 8}
    config = Owlv2Config(text_config=text, vision_config=vision, projection_dim=16)
    Owlv2ForObjectDetection(config).save_pretrained(folder)
    Owlv2Processor(Owlv2ImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder
