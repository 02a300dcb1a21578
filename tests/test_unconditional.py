"""Finetuning of pipelines without prompts: DDIM and DDPM on pixels; and metadata of prompts in a training."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROMPT, sd
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from finetune_runs import METHODS
from pairwise import hard_but
from torch import Generator, Tensor

from steer import TrainingConfig, TrainingResult
from steer.errors import InputError
from steer.training.rollout import Rows, Sampler, log_probs

BASE = TrainingConfig(
    max_steps=3,
    train_batch_size=2,
    num_generations=2,
    micro_batch=2,
    num_inference_steps=4,
    lora_rank=2,
    learning_rate=0.01,
    eval_steps=2,
    save_steps=2,
)


def unet() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
    ).eval()


def pipeline(name: str) -> Any:
    noise = {"num_train_timesteps": 100, "clip_sample": False}
    made = DDIMPipeline(unet(), DDIMScheduler(**noise)) if name == "ddim" else None
    made = made or DDPMPipeline(unet(), DDPMScheduler(**noise))
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_a_replay_has_the_rollouts_log_probs_which_are_those_of_diffusers_own_step(name: str) -> None:
    pipe = pipeline(name)
    sampler = Sampler(pipe, {"num_inference_steps": 4})
    rows = Rows(("",) * 3, (1, 2, 3), (4, 5, 6))
    stored, images = sampler.rollout(rows)
    assert images.shape == (3, 3, 8, 8) and stored.latents.shape == (3, 4, 3, 8, 8)
    assert torch.allclose(log_probs(sampler, stored), stored.log_probs, rtol=1e-6)
    alone, _ = sampler.rollout(rows.at([1]))
    assert torch.allclose(alone.latents, stored.latents[1:2], atol=1e-5)
    # The first step by hand: DDIM's mean and variance with eta 1, from the noise that the seed draws.
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(4)
    x = torch.cat([torch.randn((1, 3, 8, 8), generator=Generator().manual_seed(seed)) for seed in rows.starts])
    t = scheduler.timesteps[0]
    with torch.no_grad():
        out = pipe.unet(x, t).sample
    mean = scheduler.step(out, t, x, eta=1.0, variance_noise=torch.zeros_like(x)).prev_sample
    std = scheduler._get_variance(t, t - 100 // 4) ** 0.5
    expected = torch.distributions.Normal(mean, std).log_prob(stored.latents[:, 0]).sum((1, 2, 3))
    assert torch.allclose(stored.log_probs[:, 0], expected.double(), rtol=1e-3)


def train(
    method: str, pipe: Any, folder: Path, config: TrainingConfig, reward: Any = "brightness", **options: Any
) -> TrainingResult:
    resume = options.pop("resume", False)
    trainer = METHODS[method][0](pipe, reward, replace(config, output_dir=str(folder)), **options)
    return trainer.train(resume_from_checkpoint=resume)


@pytest.mark.few(1)
@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.hard), 2])
@pytest.mark.parametrize("method", hard_but(["d3po", "prdp", "ddpo", "grpo", "filtered"], "prdp", "filtered"))
def test_every_method_trains_a_pipeline_without_prompts(method: str, rank: int, tmp_path: Path) -> None:
    pipe = pipeline("ddim")
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    config = replace(BASE, lora_rank=rank)
    result = train(method, pipe, tmp_path, config, train_prompts=2, eval_prompts=3)
    assert result.step == 3 and len(result.records) == 3 and result.weights is not None and result.weights.exists()
    assert all(record["grad_norm"] > 0 for record in result.records) and result.records[0]["kl"] == 0
    now = pipe.unet.state_dict()
    changed = [name for name, value in before.items() if name in now and not torch.equal(now[name], value)]
    assert bool(changed) == (rank == 0)
    longer, texts = replace(config, max_steps=4), {"train_prompts": [""] * 2, "eval_prompts": [""] * 3}
    again = train(method, pipeline("ddim"), tmp_path, longer, **texts, resume=True)
    assert again.step == 4


RISING = {
    "d3po": ({"beta": 10.0}, {"max_steps": 12, "train_batch_size": 4, "num_generations": 8, "learning_rate": 3e-3}),
    "grpo": ({"clip": 1.0}, {"max_steps": 10, "train_batch_size": 1, "num_generations": 256, "learning_rate": 3e-4}),
}


@pytest.mark.hard
@pytest.mark.parametrize("method", RISING)
def test_the_reward_rises(method: str, tmp_path: Path) -> None:
    options, numbers = RISING[method]
    changed = {"micro_batch": 256, "lora_rank": 0, "eval_steps": 12, "num_generations_eval": 64} | numbers | options
    changed |= {"num_inference_steps": 3 if method == "grpo" else 4}
    config = METHODS[method][0].config_class(**vars(BASE) | changed)
    result = train(method, pipeline("ddim"), tmp_path, config, train_prompts=1, eval_prompts=1)
    first, *_, last = (one["eval/brightness"][0] for one in result.evaluations)
    assert last > first + 0.003


def test_a_reward_may_read_prompts_that_the_pipeline_does_not_take(tmp_path: Path) -> None:
    received: set[str] = set()

    def reads(images: Tensor, prompts: Sequence[str]) -> Tensor:
        received.update(prompts)
        return images.mean((1, 2, 3))

    train("grpo", pipeline("ddpm"), tmp_path, replace(BASE, max_steps=1), reads, train_prompts=["a", "b"])
    assert received == {"a", "b"}


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="prompts must be texts, got 3: a count is for pipelines without prompts"):
        train("grpo", sd(), tmp_path, BASE, train_prompts=3)
    for prompts, message in ((0, "at least one is needed"), (-1, "at least 0"), ("a star", "got one text: 'a star'")):
        with pytest.raises(InputError, match=message):
            train("grpo", pipeline("ddim"), tmp_path, BASE, train_prompts=prompts)
    with pytest.raises(InputError, match="DDIMPipeline makes arrays of its images"):
        train("reward-backprop", pipeline("ddim"), tmp_path, BASE, train_prompts=1)
    with pytest.raises(InputError, match="no layer named to_x: give lora_target_modules"):
        train("grpo", pipeline("ddim"), tmp_path, replace(BASE, lora_target_modules=("to_x",)), train_prompts=1)


def near(
    images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
) -> tuple[Tensor, dict[str, Any]]:
    """Brightness times what the prompt's row says."""
    factors = torch.tensor([row["factor"] for row in metadata])
    assert [row["of"] for row in metadata] == list(prompts)
    return images.mean((1, 2, 3)).cpu() * factors, {}


def test_metadata_reaches_the_reward_of_a_training_and_of_its_evaluations(tmp_path: Path) -> None:
    config = replace(BASE, max_steps=1, call={"height": 8, "width": 8})

    def rows(*prompts: str) -> list[dict[str, Any]]:
        return [{"factor": 100.0, "of": prompt} for prompt in prompts]

    def named(images: Tensor, prompts: Sequence[str], metadata: Any) -> Any:
        return near(images, prompts, metadata)

    held_out = ["a star", "a cross"]
    with pytest.raises(InputError, match="metadata must be one mapping for each prompt, got 1 of them and 2 prompts"):
        train("grpo", sd(), tmp_path, config, near, train_prompts=[PROMPT, "a"], metadata=rows(PROMPT))
    with pytest.raises(InputError, match="metadata: prompt 'a' has two different rows"):
        train("grpo", sd(), tmp_path, config, near, train_prompts=["a", "a"], metadata=[{"k": 1}, {"k": 2}])
    given = {"train_prompts": [PROMPT, "a"], "eval_prompts": held_out, "eval_rewards": [named]}
    metadata = {"metadata": rows(PROMPT, "a"), "eval_metadata": rows(*held_out)}
    result = train("grpo", sd(), tmp_path, config, near, **given, **metadata)
    assert result.records[0]["reward"] > 5
    assert result.evaluations[0]["eval/near"] == result.evaluations[0]["eval/named"]
