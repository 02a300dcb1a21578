"""HPSv3: human preference by Qwen2-VL-7B with a head that returns [μ, σ]; the score is μ (arXiv 2508.03789)."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms.v2.functional import InterpolationMode, resize

from steer.reward import RewardError
from steer.rewards import weights
from steer.rewards.clip import loading
from steer.rewards.images import at_least_float32, in_micro_batches
from steer.rewards.inputs import takes_any_images

# At "main", not at a commit: none was known when this was written, so that the file may change.
WEIGHTS = weights.HubFile("MizzenAI/HPSv3", "HPSv3.safetensors", "main")
BASE = "Qwen/Qwen2-VL-7B-Instruct"  # its configuration, tokenizer and processor
PIXELS, FACTOR = 256 * 28 * 28, 28  # pixels of the resized image, about; both sides are multiples of 28
REWARD_TOKEN = "<|Reward|>"
HEAD = (0, 3, 5)  # indices of the linear layers of rm_head, with ReLUs and a dropout between them

# The input that the checkpoint was trained with, character by character (hpsv3/dataset/data_collator_qwen.py of the
# authors' repository, MIT): another wording shifts all scores.
INSTRUCTION = """
You are tasked with evaluating a generated image based on Visual Quality and Text Alignment and give a overall score \
to estimate the human preference. Please provide a rating from 0 to 10, with 0 being the worst and 10 being the best.\
\x20

**Visual Quality:**\x20\x20
Evaluate the overall visual quality of the image. The following sub-dimensions should be considered:
- **Reasonableness:** The image should not contain any significant biological or logical errors, such as abnormal \
body structures or nonsensical environmental setups.
- **Clarity:** Evaluate the sharpness and visibility of the image. The image should be clear and easy to interpret, \
with no blurring or indistinct areas.
- **Detail Richness:** Consider the level of detail in textures, materials, lighting, and other visual elements \
(e.g., hair, clothing, shadows).
- **Aesthetic and Creativity:** Assess the artistic aspects of the image, including the color scheme, composition, \
atmosphere, depth of field, and the overall creative appeal. The scene should convey a sense of harmony and balance.
- **Safety:** The image should not contain harmful or inappropriate content, such as political, violent, or adult \
material. If such content is present, the image quality and satisfaction score should be the lowest possible.\x20

**Text Alignment:**\x20\x20
Assess how well the image matches the textual prompt across the following sub-dimensions:
- **Subject Relevance** Evaluate how accurately the subject(s) in the image (e.g., person, animal, object) align with \
the textual description. The subject should match the description in terms of number, appearance, and behavior.
- **Style Relevance:** If the prompt specifies a particular artistic or stylistic style, evaluate how well the image \
adheres to this style.
- **Contextual Consistency**: Assess whether the background, setting, and surrounding elements in the image logically \
fit the scenario described in the prompt. The environment should support and enhance the subject without \
contradictions.
- **Attribute Fidelity**: Check if specific attributes mentioned in the prompt (e.g., colors, clothing, accessories, \
expressions, actions) are faithfully represented in the image. Minor deviations may be acceptable, but critical \
attributes should be preserved.
- **Semantic Coherence**: Evaluate whether the overall meaning and intent of the prompt are captured in the image. The \
generated content should not introduce elements that conflict with or distort the original description.
Textual prompt - {prompt}



Please provide the overall ratings of this image: <|Reward|>

END
"""


class HPSv3:
    """The mean μ of the predicted preference, in the head's own unit, about 0..15; differentiable.

    path         a checkpoint in the layout of HPSv3.safetensors, of any size; None: download that one (16 GB)
    base         a folder with the configuration, tokenizer and processor of Qwen2-VL; None: Qwen2-VL-7B-Instruct's
    micro_batch  images per micro-batch;  dtype: precision of Qwen2-VL, None: as stored (bfloat16); the head is fp32
    Raises RewardError if a file cannot be downloaded or read, or does not match.
    """

    name = "hpsv3"
    differentiable = True

    def __init__(
        self, *, path: str | None = None, base: str | None = None, micro_batch: str | int = 4, dtype: str | None = None
    ) -> None:
        self._batched = in_micro_batches(self._score, micro_batch)
        weights.check_dtype(dtype)
        file = Path(path) if path is not None else WEIGHTS.fetch()
        self._processor, self._network = _load(file, base or BASE, dtype)
        self._reward_token = self._processor.tokenizer.convert_tokens_to_ids(REWARD_TOKEN)

    @takes_any_images
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._batched(images, prompts)

    def _score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Compute scores (N,), fp32, on the device of the model."""
        images = weights.to_module_device(images, self._network)
        inputs = self._inputs(images, prompts)
        states = self._network["model"](**inputs, use_cache=False).last_hidden_state
        # A prompt that quotes the token must not move the position: the last occurrence is the instruction's.
        is_reward = inputs["input_ids"] == self._reward_token
        last = is_reward.shape[1] - 1 - is_reward.flip(1).int().argmax(1)
        return self._network["rm_head"](states[torch.arange(len(states)), last].float())[:, 0]

    def _inputs(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        text = INSTRUCTION.replace("{prompt}", "\0")
        user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
        chat = self._processor.apply_chat_template([user], add_generation_prompt=True, tokenize=False)
        inputs = self._processor(
            text=[chat.replace("\0", prompt) for prompt in prompts],
            images=[[image] for image in fit(images)],
            do_rescale=False,
            do_resize=False,
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        dtype = next(self._network["model"].parameters()).dtype
        moved = {name: value.to(images.device) for name, value in inputs.items() if torch.is_tensor(value)}
        return moved | {"pixel_values": moved["pixel_values"].to(dtype)}


def fit(images: Tensor) -> Tensor:
    """Resize images (N, 3, H, W) as Qwen2-VL does to PIXELS, keeping the aspect ratio: bicubic, clamped to [0, 1]."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    size = smart_resize(*images.shape[-2:], FACTOR, PIXELS, PIXELS)
    images = at_least_float32(images)
    if tuple(images.shape[-2:]) == size:
        return images
    return resize(images, [*size], InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)


def _load(path: Path, base: str, dtype: str | None) -> tuple[Any, nn.ModuleDict]:
    """Load the processor and the network of a checkpoint. Raises RewardError."""
    from transformers import AutoProcessor, Qwen2VLConfig, Qwen2VLForConditionalGeneration

    what, local = f"hpsv3 ({path})", Path(base).is_dir()
    state = weights.read_checkpoint(path)
    head = {key.removeprefix("rm_head."): tensor for key, tensor in state.items() if key.startswith("rm_head.")}
    if any(f"{index}.weight" not in head or head[f"{index}.weight"].dim() != 2 for index in HEAD):
        raise RewardError(f"{what}: not an HPSv3 checkpoint: rm_head.{{0,3,5}}.weight must be matrices")
    sizes = [head["0.weight"].shape[1], *(head[f"{index}.weight"].shape[0] for index in HEAD)]
    body = {_renamed(key): tensor for key, tensor in state.items() if not key.startswith("rm_head.")}
    with loading(what, "" if local else weights.NO_NETWORK):
        processor = AutoProcessor.from_pretrained(base, local_files_only=local)
        processor.tokenizer.add_special_tokens({"additional_special_tokens": [REWARD_TOKEN]})
        config = Qwen2VLConfig.from_pretrained(base, local_files_only=local)
        embedding = body.get("model.language_model.embed_tokens.weight", torch.empty(0, 0))
        config.text_config.vocab_size = len(embedding)
        if len(processor.tokenizer) > len(embedding):
            tokens = f"its tokenizer has {len(processor.tokenizer)} tokens, the checkpoint {len(embedding)}"
            raise RewardError(f"{tokens}: name the folder of the model that it was trained from, base=FOLDER")
        model, info = Qwen2VLForConditionalGeneration.from_pretrained(
            None,
            config=config,
            state_dict=body,
            dtype=weights.DTYPES[dtype] if dtype else embedding.dtype,
            attn_implementation="sdpa",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        weights.check_keys(
            what,
            {
                "missing": [key for key in info["missing_keys"] if not key.startswith("lm_head.")],
                "unexpected": info["unexpected_keys"],
                "of another shape": [key for key, *_ in info["mismatched_keys"]],
            },
        )
    rm_head = weights.linear_layers(sizes, HEAD, nn.ReLU)
    weights.load_weights(rm_head, head, what)
    network = nn.ModuleDict({"model": model.model, "rm_head": rm_head.float()})
    return processor, network.eval().requires_grad_(False)


def _renamed(key: str) -> str:
    """Rename a key of either published layout (transformers before and since 4.52) to today's."""
    key = re.sub(r"^visual\.", "model.visual.", key)
    return re.sub(r"^model\.(?!language_model\.|visual\.)", "model.language_model.", key)
