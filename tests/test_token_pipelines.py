"""diffusers' own discrete pipelines, tiny and random: LLaDA2, DiffusionGemma, aMUSEd."""

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    AmusedPipeline,
    AmusedScheduler,
    BlockRefinementScheduler,
    DiffusionGemmaPipeline,
    DiscreteDDIMScheduler,
    EntropyBoundScheduler,
    LLaDA2Pipeline,
    UVit2DModel,
    VQModel,
)
from torch import Generator, Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, DynamicCache

from steer import BestOfNPipeline, FKSteeringPipeline, InputError, SelectionPipeline
from steer.diffusion.step_hooks import hook_steps
from steer.diffusion.token_hooks import TokenStep

V, MASK, EOS, BLOCK = 12, 11, 10, 4


class Reader:
    """Tokenizer and processor: a letter a token; prompts of one length."""

    mask_token_id, eos_token_id, chat_template = MASK, EOS, None

    def __call__(self, text: str | list[str], **_: Any) -> Any:
        texts = [text] if isinstance(text, str) else text
        ids = torch.tensor([[ord(letter) - 97 for letter in one] for one in texts])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def apply_chat_template(self, messages: Any, **_: Any) -> Any:
        chats = messages if isinstance(messages[0], list) else [messages]
        return self([chat[0]["content"] for chat in chats])

    def batch_decode(self, rows: Any, **_: Any) -> list[str]:
        return ["".join(chr(97 + int(i)) for i in row if int(i) not in (MASK, EOS)) for row in rows]


class Tiny(nn.Module):
    """A random denoiser over tokens: every place sees its neighbours and the mean of all, and mostly itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out = nn.Embedding(V, 16), nn.Linear(48, V)
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def logits(self, ids: Tensor, x: Tensor) -> Tensor:
        kept = 6.0 * nn.functional.one_hot(ids, V) * (ids != MASK)[..., None]
        return kept + self.out(torch.cat([x, x.roll(1, 1), x.mean(1, keepdim=True).expand_as(x)], -1))

    def forward(self, ids: Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=self.logits(ids, self.embed(ids)))


class TinyGemma(Tiny):
    """The interface of DiffusionGemmaForBlockDiffusion: an encoder that fills a cache, a decoder that reads it."""

    def __init__(self) -> None:
        super().__init__()
        text = SimpleNamespace(vocab_size=V, num_hidden_layers=1, layer_types=None, sliding_window=None)
        self.config = SimpleNamespace(canvas_length=BLOCK, get_text_config=lambda decoder: text)
        decoder = SimpleNamespace(create_diffusion_decoder_attention_mask=lambda **_: None)
        self.model = SimpleNamespace(encoder=self._encode, decoder=decoder)

    def _encode(self, input_ids: Tensor, past_key_values: Any, **_: Any) -> None:
        keys = self.embed(input_ids)[:, None]
        past_key_values.update(keys, keys, 0)

    def forward(self, decoder_input_ids: Tensor, past_key_values: Any, self_conditioning_logits: Any, **_: Any) -> Any:
        context = past_key_values.layers[0].keys[:, 0].mean(1, keepdim=True)
        x = self.embed(decoder_input_ids) + context
        if self_conditioning_logits is not None:
            x = x + 0.1 * self_conditioning_logits.softmax(-1) @ self.embed.weight
        return SimpleNamespace(logits=self.logits(decoder_input_ids, x))


def llada() -> Any:
    return LLaDA2Pipeline(Tiny(), BlockRefinementScheduler(block_length=BLOCK), Reader())


def gemma(scheduler: Any) -> Any:
    # The pipeline's DynamicCache reads the configuration of a real model: one without it serves as well.
    return DiffusionGemmaPipeline(TinyGemma(), scheduler, Reader())


@pytest.fixture(autouse=True)
def plain_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.pipelines.diffusion_gemma import pipeline_diffusion_gemma

    monkeypatch.setattr(pipeline_diffusion_gemma, "DynamicCache", lambda config: DynamicCache())


CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llada": (llada, {"gen_length": 8, "block_length": BLOCK, "temperature": 1.0, "num_inference_steps": 4}),
    "gemma-entropy": (
        lambda: gemma(EntropyBoundScheduler(entropy_bound=100.0)),
        {"gen_length": 8, "num_inference_steps": 4},
    ),
    "gemma-block": (
        lambda: gemma(BlockRefinementScheduler(block_length=BLOCK)),
        {"gen_length": 8, "num_inference_steps": 4, "temperature": 1.0},
    ),
    "gemma-ddim": (
        lambda: gemma(DiscreteDDIMScheduler()),
        {"gen_length": 8, "num_inference_steps": 4, "temperature": 1.0},
    ),
}


def plain_arguments(name: str) -> dict[str, Any]:
    return {"eos_early_stop": False, "output_type": "seq"} | (
        {"confidence_threshold": None} if name.startswith("gemma") else {}
    )


class CountB:
    """The number of letters b: the planted reward, of texts."""

    name, differentiable, images = "count-b", False, "text"

    def __call__(self, texts: Sequence[str], prompts: Sequence[str]) -> Tensor:
        return torch.tensor([float(text.count("b")) for text in texts])


@pytest.mark.hard
@pytest.mark.parametrize("name", CALLS)
def test_without_strength_the_ids_are_those_of_the_plain_pipeline(name: str) -> None:
    build, call = CALLS[name]
    pipe = build()
    pipe.set_progress_bar_config(disable=True)
    plain = pipe(prompt=["abc"] * 4, generator=Generator().manual_seed(0), **call, **plain_arguments(name)).sequences
    out = FKSteeringPipeline(pipe, CountB())("abc", generator=Generator().manual_seed(0), lam=0.0, **call)
    assert torch.equal(out.in_slot_order().latents[:, -plain.shape[1] :], plain)
    assert len(out.texts) == 4 and all(isinstance(text, str) for text in out.texts)


@pytest.mark.few(1)
@pytest.mark.parametrize("name", CALLS)
def test_a_planted_reward_rises(name: str) -> None:
    build, call = CALLS[name]
    pipe = build()
    pipe.set_progress_bar_config(disable=True)
    options: dict[str, Any] = call | {"num_particles": 8, "chunk_size": 800}
    prompts = ["abc"] * 60
    base = BestOfNPipeline(pipe, CountB())(prompts, generator=Generator().manual_seed(1), **options).rewards
    last = 11 if name == "llada" else 7  # steps × blocks, without the last one
    fk = FKSteeringPipeline(pipe, CountB())(
        prompts, generator=Generator().manual_seed(1), lam=4.0, ess_threshold=1.0, resample_steps=range(last), **options
    )
    svdd = SelectionPipeline(pipe, CountB())(
        prompts, generator=Generator().manual_seed(1), eta=None, select_steps=range(last), **options
    )
    for method, out in (("fk", fk), ("svdd", svdd)):
        gain = out.rewards.mean(1) - base.mean(1)
        assert gain.mean() > 4 * gain.std() / math.sqrt(60), method
    assert any((info.ancestors != torch.arange(8)).any() for info in fk.history)


@pytest.mark.parametrize("name", CALLS)
def test_rows_follow_their_ancestors(name: str) -> None:
    """After ancestors at every step but the last of each block, finished tokens are those of the ancestor's line."""
    build, call = CALLS[name]
    pipe = build()
    pipe.set_progress_bar_config(disable=True)
    steps: list[TokenStep] = []
    ancestors = torch.tensor([2, 2, 0, 3])

    def sources(step: TokenStep) -> Tensor:
        """The slots that the slots continue from: themselves, where they are equal to their ancestor."""
        same = (step.x == step.x[ancestors]).all(1) & (step.output == step.output[ancestors]).flatten(1).all(1)
        return torch.where(same, torch.arange(4), ancestors)

    def on_step(step: Any) -> Any:
        if steps and steps[-1].prev.shape == step.x.shape and name == "llada":
            assert torch.equal(step.x, steps[-1].prev[sources(steps[-1])])
        steps.append(step)
        return ancestors, None

    with hook_steps(pipe, on_step, rows=4) as view:
        view(prompt=["abc"] * 4, generator=Generator().manual_seed(0), **call)
    before = steps[-1].x.shape[1] - BLOCK
    last = [step for step in steps if step.x.shape[1] == before][-1]  # before the last block
    finished = last.prev[sources(last)]
    for step in (step for step in steps if step.x.shape[1] > before):
        assert torch.equal(step.prev[:, :before], finished)
        finished = finished[sources(step)]


def test_arguments_that_cannot_follow_particles_are_refused() -> None:
    build, call = CALLS["llada"]
    steer = FKSteeringPipeline(build(), CountB())
    with pytest.raises(InputError, match="eos_early_stop"):
        steer("abc", eos_early_stop=True, **call)
    with pytest.raises(InputError, match="temperature=1"):
        steer("abc", **call | {"temperature": 0.0})
    with pytest.raises(InputError, match="use samples:4"):
        steer("abc", preview="finish:2", **call)
    with pytest.raises(InputError, match="confidence_threshold"):
        FKSteeringPipeline(gemma(EntropyBoundScheduler()), CountB())("abc", confidence_threshold=0.1)


def amused(tokenizer: Any) -> Any:
    torch.manual_seed(0)
    transformer = UVit2DModel(
        hidden_size=8,
        use_bias=False,
        hidden_dropout=0.0,
        cond_embed_dim=8,
        micro_cond_encode_dim=2,
        micro_cond_embed_dim=10,
        encoder_hidden_size=8,
        vocab_size=32,
        codebook_size=8,
        in_channels=8,
        block_out_channels=8,
        num_res_blocks=1,
        downsample=True,
        upsample=True,
        block_num_heads=1,
        num_hidden_layers=1,
        num_attention_heads=1,
        attention_dropout=0.0,
        intermediate_size=8,
        layer_norm_eps=1e-06,
        ln_elementwise_affine=True,
    )
    vqvae = VQModel(
        act_fn="silu",
        block_out_channels=[8],
        down_block_types=["DownEncoderBlock2D"],
        in_channels=3,
        latent_channels=8,
        layers_per_block=1,
        norm_num_groups=8,
        num_vq_embeddings=8,
        out_channels=3,
        sample_size=8,
        up_block_types=["UpDecoderBlock2D"],
        mid_block_add_attention=False,
        lookup_from_codebook=True,
    )
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    text = CLIPTextConfig(vocab_size=len(tokenizer), projection_dim=8, eos_token_id=tokenizer.eos_token_id, **sizes)
    encoder = CLIPTextModelWithProjection(text).eval()
    return AmusedPipeline(
        vqvae.eval(),
        tokenizer,
        encoder,
        transformer.eval(),
        AmusedScheduler(mask_token_id=31, masking_schedule="linear"),
    )


def test_amused_is_steered_by_rewards_of_images(tmp_path: Path) -> None:
    from steer.apps.scenes.training import build_tokenizer

    pipe = amused(build_tokenizer(tmp_path))
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 10, "height": 8, "width": 8, "guidance_scale": 1.0, "num_particles": 8}
    plain = pipe(
        "a",
        num_images_per_prompt=8,
        generator=Generator().manual_seed(0),
        output_type="pt",
        **{name: value for name, value in call.items() if name != "num_particles"},
    ).images
    same = FKSteeringPipeline(pipe, "brightness")(
        "a", generator=Generator().manual_seed(0), lam=0.0, output_type="pt", **call
    ).in_slot_order()
    assert torch.equal(same.images, plain)
    prompts = ["a"] * 40
    options: dict[str, Any] = call | {"chunk_size": 320, "output_type": "pt"}
    base = BestOfNPipeline(pipe, "brightness")(prompts, generator=Generator().manual_seed(1), **options)
    out = FKSteeringPipeline(pipe, "brightness")(
        prompts,
        generator=Generator().manual_seed(1),
        lam=3000.0,
        ess_threshold=1.0,
        resample_steps=range(1, 9),
        **options,
    )
    gain = out.rewards.mean(1) - base.rewards.mean(1)
    assert gain.mean() > 3 * gain.std() / 40**0.5
    decoded = pipe.vqvae.decode(out.latents, force_not_quantize=True, shape=(*out.latents.shape, 8)).sample.clip(0, 1)
    assert torch.allclose(decoded, out.images, atol=1e-6)
    assert any((info.ancestors != torch.arange(8)).any() for info in out.history)
