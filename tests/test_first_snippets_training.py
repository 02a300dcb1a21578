"""The first lines of a TRL user, written without the documentation: they run."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub import ModelCard
from transformers import TrainerCallback

from steer import (
    MODELS,
    D3POConfig,
    D3POTrainer,
    GRPOConfig,
    GRPOTrainer,
    InputError,
    PRDPTrainer,
    TrainingConfig,
)

SMALL: dict[str, Any] = {
    "max_steps": 2,
    "train_batch_size": 1,
    "num_generations": 2,
    "num_inference_steps": 2,
    "guidance_scale": 1.0,
    "lora_rank": 2,
    "learning_rate": 1e-2,
    "eval_steps": 2,
}


def scenes() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(MODELS["scenes"])
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Listener(TrainerCallback):
    """Keeps the events; stops the training after update `stop_at`."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.events: list[str] = []
        self.logs: list[dict[str, Any]] = []
        self.stop_at = stop_at

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append("on_train_begin")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self.events.append(f"on_step_end {state.global_step} of {state.max_steps}")
        control.should_training_stop = state.global_step == self.stop_at
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(logs)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.events.append(f"on_evaluate {metrics['step']}")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append("on_save")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append("on_train_end")


def test_a_grpo_trainer_trains_calls_back_and_saves_a_lora_that_diffusers_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = Listener()
    trainer = GRPOTrainer(
        scenes(),
        "brightness",
        config=GRPOConfig(output_dir=str(tmp_path / "run"), clip=1e-3, **SMALL),
        train_prompts=["a red circle", "a blue star"],
        eval_prompts=["a green square"],
        eval_rewards=["colour:red"],
        callbacks=[listener],
    )
    with pytest.raises(InputError, match="nothing is trained yet: call train"):
        trainer.save_pretrained(tmp_path / "lora")
    result = trainer.train()
    assert result.step == 2 and [logs["step"] for logs in listener.logs] == [1, 2]
    assert listener.events[0] == "on_train_begin" and listener.events[-1] == "on_train_end"
    assert {"on_step_end 2 of 2", "on_evaluate 0", "on_evaluate 2", "on_save"} <= set(listener.events)

    trainer.save_pretrained(tmp_path / "lora")
    pipe, call = scenes(), {"num_inference_steps": 2, "output_type": "pt"}
    images = [one("a star", generator=torch.manual_seed(0), **call).images for one in (pipe, trainer.pipe)]
    pipe.load_lora_weights(tmp_path / "lora")
    loaded = pipe("a star", generator=torch.manual_seed(0), **call).images
    assert (loaded - images[1]).abs().max() < 1e-5 < (loaded - images[0]).abs().max()
    card = ModelCard.load(tmp_path / "lora" / "README.md")
    assert card.data.base_model == "scenes" and "grpo" in (card.data.tags or [])
    assert {one.metric_name for one in card.data.eval_results or []} == {"brightness", "colour:red"}
    assert "- clip: 0.001" in card.text and "load_lora_weights(run, weight_name=" in card.text

    uploaded: dict[str, list[str]] = {}

    def upload(self: Any, repo_id: str, folder_path: str, **given: Any) -> None:
        uploaded[repo_id] = sorted(path.name for path in Path(folder_path).iterdir())

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, repo_id, **given: f"hub/{repo_id}")
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    assert trainer.push_to_hub("me/bright") == "hub/me/bright"
    assert uploaded == {"me/bright": ["README.md", "pytorch_lora_weights.safetensors"]}


def test_a_trainer_takes_a_plain_training_config_and_a_function_as_reward(tmp_path: Path) -> None:
    def redness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return images[:, 0].mean((1, 2))

    config = TrainingConfig(output_dir=str(tmp_path), **SMALL | {"max_steps": 5})
    trainer = PRDPTrainer(scenes(), redness, config, train_prompts=["a red circle"], callbacks=[Listener(stop_at=1)])
    assert trainer.config.beta == 0.1, "the option of the method is at its default"
    result = trainer.train()
    assert result.step == 1 and result.stopped == "a callback asked for it"
    again = PRDPTrainer(scenes(), redness, config, train_prompts=["a red circle"])
    assert again.train(resume_from_checkpoint=True).step == 5


def test_the_config_of_another_method_is_refused() -> None:
    with pytest.raises(InputError, match="config must be a D3POConfig or a TrainingConfig, got GRPOConfig"):
        D3POTrainer(None, "brightness", GRPOConfig())
    with pytest.raises(InputError, match="num_generations must be at least 2, got 1: D3PO compares the samples"):
        D3POConfig(num_generations=1)
