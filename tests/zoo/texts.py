"""Tokenizers and processors of the zoo: one small byte-pair vocabulary, with the special tokens of each family."""

import functools
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "a red circle left of a blue star",
    "dance monkey, a painting of a squirrel eating a burger, low quality, bad quality, negative, a cat",
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background",
    "Describe the key features of the input image, then explain how the text instruction should alter or "
    "modify the image. Generate a new image that meets the requirements while maintaining consistency with the input",
    "You are an assistant designed to generate superior images with the superior degree of image-text alignment based "
    "on textual prompts or user prompts. system user assistant Picture",
]
SPECIAL = [
    "<pad>", "</s>", "<s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|startoftext|>",
    "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<image>", "<think>", "</think>",
    "<img>", "</img>", "<bos>", "<eos>", "<start_of_image>", "<end_of_image>", "<image_soft_token>", "[IMG]",
    "[IMG_BREAK]", "[IMG_END]", "[INST]", "[/INST]", "[MASK]", "[CLS]", "[SEP]", "[PAD]",
]  # fmt: skip
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# First and last token, length: of the tokenizers that pipelines expect.
KINDS: dict[str, tuple[str, str, str, int]] = {
    "clip": ("<|startoftext|>", "<|endoftext|>", "<|endoftext|>", 77),
    "t5": ("", "</s>", "<pad>", 512),
    "bert": ("[CLS]", "[SEP]", "[PAD]", 77),
    "gemma": ("<bos>", "<eos>", "<pad>", 8192),
    "llama": ("<s>", "</s>", "<pad>", 8192),
    "qwen": ("", "<|im_end|>", "<|endoftext|>", 8192),
}
VOCABULARY = 600


@functools.cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer.to_str()


def tokenizer(kind: str, length: int | None = None) -> PreTrainedTokenizerFast:
    """Build the tokenizer of a kind; `length`: another model_max_length."""
    first, last, pad, own_length = KINDS[kind]
    fast = Tokenizer.from_str(_trained())
    template = " ".join(
        [*([first] if first else []), "$A", *([last] if last and kind not in ("qwen", "gemma", "llama") else [])]
    )
    specials = [(name, fast.token_to_id(name)) for name in (first, last) if name]
    fast.post_processor = processors.TemplateProcessing(single=template, pair=f"{template} $B", special_tokens=specials)
    names = {"bos_token": first or None, "eos_token": last, "pad_token": pad, "unk_token": "<unk>"}
    extra = {"image": "<|image_pad|>", "video": "<|video_pad|>", "vision_bos": "<|vision_start|>"}
    built = PreTrainedTokenizerFast(
        tokenizer_object=fast,
        model_max_length=length or own_length,
        chat_template=CHAT,
        padding_side="left" if kind == "gemma" else "right",
        **names,
    )
    for name, token in extra.items():
        setattr(built, f"{name}_token", token)
        setattr(built, f"{name}_token_id", fast.token_to_id(token))
    return built


def processor(kind: str, length: int | None = None) -> Any:
    """Build a processor of texts and images of Qwen's kind."""
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor, Qwen3VLProcessor

    cls = Qwen3VLProcessor if kind == "qwen3" else Qwen2VLProcessor
    images = Qwen2VLImageProcessor(patch_size=14 if kind == "qwen" else 16, min_pixels=28 * 28, max_pixels=56 * 56)
    return cls(images, tokenizer("qwen", length), Qwen2VLVideoProcessor(), chat_template=CHAT)
