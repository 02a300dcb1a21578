"""`steer bench`: naive and ours compute the same, with the documented number of calls, and are timed in turns."""

import math
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from bench_subject import PARTICLES, READS, STEPS, fresh, rows_of, tiny_subject
from pairwise import hard_but
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

from steer.apps.bench import comparisons as against_naive
from steer.apps.bench import timing as clock
from steer.apps.bench.comparisons import COMPARISONS, BenchOptions, fk, of_size, reno, steer_whole
from steer.apps.bench.naive import naive_d3po
from steer.apps.bench.sizes import REAL_SIZES, SD_VAE
from steer.apps.bench.subject import EightBits, Subject, build, denoise_steered, make_preference_batch
from steer.apps.bench.timing import (
    Measurement,
    PreparedComparison,
    RepeatPolicy,
    Variant,
    compare,
    measure,
)
from steer.errors import InputError

CPU = torch.device("cpu")
ONCE = RepeatPolicy(0.0, least=1)


@pytest.fixture
def subject() -> Subject:
    return tiny_subject()


@dataclass
class Counted(Measurement):
    """A measurement with the rows of a run."""

    rows: dict[str, int] = field(default_factory=dict)


def measured(name: str, subject: Subject) -> tuple[PreparedComparison, Counted, Counted, Any]:
    """A comparison measured once: what was found of both, and how their results compare."""
    with COMPARISONS[name].open(subject) as opened:
        counts = Counted(opened.over.name), Counted(opened.under.name)
        results = measure(opened, counts, CPU, ONCE)
        for counted, variant in zip(counts, (opened.over, opened.under), strict=True):
            counted.rows = rows_of(variant.run, subject)
        return opened, *counts, opened.check and opened.check(*results)


@pytest.mark.hard
def test_the_naive_steering_gives_our_images_rewards_and_ancestors(subject: Subject) -> None:
    _, _, _, check = measured("naive_fk_over_ours", subject)
    assert check.passed and check.difference <= 1e-4
    _, _, ancestors = steer_whole(subject, subject.pipe, EightBits(subject.judge()))
    moved = [not torch.equal(rows[0], torch.arange(PARTICLES)) for rows in ancestors]
    assert any(moved) and len(moved) == READS  # else there was nothing to agree on


@pytest.mark.hard
def test_all_exact_gains_together_still_give_the_naive_images(subject: Subject) -> None:
    _, naive, ours, check = measured("naive_fk_over_ours_everything_on", subject)
    assert check.passed and naive.rows["denoiser"] == ours.rows["denoiser"]


def test_a_naive_steering_that_goes_another_way_is_noticed(subject: Subject) -> None:
    with fk(subject) as opened:
        theirs, ours = opened.over.run(), opened.under.run()
        assert opened.check is not None
        other = (theirs[0], theirs[1], tuple(rows.flip(1) for rows in theirs[2]))
        assert not opened.check(other, ours).passed
        assert not opened.check((theirs[0] + 2e-4, *theirs[1:]), ours).passed
        assert not opened.check((theirs[0], theirs[1] + 2e-4, theirs[2]), ours).passed


def test_the_naive_noise_search_goes_our_way(subject: Subject) -> None:
    subject = replace(subject, iterations=3)
    with reno(subject) as opened:
        (noise, rewards), ours = opened.over.run(), opened.under.run()
        start = against_naive.search_of(subject).start
        assert (noise - start).abs().max() > 1e-2  # it went somewhere
        torch.testing.assert_close(noise, ours[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(rewards, ours[1], atol=1e-4, rtol=0)


D3PO = [name for name in COMPARISONS if name.startswith("naive_d3po")]


@pytest.mark.few(1)
@pytest.mark.parametrize("name", D3PO)
def test_the_naive_update_has_our_loss_and_gradient(name: str, subject: Subject) -> None:
    with COMPARISONS[name].open(subject) as opened:
        (loss, gradient), (our_loss, our_gradient) = opened.over.run(), opened.under.run()
    assert abs(loss - math.log(2)) > 1e-5  # the policy has left the reference
    torch.testing.assert_close(loss, our_loss, atol=1e-5, rtol=0)
    torch.testing.assert_close(gradient, our_gradient, atol=1e-4, rtol=0)
    assert gradient.norm().item() == pytest.approx(1, abs=1e-4)


@pytest.mark.few(1)
def test_the_naive_update_prefers_the_winners(subject: Subject) -> None:
    """Along its gradient the winners become likelier than the losers: swapped, it turns round."""
    preference_batch = make_preference_batch(subject, fresh())
    gradients = []
    for winners in (preference_batch.winners, tuple(1 - winner for winner in preference_batch.winners)):
        against_naive.zero_grad(preference_batch)
        naive_d3po(
            preference_batch.pipe, preference_batch.trained, preference_batch.stored, winners, 1e-6, 3.0, 1.0
        )  # β → 0: a linear loss
        gradients.append(against_naive.gradient_of(preference_batch))
    torch.testing.assert_close(gradients[0], -gradients[1], atol=1e-3, rtol=0)


@pytest.mark.hard
def test_steering_makes_the_documented_number_of_calls(subject: Subject) -> None:
    """Rows with guidance: 2 K in each of T calls; evaluations, then one final decode, naive two."""
    _, naive, ours, _ = measured("naive_fk_over_ours", subject)
    assert naive.rows["denoiser"] == ours.rows["denoiser"] == 2 * PARTICLES * STEPS
    assert naive.rows["reward"] == ours.rows["reward"] == PARTICLES * (READS + 1)
    assert naive.rows["decoder"] == PARTICLES * (READS + 2)
    assert ours.rows["decoder"] == PARTICLES * (READS + 1)


@pytest.mark.hard
def test_a_look_ahead_of_three_steps_has_two_more_evaluations(subject: Subject) -> None:
    _, steered, plain, _ = measured("fk_by_lookahead_over_plain_batch", subject)
    assert plain.rows["denoiser"] == 2 * PARTICLES * STEPS
    assert 0 < steered.rows["denoiser"] - plain.rows["denoiser"] <= 2 * PARTICLES * 2 * READS  # fewer near the end


@pytest.mark.hard
def test_a_race_has_no_more_evaluations_than_best_of_n(subject: Subject) -> None:
    large = replace(subject, size=6)
    _, race, best, _ = measured("race_over_best_of_n", large)
    assert best.rows["denoiser"] == 2 * 6 * STEPS and best.rows["reward"] == 6
    assert 2 * 6 * STEPS / 2 < race.rows["denoiser"] <= best.rows["denoiser"]
    assert race.rows["reward"] > 2


@pytest.mark.hard
def test_denoising_decodes_nothing_and_calls_the_denoiser_as_often(subject: Subject) -> None:
    _, steered, plain, check = measured("fk_over_plain_batch", subject)
    assert steered.rows["denoiser"] == plain.rows["denoiser"] == 2 * PARTICLES * STEPS
    assert not {"decoder", "reward"} & (steered.rows.keys() | plain.rows.keys())
    assert check.passed  # without strength the images are the plain ones
    ancestors = denoise_steered(subject, subject.pipe).ancestors
    assert len(ancestors) == READS and all(len(rows.unique()) < PARTICLES for rows in ancestors)


@pytest.mark.hard
def test_the_noise_search_encodes_text_in_no_iteration(subject: Subject) -> None:
    _, naive, ours, check = measured("naive_reno_over_ours", subject)
    iterations, rows = subject.iterations, 2
    assert naive.rows["text encoder"] == iterations * rows and "text encoder" not in ours.rows
    for counts in (naive.rows, ours.rows):
        assert counts["denoiser with a graph"] == counts["decoder with a graph"] == iterations * rows
        assert "denoiser" not in counts
    assert check.passed


@pytest.mark.hard
def test_an_update_makes_four_passes_or_two(subject: Subject) -> None:
    """3 pairs, 3 steps, of which 2 have noise, guidance: the policy's rows have a graph, the reference's have none."""
    rows = 2 * 2 * 3 * 2
    _, naive, ours, check = measured("naive_d3po_over_ours", subject)
    assert naive.rows["denoiser with a graph"] == ours.rows["denoiser with a graph"] == rows
    assert naive.rows["denoiser"] == rows and "denoiser" not in ours.rows
    assert check.passed
    for turn in ("first", "later"):  # the reference is asked, or the policy once more: nothing is saved then
        _, naive, ours, check = measured(f"naive_d3po_over_ours_{turn}_pass", subject)
        assert ours.rows["denoiser"] == naive.rows["denoiser"] == rows
        assert check.passed


@pytest.mark.hard
@pytest.mark.parametrize("name", hard_but(["naive_grpo_over_ours", "naive_ddpo_over_ours"], "naive_grpo_over_ours"))
def test_a_policy_gradient_is_the_naive_loop_with_the_same_calls(name: str, subject: Subject) -> None:
    """3 pairs and guidance: 12 rows in each of 3 steps of the rollout, and with a graph in the 2 that have noise."""
    _, naive, ours, check = measured(name, subject)
    assert naive.rows["denoiser with a graph"] == ours.rows["denoiser with a graph"] == 12 * 2
    assert naive.rows["denoiser"] == ours.rows["denoiser"] == 12 * 3
    assert naive.rows["decoder"] == ours.rows["decoder"] == 6
    assert check.passed


@pytest.mark.hard
@pytest.mark.parametrize("name", ["sdpa_off_over_on", "micro_batches_off_over_on"])
def test_an_exact_gain_changes_no_result_and_leaves_nothing(name: str, subject: Subject) -> None:
    before = {part: set(vars(part)) for part in subject.pipe.unet.modules()}
    _, off, on, check = measured(name, subject)
    assert check.passed and check.same_ancestors
    assert off.rows["denoiser"] == on.rows["denoiser"]
    assert {part: set(vars(part)) for part in subject.pipe.unet.modules()} == before
    assert off.flops == on.flops > 0


def test_a_switch_does_what_it_says(subject: Subject) -> None:
    """No product of attention is left to PyTorch's plain ones; few rows at a time."""

    def products(run: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_flop_counts()["Global"].get(torch.ops.aten.bmm, 0)

    with COMPARISONS["sdpa_off_over_on"].open(subject) as opened:
        assert products(opened.under.run) == 0 < products(opened.over.run)
    rows: list[int] = []
    handle = subject.pipe.unet.register_forward_hook(lambda module, given, output: rows.append(len(output[0])))
    with handle, COMPARISONS["micro_batches_off_over_on"].open(subject) as opened:
        opened.over.run()
        assert set(rows) == {2 * PARTICLES}
        rows.clear()
        opened.under.run()
        assert set(rows) == {4}


def test_variants_take_turns(subject: Subject) -> None:
    calls: list[str] = []
    variants = [Variant(name, lambda name=name: calls.append(name)) for name in "AB"]
    measurements = Measurement("A"), Measurement("B")
    measure(PreparedComparison(*variants, 1), measurements, CPU, RepeatPolicy(60.0, least=2, most=4))
    assert "".join(calls) == "AB" + "AB" * 4 + "AB"  # a warm-up, as many turns as may be, one that counts
    assert [len(one.seconds) for one in measurements] == [4, 4]
    calls.clear()
    measure(
        PreparedComparison(*variants, 1), (Measurement("A"), Measurement("B")), CPU, RepeatPolicy(0.0, least=2, most=4)
    )
    assert "".join(calls) == "AB" * 4


@pytest.mark.skipif(not clock.reset_peak(), reason="this system does not tell peaks")
def test_the_peak_is_what_a_run_needs_at_most() -> None:
    size = 2**26  # bytes

    def run() -> None:
        first = torch.ones(size, dtype=torch.uint8)
        del first
        torch.ones(size, dtype=torch.uint8).add_(1)

    measurements = Measurement("A"), Measurement("B")
    measure(PreparedComparison(Variant("A", run), Variant("B", lambda: None), 1), measurements, CPU, ONCE)
    assert measurements[0].peak is not None and 0.9 * size < measurements[0].peak < 1.5 * size
    assert measurements[1].peak is not None and measurements[1].peak < 0.1 * size


def test_flops_are_counted_where_they_may_be() -> None:
    """2 · 3 · 4 · 5 FLOPs of a matrix product."""
    linear = torch.nn.Linear(4, 5, bias=False)

    def run() -> torch.Tensor:
        return linear(torch.ones(3, 4))

    counted, not_counted = Measurement("A"), Measurement("B")
    measure(PreparedComparison(Variant("A", run), Variant("B", run, False), 3), (counted, not_counted), CPU, ONCE)
    assert (counted.flops, not_counted.flops) == (2 * 3 * 4 * 5, 0)


def test_numbers_are_compared_within_the_limit_and_ancestors_exactly() -> None:
    images, rows = torch.zeros(2, 3), (torch.tensor([0, 1]),)
    assert compare((images, rows), (images + 0.5, rows), 0.5).passed
    assert compare((images, rows), (images + 0.5, rows), 0.5).difference == 0.5
    assert not compare((images, rows), (images + 0.6, rows), 0.5).passed
    assert not compare((images, rows), (images, (torch.tensor([0, 0]),)), 0.5).passed
    assert not compare((images, rows), (images[:1], rows), 0.5).passed


PARAMETERS = {"sd15": 859.52e6, "sdxl": 2567.46e6, "sd3": 2028.33e6, "flux": 11901.41e6}


@pytest.mark.parametrize("name", list(REAL_SIZES))
def test_real_sizes_are_the_published_ones(name: str) -> None:
    pipe = build(REAL_SIZES[name], "meta", torch.bfloat16)
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    assert sum(p.numel() for p in denoiser.parameters()) == pytest.approx(PARAMETERS[name], rel=1e-5)
    assert sum(p.numel() for p in pipe.vae.parameters()) == pytest.approx(83.7e6, rel=0.01)
    assert {p.device.type for p in denoiser.parameters()} == {"meta"}
    assert denoiser.dtype == pipe.vae.dtype == torch.bfloat16 and torch.get_default_dtype() == torch.float32


SMALL_VAE = SD_VAE | {"block_out_channels": (4,) * 4, "norm_num_groups": 2, "layers_per_block": 1}
SMALL_UNET = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1, "attention_head_dim": 4}
SMALL_DIT = {"num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 24}
SIXTEEN = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.1}
SMALL = {
    name: replace(REAL_SIZES[name], denoiser=REAL_SIZES[name].denoiser | denoiser, vae=SMALL_VAE | vae, text=text)
    for name, denoiser, vae, text in [
        ("sd15", SMALL_UNET | {"sample_size": 8, "cross_attention_dim": 16}, {}, ((CLIPTextModel, 16),)),
        (
            "sdxl",
            {"block_out_channels": (8, 8, 8), "norm_num_groups": 4, "attention_head_dim": 4, "sample_size": 8}
            | {"transformer_layers_per_block": 1, "cross_attention_dim": 32, "addition_time_embed_dim": 8}
            | {"projection_class_embeddings_input_dim": 6 * 8 + 16},
            {},
            ((CLIPTextModel, 16), (CLIPTextModelWithProjection, 16)),
        ),
        (
            "sd3",
            SMALL_DIT
            | {"caption_projection_dim": 32, "pooled_projection_dim": 32, "sample_size": 8, "pos_embed_max_size": 8},
            SIXTEEN,
            ((CLIPTextModelWithProjection, 8), (CLIPTextModelWithProjection, 24), (T5EncoderModel, 24)),
        ),
        (
            "flux",
            SMALL_DIT | {"num_single_layers": 1, "pooled_projection_dim": 16, "axes_dims_rope": (4, 4, 8)},
            SIXTEEN,
            ((CLIPTextModel, 16), (T5EncoderModel, 24)),
        ),
    ]
}


@pytest.mark.hard
@pytest.mark.parametrize("name", SMALL)
def test_what_is_measured_of_real_sizes_runs_on_small_ones(name: str) -> None:
    subject = of_size(name, SMALL[name], BenchOptions("cpu", particles=4, steps=6, resolution=64, quick=True))
    _, steered, plain, check = measured("fk_over_plain_batch", subject)
    assert check.passed and steered.rows["denoiser"] == plain.rows["denoiser"] > 0
    _, steered, _, _ = measured("whole_fk_over_plain_batch", subject)
    assert steered.rows["reward"] == 4 * (len(subject.read_at) + 1)
    for comparison in (COMPARISONS[one] for one in COMPARISONS if one.startswith("naive")):
        with (
            nullcontext() if name == "sd15" else pytest.raises(InputError, match="under DDIM"),
            comparison.open(subject),
        ):
            pass


@pytest.mark.hard
def test_naive_and_ours_run_in_half_precision() -> None:
    """As on a GPU: nothing but rounding lies between them."""
    subject = of_size("sd15", SMALL["sd15"], BenchOptions("cpu", "bfloat16", particles=2, steps=4, quick=True))
    assert subject.pipe.dtype == torch.bfloat16
    _, _, _, check = measured("naive_d3po_over_ours", subject)
    assert check.difference <= 0.1
    _, naive, ours, _ = measured("naive_fk_over_ours", subject)
    assert naive.rows["denoiser"] == ours.rows["denoiser"]
