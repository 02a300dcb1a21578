"""Finetuning of pipelines with two denoisers, of high and of low noise, such as Wan 2.2: exact, and files that load."""

from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
from finetune_runs import config_of, train
from rollouts import TWO_PROMPTS, call_of, counted, fresh_pipe, move
from soft_rewards import images_of, seeded
from torch import Tensor

from steer.apps.models import adapter_applied
from steer.errors import InputError
from steer.training.gradient import Batch, two_pass_gradient
from steer.training.losses import GRPO
from steer.training.rollout import Sampler, log_probs
from steer.training.trainable import LoRA

CALL = call_of("wan")  # four steps at t = 1000, 857, 602, 9
NAMES = ("transformer", "transformer_2")
REWARDS = torch.tensor([[0.2, 0.9], [0.5, -0.4]])


def two_denoisers() -> Any:
    """Wan with another transformer below t = 800: two steps of each."""
    pipe: Any = fresh_pipe("wan")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        pipe.register_modules(transformer_2=type(pipe.transformer).from_config(pipe.transformer.config).eval())
    pipe.register_to_config(boundary_ratio=0.8)
    return pipe


def gradients(only: str | None) -> tuple[dict[str, Tensor], Tensor]:
    """The gradient of one loss by the parameters of both denoisers, and the log-densities of its samples."""
    pipe = two_denoisers()
    trained = LoRA(pipe, 2, denoiser=only)
    prefix = "" if only is None else f"{only}."
    with torch.no_grad():
        for name, parameter in trained.parameters.items():
            if ".lora_A." in name:  # B starts at 0
                generator = torch.Generator().manual_seed(crc32(f"{prefix}{name}".encode()))
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    sampler = Sampler(pipe, CALL)
    stored, _ = sampler.rollout(TWO_PROMPTS)
    two_pass_gradient(sampler, Batch([stored], [], (0, 1, 2), REWARDS), GRPO(), on_policy=True)
    ups = {f"{prefix}{name}": p.grad for name, p in trained.parameters.items() if ".lora_B." in name}
    return {name: value for name, value in ups.items() if value is not None}, stored.log_probs


def test_a_replay_gives_the_rollouts_densities_by_the_denoiser_of_each_step() -> None:
    pipe = two_denoisers()
    lora = LoRA(pipe, 2)
    move(lora, 0.02)
    assert {name.partition(".")[0] for name in lora.parameters} == set(NAMES)
    sampler = Sampler(pipe, CALL)
    with counted(pipe.transformer) as high, counted(pipe.transformer_2) as low:
        stored, _ = sampler.rollout(TWO_PROMPTS)
    assert len(high) == len(low) == 4  # two steps of two calls each, for guidance
    torch.testing.assert_close(log_probs(sampler, stored), stored.log_probs, rtol=1e-6, atol=1e-4)
    move(lora, 0.05, seed=1)
    differences = (log_probs(sampler, stored) - stored.log_probs).abs()
    assert (differences > 1e-3).all(), "both adapters count"
    with lora.reference():
        base = log_probs(Sampler(two_denoisers(), CALL), stored)
        torch.testing.assert_close(log_probs(sampler, stored), base, rtol=1e-6, atol=1e-4)


def test_the_gradient_of_one_denoiser_is_its_part_of_that_of_both() -> None:
    both, drawn = gradients(None)
    assert {name.partition(".")[0] for name in both} == set(NAMES)
    assert all(value.abs().max() > 0 for value in both.values())
    for name in NAMES:
        alone, same = gradients(name)
        assert torch.equal(drawn, same)
        assert alone.keys() == {one for one in both if one.startswith(f"{name}.")}
        for key, value in alone.items():
            torch.testing.assert_close(value, both[key], rtol=1e-4, atol=1e-9)


def image(pipe: Any) -> Tensor:
    return images_of(pipe, prompt="a star", **CALL, generator=seeded())


QUICK: dict[str, Any] = {
    **{"max_steps": 2, "steps_per_generation": 1, "num_iterations": 1, "eval_steps": 2, "kl_target_nats": None},
    **{"kl_weight": 0.0, "warmup_steps": 0, "ema_decay": 0.0, "num_inference_steps": 4, "guidance_scale": 3.0},
    "call": {key: CALL[key] for key in ("height", "width", "num_frames", "max_sequence_length")},
}


@pytest.mark.few(1)
@pytest.mark.parametrize("only", [None, "transformer_2"])
def test_a_training_changes_what_it_is_to_and_its_files_load_in_diffusers(only: str | None, tmp_path: Path) -> None:
    pipe = two_denoisers()
    result = train("grpo", pipe, tmp_path, config_of("grpo", **QUICK, denoiser=only, eval_kl=True))
    names = NAMES if only is None else (only,)
    assert all(record["grad_norm"] > 0 for record in result.records)
    assert result.evaluations[0]["eval/kl"] == 0 < result.evaluations[-1]["eval/kl"]
    there, plain, own = image(pipe), two_denoisers(), two_denoisers()
    assert (there - image(plain)).abs().max() > 1e-4
    for name in names:
        place = tmp_path / "final" / ("" if name == "transformer" else name)
        plain.load_lora_weights(str(place), load_into_transformer_2=name == "transformer_2")
    torch.testing.assert_close(image(plain), there, atol=1e-5, rtol=0)
    for weights in (str(result.weights.parent if result.weights else ""), f"{tmp_path}/checkpoints/step-00000002"):
        with adapter_applied(own, weights):
            torch.testing.assert_close(image(own), there, atol=1e-5, rtol=0)


def test_what_does_not_fit_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="denoiser: WanPipeline has transformer and transformer_2, got 'unet'"):
        LoRA(two_denoisers(), 2, denoiser="unet")
    with pytest.raises(InputError, match="trains all weights of one denoiser, transformer and transformer_2 are two"):
        train("grpo", two_denoisers(), tmp_path, config_of("grpo", **QUICK, lora_rank=0))
    with pytest.raises(InputError, match="denoiser chooses where a LoRA goes"):
        config_of("grpo", **QUICK, lora_rank=0, denoiser="transformer")
