"""Masked diffusion against enumeration: the kernel, its pipeline, and steering on it."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tabular
import torch
from pairwise import hard_but
from safetensors.torch import save_file
from tabular import MASK, SEQUENCES, STATES, V, index_of, kernel_matrix, law_of_sampler, pipeline
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Generator, Tensor
from transformers import PreTrainedTokenizerFast

from steer import BestOfNPipeline, FKSteeringPipeline, InputError, SelectionPipeline
from steer.diffusion.masked import OPENINGS, MaskedKernel, subs
from steer.pipelines.text.masked_diffusion import MaskedDiffusionPipeline, pipeline_class
from steer.smc.potentials import POTENTIALS
from steer.smc.resampling import RESAMPLERS

LOG_X0 = subs(tabular.Table().logits.detach(), STATES, MASK)


@pytest.mark.parametrize("opening", OPENINGS)
@pytest.mark.parametrize("rate", [0.25, 0.4, 1.0])
def test_log_prob_is_that_of_the_definition_and_rows_sum_to_one(opening: str, rate: float) -> None:
    exact = kernel_matrix(LOG_X0, rate, opening)
    assert torch.allclose(exact.sum(1), torch.ones(len(STATES), dtype=torch.float64), atol=1e-6)
    for row in (255, 3, 77, 240, 0):
        state = STATES[row : row + 1].expand(len(STATES), -1)
        kernel = MaskedKernel(state, LOG_X0[row].expand(len(STATES), -1, -1), rate, MASK, opening)
        assert torch.allclose(kernel.log_prob(STATES).exp(), exact[row], atol=1e-6)


@pytest.mark.parametrize("opening", OPENINGS)
def test_samples_follow_the_kernel(opening: str) -> None:
    n, rate, exact = 40_000, 0.4, kernel_matrix(LOG_X0, 0.4, opening)[-1]
    kernel = MaskedKernel(STATES[-1:].expand(n, -1), LOG_X0[-1].expand(n, -1, -1), rate, MASK, opening)
    counts = torch.bincount(index_of(kernel.sample(Generator().manual_seed(0))), minlength=len(STATES)).double()
    expected = exact * n
    frequent = expected > 5
    assert counts[exact == 0].sum() == 0
    chi2 = ((counts - expected)[frequent] ** 2 / expected[frequent]).sum()
    degrees = int(frequent.sum()) - 1
    assert abs(chi2 - degrees) < 4 * (2 * degrees) ** 0.5


@pytest.mark.parametrize("opening", OPENINGS)
def test_kl_is_that_of_enumeration_and_not_zero_at_masked_places(opening: str) -> None:
    torch.manual_seed(0)
    other = subs(tabular.Table().logits.detach() + torch.randn(len(STATES), tabular.L, V + 1), STATES, MASK)
    p, q = (kernel_matrix(log_x0, 0.4, opening) for log_x0 in (LOG_X0, other))
    exact = torch.where(p > 0, p * (p / q).log(), 0.0).sum(1)
    closed = MaskedKernel(STATES, LOG_X0, 0.4, MASK, opening).kl(MaskedKernel(STATES, other, 0.4, MASK, opening))
    assert torch.allclose(closed, exact, atol=1e-6)
    masked = (STATES == MASK).any(1)
    assert (closed[masked] > 1e-3).all() and (closed[~masked] == 0).all()


def test_kl_of_different_steps_is_refused() -> None:
    kernel = MaskedKernel(STATES, LOG_X0, 0.4, MASK)
    with pytest.raises(InputError, match="one state"):
        kernel.kl(MaskedKernel(STATES, LOG_X0, 0.5, MASK))


@pytest.mark.few(1)
@pytest.mark.parametrize("opening", OPENINGS)
def test_the_pipeline_draws_from_the_product_of_its_kernels(opening: str) -> None:
    n = 20_000
    ids = pipeline(opening)([""] * n, 3, Generator().manual_seed(0), output_type="ids").texts
    exact = law_of_sampler(LOG_X0, 3, opening)
    counts = torch.bincount(index_of(ids), minlength=len(STATES))[index_of(SEQUENCES)].double()
    assert counts.sum() == n
    chi2 = ((counts - n * exact) ** 2 / (n * exact)).sum()
    assert abs(chi2 - 80) < 4 * 160**0.5


def test_balanced_opening_with_steps_enough_has_the_law_of_the_data_and_independent_has_not() -> None:
    distance = {o: (law_of_sampler(LOG_X0, tabular.L, o) - tabular.DATA).abs().sum() / 2 for o in OPENINGS}
    assert distance["balanced"] < 1e-6 and distance["independent"] > 0.02


def test_a_prompt_stays_and_masks_in_it_are_filled() -> None:
    texts = pipeline()(["a", "_b_c"], 4, Generator().manual_seed(0)).texts
    assert texts[0][0] == "a" and texts[1][1] == "b" and texts[1][3] == "c" and set(map(len, texts)) == {4}
    with pytest.raises(InputError, match="5 tokens"):
        pipeline()("aaaaa")


class TableReward:
    """A reward of token ids: a number for each of the 81 sequences."""

    name, differentiable, images = "table", False, "ids"

    def __init__(self) -> None:
        self.table = torch.rand(len(SEQUENCES), generator=Generator().manual_seed(3)) * 2 - 0.5

    def __call__(self, ids: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.table[(ids * V ** torch.arange(tabular.L - 1, -1, -1)).sum(1)]


REWARD, LAM, STEPS = TableReward(), 1.5, 4
GROUPS, SIZE = 2500, 4


def steered(pipe: Any, **options: Any) -> Any:
    options = {"lam": LAM, "resample_steps": [0, 1, 2], "num_inference_steps": STEPS, "num_particles": SIZE} | options
    return FKSteeringPipeline(pipe, REWARD)(
        [""] * GROUPS, generator=Generator().manual_seed(0), output_type="latent", chunk_size=GROUPS * SIZE, **options
    )


@pytest.mark.few(1)
@pytest.mark.parametrize("threshold", [0.5, 1.0], ids=["adaptive", "scheduled"])
@pytest.mark.parametrize("resampler", hard_but(RESAMPLERS, "systematic", "residual"))
@pytest.mark.parametrize("potential", POTENTIALS)
def test_the_normaliser_and_the_law_are_those_of_enumeration(potential: str, resampler: str, threshold: float) -> None:
    law = law_of_sampler(LOG_X0, STEPS, "independent")
    tilt = (LAM * REWARD.table.double()).exp()
    out = steered(pipeline(), potential=potential, resampler=resampler, ess_threshold=threshold)
    z_hat = out.log_normaliser.double().exp()
    z = (z_hat.mean() - (law * tilt).sum()) / (z_hat.std() / GROUPS**0.5)
    assert abs(z) < 4
    # E[Ẑ · mean_w f] = Σ p exp(λ r) f: unbiased, here for f = 1[first letter is a].
    first = (out.latents[:, 0] == 0).double().view(GROUPS, SIZE)
    value = z_hat * (out.log_weights.double().softmax(1) * first).sum(1)
    exact = (law * tilt * (SEQUENCES[:, 0] == 0)).sum()
    assert abs((value.mean() - exact) / (value.std() / GROUPS**0.5)) < 4
    assert any((info.ancestors != torch.arange(SIZE)).any() for info in out.history)


@pytest.mark.few(1)
@pytest.mark.parametrize("options", [{"preview": "samples:2"}, {"preview": "finish:2"}, {"opening": "balanced"}])
def test_other_previews_and_openings_keep_the_law(options: dict[str, str]) -> None:
    opening = options.pop("opening", "independent")
    exact = (law_of_sampler(LOG_X0, STEPS, opening) * (LAM * REWARD.table.double()).exp()).sum()
    z_hat = steered(pipeline(opening), **options).log_normaliser.double().exp()
    assert abs((z_hat.mean() - exact) / (z_hat.std() / GROUPS**0.5)) < 4


def test_without_strength_the_ids_are_those_of_the_plain_pipeline() -> None:
    plain = pipeline()([""] * 8, STEPS, Generator().manual_seed(0), output_type="ids").texts
    out = FKSteeringPipeline(pipeline(), REWARD)(
        ["", ""], generator=Generator().manual_seed(0), num_inference_steps=STEPS, lam=0.0
    ).in_slot_order()
    assert torch.equal(out.latents, plain) and out.texts == pipeline().decode(plain)


@pytest.mark.few(1)
@pytest.mark.parametrize("method", ["svdd", "beam", "best-of-n"])
def test_searches_find_higher_rewards_than_the_plain_pipeline(method: str) -> None:
    own: dict[str, Any] = {"svdd": {}, "beam": {"beams": 2}, "best-of-n": {}}[method]
    kind = BestOfNPipeline if method == "best-of-n" else SelectionPipeline
    out = kind(pipeline(), REWARD)(
        [""] * 200, generator=Generator().manual_seed(0), num_inference_steps=8, chunk_size=800, **own
    )
    plain = (law_of_sampler(LOG_X0, 8, "independent") * REWARD.table.double()).sum()
    best = out.rewards[:, 0].double()
    assert (best.mean() - plain) / (best.std() / 200**0.5) > 6
    assert torch.equal(out.rewards.flatten(), REWARD(out.latents, []))


def test_settings_that_do_not_fit_tokens_are_refused() -> None:
    steer = FKSteeringPipeline(pipeline(), REWARD)
    with pytest.raises(InputError, match="always a draw"):
        steer("", eta=0.5, num_inference_steps=6)
    with pytest.raises(InputError, match="samples:N"):
        steer("", preview="linear")


# The layout of kuleshov-group/mdlm-owt: config.json of model_type mdlm, and these tensors in model.safetensors.
MDLM_CONFIG = {
    "model_type": "mdlm",
    "architectures": ["MDLM"],
    "auto_map": {"AutoModelForMaskedLM": "modeling_mdlm.MDLM"},
    "vocab_size": 29,
    "model_length": 8,
    "hidden_dim": 32,
    "cond_dim": 12,
    "n_blocks": 2,
    "n_heads": 4,
    "dropout": 0.1,
    "time_conditioning": False,
    "return_dict": False,
}


def mdlm_weights() -> dict[str, Tensor]:
    v, d, c = 29, 32, 12
    shapes: dict[str, tuple[int, ...]] = {
        "vocab_embed.embedding": (v, d),
        "sigma_map.mlp.0.weight": (c, 256),
        "sigma_map.mlp.0.bias": (c,),
        "sigma_map.mlp.2.weight": (c, c),
        "sigma_map.mlp.2.bias": (c,),
        "rotary_emb.inv_freq": (4,),
        "output_layer.norm_final.weight": (d,),
        "output_layer.linear.weight": (v, d),
        "output_layer.linear.bias": (v,),
        "output_layer.adaLN_modulation.weight": (2 * d, c),
        "output_layer.adaLN_modulation.bias": (2 * d,),
    }
    for block in (0, 1):
        own = {
            "norm1.weight": (d,),
            "attn_qkv.weight": (3 * d, d),
            "attn_out.weight": (d, d),
            "norm2.weight": (d,),
            "mlp.0.weight": (4 * d, d),
            "mlp.0.bias": (4 * d,),
            "mlp.2.weight": (d, 4 * d),
            "mlp.2.bias": (d,),
            "adaLN_modulation.weight": (6 * d, c),
            "adaLN_modulation.bias": (6 * d,),
        }
        shapes |= {f"blocks.{block}.{name}": shape for name, shape in own.items()}
    generator = Generator().manual_seed(0)
    weights = {f"backbone.{name}": torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
    weights["backbone.rotary_emb.inv_freq"] = 10_000 ** (-torch.arange(0, 8, 2).float() / 8)
    return weights


def mdlm_logits(w: dict[str, Tensor], ids: Tensor) -> Tensor:
    """The forward pass of one sequence, place by place and head by head, written from the paper's description."""
    w, d, heads = {name.removeprefix("backbone."): value.double() for name, value in w.items()}, 32, 4
    angle0 = torch.cat([torch.ones(128), torch.zeros(128)]).double()  # cos 0 and sin 0
    silu = torch.nn.functional.silu
    hidden = silu(w["sigma_map.mlp.0.weight"] @ angle0 + w["sigma_map.mlp.0.bias"])
    c = silu(w["sigma_map.mlp.2.weight"] @ hidden + w["sigma_map.mlp.2.bias"])
    x = w["vocab_embed.embedding"][ids]

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt() * weight

    def rotate(vector: Tensor, place: int) -> Tensor:
        out = vector.clone()
        for j in range(4):  # pairs (j, j + 4) of the 8 numbers of a head
            a = place * float(w["rotary_emb.inv_freq"][j])
            turn = torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]]).double()
            out[[j, j + 4]] = turn @ vector[[j, j + 4]]
        return out

    for b in ("blocks.0.", "blocks.1."):
        m = (w[b + "adaLN_modulation.weight"] @ c + w[b + "adaLN_modulation.bias"]).split(d)
        qkv = (norm(x, w[b + "norm1.weight"]) * (1 + m[1]) + m[0]) @ w[b + "attn_qkv.weight"].T
        mixed = torch.zeros_like(x)
        for h in range(heads):
            q, k, v = (qkv[:, part * d + h * 8 : part * d + h * 8 + 8] for part in range(3))
            q, k = (torch.stack([rotate(row, place) for place, row in enumerate(one)]) for one in (q, k))
            mixed[:, h * 8 : h * 8 + 8] = (q @ k.T / 8**0.5).softmax(-1) @ v
        x = x + m[2] * (mixed @ w[b + "attn_out.weight"].T)
        inner = (norm(x, w[b + "norm2.weight"]) * (1 + m[4]) + m[3]) @ w[b + "mlp.0.weight"].T + w[b + "mlp.0.bias"]
        inner = 0.5 * inner * (1 + torch.tanh((2 / math.pi) ** 0.5 * (inner + 0.044715 * inner**3)))
        x = x + m[5] * (inner @ w[b + "mlp.2.weight"].T + w[b + "mlp.2.bias"])
    m = (w["output_layer.adaLN_modulation.weight"] @ c + w["output_layer.adaLN_modulation.bias"]).split(d)
    x = norm(x, w["output_layer.norm_final.weight"]) * (1 + m[1]) + m[0]
    return x @ w["output_layer.linear.weight"].T + w["output_layer.linear.bias"]


def mdlm_folder(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(MDLM_CONFIG))
    (folder / "modeling_mdlm.py").write_text("raise RuntimeError('never run')")
    save_file(mdlm_weights(), folder / "model.safetensors", {"format": "pt"})
    return folder


def plain_tokenizer() -> PreTrainedTokenizerFast:
    words = {word: place for place, word in enumerate(["<|end|>", *map(str, range(27))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<|end|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>")


def test_a_checkpoint_in_the_layout_of_mdlm_computes_what_its_weights_say(tmp_path: Path) -> None:
    pipe = MaskedDiffusionPipeline.from_mdlm(mdlm_folder(tmp_path / "mdlm"), plain_tokenizer())
    assert pipe.mask_id == 28 and pipe.scheduler.config.opening == "independent"
    ids = torch.tensor([[0, 5, 28, 28, 7, 28, 1, 28]])
    with torch.no_grad():
        logits = pipe.denoiser(ids).sample
        relaxed = pipe.denoiser(torch.nn.functional.one_hot(ids, 29).float()).sample
    assert torch.allclose(logits[0].double(), mdlm_logits(mdlm_weights(), ids[0]), atol=1e-4)
    assert torch.allclose(logits, relaxed, atol=1e-5)


def test_a_pipeline_is_saved_and_loaded(tmp_path: Path) -> None:
    pipe = MaskedDiffusionPipeline.from_mdlm(mdlm_folder(tmp_path / "mdlm"), plain_tokenizer())
    pipe.save_pretrained(tmp_path / "saved")
    kinds = (pipeline_class(tmp_path / "saved"), FKSteeringPipeline)
    loaded = kinds[0].from_pretrained(tmp_path / "saved")
    steered = kinds[1].from_pretrained(tmp_path / "saved", "parses").pipe
    texts = [p("3 4", 6, Generator().manual_seed(0)).texts for p in (pipe, loaded, steered)]
    assert texts[0] == texts[1] == texts[2] and texts[0][0].startswith("3 4 ")


@pytest.mark.parametrize("damage", ["config", "weights", "file"])
def test_another_layout_is_refused_in_one_line(tmp_path: Path, damage: str) -> None:
    folder = mdlm_folder(tmp_path / "mdlm")
    if damage == "config":
        (folder / "config.json").write_text(json.dumps(MDLM_CONFIG | {"model_type": "bert"}))
    elif damage == "weights":
        save_file({"backbone.vocab_embed.embedding": torch.zeros(3, 3)}, folder / "model.safetensors")
    else:
        (folder / "model.safetensors").unlink()
    message = {"config": "'bert'", "weights": "weights are not those", "file": "no model.safetensors"}[damage]
    with pytest.raises(InputError, match=message):
        MaskedDiffusionPipeline.from_mdlm(folder, plain_tokenizer())
